"""What can be told of a request by its head alone: found once for each distinct head, and kept with that."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lbcore.ollama import Route, Shape
from lbcore.requests import PIN_HEADER
from lbio.access.cors import Verdict
from lbio.answers.local import LocalAnswer
from lbio.http1 import RequestHead

if TYPE_CHECKING:
    from lbio.answers.own import Ask

Stage = Callable[["Ask"], Awaitable[LocalAnswer | None]]
"""Returns an answer of our own, None if it has none."""

PARTS_MAX = 8
"""Heads that servers get, kept with the one that they were made of: for so many clients, or lengths of a body."""

_PIN = PIN_HEADER.encode().lower()


@dataclass(frozen=True, slots=True)
class View:
    """An answer made of the catalog, as it was written: good for as long as that and its `Date` are the same."""

    version: int  # of the catalog
    second: int  # of the clock
    data: bytes


@dataclass(slots=True)
class Known:
    """One head's facts, to one front."""

    route: Route
    shape: Shape
    verdict: Verdict
    stages: tuple[Stage, ...]  # that may have an answer of our own
    uploads: bool  # the body is passed on as it comes
    pinned: tuple[str, ...] | None  # the servers that the client names, perhaps in vain; None: it leaves that to us
    content_type: bytes
    head_parts: dict[Any, tuple[bytes, bytes]] = field(default_factory=dict)  # as servers get it
    view: View | None = None  # the answer given last, if it was made of the catalog

    def parts(self, key: object, make: Callable[[], tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
        """Return the parts of the head as servers get it, made when they are wanted for the first time."""
        found = self.head_parts.get(key)
        if found is None:
            if len(self.head_parts) >= PARTS_MAX:
                self.head_parts.clear()
            found = self.head_parts[key] = make()
        return found


def pinned(head: RequestHead) -> tuple[str, ...] | None:
    """Return the names of the servers that the client wants to be asked; None when it leaves that to us."""
    value = head.header(_PIN)
    if value is None:
        return None
    parts = value.decode(errors="replace").split(",")
    return tuple(dict.fromkeys(name for part in parts if (name := part.strip())))
