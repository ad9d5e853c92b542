"""Declared placement: which server is to pull, load or delete which model, so that all is where `[[models]]` wants it.

`wanted` decides from what the servers were last seen to have, and changes nothing; `review` starts what it says, one
piece of work a server at a time. What failed is tried again after a pause that doubles
(exponential backoff, as in Kubernetes' image pulls); so is what went well and did not last, such as a model that two
others keep pushing out of memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from lbcore.commands import CancelJob, Command, Decision, RecordDecision, StartJob, Work
from lbcore.config import Config, ModelSettings
from lbcore.events import JobEnded, JobProgressed, Reason
from lbcore.fleet import Fleet
from lbcore.ollama import canonical_model
from lbcore.records import Server
from lbcore.schema import SECOND_NS
from lbcore.states import ServerState
from lbcore.timers import TimerKind, Timers

REVIEW_NS: Final = 5 * SECOND_NS
"""How often is looked at what is to be done, beside whenever a server was read."""

_HEALTHY: Final = ServerState.HEALTHY


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work on one server."""

    id: int
    server: Server
    model: str  # canonical
    work: Work
    was_loaded: bool
    started_ns: int


@dataclass(frozen=True, slots=True)
class Setback:
    """Work that has failed, or did not last, so many times in a row; it is left alone until `again_ns`."""

    times: int
    again_ns: int
    why: str


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done next."""

    work: Work
    server: Server
    model: str
    why: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where one declared model is, and is to be; servers by name."""

    settings: ModelSettings
    model: str
    copies: int
    servers: tuple[str, ...]  # that it is placed on
    on_disk: tuple[str, ...]
    loaded: tuple[str, ...]


Key = tuple[int, str, Work]
"""Server, model and work."""


class Provision:
    """Brings models to where they are declared to be. Owned by the balancer."""

    def __init__(self, config: Config, fleet: Fleet, timers: Timers, out: list[Command]) -> None:
        self._config = config
        self._fleet = fleet
        self._timers = timers
        self._out = out
        self._declared = {canonical_model(model.name): model for model in config.models}
        self._last_job_id = 0
        self.jobs: dict[int, Job] = {}
        self.setbacks: dict[Key, Setback] = {}
        self._warmed_ns: dict[tuple[int, str], int] = {}  # when a model was last told to be loaded
        self._pulled: dict[tuple[int, str], None] = {}  # and not seen there yet, since the server was not read again
        if self._declared:
            timers.arm(TimerKind.REVIEW, 0, 0)

    def __repr__(self) -> str:
        return f"<Provision of {len(self._declared)} models, {len(self.jobs)} jobs>"

    # --- what is to be ---------------------------------------------------------------------------------------

    def places(self, now_ns: int) -> list[Place]:
        """Return where each declared model is, and is to be."""
        shelves: Counter[int] = Counter()
        return [self._place(model, now_ns, shelves)[0] for model in self._declared]

    def placed(self, model: str | None, now_ns: int) -> list[Server] | None:
        """Return the live servers that a model is placed on; None when it is not declared."""
        if model not in self._declared:
            return None
        shelves: Counter[int] = Counter()
        for name in self._declared:
            _, servers = self._place(name, now_ns, shelves)
            if name == model:
                return [server for server in servers if server.state is _HEALTHY]
        return None

    def _place(self, model: str, now_ns: int, shelves: Counter[int]) -> tuple[Place, list[Server]]:
        """Return where a model is to be; `shelves` counts the models placed on each server, so that they spread."""
        settings = self._declared[model]
        allowed = [s for s in self._fleet if not settings.servers or s.name in settings.servers]
        copies = settings.copies or len(settings.servers) or 1
        ranked = sorted((rank, s.id) for s in allowed if (rank := self._rank(s, model, now_ns, shelves)) is not None)
        servers = [self._fleet.servers[server_id] for _, server_id in ranked[:copies]]
        shelves.update(server.id for server in servers)
        holders = [s for s in self._fleet if s.state is _HEALTHY and s.has(model)]
        place = Place(
            settings,
            model,
            copies,
            _names(servers),
            _names(s for s in holders if s.models[model].available is not None),
            _names(s for s in holders if s.models[model].loaded),
        )
        return place, servers

    def _rank(self, server: Server, model: str, now_ns: int, shelves: Mapping[int, int]) -> tuple[int, int, int] | None:
        """Return how well a server is suited, the lowest best; None when it is not.

        Who has a model keeps it; then whoever pulls it already goes on; then those where pulls do not fail, and with
        the fewest models placed on them so far.
        """
        if server.state is _HEALTHY:
            if server.has(model):
                return 0, 0, 0
            pulls = any(job.server is server and job.model == model for job in self.jobs.values())
            pulls = pulls or (server.id, model) in self._pulled
            setback = self.setbacks.get((server.id, model, Work.PULL))
            return (2, 0, 0) if pulls else (3, setback.times if setback is not None else 0, shelves.get(server.id, 0))
        if server.state is ServerState.DEAD and server.died_ns is not None and server.has(model):
            lasts = now_ns < server.died_ns + self._config.placement.replace_after_ns
            return (1, 0, 0) if lasts else None
        return None

    def wanted(self, now_ns: int) -> list[Step]:
        """Return all that is lacking or too much, as far as the live servers are concerned."""
        if any(server.last_sync_ns is None and not server.probe_failures for server in self._fleet):
            return []  # it may turn out to have everything
        shelves: Counter[int] = Counter()
        placed = [self._place(model, now_ns, shelves) for model in self._declared]
        return [step for place, servers in placed for step in self._wanted(place, servers, now_ns)]

    def _wanted(self, place: Place, servers: list[Server], now_ns: int) -> Iterable[Step]:
        """Yield what one model lacks."""
        model, settings = place.model, place.settings
        have = 0
        for server in servers:
            if server.state is not _HEALTHY:
                continue
            record = server.models.get(model)
            if record is None or not server.has(model):
                yield Step(Work.PULL, server, model, f"placed on {', '.join(place.servers)}, missing here")
                continue
            have += 1
            if not settings.warm or record.loading:
                continue
            alone = server.in_flight == record.in_flight  # a load would push others out, or wait for them
            if not record.loaded and alone:
                yield Step(Work.WARM, server, model, "it is to stay loaded, and is not")
            elif record.loaded and not record.in_flight and self._is_due(server, model, now_ns):
                yield Step(Work.WARM, server, model, "it is to stay loaded")
        if settings.prune and have == place.copies:
            for server in self._fleet:
                record = server.models.get(model)
                extra = server.state is _HEALTHY and server not in servers and record is not None
                if extra and record is not None and record.available is not None and not record.in_flight:
                    yield Step(Work.DELETE, server, model, f"placed on {', '.join(place.servers)}, not here")

    def _is_due(self, server: Server, model: str, now_ns: int) -> bool:
        last_ns = self._warmed_ns.get((server.id, model))
        return last_ns is None or now_ns >= last_ns + self._config.placement.warm_every_ns

    # --- doing it --------------------------------------------------------------------------------------------

    def review(self, now_ns: int) -> None:
        """Start what is to be done, one thing a server at a time."""
        if not self._declared:
            return
        self._forget()
        busy = {job.server.id for job in self.jobs.values()}
        for step in self.wanted(now_ns):
            if step.server.id not in busy and not step.server.outdated and not self._rests(step, now_ns):
                busy.add(step.server.id)
                self._start(step, now_ns)
        self._timers.arm(TimerKind.REVIEW, 0, now_ns + REVIEW_NS)

    def _rests(self, step: Step, now_ns: int) -> bool:
        """Tell whether some work has failed so recently that it is left alone."""
        setback = self.setbacks.get((step.server.id, step.model, step.work))
        stays = step.work is Work.WARM and step.server.models[step.model].loaded  # it need not be loaded anew
        return setback is not None and now_ns < setback.again_ns and not stays

    def _forget(self) -> None:
        """Drop what is not true any more: setbacks of what is done, and all about servers that are gone."""
        for key in list(self.setbacks):
            server_id, model, work = key
            server = self._fleet.servers.get(server_id)
            done = server is not None and server.has(model) is (work is not Work.DELETE)
            if server is None or (done and work is not Work.WARM):
                del self.setbacks[key]
        servers = self._fleet.servers
        for pair in [pair for pair in self._warmed_ns if pair[0] not in servers]:
            del self._warmed_ns[pair]
        for pair in [pair for pair in self._pulled if pair[0] not in servers or not servers[pair[0]].outdated]:
            del self._pulled[pair]

    def _start(self, step: Step, now_ns: int) -> None:
        self._last_job_id += 1
        record = step.server.models.get(step.model)
        was_loaded = record is not None and record.loaded
        runner_key = record.runner_key or "" if record is not None else ""  # so that nothing is loaded anew
        job = Job(self._last_job_id, step.server, step.model, step.work, was_loaded, now_ns)
        self.jobs[job.id] = job
        self._timers.arm(TimerKind.JOB, job.id, now_ns + self._config.placement.stall_ns)
        name = self._declared[step.model].name
        if step.work is Work.WARM:
            self._warmed_ns[step.server.id, step.model] = now_ns
        self._out.append(StartJob(job.id, step.server.id, step.work, name, runner_key))
        if step.work is not Work.WARM or not was_loaded:
            self._record(Decision.JOB_STARTED, job, step.why)

    def on_progressed(self, event: JobProgressed, now_ns: int) -> bool:
        """Take note that a job goes on; False when it is over."""
        if event.job_id not in self.jobs:
            return False
        self._timers.arm(TimerKind.JOB, event.job_id, now_ns + self._config.placement.stall_ns)
        return True

    def on_ended(self, event: JobEnded, now_ns: int) -> bool:
        """Take the end of a job; False when it is not one under way."""
        job = self.jobs.pop(event.job_id, None)
        if job is None:
            return False
        self._timers.cancel(TimerKind.JOB, job.id)
        if event.reason is None:
            self._succeeded(job, now_ns)
        else:
            self._failed(job, f"{event.reason}: {event.detail}" if event.detail else event.reason, now_ns)
        self.review(now_ns)
        return True

    def _succeeded(self, job: Job, now_ns: int) -> None:
        key = (job.server.id, job.model, job.work)
        if job.work is Work.WARM:
            self._fleet.loaded(job.server, job.model, now_ns - job.started_ns)
        if job.work is Work.PULL:
            self._pulled[job.server.id, job.model] = None
        if job.work is not Work.WARM or not job.was_loaded:
            self._fleet.probe_now(job.server, now_ns, changed=True)
        if job.work is Work.WARM and job.was_loaded:
            self.setbacks.pop(key, None)  # it has lasted
            return
        self._set_back(key, "it did not last", now_ns)
        self._record(Decision.JOB_DONE, job, "", now_ns - job.started_ns)

    def _failed(self, job: Job, why: str, now_ns: int) -> None:
        setback = self._set_back((job.server.id, job.model, job.work), why, now_ns)
        again_s = (setback.again_ns - now_ns) / SECOND_NS
        self._record(Decision.JOB_FAILED, job, f"{why} (again in {again_s:.0f} s)", now_ns - job.started_ns)
        self._fleet.probe_now(job.server, now_ns)

    def _set_back(self, key: Key, why: str, now_ns: int) -> Setback:
        """Let some work rest, each time for twice as long."""
        settings, before = self._config.placement, self.setbacks.get(key)
        times = 1 if before is None else before.times + 1
        pause_ns = min(settings.retry_ns << min(times - 1, 32), settings.retry_max_ns)
        setback = self.setbacks[key] = Setback(times, now_ns + pause_ns, why)
        return setback

    def on_stalled(self, job_id: int, now_ns: int) -> None:
        """Give up a job that has told of no progress for too long."""
        job = self.jobs.pop(job_id, None)
        if job is not None:
            self._out.append(CancelJob(job.id))
            self._failed(job, Reason.STALLED, now_ns)

    def cancel_on(self, server: Server) -> None:
        """Give up what is under way on a server that is to go."""
        self.cancel_all(lambda job: job.server is server)

    def cancel_all(self, chosen: Callable[[Job], bool] = lambda _job: True) -> None:
        """Give up what is under way."""
        for job in [job for job in self.jobs.values() if chosen(job)]:
            del self.jobs[job.id]
            self._timers.cancel(TimerKind.JOB, job.id)
            self._out.append(CancelJob(job.id))

    def _record(self, decision: Decision, job: Job, why: str, took_ns: int = 0) -> None:
        what = f"{job.work} {self._declared[job.model].name}"
        self._out.append(
            RecordDecision(decision, server=job.server.name, why=why, before=what, took_ns=took_ns)
        )


def _names(servers: Iterable[Server]) -> tuple[str, ...]:
    return tuple([server.name for server in servers])
