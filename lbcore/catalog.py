"""The models of the fleet as one Ollama would list them, from what the last probes said (pure).

Entries are relayed as the servers wrote them. Of a model that several servers have, the entry changed last is listed;
so the merge does not depend on the order of the servers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from lbcore.config import Alias
from lbcore.events import ModelInfo
from lbcore.ollama import canonical_model
from lbcore.records import Server

_NUMBERS = re.compile(r"\d{1,18}")  # a longer one is compared in parts: Python reads none of thousands of digits


May = Callable[[str], bool]
"""Tells whether a model, by its name, is to be listed."""


def _every(_model: str) -> bool:
    return True


def _newest(servers: Iterable[Server], may: May = _every, aliases: Iterable[Alias] = ()) -> list[ModelInfo]:
    """Return every model of a live server once, and every alias of one, changed last first, as Ollama does."""
    newest: dict[str, ModelInfo] = {}
    for server in servers:
        if server.is_alive:
            for name, record in server.models.items():
                info = record.available
                if info is not None and (name not in newest or _age_key(info) > _age_key(newest[name])):
                    newest[name] = info
    newest |= {canonical_model(alias.name): found for alias in aliases if (found := _stood_for(alias, newest))}
    return sorted((info for name, info in newest.items() if may(name)), key=_age_key, reverse=True)


def _stood_for(alias: Alias, known: Mapping[str, ModelInfo]) -> ModelInfo | None:
    """Return the first model of an alias that is known, under the name of the alias, if it can be written again."""
    info = next((info for name in alias.models if (info := known.get(canonical_model(name))) is not None), None)
    if info is None or canonical_model(info.name) == canonical_model(alias.name):
        return info
    try:
        entry = {**json.loads(info.entry), "name": alias.name, "model": alias.name}
        written = json.dumps(entry, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):  # a number of thousands of digits, say, or one beyond all bounds
        return None
    return replace(info, name=alias.name, entry=written)


def tags_json(servers: Iterable[Server], may: May = _every, aliases: Iterable[Alias] = ()) -> bytes:
    """Return the answer to `GET /api/tags`."""
    return _models(info.entry for info in _newest(servers, may, aliases))


def v1_models_json(servers: Iterable[Server], may: May = _every, aliases: Iterable[Alias] = ()) -> bytes:
    """Return the answer to `GET /v1/models` (capture: v1_models)."""
    told = {"object": "list", "data": [_v1_entry(info, info.name) for info in _newest(servers, may, aliases)]}
    return _v1_line(told)


def v1_model_json(servers: Iterable[Server], model: str, aliases: Iterable[Alias] = ()) -> bytes | None:
    """Return the answer to `GET /v1/models/:model` (capture: v1_model), None when no live server has it."""
    name = canonical_model(model)
    found = (info for info in _newest(servers, aliases=aliases) if canonical_model(info.name) == name)
    told = next((_v1_entry(info, model) for info in found), None)
    return None if told is None else _v1_line(told)


def _v1_line(told: dict[str, Any]) -> bytes:
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _v1_entry(info: ModelInfo, name: str) -> dict[str, str | int]:
    path = info.name.split("/")
    owner = path[-2] if len(path) > 1 else "library"
    return {"id": name, "object": "model", "created": int(_timestamp(info.modified_at)), "owned_by": owner}


def builds(servers: Iterable[Server]) -> dict[str, dict[str, list[str]]]:
    """Return the models of which live servers have different builds: for each digest, who has it."""
    found: dict[str, dict[str, list[str]]] = {}
    for server in servers:
        if server.is_alive:
            for name, record in server.models.items():
                if record.available is not None and record.available.digest:
                    found.setdefault(name, {}).setdefault(record.available.digest, []).append(server.name)
    return {name: digests for name, digests in sorted(found.items()) if len(digests) > 1}


def same_build(holders: Iterable[Server], model: str) -> list[Server]:
    """Return those of the servers that have one build of a model: what most of them have; of as many, the newest."""
    found: dict[str, list[Server]] = {}
    newest: dict[str, tuple[float, str, str, str]] = {}
    for server in holders:
        info = server.models[model].available
        if info is not None and info.digest:
            found.setdefault(info.digest, []).append(server)
            newest[info.digest] = max(newest.get(info.digest, _NO_AGE), _age_key(info))
    return max(found.items(), key=lambda item: (len(item[1]), newest[item[0]]), default=("", []))[1]


_NO_AGE = (0.0, "", "", "")


def _age_key(info: ModelInfo) -> tuple[float, str, str, str]:
    return _timestamp(info.modified_at), info.name, info.digest, info.entry


def _timestamp(text: str) -> float:
    """Return the time of an RFC 3339 text, s; UTC when it names no zone, 0.0 for what is none."""
    try:
        parsed = datetime.fromisoformat(text)
        return (parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def ps_json(servers: Iterable[Server], may: May = _every, aliases: Iterable[Alias] = ()) -> bytes:  # noqa: ARG001
    """Return the answer to `GET /api/ps`: every loaded model of a live server, once, under its own name."""
    entries: dict[str, str] = {}
    for server in servers:
        if server.is_alive:
            for name, record in server.models.items():
                if record.active is not None:
                    entries[name] = max(entries.get(name, ""), record.active.entry)
    return _models(entries[name] for name in sorted(entries) if may(name))


def _models(entries: Iterable[str]) -> bytes:
    return ('{"models":[' + ",".join(entries) + "]}").encode()


def version_key(version: str) -> tuple[tuple[int, ...], bool, str]:
    """Return what versions are compared by: their numbers, a release above its pre-releases."""
    core, dash, pre = version.partition("-")
    return tuple(int(n) for n in _NUMBERS.findall(core)), not dash, pre


def highest_version(servers: Iterable[Server]) -> str | None:
    """Return the highest version among live servers, None when none is alive."""
    return max((s.version for s in servers if s.is_alive and s.version), key=version_key, default=None)


def known_names(infos: Iterable[ModelInfo]) -> dict[str, ModelInfo]:
    """Return models by their canonical names."""
    return {canonical_model(info.name): info for info in infos}
