"""Pictures of runs and sweeps. Needs matplotlib (the extra `ollama-lb[plot]`), which is imported only when drawing.

The format is that of the path's suffix: png, svg, pdf. The same results give the same bytes. Colours are those of
Okabe and Ito (https://jfly.uni-koeln.de/color/), which people tell apart whatever kind of colour vision they have;
line styles and markers differ as well.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulator.reports.figures import Estimate, SweepRow, figure_of
from simulator.tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# ruff: noqa: PLC0415  # matplotlib is optional, and takes half a second to import

BLUE, ORANGE, VERMILION, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
SKY, PURPLE, YELLOW, BLACK, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#000000", "#8C8C8C"

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_ORACLE = "oracle"  # the lower bound is drawn apart from the policies
_LOG_FROM = 10.0  # %, from which on a cost may need a logarithmic axis

_STYLE: Mapping[str, Any] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.titlesize": 12,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 120,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ollama-lb",  # or else the ids in an SVG are drawn at random
    "text.parse_math": False,  # a dollar in a name is a dollar
}


class PlotError(Exception):
    """A picture cannot be made; says why and what to do."""


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw in our style, whatever the user's own. Raises PlotError when there is no matplotlib."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise PlotError(f"pictures need matplotlib: pip install 'ollama-lb[plot]' ({error})") from error
    with matplotlib.style.context(["default", dict(_STYLE)]):
        yield


def new_figure(width_in: float, height_in: float, title: str) -> Figure:
    """Return an empty figure. Not one of pyplot's: it needs no screen and leaves nothing behind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(printable(title), round(width_in * 9))), x=0.01, ha="left", weight="bold")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure, without the moment and the program in it. Raises PlotError when that is not possible."""
    known = sorted(figure.canvas.get_supported_filetypes())
    kind = path.suffix.removeprefix(".").lower()
    if kind not in known:
        given = path.suffix or "a file without suffix"
        raise PlotError(f"{path}: no picture can be written as {given}; write .png, .svg or .pdf")
    unset: Mapping[str, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    try:
        figure.savefig(path, metadata=unset.get(kind))
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror or error}") from error


def legend(axes: Axes, title: str) -> None:
    """Put the legend beside the axes, where it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.005, 1.0), "borderaxespad": 0.0}
        axes.legend(title=title, alignment="left", title_fontsize=8, **beside)


def scale_y(axes: Axes, values: Sequence[float], log_from: float = 20.0) -> None:
    """Make the y axis logarithmic when the largest value is `log_from` times the smallest; else let it begin at 0."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) > log_from:
        axes.set_yscale("log")
        axes.set_ylim(min(positive) / 1.3, max(positive) * 1.3)
        decades = math.log10(max(positive) / min(positive))
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.12 * max(positive, default=1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _scale_x(axes: Axes, values: Sequence[float]) -> None:
    """Let the x axis begin at 0, and be logarithmic from 1 on when little and much must both be seen."""
    most = max(values, default=0.0) or 1.0
    small = [value for value in values if 0.02 * most < value < 0.2 * most]
    if most > _LOG_FROM and small:
        axes.set_xscale("symlog", linthresh=1.0, linscale=0.5)
        ticks = [tick for tick in (0, 1, 2, 5, 10, 20, 50, 100) if tick <= 1.5 * most]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlim(-0.2, 1.25 * most)
    else:
        axes.set_xlim(-0.04 * most, 1.08 * most)


def say_empty(axes: Axes, words: str) -> None:
    """Say in the middle of the axes why there is nothing to see."""
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=GREY)


def style_of(place: int) -> dict[str, Any]:
    """Return colour and line style of the n-th of several lines."""
    return {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _DASHES[place // len(_COLOURS) % len(_DASHES)]}


# --- sweeps ----------------------------------------------------------------------------------------------------


def plot_sweep(rows: Sequence[SweepRow], path: Path, *, name: str = "ttft_p99_ms", title: str = "") -> None:
    """Draw a figure (p99 TTFT unless told otherwise) against load: a panel a scenario, a line a policy.

    The bands are the 95 % confidence intervals. Raises PlotError.
    """
    with drawing():
        scenarios = list(dict.fromkeys(row.scenario for row in rows))
        figure, panels = _panels(scenarios, title or f"{_label(name)} against load{_seeds(rows)}")
        styles = _policy_styles(rows)
        for scenario, axes in zip(scenarios, panels, strict=True):
            here = [row for row in rows if row.scenario == scenario]
            for policy, style in styles.items():
                _line(axes, [row for row in here if row.policy == policy], name, style)
            scale_y(axes, _ends(here, name))
            axes.set_xlabel("offered load (% of what the fleet can do)")
            axes.set_ylabel(_label(name))
        _policy_legend(figure, panels)
        save(figure, path)


def _line(axes: Axes, rows: Sequence[SweepRow], name: str, style: Mapping[str, Any]) -> None:
    found = sorted((row.load * 100, row.figure(name)) for row in rows if row.figure(name).runs)
    if not found:
        return
    loads = [load for load, _ in found]
    means = [of.mean for _, of in found]
    axes.plot(loads, means, label=printable(rows[0].policy), markersize=4, linewidth=1.5, **style)
    low, high = [of.low for _, of in found], [of.high for _, of in found]
    axes.fill_between(loads, low, high, color=style["color"], alpha=0.13, linewidth=0)


def plot_pareto(
    rows: Sequence[SweepRow], path: Path, *, cost: str = "wasted_tokens_pct", name: str = "ttft_p99_ms", title: str = ""
) -> None:
    """Draw what is paid against what it buys: a panel for each scenario and load, a marker a policy.

    The grey line joins the policies that no other but the oracle beats in both figures; the crosses are 95 %
    confidence intervals. Raises PlotError.
    """
    with drawing():
        cells = list(dict.fromkeys((row.scenario, row.load) for row in rows))
        names = [f"{scenario} at {load:.0%} load" for scenario, load in cells]
        figure, panels = _panels(names, title or f"{_label(name)} against {_label(cost)}{_seeds(rows)}")
        styles = _policy_styles(rows)
        for cell, axes in zip(cells, panels, strict=True):
            here = [row for row in rows if (row.scenario, row.load) == cell and _has(row, cost, name)]
            real = [row for row in here if row.policy != _ORACLE]
            front = _front([(row.figure(cost).mean, row.figure(name).mean) for row in real])
            axes.plot([x for x, _ in front], [y for _, y in front], color=GREY, linewidth=1, alpha=0.7, zorder=1)
            for row in here:
                _mark(axes, row, row.figure(cost), row.figure(name), styles[row.policy])
            scale_y(axes, _ends(here, name), log_from=5.0)
            _scale_x(axes, [end for row in here for end in (row.figure(cost).mean, row.figure(cost).high)])
            axes.set_xlabel(_label(cost))
            axes.set_ylabel(_label(name))
        _policy_legend(figure, panels)
        save(figure, path)


def _has(row: SweepRow, *names: str) -> bool:
    return all(row.figure(name).runs for name in names)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that none is better than in both, by their first figure."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _mark(axes: Axes, row: SweepRow, cost: Estimate, value: Estimate, style: Mapping[str, Any]) -> None:
    xerr = [[cost.mean - cost.low], [cost.high - cost.mean]]
    yerr = [[value.mean - value.low], [value.high - value.mean]]
    shown = {"color": style["color"], "marker": style["marker"], "elinewidth": 0.8, "ecolor": style["color"] + "80"}
    axes.errorbar(cost.mean, value.mean, yerr, xerr, "", label=printable(row.policy), markersize=7, ls="none", **shown)


def _panels(names: Sequence[str], title: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with a titled panel for each name, at most three in a row."""
    columns = max(1, min(3, len(names)))
    lines = max(1, -(-len(names) // columns))
    figure = new_figure(2.5 + 4.6 * columns + (2.0 if columns == 1 else 0.0), 0.6 + 3.8 * lines, title)
    panels: list[Axes] = []
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(lines, columns, place)
        axes.set_title("\n".join(textwrap.wrap(printable(name), 60)))
        panels.append(axes)
    if not names:
        say_empty(figure.add_subplot(), "nothing to show")
    return figure, panels


def _policy_styles(rows: Sequence[SweepRow]) -> dict[str, dict[str, Any]]:
    """Return how each policy is drawn, the same in all panels."""
    policies = list(dict.fromkeys(row.policy for row in rows))
    others = [policy for policy in policies if policy != _ORACLE]
    styles = {policy: {**style_of(n), "marker": _MARKERS[n % len(_MARKERS)]} for n, policy in enumerate(others)}
    oracle = {_ORACLE: {"color": BLACK, "linestyle": "--", "marker": "*"}}
    return {**styles, **oracle} if _ORACLE in policies else styles


def _policy_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Put one legend for all panels beside them."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        place: dict[str, Any] = {"loc": "outside right upper", "title": "policy", "alignment": "left"}
        figure.legend(list(handles.values()), list(handles), **place)


def _ends(rows: Sequence[SweepRow], name: str) -> list[float]:
    """Return the values that must be seen; an interval that reaches down to 0 is no reason for a longer axis."""
    found = [row.figure(name) for row in rows if row.figure(name).runs]
    read: Sequence[Callable[[Estimate], float]] = (
        lambda of: of.mean,
        lambda of: min(of.high, 3 * of.mean),
        lambda of: max(of.low, of.mean / 3),
    )
    return [end(of) for of in found for end in read]


_LABELS: Mapping[str, str] = {
    "ttft_p50_ms": "p50 TTFT (ms)",
    "ttft_p90_ms": "p90 TTFT (ms)",
    "ttft_p99_ms": "p99 TTFT (ms)",
    "e2e_p99_ms": "p99 E2E (ms)",
    "itl_p99_ms": "p99 ITL (ms)",
    "wasted_tokens_pct": "wasted tokens (%)",
    "wasted_server_seconds_pct": "wasted server-seconds (%)",
}


def _label(name: str) -> str:
    """Return a figure's name for an axis, with its unit."""
    figure = figure_of(name)
    return _LABELS.get(name) or (f"{figure.words} ({figure.unit})" if figure.unit else figure.words)


def _seeds(rows: Sequence[SweepRow]) -> str:
    runs = [of.runs for row in rows for of in row.figures.values() if of.runs]
    return f", means of {max(runs)} seeds" if runs and max(runs) > 1 else ""
