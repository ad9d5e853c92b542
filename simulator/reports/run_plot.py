"""The picture of one run: faults, first tokens, attempts on each server and health, on one axis of time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lbcore.health import ALIVE_FROM
from lbcore.schema import MS_NS, SECOND_NS
from simulator.reports.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    drawing,
    legend,
    new_figure,
    save,
    say_empty,
    scale_y,
    style_of,
)
from simulator.reports.results import AttemptResult, Band, Outcome, RunResult, ServerResult
from simulator.tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# ruff: noqa: PLC0415  # matplotlib is optional, and takes half a second to import

_LANES_MAX = 16  # of one server; more attempts at a time share the last
_WAIT_MIN_NS = MS_NS  # less is the way to the server
_FAULTS_MAX = 16
_LINES_MAX = 12  # servers with a line of their own colour
_BAND_COLOURS = (YELLOW, SKY, GREEN, PURPLE)  # of faults; none of them is the colour of an attempt

_OUTCOMES = {
    Outcome.COMPLETED: (BLUE, "o"),
    Outcome.FAILED: (VERMILION, "x"),
    Outcome.REJECTED: (BLACK, "v"),
    Outcome.LEFT: (GREY, "D"),
    Outcome.UNFINISHED: (PURPLE, "P"),
}


class _Clock(NamedTuple):
    """The axis of time: from 0 to the end of the run, in a unit that suits its length."""

    unit: str
    unit_ns: int
    end: float

    def at(self, time_ns: float) -> float:
        """Return a time on the axis, not beyond the run."""
        return min(max(time_ns / self.unit_ns, 0.0), self.end)


def _clock(end_ns: int) -> _Clock:
    unit, unit_ns = "s", SECOND_NS
    if end_ns > 6 * 3600 * SECOND_NS:
        unit, unit_ns = "h", 3600 * SECOND_NS
    elif end_ns > 600 * SECOND_NS:
        unit, unit_ns = "min", 60 * SECOND_NS
    return _Clock(unit, unit_ns, max(end_ns, 1) / unit_ns)


def plot_run(result: RunResult, path: Path) -> None:
    """Draw one run into `path`. Raises PlotError."""
    with drawing():
        clock = _clock(result.ended_ns)
        faults = _faults(result.bands)
        n = max(1, len(result.servers))
        heights = [0.3 + 0.19 * len(faults)] if faults else []
        heights += [3.0, min(9.0, 0.6 + n * (0.5 if n <= 8 else 0.3)), 2.2]
        title = f"{result.scenario}, {result.policy or 'as configured'}, seed {result.seed}"
        figure = new_figure(14.0, sum(heights) + 1.2, title)
        panels: list[Axes] = list(
            figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        )
        ttft, gantt, health = panels[-3:]
        if faults:
            _draw_faults(panels[0], faults, clock)
        for axes in (ttft, health):
            _shade(axes, faults, clock)
        _draw_ttft(ttft, result, clock)
        _draw_gantt(gantt, result, faults, clock)
        _draw_health(health, result, clock)
        health.set_xlabel(f"time ({clock.unit})")
        health.set_xlim(0, clock.end)
        figure.align_ylabels(panels)
        save(figure, path)


# --- faults ----------------------------------------------------------------------------------------------------

_Faults = Sequence[tuple[str, str, list[Band]]]
"""The bands of each fault: server, kind, when it was on."""


def _faults(bands: Sequence[Band]) -> _Faults:
    by_fault: dict[tuple[str, str], list[Band]] = {}
    for band in bands:
        by_fault.setdefault((band.server, band.kind), []).append(band)
    return [(server, kind, found) for (server, kind), found in list(by_fault.items())[:_FAULTS_MAX]]


def _stretches(bands: Iterable[Band], clock: _Clock) -> list[tuple[float, float]]:
    """Return bands as (begin, length)."""
    ends = [(clock.at(band.from_ns), clock.at(band.until_ns)) for band in bands]
    return [(begin, end - begin) for begin, end in ends]


def _draw_faults(axes: Axes, faults: _Faults, clock: _Clock) -> None:
    for place, (_, _, bands) in enumerate(faults):
        colour = _BAND_COLOURS[place % len(_BAND_COLOURS)]
        axes.broken_barh(_stretches(bands, clock), (place - 0.35, 0.7), color=colour, linewidth=0.5)
    names = [printable(f"{server or 'everywhere'}: {kind}") for server, kind, _ in faults]
    axes.set_yticks(range(len(faults)), names)
    axes.set_ylim(len(faults) - 0.5, -0.5)
    axes.set_title("faults")
    axes.grid(visible=False, axis="y")


def _shade(axes: Axes, faults: _Faults, clock: _Clock) -> None:
    """Shade the whole height of a panel while a fault is on."""
    for place, (_, _, bands) in enumerate(faults):
        colour = _BAND_COLOURS[place % len(_BAND_COLOURS)]
        whole = axes.get_xaxis_transform()
        axes.broken_barh(_stretches(bands, clock), (0, 1), color=colour, alpha=0.16, linewidth=0, transform=whole)


# --- first tokens ----------------------------------------------------------------------------------------------


def _draw_ttft(axes: Axes, result: RunResult, clock: _Clock) -> None:
    longest_ns = max((request.ttft_ns or 0 for request in result.requests), default=0)
    unit, unit_ns = ("s", SECOND_NS) if longest_ns >= 10 * SECOND_NS else ("ms", MS_NS)
    many = len(result.requests) > 3000
    values: list[float] = []
    without: list[tuple[Outcome, list[float]]] = []
    for outcome, (colour, marker) in _OUTCOMES.items():
        of = [request for request in result.requests if request.outcome is outcome]
        if not of:
            continue
        points = [(clock.at(request.ask.arrives_ns), request.ttft_ns / unit_ns)
                  for request in of if request.ttft_ns is not None]  # fmt: skip
        values += [value for _, value in points]
        plain = outcome is Outcome.COMPLETED
        size = (4.0 if many else 12.0) if plain else 24.0
        shown: dict[str, Any] = {"c": colour, "marker": marker, "s": size, "linewidths": 0 if plain else 1.0}
        shown |= {"label": f"{outcome} ({len(of):,})", "rasterized": many, "zorder": 2 if plain else 3}
        axes.scatter([x for x, _ in points], [y for _, y in points], alpha=0.45 if many and plain else 1.0, **shown)
        without.append((outcome, [clock.at(r.ask.arrives_ns) for r in of if r.ttft_ns is None]))
    if not result.requests:
        say_empty(axes, "no requests")
    scale_y(axes, values)
    _draw_without(axes, without)
    axes.set_ylabel(f"TTFT ({unit})")
    room = 22 if any(xs for _, xs in without) else 6
    axes.set_title("time to first token of each request, by its arrival", pad=room)
    legend(axes, "requests")
    found = axes.get_legend()
    for handle in found.legend_handles if found is not None else ():
        if handle is not None:
            handle.set_alpha(1.0)
            if hasattr(handle, "set_sizes"):
                handle.set_sizes([40.0 if many else 30.0])


def _draw_without(axes: Axes, without: Sequence[tuple[Outcome, list[float]]]) -> None:
    """Show the requests that never got a token above the panel, where no time can be read off for them."""
    if not any(xs for _, xs in without):
        return
    for outcome, xs in without:
        colour, marker = _OUTCOMES[outcome]
        axes.scatter(xs, [1.05] * len(xs), c=colour, marker=marker, s=16, linewidths=1.0, clip_on=False,
                     transform=axes.get_xaxis_transform(), rasterized=len(xs) > 3000)  # fmt: skip
    axes.text(-0.006, 1.05, "no first token", transform=axes.transAxes, ha="right", va="center", fontsize=8)


# --- attempts --------------------------------------------------------------------------------------------------

_WON, _LOST, _FAILED, _LEFT, _WAITED, _OTHER = "won", "lost a race", "failed", "client left", "waiting", "cancelled"
_FATES = {_WAITED: "#C9C9C9", _WON: BLUE, _LOST: ORANGE, _LEFT: GREY, _OTHER: BLACK, _FAILED: VERMILION}
"""Drawn in this order: what matters most lies on top."""


def _fate(attempt: AttemptResult) -> str:
    if attempt.outcome == "failed":
        return _FAILED
    if attempt.outcome == "cancelled":
        return {"lost the race": _LOST, "the client left": _LEFT}.get(attempt.why, _OTHER)
    return _WON if attempt.delivered or attempt.outcome == "succeeded" else _OTHER


def _lanes(attempts: Sequence[AttemptResult]) -> list[int]:
    """Return a lane for each attempt, in order of their beginnings, so that those of one lane do not overlap."""
    busy: list[tuple[int, int]] = []
    free: list[int] = []
    lanes: list[int] = []
    for attempt in attempts:
        while busy and busy[0][0] <= attempt.started_ns:
            heappush(free, heappop(busy)[1])
        lane = heappop(free) if free else len(busy)
        heappush(busy, (attempt.ended_ns, lane))
        lanes.append(lane)
    return lanes


_Box = tuple[float, float, float, float]
"""Left, right, bottom, top."""


def _boxes(server: ServerResult, attempts: Sequence[AttemptResult], row: int, clock: _Clock) -> dict[str, list[_Box]]:
    """Return the bars of one server by their fates: the time until a slot apart from the time in it."""
    lanes = _lanes(attempts)
    n = min(_LANES_MAX, max(server.slots, 1 + max(lanes, default=0)))
    boxes: dict[str, list[_Box]] = {fate: [] for fate in _FATES}
    for attempt, lane in zip(attempts, lanes, strict=True):
        top = row - 0.42 + 0.84 * min(lane, n - 1) / n
        bottom = top + 0.84 / n * 0.9
        begin, end = clock.at(attempt.started_ns), clock.at(attempt.ended_ns)
        waited = attempt.slot_ns is not None and attempt.slot_ns - attempt.started_ns >= _WAIT_MIN_NS
        slot = clock.at(attempt.slot_ns) if waited and attempt.slot_ns is not None else begin
        if waited:
            boxes[_WAITED].append((begin, slot, bottom, top))
        boxes[_fate(attempt)].append((slot, end, bottom, top))
    return boxes


def _draw_gantt(axes: Axes, result: RunResult, faults: _Faults, clock: _Clock) -> None:
    by_server: dict[str, list[AttemptResult]] = {server.name: [] for server in result.servers}
    for attempt in sorted(result.attempts, key=lambda attempt: (attempt.started_ns, attempt.attempt_id)):
        by_server[attempt.server].append(attempt)
    drawn: dict[str, list[_Box]] = {fate: [] for fate in _FATES}
    for row, server in enumerate(result.servers):
        for fate, boxes in _boxes(server, by_server[server.name], row, clock).items():
            drawn[fate] += boxes
    for fate, boxes in drawn.items():
        _draw_boxes(axes, boxes, fate)
    rows = {server.name: row for row, server in enumerate(result.servers)}
    for place, (name, _, bands) in enumerate(faults):
        here = range(len(rows)) if not name else [rows[name]] if name in rows else []
        for row in here:
            axes.broken_barh(_stretches(bands, clock), (row - 0.5, 1.0), linewidth=0, zorder=0.5,
                             color=_BAND_COLOURS[place % len(_BAND_COLOURS)], alpha=0.35)  # fmt: skip
    names = [printable(f"{server.name} ({server.slots})") for server in result.servers]
    axes.set_yticks(range(len(names)), names, fontsize=9 if len(names) <= 20 else 6)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color=GREY, linewidth=0.4, alpha=0.6)
    axes.grid(visible=False, axis="y")
    axes.set_ylabel("server (slots)")
    axes.set_title("attempts, a bar each; those below one another ran at the same time")
    if not result.attempts:
        say_empty(axes, "no attempts")
    legend(axes, "attempts")


def _draw_boxes(axes: Axes, boxes: Sequence[_Box], fate: str) -> None:
    from matplotlib.collections import PolyCollection

    if not boxes:
        return
    corners = [((left, low), (right, low), (right, high), (left, high)) for left, right, low, high in boxes]
    bars = PolyCollection(corners, facecolors=_FATES[fate], edgecolors=_FATES[fate], rasterized=len(boxes) > 3000)
    bars.set_linewidth(1.0 if fate == _FAILED else 0.3)  # a failure may take no time at all, and must be seen
    bars.set_zorder(2 + 0.1 * list(_FATES).index(fate))
    bars.set_label(f"{'waiting for a slot or a load' if fate == _WAITED else fate} ({len(boxes):,})")
    axes.add_collection(bars, autolim=False)


# --- health ----------------------------------------------------------------------------------------------------


def _draw_health(axes: Axes, result: RunResult, clock: _Clock) -> None:
    steps: dict[str, list[tuple[int, float]]] = {server.name: [] for server in result.servers}
    for point in sorted(result.health, key=lambda point: point.at_ns):
        steps.setdefault(point.server, []).append((point.at_ns, point.value))
    steps = {name: found for name, found in steps.items() if found}
    lowest = sorted(steps, key=lambda name: min(value for _, value in steps[name][1:] or steps[name]))
    named = [name for name in steps if name in lowest[:_LINES_MAX]]
    for name, found in steps.items():
        xs = [*(clock.at(at_ns) for at_ns, _ in found), clock.end]
        ys = [*(value for _, value in found), found[-1][1]]
        style = style_of(named.index(name)) if name in named else {"color": GREY, "linewidth": 0.6, "alpha": 0.5}
        label = printable(name) if name in named else "_"
        axes.step(xs, ys, where="post", label=label, **{"linewidth": 1.2, **style})
    axes.set_yscale("symlog", linthresh=ALIVE_FROM, linscale=0.4)
    top = max((value for found in steps.values() for _, value in found), default=100.0)
    axes.set_ylim(0, max(10.0, top * 1.4))
    axes.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    axes.axhspan(0, ALIVE_FROM, color=GREY, alpha=0.12, linewidth=0)
    axes.set_ylabel("health value")
    axes.set_title("health of each server; below 1 (grey) it is dead")
    if not steps:
        say_empty(axes, "no health recorded")
    rest = len(steps) - len(named)
    legend(axes, f"servers (and {rest} more, grey)" if rest else "servers")
