"""Faults: the pure schedules, and each kind as a client on a raw socket sees it."""

import dataclasses
import itertools
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.fake_ollama import FakeModel, FakeSpec
from simulator.faults import NO_EFFECT, Effect, Fault, FaultKind, active, next_change_ns
from simulator.serve import FakeServer, serve_fleet
from tests.simulator.wire import Answer, ask, body_of, chat, connect, exchange, parse, receive_all, request

S = 1_000_000_000
SPEC = FakeSpec(
    "f", models=(FakeModel("tiny"),), start_loaded=("tiny",), first_token_ms=2, token_ms=1, load_ms=5, tokens=6
)
CHAT = request("POST", "/api/chat", chat())


def test_schedule_is_half_open() -> None:
    faults = [Fault(FaultKind.HANG, from_s=1, until_s=2)]
    assert [active(faults, t).instead for t in (0, S - 1, S, 2 * S - 1, 2 * S)] == [
        None, None, FaultKind.HANG, FaultKind.HANG, None,
    ]  # fmt: skip
    assert [next_change_ns(faults, t) for t in (0, S, 2 * S)] == [S, 2 * S, None]


def test_flap_is_up_first_and_then_periodic() -> None:
    faults = [Fault(FaultKind.FLAP, from_s=1, until_s=7, period_s=2, up_s=1.5)]
    down = [active(faults, t * S // 4).down for t in range(32)]
    expected = [4 <= t < 28 and (t - 4) % 8 >= 6 for t in range(32)]
    assert down == expected


def test_composition() -> None:
    slow, crawl = Fault(FaultKind.SLOW, factor=3), Fault(FaultKind.CRAWL, factor=5)
    late, early = Fault(FaultKind.CUT_MIDSTREAM, after_tokens=9), Fault(FaultKind.STALL_MIDSTREAM, after_tokens=2)
    effect = active([slow, crawl, late, early, Fault(FaultKind.BUSY_503), Fault(FaultKind.HANG)], 0)
    assert effect == Effect(
        instead=FaultKind.HANG,
        first_token_factor=3,
        token_factor=15,
        breaks=FaultKind.STALL_MIDSTREAM,
        after_tokens=2,
    )
    assert [effect.breaks_at(n) for n in (1, 2)] == [None, FaultKind.STALL_MIDSTREAM]
    assert active([], 5) is NO_EFFECT


@pytest.mark.parametrize("bad", [{"period_s": 0}, {"up_s": 3}, {"factor": 0}, {"after_tokens": -1}])
def test_nonsense_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="flap"):
        Fault(FaultKind.FLAP, **bad)  # type: ignore[arg-type]


ticks = st.integers(0, 40).map(lambda n: n / 4)


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    period = draw(st.integers(1, 12)) / 4
    up = draw(st.integers(0, round(period * 4))) / 4
    window = (draw(st.none() | ticks), draw(st.none() | ticks))
    return Fault(draw(st.sampled_from(FaultKind)), *window, period_s=period, up_s=up)


@given(st.lists(faults(), max_size=4), st.integers(0, 12 * S), st.integers(0, 12 * S))
def test_effect_changes_only_where_next_change_says(found: list[Fault], t: int, later: int) -> None:
    change = next_change_ns(found, t)
    assert change is None or change > t
    until = t + later if change is None else min(t + later, change - 1)
    assert active(found, until) == active(found, t)


# --- over sockets --------------------------------------------------------------------------------------------


async def silent_for(stream_url: str, raw: bytes, seconds: float = 0.05) -> bool:
    async with await connect(stream_url) as stream:
        await stream.send(raw)
        with anyio.move_on_after(seconds):
            await stream.receive()
            return False
    return True


async def faulty_chat(fault: Fault, **fields: Any) -> bytes:
    async with serve_fleet([dataclasses.replace(SPEC, faults=(fault,))]) as (server,):
        assert (await ask(server.url, "GET", "/api/version")).status == 200
        return await exchange(server.url, request("POST", "/api/chat", chat(**fields)))


async def healthy_answer() -> Answer:
    async with serve_fleet([SPEC]) as (server,):
        return parse(await exchange(server.url, CHAT))




@pytest.mark.anyio
async def test_refuse_and_heal() -> None:
    async with serve_fleet([SPEC]) as (server,):
        async with await connect(server.url) as idle:
            await idle.send(request("GET", "/api/version", close=False))
            await idle.receive()
            server.set_fault(Fault(FaultKind.REFUSE))
            assert await receive_all(idle) == b""
        with pytest.raises(OSError, match=r"onnect"):
            await connect(server.url)
        port = server.port
        server.set_fault(None)
        await wait_up(server)
        assert server.port == port
        assert parse(await exchange(server.url, CHAT)).lines[-1]["done"]


async def wait_up(server: FakeServer) -> None:
    with anyio.fail_after(1):
        while not server.up:  # noqa: ASYNC110
            await anyio.sleep(0.005)


@pytest.mark.anyio
async def test_flap() -> None:
    flap = Fault(FaultKind.FLAP, period_s=0.08, up_s=0.04)
    seen = []
    async with serve_fleet([dataclasses.replace(SPEC, faults=(flap,))]) as (server,):
        for _ in range(30):
            try:
                seen.append((await ask(server.url, "GET", "/api/version")).status)
            except (OSError, AssertionError, anyio.BrokenResourceError):  # refused, or cut in the middle
                seen.append(0)
            await anyio.sleep(0.008)
    flips = sum(a != b for a, b in itertools.pairwise(seen))
    assert set(seen) == {0, 200}
    assert flips >= 3


@pytest.mark.anyio
async def test_hang_hits_probes_too_and_ends_with_the_fault() -> None:
    async with serve_fleet([SPEC]) as (server,):
        server.set_fault(Fault(FaultKind.HANG))
        assert await silent_for(server.url, request("GET", "/api/tags"))
        assert await silent_for(server.url, CHAT)
        async with await connect(server.url) as stream:
            await stream.send(CHAT)
            await anyio.sleep(0.01)
            server.set_fault(None)
            assert parse(await receive_all(stream)).complete
        assert [abort.stage for abort in server.stats.aborts] == ["hung", "hung"]


@pytest.mark.anyio
async def test_hang_chat_answers_probes() -> None:
    async with serve_fleet([SPEC]) as (server,):
        server.set_fault(Fault(FaultKind.HANG_CHAT))
        for path in ("/", "/api/version", "/api/tags", "/api/ps"):
            assert (await ask(server.url, "GET", path)).status == 200
        assert await silent_for(server.url, CHAT)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("kind", "first_ms", "last_ms"), [(FaultKind.SLOW, 40, 40 + 5 * 20), (FaultKind.CRAWL, 2, 2 + 5 * 20)]
)
async def test_slow_and_crawl(kind: FaultKind, first_ms: float, last_ms: float) -> None:
    async with (
        serve_fleet([dataclasses.replace(SPEC, faults=(Fault(kind, factor=20),))]) as (server,),
        await connect(server.url) as stream,
    ):
        start = anyio.current_time()
        await stream.send(CHAT)
        await stream.receive()
        first = anyio.current_time() - start
        await receive_all(stream)
        last = anyio.current_time() - start
    assert first_ms <= first * 1000 < first_ms + 35  # CRAWL is told from SLOW; a busy machine is late
    assert last_ms <= last * 1000 < last_ms + 150


@pytest.mark.anyio
@pytest.mark.parametrize(("kind", "status"), [(FaultKind.ERROR_500, 500), (FaultKind.BUSY_503, 503)])
async def test_error_statuses(kind: FaultKind, status: int) -> None:
    async with serve_fleet([dataclasses.replace(SPEC, faults=(Fault(kind),))]) as (server,):
        answer = await ask(server.url, "POST", "/api/chat", chat())
        assert answer.status == status
        assert list(body_of(answer)) == ["error"]
        openai = await ask(server.url, "POST", "/v1/chat/completions", chat())
        assert openai.status == status
        assert list(body_of(openai)["error"]) == ["message", "type", "param", "code"]
        assert (await ask(server.url, "GET", "/api/ps")).status == 200


@pytest.mark.anyio
async def test_garbage_is_no_http() -> None:
    async with serve_fleet([dataclasses.replace(SPEC, faults=(Fault(FaultKind.GARBAGE),))]) as (server,):
        raw = await exchange(server.url, request("GET", "/api/version"))
        assert raw
        assert not raw.startswith(b"HTTP")


@pytest.mark.anyio
async def test_reset() -> None:
    async with serve_fleet([dataclasses.replace(SPEC, faults=(Fault(FaultKind.RESET),))]) as (server,):
        for raw in (CHAT, request("GET", "/api/tags")):
            with pytest.raises(anyio.BrokenResourceError):
                await exchange(server.url, raw)
        assert server.stats.aborted == 0


@pytest.mark.anyio
async def test_cut_midstream() -> None:
    whole = await healthy_answer()
    answer = parse(await faulty_chat(Fault(FaultKind.CUT_MIDSTREAM, after_tokens=3)))
    assert answer.status == 200
    assert not answer.complete
    assert answer.text == "".join(line["message"]["content"] for line in whole.lines[:3])


@pytest.mark.anyio
async def test_stall_midstream_keeps_the_connection_and_the_slot() -> None:
    async with serve_fleet([SPEC]) as (server,):
        server.set_fault(Fault(FaultKind.STALL_MIDSTREAM, after_tokens=2))
        async with await connect(server.url) as stream:
            await stream.send(CHAT)
            data = b""
            with anyio.move_on_after(0.08):
                while True:
                    data += await stream.receive()
            assert len(parse(data).lines) == 2
            assert not parse(data).complete
            assert server.stats.concurrent == 1
        await anyio.sleep(0.03)
        assert server.stats.concurrent == 0


@pytest.mark.anyio
async def test_error_midstream() -> None:
    answer = parse(await faulty_chat(Fault(FaultKind.ERROR_MIDSTREAM, after_tokens=4)))
    assert answer.complete
    assert [list(line)[-1] for line in answer.lines] == ["done"] * 4 + ["error"]


@pytest.mark.anyio
async def test_end_midstream() -> None:
    answer = parse(await faulty_chat(Fault(FaultKind.END_MIDSTREAM, after_tokens=4)))
    assert answer.complete
    assert [line["done"] for line in answer.lines] == [False] * 4


@pytest.mark.anyio
async def test_breaks_before_the_first_token_and_after_the_last() -> None:
    assert parse(await faulty_chat(Fault(FaultKind.ERROR_MIDSTREAM, after_tokens=0))).status == 500
    assert parse(await faulty_chat(Fault(FaultKind.END_MIDSTREAM, after_tokens=0))).body == b""
    whole_but_for_done = parse(await faulty_chat(Fault(FaultKind.END_MIDSTREAM, after_tokens=6)))
    assert [line["done"] for line in whole_but_for_done.lines] == [False] * 6


@pytest.mark.anyio
async def test_single_answers_break_too() -> None:
    assert await faulty_chat(Fault(FaultKind.CUT_MIDSTREAM), stream=False) == b""
    assert parse(await faulty_chat(Fault(FaultKind.ERROR_MIDSTREAM), stream=False)).status == 500


@pytest.mark.anyio
async def test_down_from_the_start_has_an_address() -> None:
    fault = Fault(FaultKind.REFUSE, until_s=0.05)
    async with serve_fleet([dataclasses.replace(SPEC, faults=(fault,))]) as (server,):
        url = server.url
        with pytest.raises(OSError, match=r"onnect"):
            await connect(url)
        await wait_up(server)
        assert server.url == url
        assert (await ask(url, "GET", "/")).status == 200


@pytest.mark.anyio
async def test_a_schedule_runs_by_itself() -> None:
    fault = Fault(FaultKind.REFUSE, from_s=0.05, until_s=0.1)
    async with serve_fleet([dataclasses.replace(SPEC, faults=(fault,))]) as (server,):
        ups = [server.up]
        await anyio.sleep(0.07)
        ups.append(server.up)
        assert ups == [True, False]
        await anyio.sleep(0.05)
        await wait_up(server)
        assert parse(await exchange(server.url, CHAT)).complete
