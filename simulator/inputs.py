"""Files that users give: scenarios read from them, and what is wrong with them in words."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from lbcore.file_kind import FileKind, other_kind
from lbcore.parsing import ABSENT, Problem
from simulator.scenario import Scenario, parse_scenario


class InputError(Exception):
    """Something given cannot be used; `problems` are lines for the user."""

    def __init__(self, problems: Iterable[object]) -> None:
        self.problems = tuple(str(problem) for problem in problems)
        super().__init__("\n".join(self.problems))


def toml_files(paths: Sequence[Path], what: str = "scenario") -> list[Path]:
    """Return the files that `paths` name: a folder stands for the TOML files in it, by name. Raises InputError."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.toml")) if path.is_dir() else [path]
        if not found:
            raise InputError([Problem(str(path), ABSENT, f"has no {what} in it", "name a folder of .toml files")])
        files += found
    return files


def read_text(path: Path, what: str = "scenario file") -> str:
    """Return what is in a file. Raises InputError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except ValueError as error:
        reason = f"it is not UTF-8: {error}"
    raise InputError([Problem(str(path), ABSENT, f"cannot be read: {reason}", f"name a {what}")])


def parse_scenario_text(text: str, path: Path) -> Scenario:
    """Return the scenario that the text of the file `path` describes. Raises InputError, naming file and keys."""
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError([Problem(str(path), ABSENT, f"is not TOML: {error}", "write key = value")]) from None
    if (problem := other_kind(raw, str(path), FileKind.SCENARIO)) is not None:
        raise InputError([problem])
    problems: list[Problem] = []
    scenario = parse_scenario(raw, path.stem, problems, folder=path.parent)
    if scenario is None:
        raise InputError(f"{path}: {problem}" for problem in problems)
    return scenario


def load_scenario(path: Path) -> Scenario:
    """Return the scenario in a file. Raises InputError with every problem, each naming the file and the key."""
    return parse_scenario_text(read_text(path), path)


def load_scenarios(paths: Iterable[Path]) -> list[tuple[Path, Scenario]]:
    """Return the scenarios in files, each with its path. Raises InputError with the problems of all of them."""
    found: list[tuple[Path, Scenario]] = []
    wrong: list[str] = []
    for path in paths:
        try:
            found.append((path, load_scenario(path)))
        except InputError as error:
            wrong += error.problems
    if wrong:
        raise InputError(wrong)
    return found
