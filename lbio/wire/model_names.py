"""The names of models in the answers of servers, replaced by the one that the client has asked for.

Replaced is the member `model` of the object that an answer, or a line of a stream, is; in events also that of the
`response` or `message` in it. Nothing else is touched: what a model writes stands in texts, or in objects further in,
such as the arguments of a tool. However an answer is cut into pieces, the same comes of it.
"""

from __future__ import annotations

import json
import re
from typing import Final

from lbcore.ollama import Shape

NAME_BYTES_MAX: Final = 4096
"""A longer name is left as it is."""
DEPTH_MAX: Final = 1000
"""Objects and lists further in than this are not followed; the rest of such a line is passed on as it is."""

_MODEL = b"model"
_INNER = {Shape.OPENAI: b"response", Shape.ANTHROPIC: b"message"}
_MARK = re.compile(rb'["{}\[\],:\n]')
_OPENING = re.compile(rb"[{\[\n]")
_TEXT_GOES_ON = re.compile(rb'[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+')
_SHORT_TEXT = re.compile(rb'"((?:[^"\\\n]|\\[^\n]){0,%d}+)"' % NAME_BYTES_MAX)
_SHORT_TEXT_BEGUN = re.compile(rb'"(?:[^"\\\n]|\\[^\n]){0,%d}+\\?' % NAME_BYTES_MAX)
_LIST, _OBJECT, _NAMING = range(3)  # what is open: of the last kind, the model is renamed
_HTML = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def as_go_writes(name: str) -> bytes:
    """Return a name as a text of JSON, as an Ollama writes it."""
    return json.dumps(name, ensure_ascii=False).translate(_HTML).encode()


def renamed_in_error(body: bytes, sent: str, asked: str) -> bytes:
    """Return an error in which a model that stands there in quotes is called what the client has asked for."""
    name, other = as_go_writes(sent)[1:-1], as_go_writes(asked)[1:-1]
    quoted = re.compile(rb"(\\\"|')%s(?::latest)?\1" % re.escape(name), re.IGNORECASE)
    return quoted.sub(lambda found: found[1] + other + found[1], body)


class Renamer:
    """Renames the model in one answer, piece by piece. `lines`: each line is an object of its own (an event's data)."""

    __slots__ = ("_asked", "_at_name", "_in_text", "_inner", "_kept", "_lines", "_name", "_open", "_settled")

    def __init__(self, asked: str, shape: Shape, *, lines: bool) -> None:
        self._asked = as_go_writes(asked)
        self._inner = _INNER.get(shape) if lines else None
        self._lines = lines
        self._open: list[int] = []  # lists and objects
        self._at_name = False  # the next text is the name of a member
        self._name = b""  # of the member whose value comes, if that matters
        self._in_text = False
        self._kept = b""  # the beginning of a text that matters
        self._settled = False  # nothing more matters in this line (this answer)

    def feed(self, data: bytes) -> bytes:
        """Return the next piece of the answer, but for what cannot be told yet."""
        if self._settled and not self._lines:
            return data
        is_begun = self._open or self._kept or self._settled
        if self._lines and not is_begun and _MODEL not in data and data.endswith(b"\n"):
            return data  # whole lines that name none, as most are in some streams
        data = self._kept + data
        self._kept = b""
        pieces: list[bytes] = []
        copied = at = 0
        while (at := self._next_mark(data, at)) < len(data):
            mark = data[at : at + 1]
            if mark == b'"' and self._matters:
                text = _SHORT_TEXT.match(data, at)
                if text is None and _SHORT_TEXT_BEGUN.fullmatch(data, at) is not None:
                    self._kept = data[at:]
                    break
                if text is not None:
                    if not self._at_name and text[1]:
                        pieces += data[copied:at], self._asked
                        copied = text.end()
                        self._settled = True
                    self._name = text[1]
                    at = text.end()
                    continue
            self._take(mark)
            at += 1
        pieces.append(data[copied : len(data) - len(self._kept)])
        return b"".join(pieces)

    def end(self) -> bytes:
        """Return what was kept back: the answer has ended."""
        kept, self._kept = self._kept, b""
        return kept

    @property
    def _matters(self) -> bool:
        """Whether a text that begins here is a name of a member, or the value, that is looked for."""
        return bool(self._open) and self._open[-1] == _NAMING and (self._at_name or self._name == _MODEL)

    def _next_mark(self, data: bytes, at: int) -> int:
        """Return where the next character is that means something; the end when there is none."""
        if self._settled:
            newline = data.find(b"\n", at) if self._lines else -1
            return newline if newline >= 0 else len(data)
        if self._in_text:
            goes_on = _TEXT_GOES_ON.match(data, at)  # for nothing, if need be
            at = goes_on.end() if goes_on is not None else at
            if at == len(data) or data[at:] == b"\\":
                self._kept = data[at:]
                return len(data)
            self._in_text = False
            at += data[at : at + 1] != b"\n"
        mark = (_MARK if self._open else _OPENING).search(data, at)
        return mark.start() if mark is not None else len(data)

    def _take(self, mark: bytes) -> None:
        """Follow where in the answer this is."""
        if mark == b'"':
            self._in_text = True
        elif mark == b":":
            self._at_name = False
        elif mark != b"\n" or self._lines:
            if mark in b"{[":
                self._open.append(self._kind(mark))
                self._settled = len(self._open) > DEPTH_MAX
            elif mark in b"}]":
                self._open.pop()
                self._settled = not (self._open or self._lines)
            elif mark == b"\n":
                self._open.clear()
                self._settled = False
            self._name = b""
            self._at_name = mark in b"{," and self._open[-1] != _LIST

    def _kind(self, mark: bytes) -> int:
        if mark == b"[":
            return _LIST
        is_inner = self._open == [_NAMING] and self._inner is not None and self._name == self._inner
        return _NAMING if is_inner or not self._open else _OBJECT
