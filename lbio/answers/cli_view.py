"""What the `ollama` CLI, by its User-Agent, is shown of the fleet where one Ollama would show itself (pure).

`ollama ps` has a line for each server and model, `llama3.2:latest (gpu1)`. `ollama list` prints the first characters of
a digest, which nobody types: the last of them tell on how many of the servers the model is, `a80c4f17 2/4`. Names stay
what they are, since they are used in all other commands.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import msgspec

from lbcore import catalog
from lbcore.config import Alias
from lbcore.ollama import canonical_model
from lbcore.records import Server
from lbio.answers.local import JSON, LocalAnswer
from lbio.http1 import RequestHead

_ID_CHARS = 12
"""So much of a digest does `ollama list` print."""


def is_cli(head: RequestHead) -> bool:
    """Tell whether a request comes from the CLI: libraries call themselves `ollama-python/…` and the like."""
    return (head.header(b"user-agent") or b"").startswith(b"ollama/")


_Entry = dict[str, Any]
"""A model as a server wrote it: values are `msgspec.Raw` and so go on as they are, but for those that are ours."""

_decode_entry = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_models = msgspec.json.Decoder(dict[str, list[dict[str, msgspec.Raw]]]).decode
_decode_text = msgspec.json.Decoder(str).decode


def _tags(servers: list[Server], may: catalog.May, aliases: Iterable[Alias]) -> list[_Entry]:
    chains = {canonical_model(alias.name): alias.models for alias in aliases}
    entries: list[_Entry] = [*_decode_models(catalog.tags_json(servers, may, aliases))["models"]]
    for entry in entries:
        name = canonical_model(_decode_text(entry["name"]))
        holders = (_holders(servers, model) for model in chains.get(name, (name,)))
        n_with = next((n for n in holders if n), 0)
        digest = _decode_text(entry["digest"]) if "digest" in entry else ""
        entry["digest"] = _marked(digest, n_with, len(servers))
    return entries


def _holders(servers: list[Server], model: str) -> int:
    """Return on how many live servers a model is."""
    return sum(server.is_alive and server.has(canonical_model(model)) for server in servers)


def _marked(digest: str, n_with: int, n_servers: int) -> str:
    """Return a digest whose first characters, as many as are printed, end with `2/4`."""
    mark = f" {n_with}/{n_servers}"
    return f"{digest[: _ID_CHARS - len(mark)]:{_ID_CHARS - len(mark)}}{mark}{digest[_ID_CHARS:]}"


def _ps(servers: list[Server], may: catalog.May, _aliases: Iterable[Alias]) -> list[_Entry]:
    loaded = [
        (name, server.name, record.active.entry)
        for server in servers
        if server.is_alive
        for name, record in server.models.items()
        if record.active is not None and may(name)
    ]
    entries = []
    for _, server_name, text in sorted(loaded):
        entry: _Entry = {**_decode_entry(text)}
        entry["name"] = f"{_decode_text(entry['name'])} ({server_name})"
        entries.append(entry)
    return entries


def _every(_model: str) -> bool:
    return True


_View = Callable[[list[Server], catalog.May, Iterable[Alias]], list[_Entry]]
_VIEWS: Mapping[str, _View] = {"/api/tags": _tags, "/api/ps": _ps}

VIEWS = frozenset(_VIEWS)
"""The routes that the CLI gets another view of."""


def answer_cli(
    route: str, servers: Iterable[Server], may: catalog.May | None = None, aliases: Collection[Alias] = ()
) -> LocalAnswer | None:
    """Answer a route of `VIEWS` for the CLI, of the models that it `may` see.

    None where there is nothing to tell apart: one server, or nobody alive.
    """
    known = list(servers)
    if len(known) < 2 or not any(server.is_alive for server in known):
        return None
    return LocalAnswer(200, JSON, msgspec.json.encode({"models": _VIEWS[route](known, may or _every, aliases)}))
