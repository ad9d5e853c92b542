"""The original program as it is, for reference: the decisions that ollama-lb was written to mend.

What is known of it (design §3 and §6, configs/seed.toml): all servers start dead; every sync sets health to 1.0, also
one that was earned or lost; success +2, the fastest +4, a failure halves, below 1.0 a server is dead. A chat goes to a
sample of servers weighted by health: six that have the model loaded, or, when these are fewer than three, three that
have it at all; with a small probability one of them is a dead server. The client waits until the *slowest* racer has
given its first token, or has failed, and two seconds more; then the racer with the most tokens wins and the others are
cancelled. There is one timeout, 30 s, which cuts long loads too; no queue, no retry beyond the other racers, no hedge.

Assumed, since nothing tells: syncs come every `probe.interval` and for no other reason; a window is also waited for
when one racer is left; a failure is whatever is no good answer, save an error of 4xx; tokens that came before the
window count too; a winner that is complete gets its +4, racers that were complete before the choice +2; a server
whose stream broke is drawn after all others; other routes go to one server of the sample.
"""

from __future__ import annotations

from random import Random

from lbcore import commands as cmd
from lbcore import events, race
from lbcore.balancer import LoadBalancer
from lbcore.commands import AttemptKind, Decision
from lbcore.config import Config
from lbcore.events import Reason
from lbcore.ledger import Ledger
from lbcore.ollama import canonical_model, model_not_found
from lbcore.provision import Provision
from lbcore.records import Attempt, Failure, Request
from lbcore.states import AttemptInput, AttemptState, Reliability, ReliabilityInput, RequestInput
from lbcore.timers import TimerKind, Timers
from simulator.policies.original_fleet import Draw, OriginalFleet, is_raced

_NEUTRAL = frozenset({Reason.CLIENT_ERROR, Reason.MODEL_NOT_FOUND, Reason.ELSEWHERE})


class Original(LoadBalancer):
    """The original's decisions under the contract of `LoadBalancer`, of which it shares nothing but that contract."""

    def __init__(self, config: Config, rng: Random) -> None:
        self.config = config
        self.timers = Timers()
        self.next_deadline = self.timers.next_deadline
        self._out: list[cmd.Command] = []
        self._syncing = OriginalFleet(config, self.timers, self._out)
        self.fleet = self._syncing
        self.ledger = Ledger(config, self.fleet, self.timers, self._out)
        self.placement = Draw(config, self.fleet, rng)
        self.provision = Provision(config, self.fleet, self.timers, self._out)  # for who declares models
        self._handlers = {
            events.RequestArrived: self._on_arrived,
            events.DownstreamClosed: self._on_downstream_closed,
            events.DrainDeadlinePassed: self._on_drain_deadline_passed,
            events.AttemptConnected: self._on_connected,
            events.HeadReceived: self._on_head,
            events.FirstTokenReceived: self._on_first_token,
            events.BufferFilled: self._on_first_token,
            events.StreamEnded: self._on_ended,
            events.AttemptFailed: self._on_failed,
            events.ProbeCompleted: self._on_probe_completed,
            events.ModelsSynced: self._on_models_synced,
            events.JobProgressed: self._on_job_progressed,
            events.JobEnded: self._on_job_ended,
            events.ServerAdded: self._on_server_added,
            events.ServerRemovalRequested: self._on_server_removal_requested,
            events.SyncRequested: self._on_sync_requested,
        }
        self._timeouts = {
            TimerKind.ATTEMPT: self._on_attempt_timer,
            TimerKind.MEASURE: self._on_measure_timer,
            TimerKind.PROBE: self._on_probe_timer,
            TimerKind.JOB: self.provision.on_stalled,
            TimerKind.REVIEW: lambda _owner, now_ns: self.provision.review(now_ns),
        }

    def _use_room(self, now_ns: int) -> None:  # noqa: ARG002
        """Nobody waits for room."""
        self.ledger.room_made = False

    def _on_probe_completed(self, event: events.ProbeCompleted, now_ns: int) -> None:
        self.fleet.on_probe_completed(event, now_ns)

    def _on_probe_timer(self, server_id: int, now_ns: int) -> None:
        self.fleet.on_probe_timer(server_id, now_ns)

    def _on_models_synced(self, event: events.ModelsSynced, now_ns: int) -> None:
        self.fleet.on_models_synced(event, now_ns)

    def _on_sync_requested(self, _event: events.SyncRequested, now_ns: int) -> None:
        for server in self.fleet:
            self._syncing.sync(server, now_ns)

    # --- requests --------------------------------------------------------------------------------------------

    def _on_arrived(self, event: events.RequestArrived, now_ns: int) -> None:
        if event.request_id in self.ledger.requests:
            self.ledger.late_events += 1
            return
        model = canonical_model(event.model) if event.model else None
        request = Request(event, model, self.config.route(event.route), now_ns)
        self.ledger.requests[request.id] = request
        candidates = self.fleet.holders(model)
        if candidates:
            chosen = self.placement.first(request, candidates, now_ns)
            for i, server in enumerate(chosen):
                self.ledger.start(request, server, AttemptKind.RACER if i else AttemptKind.PRIMARY, now_ns)
            names = tuple(server.name for server in chosen)
            self.ledger.record(Decision.STARTED, request, "drawn by health", names=names)
            return
        status, message = 502, self.fleet.nobody_there()
        if self.fleet.holders(None):
            status, message = 404, model_not_found(event.model or "")
        self._out.append(cmd.RejectRequest(request.id, status, message))
        self.ledger.end(request, RequestInput.REJECT, Decision.REJECTED, f"{status}: {message}", now_ns)

    def _on_downstream_closed(self, event: events.DownstreamClosed, now_ns: int) -> None:
        request = self.ledger.requests.get(event.request_id)
        if request is None:
            self.ledger.late_events += 1
            return
        self.ledger.cancel_all(request, Reason.CLIENT_LEFT, now_ns)
        self.ledger.end(request, RequestInput.ABORT, Decision.ABORTED, "the client left", now_ns)

    def _on_drain_deadline_passed(self, _event: events.DrainDeadlinePassed, now_ns: int) -> None:
        message = "the load balancer is shutting down"
        for request in list(self.ledger.requests.values()):
            self.ledger.cancel_all(request, Reason.DRAINED, now_ns)
            late = request.committed is not None
            self._out.append(
                cmd.AbortRequest(request.id, message) if late else cmd.RejectRequest(request.id, 503, message)
            )
            self.ledger.end(request, RequestInput.FAIL, Decision.FAILED, message, now_ns)

    # --- attempts --------------------------------------------------------------------------------------------

    def _on_connected(self, event: events.AttemptConnected, now_ns: int) -> None:
        attempt = self.ledger.advance(event.attempt_id, AttemptInput.CONNECTED)
        if attempt is not None:
            self.ledger.expect_by(attempt, now_ns + self.config.timeouts.first_token_warm_ns)

    def _on_head(self, event: events.HeadReceived, now_ns: int) -> None:
        attempt = self.ledger.advance(event.attempt_id, AttemptInput.HEAD)
        if attempt is not None:
            attempt.last_chunk_ns = now_ns

    def _on_first_token(self, event: events.FirstTokenReceived | events.BufferFilled, now_ns: int) -> None:
        attempt = self.ledger.advance(event.attempt_id, AttemptInput.FIRST_TOKEN)
        if attempt is not None and attempt.first_token_ns is None:
            self.ledger.mark_first_token(attempt, now_ns)
            self.ledger.expect_by(attempt, now_ns + self.config.timeouts.silence_ns)
            self._look(attempt.request, now_ns)

    def _look(self, request: Request, now_ns: int) -> None:
        """Go on once every racer has begun, ended or failed: with the window, or with the choice."""
        if request.committed is not None or any(a.first_token_ns is None for a in request.live_attempts):
            return
        if request.live_attempts and is_raced(request):
            if not self.timers.is_armed(TimerKind.MEASURE, request.id):
                self.timers.arm(TimerKind.MEASURE, request.id, now_ns + self.config.race.measure_ns)
            return
        self._choose(request, now_ns)

    def _on_measure_timer(self, request_id: int, now_ns: int) -> None:
        request = self.ledger.requests.get(request_id)
        if request is not None and request.committed is None:
            self._choose(request, now_ns)

    def _choose(self, request: Request, now_ns: int) -> None:
        """Commit the racer with the most tokens, and cancel the others."""
        runners = [a for a in request.attempts if a.state in {AttemptState.STREAMING, AttemptState.SUCCEEDED}]
        winner = min(runners, key=lambda a: (-a.n_tokens, a.first_token_ns or 0, a.id))
        self.ledger.commit(request, winner)
        self._out.append(cmd.CommitAttempt(request.id, winner.id))
        took_ns = now_ns - request.arrived_ns
        self.ledger.record(Decision.COMMITTED, request, "most tokens", server=winner.server.name, took_ns=took_ns)
        self.ledger.disarm(request)
        for loser in request.live_attempts[:]:
            if loser is not winner:
                self.ledger.cancel(loser, Reason.LOST_RACE, f"lost to {winner.server.name}", now_ns)
        for runner in runners:
            if runner is not winner and runner.state is AttemptState.SUCCEEDED:
                self.fleet.succeed(runner.server, now_ns, "lost a race, but ended well")
                self.ledger.waste(runner)
        if winner.state is AttemptState.SUCCEEDED:
            self._finish(request, winner, now_ns)

    def _on_ended(self, event: events.StreamEnded, now_ns: int) -> None:
        attempt = self.ledger.advance(event.attempt_id, AttemptInput.END)
        if attempt is None:
            return
        request = attempt.request
        if attempt.first_token_ns is None:  # an answer without a body
            self.ledger.mark_first_token(attempt, now_ns)
        self.ledger.release(attempt)
        if request.stream and attempt.server.reliability is not Reliability.RELIABLE:
            self.fleet.note_reliability(attempt.server, ReliabilityInput.ENDED_WELL, now_ns, "a stream ended well")
        if request.committed is attempt:
            self._finish(request, attempt, now_ns)
        else:
            self._look(request, now_ns)

    def _finish(self, request: Request, winner: Attempt, now_ns: int) -> None:
        fastest = len(request.attempts) > 1
        self.fleet.succeed(winner.server, now_ns, "won a race" if fastest else "served a request", fastest=fastest)
        why = f"{winner.n_tokens} tokens" if winner.n_tokens else ""
        self.ledger.end(request, RequestInput.FINISH, Decision.FINISHED, why, now_ns, server=winner.server.name)

    def _on_failed(self, event: events.AttemptFailed, now_ns: int) -> None:
        attempt = self.ledger.attempts.get(event.attempt_id)
        if attempt is not None:
            attempt.answered = event.answered
        self._fail(event.attempt_id, event.reason, now_ns, event.status, event.detail)

    def _on_attempt_timer(self, attempt_id: int, now_ns: int) -> None:
        attempt = self.ledger.attempts.get(attempt_id)
        if attempt is None or not self.ledger.is_due(attempt, now_ns):
            return
        reason = Reason.CONNECT_TIMEOUT if attempt.state is AttemptState.CONNECTING else Reason.FIRST_TOKEN_TIMEOUT
        if attempt.first_token_ns is not None:
            reason = Reason.SILENCE_TIMEOUT
            heard_ns = now_ns if attempt.paused else attempt.last_chunk_ns
            attempt.due_ns = heard_ns + self.config.timeouts.silence_ns
            if not self.ledger.is_due(attempt, now_ns):
                return
        self._out.append(cmd.CancelAttempt(attempt.id, reason))
        self._fail(attempt.id, reason, now_ns)

    def _fail(self, attempt_id: int, reason: Reason, now_ns: int, status: int = 0, detail: str = "") -> None:
        attempt = self.ledger.advance(attempt_id, AttemptInput.FAIL)
        if attempt is None:
            return
        request, server = attempt.request, attempt.server
        failure = attempt.failure = Failure(server.name, reason, status, detail)
        request.failures.append(failure)
        took_ns = now_ns - attempt.started_ns
        self.ledger.record(Decision.ATTEMPT_FAILED, request, str(failure), server=server.name, took_ns=took_ns)
        self.ledger.release(attempt)
        self.ledger.waste(attempt)
        if reason is Reason.MODEL_NOT_FOUND and request.model is not None:
            self.fleet.lacks(server, request.model, now_ns)
        elif reason not in _NEUTRAL:
            if attempt.first_token_ns is not None and request.stream:
                self.fleet.note_reliability(server, ReliabilityInput.BROKE, now_ns, str(failure))
            self.fleet.fail(server, failure, now_ns)
        if request.committed is attempt:
            self._out.append(cmd.AbortRequest(request.id, f"the stream broke: {failure}"))
            self.ledger.end(request, RequestInput.FAIL, Decision.FAILED, str(failure), now_ns, server=server.name)
            return
        request.last_answered = attempt if attempt.answered else request.last_answered
        if request.live_attempts or any(a.state is AttemptState.SUCCEEDED for a in request.attempts):
            self._look(request, now_ns)
        else:
            self._conclude(request, now_ns)

    def _conclude(self, request: Request, now_ns: int) -> None:
        """All have failed."""
        given, decision = RequestInput.FAIL, Decision.FAILED
        status, message = race.closing_words(request)
        answered = request.last_answered
        if answered is None or answered.failure is None:
            self._out.append(cmd.RejectRequest(request.id, status, message))
        else:
            status, message = answered.failure.status, "passed on as it was"
            self._out.append(cmd.PassAnswer(request.id, answered.id))
            if status < 500:
                given, decision = RequestInput.FINISH, Decision.FINISHED
        self.ledger.end(request, given, decision, f"{status}: {message}", now_ns)
