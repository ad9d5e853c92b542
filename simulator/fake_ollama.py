"""How one Ollama server behaves: its models, its scheduler, its slots. Pure; time is passed in as int ns.

`FakeOllama` is a state machine that the driver (`simulator.serve` with a real clock, `simulator.world` with a
virtual one) feeds with jobs and moments, and that answers with notices. It follows Ollama's scheduler
(design §7): a job whose model is loaded with the same runner options goes straight to that runner and waits
there for a slot, first come first served and without bound. Any other job joins the cold queue, which is
bounded (503 beyond) and worked off strictly one by one: whatever stands in the way of its model (the same
model with other options, or others when memory or the number of runners does not suffice) is unloaded as soon
as it is idle; then the model is loaded. A job that leaves while queued, waiting or loading takes its work
with it.
"""

from collections import deque
from copy import copy
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from simulator.fakes.engine import Engine
from simulator.fakes.jobs import Crashed, Job, Loaded, Notice, Refused, Started, Token, Unloaded, Work
from simulator.fakes.specs import (
    FOREVER_NS,
    NS_PER_MS,
    NS_PER_S,
    FakeModel,
    FakeSpec,
    Prefill,
    RunnerOptions,
    canonical_name,
    keep_alive_ns,
    memory_bytes,
    model_key,
    runner_options,
)
from simulator.workloads.asks import BLOCK_TOKENS

__all__ = [
    "FOREVER_NS",
    "NS_PER_MS",
    "NS_PER_S",
    "Crashed",
    "FakeModel",
    "FakeOllama",
    "FakeSpec",
    "Job",
    "Loaded",
    "Notice",
    "Prefill",
    "PsEntry",
    "Refused",
    "RunnerOptions",
    "Started",
    "Token",
    "Unloaded",
    "Work",
    "canonical_name",
    "keep_alive_ns",
    "runner_options",
]


@dataclass(slots=True, eq=False)
class Slot:
    """A place for one answer, and the prompt it has in its cache."""

    blocks: tuple[int, ...] = ()

    def shared_blocks(self, blocks: tuple[int, ...]) -> int:
        """Return how many blocks from the beginning on need not be read again."""
        count = 0
        for mine, theirs in zip(self.blocks, blocks, strict=False):
            if mine != theirs:
                break
            count += 1
        return count


@dataclass(slots=True)
class Runner:
    """A model in memory."""

    model: FakeModel
    options: RunnerOptions
    size_bytes: int
    keep_alive_ns: int
    engine: Engine
    free: list[Slot]  # the one idle for longest in front
    running: dict[int, tuple[Job, Slot]] = field(default_factory=dict)  # by job id
    visiting: set[int] = field(default_factory=set)  # LOAD jobs not yet ended
    waiting: deque[Job] = field(default_factory=deque)
    expires_at_ns: int | None = None  # None while in use
    doomed: bool = False  # goes as soon as it is idle

    @property
    def idle(self) -> bool:
        """Whether no job is on it."""
        return not (self.running or self.visiting or self.waiting)

    def twin(self) -> "Runner":
        """Return a runner that is at the same point, and goes on by itself."""
        return replace(
            self,
            engine=self.engine.twin(),
            free=[replace(slot) for slot in self.free],
            running={job_id: (job, replace(slot)) for job_id, (job, slot) in self.running.items()},
            visiting=self.visiting.copy(),
            waiting=self.waiting.copy(),
        )


@dataclass(frozen=True, slots=True)
class Load:
    """A load in progress."""

    job: Job
    model: FakeModel
    ready_at_ns: int


class PsEntry(NamedTuple):
    """One line of `/api/ps`; `left_ns` is the time until it expires."""

    model: FakeModel
    size_bytes: int
    size_vram_bytes: int
    num_ctx: int
    left_ns: int


class FakeOllama:
    """One server's state. Every method that takes `now_ns` first does what was due until then."""

    def __init__(self, spec: FakeSpec, now_ns: int) -> None:
        self.spec = spec
        self.disk: dict[str, FakeModel] = {
            model_key(m.name): replace(m, name=canonical_name(m.name)) for m in spec.models
        }
        self.blobs: dict[str, int] = {}  # uploaded: digest, bytes
        self.runners: dict[str, Runner] = {}
        self.pending: deque[Job] = deque()  # the cold queue
        self.current: Job | None = None  # taken off it, in need of room for its model
        self.loading: Load | None = None
        self._factors = (1.0, 1.0)
        for name in spec.start_loaded:
            model = self.find(name)
            if model is None:
                raise ValueError(f"{spec.name}: start_loaded names {name!r}, which is not one of its models")
            self._put(model, runner_options(model, None), round(spec.keep_alive_s * NS_PER_S), now_ns)

    def twin(self) -> "FakeOllama":
        """Return a server that is at the same point, and goes on by itself: to see what would come."""
        twin = copy(self)
        twin.disk, twin.pending = self.disk.copy(), self.pending.copy()
        twin.runners = {key: runner.twin() for key, runner in self.runners.items()}
        return twin

    # disk

    def find(self, name: str) -> FakeModel | None:
        """Return the model of that name on disk."""
        return self.disk.get(model_key(name))

    def copy(self, source: str, destination: str, modified_at: str) -> bool:
        """Give a model a second name; False if there is no such model."""
        model = self.find(source)
        if model is not None:
            name = canonical_name(destination)
            self.disk[model_key(destination)] = replace(model, name=name, modified_at=modified_at)
        return model is not None

    def delete(self, name: str, now_ns: int) -> list[Notice] | None:
        """Remove a model from disk and memory; None if there is no such model."""
        if self.disk.pop(model_key(name), None) is None:
            return None
        return self.unload(name, now_ns)

    # jobs

    def submit(self, job: Job, now_ns: int) -> list[Notice]:
        """Take in a job whose model is on disk."""
        notices = self.advance(now_ns)
        runner = self.runners.get(model_key(job.model))
        if runner is not None and runner.options == job.options:
            self._attach(runner, job, now_ns, notices)
        elif len(self.pending) >= self.spec.max_queue and (self.current or self.loading):
            notices.append(Refused(job.id, now_ns))
        else:
            self.pending.append(job)
            self._pump(now_ns, notices)
        return notices

    def end(self, job_id: int, now_ns: int) -> list[Notice]:
        """Take a job out: its answer is complete, or its client has left, whatever stage it was in."""
        notices = self.advance(now_ns)
        self.pending = deque(job for job in self.pending if job.id != job_id)
        if self.current is not None and self.current.id == job_id:
            self.current = None
        if self.loading is not None and self.loading.job.id == job_id:
            self.loading = None
        for runner in list(self.runners.values()):
            self._detach(runner, job_id, now_ns, notices)
        self._pump(now_ns, notices)
        return notices

    def unload(self, name: str, now_ns: int) -> list[Notice]:
        """Drop a model from memory as soon as it is idle, as keep_alive 0 without a prompt asks for."""
        notices = self.advance(now_ns)
        runner = self.runners.get(model_key(name))
        if runner is not None:
            runner.doomed = True
            self._settle(runner, now_ns, notices)
            self._pump(now_ns, notices)
        return notices

    # answers

    def made(self, job_id: int, now_ns: int) -> tuple[int, int]:
        """Return how many tokens a job's answer has so far, and when the last one was made, ns; (0, 0) for none."""
        engine = self._engine_of(job_id)
        return engine.made(job_id, now_ns) if engine is not None else (0, 0)

    def gaps(self, job_id: int, now_ns: int) -> list[tuple[float, int]]:
        """Return the times between a job's tokens so far as (number of tokens, ns between them)."""
        engine = self._engine_of(job_id)
        return engine.gaps(job_id, now_ns) if engine is not None else []

    def token_due_ns(self, job_id: int, tokens: int) -> int | None:
        """Return when the answer will have so many tokens unless a pace changes before; at least not later.

        None when the job holds no slot any more.
        """
        engine = self._engine_of(job_id)
        return engine.token_due_ns(job_id, tokens) if engine is not None else None

    def watch(self, job_id: int, tokens: int) -> None:
        """Tell of one more token count, which the answer must not have reached yet."""
        engine = self._engine_of(job_id)
        if engine is not None:
            engine.add_mark(job_id, tokens)

    def stall(self, job_id: int, now_ns: int) -> None:
        """Let an answer hold its slot and go no further."""
        engine = self._engine_of(job_id)
        if engine is not None:
            engine.stop(job_id, now_ns)

    def set_factors(self, first: float, token: float, now_ns: int) -> None:
        """Make first tokens, and further ones, take so many times as long from now on. `advance` first."""
        self._factors = first, token
        for runner in self.runners.values():
            runner.engine.set_factors(first, token, now_ns)

    @property
    def pace_version(self) -> int:
        """A number that changes whenever `token_due_ns` may answer differently."""
        return sum(runner.engine.version for runner in self.runners.values())

    def _engine_of(self, job_id: int) -> Engine | None:
        for runner in self.runners.values():
            if job_id in runner.running:
                return runner.engine
        return None

    # time

    def next_deadline_ns(self) -> int | None:
        """Return when `advance` has something to do, if nothing else happens before."""
        due_ns = None if self.loading is None else self.loading.ready_at_ns
        for runner in self.runners.values():
            for moment in (runner.expires_at_ns, runner.engine.next_ns):
                if moment is not None and (due_ns is None or moment < due_ns):
                    due_ns = moment
        return due_ns

    def advance(self, now_ns: int) -> list[Notice]:
        """Do all that was due until now, in order of time; harmless when nothing was."""
        notices: list[Notice] = []
        while (due_ns := self.next_deadline_ns()) is not None and due_ns <= now_ns:
            if self.loading is not None and self.loading.ready_at_ns == due_ns:
                self._finish_load(self.loading, due_ns, notices)
            else:
                for runner in list(self.runners.values()):
                    if runner.engine.next_ns is not None and runner.engine.next_ns <= due_ns:
                        self._make(runner, due_ns, notices)
                    elif runner.expires_at_ns == due_ns:
                        self._drop(runner, due_ns, notices)
            self._pump(due_ns, notices)
        return notices

    def ps(self, now_ns: int) -> list[PsEntry]:
        """Return the models in memory, the longest-lived first, as `/api/ps` lists them."""
        entries = [
            PsEntry(
                model=runner.model,
                size_bytes=runner.size_bytes,
                size_vram_bytes=min(runner.size_bytes, self.spec.vram_bytes),
                num_ctx=runner.options.num_ctx,
                left_ns=(runner.keep_alive_ns if runner.expires_at_ns is None else runner.expires_at_ns - now_ns),
            )
            for runner in self.runners.values()
        ]
        return sorted(entries, key=lambda entry: -entry.left_ns)

    # inside

    def _make(self, runner: Runner, due_ns: int, notices: list[Notice]) -> None:
        """Make the tokens that are due; the first one of a poisonous job is the end of its runner."""
        for mark in runner.engine.advance(due_ns):
            if mark.stream_id in runner.running and runner.running[mark.stream_id][0].poison:
                crashed = [*runner.running, *runner.visiting, *(job.id for job in runner.waiting)]
                notices += [Crashed(job_id, due_ns) for job_id in crashed]
                self._drop(runner, due_ns, notices)
                return
            notices.append(Token(mark.stream_id, mark.at_ns, mark.tokens))

    def _pump(self, now_ns: int, notices: list[Notice]) -> None:
        """Work off the cold queue until something takes time."""
        while self.loading is None:
            if self.current is None:
                if not self.pending:
                    return
                self.current = self.pending.popleft()
            job = self.current
            runner = self.runners.get(model_key(job.model))
            if runner is not None and runner.options == job.options:
                self.current = None
                self._attach(runner, job, now_ns, notices)
                continue
            model = self.find(job.model)
            if model is None:  # deleted while it waited: as good as refused
                self.current = None
                notices.append(Refused(job.id, now_ns))
                continue
            victim = runner or self._victim(memory_bytes(model, job.options))
            if victim is None:
                self.current = None
                self.loading = Load(job, model, now_ns + self.spec.speed(model.name).load_ns(model.size_bytes))
                if self.loading.ready_at_ns <= now_ns:
                    self._finish_load(self.loading, now_ns, notices)
            else:
                victim.doomed = True
                if not victim.idle:
                    return
                self._drop(victim, now_ns, notices)

    def _victim(self, needed_bytes: int) -> Runner | None:
        """Return what must go before so much can be loaded: idle first, shortest keep_alive first (§7.4).

        One that is already to go comes before all others, so that none goes in vain while it is still busy.
        """
        if not self.runners or self._fits(needed_bytes):
            return None
        return min(self.runners.values(), key=lambda r: (not r.doomed, not r.idle, r.keep_alive_ns))

    def _fits(self, needed_bytes: int) -> bool:
        if len(self.runners) >= self.spec.max_loaded:
            return False
        used_bytes = sum(runner.size_bytes for runner in self.runners.values())
        return not self.spec.vram_bytes or used_bytes + needed_bytes <= self.spec.vram_bytes

    def _finish_load(self, load: Load, at_ns: int, notices: list[Notice]) -> None:
        self.loading = None
        runner = self._put(load.model, load.job.options, load.job.keep_alive_ns, at_ns)
        notices.append(Loaded(load.model.name, at_ns))
        self._attach(runner, load.job, at_ns, notices)

    def _put(self, model: FakeModel, options: RunnerOptions, keep_alive: int, at_ns: int) -> Runner:
        engine = Engine(self.spec.speed(model.name))
        engine.set_factors(*self._factors, at_ns)
        free = [Slot() for _ in range(self.spec.num_parallel)]
        runner = Runner(model, options, memory_bytes(model, options), keep_alive, engine, free)
        runner.expires_at_ns = at_ns + keep_alive
        self.runners[model_key(model.name)] = runner
        return runner

    def _attach(self, runner: Runner, job: Job, now_ns: int, notices: list[Notice]) -> None:
        runner.keep_alive_ns = job.keep_alive_ns
        runner.expires_at_ns = None
        if job.work is Work.LOAD:
            runner.visiting.add(job.id)
            notices.append(Started(job.id, now_ns, runner.model.name))
        else:
            runner.waiting.append(job)
            self._fill_slots(runner, now_ns, notices)

    def _fill_slots(self, runner: Runner, now_ns: int, notices: list[Notice]) -> None:
        while runner.waiting and runner.free:
            job = runner.waiting.popleft()
            slot = max(runner.free, key=lambda s: s.shared_blocks(job.blocks)) if job.blocks else runner.free[0]
            unread = job.prompt_tokens - BLOCK_TOKENS * slot.shared_blocks(job.blocks)
            runner.free.remove(slot)
            slot.blocks = job.blocks
            runner.running[job.id] = job, slot
            if job.marks:
                runner.engine.add(job.id, max(1, unread), list(job.marks), now_ns)
            notices.append(Started(job.id, now_ns, runner.model.name))

    def _detach(self, runner: Runner, job_id: int, now_ns: int, notices: list[Notice]) -> None:
        if job_id in runner.running or job_id in runner.visiting:
            runner.visiting.discard(job_id)
            if (held := runner.running.pop(job_id, None)) is not None:
                runner.free.append(held[1])
                runner.engine.remove(job_id, now_ns)
        elif any(job.id == job_id for job in runner.waiting):
            runner.waiting = deque(job for job in runner.waiting if job.id != job_id)
        else:
            return
        self._fill_slots(runner, now_ns, notices)
        self._settle(runner, now_ns, notices)

    def _settle(self, runner: Runner, now_ns: int, notices: list[Notice]) -> None:
        """Decide what becomes of a runner that may have become idle."""
        if not runner.idle:
            return
        if runner.doomed or runner.keep_alive_ns <= 0:
            self._drop(runner, now_ns, notices)
        else:
            runner.expires_at_ns = now_ns + runner.keep_alive_ns

    def _drop(self, runner: Runner, now_ns: int, notices: list[Notice]) -> None:
        del self.runners[model_key(runner.model.name)]
        notices.append(Unloaded(runner.model.name, now_ns))
