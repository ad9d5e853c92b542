"""Servers, and proxies before them, that write what no Ollama does."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from lbcore.events import Reason
from lbcore.ollama import MODEL_CHARS_MAX
from tests.lbio import kit
from tests.lbio.kit import NDJSON, Rig, Scripted, chunked, line, scripted
from tests.simulator.wire import Answer, chat

pytestmark = pytest.mark.anyio

CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
LAST_CHUNK = b"0\r\n\r\n"
DEEP = b"[" * 100_000 + b"]" * 100_000
ALONE: dict[str, Any] = {"race": {"racers_max": 1}, "timeouts": {"silence": "300ms"}, "probe": {"interval": "60s"}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_internal_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.ERROR, "ollama_lb"):
        yield
    assert [message for message in caplog.messages if "internal error" in message] == []


# --- probes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), [
    ("/api/tags", b'{"models":[{"name":"m","a":%s}]}' % DEEP), ("/api/tags", b'{"a":%s}' % DEEP),
    ("/api/version", b'{"a":%s,"version":"1"}' % DEEP), ("/api/tags", b'{"models":[{"name":"m","x":"\xff"}]}'),
    ("/api/ps", b'{"models":[{"name":"m","x":"\xff"}]}'),
])  # fmt: skip
async def test_what_no_ollama_answers_to_a_probe_is_said_so(
    path: str, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kit.PROBES, path, body)
    async with scripted() as (rig, _):
        server = rig.server("s0")
        assert not server.is_alive
        assert server.last_error.startswith(Reason.GARBAGE)
        assert "not what an Ollama answers" in server.last_error


async def test_a_version_of_thousands_of_digits_is_one_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kit.PROBES, "/api/version", b'{"version":"%s"}' % (b"9" * 5000))
    async with scripted() as (rig, _):
        assert (await rig.ask("GET", "/api/version")).status == 200


async def test_a_model_with_a_name_too_long_to_be_asked_for_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = b'{"models":[{"name":"%s"},{"name":"tiny:latest"}]}' % (b"x" * (MODEL_CHARS_MAX + 1))
    monkeypatch.setitem(kit.PROBES, "/api/tags", listed)
    monkeypatch.setitem(kit.PROBES, "/api/ps", listed)
    async with scripted() as (rig, _):
        assert rig.server("s0").is_alive
        assert list(rig.server("s0").models) == ["tiny:latest"]


@pytest.mark.parametrize("number", [b"9" * 6000, b"1e999"])
async def test_a_model_that_cannot_be_written_again_is_listed_but_its_alias_is_not(
    number: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = b'{"models":[{"name":"tiny:latest","size":%s}]}' % number
    monkeypatch.setitem(kit.PROBES, "/api/tags", listed)
    async with scripted(alias={"small": "tiny"}) as (rig, _):
        assert (await rig.ask("GET", "/api/tags")).body == listed


# --- the end of a stream ---------------------------------------------------------------------------------------


async def answered(rig: Rig, server: Scripted, pieces: Sequence[bytes], path: str = "/api/chat") -> Answer:
    """Ask once; the server writes the pieces and closes."""
    server.pieces, server.close, server.pause_s = pieces, True, 0.01
    return await rig.ask("POST", path, {**chat(), "max_tokens": 9, "stream": True})


async def test_a_line_nested_too_deeply_to_be_read_is_passed_on() -> None:
    deep = b'{"error":%s}\n' % DEEP
    async with scripted(**ALONE) as (rig, (server,)):
        stream = [line("one"), deep, line("", done=True)]
        answer = await answered(rig, server, [NDJSON + CHUNKED + chunked(stream)])
    assert answer.complete
    assert answer.body == b"".join(stream)


@pytest.mark.parametrize("at", [1000, 90], ids=["before the commit", "after it"])
async def test_a_stream_that_said_it_is_complete_is_so_without_its_last_chunk(at: int) -> None:
    stream = [line("one"), line("", done=True)]
    cut = chunked(stream).removesuffix(LAST_CHUNK)
    async with scripted(**ALONE) as (rig, (server,)):
        before = rig.healths()["s0"]
        answer = await answered(rig, server, [NDJSON + CHUNKED + cut[:at], cut[at:]])
        assert (answer.complete, answer.body) == (True, b"".join(stream))
        assert rig.healths()["s0"] > before


async def test_a_server_that_keeps_the_last_chunk_back_adds_no_error_to_a_complete_answer() -> None:
    stream = [line("one"), line("", done=True)]
    async with scripted(**ALONE) as (rig, (server,)):
        server.pieces, server.pause_s = [NDJSON + CHUNKED + chunked(stream).removesuffix(LAST_CHUNK), b""], 30
        answer = await rig.chat()
    assert (answer.complete, answer.body) == (True, b"".join(stream))


async def test_a_stream_cut_before_its_end_still_gets_its_error() -> None:
    cut = chunked([line("one")]).removesuffix(LAST_CHUNK)
    async with scripted(**ALONE) as (rig, (server,)):
        answer = await answered(rig, server, [NDJSON + CHUNKED + cut])
    assert "error" in answer.lines[-1]


EVENTS = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\ndata: [DONE]\n\n'
MESSAGES = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)


@pytest.mark.parametrize(("path", "events"), [("/v1/chat/completions", EVENTS), ("/v1/messages", MESSAGES)])
@pytest.mark.parametrize("write", [
    lambda data: data.replace(b"\n", b"\r\n"), lambda data: data.replace(b": {", b":{").replace(b": [", b":["),
    lambda data: data.replace(b"event: ", b"event:").replace(b"data: ", b"data:"), lambda data: data[:-1],
    lambda data: data[:-2], lambda data: b": ping\r\n\r\n" + data.replace(b"\n", b"\r\n")[:-2],
], ids=["crlf", "data without a blank", "no blanks", "one newline", "no newline", "crlf with one newline"])  # fmt: skip
@pytest.mark.parametrize("last", [LAST_CHUNK, None], ids=["chunked", "until close"])
async def test_server_sent_events_are_read_however_they_are_written(
    path: str, events: bytes, write: Callable[[bytes], bytes], last: bytes | None
) -> None:
    data = write(events)
    raw = SSE + CHUNKED + chunked([data]) if last else SSE + b"\r\n" + data
    async with scripted(**ALONE) as (rig, (server,)):
        before = rig.healths()["s0"]
        answer = await answered(rig, server, [raw], path)
        assert (answer.status, answer.complete, answer.body) == (200, True, data)
        assert rig.healths()["s0"] > before


async def test_the_last_line_of_a_stream_may_lack_its_newline() -> None:
    stream = [line("one"), line("", done=True)[:-1]]
    async with scripted(**ALONE) as (rig, (server,)):
        answer = await answered(rig, server, [NDJSON + CHUNKED + chunked(stream)])
    assert (answer.status, answer.body) == (200, b"".join(stream))
