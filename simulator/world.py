"""The world around the core under virtual time: it carries out commands on simulated servers, for simulated clients.

The twin of `lbio.driver`: the same `LoadBalancer` gets the same events in the same order as in production, its commands
are carried out at once, and one timer is kept. Tokens are not events: the core is told of them, as `note_chunk` does
in production, before it is told of anything else that concerns their request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lbcore.balancer import LoadBalancer
from lbcore.commands import (
    AbortRequest,
    CancelAttempt,
    CancelJob,
    CancelProbe,
    Command,
    CommitAttempt,
    Decision,
    EndMerge,
    ForgetServer,
    PassAnswer,
    RecordDecision,
    RejectRequest,
    StartAttempt,
    StartJob,
    StartMerge,
    StartProbe,
    UseModel,
)
from lbcore.decision_words import decision_words
from lbcore.events import (
    ActiveModel,
    AttemptFailed,
    DownstreamClosed,
    Event,
    JobEnded,
    ModelInfo,
    ModelsSynced,
    ProbeCompleted,
    Reason,
    RequestArrived,
    StreamEnded,
)
from lbcore.ollama import RequestKind, runner_key
from lbcore.timers import TimerKind
from simulator.attempt import AttemptRun
from simulator.box import Box
from simulator.job import JobRun
from simulator.kernel import Kernel
from simulator.reports.results import AttemptResult, HealthPoint, Outcome, RequestResult, RunResult
from simulator.reports.summary import gap_bin
from simulator.workloads.asks import Ask, Source

Models = tuple[tuple[ModelInfo, ...], tuple[ActiveModel, ...]]
Watcher = Callable[[Event | None, Sequence[Command], int], None]
"""Called after every step of the core with the event (None: a timeout), the commands and the moment."""


class Call:
    """One request under way."""

    __slots__ = ("ask", "committed", "result", "runs", "sent")

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.sent = ask  # as servers get it
        self.result = RequestResult(ask)
        self.runs: dict[int, AttemptRun] = {}  # all its attempts, by id
        self.committed: AttemptRun | None = None


class World:
    """Clients, servers, and the balancer between them."""

    def __init__(
        self,
        boxes: Sequence[Box],
        source: Source,
        kernel: Kernel,
        result: RunResult,
        *,
        pauses: Sequence[tuple[int, int]] = (),
        keep_lines: bool = False,
        watch: Watcher | None = None,
    ) -> None:
        self.boxes = {box.spec.name: box for box in boxes}
        self.result = result
        self.n_open = 0  # requests under way
        self.all_asked = False  # no further request comes by itself
        self._kernel = kernel
        self._source = source
        self._asks = source.asks()
        self._pauses = pauses
        self._keep_lines = keep_lines
        self._watch = watch
        self._calls: dict[int, Call] = {}
        self._runs: dict[int, AttemptRun] = {}
        self._call_of: dict[int, Call] = {}  # by attempt id
        self._probes: dict[int, int] = {}  # probe id -> server id
        self._jobs: dict[int, JobRun] = {}
        self._timer_ns: int | None = None
        self._balancer: LoadBalancer  # given by `begin`, since it may need to ask this world
        self._execute: Mapping[type, Callable[[Any], None]] = {
            StartAttempt: self._start_attempt,
            UseModel: self._use_model,
            CancelAttempt: self._cancel_attempt,
            CommitAttempt: self._commit_attempt,
            PassAnswer: self._pass_answer,
            StartMerge: lambda _command: None,  # no workload asks for what is merged
            EndMerge: lambda _command: None,
            RejectRequest: self._reject_request,
            AbortRequest: self._abort_request,
            StartJob: self._start_job,
            CancelJob: self._cancel_job,
            StartProbe: self._start_probe,
            CancelProbe: self._cancel_probe,
            ForgetServer: lambda _command: None,
            RecordDecision: self._record,
        }

    # --- driving ---------------------------------------------------------------------------------------------

    def gate(self, at_ns: int) -> int:
        """Return when the balancer gets to see what reaches it at a moment: after the pause that it falls into.

        A pause is a machine that was suspended: its clock has jumped when it goes on, and everything is there at once.
        """
        for from_ns, until_ns in self._pauses:
            if from_ns <= at_ns < until_ns:
                return until_ns
        return at_ns

    def begin(self, balancer: LoadBalancer) -> None:
        """Start the balancer, and the first client."""
        self._balancer = balancer
        self._plan_timer()
        self._plan_next_ask()

    def dispatch(self, event: Event) -> None:
        """Give the core an event and carry out what it commands, before anything else happens."""
        now_ns = self._kernel.now_ns
        self.result.n_events += 1
        attempt_id = getattr(event, "attempt_id", None)
        call = self._call_of.get(attempt_id) if attempt_id is not None else None
        if call is not None and len(call.runs) > 1:
            self._sync(call.runs.values())
        if isinstance(event, JobEnded):
            self._jobs.pop(event.job_id, None)
        self._carry_out(event, self._balancer.handle(event, now_ns), now_ns)
        if call is not None and isinstance(event, StreamEnded | AttemptFailed):
            self._on_attempt_over(call, event)

    def _sync_due(self, now_ns: int) -> None:
        """Tell the core of the tokens that the timers now due may look at."""
        for kind, owner_id in self._balancer.timers.due(now_ns):
            call = self._calls.get(owner_id) if kind is TimerKind.MEASURE else None
            call = self._call_of.get(owner_id) if kind is TimerKind.ATTEMPT else call
            if call is not None:
                self._sync(call.runs.values())

    def _sync(self, runs: Iterable[AttemptRun]) -> None:
        """Tell the core of the tokens that have come since it was last told."""
        for run in runs:
            run.sync(self._kernel.now_ns)

    def note_chunk(self, attempt_id: int, n_bytes: int, n_tokens: int, at_ns: int) -> None:
        """Count a piece of an answer."""
        self._balancer.note_chunk(attempt_id, n_bytes, n_tokens, at_ns)

    def _carry_out(self, event: Event | None, commands: list[Command], now_ns: int) -> None:
        for command in commands:
            self._execute[type(command)](command)
        if self._watch is not None:
            self._watch(event, commands, now_ns)
        self._plan_timer()

    def _plan_timer(self) -> None:
        due_ns = self._balancer.next_deadline()
        if due_ns is not None and (self._timer_ns is None or due_ns < self._timer_ns):
            self._timer_ns = due_ns
            self._kernel.at(self.gate(due_ns), self._on_timer, due_ns)

    def _on_timer(self, due_ns: int) -> None:
        if due_ns != self._timer_ns:
            return  # an earlier one was planned since
        self._timer_ns = None
        now_ns = self._kernel.now_ns
        deadline_ns = self._balancer.next_deadline()
        if deadline_ns is not None and deadline_ns <= now_ns:
            self._sync_due(now_ns)
            self.result.n_events += 1
            self._carry_out(None, self._balancer.handle_timeout(now_ns), now_ns)
        else:
            self._plan_timer()

    # --- clients ---------------------------------------------------------------------------------------------

    def _plan_next_ask(self) -> None:
        ask = next(self._asks, None)
        if ask is None:
            self.all_asked = True
        else:
            self._kernel.at(self.gate(ask.arrives_ns), self._next_ask_arrives, ask)

    def _next_ask_arrives(self, ask: Ask) -> None:
        self._plan_next_ask()
        self._arrive(ask)

    def _arrive(self, ask: Ask) -> None:
        call = self._calls[ask.id] = Call(ask)
        self.result.requests.append(call.result)
        self.n_open += 1
        if ask.leaves_after_ns is not None:
            self._kernel.at(self.gate(ask.arrives_ns + ask.leaves_after_ns), self._leave, call)
        self.dispatch(
            RequestArrived(
                ask.id,
                ask.route,
                ask.model,
                RequestKind.GENERATE,
                ask.stream,
                generates=True,
                runner_key="" if ask.num_ctx is None else runner_key({"num_ctx": ask.num_ctx}),
            )
        )

    def _leave(self, call: Call) -> None:
        if call.ask.id in self._calls:
            self._sync(call.runs.values())
            self.dispatch(DownstreamClosed(call.ask.id))
            self._end(call, Outcome.LEFT, "")

    def _end(self, call: Call, outcome: Outcome, why: str, status: int = 0) -> None:
        if self._calls.pop(call.ask.id, None) is None:
            return
        now_ns = self._kernel.now_ns
        result = call.result
        result.outcome, result.why, result.ended_ns = outcome, why, now_ns
        result.status = status or (200 if call.committed is not None else 0)
        if call.committed is not None:
            result.tokens = call.committed.noted
            self._count_gaps(call.committed)
        self.n_open -= 1
        further = self._source.follow_up(call.ask, now_ns, completed=outcome is Outcome.COMPLETED)
        if further is not None:
            self.n_open += 1  # it is as good as there: the run is not over
            self._kernel.at(self.gate(further.arrives_ns), self._follow_up_arrives, further)

    def _follow_up_arrives(self, ask: Ask) -> None:
        self.n_open -= 1
        self._arrive(ask)

    def _count_gaps(self, run: AttemptRun) -> None:
        gaps = self.result.gaps
        for share, gap_ns in run.gaps:
            gaps.bins[gap_bin(gap_ns)] += round(share)
            gaps.max_ns = max(gaps.max_ns, gap_ns)

    # --- commands about requests -----------------------------------------------------------------------------

    def _start_attempt(self, command: StartAttempt) -> None:
        call = self._calls[command.request_id]
        server = self._balancer.fleet.servers[command.server_id]
        now_ns = self._kernel.now_ns
        result = AttemptResult(command.request_id, command.attempt_id, server.name, command.kind, now_ns)
        self.result.attempts.append(result)
        call.result.n_attempts += 1
        run = AttemptRun(call.sent, result, self.boxes[server.name], self, self._kernel)
        call.runs[run.attempt_id] = self._runs[run.attempt_id] = run
        self._call_of[run.attempt_id] = call
        run.start()

    def _use_model(self, command: UseModel) -> None:
        call = self._calls[command.request_id]
        call.sent = replace(call.ask, model=command.model)

    def _cancel_attempt(self, command: CancelAttempt) -> None:
        run = self._runs.pop(command.attempt_id, None)
        if run is not None:
            del self._call_of[command.attempt_id]
            self._close(run, "cancelled", command.reason)
            run.cancel()

    def _close(self, run: AttemptRun, outcome: str, why: str) -> None:
        run.result.ended_ns = self._kernel.now_ns
        run.result.outcome, run.result.why = outcome, why

    def _on_attempt_over(self, call: Call, event: StreamEnded | AttemptFailed) -> None:
        run = call.runs[event.attempt_id]
        self._runs.pop(run.attempt_id, None)
        self._call_of.pop(run.attempt_id, None)
        if isinstance(event, AttemptFailed):
            self._close(run, "failed", event.reason)
            run.closed = True
        else:
            self._close(run, "succeeded", "")
            if run is call.committed:
                self._end(call, Outcome.COMPLETED, "")

    def _commit_attempt(self, command: CommitAttempt) -> None:
        call = self._calls[command.request_id]
        run = call.runs[command.attempt_id]
        now_ns = self._kernel.now_ns
        call.committed = run
        call.result.committed_ns = now_ns
        call.result.server = run.server
        run.result.delivered = True
        if call.ask.stream:
            call.result.first_token_ns = now_ns
        if run.ended_well:  # its whole answer is held
            self._end(call, Outcome.COMPLETED, "")

    def _pass_answer(self, command: PassAnswer) -> None:
        call = self._calls[command.request_id]
        run = call.runs[command.attempt_id]
        call.result.server = run.server
        self._end(call, Outcome.FAILED, f"{run.server} answered {run.status}", run.status)

    def _reject_request(self, command: RejectRequest) -> None:
        call = self._calls[command.request_id]
        outcome = Outcome.FAILED if call.result.n_attempts else Outcome.REJECTED
        self._end(call, outcome, command.message, command.status)

    def _abort_request(self, command: AbortRequest) -> None:
        self._end(self._calls[command.request_id], Outcome.FAILED, command.message)

    # --- commands about servers ------------------------------------------------------------------------------

    def _start_probe(self, command: StartProbe) -> None:
        server = self._balancer.fleet.servers[command.server_id]
        box = self.boxes[server.name]
        self._probes[command.probe_id] = command.server_id
        if not box.wire.is_silent(self._kernel.now_ns):
            self._kernel.at(box.wire.arrival_ns(self._kernel.now_ns), self._probe_knocks, box, command.probe_id)

    def _probe_knocks(self, box: Box, probe_id: int) -> None:
        at_ns = self._kernel.now_ns
        if not box.is_up:
            back_ns = self.gate(box.wire.arrival_ns(at_ns))
            self._kernel.at(back_ns, self._probe_ends, probe_id, Reason.CONNECT_REFUSED, None)
            return
        for _ in range(_PROBE_MESSAGES):
            at_ns = box.wire.arrival_ns(at_ns)
        self._kernel.at(at_ns, self._probe_reads, box, probe_id)

    def _probe_reads(self, box: Box, probe_id: int) -> None:
        if box.hangs_probes:
            box.hold_probe(partial(self._probe_reads, box, probe_id))  # until the core gives it up, or it is over
            return
        reason = box.probe_failure()
        models = box.models() if reason is None else None
        back_ns = self.gate(box.wire.arrival_ns(self._kernel.now_ns))
        self._kernel.at(back_ns, self._probe_ends, probe_id, reason, models)

    def _probe_ends(self, probe_id: int, reason: Reason | None, models: Models | None) -> None:
        server_id = self._probes.pop(probe_id, None)
        if server_id is None:
            return
        self.dispatch(ProbeCompleted(server_id, probe_id, reason, version="0.12.6" if reason is None else ""))
        if models is not None:
            self.dispatch(ModelsSynced(server_id, probe_id, *models))

    def _start_job(self, command: StartJob) -> None:
        box = self.boxes[self._balancer.fleet.servers[command.server_id].name]
        job = self._jobs[command.job_id] = JobRun(command, box, self, self._kernel)
        job.start()

    def _cancel_job(self, command: CancelJob) -> None:
        job = self._jobs.pop(command.job_id, None)
        if job is not None:
            job.cancel()

    def _cancel_probe(self, command: CancelProbe) -> None:
        self._probes.pop(command.probe_id, None)

    def _record(self, decision: RecordDecision) -> None:
        now_ns = self._kernel.now_ns
        if decision.decision is Decision.HEALTH:
            self.result.health.append(HealthPoint(now_ns, decision.server, float(decision.after)))
        if self._keep_lines:
            self.result.lines.append((now_ns, decision.request_id, decision_words(decision)))

    # --- the end -----------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether every client has got what it gets, and none will ask again."""
        return self.all_asked and not self._calls and not self.n_open

    @property
    def open_calls(self) -> Sequence[Call]:
        """The requests under way."""
        return tuple(self._calls.values())

    @property
    def now_ns(self) -> int:
        """The moment."""
        return self._kernel.now_ns

    @property
    def balancer(self) -> LoadBalancer:
        """The balancer under way."""
        return self._balancer

    def finish(self) -> None:
        """Close the books: what is still under way counts as unfinished."""
        result = self.result
        result.ended_ns = self._kernel.now_ns
        for call in list(self._calls.values()):
            call.result.ended_ns = result.ended_ns
        servers = {box.spec.name: box.result for box in self.boxes.values()}
        for attempt in result.attempts:
            if not attempt.ended_ns:
                attempt.ended_ns = result.ended_ns
            server = servers[attempt.server]
            server.tokens += attempt.tokens
            server.busy_ns += attempt.busy_ns
            if not attempt.delivered:
                server.tokens_wasted += attempt.tokens
                server.wasted_ns += attempt.busy_ns
        result.servers = list(servers.values())
        result.amplification = len(result.attempts) / max(1, len(result.requests))

    # --- what policies may ask that know more than the core (`simulator.policies.placements.WorldView`) ----------

    def session_of(self, request_id: int) -> int:
        """Return the session of a request; 0: none."""
        return self._calls[request_id].ask.session

    def first_token_ns(self, server_name: str, request_id: int, now_ns: int) -> int | None:
        """Return when a server would give the first token if asked now; None: it would fail, or break its stream."""
        box = self.boxes[server_name]
        there_ns = now_ns + 3 * box.wire.link.latency_ns
        ask, model = self._calls[request_id].ask, self._balancer.ledger.requests[request_id].model
        ask = replace(ask, model=model or ask.model)
        first_ns = box.foresee_first_token_ns(ask, there_ns)
        return None if first_ns is None else first_ns + box.wire.link.latency_ns


_PROBE_MESSAGES = 6  # the connection's answer, two exchanges, and the third question
