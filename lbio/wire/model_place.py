"""Where the body of a request names its model, so that another name can stand there and all else stays byte for byte.

Found are the one member `model` (or, for older clients, `name`) of an object, and the field of a form. An object that
has it in another way (`Model`, or twice) is read as Go would read it, and written anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from lbio.wire.bodies import LENIENT_BYTES_MAX, form_model, without_surrogates

MEMBERS_MAX: Final = 200_000
"""A body that may have more members than this, however deep, is not looked into: that would take long."""

_NAMING = ("model", "name")  # of which the first that says anything counts
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_name = msgspec.json.Decoder(str).decode
_UNREADABLE = (ValueError, RecursionError)  # of which msgspec's errors and bad UTF-8 are some
_KEY = re.compile(rb'[ \t\r\n]*+("(?:[^"\\]|\\.)*+")[ \t\r\n]*+:[ \t\r\n]*+', re.DOTALL)
_BEGIN = re.compile(rb"\{")
_COMMA = re.compile(rb"[ \t\r\n]*+,")
_END = re.compile(rb"[ \t\r\n]*+\}")
_SAYS_NOTHING = (b"null", b'""')
_PIECE = 65536


class PlacelessError(ValueError):
    """No other name can stand in the place of the model's; the text says why."""


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """The bytes of a body that name its model."""

    begin: int
    end: int
    in_form: bool = False

    def renamed(self, body: bytes, model: str) -> tuple[bytes, ModelPlace]:
        """Return the body with another model, and the place of that."""
        value = model.encode() if self.in_form else _as_json(model)
        place = ModelPlace(self.begin, self.begin + len(value), in_form=self.in_form)
        view = memoryview(body)
        return b"".join((view[: self.begin], value, view[self.end :])), place


def find_place(body: bytes, content_type: bytes) -> tuple[bytes, ModelPlace]:
    """Return a body, and where it names its model; it is another body if it had to be written anew.

    Raises PlacelessError.
    """
    if content_type.lower().startswith(b"multipart/form-data"):
        field = form_model(body)
        if field is None:
            raise PlacelessError("its form has no field for it")
        return body, ModelPlace(field.start(1), field.end(1), in_form=True)
    if body.count(b'":') + body.count(b'" :') > MEMBERS_MAX:
        raise PlacelessError("its body has very many members")
    place = _place_in(body)
    return (body, place) if place is not None else _written_anew(body)


def _place_in(body: bytes) -> ModelPlace | None:
    """Find the member of an object; None unless all its members are there once, and this one is spelt as usual."""
    try:
        members = _decode_members(body)
    except _UNREADABLE:
        body = without_surrogates(body)  # of the same length
        try:
            members = _decode_members(body)
        except _UNREADABLE:
            return None
    spans = _spans(body, members)
    if any(name.lower() in _NAMING and name not in _NAMING for name in spans):
        return None
    named = (spans[name] for name in _NAMING if name in spans)
    return next((ModelPlace(*span) for span in named if body[slice(*span)] not in _SAYS_NOTHING), None)


def _spans(body: bytes, members: Mapping[str, msgspec.Raw]) -> dict[str, tuple[int, int]]:
    """Go from member to member, whose lengths are known, and return where their values are; {} if one is there twice.

    What is found is what was decoded: where each name and each value should stand it does stand, up to the end.
    """
    spans: dict[str, tuple[int, int]] = {}
    at = body.index(b"{")
    for name, raw in members.items():
        begins = _COMMA.match(body, at) if spans else _BEGIN.match(body, at)
        key = _KEY.match(body, begins.end()) if begins is not None else None
        if key is None or _decode_name(key[1]) != name or not _stands_at(key.end(), body, raw):
            return {}
        at = key.end() + len(memoryview(raw))
        spans[name] = key.end(), at
    return spans if _END.match(body, at) is not None else {}


def _stands_at(begin: int, body: bytes, raw: msgspec.Raw) -> bool:
    value, text = memoryview(raw), memoryview(body)[begin:]
    pieces = range(0, len(value), _PIECE)
    return all(bytes(value[at : at + _PIECE]) == bytes(text[at : min(at + _PIECE, len(value))]) for at in pieces)


def _written_anew(body: bytes) -> tuple[bytes, ModelPlace]:
    """Read an object as Go does: names in any case, of several the last, and nothing after it matters."""
    if len(body) > LENIENT_BYTES_MAX:
        raise PlacelessError('its large body does not name it as usual, once and as "model"')
    try:
        members, _ = json.JSONDecoder().raw_decode(body.decode(errors="replace").lstrip())
        named = [name for wanted in _NAMING for name in members if name.lower() == wanted and members[name]]
        others = {name: value for name, value in members.items() if name.lower() not in _NAMING}
        rest = json.dumps(others)[1:].encode()
    except _UNREADABLE:
        raise PlacelessError("its body is not JSON") from None
    if not named:
        raise PlacelessError('its body does not name it as "model"')
    before, value = b'{"model":', b'""'
    return before + value + (b"," if others else b"") + rest, ModelPlace(len(before), len(before) + len(value))


def _as_json(model: str) -> bytes:
    return json.dumps(model, ensure_ascii=False).encode()
