"""Where the attempts of a request go: first, beside it, after a hedge delay, after a failure.

Reads the fleet and changes none of it; what it keeps are its random generators and the race budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from lbcore import selection
from lbcore.admission import RaceBudget
from lbcore.compiling import mypyc_attr
from lbcore.config import Config, Strategy
from lbcore.events import Reason
from lbcore.fleet import Fleet
from lbcore.ollama import RequestKind, find_route
from lbcore.records import Request, Server
from lbcore.standing import Among
from lbcore.states import Reliability, ServerState

_MANY: Final = frozenset({Strategy.RACE, Strategy.HEDGE})
_GENERATE: Final = RequestKind.GENERATE  # bound once: a look-up in the enum's class costs more than what it is used for
_RELIABLE: Final = Reliability.RELIABLE


@mypyc_attr(allow_interpreted_subclasses=True)
class Placement:
    """Chooses servers for attempts."""

    def __init__(self, config: Config, fleet: Fleet, rng: Random) -> None:
        self._config = config
        self._fleet = fleet
        self._rng = Random(rng.getrandbits(64))
        self._resurrect_rng = Random(rng.getrandbits(64))
        self._resurrect = config.health.resurrect
        self.race_budget = RaceBudget(config.race)

    def order(self, candidates: Sequence[Server], request: Request, now_ns: int) -> Sequence[Server]:
        """Return the candidates, the one to ask first in front."""
        if type(candidates) is Among:
            return candidates.order(self._rng)
        holders = self._fleet.pool(request.model)
        records = holders.records if candidates is holders.servers else None
        return selection.order(candidates, request, self._config, self._rng, now_ns, records)

    def holders(self, request: Request) -> list[Server]:
        """Return the live servers that have what the request needs; those that the client named, whatever they have."""
        names = request.event.servers
        if not names:
            return self._fleet.holders(request.model)
        return self._fleet.named(names, request.model)

    def concerned(self, request: Request) -> list[Server]:
        """Return all live servers that a broadcast goes to."""
        if request.event.servers:
            return self.holders(request)
        needs_model = find_route(request.event.route).needs_model
        return self._fleet.suspected(request.model) if needs_model else self._fleet.holders(None)

    def first(self, request: Request, candidates: Sequence[Server], now_ns: int) -> list[Server]:
        """Return who gets the request at once: the primary, then its racers."""
        ordered = self.order(candidates, request, now_ns)
        primary = ordered[0]
        route = request.route
        if request.kind is not _GENERATE or route.strategy not in _MANY:
            return [primary]
        extra = self._racers(request, ordered, now_ns) if route.racers_max > 1 else []
        if not extra and primary.doubted:
            extra = _companion(request, ordered)
        return [primary, *extra]

    def _racers(self, request: Request, ordered: Sequence[Server], now_ns: int) -> list[Server]:
        """Return the extra racers.

        `racers_min` whatever it costs; the rest only where the model is loaded and a slot is idle, while the model's
        slots are little used and the race budget lasts (design §5).
        """
        route, budget = request.route, self.race_budget
        n_min, n_max = route.racers_min, route.racers_max - 1
        limit = self._config.race.utilisation_max
        extra = list(ordered[1:n_min]) if n_min > 1 else []
        if self._resurrect_rng.random() < self._resurrect and len(extra) < n_max:
            extra += self._outcast(request, [ordered[0], *extra])
        if len(extra) < n_max and budget.credits >= 1.0 and self._is_used_at_most(limit, request):
            for i in range(n_min, len(ordered)):
                server = ordered[i]
                if _is_trusted_and_ready(server, request, now_ns) and server not in extra and budget.spend():
                    extra.append(server)
                    if len(extra) >= n_max or budget.credits < 1.0:
                        break
        return extra

    def _outcast(self, request: Request, chosen: Sequence[Server]) -> list[Server]:
        """Return a server that is dead or doubted, to find out whether it still is; it takes one racer's place."""
        model = request.model
        if request.event.servers or model is None:
            return []
        outcasts = [
            s
            for s in self._fleet.outcasts()
            if (record := s.models.get(model)) is not None
            and (record.in_flight < s.in_flight_max or not request.generates)
            and s.has(model)
            and s not in chosen
        ]
        if not outcasts or not self.race_budget.spend():
            return []
        return [outcasts[self._resurrect_rng.randrange(len(outcasts))]]

    def _is_used_at_most(self, limit: float, request: Request) -> bool:
        """Tell whether so small a share of the model's slots is in use on live servers that have it loaded.

        Of many servers, as it was when they were last looked at: for this request.
        """
        holders = self._fleet.pool(request.model)
        if not holders.slots:
            return True
        if holders.are_many and not request.event.servers:
            return self._fleet.pools.standing(request).in_slots / holders.slots <= limit
        if sum([record.in_flight for record in holders.records]) / holders.slots <= limit:
            return True  # even if each of them was in a slot
        pairs = zip(holders.servers, holders.records, strict=True)
        busy = sum(min(record.in_flight, server.slots) for server, record in pairs if record.loaded)
        return busy / holders.slots <= limit

    def hedge(self, request: Request, now_ns: int) -> Server | None:
        """Return one more server to ask.

        One without an idle slot, and outside the race budget, only when every server asked so far is dead, doubted or
        unreliable.
        """
        hopeless = all(is_in_doubt(attempt.server) for attempt in request.live_attempts)
        usable = self._untried(request, now_ns, ready_only=True)
        if not usable and hopeless:
            usable = self._untried(request, now_ns)
        if not usable or not (hopeless or self._may_hedge(request)):
            return None
        return self.order(usable, request, now_ns)[0]

    def _may_hedge(self, request: Request) -> bool:
        limit = self._config.race.hedge_utilisation_max
        return self._is_used_at_most(limit, request) and self.race_budget.spend()

    def _untried(self, request: Request, now_ns: int, *, ready_only: bool = False) -> Sequence[Server]:
        """Return who has what the request needs and room for it, and was not asked yet.

        `ready_only`: and would start at once, and is not passed over; of many, those may only be the first in order.
        """
        usable: list[Server]
        if not request.event.servers and self._fleet.pool(request.model).are_many:
            among = self._fleet.pools.among(request, now_ns, request.tried())
            if not ready_only or among.standing.begins_ready():
                return among
            usable = among.listed()
        else:
            usable = selection.with_room(selection.eligible(self.holders(request), request), request)
        if not ready_only:
            return usable
        return [s for s in usable if selection.is_ready(s, request) and not selection.is_passed_over(s, now_ns)]

    def next_after_failure(self, request: Request, now_ns: int) -> Server | None:
        """Return the next server that could answer, a full one or a dead one if there is no better."""
        holders = self.holders(request)
        usable = self._untried(request, now_ns) or selection.eligible(holders, request) or self.dead(request)
        if usable:
            return self.order(usable, request, now_ns)[0]
        lacks = request.failures and request.failures[-1].reason is Reason.MODEL_NOT_FOUND
        return None if lacks or holders or request.event.servers else self.anyone(request)

    def anyone(self, request: Request) -> Server | None:
        """Return a live server to ask for what nobody is known to have; None when all are full or were asked."""
        untried = selection.eligible(self._fleet.holders(None), request)
        usable = [server for server in untried if selection.has_room(server, request)]
        return min(usable, key=lambda server: (server.in_flight, server.id), default=None)

    def last_resort(self, request: Request, dead: list[Server], now_ns: int) -> Server | None:
        """Return a dead server to try, since nobody alive has what is needed; None when all of them are full."""
        with_room = selection.with_room(dead, request)
        return self.order(with_room, request, now_ns)[0] if with_room else None

    def dead(self, request: Request) -> list[Server]:
        """Return the dead servers that had what is needed when they were last read, and were not asked yet."""
        return [
            s
            for s in self._fleet
            if s.state is ServerState.DEAD
            and s.last_sync_ns is not None
            and not request.event.servers
            and not request.has_tried(s)
            and (request.model is None or s.has(request.model))
        ]


def is_in_doubt(server: Server) -> bool:
    """Tell whether an answer from the server should not be relied on: dead, doubted or unreliable."""
    return server.state is ServerState.DEAD or server.doubted or server.reliability is Reliability.UNRELIABLE


def _is_trusted_and_ready(server: Server, request: Request, now_ns: int) -> bool:
    if server.doubted or (server.reliability is not _RELIABLE and selection.is_passed_over(server, now_ns)):
        return False
    record = server.models.get(request.model or "")  # `selection.is_ready`: racers are for what generates
    return record is not None and record.in_flight < server.slots and record.is_warm(request.runner_key)


def _companion(request: Request, ordered: Sequence[Server]) -> list[Server]:
    """Return one more server, so that a doubted one is not alone."""
    ready = [server for server in ordered[1:] if selection.is_ready(server, request)]
    return ready[:1] or list(ordered[1:2])
