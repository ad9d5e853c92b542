"""What `ollama-lb simulate` prints: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lbcore.health import ALIVE_FROM
from lbcore.schema import SECOND_NS
from simulator.reports.expect import Expectation, check
from simulator.reports.figures import Spread, figure_of, merge
from simulator.reports.results import Outcome
from simulator.reports.summary import HealthSummary, Quantiles, ServerSummary, Summary, flat
from simulator.tables import add, figure_text, finite, is_utf, new_table, percent_text, printable, say, show, time_text

_WIDTH_MORE = 90  # from here on there is room for all columns of servers
_WIDTH_SPARKS = 110  # from here on there is room for health over time
_FAILURES_MAX = 10  # shown of each scenario
_WHYS_MAX = 12


@dataclass(frozen=True, slots=True)
class Verdict:
    """One run and what was not as it should be."""

    summary: Summary
    missed: tuple[str, ...] = ()  # expectations, in words
    path: str = ""  # of the scenario's file, to say how to run it again

    @property
    def failures(self) -> tuple[str, ...]:
        """Everything wrong, in words: violations come first."""
        return (*self.summary.violations, *self.missed)


def judge(summary: Summary, expectations: Sequence[Expectation], path: str = "") -> Verdict:
    """Hold a run against what its scenario expects."""
    return Verdict(summary, tuple(check(expectations, flat(summary))), path)


def _verdict_text(failures: int) -> Text:
    return Text("FAILED", "bold red") if failures else Text("ok", "green")


# --- one run ---------------------------------------------------------------------------------------------------


def print_run(verdict: Verdict, console: Console) -> None:
    """Print all about one run."""
    summary = verdict.summary
    head = Text(printable(f"{summary.scenario}, {summary.policy or 'as configured'}, seed {summary.seed}: "), "bold")
    say(console, head + _verdict_text(len(verdict.failures)))
    say(console, *(Text(f"  {printable(words)}", "red") for words in verdict.failures))
    show(console, _outcomes(summary))
    show(console, _latencies(summary))
    show(console, _servers(summary, console.width, sparks=is_utf(console)))
    say(console, *_footer(summary))


def _outcomes(summary: Summary) -> Table:
    why = ("why",) if summary.whys else ()
    table = new_table("", "requests", "number", "share", *why, left=why)
    add(table, "arrived", f"{summary.requests:,}", "")
    left_out = max(0, len(summary.whys) - _WHYS_MAX)
    for outcome, n in summary.outcomes.items():
        if n or outcome is Outcome.COMPLETED:
            style = "" if outcome in {Outcome.COMPLETED, Outcome.LEFT} else "red"
            add(table, Text(outcome, style), f"{n:,}", percent_text(n, summary.requests))
        for of, words, count in summary.whys[:_WHYS_MAX]:
            if of is outcome:
                add(table, "", f"{count:,}", "", words or "for no reason given")
    if left_out:
        add(table, "", f"{sum(row[2] for row in summary.whys[_WHYS_MAX:]):,}", "", f"for {left_out} other reasons")
    return table


def _latencies(summary: Summary) -> Table:
    table = new_table("", "latency", "p50", "p90", "p99", "max", "measured")
    rows = {
        "first token (TTFT)": summary.ttft,
        "between tokens (ITL)": summary.itl,
        "whole answer (E2E)": summary.e2e,
    }
    for name, of in rows.items():
        add(table, name, *map(time_text, _four(of)), f"{of.n:,}")
    return table


def _four(of: Quantiles) -> tuple[int | None, int | None, int | None, int | None]:
    return of.p50_ns, of.p90_ns, of.p99_ns, of.max_ns


def _servers(summary: Summary, width: int, *, sparks: bool) -> Table:
    more, sparks = width >= _WIDTH_MORE, sparks and width >= _WIDTH_SPARKS
    columns = ("attempts", "tokens", "wasted", "busy", "loads", "health", "least")
    wide = ("slots", "mean") if more else ()
    table = new_table("", "server", *columns, *wide, *(("over time",) if sparks else ()), left=("over time",))
    for server in summary.servers:
        health = server.health
        extra = (f"{server.slots}", "-" if health is None else _health_text(health.mean)) if more else ()
        add(table, *_server_cells(server), *extra, *((_spark(health),) if sparks else ()))
    return table


def _server_cells(server: ServerSummary) -> list[str | Text]:
    health = server.health
    return [
        server.name,
        f"{server.attempts:,}",
        f"{server.tokens:,}",
        percent_text(server.tokens_wasted, server.tokens),
        percent_text(server.utilisation, 1.0),
        f"{server.loads:,}",
        *(("-", "-") if health is None else (_health_text(health.last), _health_text(health.low))),
    ]


def _health_text(value: float) -> Text:
    return Text(f"{value:.1f}", "red" if value < ALIVE_FROM else "")


_SPARKS = "▁▂▃▄▅▆▇█"


def _spark(health: HealthSummary | None) -> Text:
    """Return health over time as a line of blocks, by its logarithm; x is dead, a blank not yet known."""
    text = Text()
    for value in () if health is None else health.samples:
        if math.isnan(value):
            text.append(" ")
        elif value < ALIVE_FROM:
            text.append("x", "red")
        else:
            text.append(_SPARKS[min(len(_SPARKS) - 1, int(math.log(value, 100) * len(_SPARKS)))])
    return text


def _footer(summary: Summary) -> list[str]:
    tokens = f"{summary.tokens_wasted:,} of {summary.tokens:,}"
    seconds = f"{summary.wasted_ns / SECOND_NS:,.1f} of {summary.busy_ns / SECOND_NS:,.1f}"
    return [
        f"wasted: {percent_text(summary.tokens_wasted, summary.tokens)} of the tokens ({tokens})",
        f"wasted: {percent_text(summary.wasted_ns, summary.busy_ns)} of the server-seconds ({seconds})",
        f"{summary.attempts:,} attempts, {summary.amplification:.2f} a request",
        f"{summary.n_events:,} events in {time_text(summary.ended_ns)} of virtual time",
    ]


# --- many runs -------------------------------------------------------------------------------------------------

SEED_FIGURES: Sequence[str] = (
    "requests", "completed", "failed", "rejected", "left", "unfinished",
    "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "ttft_max_ms", "itl_p50_ms", "itl_p99_ms", "itl_max_ms",
    "e2e_p50_ms", "e2e_p99_ms", "wasted_tokens_pct", "wasted_server_seconds_pct", "amplification",
    "utilisation_pct", "busiest_pct", "loads", "health_last_min", "violations",
)  # fmt: skip


def print_seeds(verdicts: Sequence[Verdict], console: Console) -> None:
    """Print what the seeds of one scenario come to; `verdicts` are not empty."""
    summary = verdicts[0].summary
    failed = sum(bool(verdict.failures) for verdict in verdicts)
    head = printable(f"{summary.scenario}, {summary.policy or 'as configured'}, {len(verdicts)} seeds: ")
    words = f" ({failed} of them)" if failed else ""
    say(console, Text(head, "bold") + _verdict_text(failed) + Text(words))
    table = new_table("", "figure", "median", "least", "most", "worst seed")
    spreads = _spreads(verdicts)
    for name in SEED_FIGURES:
        figure, spread = figure_of(name), spreads[name]
        values = (figure_text(figure, value) for value in (spread.median, spread.low, spread.high))
        add(table, name, *values, "" if spread.low == spread.high or not spread.runs else str(spread.worst_seed))
    show(console, table)
    say(console, *_failures(verdicts))


def _spreads(verdicts: Sequence[Verdict]) -> dict[str, Spread]:
    return merge([(verdict.summary.seed, flat(verdict.summary)) for verdict in verdicts])


def _failures(verdicts: Sequence[Verdict]) -> list[Text]:
    """Return what failed in words, each seed with the command that shows it again."""
    failing = [verdict for verdict in verdicts if verdict.failures]
    lines: list[Text] = []
    for verdict in failing[:_FAILURES_MAX]:
        again = f"ollama-lb simulate {shlex.quote(verdict.path)} --seed {verdict.summary.seed}" if verdict.path else ""
        lines.append(Text(printable(f"  seed {verdict.summary.seed}{': ' if again else ''}{again}"), "bold"))
        lines += [Text(f"    {printable(words)}", "red") for words in verdict.failures[:_FAILURES_MAX]]
        lines += _more(len(verdict.failures) - _FAILURES_MAX, "    ", "failures")
    return lines + _more(len(failing) - _FAILURES_MAX, "  ", "seeds")


def _more(n: int, indent: str, what: str) -> list[Text]:
    return [Text(f"{indent}and {n:,} more {what}")] if n > 0 else []


_SCENARIO_COLUMNS = {
    "requests": "requests",
    "completed": "completed",
    "TTFT p50": "ttft_p50_ms",
    "TTFT p99": "ttft_p99_ms",
    "wasted": "wasted_tokens_pct",
}


def print_scenarios(cases: Sequence[Sequence[Verdict]], console: Console) -> None:
    """Print many scenarios, each with its seeds (at least one): verdicts, key figures, then what failed."""
    table = new_table("", "scenario", "verdict", *_SCENARIO_COLUMNS, left=("verdict",))
    for verdicts in cases:
        spreads = _spreads(verdicts)
        values = (figure_text(figure_of(name), spreads[name].median) for name in _SCENARIO_COLUMNS.values())
        failed = sum(bool(verdict.failures) for verdict in verdicts)
        add(table, verdicts[0].summary.scenario, _verdict_text(failed), *values)
    show(console, table)
    for verdicts in cases:
        if lines := _failures(verdicts):
            say(console, Text(printable(verdicts[0].summary.scenario), "bold red"), *lines)
    seeds = max((len(verdicts) for verdicts in cases), default=0)
    failed = sum(any(verdict.failures for verdict in verdicts) for verdicts in cases)
    of = f"; figures are medians of {seeds} seeds" if seeds > 1 else ""
    say(console, f"{len(cases):,} scenario{'' if len(cases) == 1 else 's'}, {failed or 'none'} failed{of}")


# --- JSON ------------------------------------------------------------------------------------------------------


def as_object(verdict: Verdict) -> dict[str, Any]:
    """Return one run as JSON's types: every figure by name, null where there is nothing to measure."""
    summary = verdict.summary
    return {
        "scenario": summary.scenario,
        "policy": summary.policy,
        "seed": summary.seed,
        "ok": not verdict.failures,
        "failures": list(verdict.failures),
        "figures": {name: finite(value) for name, value in flat(summary).items()},
        "whys": [{"outcome": outcome, "why": why, "requests": n} for outcome, why, n in summary.whys],
        "health": {
            server.name: [finite(value) for value in server.health.samples]
            for server in summary.servers
            if server.health is not None
        },
    }


def to_json(verdicts: Sequence[Verdict]) -> str:
    """Return runs as one JSON object on one line."""
    runs = [as_object(verdict) for verdict in verdicts]
    return json.dumps({"ok": all(run["ok"] for run in runs), "runs": runs}, allow_nan=False)
