"""How figures and tables are printed, for people.

Tables need 80 columns; on a narrower terminal their lines are folded, and no figure is ever cut. Without a terminal
there are no colours, and the same figures give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import IO, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lbcore.schema import MS_NS, SECOND_NS
from simulator.reports.figures import Figure
from simulator.reports.summary import ratio

_WIDTH_MIN = 80
_WIDTH_MAX = 10_000


# --- figures as text -------------------------------------------------------------------------------------------


def time_text(time_ns: float | None) -> str:
    """Return a time with three digits or so: "4.32 ms", "183 ms", "12.3 s", "1,234 s"; "-" for none."""
    if time_ns is None or math.isnan(time_ns):
        return "-"
    ms = time_ns / MS_NS
    if ms < 9.995:
        return f"{ms:.2f} ms"
    if ms < 99.95:
        return f"{ms:.1f} ms"
    if ms < 9999.5:
        return f"{ms:,.0f} ms"
    return f"{ms / 1000:.1f} s" if ms < 999_950 else f"{ms / 1000:,.0f} s"


def percent_text(part: float, whole: float) -> str:
    """Return a share in percent; never 100 % or 0 % for what is not quite that."""
    percent = 100 * ratio(part, whole)
    if 0 < percent < 0.05:
        return "<0.1 %"
    return ">99.9 %" if 99.95 <= percent < 100 else f"{percent:.1f} %"


def figure_text(figure: Figure, value: float) -> str:
    """Return a figure's value with its unit."""
    if math.isnan(value):
        return "-"
    if figure.unit in {"ms", "s"}:
        return time_text(value * (MS_NS if figure.unit == "ms" else SECOND_NS))
    if figure.high == 1.0:
        return percent_text(value, 1.0)
    if figure.unit == "%":
        return percent_text(value, 100.0)
    return f"{value:,.0f}" if figure.whole else f"{value:,.2f}"


def finite(value: float) -> float | None:
    """Return a number that JSON can hold; None for nan."""
    return None if math.isnan(value) else value


# --- tables -----------------------------------------------------------------------------------------------------------


def new_console(file: IO[str] | None = None) -> Console:
    """Return where to print; standard output unless told otherwise."""
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    console.width = max(console.width, _WIDTH_MIN)
    return console


def is_utf(console: Console) -> bool:
    """Return whether more than ASCII can be printed."""
    return console.encoding.lower().startswith("utf")


def printable(text: str) -> str:
    """Return text that cannot move the cursor or forge a line."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _cell(value: str | Text) -> Text:
    return value if isinstance(value, Text) else Text(printable(value), overflow="fold")


def new_table(title: str, *columns: str, left: Sequence[str] = ()) -> Table:
    """Return an empty table; the first column and those named in `left` hold words, the others figures."""
    look: Mapping[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=title or None, title_justify="left", title_style="bold", **look)
    for index, column in enumerate(columns):
        words = index == 0 or column in left
        justify: Literal["left", "right"] = "left" if words else "right"
        whole = index == 0 or not words
        table.add_column(column, justify=justify, no_wrap=whole, overflow="fold", min_width=len(column))
    return table


def add(table: Table, *cells: str | Text) -> None:
    """Add a row; text is taken as it is, without markup. The first column is as wide as its longest cell."""
    row = [_cell(cell) for cell in cells]
    first = table.columns[0]
    first.min_width = max(first.min_width or 0, row[0].cell_len)
    table.add_row(*row)


def show(console: Console, table: Table) -> None:
    """Print a table and an empty line; one that cannot do with the width there is gets more, and no line is cut."""
    width = console.width
    console.width = max(width, Measurement.get(console, console.options.update(width=_WIDTH_MAX), table).minimum)
    console.print(table)
    console.width = width
    console.print()


def say(console: Console, *lines: str | Text) -> None:
    """Print lines that the terminal folds."""
    for line in lines:
        console.print(line if isinstance(line, Text) else Text(printable(line)), soft_wrap=True)
