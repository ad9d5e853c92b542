"""What a request body says that decides where it goes, read without decoding the rest of it.

Bodies come from anybody and may be large, so time and memory are bounded by one pass over the text: nothing is built of
what does not matter, nor of what does while it is longer than a server would take.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from lbcore.ollama import (
    KEEP_ALIVE_CHARS_MAX,
    MODEL_CHARS_MAX,
    RUNNER_OPTIONS,
    BodyFacts,
    Ending,
    RequestKind,
    Route,
    request_kind,
    runner_key,
)

_MISSING = msgspec.Raw()
_Options = msgspec.defstruct("_Options", [(name, msgspec.Raw, _MISSING) for name in RUNNER_OPTIONS])


class _Fields(msgspec.Struct):
    """The members that matter, undecoded; msgspec skips the others without building objects of them."""

    model: msgspec.Raw = _MISSING
    name: msgspec.Raw = _MISSING  # what older clients call `model`
    source: msgspec.Raw = _MISSING  # /api/copy
    stream: bool | None = None
    keep_alive: msgspec.Raw = _MISSING
    options: _Options | None = None  # type: ignore[valid-type]
    messages: msgspec.Raw = _MISSING
    prompt: msgspec.Raw = _MISSING


_decode = msgspec.json.Decoder(_Fields).decode
_decode_name = msgspec.json.Decoder(str | None).decode
_decode_keep_alive = msgspec.json.Decoder(str | float | None).decode
_EMPTY_BYTES_MAX = 16  # longer JSON is taken for not empty, unread
_OPTION_BYTES_MAX = 32  # the longest number or word that a runner option can be
_NAME_BYTES_MAX = 12 * MODEL_CHARS_MAX  # each character written as two escapes
LENIENT_BYTES_MAX = 256 << 10  # larger bodies are decoded strictly: objects take many times the memory of their text
_FIELD_BYTES_MAX = 1024 + 4 * MODEL_CHARS_MAX  # of a form: its headers, its value and what follows
_FIELDS_MAX = 64  # of a form that are looked at: of many millions, that would take minutes
_MODEL_FIELD = re.compile(
    rb'form-data;[ \t]*name="?model"?[ \t]*\r\n(?:[^\r\n]++\r\n)*+\r\n([^\r\n]*+)\r\n--', re.IGNORECASE
)
_MEMBERS = tuple(_Fields.__struct_fields__)


def read_facts(route: Route, method: str, body: bytes, content_type: bytes = b"") -> BodyFacts:
    """Return what `body` says; a body that cannot be understood says nothing, so that an Ollama gives the answer."""
    kind = request_kind(route, method, empty=False, keep_alive=None)
    if content_type.lower().startswith(b"multipart/form-data"):
        field = form_model(body)
        name = field[1].decode(errors="replace").strip() if field is not None else ""
        return BodyFacts(model=name if 0 < len(name) <= MODEL_CHARS_MAX else None, kind=kind)
    if body.lstrip()[:1] != b"{":
        return BodyFacts(kind=kind)
    try:
        fields = _fields(body)
        model = _name(fields)
        keep_alive = _short(fields.keep_alive, KEEP_ALIVE_CHARS_MAX, _decode_keep_alive)
        key = _runner_key(fields.options)
        empty = _is_empty(fields.messages) and _is_empty(fields.prompt)
    except (ValueError, RecursionError):  # of which msgspec's errors and bad UTF-8 are some
        return BodyFacts(kind=kind)
    kind = request_kind(route, method, empty=empty and model is not None, keep_alive=keep_alive)
    answers_at_once = kind in {RequestKind.LOAD, RequestKind.UNLOAD}
    stream = route.streams_by_default if fields.stream is None else fields.stream
    can_stream = route.generates or route.ending is not Ending.FRAMING
    return BodyFacts(model=model, runner_key=key, stream=stream and can_stream and not answers_at_once, kind=kind)


def form_model(body: bytes) -> re.Match[bytes] | None:
    """Find the field `model` of a form, without taking the form apart: the rest is a recording of many megabytes.

    Its value is the first group.
    """
    at = -1
    for _ in range(_FIELDS_MAX):
        at = body.find(b"form-data", at + 1)
        if at < 0:
            break
        field = _MODEL_FIELD.match(body, at, at + _FIELD_BYTES_MAX)
        if field is not None:
            return field
    return None


def _fields(body: bytes) -> _Fields:
    """Find the members that matter. Raises ValueError or RecursionError for what cannot be read."""
    try:
        fields = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if len(body) > LENIENT_BYTES_MAX:
            return _decode(without_surrogates(body))
    else:
        if fields.model or fields.name or fields.source or len(body) > LENIENT_BYTES_MAX:
            return fields
    return _lenient_fields(body)


def without_surrogates(body: bytes) -> bytes:
    """Replace what is cut out of an emoji, as JavaScript does to texts, by other characters of the same length.

    Go does not mind it, msgspec does; what the texts say does not matter here.
    """
    return body.replace(b"\\ud", b"\\u0").replace(b"\\uD", b"\\u0")


def _lenient_fields(body: bytes) -> _Fields:
    """Read a body as Go does: names in any case, and nothing after the first value matters."""
    decoded, _ = json.JSONDecoder().raw_decode(body.decode().lstrip())
    known = {key.lower(): value for key, value in decoded.items() if key.lower() in _MEMBERS and value is not None}
    for name in ("messages", "prompt"):
        known[name] = 1 if known.get(name) else None  # all that matters is whether it is empty
    return _decode(msgspec.json.encode(known))


def _short(raw: msgspec.Raw, bytes_max: int, decode: Any) -> Any:
    """Return the value of a member; None when it is missing, or longer than any that means something."""
    text = memoryview(raw)
    return decode(text) if 0 < len(text) <= bytes_max else None


def _name(fields: _Fields) -> str | None:
    """Return the model's name; one that is too long for a server is none."""
    for raw in (fields.model, fields.name, fields.source):
        name: str | None = _short(raw, _NAME_BYTES_MAX, _decode_name)
        if name:
            return name if len(name) <= MODEL_CHARS_MAX else None
        if name is None and len(memoryview(raw)) > _NAME_BYTES_MAX:
            return None
    return None


def _runner_key(options: Any) -> str:
    if options is None:
        return ""
    given = [(name, raw) for name in RUNNER_OPTIONS if (raw := getattr(options, name))]
    return runner_key({name: _short(raw, _OPTION_BYTES_MAX, msgspec.json.decode) for name, raw in given})


def _is_empty(raw: msgspec.Raw) -> bool:
    """Tell whether a member is missing, null, an empty list or an empty text."""
    text = memoryview(raw)
    try:
        return len(text) == 0 or (len(text) <= _EMPTY_BYTES_MAX and msgspec.json.decode(text) in (None, [], ""))
    except ValueError:  # bad UTF-8, which Go replaces, is not empty
        return False
