"""Requests and attempts under way. Every change of their state, and every count that follows from it, is made here."""

from __future__ import annotations

from typing import Final

from lbcore.admission import AdmissionQueue, RetryBudget
from lbcore.commands import AttemptKind, CancelAttempt, Command, Decision, RecordDecision, StartAttempt, UseModel
from lbcore.config import Config
from lbcore.events import Reason
from lbcore.fleet import Fleet
from lbcore.records import Attempt, Request, Server, ServerModel
from lbcore.states import (
    ATTEMPT_STEPS,
    REQUEST_ENDS,
    REQUEST_STEPS,
    AttemptInput,
    Reliability,
    ReliabilityInput,
    RequestInput,
    RequestState,
    ServerState,
)
from lbcore.timers import TimerKind, Timers

# Members bound once: in Python 3.11 a look-up in an enum's class costs more than what the member is used for here.
_RACER: Final = AttemptKind.RACER
_HEDGE: Final = AttemptKind.HEDGE
_RETRY: Final = AttemptKind.RETRY
_QUEUED: Final = RequestState.QUEUED
_RELAYING: Final = RequestState.RELAYING
_START: Final = RequestInput.START
_COMMIT: Final = RequestInput.COMMIT
_CHOOSE: Final = AttemptInput.COMMIT
_CANCEL: Final = AttemptInput.CANCEL
_RELIABLE: Final = Reliability.RELIABLE
_DRAINING: Final = ServerState.DRAINING
_CANCELLED: Final = Decision.CANCELLED
_ATTEMPT_TIMER: Final = TimerKind.ATTEMPT
_HEDGE_TIMER: Final = TimerKind.HEDGE
_MEASURE_TIMER: Final = TimerKind.MEASURE
_QUEUE_TIMER: Final = TimerKind.QUEUE

_new: Final = tuple.__new__  # of the named tuples below: their own constructors take twice as long


class Ledger:
    """What is under way, by id."""

    def __init__(self, config: Config, fleet: Fleet, timers: Timers, out: list[Command]) -> None:
        self._config = config
        self._fleet = fleet
        self._timers = timers
        self._out = out
        self._last_attempt_id = 0
        self.requests: dict[int, Request] = {}
        self.attempts: dict[int, Attempt] = {}
        self.queue = AdmissionQueue(config.queue.length_max)
        self.retry_budget = RetryBudget(config.retry)
        self.room_made = False  # an attempt has ended since this was last reset
        self.late_events = 0  # events for what is over: harmless, but counted
        self.wasted_tokens = 0  # seen from attempts that were not delivered

    # --- attempts ------------------------------------------------------------------------------------------

    def start(self, request: Request, server: Server, kind: AttemptKind, now_ns: int) -> Attempt:
        """Start an attempt."""
        self._last_attempt_id = attempt_id = self._last_attempt_id + 1
        due_ns = now_ns + self._config.timeouts.connect_ns
        attempt = Attempt(attempt_id, request, server, kind, now_ns, due_ns)
        request.attempts.append(attempt)
        request.live_attempts.append(attempt)
        self.attempts[attempt_id] = attempt
        server.in_flight += 1
        self._fleet.moved[server.id] = server
        target = attempt.target
        if target is not None:
            target.in_flight += 1
            if target.failures:
                self._fleet.set_back(server, target, now_ns)
            if attempt.cold:
                self._see_who_loads(attempt, target)
        if kind is _RACER or kind is _HEDGE:
            request.raced = True
        elif kind is _RETRY:
            self.retry_budget.begin()
        if request.state is _QUEUED:
            self._timers.cancel(_QUEUE_TIMER, request.id)
            self.step(request, _START)
        if server.reliability is not _RELIABLE:
            self._fleet.note_reliability(server, ReliabilityInput.CHOSEN, now_ns, "chosen again")
        self._timers.arm(_ATTEMPT_TIMER, attempt_id, due_ns)
        alias = request.alias
        if alias is not None and alias.sent != request.model and request.model is not None:
            alias.sent = request.model
            self._out.append(UseModel(request.id, alias.name))
        self._out.append(_new(StartAttempt, (request.id, attempt_id, server.id, kind)))
        return attempt

    def advance(self, attempt_id: int, given: AttemptInput) -> Attempt | None:
        """Step an attempt; None, and counted as late, when the input means nothing to it."""
        attempt = self.attempts.get(attempt_id)
        if attempt is not None:
            following = ATTEMPT_STEPS[attempt.state].get(given)
            if following is not None:
                attempt.state = following
                return attempt
        self.late_events += 1
        return None

    def expect_by(self, attempt: Attempt, due_ns: int) -> None:
        """Set when an attempt has taken too long at its step.

        Most steps end long before. So the timer is only armed anew if it would come too late; when it fires, it looks
        at `due_ns`.
        """
        attempt.due_ns = due_ns
        if due_ns < attempt.timer_ns:
            attempt.timer_ns = due_ns
            self._timers.arm(_ATTEMPT_TIMER, attempt.id, due_ns)

    def is_due(self, attempt: Attempt, now_ns: int) -> bool:
        """Tell whether a timer that fired means something; if not, arm it for when it will."""
        if attempt.due_ns <= now_ns:
            return True
        attempt.timer_ns = attempt.due_ns
        self._timers.arm(_ATTEMPT_TIMER, attempt.id, attempt.due_ns)
        return False

    def mark_first_token(self, attempt: Attempt, now_ns: int) -> None:
        """Note when the answer began; its model is loaded from now on."""
        attempt.first_token_ns = attempt.last_chunk_ns = now_ns
        self._fleet.note_first_token(attempt, now_ns)
        if attempt.target is not None:
            attempt.target.loading -= attempt.cold
            if attempt.target.loading:
                self._pass_on_load(attempt)

    def release(self, attempt: Attempt) -> None:
        """Give back what an ended attempt held."""
        request, server, target = attempt.request, attempt.server, attempt.target
        del self.attempts[attempt.id]
        if not attempt.detached:
            request.live_attempts.remove(attempt)
        self._timers.cancel(_ATTEMPT_TIMER, attempt.id)
        server.in_flight -= 1
        self._fleet.moved[server.id] = server
        if target is not None:
            target.in_flight -= 1
            if attempt.first_token_ns is None:
                target.loading -= attempt.cold
        if request.committed is not attempt:
            self._count_off_retry(attempt)
        self.room_made = True
        if attempt.loader and attempt.loads:
            self._pass_on_load(attempt)
        if server.state is _DRAINING:
            self._fleet.forget_if_drained(server)

    def _see_who_loads(self, attempt: Attempt, target: ServerModel) -> None:
        """Tell whether a new attempt is the one for which Ollama loads: nobody else waits for a load to come."""
        attempt.loader = target.loading == 0 or not any(
            other.target is target and other.loader and other.loads and not target.is_warm(other.request.runner_key)
            for other in self.attempts.values()
        )
        target.loading += 1

    def _pass_on_load(self, served: Attempt) -> None:
        """Ollama loads for the request that came first; when that is served or goes, for the next that needs a load.

        Those with the same options do not, once it is loaded.
        """
        target = served.target
        if target is None:
            return
        for attempt in self.attempts.values():
            if attempt.target is target and attempt.loads and not target.is_warm(attempt.request.runner_key):
                attempt.loader = True
                return

    def waste(self, attempt: Attempt) -> None:
        """Count the tokens of an ended attempt that were not delivered."""
        if attempt.request.committed is not attempt:
            self.wasted_tokens += attempt.n_tokens

    def commit(self, request: Request, winner: Attempt) -> None:
        """Choose an attempt; a retry is over with that, though its answer may stream on for long."""
        self.step(request, _COMMIT)
        request.committed = winner
        if winner.kind is _RETRY:
            self.retry_budget.give_back()
        if winner.id in self.attempts:  # else its whole answer is held, and it has ended already
            self.advance(winner.id, _CHOOSE)
            self._count_off_retry(winner)

    def _count_off_retry(self, attempt: Attempt) -> None:
        if attempt.kind is _RETRY:
            self.retry_budget.under_way -= 1

    def detach(self, attempt: Attempt) -> None:
        """Let an attempt that lost its race go on, until the model it loads is loaded."""
        attempt.detached = True
        attempt.request.live_attempts.remove(attempt)

    def cancel(self, attempt: Attempt, reason: Reason, why: str, now_ns: int) -> None:
        """Cancel an attempt that is not needed any more."""
        if self.advance(attempt.id, _CANCEL) is not None:
            self._out.append(_new(CancelAttempt, (attempt.id, reason)))
            self.record(_CANCELLED, attempt.request, why, attempt.server.name, now_ns - attempt.started_ns)
            self.release(attempt)
            self.waste(attempt)

    def cancel_all(self, request: Request, reason: Reason, now_ns: int) -> None:
        """Cancel whatever still runs for a request."""
        for attempt in request.live_attempts[:]:
            self.cancel(attempt, reason, reason, now_ns)

    # --- requests ------------------------------------------------------------------------------------------

    def step(self, request: Request, given: RequestInput) -> None:
        """Step a request. Its inputs come from the balancer alone, so one that does not fit is a defect."""
        following = REQUEST_STEPS[request.state].get(given)
        assert following is not None, (request, given)  # noqa: S101
        request.state = following
        assert following not in REQUEST_ENDS or not request.live_attempts, request  # noqa: S101

    def disarm(self, request: Request) -> None:
        """Drop the timers of a request."""
        self._timers.cancel(_HEDGE_TIMER, request.id)
        self._timers.cancel(_MEASURE_TIMER, request.id)
        if request.state is _QUEUED:
            self._timers.cancel(_QUEUE_TIMER, request.id)

    def end(
        self, request: Request, given: RequestInput, decision: Decision, why: str, now_ns: int, server: str = ""
    ) -> None:
        """End a request: this is its one outcome."""
        if request.state is not _RELAYING:  # else that was done at the commit
            self.disarm(request)
        self.step(request, given)
        self.queue.remove(request)
        del self.requests[request.id]
        self.record(decision, request, why, server, now_ns - request.arrived_ns)

    def record(
        self,
        decision: Decision,
        request: Request,
        why: str,
        server: str = "",
        took_ns: int = 0,
        names: tuple[str, ...] = (),
    ) -> None:
        """Tell of a decision about a request."""
        self._out.append(_new(RecordDecision, (decision, request.id, server, why, "", "", took_ns, names)))
