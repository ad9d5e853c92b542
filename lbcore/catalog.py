"""The models of the fleet as one Ollama would list them, from what the last probes said (pure).

Entries are relayed as the servers wrote them. Of a model that several servers have, the entry changed last is listed;
so the merge does not depend on the order of the servers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime

from lbcore.events import ModelInfo
from lbcore.ollama import canonical_model
from lbcore.records import Server

_NUMBERS = re.compile(r"\d{1,18}")  # a longer one is compared in parts: Python reads none of thousands of digits


def tags_json(servers: Iterable[Server]) -> bytes:
    """Return the answer to `GET /api/tags`: every model of a live server, changed last first, as Ollama does."""
    newest: dict[str, ModelInfo] = {}
    for server in servers:
        if server.is_alive:
            for name, record in server.models.items():
                info = record.available
                if info is not None and (name not in newest or _age_key(info) > _age_key(newest[name])):
                    newest[name] = info
    ordered = sorted(newest.values(), key=_age_key, reverse=True)
    return _models(info.entry for info in ordered)


def _age_key(info: ModelInfo) -> tuple[float, str, str, str]:
    return _timestamp(info.modified_at), info.name, info.digest, info.entry


def _timestamp(text: str) -> float:
    """Return the time of an RFC 3339 text, s; UTC when it names no zone, 0.0 for what is none."""
    try:
        parsed = datetime.fromisoformat(text)
        return (parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def ps_json(servers: Iterable[Server]) -> bytes:
    """Return the answer to `GET /api/ps`: every loaded model of a live server, once."""
    entries: dict[str, str] = {}
    for server in servers:
        if server.is_alive:
            for name, record in server.models.items():
                if record.active is not None:
                    entries[name] = max(entries.get(name, ""), record.active.entry)
    return _models(entries[name] for name in sorted(entries))


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
