"""What the balancer promises its clients and its servers, checked in a run from outside.

`lbcore.invariants` looks at the core's own books. Here the commands are held against books of our own, and against what
the simulated servers really hold: a core whose books are wrong, but agree with each other, is found out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from lbcore import events as ev
from lbcore.balancer import LoadBalancer
from lbcore.commands import (
    AbortRequest,
    AttemptKind,
    CancelAttempt,
    Command,
    CommitAttempt,
    Decision,
    PassAnswer,
    RecordDecision,
    RejectRequest,
    StartAttempt,
    StartJob,
    StartProbe,
    UseModel,
    Work,
)
from lbcore.config import Config
from lbcore.events import Event, Reason
from lbcore.ollama import canonical_model
from lbcore.records import Attempt, Server
from simulator.box import Box
from simulator.calls import Call

RACE_BURST = 10
"""Unused race budget is kept up to this many attempts (`lbcore.admission`)."""
RETRY_BURST = 20
"""Unused retry budget is kept up to this many retries."""


class Promises:
    """Follows one balancer. Call it with every step; it returns what was broken, in words."""

    def __init__(self, config: Config, boxes: Sequence[Box], pauses: Sequence[tuple[int, int]]) -> None:
        self._config = config
        self._boxes = {box.spec.name: box for box in boxes}
        self._paused_ns = sum(until_ns - from_ns for from_ns, until_ns in pauses)
        self._balancer: LoadBalancer
        self._server_names: dict[int, str] = {}
        self._moving = frozenset(canonical_model(model.name) for model in config.models)
        self._holders: dict[str, frozenset[str]] = {}  # model -> names of the servers that really have it
        self._calls: dict[int, Call] = {}  # not over
        self._waiting: dict[int, Call] = {}
        self._call_of: dict[int, Call] = {}  # by live attempt, also of requests that are over
        self._starts: dict[int, StartAttempt] = {}  # live attempts
        # by server and model: attempts that came when it was not loaded as they want it, with their options; those of
        # them that wait for a load; and the options that it was last loaded with
        self._cold: dict[tuple[int, str], dict[int, str]] = defaultdict(dict)
        self._loads: dict[tuple[int, str], dict[int, str]] = defaultdict(dict)
        self._loaded_as: dict[tuple[int, str], str] = {}
        self._n_arrived = 0
        self._n_extra = 0  # racers and hedges that only the budget allows
        self._retries_in_vain: set[int] = set()  # up to now: those that were not committed
        self._last_probe_ns: dict[int, int] = {}
        self._died_ns: dict[str, int] = {}
        self._unread: set[str] = set()  # servers of which it was told that they cannot be read
        self._failures: dict[int, int] = {}  # of a server, one after the other
        health = config.health
        divisor = health.failure_divisor
        self._failures_max = math.ceil(math.log(health.value_max, divisor)) + 1 if divisor > 1 else 2**63

    def begin(self, balancer: LoadBalancer) -> None:
        """Follow a balancer from its first step on."""
        self._balancer = balancer

    def __call__(self, event: Event | None, commands: Sequence[Command], now_ns: int) -> list[str]:
        """Take one step."""
        waiting_before = list(self._waiting)
        problems = list(self._on_event(event, now_ns))
        for command in commands:
            problems += self._on_command(command, commands, now_ns)
        problems += self._after(event, commands, waiting_before)
        return problems

    # --- what has happened -----------------------------------------------------------------------------------

    def _on_event(self, event: Event | None, now_ns: int) -> Iterator[str]:
        match event:
            case ev.RequestArrived():
                route = self._config.route(event.route)
                alias = self._config.aliases.get(canonical_model(event.model or ""))
                call = Call(event, alias, route.racers_min, now_ns)
                self._calls[call.id] = self._waiting[call.id] = call
                self._n_arrived += 1
            case ev.DownstreamClosed(request_id):
                self._over(self._calls.get(request_id))
            case ev.FirstTokenReceived(attempt_id) | ev.BufferFilled(attempt_id):
                call_ = self._call_of.get(attempt_id)
                if call_ is not None:
                    server_id = self._server_of(attempt_id)
                    self._cold[server_id, call_.model].pop(attempt_id, None)
                    self._loaded(server_id, call_.model, call_.options)
            case ev.ModelsSynced(server_id, active=active):
                self._on_synced(server_id, [canonical_model(model.name) for model in active])
            case ev.StreamEnded(attempt_id):
                self._failures.pop(self._server_of(attempt_id), None)
                ended = self._end(attempt_id)
                if ended is not None and ended.committed == attempt_id:
                    self._over(ended)
            case ev.AttemptFailed(attempt_id, reason):
                yield from self._on_failed(attempt_id, reason)
                self._end(attempt_id)
            case _:
                pass

    def _on_failed(self, attempt_id: int, reason: Reason) -> Iterator[str]:
        server_id = self._server_of(attempt_id)
        if reason in _ITS_OWN_FAULT and server_id:
            self._failures[server_id] = self._failures.get(server_id, 0) + 1
            server = self._balancer.fleet.servers.get(server_id)
            if server is not None and server.is_alive and self._failures[server_id] > self._failures_max:
                yield f"{server} has failed {self._failures[server_id]} times in a row and is taken for alive"

    def _server_of(self, attempt_id: int) -> int:
        start = self._starts.get(attempt_id)
        return 0 if start is None else start.server_id

    def _end(self, attempt_id: int) -> Call | None:
        """Forget an attempt that has ended."""
        start, call = self._starts.pop(attempt_id, None), self._call_of.pop(attempt_id, None)
        if start is not None and call is not None:
            for of in (self._loads, self._cold):
                of[start.server_id, call.model].pop(attempt_id, None)
            call.live.pop(attempt_id, None)
        return call

    def _loaded(self, server_id: int, model: str, options: str | None) -> None:
        """A model is loaded: who asked for it with the same options waits for its load no more. None: as it was.

        If the options are others than before, whoever was thought to be served by that load, and came too late, waits
        for one again.
        """
        key = server_id, model
        waiting = self._loads[key]
        if options is not None:
            before, self._loaded_as[key] = self._loaded_as.get(key), options
            waiting = self._cold[key] if before != options else waiting
        loaded_as = self._loaded_as.get(key)
        self._loads[key] = {a: o for a, o in waiting.items() if loaded_as is not None and o != loaded_as}

    def _on_synced(self, server_id: int, active: Sequence[str]) -> None:
        for key in [key for key in self._cold if key[0] == server_id]:
            answering = len(self._live_at(*key)) > len(self._cold[key])  # loaded for sure, whatever was read
            if key[1] in active:
                self._loaded(*key, None)
            elif not answering:
                self._loaded_as.pop(key, None)
                self._loads[key] = dict(self._cold[key])

    def _live_at(self, server_id: int, model: str) -> list[int]:
        return [a for a, s in self._starts.items() if s.server_id == server_id and self._call_of[a].model == model]

    def _over(self, call: Call | None) -> None:
        if call is not None:
            call.is_over = True
            self._calls.pop(call.id, None)
            self._waiting.pop(call.id, None)

    # --- what is commanded -----------------------------------------------------------------------------------

    def _on_command(self, command: Command, commands: Sequence[Command], now_ns: int) -> Iterator[str]:
        match command:
            case StartAttempt():
                yield from self._on_start(command)
            case UseModel(request_id, model):
                yield from self._on_use(command, self._calls.get(request_id), canonical_model(model))
            case CancelAttempt(attempt_id, reason):
                yield from self._on_cancel(attempt_id, reason)
            case CommitAttempt(request_id, attempt_id):
                call = self._calls.get(request_id)
                if call is None or call.committed is not None:
                    yield f"{command}: request {request_id} {'is over' if call is None else 'has its answer already'}"
                    return
                call.committed = attempt_id
                self._retries_in_vain.discard(attempt_id)
                if attempt_id not in call.live:  # its whole answer was held
                    self._over(call)
            case PassAnswer(request_id) | RejectRequest(request_id) | AbortRequest(request_id):
                yield from self._on_bad_end(command, request_id, commands, now_ns)
            case StartProbe(server_id):
                yield from self._on_probe(server_id, now_ns)
            case StartJob():
                yield from self._on_job(command)
            case RecordDecision(Decision.SERVER_UNREAD, server=name):
                if name in self._unread:
                    yield f"{name} is told of again: it could not be read before"
                self._unread.add(name)
            case RecordDecision(Decision.SERVER_DIED, server=name):
                self._died_ns[name] = now_ns
            case RecordDecision(Decision.SERVER_BACK, server=name):
                self._died_ns.pop(name, None)
            case _:
                pass

    def _on_use(self, command: UseModel, call: Call | None, model: str) -> Iterator[str]:
        """The first model of an alias that somebody alive has is used, then the next one, and none of them twice."""
        if call is None or call.committed is not None or call.live:
            yield f"{command}: the request is over, has its answer, or servers work on another model for it"
        elif model not in call.others:
            yield f"{command}: it is none of {call.others}"
        else:
            for other in call.others[: call.others.index(model)]:
                if any(len(self._live_at(s.id, other)) < s.in_flight_max for s in self._live_holders(other)):
                    yield f"{command}: somebody alive has {other}, which goes before"
            call.model = model
            call.tried = []

    def _live_holders(self, model: str) -> list[Server]:
        holders = self._really_have(model)
        return [server for server in self._balancer.fleet if server.is_alive and server.name in holders]

    def _on_start(self, start: StartAttempt) -> Iterator[str]:
        call = self._calls.get(start.request_id)
        if call is None or call.committed is not None:
            yield f"{start}: the request is over, or has its answer"
            return
        if start.server_id in call.tried:
            yield f"{start}: the server was asked before"
        server = self._balancer.fleet.servers[start.server_id]
        tries_dead = start.kind is AttemptKind.PRIMARY and server.name in self._died_ns
        if tries_dead or server.name not in self._really_have(call.model):
            others = [model for model in dict.fromkeys((call.model, *call.others)) if self._live_holders(model)]
            if others:
                yield f"{start}: {server.name} is dead or does not have {call.model}, somebody else has {others[0]}"
        attempt = self._balancer.ledger.attempts.get(start.attempt_id)
        if attempt is not None and attempt.cold and attempt.first_token_ns is None:
            for of in (self._loads, self._cold):
                of[start.server_id, call.model][start.attempt_id] = call.options
        if start.kind in _EXTRA and not self._is_free(start, call, attempt):
            self._n_extra += 1
            allowed = RACE_BURST + self._config.race.budget * self._n_arrived if self._config.race.budget else 0
            if self._n_extra > allowed:
                yield f"{start}: the {self._n_extra}. extra attempt for {self._n_arrived} requests"
        if start.kind is AttemptKind.RETRY:
            self._retries_in_vain.add(start.attempt_id)
        if call.model in call.others:
            call.others.remove(call.model)
        call.tried.append(start.server_id)
        call.live[start.attempt_id] = start
        self._call_of[start.attempt_id] = call
        self._starts[start.attempt_id] = start
        self._waiting.pop(call.id, None)

    def _is_free(self, start: StartAttempt, call: Call, attempt: Attempt | None) -> bool:
        """Tell whether a racer or hedge needs no budget: `racers_min`, or nobody trusted is asked."""
        if attempt is None or (start.kind is AttemptKind.RACER and len(call.tried) < call.racers_min):
            return True
        servers = self._balancer.fleet.servers
        others = [servers[other.server_id] for other in call.live.values()]
        return all(not s.is_alive or s.doubted or s.breaks for s in others)

    def _on_cancel(self, attempt_id: int, reason: Reason) -> Iterator[str]:
        call, server_id = self._call_of.get(attempt_id), self._server_of(attempt_id)
        if call is None:
            yield f"attempt {attempt_id} is cancelled, but does not run"
            return
        loads = self._loads[server_id, call.model]
        if reason is Reason.LOST_RACE and next(iter(loads), None) == attempt_id and self._is_loaded_for(attempt_id):
            yield f"attempt {attempt_id} of {call.id} is cancelled by a lost race, and the load of {call.model} with it"
        if reason in _ITS_OWN_FAULT:
            yield from self._on_failed(attempt_id, reason)
        self._end(attempt_id)

    def _is_loaded_for(self, attempt_id: int) -> bool:
        """Tell whether the server is really loading a model for an attempt, or making room for it.

        Several that wait may have overtaken each other on their way to the server, which the balancer cannot know.
        """
        name = self._balancer.fleet.servers[self._server_of(attempt_id)].name
        fake = self._boxes[name].fake
        job = fake.loading.job if fake.loading is not None else fake.current
        return job is not None and job.id == attempt_id

    def _on_bad_end(self, command: Command, request_id: int, commands: Sequence[Command], now_ns: int) -> Iterator[str]:
        call = self._calls.get(request_id)
        aborted = isinstance(command, AbortRequest)
        if call is None or (call.committed is not None) != aborted:
            yield f"{command}: the request {'is over' if call is None else 'has its answer'}"
        elif not aborted:
            servers = self._live_holders(call.model)
            if call.tried:
                spent = any(
                    isinstance(c, RecordDecision) and c.decision is Decision.RETRIED and c.request_id == request_id
                    for c in commands
                )
                left = [] if spent else [s.name for s in servers if s.id not in call.tried]
                if left:
                    yield f"{command}: {left[0]} was not asked"
                others = [] if spent else [model for model in call.others if self._live_holders(model)]
                if others:
                    yield f"{command}: {self._live_holders(others[0])[0].name} was not asked for {others[0]}"
            else:
                yield from self._on_refusal(call, [s.id for s in servers], now_ns)
        self._over(call)

    def _on_refusal(self, call: Call, servers: Sequence[int], now_ns: int) -> Iterator[str]:
        """Nobody is refused while there is room: for the request itself, or in the queue."""
        queue = self._config.queue
        in_flight: dict[int, int] = defaultdict(int)
        for attempt_id, start in self._starts.items():
            in_flight[start.server_id] += self._call_of[attempt_id].model == call.model
        fleet = self._balancer.fleet.servers
        roomy = [fleet[i].name for i in servers if in_flight[i] < fleet[i].settings.in_flight_max]
        if roomy:
            yield f"request {call.id} is refused, though {roomy[0]} has room"
        elif servers and len(self._waiting) - 1 < queue.length_max and now_ns < call.arrived_ns + queue.timeout_ns:
            yield f"request {call.id} is refused, though it might wait"

    def _on_job(self, job: StartJob) -> Iterator[str]:
        """Nothing is pulled where it is, or may not be; nothing deleted of which too little is left."""
        fleet = self._balancer.fleet
        name = fleet.servers[job.server_id].name
        wanted = next(m for m in self._config.models if canonical_model(m.name) == canonical_model(job.model))
        may_be_on = wanted.servers or tuple(self._boxes)
        holders = [other for other, box in self._boxes.items() if box.fake.find(job.model) is not None]
        if job.work is not Work.DELETE and name not in may_be_on:
            yield f"{job}: it is not to be on {name}"
        if job.work is Work.PULL and name in holders:
            yield f"{job}: {name} has it"
        if job.work is Work.DELETE:
            alive = [server.name for server in fleet if server.is_alive and server.name != name]
            left = [other for other in alive if other in holders and other in may_be_on]
            if not wanted.prune or len(left) < (wanted.copies or len(wanted.servers) or 1):
                yield f"{job}: it is left on {', '.join(left) or 'none'} of {wanted}"

    def _on_probe(self, server_id: int, now_ns: int) -> Iterator[str]:
        yield from self._late_probe(server_id, now_ns)
        self._last_probe_ns[server_id] = now_ns

    def _late_probe(self, server_id: int, now_ns: int) -> Iterator[str]:
        server, probe = self._balancer.fleet.servers[server_id], self._config.probe
        since_ns = now_ns - self._last_probe_ns.get(server_id, 0)
        allowed_ns = probe.timeout_ns + max(probe.interval_ns, probe.interval_dead_max_ns)
        died_ns = self._died_ns.get(server.name)
        if died_ns is not None:
            since_ns = min(since_ns, now_ns - died_ns)
            allowed_ns = probe.timeout_ns + probe.interval_dead_max_ns
        if since_ns > allowed_ns + self._paused_ns:
            yield f"{server} was not looked at for {since_ns / 1e9:g} s"

    # --- what must hold after each step ------------------------------------------------------------------------

    def _after(self, event: Event | None, commands: Sequence[Command], waiting_before: Sequence[int]) -> Iterator[str]:
        if len(self._waiting) > self._config.queue.length_max:
            yield f"{len(self._waiting)} requests wait, {self._config.queue.length_max} may"
        started = [c for c in commands if isinstance(c, StartAttempt)]
        if started:
            yield from self._overtaking(started, waiting_before)
            yield from self._retries(started)
        if any(isinstance(c, RecordDecision) and c.decision is Decision.SERVER_DIED for c in commands):
            yield from self._left_there()
        ended = {c.request_id for c in commands if isinstance(c, _LAST_WORDS)}
        if isinstance(event, ev.DownstreamClosed):
            ended.add(event.request_id)
        if ended:
            ledger = self._balancer.ledger
            for attempt_id, call in self._call_of.items():
                attempt = ledger.attempts.get(attempt_id)
                if call.is_over and call.id in ended and (attempt is None or not attempt.detached):
                    yield f"attempt {attempt_id} goes on, though request {call.id} is over"

    def _left_there(self) -> Iterator[str]:
        """A server has died: whoever waits only for dead ones has been sent to a live one that has room."""
        fleet = self._balancer.fleet.servers
        for call in self._calls.values():
            if not call.races or any(fleet[start.server_id].is_alive for start in call.live.values()):
                continue
            holders = self._really_have(call.model)
            for server in fleet.values():
                has_room = len(self._live_at(server.id, call.model)) < server.settings.in_flight_max
                if server.is_alive and server.name in holders and server.id not in call.tried and has_room:
                    yield f"request {call.id} waits for dead servers alone, though {server.name} has room"
                    break

    def _overtaking(self, started: Sequence[StartAttempt], waiting_before: Sequence[int]) -> Iterator[str]:
        for start in started:
            call = self._calls.get(start.request_id)
            if call is None or start.kind is not AttemptKind.PRIMARY:
                continue
            for earlier in waiting_before:
                if earlier == call.id:
                    break
                other = self._waiting.get(earlier)
                if other is not None and other.model == call.model:
                    yield f"request {call.id} was served before {earlier}, which waits for {call.model} too"

    def _retries(self, started: Sequence[StartAttempt]) -> Iterator[str]:
        if any(start.kind is AttemptKind.RETRY for start in started):
            retry = self._config.retry
            in_vain = len(self._retries_in_vain)
            if retry.budget and in_vain > RETRY_BURST + retry.budget * self._n_arrived:
                yield f"{in_vain} retries have not helped, of {self._n_arrived} requests"
            under_way = len(self._retries_in_vain & self._starts.keys())
            if not retry.budget and under_way > retry.budget_min:
                yield f"{under_way} retries are under way, {retry.budget_min} may be"

    # --- the end -----------------------------------------------------------------------------------------------

    def at_end(self, now_ns: int) -> list[str]:
        """Return what is wrong when the run is over."""
        problems: list[str] = []
        for server in self._balancer.fleet:
            problems += self._late_probe(server.id, now_ns)
        return problems

    def _really_have(self, model: str) -> frozenset[str]:
        if model in self._moving:  # all that can be known of it is what was read last
            return frozenset(server.name for server in self._balancer.fleet if server.has(model))
        holders = self._holders.get(model)
        if holders is None:
            names = (name for name, box in self._boxes.items() if box.fake.find(model) is not None)
            holders = self._holders[model] = frozenset(names)
        return holders


_EXTRA = frozenset({AttemptKind.RACER, AttemptKind.HEDGE})
_LAST_WORDS = (PassAnswer, RejectRequest, AbortRequest)
_ITS_OWN_FAULT: frozenset[Reason] = frozenset(
    {
        Reason.CONNECT_REFUSED,
        Reason.CONNECT_TIMEOUT,
        Reason.RESET,
        Reason.GARBAGE,
        Reason.FIRST_TOKEN_TIMEOUT,
        Reason.SILENCE_TIMEOUT,
        Reason.ANSWER_TIMEOUT,
        Reason.TRUNCATED,
    }
)
"""Failures that nobody but the server can be blamed for."""
