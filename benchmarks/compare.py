"""Two results side by side: `python -m benchmarks compare OLD NEW`, two files or two directories of them.

For each figure its medians, how far the new one is from the old one, and whether that is more than chance: `worse` and
`better` mean that no repetition of the one is as good as any of the other, in three or more repetitions of each (chance
alone does that once in ten with three, once in 126 with five). `within the spread` is everything else. `for
information`: absolute times of the processor, which depend on the moment; their ratios to nginx in the same run are
judged.

Exit code: 0 when nothing judged is worse, 1 when something is, 2 when there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.kit import Figure, median, spread

ENOUGH = 3  # repetitions
_LIST_MAX = 50  # numbers in a list of repetitions; longer ones are samples


@dataclass(frozen=True)
class Change:
    """One figure, before and after."""

    name: str
    unit: str
    old: list[float]
    new: list[float]
    word: str

    @property
    def percent(self) -> float | None:
        """Change of the median in percent of the old one; None when that is zero."""
        before = median(self.old)
        return (median(self.new) - before) / abs(before) * 100 if before else None


def word_on(old: Figure, new: Figure) -> str:
    """Say whether a change is more than chance."""
    if not new.judged:
        return "for information"
    if min(len(old.values), len(new.values)) < ENOUGH:
        return "too few repetitions"
    if min(new.values) <= max(old.values) and min(old.values) <= max(new.values):
        return "within the spread"
    higher = min(new.values) > max(old.values)
    return "better" if higher == new.higher_is_better else "worse"


def _leaves(found: Any, path: str = "") -> Iterator[tuple[str, list[float]]]:
    """Yield the numbers and the short lists of numbers in a result's data, with where they stand."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from _leaves(value, f"{path}, {key}" if path else key)
    elif isinstance(found, list):
        if 0 < len(found) <= _LIST_MAX and all(_is_number(value) for value in found):
            yield path, found
    elif _is_number(found):
        yield path, [found]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def figures_of(result: dict[str, Any]) -> dict[str, Figure]:
    """Return a result's figures; of one that names none, all numbers that it has, for information."""
    named = {name: Figure(**figure) for name, figure in result.get("figures", {}).items()}
    return named or {name: Figure(values, "", judged=False) for name, values in _leaves(result.get("data", {}))}


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Return what both results have, in the order of the new one."""
    before, after = figures_of(old), figures_of(new)
    both = [name for name in after if name in before and before[name].values and after[name].values]
    return [
        Change(name, after[name].unit, before[name].values, after[name].values, word_on(before[name], after[name]))
        for name in both
    ]


def pairs(old: Path, new: Path) -> list[tuple[str, Path, Path]]:
    """Return the results to compare, by name. Raises ValueError when there are none."""
    if old.is_dir() != new.is_dir():
        raise ValueError("two files or two directories: not one of each")
    if not old.is_dir():
        return [(new.stem, old, new)]
    found = [(path.stem, old / path.name, path) for path in sorted(new.glob("*.json")) if (old / path.name).is_file()]
    if not found:
        raise ValueError(f"{old} and {new} have no result of the same name")
    return found


def _read(path: Path) -> dict[str, Any]:
    """Return one result. Raises ValueError when it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(found, dict) or "data" not in found:
        raise ValueError(f"{path}: not a result of a benchmark")
    return found


def _digits(change: Change) -> int:
    size = max(abs(median(change.old)), abs(median(change.new)))
    return 0 if size >= 1000 else 1 if size >= 20 else 2


def _show(console: Console, name: str, old: dict[str, Any], new: dict[str, Any], changes: list[Change]) -> None:
    table = Table(title=name, title_justify="left", title_style="bold")
    for column in ("figure", "unit", "old", "new", "change", ""):
        table.add_column(column, justify="left" if column in {"figure", "unit", ""} else "right", no_wrap=True)
    for change in changes:
        digits = _digits(change)
        percent = "-" if change.percent is None else f"{change.percent:+.1f} %"
        sides = (spread(change.old, digits), spread(change.new, digits))
        table.add_row(change.name, change.unit, *sides, percent, change.word)
    console.print(table)
    for which, result in (("old", old), ("new", new)):
        here = result["machine"]
        where = f"{here['cpu']}, {here['cores']} cores, Python {here['python']}, load {here['load_average_1m']}"
        console.print(f"{which}: {here['when']}, {where}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("old", type=Path, help="a file of results/, or a directory with such files")
    options.add_argument("new", type=Path, help="the same, later")
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = options.parse_args(argv)
    try:
        read = [(name, _read(before), _read(after)) for name, before, after in pairs(args.old, args.new)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    compared = {name: compare(old, new) for name, old, new in read}
    if not any(compared.values()):
        print("the results have no figure in common", file=sys.stderr)
        return 2
    if args.json:
        lines = {
            name: [{**asdict(change), "percent": change.percent} for change in changes]
            for name, changes in compared.items()
        }
        print(json.dumps(lines))
    else:
        console = Console()
        console.width = max(console.width, 160)
        for name, old, new in read:
            _show(console, name, old, new, compared[name])
    return int(any(change.word == "worse" for changes in compared.values() for change in changes))
