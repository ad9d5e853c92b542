"""Requests and attempts under way. Every change of their state, and every count that follows from it, is made here."""

from __future__ import annotations

from lbcore.admission import AdmissionQueue, RetryBudget
from lbcore.commands import AttemptKind, CancelAttempt, Command, Decision, RecordDecision, StartAttempt
from lbcore.config import Config
from lbcore.events import Reason
from lbcore.fleet import Fleet
from lbcore.records import Attempt, Request, Server
from lbcore.states import (
    ATTEMPT_TRANSITIONS,
    REQUEST_ENDS,
    REQUEST_TRANSITIONS,
    AttemptInput,
    Reliability,
    ReliabilityInput,
    RequestInput,
    RequestState,
)
from lbcore.timers import TimerKind, Timers


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
        self._last_attempt_id += 1
        attempt = Attempt(self._last_attempt_id, request, server, kind, now_ns)
        request.attempts.append(attempt)
        request.live_attempts.append(attempt)
        self.attempts[attempt.id] = attempt
        server.in_flight += 1
        if attempt.target is not None:
            attempt.target.in_flight += 1
            attempt.target.loading += attempt.cold
        self.retry_budget.under_way += kind is AttemptKind.RETRY
        if request.state is RequestState.QUEUED:
            self._timers.cancel(TimerKind.QUEUE, request.id)
            self.step(request, RequestInput.START)
        if server.reliability is not Reliability.RELIABLE:
            self._fleet.note_reliability(server, ReliabilityInput.CHOSEN, now_ns, "chosen again")
        attempt.due_ns = attempt.timer_ns = now_ns + self._config.timeouts.connect_ns
        self._timers.arm(TimerKind.ATTEMPT, attempt.id, attempt.timer_ns)
        self._out.append(StartAttempt(request.id, attempt.id, server.id, kind))
        return attempt

    def advance(self, attempt_id: int, given: AttemptInput) -> Attempt | None:
        """Step an attempt; None, and counted as late, when the input means nothing to it."""
        attempt = self.attempts.get(attempt_id)
        following = ATTEMPT_TRANSITIONS.get((attempt.state, given)) if attempt is not None else None
        if attempt is None or following is None:
            self.late_events += 1
            return None
        attempt.state = following
        return attempt

    def expect_by(self, attempt: Attempt, due_ns: int) -> None:
        """Set when an attempt has taken too long at its step.

        Most steps end long before. So the timer is only armed anew if it would come too late; when it fires, it looks
        at `due_ns`.
        """
        attempt.due_ns = due_ns
        if due_ns < attempt.timer_ns:
            attempt.timer_ns = due_ns
            self._timers.arm(TimerKind.ATTEMPT, attempt.id, due_ns)

    def is_due(self, attempt: Attempt, now_ns: int) -> bool:
        """Tell whether a timer that fired means something; if not, arm it for when it will."""
        if attempt.due_ns <= now_ns:
            return True
        attempt.timer_ns = attempt.due_ns
        self._timers.arm(TimerKind.ATTEMPT, attempt.id, attempt.due_ns)
        return False

    def mark_first_token(self, attempt: Attempt, now_ns: int) -> None:
        """Note when the answer began; its model is loaded from now on."""
        attempt.first_token_ns = attempt.last_chunk_ns = now_ns
        self._fleet.note_first_token(attempt, now_ns)
        if attempt.target is not None:
            attempt.target.loading -= attempt.cold

    def release(self, attempt: Attempt) -> None:
        """Give back what an ended attempt held."""
        del self.attempts[attempt.id]
        if not attempt.detached:
            attempt.request.live_attempts.remove(attempt)
        self._timers.cancel(TimerKind.ATTEMPT, attempt.id)
        attempt.server.in_flight -= 1
        if attempt.target is not None:
            attempt.target.in_flight -= 1
            if attempt.first_token_ns is None:
                attempt.target.loading -= attempt.cold
        if attempt.request.committed is not attempt:
            self._count_off_retry(attempt)
        self.room_made = True
        if attempt.loader and attempt.loads:
            self._pass_on_load(attempt)
        self._fleet.forget_if_drained(attempt.server)

    def _pass_on_load(self, gone: Attempt) -> None:
        """Ollama loads for the request that came first; if that goes, for the next one."""
        for attempt in self.attempts.values():
            if attempt.target is gone.target and attempt.loads:
                attempt.loader = True
                return

    def waste(self, attempt: Attempt) -> None:
        """Count the tokens of an ended attempt that were not delivered."""
        if attempt.request.committed is not attempt:
            self.wasted_tokens += attempt.n_tokens

    def commit(self, request: Request, winner: Attempt) -> None:
        """Choose an attempt; a retry is over with that, though its answer may stream on for long."""
        self.step(request, RequestInput.COMMIT)
        request.committed = winner
        if winner.id in self.attempts:  # else its whole answer is held, and it has ended already
            self.advance(winner.id, AttemptInput.COMMIT)
            self._count_off_retry(winner)

    def _count_off_retry(self, attempt: Attempt) -> None:
        self.retry_budget.under_way -= attempt.kind is AttemptKind.RETRY

    def detach(self, attempt: Attempt) -> None:
        """Let an attempt that lost its race go on, until the model it loads is loaded."""
        attempt.detached = True
        attempt.request.live_attempts.remove(attempt)

    def cancel(self, attempt: Attempt, reason: Reason, why: str, now_ns: int) -> None:
        """Cancel an attempt that is not needed any more."""
        if self.advance(attempt.id, AttemptInput.CANCEL) is not None:
            self._out.append(CancelAttempt(attempt.id, reason))
            self.record(
                Decision.CANCELLED,
                attempt.request,
                why,
                server=attempt.server.name,
                took_ns=now_ns - attempt.started_ns,
            )
            self.release(attempt)
            self.waste(attempt)

    def cancel_all(self, request: Request, reason: Reason, now_ns: int) -> None:
        """Cancel whatever still runs for a request."""
        for attempt in request.live_attempts[:]:
            self.cancel(attempt, reason, reason, now_ns)

    # --- requests ------------------------------------------------------------------------------------------

    def step(self, request: Request, given: RequestInput) -> None:
        """Step a request. Its inputs come from the balancer alone, so one that does not fit is a defect."""
        following = REQUEST_TRANSITIONS.get((request.state, given))
        assert following is not None, (request, given)  # noqa: S101
        request.state = following
        assert following not in REQUEST_ENDS or not request.live_attempts, request  # noqa: S101

    def disarm(self, request: Request) -> None:
        """Drop the timers of a request."""
        self._timers.cancel(TimerKind.HEDGE, request.id)
        self._timers.cancel(TimerKind.MEASURE, request.id)
        if request.state is RequestState.QUEUED:
            self._timers.cancel(TimerKind.QUEUE, request.id)

    def end(
        self, request: Request, given: RequestInput, decision: Decision, why: str, now_ns: int, *, server: str = ""
    ) -> None:
        """End a request: this is its one outcome."""
        if request.state is not RequestState.RELAYING:  # else that was done at the commit
            self.disarm(request)
        self.step(request, given)
        self.queue.remove(request)
        del self.requests[request.id]
        self.record(decision, request, why, server=server, took_ns=now_ns - request.arrived_ns)

    def record(
        self,
        decision: Decision,
        request: Request,
        why: str,
        *,
        server: str = "",
        took_ns: int = 0,
        names: tuple[str, ...] = (),
    ) -> None:
        """Tell of a decision about a request."""
        self._out.append(RecordDecision(decision, request.id, server, why, "", "", took_ns, names))
