"""Traces of real traffic, read lazily from files into rows.

The formats, each recognised by its first line (`FORMATS` is the table of their readers):

- `azure`: CSV with TIMESTAMP, ContextTokens, GeneratedTokens. Microsoft's Azure LLM inference traces of 2023 and 2024,
  CC-BY; the former by Patel et al., "Splitwise: Efficient generative LLM inference using phase splitting", ISCA 2024.
- `mooncake`: JSON lines with timestamp (ms), input_length, output_length, hash_ids (512 tokens a block). Qin et al.,
  "Mooncake: Trading more storage for less computation", FAST 2025.
- `burstgpt`: CSV with Timestamp (s), Model, Request tokens, Response tokens and, in the later releases, Session ID.
  Wang et al., "BurstGPT: A real-world workload dataset to optimize LLM serving systems", 2024, CC-BY.
- `plain`: CSV of our own with arrives_s, prompt_tokens, output_tokens and, if wanted, model and session.
- `events`: our own event logs (`[record]`); see `simulator.workloads.log_trace` for what they tell and what not.

What all readers do alike: columns are found by name, whatever their order and case; a BOM, CRLF and blank lines are of
no account; a row without output tokens is left out (in BurstGPT a failed request: nobody knows what it would have
been); a prompt has at least one token; a row that is earlier than the one before it is an error unless the file is
read with `sort`, which holds it in memory; a last line that is not ended and cannot be read was cut off, and is left
out. Any other line that cannot be read is a `TraceError` with file, line and column.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from lbcore.parsing import choice_fix, quote, show
from simulator.workloads.log_trace import event_log, is_event_log
from simulator.workloads.trace_rows import BadLineError, Line, Parse, Row

__all__ = ["FORMATS", "BadLineError", "Format", "Line", "Parse", "Row", "TraceError", "format_of", "read_trace"]

_NS_PER_S = 1_000_000_000
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001  # the traces' times have no zone, and only their differences count
_TOKENS_MAX = 10_000_000
_SECONDS_MAX = 10_000_000_000
_LINE_MAX = 16 << 20  # bytes; a longer one is no line of any trace (the state in an event log is some MB)


class TraceError(ValueError):
    """A trace cannot be read: the file, the line (0: the whole file), the column, what is wrong, how to mend it."""

    def __init__(self, path: str, line: int, column: str, message: str, fix: str = "") -> None:
        super().__init__(path, line, column, message, fix)
        self.path = path
        self.line = line
        self.column = column
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        """Return one line, fit for a terminal."""
        where = f"{self.path}:{self.line}" if self.line else self.path
        column = f"column {self.column}: " if self.column else ""
        return f"{where}: {column}{self.message}" + (f"; {self.fix}" if self.fix else "")


@dataclass(frozen=True, slots=True)
class Format:
    """How one kind of trace is told from others, and read.

    `reader` gets the first line that is not blank and returns the parser of the lines; with `header` the first line
    is no row itself. A format whose rows take several lines keeps what it needs in that closure.
    """

    name: str
    first_line: str  # what it looks like, for messages
    recognise: Callable[[str], bool]
    reader: Callable[[str], Parse]
    header: bool = True
    from_first: bool = True  # its clock starts anywhere: the first row arrives at once
    in_order: bool = True  # its rows are complete in the order of their arrival; else it is always read with `sort`
    left_out: str = "rows without output tokens"  # what a line stands for that gives no row; "": nothing worth telling


# --- cells -------------------------------------------------------------------------------------------------------


def _tokens(text: str, column: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit()):
        raise BadLineError(column, f"{show(text)} is not a whole number of tokens")
    return _checked_tokens(int(text[:20]), column)


def _checked_tokens(n: int, column: str) -> int:
    if n > _TOKENS_MAX:
        raise BadLineError(column, f"{n} tokens are too many", f"the most is {_TOKENS_MAX}")
    return n


def _seconds(text: str, column: str) -> int:
    """Return ns, exact as written."""
    try:
        seconds = Decimal(text.strip())
    except InvalidOperation:
        raise BadLineError(column, f"{show(text.strip())} is not a number of seconds") from None
    return _time(seconds, 1, column)


def _time(value: Decimal, units_per_s: int, column: str) -> int:
    if not value.is_finite() or not 0 <= value <= _SECONDS_MAX * units_per_s:
        raise BadLineError(column, f"{value} is no time", "times are 0 or more")
    return round(value * (_NS_PER_S // units_per_s))


_STAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|\+00:?00)?", re.ASCII)


def _stamp(text: str, column: str) -> int:
    """Return the ns since 1970 of a date and time with up to nine digits of a second; `datetime` keeps only six."""
    match = _STAMP.fullmatch(text.strip())
    day, time, fraction = match.groups("") if match else ("", "", "")
    try:
        whole = datetime.fromisoformat(f"{day} {time}") - _EPOCH
    except ValueError:
        fix = "write it as 2023-11-16 18:15:46.6805900, in UTC"
        raise BadLineError(column, f"{show(text.strip())} is no date and time", fix) from None
    return (whole.days * 86_400 + whole.seconds) * _NS_PER_S + int(fraction.ljust(9, "0"))


def _row(at_ns: int, prompt_tokens: int, output_tokens: int, **others: Any) -> Row | None:
    return Row(at_ns, max(1, prompt_tokens), output_tokens, **others) if output_tokens else None


# --- CSV ---------------------------------------------------------------------------------------------------------


def _cells(line: str) -> Sequence[str]:
    try:
        return next(csv.reader([line])) if '"' in line else line.split(",")
    except csv.Error:
        raise BadLineError("", "is no line of CSV") from None


def _names(line: str) -> list[str]:
    return [cell.strip().lower() for cell in _cells(line)]


def _has(*columns: str) -> Callable[[str], bool]:
    wanted = {column.lower() for column in columns}

    def recognise(line: str) -> bool:
        try:
            return wanted <= set(_names(line))
        except BadLineError:
            return False

    return recognise


def _columns(header: str, needed: Sequence[str], optional: Sequence[str] = ()) -> Callable[[str], list[str]]:
    """Return what picks these columns out of a line; an optional one that the header lacks is always ""."""
    names = _names(header)
    missing = [column for column in needed if column.lower() not in names]
    if missing:
        raise BadLineError(missing[0], "is missing from the header", f"the columns needed are {', '.join(needed)}")
    wanted = [*needed, *optional]
    places = [names.index(column.lower()) if column.lower() in names else None for column in wanted]

    def pick(line: str) -> list[str]:
        cells = _cells(line)
        try:
            return ["" if place is None else cells[place] for place in places]
        except IndexError:
            absent = next(name for name, at in zip(wanted, places, strict=True) if at is not None and at >= len(cells))
            raise BadLineError(absent, f"is missing: the line has {len(cells)} of {len(names)} columns") from None

    return pick


_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
_PLAIN = ("arrives_s", "prompt_tokens", "output_tokens")


def _azure(header: str) -> Parse:
    pick = _columns(header, _AZURE)

    def parse(line: str) -> Row | None:
        at, prompt, output = pick(line)
        return _row(_stamp(at, _AZURE[0]), _tokens(prompt, _AZURE[1]), _tokens(output, _AZURE[2]))

    return parse


def _burstgpt(header: str) -> Parse:
    pick = _columns(header, _BURSTGPT, ("Model", "Session ID"))

    def parse(line: str) -> Row | None:
        at, prompt, output, model, session = pick(line)
        return _row(
            _seconds(at, _BURSTGPT[0]),
            _tokens(prompt, _BURSTGPT[1]),
            _tokens(output, _BURSTGPT[2]),
            model=model.strip(),
            session=session.strip(),
        )

    return parse


def _plain(header: str) -> Parse:
    pick = _columns(header, _PLAIN, ("model", "session"))

    def parse(line: str) -> Row | None:
        at, prompt, output, model, session = pick(line)
        return _row(
            _seconds(at, _PLAIN[0]),
            _tokens(prompt, _PLAIN[1]),
            _tokens(output, _PLAIN[2]),
            model=model.strip(),
            session=session.strip(),
        )

    return parse


# --- JSON lines --------------------------------------------------------------------------------------------------


def json_object(line: str) -> Mapping[str, Any]:
    """Return the JSON object on a line. Raises `BadLineError`."""
    try:
        found = json.loads(line, parse_float=Decimal)
    except (ValueError, RecursionError):
        raise BadLineError("", "is no JSON") from None
    if not isinstance(found, dict):
        raise BadLineError("", "is no JSON object")
    return found


def _json_int(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        what = "is missing" if name not in found else f"{json.dumps(value, default=str)[:80]} is not a whole number"
        raise BadLineError(name, what)
    return value


def _mooncake(_: str) -> Parse:
    def parse(line: str) -> Row | None:
        found = json_object(line)
        at = found.get("timestamp")
        if isinstance(at, bool) or not isinstance(at, int | Decimal):
            raise BadLineError("timestamp", "is missing" if at is None else "is not a number of ms")
        blocks = found.get("hash_ids", [])
        if not isinstance(blocks, list) or any(type(block) is not int for block in blocks):
            raise BadLineError("hash_ids", "is not a list of whole numbers")
        return _row(
            _time(Decimal(at), 1000, "timestamp"),
            _checked_tokens(_json_int(found, "input_length"), "input_length"),
            _checked_tokens(_json_int(found, "output_length"), "output_length"),
            blocks=tuple(blocks),
        )

    return parse


def _is_mooncake(line: str) -> bool:
    try:
        return {"timestamp", "input_length"} <= json_object(line).keys()
    except BadLineError:
        return False


FORMATS: Mapping[str, Format] = {
    format_.name: format_
    for format_ in (
        Format("azure", ",".join(_AZURE), _has(*_AZURE), _azure),
        Format("burstgpt", "Timestamp,Model,Request tokens,Response tokens", _has(*_BURSTGPT), _burstgpt),
        Format("plain", ",".join(_PLAIN), _has(*_PLAIN), _plain, from_first=False),
        Format(
            "events",
            '{"ollama-lb-log": 1, ...}',
            is_event_log,
            event_log,
            in_order=False,
            left_out="lines of other kinds, or of requests without a whole answer,",
        ),
        Format("mooncake", '{"timestamp": 0, "input_length": 9, ...}', _is_mooncake, _mooncake, header=False),
    )
}
"""The readers, by name; a new format is a new line here (and a choice in `simulator.workloads.tables.TraceFormat`)."""


# --- files -------------------------------------------------------------------------------------------------------


def read_trace(
    path: Path, format_name: str = "", *, sort: bool = False, notes: list[str] | None = None
) -> Iterator[Row]:
    """Return the rows of a trace in order of time, read as they are drawn; `sort` reads all of them first.

    `format_name` is one of `FORMATS`, or "" to recognise it. What was left out on the way is told in `notes`, one
    sentence a kind, at the end of the file. Raises `TraceError`, where it meets what is wrong.
    """
    sort = sort or not format_of(path, format_name).in_order
    rows = _read(path, format_name, [] if notes is None else notes)
    return iter(sorted((row for row, _ in rows), key=attrgetter("at_ns"))) if sort else _in_order(path, rows)


def format_of(path: Path, format_name: str = "") -> Format:
    """Return the format that a trace is in, from its first line. Raises `TraceError` if it cannot be read."""
    return _opened(path, _lines(path), format_name)[0]


def _opened(path: Path, lines: Iterator[Line], format_name: str) -> tuple[Format, Parse, Line]:
    first = next((line for line in lines if line.text.strip()), None)
    if first is None:
        raise TraceError(str(path), 0, "", "is empty")
    known = "; ".join(f"{name}: {format_.first_line}" for name, format_ in FORMATS.items())
    if format_name and format_name not in FORMATS:
        raise TraceError(
            str(path), 0, "", f"{quote(format_name)} is no format of a trace", choice_fix(format_name, list(FORMATS))
        )
    fitting = [FORMATS[format_name]] if format_name else [f for f in FORMATS.values() if f.recognise(first.text)]
    if not fitting:
        raise TraceError(
            str(path), first.number, "", "is the first line of no trace that is known", f"the first lines are {known}"
        )
    try:
        return fitting[0], fitting[0].reader(first.text), first
    except BadLineError as error:
        raise TraceError(str(path), first.number, error.column, error.message, error.fix) from None


class _Numbered(NamedTuple):
    """A row and where it stood."""

    row: Row
    line: int


def _in_order(path: Path, rows: Iterator[_Numbered]) -> Iterator[Row]:
    last_ns, last_line = 0, 0
    for row, line in rows:
        if row.at_ns < last_ns:
            raise TraceError(
                str(path), line, "", f"is earlier than line {last_line}", "sort the file, or set sort = true"
            )
        last_ns, last_line = row.at_ns, line
        yield row


def _read(path: Path, format_name: str, notes: list[str]) -> Iterator[_Numbered]:
    lines = _lines(path)
    format_, parse, first = _opened(path, lines, format_name)
    n_left_out = 0
    for line in lines if format_.header else chain([first], lines):
        if not line.text or line.text.isspace():
            continue
        try:
            row = parse(line.text)
        except BadLineError as error:
            if line.ended:
                raise TraceError(str(path), line.number, error.column, error.message, error.fix) from None
            notes.append(f"{path}:{line.number}: the last line is cut off and left out")
            break
        if row is None:
            n_left_out += 1
        else:
            yield _Numbered(row, line.number)
    if n_left_out and format_.left_out:
        notes.append(f"{path}: {n_left_out} {format_.left_out} are left out")


def _lines(path: Path) -> Iterator[Line]:
    """Return the lines of a file; read in bytes, so that a line that is no text has a number."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(_LINE_MAX):
                number += 1
                yield Line(number, _text(path, number, raw), raw.endswith(b"\n"))
    except OSError as error:
        raise TraceError(str(path), 0, "", f"cannot be read: {error.strerror or error}") from None


def _text(path: Path, number: int, raw: bytes) -> str:
    if len(raw) == _LINE_MAX and not raw.endswith(b"\n"):
        raise TraceError(str(path), number, "", f"is longer than {_LINE_MAX} bytes", "is this a trace?")
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        if not raw.endswith(b"\n"):
            return "\x00"  # a last line, cut off within a character: no format takes it
        raise TraceError(str(path), number, "", "is not UTF-8 text", "is it compressed?") from None
    return text.rstrip("\r\n")
