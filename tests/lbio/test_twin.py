"""The simulator and the real I/O layer are twins: the same requests end at the same moments, on the same servers.

Both in virtual time, over a network without latency: `simulator.world` on planned moments, and the whole HTTP path of
`tests.lbio.virtual`. Nothing is noise here, so nothing is compared by percentiles: every request is. The scenarios are
those of `benchmarks.fidelity`, which compares with real sockets. Their values are such that no two things happen at the
same instant by chance: what is decided then is not modelled, and no defect.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import anyio
import pytest

from benchmarks.fidelity import CONFIG_TABLES, body_of
from benchmarks.stages import raw_of, scenario_of, tables
from lbcore.balancer import LoadBalancer
from lbcore.parsing import Problem
from simulator.fleet import DEFAULT_MODEL as MODEL
from simulator.reports.results import Outcome
from simulator.scenario import Scenario, parse_scenario, run_scenario
from simulator.workload import make_source
from simulator.workloads.asks import Ask
from tests.lbio.virtual import Caller, Rig, in_virtual_time, took, virtual
from tests.simulator.wire import parse as parse_answer

N_REQUESTS = dict.fromkeys(tables(1), 60) | {"one-server-hangs": 150}
"""So that a probe falls into the time in which the server hangs."""
SEED = 1


@dataclass(frozen=True)
class Seen:
    """What one client saw. Times in ms since its request, to 10 us."""

    server: str
    attempts: int
    first_ms: float
    end_ms: float
    whole: bool


def in_the_simulator(scenario: Scenario) -> dict[int, Seen]:
    scenario = replace(scenario, link=replace(scenario.link, latency_ns=0, bandwidth=1e18))
    result = run_scenario(scenario, SEED, build=lambda config, _rng, _world: LoadBalancer(config, Random(SEED)))
    return {
        r.ask.id: Seen(
            r.server,
            r.n_attempts,
            round((r.ttft_ns or 0) / 1e6, 2),
            round(r.e2e_ns / 1e6, 2),
            r.outcome is Outcome.COMPLETED,
        )
        if r.outcome is not Outcome.LEFT
        else _left(r.ask)
        for r in result.requests
    }


def _left(one: Ask) -> Seen:
    return Seen("", 0, 0.0, round((one.leaves_after_ns or 0) / 1e6, 2), whole=False)


def over_http(scenario: Scenario, raw: Mapping[str, Any]) -> dict[int, Seen]:
    seen: dict[int, Seen] = {}

    @in_virtual_time
    async def story() -> None:
        specs = [replace(spec, faults=()) for spec in scenario.specs]
        config = {key: raw[key] for key in CONFIG_TABLES if key in raw}
        async with virtual(specs, **config) as rig:
            assert anyio.current_time() == 0
            for fake, spec in zip(rig.fleet, scenario.specs, strict=True):
                fake.set_fault(*spec.faults)
            async with anyio.create_task_group() as tasks:
                for one in make_source(scenario.workload, SEED).asks():
                    await anyio.sleep(one.arrives_ns / 1e9 - anyio.current_time())
                    tasks.start_soon(_ask, rig, one, seen)

    story()
    return seen


async def _ask(rig: Rig, one: Ask, seen: dict[int, Seen]) -> None:
    caller = await rig.connect()
    seen[one.id] = _left(one)
    with anyio.move_on_after(None if one.leaves_after_ns is None else one.leaves_after_ns / 1e9):
        seen[one.id] = await _answer(caller, one)
    caller.stream.close()


async def _answer(caller: Caller, one: Ask) -> Seen:
    body = body_of(one)
    began_s = anyio.current_time()
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    await caller.send(head + body)
    data = await caller.until(b"\r\n\r\n")
    while not caller.data:
        caller.data += await caller.stream.receive()
    first_ms = took(began_s) * 1000
    await _to_the_end(caller, chunked=b"Transfer-Encoding" in data)
    end_ms = took(began_s) * 1000
    answer = parse_answer(data + bytes(caller.data), "POST")
    whole = b'"done":true' in answer.body
    attempts = int(answer.header("X-Ollama-LB-Attempts") or 0)
    server = answer.header("X-Ollama-LB-Server") or ""
    streamed = one.stream and answer.status == 200
    return Seen(server, attempts, round(first_ms if streamed else 0, 2), round(end_ms, 2), whole)


async def _to_the_end(caller: Caller, *, chunked: bool) -> None:
    """Read the rest of the body; the connection is closed a moment later."""
    with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while chunked and not caller.data.endswith(b"0\r\n\r\n"):
            caller.data += await caller.stream.receive()


@pytest.mark.parametrize("name", N_REQUESTS)
def test_every_request_fares_alike(name: str) -> None:
    assert differences(scenario_of(name, N_REQUESTS[name]), raw_of(name, N_REQUESTS[name])) == []


SMALL: Mapping[str, Mapping[str, Any]] = {
    "slow": {"fault": {"kind": "slow"}},
    "crawl": {"fault": {"kind": "crawl"}},
    "error-500": {"fault": {"kind": "error-500"}},
    "busy-503": {"fault": {"kind": "busy-503"}},
    "not-streamed": {"workload": {"stream": 0.5}},
    "num_ctx": {"workload": {"num_ctx": {"default": 0.7, "8192": 0.3}}},
    "cold": {"fleet": {"loaded": [], "load": "2011ms"}},
    "evictions": {
        "fleet": {"models": [{"name": MODEL, "size": "6GB"}, {"name": "other", "size": "6GB"}], "vram": "10GB"},
        "workload": {"models": {MODEL: 0.7, "other": 0.3}},
    },
    "keep_alive": {"fleet": {"keep_alive": "1500ms", "load": "807ms"}, "workload": {"rate": 1.0}},
    "leaves": {"workload": {"leave": {"share": 0.5, "after": {"min": "200ms", "max": "2s"}}}},
    "full-queue": {"workload": {"rate": 40.0}, "queue": {"length_max": 10}},
    "first-finish": {"race": {"winner": "first-finish"}},
    "most-tokens": {"race": {"winner": "most-tokens", "measure": "1s"}},
}
"""What each differs in from three equal servers with 4 slots, 40 requests and no fault."""


@pytest.mark.parametrize("name", SMALL)
def test_every_request_fares_alike_also_when(name: str) -> None:
    base = tables(1)["slow-x20"]
    more = dict(SMALL[name])
    more["fleet"] = [{**server, "slots": 4, **more.get("fleet", {})} for server in base["fleet"][:3]]
    lengths = {"prompt_tokens": {"min": 20, "max": 2000}, "output_tokens": {"min": 5, "max": 60}}
    workload = {"kind": "poisson", "rate": 8.0, "start": "3.37s", "requests": 40, **lengths}
    more["workload"] = {**workload, **more.get("workload", {})}
    if "fault" in more:
        more["fault"] = [{**more["fault"], "servers": ["b"], "from": "4.123s", "until": "7.511s"}]
    raw = {"about": "", "duration": "600s", "settle": "600s", **more}
    problems: list[Problem] = []
    scenario = parse_scenario(raw, name, problems)
    assert scenario is not None, problems
    assert differences(scenario, raw) == []


def differences(scenario: Scenario, raw: Mapping[str, Any]) -> list[str]:
    simulated, real = in_the_simulator(scenario), over_http(scenario, raw)
    assert len(real) == len(simulated)
    differ = [f"request {key}: simulated {simulated[key]}, over HTTP {real[key]}" for key in simulated]
    return [line for key, line in zip(simulated, differ, strict=True) if not _alike(simulated[key], real[key])]


def _alike(one: Seen, other: Seen) -> bool:
    times = pytest.approx((one.first_ms, one.end_ms), abs=0.02) == (other.first_ms, other.end_ms)
    return times and replace(one, first_ms=0, end_ms=0) == replace(other, first_ms=0, end_ms=0)
