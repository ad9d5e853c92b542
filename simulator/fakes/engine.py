"""How fast a loaded model works: prompts are read and tokens made at rates, and only a change of a rate costs anything.

A stream waits out a fixed time, then its prompt is read (the prompts being read share the rate), then its tokens are
made, slower the more streams are decoded together and while a prompt is being read. Pure; times are int ns.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from enum import IntEnum
from math import ceil, inf
from typing import NamedTuple

_NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one model is on one server."""

    first_token_ns: int = 50_000_000  # from the slot to the first token, whatever the prompt
    prefill_rate: float = inf  # prompt tokens/s; inf: reading costs nothing
    token_ns: int = 5_000_000  # between two tokens of one stream alone
    batch_slowdown: float = 0.0  # each further stream of a batch adds this share to `token_ns`
    prefill_interference: float = 0.0  # 0..1 (excluded): share of its speed that decoding loses while a prompt is read
    load_fixed_ns: int = 2_000_000_000
    load_rate: float = inf  # bytes/s from disk to memory
    shared_prefill: bool = True  # prompts that are read together share the rate

    @property
    def is_steady(self) -> bool:
        """Whether company does not change the pace of a stream."""
        return self.prefill_rate == inf and not self.batch_slowdown and not self.prefill_interference

    def load_ns(self, size_bytes: int) -> int:
        """Return how long a load of so many bytes takes."""
        return self.load_fixed_ns + round(size_bytes / self.load_rate * _NS_PER_S)


class _Phase(IntEnum):
    FIXED = 0
    READING = 1
    DECODING = 2
    STOPPED = 3  # holds its slot, and nothing comes any more


class Mark(NamedTuple):
    """A stream has made as many tokens as its driver wanted to be told of."""

    stream_id: int
    at_ns: int
    tokens: int


class _Stream:
    """One answer being made. Work is counted in ns at full speed; `slowdown` turns it into time."""

    __slots__ = (
        "anchor_ns",
        "begun",
        "due_ns",
        "history",
        "id",
        "marks",
        "phase",
        "read_ns",
        "slowdown",
        "work_left_ns",
        "worked_ns",
    )

    def __init__(self, stream_id: int, fixed_ns: int, read_ns: int, marks: list[int], now_ns: int) -> None:
        self.id = stream_id
        self.phase = _Phase.FIXED
        self.begun = False  # its first token is made
        self.read_ns = read_ns
        self.marks = marks  # token counts to tell of, the next one last
        self.anchor_ns = now_ns  # what stands here is true for this moment
        self.worked_ns = 0  # of the decoding, up to the anchor
        self.work_left_ns = fixed_ns  # until the next change of phase or mark
        self.slowdown = 1.0
        self.due_ns = now_ns + fixed_ns
        self.history: dict[float, int] = {}  # slowdown -> decoding done at it

    def twin(self) -> _Stream:
        """Return a stream that is at the same point, and goes on by itself."""
        twin = copy(self)
        twin.marks, twin.history = self.marks.copy(), self.history.copy()
        return twin

    def settle(self, now_ns: int) -> None:
        """Move the anchor to a moment that is not after `due_ns`."""
        done_ns = self.work_left_ns if now_ns >= self.due_ns else int((now_ns - self.anchor_ns) / self.slowdown)
        done_ns = min(done_ns, self.work_left_ns)
        self.work_left_ns -= done_ns
        if self.phase is _Phase.DECODING and done_ns:
            self.worked_ns += done_ns
            self.history[self.slowdown] = self.history.get(self.slowdown, 0) + done_ns
        self.anchor_ns = now_ns

    def pace(self, slowdown: float) -> None:
        """Go on at another speed from the anchor on."""
        self.slowdown = slowdown
        self.due_ns = self.anchor_ns + ceil(self.work_left_ns * slowdown)


class Engine:
    """The streams of one loaded model."""

    __slots__ = ("_company", "_first_factor", "_paces", "_streams", "_token_factor", "next_ns", "speed", "version")

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self.next_ns: int | None = None  # when `advance` has something to do
        self.version = 0  # changes whenever the pace of a stream does
        self._streams: dict[int, _Stream] = {}
        self._company = [0] * len(_Phase)  # streams in each phase
        self._paces = (1.0, 1.0, 1.0)  # slowdown in each phase
        self._first_factor = 1.0
        self._token_factor = 1.0

    def twin(self) -> Engine:
        """Return an engine that is at the same point, and goes on by itself."""
        twin = copy(self)
        twin._streams = {stream_id: stream.twin() for stream_id, stream in self._streams.items()}  # noqa: SLF001  its own
        twin._company = self._company.copy()  # noqa: SLF001
        return twin

    def add(self, stream_id: int, prompt_tokens: int, marks: list[int], now_ns: int) -> None:
        """Begin a stream that has so many prompt tokens to read.

        `marks` are the token counts to tell of, ascending, from 1 on; at the last one the stream stops.
        """
        speed = self.speed
        read_ns = 0 if speed.prefill_rate == inf else round(prompt_tokens / speed.prefill_rate * _NS_PER_S)
        stream = _Stream(stream_id, speed.first_token_ns, read_ns, marks[::-1], now_ns)
        self._streams[stream_id] = stream
        self._company[_Phase.FIXED] += 1
        self._repace(now_ns, (stream,))

    def remove(self, stream_id: int, now_ns: int) -> None:
        """End a stream; harmless when there is none."""
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            self._company[stream.phase] -= 1
            self._repace(now_ns, ())

    def stop(self, stream_id: int, now_ns: int) -> None:
        """Let a stream make no more tokens; it stays until it is removed."""
        stream = self._streams[stream_id]
        stream.settle(now_ns)
        self._enter(stream, _Phase.STOPPED)
        self._repace(now_ns, ())

    def set_factors(self, first: float, token: float, now_ns: int) -> None:
        """Make first tokens, and further ones, take so many times as long."""
        if (first, token) != (self._first_factor, self._token_factor):
            self._first_factor, self._token_factor = first, token
            self._repace(now_ns, ())

    def add_mark(self, stream_id: int, tokens: int) -> None:
        """Tell of one more token count of a stream, which it must not have reached yet."""
        stream = self._streams[stream_id]
        if tokens not in stream.marks:
            stream.marks = sorted([*stream.marks, tokens], reverse=True)
            if stream.phase is _Phase.DECODING:
                stream.work_left_ns = self._work_to(stream)
                stream.pace(stream.slowdown)
            self._repace(stream.anchor_ns, ())

    def advance(self, now_ns: int) -> list[Mark]:
        """Return the marks reached until now, in order of time."""
        reached: list[Mark] = []
        while self.next_ns is not None and self.next_ns <= now_ns:
            at_ns = self.next_ns
            due = [s for s in self._streams.values() if s.due_ns == at_ns and s.phase is not _Phase.STOPPED]
            for stream in due:
                self._turn(stream, at_ns, reached)
            self._repace(at_ns, due)
        return reached

    def made(self, stream_id: int, now_ns: int) -> tuple[int, int]:
        """Return how many tokens a stream has made until now, and when the last one was made (0: none yet)."""
        stream = self._streams[stream_id]
        if not stream.begun:
            return 0, 0
        worked_ns, at_ns = stream.worked_ns, stream.anchor_ns
        if stream.phase is _Phase.DECODING and now_ns > at_ns:
            worked_ns += min(int((now_ns - at_ns) / stream.slowdown), stream.work_left_ns)
            at_ns = now_ns
        further = worked_ns // max(1, self.speed.token_ns)
        return 1 + further, at_ns - round((worked_ns - further * self.speed.token_ns) * stream.slowdown)

    def gaps(self, stream_id: int, now_ns: int) -> list[tuple[float, int]]:
        """Return the times between tokens so far as (number of tokens, ns between them)."""
        stream = self._streams[stream_id]
        if stream.phase is _Phase.DECODING:
            stream.settle(now_ns)
        token_ns = max(1, self.speed.token_ns)
        return [(work_ns / token_ns, round(token_ns * slowdown)) for slowdown, work_ns in stream.history.items()]

    def token_due_ns(self, stream_id: int, tokens: int) -> int | None:
        """Return when a stream will have made so many tokens if no pace changes before; None: never.

        Before its first token it may take longer than that, since others may have their prompts read as well.
        """
        stream = self._streams[stream_id]
        if stream.phase is _Phase.DECODING:
            left_ns = (tokens - 1) * self.speed.token_ns - stream.worked_ns
            return stream.anchor_ns + ceil(max(0, left_ns) * stream.slowdown)
        if stream.phase is _Phase.STOPPED:
            return stream.anchor_ns if stream.begun and self.made(stream_id, stream.anchor_ns)[0] >= tokens else None
        unread_ns = stream.read_ns if stream.phase is _Phase.FIXED else 0
        return stream.due_ns + ceil(unread_ns * self._first_factor)

    # inside

    def _turn(self, stream: _Stream, at_ns: int, reached: list[Mark]) -> None:
        """Take a stream over the change that is due."""
        stream.settle(at_ns)
        if stream.phase is _Phase.FIXED and stream.read_ns:
            self._enter(stream, _Phase.READING)
            stream.work_left_ns = stream.read_ns
            stream.pace(stream.slowdown)
            return
        self._enter(stream, _Phase.DECODING)
        stream.begun = True
        while stream.marks and self._work_to(stream) <= 0:
            reached.append(Mark(stream.id, at_ns, stream.marks.pop()))
        if stream.marks:
            stream.work_left_ns = self._work_to(stream)
            stream.pace(stream.slowdown)
        else:
            self._enter(stream, _Phase.STOPPED)

    def _work_to(self, stream: _Stream) -> int:
        return (stream.marks[-1] - 1) * self.speed.token_ns - stream.worked_ns

    def _enter(self, stream: _Stream, phase: _Phase) -> None:
        self._company[stream.phase] -= 1
        self._company[phase] += 1
        stream.phase = phase

    def _repace(self, now_ns: int, touched: Iterable[_Stream]) -> None:
        """Give the streams that were touched, or all if company has changed it, the pace that holds from now on."""
        speed, reading = self.speed, self._company[_Phase.READING]
        decode = self._token_factor * (1.0 + speed.batch_slowdown * max(0, self._company[_Phase.DECODING] - 1))
        if reading:
            decode /= 1.0 - speed.prefill_interference
        paces = (self._first_factor, self._first_factor * (max(1, reading) if speed.shared_prefill else 1), decode)
        if paces != self._paces:
            self._paces = paces
            touched = self._streams.values()
        for stream in touched:
            if stream.phase is not _Phase.STOPPED and paces[stream.phase] != stream.slowdown:
                stream.settle(now_ns)
                self.version += 1
                stream.pace(paces[stream.phase])
        self.next_ns = min([s.due_ns for s in self._streams.values() if s.phase is not _Phase.STOPPED], default=None)
