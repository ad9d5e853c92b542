"""The measurement of starts: what it makes of its samples, and that a start which fails is no figure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import startup
from benchmarks.startup import Sample, ended_after, report_of


def _report(walls: list[float], bar: float | None) -> dict[str, bool]:
    return report_of({"run": [Sample(wall, wall, "HTTP/1.1 200 OK") for wall in walls]}, {"run": bar}).bars


def test_the_median_is_judged_not_a_single_start() -> None:
    assert _report([100.0, 390.0, 2000.0], 400.0) == {"run <= 400 ms: 390 ms": True}
    assert _report([100.0, 410.0, 2000.0], 400.0) == {"run <= 400 ms: 410 ms": False}


def test_a_start_that_waited_for_a_core_is_told_of() -> None:
    waited = report_of({"run": [Sample(500.0, 300.0)]}, {"run": 400.0})
    assert waited.notes[0].startswith("NOISY: run waited 200 ms")
    assert not any("NOISY" in note for note in report_of({"run": [Sample(310.0, 300.0)]}, {"run": 400.0}).notes)


def test_what_has_no_bar_is_shown_only() -> None:
    assert _report([9000.0], None) == {}


def test_the_table_says_how_often_and_with_what_answer() -> None:
    report = report_of(
        {"run": [Sample(1.0, 0.5, "HTTP/1.1 200 OK"), Sample(3.0, 1.5, "HTTP/1.1 200 OK")]}, {"run": None}
    )
    assert report.rows == [("run", "2", "1.0 (1.0-3.0)", "0.5 (0.5-1.5)", "200 OK")]


def test_a_command_that_fails_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        ended_after([sys.executable, "-c", "raise SystemExit(3)"], os.environ)


@pytest.mark.parametrize("name", ["benchmarks", "benchmarks.startup"])
def test_help_says_how_it_is_called(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", name, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert f"example: python -m {name}" in done.stdout


def test_all_measurements_have_a_quick_form() -> None:
    from benchmarks import __main__ as entry  # noqa: PLC0415  # a name that is a module's, not this one's

    assert entry._FULL.keys() == entry._QUICK.keys()
    assert "startup" in entry._FULL


def test_byte_code_is_kept_even_where_python_is_told_not_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    env = startup._environment(tmp_path)
    assert "PYTHONDONTWRITEBYTECODE" not in env
    assert env["PYTHONPYCACHEPREFIX"].startswith(str(tmp_path))
