"""A request for many embeddings taken apart, and the answers to its parts put together. Text in, text out (pure).

What stands in an array is copied as it is: no number and no text is ever written anew. Whatever is not understood for
sure is None, and the request stays whole: an Ollama has to read it, and says what is wrong with it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

INPUTS_MAX = 20_000
"""Of more inputs, the answer would mostly be larger than may be held."""
_BODY_BYTES_MAX = 16 << 20
"""A larger body is not looked through: others would have to wait for that."""
_REST_BYTES_MAX = 65536
"""What stands around the array is no longer than this."""
_NAMES_MAX = 1000  # texts that look like the name of the array, before it is given up
_UNREADABLE = (ValueError, RecursionError)  # of which msgspec's errors and bad UTF-8 are some

_MISSING = msgspec.Raw()


class _Native(msgspec.Struct, forbid_unknown_fields=True):
    """All that is known of `/api/embed`: each holds for every input alike."""

    input: msgspec.Raw
    model: str
    truncate: msgspec.Raw = _MISSING
    dimensions: msgspec.Raw = _MISSING
    options: msgspec.Raw = _MISSING
    keep_alive: msgspec.Raw = _MISSING


class _OpenAi(msgspec.Struct, forbid_unknown_fields=True):
    """All that is known of `/v1/embeddings`."""

    input: msgspec.Raw
    model: str
    encoding_format: msgspec.Raw = _MISSING
    dimensions: msgspec.Raw = _MISSING
    user: msgspec.Raw = _MISSING


_BLANKS = b" \t\r\n"
_SPACE = rb"[ \t\r\n]*+"
_COLON = re.compile(_SPACE + rb":" + _SPACE)
_OPENING = re.compile(rb"\[" + _SPACE + rb'"')
_BETWEEN = re.compile(rb'"' + _SPACE + rb"," + _SPACE + rb'"')
_INDEX = re.compile(rb'("index"\s*+:\s*+)([0-9]{1,9})(?![0-9.eE])')

_decode_any = msgspec.json.Decoder(msgspec.Raw).decode
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_number = msgspec.json.Decoder(int).decode


@dataclass(frozen=True, slots=True)
class Form:
    """How one path writes its requests and its answers.

    `member` is the array in an answer, `numbers` what is made of the numbers beside it.
    """

    read: Callable[[bytes], Any]
    member: bytes
    find: Callable[[bytes], Any]
    numbers: Mapping[str, Callable[[Sequence[msgspec.Raw]], bytes]]
    numbered: bool = False  # each element says where in the array it stands


# --- requests --------------------------------------------------------------------------------------------------


class Inputs:
    """The inputs of one request, where they stand in its body; texts, at least one."""

    __slots__ = ("_begin", "_body", "_end", "_ends", "_starts")

    def __init__(self, body: bytes, begin: int, end: int, starts: Sequence[int], ends: Sequence[int]) -> None:
        self._body = body
        self._begin = begin  # of the array
        self._end = end
        self._starts = starts
        self._ends = ends

    def __len__(self) -> int:
        return len(self._starts)

    def bodies(self, shares: Iterable[int]) -> list[bytes]:
        """Return one body for each share of them, the same but for its inputs."""
        bodies, first = [], 0
        for share in shares:
            last = first + share - 1
            bodies.append(self.with_items(self._body[self._starts[first] : self._ends[last]]))
            first += share
        return bodies

    def with_items(self, items: bytes) -> bytes:
        """Return the body with other items in its array."""
        return b"".join((self._body[: self._begin], b"[", items, b"]", self._body[self._end :]))


def find_inputs(body: bytes, form: Form) -> Inputs | None:
    """Find the inputs of a request."""
    begin = _value_of(body, b'"input"') if len(body) <= _BODY_BYTES_MAX else None
    if begin is None:
        return None
    try:
        end = begin + len(memoryview(form.read(body).input))
        inputs = _texts_between(body, begin, end)
        is_sure = inputs is not None and bytes(form.read(inputs.with_items(b"")).input) == b"[]"
    except _UNREADABLE:
        return None
    return inputs if is_sure else None


def _texts_between(body: bytes, begin: int, end: int) -> Inputs | None:
    """Find the texts in an array. Raises ValueError when there is anything else in it."""
    opening = _OPENING.match(body, begin)
    if opening is None or len(body) - (end - begin) > _REST_BYTES_MAX:
        return None
    starts, ends = array("Q"), array("Q")
    start = opening.end() - 1
    at = start + 1
    while (between := _BETWEEN.search(body, at, end)) is not None:
        text = body[start : between.start() + 1]
        if _is_open(text):
            at = between.start() + 1
            continue
        _decode_any(text)
        starts.append(start)
        ends.append(between.start() + 1)
        if len(starts) == INPUTS_MAX:
            return None
        start = between.end() - 1
        at = start + 1
    text = body[start : end - 1].rstrip(_BLANKS)
    _decode_any(text)
    starts.append(start)
    ends.append(start + len(text))
    return Inputs(body, begin, end, starts, ends)


def _is_open(text: bytes) -> bool:
    """Tell whether the quote at the end of what begins with one is part of the text: a backslash stands before it."""
    before = text[1:-1]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1


def _value_of(text: bytes, name: bytes) -> int | None:
    """Return where the value of a member begins, if only one is called so anywhere.

    A quote within a text has a backslash before it, so what is found before a colon is a name.
    """
    found: int | None = None
    at = -1
    for _ in range(_NAMES_MAX):
        at = text.find(name, at + 1)
        if at < 0:
            return found
        if (colon := _COLON.match(text, at + len(name))) is not None:
            if found is not None:
                return None
            found = colon.end()
    return None


# --- answers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Portion:
    """The answer to one part: what stands in its array, and all that stands around it."""

    items: bytes
    members: Mapping[str, msgspec.Raw]
    tail: bytes  # after the object


def read_portion(text: bytes, form: Form, n_before: int, n_items: int) -> Portion | None:
    """Take the answer to a part apart, before which come so many other inputs; it must have so many answers."""
    begin = _value_of(text, form.member)
    if begin is None:
        return None
    try:
        end = begin + len(memoryview(form.find(text).it))
        rest = b"".join((text[:begin], b"[]", text[end:]))
        members = _decode_members(rest) if len(rest) <= _REST_BYTES_MAX else {}
    except _UNREADABLE:
        return None
    items = text[begin + 1 : end - 1]
    if form.numbered:
        items, n_found = _renumbered(items, n_before)
    else:
        n_found = items.count(b"[")
    name = form.member[1:-1].decode()
    if n_found != n_items or bytes(members.get(name, _MISSING)) != b"[]":
        return None
    return Portion(items, members, rest[len(rest.rstrip()) :])


def _renumbered(items: bytes, n_before: int) -> tuple[bytes, int]:
    return _INDEX.subn(lambda found: found[1] + b"%d" % (int(found[2]) + n_before), items)


def join(portions: Sequence[Portion], form: Form) -> bytes | None:
    """Return one answer made of those to all parts, in their order; what is not known is as in the first."""
    members = dict(portions[0].members)
    for name in form.numbers:
        if any(name in portion.members for portion in portions):
            members.setdefault(name, _MISSING)
    try:
        written = [_member(name, raw, portions, form) for name, raw in members.items()]
    except _UNREADABLE:
        return None
    return b"{" + b",".join(written) + b"}" + portions[0].tail


def _member(name: str, first: msgspec.Raw, portions: Sequence[Portion], form: Form) -> bytes:
    key = msgspec.json.encode(name)
    if key == form.member:
        return key + b":[" + b",".join([portion.items for portion in portions]) + b"]"
    combine = form.numbers.get(name)
    if combine is None:
        return key + b":" + bytes(first)
    return key + b":" + combine([portion.members[name] for portion in portions if name in portion.members])


def _sum(raws: Sequence[msgspec.Raw]) -> bytes:
    return b"%d" % sum(map(_decode_number, raws))


def _max(raws: Sequence[msgspec.Raw]) -> bytes:
    return b"%d" % max(map(_decode_number, raws))


def _sums(raws: Sequence[msgspec.Raw]) -> bytes:
    """Return an object with the sums of all numbers of several."""
    tables = [_decode_members(raw) for raw in raws]
    written = []
    for name, first in tables[0].items():
        values = [table[name] for table in tables if name in table]
        is_number = all(bytes(value).isdigit() for value in values)
        written.append(msgspec.json.encode(name) + b":" + (_sum(values) if is_number else bytes(first)))
    return b"{" + b",".join(written) + b"}"


def _finder(member: str) -> Callable[[bytes], Any]:
    found = msgspec.defstruct("_Found", [("it", msgspec.Raw)], rename={"it": member})
    return msgspec.json.Decoder(found).decode


FORMS: Mapping[str, Form] = {
    "/api/embed": Form(
        msgspec.json.Decoder(_Native).decode,
        b'"embeddings"',
        _finder("embeddings"),
        {"total_duration": _max, "load_duration": _max, "prompt_eval_count": _sum},
    ),
    "/v1/embeddings": Form(
        msgspec.json.Decoder(_OpenAi).decode, b'"data"', _finder("data"), {"usage": _sums}, numbered=True
    ),
}
"""By route: those whose requests may be taken apart."""
