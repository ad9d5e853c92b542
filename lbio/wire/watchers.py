"""Watch a streamed answer go by: how many tokens, whether it has ended well, whether it carried an error.

A watcher sees each piece of the payload once. What it costs on the hot path is a count and one search; only a line that
looks like an end or an error is decoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from lbcore.ollama import Ending

_LINE_BYTES_MAX = 4 << 20
"""A line longer than this is not kept for inspection (the last line of /api/generate carries its whole context)."""

_CRLF_SEPARATOR = b"\r\n\r\n"


class Mark(Enum):
    """What a line means."""

    NONE = 0
    COMPLETE = 1
    FAILED = 2
    BESIDES = 3  # neither a token nor an end: why the answer ended, or what it used


_NEVER = b"\0\n"  # ends no line of JSON


@dataclass(frozen=True, slots=True)
class _Format:
    """How one kind of stream is read.

    Each `token` is one, but for those of lines with a mark, and those before the first one that `says` something. Every
    line whose mark is not NONE has in it what `suspicious` finds, or `marker`: a plain search for it costs less than
    one more branch of the pattern.
    """

    separator: bytes  # ends a line (an event)
    token: bytes
    suspicious: re.Pattern[bytes]
    judge: Callable[[bytes], Mark]
    marker: bytes = b"\0"
    ordinary: bytes = _NEVER  # how a line ends that is a token, and has no mark unless it has `"error"` in it
    says: Callable[[bytes], bool] | None = None  # None: all do

    def with_crlf(self) -> _Format:
        """Return how the same is read where lines end with CR LF."""
        separator, token = (text.replace(b"\n", b"\r\n") for text in (self.separator, self.token))
        return replace(self, separator=separator, token=token)


def _judge_ndjson(line: bytes) -> Mark:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return Mark.NONE
    if not isinstance(value, dict):
        return Mark.NONE
    if value.get("error"):
        return Mark.FAILED
    return Mark.COMPLETE if value.get("done") is True or value.get("status") == "success" else Mark.NONE


_CONTENT = re.compile(rb'"(?:content|reasoning|reasoning_content|text|refusal|name|arguments)"\s*:\s*"(?!")')


def _judge_openai(line: bytes) -> Mark:
    """Judge an event of /v1/chat/completions or /v1/completions.

    The quotes of keys cannot stand in a text, whose own are escaped. The last chunk mostly has an empty delta, and so
    has what Ollama writes when its runner dies, under an empty `model` (capture: v1_chat_runner_killed_midstream).
    """
    if not line.startswith(b"data:"):
        return Mark.NONE
    value = line[5:].lstrip(b" ")  # SSE leaves the blank to the writer
    if value.startswith(b"[DONE]"):
        return Mark.COMPLETE
    if value.startswith(b'{"error":'):
        return Mark.FAILED
    if not value.startswith(b"{") or _CONTENT.search(line) is not None:
        return Mark.NONE
    return Mark.BESIDES if _OPENAI_BESIDES.search(line) is not None else Mark.NONE


def _says_something(event: bytes) -> bool:
    """Tell whether an event has more in it than who speaks: that, or a comment, may come long before the first token.

    What cannot be read is taken for something, as any member is that is not known here.
    """
    data = next((line[5:] for line in event.split(b"\n") if line.startswith(b"data:")), None)
    if data is None:
        return False
    try:
        return any(map(_has_text, json.loads(data)["choices"]))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return True


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {"text": choice.get("text")}
    return any(value and name != "role" for name, value in delta.items())


def _judge_events(complete: tuple[bytes, ...], failed: tuple[bytes, ...]) -> Callable[[bytes], Mark]:
    def judge(line: bytes) -> Mark:
        if not line.startswith(b"event:"):
            return Mark.NONE
        name = line[6:].lstrip(b" ")
        if name.startswith(complete):
            return Mark.COMPLETE
        return Mark.FAILED if name.startswith(failed) else Mark.NONE

    return judge


_BESIDES = rb'finish_reason"\s*:\s*"|choices"\s*:\s*\[\]|model"\s*:\s*""'
_OPENAI_BESIDES = re.compile(rb'"(?:%s)' % _BESIDES)
_FORMATS: Mapping[Ending, _Format] = {
    Ending.NDJSON_DONE: _Format(
        b"\n",
        b"\n",
        re.compile(rb'"done"\s*:\s*true|"error"\s*:'),
        _judge_ndjson,
        # In a JSON object that ends so, no text is open before the comma: it is the last `done` of the object itself.
        ordinary=b',"done":false}\n',
    ),
    Ending.NDJSON_SUCCESS: _Format(b"\n", b"\n", re.compile(rb'"success"|"error"\s*:'), _judge_ndjson),
    Ending.SSE_DONE: _Format(
        b"\n\n",
        b"\n\n",
        re.compile(rb'"(?:error"\s*:|%s)' % _BESIDES),
        _judge_openai,
        marker=b"[DONE]",
        says=_says_something,
    ),
    Ending.RESPONSE_COMPLETED: _Format(
        b"\n\n",
        b".delta\ndata:",
        re.compile(rb"event: ?(?:response\.(?:completed|incomplete|failed)|error)"),
        _judge_events((b"response.completed", b"response.incomplete"), (b"response.failed", b"error")),
    ),
    Ending.MESSAGE_STOP: _Format(
        b"\n\n",
        b"content_block_delta\ndata:",
        re.compile(rb"event: ?(?:message_stop|error)"),
        _judge_events((b"message_stop",), (b"error",)),
    ),
}


class Watcher:
    """Counts tokens and looks for the end of one stream."""

    __slots__ = ("_format", "at_line_start", "complete", "failed", "n_tokens", "ordinary_ending", "partial")

    def __init__(self, ending: Ending) -> None:
        self._format = _FORMATS.get(ending)
        self.ordinary_ending = self._format.ordinary if self._format is not None else _NEVER
        self.partial = bytearray()  # the beginning of a line (of an event) whose rest has not come
        self.n_tokens = 0
        self.complete = ending is Ending.FRAMING  # the terminator was seen, or none is needed
        self.failed = False  # an error was seen
        self.at_line_start = True  # so that something can be written without joining a broken line

    def feed(self, data: bytes) -> int:
        """Take the next piece of the payload; return how many tokens ended in it."""
        form = self._format
        if form is None or not data:
            return 0
        if self.partial:
            if self._goes_on(form, data):
                return 0
            data = bytes(self.partial)
        end = data.rfind(form.separator) + len(form.separator)
        if end < len(form.separator):
            if form.separator == b"\n\n" and _CRLF_SEPARATOR in data:
                self._format, self.partial = form.with_crlf(), bytearray()
                return self.feed(data)
            self.partial = bytearray(data)
            self.at_line_start = False
            return 0
        if self.partial or end < len(data):
            self.partial = bytearray(data[end:])
        self.at_line_start = not self.partial
        begun = self.n_tokens or form.says is None
        if not begun or form.suspicious.search(data, 0, end) is not None or data.find(form.marker, 0, end) >= 0:
            return self._inspect(form, data[:end])
        n_tokens = data.count(form.token, 0, end)
        self.n_tokens += n_tokens
        return n_tokens

    def end(self) -> None:
        """Take what is left for a line: some leave out the newline at the very end."""
        if self._format is not None and self.partial:
            self._inspect(self._format, bytes(self.partial))
            self.partial = bytearray()

    @property
    def terminated(self) -> bool:
        """Whether the stream has said itself that it is complete."""
        return self.complete and self._format is not None

    def _goes_on(self, form: _Format, data: bytes) -> bool:
        """Add to the line that was begun, without looking at that again; tell whether it has still not ended."""
        partial = self.partial
        begin = max(0, len(partial) - len(_CRLF_SEPARATOR) + 1)
        partial += data
        if partial.find(form.separator, begin) >= 0 or partial.find(_CRLF_SEPARATOR, begin) >= 0:
            return False
        if len(partial) > _LINE_BYTES_MAX:
            self.partial = bytearray()
        return True

    def _inspect(self, form: _Format, lines: bytes) -> int:
        """Judge every line; neither the terminator nor an error is a token, nor anything before the first one."""
        begin = 0 if self.n_tokens else _first(form, lines)
        n_tokens = lines.count(form.token, begin)
        at = 0
        for line in lines.split(b"\n"):
            if form.suspicious.search(line) is not None or form.marker in line:
                mark = form.judge(line)
                self.complete = self.complete or mark is Mark.COMPLETE
                self.failed = self.failed or mark is Mark.FAILED
                n_tokens -= mark is not Mark.NONE and form.token == form.separator and at >= begin
            at += len(line) + 1
        self.n_tokens += max(0, n_tokens)
        return max(0, n_tokens)


def _first(form: _Format, lines: bytes) -> int:
    """Return where the first event begins that says something; the end of all if none does."""
    at = 0
    while form.says is not None:
        end = lines.find(form.separator, at)
        if end < 0:
            return len(lines)
        event = lines[at:end]
        if form.says(event) and form.judge(event) is Mark.NONE:
            break
        at = end + len(form.separator)
    return at
