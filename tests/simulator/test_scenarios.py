"""Every scenario that ships says what it shows, and shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator.cli import load_scenario
from simulator.report import judge
from simulator.reports.summary import summarise
from simulator.scenario import run_scenario

FILES = sorted((Path(__file__).parents[2] / "configs" / "scenarios").glob("*.toml"))


def test_there_are_enough_of_them() -> None:
    assert len(FILES) >= 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_expected_holds(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.about
    assert scenario.expectations
    verdict = judge(summarise(run_scenario(scenario)), scenario.expectations, str(path))
    assert verdict.failures == ()
