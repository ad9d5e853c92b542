"""Watch a streamed answer go by: how many tokens, whether it has ended well, whether it carried an error.

A watcher sees each piece of the payload once. What it costs on the hot path is a count and one search; only a line that
looks like an end or an error is decoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from lbcore.ollama import Ending

_LINE_BYTES_MAX = 4 << 20
"""A line longer than this is not kept for inspection (the last line of /api/generate carries its whole context)."""


class Mark(Enum):
    """What a line means."""

    NONE = 0
    COMPLETE = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class _Format:
    """How one kind of stream is read."""

    separator: bytes  # ends one token
    suspicious: re.Pattern[bytes]  # found in every line whose mark is not NONE
    judge: Callable[[bytes], Mark]


def _judge_ndjson(line: bytes) -> Mark:
    try:
        value = json.loads(line)
    except ValueError:
        return Mark.NONE
    if not isinstance(value, dict):
        return Mark.NONE
    if value.get("error"):
        return Mark.FAILED
    return Mark.COMPLETE if value.get("done") is True or value.get("status") == "success" else Mark.NONE


def _judge_sse(complete: tuple[bytes, ...], failed: tuple[bytes, ...]) -> Callable[[bytes], Mark]:
    def judge(line: bytes) -> Mark:
        if line.startswith(complete):
            return Mark.COMPLETE
        return Mark.FAILED if line.startswith(failed) else Mark.NONE

    return judge


_NDJSON_DONE = _Format(b"\n", re.compile(rb'"done"\s*:\s*true|"error"\s*:'), _judge_ndjson)
_FORMATS: Mapping[Ending, _Format] = {
    Ending.NDJSON_DONE: _NDJSON_DONE,
    Ending.NDJSON_SUCCESS: _Format(b"\n", re.compile(rb'"success"|"error"\s*:'), _judge_ndjson),
    Ending.SSE_DONE: _Format(
        b"\n\n", re.compile(rb'\[DONE\]|"error"\s*:'), _judge_sse((b"data: [DONE]",), (b'data: {"error":',))
    ),
    Ending.RESPONSE_COMPLETED: _Format(
        b"\n\n",
        re.compile(rb"event: (?:response\.(?:completed|incomplete|failed)|error)"),
        _judge_sse(
            (b"event: response.completed", b"event: response.incomplete"), (b"event: response.failed", b"event: error")
        ),
    ),
    Ending.MESSAGE_STOP: _Format(
        b"\n\n",
        re.compile(rb"event: (?:message_stop|error)"),
        _judge_sse((b"event: message_stop",), (b"event: error",)),
    ),
}


class Watcher:
    """Counts tokens and looks for the end of one stream."""

    __slots__ = ("_format", "at_line_start", "complete", "failed", "n_tokens", "partial")

    def __init__(self, ending: Ending) -> None:
        self._format = _FORMATS.get(ending)
        self.partial = b""  # the beginning of a line (of an event) whose rest has not come
        self.n_tokens = 0
        self.complete = ending is Ending.FRAMING  # the terminator was seen, or none is needed
        self.failed = False  # an error was seen
        self.at_line_start = True  # so that something can be written without joining a broken line

    def feed(self, data: bytes) -> int:
        """Take the next piece of the payload; return how many tokens ended in it."""
        form = self._format
        if form is None or not data:
            return 0
        whole = self.partial + data if self.partial else data
        end = whole.rfind(form.separator) + len(form.separator)
        if end < len(form.separator):
            self.partial = whole if len(whole) <= _LINE_BYTES_MAX else b""
            self.at_line_start = False
            return 0
        self.partial = whole[end:]
        self.at_line_start = not self.partial
        if form.suspicious.search(whole, 0, end) is not None:
            return self._inspect(form, whole[:end])
        n_tokens = whole.count(form.separator, 0, end)
        self.n_tokens += n_tokens
        return n_tokens

    def _inspect(self, form: _Format, lines: bytes) -> int:
        """Judge every line; neither the terminator nor an error is a token."""
        n_tokens = lines.count(form.separator)
        for line in lines.split(b"\n"):
            if form.suspicious.search(line) is not None:
                mark = form.judge(line)
                self.complete = self.complete or mark is Mark.COMPLETE
                self.failed = self.failed or mark is Mark.FAILED
                n_tokens -= mark is not Mark.NONE
        self.n_tokens += max(0, n_tokens)
        return max(0, n_tokens)
