"""A full audit of the balancer's state, and of the commands it gives over time (design §4).

`audit` looks at one moment; `Auditor` follows a balancer step by step. Both raise InvariantError, which holds under
`python -O` too, and change nothing. They walk everything, so they are for tests and the simulator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence

from lbcore import commands as cmd
from lbcore.admission import RACE_BURST, RETRY_BURST
from lbcore.balancer import LoadBalancer
from lbcore.commands import AttemptKind, Command, Decision
from lbcore.errors import InvariantError
from lbcore.health import ALIVE_FROM
from lbcore.ollama import RequestKind, canonical_model
from lbcore.records import Attempt, Request, Server
from lbcore.states import ATTEMPT_ENDS, REQUEST_ENDS, AttemptState, Reliability, RequestState, ServerState
from lbcore.timers import TimerKind


def audit(balancer: LoadBalancer, now_ns: int) -> None:
    """Raise InvariantError with everything that is wrong with the state of `balancer`."""
    deadlines = _deadlines(balancer)
    problems = [
        *_requests(balancer, deadlines),
        *_attempts(balancer, deadlines),
        *_counters(balancer),
        *_budgets(balancer),
        *_servers(balancer, deadlines, now_ns),
        *_catalog(balancer),
        *balancer.fleet.pools.out_of_date(now_ns),
        *_jobs(balancer, deadlines),
        *_orphans(balancer, deadlines),
    ]
    if problems:
        raise InvariantError("; ".join(problems))


def _deadlines(balancer: LoadBalancer) -> dict[tuple[TimerKind, int], int]:
    return balancer.timers.deadlines()


# --- requests and attempts ---------------------------------------------------------------------------------


def _requests(balancer: LoadBalancer, deadlines: dict[tuple[TimerKind, int], int]) -> Iterator[str]:
    ledger = balancer.ledger
    for request_id, request in ledger.requests.items():
        if request.id != request_id:
            yield f"{request} is filed under {request_id}"
        if request.state in REQUEST_ENDS:
            yield f"{request} has ended but is still in the ledger"
        queued = request.state is RequestState.QUEUED
        if queued != (request in ledger.queue):
            yield f"{request} {'is not' if queued else 'is'} in the queue"
        if queued != ((TimerKind.QUEUE, request.id) in deadlines):
            yield f"{request} {'has no' if queued else 'has a'} QUEUE timer"
        yield from _racers(request, deadlines)
        if not request.attempts and not request.live_attempts:
            continue
        live = [attempt for attempt in request.attempts if attempt.is_live and not attempt.detached]
        if request.live_attempts != live:
            yield f"{request} counts {request.live_attempts} as live, but {live} are"
        for attempt in request.attempts:
            if attempt.is_live and ledger.attempts.get(attempt.id) is not attempt:
                yield f"{attempt} lives, but the ledger does not know it"
    for request in ledger.queue:
        if ledger.requests.get(request.id) is not request:
            yield f"{request} waits in the queue, but the ledger does not know it"


def _racers(request: Request, deadlines: dict[tuple[TimerKind, int], int]) -> Iterator[str]:
    live = request.live_attempts
    committed = [attempt for attempt in request.attempts if attempt.state is AttemptState.COMMITTED]
    if len(committed) > 1:
        yield f"{request} has {len(committed)} committed attempts"
    if request.state is RequestState.QUEUED and request.attempts:
        yield f"{request} is queued, but has attempts"
    if request.state is RequestState.RACING:
        if not live:
            yield f"{request} races without a live attempt: nothing will ever end it"
        if request.committed is not None or committed:
            yield f"{request} races, but {request.committed or committed} is committed"
        if request.hedges_left > 0 and (TimerKind.HEDGE, request.id) not in deadlines:
            yield f"{request} has {request.hedges_left} hedges left, but no HEDGE timer"
    elif (TimerKind.HEDGE, request.id) in deadlines or (TimerKind.MEASURE, request.id) in deadlines:
        yield f"{request} does not race, but has a HEDGE or MEASURE timer"
    if request.state is RequestState.RELAYING and not (live == committed == [request.committed]):
        yield f"{request} relays {request.committed}, but {committed} are committed and {live} live"
    use = request.alias
    asked = request.attempts if use is None else request.attempts[use.attempts_from :]
    if len({attempt.server.id for attempt in asked}) < len(asked):
        yield f"{request} was sent twice to the same server"
    if use is not None:
        if request.model not in {canonical_model(name) for name in use.models} - {*use.given_up}:
            yield f"{request} is for {use}, which has no such model left"
        if live and (use.sent != request.model or any(attempt not in asked for attempt in live)):
            yield f"{request} is sent as {use.sent}, or was before"


def _attempts(balancer: LoadBalancer, deadlines: dict[tuple[TimerKind, int], int]) -> Iterator[str]:
    ledger = balancer.ledger
    for attempt_id, attempt in ledger.attempts.items():
        request = attempt.request
        if attempt.id != attempt_id or attempt not in request.attempts:
            yield f"{attempt} is filed under {attempt_id}, its request has {request.attempts}"
        if attempt.state in ATTEMPT_ENDS:
            yield f"{attempt} has ended but is still in the ledger"
        if (TimerKind.ATTEMPT, attempt.id) not in deadlines:
            yield f"{attempt} has no ATTEMPT timer"
        if balancer.fleet.servers.get(attempt.server.id) is not attempt.server:
            yield f"{attempt} runs on a server that is gone"
        if attempt.detached:
            if attempt is request.committed or not attempt.loader or attempt.first_token_ns is not None:
                yield f"{attempt} is detached, but is not a load under way"
        elif ledger.requests.get(request.id) is not request:
            yield f"{attempt} lives on after its {request} has ended"
        if attempt.target is not None and attempt.server.models.get(request.model or "") is not attempt.target:
            yield f"{attempt} counts for a record of {request.model} that its server does not have any more"


def _jobs(balancer: LoadBalancer, deadlines: dict[tuple[TimerKind, int], int]) -> Iterator[str]:
    jobs = balancer.provision.jobs
    for job_id, job in jobs.items():
        if job.id != job_id or (TimerKind.JOB, job_id) not in deadlines:
            yield f"{job.work} {job.model} on {job.server.name} is filed under {job_id}, or has no JOB timer"
        if balancer.fleet.servers.get(job.server.id) is not job.server or job.server.state is ServerState.DRAINING:
            yield f"{job.work} {job.model} goes on on {job.server.name}, which is gone, or is to go"
    busy = Counter(job.server.name for job in jobs.values())
    yield from (f"{n} jobs at once on {name}" for name, n in busy.items() if n > 1)
    if (balancer.config.models != ()) != ((TimerKind.REVIEW, 0) in deadlines):
        yield f"there are {len(balancer.config.models)} declared models, and the REVIEW timer does not fit that"


# --- counts ------------------------------------------------------------------------------------------------


def _counters(balancer: LoadBalancer) -> Iterator[str]:
    live = list(balancer.ledger.attempts.values())
    by_server = Counter(attempt.server.id for attempt in live)
    by_model = Counter((a.server.id, a.request.model) for a in live if a.target is not None)
    by_load = Counter((a.server.id, a.request.model) for a in live if a.cold and a.first_token_ns is None)
    for server in balancer.fleet:
        if server.in_flight != by_server[server.id]:
            yield f"{server}: {by_server[server.id]} attempts live"
        for name, record in server.models.items():
            key = server.id, name
            if record.in_flight != by_model[key]:
                yield f"{server}: {name} in_flight={record.in_flight}, but {by_model[key]} attempts live"
            if record.loading != by_load[key]:
                yield f"{server}: {name} loading={record.loading}, but {by_load[key]} attempts wait for its load"
    retries = sum(attempt.kind is AttemptKind.RETRY for attempt in live if attempt.request.committed is not attempt)
    if balancer.ledger.retry_budget.under_way != retries:
        yield f"{balancer.ledger.retry_budget.under_way} retries are said to be under way, {retries} are"


def _budgets(balancer: LoadBalancer) -> Iterator[str]:
    queue = balancer.ledger.queue
    if len(queue) > queue.length_max:
        yield f"{len(queue)} requests are queued, {queue.length_max} may be"
    credits_max = max(RACE_BURST, balancer.config.race.budget)
    if not 0 <= balancer.placement.race_budget.credits <= credits_max:
        yield f"{balancer.placement.race_budget.credits} race credits, not within 0 and {credits_max}"
    retries, retry = balancer.ledger.retry_budget, balancer.config.retry
    if retry.budget > 0 and not 0 <= retries.credits <= RETRY_BURST:
        yield f"{retries.credits} retry credits, not within 0 and {RETRY_BURST}"
    if retry.budget == 0 and retries.under_way > retry.budget_min:
        yield f"{retries.under_way} retries are under way, {retry.budget_min} may be"
    if balancer.ledger.wasted_tokens < 0:
        yield f"{balancer.ledger.wasted_tokens} wasted tokens"


# --- servers -----------------------------------------------------------------------------------------------


def _servers(balancer: LoadBalancer, deadlines: dict[tuple[TimerKind, int], int], now_ns: int) -> Iterator[str]:
    value_max = balancer.config.health.value_max
    for server_id, server in balancer.fleet.servers.items():
        if server.id != server_id:
            yield f"{server} is filed under {server_id}"
        if not 0 <= server.health <= value_max:
            yield f"{server}: health {server.health} is not within 0 and {value_max}"
        if (server.reliability is Reliability.RELIABLE) != (server.breaks == 0):
            yield f"{server}: {server.breaks} breaks"
        if server.losses < 0 or server.probe_failures < 0:
            yield f"{server}: {server.losses} losses, {server.probe_failures} failed probes"
        due = deadlines.get((TimerKind.PROBE, server.id))
        if server.state is ServerState.DRAINING:
            yield from _draining(server, due)
            continue
        if server.is_alive != (server.health >= ALIVE_FROM):
            yield f"{server}: health {server.health}"
        probe = balancer.config.probe
        longest_ns = max(probe.interval_ns, probe.interval_dead_ns, probe.interval_dead_max_ns, probe.timeout_ns)
        if due is None:
            yield f"{server} has no PROBE timer: it will never be looked at again"
        elif due > now_ns + longest_ns:
            yield f"{server} is not probed for {(due - now_ns) / 1e9:g} s"


def _catalog(balancer: LoadBalancer) -> Iterator[str]:
    fleet = balancer.fleet
    models = {name for server in fleet for name in server.models}
    models |= {request.model for request in balancer.ledger.requests.values() if request.model is not None}
    for model in (None, *sorted(models)):
        holders = [server for server in fleet if server.is_alive and (model is None or server.has(model))]
        if fleet.holders(model) != holders:
            yield f"{fleet.holders(model)} are said to have {model or 'any model'}, but {holders} have it"
        elif model is not None and fleet.pool(model).records != [server.models[model] for server in holders]:
            yield f"what is kept of the holders of {model} is out of date"

    if fleet.outcasts() != [s for s in fleet if s.state is ServerState.DEAD or (s.is_alive and s.doubted)]:
        yield "what is kept of the dead and doubted servers is out of date"


def _draining(server: Server, due: int | None) -> Iterator[str]:
    if server.in_flight == 0:
        yield f"{server} has nothing in flight, but was not forgotten"
    if due is not None or server.probe_id:
        yield f"{server} is draining, but is still probed"


def _orphans(balancer: LoadBalancer, deadlines: dict[tuple[TimerKind, int], int]) -> Iterator[str]:
    owners: dict[TimerKind, Container[int]] = {
        TimerKind.ATTEMPT: balancer.ledger.attempts,
        TimerKind.PROBE: balancer.fleet.servers,
        TimerKind.JOB: balancer.provision.jobs,
        TimerKind.REVIEW: (0,),
    }
    for kind, owner in deadlines:
        if owner not in owners.get(kind, balancer.ledger.requests):
            yield f"a {kind.name} timer is armed for {owner}, which is gone"


# --- over time ---------------------------------------------------------------------------------------------

_TERMINAL = frozenset({Decision.FINISHED, Decision.REJECTED, Decision.FAILED, Decision.ABORTED})


class Auditor:
    """Follows one balancer: call `check` with the commands of every step, in order."""

    def __init__(self, balancer: LoadBalancer) -> None:
        self._balancer = balancer
        self._last_attempt_id = 0
        self._last_probe_id = 0
        self._last_job_id = 0
        self._alive: set[int] = set()  # servers, after the last step
        self._live: dict[int, int] = {}  # request by attempt
        self._probes: dict[int, int] = {}  # probe by server
        self._seen: set[int] = set()  # requests
        self._under_way: set[int] = set()  # requests, after the last step
        self._committed: dict[int, int] = {}  # attempt by request
        self._merged: set[int] = set()  # requests whose answer is made of several
        self._told: set[int] = set()  # requests whose client got its last command
        self._used: dict[int, str] = {}  # by request: the model that servers are to be asked for instead of its own
        self._ended: dict[int, Decision] = {}
        self._gone: set[int] = set()  # servers

    @property
    def ended(self) -> dict[int, Decision]:
        """The outcome of every request that has ended."""
        return self._ended

    def check(self, commands: Sequence[Command], now_ns: int) -> None:
        """Audit the state after a step, and the commands that the step gave."""
        audit(self._balancer, now_ns)
        for command in commands:
            problem = self._problem(command)
            if problem:
                raise InvariantError(f"{command}: {problem}")
        self._alive = self._alive_now()
        ledger = self._balancer.ledger
        self._seen |= ledger.requests.keys()
        for request_id in self._under_way - ledger.requests.keys():
            if request_id not in self._ended:
                raise InvariantError(f"request {request_id} has vanished without an outcome")
        self._under_way = set(ledger.requests)
        for attempt in ledger.attempts.values():
            if attempt.id > self._last_attempt_id:
                raise InvariantError(f"{attempt} was started without a command")
        self._live = {attempt.id: attempt.request.id for attempt in ledger.attempts.values()}

    def _alive_now(self) -> set[int]:
        return {server.id for server in self._balancer.fleet if server.is_alive}

    def _problem(self, command: Command) -> str:
        match command:
            case cmd.StartAttempt():
                return self._on_start(command)
            case cmd.UseModel(request_id, model):
                return self._on_use(request_id, model)
            case cmd.CancelAttempt(attempt_id):
                return "" if self._live.pop(attempt_id, None) is not None else "it does not run (any more)"
            case cmd.CommitAttempt(request_id, attempt_id):
                problem = self._on_answer(request_id, committed=False)
                self._committed[request_id] = attempt_id
                return problem or ("its answer is merged" if request_id in self._merged else "")
            case cmd.StartMerge(request_id):
                self._merged.add(request_id)
                return self._on_answer(request_id, committed=False)
            case cmd.PassAnswer(request_id) | cmd.RejectRequest(request_id) | cmd.EndMerge(request_id):
                problem = self._on_answer(request_id, committed=False)
                self._told.add(request_id)
                return problem
            case cmd.AbortRequest(request_id):
                problem = self._on_answer(request_id, committed=request_id not in self._merged)
                self._told.add(request_id)
                return problem
            case cmd.RecordDecision():
                return self._on_decision(command)
            case cmd.StartJob(job_id, server_id):
                known, self._last_job_id = self._last_job_id, job_id
                if job_id <= known:
                    return "the id was used before"
                # one that was alive before the step may have died in it, after that
                return "" if server_id in self._alive | self._alive_now() else "the server is not alive"
            case cmd.CancelJob(job_id):
                return "" if job_id <= self._last_job_id else "there is no such job"
            case _:
                return self._on_server(command)

    def _on_start(self, start: cmd.StartAttempt) -> str:
        if start.attempt_id <= self._last_attempt_id:
            return "the id was used before"
        self._last_attempt_id = start.attempt_id
        self._live[start.attempt_id] = start.request_id
        self._seen.add(start.request_id)
        if start.request_id in self._told or start.request_id in self._ended or start.request_id in self._committed:
            return "the request has its answer already"
        attempt = self._balancer.ledger.attempts.get(start.attempt_id)
        if start.server_id in self._gone:
            return "the server is gone"
        return "" if attempt is None else self._misplaced(attempt)

    def _on_use(self, request_id: int, model: str) -> str:
        if request_id in self._told or request_id in self._ended or request_id in self._committed:
            return "the request has its answer already"
        attempts = self._balancer.ledger.attempts.values()
        if any(attempt.request.id == request_id and attempt.id in self._live for attempt in attempts):
            return "servers are at work on another model for it"
        if self._used.get(request_id) == model:
            return "so it was sent before"
        self._used[request_id] = model
        return ""

    def _misplaced(self, attempt: Attempt) -> str:
        server, request = attempt.server, attempt.request
        if server.state is ServerState.DRAINING:
            return "the server is draining"
        model = None if request.event.servers or request.merged else request.model
        if model is not None and not server.has(model) and any(s.is_alive and s.has(model) for s in self._fleet()):
            return f"{server.name} does not have {model}, another server does"
        if (
            attempt.target is not None
            and request.kind is not RequestKind.UNLOAD
            and attempt.kind is not AttemptKind.RETRY
            and server.is_alive
        ):
            # an unload needs no room; a retry that came after it in the same step may have taken more than there is
            others = (a for a in self._balancer.ledger.attempts.values() if a.request.kind is not RequestKind.UNLOAD)
            in_flight = sum(other.target is attempt.target and other.id <= attempt.id for other in others)
            if in_flight > server.settings.in_flight_max:
                return f"{server.name} has {in_flight} of {model} in flight"
        return ""

    def _fleet(self) -> list[Server]:
        return list(self._balancer.fleet)

    def _on_answer(self, request_id: int, *, committed: bool) -> str:
        if request_id in self._told or request_id in self._ended:
            return "the request is over"
        if committed != (request_id in self._committed):
            return "nothing was committed" if committed else "an attempt is committed"
        return ""

    def _on_decision(self, record: cmd.RecordDecision) -> str:
        self._seen |= {record.request_id} - {0}
        if record.decision not in _TERMINAL:
            return ""
        before = self._ended.setdefault(record.request_id, record.decision)
        return "" if before is record.decision and record.request_id in self._seen else f"it was {before} before"

    def _on_server(self, command: Command) -> str:
        match command:
            case cmd.StartProbe(server_id, probe_id):
                known = probe_id > self._last_probe_id and server_id not in self._gone
                self._last_probe_id = self._probes[server_id] = probe_id
                return "" if known else "the id was used before, or the server is gone"
            case cmd.CancelProbe(server_id, probe_id):
                return "" if self._probes.pop(server_id, 0) == probe_id else "it does not run"
            case cmd.ForgetServer(server_id):
                twice = server_id in self._gone
                self._gone.add(server_id)
                return "twice" if twice else ""
            case _:
                return "what is this?"
