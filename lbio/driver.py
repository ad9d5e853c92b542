"""Drives the core: events in, commands carried out at once, one timer. Nothing is awaited in between."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import anyio
from anyio.abc import TaskGroup

from lbcore.balancer import LoadBalancer
from lbcore.commands import (
    AbortRequest,
    CancelAttempt,
    CancelJob,
    CancelProbe,
    Command,
    CommitAttempt,
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
from lbcore.config import ServerSettings
from lbcore.events import DownstreamClosed, Event, Reason, RequestArrived
from lbcore.memory import Memory
from lbcore.records import Server
from lbcore.schema import SECOND_NS
from lbio.access.credentials import NO_CREDENTIALS, Credentials
from lbio.answers.merge import Merge
from lbio.answers.status import warnings_of
from lbio.attempt import AttemptRun
from lbio.client import LOOK_S
from lbio.configuration.settings import AppConfig
from lbio.exchange import ClientRequest, Exchange
from lbio.job import JobRun
from lbio.journal.logs import Log
from lbio.journal.totals import Totals
from lbio.prober import Probe
from lbio.upstream import Endpoint
from lbio.wire.streams import Connect, connect
from lbio.wire.tls import client_context

_BUILDS_S = 5.0
"""How often the builds of models are compared."""


class Driver:
    """Carries out what the core commands, and owns the tasks that it takes."""

    def __init__(
        self,
        balancer: LoadBalancer,
        app: AppConfig,
        tasks: TaskGroup,
        log: Log,
        clock: Callable[[], int],
        connect: Connect = connect,
        upstream: Mapping[str, Credentials] = MappingProxyType({}),
    ) -> None:
        self.memory = Memory(balancer)
        self.balancer: LoadBalancer = self.memory
        self.app = app
        self.log = log
        self.clock = clock
        self.tasks = tasks
        self._connect = connect
        self._upstream = upstream  # by url
        self.totals = Totals(clock())
        self.via = f"ollama-lb-{secrets.token_hex(6)}"  # in `Via`: a request that has it already goes round in a circle
        self.boot = secrets.token_hex(2)  # begins the ids of requests, so that those before a restart are others
        self._exchanges: dict[int, Exchange] = {}
        self._runs: dict[int, AttemptRun] = {}
        self._probes: dict[int, Probe] = {}
        self.jobs: dict[int, JobRun] = {}
        self._endpoints: dict[int, Endpoint] = {}
        self._probe_ended = anyio.Event()
        self._all_answered = anyio.Event()
        self._afterwards: deque[Callable[[], object]] = deque()  # what can wait until all commands are carried out
        self._timer_due_ns: int | None = None
        self._timer_poke = anyio.Event()
        self._execute: Mapping[type, Callable[[Any], None]] = {
            StartAttempt: self._start_attempt,
            UseModel: self._use_model,
            CancelAttempt: self._cancel_attempt,
            CommitAttempt: self._commit_attempt,
            PassAnswer: self._pass_answer,
            StartMerge: self._start_merge,
            EndMerge: self._end_merge,
            RejectRequest: self._reject_request,
            AbortRequest: self._abort_request,
            StartJob: self._start_job,
            CancelJob: self._cancel_job,
            StartProbe: self._start_probe,
            CancelProbe: self._cancel_probe,
            ForgetServer: self._forget_server,
            RecordDecision: self._record_decision,
        }

    # --- events --------------------------------------------------------------------------------------------

    def dispatch(self, event: Event) -> None:
        """Give the core an event and carry out what it commands, before anything else happens."""
        self._carry_out(self.balancer.handle(event, self.clock()))

    def note_chunk(self, attempt_id: int, n_bytes: int, n_tokens: int) -> None:
        """Count a piece of an answer."""
        self.balancer.note_chunk(attempt_id, n_bytes, n_tokens, self.clock())

    def note_paused(self, attempt_id: int, *, paused: bool) -> None:
        """Tell the core that an answer is, or is not, being read."""
        self.balancer.note_paused(attempt_id, paused=paused, now_ns=self.clock())

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            self._execute[type(command)](command)
        while self._afterwards:
            self._afterwards.popleft()()
        due_ns = self.balancer.next_deadline()
        if due_ns is not None and (self._timer_due_ns is None or due_ns < self._timer_due_ns):
            self._timer_due_ns = due_ns
            self._timer_poke.set()

    async def run_timer(self) -> None:
        """Keep the one timer of the core, for ever."""
        while True:
            self._timer_poke = anyio.Event()
            due_ns = self._timer_due_ns = self.balancer.next_deadline()
            wait_s = None if due_ns is None else max(0.0, (due_ns - self.clock()) / SECOND_NS)
            with anyio.move_on_after(wait_s):
                await self._timer_poke.wait()
                continue
            self._timer_due_ns = None
            self._carry_out(self.balancer.handle_timeout(self.clock()))

    # --- requests ------------------------------------------------------------------------------------------

    def open(self, request: ClientRequest) -> Exchange:
        """Give the core a request; what becomes of it is written into the exchange."""
        exchange = Exchange(request)
        self._exchanges[request.request_id] = exchange
        self.log.request(request)
        self.dispatch(
            RequestArrived(
                request.request_id,
                request.route.name,
                request.facts.model,
                request.facts.kind,
                stream=request.facts.stream,
                generates=request.route.generates,
                runner_key=request.facts.runner_key,
                servers=request.servers,
            )
        )
        return exchange

    def close(self, exchange: Exchange) -> None:
        """Forget a request. If the core still works on it, its client is gone."""
        if exchange.request.request_id in self.balancer.ledger.requests:
            self.dispatch(DownstreamClosed(exchange.request.request_id))
        self._exchanges.pop(exchange.request.request_id, None)
        self.log.forget(exchange.request)
        if exchange.chosen is not None:
            exchange.chosen.retire()
            self.note_over(exchange.chosen)
        exchange.close()
        if not self._exchanges:
            self._all_answered.set()

    async def wait_all_answered(self) -> None:
        """Wait until no client waits for anything."""
        while self._exchanges:
            self._all_answered = anyio.Event()
            await self._all_answered.wait()

    @property
    def n_requests(self) -> int:
        """Requests whose clients have not got everything yet."""
        return len(self._exchanges)

    def _start_attempt(self, command: StartAttempt) -> None:
        exchange = self._exchanges[command.request_id]
        exchange.n_attempts += 1
        self.totals.attempts[command.kind] += 1
        limits = self.app.limits
        run = AttemptRun(
            command.attempt_id,
            exchange,
            self._endpoint(command.server_id),
            self,
            limits.head_bytes_max,
            limits.buffer_bytes_max,
        )
        self._runs[command.attempt_id] = exchange.runs[command.attempt_id] = run
        run.begin()
        self._afterwards.append(run.go_on)

    def _use_model(self, command: UseModel) -> None:
        self._exchanges[command.request_id].use(command.model)

    def spawn(self, run: AttemptRun) -> None:
        """Run the task of an attempt."""
        self.tasks.start_soon(run.run)

    def note_defect(self, error: BaseException) -> None:
        """Tell of a defect of the program."""
        self.log.defect(error)

    def note_over(self, run: AttemptRun) -> None:
        """Forget an attempt that the core does not know any more."""
        if run.attempt_id not in self.balancer.ledger.attempts:
            self._runs.pop(run.attempt_id, None)

    def _cancel_attempt(self, command: CancelAttempt) -> None:
        run = self._runs.pop(command.attempt_id, None)
        if run is not None:
            merge = run.exchange.merge
            if merge is not None:
                merge.end(run.endpoint.name, reason=command.reason, words=command.reason, status=0, body=b"")
            if run.cancel() and command.reason is Reason.LOST_RACE:
                self._afterwards.append(partial(self.tasks.start_soon, self._dial_spare, run.endpoint))
            if not run.chosen:
                run.exchange.runs.pop(command.attempt_id, None)

    def _commit_attempt(self, command: CommitAttempt) -> None:
        self._exchanges[command.request_id].runs[command.attempt_id].choose(passed_on=False)

    def _pass_answer(self, command: PassAnswer) -> None:
        self._exchanges[command.request_id].runs[command.attempt_id].choose(passed_on=True)

    def _start_merge(self, command: StartMerge) -> None:
        exchange = self._exchanges[command.request_id]
        names = [self.balancer.fleet.servers[server_id].name for server_id in command.server_ids]
        exchange.merge = Merge(exchange.request, names, exchange.decided.set)

    def _end_merge(self, command: EndMerge) -> None:
        exchange = self._exchanges.get(command.request_id)
        if exchange is not None and exchange.merge is not None:
            exchange.merge.finish()
            exchange.decided.set()

    def _reject_request(self, command: RejectRequest) -> None:
        exchange = self._exchanges.get(command.request_id)
        if exchange is not None:
            exchange.reject(command)

    def _abort_request(self, command: AbortRequest) -> None:
        exchange = self._exchanges.get(command.request_id)
        if exchange is not None:
            exchange.abort(command.message)

    def _record_decision(self, decision: RecordDecision) -> None:
        self.totals.decisions[decision.decision] += 1
        self._afterwards.append(partial(self.log.decision, decision))

    # --- servers -------------------------------------------------------------------------------------------

    def _endpoint(self, server_id: int) -> Endpoint:
        endpoint = self._endpoints.get(server_id)
        if endpoint is None:
            settings = self.balancer.fleet.servers[server_id].settings
            endpoint = self._endpoints[server_id] = self.new_endpoint(settings)
        return endpoint

    def new_endpoint(self, settings: ServerSettings) -> Endpoint:
        """Return the connections to a server, none of them open yet. Raises OSError for an unusable ca_file."""
        own = self._upstream.get(settings.url, NO_CREDENTIALS)
        tls = client_context(settings)
        return Endpoint(settings.name, settings.url, tls, self.app.pool, self.clock, self._connect, own)

    async def _dial_spare(self, endpoint: Endpoint) -> None:
        await endpoint.dial_spare(self.balancer.config.timeouts.connect_ns)

    def _start_probe(self, command: StartProbe) -> None:
        probe = Probe(command.server_id, command.probe_id, self._endpoint(command.server_id), self, self.via)
        self._probes[command.probe_id] = probe
        self.tasks.start_soon(self._run_probe, probe)

    async def _run_probe(self, probe: Probe) -> None:
        try:
            await probe.run(self.log.defect)
        finally:
            self._probes.pop(probe.probe_id, None)
            self._probe_ended.set()
            self._probe_ended = anyio.Event()

    async def wait_probed(self, still_awaited: Callable[[Server], bool]) -> None:
        """Wait until no server is left for which `still_awaited` holds; looked at whenever a probe has ended."""
        while any(still_awaited(server) for server in self.balancer.fleet):
            await self._probe_ended.wait()

    def _cancel_probe(self, command: CancelProbe) -> None:
        probe = self._probes.pop(command.probe_id, None)
        if probe is not None:
            probe.cancel()

    def _start_job(self, command: StartJob) -> None:
        job = self.jobs[command.job_id] = JobRun(command, self._endpoint(command.server_id), self, self.via)
        self.tasks.start_soon(self._run_job, job)

    async def _run_job(self, job: JobRun) -> None:
        try:
            await job.run(self.log.defect)
        finally:
            self.jobs.pop(job.id, None)

    def _cancel_job(self, command: CancelJob) -> None:
        job = self.jobs.pop(command.job_id, None)
        if job is not None:
            job.cancel()

    def _forget_server(self, command: ForgetServer) -> None:
        endpoint = self._endpoints.pop(command.server_id, None)
        if endpoint is not None:
            endpoint.close()

    async def sweep_pools(self) -> None:
        """Close connections that have been idle for too long, for ever."""
        while True:
            await anyio.sleep(max(1.0, self.app.pool.idle_timeout_ns / SECOND_NS / 2))
            for endpoint in self._endpoints.values():
                endpoint.sweep()

    async def watch_streams(self) -> None:
        """Look after streams whose loop tells of nothing any more, for ever."""
        while True:
            await anyio.sleep(LOOK_S)
            for run in list(self._runs.values()):
                run.look()

    async def watch_builds(self) -> None:
        """Warn, once, of models that are not the same everywhere, for ever."""
        warned: set[str] = set()
        while True:
            found = warnings_of(self.balancer)
            for text in found:
                if text not in warned:
                    self.log.warning(text)
            warned = set(found)
            await anyio.sleep(_BUILDS_S)

    def close_pools(self) -> None:
        """Close every idle connection."""
        for endpoint in self._endpoints.values():
            endpoint.close()
