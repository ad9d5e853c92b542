"""What goes wrong with servers: before the commit nobody notices, after it the stream ends honestly."""

import json
from typing import Any

import anyio
import pytest

from lbcore.events import Reason
from simulator.faults import BREAKS, Fault, FaultKind
from tests.lbio.kit import LIMIT_S, NDJSON, STREAM, Rig, balanced, before, chunked, line, scripted, specs
from tests.lbio.sockets_kit import free_port, until
from tests.simulator.wire import Answer, ask, chat

pytestmark = pytest.mark.anyio

SHORT: dict[str, Any] = {
    "timeouts": {"connect": "200ms", "first_token_warm": "100ms", "silence": "80ms"},
    "race": {"racers_max": 1, "hedges_max": 1, "hedge_delay_min": "10s", "hedge_delay_initial": "10s"},
    "health": {"resurrect": 0.0},
}
WHOLE = b'{"done":true}'
EARLY = [kind for kind in FaultKind if kind not in BREAKS | {FaultKind.CRAWL, FaultKind.FLAP}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def by(answer: Answer) -> str:
    return answer.header("X-Ollama-LB-Server") or ""


async def other_than(rig: Rig, name: str) -> None:
    """Ask until a request has met the server called `name`; each must be served whole."""
    server = next(fake for fake in rig.fleet if fake.spec.name == name)
    before = server.stats.connections_total
    for _ in range(8):
        answer = await rig.chat()
        assert answer.status == 200
        assert answer.complete
        assert answer.lines[-1]["done"] is True
        assert by(answer) != name
        if server.stats.connections_total > before or rig.server(name).last_error:
            return
    pytest.fail(f"no request went to {name}")


# --- before the commit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
@pytest.mark.parametrize("kind", EARLY)
async def test_a_failure_before_the_first_token_is_invisible(kind: FaultKind) -> None:
    async with balanced(specs("bad", "good"), **SHORT) as rig:
        rig.fleet[0].set_fault(Fault(kind, factor=1000))
        await other_than(rig, "bad")


@pytest.mark.parametrize("kind", sorted(BREAKS))
async def test_a_stream_that_breaks_before_its_first_token_is_invisible(kind: FaultKind) -> None:
    async with balanced(specs("bad", "good"), **SHORT) as rig:
        rig.fleet[0].set_fault(Fault(kind, after_tokens=0))
        await other_than(rig, "bad")


# --- after the commit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(BREAKS - {FaultKind.ERROR_MIDSTREAM}))
async def test_a_broken_stream_ends_with_an_error_on_a_line_of_its_own(kind: FaultKind) -> None:
    async with balanced(specs("a"), **SHORT) as rig:
        rig.fleet[0].set_fault(Fault(kind, after_tokens=3))
        answer = await rig.chat()
    assert answer.status == 200
    assert answer.complete
    assert answer.body.endswith(b"\n")
    *tokens, error = answer.lines
    assert list(error) == ["error"]
    assert error["error"]
    assert len(tokens) == 3
    assert all("message" in token for token in tokens)


@pytest.mark.parametrize("kind", sorted(BREAKS - {FaultKind.ERROR_MIDSTREAM}))
async def test_the_server_that_broke_a_stream_is_blamed(kind: FaultKind) -> None:
    async with balanced(specs("a"), **SHORT) as rig:
        before = rig.healths()["a"]
        rig.fleet[0].set_fault(Fault(kind, after_tokens=3))
        await rig.chat()
        assert rig.healths()["a"] < before
        assert rig.server("a").reliability == "Unreliable"


async def test_an_error_line_of_the_server_is_passed_on_once() -> None:
    async with balanced(specs("a"), **SHORT) as rig:
        rig.fleet[0].set_fault(Fault(FaultKind.ERROR_MIDSTREAM, after_tokens=3))
        answer = await rig.chat()
    assert answer.complete
    assert [list(found) for found in answer.lines if "error" in found] == [["error"]]
    assert "error" in answer.lines[-1]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_broken_stream_of_openai_ends_with_an_event_that_is_an_error(path: str) -> None:
    async with balanced(specs("a"), **SHORT) as rig:
        rig.fleet[0].set_fault(Fault(FaultKind.CUT_MIDSTREAM, after_tokens=3))
        answer = await rig.ask("POST", path, {**chat(), "prompt": "x", "stream": True})
    assert answer.complete
    last = answer.body.decode().split("\n\n")[-2]
    assert last.startswith("data: {")
    assert set(json.loads(last.removeprefix("data: "))["error"]) == {"message", "type", "param", "code"}
    assert b"[DONE]" not in answer.body


async def test_a_broken_stream_of_anthropic_ends_with_an_event_that_is_an_error() -> None:
    async with balanced(specs("a"), **SHORT) as rig:
        rig.fleet[0].set_fault(Fault(FaultKind.CUT_MIDSTREAM, after_tokens=3))
        answer = await rig.ask("POST", "/v1/messages", {**chat(), "max_tokens": 9, "stream": True})
    assert answer.complete
    last = answer.body.decode().split("\n\n")[-2]
    assert last.startswith('event: error\ndata: {"type":"error","error":{')


@pytest.mark.parametrize("cut_at", range(1, 90, 11))
async def test_wherever_a_stream_is_cut_the_error_stands_on_a_line_of_its_own(cut_at: int) -> None:
    raw = NDJSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(STREAM[:2])[:-5]
    half = b"50\r\n" + STREAM[2] + b"x" * 90
    async with scripted(**SHORT) as (rig, (server,)):
        server.pieces, server.close, server.pause_s = [raw, half[:cut_at]], True, 0.01
        answer = await rig.chat()
    assert answer.complete
    assert json.loads(answer.body.split(b"\n")[-2]).keys() == {"error"}
    assert answer.body.startswith(STREAM[0] + STREAM[1])


async def test_garbage_inside_the_chunked_body_ends_with_an_error_line() -> None:
    raw = NDJSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(STREAM[:2])[:-5]
    async with scripted(**SHORT) as (rig, (server,)):
        server.pieces, server.pause_s = [raw, b"zz\r\nno chunk\r\n"], 0.01
        answer = await rig.chat()
    assert answer.complete
    assert "error" in answer.lines[-1]


async def test_a_length_that_cannot_be_kept_is_not_padded() -> None:
    raw = NDJSON + b"Content-Length: 10000\r\n\r\n" + line("one")
    async with scripted(**SHORT) as (rig, (server,)):
        server.pieces, server.close = [raw], True
        answer = await rig.chat()
    assert answer.status in {200, 502}
    assert answer.status == 502 or not answer.complete


# --- all fail --------------------------------------------------------------------------------------------------


async def test_when_no_server_answers_a_502_names_what_happened_on_each() -> None:
    async with balanced(specs("a", "b"), **SHORT) as rig:
        for fake in rig.fleet:
            fake.set_fault(Fault(FaultKind.RESET))
        answer = await rig.chat()
    assert answer.status == 502
    error = json.loads(answer.body)["error"]
    assert all(name in error for name in ("a: ", "b: "))


async def test_when_all_time_out_it_is_a_504() -> None:
    async with balanced(specs("a", "b"), **SHORT) as rig:
        for fake in rig.fleet:
            fake.set_fault(Fault(FaultKind.HANG_CHAT))
        answer = await rig.chat()
    assert answer.status == 504
    assert "error" in json.loads(answer.body)


@pytest.mark.parametrize(("kind", "status"), [(FaultKind.ERROR_500, 500), (FaultKind.BUSY_503, 503)])
async def test_when_all_give_the_same_error_it_is_passed_on_unchanged(kind: FaultKind, status: int) -> None:
    async with balanced(specs("a", "b"), **SHORT) as rig:
        healths = rig.healths()
        for fake in rig.fleet:
            fake.set_fault(Fault(kind))
        answer = await rig.chat()
        direct = await ask(rig.fleet[0].url, "POST", "/api/chat", chat())
        assert (answer.status, answer.body) == (status, direct.body)
        assert answer.header("X-Ollama-LB-Attempts") == "2"
        assert sum(fake.stats.requests["/api/chat"] for fake in rig.fleet) == 3
        assert rig.healths() == healths  # nobody is blamed


async def test_a_500_is_blamed_once_another_server_has_answered_well() -> None:
    async with balanced(specs("bad", "good"), **SHORT) as rig:
        rig.fleet[0].set_fault(Fault(FaultKind.ERROR_500))
        before = rig.healths()["bad"]
        await other_than(rig, "bad")
        assert rig.healths()["bad"] < before


async def test_a_busy_server_is_not_blamed() -> None:
    async with balanced(specs("busy", "good"), **SHORT) as rig:
        rig.fleet[0].set_fault(Fault(FaultKind.BUSY_503))
        before = rig.healths()["busy"]
        await other_than(rig, "busy")
        assert rig.healths()["busy"] >= before


async def test_an_unknown_model_is_a_404_in_ollamas_words() -> None:
    async with balanced(specs("a", "b")) as rig:
        answer = await rig.chat(model="nosuch")
    assert (answer.status, json.loads(answer.body)) == (404, {"error": "model 'nosuch' not found"})


async def test_a_refusal_is_the_clients_and_comes_from_one_server() -> None:
    async with balanced(specs("a", "b"), **SHORT) as rig:
        healths = rig.healths()
        answer = await rig.ask("POST", "/api/chat", b'{"model": "tiny", "messages": 5}')
        assert answer.status == 400
        assert rig.healths() == healths
        assert sum(fake.stats.requests["/api/chat"] for fake in rig.fleet) == 1


# --- coming and going ------------------------------------------------------------------------------------------


async def test_a_stale_pooled_connection_is_replaced_and_nobody_is_blamed() -> None:
    async with balanced(specs("a"), **SHORT) as rig:
        await rig.chat()
        healths = rig.healths()
        await rig.fleet[0].stop()
        await rig.fleet[0].start()
        answer = await rig.chat()
        assert answer.status == 200
        assert answer.complete
        assert answer.header("X-Ollama-LB-Attempts") == "1"
        assert rig.healths()["a"] >= healths["a"]
        assert not rig.server("a").last_error


async def test_a_server_that_is_down_at_the_start_is_used_once_it_is_up() -> None:
    async with balanced(specs("a", faults=(Fault(FaultKind.REFUSE),)), **SHORT) as rig:
        refused = await rig.chat()
        assert refused.status in {502, 503}
        rig.fleet[0].set_fault(None)
        await until(lambda: rig.server("a").is_alive)
        assert (await rig.chat()).status == 200


async def test_with_every_server_unreachable_the_error_names_them() -> None:
    async with before([{"url": f"http://127.0.0.1:{free_port()}", "name": "gone"}]) as service:
        answer = await ask(service.url, "POST", "/api/chat", chat())
    assert answer.status == 502
    assert "gone" in json.loads(answer.body)["error"]
    assert Reason.CONNECT_REFUSED in json.loads(answer.body)["error"]


# --- the queue -------------------------------------------------------------------------------------------------


async def test_when_the_queue_is_full_it_is_a_503_that_says_when_to_come_back() -> None:
    full: dict[str, Any] = {"queue": {"length_max": 1}, "server": {"in_flight_max": 1}}
    async with balanced(specs("a", first_token_ms=300), **full) as rig, anyio.create_task_group() as tasks:
        tasks.start_soon(rig.chat)
        tasks.start_soon(rig.chat)
        await until(lambda: rig.queued() == 1)
        answer = await rig.chat()
        assert answer.status == 503
        assert int(answer.header("Retry-After") or 0) >= 1
        assert "error" in json.loads(answer.body)


async def test_who_waits_too_long_in_the_queue_gets_503() -> None:
    full: dict[str, Any] = {"queue": {"timeout": "50ms"}, "server": {"in_flight_max": 1}}
    async with balanced(specs("a", first_token_ms=400), **full) as rig, anyio.create_task_group() as tasks:
        tasks.start_soon(rig.chat)
        await until(lambda: rig.n_requests == 1)
        answer = await rig.chat()
        assert answer.status == 503
        assert answer.header("Retry-After")


async def test_who_waits_in_the_queue_is_served_in_the_end() -> None:
    async with balanced(specs("a", first_token_ms=20), server={"in_flight_max": 1}) as rig:
        answers: list[Answer] = []

        async def one() -> None:
            answers.append(await rig.chat())

        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(one)
        assert [answer.status for answer in answers] == [200] * 5
        assert rig.fleet[0].stats.concurrent_max == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_web_page_is_no_answer_to_a_chat(stream: bool) -> None:
    async with scripted(2, **SHORT) as (rig, (bad, good)):
        bad.pieces = [b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>"]
        if not stream:
            good.pieces = [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n" + WHOLE]
        for _ in range(6):
            answer = await rig.chat(stream=stream)
            assert by(answer) == "s1"
            if bad.heads:
                break
        assert bad.heads
