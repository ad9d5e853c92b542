"""Stories about the core, in the manner of mitmproxy's Playbook: `book >> event` tells it what happened, `book <<
command` asserts what it wants done: exactly that, in that order, and (checked at the next event) nothing else.

    book = fleet("a b")                         # two synced servers, "a" expected to be faster
    first, second = book.race(1)                # request 1 arrives; asserts the attempts that it starts
    book.after(50).token(second)                # connected, head, first token
    book << CommitAttempt(1, second.id) << lost(first)

`RecordDecision`s are skipped unless asked for: `book << decision(Decision.HEALTH, server="a")`. The state is audited
after every step. Time is virtual; `at` and `after` fire every timer that falls due on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NoReturn

from lbcore import events
from lbcore.balancer import LoadBalancer
from lbcore.commands import (
    AttemptKind,
    CancelAttempt,
    Command,
    Decision,
    RecordDecision,
    RejectRequest,
    StartAttempt,
    StartProbe,
)
from lbcore.config import (
    Config,
    HealthSettings,
    ProbeSettings,
    QueueSettings,
    RaceSettings,
    RetrySettings,
    RouteSettings,
    SelectionSettings,
    ServerSettings,
    TimeoutSettings,
)
from lbcore.errors import InvariantError
from lbcore.events import Event, Reason
from lbcore.invariants import Auditor
from lbcore.ollama import RequestKind, default_routes, find_route
from lbcore.records import Request, Server, ServerModel
from lbcore.schema import MS_NS, SECOND_NS

HOUR_NS = 3600 * SECOND_NS
MODEL = "m:latest"

_open_books: list[Playbook] = []


@dataclass(frozen=True)
class A:
    """An attempt that was started: its id, and the name of its server."""

    id: int
    server: str


@dataclass(frozen=True)
class DecisionPattern:
    """Matches a `RecordDecision` by the fields that are given; texts match anywhere within."""

    decision: Decision
    fields: tuple[tuple[str, Any], ...]

    def matches(self, record: RecordDecision) -> bool:
        """Tell whether `record` fits."""
        return record.decision is self.decision and all(self._fits(getattr(record, k), v) for k, v in self.fields)

    @staticmethod
    def _fits(value: Any, wanted: Any) -> bool:
        return wanted in value if isinstance(wanted, str) and isinstance(value, str) and wanted else value == wanted


@dataclass(frozen=True)
class RejectPattern:
    """Matches a `RejectRequest` by its status and parts of its message."""

    request_id: int
    status: int
    parts: tuple[str, ...]

    def matches(self, command: Command) -> bool:
        """Tell whether `command` fits."""
        return (
            isinstance(command, RejectRequest)
            and (command.request_id, command.status) == (self.request_id, self.status)
            and all(part in command.message for part in self.parts)
        )


Expected = Command | DecisionPattern | RejectPattern


def decision(kind: Decision, **fields: Any) -> DecisionPattern:
    """Expect a decision."""
    return DecisionPattern(kind, tuple(fields.items()))


def rejected(request_id: int, status: int, *parts: str) -> RejectPattern:
    """Expect an error of our own that says all of `parts`."""
    return RejectPattern(request_id, status, parts)


def lost(attempt: A) -> CancelAttempt:
    """Expect the cancellation of a loser."""
    return CancelAttempt(attempt.id, Reason.LOST_RACE)


def models(*names: str) -> tuple[events.ModelInfo, ...]:
    """Return models as `/api/tags` lists them."""
    return tuple(
        events.ModelInfo(name, f"sha-{name}", "2026-01-01T00:00:00Z", f'{{"name":"{name}"}}') for name in names
    )


def loaded(*names: str) -> tuple[events.ActiveModel, ...]:
    """Return models as `/api/ps` lists them."""
    return tuple(events.ActiveModel(name, f'{{"name":"{name}"}}') for name in names)


def arrival(
    request_id: int,
    model: str | None = "m",
    *,
    route: str = "/api/chat",
    kind: RequestKind = RequestKind.GENERATE,
    stream: bool = True,
    runner_key: str = "",
    servers: tuple[str, ...] = (),
) -> events.RequestArrived:
    """Return the arrival of a request, a streamed chat unless said otherwise."""
    generates = find_route(route).generates
    return events.RequestArrived(request_id, route, model, kind, stream, generates, runner_key, servers)


def many(route: str = "/api/chat", /, **fields: Any) -> dict[str, RouteSettings]:
    """Return the default routes with some settings of one changed."""
    routes = default_routes(fields.pop("race", RaceSettings()))
    before = {name: getattr(routes[route], name) for name in RouteSettings.__dataclass_fields__}
    return {**routes, route: RouteSettings(**{**before, **fields})}


def _shown(thing: object) -> str:
    """Return an event or command on one line, without what it does not say."""
    if isinstance(thing, RecordDecision):
        said = {name: value for name, value in thing._asdict().items() if value and name != "decision"}
        return f"({thing.decision}: {', '.join(f'{name}={value}' for name, value in said.items())})"
    if isinstance(thing, events.ModelsSynced):
        have, active = ([model.name for model in some] for some in (thing.available, thing.active))
        return f"ModelsSynced(server_id={thing.server_id}, probe_id={thing.probe_id}, {have}, loaded {active})"
    return re.sub(r"<(\w+\.\w+): .*?>", r"\1", str(thing))


class Playbook:
    """One balancer and the story told to it so far."""

    def __init__(self, names: str = "", *, seed: int = 1, **sections: Any) -> None:
        servers = tuple(self.settings(name, **sections.pop(name, {})) for name in names.split())
        race = sections.setdefault("race", RaceSettings())
        sections.setdefault("routes", default_routes(race))
        # probes only when there is a reason: a story about something else need not tell of them
        sections.setdefault(
            "probe", ProbeSettings(interval_ns=HOUR_NS, interval_dead_ns=HOUR_NS, interval_dead_max_ns=HOUR_NS)
        )
        sections.setdefault("health", HealthSettings(resurrect=0.0))
        self.config = Config(servers=servers, **sections)
        self.balancer = LoadBalancer(self.config, Random(seed))
        self.now_ns = 0
        self._auditor = Auditor(self.balancer)
        self._story: list[str] = []
        self._pending: list[Command] = []
        self._decisions: list[RecordDecision] = []
        _open_books.append(self)

    @staticmethod
    def settings(name: str, **fields: Any) -> ServerSettings:
        """Return the settings of a server."""
        return ServerSettings(url=f"http://{name}:11434", name=name, **fields)

    # --- the language ----------------------------------------------------------------------------------------

    def __rshift__(self, event: Event) -> Playbook:
        """Tell what happened. Commands that were not expected by now fail."""
        self.done()
        self._story.append(f"{self._clock()}  >> {_shown(event)}")
        self._step(self.balancer.handle(event, self.now_ns))
        return self

    def __lshift__(self, expected: Expected) -> Playbook:
        """Assert the next command, or one decision of the last step."""
        if isinstance(expected, DecisionPattern):
            found = next((record for record in self._decisions if expected.matches(record)), None)
            if found is None:
                self._fail(expected, self._decisions)
            self._decisions.remove(found)
            return self
        if not self._pending or not self._equal(expected, self._pending[0]):
            self._fail(expected, self._pending)
        self._pending.pop(0)
        return self

    def at(self, ms: float) -> Playbook:
        """Go to a time, firing the timers that fall due on the way."""
        self.done()
        target_ns = int(ms * MS_NS)
        assert target_ns >= self.now_ns, "time does not run backwards"
        for _ in range(100_000):
            due_ns = self.balancer.next_deadline()
            if due_ns is None or due_ns > target_ns:
                break
            self._fire(max(due_ns, self.now_ns))
        else:
            self._fail(f"that time goes on to {ms} ms", self._pending)
        self.now_ns = target_ns
        return self

    def after(self, ms: float) -> Playbook:
        """Let time pass, firing the timers that fall due on the way."""
        return self.at(self.now_ns / MS_NS + ms)

    def timeout(self) -> Playbook:
        """Go to the next deadline, and fire it."""
        self.done()
        due_ns = self.balancer.next_deadline()
        assert due_ns is not None, "nothing is due, ever"
        self._fire(max(due_ns, self.now_ns))
        return self

    def done(self) -> Playbook:
        """Assert that no command is left that was not expected."""
        if self._pending:
            self._fail("no (more) commands", self._pending)
        self._decisions.clear()
        return self

    def skip(self) -> list[Command]:
        """Take the commands of the last step as they are."""
        pending, self._pending = self._pending, []
        return pending

    # --- sentences that are told often -----------------------------------------------------------------------

    def started(self, request_id: int, kind: AttemptKind = AttemptKind.PRIMARY, server: str | None = None) -> A:
        """Assert that the next command starts an attempt of this kind (on this server); return it."""
        command = self._pending[0] if self._pending else None
        wanted = f"StartAttempt of {request_id}, {kind}" + (f", on {server}" if server else "")
        if not isinstance(command, StartAttempt) or (command.request_id, command.kind) != (request_id, kind):
            self._fail(wanted, self._pending)
        name = self.balancer.fleet.servers[command.server_id].name
        if server is not None and name != server:
            self._fail(wanted, self._pending)
        self._pending.pop(0)
        return A(command.attempt_id, name)

    def race(self, request_id: int, **fields: Any) -> list[A]:
        """Tell of an arrival, and return the attempts that it starts; no other command may come."""
        self >> arrival(request_id, **fields)
        chosen = [self.started(request_id)] if self._pending else []
        while self._pending:
            chosen.append(self.started(request_id, AttemptKind.RACER))
        return chosen

    def alone(self, request_id: int, server: str | None = None, **fields: Any) -> A:
        """Tell of an arrival that starts one attempt, on `server`."""
        self >> arrival(request_id, **fields)
        attempt = self.started(request_id, AttemptKind.PRIMARY, server)
        self.done()
        return attempt

    def head(self, *attempts: A) -> Playbook:
        """Tell that attempts were accepted and answer with a good head."""
        for attempt in attempts:
            self >> events.AttemptConnected(attempt.id) >> events.HeadReceived(attempt.id, 200)
        return self.done()

    def token(self, attempt: A) -> Playbook:
        """Tell of an attempt's connection, head and first token; what follows from that is to be asserted."""
        return self.head(attempt) >> events.FirstTokenReceived(attempt.id)

    def tokens(self, attempt: A, n: int) -> Playbook:
        """Tell of a piece of an answer."""
        self._story.append(f"{self._clock()}  >> {n} tokens of {attempt}")
        self.balancer.note_chunk(attempt.id, 100 * n, n, self.now_ns)
        return self

    def failed(self, attempt: A, reason: Reason, status: int = 0, *, answered: bool | None = None) -> Playbook:
        """Tell that an attempt failed."""
        held = status >= 400 if answered is None else answered
        return self >> events.AttemptFailed(attempt.id, reason, status, answered=held)

    def ends(self, attempt: A) -> Playbook:
        """Tell that an answer ended well."""
        return self >> events.StreamEnded(attempt.id)

    def sync(self, name: str, have: str = "m", active: str = "m") -> Playbook:
        """Tell that the probe under way of a server ended well; any probe that was asked for may be pending."""
        server = self.server(name)
        self._pending = [c for c in self._pending if not (isinstance(c, StartProbe) and c.server_id == server.id)]
        probe_id = server.probe_id
        assert probe_id, f"no probe of {name} is under way"
        self >> events.ProbeCompleted(server.id, probe_id, version="0.9.0")
        return self >> events.ModelsSynced(server.id, probe_id, models(*have.split()), loaded(*active.split()))

    def probe_failed(self, name: str, reason: Reason = Reason.CONNECT_REFUSED) -> Playbook:
        """Tell that the probe under way of a server failed; the command that asked for it may be pending."""
        server = self.server(name)
        self._pending = [c for c in self._pending if not (isinstance(c, StartProbe) and c.server_id == server.id)]
        assert server.probe_id, f"no probe of {name} is under way"
        return self >> events.ProbeCompleted(server.id, server.probe_id, reason)

    # --- what can be seen ------------------------------------------------------------------------------------

    def server(self, name: str) -> Server:
        """Return a server's record."""
        server = self.balancer.fleet.by_name(name)
        assert server is not None, name
        return server

    def doubt(self, name: str) -> None:
        """Doubt a server, as after many lost races."""
        self.balancer.fleet.set_doubted(self.server(name), doubted=True)

    def model(self, name: str, model: str = MODEL) -> ServerModel:
        """Return the record of a model on a server."""
        return self.server(name).models[model]

    def request(self, request_id: int) -> Request:
        """Return the record of a request under way."""
        return self.balancer.ledger.requests[request_id]

    def outcome(self, request_id: int) -> Decision | None:
        """Return how a request has ended."""
        return self._auditor.ended.get(request_id)

    def probed(self, name: str) -> StartProbe:
        """Return the command that has started the probe under way."""
        server = self.server(name)
        return StartProbe(server.id, server.probe_id)

    # --- inside ----------------------------------------------------------------------------------------------

    def _fire(self, now_ns: int) -> None:
        self.now_ns = now_ns
        self._story.append(f"{self._clock()}  (timeout)")
        self._step(self.balancer.handle_timeout(now_ns))

    def _step(self, commands: Sequence[Command]) -> None:
        self._story += [f"{'':12}<< {_shown(command)}" for command in commands]
        self._decisions += [c for c in commands if isinstance(c, RecordDecision)]
        self._pending += [c for c in commands if not isinstance(c, RecordDecision)]
        try:
            self._auditor.check(commands, self.now_ns)
        except InvariantError as error:
            raise AssertionError(f"{self._told()}\n--> the audit fails: {error}") from None

    @staticmethod
    def _equal(expected: Command | RejectPattern, command: Command) -> bool:
        return expected.matches(command) if isinstance(expected, RejectPattern) else expected == command

    def _clock(self) -> str:
        return f"{self.now_ns / MS_NS:8.0f} ms"

    def _told(self) -> str:
        return "\n".join(["the story so far:", *self._story, f"{'':12}{self.balancer!r}"])

    def _fail(self, expected: object, got: Iterable[object]) -> NoReturn:
        found = "\n".join(f"    got      << {_shown(command)}" for command in got) or "    got      nothing (more)"
        raise AssertionError(f"{self._told()}\n--> expected << {expected}\n{found}")


def open_books() -> list[Playbook]:
    """Return the books opened since the last call; a fixture checks that each was read to its end."""
    books = _open_books[:]
    _open_books.clear()
    return books


def fleet(names: str = "a b", *, have: str = "m", active: str = "m", factor: int = 4, **sections: Any) -> Playbook:
    """Return a synced fleet: every server has the models `have` on disk and `active` loaded.

    The first is known to be the fastest (100 ms), the next is `factor` times slower, and so on, so that who is asked
    first is not left to chance; 0: nothing is known of them.
    """
    book = Playbook(names, **sections)
    book.timeout().skip()
    for i, name in enumerate(names.split()):
        book.sync(name, have, active)
        for model in active.split() if factor else ():
            book.model(name, f"{model}:latest").note_first_token(100 * MS_NS * factor**i, 0)
    return book.done()


__all__ = [
    "HOUR_NS",
    "MODEL",
    "A",
    "HealthSettings",
    "Playbook",
    "ProbeSettings",
    "QueueSettings",
    "RaceSettings",
    "RetrySettings",
    "RouteSettings",
    "SelectionSettings",
    "TimeoutSettings",
    "arrival",
    "decision",
    "fleet",
    "loaded",
    "lost",
    "many",
    "models",
    "open_books",
    "rejected",
]
