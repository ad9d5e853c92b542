"""`[workload]` tables into settings; when clients come, and how much they ask."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise, takewhile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.parsing import Problem
from simulator.workload import DEFAULT_OUTPUT, DEFAULT_PROMPT, make_source, parse_workload
from simulator.workloads.arrivals import Even, Gamma, Herd, Mmpp, Poisson
from simulator.workloads.asks import Ask
from simulator.workloads.lengths import Amount, Form, Mix, exponential, fixed, lognormal, mix_of
from simulator.workloads.sources import Leave, OpenLoop, Sessions, Trace, Traits
from tests.simulator.clients import S, asks, parse, workload

# --- tables ----------------------------------------------------------------------------------------------------

ONE = fixed(10)


@pytest.mark.parametrize(("text", "expected"), [
    ('kind = "poisson"\nrate = 2\nrequests = 5',
     OpenLoop(Traits(), Poisson(2.0), DEFAULT_PROMPT, DEFAULT_OUTPUT, requests=5)),
    ('kind = "even"\nrate = 0.5\nduration = "1m"\nstart = "2s"\nprompt_tokens = 10\noutput_tokens = 10',
     OpenLoop(Traits(), Even(0.5), ONE, ONE, 2 * S, None, 60 * S)),
    ('kind = "gamma"\nrate = 2\nrequests = 5\nduration = 3',
     OpenLoop(Traits(), Gamma(2.0, 3.0), DEFAULT_PROMPT, DEFAULT_OUTPUT, 0, 5, 3 * S)),
    ('kind = "mmpp"\nrate_low = 0\nrate_high = 9\ndwell_low = "3s"\ndwell_high = "1s"\nrequests = 1',
     OpenLoop(Traits(), Mmpp(0.0, 9.0, 3 * S, S), DEFAULT_PROMPT, DEFAULT_OUTPUT, requests=1)),
    ('kind = "herd"\nat = "4s"\nrequests = 20\nmodels = "x"\nprompt_tokens = 10\noutput_tokens = 10',
     OpenLoop(Traits(Mix(("x",), (1.0,))), Herd(), ONE, ONE, 4 * S, 20)),
    ('kind = "sessions"\nusers = 3\nrequests = 9\nprompt_tokens = 10\noutput_tokens = 10',
     Sessions(Traits(), ONE, ONE, ONE, fixed(5), exponential(10 * S, 0, 7 * 86_400 * S), 3, requests=9)),
    (('kind = "sessions"\nrate = 0.5\nduration = 9\nprompt_tokens = 10\noutput_tokens = 10\nnew_tokens = 7\n'
     'turns = { min = 1, max = 3 }\nthink = "2s"\nprompt_max = 4096'),
     Sessions(Traits(), ONE, fixed(7), ONE, Amount(Form.UNIFORM, 1, 3), fixed(2 * S), None, 0.5, 4096,
              duration_ns=9 * S)),
    (('kind = "even"\nrate = 1\nrequests = 1\nprompt_tokens = { median = 100, p95 = 400, max = 4096 }\n'
     'output_tokens = { mean = 50, min = 2 }\nmodels = { x = 1, y = 3 }\nnum_ctx = { default = 1, 8192 = 1 }\n'
     'stream = 0.5\npoison = 0.25\nroute = "/api/generate"\n'
     'leave = { share = 0.1, after = { min = "1s", max = "2s" } }'),
     OpenLoop(
         Traits(Mix(("x", "y"), (0.25, 1.0)), Mix((None, 8192), (0.5, 1.0)), "/api/generate", 0.5, 0.25,
                Leave(0.1, Amount(Form.UNIFORM, S, 2 * S))),
         Even(1.0), lognormal(100, 400, 1, 4096), exponential(50, 2, 1_000_000), requests=1)),
    ('kind = "even"\nrate = 1\nrequests = 1\nnum_ctx = 8192\nleave = { after = "2s" }',
     OpenLoop(Traits(None, Mix((8192,), (1.0,)), leave=Leave(1.0, fixed(2 * S))), Even(1.0), DEFAULT_PROMPT,
              DEFAULT_OUTPUT, requests=1)),
])
def test_every_kind_is_read(text: str, expected: object) -> None:
    assert workload(text) == (expected,)


def test_a_trace_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrives_s,prompt_tokens,output_tokens\n", encoding="utf-8")
    assert workload('kind = "trace"\npath = "t.csv"', tmp_path) == (Trace(Traits(), tmp_path / "t.csv"),)
    text = ('kind = "trace"\npath = "t.csv"\nformat = "plain"\nstart = 1\nduration = 2\nspeed = 3\nlimit = 4\n'
            'repeat = 5\nsort = true\nrename = { "ChatGPT" = "x" }')
    assert workload(text, tmp_path) == (
        Trace(Traits(), tmp_path / "t.csv", "plain", (("ChatGPT", "x"),), S, 2 * S, 3.0, 4, 5, sort=True),)


def test_the_run_ends_a_workload_that_does_not_end_itself() -> None:
    text = '[[workload]]\nkind = "even"\nrate = 1\n'
    found, problems = parse(f"{text}{text}requests = 2", duration_ns=9 * S)
    assert problems == []
    assert [settings.duration_ns for settings in found] == [9 * S, None]


NUMBERS = "{ median = , p95 = }, { mean = } or { min = , max = }"
DATE = '"300ms", "1.5s", "1h30m" or a number of seconds'
END = 'write requests = 1000 or duration = "10m"'


@pytest.mark.parametrize(("text", "problems"), [
    ("rate = 1", ["W.kind: is missing; it says how clients come"]),
    ('kind = "posson"', [('W.kind: "posson" is not one of the choices; did you mean "poisson"? The choices are '
                         '"poisson", "gamma", "mmpp", "even", "herd", "sessions", "trace"')]),
    ('kind = "poisson"\nrequests = 1', ["W.rate: is missing; it says requests per s"]),
    ('kind = "poisson"\nrate = 0\nrequests = 1', ["W.rate: 0 is too small; write a number of 1e-06 or more"]),
    ('kind = "poisson"\nrate = 1', [f"W: {{...}} never ends; {END}"]),
    ('kind = "poisson"\nrate = 1\nrequests = 0', [
        "W.requests: 0 is too small; write a whole number from 1 to 100000000"]),
    ('kind = "sessions"\nusers = 0\nrequests = 1', [
        "W.users: 0 is too small; write a whole number from 1 to 1000000"]),
    ('kind = "poisson"\nrate = 1\nrequests = 1\ncv = 2', [
        ("W.cv: 2 is set, but there is no such key; the keys here are kind, route, stream, poison, start, requests, "
        "duration, rate, models, num_ctx, leave, prompt_tokens, output_tokens")]),
    ('kind = "poisson"\nrate = 1\nrequests = 1\nmodel = "x"', [
        'W.model: "x" is set, but there is no such key; did you mean W.models?']),
    ('kind = "poisson"\nrate = 1\nrequests = 1\nafter = 1', [
        "W.after: 1 is set, but there is no such key; did you mean W.leave.after?"]),
    ('kind = "gamma"\nrate = 1\nrequests = 1\ncv = 0', ["W.cv: 0 is too small; write a number from 0.01 to 100"]),
    ('kind = "mmpp"\nrequests = 1', [
        "W.rate_low: is missing; it says requests per s in quiet times; 0 is nobody",
        "W.rate_high: is missing; it says requests per s in busy times",
        "W.dwell_low: is missing; it says how long quiet times are, on average",
        "W.dwell_high: is missing; it says how long busy times are, on average"]),
    ('kind = "herd"\nstart = 1', [
        ("W.start: 1 is set, but there is no such key; the keys here are kind, route, stream, poison, at, requests, "
        "models, num_ctx, leave, prompt_tokens, output_tokens"),
        "W.at: is missing; it says since the start of the run, when all of them come",
        "W.requests: is missing; it says how many"]),
    ('kind = "sessions"\nrequests = 1', [
        "W: {...} says neither users nor rate; write users = 20, or rate = 0.5 sessions per s"]),
    ('kind = "sessions"\nrequests = 1\nrate = 1\nusers = 1', [
        "W: {...} says both users and rate; write users = 20, or rate = 0.5 sessions per s"]),
    ('kind = "sessions"\nusers = 1\nturns = 0\nthink = -1', [
        f"W.turns: 0 is too small; write a whole number from 1 to 1000000, or a table: {NUMBERS}",
        f"W.think: -1 is negative; write {DATE}, or a table: {NUMBERS}",
        f"W: {{...}} never ends; {END}"]),
    ('kind = "even"\nrate = 1\nrequests = 1\nmodels = []', [
        ('W.models: [] is not the name of a model; write "llama3.2:latest", or weights: '
        '{ "llama3.2:latest" = 0.8, "qwen2.5:0.5b" = 0.2 }')]),
    ('kind = "even"\nrate = 1\nrequests = 1\nmodels = { "a:b" = "x", c = -1 }', [
        'W.models."a:b": "x" is not a weight; write a number such as 0.8',
        "W.models.c: -1 is not a weight; write a number such as 0.8"]),
    ('kind = "even"\nrate = 1\nrequests = 1\nmodels = { a = 0 }', [
        'W.models: {...} has no weight above 0; write weights, such as { "llama3.2" = 0.8, ... }']),
    ('kind = "even"\nrate = 1\nrequests = 1\nmodels = {}', [
        'W.models: {} has no weight above 0; write weights, such as { "llama3.2" = 0.8, ... }']),
    ('kind = "even"\nrate = 1\nrequests = 1\nnum_ctx = { defalt = 1 }', [
        ("W.num_ctx.defalt: 1 is not the weight of a number of tokens; "
        "write weights such as { default = 0.9, 8192 = 0.1 }")]),
    ('kind = "even"\nrate = 1\nrequests = 1\nnum_ctx = "8k"', [
        f'W.num_ctx: "8k" is not a whole number; write a whole number such as 3, without quotes, or a table: {NUMBERS}',
    ]),
    ('kind = "even"\nrate = 1\nrequests = 1\nleave = "2s"', [
        'W.leave: "2s" is not a table; write its keys in a table of their own']),
    ('kind = "even"\nrate = 1\nrequests = 1\nleave = { share = 2 }', [
        "W.leave.share: 2 is too large; write a number from 0 to 1",
        "W.leave.after: is missing; it says how long a client waits"]),
    ('kind = "even"\nrate = 1\nrequests = 1\nleave = { aftr = 2, after = "2" }', [
        "W.leave.aftr: 2 is set, but there is no such key; did you mean W.leave.after?",
        f'W.leave.after: "2" is text without a unit; write 2 or "2s", or a table: {NUMBERS}']),
    ('kind = "even"\nrate = 1\nrequests = 1\nstream = true\npoison = 2\nroute = "/api/embed"', [
        ('W.route: "/api/embed" is not one of the choices; did you mean "/api/generate"? The choices are "/api/chat", '
        '"/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"'),
        "W.stream: true is not a number; write a number such as 0.5",
        "W.poison: 2 is too large; write a number from 0 to 1"]),
    ('kind = "even"\nrate = 1\nrequests = 1\nprompt_tokens = 0.5', [
        f"W.prompt_tokens: 0.5 is not a whole number; write a whole number such as 3, or a table: {NUMBERS}"]),
    ('kind = "even"\nrate = 1\nrequests = 1\nprompt_tokens = {}', [
        f"W.prompt_tokens: {{}} is no distribution; write a whole number, {NUMBERS}"]),
    ('kind = "even"\nrate = 1\nrequests = 1\nprompt_tokens = { median = 5 }', [
        f"W.prompt_tokens: {{...}} is no distribution; write a whole number, {NUMBERS}"]),
    ('kind = "even"\nrate = 1\nrequests = 1\nprompt_tokens = { median = 5, p95 = 6, mean = 7 }', [
        f"W.prompt_tokens: {{...}} is no distribution; write a whole number, {NUMBERS}"]),
    ('kind = "even"\nrate = 1\nrequests = 1\nprompt_tokens = { median = 5, p95 = 4 }', [
        "W.prompt_tokens.p95: 4 is less than W.prompt_tokens.median; write more"]),
    ('kind = "even"\nrate = 1\nrequests = 1\noutput_tokens = { min = 5, max = 4 }', [
        "W.output_tokens.min: 5 is more than W.output_tokens.max; write less"]),
    ('kind = "even"\nrate = 1\nrequests = 1\noutput_tokens = { medan = 0, p95 = 0 }', [
        "W.output_tokens.medan: 0 is set, but there is no such key; did you mean W.output_tokens.median?",
        "W.output_tokens.p95: 0 is too small; write a whole number from 1 to 1000000"]),
    ('kind = "trace"', ["W.path: is missing; it says the file, from the folder of this one"]),
    ('kind = "trace"\npath = "absent"\nrename = 1', [
        'W.rename: 1 is not a table of model names; write { "ChatGPT" = "llama3.2:latest" }',
        'W.path: "absent" cannot be read: No such file or directory']),
    ('kind = "trace"\npath = "x"\nprompt_tokens = 1\nspeed = 0', [
        ("W.prompt_tokens: 1 is set, but there is no such key; the keys here are kind, route, stream, poison, path, "
        "format, start, duration, speed, limit, repeat, sort, models, num_ctx, leave, rename"),
        "W.speed: 0 is too small; write a number from 1e-06 to 1000000",
        'W.path: "x" cannot be read: No such file or directory']),
])
def test_every_problem_is_told_with_its_key(text: str, problems: list[str]) -> None:
    for header, key in (("[workload]", "workload"), ("[[workload]]", "workload[0]")):
        _, found = parse(f"{header}\n{text}")
        assert found == [problem.replace("W", key) for problem in problems]


@pytest.mark.parametrize(("content", "problem"), [
    ("", 'workload.path: "t" is empty'),
    ("a,b", 'workload.path: "t" (line 1) is the first line of no trace that is known; the first lines are azure: '),
    ("\narrives_s", ('workload.path: "t" (line 2, column prompt_tokens) is missing from the header; '
                     "the columns needed are arrives_s, prompt_tokens, output_tokens")),
])
def test_a_file_that_is_no_trace_is_told_at_once(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "t").write_text(content, encoding="utf-8")
    named = 'format = "plain"' if "arrives" in content else ""
    _, found = parse(f'[workload]\nkind = "trace"\npath = "t"\n{named}', folder=tmp_path)
    assert len(found) == 1
    assert found[0].startswith(problem)


@pytest.mark.parametrize(("raw", "problem"), [
    ([], "workload: [] is empty; write a [workload] table"),
    ([3], "workload[0]: 3 is not a table; write its keys in a table of their own"),
    ("poisson", 'workload: "poisson" is not a table; write its keys in a table of their own'),
])
def test_what_is_no_table(raw: object, problem: str) -> None:
    problems: list[Problem] = []
    assert parse_workload(raw, problems) == ()
    assert [str(found) for found in problems] == [problem]


# --- arrivals --------------------------------------------------------------------------------------------------


def gaps(text: str, n: int, seed: int) -> list[int]:
    times = [ask.arrives_ns for ask in islice(make_source(workload(text), seed).asks(), n)]
    return [second - first for first, second in pairwise(times)]


@pytest.mark.parametrize(("text", "rate", "cv"), [
    ('kind = "poisson"\nrate = 4\nrequests = 20000', 4, 1),
    ('kind = "gamma"\nrate = 4\ncv = 3\nrequests = 20000', 4, 3),
    ('kind = "gamma"\nrate = 0.1\ncv = 0.5\nrequests = 20000', 0.1, 0.5),
    ('kind = "gamma"\nrate = 400\ncv = 1\nrequests = 20000', 400, 1),
    ('kind = "even"\nrate = 4\nrequests = 20000', 4, 0),
])
def test_rate_and_burstiness_are_as_asked(text: str, rate: float, cv: float) -> None:
    for seed in (1, 2):
        found = gaps(text, 20_000, seed)
        mean = statistics.fmean(found)
        assert mean == pytest.approx(S / rate, rel=5 * max(cv, 0.001) / math.sqrt(len(found)))
        assert statistics.pstdev(found) / mean == pytest.approx(cv, rel=0.1, abs=0.001)


def test_two_rates_by_turns() -> None:
    ends_ns = 20_000 * S  # some 500 turns each
    busy = Mmpp(1.0, 21.0, 30 * S, 10 * S)
    times = list(takewhile(lambda at_ns: at_ns < ends_ns, busy.times(Random(1))))
    found = [second - first for first, second in pairwise(times)]
    assert len(times) / 20_000 == pytest.approx((30 * 1 + 10 * 21) / 40, rel=0.1)
    assert statistics.pstdev(found) / statistics.fmean(found) > 1.5
    idle = takewhile(lambda at_ns: at_ns < ends_ns, replace(busy, rate_low=0.0).times(Random(1)))
    quiet = [second - first for first, second in pairwise(idle) if second - first > 2 * S]
    assert statistics.fmean(quiet) == pytest.approx(30 * S, rel=0.15)


def test_even_gaps_do_not_drift() -> None:
    found = asks('kind = "even"\nrate = 3\nrequests = 30001\nstart = 1')
    assert found[0].arrives_ns == S
    assert found[-1].arrives_ns == 10_001 * S


def test_a_herd_comes_at_once() -> None:
    found = asks('kind = "herd"\nat = "4s"\nrequests = 50\nmodels = "x"')
    assert {(ask.arrives_ns, ask.model) for ask in found} == {(4 * S, "x")}
    assert len(found) == 50


def test_a_workload_ends_by_number_or_by_time_whichever_is_first() -> None:
    assert len(asks('kind = "even"\nrate = 1\nrequests = 7\nduration = "10s"')) == 7
    assert len(asks('kind = "even"\nrate = 1\nrequests = 70\nduration = "10s"\nstart = "1h"')) == 10
    assert all(ask.arrives_ns < 10 * S for ask in asks('kind = "poisson"\nrate = 100\nduration = "10s"'))


# --- lengths and traits ------------------------------------------------------------------------------------------


def test_lengths_are_distributed_as_asked() -> None:
    found = asks('kind = "even"\nrate = 1\nrequests = 20000\nprompt_tokens = { median = 1000, p95 = 4000 }\n'
                 "output_tokens = { min = 10, max = 19 }")
    prompts = sorted(ask.prompt_tokens for ask in found)
    assert prompts[10_000] == pytest.approx(1000, rel=0.04)
    assert prompts[19_000] == pytest.approx(4000, rel=0.06)
    outputs = Counter(ask.output_tokens for ask in found)
    assert sorted(outputs) == list(range(10, 20))
    assert all(n == pytest.approx(2000, rel=0.1) for n in outputs.values())
    found = asks('kind = "even"\nrate = 1\nrequests = 20000\nprompt_tokens = 5\noutput_tokens = { mean = 200 }')
    assert statistics.fmean(ask.output_tokens for ask in found) == pytest.approx(200, rel=0.04)
    assert {ask.prompt_tokens for ask in found} == {5}


def test_lengths_are_clamped() -> None:
    found = asks('kind = "even"\nrate = 1\nrequests = 2000\nprompt_tokens = { median = 100, p95 = 9999, max = 300 }\n'
                 "output_tokens = { mean = 20, min = 15, max = 30 }")
    assert max(ask.prompt_tokens for ask in found) == 300
    assert {min(ask.output_tokens for ask in found), max(ask.output_tokens for ask in found)} == {15, 30}


@given(
    st.sampled_from([fixed(7), lognormal(100, 500, 1, 1000), lognormal(3, 3, 1, 9), exponential(50, 1, 200),
                     Amount(Form.UNIFORM, 3, 9), Amount(Form.UNIFORM, 3, 3)]),
    st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True),
)
def test_an_amount_grows_with_its_share_and_stays_within_bounds(amount: Amount, u: float, v: float) -> None:
    small, large = amount.at(min(u, v)), amount.at(max(u, v))
    assert amount.low <= small <= large <= amount.high


@given(st.dictionaries(st.text(min_size=1), st.floats(0.001, 1e6), min_size=1, max_size=6),
       st.floats(0, 1, exclude_max=True))
def test_a_mix_gives_one_of_its_values(weights: dict[str, float], u: float) -> None:
    assert mix_of(weights).at(u) in weights


def test_traits_have_their_shares() -> None:
    found = asks('kind = "even"\nrate = 1\nrequests = 20000\nmodels = { "llama3.2" = 8, "qwen2.5:0.5b" = 2 }\n'
                 'num_ctx = { default = 0.9, 8192 = 0.1 }\nstream = 0.7\npoison = 0.01\n'
                 'leave = { share = 0.2, after = { min = "2s", max = "4s" } }')

    def share(what: Callable[[Ask], bool]) -> float:
        return sum(map(what, found)) / len(found)

    assert share(lambda ask: ask.model == "qwen2.5:0.5b") == pytest.approx(0.2, abs=0.015)
    assert share(lambda ask: ask.num_ctx == 8192) == pytest.approx(0.1, abs=0.015)
    assert share(lambda ask: ask.num_ctx is None) == pytest.approx(0.9, abs=0.015)
    assert share(lambda ask: ask.stream) == pytest.approx(0.7, abs=0.015)
    assert share(lambda ask: ask.poison) == pytest.approx(0.01, abs=0.005)
    waits = [ask.leaves_after_ns for ask in found if ask.leaves_after_ns is not None]
    assert len(waits) / len(found) == pytest.approx(0.2, abs=0.015)
    assert min(waits) == pytest.approx(2 * S, rel=0.01)
    assert max(waits) == pytest.approx(4 * S, rel=0.01)
    assert statistics.fmean(waits) == pytest.approx(3 * S, rel=0.02)


def test_a_change_of_one_setting_changes_nothing_else() -> None:
    base = 'kind = "poisson"\nrate = 3\nrequests = 500\n'
    plain = asks(base)
    other = asks(base + 'poison = 0.5\nstream = 0.5\nmodels = { a = 1, b = 1 }\nleave = { share = 0.5, after = "2s" }')
    assert plain == [
        replace(ask, poison=False, stream=True, model=plain[0].model, leaves_after_ns=None) for ask in other]
    faster = asks(base.replace("rate = 3", "rate = 30"))
    assert [replace(ask, arrives_ns=0) for ask in faster] == [replace(ask, arrives_ns=0) for ask in plain]
    assert all(ask.arrives_ns == pytest.approx(10 * quick.arrives_ns, abs=10_000)
               for ask, quick in zip(plain, faster, strict=True))
