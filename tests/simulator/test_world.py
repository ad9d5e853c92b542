"""Runs of the production core in the simulated world: timing, faults, clients, and that a seed says it all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lbcore.ledger import Ledger
from lbcore.schema import MS_NS, SECOND_NS
from simulator.reports.results import Outcome, RequestResult
from simulator.scenario import run_scenario
from tests.simulator.worlds import MODEL, outcomes, run, scenario, server, tables


def in_steps(result_ns: int | None) -> float:
    assert result_ns is not None
    return result_ns / MS_NS


def test_the_first_request_pays_for_its_connection_and_the_next_does_not() -> None:
    result = run("a", workload={"kind": "even", "rate": 1.0, "start": "1s"})
    first, second = (in_steps(request.ttft_ns) for request in result.requests[:2])
    # 0.1 ms each way; the prompt's 400 bytes take some us
    assert first == pytest.approx(0.2 + 0.1 + 50 + 0.1, abs=0.01)
    assert second == pytest.approx(0.1 + 50 + 0.1, abs=0.01)
    assert in_steps(result.requests[1].e2e_ns) == pytest.approx(0.1 + 50 + 39 * 5 + 0.1, abs=0.01)


def test_an_answer_that_is_not_streamed_has_no_first_token_of_its_own() -> None:
    result = run("a", workload={"kind": "even", "rate": 1.0, "stream": 0.0})
    assert outcomes(result) == {"completed": len(result.requests)}
    assert {request.first_token_ns for request in result.requests} == {None}
    assert {request.tokens for request in result.requests} == {40}


@pytest.mark.parametrize(
    "kind", ["refuse", "hang", "hang-chat", "slow", "error-500", "busy-503", "garbage", "reset", "flap"]
)
def test_one_bad_server_fails_nobody(kind: str) -> None:
    result = run("a", "b", "c", fault={"kind": kind, "servers": ["b"], "from": "2s"})
    failed = [request for request in result.requests if request.outcome is not Outcome.COMPLETED]
    assert [request.why for request in failed if request.committed_ns is None] == []
    assert {request.server for request in failed} <= {"b"}  # was streaming from it when it went down
    assert bool(failed) <= (kind in {"refuse", "flap"})


@pytest.mark.parametrize("kind", ["cut-midstream", "error-midstream", "end-midstream", "stall-midstream"])
def test_a_stream_that_breaks_fails_only_who_was_committed_to_it(kind: str) -> None:
    timeouts = {"silence": "1s"}
    result = run("a", "b", "c", timeouts=timeouts, fault={"kind": kind, "servers": ["b"], "from": "2s"})
    failed = [request for request in result.requests if request.outcome is Outcome.FAILED]
    assert failed
    assert {request.server for request in failed} == {"b"}
    assert {request.committed_ns is not None for request in failed} == {True}
    assert len(failed) < 0.1 * len(result.requests)


def test_a_fault_that_begins_in_the_midst_of_an_answer_breaks_it_at_the_next_token() -> None:
    result = run(
        "a",
        workload={"kind": "even", "rate": 0.2, "output_tokens": 1000},
        fault={"kind": "cut-midstream", "from": "6001ms"},
    )
    (broken,) = (request for request in result.requests if request.outcome is Outcome.FAILED)
    begun_ms = in_steps(broken.first_token_ns)
    told_ms = broken.ended_ns / MS_NS
    assert 6001 <= told_ms <= 6001 + 5.2
    assert (told_ms - begun_ms) % 5 == pytest.approx(0, abs=0.01)


def test_crawling_tokens_are_seen_between_tokens_and_not_before_the_first() -> None:
    result = run("a", workload={"rate": 0.5}, fault={"kind": "crawl", "factor": 10.0})
    assert in_steps(result.gaps.max_ns) == pytest.approx(50)
    assert min(in_steps(request.ttft_ns) for request in result.requests) < 51


def test_a_client_that_leaves_leaves_nothing_behind() -> None:
    result = run("a", "b", workload={"leave": {"share": 1.0, "after": "100ms"}})
    assert outcomes(result) == {"left": len(result.requests)}
    for request in result.requests:
        mine = [attempt for attempt in result.attempts if attempt.request_id == request.ask.id]
        assert max(attempt.ended_ns for attempt in mine) == request.ended_ns
        assert request.e2e_ns == 100 * MS_NS
    assert sum(of.busy_ns for of in result.servers) > 0


def test_poison_crashes_every_runner_that_it_meets() -> None:
    result = run("a", "b", "c", workload={"poison": 0.05, "rate": 3.0}, duration="20s")
    assert {of.loads > 0 for of in result.servers} == {True}
    poisonous = [request for request in result.requests if request.ask.poison]
    assert poisonous
    assert {request.outcome for request in poisonous} == {Outcome.FAILED}


def test_a_full_cold_queue_says_503_and_the_request_goes_elsewhere() -> None:
    cold = server("cold", loaded=[], queue_max=0, load="3s")
    result = run(fleet=[cold, server("warm", slots=1)], workload={"rate": 4.0})
    assert outcomes(result) == {"completed": len(result.requests)}


def test_a_conversation_is_read_on_from_where_its_slot_stopped() -> None:
    talk = {"kind": "sessions", "users": 1, "turns": 4, "prompt_tokens": 2000, "output_tokens": 20, "think": "100ms"}
    raw = tables(fleet=[server("a", slots=1, prefill=2000.0)], duration="30s")
    raw["workload"] = talk
    result = run_scenario(scenario(raw), audit=True)
    first, second = result.requests[0], result.requests[1]
    assert second.ask.prompt_tokens > first.ask.prompt_tokens
    assert second.ttft_ns is not None
    # what is new is less than two thirds of the prompt
    assert in_steps(second.ttft_ns) < 50 + second.ask.prompt_tokens / 2 * 2 / 3


def test_a_server_without_power_says_nothing_and_is_left() -> None:
    result = run(
        "a", "b", timeouts={"silence": "1s"}, fault={"kind": "power-off", "servers": ["a"], "from": "3s", "until": "6s"}
    )
    failed = [request for request in result.requests if request.outcome is Outcome.FAILED]
    assert {request.server for request in failed} <= {"a"}
    assert {"silence between tokens"} >= {a.why for a in result.attempts if a.outcome == "failed" and a.delivered}
    late = [request for request in result.requests if request.ask.arrives_ns > 4 * SECOND_NS]
    assert {request.outcome for request in late} == {Outcome.COMPLETED}


def test_what_was_sent_into_a_partition_arrives_when_it_is_over() -> None:
    result = run("a", fault={"kind": "partition", "servers": ["a"], "from": "3s", "until": "5s"})
    within = [r for r in result.requests if 3 * SECOND_NS < r.ask.arrives_ns < 5 * SECOND_NS]
    assert within
    assert all(request.outcome is Outcome.COMPLETED and request.ended_ns > 5 * SECOND_NS for request in within)


def test_latency_of_a_link_is_paid_both_ways() -> None:
    result = run("a", network={"latency": "10ms"}, workload={"kind": "even", "rate": 1.0})
    assert in_steps(result.requests[1].ttft_ns) == pytest.approx(10 + 50 + 10, abs=0.01)


def test_a_suspended_balancer_finds_everything_at_once() -> None:
    result = run("a", "b", fault={"kind": "pause", "from": "3s", "until": "6s"})
    within = [r for r in result.requests if 3 * SECOND_NS < r.ask.arrives_ns < 6 * SECOND_NS]
    assert within
    assert outcomes(result) == {"completed": len(result.requests)}
    assert all(request.first_token_ns is not None and request.first_token_ns > 6 * SECOND_NS for request in within)


def test_wasted_work_is_counted() -> None:
    result = run("a", "b", race={"racers_min": 2, "racers_max": 2, "budget": 10.0})
    lost = [attempt for attempt in result.attempts if not attempt.delivered]
    assert lost
    assert sum(of.wasted_ns for of in result.servers) == sum(attempt.busy_ns for attempt in lost)
    assert sum(of.tokens for of in result.servers) == sum(attempt.tokens for attempt in result.attempts)
    assert sum(request.tokens for request in result.requests) == 40 * len(result.requests)


def shape(request: RequestResult) -> tuple[object, ...]:
    return request.ask, request.outcome, request.server, request.first_token_ns, request.ended_ns, request.n_attempts


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    raw = tables("a", "b", "c", fault={"kind": "flap", "servers": ["a"]}, network={"jitter": "1ms", "loss": 0.01})
    one, two, other = (run_scenario(scenario(raw), seed) for seed in (1, 1, 2))
    assert list(map(shape, one.requests)) == list(map(shape, two.requests))
    assert list(map(shape, one.requests)) != list(map(shape, other.requests))


PRINTS_A_RUN = """
from simulator.scenario import run_scenario
from tests.simulator.test_world import shape
from tests.simulator.worlds import scenario, tables
raw = tables("a", "b", "c", fault={"kind": "flap", "servers": ["a"]}, network={"jitter": "1ms", "loss": 0.01})
result = run_scenario(scenario(raw), keep_lines=True)
print([shape(request) for request in result.requests], result.lines, result.health)
"""


def test_a_run_does_not_depend_on_the_hash_seed() -> None:
    def printed(hash_seed: str) -> bytes:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run([sys.executable, "-c", PRINTS_A_RUN], env=env, capture_output=True, check=True).stdout

    assert printed("1") == printed("4242")


@pytest.mark.plain_core
def test_audit_sees_a_core_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "waste", lambda *_: None)
    honest = Ledger.release

    def careless(self: Ledger, attempt: object) -> None:
        honest(self, attempt)  # type: ignore[arg-type]
        attempt.server.in_flight += 1  # type: ignore[attr-defined]

    monkeypatch.setattr(Ledger, "release", careless)
    result = run_scenario(scenario(tables("a", "b")), audit=True)
    assert result.violations
    assert result.violations[0].startswith("at 0.")


def test_liveness_names_who_is_not_well() -> None:
    slow_probes = {"interval_dead": "30s", "interval_dead_max": "60s"}
    raw = tables("a", "b", probe=slow_probes, settle="1s", fault={"kind": "refuse", "servers": ["a"], "until": "9s"})
    result = run_scenario(scenario(raw), audit=True)
    assert len(result.violations) == 1
    assert result.violations[0].startswith("1 s after the last fault, a is not healthy")


def test_model_names_go_as_clients_write_them() -> None:
    result = run("a", workload={"models": "llama3.2"})
    assert outcomes(result) == {"completed": len(result.requests)}
    assert MODEL != "llama3.2"
