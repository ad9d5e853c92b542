"""What the head or the body of a server's answer means, when that is not what was asked for (pure)."""

from __future__ import annotations

import contextlib
import json
import re

from lbcore.events import Reason
from lbio.http1 import ResponseHead

_DETAIL_CHARS_MAX = 200
_NOT_FOUND = re.compile(rb'"model[^{}]{0,300}not found|not found, try pulling')
_MODEL_OUTPUT = (b"application/x-ndjson", b"application/json", b"text/event-stream")
_ELSEWHERE = frozenset({401, 403, 407, 408, 425, 429})


def reason_of(status: int, body: bytes | bytearray, *, passed_through: bool) -> Reason:
    """Return what an error status means for the question who could answer better."""
    if status == 404:
        if _NOT_FOUND.search(body[:4096]) is not None:
            return Reason.MODEL_NOT_FOUND
        # An unknown path is unknown to every Ollama; a known one may be too new for this server.
        return Reason.CLIENT_ERROR if passed_through else Reason.ELSEWHERE
    if status == 503:
        return Reason.BUSY
    if status in _ELSEWHERE:
        return Reason.ELSEWHERE
    return Reason.SERVER_ERROR if status >= 500 else Reason.CLIENT_ERROR


def is_model_output(head: ResponseHead, *, plain: bool) -> bool:
    """Tell whether it may come from a model; `plain`: text may."""
    said = (head.header(b"content-type") or b"").lower()
    return said.startswith(_MODEL_OUTPUT) or (plain and said.startswith(b"text/plain"))


def shortened(body: bytes | bytearray) -> str:
    """Return the words of an error body, for a log line."""
    match = re.search(rb'"(?:error|message)"\s*:\s*"((?:[^"\\]|\\.)*)', body[:4096])
    text = (match[1] if match is not None else bytes(body[:_DETAIL_CHARS_MAX])).decode(errors="replace")
    if match is not None and "\\" in text:
        with contextlib.suppress(ValueError):
            text = json.loads(f'"{text}"')
    return " ".join(text.split())[:_DETAIL_CHARS_MAX]
