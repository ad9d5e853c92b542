"""Which of the three kinds a TOML file is: a configuration, a scenario or a bench. Told by its keys (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from lbcore.parsing import ABSENT, Problem


class FileKind(StrEnum):
    """What a file is for."""

    BENCH = "a bench file"
    SCENARIO = "a scenario"
    CONFIGURATION = "a configuration"


_COMMANDS: Mapping[FileKind, str] = {
    FileKind.BENCH: "bench",
    FileKind.SCENARIO: "simulate",
    FileKind.CONFIGURATION: "run",
}
_TELLING: Mapping[FileKind, frozenset[str]] = {
    FileKind.BENCH: frozenset({"scenarios", "sweep", "policies", "loads"}),
    FileKind.SCENARIO: frozenset({"workload", "expect", "fault", "duration", "settle"}),
    FileKind.CONFIGURATION: frozenset({"servers", "fleet", "listen"}),
}
"""Keys that no kind before has; the first kind of which a file has one is its kind."""


def file_kind(raw: Mapping[str, Any]) -> FileKind | None:
    """Return the kind of a file that holds the tables `raw`; None when nothing tells."""
    return next((kind for kind, keys in _TELLING.items() if not keys.isdisjoint(raw)), None)


def other_kind(raw: Mapping[str, Any], path: str, wanted: FileKind) -> Problem | None:
    """Return the one problem of a file that another command takes: all others would follow from it."""
    kind = file_kind(raw)
    if kind is None or kind is wanted:
        return None
    return Problem(path, ABSENT, f"is {kind}, not {wanted}", f"run it with: ollama-lb {_COMMANDS[kind]} {path}")
