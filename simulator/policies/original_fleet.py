"""The original's servers and how it draws them; `simulator.policies.original` says what is known."""

from __future__ import annotations

from collections.abc import Sequence
from math import log

from lbcore import events
from lbcore.config import Strategy
from lbcore.fleet import Fleet
from lbcore.health import ALIVE_FROM
from lbcore.ollama import RequestKind
from lbcore.placement import Placement
from lbcore.records import Request, Server
from lbcore.states import Reliability, ServerState

_WEIGHT_MIN = 1e-6  # of a server that has never been alive


class OriginalFleet(Fleet):
    """Servers that are read on a fixed beat, each time with a clean slate."""

    def probe_now(self, server: Server, now_ns: int, *, changed: bool = False) -> None:
        """Do nothing: no event makes the original look at a server."""

    def sync(self, server: Server, now_ns: int) -> None:
        """Read a server now."""
        super().probe_now(server, now_ns)

    def on_probe_timer(self, server_id: int, now_ns: int) -> Server | None:
        """Read the server that is due, or give up the reading under way."""
        server = self.servers.get(server_id)
        if server is None or server.probe_id:
            return super().on_probe_timer(server_id, now_ns)
        self.sync(server, now_ns)
        return None

    def on_models_synced(self, event: events.ModelsSynced, now_ns: int) -> Server | None:
        """Take what a server holds, and forget its health (the defect)."""
        server = super().on_models_synced(event, now_ns)
        if server is not None:
            self._set_health(server, ALIVE_FROM, now_ns, "synced: whatever it was before")
        return server


class Draw(Placement):
    """A sample of servers, weighted by health."""

    def order(self, candidates: Sequence[Server], request: Request, now_ns: int) -> list[Server]:  # noqa: ARG002
        """Return the candidates as they are drawn; the unreliable ones last."""
        draw = self._rng.random
        keys = [
            (server.reliability is Reliability.UNRELIABLE, -log(1.0 - draw()) / (server.health or _WEIGHT_MIN), i)
            for i, server in enumerate(candidates)
        ]
        return [candidates[key[2]] for key in sorted(keys)]

    def first(self, request: Request, candidates: Sequence[Server], now_ns: int) -> list[Server]:
        """Return all that get the request."""
        ordered = self.order(candidates, request, now_ns)
        if not is_raced(request):
            return ordered[:1]
        route, model = request.route, request.model
        active = [s for s in ordered if model is None or s.models[model].loaded]
        chosen = active[: route.racers_max]
        chosen += [s for s in ordered if s not in active][: max(0, route.racers_min - len(chosen))]
        dead = [s for s in self._fleet if s.state is ServerState.DEAD and model is not None and s.has(model)]
        if self._resurrect_rng.random() < self._config.health.resurrect and dead:
            chosen[route.racers_max - 1 :] = [dead[self._resurrect_rng.randrange(len(dead))]]
        return chosen


def is_raced(request: Request) -> bool:
    """Tell whether a request goes to several servers."""
    return request.kind is RequestKind.GENERATE and request.route.strategy is Strategy.RACE
