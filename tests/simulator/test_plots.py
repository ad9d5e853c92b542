"""Pictures: what is in them, that nothing covers the data, the same bytes each time, and what is said of failures."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lbcore.schema import MS_NS, SECOND_NS
from simulator.reports import plots, run_plot
from simulator.reports.figures import SweepRow, sweep_row
from simulator.reports.plots import PlotError, plot_pareto, plot_sweep
from simulator.reports.results import AttemptResult, Band, HealthPoint, Outcome, RunResult, ServerResult
from simulator.reports.run_plot import plot_run
from tests.simulator.runs import big, small

pytest.importorskip("matplotlib", reason="pictures need the extra ollama-lb[plot]")

PNG = b"\x89PNG\r\n\x1a\n"


def text_of(tmp_path: Path, draw: Callable[[Path], None]) -> str:
    """Return the picture as SVG, where text is text."""
    path = tmp_path / "picture.svg"
    draw(path)
    return path.read_text(encoding="utf-8")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the figures that are drawn instead of saved, laid out."""
    found: list[Any] = []

    def keep(figure: Any, _: Path) -> None:
        figure.draw_without_rendering()
        found.append(figure)

    monkeypatch.setattr(plots, "save", keep)
    monkeypatch.setattr(run_plot, "save", keep)
    return found


def sweep(*, loads: Sequence[float] = (0.15, 0.3, 0.85), scenarios: Sequence[str] = ("bad servers",)) -> list[SweepRow]:
    rng = random.Random(1)
    policies = {"random": (3.0, 0.0), "race 3": (1.2, 60.0), "race within budget": (1.3, 4.0), "oracle": (1.0, 0.0)}

    def run(slower: float, wasted: float, load: float) -> dict[str, float]:
        ttft_ms = 100 * slower / (1 - load) * rng.lognormvariate(0, 0.1)
        return {"ttft_p99_ms": ttft_ms, "wasted_tokens_pct": wasted * rng.lognormvariate(0, 0.1)}

    return [
        sweep_row(scenario, policy, load, [run(*of, load) for _ in range(3)])
        for scenario in scenarios for load in loads for policy, of in policies.items()
    ]  # fmt: skip


# --- one run ---------------------------------------------------------------------------------------------------


def test_the_picture_of_a_run_says_what_it_shows(tmp_path: Path) -> None:
    text = text_of(tmp_path, lambda path: plot_run(small(), path))
    for words in (
        "two-servers, race within budget, seed 7", "b: refuse", "TTFT (ms)", "completed (2)", "rejected (1)",
        "left (1)", "no first token", "a (1)", "b (2)", "won (2)", "lost a race (1)", "failed (1)", "client left (1)",
        "waiting for a slot or a load (4)", "server (slots)", "health value", "time (s)",
    ):  # fmt: skip
        assert f">{words}<" in text, words


def test_all_panels_share_the_axis_of_time(figures: list[Any]) -> None:
    plot_run(small(), Path("x.png"))
    panels = figures[0].axes
    assert [axes.get_xlim() for axes in panels] == [(0.0, 2.0)] * 4
    plot_run(dataclasses.replace(small(), bands=[]), Path("x.png"))
    assert len(figures[1].axes) == 3  # nothing was wrong


@pytest.mark.parametrize("run", [small(), big(100, servers=30)], ids=["small", "wide"])
def test_legends_cover_no_data_and_stay_in_the_picture(run: RunResult, figures: list[Any]) -> None:
    plot_run(run, Path("x.png"))
    figure = figures[0]
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend() is not None]
    assert len(legends) == 3
    for found in legends:
        box = found.get_window_extent()
        assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1


def test_labels_of_servers_and_faults_stay_in_the_picture(figures: list[Any]) -> None:
    plot_run(small(), Path("x.png"))
    for axes in figures[0].axes:
        for label in (*axes.get_yticklabels(), *axes.texts):
            assert label.get_window_extent().x0 >= 0, label.get_text()


def test_a_big_run_is_drawn_in_bounded_time_and_size(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    plot_run(big(20_000), path)
    picture = path.read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) < 2_000_000
    svg = tmp_path / "big.svg"
    plot_run(big(3500), svg)
    assert svg.stat().st_size < 3_000_000  # thousands of bars are one image


def test_the_axis_of_time_has_a_unit_that_suits() -> None:
    assert [run_plot._clock(seconds * SECOND_NS).unit for seconds in (1, 600, 601, 6 * 3600, 7 * 3600)] == [
        "s", "s", "min", "min", "h",
    ]  # fmt: skip
    clock = run_plot._clock(10 * SECOND_NS)
    assert (clock.at(5 * SECOND_NS), clock.at(50 * SECOND_NS), clock.at(-1)) == (5.0, 10.0, 0.0)


def test_far_apart_times_are_shown_by_their_logarithm(figures: list[Any]) -> None:
    plot_run(small(), Path("x.png"))
    plot_run(big(100), Path("x.png"))
    assert [figure.axes[1].get_yscale() for figure in figures] == ["linear", "log"]


def test_attempts_in_a_lane_do_not_overlap() -> None:
    rng = random.Random(3)
    begins = sorted(rng.randrange(1000) for _ in range(300))
    attempts = [AttemptResult(1, n, "a", "primary", at, ended_ns=at + rng.randrange(30)) for n, at in enumerate(begins)]
    lanes = run_plot._lanes(attempts)
    for lane in range(max(lanes) + 1):
        here = [attempt for attempt, of in zip(attempts, lanes, strict=True) if of == lane]
        assert all(one.ended_ns <= two.started_ns for one, two in pairwise(here))
    most = max(sum(a.started_ns <= t < a.ended_ns for a in attempts) for t in range(1030))
    assert most <= max(lanes) + 1 <= most + 1  # an attempt that took no time needs a lane as well
    assert run_plot._lanes([]) == []


@pytest.mark.parametrize(("attempt", "fate"), [
    (AttemptResult(1, 1, "a", "primary", 0, outcome="succeeded", delivered=True), "won"),
    (AttemptResult(1, 1, "a", "primary", 0, outcome="failed", delivered=True), "failed"),
    (AttemptResult(1, 1, "a", "racer", 0, outcome="cancelled", why="lost the race"), "lost a race"),
    (AttemptResult(1, 1, "a", "primary", 0, outcome="cancelled", why="the client left"), "client left"),
    (AttemptResult(1, 1, "a", "primary", 0, outcome="cancelled", why="shut down"), "cancelled"),
    (AttemptResult(1, 1, "a", "primary", 0), "cancelled"),
])
def test_bars_are_coloured_by_what_became_of_the_attempt(attempt: AttemptResult, fate: str) -> None:
    assert run_plot._fate(attempt) == fate


def test_a_flood_of_attempts_stays_in_its_row() -> None:
    attempts = [AttemptResult(1, n, "a", "primary", n, slot_ns=MS_NS * n, ended_ns=SECOND_NS) for n in range(50)]
    boxes = run_plot._boxes(ServerResult("a", 2), attempts, 3, run_plot._clock(SECOND_NS))
    tops = [edge for of in boxes.values() for box in of for edge in box[2:]]
    assert min(tops) >= 2.5
    assert max(tops) <= 3.5
    assert len(boxes["waiting"]) == 48  # what is below 1 ms is the way to the server


def test_nothing_can_be_drawn_too(tmp_path: Path) -> None:
    text = text_of(tmp_path, lambda path: plot_run(RunResult("empty", 1, ""), path))
    for words in ("empty, as configured, seed 1", "no requests", "no attempts", "no health recorded"):
        assert f">{words}<" in text
    run = RunResult("all refused", 1, "", requests=[small().requests[2]], ended_ns=SECOND_NS)
    assert ">rejected (1)<" in text_of(tmp_path, lambda path: plot_run(run, path))


def test_names_are_taken_as_they_are(tmp_path: Path) -> None:
    run = dataclasses.replace(small(), scenario="$x^2$ \x1b[31m _y_", policy="a & b <c>")
    run.bands.append(Band("nobody", "hang", 0, 10**15))
    run.bands.append(Band("", "loss", 0, MS_NS))
    run.health.append(HealthPoint(0, "_hidden", 1.0))
    text = text_of(tmp_path, lambda path: plot_run(run, path))
    assert r"$x^2$ \x1b[31m _y_, a &amp; b &lt;c&gt;, seed 7" in text
    assert ">everywhere: loss<" in text
    assert ">nobody: hang<" in text


def test_requests_still_under_way_are_shown(tmp_path: Path) -> None:
    run = small()
    run.requests[0].outcome = Outcome.UNFINISHED
    assert ">unfinished (1)<" in text_of(tmp_path, lambda path: plot_run(run, path))


# --- sweeps ----------------------------------------------------------------------------------------------------


def test_a_sweep_has_a_line_for_each_policy(tmp_path: Path, figures: list[Any]) -> None:
    plot_sweep(sweep(), Path("x.png"))
    axes = figures[0].axes[0]
    assert [line.get_label() for line in axes.lines] == ["random", "race 3", "race within budget", "oracle"]
    assert list(axes.lines[0].get_xdata()) == [15.0, 30.0, 85.0]
    assert len(axes.collections) == 4  # confidence bands
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 4
    assert axes.get_xlabel() == "offered load (% of what the fleet can do)"
    assert axes.get_ylabel() == "p99 TTFT (ms)"


def test_a_sweep_has_a_panel_for_each_scenario(figures: list[Any]) -> None:
    plot_sweep(sweep(scenarios=("one", "two", "three", "four")), Path("x.png"))
    assert [axes.get_title("left") for axes in figures[0].axes] == ["one", "two", "three", "four"]
    assert len(figures[0].legends) == 1


def test_a_pareto_picture_has_a_marker_for_each_policy(figures: list[Any]) -> None:
    plot_pareto(sweep(loads=(0.3,)), Path("x.png"))
    axes = figures[0].axes[0]
    assert axes.get_title("left") == "bad servers at 30% load"
    assert [container.get_label() for container in axes.containers] == [
        "random", "race 3", "race within budget", "oracle",
    ]  # fmt: skip
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("wasted tokens (%)", "p99 TTFT (ms)")
    front = axes.lines[0]
    assert list(front.get_xdata()) == sorted(front.get_xdata())
    assert len(front.get_xdata()) == 3


def test_the_front_is_what_no_other_beats() -> None:
    points = [(0.0, 9.0), (1.0, 5.0), (1.0, 7.0), (2.0, 6.0), (3.0, 5.0), (4.0, 1.0)]
    assert plots._front(points) == [(0.0, 9.0), (1.0, 5.0), (4.0, 1.0)]
    assert plots._front([]) == []


def test_policies_without_a_value_are_left_out(figures: list[Any]) -> None:
    rows = [*sweep(loads=(0.3,)), sweep_row("bad servers", "broken", 0.3, [{"ttft_p99_ms": float("nan")}])]
    plot_sweep(rows, Path("x.png"))
    plot_pareto(rows, Path("x.png"))
    assert len(figures[0].axes[0].lines) == 4
    assert len(figures[1].axes[0].containers) == 4


def test_an_empty_sweep_says_so(tmp_path: Path) -> None:
    for draw in (plot_sweep, plot_pareto):
        assert ">nothing to show<" in text_of(tmp_path, lambda path, draw=draw: draw([], path))  # type: ignore[misc]


def test_policies_are_told_apart_without_colours(figures: list[Any]) -> None:
    rows = [sweep_row("s", f"policy {n}", 0.3, [{"ttft_p99_ms": 1.0 + n}]) for n in range(20)]
    plot_sweep(rows, Path("x.png"))
    lines = figures[0].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) >= 16


# --- files -----------------------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from simulator.reports.run_plot import plot_run;"
        "from tests.simulator.runs import small; [plot_run(small(), Path(path)) for path in sys.argv[1:]]"
    )
    found = []
    for seed in ("1", "2"):
        paths = [tmp_path / f"{seed}{suffix}" for suffix in (".png", ".svg", ".pdf")]
        subprocess.run([sys.executable, "-c", code, *paths], env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
        found.append([path.read_bytes() for path in paths])
    assert found[0] == found[1]
    assert found[0][0].startswith(PNG)


@pytest.mark.parametrize(("name", "words"), [
    ("x.jpegg", "no picture can be written as .jpegg; write .png, .svg or .pdf"),
    ("x", "no picture can be written as a file without suffix"),
    ("nowhere/x.png", "nowhere/x.png: No such file or directory"),
])
def test_a_picture_that_cannot_be_written_says_why(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(PlotError, match=words):
        plot_run(small(), tmp_path / name)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    words = r"pictures need matplotlib: pip install 'ollama-lb\[plot\]'"
    with pytest.raises(PlotError, match=words):
        plot_run(small(), tmp_path / "x.png")
    with pytest.raises(PlotError, match=words):
        plot_sweep([], tmp_path / "x.png")


def test_matplotlib_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, simulator.reports.plots, simulator.reports.run_plot;"
        "sys.exit(bool({'matplotlib', 'numpy'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_users_own_style_changes_nothing(figures: list[Any]) -> None:
    import matplotlib as mpl  # noqa: PLC0415  only where it is there

    with mpl.rc_context({"font.size": 30, "text.parse_math": True}):
        plot_run(small(), Path("x.png"))
        assert mpl.rcParams["font.size"] == 30
    assert figures[0].axes[0].get_yticklabels()[0].get_fontsize() == 9
