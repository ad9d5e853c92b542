"""Scenarios as dictionaries, run in a line."""

from __future__ import annotations

from typing import Any

from lbcore.parsing import Problem
from simulator.reports.results import Outcome, RunResult
from simulator.scenario import Scenario, parse_scenario, run_scenario

MODEL = "llama3.2:latest"


def server(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "slots": 4, "models": [MODEL], "loaded": [MODEL], **more}


def tables(*names: str, fleet: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    """Return a scenario of equal servers with light traffic for ten seconds, changed by `more`."""
    workload = {"kind": "poisson", "rate": 10.0, "prompt_tokens": 100, "output_tokens": 40, **more.pop("workload", {})}
    given = fleet if fleet is not None else [server(name) for name in names or ("a", "b")]
    return {"about": "a test", "duration": "10s", "fleet": given, "workload": workload, **more}


def scenario(raw: dict[str, Any]) -> Scenario:
    problems: list[Problem] = []
    parsed = parse_scenario(raw, "test", problems)
    assert parsed is not None, problems
    return parsed


def run(*names: str, seed: int = 1, **more: Any) -> RunResult:
    """Run with every invariant checked; what must hold of all runs is asserted here."""
    result = run_scenario(scenario(tables(*names, **more)), seed, audit=True)
    assert result.violations == []
    assert Outcome.UNFINISHED not in {request.outcome for request in result.requests}
    return result


def outcomes(result: RunResult) -> dict[str, int]:
    found: dict[str, int] = {}
    for request in result.requests:
        found[request.outcome] = found.get(request.outcome, 0) + 1
    return found
