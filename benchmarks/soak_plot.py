"""The picture of benchmarks/soak.py: memory, descriptors and times over the time, with the faults behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit import NS_PER_S, percentile
from benchmarks.soak_load import Outcome
from benchmarks.soak_watch import Sample, Span

BIN_S = 5.0
RACED = frozenset({"chat", "long chat", "generate", "v1 chat", "reads little", "leaves mid-stream"})
_MIB = 2**20


def binned(outcomes: Sequence[Outcome], begin_ns: int, width_s: float = BIN_S) -> list[tuple[float, float, float]]:
    """Return the middle of each span of time (s), and p50 and p99 to the first byte of what was planned in it (ms)."""
    bins: dict[int, list[float]] = {}
    for outcome in outcomes:
        if outcome.first_ns:
            index = int((outcome.planned_ns - begin_ns) / NS_PER_S / width_s)
            bins.setdefault(index, []).append((outcome.first_ns - outcome.planned_ns) / 1e6)
    return [
        ((index + 0.5) * width_s, percentile(waits, 0.5), percentile(waits, 0.99))
        for index, waits in sorted(bins.items())
    ]


def draw(
    path: Path,
    samples: Sequence[Sample],
    spans: Sequence[Span],
    outcomes: Sequence[Outcome],
    lost_ns: Sequence[int],
    begin_ns: int,
    warm_s: float,
) -> bool:
    """Draw a run; tell whether that was possible: matplotlib need not be there."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  # optional, and slow to import
    except ImportError:
        return False
    figure = Figure(figsize=(14, 9), layout="constrained")
    memory, held, times, faults = figure.subplots(4, 1, sharex=True, height_ratios=(3, 2, 3, 2))
    at = [each.at_s for each in samples]
    memory.plot(at, [each.rss / _MIB for each in samples], label="resident")
    memory.plot(at, [each.uss / _MIB for each in samples], label="its own")
    memory.axvline(warm_s, color="black", linestyle=":", label="warm")
    memory.set_ylabel("memory, MiB")
    held.plot(at, [each.descriptors for each in samples], label="descriptors")
    held.plot(at, [each.threads for each in samples], label="threads")
    held.set_ylabel("number")
    for who, raced in (("streams, which are raced", True), ("others, of one server at a time", False)):
        bins = binned([outcome for outcome in outcomes if (outcome.kind in RACED) is raced], begin_ns)
        for column, name in ((1, "p50"), (2, "p99")):
            times.plot([each[0] for each in bins], [each[column] for each in bins], label=f"{who}: {name}")
    times.set_yscale("log")
    times.set_ylabel("first byte, ms")
    _draw_faults(faults, spans, begin_ns)
    for moment in lost_ns:
        for axes in (memory, held, times, faults):
            axes.axvline((moment - begin_ns) / NS_PER_S, color="red", linewidth=0.8)
    for axes in (memory, held, times):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
        axes.grid(alpha=0.3)
    held.set_ylim(bottom=0)
    words = "; a red line for each request that was lost" if lost_ns else "; no request was lost"
    memory.set_title(f"{len(outcomes):,} requests, {len(spans)} faults{words}")
    faults.set_xlabel("s")
    figure.savefig(path, dpi=110)
    return True


def _draw_faults(axes: Any, spans: Sequence[Span], begin_ns: int) -> None:
    """Draw a row for each server, a colour for each kind of fault."""
    kinds = sorted({span.kind for span in spans})
    servers = sorted({span.server for span in spans})
    shown = set()
    for span in spans:
        begin_s = (span.begin_ns - begin_ns) / NS_PER_S
        width_s = (span.end_ns - span.begin_ns) / NS_PER_S if span.end_ns else 0.0
        label = None if span.kind in shown else span.kind
        shown.add(span.kind)
        colour = f"C{kinds.index(span.kind)}" if kinds.index(span.kind) < 10 else f"{kinds.index(span.kind) / 40}"
        axes.broken_barh([(begin_s, width_s)], (servers.index(span.server) - 0.4, 0.8), color=colour, label=label)
    axes.set_yticks(range(len(servers)), servers)
    axes.set_ylabel("faults")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
