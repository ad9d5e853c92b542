"""Stories of minutes and hours over the whole HTTP path, each in a moment: see `tests.lbio.virtual`."""

import json
import os
import signal
from dataclasses import replace
from random import Random

import anyio
import anyio.abc
import pytest

from lbio import service as service_module
from simulator.fake_ollama import FakeSpec
from simulator.faults import Fault, FaultKind
from tests.lbio.kit import FAST, chat_request
from tests.lbio.virtual import HOST, Caller, Rig, in_virtual_time, tasks_living, took, virtual
from tests.simulator.wire import Answer
from tests.simulator.wire import parse as parse_answer

ONE = FAST
TWO = [FAST, replace(FAST, name="b")]


def loaded(rig: Rig, name: str) -> bool:
    return rig.server(name).model("tiny:latest").loaded


# --- connections ----------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_idle_client_is_let_go_after_the_idle_timeout() -> None:
    async with virtual([ONE]) as rig:
        caller = await rig.connect()
        await caller.get("/api/version")
        await anyio.sleep(74.9)
        await caller.get("/api/version")  # in time: it begins anew
        began_s = anyio.current_time()
        assert await caller.rest() == b""
        assert 75 <= took(began_s) <= 76  # idle connections are looked at once a second


@in_virtual_time
async def test_connections_to_a_server_are_kept_for_a_while_and_then_closed() -> None:
    async with virtual([ONE]) as rig:
        fake = rig.fake("a")
        for _ in range(5):
            await rig.chat()
            await anyio.sleep(5)
        assert rig.net.open_to(fake.port) == 1
        dialled = sum(1 for stream in rig.net.streams if stream.there[1] == fake.port)
        idle_s = 5 + await rig.wait_for(lambda: rig.net.open_to(fake.port) == 0, every_s=0.5)
        assert 30 <= idle_s <= 46  # pool.idle_timeout, looked at twice in it
        assert (await rig.chat()).complete
        probes = fake.stats.requests["/api/version"]
        assert dialled - probes <= 1  # one for five chats


@in_virtual_time
async def test_a_server_whose_machine_is_off_costs_the_connect_timeout_once() -> None:
    async with virtual(TWO) as rig:
        await anyio.sleep(60)  # nothing is left in the pool
        rig.net.silent.add(rig.fake("a").port)
        waits = []
        for _ in range(20):
            began_s = anyio.current_time()
            assert (await rig.chat()).complete
            waits.append(took(began_s))
            await anyio.sleep(1)
        assert max(waits) < 1.1  # the first hedge's delay, and not the 3 s of the connect timeout
        assert await rig.wait_for(lambda: not rig.server("a").is_alive, every_s=0.5) < 30


# --- what a client does not send, or not read -------------------------------------------------------------------


@in_virtual_time
async def test_a_request_head_must_be_there_in_time_however_slowly_it_trickles() -> None:
    async with virtual([ONE]) as rig:
        caller = await rig.connect()
        await anyio.sleep(60)  # before its first byte it is only idle
        began_s = anyio.current_time()
        answers: list[bytes] = []

        async def listen() -> None:
            answers.append(await caller.rest())
            assert 30 <= took(began_s) <= 31
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            for byte in b"GET /api/version HTTP/1.1\r\nX-Long: " + b"x" * 100:
                await caller.send(bytes([byte]))
                await anyio.sleep(1)
        answer = parse_answer(answers[0])
        assert answer.status == 408
        assert "30 s" in json.loads(answer.body)["error"]


@in_virtual_time
async def test_a_request_body_may_come_slowly_but_must_not_stop() -> None:
    request = chat_request()
    async with virtual([ONE]) as rig:
        caller = await rig.connect()
        for at in range(0, len(request), 20):
            await caller.send(request[at : at + 20])
            await anyio.sleep(59 if b"\r\n\r\n" in request[:at] else 0)
        assert parse_answer(await caller.rest(), "POST").complete

        caller = await rig.connect()
        await caller.send(request[:-3])
        began_s = anyio.current_time()
        assert parse_answer(await caller.rest(), "POST").status == 408
        assert took(began_s) == pytest.approx(60, abs=1)
        caller.stream.close()
        await anyio.sleep(1)
        assert rig.left_overs() == []


LONG = replace(ONE, tokens=1000, token_ms=10.0)


@in_virtual_time
async def test_a_client_that_reads_nothing_frees_its_server_after_the_write_timeout() -> None:
    async with virtual([LONG]) as rig:
        caller = await rig.connect(room_bytes=8192)
        await caller.send(chat_request())
        began_s = anyio.current_time()
        await rig.wait_for(lambda: rig.n_requests == 1)
        await rig.wait_for(lambda: rig.n_requests == 0, every_s=0.5)
        assert 60 < took(began_s) < 63  # what the buffers take, then the timeout
        await rig.wait_for(lambda: rig.fake("a").stats.aborted == 1)
        assert took(began_s) < 63
        assert rig.fake("a").stats.concurrent == 0
        assert rig.server("a").health >= 1  # nobody's failure


@in_virtual_time
async def test_a_slow_client_gets_all_of_it_and_its_server_is_not_blamed() -> None:
    async with virtual([LONG]) as rig:
        caller = await rig.connect(room_bytes=8192)
        await caller.send(chat_request())
        began_s = anyio.current_time()
        data = bytearray()
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data += await caller.stream.receive(4096)
            await anyio.sleep(10)
        assert took(began_s) > 250
        answer = parse_answer(bytes(data), "POST")
        assert answer.complete
        assert len(answer.lines) == 1001
        assert rig.server("a").health > 1


# --- models -----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_idle_model_leaves_the_memory_and_api_ps() -> None:
    async with virtual([replace(ONE, keep_alive_s=300, load_ms=4000)]) as rig:
        await rig.chat()
        await anyio.sleep(289)
        assert [model["name"] for model in json.loads(await rig.get("/api/ps"))["models"]] == ["tiny:latest"]
        await anyio.sleep(22)  # 300 s, and the next probe
        assert json.loads(await rig.get("/api/ps"))["models"] == []
        began_s = anyio.current_time()
        assert (await rig.chat()).complete
        assert 4 < took(began_s) < 4.1  # it was loaded again
        await anyio.sleep(11)
        assert loaded(rig, "a")


@in_virtual_time
async def test_a_cold_model_has_ten_minutes_and_a_warm_one_two() -> None:
    slow = replace(ONE, start_loaded=(), load_ms=599_000)
    async with virtual([slow]) as rig:
        began_s = anyio.current_time()
        assert (await rig.chat()).complete
        assert 599 < took(began_s) < 600
    for spec, fault, limit_s in (
        (replace(ONE, start_loaded=(), load_ms=3_600_000), None, 600),
        (ONE, Fault(FaultKind.HANG_CHAT), 120),
    ):
        async with virtual([spec]) as rig:
            rig.fake("a").set_fault(fault)
            began_s = anyio.current_time()
            first_s = await rig_chat_attempts(rig)
            assert limit_s <= first_s <= limit_s + 1
            assert took(began_s) <= 3 * limit_s + 1
            assert rig.left_overs() == []


async def rig_chat_attempts(rig: Rig) -> float:
    """Ask until it fails; how long its first attempt was given."""
    began_s = anyio.current_time()
    stats = rig.fake("a").stats
    answers: list[Answer] = []

    async def ask() -> None:
        answers.append(await rig.chat())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await rig.wait_for(lambda: stats.aborted >= 1, every_s=1)
        first_s = took(began_s)
    assert answers[0].status >= 500
    assert "error" in json.loads(answers[0].body)
    return first_s


@in_virtual_time
async def test_an_answer_that_is_not_streamed_has_a_quarter_of_an_hour() -> None:
    async with virtual([replace(ONE, tokens=850, token_ms=1000.0)]) as rig:
        began_s = anyio.current_time()
        answer = await rig.chat(stream=False)
        assert json.loads(answer.body)["done"]
        assert 849 <= took(began_s) <= 851


# --- servers that fail -------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_stream_that_falls_silent_ends_with_an_error_line_after_a_minute() -> None:
    async with virtual(TWO) as rig:
        for fake in rig.fleet:
            fake.set_fault(Fault(FaultKind.STALL_MIDSTREAM, after_tokens=3))
        began_s = anyio.current_time()
        answer = await rig.chat()
        assert 60 <= took(began_s) < 60.1
        assert answer.status == 200
        assert answer.complete  # the framing; what is in it says that it is not whole
        assert [line.get("done") for line in answer.lines] == [False] * 3 + [None]
        assert "error" in answer.lines[-1]
        await anyio.sleep(1)
        assert rig.left_overs() == []
        assert sum(fake.stats.concurrent for fake in rig.fleet) == 0


@in_virtual_time
async def test_a_hedge_comes_after_its_delay_when_a_server_hangs() -> None:
    async with virtual(TWO, race={"racers_max": 1}) as rig:
        rig.fake("a").set_fault(Fault(FaultKind.HANG_CHAT))
        waits = []
        for _ in range(12):
            began_s = anyio.current_time()
            assert (await rig.chat()).complete
            waits.append(round(took(began_s), 4))
        at_once = 0.0055  # first_token_ms and 7 tokens
        assert set(waits) <= {
            at_once,
            1 + at_once,
            0.05 + at_once,
        }  # hedge_delay_initial; later the p95, 50 ms at least
        assert len(set(waits)) >= 2


@in_virtual_time
async def test_a_hang_is_noticed_by_probes() -> None:
    async with virtual(TWO) as rig:
        rig.fake("a").set_fault(Fault(FaultKind.HANG))
        # probe.interval, then probe.timeout, and soon after that the second one
        assert await rig.wait_for(lambda: not rig.server("a").is_alive, every_s=0.5) <= 10 + 5 + 10 + 5
        began_s = anyio.current_time()
        assert (await rig.chat()).complete
        assert took(began_s) < 0.01
        rig.fake("a").set_fault(None)
        assert await rig.wait_for(lambda: rig.server("a").is_alive, every_s=0.5) <= 15 + 5


@in_virtual_time
async def test_a_dead_server_is_back_within_the_longest_pause_between_probes() -> None:
    async with virtual(TWO) as rig:
        await rig.fake("a").stop()
        died_s = await rig.wait_for(lambda: not rig.server("a").is_alive, every_s=0.5)
        assert died_s <= 20
        await anyio.sleep(1000)
        stats = rig.fake("a").stats.connections_total
        await rig.fake("a").start()
        assert await rig.wait_for(lambda: rig.server("a").is_alive, every_s=0.5) <= 15.6  # probe.interval_dead_max
        assert rig.fake("a").stats.connections_total == stats + 1


@in_virtual_time
async def test_all_dead_for_an_hour_then_all_back() -> None:
    async with virtual(TWO) as rig:
        for fake in rig.fleet:
            await fake.stop()
        await anyio.sleep(3600)
        began_s = anyio.current_time()
        answer = await rig.chat()
        assert answer.status in {502, 503}
        assert took(began_s) < 10
        for fake in rig.fleet:
            await fake.start()
        await anyio.sleep(15.1)
        assert (await rig.chat()).complete


# --- shutting down -----------------------------------------------------------------------------------------------


async def shut_down_during(spec: FakeSpec, **config: object) -> tuple[bytes, float]:
    """Begin a chat, shut down; what the client got then, and how long the shutdown took."""
    data = bytearray()
    async with anyio.create_task_group() as tasks:
        async with virtual([spec], **config) as rig:
            idle, busy = await rig.connect(), await rig.connect()
            await idle.get("/api/version")
            await busy.send(chat_request(close=False))
            await busy.until(b'"done":false')

            async def listen() -> None:
                data.extend(await busy.rest())

            tasks.start_soon(listen)
            tasks.start_soon(_refused_soon, rig, idle)
            began_s = anyio.current_time()
        took_s = took(began_s)
    return bytes(data), took_s


async def _refused_soon(rig: Rig, idle: Caller) -> None:
    assert await idle.rest() == b""
    with pytest.raises(ConnectionRefusedError):
        await rig.net.connect(HOST, rig.port)


@in_virtual_time
async def test_draining_waits_for_a_stream_and_for_nothing_else() -> None:
    body, took_s = await shut_down_during(replace(ONE, tokens=100, token_ms=250.0), drain_timeout="30s")
    assert b'"done":true' in body
    assert 24 < took_s < 25.5


@in_virtual_time
async def test_draining_cuts_what_takes_too_long_with_an_error_line() -> None:
    body, took_s = await shut_down_during(replace(ONE, tokens=100, token_ms=250.0), drain_timeout="5s")
    assert b'"done":true' not in body
    assert b'{"error":' in body
    assert body.endswith(b"0\r\n\r\n")  # the message is whole
    assert 5 <= took_s < 6


@in_virtual_time
async def test_sigterm_begins_the_drain() -> None:
    async with anyio.create_task_group() as tasks:
        with service_module._receiving_signals() as signals:
            async with virtual([replace(ONE, tokens=40, token_ms=1000.0)], drain_timeout="60s") as rig:
                caller = await rig.connect()
                await caller.send(chat_request())
                await anyio.sleep(10)
                os.kill(os.getpid(), signal.SIGTERM)
                await service_module._until_told(rig.service, signals)
                assert anyio.current_time() == pytest.approx(10, abs=0.1)
                tasks.start_soon(_whole_at_40, caller)
        assert anyio.current_time() < 41


async def _whole_at_40(caller: Caller) -> None:
    assert parse_answer(await caller.rest(), "POST").complete
    assert anyio.current_time() == pytest.approx(39, abs=1.1)


# --- an hour -----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_hour_of_mixed_traffic_with_a_flapping_server() -> None:
    flaps = Fault(FaultKind.FLAP, from_s=60, until_s=3500, period_s=197, up_s=120)
    fakes = [
        replace(FAST, name="a", tokens=4, first_token_ms=300.0, token_ms=200.0),
        replace(FAST, name="b", tokens=4, first_token_ms=400.0, token_ms=150.0, faults=(flaps,)),
    ]
    rng = Random(1)
    got: list[tuple[Answer, str | None]] = []
    async with virtual(fakes, probe={"interval": "60s"}) as rig:
        await anyio.sleep(31)
        quiet_tasks = tasks_living()

        async def ask() -> None:
            kind = rng.choice(("chat", "chat", "single", "leaves"))
            if kind == "leaves":
                with anyio.move_on_after(rng.uniform(0, 1)):
                    await rig.chat()
                return
            answer = await rig.chat(stream=kind == "chat")
            server = answer.header("X-Ollama-LB-Server")
            got.append((answer, server))

        async with anyio.create_task_group() as tasks:
            while anyio.current_time() < 3600:
                tasks.start_soon(ask)
                await anyio.sleep(rng.expovariate(1 / 50))
        assert len(got) > 40
        for answer, server in got:
            assert answer.status == 200
            assert answer.complete
            if not _is_whole(answer):
                assert b'{"error":' in answer.body
                assert server == "b"  # it was under way there as that went down
        assert sum(1 for answer, _ in got if not _is_whole(answer)) < 5
        assert rig.server("a").health > 10

        await anyio.sleep(120)
        assert rig.left_overs() == []
        await rig.wait_for(lambda: [rig.net.open_to(fake.port) for fake in rig.fleet] == [0, 0])
        assert rig.net.open_to(rig.port) == 0
        await rig.wait_for(lambda: tasks_living() == quiet_tasks)  # a probe may be under way


def _is_whole(answer: Answer) -> bool:
    return b'"done":true' in answer.body
