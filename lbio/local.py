"""Answers given here: the front page, the merged views of the fleet, redirects and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lbcore import catalog
from lbcore.fleet import Fleet
from lbcore.ollama import ROUTES, Route, Shape, error_body, find_route
from lbio.http1 import HeaderPairs, RequestHead

JSON = b"application/json; charset=utf-8"
TEXT = b"text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class LocalAnswer:
    """An answer of our own."""

    status: int
    content_type: bytes
    body: bytes
    headers: HeaderPairs = ()


def json_answer(status: int, value: object) -> LocalAnswer:
    """Answer with a JSON value."""
    return LocalAnswer(status, JSON, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def error_answer(shape: Shape, status: int, message: str, tag: str = "", *, retry_after_s: int = 0) -> LocalAnswer:
    """Answer with an error, in the shape the client knows."""
    headers = ((b"Retry-After", b"%d" % retry_after_s),) if retry_after_s else ()
    return LocalAnswer(status, JSON, error_body(shape, status, message, tag), headers)


def preliminary_answer(head: RequestHead) -> LocalAnswer | None:
    """Answer what is settled by method and path alone, as Ollama does (captures: chat_get, chat_trailing_slash)."""
    path = head.path
    if len(path) > 1 and path.endswith("/") and find_route(path.rstrip("/")).methods:
        location = path.rstrip("/") + (f"?{head.query}" if head.query else "")
        status = 301 if head.method == "GET" else 307
        return LocalAnswer(status, b"", b"", ((b"Location", location.encode()),))
    route = find_route(path)
    if route.methods and head.method not in route.methods and head.method != "OPTIONS":
        allow = ", ".join(route.methods).encode()
        return LocalAnswer(405, b"text/plain", b"405 method not allowed", ((b"Allow", allow),))
    return None


def _root(_fleet: Fleet) -> LocalAnswer:
    return LocalAnswer(200, TEXT, b"Ollama is running")


def _version(fleet: Fleet) -> LocalAnswer:
    return json_answer(200, {"version": catalog.highest_version(fleet) or ""})


def _tags(fleet: Fleet) -> LocalAnswer:
    return LocalAnswer(200, JSON, catalog.tags_json(fleet))


def _ps(fleet: Fleet) -> LocalAnswer:
    return LocalAnswer(200, JSON, catalog.ps_json(fleet))


_ANSWERS: Mapping[str, Callable[[Fleet], LocalAnswer]] = {
    "/": _root,
    "/api/version": _version,
    "/api/tags": _tags,
    "/api/ps": _ps,
}

NEEDS_SERVERS = frozenset(route.name for route in ROUTES if route.name in _ANSWERS and route.name != "/")
"""Local routes whose answer is made of what live servers said."""


def answer_route(route: Route, fleet: Fleet) -> LocalAnswer:
    """Answer a `local` or `aggregate` route. Without a live server, what would be made of servers is a 502."""
    if route.name in NEEDS_SERVERS and not any(server.is_alive for server in fleet):
        return error_answer(Shape.NATIVE, 502, fleet.nobody_there(), retry_after_s=1)
    return _ANSWERS[route.name](fleet)
