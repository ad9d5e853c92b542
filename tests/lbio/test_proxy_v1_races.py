"""The paths of OpenAI and Anthropic are raced: what a first token is in each, who wins, what a break says."""

import json
from typing import Any

import pytest

from lbcore.config import Winner
from simulator.faults import BREAKS, Fault, FaultKind
from tests.lbio.kit import Rig, balanced, chunked, scripted, specs
from tests.lbio.sockets_kit import until
from tests.simulator.wire import Answer, chat

pytestmark = pytest.mark.anyio

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
PATHS = [CHAT, TEXT, RESPONSES, MESSAGES]
ENDS = {
    CHAT: b"data: [DONE]\n\n",
    TEXT: b"data: [DONE]\n\n",
    RESPONSES: b'"type":"response.completed"}\n\n',
    MESSAGES: b'data: {"type":"message_stop"}\n\n',
}
ALONE: dict[str, Any] = {"race": {"racers_max": 1, "hedges_max": 0}, "health": {"resurrect": 0.0}}
BOTH: dict[str, Any] = {"race": {"racers_min": 2, "utilisation_max": 1.0, "budget": 3.0, "hedges_max": 0}}
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def asked(path: str, *, stream: bool) -> dict[str, Any]:
    """A request that each of the paths understands."""
    return chat(prompt="hello", input="hello", max_tokens=6, stream=stream)


async def ask(rig: Rig, path: str, *, stream: bool) -> Answer:
    return await rig.ask("POST", path, asked(path, stream=stream))


def by(answer: Answer) -> str:
    return answer.header("X-Ollama-LB-Server") or ""


def is_whole(answer: Answer, path: str, *, stream: bool) -> bool:
    return answer.status == 200 and answer.complete and answer.body.endswith(ENDS[path] if stream else b"}\n")


# --- the race ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
async def test_the_quickest_server_wins_and_the_other_is_let_go(path: str, stream: bool) -> None:
    slow = specs("slow", first_token_ms=2000)
    async with balanced([*slow, *specs("quick")]) as rig:  # by default
        answer = await ask(rig, path, stream=stream)
        assert is_whole(answer, path, stream=stream)
        assert by(answer) == "quick"
        assert answer.header("X-Ollama-LB-Attempts") == "2"
        await until(lambda: rig.fleet[0].stats.aborted == 1)
        assert rig.fleet[0].stats.requests[path] == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
async def test_a_racer_that_fails_does_not_win(path: str, stream: bool) -> None:
    async with balanced([*specs("bad"), *specs("good", first_token_ms=50)], **BOTH) as rig:
        rig.fleet[0].set_fault(Fault(FaultKind.ERROR_500))
        answer = await ask(rig, path, stream=stream)
        assert is_whole(answer, path, stream=stream)
        assert by(answer) == "good"
        assert rig.fleet[0].stats.requests[path] == 1


@pytest.mark.parametrize("kind", [FaultKind.ERROR_500, FaultKind.RESET, FaultKind.BUSY_503])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
async def test_an_error_before_the_first_token_goes_to_the_next_server(
    path: str, stream: bool, kind: FaultKind
) -> None:
    async with balanced(specs("bad", "good"), **ALONE) as rig:
        rig.fleet[0].set_fault(Fault(kind))
        for _ in range(8):
            answer = await ask(rig, path, stream=stream)
            assert is_whole(answer, path, stream=stream)
            assert by(answer) == "good"
            if rig.server("bad").last_error or rig.fleet[0].stats.requests[path]:
                return
    pytest.fail("no request went to the bad server")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
async def test_a_hedge_is_made_where_that_is_configured(path: str, stream: bool) -> None:
    soon = {"hedge_delay_min": "20ms", "hedge_delay_initial": "20ms", "hedge_delay_max": "50ms"}
    slow = specs("slow", first_token_ms=2000)
    async with balanced([*slow, *specs("other")], routes={path: "hedge"}, race=soon) as rig:
        for _ in range(8):
            answer = await ask(rig, path, stream=stream)
            assert is_whole(answer, path, stream=stream)
            assert by(answer) == "other"
            if answer.header("X-Ollama-LB-Attempts") == "2":
                return
    pytest.fail("no request went to the slow server first")


@pytest.mark.parametrize("winner", Winner)
@pytest.mark.parametrize("path", PATHS)
async def test_an_answer_is_whole_whoever_wins(path: str, winner: Winner) -> None:
    race = {**BOTH["race"], "winner": winner, "measure": "30ms"}
    async with balanced(specs("a", "b", token_ms=10), race=race) as rig:
        answer = await ask(rig, path, stream=True)
    assert is_whole(answer, path, stream=True)
    assert answer.body.count(ENDS[path]) == 1


# --- the first token -----------------------------------------------------------------------------------------------


def event(kind: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), json.dumps({"type": kind, **fields}).encode())


def delta(**fields: Any) -> bytes:
    chunk = {"model": "tiny", "choices": [{"index": 0, "delta": fields, "finish_reason": None}]}
    return b"data: %s\n\n" % json.dumps(chunk).encode()


def text(said: str) -> bytes:
    return b"data: %s\n\n" % json.dumps({"choices": [{"text": said, "index": 0, "finish_reason": None}]}).encode()


PRELUDES: dict[str, bytes] = {
    CHAT: b": thinking\n\n" + delta(role="assistant") + delta(role="assistant", content="") + delta(content=None),
    TEXT: b": thinking\n\n" + text(""),
    RESPONSES: event("response.created", response={})
    + event("response.in_progress", response={})
    + event("response.output_item.added", item={})
    + event("response.content_part.added", part={"text": ""}),
    MESSAGES: event("message_start", message={}) + event("content_block_start", index=0) + event("ping"),
}
TOKENS: dict[str, bytes] = {
    CHAT: delta(content="x"),
    TEXT: text("x"),
    RESPONSES: event("response.output_text.delta", delta="x"),
    MESSAGES: event("content_block_delta", index=0, delta={"type": "text_delta", "text": "x"}),
}
LASTS: dict[str, bytes] = {
    CHAT: b"data: [DONE]\n\n",
    TEXT: b"data: [DONE]\n\n",
    RESPONSES: event("response.completed", response={}),
    MESSAGES: event("message_stop"),
}


def piece(data: bytes) -> bytes:
    return chunked([data]).removesuffix(b"0\r\n\r\n")


@pytest.mark.parametrize("path", PATHS)
async def test_what_comes_before_the_first_token_wins_no_race(path: str) -> None:
    async with scripted(2, **BOTH) as (rig, (talker, doer)):
        prelude, rest = SSE + piece(PRELUDES[path]), chunked([TOKENS[path], LASTS[path]])
        talker.pieces, talker.pause_s = [prelude, b"", rest], 0.4  # it speaks at once, and says nothing
        doer.pieces, doer.pause_s = [b"", prelude, rest], 0.05
        answer = await ask(rig, path, stream=True)
    assert by(answer) == "s1"
    assert answer.body == PRELUDES[path] + TOKENS[path] + LASTS[path], "and nothing of it is lost, nor the other's sent"


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_that_breaks_before_its_first_token_goes_to_the_next_server(path: str) -> None:
    async with scripted(2, **ALONE) as (rig, servers):
        for server in servers:
            server.pieces = [SSE + chunked([PRELUDES[path], TOKENS[path], LASTS[path]])]
        servers[0].pieces = [SSE + chunked([PRELUDES[path]])]  # a clean end without the terminator
        for _ in range(8):
            answer = await ask(rig, path, stream=True)
            assert by(answer) == "s1"
            assert answer.body == PRELUDES[path] + TOKENS[path] + LASTS[path]
            if servers[0].heads:
                return
    pytest.fail("no request went to the server that breaks")


@pytest.mark.parametrize(
    "said",
    [
        delta(role="assistant", content="", reasoning="hm"),
        delta(content="", tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]),
        delta(refusal="no"),
        delta(reasoning_details=[{"text": "hm"}]),
    ],
    ids=["thought", "call", "refusal", "unknown"],
)
async def test_a_thought_and_a_call_are_first_tokens_too(said: bytes) -> None:
    async with scripted(2, **BOTH) as (rig, (thinker, other)):
        thinker.pieces, thinker.pause_s = [SSE + piece(said), chunked([LASTS[CHAT]])], 0.1
        other.pieces, other.pause_s = [b"", SSE + chunked([TOKENS[CHAT], LASTS[CHAT]])], 1.0
        answer = await ask(rig, CHAT, stream=True)
    assert by(answer) == "s0"


@pytest.mark.parametrize("path", PATHS)
async def test_an_answer_that_ends_well_without_a_token_is_one(path: str) -> None:
    async with scripted(**ALONE) as (rig, (server,)):
        server.pieces = [SSE + chunked([PRELUDES[path], LASTS[path]])]
        answer = await ask(rig, path, stream=True)
    assert answer.complete
    assert answer.body == PRELUDES[path] + LASTS[path]


# --- a break after the first token ---------------------------------------------------------------------------------

SHORT: dict[str, Any] = {"timeouts": {"silence": "100ms"}}
OPENAI_ERROR = {"message", "type", "param", "code"}


def last_event(answer: Answer) -> tuple[str, Any]:
    """Name and data of the last event."""
    lines = answer.body.decode().split("\n\n")[-2].split("\n")
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    (data,) = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return "".join(names), json.loads(data)


@pytest.mark.parametrize("kind", sorted(BREAKS))
@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_that_breaks_ends_with_an_error_in_the_shape_of_its_path(path: str, kind: FaultKind) -> None:
    async with balanced(specs("a", "b", token_ms=5), **BOTH, **SHORT) as rig:
        for fake in rig.fleet:
            fake.set_fault(Fault(kind, after_tokens=3))
        answer = await ask(rig, path, stream=True)
    assert (answer.status, answer.complete) == (200, True)
    assert ENDS[path] not in answer.body
    name, data = last_event(answer)
    if path == MESSAGES:
        assert (name, data["type"], set(data["error"])) == ("error", "error", {"type", "message"})
    elif path == RESPONSES:
        assert (name, data["type"], set(data["error"])) == ("error", "error", OPENAI_ERROR)
    else:
        assert (name, set(data), set(data["error"])) == ("", {"error"}, OPENAI_ERROR)


@pytest.mark.parametrize("kind", [FaultKind.CUT_MIDSTREAM, FaultKind.ERROR_MIDSTREAM])
@pytest.mark.parametrize("path", PATHS)
async def test_a_single_answer_that_breaks_is_made_by_the_next_server(path: str, kind: FaultKind) -> None:
    async with balanced(specs("bad", "good"), **ALONE) as rig:
        rig.fleet[0].set_fault(Fault(kind, after_tokens=3))
        for _ in range(8):
            answer = await ask(rig, path, stream=False)
            assert is_whole(answer, path, stream=False)
            assert by(answer) == "good"
            if rig.fleet[0].stats.requests[path]:
                return
    pytest.fail("no request went to the bad server")


@pytest.mark.parametrize("path", PATHS)
async def test_when_all_fail_the_error_is_in_the_shape_of_the_path(path: str) -> None:
    async with balanced(specs("a", "b"), **BOTH) as rig:
        for fake in rig.fleet:
            fake.set_fault(Fault(FaultKind.RESET))
        answer = await ask(rig, path, stream=True)
    assert answer.status == 502
    error = json.loads(answer.body)["error"]
    assert set(error) == ({"type", "message"} if path == MESSAGES else OPENAI_ERROR)
    assert all(name in error["message"] for name in ("a: ", "b: "))
