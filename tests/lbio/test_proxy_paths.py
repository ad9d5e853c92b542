"""Each path over several servers: what goes on untouched, who is asked, and what one server's own answers are."""

import json
import tracemalloc
from typing import Any

import pytest

from lbcore.ollama import find_route
from lbio.wire.bodies import read_facts
from simulator.fake_ollama import FakeModel
from simulator.faults import Fault, FaultKind
from tests.lbio.kit import balanced, scripted, specs
from tests.simulator.wire import Answer, ask, request

pytestmark = pytest.mark.anyio

ALONE: dict[str, Any] = {"race": {"racers_max": 1, "hedges_max": 0}, "health": {"resurrect": 0.0}}
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
OK = [JSON + b"Content-Length: 3\r\n\r\n{}\n"]
BROKEN = [b'HTTP/1.1 500 Internal Server Error\r\nContent-Length: 16\r\n\r\n{"error":"boom"}']
GENERATING = [
    *("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
    *("/api/embed", "/api/embeddings", "/v1/embeddings"),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def by(answer: Answer) -> str:
    return answer.header("X-Ollama-LB-Server") or ""


ODD = (
    b'{ "model" : "tiny",\t"stream":false,"messages":[{"role":"user","content":"\\u00e9\\ud83d\\ude42 \xc3\xa9",'
    b'"images":["aGk="],"content":"twice"}],"prompt":"x","input":["a","b"],\r\n"tools":[{"type":"function","function":'
    b'{"name":"f","parameters":{}}}],"think":"high","format":{"type":"object"},"logprobs":true,"top_logprobs":2,'
    b'"keep_alive":"5m0s","options":{"num_ctx":1e3,"temperature":0.10,"seed":-1},"max_tokens":9,"unknown":[1.0]}  \n'
)


@pytest.mark.parametrize("path", GENERATING)
async def test_a_body_reaches_each_server_byte_for_byte(path: str) -> None:
    async with scripted(2, **ALONE) as (rig, servers):
        for server in servers:
            server.pieces = BROKEN
        await rig.ask("POST", path, ODD)
        assert [server.bodies for server in servers] == [[ODD]] * 2


@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings", "/v1/embeddings"])
async def test_embeddings_are_made_by_the_next_server_if_one_fails(path: str) -> None:
    body = {"model": "tiny", "input": "x", "prompt": "x"}
    async with scripted(2, **ALONE) as (rig, (bad, good)):
        bad.pieces, good.pieces = BROKEN, OK
        for _ in range(8):
            answer = await rig.ask("POST", path, body)
            assert (answer.status, by(answer)) == (200, "s1")
            if bad.heads:
                return
    pytest.fail("no request went to the bad server")


# --- recordings ----------------------------------------------------------------------------------------------------


def form(model: str, recording: bytes, boundary: str = "x1y2") -> bytes:
    """A form as clients send it: some name the model after the file."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'.encode()
    tail = f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n--{boundary}--\r\n'
    return head + recording + tail.encode()


def transcription(model: str, recording: bytes) -> bytes:
    raw = request("POST", "/v1/audio/transcriptions", form(model, recording))
    return raw.replace(b"Content-Length", b"Content-Type: multipart/form-data; boundary=x1y2\r\nContent-Length", 1)


async def test_a_recording_reaches_a_server_that_has_its_model_byte_for_byte() -> None:
    recording = bytes(range(256)) * 4000
    async with scripted(1) as (rig, (server,)):
        server.pieces = OK
        assert (await rig.send(transcription("tiny", recording))).status == 200
        assert server.bodies == [form("tiny", recording)]
    deaf, other = specs("deaf", models=(FakeModel("x"),), start_loaded=()), specs("other")
    async with balanced([*deaf, *other]) as rig:
        for _ in range(4):
            answer = await rig.send(transcription("tiny", recording))
            assert by(answer) == "other"
            assert answer.status == 500, "its model cannot hear, and says so"
        unknown = await rig.send(transcription("nosuch", recording))
    assert unknown.status == 404
    assert json.loads(unknown.body)["error"]["type"] == "not_found_error"


def test_finding_the_model_of_a_recording_copies_nothing_of_it() -> None:
    body = form("tiny", bytes(16 << 20))
    tracemalloc.start()
    try:
        facts = read_facts(find_route("/v1/audio/transcriptions"), "POST", body, b"multipart/form-data; boundary=x1y2")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert facts.model == "tiny"
    assert peak_bytes < 1 << 20


# --- one server ----------------------------------------------------------------------------------------------------


async def test_a_push_goes_from_one_server_that_has_the_model() -> None:
    lone, other = specs("lone", "other")
    async with balanced([lone, other]) as rig:
        del rig.fleet[1].live.fake.disk["tiny:latest"]
        assert (await rig.ask("POST", "/sync_servers")).status == 200
        for _ in range(6):
            answer = await rig.ask("POST", "/api/push", {"model": "tiny"})
            assert answer.lines[-1] == {"status": "success"}
            assert by(answer) == "lone"
        assert not rig.fleet[1].stats.requests["/api/push"]


async def test_a_push_is_sent_once_even_if_it_fails() -> None:
    async with balanced(specs("a", "b"), **ALONE) as rig:
        for fake in rig.fleet:
            fake.set_fault(Fault(FaultKind.RESET))
        assert (await rig.ask("POST", "/api/push", {"model": "tiny"})).status == 502
        assert sum(fake.stats.requests["/api/push"] for fake in rig.fleet) == 1


PASSED: list[tuple[str, str, Any, int]] = [
    ("POST", "/api/me", None, 503),
    ("POST", "/api/signout", None, 500),
    ("DELETE", "/api/user/keys/abc", None, 500),
    ("POST", "/api/experimental/web_search", {}, 502),
    ("POST", "/api/experimental/web_fetch", {}, 502),
    ("POST", "/api/experimental/web_fetch", None, 400),
    ("GET", "/api/experimental/model-recommendations", None, 200),
    ("GET", "/api/status", None, 200),
    ("GET", "/nope", None, 404),
    ("POST", "/v1/images/generations", {"model": "tiny"}, 404),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), PASSED)
async def test_what_is_not_ours_is_answered_by_one_server(method: str, path: str, body: Any, status: int) -> None:
    async with balanced(specs("a", "b")) as rig:
        answer = await rig.ask(method, path, body)
        assert answer.status == status
        assert by(answer) in {"a", "b"}
        assert answer.header("X-Ollama-LB-Attempts") == "1" or status in {500, 502, 503}
        assert sum(fake.stats.requests[path] for fake in rig.fleet) >= 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/api/chat", 405),
        ("GET", "/v1/responses", 405),
        ("DELETE", "/api/tags", 405),
        ("POST", "/api/chat/", 307),
        ("GET", "/api/tags/", 301),
    ],
)
async def test_a_wrong_method_and_a_trailing_slash_are_answered_as_by_a_server(
    method: str, path: str, status: int
) -> None:
    async with balanced(specs("a")) as rig:
        ours, theirs = await rig.ask(method, path, {}), await ask(rig.fleet[0].url, method, path, {})
    assert ours.status == theirs.status == status
    assert ours.body == theirs.body
    assert [ours.header(name) for name in ("Allow", "Location")] == [
        theirs.header(name) for name in ("Allow", "Location")
    ]
