"""What must hold whatever the fleet, its clients and its faults are; hypothesis looks for a case, and makes it small.

What holds of every run at all is in `simulator.promises`. Here are bounds that hold under a condition, each drawn so
that the condition is met.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import tomli_w
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from lbcore.commands import AttemptKind
from lbcore.events import Reason
from simulator.faults import BREAKS, FaultKind
from simulator.reports.results import Outcome, RequestResult, RunResult
from simulator.sweeps.dice import Tables, draw_scenario
from simulator.sweeps.swarm import run_tables
from tests.simulator.worlds import MODEL, run, scenario, server, tables

_T = TypeVar("_T")

few = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


class DrawnDice:
    """Choices that hypothesis makes, so that it can make them simpler."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def pick(self, options: Sequence[_T]) -> _T:
        return options[self._draw(st.integers(0, len(options) - 1))]

    def whole(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def chance(self, share: float) -> bool:
        return self._draw(st.integers(0, 99)) >= 100 - round(100 * share)


@st.composite
def scenarios(draw: st.DrawFn) -> Tables:
    return {**draw_scenario(DrawnDice(draw)), "seed": draw(st.integers(1, 1000))}


def ran(raw: Tables) -> RunResult:
    """Run, with the file in the report of a failure."""
    note(tomli_w.dumps(raw))
    return run_tables(raw, "drawn")


def attempts_of(result: RunResult, request: RequestResult) -> list[Any]:
    return [attempt for attempt in result.attempts if attempt.request_id == request.ask.id]


# --- of every scenario -----------------------------------------------------------------------------------------------


@few
@given(scenarios())
def test_every_promise_is_kept(raw: Tables) -> None:
    assert ran(raw).violations == []


@few
@given(scenarios())
def test_every_request_has_one_outcome_and_one_answer(raw: Tables) -> None:
    result = ran(raw)
    assert len({request.ask.id for request in result.requests}) == len(result.requests)
    delivered = Counter(attempt.request_id for attempt in result.attempts if attempt.delivered)
    assert not delivered or max(delivered.values()) == 1
    for request in result.requests:
        assert request.outcome is not Outcome.UNFINISHED
        if request.outcome is Outcome.COMPLETED:
            assert delivered[request.ask.id] == 1
            assert request.tokens == request.ask.output_tokens
        assert max((a.ended_ns for a in attempts_of(result, request) if a.delivered), default=0) <= request.ended_ns


@few
@given(scenarios())
def test_a_seed_says_it_all(raw: Tables) -> None:
    one, two = ran(raw), ran(raw)
    assert (one.requests, one.attempts, one.health) == (two.requests, two.attempts, two.health)


PRINTS_RUNS = """
from simulator.sweeps.swarm import run_tables, swarm_scenario
for seed in (5, 6, 7):
    result = run_tables(swarm_scenario(seed), "", keep_lines=True)
    print(result.requests, result.attempts, result.health, result.lines, sorted(result.gaps.bins.items()))
"""


def test_a_seed_says_it_all_whatever_python_hashes() -> None:
    def printed(hash_seed: str) -> bytes:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run([sys.executable, "-c", PRINTS_RUNS], env=env, capture_output=True, check=True).stdout

    assert printed("1") == printed("77")


# --- under a condition ------------------------------------------------------------------------------------------------

KINDS = [kind for kind in FaultKind if kind not in BREAKS]


@few
@given(
    kind=st.sampled_from(list(FaultKind)),
    seed=st.integers(1, 10_000),
    n_servers=st.integers(2, 5),
    race=st.sampled_from([{}, {"racers_max": 1, "hedges_max": 0}, {"racers_min": 2}, {"winner": "most-tokens"}]),
    whole=st.booleans(),
    from_ms=st.integers(0, 5000),
    after_tokens=st.integers(0, 5),
)
def test_one_bad_server_fails_nobody_who_was_not_given_its_answer(
    kind: FaultKind, seed: int, n_servers: int, race: Tables, whole: bool, from_ms: int, after_tokens: int
) -> None:
    names = "abcde"[:n_servers]
    fault: Tables = {"kind": str(kind), "servers": ["a"], "from": f"{from_ms}ms"}
    if kind in BREAKS:
        fault["after_tokens"] = after_tokens
    raw = tables(
        *names,
        fault=fault,
        race=race,
        retry={"budget_min": 100, "budget": 1.0},
        timeouts={"first_token_warm": "2s", "first_token_cold": "5s", "answer": "3s", "silence": "1s"},
        workload={"rate": 8.0, "stream": 0.0 if whole else 1.0},
        settle="1800s",
    )
    result = ran({**raw, "seed": seed})
    assert result.violations == []
    failed = [request for request in result.requests if request.outcome is not Outcome.COMPLETED]
    assert [(r.ask.id, r.why) for r in failed if r.committed_ns is None] == []
    assert {request.server for request in failed} <= {"a"}


@settings(few, max_examples=5)
@given(
    kind=st.sampled_from(["error-500", "busy-503", "refuse", "reset", "garbage", "hang", "hang-chat"]),
    seed=st.integers(1, 10_000),
    n_servers=st.integers(2, 6),
    rate=st.sampled_from([20.0, 40.0]),
)
def test_retries_do_not_feed_a_storm(kind: str, seed: int, n_servers: int, rate: float) -> None:
    """Every server fails, most requests are retried at once: the budget keeps the retries under a fifth."""
    result = ran(
        tables(
            *"abcdef"[:n_servers],
            fault={"kind": kind, "from": "2s", "until": "8s"},
            race={"racers_max": 1, "hedges_max": 0},
            timeouts={"first_token_warm": "1s", "first_token_cold": "2s"},
            workload={"rate": rate},
            settle="1800s",
            seed=seed,
        )
    )
    assert result.violations == []
    kinds = Counter(attempt.kind for attempt in result.attempts)
    assert kinds[AttemptKind.RETRY] <= 0.2 * len(result.requests) + 10, kinds


@settings(few, max_examples=5)
@given(
    seed=st.integers(1, 10_000), n_servers=st.integers(2, 6), policy=st.sampled_from(["expected-first-token", "health"])
)
def test_no_server_starves(seed: int, n_servers: int, policy: str) -> None:
    """Each of n equal servers is asked now and then, one that was slow for a while included.

    The least health is a fifth of the most here, so the least share of 300 requests is 10: none at all is 1 in 20,000.
    """
    names = "abcdef"[:n_servers]
    result = ran(
        tables(
            *names,
            selection={"policy": policy, "forget": "1s"},
            health={"value_max": 5.0},
            race={"racers_max": 1, "hedges_max": 0},
            fault={"kind": "slow", "servers": ["a"], "until": "3s"},
            workload={"rate": 10.0},
            duration="40s",
            seed=seed,
        )
    )
    assert result.violations == []
    asked = Counter(attempt.server for attempt in result.attempts if attempt.started_ns > 10e9)
    assert set(asked) == set(names)


@few
@given(
    seed=st.integers(1, 10_000),
    n_servers=st.integers(2, 5),
    n_cold=st.integers(1, 4),
    race=st.sampled_from(
        [{"racers_min": 2}, {"racers_min": 3, "racers_max": 3}, {"winner": "most-tokens", "racers_min": 2}]
    ),
    whole=st.booleans(),
)
def test_a_lost_race_never_ends_a_load(seed: int, n_servers: int, n_cold: int, race: Tables, whole: bool) -> None:
    fleet = [
        server(name, loaded=[] if i < n_cold else [MODEL], load="3s") for i, name in enumerate("abcde"[:n_servers])
    ]
    timeouts = {"first_token_warm": "20s", "answer": "30s"}
    workload = {"rate": 3.0, "stream": 0.0 if whole else 1.0}
    race = {"racers_max": 2, "budget": 10.0, **race}
    result = ran(tables(fleet=fleet, race=race, timeouts=timeouts, workload=workload, duration="8s", seed=seed))
    assert result.violations == []
    asked = {attempt.server for attempt in result.attempts}
    loads = {of.name: of.loads for of in result.servers}
    for spec in fleet:
        assert loads[spec["name"]] == (1 if not spec["loaded"] and spec["name"] in asked else 0)


@few
@given(
    raw=scenarios(),
    after_ms=st.integers(0, 400),
)
def test_a_client_that_leaves_leaves_nothing_behind(raw: Tables, after_ms: int) -> None:
    for workload in raw["workload"]:
        workload["leave"] = {"share": 1.0, "after": f"{after_ms}ms"}
    result = ran(raw)
    assert result.violations == []  # servers that work for nobody are among these
    for request in result.requests:
        if request.outcome is not Outcome.LEFT:
            continue
        for attempt in attempts_of(result, request):
            load_goes_on = attempt.outcome == "cancelled" and attempt.why == Reason.LOST_RACE
            assert attempt.ended_ns <= request.ended_ns or load_goes_on or not attempt.delivered


@pytest.mark.parametrize("kind", ["refuse", "hang", "power-off", "partition"])
def test_a_dead_server_is_asked_again_within_its_bound(kind: str) -> None:
    probe = {"interval_dead": "500ms", "interval_dead_max": "2s", "timeout": "1s"}
    result = run(
        "a", "b", probe=probe, fault={"kind": kind, "servers": ["a"], "from": "2s", "until": "9s"}, duration="20s"
    )
    back = [point.at_ns for point in result.health if point.server == "a" and point.at_ns >= 9e9 and point.value >= 1]
    assert min(back) < 9e9 + 2e9 + 1e9 + 0.3e9  # the pause, a probe that was just going wrong, and a retransmission


def test_the_scenarios_of_this_file_are_sound() -> None:
    assert scenario(tables("a")).config.servers
