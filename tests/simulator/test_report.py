"""What is printed of runs: to any width, to a pipe, as JSON; and one request's story."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
from rich.console import Console

from lbcore.schema import MS_NS, SECOND_NS
from simulator.report import SEED_FIGURES, Verdict, judge, print_run, print_scenarios, print_seeds, to_json
from simulator.reports.expect import Expectation
from simulator.reports.figures import FIGURES, Estimate, SweepRow, figure_of, sweep_row
from simulator.reports.results import Band, Outcome, RequestResult, RunResult
from simulator.reports.story import explain
from simulator.reports.summary import flat, summarise
from simulator.reports.sweep_report import estimate_text, print_sweep, sweep_csv, sweep_json
from simulator.tables import figure_text, new_console, percent_text, time_text
from tests.simulator.runs import big, small

MISSED = "ttft_p99_ms is 151, must be at most 150"


def printed(show: Callable[[Console], None], width: int = 80, encoding: str = "utf-8") -> str:
    """Return what is printed to a pipe of some width."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    console = new_console(file)
    console.width = width
    show(console)
    return raw.getvalue().decode(encoding)


def verdict(*, missed: Sequence[str] = (), path: str = "") -> Verdict:
    return Verdict(summarise(small()), tuple(missed), path)


# --- figures as text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time_ns", "text"), [
    (None, "-"), (math.nan, "-"), (0, "0.00 ms"), (4_321_000, "4.32 ms"), (9_996_000, "10.0 ms"),
    (53_210_000, "53.2 ms"), (99_960_000, "100 ms"), (9_999_400_000, "9,999 ms"), (9_999_600_000, "10.0 s"),
    (3600 * SECOND_NS, "3,600 s"),
])
def test_times_have_three_digits_or_so(time_ns: float | None, text: str) -> None:
    assert time_text(time_ns) == text


@pytest.mark.parametrize(("part", "whole", "text"), [
    (0, 0, "0.0 %"), (0, 5, "0.0 %"), (1, 3, "33.3 %"), (1, 100_000, "<0.1 %"), (99_999, 100_000, ">99.9 %"),
    (5, 5, "100.0 %"), (3, 2, "150.0 %"),
])
def test_almost_all_is_not_all(part: float, whole: float, text: str) -> None:
    assert percent_text(part, whole) == text


@pytest.mark.parametrize(("name", "value", "text"), [
    ("requests", 1234, "1,234"), ("requests", 588.6, "589"), ("completed", 0.5, "50.0 %"),
    ("ttft_p50_ms", 5, "5.00 ms"),
    ("duration_s", 12, "12.0 s"), ("wasted_tokens_pct", 4.56, "4.6 %"), ("amplification", 1.2, "1.20"),
    ("itl_p50_ms", math.nan, "-"),
])
def test_figures_have_their_units(name: str, value: float, text: str) -> None:
    assert figure_text(figure_of(name), value) == text


# --- one run ---------------------------------------------------------------------------------------------------


def test_a_run_is_told_whole() -> None:
    text = printed(lambda console: print_run(verdict(missed=[MISSED]), console))
    lines = text.splitlines()
    assert lines[0] == "two-servers, race within budget, seed 7: FAILED"
    assert lines[1] == f"  {MISSED}"
    rows = [line.split() for line in lines]
    for row in (
        "arrived 4", "completed 2 50.0 %", "rejected 1 25.0 %", "1 the queue is full", "left 1 25.0 %",
        "first token (TTFT) 51.0 ms 151 ms 151 ms 151 ms 2", "between tokens (ITL) 9.83 ms 9.83 ms 20.0 ms 20.0 ms 18",
        "whole answer (E2E) 151 ms 251 ms 251 ms 251 ms 2", "a 3 20 0.0 % 17.5 % 1 3.0 1.0",
        "b 2 1 100.0 % 1.2 % 0 0.5 0.5", "wasted: 4.8 % of the tokens (1 of 21)",
        "wasted: 25.2 % of the server-seconds (0.1 of 0.4)", "5 attempts, 1.25 a request",
        "40 events in 2,000 ms of virtual time",
    ):  # fmt: skip
        assert row.split() in rows
    assert "failed" not in text
    assert "unfinished" not in text


def test_a_run_as_expected_is_ok() -> None:
    assert printed(lambda console: print_run(verdict(), console)).startswith(
        "two-servers, race within budget, seed 7: ok\n"
    )


@pytest.mark.parametrize("width", [20, 40, 79, 80, 90, 120, 200])
def test_no_figure_is_cut_at_any_width(width: int) -> None:
    summary = summarise(big(500))
    text = printed(lambda console: print_run(Verdict(summary), console), width)
    assert "…" not in text
    assert "\x1b" not in text
    for server in summary.servers:
        assert f"{server.attempts:,}" in text
        assert f"{server.tokens:,}" in text
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [20, 80])
def test_names_are_not_folded(width: int) -> None:
    name = "hangs-but-answers-probes-and-then-some"
    summary = dataclasses.replace(summarise(big(50)), scenario=name)
    text = printed(lambda console: print_scenarios([[Verdict(summary)]], console), width)
    assert any(line.startswith(f"{name}  ") for line in text.splitlines())
    assert text.startswith("scenario ")
    assert " verdict " in text.splitlines()[0]


def test_tables_begin_at_the_left_and_have_no_column_without_a_cell() -> None:
    lines = printed(lambda console: print_run(Verdict(summarise(RunResult("x", 1, ""))), console)).splitlines()
    assert lines[1].split() == ["requests", "number", "share"]
    assert not any(line.startswith(" ") for line in lines)
    assert all(lines[i] or lines[i + 1] for i in range(len(lines) - 1))


def test_a_wide_terminal_shows_health_over_time() -> None:
    text = printed(lambda console: print_run(Verdict(summarise(big(2000))), console), 120)
    row = next(line for line in text.splitlines() if line.startswith("gpu2"))
    assert "█xxxxxx" in row
    assert "█" not in printed(lambda console: print_run(Verdict(summarise(big(2000))), console), 100)


def test_a_pipe_that_knows_only_ascii_can_be_written_to() -> None:
    rows = [sweep_row("s", "p", 0.3, [flat(summarise(big(300, seed=seed))) for seed in (1, 2, 3)])]
    text = printed(lambda console: print_run(verdict(), console), 120, "ascii")
    text += printed(lambda console: print_sweep(rows, console), 120, "ascii")
    assert " +-" in text


def test_names_can_neither_colour_nor_forge() -> None:
    run = dataclasses.replace(small(), scenario="[red]x\x1b[2J\nseed 1: ok", policy="")
    run.requests[2].why = "[/]\x1b[31m"
    run.servers[0].name = "[bold]a"
    text = printed(lambda console: print_run(Verdict(summarise(run)), console), 120)
    assert text.startswith("[red]x\\x1b[2J\\nseed 1: ok, as configured, seed 7: ok\n")
    assert "\x1b" not in text
    assert "[bold]a" in text
    assert "[/]\\x1b[31m" in text


def test_many_reasons_are_summed_up() -> None:
    run = RunResult("x", 1, "")
    for number in range(20):
        run.requests.append(RequestResult(small().requests[0].ask, Outcome.FAILED, f"reason {number}"))
    text = printed(lambda console: print_run(Verdict(summarise(run)), console))
    assert ["8", "for", "8", "other", "reasons"] in [line.split() for line in text.splitlines()]


def test_a_run_without_requests_can_be_printed() -> None:
    text = printed(lambda console: print_run(Verdict(summarise(RunResult("x", 1, ""))), console), 120)
    assert "first token (TTFT)" in text


# --- verdicts --------------------------------------------------------------------------------------------------


def test_a_run_is_judged_by_what_is_expected() -> None:
    summary = summarise(small())
    found = judge(summary, [Expectation("ttft_p99_ms", None, 150.0)])
    assert found.failures == (MISSED,)
    violated = dataclasses.replace(summary, violations=("two outcomes",))
    assert judge(violated, []).failures == ("two outcomes",)
    assert judge(summary, []).failures == ()


def test_seeds_show_the_spread_and_the_worst() -> None:
    summaries = [summarise(big(200, seed=seed)) for seed in (1, 2, 3)]
    runs = [Verdict(summary, (MISSED,) if summary.seed == 3 else (), "a file.toml") for summary in summaries]
    text = printed(lambda console: print_seeds(runs, console))
    lines = text.splitlines()
    assert lines[0] == "bad-servers, race within budget, 3 seeds: FAILED (1 of them)"
    assert "  seed 3: ollama-lb simulate 'a file.toml' --seed 3" in lines
    assert f"    {MISSED}" in lines
    assert "seed 2:" not in text
    names = [line.split()[0] for line in lines if line.strip()]
    assert [name for name in names if name in FIGURES][: len(SEED_FIGURES)] == list(SEED_FIGURES)
    assert ["requests", "200", "200", "200"] in [line.split() for line in lines]
    assert max(map(len, lines)) <= 80


def test_many_failures_are_counted_not_listed() -> None:
    runs = [Verdict(summarise(small()), tuple(f"wrong {number}" for number in range(12)))] * 12
    text = printed(lambda console: print_seeds(runs, console))
    assert text.count("    and 2 more failures\n") == 10
    assert text.endswith("  and 2 more seeds\n")


def test_scenarios_are_listed_with_their_failures_below() -> None:
    good, bad = Verdict(summarise(big(200))), verdict(missed=[MISSED], path="configs/scenarios/two.toml")
    text = printed(lambda console: print_scenarios([[good], [bad]], console))
    rows = [line.split() for line in text.splitlines()]
    assert ["two-servers", "FAILED", "4", "50.0", "%", "51.0", "ms", "151", "ms", "4.8", "%"] in rows
    assert text.endswith(
        "two-servers\n  seed 7: ollama-lb simulate configs/scenarios/two.toml --seed 7\n"
        f"    {MISSED}\n2 scenarios, 1 failed\n"
    )
    assert printed(lambda console: print_scenarios([[good, good]], console)).endswith(
        "1 scenario, none failed; figures are medians of 2 seeds\n"
    )
    assert printed(lambda console: print_scenarios([], console)).endswith("0 scenarios, none failed\n")


def test_colours_are_for_terminals() -> None:
    file = io.StringIO()
    print_run(verdict(missed=[MISSED]), Console(file=file, force_terminal=True, color_system="standard", width=80))
    assert "\x1b[1;31mFAILED\x1b[0m" in file.getvalue()


# --- programs --------------------------------------------------------------------------------------------------


def test_json_holds_every_figure() -> None:
    whole = json.loads(to_json([verdict(), verdict(missed=[MISSED])]))
    assert (whole["ok"], [run["ok"] for run in whole["runs"]]) == (False, [True, False])
    run = whole["runs"][0]
    assert run["figures"] == pytest.approx(flat(summarise(small())))
    assert run["whys"] == [{"outcome": "rejected", "why": "the queue is full", "requests": 1}]
    assert len(run["health"]["a"]) == 24


def test_json_has_null_for_nothing() -> None:
    whole = json.loads(to_json([Verdict(summarise(RunResult("x", 1, "")))]))
    assert whole["runs"][0]["figures"]["ttft_p50_ms"] is None


def test_the_same_run_gives_the_same_bytes_whatever_the_hash_seed() -> None:
    code = (
        "from simulator.report import *; from simulator.reports.summary import summarise;"
        "from simulator.tables import *;"
        "from tests.simulator.runs import big, small; v = [Verdict(summarise(r)) for r in (big(300), small())];"
        "c = new_console(); print_run(v[0], c); print_seeds(v, c); print(to_json(v))"
    )
    outputs = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
                       check=True).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert outputs[0] == outputs[1]
    assert outputs[0]


# --- sweeps ----------------------------------------------------------------------------------------------------


def sweep() -> list[SweepRow]:
    cells = {("oracle", 0.3): (100.0,) * 3, ("ours", 0.3): (110.0, 120.0, 130.0),
             ("random", 0.3): (500.0, 600.0, 700.0),
             ("ours", 0.85): (900.0, 1000.0, 1100.0)}  # fmt: skip
    return [
        sweep_row("bad", policy, load, [{"ttft_p99_ms": value, "completed": 1.0, "requests": 9} for value in values])
        for (policy, load), values in cells.items()
    ]


def test_a_sweep_ranks_policies_at_each_load() -> None:
    text = printed(lambda console: print_sweep(sweep(), console))
    rows = [line.split() for line in text.splitlines() if line.strip()]
    assert rows[0] == ["bad", "at", "30%", "load"]
    assert [row[0] for row in rows[3:6]] == ["oracle", "ours", "random"]
    assert rows[4][-1] == "1.20"
    assert rows[3][2:6] == ["100", "±0.00", "ms", "-"]
    assert rows[6] == ["bad", "at", "85%", "load"]
    assert rows[-2][-1] == "-"
    assert text.endswith("means over 3 seeds; p99 TTFT with its 95 % confidence interval, and as a ratio\n")
    assert max(map(len, text.splitlines())) <= 80


def test_two_seeds_have_no_interval() -> None:
    rows = [sweep_row("bad", "ours", 0.3, [{"ttft_p99_ms": value, "requests": 9} for value in (100.0, 200.0)])]
    text = printed(lambda console: print_sweep(rows, console))
    assert "150 ms" in text
    assert "±" not in text
    assert text.endswith("means over 2 seeds; p99 TTFT and as a ratio\n")


def test_an_interval_is_told_with_its_mean() -> None:
    figure = FIGURES["ttft_p99_ms"]
    assert estimate_text(figure, Estimate(183, 171, 195, 5)) == "183 ±12.0 ms"
    assert estimate_text(figure, Estimate(12_300, 11_300, 13_300, 5)) == "12.3 s ±1,000 ms"
    assert estimate_text(figure, Estimate(183, 183, 183, 1)) == "183 ms"
    assert estimate_text(figure, Estimate(183, 183, 183, 2)) == "183 ms"
    assert estimate_text(FIGURES["amplification"], Estimate(1.1, 1.0, 1.2, 5)) == "1.10 ±0.10"


def test_a_sweep_as_csv() -> None:
    lines = sweep_csv(sweep(), ["ttft_p99_ms", "e2e_p99_ms"]).splitlines()
    assert lines[0].startswith("scenario,policy,load,seeds,ttft_p99_ms,ttft_p99_ms_low,ttft_p99_ms_high,e2e_p99_ms,")
    assert lines[1] == "bad,oracle,0.3,3,100.0,100.0,100.0,,,"
    assert len(lines) == 5
    assert "completed" in sweep_csv(sweep())


def test_a_sweep_as_json() -> None:
    cells = json.loads(sweep_json(sweep()))["cells"]
    assert (cells[1]["policy"], cells[1]["load"]) == ("ours", 0.3)
    assert cells[1]["figures"]["ttft_p99_ms"]["mean"] == 120.0
    assert cells[1]["figures"]["ttft_p99_ms"]["seeds"] == 3


# --- stories ---------------------------------------------------------------------------------------------------


def told(result: RunResult, request_id: int) -> list[str]:
    return [" ".join(line.split()) for line in explain(result, request_id)]


def test_a_story_is_told_from_the_arrival_on() -> None:
    assert told(small(), 2) == [
        "request 2 of two-servers, seed 7, at 0.200 s: /api/chat llama3.2, a prompt of 100 tokens, an answer of 10",
        "+0.000 ms client asks",
        "+0.000 ms fault b: refuse, from 0.200 s to 1.000 s of the run",
        "+0.000 ms balancer /api/chat llama3.2 -> b (fastest expected)",
        "+0.000 ms b attempt 3 (primary) begins",
        "+40.000 ms meanwhile b is being looked at",
        "+50.000 ms b attempt 3 (primary) failed: connection refused; it cost nothing",
        "+50.000 ms balancer b: connection refused (after 50 ms)",
        "+50.000 ms balancer b health 1.00 -> 0.50: connection refused",
        "+50.000 ms balancer retried on a: connection refused",
        "+50.000 ms a attempt 4 (retry) begins",
        "+100.000 ms a attempt 4 (retry) has a slot after waiting 50.0 ms",
        "+150.000 ms a attempt 4 (retry) makes its first token",
        "+150.000 ms balancer a won after 150 ms (first-token)",
        "+151.000 ms client sees the first token, from a",
        "+250.000 ms a attempt 4 (retry) succeeded; 10 tokens and 0.150 s of a slot, delivered",
        "+251.000 ms client has the whole answer: 10 tokens, status 200",
    ]


def test_the_loser_of_a_race_is_told_of() -> None:
    assert "+50.000 ms b attempt 2 (racer) cancelled: lost the race; 1 token and 0.049 s of a slot, wasted" in told(
        small(), 1
    )


def test_without_lines_the_records_tell_the_story() -> None:
    run = dataclasses.replace(small(), lines=[])
    assert "+50.000 ms balancer a is committed" in told(run, 1)
    assert told(run, 3)[1:] == [
        "+0.000 ms client asks",
        "+0.000 ms client is refused, status 503: the queue is full",
    ]
    assert told(run, 4)[1] == "+0.000 ms client asks, and will leave after 1.0 s"
    assert told(run, 4)[-1] == "+1,000.000 ms client leaves, after 0 tokens"


def test_other_ends_are_told_too() -> None:
    run = small()
    run.requests[0].outcome, run.requests[0].why = Outcome.FAILED, "the stream broke"
    assert told(run, 1)[-1] == "+151.000 ms client sees it fail after 10 tokens, status 200: the stream broke"
    run.requests[0].outcome, run.requests[0].status = Outcome.UNFINISHED, 0
    assert told(run, 1)[-1] == "+151.000 ms client still waits when the run ends, after 10 tokens"
    run.attempts[0].outcome = ""
    assert "+150.000 ms a attempt 1 (primary) goes on; 10 tokens and 0.149 s of a slot, delivered" in told(run, 1)


def test_what_is_special_about_a_request_is_said() -> None:
    run = small()
    ask = dataclasses.replace(run.requests[0].ask, num_ctx=8192, stream=False, session=3, poison=True)
    run.requests[0].ask = ask
    assert told(run, 1)[0].endswith("an answer of 10, num_ctx 8192, not streamed, of session 3, poison")


def test_faults_of_others_are_not_its_story() -> None:
    run = small()
    run.bands = [Band("c", "hang", 0, SECOND_NS), Band("", "loss", 0, SECOND_NS), Band("a", "slow", 0, 100 * MS_NS)]
    assert [line for line in told(run, 2) if " fault " in line] == [
        "+0.000 ms fault everywhere: loss, from 0.000 s to 1.000 s of the run"
    ]


def test_that_a_server_serves_others_is_not_told() -> None:
    run = small()
    run.lines = [
        (210 * MS_NS, 0, "b health 1.00 -> 3.00: served a request"),
        (211 * MS_NS, 0, "b health 3.00 -> 1.50: it broke"),
        (212 * MS_NS, 0, "b health 0.50 -> 1.00: synced again"), (213 * MS_NS, 0, "b is back: synced again"),
    ]  # fmt: skip
    assert [line.partition(" meanwhile ")[2] for line in told(run, 2) if " meanwhile " in line] == [
        "b health 3.00 -> 1.50: it broke", "b health 0.50 -> 1.00: synced again", "b is back: synced again",
    ]  # fmt: skip


def test_much_that_happens_meanwhile_is_cut_short() -> None:
    run = small()
    run.lines = [(210 * MS_NS + number, 0, f"b probe {number}") for number in range(100)]
    story = told(run, 2)
    assert sum(" meanwhile " in line for line in story) == 21
    assert "+250.000 ms meanwhile 80 more lines about its servers" in story


def test_an_unknown_request_is_no_story() -> None:
    with pytest.raises(LookupError, match="there is no request 9 in this run; they go from 1 to 4"):
        explain(small(), 9)
    with pytest.raises(LookupError, match="there are none"):
        explain(RunResult("x", 1, ""), 1)
