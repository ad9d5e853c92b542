"""The fake answers each recorded request as the real Ollama did."""

import dataclasses
import json
import re
from hashlib import sha256
from typing import Any

import anyio
import pytest

from simulator.fake_ollama import FakeModel, FakeSpec
from simulator.faults import Fault, FaultKind
from simulator.serve import FakeServer, serve_fleet
from tests.simulator.wire import CAPTURES, Answer, Capture, ask, chat, exchange, load, parse, request

pytestmark = pytest.mark.anyio

TINY = FakeModel(
    name="tiny",
    digest="9c336ca999a70f74fa4d4c6bd1d7605ed1960dd9dab7290c2182e105a5bff684",
    size_bytes=17438409,
    family="llama",
    parameter_size="4.18M",
    quantization="unknown",
    context_length=4096,
    embedding_length=64,
    num_ctx=512,
    modified_at="2026-11-23T21:57:00.26805652Z",
)
WARM = FakeSpec(
    "real",
    models=(TINY,),
    start_loaded=("tiny",),
    vram_bytes=0,
    first_token_ms=1,
    token_ms=0.2,
    load_ms=5,
    version="0.0.0",
)
COLD = dataclasses.replace(WARM, start_loaded=())


def broken(kind: FaultKind) -> FakeSpec:
    return dataclasses.replace(WARM, faults=(Fault(kind, after_tokens=7),))


SPECS = {
    "chat_stream_cold": COLD,
    "ps_empty": COLD,
    "unload": COLD,
    "chat_runner_killed_midstream": broken(FaultKind.ERROR_MIDSTREAM),
    "v1_chat_runner_killed_midstream": broken(FaultKind.ERROR_MIDSTREAM),
    "v1_messages_runner_killed_midstream": broken(FaultKind.ERROR_MIDSTREAM),
    "chat_sigterm_midstream": broken(FaultKind.CUT_MIDSTREAM),
    "chat_server_busy": dataclasses.replace(COLD, max_queue=1, load_ms=100_000),
}
# What else must have been asked before, as when it was recorded.
BEFORE: dict[str, list[tuple[str, str, object]]] = {
    "tags_two": [("POST", "/api/copy", {"source": "tiny", "destination": "tiny2"})],
    "delete": [("POST", "/api/copy", {"source": "tiny", "destination": "tiny2"})],
    "delete_tiny3": [("POST", "/api/copy", {"source": "tiny", "destination": "tiny3"})],
    "blob_head_present": [("POST", f"/api/blobs/sha256:{sha256(b'hello blob').hexdigest()}", b"hello blob")],
    "ps_forever": [("POST", "/api/chat", {"model": "tiny", "messages": [], "keep_alive": -1})],
    "ps_after_num_ctx": [("POST", "/api/chat", chat(options={"num_ctx": 256, "num_predict": 1}))],
}
# Bodies that do not depend on time, chance or text: the same to the byte.
SAME_BODY = {
    *("root_get", "root_head", "version", "tags", "tags_head", "ps_empty", "chat_images"),
    *("pull_unreachable", "create_unknown_from", "push_unknown"),
    *("v1_models", "v1_model", "not_found", "foreign_host", "embed", "embeddings_old", "v1_embeddings"),
}
FREE_HEADERS = {"Date", "Content-Length"}
EXCEPTIONS = {  # name: why the fake gives another answer
    "chat_abort": "the client left in the middle: there is no end to compare",
    "chat_format_json": "its four tokens were blanks, which Ollama kept back; the fake's begin an object",
}
NAMES = sorted(path.stem for path in CAPTURES.glob("*.json") if path.stem not in EXCEPTIONS)


def shape(value: object) -> object:
    """Keys in order and types; a list is what different shapes it holds, in order of appearance."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return squeezed([shape(inner) for inner in value])
    return type(value).__name__


def squeezed(shapes: list[object]) -> list[object]:
    kept: list[object] = []
    for found in shapes:
        if not kept or kept[-1] != found:
            kept.append(found)
    return kept


def ordered(value: object) -> str:
    return json.dumps(value)  # dicts compare without order, their JSON does not


def record_shape(record: str) -> object:
    """A line of an SSE or NDJSON stream: its prefix and the shape of its JSON."""
    prefix, brace, rest = record.partition("{")
    return (prefix, shape(json.loads(brace + rest))) if brace else record


def chunk_shape(chunk: bytes) -> object:
    return [record_shape(line) for line in chunk.decode().split("\n")]


def masked(body: bytes) -> bytes:
    return re.sub(rb"ts=\d+", b"ts=", re.sub(rb"req_[0-9a-f]{24}", b"req_", body))


def check_same(ours: Answer, theirs: Answer, name: str) -> None:
    assert ours.status_line == theirs.status_line
    assert [header for header, _ in ours.headers] == [header for header, _ in theirs.headers]
    for (header, our_value), (_, their_value) in zip(ours.headers, theirs.headers, strict=True):
        assert header in FREE_HEADERS or our_value == their_value
    assert ours.complete == theirs.complete
    assert (ours.chunks is None) == (theirs.chunks is None)
    if name in SAME_BODY or theirs.status >= 400:
        assert masked(ours.body) == masked(theirs.body)
        assert name == "ps_forever" or ours.header("Content-Length") == theirs.header("Content-Length")
    if theirs.chunks is not None:
        assert ours.chunks is not None
        ours_shape = squeezed([chunk_shape(chunk) for chunk in ours.chunks])
        assert ordered(ours_shape) == ordered(squeezed([chunk_shape(chunk) for chunk in theirs.chunks]))
    elif theirs.body[:1] == b"{":
        assert ordered(shape(json.loads(ours.body))) == ordered(shape(json.loads(theirs.body)))
        assert ours.body.endswith(b"\n") == theirs.body.endswith(b"\n")
    else:
        assert ours.body == theirs.body


async def answer_to(server: FakeServer, capture: Capture) -> bytes:
    if capture.name != "chat_server_busy":
        return await exchange(server.url, capture.request)
    async with anyio.create_task_group() as group:
        for _ in range(2):  # one that loads, one that fills the queue
            group.start_soon(exchange, server.url, capture.request)
            await anyio.sleep(0.02)
        raw = await exchange(server.url, capture.request)
        group.cancel_scope.cancel()
    return raw


@pytest.mark.parametrize("name", NAMES)
async def test_same_as_recorded(name: str) -> None:
    capture = load(name)
    method = capture.head.split()[0]
    async with serve_fleet([SPECS.get(name, WARM)]) as (server,):
        for asked_method, path, body in BEFORE.get(name, []):
            assert (await ask(server.url, asked_method, path, body)).status in {200, 201}
        raw = await answer_to(server, capture)
    check_same(parse(raw, method), parse(capture.response, method), name)


def values(answer: Answer) -> dict[str, Any]:
    found = json.loads(answer.body)
    assert isinstance(found, dict)
    return found


LOADS = ["chat_load", "chat_load_keep_forever", "chat_unload", "unload", "generate_load", "generate_unload"]
STREAMS = [
    *("chat_stream_warm", "generate_stream", "v1_chat_stream", "v1_completions_stream", "v1_messages_stream"),
    "v1_responses_stream",
]


@pytest.mark.parametrize("name", LOADS)
async def test_load_and_unload_say_which(name: str) -> None:
    capture = load(name)
    async with serve_fleet([WARM]) as (server,):
        ours, theirs = values(parse(await exchange(server.url, capture.request))), values(parse(capture.response))
    assert {**ours, "created_at": ""} == {**theirs, "created_at": ""}


async def test_ps_values() -> None:
    theirs = values(parse(load("ps_loaded").response))["models"][0]
    async with serve_fleet([WARM]) as (server,):
        ours = values(await ask(server.url, "GET", "/api/ps"))["models"][0]
    free = {"expires_at": "", "size": 0}
    assert ours | free == theirs | free


async def test_the_prompt_as_rendered() -> None:
    capture = load("chat_debug_render")
    async with serve_fleet([WARM]) as (server,):
        ours = values(parse(await exchange(server.url, capture.request)))
    assert ours | {"created_at": ""} == values(parse(capture.response)) | {"created_at": ""}


async def test_prefill_echo() -> None:
    recorded = parse(load("chat_prefill").response)
    assert recorded.lines[0]["message"]["content"].startswith("I am")
    async with serve_fleet([WARM]) as (server,):
        ours = parse(await exchange(server.url, load("chat_prefill").request))
    assert ours.lines[0]["message"]["content"].startswith("I am")
    assert len(ours.lines) == len(recorded.lines)
    assert ours.lines[-1]["eval_count"] == recorded.lines[-1]["eval_count"]


@pytest.mark.parametrize("name", STREAMS)
async def test_as_many_chunks_as_recorded(name: str) -> None:
    capture = load(name)
    async with serve_fleet([WARM]) as (server,):
        ours = parse(await exchange(server.url, capture.request))
    theirs = parse(capture.response)
    assert ours.chunks is not None
    assert theirs.chunks is not None
    assert [chunk_shape(c) for c in ours.chunks] == [chunk_shape(c) for c in theirs.chunks]


async def test_keep_alive_connection_has_no_connection_header() -> None:
    async with serve_fleet([WARM]) as (server,):
        raw = await exchange(
            server.url, request("GET", "/api/version", close=False) + request("GET", "/api/version")
        )
    first, second = raw.split(b"}HTTP/1.1", 1)
    assert b"Connection" not in first
    assert b"Connection: close" in second
