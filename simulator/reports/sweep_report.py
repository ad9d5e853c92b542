"""What `ollama-lb bench` prints of a sweep: tables for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Console

from simulator.reports.figures import INTERVAL_RUNS_MIN, Estimate, Figure, SweepRow, figure_of, ratio_to
from simulator.tables import add, figure_text, finite, is_utf, new_table, printable, say, show

_RANKED = "ttft_p99_ms"
_SWEEP_COLUMNS: Mapping[str, str] = {
    "TTFT p50": "ttft_p50_ms",
    "TTFT p99": "ttft_p99_ms",
    "E2E p99": "e2e_p99_ms",
    "wasted": "wasted_tokens_pct",
}
_SLOT_TIME: Mapping[str, str] = {"slot time": "wasted_server_seconds_pct"}  # wasted as well; where there is room
_WIDTH_MORE = 90


def print_sweep(rows: Sequence[SweepRow], console: Console, *, reference: str = "oracle") -> None:
    """Print a sweep: a table for each scenario and load, the best p99 TTFT first, each as a ratio to `reference`."""
    cells = dict.fromkeys((row.scenario, row.load) for row in rows)
    more = _SLOT_TIME if console.width >= _WIDTH_MORE else {}
    columns = {**_SWEEP_COLUMNS, **more, "done": "completed"}
    for scenario, load in cells:
        here = [row for row in rows if (row.scenario, row.load) == (scenario, load)]
        here.sort(key=lambda row: (_nan_last(row.figure(_RANKED).mean), row.policy))
        table = new_table(printable(f"{scenario} at {load:.0%} load"), "policy", *columns, f"x {reference}")
        for row in here:
            times = ratio_to(rows, row, _RANKED, reference)
            values = (_sweep_text(name, row.figure(name), console) for name in columns.values())
            add(table, row.policy, *values, "-" if math.isnan(times) else f"{times:.2f}")
        show(console, table)
    runs = [row.figure("requests").runs for row in rows]
    if runs:
        seeds = f"{min(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
        interval = " with its 95 % confidence interval," if min(runs) >= INTERVAL_RUNS_MIN else ""
        say(console, f"means over {seeds} seeds; p99 TTFT{interval} and as a ratio")


def _sweep_text(name: str, found: Estimate, console: Console) -> str:
    """Return a cell; only the figure that is ranked has room for its interval."""
    if name != _RANKED:
        return figure_text(figure_of(name), found.mean)
    text = estimate_text(figure_of(name), found)
    return text if is_utf(console) else text.replace("±", "+-")


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def estimate_text(figure: Figure, estimate: Estimate) -> str:
    """Return a mean with half the width of its interval: "183 ±12.3 ms"; a few runs have no interval."""
    text = figure_text(figure, estimate.mean)
    if not estimate.has_interval:
        return text
    half = figure_text(figure, estimate.high - estimate.mean)
    unit = half.partition(" ")[2]
    return f"{text.removesuffix(f' {unit}') if unit else text} ±{half}"


def sweep_csv(rows: Sequence[SweepRow], names: Iterable[str] | None = None) -> str:
    """Return a sweep as CSV, one line a cell: of each figure its mean and interval. `names`: all unless told."""
    named = list(dict.fromkeys(name for row in rows for name in row.figures) if names is None else names)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts: Mapping[str, Callable[[Estimate], float]] = {
        "": lambda found: found.mean, "_low": lambda found: found.low, "_high": lambda found: found.high,
    }  # fmt: skip
    seeds = [max((estimate.runs for estimate in row.figures.values()), default=0) for row in rows]
    writer.writerow(["scenario", "policy", "load", "seeds", *(f"{name}{part}" for name in named for part in parts)])
    for row, n in zip(rows, seeds, strict=True):
        values = [read(row.figure(name)) for name in named for read in parts.values()]
        cells = ["" if math.isnan(value) else repr(value) for value in values]
        writer.writerow([row.scenario, row.policy, repr(row.load), n, *cells])
    return out.getvalue()


def sweep_json(rows: Sequence[SweepRow], violations: Sequence[str] = ()) -> str:
    """Return a sweep as one JSON object on one line, with what went wrong in it."""
    cells = [
        {
            "scenario": row.scenario,
            "policy": row.policy,
            "load": row.load,
            "figures": {
                name: {"mean": finite(of.mean), "low": finite(of.low), "high": finite(of.high), "seeds": of.runs}
                for name, of in row.figures.items()
            },
        }
        for row in rows
    ]
    return json.dumps({"cells": cells, "violations": list(violations)}, allow_nan=False)
