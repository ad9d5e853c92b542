"""Which models a request names, read so that no server reads it otherwise. Pure.

`lbio.wire.bodies` reads what balancing needs, as fast as it can; here it matters that nothing is overlooked, since a
key may be for some models only. So all spellings are found that Go would take (it ignores case, and takes the last of
several), and whatever may be read in two ways is refused, as is what is no JSON object at all: an Ollama would refuse
it too, but another server might read it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from typing import Final
from urllib.parse import unquote_plus

import msgspec

from lbcore.ollama import Route
from lbio.http1 import RequestHead
from lbio.wire.bodies import without_surrogates

LENIENT_BYTES_MAX: Final = 256 << 10
"""A larger body must be JSON as it should be: objects take many times the memory of their text."""
MEMBERS_MAX: Final = 200_000
"""What is read of a larger body has no more members than this, for the same reason."""

_USED = frozenset({"model"})
_NAMED = frozenset({"model", "name", "source", "destination", "from", "alias", "target"})
_OPAQUE = frozenset({"modelfile", "path"})
"""Members of /api/create, for older servers, that may name models in a language of their own."""

_TRANSCRIPTIONS = "/v1/audio/transcriptions"


class UnreadableError(Exception):
    """It cannot be told for sure which models a request names; the text says why."""


def named_models(head: RequestHead, route: Route, body: bytes) -> list[str]:
    """Return every model that the body of a request names. Raises UnreadableError."""
    coding = [value.strip().lower() for name, value in head.headers if name == b"content-encoding"]
    if any(value not in {b"", b"identity"} for value in coding):
        raise UnreadableError("its body is compressed")
    if route.name == _TRANSCRIPTIONS:
        return _in_form(head, body)
    return _in_json(body, _USED if route.generates else _NAMED)


# --- JSON --------------------------------------------------------------------------------------------------

_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_UNREADABLE = (ValueError, RecursionError)  # of which msgspec's errors and bad UTF-8 are some
_BLANKS = b" \t\r\n"
_COLON = re.compile(rb'"[ \t\r\n]*+:')


def _in_json(body: bytes, wanted: frozenset[str]) -> list[str]:
    begin = body.lstrip(_BLANKS)[:1]
    if begin != b"{":
        if begin:
            raise UnreadableError("its body is no JSON object")
        return []
    names: list[str] = []
    for member, value in _members(body).items():
        folded = member.casefold()
        if folded in wanted:
            if not isinstance(value, str):
                raise UnreadableError(f'"{folded}" is no text')
            names += [value] if value else []
        elif folded in _OPAQUE and wanted is _NAMED and value:
            raise UnreadableError(f'"{folded}" may name any; use "from"')
    return names


def _members(body: bytes) -> dict[str, object]:
    """Return the members of an object; those that are no short text as something that is none."""
    large = len(body) > LENIENT_BYTES_MAX
    if large and sum(1 for _ in itertools.islice(_COLON.finditer(body), MEMBERS_MAX)) == MEMBERS_MAX:
        raise UnreadableError("its body has very many members")
    with contextlib.suppress(*_UNREADABLE):
        return _strictly(body)
    try:
        if large:
            return _strictly(without_surrogates(body))
        # As Go does: what is no UTF-8 is replaced, and nothing after the first value matters.
        decoded, _ = json.JSONDecoder().raw_decode(body.decode(errors="replace").lstrip())
    except _UNREADABLE:
        raise UnreadableError("its body is not JSON") from None
    return dict(decoded)


def _strictly(body: bytes) -> dict[str, object]:
    return {member: _text(raw) for member, raw in _decode_members(body).items()}


_NAME_BYTES_MAX = 1 << 16


def _text(raw: msgspec.Raw) -> object:
    text = memoryview(raw)
    if len(text) > _NAME_BYTES_MAX or bytes(text[:1]) != b'"':
        return True
    return msgspec.json.decode(text)


# --- forms -------------------------------------------------------------------------------------------------

_BOUNDARY = re.compile(
    rb'multipart/form-data;[ \t]*boundary=(?:"([^"\\]{1,70})"|([-0-9A-Za-z\'()+_,./:=?]{1,70}))[ \t]*', re.IGNORECASE
)
_PART = re.compile(
    rb'[ \t]*\r\n(?:Content-Type:[^\r\n"]*\r\n)?'
    rb'Content-Disposition:[ \t]*form-data;[ \t]*name="([^"\\\r\n]*)"'
    rb'(?:;[ \t]*filename="[^"\\\r\n]*")?(?:;[ \t]*filename\*=[^;"\s]*)?[ \t]*\r\n'
    rb"(?:Content-(?:Type|Length|Transfer-Encoding):[^\r\n]*+\r\n)*+\r\n",
    re.IGNORECASE,
)
_PARTS_MAX = 1000
_PART_HEAD_BYTES_MAX = 8192
_ENCODED = re.compile(rb"\r\nContent-Transfer-Encoding:", re.IGNORECASE)


def _in_form(head: RequestHead, body: bytes) -> list[str]:
    """Return the models in the fields of a form, whose parts are sought wherever its boundary stands."""
    found = _BOUNDARY.fullmatch(head.header(b"content-type") or b"")
    if found is None:
        raise UnreadableError("its Content-Type is no plain multipart/form-data")
    if "model" in unquote_plus(head.query).casefold():
        raise UnreadableError("its query names one too")
    line = b"--" + (found[1] or found[2])
    names: list[str] = []
    at = body.find(line)
    for _ in range(_PARTS_MAX):
        if at < 0:
            return names
        begin = at + len(line)
        at = body.find(line, begin)
        if body.startswith(b"--", begin):
            continue
        part = _PART.match(body, begin, begin + _PART_HEAD_BYTES_MAX)
        if part is None:
            raise UnreadableError("a part of its form is not as clients write them")
        if part[1].lower() == b"model":
            if _ENCODED.search(part[0]) is not None:
                raise UnreadableError("a part of its form is encoded")
            end = body.find(b"\r\n", part.end())
            if end < 0 or end + 2 != at:
                raise UnreadableError("the model in its form is no line of text")
            names.append(body[part.end() : end].decode(errors="replace"))
    raise UnreadableError("its form has very many parts")
