"""Any number of things may happen, in any order: a state machine of hypothesis plays driver, clients and servers.

Its own model of the commands stands beside the audit of lbcore.invariants, so that neither has to be believed alone. At
the end of each run the world is healed: then everything must finish.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lbcore import commands as cmd
from lbcore import events
from lbcore.admission import RETRY_BURST
from lbcore.balancer import LoadBalancer
from lbcore.commands import AttemptKind, Decision
from lbcore.config import (
    Config,
    HealthSettings,
    Policy,
    ProbeSettings,
    QueueSettings,
    RaceSettings,
    RetrySettings,
    RouteSettings,
    SelectionSettings,
    ServerSettings,
    Strategy,
    Winner,
)
from lbcore.config_aliases import parse_aliases
from lbcore.events import Event, Reason
from lbcore.invariants import Auditor
from lbcore.ollama import RequestKind, find_route
from lbcore.records import Server
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.states import AttemptState, ServerState

MODELS = ("m", "n:7b", "registry.ollama.ai/library/m:latest", "unknown", "big")
CHAINS = {"big": ["nobodys", "n:7b", "m"], "m": ["m", "n:7b"]}
ON_DISK = ("m:latest", "n:7b")
ROUTES = {
    "/api/chat": Strategy.RACE,
    "/api/generate": Strategy.HEDGE,
    "/v1/messages": Strategy.SEQUENTIAL,
    "/api/show": Strategy.SEQUENTIAL,
    "/api/delete": Strategy.BROADCAST,
    "/api/pull": Strategy.BROADCAST,
}
PROBE = ProbeSettings(interval_ns=4 * SECOND_NS, interval_dead_ns=SECOND_NS, interval_dead_max_ns=8 * SECOND_NS)
SECOND_CHANCES = {Decision.FINISHED, Decision.FAILED}
OUTCOMES = SECOND_CHANCES | {Decision.REJECTED, Decision.ABORTED}
PROGRESS: dict[AttemptState, tuple[type[Event], ...]] = {
    AttemptState.CONNECTING: (events.AttemptConnected,),
    AttemptState.AWAITING_HEAD: (events.HeadReceived,),
    AttemptState.STREAMING: (events.FirstTokenReceived, events.StreamEnded, events.BufferFilled),
    AttemptState.COMMITTED: (events.StreamEnded,),
}
ANSWERS = (events.FirstTokenReceived, events.BufferFilled, events.StreamEnded)


def attempt_event(kind: type[Event], attempt_id: int) -> Event:
    """Return an event of an attempt that needs no more than its id."""
    if kind is events.HeadReceived:
        return events.HeadReceived(attempt_id, 200)
    assert kind in {e for es in PROGRESS.values() for e in es}
    return kind(attempt_id)  # type: ignore[call-arg,arg-type]


class Model:
    """What the commands so far mean, seen from the driver."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.outcome: dict[int, Decision] = {}
        self.answered: dict[int, cmd.Command] = {}  # the command that ended it for the client
        self.committed: dict[int, int] = {}
        self.merged: dict[int, tuple[int, ...]] = {}  # the servers whose answers make one
        self.running: dict[int, cmd.StartAttempt] = {}
        self.started: dict[int, cmd.StartAttempt] = {}
        self.used: dict[int, list[str]] = {}  # by request: the models that servers were to be asked for
        self.asked: set[tuple[int, int, int]] = set()  # request, how many models before, server
        self.whole_answers: set[int] = set()
        self.probes: dict[int, int] = {}
        self.gone: set[int] = set()
        self.cancels: Counter[int] = Counter()

    def take(self, command: cmd.Command) -> None:
        """Check and take one command."""
        match command:
            case cmd.StartAttempt(request_id, attempt_id, server_id):
                assert request_id in self.open
                assert request_id not in self.committed
                assert request_id not in self.answered
                assert attempt_id > max(self.started, default=0), "ids are not reused"
                assert server_id not in self.gone
                sent = request_id, len(self.used.get(request_id, ())), server_id
                assert sent not in self.asked
                self.asked.add(sent)
                self.running[attempt_id] = self.started[attempt_id] = command
            case cmd.UseModel(request_id, model):
                assert request_id in self.open
                assert request_id not in {a.request_id for a in self.running.values()}
                assert model not in self.used.setdefault(request_id, [])
                self.used[request_id].append(model)
            case cmd.CancelAttempt(attempt_id):
                self.cancels[attempt_id] += 1
                assert self.running.pop(attempt_id, None) is not None, f"{command}: not running"
                assert self.cancels[attempt_id] == 1
            case cmd.CommitAttempt(request_id, attempt_id):
                assert request_id in self.open
                assert request_id not in self.committed
                assert request_id not in self.answered
                assert self.started[attempt_id].request_id == request_id
                assert attempt_id not in self.cancels
                assert request_id not in self.merged
                self.committed[request_id] = attempt_id
            case cmd.StartMerge(request_id, server_ids):
                assert request_id in self.open
                assert request_id not in self.merged
                assert len(set(server_ids)) == len(server_ids) > 1
                self.merged[request_id] = server_ids
            case cmd.EndMerge(request_id):
                asked = tuple(a.server_id for a in self.started.values() if a.request_id == request_id)
                assert asked == self.merged[request_id]
                assert request_id not in {a.request_id for a in self.running.values()}
                self._answer(request_id, command)
            case cmd.PassAnswer(request_id, attempt_id):
                assert request_id not in self.committed
                assert request_id not in self.merged
                assert attempt_id in self.whole_answers
                self._answer(request_id, command)
            case cmd.RejectRequest(request_id):
                assert request_id not in self.committed
                assert command.message
                assert 400 <= command.status < 600
                self._answer(request_id, command)
            case cmd.AbortRequest(request_id):
                assert request_id in self.committed or request_id in self.merged
                self._answer(request_id, command)
            case cmd.RecordDecision():
                self._decide(command)
            case cmd.StartProbe(server_id, probe_id):
                assert server_id not in self.probes, "two probes at once"
                assert server_id not in self.gone
                self.probes[server_id] = probe_id
            case cmd.CancelProbe(server_id, probe_id):
                assert self.probes.pop(server_id) == probe_id
            case cmd.ForgetServer(server_id):
                assert server_id not in self.gone
                assert server_id not in {a.server_id for a in self.running.values()}
                self.gone.add(server_id)

    def _answer(self, request_id: int, command: cmd.Command) -> None:
        assert request_id in self.open
        assert request_id not in self.answered, (self.answered[request_id], command)
        self.answered[request_id] = command

    def _decide(self, record: cmd.RecordDecision) -> None:
        if record.decision not in OUTCOMES:
            return
        request_id = record.request_id
        assert request_id in self.open, f"{record}: it has ended before"
        self.open.remove(request_id)
        self.outcome[request_id] = record.decision
        answer = self.answered.get(request_id)
        match record.decision:
            case Decision.FINISHED:
                whole = isinstance(answer, cmd.PassAnswer | cmd.EndMerge)
                assert whole or (answer is None and request_id in self.committed)
            case Decision.REJECTED:
                assert isinstance(answer, cmd.RejectRequest)
            case Decision.ABORTED:
                assert answer is None
            case _:
                assert answer is not None


class Machine(RuleBasedStateMachine):
    """Driver, clients and servers."""

    balancer: LoadBalancer
    auditor: Auditor

    # --- the world -------------------------------------------------------------------------------------------

    @initialize(
        n_servers=st.integers(0, 4),
        seed=st.integers(0, 3),
        winner=st.sampled_from(Winner),
        racers=st.sampled_from([(1, 1), (1, 2), (2, 2), (2, 4), (3, 3)]),
        hedges_max=st.integers(0, 2),
        resurrect=st.sampled_from([0.0, 1.0]),
        room=st.sampled_from([(1, 1), (1, 2), (2, 8)]),
        queue=st.sampled_from([0, 1, 512]),
        retry=st.sampled_from([(0.0, 0), (0.0, 1), (0.2, 3)]),
        policy=st.sampled_from(Policy),
        fall=st.integers(1, 2),
        losses_max=st.integers(1, 2),
        synced=st.booleans(),
        chains=st.sampled_from([{}, CHAINS]),
    )
    def build(
        self,
        n_servers: int,
        seed: int,
        winner: Winner,
        racers: tuple[int, int],
        hedges_max: int,
        resurrect: float,
        room: tuple[int, int],
        queue: int,
        retry: tuple[float, int],
        policy: Policy,
        fall: int,
        losses_max: int,
        synced: bool,
        chains: dict[str, list[str]],
    ) -> None:
        self.room = room
        low, high = racers
        routes = {
            name: RouteSettings(strategy=s, winner=winner, racers_min=low, racers_max=high, hedges_max=hedges_max)
            if s in {Strategy.RACE, Strategy.HEDGE}
            else RouteSettings(strategy=s)
            for name, s in ROUTES.items()
        }
        self.config = Config(
            servers=tuple(self._settings(f"s{i}") for i in range(n_servers)),
            routes=routes,
            race=RaceSettings(winner=winner, racers_min=low, racers_max=high, hedges_max=hedges_max),
            selection=SelectionSettings(policy=policy),
            health=HealthSettings(resurrect=resurrect, losses_max=losses_max),
            probe=ProbeSettings(
                interval_ns=PROBE.interval_ns,
                interval_dead_ns=PROBE.interval_dead_ns,
                interval_dead_max_ns=PROBE.interval_dead_max_ns,
                fall=fall,
            ),
            retry=RetrySettings(budget=retry[0], budget_min=retry[1]),
            queue=QueueSettings(length_max=queue, timeout_ns=20 * SECOND_NS),
            aliases=parse_aliases(chains, []),
        )
        self.balancer = LoadBalancer(self.config, Random(seed))
        self.auditor = Auditor(self.balancer)
        self.model = Model()
        self.now_ns = 0
        self.n_requests = self.n_added = 0
        self.disk: dict[int, set[str]] = {}  # what each server has said last that it has
        self.answered: set[tuple[int, str | None]] = set()  # who has answered with a model, whatever it had said
        self.done(self.balancer.handle_timeout(0))
        if synced:
            for server in list(self.balancer.fleet):
                self.probe_well(server, list(ON_DISK), list(ON_DISK))

    def _settings(self, name: str) -> ServerSettings:
        return ServerSettings(url=f"http://{name}:1", name=name, slots=self.room[0], in_flight_max=self.room[1])

    def handle(self, event: Event) -> None:
        """Tell the balancer of an event, and check what it wants done."""
        if isinstance(event, events.RequestArrived) and event.request_id > self.n_requests:
            self.n_requests = event.request_id
            self.model.open.add(event.request_id)
        attempt = self.balancer.ledger.attempts.get(getattr(event, "attempt_id", 0))
        if attempt is not None and isinstance(event, ANSWERS):
            self.answered.add((attempt.server.id, attempt.request.model))
        before = self.holders()
        self.done(self.balancer.handle(event, self.now_ns), before)

    def holders(self) -> dict[str, set[int]]:
        """Return who is alive and has said last that it has a model."""
        alive = {s.id for s in self.balancer.fleet if s.is_alive}
        return {name: {i for i in alive if name in self.disk.get(i, ())} for name in ON_DISK}

    def done(self, commands: list[cmd.Command], before: dict[str, set[int]] | None = None) -> None:
        """Check the commands of one step."""
        ledger = self.balancer.ledger
        after = self.holders()
        before = before or after
        for command in commands:
            self.model.take(command)
            if not isinstance(command, cmd.StartAttempt):
                continue
            attempt = ledger.attempts.get(command.attempt_id)
            free = attempt is not None and not (attempt.request.merged or attempt.request.event.servers)
            name = attempt.request.model if attempt is not None and free else None
            if name in ON_DISK:
                better = before[name] & after[name]
                assert not better or command.server_id in before[name] | after[name] or self._dead(command, name), (
                    f"{command} lacks {name}, {better} have it"
                )
            retries = sum(
                a.kind is AttemptKind.RETRY and a.request.committed is not a for a in ledger.attempts.values()
            )
            if command.kind is AttemptKind.RETRY:
                started = {a.attempt_id for a in self.model.started.values() if a.kind is AttemptKind.RETRY}
                in_vain = len(started.difference(self.model.committed.values()))
                retry = self.config.retry
                assert retry.budget == 0 or in_vain <= RETRY_BURST + retry.budget * self.n_requests
                assert retry.budget > 0 or retries <= retry.budget_min
        assert set(self.model.running) == set(ledger.attempts), "the driver and the core disagree on what runs"
        assert self.model.open == set(ledger.requests)
        assert self.model.probes == {s.id: s.probe_id for s in self.balancer.fleet if s.probe_id}
        self.auditor.check(commands, self.now_ns)

    def _dead(self, command: cmd.StartAttempt, name: str) -> bool:
        """Tell whether a server that is tried for its resurrection had the model when it was alive."""
        server = self.balancer.fleet.servers.get(command.server_id)
        if server is None or server.is_alive:
            return False
        return name in self.disk.get(server.id, ()) or (server.id, name) in self.answered

    def attempt_ended(self, attempt_id: int) -> None:
        """An attempt has ended on the driver's side: the core learns of it now."""
        self.model.running.pop(attempt_id, None)

    def probe_well(self, server: Server, have: list[str], active: list[str]) -> None:
        """End the probe under way of a server well."""
        probe_id = self.model.probes.pop(server.id)
        self.handle(events.ProbeCompleted(server.id, probe_id, version="0.9.0"))
        self.sync(server, probe_id, have, active)

    def sync(self, server: Server, probe_id: int, have: list[str], active: list[str]) -> None:
        """Tell what a server has."""
        self.disk[server.id] = {*have, *active}
        infos = tuple(events.ModelInfo(name, "d", "2026-01-01T00:00:00Z", "{}") for name in have)
        actives = tuple(events.ActiveModel(name, "{}") for name in active)
        self.handle(events.ModelsSynced(server.id, probe_id, infos, actives))

    # --- rules -----------------------------------------------------------------------------------------------

    @rule(
        model=st.sampled_from(MODELS) | st.just("m") | st.none(),
        route=st.sampled_from(sorted(ROUTES)),
        kind=st.just(RequestKind.GENERATE) | st.sampled_from(RequestKind),
        stream=st.booleans(),
        runner_key=st.sampled_from(["", '{"num_ctx":1}']),
        times=st.sampled_from([1, 1, 4]),
        pins=st.just(()) | st.lists(st.sampled_from(["s0", "s1", "s9"]), max_size=2, unique=True).map(tuple),
    )
    def arrive(
        self,
        model: str | None,
        route: str,
        kind: RequestKind,
        stream: bool,
        runner_key: str,
        times: int,
        pins: tuple[str, ...],
    ) -> None:
        if kind in {RequestKind.LOAD, RequestKind.UNLOAD}:
            route, model = "/api/chat", model or "m"
        if ROUTES[route] is Strategy.BROADCAST:
            kind = RequestKind.MANAGE
        generates = find_route(route).generates and kind is not RequestKind.MANAGE
        for _ in range(times):
            request_id = self.n_requests + 1
            self.handle(events.RequestArrived(request_id, route, model, kind, stream, generates, runner_key, pins))

    @precondition(lambda self: self.model.open)
    @rule(data=st.data())
    def arrive_twice(self, data: st.DataObject) -> None:
        again = data.draw(st.sampled_from(sorted(self.model.open)))
        late = self.balancer.ledger.late_events
        self.handle(events.RequestArrived(again, "/api/chat", "m"))
        assert self.balancer.ledger.late_events == late + 1

    @precondition(lambda self: self.model.running)
    @rule(data=st.data(), steps=st.integers(1, 4), n_tokens=st.integers(0, 3))
    def progress(self, data: st.DataObject, steps: int, n_tokens: int) -> None:
        attempt_id = data.draw(st.sampled_from(sorted(self.model.running)))
        for _ in range(steps):
            attempt = self.balancer.ledger.attempts.get(attempt_id)
            if attempt is None:
                return
            kind = data.draw(st.sampled_from(PROGRESS[attempt.state]))
            if kind is events.StreamEnded:
                self.attempt_ended(attempt_id)
            self.handle(attempt_event(kind, attempt_id))
            self.balancer.note_chunk(attempt_id, 10 * n_tokens, n_tokens, self.now_ns)

    @rule(
        data=st.data(),
        kind=st.sampled_from(sorted({e for es in PROGRESS.values() for e in es}, key=lambda e: e.__name__)),
        known=st.booleans(),
    )
    def any_event(self, data: st.DataObject, kind: type[Event], known: bool) -> None:
        attempt_id = data.draw(st.sampled_from(sorted(self.model.started))) if known and self.model.started else 999
        attempt = self.balancer.ledger.attempts.get(attempt_id)
        if attempt is not None and kind is events.StreamEnded and kind in PROGRESS[attempt.state]:
            self.attempt_ended(attempt_id)
        self.handle(attempt_event(kind, attempt_id))

    @precondition(lambda self: self.model.running)
    @rule(
        data=st.data(), reason=st.sampled_from(Reason), status=st.sampled_from([0, 400, 404, 500]), whole=st.booleans()
    )
    def fail(self, data: st.DataObject, reason: Reason, status: int, whole: bool) -> None:
        attempt_id = data.draw(st.sampled_from(sorted(self.model.running)))
        answered = whole and status > 0
        if answered:
            self.model.whole_answers.add(attempt_id)
        start = self.model.running[attempt_id]
        if reason is Reason.MODEL_NOT_FOUND:
            name = self.balancer.ledger.attempts[attempt_id].request.model
            self.disk.get(start.server_id, set()).discard(name or "")
        self.attempt_ended(attempt_id)
        self.handle(events.AttemptFailed(attempt_id, reason, status, "why", answered))

    @precondition(lambda self: self.model.started)
    @rule(data=st.data(), reason=st.sampled_from(Reason))
    def fail_late(self, data: st.DataObject, reason: Reason) -> None:
        attempt_id = data.draw(st.sampled_from(sorted(self.model.started)))
        if attempt_id not in self.model.running:
            late = self.balancer.ledger.late_events
            self.handle(events.AttemptFailed(attempt_id, reason, 500, "late", answered=True))
            assert self.balancer.ledger.late_events == late + 1

    @precondition(lambda self: self.model.running)
    @rule(data=st.data(), paused=st.booleans())
    def pause(self, data: st.DataObject, paused: bool) -> None:
        attempt_id = data.draw(st.sampled_from(sorted(self.model.running)))
        self.balancer.note_paused(attempt_id, paused=paused, now_ns=self.now_ns)

    @precondition(lambda self: self.model.open)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.model.open)))
        health = {s.id: (s.health, s.reliability) for s in self.balancer.fleet}
        self.handle(events.DownstreamClosed(request_id))
        assert self.model.outcome[request_id] is Decision.ABORTED
        for server in self.balancer.fleet:
            assert health[server.id][0] == server.health, "nobody is blamed"

    @precondition(lambda self: self.model.probes)
    @rule(
        data=st.data(),
        have=st.just(ON_DISK) | st.sets(st.sampled_from(ON_DISK)),
        active=st.sets(st.sampled_from(ON_DISK)),
    )
    def probe_succeeds(self, data: st.DataObject, have: set[str], active: set[str]) -> None:
        server = self.balancer.fleet.servers[data.draw(st.sampled_from(sorted(self.model.probes)))]
        self.probe_well(server, sorted(have), sorted(active))

    @precondition(lambda self: self.model.probes)
    @rule(data=st.data(), reason=st.sampled_from(Reason))
    def probe_fails(self, data: st.DataObject, reason: Reason) -> None:
        server_id = data.draw(st.sampled_from(sorted(self.model.probes)))
        self.handle(events.ProbeCompleted(server_id, self.model.probes.pop(server_id), reason))

    @precondition(lambda self: self.balancer.fleet.servers)
    @rule(data=st.data(), reason=st.none() | st.sampled_from(Reason))
    def probe_of_another_time_ends(self, data: st.DataObject, reason: Reason | None) -> None:
        server_id = data.draw(st.sampled_from([*sorted(self.balancer.fleet.servers), 999]))
        health = {s.id: s.health for s in self.balancer.fleet}
        self.handle(events.ProbeCompleted(server_id, 0, reason))
        self.handle(events.ProbeCompleted(server_id, 10**6, reason))
        self.handle(events.ModelsSynced(server_id, 10**6, (events.ModelInfo("other", "", "", "{}"),)))
        assert {s.id: s.health for s in self.balancer.fleet} == health, "what is not awaited is nothing"

    @rule(new=st.booleans())
    def add_server(self, new: bool) -> None:
        self.n_added += new
        self.handle(events.ServerAdded(self._settings(f"added{self.n_added}")))
        names = Counter(s.name for s in self.balancer.fleet)
        assert max(names.values()) == 1

    @precondition(lambda self: self.balancer.fleet.servers)
    @rule(data=st.data())
    def remove_server(self, data: st.DataObject) -> None:
        server_id = data.draw(st.sampled_from(sorted(self.balancer.fleet.servers)))
        self.model.probes.setdefault(server_id, 0)
        if self.model.probes[server_id] == 0:
            del self.model.probes[server_id]
        self.handle(events.ServerRemovalRequested(server_id))

    @rule()
    def sync_requested(self) -> None:
        self.handle(events.SyncRequested())
        assert all(s.probe_id for s in self.balancer.fleet if s.state is not ServerState.DRAINING)

    @rule(ms=st.sampled_from([0, 1, 50, 1000, 5000, 60_000, 1_000_000]), late=st.booleans())
    def time_passes(self, ms: int, late: bool) -> None:
        self.advance(ms * MS_NS, late=late)

    @rule(n=st.integers(1, 5))
    def deadlines_pass(self, n: int) -> None:
        for _ in range(n):
            due_ns = self.balancer.next_deadline()
            if due_ns is not None:
                self.advance(due_ns - self.now_ns)

    @precondition(lambda self: len(self.model.open) > 3)
    @rule()
    def shut_down(self) -> None:
        self.handle(events.DrainDeadlinePassed())
        assert not self.model.open
        assert not self.model.running

    def advance(self, for_ns: int, *, late: bool = False) -> None:
        """Let time pass; a driver that is `late` calls once, at the end."""
        end_ns = self.now_ns + max(0, for_ns)
        while not late:
            due_ns = self.balancer.next_deadline()
            if due_ns is None or due_ns > end_ns:
                break
            self.now_ns = max(self.now_ns, due_ns)
            self.timeout()
        self.now_ns = end_ns
        self.timeout()
        self.done(self.balancer.handle_timeout(end_ns))

    def timeout(self) -> None:
        """Fire what is due. Attempts that take too long are cancelled by a command; probes too."""
        before = self.holders()
        self.done(self.balancer.handle_timeout(self.now_ns), before)
        due_ns = self.balancer.next_deadline()
        assert due_ns is None or due_ns > self.now_ns, "a timer stays due"

    # --- the end ---------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """The world is well again: every request ends, every server that was not removed is healthy in time."""
        if not hasattr(self, "balancer"):
            return
        for attempt_id in sorted(self.model.running):
            self.balancer.note_paused(attempt_id, paused=False, now_ns=self.now_ns)
        bound_ns = self.now_ns + PROBE.interval_dead_max_ns + 2 * PROBE.timeout_ns
        while self.now_ns < bound_ns:
            self._heal()
            due_ns = self.balancer.next_deadline()
            self.advance(bound_ns - self.now_ns if due_ns is None else min(due_ns, bound_ns) - self.now_ns)
        self._heal()
        assert not self.model.open, f"{list(self.balancer.ledger.requests.values())} have not ended"
        assert not self.model.running
        assert all(server.is_alive for server in self.balancer.fleet)
        assert len(self.model.outcome) == self.n_requests
        assert len(self.balancer.timers) == len(self.balancer.fleet.servers)  # nothing but the next probes

    def _heal(self) -> None:
        while self.model.running or self.model.probes:
            for server_id in sorted(self.model.probes):
                server = self.balancer.fleet.servers.get(server_id)
                if server is not None and server_id in self.model.probes:
                    self.probe_well(server, list(ON_DISK), list(ON_DISK))
            for attempt_id in sorted(self.model.running):
                for kind in (events.AttemptConnected, events.HeadReceived, events.FirstTokenReceived):
                    self.handle(attempt_event(kind, attempt_id))
                if attempt_id in self.model.running:
                    self.attempt_ended(attempt_id)
                    self.handle(events.StreamEnded(attempt_id))


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
