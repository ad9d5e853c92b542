"""Answers to `/api/show` that are kept: what a model is does not change as long as its digest does not."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from lbcore.fleet import Fleet
from lbcore.ollama import canonical_model
from lbio.attempt import AttemptRun
from lbio.client import ClientStream
from lbio.exchange import Exchange
from lbio.relay import Core, Relay
from lbio.upstream import Answer

ANSWER_BYTES_MAX = 1 << 20
"""A larger answer (`"verbose": true` lists every token) is not kept."""
_BYTES_MAX = 16 << 20

Key = tuple[str, bytes]
"""The digest of the model, and the whole request body: all that an answer depends on."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An answer that a server gave."""

    server: str
    content_type: bytes
    body: bytes


class Shows:
    """The answers used last, within a bound of bytes."""

    def __init__(self, bytes_max: int = _BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._held = 0
        self._kept: OrderedDict[Key, Shown] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Shows {len(self._kept)} answers, {self._held} bytes>"

    @staticmethod
    def key(fleet: Fleet, model: str | None, body: bytes) -> Key | None:
        """Return what the answer depends on; None when servers have different builds, or may have changed."""
        if model is None:
            return None
        holders = fleet.holders(name := canonical_model(model))
        digests = {info.digest if (info := server.models[name].available) else "" for server in holders}
        if len(digests) != 1 or "" in digests or any(server.outdated for server in holders):
            return None
        return digests.pop(), body

    def get(self, key: Key) -> Shown | None:
        """Return the answer kept for a key."""
        shown = self._kept.get(key)
        if shown is not None:
            self._kept.move_to_end(key)
        return shown

    def put(self, key: Key, shown: Shown) -> None:
        """Keep an answer; those not used for longest make room."""
        if len(shown.body) > ANSWER_BYTES_MAX:
            return
        self._drop(key)
        self._kept[key] = shown
        self._held += _size(key, shown)
        while self._held > self._bytes_max:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        shown = self._kept.pop(key, None)
        if shown is not None:
            self._held -= _size(key, shown)


class ShowRelay(Relay):
    """Relays an answer to `/api/show` and keeps it, if it was a good one and came whole."""

    __slots__ = ("_body", "_key", "_shown", "_shows")
    is_verbatim = False

    def __init__(
        self,
        exchange: Exchange,
        run: AttemptRun,
        answer: Answer,
        client: ClientStream,
        core: Core,
        shows: Shows,
        key: Key,
    ) -> None:
        super().__init__(exchange, run, answer, client, core)
        self._shows = shows
        self._key = key
        self._body = bytearray()
        self._shown = Shown(run.endpoint.name, answer.head.header(b"content-type") or b"", b"")

    def _framed(self, payload: bytes) -> bytes:
        if len(self._body) <= ANSWER_BYTES_MAX:
            self._body += payload
        return super()._framed(payload)

    async def _end(self) -> bool:
        is_whole = await super()._end()
        head = self._answer.head
        is_plain = head.status == 200 and head.header(b"content-encoding") is None
        if is_whole and is_plain and self._exchange.aborted is None:
            self._shows.put(self._key, replace(self._shown, body=bytes(self._body)))
        return is_whole


def _size(key: Key, shown: Shown) -> int:
    return len(key[1]) + len(shown.body)
