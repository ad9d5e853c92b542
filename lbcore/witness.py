"""Stands in for a balancer and sees every call of it, with what came of it, so that the calls can be made again (pure).

`note_chunk` and `note_paused` are no calls of their own: they are summed for each attempt, and seen before the first
call in which the core may look at them, no sooner. That is a call about their request, one about a timer of it, or news
of the server, on which the core looks at who waits for a model to be loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from lbcore import events
from lbcore.balancer import LoadBalancer
from lbcore.commands import Command
from lbcore.compiling import mypyc_attr
from lbcore.events import Event
from lbcore.loglines import EVENT_CODES, Chunks, Raised
from lbcore.records import Request
from lbcore.timers import TimerKind

_OF_SERVERS: Final = (events.ProbeCompleted, events.ModelsSynced)
_OF_REQUESTS: Final = (TimerKind.HEDGE, TimerKind.MEASURE)
_NO_CHUNKS: Final[Chunks] = ()


@mypyc_attr(allow_interpreted_subclasses=True)
class Witness(LoadBalancer):
    """A balancer, or another witness, with somebody who looks on: `note` gets each call.

    A `handle_timeout` that has nothing to do is none.
    """

    def __init__(self, balancer: LoadBalancer) -> None:  # the parts are those of the balancer, not new ones
        self.config = balancer.config
        self.timers = balancer.timers
        self.fleet = balancer.fleet
        self.ledger = balancer.ledger
        self.placement = balancer.placement
        self.provision = balancer.provision
        self.next_deadline = balancer.next_deadline
        self.balancer = balancer
        self._handle = balancer.handle
        self.plain: LoadBalancer = balancer.plain if isinstance(balancer, Witness) else balancer
        self._pending: dict[int, list[Any]] = {}  # attempt: bytes, tokens, time of the last, paused

    def note(self, event: Event | None, outcome: list[Command] | Raised, now_ns: int, chunks: Chunks) -> None:
        """Take a call: its event (None for `handle_timeout`), what came of it, and the chunks before it."""
        raise NotImplementedError

    def arriving(self, now_ns: int) -> None:
        """Look at the state before a request comes."""

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """As `LoadBalancer.handle`."""
        kind, chunks = type(event), _NO_CHUNKS
        if kind is events.RequestArrived:
            self.arriving(now_ns)
        elif kind not in EVENT_CODES:
            return self.balancer.handle(event, now_ns)  # which refuses it
        elif self._pending:
            chunks = self._chunks_seen_by(event)
        try:
            outcome = self._handle(event, now_ns)
        except Exception as error:
            self.note(event, type(error).__name__, now_ns, chunks)
            raise
        self.note(event, outcome, now_ns, chunks)
        return outcome

    def handle_timeout(self, now_ns: int) -> list[Command]:
        """As `LoadBalancer.handle_timeout`."""
        due_ns = self.next_deadline()
        if due_ns is None or due_ns > now_ns:
            return self.balancer.handle_timeout(now_ns)
        chunks = self._chunks_seen_at(now_ns) if self._pending else _NO_CHUNKS
        try:
            outcome = self.balancer.handle_timeout(now_ns)
        except Exception as error:
            self.note(None, type(error).__name__, now_ns, chunks)
            raise
        self.note(None, outcome, now_ns, chunks)
        return outcome

    def note_chunk(self, attempt_id: int, n_bytes: int, n_tokens: int, now_ns: int) -> None:
        """As `LoadBalancer.note_chunk`."""
        pending = self._pending.get(attempt_id)
        if pending is not None:
            pending[0] += n_bytes
            pending[1] += n_tokens
            pending[2] = now_ns
        elif attempt_id in self.ledger.attempts:
            self._pending[attempt_id] = [n_bytes, n_tokens, now_ns, None]
        self.balancer.note_chunk(attempt_id, n_bytes, n_tokens, now_ns)

    def note_paused(self, attempt_id: int, *, paused: bool, now_ns: int) -> None:
        """As `LoadBalancer.note_paused`."""
        if attempt_id in self.ledger.attempts:
            pending = self._pending.setdefault(attempt_id, [0, 0, now_ns, None])
            pending[2:] = now_ns, paused
        self.balancer.note_paused(attempt_id, paused=paused, now_ns=now_ns)

    # --- which chunks a call may look at -------------------------------------------------------------------

    def _all_chunks(self) -> Chunks:
        return self._take(list(self._pending))

    def _take(self, attempt_ids: Iterable[int]) -> Chunks:
        taken = [(attempt_id, self._pending.pop(attempt_id, None)) for attempt_id in attempt_ids]
        return [(attempt_id, *pending) for attempt_id, pending in taken if pending is not None]

    def _chunks_seen_by(self, event: Event) -> Chunks:
        attempt_id = getattr(event, "attempt_id", None)
        if attempt_id is not None:
            attempt = self.ledger.attempts.get(attempt_id)
            return _NO_CHUNKS if attempt is None else self._of_request(attempt.request)  # None: it comes late
        if isinstance(event, events.DownstreamClosed):
            return self._of_request(self.ledger.requests.get(event.request_id))
        return self._on_server(event.server_id) if isinstance(event, _OF_SERVERS) else self._all_chunks()

    def _of_request(self, request: Request | None) -> Chunks:
        return _NO_CHUNKS if request is None else self._take([attempt.id for attempt in request.attempts])

    def _on_server(self, server_id: int) -> Chunks:
        attempts = self.ledger.attempts
        there = [i for i in self._pending if (a := attempts.get(i)) is not None and a.server.id == server_id]
        return self._take(there)

    def _chunks_seen_at(self, now_ns: int) -> Chunks:
        chunks: list[Any] = []
        for kind, owner_id in self.timers.due(now_ns):
            if kind is TimerKind.PROBE:
                chunks += self._on_server(owner_id)
            elif kind is TimerKind.ATTEMPT:
                attempt = self.ledger.attempts.get(owner_id)
                chunks += self._of_request(None if attempt is None else attempt.request)
            elif kind in _OF_REQUESTS:
                chunks += self._of_request(self.ledger.requests.get(owner_id))
        return chunks
