"""Who has which model, kept until the catalog changes; and of many servers, in which order they are to be asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from lbcore.config import SelectionSettings
from lbcore.records import Request, Server
from lbcore.standing import Among, Standing

FEW = 16  # not Final, so that tests can change it where the core is compiled
"""So many servers are looked at one by one for each request; of more, their order is kept (`lbcore.standing`)."""

_POOLS_MAX: Final = 1024
_STANDINGS_MAX: Final = 64


class Holders:
    """The live servers that have a model, their records of it, and what follows from both until the catalog changes."""

    __slots__ = ("are_many", "in_flight_max", "records", "servers", "slots", "standings")

    def __init__(self, servers: list[Server], model: str | None) -> None:
        self.servers = servers
        self.records = [server.models[model] for server in servers] if model is not None else []
        self.slots = sum(s.slots for s, record in zip(servers, self.records, strict=False) if record.loaded)
        """Of those that have it loaded."""
        self.in_flight_max = min((server.in_flight_max for server in servers), default=0)
        """What each of them may be sent at least."""
        self.are_many = len(servers) > FEW
        self.standings: dict[str | None, Standing] = {}
        """Of many, by runner key."""

    def with_room(self) -> list[Server]:
        """Return those that may be sent one more request for the model: mostly all of them."""
        records = self.records
        if not records or max([record.in_flight for record in records]) < self.in_flight_max:
            return self.servers
        pairs = zip(self.servers, records, strict=True)
        return [server for server, record in pairs if record.in_flight < server.in_flight_max]


class Pools:
    """The holders of each model that was asked for. A cache of what the servers say, who has to tell it of changes."""

    def __init__(self, servers: Mapping[int, Server], settings: SelectionSettings) -> None:
        self._servers = servers
        self._settings = settings
        self._holders: dict[str | None, Holders] = {}
        self._standings: list[Standing] = []  # those of the above
        self.touched: dict[int, Server] = {}
        """Servers that something has happened to which their order depends on, since that was last looked at."""
        self.moved: dict[int, Server] = {}
        """Servers of which no more has changed than what is in flight there, and their health."""

    def forget(self) -> None:
        """Forget all, since a server has died, is back, or has other models."""
        self._holders.clear()
        self._standings.clear()

    def pool(self, model: str | None) -> Holders:
        """Return the live servers that have a model (None: all that are alive), and what else follows."""
        known = self._holders.get(model)
        if known is None:
            if len(self._holders) >= _POOLS_MAX:  # names come from clients
                self.forget()
            servers = [s for s in self._servers.values() if s.is_alive and (model is None or s.has(model))]
            known = self._holders[model] = Holders(servers, model)
        return known

    def among(self, request: Request, now_ns: int, tried: Sequence[Server] = ()) -> Among:
        """Return those of many servers that have what a request needs and room for it, but for those tried."""
        if self.touched or self.moved:
            for standing in self._standings:
                standing.note(self.touched, self.moved)
            self.touched.clear()
            self.moved.clear()
        return Among(self.standing(request), now_ns, tried)

    def standing(self, request: Request) -> Standing:
        """Return the order of those that have what a request needs, as it was when it was last settled."""
        holders = self.pool(request.model)
        runner_key = request.runner_key if request.generates and request.model is not None else None
        known = holders.standings.get(runner_key)
        if known is None:
            if len(self._standings) >= _STANDINGS_MAX:  # runner keys come from clients too
                self.forget()
                holders = self.pool(request.model)
            known = Standing(holders.servers, holders.records, runner_key, self._settings)
            holders.standings[runner_key] = known
            self._standings.append(known)
        return known

    def out_of_date(self, now_ns: int) -> Iterator[str]:
        """Yield which orders are not what they would be if they were made now, for an audit."""
        for model, holders in self._holders.items():
            for runner_key, kept in holders.standings.items():
                kept.note(self.touched, self.moved)
                made = Standing(holders.servers, holders.records, runner_key, self._settings)
                if kept.as_told(now_ns) != made.as_told(now_ns):
                    yield f"the order of the holders of {model} ({runner_key!r}) is out of date"
