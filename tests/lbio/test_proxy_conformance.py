"""Each recorded request through the balancer in front of one fake gets the answer that was recorded."""

import dataclasses
import json

import anyio
import pytest

from simulator.faults import FaultKind
from tests.lbio.kit import LIMIT_S, Rig, balanced
from tests.simulator.test_captures import (
    BEFORE,
    FREE_HEADERS,
    NAMES,
    SAME_BODY,
    SPECS,
    WARM,
    masked,
    ordered,
    record_shape,
    shape,
    squeezed,
)
from tests.simulator.wire import Answer, Capture, exchange, load, parse

pytestmark = pytest.mark.anyio

HOP_BY_HOP = {"Connection", "Transfer-Encoding", "Keep-Alive"}
BROKEN = {  # ends silently with Ollama, with an error here: see test_proxy_failures
    "chat_sigterm_midstream",
    "v1_chat_runner_killed_midstream",
    "v1_messages_runner_killed_midstream",
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def headers(answer: Answer) -> list[tuple[str, str]]:
    """Names and values that must be the same."""
    dropped = HOP_BY_HOP | {"Date"}
    kept = [pair for pair in answer.headers if pair[0] not in dropped and not pair[0].startswith("X-Ollama-LB-")]
    return sorted((name, "" if name in FREE_HEADERS else value) for name, value in kept)


def check_same(ours: Answer, theirs: Answer, name: str) -> None:
    assert ours.status_line == theirs.status_line
    assert headers(ours) == headers(theirs)
    assert ours.complete == theirs.complete
    assert (ours.chunks is None) == (theirs.chunks is None)
    if name in SAME_BODY or theirs.status >= 400:
        assert masked(ours.body) == masked(theirs.body)
    if theirs.chunks is not None:
        assert ours.chunks is not None
        assert all(chunk.endswith(b"\n") for chunk in ours.chunks) == theirs.body.endswith(b"\n")
        assert ordered(records(ours.body)) == ordered(records(theirs.body))
    elif theirs.body[:1] == b"{":
        assert ordered(shape(json.loads(ours.body))) == ordered(shape(json.loads(theirs.body)))
        assert ours.body.endswith(b"\n") == theirs.body.endswith(b"\n")
    else:
        assert ours.body == theirs.body


def records(body: bytes) -> list[object]:
    """The shapes of the lines of NDJSON, or of the events of SSE."""
    events = body.decode().split("\n\n" if body.startswith((b"data:", b"event:")) else "\n")
    return squeezed([[record_shape(record) for record in event.split("\n")] for event in events])


async def answer_to(rig: Rig, capture: Capture) -> bytes:
    if capture.name != "chat_server_busy":
        return await rig.exchange([capture.request])
    async with anyio.create_task_group() as group:  # one loads, one fills the server's queue
        for _ in range(2):
            group.start_soon(exchange, rig.fleet[0].url, capture.request)
            await anyio.sleep(0.02)
        raw = await rig.exchange([capture.request])
        group.cancel_scope.cancel()
    return raw


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BROKEN])
async def test_same_as_recorded(name: str) -> None:
    capture = load(name)
    method = capture.head.split()[0]
    async with balanced([SPECS.get(name, WARM)]) as rig:
        for asked_method, path, body in BEFORE.get(name, []):
            assert (await rig.ask(asked_method, path, body)).status in {200, 201}
        if BEFORE.get(name):
            assert (await rig.ask("POST", "/sync_servers")).status == 200
        raw = await answer_to(rig, capture)
    check_same(parse(raw, method), parse(capture.response, method), name)


async def test_a_stream_comes_line_by_line() -> None:
    capture = load("chat_stream_warm")
    slow = dataclasses.replace(WARM, token_ms=25)
    with anyio.fail_after(LIMIT_S):
        async with balanced([slow]) as rig:
            ours = parse(await rig.exchange([capture.request]))
    assert ours.chunks is not None
    n_lines = [chunk.count(b"\n") for chunk in ours.chunks]
    assert n_lines[:-1] == [1] * (len(n_lines) - 1)  # the last token and the terminator are written together
    assert sum(n_lines) == len(parse(capture.response).lines)


async def test_every_broken_stream_of_the_recordings_is_of_a_kind_that_the_fakes_know() -> None:
    broken = {spec.faults[0].kind for spec in SPECS.values() if spec.faults}
    assert broken == {FaultKind.ERROR_MIDSTREAM, FaultKind.CUT_MIDSTREAM}
