"""Configurations, scenarios and bench files are told apart by their keys."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from lbcore.file_kind import FileKind, file_kind, other_kind

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDERS = {
    "configs": FileKind.CONFIGURATION,
    "scenarios": FileKind.SCENARIO,
    "bench": FileKind.BENCH,
    "fleets": FileKind.SCENARIO,
}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_file_that_ships_is_of_the_kind_of_its_folder(path: Path) -> None:
    assert file_kind(tomllib.loads(path.read_text(encoding="utf-8"))) is FOLDERS[path.parent.name]


@pytest.mark.parametrize(("raw", "kind"), [
    ({"servers": [], "fault": []}, FileKind.SCENARIO),
    ({"duration": "1s", "fleet": []}, FileKind.SCENARIO),
    ({"listen": ":1"}, FileKind.CONFIGURATION),
    ({"about": "x", "seeds": 2, "policies": []}, FileKind.BENCH),
    ({"about": "x", "seed": 1, "race": {}}, None),
    ({}, None),
])
def test_the_kind_of_half_a_file(raw: dict[str, Any], kind: FileKind | None) -> None:
    assert file_kind(raw) is kind


def test_the_problem_names_the_command_for_the_other_kind() -> None:
    problem = other_kind({"workload": {}}, "a.toml", FileKind.CONFIGURATION)
    assert str(problem) == "a.toml: is a scenario, not a configuration; run it with: ollama-lb simulate a.toml"


def test_what_may_be_of_the_wanted_kind_is_no_problem() -> None:
    for kind in FileKind:
        assert other_kind({"about": "x"}, "a.toml", kind) is None
    assert other_kind({"workload": {}}, "a.toml", FileKind.SCENARIO) is None
