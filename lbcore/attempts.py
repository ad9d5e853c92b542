"""Events of attempts: their progress, who wins, and what their end means for the request and for the server."""

from __future__ import annotations

from typing import Final

from lbcore import events, race
from lbcore.broadcast import Broadcast
from lbcore.commands import AbortRequest, CancelAttempt, Command, CommitAttempt, Decision
from lbcore.config import Config, Winner
from lbcore.events import Reason
from lbcore.fleet import Fleet
from lbcore.health import BLAME, SETS_BACK, TIMEOUTS, UNDONE, UNSENT, Blame
from lbcore.ledger import Ledger
from lbcore.ollama import RequestKind, find_route
from lbcore.records import Attempt, Failure, Request, Server, ServerModel, smooth
from lbcore.requests import Requests
from lbcore.schema import SECOND_NS
from lbcore.states import AttemptInput, AttemptState, Reliability, ReliabilityInput, RequestInput, RequestState
from lbcore.timers import TimerKind, Timers
from lbcore.units import counted

# Members bound once: in Python 3.11 a look-up in an enum's class costs more than what the member is used for here.
_CONNECTED: Final = AttemptInput.CONNECTED
_HEAD: Final = AttemptInput.HEAD
_FIRST_TOKEN: Final = AttemptInput.FIRST_TOKEN
_END: Final = AttemptInput.END
_FINISH: Final = RequestInput.FINISH
_RACING: Final = RequestState.RACING
_GENERATE: Final = RequestKind.GENERATE
_LOAD: Final = RequestKind.LOAD
_UNLOAD: Final = RequestKind.UNLOAD
_MANAGE: Final = RequestKind.MANAGE
_RELIABLE: Final = Reliability.RELIABLE
_UNRELIABLE: Final = Reliability.UNRELIABLE
_MOST_TOKENS: Final = Winner.MOST_TOKENS
_LOST_RACE: Final = Reason.LOST_RACE
_COMMITTED: Final = Decision.COMMITTED
_FINISHED: Final = Decision.FINISHED


def _is_refused(request: Request) -> bool:
    """Tell whether a server has said that the request is wrong: that is final."""
    answered = request.last_answered
    return answered is not None and answered.failure is not None and answered.failure.reason is Reason.CLIENT_ERROR


def _may_go_elsewhere(request: Request, reason: Reason) -> bool:
    """Tell whether another server may be asked after a failure."""
    if request.kind is not _MANAGE:
        return not _is_refused(request)
    return reason in (UNSENT if find_route(request.event.route).uploads else UNDONE)


def _blame_of(request: Request, reason: Reason) -> Blame:
    """Return what a failure does to its server: a pull that stands still, or tells of an error, is the registry's."""
    if request.kind is _MANAGE and (reason is Reason.ERROR_LINE or reason in TIMEOUTS - {Reason.CONNECT_TIMEOUT}):
        return Blame.NONE
    return BLAME[reason]


class Attempts:
    """Decides what the progress of attempts leads to. Owned by the balancer."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        ledger: Ledger,
        requests: Requests,
        broadcast: Broadcast,
        timers: Timers,
        out: list[Command],
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._ledger = ledger
        self._requests = requests
        self._broadcast = broadcast
        self._timers = timers
        self._out = out

    def on_connected(self, event: events.AttemptConnected, now_ns: int) -> None:
        """The server accepted: the time for its first token runs."""
        attempt = self._ledger.advance(event.attempt_id, _CONNECTED)
        if attempt is not None:
            self._ledger.expect_by(attempt, now_ns + self._patience_ns(attempt))

    def _patience_ns(self, attempt: Attempt) -> int:
        """Return how long a connected attempt may take to its first token, or to its whole answer."""
        timeouts = self._config.timeouts
        request = attempt.request
        if request.stream and request.kind is not _LOAD:
            return timeouts.first_token_cold_ns if attempt.cold else timeouts.first_token_warm_ns
        if request.kind is _LOAD:
            return timeouts.first_token_cold_ns
        return timeouts.answer_ns + (timeouts.first_token_cold_ns if attempt.cold else 0)

    def _silence_ns(self, request: Request) -> int:
        """Return how long a stream may be silent: a server that checks a pulled model is, for minutes."""
        timeouts = self._config.timeouts
        return timeouts.answer_ns if request.kind is _MANAGE else timeouts.silence_ns

    def on_head(self, event: events.HeadReceived, now_ns: int) -> None:
        """A good head came, before the first token; nothing is decided by it."""
        attempt = self._ledger.advance(event.attempt_id, _HEAD)
        if attempt is not None:
            attempt.last_chunk_ns = now_ns

    def on_first_token(self, event: events.FirstTokenReceived, now_ns: int) -> None:
        """The first token came: this may be the winner."""
        attempt = self._ledger.advance(event.attempt_id, _FIRST_TOKEN)
        if attempt is None or attempt.first_token_ns is not None:
            return
        self._ledger.mark_first_token(attempt, now_ns)
        if attempt.detached:
            self._ledger.cancel(attempt, Reason.LOST_RACE, "its model is loaded now", now_ns)
            return
        request = attempt.request
        if request.stream:
            self._ledger.expect_by(attempt, now_ns + self._silence_ns(request))
        if request.rule is _MOST_TOKENS:
            self._open_window(request, self._config.race.measure_ns, now_ns)
        elif attempt.server.reliability is _UNRELIABLE:
            self._open_window(request, self._config.race.hedge_delay_initial_ns, now_ns)
        self._settle(request, now_ns)

    def _open_window(self, request: Request, length_ns: int, now_ns: int) -> None:
        if not self._timers.is_armed(TimerKind.MEASURE, request.id):
            self._timers.arm(TimerKind.MEASURE, request.id, now_ns + length_ns)

    def on_buffer_filled(self, event: events.BufferFilled, now_ns: int) -> None:
        """No more of this answer can be held: it is the winner if there is none yet."""
        attempt = self._ledger.advance(event.attempt_id, AttemptInput.BUFFER_FULL)
        if attempt is not None:
            attempt.full = True
            attempt.last_chunk_ns = now_ns
            if attempt.first_token_ns is None:  # one token alone is larger than what may be held
                self._ledger.mark_first_token(attempt, now_ns)
            if attempt.detached:
                self._ledger.cancel(attempt, Reason.LOST_RACE, "its model is loaded now", now_ns)
                return
            self._ledger.expect_by(attempt, now_ns + self._config.timeouts.silence_ns)
            self._settle(attempt.request, now_ns)

    def look_at_loads(self, server: Server, now_ns: int) -> None:
        """A server was read: end what went on for the sake of a load that is done, and see who makes it load now.

        That is whoever came first of those that wait for a model it has not loaded, or has with other options.
        """
        if not any(record.loading for record in server.models.values()):
            return  # as mostly
        seen: list[ServerModel] = []
        for attempt in [a for a in self._ledger.attempts.values() if a.server is server and a.loads]:
            target = attempt.target
            if target is None:
                continue
            if target.is_warm(attempt.request.runner_key):
                if attempt.detached and target.active is not None:
                    self._ledger.cancel(attempt, Reason.LOST_RACE, "its model is loaded now", now_ns)
            elif not any(known is target for known in seen):
                attempt.loader = True  # beside one that was to load next while this one waited for a slot
                seen.append(target)

    def on_measure_timer(self, request_id: int, now_ns: int) -> None:
        """The window in which tokens are counted is over."""
        request = self._ledger.requests.get(request_id)
        if request is not None:
            self._settle(request, now_ns, window_over=True)

    def _settle(self, request: Request, now_ns: int, *, window_over: bool = False) -> None:
        """Commit the winner, if there is one by now."""
        if request.state is not _RACING or request.kind is _UNLOAD or request.merged:
            return
        winner = race.winner_now(request, window_over=window_over)
        if winner is not None:
            self._commit(request, winner, now_ns)

    def _commit(self, request: Request, winner: Attempt, now_ns: int) -> None:
        self._ledger.commit(request, winner)
        self._out.append(CommitAttempt(request.id, winner.id))
        rule = request.rule if len(request.attempts) > 1 else "the only one"
        self._ledger.record(_COMMITTED, request, rule, winner.server.name, now_ns - request.arrived_ns)
        learns = request.kind is _GENERATE and winner.target is not None and not winner.cold
        if request.model is not None and learns:
            stats = self._fleet.model_stats(request.model)
            if request.stream:
                stats.first_token.add((winner.first_token_ns or now_ns) - winner.started_ns)
            else:
                stats.answer.add(now_ns - winner.started_ns)
        self._ledger.disarm(request)
        for loser in request.live_attempts[:]:
            if loser is not winner:
                self._lose(loser, winner, now_ns)

    def _lose(self, loser: Attempt, winner: Attempt, now_ns: int) -> None:
        """Cancel a loser, unless a model is being loaded for it: a lost race never cancels a load (design §5)."""
        if loser.loads and loser.loader:
            self._ledger.detach(loser)
            why = "lost, but goes on until its model is loaded"
            took_ns = now_ns - loser.started_ns
            self._ledger.record(Decision.CANCELLED, loser.request, why, server=loser.server.name, took_ns=took_ns)
            return
        if loser.first_token_ns is None and not loser.cold:
            self._fleet.note_loss(loser, winner, now_ns)
        self._ledger.cancel(loser, _LOST_RACE, f"lost to {winner.server.name}", now_ns)

    def on_ended(self, event: events.StreamEnded, now_ns: int) -> None:
        """An answer ended well."""
        attempt = self._ledger.advance(event.attempt_id, _END)
        if attempt is None:
            return
        request = attempt.request
        if attempt.first_token_ns is None:  # an answer without a body
            self._ledger.mark_first_token(attempt, now_ns)
        self._ledger.release(attempt)
        self._note_served(attempt, now_ns)
        if attempt.detached:
            self._ledger.waste(attempt)
            return
        if request.kind is _UNLOAD:
            self._settle_unload(request, now_ns)
            return
        if request.merged:
            self._broadcast.settle(request, now_ns)
            return
        if request.committed is None:
            self._settle(request, now_ns)
        if request.committed is attempt:
            self._finish(request, attempt, now_ns)

    def _note_served(self, attempt: Attempt, now_ns: int) -> None:
        """A whole good answer has come: learn from it, and credit the server."""
        request, server, target = attempt.request, attempt.server, attempt.target
        took_ns = now_ns - attempt.started_ns
        if target is not None and not attempt.cold and request.kind is _GENERATE:
            target.service_ns = smooth(target.service_ns, took_ns)
            since_first_ns = now_ns - (attempt.first_token_ns or now_ns)
            if attempt.n_tokens > 1 and since_first_ns > 0:
                target.token_rate = smooth(target.token_rate, (attempt.n_tokens - 1) * SECOND_NS / since_first_ns)
        if request.kind is _UNLOAD and request.model is not None:
            self._fleet.unloaded(server, request.model, now_ns)
        elif request.kind is _MANAGE:
            self._fleet.probe_now(server, now_ns, changed=True)
        if request.stream and request.kind is _GENERATE and server.reliability is not _RELIABLE:
            self._fleet.note_reliability(server, ReliabilityInput.ENDED_WELL, now_ns, "a stream ended well")
        fastest = request.raced and not attempt.detached
        why = "won a race and ended well" if fastest else "served a request"
        self._fleet.succeed(server, now_ns, why, fastest=fastest)

    def _settle_unload(self, request: Request, now_ns: int) -> None:
        if request.live_attempts:
            return
        served = next((a for a in request.attempts if a.state is AttemptState.SUCCEEDED), None)
        if served is None:
            self._requests.conclude(request, now_ns)
            return
        self._commit(request, served, now_ns)
        self._finish(request, served, now_ns)

    def _finish(self, request: Request, attempt: Attempt, now_ns: int) -> None:
        for server, failure in request.suspects:
            if server.id in self._fleet.servers and server is not attempt.server:
                self._fail_server(server, failure, now_ns)
        why = counted(attempt.n_tokens, "token") if attempt.n_tokens else ""
        self._ledger.end(request, _FINISH, _FINISHED, why, now_ns, attempt.server.name)

    def on_failed(self, event: events.AttemptFailed, now_ns: int) -> None:
        """An attempt failed, as the driver saw it."""
        attempt = self._ledger.attempts.get(event.attempt_id)
        if attempt is not None:
            attempt.answered = event.answered
        self._fail(event.attempt_id, event.reason, now_ns, status=event.status, detail=event.detail)

    def on_timer(self, attempt_id: int, now_ns: int) -> None:
        """An attempt took too long at the step it is in."""
        attempt = self._ledger.attempts.get(attempt_id)
        if attempt is None or not self._ledger.is_due(attempt, now_ns):
            return
        request = attempt.request
        counts_from_ns = now_ns if attempt.paused else attempt.last_chunk_ns
        if attempt.state is AttemptState.CONNECTING:
            reason, limit_ns = Reason.CONNECT_TIMEOUT, self._config.timeouts.connect_ns
        elif attempt.first_token_ns is None or (not request.stream and not attempt.full):
            reason = Reason.FIRST_TOKEN_TIMEOUT if request.stream else Reason.ANSWER_TIMEOUT
            limit_ns = self._patience_ns(attempt)
            if request.kind is _MANAGE and not request.stream:  # which may have taken long to be sent
                attempt.due_ns = max(attempt.due_ns, counts_from_ns + limit_ns)
        else:
            reason, limit_ns = Reason.SILENCE_TIMEOUT, self._silence_ns(request)
            attempt.due_ns = counts_from_ns + limit_ns
        if not self._ledger.is_due(attempt, now_ns):
            return
        self._out.append(CancelAttempt(attempt.id, reason))
        self._fail(attempt.id, reason, now_ns, detail=f"after {limit_ns / SECOND_NS:g} s")

    def _fail(self, attempt_id: int, reason: Reason, now_ns: int, *, status: int = 0, detail: str = "") -> None:
        attempt = self._ledger.advance(attempt_id, AttemptInput.FAIL)
        if attempt is None:
            return
        request, server = attempt.request, attempt.server
        failure = Failure(server.name, reason, status, detail)
        attempt.failure = failure
        request.failures.append(failure)
        self._ledger.record(
            Decision.ATTEMPT_FAILED, request, str(failure), server=server.name, took_ns=now_ns - attempt.started_ns
        )
        self._ledger.release(attempt)
        self._ledger.waste(attempt)
        if request.committed is attempt:
            self._break_stream(attempt, failure, now_ns)
            return
        self._blame(attempt, failure, now_ns)
        if attempt.detached:
            return
        if attempt.answered and not _is_refused(request):
            request.last_answered = attempt
        self._after_failure(request, reason, now_ns)

    def _blame(self, attempt: Attempt, failure: Failure, now_ns: int) -> None:
        request, server = attempt.request, attempt.server
        if failure.reason is Reason.MODEL_NOT_FOUND and request.model is not None:
            self._fleet.lacks(server, request.model, now_ns)
        if failure.reason in SETS_BACK and attempt.target is not None:
            self._fleet.note_failure(attempt, attempt.target, now_ns)
        blame = _blame_of(request, failure.reason)
        if blame is Blame.CONTRAST and not attempt.detached:
            request.suspects.append((server, failure))
        elif blame is Blame.AT_ONCE:
            if attempt.first_token_ns is not None and request.stream:
                self._fleet.note_reliability(server, ReliabilityInput.BROKE, now_ns, str(failure))
            self._fail_server(server, failure, now_ns)

    def _fail_server(self, server: Server, failure: Failure, now_ns: int) -> None:
        was_alive = server.is_alive
        self._fleet.fail(server, failure, now_ns)
        if was_alive and not server.is_alive:
            self._requests.rescue_from(server, now_ns)

    def _break_stream(self, attempt: Attempt, failure: Failure, now_ns: int) -> None:
        """End a committed stream that broke; a RESUME attempt elsewhere would be started here."""
        request, server = attempt.request, attempt.server
        is_to_blame = _blame_of(request, failure.reason) is not Blame.NONE
        if is_to_blame:
            self._fleet.note_reliability(server, ReliabilityInput.BROKE, now_ns, str(failure))
        self._out.append(AbortRequest(request.id, f"the stream broke: {failure}"))
        self._ledger.end(
            request,
            RequestInput.FAIL,
            Decision.FAILED,
            f"{failure} after {counted(attempt.n_tokens, 'token')}",
            now_ns,
            server=server.name,
        )
        if is_to_blame:
            self._fail_server(server, failure, now_ns)
            self._requests.rescue_from(server, now_ns)

    def _after_failure(self, request: Request, reason: Reason, now_ns: int) -> None:
        """Go on after an attempt failed before the commit: wait for the others, ask the next server, or give up."""
        if request.kind is _UNLOAD:
            self._settle_unload(request, now_ns)
            return
        if request.merged:
            self._broadcast.settle(request, now_ns)
            return
        if request.live_attempts:
            self._settle(request, now_ns)
            if not _is_refused(request):
                self._requests.replace(request, now_ns)
            return
        if _may_go_elsewhere(request, reason) and self._requests.retry(request, now_ns):
            return
        self._requests.conclude(request, now_ns)
