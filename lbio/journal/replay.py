"""`ollama-lb replay LOG`: the events of a log given to the core again, and whether it decides the same; or one request.

For people on standard output, or as one JSON object; what is wrong with a log goes to standard error, with its line.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from lbcore import __version__
from lbcore.comparison import Comparison, Difference, compare
from lbcore.explain import UnknownRequestError, explain_at
from lbcore.trace import LogError
from lbcore.units import counted
from lbio.journal.explanations import explanation_lines

EXIT_SAME: Final = 0
EXIT_DIFFERENT: Final = 1
EXIT_UNREADABLE: Final = 2

_PROGRESS_EVERY_S = 0.5


def replay(path: Path, *, at: int | None = None, as_json: bool = False) -> int:
    """Replay the log at `path` (or explain request `at`), print what came of it and return the exit code."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            lines = _with_progress(file, path)
            if at is None:
                return _compare(path, lines, as_json=as_json)
            return _explain(path, lines, at, as_json=as_json)
    except OSError as error:
        return _refuse(str(path), f"cannot be read: {error.strerror or error}", as_json=as_json)
    except LogError as error:
        return _refuse(f"{path}:{error.line}", error.message, as_json=as_json)
    except UnknownRequestError as error:
        return _refuse(f"{path}", str(error), as_json=as_json)


def _refuse(where: str, message: str, *, as_json: bool) -> int:
    if as_json:
        _print([json.dumps({"ok": False, "error": message, "where": where}, ensure_ascii=False)])
    else:
        sys.stderr.write(f"{where}: {message}\n")
    return EXIT_UNREADABLE


def _print(lines: Iterable[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _with_progress(lines: Iterable[str], path: Path) -> Iterator[str]:
    """Yield the lines; tell people at a terminal how far it is when that takes long."""
    told = sys.stderr.isatty()
    size = max(1, path.stat().st_size)
    n_read, next_s, has_told = 0, time.monotonic() + _PROGRESS_EVERY_S, False
    for line in lines:
        yield line
        n_read += len(line)
        if told and time.monotonic() >= next_s:
            next_s, has_told = time.monotonic() + _PROGRESS_EVERY_S, True
            sys.stderr.write(f"\rreplaying: {min(99, 100 * n_read // size)} %")
            sys.stderr.flush()
    if has_told:
        sys.stderr.write("\r" + " " * 20 + "\r")


# --- the whole log ---------------------------------------------------------------------------------------------


def _compare(path: Path, lines: Iterable[str], *, as_json: bool) -> int:
    found = compare(lines)
    if as_json:
        _print([json.dumps(_comparison_object(path, found), ensure_ascii=False)])
    else:
        _print(_comparison_lines(path, found))
    return EXIT_SAME if found.difference is None else EXIT_DIFFERENT


def _comparison_object(path: Path, found: Comparison) -> dict[str, Any]:
    return {"ok": found.difference is None, "log": str(path), "program": __version__, **dataclasses.asdict(found)}


def _comparison_lines(path: Path, found: Comparison) -> Iterator[str]:
    header = found.header
    begun = f", begun {header['started']}" if header.get("started") else ""
    yield f"{path}: written by ollama-lb {header.get('program')}{begun}; this is {__version__}"
    yield (
        f"{counted(found.n_calls, 'call')} over {found.length_s:.1f} s, {counted(found.n_requests, 'request')}, "
        f"{counted(found.n_commands, 'command')} compared"
    )
    if found.truncated is not None:
        yield f"the log breaks off in line {found.truncated}: replayed up to there"
    if found.difference is None:
        yield "byte-identical"
    else:
        yield from _difference_lines(found.difference)


def _difference_lines(found: Difference) -> Iterator[str]:
    yield ""
    yield f"the first difference is in line {found.line}, {found.at_s:.6f} s after the first call"
    yield from (f"  {text}" for text in found.context)
    yield f"  line {found.line}: {found.event}"
    for index in range(max(len(found.expected), len(found.got))):
        expected, got = _item(found.expected, index), _item(found.got, index)
        if expected == got:
            yield f"      {expected}"
        else:
            yield f"    - {expected}   (recorded)"
            yield f"    + {got}   (now)"
    if found.expected == found.got:
        yield "    the same commands, written differently"


def _item(texts: Sequence[str], index: int) -> str:
    return texts[index] if index < len(texts) else "nothing"


# --- one request -----------------------------------------------------------------------------------------------


def _explain(path: Path, lines: Iterable[str], request_id: int, *, as_json: bool) -> int:
    told = explain_at(lines, request_id)
    if as_json:
        _print([json.dumps({"log": str(path), **dataclasses.asdict(told)}, ensure_ascii=False)])
    else:
        _print(explanation_lines(told))
    return EXIT_SAME if told.same else EXIT_DIFFERENT
