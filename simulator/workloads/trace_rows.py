"""What readers of traces have in common: a row, a line, and how a line that cannot be read is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """One request of a trace. What a trace does not tell is None, "" or empty; the workload then decides."""

    at_ns: int  # on the trace's own clock
    prompt_tokens: int
    output_tokens: int
    model: str = ""
    session: str = ""  # requests with the same one are of one conversation
    blocks: tuple[int, ...] = ()  # see simulator.workloads.asks.Ask
    route: str = ""
    stream: bool | None = None
    num_ctx: int | None = None
    leaves_after_ns: int | None = None


class Line(NamedTuple):
    """One line of a file, without its end."""

    number: int  # from 1 on
    text: str
    ended: bool  # False: the last one, which may be cut off


class BadLineError(ValueError):
    """A line cannot be read; becomes a `TraceError` where its file is known."""

    def __init__(self, column: str, message: str, fix: str = "") -> None:
        super().__init__(column, message, fix)
        self.column = column
        self.message = message
        self.fix = fix


Parse = Callable[[str], Row | None]
"""Turns a line into a row, or None for a line that stands for no request. Raises `BadLineError`."""
