"""Stories about policies: the playbook of the core, told to a balancer of any policy."""

from __future__ import annotations

from typing import Any

import pytest

from lbcore.commands import AttemptKind, StartAttempt
from lbcore.config import RouteSettings
from lbcore.records import Request
from lbcore.schema import MS_NS
from simulator.policies.known import policy
from tests import playbook
from tests.playbook import A, Playbook, arrival, fleet


class View:
    """A world of which everything is known in advance."""

    def __init__(self, first_ms: dict[str, int | None] | None = None) -> None:
        self.first_ms = first_ms or {}
        self.sessions: dict[int, int] = {}

    def session_of(self, request_id: int) -> int:
        return self.sessions.get(request_id, request_id)

    def first_token_ns(self, server_name: str, request_id: int, now_ns: int) -> int | None:
        delay_ms = self.first_ms.get(server_name, 100)
        return None if delay_ms is None else now_ns + delay_ms * MS_NS


def told(name: str, names: str = "a b c", *, world: View | None = None, factor: int = 0, **sections: Any) -> Playbook:
    """Open a book about a synced fleet under a policy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(playbook, "LoadBalancer", lambda config, rng: policy(name).build(config, rng, world or View()))
        return fleet(names, factor=factor, **sections)


def asked(book: Playbook, n: int, *, ends: bool = True, after_ms: float = 0) -> list[str]:
    """Tell of so many arrivals, one after the other, and return who was asked alone for each."""
    names = []
    for _ in range(n):
        attempt = book.alone(next_id(book))
        names.append(attempt.server)
        if ends:
            serve(book, attempt, after_ms)
    return names


def serve(book: Playbook, attempt: A, after_ms: float = 0) -> None:
    """Tell that an attempt gave its first token after so long, and ended at once."""
    book.after(after_ms).token(attempt).skip()
    book.ends(attempt).skip()


def started(book: Playbook) -> list[A]:
    """Return the attempts that the last step has started; whatever else it commands is left aside."""
    names = {server.id: server.name for server in book.balancer.fleet}
    return [A(c.attempt_id, names[c.server_id]) for c in book.skip() if isinstance(c, StartAttempt)]


def next_id(book: Playbook) -> int:
    """Return a request id that was not used yet."""
    book.last_id = getattr(book, "last_id", 0) + 1  # type: ignore[attr-defined]
    return int(book.last_id)  # type: ignore[attr-defined]


def busy(book: Playbook, **in_flight: int) -> None:
    """Put requests on servers, as if they had been placed there."""
    for name, n in in_flight.items():
        for _ in range(n):
            request = Request(arrival(next_id(book)), "m:latest", RouteSettings(), book.now_ns)
            book.balancer.ledger.requests[request.id] = request
            book.balancer.ledger.start(request, book.server(name), AttemptKind.PRIMARY, book.now_ns)
    book.balancer.handle_timeout(book.now_ns)
