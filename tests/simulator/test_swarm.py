"""A thousand random scenarios, everything checked after every step; and that the swarm says what it found."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lbcore import pools
from lbcore.ledger import Ledger
from simulator.cli import load_scenario
from simulator.faults import FaultKind
from simulator.network import LinkFaultKind
from simulator.reports.results import RunResult
from simulator.scenario import run_scenario
from simulator.sweeps.dice import SeededDice, draw_scenario
from simulator.sweeps.swarm import as_file, reproduce, run_seed, run_swarm, swarm, swarm_scenario
from tests.simulator.test_world import shape

CHUNKS = 20
PER_CHUNK = 50


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_thousand_random_runs_keep_every_promise(chunk: int) -> None:
    first = 1 + chunk * PER_CHUNK
    failing = {
        reproduce(seed): run.violations
        for seed in range(first, first + PER_CHUNK)
        if (run := run_seed(seed)).violations
    }
    assert failing == {}


def test_runs_are_the_same_where_few_servers_count_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that is kept is audited after every step, and everybody is chosen as without it."""

    def without_time() -> list[Any]:
        return [(r.violations, r.n_requests, r.n_attempts, r.n_events) for r in map(run_seed, range(2001, 2041))]

    expected = without_time()
    monkeypatch.setattr(pools, "FEW", 0)
    assert without_time() == expected


def told(result: RunResult) -> list[Any]:
    return [[shape(request) for request in result.requests], result.lines, result.health, result.attempts]


@pytest.mark.parametrize("seed", [3, 11, 42])
def test_a_file_is_the_run_that_its_seed_was(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "found.toml"
    path.write_text(as_file(seed), encoding="utf-8")
    from_file = run_scenario(load_scenario(path), keep_lines=True, audit=True)
    again = run_scenario(load_scenario(path), keep_lines=True)
    assert told(from_file) == told(again)  # an audit changes nothing
    assert (len(from_file.requests), from_file.n_events) == (run_seed(seed).n_requests, run_seed(seed).n_events)


def test_the_swarm_turns_everything_on_and_off() -> None:
    drawn = [draw_scenario(SeededDice(seed)) for seed in range(400)]
    kinds = {fault["kind"] for tables in drawn for fault in tables.get("fault", [])}
    assert kinds == {*FaultKind, *LinkFaultKind, "pause"}
    assert {len(tables["fleet"]) for tables in drawn} == set(range(1, 7))
    for table in ("race", "selection", "health", "probe", "retry", "queue", "routes", "network", "alias", "fault"):
        share = sum(table in tables for tables in drawn) / len(drawn)
        assert 0.2 < share < 0.95, table
    assert {tables["workload"][0]["kind"] for tables in drawn} == {"poisson", "even", "gamma", "herd", "sessions"}
    assert all(a != b for a, b in pairwise(drawn))


def test_the_number_of_processes_changes_nothing() -> None:
    def without_time(seeds: range, workers: int) -> list[Any]:
        return [(r.seed, r.violations, r.n_requests, r.n_attempts, r.n_events) for r in run_swarm(seeds, workers)]

    assert without_time(range(1, 17), 1) == without_time(range(1, 17), 2)


@pytest.mark.plain_core
def test_what_is_found_is_told_and_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    honest = Ledger.release

    def careless(self: Ledger, attempt: object) -> None:
        honest(self, attempt)  # type: ignore[arg-type]
        attempt.server.in_flight += 1  # type: ignore[attr-defined]

    monkeypatch.setattr(Ledger, "release", careless)
    assert swarm(2, 7, save=tmp_path, workers=1) == 1
    out = capsys.readouterr().out
    assert "ollama-lb simulate --swarm 1 --seed 7\n" in out
    assert "2 runs with a violation" in out
    assert load_scenario(tmp_path / "swarm-8.toml").seed == 8
    assert (
        (tmp_path / "swarm-7.toml").read_text(encoding="utf-8").startswith("# ollama-lb simulate --swarm 1 --seed 7\n")
    )


@pytest.mark.plain_core
def test_a_core_that_raises_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(Ledger, "release", broken)
    (violation,) = run_seed(1).violations
    assert violation.startswith("raised ZeroDivisionError: on purpose (test_swarm.py:")


def test_a_scenario_carries_its_seed() -> None:
    assert swarm_scenario(99)["seed"] == 99
