"""Plots of results, one PNG for each: `python -m benchmarks plots [DIRECTORY]`. Needs matplotlib.

Bars are medians, the lines on them go from the least to the greatest repetition.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit import RESULTS, median

_DECADES = 3  # more than this from the least to the greatest: on a logarithmic axis
NO_MATPLOTLIB = "matplotlib is not installed: no plots (pip install 'ollama-lb[plot]')"
_COLOURS = {"ollama-lb": "#1b6ca8", "nginx": "#2e8b57", "haproxy": "#c8553d", "direct": "#808080"}
_LIGHT = {"nginx with access_log": "#8fc7a5", "ollama-lb, races": "#86b5d9"}


def colour(name: str) -> str:
    """Return the colour of a program; a name begins with it."""
    if name in _LIGHT:
        return _LIGHT[name]
    return next((tone for program, tone in _COLOURS.items() if name.startswith(program)), "#404040")


def grouped(rows: dict[str, Any], *, by_last: bool) -> dict[str, dict[str, Any]]:
    """Group rows with names of two parts, such as `10, nginx`, by the part before or after the last comma."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        before, _, after = name.rpartition(", ")
        group, key = (after, before) if by_last else (before, after)
        found.setdefault(group, {})[key] = row
    return found


def bars(axes: Any, groups: Mapping[str, Mapping[str, Sequence[float]]], unit: str) -> None:
    """Draw a group of bars for each key, a bar for each program in it."""
    programs = list(dict.fromkeys(program for group in groups.values() for program in group))
    width = 0.8 / len(programs)
    for program in programs:
        places, heights, below, above = [], [], [], []
        for place, group in enumerate(groups.values()):
            if values := group.get(program):
                there = [name for name in programs if group.get(name)]
                places.append(place + (there.index(program) - (len(there) - 1) / 2) * width)
                heights.append(median(values))
                below.append(median(values) - min(values))
                above.append(max(values) - median(values))
        whiskers = [below, above] if any(below) or any(above) else None
        axes.bar(places, heights, width * 0.92, yerr=whiskers, capsize=2, color=colour(program), label=program)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(unit)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _relay(figure: Any, data: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    by_servers = grouped(data, by_last=True)
    each = {
        f"{word},\n{servers}": {name: [pick(run) for run in runs] for name, runs in programs.items()}
        for word, pick in (("all CPU / tokens", _whole), ("one more token", _steady))
        for servers, programs in by_servers.items()
    }
    bars(left, each, "CPU us a token")
    left.legend(frameon=False)
    chats = {
        servers: {name: [run["chats_cpu_us"] / run["chats"] for run in runs] for name, runs in programs.items()}
        for servers, programs in by_servers.items()
    }
    bars(right, chats, "CPU us a chat of one token")


def _whole(run: dict[str, float]) -> float:
    return run["cpu_us"] / run["tokens"]


def _steady(run: dict[str, float]) -> float:
    return run["steady_cpu_us"] / run["steady_tokens"]


def _relay_times(figure: Any, data: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator  # noqa: PLC0415

    by_crowd = grouped(data, by_last=False)
    for axes, (crowd, programs) in zip(figure.subplots(1, len(by_crowd)), by_crowd.items(), strict=True):
        for name, found in programs.items():
            _distribution(axes, found["ttft_ms"], name)
        axes.set_title(f"streams: {crowd}", fontsize=10)
        axes.set_xlabel("time to first token, ms")
        times = [value for found in programs.values() for value in found["ttft_ms"]]
        if max(times) > _DECADES * min(times):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter("")
    figure.axes[0].set_ylabel("share of the streams that had it")
    figure.axes[0].legend(frameon=False)


def _distribution(axes: Any, values: Sequence[float], name: str) -> None:
    ordered = sorted(values)
    shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
    axes.step(ordered, shares, where="post", color=colour(name), label=name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _small(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.subplots()
    groups = {
        kind: {name: [run["requests"] / run["cpu_s"] for run in runs] for name, runs in programs.items()}
        for kind, programs in grouped(data, by_last=False).items()
    }
    bars(axes, groups, "requests a CPU-second")
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.12))


def _memory(figure: Any, data: dict[str, Any]) -> None:
    groups: dict[str, dict[str, list[float]]] = {}
    for name, runs in data.items():
        number, _, program = name.partition(", ")
        for word in ("waiting", "streaming"):
            groups.setdefault(f"{number} {word}", {})[program] = [run[f"{word}_uss"] for run in runs]
    axes = figure.subplots()
    bars(axes, groups, "KiB a stream")
    axes.legend(frameon=False)


def _race(figure: Any, data: dict[str, Any]) -> None:
    for axes, (fleet, found) in zip(figure.subplots(1, len(data)), data.items(), strict=True):
        _distribution(axes, found["direct"], "direct")
        _distribution(axes, found["raced"], "ollama-lb")
        axes.set_title(fleet, fontsize=10)
        axes.set_xlabel("time to first token, ms")
    figure.axes[0].legend(["direct, the fastest server", "raced by ollama-lb"], frameon=False)


def _chaos(figure: Any, data: dict[str, Any]) -> None:
    groups: dict[str, dict[str, list[float]]] = {}
    for found in data.values():
        groups.setdefault(found["scenario"], {})[found["program"]] = [found["ttft_p99_ms"]]
    axes = figure.subplots()
    bars(axes, groups, "time to first token, p99, ms (log)")
    axes.set_yscale("log")
    axes.tick_params("x", rotation=20)
    axes.legend(frameon=False, ncols=4)


def _core(figure: Any, data: dict[str, Any]) -> None:
    groups = {
        f"{n_servers} servers": {core: found["events_per_s"] for core, found in cores.items()}
        for n_servers, cores in data.items()
    }
    bars(figure.subplots(), groups, "events a second of CPU")


def _startup(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.subplots()
    names = list(data)
    heights = [median(data[name]["wall_ms"]) for name in names]
    below = [median(data[name]["wall_ms"]) - min(data[name]["wall_ms"]) for name in names]
    above = [max(data[name]["wall_ms"]) - median(data[name]["wall_ms"]) for name in names]
    axes.barh(names, heights, xerr=[below, above], capsize=2, color=[colour(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("ms from exec")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


_PLOTS: dict[str, tuple[Callable[[Any, dict[str, Any]], None], tuple[float, float]]] = {  # and the size, inches
    "relay": (_relay, (12, 4.5)),
    "relay-times": (_relay_times, (14, 4.5)),
    "small": (_small, (12, 5)),
    "memory": (_memory, (8, 4.5)),
    "startup": (_startup, (10, 4.5)),
    "core": (_core, (6, 4.5)),
    "race": (_race, (10, 4.5)),
    "chaos": (_chaos, (13, 5)),
}


def draw(results: Path, names: Sequence[str] = tuple(_PLOTS)) -> list[str]:
    """Draw the results of these names that are there; return a line on each picture, or why there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        return [NO_MATPLOTLIB]
    from matplotlib.figure import Figure  # noqa: PLC0415  takes half a second, and not everybody has it

    lines = []
    for name in names:
        path = results / f"{name}.json"
        if name not in _PLOTS or not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        plot, size = _PLOTS[name]
        figure = Figure(figsize=size, layout="constrained")
        plot(figure, found["data"])
        figure.suptitle(found["title"], fontsize=11)
        here = found["machine"]
        figure.supxlabel(
            f"{here['when']}, {here['cpu']}, {here['cores']} cores, load {here['load_average_1m']}", fontsize=7
        )
        figure.savefig(results / f"{name}.png", dpi=120)
        lines.append(f"drawn: {results / name}.png")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Draw what a directory has."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("directory", nargs="?", type=Path, default=RESULTS, help="default: benchmarks/results")
    args = options.parse_args(argv)
    lines = draw(args.directory)
    print("\n".join(lines) if lines else f"{args.directory} has no results to draw", file=sys.stderr)
    return int(not lines)
