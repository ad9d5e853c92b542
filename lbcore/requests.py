"""Events of requests: arrival, admission, the queue, hedges, retries, and every end but the good one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from lbcore import aliases, race, selection
from lbcore.broadcast import Broadcast
from lbcore.commands import (
    AbortRequest,
    AttemptKind,
    Command,
    Decision,
    PassAnswer,
    RejectRequest,
)
from lbcore.config import Config, Strategy
from lbcore.events import DownstreamClosed, DrainDeadlinePassed, Reason, RequestArrived
from lbcore.fleet import Fleet, why_not
from lbcore.health import retry_after_s
from lbcore.ledger import Ledger
from lbcore.ollama import RequestKind, canonical_model, find_route
from lbcore.placement import Placement, is_in_doubt
from lbcore.records import Request, Server
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.states import RequestInput, RequestState, ServerState
from lbcore.timers import TimerKind, Timers
from lbcore.units import counted

# Members bound once: in Python 3.11 a look-up in an enum's class costs more than what the member is used for here.
_GENERATE: Final = RequestKind.GENERATE
_LOAD: Final = RequestKind.LOAD
_UNLOAD: Final = RequestKind.UNLOAD
_PRIMARY: Final = AttemptKind.PRIMARY
_RACER: Final = AttemptKind.RACER
_STARTED: Final = Decision.STARTED
_BROADCAST: Final = Strategy.BROADCAST
_RACING: Final = RequestState.RACING
_HEDGE_TIMER: Final = TimerKind.HEDGE

_NAMES_MAX: Final = 1024
_SHOWN_CHARS_MAX: Final = 100
_canonical: Final = lru_cache(_NAMES_MAX)(canonical_model)  # clients name few models, and each again and again

SYNC_FRESH_NS: Final = SECOND_NS
"""A model nobody is known to have is asked for anew unless the servers were read this recently."""

HEDGE_AGAIN_MAX_NS: Final = SECOND_NS
"""Where there was nobody to hedge to, that is looked at anew this often, or after each hedge delay if it is longer."""

PIN_HEADER: Final = "X-Ollama-LB-Server"
"""The header in which a client names the servers that it wants to be asked."""

SERVER_BUSY: Final = "server busy, please try again.  maximum pending requests exceeded"
"""Ollama's own words (capture: chat_server_busy)."""


class Requests:
    """Decides what becomes of requests. Owned by the balancer."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        ledger: Ledger,
        placement: Placement,
        broadcast: Broadcast,
        timers: Timers,
        out: list[Command],
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._ledger = ledger
        self._placement = placement
        self._timers = timers
        self._out = out
        self._broadcast = broadcast
        self.stuck: dict[int, Request] = {}  # wait only for servers in doubt, and nobody else could be asked

    def on_arrived(self, event: RequestArrived, now_ns: int) -> None:
        """Start a request, let it wait, or refuse it."""
        if event.request_id in self._ledger.requests:
            self._ledger.late_events += 1
            return
        model = _canonical(event.model) if event.model else None
        request = Request(event, model, self._config.route(event.route), now_ns)
        if self._config.aliases:
            aliases.begin(request, self._config, self._fleet)
        self._ledger.requests[request.id] = request
        self._placement.race_budget.earn()
        self._ledger.retry_budget.earn()
        if self._fleet.failing:
            self._serve_those_before(now_ns)
        if not self._try_start(request, now_ns):
            self._enqueue(request, now_ns)

    def _serve_those_before(self, now_ns: int) -> None:
        """Start what waits while a server fails, now that it may be over: whoever comes now is not to be first."""
        if len(self._ledger.queue):
            self.serve_queue(now_ns)
        failing = self._fleet.failing
        for server_id in [server_id for server_id, until_ns in failing.items() if until_ns <= now_ns]:
            del failing[server_id]

    def _try_start(self, request: Request, now_ns: int) -> bool:
        """Start a request, or refuse it; False when it must wait."""
        request.awaits_sync = False
        if request.kind is _UNLOAD and self._broadcast.unload(request, now_ns):
            return True
        if request.event.servers:
            return self._start_pinned(request, now_ns)
        if request.kind is _LOAD and self._broadcast.load(request, now_ns):
            return True
        if request.route.strategy is _BROADCAST and self._start_broadcast(request, now_ns):
            return True
        holders = self._fleet.pool(request.model)
        if holders.servers:
            with_room: Sequence[Server]
            if holders.are_many:
                with_room = self._fleet.pools.among(request, now_ns)
            else:
                with_room = holders.with_room() if request.generates else holders.servers
            if not with_room or (
                len(with_room) <= len(self._fleet.failing) and self._is_better_off_waiting(request, with_room, now_ns)
            ):
                return False
            self._start_racing(request, with_room, now_ns)
            return True
        if self._sync_may_help(request, now_ns):
            request.awaits_sync = True
            return False
        alive = self._fleet.holders(None)
        if alive and not find_route(request.event.route).needs_model:  # such as a pull: for any server to answer
            self._start_racing(request, alive, now_ns)
            return True
        dead = self._placement.dead(request)
        if dead:
            last_resort = self._placement.last_resort(request, dead, now_ns)
            if last_resort is None:
                return False
            self._ledger.start(request, last_resort, _PRIMARY, now_ns)
            why = aliases.words(request, "no live server has it: a dead one is tried")
            self._ledger.record(_STARTED, request, why, names=(last_resort.name,))
            self.stuck[request.id] = request
        elif request.model is not None and alive:
            asked = self._placement.anyone(request)
            if asked is None:
                return False
            self._ledger.start(request, asked, _PRIMARY, now_ns)
            why = "nobody is known to have it: one is asked, and says so in the words of this path"
            self._ledger.record(_STARTED, request, aliases.words(request, why), names=(asked.name,))
        else:
            self._reject(
                request,
                502,
                self._fleet.nobody_there(),
                now_ns,
                retry_after=self._retry_after_s(),
            )
        return True

    def _is_better_off_waiting(self, request: Request, with_room: Sequence[Server], now_ns: int) -> bool:
        """Tell whether only servers that fail at present have room, while others are full, and the queue is not.

        A server that fails at once always has room: it would draw and fail whatever the others cannot take at once.
        """
        model = request.model
        if model is None or not request.generates:
            return False
        if self._ledger.queue.is_full or request.arrived_ns + self._config.queue.timeout_ns <= now_ns:
            return False
        if any(server.models[model].failing_until_ns <= now_ns for server in with_room):
            return False
        return any(server.models[model].failing_until_ns <= now_ns for server in self._fleet.holders(model))

    def _start_pinned(self, request: Request, now_ns: int) -> bool:
        """Ask only those servers that the client has named; False when all of them are full."""
        known = {server.name: server for server in self._fleet}
        if unknown := [name for name in request.event.servers if name not in known]:
            there = ", ".join(known) or "none"
            name = unknown[0][:_SHOWN_CHARS_MAX]
            self._reject(request, 400, f'{PIN_HEADER}: there is no server "{name}"; there are {there}', now_ns)
            return True
        named = self._placement.holders(request)
        lost = [known[name] for name in request.event.servers if known[name] not in named]
        if lost and (not named or request.route.strategy is _BROADCAST):
            message = "; ".join(f"server {server.name} is {server.state}: {why_not(server)}" for server in lost)
            self._reject(request, 502, f"{PIN_HEADER}: {message}", now_ns, retry_after=self._retry_after_s())
            return True
        if request.route.strategy is _BROADCAST and self._start_broadcast(request, now_ns):
            return True
        with_room = selection.with_room(named, request)
        if with_room:
            self._start_racing(request, with_room, now_ns)
        return bool(with_room)

    def _retry_after_s(self) -> int:
        return retry_after_s(self._config.probe.interval_dead_ns)

    def _start_broadcast(self, request: Request, now_ns: int) -> bool:
        """Ask all servers that are concerned; of one alone its own answer will do. False when there is none such."""
        concerned = self._broadcast.concerned(request, now_ns)
        if concerned is None:
            return False
        if len(concerned) > 1:
            self._broadcast.merge(request, concerned, now_ns)
        elif concerned:
            self._start_racing(request, concerned, now_ns)
        else:
            message = f"no server that '{request.event.model}' is placed on is alive ([[models]])"
            self._reject(request, 502, message, now_ns, retry_after=self._retry_after_s())
        return True

    def _sync_may_help(self, request: Request, now_ns: int) -> bool:
        """Read the servers anew when none is known to have what is needed; True while the answer is awaited.

        What was read less than a second before the request came is good enough, so that requests for a model that
        does not exist cannot flood the servers with probes.
        """
        awaited = False
        for server in self._fleet:
            if server.last_sync_ns is None:
                awaited = awaited or (server.probe_failures == 0 and server.state is ServerState.DEAD)
            elif (
                server.is_alive
                and request.model is not None
                and server.last_sync_ns + SYNC_FRESH_NS <= request.arrived_ns
            ):
                self._fleet.probe_now(server, now_ns)
                awaited = True
        return awaited

    def _enqueue(self, request: Request, now_ns: int) -> None:
        if self._ledger.queue.is_full:
            self._reject(request, 503, SERVER_BUSY, now_ns, retry_after=1)
            return
        self._ledger.queue.push(request)
        self._timers.arm(TimerKind.QUEUE, request.id, now_ns + self._config.queue.timeout_ns)
        why = (
            "until the servers were asked for the model"
            if request.awaits_sync
            else "every server that has the model is full"
        )
        self._ledger.record(Decision.QUEUED, request, why)

    def serve_queue(self, now_ns: int) -> None:
        """Start what can start, after room was made or a server has changed."""
        if self._config.aliases:
            for request in self._ledger.queue:
                aliases.resolve(request, self._fleet)
        for _ in self._ledger.queue.pop_ready(lambda request: self._try_start(request, now_ns)):
            pass

    def on_queue_timer(self, request_id: int, now_ns: int) -> None:
        """A request has waited too long."""
        request = self._ledger.requests.get(request_id)
        if request is None or request not in self._ledger.queue:
            return
        if self._try_start(request, now_ns):  # at a server that fails
            self._ledger.queue.remove(request)
        else:
            self._reject(request, 503, SERVER_BUSY, now_ns, retry_after=1)

    def _start_racing(self, request: Request, candidates: Sequence[Server], now_ns: int) -> None:
        chosen = self._placement.first(request, candidates, now_ns)
        route = request.route
        kind = _PRIMARY
        for server in chosen:
            self._ledger.start(request, server, kind, now_ns)
            kind = _RACER
        why = route.strategy if request.alias is None else aliases.words(request, route.strategy)
        self._ledger.record(_STARTED, request, why, names=tuple([server.name for server in chosen]))
        if route.hedges_max > 0 and request.kind is _GENERATE:
            request.hedges_left = route.hedges_max
            stats = self._fleet.stats.get(request.model or "")
            request.hedge_delay_ns = race.hedge_delay_ns(stats, self._config.race, stream=request.stream)
            self._timers.arm(_HEDGE_TIMER, request.id, now_ns + request.hedge_delay_ns)

    def on_hedge_timer(self, request_id: int, now_ns: int) -> None:
        """No first token within the hedge delay: ask one more server."""
        request = self._ledger.requests.get(request_id)
        if request is None or request.state is not RequestState.RACING or request.hedges_left <= 0:
            return
        if any(attempt.first_token_ns is not None for attempt in request.live_attempts):
            self._look_again(request, now_ns)
            return  # there is an answer to wait for, as long as it does not fail
        if self._hedge(request, f"no answer within {request.hedge_delay_ns // MS_NS} ms", now_ns):
            request.hedges_left -= 1
        if request.hedges_left:
            self._look_again(request, now_ns)

    def _look_again(self, request: Request, now_ns: int) -> None:
        """Arm the hedge timer anew: after the delay, or after as long again as nobody was asked, up to a second.

        So a delay of a few ms does not make it fire hundreds of times while there is nobody to ask.
        """
        waited_ns = now_ns - request.attempts[-1].started_ns
        pause_ns = max(request.hedge_delay_ns, MS_NS, min(waited_ns, HEDGE_AGAIN_MAX_NS))
        self._timers.arm(_HEDGE_TIMER, request.id, now_ns + pause_ns)

    def _hedge(self, request: Request, why: str, now_ns: int) -> bool:
        server = self._placement.hedge(request, now_ns)
        if server is not None:
            self._ledger.record(Decision.HEDGED, request, why, names=(server.name,))
            self._ledger.start(request, server, AttemptKind.HEDGE, now_ns)
        return server is not None

    def retry(self, request: Request, now_ns: int) -> bool:
        """Ask the next server; False when there is none or the retry budget is spent."""
        budget = self._ledger.retry_budget
        if not budget.allows():
            under_way = counted(budget.under_way, "retry")
            self._ledger.record(Decision.RETRIED, request, f"the budget is spent; {under_way} under way")
            return False
        why = str(request.failures[-1])
        if (model := aliases.next_model(request, self._fleet)) is not None:
            aliases.change(request, model)
            why = f"as {model}, since {why}"
        return self._ask_next(request, why, now_ns)

    def _ask_next(self, request: Request, why: str, now_ns: int) -> bool:
        server = self._placement.next_after_failure(request, now_ns)
        if server is None:
            return False
        self._ledger.record(Decision.RETRIED, request, why, names=(server.name,))
        self._ledger.start(request, server, AttemptKind.RETRY, now_ns)
        if self._is_stuck(request):  # for want of a better one
            self.stuck[request.id] = request
        return True

    def conclude(self, request: Request, now_ns: int) -> None:
        """Nobody could answer: pass on the last answer a server gave, or say what happened on each."""
        answered = request.last_answered
        if answered is None or answered.failure is None:
            status, message = race.closing_words(request)
            self._out.append(RejectRequest(request.id, status, message, 1 if status == 503 else 0))
            self._ledger.end(request, RequestInput.FAIL, Decision.FAILED, f"{status}: {message}", now_ns)
            return
        self._out.append(PassAnswer(request.id, answered.id))
        refused = answered.failure.status < 500
        given, decision = (RequestInput.FINISH, Decision.FINISHED) if refused else (RequestInput.FAIL, Decision.FAILED)
        why = f"passed on as it was: {answered.failure}"
        self._ledger.end(request, given, decision, why, now_ns, server=answered.server.name)

    def rescue_from(self, server: Server, now_ns: int) -> None:
        """A server died or broke a stream: ask another for every request that waits only for servers in doubt."""
        for attempt in [a for a in self._ledger.attempts.values() if a.server is server and not a.detached]:
            self.rescue(attempt.request, f"{server.name} has failed", now_ns)

    def rescue(self, request: Request, why: str, now_ns: int) -> None:
        """Ask another server for a request that waits only for servers in doubt: now, or as soon as there is one."""
        if not self._is_stuck(request) or self._hedge(request, why, now_ns):
            self.stuck.pop(request.id, None)
        elif request.alias is None or not self._give_up_dead(request, why, now_ns):
            self.stuck[request.id] = request

    def _give_up_dead(self, request: Request, why: str, now_ns: int) -> bool:
        """Go on to the next model of an alias when only dead servers work on the present one; False when there is none.

        A request that came now would be for that one, so whoever waits already is not to wait any longer.
        """
        live = request.live_attempts
        model = aliases.next_model(request, self._fleet, with_room=True)
        if model is None or not live or any(attempt.server.state is not ServerState.DEAD for attempt in live):
            return False
        if not self._ledger.retry_budget.allows():
            return False
        self._ledger.cancel_all(request, Reason.GIVEN_UP, now_ns)
        aliases.change(request, model)
        return self._ask_next(request, f"as {model}, since {why}", now_ns)

    def replace(self, request: Request, now_ns: int) -> None:
        """One of several attempts has failed: ask another server in its place, where one is idle."""
        self.rescue(request, "what is left is in doubt", now_ns)
        waits = request.state is _RACING and request.kind is _GENERATE
        if waits and len(request.live_attempts) < request.route.racers_max and not self._is_stuck(request):
            self._hedge(request, str(request.failures[-1]), now_ns)

    def _is_stuck(self, request: Request) -> bool:
        waits = request.state is _RACING and request.kind is _GENERATE and not request.merged
        return waits and all(is_in_doubt(attempt.server) for attempt in request.live_attempts)

    def rescue_stuck(self, now_ns: int) -> None:
        """Offer what has changed, a server or its room, to the requests that wait only for servers in doubt."""
        for request in list(self.stuck.values()):
            self.rescue(request, "every server asked is in doubt", now_ns)

    def _reject(self, request: Request, status: int, message: str, now_ns: int, *, retry_after: int = 0) -> None:
        self._out.append(RejectRequest(request.id, status, message, retry_after))
        self._ledger.end(request, RequestInput.REJECT, Decision.REJECTED, f"{status}: {message}", now_ns)

    def on_downstream_closed(self, event: DownstreamClosed, now_ns: int) -> None:
        """Cancel all that runs for a client that left; nobody is blamed."""
        request = self._ledger.requests.get(event.request_id)
        if request is None:
            self._ledger.late_events += 1
            return
        self._ledger.cancel_all(request, Reason.CLIENT_LEFT, now_ns)
        self._ledger.end(request, RequestInput.ABORT, Decision.ABORTED, "the client left", now_ns)

    def on_drain_deadline_passed(self, _event: DrainDeadlinePassed, now_ns: int) -> None:
        """End everything: the balancer stops now."""
        message = "the load balancer is shutting down"
        for request in list(self._ledger.requests.values()):
            streaming = request.state is RequestState.RELAYING or request.merged
            queued = request.state is RequestState.QUEUED
            self._ledger.cancel_all(request, Reason.DRAINED, now_ns)
            if streaming:
                self._out.append(AbortRequest(request.id, message))
            elif queued:
                self._reject(request, 503, message, now_ns, retry_after=1)
                continue
            else:
                self._out.append(RejectRequest(request.id, 503, message, 1))
            self._ledger.end(request, RequestInput.FAIL, Decision.FAILED, message, now_ns)
        for attempt in list(self._ledger.attempts.values()):
            self._ledger.cancel(attempt, Reason.DRAINED, message, now_ns)  # loads that outlived their requests
