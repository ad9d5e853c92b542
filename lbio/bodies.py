"""What a request body says that decides where it goes, read without decoding the rest of it."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from lbcore.ollama import BodyFacts, RequestKind, Route, request_kind, runner_key


class _Fields(msgspec.Struct):
    """The members that matter; msgspec skips the others (prompts, images) without building objects of them."""

    model: str | None = None
    name: str | None = None  # what older clients call `model`
    source: str | None = None  # /api/copy
    stream: bool | None = None
    keep_alive: str | float | None = None
    options: dict[str, Any] | None = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Fields).decode
_EMPTY_BYTES_MAX = 16  # longer JSON is taken for not empty, unread
_MEMBERS = tuple(_Fields.__struct_fields__)


def read_facts(route: Route, method: str, body: bytes) -> BodyFacts:
    """Return what `body` says; a body that cannot be understood says nothing, so that an Ollama gives the answer."""
    kind = request_kind(route, method, empty=False, keep_alive=None)
    if body.lstrip()[:1] != b"{":
        return BodyFacts(kind=kind)
    fields = _fields(body)
    if fields is None:
        return BodyFacts(kind=kind)
    model = fields.model or fields.name or fields.source
    empty = _is_empty(fields.messages) and _is_empty(fields.prompt)
    kind = request_kind(route, method, empty=empty and bool(model), keep_alive=fields.keep_alive)
    answers_at_once = kind in {RequestKind.LOAD, RequestKind.UNLOAD}
    stream = route.streams_by_default if fields.stream is None else fields.stream
    return BodyFacts(
        model=model or None,
        runner_key=runner_key(fields.options),
        stream=stream and route.generates and not answers_at_once,
        kind=kind,
    )


def _fields(body: bytes) -> _Fields | None:
    try:
        fields = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = None
    if fields is not None and (fields.model or fields.name or fields.source):
        return fields
    return _lenient_fields(body)


def _lenient_fields(body: bytes) -> _Fields | None:
    """Read a body as Go does: names in any case, and nothing after the first value matters."""
    try:
        decoded, _ = json.JSONDecoder().raw_decode(body.decode().lstrip())
    except (ValueError, RecursionError):
        return None
    if not isinstance(decoded, dict):
        return None
    known = {key.lower(): value for key, value in decoded.items() if key.lower() in _MEMBERS and value is not None}
    for name in ("messages", "prompt"):
        known[name] = msgspec.Raw(b"1" if known.get(name) else b"null")  # all that matters is whether it is empty
    try:
        return msgspec.convert(known, _Fields)
    except msgspec.ValidationError:
        return None  # a wrong type: for an Ollama to refuse


def _is_empty(raw: msgspec.Raw) -> bool:
    """Tell whether a member is missing, null, an empty list or an empty text."""
    text = memoryview(raw)
    return len(text) == 0 or (len(text) <= _EMPTY_BYTES_MAX and msgspec.json.decode(text) in (None, [], ""))
