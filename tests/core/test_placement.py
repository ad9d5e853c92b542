"""Where attempts go is a part that can be replaced."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from lbcore import events
from lbcore.balancer import LoadBalancer
from lbcore.commands import StartAttempt
from lbcore.config import Config, RaceSettings, ServerSettings
from lbcore.ollama import default_routes
from lbcore.placement import Placement
from lbcore.records import Request, Server


class LastFirst(Placement):
    """Asks the server that was named last."""

    def order(self, candidates: Sequence[Server], request: Request, now_ns: int) -> list[Server]:
        return sorted(candidates, key=lambda server: -server.id)


def test_a_placement_that_overrides_the_order_decides_who_is_asked() -> None:
    race = RaceSettings(racers_min=2, racers_max=2)
    servers = tuple(ServerSettings(url=f"http://{name}:1", name=name) for name in "abc")
    balancer = LoadBalancer(Config(servers=servers, race=race, routes=default_routes(race)), Random(1), LastFirst)
    balancer.handle_timeout(0)
    on_disk = (events.ModelInfo("m", "sha", "2026-01-01T00:00:00Z", "{}"),)
    for server in list(balancer.fleet):
        balancer.handle(events.ProbeCompleted(server.id, server.probe_id, version="0.9.0"), 0)
        balancer.handle(events.ModelsSynced(server.id, server.last_probe_id, on_disk), 0)
    commands = balancer.handle(events.RequestArrived(1, "/api/chat", "m", stream=True, generates=True), 0)
    assert [c.server_id for c in commands if isinstance(c, StartAttempt)] == [3, 2]
