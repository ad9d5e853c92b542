"""Which core is tested. It is plain Python, unless somebody has compiled it in its place (setup.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

import lbcore
from lbcore.compiled import is_compiled

CORE = Path(lbcore.__path__[0])


def pytest_report_header() -> str:
    return f"core: {'compiled' if is_compiled() else 'pure Python'}"


def pytest_sessionstart() -> None:
    compiled_ns = min((path.stat().st_mtime_ns for path in CORE.glob("compiled.*.so")), default=None)
    if compiled_ns is not None and any(path.stat().st_mtime_ns > compiled_ns for path in CORE.glob("*.py")):
        raise pytest.UsageError(f"the compiled core is older than its sources: compile it again, or rm {CORE}/*.so")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Tests that break functions of the core can do so in plain Python only."""
    if is_compiled():
        skipped = pytest.mark.skip(reason="it changes functions of the core, which is compiled here")
        for item in items:
            if item.get_closest_marker("plain_core") is not None:
                item.add_marker(skipped)
