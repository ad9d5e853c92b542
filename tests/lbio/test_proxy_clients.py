"""Clients that leave, do not read, trickle, send too much or what is not HTTP; and the others, which notice nothing."""

import json
import re
import socket
import sys
from typing import Any

import anyio
import pytest

from lbio.wire.streams import SocketStream
from simulator.faults import Fault, FaultKind
from tests.lbio.kit import LIMIT_S, NDJSON, Rig, balanced, chat_request, client, line, scripted, specs
from tests.lbio.malformed import BEGINNINGS, CHUNKED_BODIES, REQUEST_HEADS
from tests.lbio.sockets_kit import until
from tests.simulator.wire import parse, request

pytestmark = pytest.mark.anyio
ONE_RACER: dict[str, Any] = {"race": {"racers_max": 1}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def serves(rig: Rig) -> None:
    answer = await rig.chat()
    assert answer.status == 200
    assert answer.complete


# --- clients that leave ----------------------------------------------------------------------------------------


async def left_behind(rig: Rig) -> float:
    """Wait until the server has noticed; how long that took."""
    begun = anyio.current_time()
    await until(lambda: rig.fleet[0].stats.aborted == 1)
    return anyio.current_time() - begun


async def test_a_client_that_leaves_before_the_first_token_frees_the_server() -> None:
    async with balanced(specs("a", first_token_ms=5000)) as rig:
        healths = rig.healths()
        async with client(rig) as leaver:
            await leaver.send(chat_request())
            await until(lambda: rig.fleet[0].stats.concurrent == 1)
        assert await left_behind(rig) < 0.05
        assert rig.healths() == healths
        assert rig.n_requests == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_client_that_leaves_mid_stream_frees_the_server() -> None:
    async with balanced(specs("a", token_ms=20, tokens=500)) as rig:
        healths = rig.healths()
        async with client(rig) as leaver:
            await leaver.send(chat_request())
            await leaver.until(b'"done":false}\n')
        assert await left_behind(rig) < 0.05
        assert rig.fleet[0].stats.tokens_generated < 5
        assert rig.healths() == healths
        assert rig.server("a").reliability == "Reliable"


async def test_a_client_that_leaves_the_queue_never_reaches_a_server() -> None:
    async with balanced(specs("a", first_token_ms=300), server={"in_flight_max": 1}) as rig:
        async with client(rig) as first, anyio.create_task_group():
            await first.send(chat_request())
            await until(lambda: rig.n_requests == 1)
            async with client(rig) as second:
                await second.send(chat_request())
                await until(lambda: rig.queued() == 1)
            await until(lambda: rig.queued() == 0)
            await first.rest()
        assert rig.fleet[0].stats.requests["/api/chat"] == 1


async def test_a_client_that_leaves_inside_its_body_never_reaches_a_server() -> None:
    async with balanced(specs("a")) as rig:
        async with client(rig) as leaver:
            await leaver.send(chat_request()[:-5])
        await until(lambda: not rig.service.front.connections)
        assert rig.fleet[0].stats.requests["/api/chat"] == 0
        await serves(rig)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of an end that comes behind unread bytes")
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_client_that_sends_a_flood_of_requests_and_leaves_frees_the_server() -> None:
    async with balanced(specs("a", first_token_ms=30_000)) as rig:
        async with client(rig) as leaver:
            await leaver.send(chat_request(close=False))
            await until(lambda: rig.fleet[0].stats.concurrent == 1)
            await leaver.send(request("GET", "/", close=False) * (100_000 // len(request("GET", "/", close=False))))
            await anyio.sleep(0.1)
            assert rig.fleet[0].stats.aborted == 0
        assert await left_behind(rig) < 2
        await until(lambda: not rig.service.front.connections)


async def test_a_client_that_sends_its_next_request_early_has_not_left() -> None:
    async with balanced(specs("a", first_token_ms=50)) as rig, client(rig) as eager:
        await eager.send(chat_request(close=False))
        await eager.until(b"HTTP/1.1 200 OK")
        await eager.send(request("GET", "/api/version"))
        assert b'{"version"' in await eager.rest()


# --- clients that do not read ----------------------------------------------------------------------------------


def endless(server: Any) -> None:
    server.pieces = [NDJSON + b"Connection: close\r\n\r\n", *[line("x" * 65536)] * 1600]  # 100 MiB


async def test_a_client_that_does_not_read_stops_its_server_while_others_go_on() -> None:
    async with scripted(client={"write_timeout": "30s"}) as (rig, (server,)), client(rig) as lazy:
        endless(server)
        await lazy.send(chat_request())
        await until(lambda: server.written > 0)
        before = -1
        while server.written != before:
            before = server.written
            await anyio.sleep(0.1)
        assert server.written < 24 << 20  # what the kernel's buffers hold
        server.pieces, server.close = [NDJSON + b"Connection: close\r\n\r\n" + line("x", done=True)], True
        await serves(rig)


async def test_a_client_that_does_not_read_is_cut_after_the_write_timeout() -> None:
    async with scripted(client={"write_timeout": "100ms"}) as (rig, (server,)), client(rig) as lazy:
        healths = rig.healths()
        endless(server)
        await lazy.send(chat_request())
        await until(lambda: server.closed_by_peer == 1)
        await until(lambda: rig.n_requests == 0)
        assert rig.healths() == healths


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what of it has arrived")
async def test_a_client_that_reads_little_is_not_one_that_reads_nothing() -> None:
    async with scripted(client={"write_timeout": "150ms"}) as (rig, (server,)):
        endless(server)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            sock.connect(rig.service.addresses[0])
            slow = SocketStream(sock)
            await slow.send(chat_request())
            for _ in range(60):  # far less in all this time than must be read before there is room to write again
                await slow.receive(4096)
                await anyio.sleep(0.02)
            assert (server.closed_by_peer, rig.n_requests) == (0, 1)
            begun = anyio.current_time()
            await until(lambda: rig.n_requests == 0)
            assert anyio.current_time() - begun > 0.1


async def test_the_silence_of_a_server_that_is_not_read_is_not_its_own() -> None:
    patience: dict[str, Any] = {"client": {"write_timeout": "30s"}, "timeouts": {"silence": "50ms"}}
    async with scripted(**patience) as (rig, (server,)), client(rig) as lazy:
        server.pieces, server.close = [NDJSON + b"Connection: close\r\n\r\n", *[line("x" * 65536)] * 320], True
        server.pieces = [*server.pieces, line("", done=True)]
        await lazy.send(chat_request())
        await until(lambda: server.written > 0)
        await anyio.sleep(0.3)
        assert (await lazy.rest()).endswith(b'"done":true}\n\r\n0\r\n\r\n')


# --- slow clients ----------------------------------------------------------------------------------------------


async def test_a_head_that_trickles_gets_408() -> None:
    async with balanced(specs("a"), client={"head_timeout": "60ms"}) as rig:
        raw = await rig.exchange([b"GET ", b"/ ", b"HTTP/1.1\r\n", b"Host: localhost\r\n"], pause_s=0.03)
        assert parse(raw).status == 408
        assert parse(raw).header("Connection") == "close"
        await serves(rig)


async def test_a_body_that_stalls_gets_408() -> None:
    async with balanced(specs("a"), client={"body_timeout": "50ms"}) as rig:
        raw = await rig.exchange([chat_request(close=False)[:-5]])
        assert parse(raw).status == 408
        assert json.loads(parse(raw).body)["error"]


async def test_a_connection_that_is_idle_is_closed_without_a_word() -> None:
    async with balanced(specs("a"), client={"idle_timeout": "50ms"}) as rig:
        assert await rig.exchange([b""]) == b""
        raw = await rig.exchange([request("GET", "/", close=False)])
        assert raw.endswith(b"Ollama is running")


# --- limits ----------------------------------------------------------------------------------------------------


async def test_a_body_declared_too_large_gets_413_before_it_is_sent() -> None:
    async with balanced(specs("a"), limits={"body_bytes_max": "1KiB"}) as rig:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1025\r\nExpect: 100-continue\r\n\r\n"
        answer = parse(await rig.exchange([head]))
        assert answer.status == 413
        assert "body_bytes_max" in json.loads(answer.body)["error"]


async def test_a_chunked_body_that_grows_too_large_gets_413() -> None:
    async with balanced(specs("a"), limits={"body_bytes_max": "1KiB"}) as rig:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = parse(await rig.exchange([head, *[b"100\r\n" + b"x" * 256 + b"\r\n"] * 5]))
        assert answer.status == 413
        assert answer.header("Connection") == "close"


async def test_a_client_that_sends_a_large_refused_body_still_reads_its_413() -> None:
    async with balanced(specs("a"), limits={"body_bytes_max": "1KiB"}) as rig:
        answer = parse(await rig.exchange([request("POST", "/api/chat", b"x" * 200_000)]))
        assert answer.status == 413


async def test_a_client_that_sends_all_before_it_reads_still_gets_its_413() -> None:
    async with balanced(specs("a"), limits={"body_bytes_max": "1KiB"}) as rig, client(rig) as sending:
        await sending.send(request("POST", "/api/chat", b"x" * (20 << 20)))
        assert parse(await sending.rest()).status == 413


async def test_a_client_that_neither_sends_its_refused_body_nor_leaves_is_left_before_long(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lbio.client._DISCARD_SILENCE_S", 0.05)
    async with balanced(specs("a"), limits={"body_bytes_max": "1KiB"}) as rig, client(rig) as silent:
        await silent.send(request("POST", "/api/chat", b"x" * 2000)[:-10])
        await silent.rest()
        with anyio.fail_after(1):
            await until(lambda: not rig.service.front.connections)


async def test_what_is_read_of_a_refused_body_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbio.client._DISCARD_BYTES_MAX", 100_000)
    async with balanced(specs("a"), limits={"body_bytes_max": "1KiB"}) as rig, client(rig) as endless:
        with anyio.fail_after(LIMIT_S), pytest.raises(anyio.BrokenResourceError):
            await endless.send(request("POST", "/api/chat", b"x" * (60 << 20)))


async def test_a_body_larger_than_all_together_may_be_gets_413() -> None:
    limits = {"body_bytes_max": "1KiB", "bodies_bytes_max": "1KiB"}
    async with balanced(specs("a"), limits=limits) as rig:
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 123456789012345\r\n\r\n"
        assert parse(await rig.exchange([head])).status == 413


async def test_a_body_of_just_the_limit_is_taken() -> None:
    async with balanced(specs("a"), limits={"body_bytes_max": "1KiB"}) as rig:
        raw = chat_request(content="")
        body = raw.partition(b"\r\n\r\n")[2]
        padded = body + b" " * (1024 - len(body))
        assert (await rig.ask("POST", "/api/chat", padded)).status == 200
        assert (await rig.ask("POST", "/api/chat", padded + b" ")).status == 413


async def test_bodies_are_bounded_together_too() -> None:
    async with balanced(
        specs("a", first_token_ms=300), limits={"body_bytes_max": "1KiB", "bodies_bytes_max": "1KiB"}
    ) as rig:
        async with client(rig) as first:
            await first.send(chat_request(content="x" * 800))
            await until(lambda: rig.n_requests == 1)
            assert (await rig.chat(content="x" * 300)).status == 503
            await first.rest()
        assert rig.service.front.bodies.held == 0
        assert (await rig.chat(content="x" * 300)).status == 200


async def test_a_head_that_is_too_large_gets_431() -> None:
    async with balanced(specs("a"), limits={"head_bytes_max": "1KiB"}) as rig:
        answer = await rig.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 2000 + b"\r\n\r\n")
        assert answer.status == 431
        await serves(rig)


async def test_one_connection_too_many_gets_503_and_when_to_come_back() -> None:
    async with balanced(specs("a"), limits={"connections_max": 1}) as rig:
        async with client(rig) as first:
            await first.send(request("GET", "/", close=False))
            await first.until(b"running")
            answer = parse(await rig.exchange([b""]))
            assert answer.status == 503
            assert answer.header("Retry-After")
        await until(lambda: not rig.service.front.connections)
        await serves(rig)


# --- what is not HTTP ------------------------------------------------------------------------------------------


def statuses(raw: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", raw)]


async def test_every_malformed_head_gets_its_status_and_a_close() -> None:
    wrong: list[tuple[str, list[int]]] = []
    async with balanced(specs("a")) as rig:
        for what, raw, status in REQUEST_HEADS:
            if what in {"two heads", "head without end"}:  # of a parser that is given the bytes of just one head
                continue
            got = await rig.exchange([raw])
            if statuses(got) != [status] or b"Connection: close" not in got:
                wrong.append((what, statuses(got)))
        await serves(rig)
        assert rig.fleet[0].stats.requests["/api/chat"] == 1
    assert not wrong


async def test_every_malformed_chunked_body_gets_its_status_and_a_close() -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    wrong: list[tuple[str, list[int]]] = []
    async with balanced(specs("a"), client={"body_timeout": "300ms"}) as rig:
        for what, body, status in CHUNKED_BODIES:
            got = await rig.exchange([head + body])
            if statuses(got) != [status] or b"Connection: close" not in got:
                wrong.append((what, statuses(got)))
        await serves(rig)
        assert rig.fleet[0].stats.requests["/api/chat"] == 1
    assert not wrong


async def test_beginnings_that_cannot_become_a_head_are_refused_at_once() -> None:
    wrong: list[tuple[str, list[int]]] = []
    async with balanced(specs("a"), limits={"head_bytes_max": "1KiB"}) as rig:
        for what, raw, status in BEGINNINGS:
            if what == "cut":
                continue
            got = await rig.exchange([raw])
            if statuses(got) != [status]:
                wrong.append((what, statuses(got)))
        await serves(rig)
    assert not wrong


async def test_the_error_of_a_malformed_request_is_json_that_says_what_is_wrong() -> None:
    async with balanced(specs("a")) as rig:
        answer = await rig.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n")
    assert answer.status == 400
    assert "Content-Length" in json.loads(answer.body)["error"]


async def test_nothing_hidden_after_a_refused_request_is_carried_out() -> None:
    smuggled = request("POST", "/api/chat", b'{"model":"tiny"}')
    framing = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    raw = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n" + framing
    async with balanced(specs("a")) as rig:
        assert statuses(await rig.exchange([raw + smuggled])) == [400]
        assert rig.fleet[0].stats.requests["/api/chat"] == 0


async def test_a_server_that_hangs_while_its_client_leaves_is_not_blamed() -> None:
    async with balanced(specs("a", faults=()), **ONE_RACER) as rig:
        healths = rig.healths()
        rig.fleet[0].set_fault(Fault(FaultKind.HANG_CHAT))
        async with client(rig) as leaver:
            await leaver.send(chat_request())
            await until(lambda: rig.fleet[0].stats.concurrent == 1)
        assert await left_behind(rig) < 0.05
        assert rig.healths() == healths


async def test_a_deeply_nested_body_gets_an_answer() -> None:
    async with balanced(specs("a")) as rig:
        answer = await rig.ask("POST", "/api/chat", b'{"a":' * 100_000)
        assert answer.status == 400
        await serves(rig)
