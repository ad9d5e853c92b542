"""Answers given here: the front page, the merged views of the fleet, redirects and refusals."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from lbcore import catalog
from lbcore.config import Alias
from lbcore.fleet import Fleet
from lbcore.ollama import Route, Shape, error_body, find_route
from lbcore.records import Server
from lbio.http1 import HeaderPairs, RequestHead

JSON = b"application/json; charset=utf-8"
PLAIN_JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class LocalAnswer:
    """An answer of our own."""

    status: int
    content_type: bytes
    body: bytes
    headers: HeaderPairs = ()
    is_view: bool = False  # it is the same for everybody until the catalog changes


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
        where = ((b"Location", location.encode()),)
        if head.method == "GET":
            page = f'<a href="{html.escape(location)}">Moved Permanently</a>.\n\n'
            return LocalAnswer(301, b"text/html; charset=utf-8", page.encode(), where)
        return LocalAnswer(307, b"", b"", where)
    route = find_route(path)
    if route.methods and head.method not in route.methods:
        allow = ", ".join(route.methods).encode()
        return LocalAnswer(405, b"text/plain", b"405 method not allowed", ((b"Allow", allow),))
    return None


Aliases = Iterable[Alias]


def _root(_fleet: Fleet, _aliases: Aliases) -> LocalAnswer:
    return LocalAnswer(200, TEXT, b"Ollama is running")


def _version(fleet: Fleet, _aliases: Aliases) -> LocalAnswer:
    return json_answer(200, {"version": catalog.highest_version(fleet) or ""})


def _tags(fleet: Fleet, aliases: Aliases) -> LocalAnswer:
    return LocalAnswer(200, JSON, catalog.tags_json(fleet, aliases=aliases))


def _ps(fleet: Fleet, _aliases: Aliases) -> LocalAnswer:
    return LocalAnswer(200, JSON, catalog.ps_json(fleet))


def _v1_models(fleet: Fleet, aliases: Aliases) -> LocalAnswer:
    return LocalAnswer(200, PLAIN_JSON, catalog.v1_models_json(fleet, aliases=aliases))


_ANSWERS: Mapping[str, Callable[[Fleet, Aliases], LocalAnswer]] = {
    "/": _root,
    "/api/version": _version,
    "/api/tags": _tags,
    "/api/ps": _ps,
    "/v1/models": _v1_models,
}
_V1_MODEL = "/v1/models/:model"

NEEDS_SERVERS = frozenset(_ANSWERS) - {"/"} | {_V1_MODEL}
"""Local routes whose answer is made of what live servers said."""


LISTS: Mapping[str, Callable[[Iterable[Server], catalog.May, Aliases], bytes]] = {
    "/api/tags": catalog.tags_json,
    "/api/ps": catalog.ps_json,
    "/v1/models": catalog.v1_models_json,
}
"""Routes that list models, of which not everybody may see all."""


def answer_list(route: Route, servers: Iterable[Server], may: catalog.May, aliases: Aliases = ()) -> LocalAnswer:
    """Answer a route of `LISTS` with some of the models that these servers have, and of their aliases."""
    body = LISTS[route.name](servers, may, aliases)
    return LocalAnswer(200, PLAIN_JSON if route.shape is Shape.OPENAI else JSON, body)


def model_in_path(route: Route, path: str) -> str | None:
    """Return the model that a path names, if its route has one there."""
    return unquote(path.rpartition("/")[2]) if route.name == _V1_MODEL else None


def answer_route(route: Route, path: str, fleet: Fleet, aliases: Aliases = ()) -> LocalAnswer | None:
    """Answer a `local` or `aggregate` route; None when a server had better be asked.

    Without a live server, what would be made of servers is a 502.
    """
    if route.name in NEEDS_SERVERS and not any(server.is_alive for server in fleet):
        return error_answer(route.shape, 502, fleet.nobody_there(), retry_after_s=1)
    model = model_in_path(route, path)
    if model is None:
        return _ANSWERS[route.name](fleet, aliases)
    body = catalog.v1_model_json(fleet, model, aliases)
    return None if body is None else LocalAnswer(200, PLAIN_JSON, body)
