"""Answers to `/api/show` are kept as long as the model is the same everywhere."""

import contextlib
import dataclasses

import anyio
import pytest

from lbio.answers.shows import ANSWER_BYTES_MAX, Shown, Shows
from lbio.http1 import Reader, parse_request_head
from lbio.wire.streams import SocketStream
from tests.lbio.kit import TINY, Rig, balanced, played, specs
from tests.simulator.wire import Answer, request

pytestmark = pytest.mark.anyio

TINY_A = dataclasses.replace(TINY, digest="a" * 64)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def n_asked(rig: Rig) -> int:
    return sum(fake.stats.requests["/api/show"] for fake in rig.fleet)


async def show(rig: Rig, **body: object) -> Answer:
    return await rig.ask("POST", "/api/show", body or {"model": "tiny"})


async def test_a_second_show_is_answered_without_a_server_and_is_the_same() -> None:
    async with balanced(specs("a", "b", models=(TINY_A,))) as rig:
        first, second = await show(rig), await show(rig)
        assert (first.status, first.body) == (200, second.body)
        assert first.header("Content-Type") == second.header("Content-Type")
        assert first.header("X-Ollama-LB-Server") == second.header("X-Ollama-LB-Server")
        assert n_asked(rig) == 1


async def test_what_is_asked_otherwise_is_asked_anew() -> None:
    async with balanced(specs("a", models=(TINY_A,))) as rig:
        for body in ({"model": "tiny"}, {"model": "tiny", "verbose": True}, {"name": "tiny"}):
            await show(rig, **body)
        assert n_asked(rig) == 3


async def test_a_model_that_has_changed_is_asked_for_anew() -> None:
    async with balanced(specs("a", "b", models=(TINY_A,))) as rig:
        await show(rig)
        for fake in rig.fleet:
            fake.live.fake.disk["tiny:latest"] = dataclasses.replace(TINY, digest="b" * 64)
        await rig.ask("POST", "/sync_servers")
        await show(rig)
        assert n_asked(rig) == 2


async def test_nothing_is_kept_of_a_model_that_is_not_the_same_everywhere() -> None:
    other = specs("b", models=(dataclasses.replace(TINY, digest="b" * 64),))
    async with balanced([*specs("a", models=(TINY_A,)), *other]) as rig:
        await show(rig)
        await show(rig)
        assert n_asked(rig) == 2


async def test_an_error_is_not_kept() -> None:
    async with balanced(specs("a", models=(TINY_A,))) as rig:
        for _ in range(2):
            assert (await show(rig, model="tiny", system=3)).status in {200, 400}
            assert (await show(rig, model="unknown")).status == 404
        assert not [key for key in rig.service.front.own.shows._kept if b"unknown" in key[1]]


async def test_a_server_that_is_named_is_asked_itself() -> None:
    async with balanced(specs("a", "b", models=(TINY_A,))) as rig:
        await show(rig)
        raw = request("POST", "/api/show", {"model": "tiny"})
        answer = await rig.send(raw.replace(b"\r\n\r\n", b"\r\nX-Ollama-LB-Server: b\r\n\r\n", 1))
        assert answer.header("X-Ollama-LB-Server") == "b"
        assert n_asked(rig) == 2


def test_what_was_not_used_for_longest_makes_room() -> None:
    shows = Shows(bytes_max=100)
    for name in ("x", "y"):
        shows.put((name, b"k"), Shown("a", b"", b"." * 40))
    assert shows.get(("x", b"k")) is not None
    shows.put(("z", b"k"), Shown("a", b"", b"." * 40))
    assert [shows.get((name, b"k")) is not None for name in "xyz"] == [True, False, True]


def test_what_is_very_long_is_not_kept() -> None:
    shows = Shows()
    shows.put(("x", b""), Shown("a", b"", bytes(ANSWER_BYTES_MAX + 1)))
    assert shows.get(("x", b"")) is None


async def test_a_compressed_answer_is_not_kept_since_nothing_would_say_that_it_is() -> None:
    body = b'{"modelfile":"x"}'
    async with played([Compressing(body)]) as (rig, (server,)):
        for n_asked in (1, 2):
            answer = await show(rig)
            assert answer.header("Content-Encoding") == "x-reversed"
            assert (answer.body, server.n_shows) == (body[::-1], n_asked)


class Compressing:
    """An Ollama behind a proxy that encodes whatever it is asked."""

    def __init__(self, body: bytes) -> None:
        self.url = ""
        self.n_shows = 0
        self._body = body

    async def serve(self, stream: SocketStream) -> None:
        reader = Reader(stream)
        listed = b'{"models":[{"name":"tiny:latest","digest":"d"}]}'
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while (raw := await reader.read_head(1 << 20, role="request")) is not None:
                head = parse_request_head(raw)
                await reader.read_body(head, None)
                body, coding = (b'{"version":"1"}' if head.path == "/api/version" else listed), b""
                if head.path == "/api/show":
                    self.n_shows += 1
                    body, coding = self._body[::-1], b"Content-Encoding: x-reversed\r\n"
                await stream.send(b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (coding, len(body), body))
        stream.close()
