"""Every recorded exchange, through the balancer before a server that answers as recorded: the same, byte for byte."""

import json
from collections.abc import Mapping

import anyio
import pytest

from lbio.http1 import Reader, parse_request_head
from lbio.wire.streams import SocketStream
from tests.lbio.kit import LIMIT_S, Client, Rig, client, played
from tests.lbio.sockets_kit import until
from tests.simulator.wire import CAPTURES, Answer, Capture, load, parse

pytestmark = pytest.mark.anyio

NAMES = sorted(path.stem for path in CAPTURES.glob("*.json"))
EXCEPTIONS: Mapping[str, str] = {  # name: why the answer is another one, and what it is then
    "chat_sigterm_midstream": "broken inside the chunked body: here the body ends, after an error line",
    "v1_chat_runner_killed_midstream": "ends as if all were well, only without [DONE]: here with an error",
    "v1_messages_runner_killed_midstream": "ends as if all were well, only without message_stop: here with an error",
    "chat_abort": "the client leaves in the middle: there is no end to compare",
}
MASKED: Mapping[str, str] = {"v1_messages_unknown": "who has no such model is known here, so the request_id is ours"}
OURS = {"X-Ollama-LB-Server", "X-Ollama-LB-Request-Id", "X-Ollama-LB-Attempts"}
LISTS = {"/api/ps": "ps_loaded", "/api/version": "version"}
HOP_BY_HOP = {"Connection", "Transfer-Encoding", "Keep-Alive"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def body_of(name: str) -> bytes:
    return parse(load(name).response).body


class Recorded:
    """Answers one request as it was recorded, and probes as the recorded server did at that time."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.url = ""
        self.n_asked = 0
        self.left = False  # the balancer has closed before the end of the answer
        method, path, _ = capture.head.split(" ", 2)
        self.asked = (method, path)
        self.lists = {path: body_of(name) for path, name in LISTS.items()} | {"/api/tags": models_of(capture)}
        answer = parse(capture.response, method)
        if path in self.lists and method == "GET" and answer.status == 200:
            self.lists[path] = answer.body

    async def serve(self, stream: SocketStream) -> None:
        reader = Reader(stream)
        try:
            while (raw := await reader.read_head(1 << 20, role="request")) is not None:
                head = parse_request_head(raw)
                await reader.read_body(head, None)
                if head.method == "GET" and head.path in self.lists:
                    body = self.lists[head.path]
                    await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                    continue
                assert (head.method, head.path) == self.asked
                self.n_asked += 1
                await stream.send(self.capture.response)
                if self.capture.name == "chat_abort":
                    await stream.receive()
                break
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            self.left = True
        finally:
            stream.close()


def models_of(capture: Capture) -> bytes:
    """What the server had when it was asked: a second model, where the request is about one."""
    body = json.loads(capture.body) if capture.body and capture.body[:1] == "{" and capture.body[-1:] == "}" else {}
    if body.get("model") in {"tiny2", "tiny3"}:
        return body_of("tags_two").replace(b"tiny2", body["model"].encode())
    return body_of("tags")


def headers(answer: Answer) -> list[tuple[str, str]]:
    return sorted(pair for pair in answer.headers if pair[0] not in HOP_BY_HOP | OURS | {"Date"})


async def answer_to(rig: Rig, capture: Capture) -> Answer:
    return parse(await rig.exchange([capture.request]), capture.head.split()[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXCEPTIONS])
async def test_the_answer_is_the_recorded_one(name: str) -> None:
    capture = load(name)
    theirs = parse(capture.response, capture.head.split()[0])
    async with played([Recorded(capture)]) as (rig, _):
        ours = await answer_to(rig, capture)
    assert ours.status_line == theirs.status_line
    assert headers(ours) == headers(theirs)
    assert ours.complete == theirs.complete
    assert (ours.chunks is None) == (theirs.chunks is None)
    if name in MASKED:
        assert error_of(ours) == error_of(theirs)
    else:
        assert ours.body == theirs.body


def error_of(answer: Answer) -> object:
    found = json.loads(answer.body)
    return {**found, "request_id": ""}


@pytest.mark.parametrize("name", [name for name in EXCEPTIONS if name.endswith("midstream")])
async def test_a_broken_stream_is_the_recorded_one_with_an_error_at_its_end(name: str) -> None:
    capture = load(name)
    theirs = parse(capture.response)
    async with played([Recorded(capture)]) as (rig, _):
        ours = await answer_to(rig, capture)
    assert ours.status_line == theirs.status_line
    assert headers(ours) == headers(theirs)
    assert ours.complete
    assert ours.body.startswith(theirs.body)
    assert b'"error":' in ours.body.removeprefix(theirs.body)
    assert ours.body.endswith(b"\n")


async def test_a_client_that_leaves_has_had_the_recorded_beginning_and_the_server_is_left_too() -> None:
    capture = load("chat_abort")
    theirs = parse(capture.response)
    recorded = Recorded(capture)
    async with played([recorded]) as (rig, _), client(rig) as asking:
        await asking.send(capture.request)
        got = await beginning(asking, len(theirs.body))
        assert got == theirs.body
        await asking.stream.aclose()
        await until(lambda: recorded.left)


async def beginning(asking: Client, n_bytes: int) -> bytes:
    """Read an answer until so much of its body is there."""
    data = b""
    with anyio.fail_after(LIMIT_S):
        while b"\r\n\r\n" not in data or len(parse(data).body) < n_bytes:
            data += await asking.stream.receive()
    return parse(data).body


def test_every_exception_is_one_of_the_recordings_and_has_its_reason() -> None:
    assert {*EXCEPTIONS, *MASKED} <= set(NAMES)
    assert all({**EXCEPTIONS, **MASKED}.values())
