"""The simulator and the real I/O layer are twins: the same requests end at the same moments, on the same servers.

Both in virtual time, over a network without latency: `simulator.world` on planned moments, and the whole HTTP path of
`tests.lbio.virtual`. Nothing is noise here, so nothing is compared by percentiles: every request is. The scenarios are
those of `benchmarks.fidelity`, which compares with real sockets. Their values are such that no two things happen at the
same instant by chance: what is decided then is not modelled, and no defect.
"""

from dataclasses import dataclass, replace
from random import Random

import anyio
import pytest

from benchmarks.fidelity import CONFIG_TABLES, body_of
from benchmarks.stages import raw_of, scenario_of, tables
from lbcore.balancer import LoadBalancer
from simulator.asks import Ask
from simulator.results import Outcome
from simulator.scenario import Scenario, run_scenario
from simulator.workload import make_source
from tests.lbio.virtual import Rig, in_virtual_time, took, virtual
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
        for r in result.requests
    }


def over_http(scenario: Scenario, name: str) -> dict[int, Seen]:
    raw = raw_of(name, N_REQUESTS[name])
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
    caller, body = await rig.connect(), body_of(one)
    began_s = anyio.current_time()
    head = b"POST /api/chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    await caller.send(head + body)
    data = await caller.until(b"\r\n\r\n")
    while not caller.data:
        caller.data += await caller.stream.receive()
    first_ms = took(began_s) * 1000
    while not caller.data.endswith(b"0\r\n\r\n") and b"Transfer-Encoding" in data:
        caller.data += await caller.stream.receive()
    end_ms = took(began_s) * 1000
    answer = parse_answer(data + bytes(caller.data), "POST")
    whole = b'"done":true' in answer.body
    attempts = int(answer.header("X-Ollama-LB-Attempts") or 0)
    server = answer.header("X-Ollama-LB-Server") or ""
    seen[one.id] = Seen(server, attempts, round(first_ms if whole else 0, 2), round(end_ms, 2), whole)
    caller.stream.close()


@pytest.mark.parametrize("name", N_REQUESTS)
def test_every_request_fares_alike(name: str) -> None:
    scenario = scenario_of(name, N_REQUESTS[name])
    simulated, real = in_the_simulator(scenario), over_http(scenario, name)
    differ = [f"request {key}: simulated {simulated[key]}, over HTTP {real[key]}" for key in simulated]
    differ = [line for key, line in zip(simulated, differ, strict=True) if not _alike(simulated[key], real[key])]
    assert differ == []
    assert len(real) == len(simulated) == N_REQUESTS[name]


def _alike(one: Seen, other: Seen) -> bool:
    times = pytest.approx((one.first_ms, one.end_ms), abs=0.02) == (other.first_ms, other.end_ms)
    return times and replace(one, first_ms=0, end_ms=0) == replace(other, first_ms=0, end_ms=0)
