"""`[expect]` tables: what they mean, how they are held against figures, and what is said of bad ones."""

from __future__ import annotations

import math
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.parsing import Problem
from simulator.reports.expect import Expectation, check, parse_expect
from simulator.reports.figures import FIGURES
from simulator.reports.summary import flat, summarise
from tests.simulator.runs import small


def parse(text: str) -> tuple[tuple[Expectation, ...], list[str]]:
    problems: list[Problem] = []
    found = parse_expect(tomllib.loads(text), problems, servers=("gpu1", "gpu2"))
    return found, [str(problem) for problem in problems]


def test_a_plain_number_is_the_bound_on_the_bad_side() -> None:
    found, problems = parse("completed = 1.0\nfailed = 0\nttft_p99_ms = 120\nrequests = 200\nhealth_last_min = 50")
    assert problems == []
    assert found == (
        Expectation("completed", 1.0, None),
        Expectation("failed", None, 0.0),
        Expectation("ttft_p99_ms", None, 120.0),
        Expectation("requests", 200.0, 200.0),
        Expectation("health_last_min", 50.0, None),
    )


def test_bounds_may_be_given() -> None:
    found, problems = parse("ttft_p99_ms = { max = 120 }\nrejected = { min = 0.1, max = 0.5 }\n"
                            "[utilisation_pct]\nmin=20")
    assert problems == []
    assert found == (Expectation("ttft_p99_ms", None, 120.0), Expectation("rejected", 0.1, 0.5),
                     Expectation("utilisation_pct", 20.0, None))


def test_single_servers_may_be_expected_of() -> None:
    found, problems = parse("[servers.gpu2]\nattempts_pct = { max = 5 }\nloads = 1")
    assert problems == []
    assert found == (Expectation("servers.gpu2.attempts_pct", None, 5.0), Expectation("servers.gpu2.loads", None, 1.0))


@pytest.mark.parametrize(("text", "problem"), [
    ("complete = 1", "expect.complete: 1 is set, but there is no such key; did you mean expect.completed?"),
    ("ttft_p99 = 1", "expect.ttft_p99: 1 is set, but there is no such key; did you mean expect.ttft_p99_ms?"),
    ("completed = 99", "expect.completed: 99 is too large; write a number from 0 to 1"),
    ("wasted_tokens_pct = 101", "expect.wasted_tokens_pct: 101 is too large; write a number from 0 to 100 (%)"),
    ("failed = -1", "expect.failed: -1 is too small; write a number from 0 to 1"),
    ('ttft_p99_ms = "120ms"',
     'expect.ttft_p99_ms: "120ms" is not a number; write a number such as 0.5, without quotes (ms)'),
    ("ttft_p99_ms = { max = true }",
     "expect.ttft_p99_ms.max: true is not a number; write a number such as 0.5 (ms)"),
    ("ttft_p99_ms = nan", "expect.ttft_p99_ms: nan is not finite; write a number such as 0.5 (ms)"),
    ("ttft_p99_ms = {}", "expect.ttft_p99_ms: {} says nothing; write { min = ... } or { max = ... }"),
    ("ttft_p99_ms = { most = 3 }", ("expect.ttft_p99_ms.most: 3 is set, but there is no such key; "
                                   "the keys here are min, max")),
    ("failed = { min = 0.5, max = 0.25 }", "expect.failed.min: 0.5 is more than expect.failed.max; write less"),
    ("utilisation_pct = 30", ("expect.utilisation_pct: 30 does not say whether less or more is expected; "
                             "write { min = 30 } or { max = 30 }")),
    ("servers = 3", 'expect.servers: 3 is not a table; write "[expect.servers.NAME]"'),
    ("[servers]\ngpu1 = 3", 'expect.servers.gpu1: 3 is not a table; write "[expect.servers.gpu1]"'),
    ("[servers.gpu3]\nloads = 1", ("expect.servers.gpu3: {...} is set, but there is no such server; "
                                  'did you mean "gpu2"? The choices are "gpu1", "gpu2"')),
    ("[servers.gpu1]\nload = 1", ("expect.servers.gpu1.load: 1 is set, but there is no such key; "
                                 "did you mean expect.servers.gpu1.loads?")),
])
def test_every_mistake_is_told_with_how_to_mend_it(text: str, problem: str) -> None:
    found, problems = parse(text)
    assert (found, problems) == ((), [problem])


def test_every_problem_is_found_and_the_rest_is_taken() -> None:
    found, problems = parse("complet = 1\nfailed = 2\nrejected = 0")
    assert len(problems) == 2
    assert found == (Expectation("rejected", None, 0.0),)


@pytest.mark.parametrize("raw", [3, "x", [], None])
def test_expect_must_be_a_table(raw: Any) -> None:
    problems: list[Problem] = []
    assert parse_expect(raw, problems) == ()
    assert [problem.message for problem in problems] == ["is not a table"]


def test_without_a_fleet_nobody_is_said_not_to_be_in_it() -> None:
    problems: list[Problem] = []
    parse_expect({"servers": {"a": {}}}, problems)
    assert problems == []


# --- checking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "value", "words"), [
    (Expectation("ttft_p99_ms", None, 120.0), 183.2, "ttft_p99_ms is 183.2, must be at most 120"),
    (Expectation("completed", 1.0), 0.999, "completed is 0.999, must be at least 1"),
    (Expectation("completed", 1.0), 0.9999999, "completed is 0.9999999, must be at least 1"),
    (Expectation("ttft_p99_ms", None, 120.0), 120.04, "ttft_p99_ms is 120.04, must be at most 120"),
    (Expectation("requests", 200.0, 200.0), 199, "requests is 199, must be 200"),
    (Expectation("rejected", 0.1, 0.5), 0.05, "rejected is 0.05, must be at least 0.1"),
    (Expectation("rejected", 0.1, 0.5), 0.75, "rejected is 0.75, must be at most 0.5"),
    (Expectation("ttft_p99_ms", None, 120.0), math.nan, "ttft_p99_ms has no value, must be at most 120"),
    (Expectation("completed", 0.5), math.nan, "completed has no value, must be at least 0.5"),
])
def test_failures_are_told_in_words(wanted: Expectation, value: float, words: str) -> None:
    assert check([wanted], {wanted.name: value}) == [words]


def test_bounds_belong_to_what_is_allowed() -> None:
    wanted = [Expectation("completed", 1.0), Expectation("rejected", 0.1, 0.5), Expectation("failed", None, 0.0)]
    assert check(wanted, {"completed": 1.0, "rejected": 0.1, "failed": 0.0}) == []
    assert check(wanted, {"completed": 1.0, "rejected": 0.5, "failed": 0.0}) == []


def test_a_figure_that_is_not_there_fails() -> None:
    assert check([Expectation("servers.a.loads", None, 1.0)], {}) == ["servers.a.loads has no value, must be at most 1"]


def test_what_is_parsed_can_be_checked_on_a_run() -> None:
    found, _ = parse("completed = 0.5\nttft_p99_ms = 150\nrequests = 4\nviolations = 0")
    assert check(found, flat(summarise(small()))) == ["ttft_p99_ms is 151, must be at most 150"]


@given(st.sampled_from(sorted(FIGURES)), st.floats(0, 1), st.floats(0, 1))
def test_bounds_and_words_never_disagree(name: str, bound: float, value: float) -> None:
    raw: dict[str, Any] = {name: {"max": bound}}
    problems: list[Problem] = []
    found = parse_expect(raw, problems)
    assert problems == []
    failures = check(found, {name: value})
    assert bool(failures) == (value > bound)
    if failures:
        shown = failures[0].removeprefix(f"{name} is ").partition(",")[0]
        assert float(shown) > bound
