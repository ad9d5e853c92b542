"""The management endpoints: what the fleet is, changing it, and who may."""

import contextlib
import dataclasses
import json
import socket
from typing import Any

import anyio
import pytest

from lbcore.config import ServerSettings
from lbcore.events import ServerAdded
from simulator.fake_ollama import FakeModel
from simulator.faults import Fault, FaultKind
from simulator.serve import serve_fleet
from tests.lbio.kit import LIMIT_S, TINY, Rig, balanced, chat_request, client, specs
from tests.lbio.sockets_kit import free_port, until
from tests.simulator.wire import Answer, body_of, parse, request

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def add(rig: Rig, body: object) -> Answer:
    return await rig.ask("POST", "/add_server", body)


def error_of(answer: Answer) -> str:
    error = body_of(answer)["error"]
    assert isinstance(error, str)
    return error


# --- /status ---------------------------------------------------------------------------------------------------


async def test_status_tells_of_every_server() -> None:
    async with balanced(specs("a", "b")) as rig:
        await rig.chat()
        told = body_of(await rig.ask("GET", "/status"))
    assert [server["name"] for server in told["servers"]] == ["a", "b"]
    for server in told["servers"]:
        assert server["state"] == "healthy"
        assert server["reliability"] == "Reliable"
        assert server["in_flight"] == 0
        assert server["models"]["tiny:latest"]["on_disk"] is True
        assert server["models"]["tiny:latest"]["loaded"] is True
        assert server["last_error"] is None
        assert server["last_sync_s_ago"] >= 0
    served = [server["models"]["tiny:latest"] for server in told["servers"]]
    assert any(model["first_token_ms"] for model in served)


async def test_status_tells_the_last_error() -> None:
    async with balanced(specs("a", "b", faults=(Fault(FaultKind.RESET),))) as rig:
        told = body_of(await rig.ask("GET", "/status"))
    for server in told["servers"]:
        assert server["state"] == "dead"
        assert server["last_error"]
        assert server["last_error_s_ago"] >= 0


async def test_status_counts_what_is_under_way() -> None:
    async with balanced(specs("a", first_token_ms=200)) as rig, client(rig) as asking:
        await asking.send(chat_request())
        await until(lambda: rig.fleet[0].stats.concurrent == 1)
        told = body_of(await rig.ask("GET", "/status"))
        assert (told["requests"], told["servers"][0]["in_flight"]) == (1, 1)


async def since_start(rig: Rig) -> dict[str, Any]:
    told = body_of(await rig.ask("GET", "/status"))["since_start"]
    assert isinstance(told, dict)
    return told


async def test_status_totals_begin_at_nothing() -> None:
    async with balanced(specs("a")) as rig:
        told = await since_start(rig)
    assert told.pop("seconds") >= 0
    assert told == {
        "requests": {"done": 0, "rejected": 0, "failed": 0, "aborted": 0},
        "attempts": {"primary": 0, "racer": 0, "hedge": 0, "retry": 0, "resume": 0},
        "wasted_tokens": 0,
        "late_events": 0,
    }


async def test_status_totals_count_each_way_a_request_ends() -> None:
    async with balanced(specs("a", token_ms=20), race={"hedges_max": 0}) as rig:
        for _ in range(2):
            await rig.chat(options={"num_predict": 1})
        async with client(rig) as leaving:
            await leaving.send(chat_request())
            await leaving.until(b'"done":false')
        await until(lambda: rig.n_requests == 0)
        rig.fleet[0].set_fault(Fault(FaultKind.ERROR_500))
        await rig.chat()
        await rig.fleet[0].stop()
        await rig.ask("POST", "/sync_servers")
        await rig.chat()
        told = (await since_start(rig))["requests"]
    assert (told["done"], told["aborted"], sum(told.values())) == (2, 1, 5)


async def test_status_totals_count_attempts_by_kind_and_what_they_wasted() -> None:
    async with balanced(specs("a", "b", first_token_ms=5), race={"racers_min": 2}) as rig:
        await rig.chat()
        told = await since_start(rig)
    assert (told["attempts"]["primary"], told["attempts"]["racer"], told["requests"]["done"]) == (1, 1, 1)
    assert told["wasted_tokens"] >= 0


async def test_status_totals_count_retries() -> None:
    async with balanced(specs("a", "b"), race={"racers_max": 1, "hedges_max": 0}) as rig:
        for fake in rig.fleet:
            fake.set_fault(Fault(FaultKind.BUSY_503))
        await rig.chat()
        told = await since_start(rig)
    assert (told["attempts"]["primary"], told["attempts"]["retry"]) == (1, 1)


async def test_status_totals_count_hedges() -> None:
    hedge: dict[str, Any] = {"racers_max": 1, "hedge_delay_min": "5ms", "hedge_delay_initial": "5ms"}
    async with balanced(specs("a", "b", first_token_ms=100), race=hedge) as rig:
        await rig.chat()
        told = await since_start(rig)
    assert told["attempts"]["hedge"] == 1


async def test_status_totals_for_people() -> None:
    async with balanced(specs("a")) as rig:
        await rig.chat()
        answer = await rig.send(request("GET", "/status").replace(b"\r\n", b"\r\nAccept: text/plain\r\n", 1))
    now, since = answer.body.decode().splitlines()[-2:]
    assert now == "now: 0 requests (0 queued), 0 attempts (0 retries)"
    assert since.endswith(
        "s ago: 1 request (1 done, 0 rejected, 0 failed, 0 aborted); 1 attempt (1 primary); "
        "0 tokens wasted; 0 late events"
    )


async def test_status_as_a_table_for_people() -> None:
    async with balanced(specs("first", "second")) as rig:
        answer = await rig.send(request("GET", "/status").replace(b"\r\n", b"\r\nAccept: text/plain\r\n", 1))
    assert (answer.header("Content-Type") or "").startswith("text/plain")
    lines = answer.body.decode().splitlines()
    assert lines[0].split()[0] == "SERVER"
    assert [line.split()[0] for line in lines[1:3]] == ["first", "second"]
    assert "tiny:latest" in lines[1]


async def test_status_answers_head() -> None:
    async with balanced(specs("a")) as rig:
        answer = await rig.ask("HEAD", "/status")
    assert (answer.status, answer.body) == (200, b"")


# --- /add_server -----------------------------------------------------------------------------------------------


async def test_a_server_that_is_added_is_used() -> None:
    more = specs("more", models=(FakeModel("other"),), start_loaded=())
    async with balanced(specs("a")) as rig, serve_fleet(more) as (fake,):
        assert (await rig.chat(model="other")).status == 404
        answer = await add(rig, {"url": fake.url, "name": "more"})
        assert answer.status == 200
        assert body_of(answer)["name"] == "more"
        assert (await rig.chat(model="other")).header("X-Ollama-LB-Server") == "more"
        names = {model["name"] for model in body_of(await rig.ask("GET", "/api/tags"))["models"]}
        assert names == {"tiny:latest", "other:latest"}


async def test_a_server_without_a_name_is_called_by_its_address() -> None:
    async with balanced(specs("a")) as rig, serve_fleet(specs("b")) as (fake,):
        answer = await add(rig, {"url": fake.url.removeprefix("http://")})
        assert body_of(answer)["name"] == fake.url.removeprefix("http://")


@pytest.mark.parametrize("same", ["url", "name"])
async def test_a_duplicate_is_a_conflict(same: str) -> None:
    async with balanced(specs("a")) as rig, serve_fleet(specs("b")) as (fake,):
        body = {"url": rig.fleet[0].url if same == "url" else fake.url, "name": "a" if same == "name" else "b"}
        answer = await add(rig, body)
        assert answer.status == 409
        assert "a" in error_of(answer)
        assert len(body_of(await rig.ask("GET", "/status"))["servers"]) == 1


async def test_a_server_that_cannot_be_reached_is_not_added() -> None:
    async with balanced(specs("a")) as rig:
        answer = await add(rig, {"url": f"http://127.0.0.1:{free_port()}", "name": "gone"})
        assert answer.status == 502
        assert "refused" in error_of(answer)
        assert len(body_of(await rig.ask("GET", "/status"))["servers"]) == 1


async def test_a_server_that_is_no_ollama_is_not_added() -> None:
    async with balanced(specs("a")) as rig, serve_fleet(specs("b", faults=(Fault(FaultKind.GARBAGE),))) as (fake,):
        assert (await add(rig, {"url": fake.url, "name": "b"})).status == 502


async def test_a_server_that_failed_can_be_added_later() -> None:
    async with balanced(specs("a")) as rig, serve_fleet(specs("b", faults=(Fault(FaultKind.RESET),))) as (fake,):
        assert (await add(rig, {"url": fake.url, "name": "b"})).status == 502
        fake.set_fault(None)
        assert (await add(rig, {"url": fake.url, "name": "b"})).status == 200


@pytest.mark.parametrize(("body", "word"), [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"\xff\xfe", "JSON"),
    (b"[" * 50_000, "JSON"),
    (b"[]", "url"),
    ({}, "url"),
    ({"url": 5}, "url"),
    ({"url": ""}, "url"),
    ({"url": "ftp://x"}, "url"),
    ({"url": "http://x:99999"}, "url"),
    ({"url": "http://user:pw@x"}, "url"),
    ({"url": "http://x/path"}, "url"),
    ({"url": "http://x\r\nA: b"}, "url"),
    ({"url": "http://x", "name": 5}, "name"),
    ({"url": "http://x", "name": []}, "name"),
    ({"url": "http://x", "name": "a\nb"}, "name"),
    ({"url": "http://x", "nmae": "x"}, "nmae"),
])  # fmt: skip
async def test_a_bad_body_is_refused_in_words(body: Any, word: str) -> None:
    async with balanced(specs("a")) as rig:
        answer = await add(rig, body)
        assert answer.status == 400
        assert word in error_of(answer)
        assert "send {" in error_of(answer) or ";" in error_of(answer)


# --- DELETE /servers/NAME --------------------------------------------------------------------------------------


async def test_a_server_that_is_removed_finishes_its_stream_and_gets_nothing_new() -> None:
    async with balanced(specs("a", "b", token_ms=15), race={"racers_max": 1}) as rig, client(rig) as asking:
        await asking.send(chat_request())
        head = await asking.until(b"\r\n\r\n")
        name = head.split(b"X-Ollama-LB-Server: ")[1].split(b"\r\n")[0].decode()
        answer = await rig.ask("DELETE", f"/servers/{name}")
        assert (answer.status, body_of(answer)["state"]) == (200, "draining")
        other = await rig.chat()
        assert other.header("X-Ollama-LB-Server") != name
        assert (await asking.rest()).count(b'"done":true') == 1
        await until(lambda: rig.service.driver.balancer.fleet.by_name(name) is None)


async def test_an_idle_server_is_removed_at_once_and_its_connections_are_closed() -> None:
    async with balanced(specs("a", "b")) as rig:
        for _ in range(4):
            await rig.chat()
        assert body_of(await rig.ask("DELETE", "/servers/a"))["state"] == "removed"
        assert [server["name"] for server in body_of(await rig.ask("GET", "/status"))["servers"]] == ["b"]
        await until(lambda: rig.fleet[0].stats.connections == 0)


async def test_removing_an_unknown_server_names_the_known_ones() -> None:
    async with balanced(specs("a", "b")) as rig:
        answer = await rig.ask("DELETE", "/servers/c")
        assert answer.status == 404
        assert "a, b" in error_of(answer)


async def test_a_name_may_be_escaped() -> None:
    async with balanced(specs("gpu:1", "b")) as rig:
        assert (await rig.ask("DELETE", "/servers/gpu%3A1")).status == 200


async def test_a_body_too_large_for_a_server_is_not_looked_at() -> None:
    async with balanced(specs("a")) as rig:
        answer = await add(rig, {"url": "http://b", "x": [{}] * 100_000})
        assert (answer.status, "larger than 65536 bytes" in error_of(answer)) == (413, True)


# --- /sync_servers ---------------------------------------------------------------------------------------------


async def test_a_sync_tells_what_changed() -> None:
    async with balanced(specs("a", "b")) as rig:
        nothing = body_of(await rig.ask("POST", "/sync_servers"))
        assert nothing == {"servers": 2, "changed": {}}
        async with await anyio.connect_tcp("127.0.0.1", rig.fleet[0].port) as stream:
            await stream.send(request("POST", "/api/copy", {"source": "tiny", "destination": "tiny2"}))
            await stream.receive()
        changed = body_of(await rig.ask("POST", "/sync_servers"))["changed"]
        assert changed == {"a": {"models": {"gained": ["tiny2:latest"], "lost": []}}}


async def test_a_sync_finds_that_a_server_has_come_back() -> None:
    slow: dict[str, Any] = {"probe": {"interval_dead": "30s", "interval_dead_max": "30s"}}
    async with balanced(specs("a", faults=(Fault(FaultKind.RESET),), models=(TINY,)), **slow) as rig:
        rig.fleet[0].set_fault(None)
        changed = body_of(await rig.ask("POST", "/sync_servers"))["changed"]
        assert changed["a"]["state"] == ["dead", "healthy"]
        assert (await rig.chat()).status == 200


async def test_a_sync_does_not_wait_for_servers_that_hang_out_of_step() -> None:
    probe = {"timeout": "200ms", "interval_dead": "50ms", "interval_dead_max": "50ms"}
    async with balanced(specs("a"), probe=probe) as rig:
        with contextlib.ExitStack() as stack:
            for number in range(8):
                hole = stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # connects, and never says a word
                url = f"http://127.0.0.1:{hole.getsockname()[1]}"
                rig.service.driver.dispatch(ServerAdded(ServerSettings(url=url, name=f"hole{number}")))
                await anyio.sleep(0.03)
            with anyio.fail_after(0.6):
                assert body_of(await rig.ask("POST", "/sync_servers"))["servers"] == 9


# --- who may ---------------------------------------------------------------------------------------------------


def with_header(line: bytes, method: str = "GET", path: str = "/status") -> bytes:
    raw = request(method, path)
    if line.lower().startswith(b"host:"):
        return raw.replace(b"Host: localhost:11434", line)
    return raw.replace(b"\r\n", b"\r\n" + line + b"\r\n", 1)


@pytest.mark.parametrize("line", [
    b"Host: evil.example",
    b"Host: evil.example:11434",
    b"Host: localhost.evil.example",
    b"Host: 127.0.0.1.evil.example",
    b"Origin: http://evil.example",
    b"Origin: https://localhost.evil.example",
    b"Origin: null",
    b"X-Forwarded-For: 127.0.0.1",
    b"Forwarded: for=127.0.0.1",
])  # fmt: skip
async def test_others_are_refused(line: bytes) -> None:
    async with balanced(specs("a")) as rig:
        answer = await rig.send(with_header(line))
    assert answer.status == 403
    assert "not allowed" in error_of(answer) or "only" in error_of(answer)


@pytest.mark.parametrize(("line", "why"), [
    (b"X-Forwarded-For: 127.0.0.1", "came through a proxy, which says so in the header X-Forwarded-For"),
    (b"Forwarded: for=127.0.0.1", "came through a proxy, which says so in the header Forwarded"),
    (b"Host: evil.example:1", 'the Host of this request is "evil.example:1"'),
])  # fmt: skip
async def test_who_is_refused_is_told_why(line: bytes, why: str) -> None:
    async with balanced(specs("a")) as rig:
        answer = await rig.send(with_header(line))
    assert why in error_of(answer)
    assert 'admin.allow = "any"' in error_of(answer)


@pytest.mark.parametrize("line", [
    b"Host: localhost", b"Host: 127.0.0.1:11434", b"Host: [::1]:1", b"Host: LOCALHOST", b"Origin: http://localhost:3000",
])  # fmt: skip
async def test_this_machine_is_let_in(line: bytes) -> None:
    async with balanced(specs("a")) as rig:
        assert (await rig.send(with_header(line))).status == 200


async def test_anyone_is_let_in_where_that_is_configured() -> None:
    async with balanced(specs("a"), admin={"allow": "any"}) as rig:
        assert (await rig.send(with_header(b"Host: gpu.example"))).status == 200
        assert (await rig.send(with_header(b"X-Forwarded-For: 10.0.0.1"))).status == 200
        assert (await rig.send(with_header(b"Origin: http://evil.example"))).status == 403


@pytest.mark.parametrize(("path", "allowed"), [
    ("/status", "GET"), ("/add_server", "POST"), ("/sync_servers", "POST"), ("/servers/a", "DELETE"),
])  # fmt: skip
async def test_other_methods_are_refused(path: str, allowed: str) -> None:
    async with balanced(specs("a")) as rig:
        for method in {"GET", "POST", "PUT", "DELETE"} - {allowed}:
            answer = await rig.ask(method, path)
            assert (answer.status, answer.header("Allow")) == (405, allowed)
        assert len(body_of(await rig.ask("GET", "/status"))["servers"]) == 1


async def test_management_answers_are_whole_on_a_kept_connection() -> None:
    raw = request("GET", "/status", close=False) + request("POST", "/add_server", b"{", close=False)
    async with balanced(specs("a")) as rig:
        got = await rig.exchange([raw + request("GET", "/")])
    assert got.count(b"HTTP/1.1 ") == 3
    assert parse(got[got.rindex(b"HTTP/1.1 ") :]).body == b"Ollama is running"
    assert json.loads(parse(got.split(b"HTTP/1.1 400")[0]).body)["servers"]


# --- from anybody ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["Host: [", "Host: [x]", "Host: localhost\r\nOrigin: http://["])
async def test_a_header_that_is_no_address_is_foreign(header: str) -> None:
    async with balanced(specs("a")) as rig:
        answer = await rig.send(f"GET /status HTTP/1.1\r\n{header}\r\nConnection: close\r\n\r\n".encode())
    assert answer.status == 403


async def test_a_member_that_is_half_an_emoji_is_unknown() -> None:
    async with balanced(specs("a")) as rig:
        answer = await add(rig, b'{"url":"http://x","\\ud800":1}')
    assert answer.status == 400
    assert r'unknown member "\ud800"' in error_of(answer)


async def test_status_and_log_warn_of_models_that_are_not_the_same_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    other = specs("b", models=(dataclasses.replace(TINY, digest="f" * 64),))
    with caplog.at_level("WARNING"):
        async with balanced([*specs("a"), *other], log={"level": "warning"}) as rig:
            told = body_of(await rig.ask("GET", "/status"))["warnings"]
            assert len(told) == 1
            assert told[0].startswith("tiny:latest is not the same everywhere: ")
            assert "ffffffffffff on b" in told[0]
            raw = b"GET /status HTTP/1.0\r\nHost: localhost\r\nAccept: text/plain\r\n\r\n"
            table = parse(await rig.exchange([raw]))
            assert f"warning: {told[0]}" in table.body.decode()
            with anyio.fail_after(LIMIT_S):  # they are compared every five seconds
                while told[0] not in caplog.messages:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
