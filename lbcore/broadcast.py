"""Requests for several servers because all of them are meant: merged answers, unloads, loads of what is placed."""

from __future__ import annotations

from collections.abc import Sequence

from lbcore import aliases, race, selection
from lbcore.commands import AttemptKind, Command, Decision, EndMerge, StartMerge
from lbcore.config import Strategy
from lbcore.events import Reason
from lbcore.fleet import Fleet
from lbcore.ledger import Ledger
from lbcore.ollama import RequestKind, find_route
from lbcore.placement import Placement
from lbcore.provision import Provision
from lbcore.records import Request, Server
from lbcore.states import RequestInput


class Broadcast:
    """Starts such requests, and ends those whose answer is merged. Owned by the balancer."""

    def __init__(
        self, fleet: Fleet, ledger: Ledger, placement: Placement, provision: Provision, out: list[Command]
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._placement = placement
        self._provision = provision
        self._out = out

    def concerned(self, request: Request, now_ns: int) -> list[Server] | None:
        """Return the live servers that a broadcast is for; None: whoever can do it, since there are none of that kind.

        What brings a declared model to servers is for those that it is placed on, and for no other.
        """
        if not (request.event.servers or find_route(request.event.route).needs_model):
            placed = self._provision.placed(request.model, now_ns)
            if placed is not None:
                return placed
        return self._placement.concerned(request) or None

    def merge(self, request: Request, servers: Sequence[Server], now_ns: int) -> None:
        """Ask servers whose answers make one."""
        request.merged = True
        self._out.append(StartMerge(request.id, tuple([server.id for server in servers])))
        self._ask(request, servers, Strategy.BROADCAST, now_ns)

    def settle(self, request: Request, now_ns: int) -> None:
        """End a merged request of which all attempts have ended."""
        if request.live_attempts:
            return
        self._out.append(EndMerge(request.id))
        n_all, failures = len(request.attempts), request.failures
        n_lacking = sum(failure.reason is Reason.MODEL_NOT_FOUND for failure in failures)
        if len(failures) < n_all and n_lacking == len(failures):
            where = f"on all {n_all} servers" if not n_lacking else f"on {n_all - n_lacking} servers, which had it"
            self._ledger.end(request, RequestInput.FINISH, Decision.FINISHED, where, now_ns)
            return
        refused = all(400 <= failure.status < 500 for failure in failures)  # such as for what is not there
        if refused and (len(failures) == n_all or request.kind is RequestKind.GENERATE):
            why = f"passed on as it was: {race.failures_in_words(failures)}"
            self._ledger.end(request, RequestInput.FINISH, Decision.FINISHED, why, now_ns)
            return
        why = f"failed on {len(failures)} of {n_all} servers: {race.failures_in_words(failures)}"
        self._ledger.end(request, RequestInput.FAIL, Decision.FAILED, why, now_ns)

    def unload(self, request: Request, now_ns: int) -> bool:
        """Send an unload to every server that has the model loaded; False when none has."""
        model = request.model or ""
        names = request.event.servers
        loaded = [
            s
            for s in self._fleet
            if s.is_alive and model in s.models and s.models[model].loaded and (not names or s.name in names)
        ]
        self._ask(request, loaded, "unload wherever it is loaded", now_ns)
        return bool(loaded)

    def load(self, request: Request, now_ns: int) -> bool:
        """Send a load to every server that the model is placed on; False when it is declared for none, or for one."""
        placed = [s for s in self._provision.placed(request.model, now_ns) or () if s.has(request.model or "")]
        with_room = selection.with_room(placed, request)
        if len(with_room) < 2:
            return False
        self._ask(request, with_room, "load wherever it is placed", now_ns)
        return True

    def _ask(self, request: Request, servers: Sequence[Server], why: str, now_ns: int) -> None:
        for server in servers:
            self._ledger.start(request, server, AttemptKind.PRIMARY, now_ns)
        if servers:
            names = tuple([server.name for server in servers])
            self._ledger.record(Decision.STARTED, request, aliases.words(request, why), names=names)
