"""The six scenarios of `benchmarks.fidelity`, each stressing something else, and their servers over real HTTP.

`python -m benchmarks.stages NAME` serves a scenario's fleet: prints `{"ports": […]}`; once every server has seen its
first probe, its faults begin to count and `{"began_ns": …}` (monotonic) is printed. Each line on standard input is
answered with what the servers have done until then. Ends when standard input does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread

from lbcore.parsing import Problem
from simulator.scenario import Scenario, parse_scenario
from simulator.serve import Stats, now_ns, serve_fleet

RATE = 5.0
START_S = 20
"""When clients come, after the balancer's first probes: all processes are up by then."""

_MODEL = "llama3.2:latest"
_LENGTHS = {"prompt_tokens": {"min": 20, "max": 2000}, "output_tokens": {"median": 40, "p95": 100, "max": 300}}


def _fleet(*, names: str = "abcd", first_token_ms: int = 400, token_ms: int = 40, **more: Any) -> list[dict[str, Any]]:
    """Return servers that are almost equal: where nothing is random, ties would be decided by what is not modelled."""
    base = {"slots": 8, "loaded": [_MODEL], "token": f"{token_ms}ms", "prefill": 10_007.0}
    return [
        {"name": name, **base, "first_token": f"{first_token_ms + 3 * index}ms", **more}
        for index, name in enumerate(names)
    ]


def _poisson(rate: float = RATE, **more: Any) -> dict[str, Any]:
    return {"kind": "poisson", "rate": rate, **_LENGTHS, **more}


def _broken(kind: str, n_requests: int, **more: Any) -> list[dict[str, Any]]:
    """Return a fault of the last server in the middle third of a run."""
    third = n_requests / RATE / 3
    from_s, until_s = START_S + third + 1.3, START_S + 2 * third + 1.7  # not together with a probe
    return [{"kind": kind, "servers": ["d"], "from": f"{from_s:.1f}s", "until": f"{until_s:.1f}s"} | more]


def tables(n_requests: int) -> dict[str, dict[str, Any]]:
    """Return the scenarios as the tables that a scenario file has."""
    mixed = [
        *_fleet(names="ab", slots=6, prefill=5003.0, batch_slowdown=0.05, prefill_interference=0.5),
        *_fleet(names="c", slots=4, first_token_ms=600, token_ms=60, prefill=2503.0, batch_slowdown=0.1),
        *_fleet(names="d", slots=2, first_token_ms=800, token_ms=100, prefill=1259.0, batch_slowdown=0.3),
    ]
    long_prompts = {"prompt_tokens": {"median": 200, "p95": 1500, "min": 20, "max": 4000}}
    bursts = {"kind": "mmpp", "rate_low": 2.0, "rate_high": 6.5, "dwell_low": "16s", "dwell_high": "16s"}
    return {
        "healthy": {
            "about": "equal servers, nothing goes wrong: races and lengths",
            "fleet": _fleet(),
            "workload": _poisson(),
        },
        "slow-x20": {
            "about": "a server takes 20 times as long for a third of the run: hedges, selection, streams that crawl",
            "fleet": _fleet(slots=5),
            "workload": _poisson(),
            "fault": _broken("slow", n_requests),
        },
        "one-server-hangs": {
            "about": "a server accepts and never answers for a third of the run: probes, hedges, death, resurrection",
            "fleet": _fleet(slots=5),
            "workload": _poisson(),
            "fault": _broken("hang", n_requests),
        },
        "answers-500": {
            "about": "a server answers 500 for a third of the run: retries, blame by contrast, health",
            "fleet": _fleet(),
            "workload": _poisson(),
            "fault": _broken("error-500", n_requests),
        },
        "hedges": {
            "about": "no races, prompts of very different lengths: hedges, prefill at a rate, slower batches",
            "race": {"racers_max": 1},
            "fleet": _fleet(prefill=2003.0, batch_slowdown=0.05, prefill_interference=0.3),
            "workload": {**_poisson(), **long_prompts},
        },
        "bursts": {
            "about": "unequal servers, bursts beyond what they can do: the queue, unequal speeds, full batches",
            "fleet": mixed,
            "workload": {**_LENGTHS, **bursts},
        },
    }


def scenario_of(name: str, n_requests: int) -> Scenario:
    """Return one of the scenarios with so many requests."""
    problems: list[Problem] = []
    raw = raw_of(name, n_requests)
    scenario = parse_scenario(raw, name, problems)
    if scenario is None:
        raise ValueError("\n".join(str(problem) for problem in problems))
    return scenario


def raw_of(name: str, n_requests: int) -> Mapping[str, Any]:
    """Return the tables of one of the scenarios."""
    raw = tables(n_requests)[name]
    workload = {**raw["workload"], "start": f"{START_S}s", "requests": n_requests}
    longest_s = START_S + 3 * n_requests / RATE + 60
    return {**raw, "duration": f"{longest_s:.0f}s", "settle": "600s", "workload": workload}


async def _main(scenario: Scenario) -> None:
    specs = [replace(spec, faults=(), seed=0) for spec in scenario.specs]
    async with serve_fleet(specs) as fleet:
        print(json.dumps({"ports": [server.port for server in fleet]}), flush=True)
        while not all(server.stats.requests["/api/version"] for server in fleet):  # noqa: ASYNC110  nobody would tell
            await anyio.sleep(0.001)
        for server, spec in zip(fleet, scenario.specs, strict=True):
            server.set_fault(*spec.faults)
        print(json.dumps({"began_ns": now_ns()}), flush=True)
        while await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            print(json.dumps(_done([server.stats for server in fleet])), flush=True)


def _done(seen: Sequence[Stats]) -> dict[str, int]:
    return {
        "attempts": sum(stats.requests["/api/chat"] for stats in seen),
        "tokens": sum(stats.tokens_generated for stats in seen),
        "tokens_of_aborted": sum(stats.tokens_of_aborted for stats in seen),
    }


if __name__ == "__main__":
    # Not uvloop: its clock, which the fakes sleep by, has a resolution of 1 ms.
    anyio.run(_main, scenario_of(sys.argv[1], int(sys.argv[2])))
