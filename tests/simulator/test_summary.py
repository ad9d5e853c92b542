"""What runs come to: figures that can be worked out by hand, quantiles, health over time, several seeds."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.schema import MS_NS, SECOND_NS
from simulator.reports.figures import (
    FIGURES,
    SERVER_FIGURES,
    Better,
    Estimate,
    Spread,
    estimate,
    figure_of,
    merge,
    ratio_to,
    sweep_row,
)
from simulator.reports.results import GAP_STEP, Gaps, HealthPoint, Outcome, RunResult, ServerResult
from simulator.reports.summary import (
    SAMPLES,
    Quantiles,
    flat,
    gap_bin,
    gap_quantiles,
    health_summary,
    quantiles,
    summarise,
)
from tests.simulator.runs import big, small

NAN = math.nan


def same(found: dict[str, float], **wanted: float) -> None:
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, nan_ok=True)


# --- one run ---------------------------------------------------------------------------------------------------


def test_requests_are_counted_by_what_became_of_them() -> None:
    summary = summarise(small())
    assert summary.requests == 4
    counts = {Outcome.COMPLETED: 2, Outcome.FAILED: 0, Outcome.REJECTED: 1, Outcome.LEFT: 1, Outcome.UNFINISHED: 0}
    assert summary.outcomes == counts
    assert summary.whys == ((Outcome.REJECTED, "the queue is full", 1),)
    same(flat(summary), requests=4, completed=0.5, failed=0, rejected=0.25, left=0.25, unfinished=0,
         completed_requests=2, rejected_requests=1, left_requests=1, failed_requests=0, unfinished_requests=0)


def test_latencies_are_those_of_the_requests_that_got_so_far() -> None:
    summary = summarise(small())
    assert summary.ttft == Quantiles(2, 51 * MS_NS, 151 * MS_NS, 151 * MS_NS, 151 * MS_NS)
    assert summary.e2e == Quantiles(2, 151 * MS_NS, 251 * MS_NS, 251 * MS_NS, 251 * MS_NS)
    same(flat(summary), ttft_p50_ms=51, ttft_p99_ms=151, ttft_max_ms=151, e2e_p50_ms=151, e2e_max_ms=251)


def test_a_broken_stream_has_a_first_token_and_no_end() -> None:
    run = small()
    run.requests[1].outcome, run.requests[1].why = Outcome.FAILED, "the stream broke"
    summary = summarise(run)
    assert (summary.ttft.n, summary.e2e.n) == (2, 1)
    assert summary.whys == ((Outcome.FAILED, "the stream broke", 1), (Outcome.REJECTED, "the queue is full", 1))


def test_waste_is_what_was_not_delivered() -> None:
    same(flat(summarise(small())), tokens=21, delivered_tokens=20, wasted_tokens=1, wasted_tokens_pct=100 / 21,
         server_seconds=0.4, wasted_server_seconds=0.101, wasted_server_seconds_pct=25.25, attempts=5,
         amplification=1.25, loads=1, violations=0, events=40, duration_s=2)


def test_servers_are_told_apart() -> None:
    found = flat(summarise(small()))
    same(found, utilisation_pct=100 * 400 / 6000, busiest_pct=17.55)
    of_b = {name: found[f"servers.b.{name}"] for name in SERVER_FIGURES}
    wanted = {"attempts": 2, "attempts_pct": 40, "tokens": 1, "wasted_tokens": 1, "utilisation_pct": 100 * 49 / 4000,
              "loads": 0, "health_min": 0.5, "health_mean": 0.5625, "health_last": 0.5}
    assert of_b == pytest.approx(wanted)


def test_every_figure_has_its_name_and_every_name_its_figure() -> None:
    found = flat(summarise(small()))
    plain = [name for name in found if not name.startswith("servers.")]
    assert sorted(plain) == sorted(FIGURES)
    assert {figure_of(name).better for name in found} == set(Better)
    of_a = [name.removeprefix("servers.a.") for name in found if name.startswith("servers.a.")]
    assert of_a == list(SERVER_FIGURES)


def test_a_server_may_be_called_anything() -> None:
    run = RunResult("x", 1, "", servers=[ServerResult("gpu.1:11434", 1)])
    name = 'servers."gpu.1:11434".loads'
    assert flat(summarise(run))[name] == 0
    assert figure_of(name) is SERVER_FIGURES["loads"]


def test_a_run_in_which_nothing_happened_has_figures() -> None:
    found = flat(summarise(RunResult("empty", 1, "")))
    same(found, completed=1, failed=0, ttft_p50_ms=NAN, itl_p99_ms=NAN, wasted_tokens_pct=0, utilisation_pct=0,
         health_min=NAN, dead_at_end=0)


def test_violations_are_kept() -> None:
    run = dataclasses.replace(small(), violations=["request 3 has two outcomes"])
    assert summarise(run).violations == ("request 3 has two outcomes",)
    same(flat(summarise(run)), violations=1)


def test_reasons_are_told_most_frequent_first() -> None:
    summary = summarise(big(2000))
    assert [(outcome, why) for outcome, why, _ in summary.whys] == [("failed", "connection refused"),
                                                                   ("rejected", "full")]
    assert sum(n for _, _, n in summary.whys) == summary.outcomes[Outcome.FAILED] + summary.outcomes[Outcome.REJECTED]


# --- quantiles -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300))
def test_quantiles_are_the_smallest_values_that_so_many_do_not_exceed(values: list[int]) -> None:
    found = quantiles(values)
    assert found.n == len(values)
    for percent, value in ((50, found.p50_ns), (90, found.p90_ns), (99, found.p99_ns)):
        enough = Fraction(percent, 100) * len(values)
        assert value == min(v for v in values if sum(other <= v for other in values) >= enough)
    assert found.max_ns == max(values)


def test_of_a_hundred_values_the_99th_is_the_99th() -> None:
    assert quantiles(range(1, 101)) == Quantiles(100, 50, 90, 99, 100)
    assert quantiles([]) == Quantiles()


@given(st.lists(st.integers(1, 10**11), min_size=1, max_size=200))
def test_gaps_are_true_to_half_a_bin(values: list[int]) -> None:
    gaps = Gaps(max_ns=max(values))
    for value in values:
        gaps.bins[gap_bin(value)] += 1
    exact, read = quantiles(values), gap_quantiles(gaps)
    assert (read.n, read.max_ns) == (exact.n, exact.max_ns)
    for true_ns, found_ns in zip((exact.p50_ns, exact.p99_ns), (read.p50_ns, read.p99_ns), strict=True):
        assert true_ns is not None
        assert found_ns is not None
        assert abs(found_ns - true_ns) <= true_ns * (GAP_STEP**0.501 - 1) + 1


def test_no_gap_at_all() -> None:
    assert gap_quantiles(Gaps()) == Quantiles()
    assert gap_bin(0) == gap_bin(1) == 0


# --- health ----------------------------------------------------------------------------------------------------


def test_health_is_averaged_over_time() -> None:
    found = health_summary([(0, 0.0), (0, 1.0), (SECOND_NS, 5.0), (3 * SECOND_NS, 0.5)], 4 * SECOND_NS)
    assert (found.low, found.mean, found.last, found.dead_ns) == (0.5, (1 + 10 + 0.5) / 4, 0.5, SECOND_NS)
    assert found.samples == (1.0,) * 6 + (5.0,) * 12 + (0.5,) * 6


def test_to_start_dead_is_not_to_have_died() -> None:
    assert health_summary([(0, 0.0), (5, 1.0), (9, 3.0)], 10).low == 1.0
    assert health_summary([(0, 0.0)], 10).low == 0.0


def test_a_server_that_came_later_has_no_health_before() -> None:
    found = health_summary([(SECOND_NS, 2.0)], 2 * SECOND_NS)
    assert found.mean == 2.0
    assert [math.isnan(value) for value in found.samples] == [True] * 12 + [False] * 12


def test_a_sample_shows_the_worst_of_its_stretch() -> None:
    steps = [(0, 50.0), (10, 0.5), (11, 50.0)]
    assert health_summary(steps, SAMPLES * 100).samples[:2] == (0.5, 50.0)


def test_health_at_the_last_instant() -> None:
    found = health_summary([(0, 1.0), (10, 3.0)], 10)
    assert (found.last, found.mean) == (3.0, 1.0)
    assert health_summary([(0, 1.0)], 0).mean == 1.0


def test_the_dead_at_the_end_are_counted() -> None:
    same(flat(summarise(small())), dead_at_end=1, health_min=0.5, health_last_min=0.5)
    run = dataclasses.replace(small(), health=[HealthPoint(0, "a", 2.0)])
    same(flat(summarise(run)), dead_at_end=0, health_min=2)


# --- several seeds ---------------------------------------------------------------------------------------------


def test_the_worst_seed_is_worst_in_the_sense_of_the_figure() -> None:
    runs = [(1, {"completed": 1.0, "ttft_p99_ms": 10.0}), (2, {"completed": 0.9, "ttft_p99_ms": 30.0}),
            (3, {"completed": 0.9, "ttft_p99_ms": 20.0})]
    found = merge(runs)
    assert found["completed"] == Spread(0.9, 0.9, 1.0, 0.9, 2, 3)
    assert found["ttft_p99_ms"] == Spread(20.0, 10.0, 30.0, 30.0, 2, 3)


def test_a_seed_without_a_value_is_left_out() -> None:
    found = merge([(1, {"ttft_p50_ms": NAN}), (2, {"ttft_p50_ms": 4.0}), (3, {"ttft_p50_ms": 6.0})])["ttft_p50_ms"]
    assert (found.median, found.runs, found.worst_seed) == (5.0, 2, 3)
    nothing = merge([(1, {"ttft_p50_ms": NAN})])["ttft_p50_ms"]
    assert math.isnan(nothing.median)
    assert (nothing.runs, nothing.worst_seed) == (0, -1)


def test_an_estimate_has_its_confidence_interval() -> None:
    assert estimate([5.0]) == Estimate(5.0, 5.0, 5.0, 1)
    found = estimate([9.0, 10.0, 11.0, NAN])
    half = 4.303 * 1.0 / math.sqrt(3)
    assert (found.mean, found.low, found.high, found.runs) == pytest.approx((10.0, 10 - half, 10 + half, 3))
    assert estimate([0.0, 0.0, 1.0]).low == 0.0
    assert estimate([0.0, 1.0]) == Estimate(0.5, 0.5, 0.5, 2)
    assert estimate([NAN]).runs == 0


def test_nineteen_of_twenty_intervals_hold_the_mean() -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(2000):
        found = estimate([rng.gauss(100, 10) for _ in range(40)])
        hits += found.low <= 100 <= found.high
    assert 0.93 < hits / 2000 < 0.97


def test_many_runs_take_the_quantile_of_many_degrees_of_freedom() -> None:
    values = [float(number) for number in range(61)]
    half = estimate(values).high - 30.0
    assert half == pytest.approx(2.000 * statistics.stdev(values) / math.sqrt(61), rel=0.002)  # t of 60 is 2.000


def test_policies_are_measured_against_the_oracle() -> None:
    rows = [sweep_row("s", policy, load, [{"ttft_p99_ms": value}]) for policy, load, value in
            (("oracle", 0.3, 100.0), ("oracle", 0.8, 0.0), ("ours", 0.3, 120.0), ("ours", 0.8, 9.0))]
    assert ratio_to(rows, rows[2], "ttft_p99_ms") == pytest.approx(1.2)
    assert math.isnan(ratio_to(rows, rows[3], "ttft_p99_ms"))
    assert math.isnan(ratio_to(rows[2:], rows[2], "ttft_p99_ms"))
    assert rows[0].figure("unknown").runs == 0
