"""The house and its walls (design §2): who may import whom, and what the core must not know."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "lbcore").glob("*.py"))

PURE = frozenset(
    [
        "__future__",
        "ast",
        "bisect",
        "collections",
        "contextlib",
        "dataclasses",
        "datetime",
        "difflib",
        "enum",
        "fractions",
        "functools",
        "graphlib",
        "heapq",
        "itertools",
        "json",
        "math",
        "operator",
        "random",
        "re",
        "types",
        "typing",
        "zlib",
        "lbcore",
    ]
)
"""What the core may import: values and algorithms, nothing that waits, looks at a clock or reaches outside."""

IMPURE_CALLS = frozenset({"id", "hash", "open", "input", "print", "exec", "eval"})
CLOCKS = frozenset({"now", "utcnow", "today"})


def test_the_import_contracts_of_pyproject_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_imports_nothing_impure(path: Path) -> None:
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= PURE, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in PURE, ast.unparse(node)
            if node.module == "random":
                assert [alias.name for alias in node.names] == ["Random"], "only a generator that is passed in"


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_asks_no_clock_and_no_address(path: Path) -> None:
    for node in _nodes(path):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                assert called.id not in IMPURE_CALLS, ast.unparse(node)
            elif isinstance(called, ast.Attribute):
                assert called.attr not in CLOCKS, ast.unparse(node)


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_iterates_over_no_set(path: Path) -> None:
    for node in _nodes(path):
        iterated = node.iter if isinstance(node, ast.For | ast.comprehension) else None
        is_set = isinstance(iterated, ast.Set | ast.SetComp) or (
            isinstance(iterated, ast.Call)
            and isinstance(iterated.func, ast.Name)
            and iterated.func.id in {"set", "frozenset"}
        )
        assert not is_set, ast.unparse(node)


def test_only_sockets_know_of_a_backend_of_anyio() -> None:
    """Their callbacks are asyncio's (design §8); all else is anyio's, so that it runs on trio, and in virtual time."""
    knowing = set()
    for path in [*ROOT.glob("lbio/**/*.py"), *ROOT.glob("simulator/**/*.py")]:
        for node in _nodes(path):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.split(".")[0] for name in names} & {"asyncio", "trio", "sniffio"}:
                knowing.add(str(path.relative_to(ROOT)))
    assert knowing == {"lbio/wire/readiness.py", "lbio/wire/sockets.py"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("[ls]*/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
