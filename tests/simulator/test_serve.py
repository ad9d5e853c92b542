"""The served fakes: disconnects, queueing, lifecycle, connections. The pure rules are tested elsewhere."""

import dataclasses
import json

import anyio
import pytest
from anyio.abc import ByteStream

from simulator.fake_ollama import FakeModel, FakeSpec, Prefill
from simulator.serve import FakeServer, now_ns, serve_fleet
from tests.simulator.wire import ask, body_of, chat, connect, exchange, parse, receive_all, request

pytestmark = pytest.mark.anyio

SPEC = FakeSpec(
    "s", models=(FakeModel("tiny"),), start_loaded=("tiny",), first_token_ms=2, token_ms=1, load_ms=5, tokens=6
)
COLD = dataclasses.replace(SPEC, start_loaded=())
LONG = dataclasses.replace(SPEC, token_ms=20, tokens=1000)
CHAT = request("POST", "/api/chat", chat())


async def begin(server: FakeServer, raw: bytes = CHAT) -> ByteStream:
    stream = await connect(server.url)
    await stream.send(raw)
    return stream


async def wait_for_aborts(server: FakeServer, count: int) -> None:
    with anyio.fail_after(0.3):
        while server.stats.aborted < count:  # noqa: ASYNC110
            await anyio.sleep(0.001)


async def test_disconnect_midstream_frees_the_slot_at_once() -> None:
    async with serve_fleet([LONG]) as (server,):
        first = await begin(server)
        await first.receive()
        waiting = await begin(server)
        await anyio.sleep(0.03)
        left_ns = now_ns()
        await first.aclose()
        await wait_for_aborts(server, 1)
        await waiting.receive()
        assert now_ns() - left_ns < 50_000_000
        abort = server.stats.aborts[0]
        assert 0 <= abort.at_ns - left_ns < 50_000_000
        assert (abort.path, abort.stage) == ("/api/chat", "generating")
        assert abort.tokens >= 1
        assert server.stats.tokens_of_aborted == abort.tokens
        await waiting.aclose()


async def test_disconnect_while_queued() -> None:
    async with serve_fleet([LONG]) as (server,):
        running, waiting = await begin(server), await begin(server)
        await anyio.sleep(0.02)
        assert server.stats.concurrent == 2
        await waiting.aclose()
        await wait_for_aborts(server, 1)
        assert server.stats.aborts[0].stage == "queued"
        assert server.stats.concurrent == 1
        await running.aclose()


async def test_disconnect_while_loading_aborts_the_load() -> None:
    async with serve_fleet([dataclasses.replace(COLD, load_ms=60)]) as (server,):
        stream = await begin(server)
        await anyio.sleep(0.02)
        await stream.aclose()
        await wait_for_aborts(server, 1)
        await anyio.sleep(0.08)
        assert body_of(await ask(server.url, "GET", "/api/ps")) == {"models": []}


async def test_disconnect_from_a_single_answer_counts_its_tokens_as_undelivered() -> None:
    async with serve_fleet([dataclasses.replace(LONG, token_ms=2)]) as (server,):
        stream = await begin(server, request("POST", "/api/chat", chat(stream=False)))
        await anyio.sleep(0.03)
        await stream.aclose()
        await wait_for_aborts(server, 1)
        made = server.stats.tokens_generated
        assert made > 0
        assert server.stats.tokens_undelivered == server.stats.tokens_of_aborted == made
        await anyio.sleep(0.01)
        assert server.stats.tokens_generated == made


async def test_half_close_is_a_disconnect() -> None:
    async with serve_fleet([LONG]) as (server,):
        stream = await begin(server)
        await stream.send_eof()
        await wait_for_aborts(server, 1)
        await stream.aclose()


@pytest.mark.parametrize("slots", [1, 2, 3])
async def test_slots(slots: int) -> None:
    spec = dataclasses.replace(SPEC, num_parallel=slots, first_token_ms=100, token_ms=2)
    ends: list[float] = []

    async def one() -> None:
        assert parse(await exchange(server.url, CHAT)).complete
        ends.append(anyio.current_time() - start)

    async with serve_fleet([spec]) as (server,):
        start = anyio.current_time()
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(one)
            while server.stats.concurrent < 3:  # noqa: ASYNC110  the figures of the server are no events
                await anyio.sleep(0.001)
            (runner,) = server.live.fake.runners.values()
            assert (len(runner.running), len(runner.waiting)) == (slots, 3 - slots)
        assert server.stats.concurrent_max == 3
    assert ends[-1] >= -(-3 // slots) * 0.110


async def test_cold_queue_overflows_with_503_and_the_others_are_served() -> None:
    statuses: list[int] = []

    async def one() -> None:
        statuses.append(parse(await exchange(server.url, CHAT)).status)

    async with serve_fleet([dataclasses.replace(COLD, max_queue=2, load_ms=40)]) as (server,):
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(one)
        assert sorted(statuses) == [200] * 3 + [503] * 3


async def test_ps_lists_a_model_only_once_loaded() -> None:
    async with serve_fleet([dataclasses.replace(COLD, load_ms=60)]) as (server,):
        stream = await begin(server)
        await anyio.sleep(0.01)
        assert body_of(await ask(server.url, "GET", "/api/ps"))["models"] == []
        answer = parse(await receive_all_until_end(stream))
        assert answer.lines[-1]["load_duration"] >= 60_000_000
        assert [m["name"] for m in body_of(await ask(server.url, "GET", "/api/ps"))["models"]] == ["tiny:latest"]


async def receive_all_until_end(stream: ByteStream) -> bytes:
    async with stream:
        return await receive_all(stream)


async def test_keep_alive_zero_and_expiry_by_the_clock() -> None:
    async with serve_fleet([COLD]) as (server,):
        await ask(server.url, "POST", "/api/chat", chat(keep_alive="40ms"))
        assert len(body_of(await ask(server.url, "GET", "/api/ps"))["models"]) == 1
        await anyio.sleep(0.06)
        assert not server.live.fake.runners  # by the server's own clock, not by being asked
        await ask(server.url, "POST", "/api/chat", chat(keep_alive=0))
        assert body_of(await ask(server.url, "GET", "/api/ps"))["models"] == []


async def test_stop_cuts_everything_and_start_is_the_same_port() -> None:
    async with serve_fleet([LONG, SPEC]) as (server, other):
        url = server.url
        streaming, idle = await begin(server), await begin(server, request("GET", "/", close=False))
        await streaming.receive()
        await idle.receive()
        await server.stop()
        with anyio.fail_after(0.3):
            assert not (await receive_all(streaming)).endswith(b"0\r\n\r\n")
            assert await receive_all(idle) == b""
        with pytest.raises(OSError, match=r"onnect"):
            await connect(url)
        assert server.stats.aborted == 0  # nobody left
        assert (server.stats.concurrent, server.stats.connections) == (0, 0)
        assert (await ask(other.url, "GET", "/")).status == 200
        await server.start()
        assert server.url == url
        assert (await ask(url, "GET", "/")).status == 200
        await server.stop()
        await server.stop()
        await server.start()
        await server.start()
        assert (await ask(url, "GET", "/")).status == 200
        for stream in (streaming, idle):
            await stream.aclose()


async def test_a_restarted_server_has_forgotten_what_it_loaded() -> None:
    async with serve_fleet([COLD]) as (server,):
        await ask(server.url, "POST", "/api/chat", chat())
        assert server.live.fake.runners
        await server.stop()
        await server.start()
        assert body_of(await ask(server.url, "GET", "/api/ps"))["models"] == []


async def test_a_restarted_server_has_kept_what_it_pulled() -> None:
    async with serve_fleet([COLD]) as (server,):
        await ask(server.url, "POST", "/api/pull", {"model": "new"})
        await server.stop()
        await server.start()
        names = [model["name"] for model in body_of(await ask(server.url, "GET", "/api/tags"))["models"]]
    assert "new:latest" in names


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serve_fleet([SPEC]) as (server,):
        raw = request("POST", "/api/chat", chat(), close=False) + request("GET", "/api/version")
        data = await exchange(server.url, raw)
        stream, _, version = data.partition(b"0\r\n\r\n")
        assert b'"done":true' in stream
        assert body_of(parse(version)) == {"version": SPEC.version}
        assert server.stats.connections_total == 1
        assert server.stats.aborted == 0


async def test_byte_by_byte_and_chunked_request_and_expect_continue() -> None:
    body = json.dumps(chat()).encode()
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nExpect: 100-continue\r\n"
    async with serve_fleet([SPEC]) as (server,), await connect(server.url) as stream:
        for byte in head + b"Transfer-Encoding: chunked\r\n\r\n":
            await stream.send(bytes([byte]))
        assert await stream.receive() == b"HTTP/1.1 100 Continue\r\n\r\n"
        for byte in b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body):
            await stream.send(bytes([byte]))
        assert parse(await receive_all(stream)).lines[-1]["done"]


async def test_malformed_request_gets_400_and_a_close() -> None:
    async with serve_fleet([SPEC]) as (server,):
        answer = parse(await exchange(server.url, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"))
        assert answer.status == 400
        assert answer.header("Connection") == "close"


async def test_same_request_same_text_everywhere_and_a_resume_completes_it() -> None:
    quiet = dataclasses.replace(SPEC, models=(FakeModel("tiny", prefill=Prefill.CONTINUE),))
    async with serve_fleet([SPEC, dataclasses.replace(quiet, name="t")]) as (one, two):
        whole = (await ask(one.url, "POST", "/api/chat", chat())).text
        assert (await ask(two.url, "POST", "/api/chat", chat())).text == whole
        assert (await ask(two.url, "POST", "/api/chat", chat("other"))).text != whole
        for letters in (1, len(whole) // 2, len(whole) - 1):
            prefix = whole[:letters]
            messages = [*chat()["messages"], {"role": "assistant", "content": prefix}]
            echoed = (await ask(one.url, "POST", "/api/chat", {"model": "tiny", "messages": messages})).text
            rest = (await ask(two.url, "POST", "/api/chat", {"model": "tiny", "messages": messages})).text
            assert echoed == prefix + rest == whole


async def test_stats_count_requests_and_tokens() -> None:
    async with serve_fleet([SPEC]) as (server,):
        for _ in range(2):
            await ask(server.url, "POST", "/api/chat", chat())
        await ask(server.url, "GET", "/api/tags")
        assert server.stats.requests == {"/api/chat": 2, "/api/tags": 1}
        assert (server.stats.tokens_generated, server.stats.tokens_undelivered) == (12, 0)


async def test_hundreds_of_streams_at_once() -> None:
    spec = dataclasses.replace(SPEC, num_parallel=300, first_token_ms=2500, token_ms=10, tokens=10)
    done: list[bool] = []

    async def one() -> None:
        done.append(parse(await exchange(server.url, CHAT)).lines[-1]["done"])

    async with serve_fleet([spec]) as (server,):
        async with anyio.create_task_group() as group:
            for _ in range(300):
                group.start_soon(one)
        assert done == [True] * 300
        assert server.stats.concurrent_max == 300


async def test_an_error_inside_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with serve_fleet([SPEC]):
            raise KeyError("mine")
