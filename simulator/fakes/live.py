"""A fake Ollama under a running clock (anyio's): jobs wait, tokens take their time. Knows nothing of sockets.

`LiveFake.generate` sleeps as `simulator.fake_ollama` decides and gives the pieces of the answer to a `Sink`.
Cancelling it, at any point, is what a client that leaves does.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import anyio

from simulator.fake_ollama import NS_PER_S, Crashed, FakeOllama, FakeSpec, Job, Notice, Refused, Started, Work
from simulator.fakes.answers import Timing
from simulator.fakes.api import (
    Generation,
    HeaderPairs,
    Moment,
    Reply,
    busy_reply,
    fault_reply,
    single_reply,
    stream_headers,
)
from simulator.fakes.dialects import dialect_of
from simulator.faults import NO_EFFECT, Effect, Fault, FaultKind, active, next_change_ns


def now_ns() -> int:
    """Return the event loop's clock in ns: monotonic, or virtual where the loop's is."""
    return round(anyio.current_time() * NS_PER_S)


def _seconds_until(moment_ns: int | None) -> float | None:
    return None if moment_ns is None else max(0, moment_ns - now_ns()) / NS_PER_S


@dataclass(frozen=True, slots=True)
class Abort:
    """A client that left before its answer was complete. `at_ns` is `now_ns()`'s time."""

    at_ns: int
    path: str
    stage: str  # hung, queued or generating
    tokens: int  # made for it until then


@dataclass(slots=True)
class Stats:
    """What a server has seen; survives stop and start."""

    requests: Counter[str] = field(default_factory=Counter)  # by path
    aborts: list[Abort] = field(default_factory=list)
    tokens_generated: int = 0
    tokens_undelivered: int = 0  # of these, never written to a client
    tokens_of_aborted: int = 0  # of these, made for clients that left, written or not
    concurrent: int = 0  # generating requests in the house, queued ones too
    concurrent_max: int = 0
    connections: int = 0  # open now
    connections_total: int = 0

    @property
    def aborted(self) -> int:
        """How many clients left early."""
        return len(self.aborts)


@dataclass(slots=True)
class Progress:
    """How far one request has come."""

    stage: str = "hung"  # hung (by a fault), queued, generating
    made: int = 0  # tokens
    written: int = 0  # tokens


class Cut(Exception):  # noqa: N818  not an error: the connection is to end here
    """End the connection without another byte."""


class Sink(Protocol):
    """Where an answer goes."""

    async def reply(self, reply: Reply) -> None:
        """Send a complete answer."""

    async def chunks(self, headers: HeaderPairs, pieces: Sequence[bytes], *, last: bool = False) -> None:
        """Send pieces of a stream, a chunk each; the head comes before the first, the end after the last."""

    async def cut(self, headers: HeaderPairs, piece: bytes) -> None:
        """End the connection inside the chunk of `piece`. Raises Cut."""


@dataclass(slots=True)
class _Waiter:
    """A job that waits for the scheduler."""

    decided: anyio.Event
    verdict: Started | Refused | Crashed | None = None


class LiveFake:
    """One server's state, clock, faults and figures."""

    def __init__(self, spec: FakeSpec) -> None:
        self.spec = spec
        self.stats = Stats()
        self.fake = FakeOllama(spec, now_ns())
        self._epoch_wall_ns = time.time_ns() - now_ns()
        self._faults: tuple[Fault, ...] = spec.faults
        self._faults_since_ns = now_ns()
        self._faults_changed = anyio.Event()
        self._waiters: dict[int, _Waiter] = {}
        self._clock_wake = anyio.Event()
        self._clock_until_ns: int | None = None
        self._paced = anyio.Event()  # set when the pace of a stream has changed
        self._pace_version = 0
        self._effect = NO_EFFECT

    def reset(self) -> None:
        """Begin anew, as a restarted server does; faults and figures stay, and so does the disk."""
        disk, blobs = self.fake.disk, self.fake.blobs
        self.fake = FakeOllama(self.spec, now_ns())
        self.fake.disk, self.fake.blobs = disk, blobs
        self._waiters.clear()
        self._effect = NO_EFFECT
        self.effect()

    def moment(self, serial: int) -> Moment:
        """Return the present."""
        at_ns = now_ns()
        return Moment(at_ns, self._epoch_wall_ns + at_ns, serial)

    # faults

    def set_faults(self, faults: Sequence[Fault]) -> None:
        """Replace all faults; their schedules count from now."""
        self._faults = tuple(faults)
        self._faults_since_ns = now_ns()
        self._faults_changed.set()
        self._faults_changed = anyio.Event()

    def effect(self) -> Effect:
        """Return what the faults amount to now."""
        at_ns = now_ns()
        effect = active(self._faults, at_ns - self._faults_since_ns)
        if effect != self._effect:
            self._effect = effect
            notices = self.fake.advance(at_ns)
            self.fake.set_factors(effect.first_token_factor, effect.token_factor, at_ns)
            self.notify(notices)
        return effect

    async def fault_change(self, seen: Effect) -> None:
        """Wait until the faults are replaced or their schedule says something new; at once unless as `seen`."""
        if self.effect() != seen:
            return
        next_ns = next_change_ns(self._faults, now_ns() - self._faults_since_ns)
        at_ns = None if next_ns is None else self._faults_since_ns + next_ns
        changed = self._faults_changed
        with anyio.move_on_after(_seconds_until(at_ns)):
            await changed.wait()

    # the scheduler's clock

    async def keep_time(self) -> None:
        """Advance the state whenever something is due, for ever."""
        while True:
            self.notify(self.fake.advance(now_ns()))
            wake = self._clock_wake = anyio.Event()
            self._clock_until_ns = self.fake.next_deadline_ns()
            with anyio.move_on_after(_seconds_until(self._clock_until_ns)):
                await wake.wait()

    def notify(self, notices: Sequence[Notice]) -> None:
        """Tell the waiting requests what the scheduler decided."""
        for notice in notices:
            if isinstance(notice, Started | Refused | Crashed) and notice.job_id in self._waiters:
                waiter = self._waiters[notice.job_id]
                waiter.verdict = notice
                waiter.decided.set()
        if self.fake.pace_version != self._pace_version:
            self._pace_version = self.fake.pace_version
            self._paced.set()
            self._paced = anyio.Event()
        due_ns = self.fake.next_deadline_ns()
        if due_ns is not None and (self._clock_until_ns is None or due_ns < self._clock_until_ns):
            self._clock_wake.set()

    # answers

    async def generate(self, wanted: Generation, moment: Moment, sink: Sink, progress: Progress) -> None:
        """See an answer through, from the queue to its last byte."""
        job_id = wanted.job.id
        fake = self.fake
        waiter = self._waiters[job_id] = _Waiter(anyio.Event())
        progress.stage = "queued"
        try:
            self.notify(fake.submit(wanted.job, moment.now_ns))
            await waiter.decided.wait()
            if isinstance(waiter.verdict, Started):
                progress.stage = "generating"
                await self._speak(wanted, moment, sink, progress)
            else:
                await sink.reply(busy_reply(wanted.answer.api, moment))
        finally:
            self._waiters.pop(job_id, None)
            self.notify(fake.end(job_id, now_ns()))

    async def _speak(self, wanted: Generation, moment: Moment, sink: Sink, progress: Progress) -> None:
        if wanted.failure is not None:
            await sink.reply(wanted.failure)
            return
        answer = wanted.answer
        dialect = dialect_of(answer)
        headers = stream_headers(wanted)
        started_ns = first_ns = now_ns()
        tokens = 0 if wanted.job.work is Work.LOAD else len(answer.tokens)
        for index in range(tokens):
            effect = self.effect()
            breaks = effect.breaks_at(index)
            if breaks is not None:
                await self._break(breaks, wanted, moment, sink, index)
                return
            await self._until_made(wanted.job, index + 1)
            progress.made += 1
            self.stats.tokens_generated += 1
            if not index:
                first_ns = now_ns()
            if answer.stream:
                pieces = dialect.token(answer, index, self.moment(0).wall_ns)
                await sink.chunks(headers, pieces if index else [*dialect.begin(answer), *pieces])
                progress.written += 1
        if tokens and (breaks := self.effect().breaks_at(tokens)) is not None:
            await self._break(breaks, wanted, moment, sink, tokens)
            return
        ended = self.moment(0)
        timing = Timing(
            total_ns=ended.now_ns - moment.now_ns,
            load_ns=started_ns - moment.now_ns,
            prompt_ns=first_ns - started_ns,
            eval_ns=ended.now_ns - first_ns,
            wall_ns=ended.wall_ns,
        )
        if answer.stream:
            begin = [] if tokens else dialect.begin(answer)
            await sink.chunks(headers, [*begin, *dialect.finish(answer, timing)], last=True)
        else:
            await sink.reply(single_reply(wanted, timing))
            progress.written = progress.made

    async def _until_made(self, job: Job, tokens: int) -> None:
        """Wait until the answer of a job has so many tokens."""
        steady = self.spec.speed(job.model).is_steady
        while (due_ns := self.fake.token_due_ns(job.id, tokens)) is not None and (wait_ns := due_ns - now_ns()) > 0:
            if steady:
                await anyio.sleep(wait_ns / NS_PER_S)
            else:
                with anyio.move_on_after(wait_ns / NS_PER_S):
                    await self._paced.wait()
            if tokens == 1 or not steady:
                self.notify(self.fake.advance(now_ns()))

    async def _break(self, kind: FaultKind, wanted: Generation, moment: Moment, sink: Sink, sent: int) -> None:
        """Break an answer after `sent` tokens; before the first one, an error has a status of its own."""
        answer = wanted.answer
        headers = stream_headers(wanted)
        if kind is FaultKind.STALL_MIDSTREAM:
            await anyio.sleep_forever()
        elif kind is FaultKind.ERROR_MIDSTREAM and (not sent or not answer.stream):
            await sink.reply(fault_reply(answer.api, kind, moment))
        elif not answer.stream:
            raise Cut
        elif kind is FaultKind.ERROR_MIDSTREAM:
            await sink.chunks(headers, dialect_of(answer).killed(answer), last=True)
        elif kind is FaultKind.END_MIDSTREAM:
            await sink.chunks(headers, [], last=True)
        else:
            pieces = dialect_of(answer).token(answer, min(sent, len(answer.tokens) - 1), moment.wall_ns)
            await sink.cut(headers, pieces[0])
