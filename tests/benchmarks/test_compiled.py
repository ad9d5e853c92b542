"""The compiled core decides what the plain one does, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import compiled


@pytest.fixture
def core() -> Path:
    """Return where the core as it stands is compiled; it takes minutes, so it is not done without being asked."""
    asked = os.environ.get("OLLAMA_LB_TEST_COMPILED", "") not in {"", "0"}
    found = compiled.build() if asked else compiled.found()
    if found is None:
        pytest.skip(f"there is no compiled core ({compiled.why_not() or 'OLLAMA_LB_TEST_COMPILED=1 makes one'})")
    return found


def test_both_cores_give_the_same_commands_and_states(core: Path) -> None:
    n_lines, words = compiled.difference(core, n_calls=5_000, n_scenarios=6)
    assert words == ""
    assert n_lines > 10_000


def test_the_first_difference_is_shown_and_not_all_of_a_long_line() -> None:
    before = "x" * 10_000
    shown = compiled.first_difference(f"{before} 263813343, null", f"{before} 263813343.0, null")
    assert "263813343.0" in shown
    assert len(shown) < 1_000
