"""What was decided for the last requests, kept so that any of them can be explained: all that a log would hold.

    memory = Memory(balancer)          # stands in for the balancer
    found = memory.about(request_id)   # calls in which it is told of, and the state before them; None: it is not known

Nothing is written before somebody asks: the calls are kept as they were made, in segments that begin with the state of
the balancer, so that the oldest can be forgotten. Once nothing has been under way for a while nothing is kept: the next
request begins a segment. Memory is bounded by the number of requests, and by bytes as they are estimated here; where a
flood of events, or requests with much to tell of, come to more than that, fewer requests are known.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lbcore import snapshot
from lbcore.balancer import LoadBalancer
from lbcore.commands import Command, RecordDecision, StartAttempt
from lbcore.compiling import mypyc_attr
from lbcore.events import (
    ActiveModel,
    AttemptConnected,
    Event,
    FirstTokenReceived,
    HeadReceived,
    ModelInfo,
    ModelsSynced,
    RequestArrived,
    StreamEnded,
)
from lbcore.fork import fork
from lbcore.loglines import Chunks, Lines, Raised, dumps
from lbcore.redaction import cut_text
from lbcore.trace import Start
from lbcore.witness import Witness

_CALL_BYTES = 320
_COMMAND_BYTES = 160
_CHUNK_BYTES = 160
_TEXT_BYTES = 60  # beside its characters
_SERVER_BYTES = 700
_MODEL_BYTES = 1000
_UNDER_WAY_BYTES = 1000  # of a request or an attempt, its timers included

_SHORT = frozenset({AttemptConnected, HeadReceived, FirstTokenReceived, StreamEnded})
"""Events, with all that comes of them, that are never long."""

Call = tuple[Event | None, list[Command] | Raised, int, Chunks]
"""An event, None for `handle_timeout`, what came of it, its time, and the chunks before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is kept."""

    requests: int = 1000
    """So many can be explained, at least."""
    segment_requests: int = 500
    """More, where servers have more models than that in all: copying the state takes longer then."""
    bytes_max: int = 32 << 20
    """Of all segments, about; one of them has an eighth of that."""
    under_way: int = 250
    """A state with more requests than that under way is not copied: it would take so long that streams felt it."""
    rest_bytes_min: int = 32 << 10
    """What is kept of a time in which nothing is under way; more, if the state comes to more."""


_LIMITS = Limits()


@dataclass(slots=True)
class Segment:
    """Calls that follow each other, and the state before the first of them."""

    state: LoadBalancer | bytes  # a fork, or a snapshot that is compressed
    now_ns: int
    carried: Chunks | None  # which the state has, but not the segment before; None: that one does not lead up to it
    under_way: tuple[int, ...]  # requests that came before
    state_size: int  # bytes, about
    size: int  # of it all
    requests_max: int
    first: int = 0  # the lowest and the highest id of those that came; 0: none
    last: int = 0
    n_requests: int = 0
    calls: list[Call] = field(default_factory=list)


class Excerpt(NamedTuple):
    """The calls in which a request is told of, as lines of a log, and where they start."""

    start: Start
    lines: Iterator[str]


@mypyc_attr(allow_interpreted_subclasses=True)
class Memory(Witness):
    """Stands in for a balancer, or a witness of one, and keeps what it did.

    `defect` says why nothing is kept, if the state is of a kind that cannot be.
    """

    def __init__(self, balancer: LoadBalancer, limits: Limits = _LIMITS) -> None:
        super().__init__(balancer)
        self.defect = ""
        self._limits = limits
        self._segments: deque[Segment] = deque()
        self._segment: Segment | None = None  # the last one; None: nothing is kept now
        self._size = 0  # of all but the last, whose grows
        self._n_requests = 0
        self._idle: tuple[int, int] | None = None  # since nothing is under way: calls before that, and their size
        self._listings: dict[int, ModelsSynced] = {}  # the last one of each server, as it is kept

    # --- keeping -------------------------------------------------------------------------------------------

    def arriving(self, now_ns: int) -> None:
        """Begin to keep what is done, if that was not worth it."""
        self._idle = None
        if self._segment is None and not self.defect and not self.is_too_busy:
            self._begin(now_ns, follows=False)

    @property
    def is_too_busy(self) -> bool:
        """Whether so much is under way that nothing new is kept."""
        return len(self.ledger.requests) > self._limits.under_way

    def handle_timeout(self, now_ns: int) -> list[Command]:
        """As `LoadBalancer.handle_timeout`."""
        if self._segment is not None and not self.ledger.requests and not self.ledger.attempts:
            self._idle_on(self._segment)
        return super().handle_timeout(now_ns)

    def note(self, event: Event | None, outcome: list[Command] | Raised, now_ns: int, chunks: Chunks) -> None:
        """Keep a call."""
        segment = self._segment
        if segment is None:
            return
        segment.size += _CALL_BYTES + _COMMAND_BYTES * len(outcome) + _CHUNK_BYTES * len(chunks)
        if type(event) not in _SHORT:
            if isinstance(event, RequestArrived):
                if outcome:  # else it came before
                    _count(segment, event, outcome)
                    self._n_requests += 1
            else:
                segment.size += _length_of(outcome)
                if isinstance(event, ModelsSynced):
                    event = self._bare(event)
        segment.calls.append((event, outcome, now_ns, chunks))
        added = segment.size - segment.state_size
        if added >= self._limits.bytes_max >> 3 or segment.n_requests >= segment.requests_max:
            if self.is_too_busy:
                self._segment = None  # until less is under way
            else:
                self._begin(now_ns, follows=True)

    def _bare(self, event: ModelsSynced) -> ModelsSynced:
        """Return a listing with nothing but names, which are shared with the one before while they are the same."""
        known = self._listings.get(event.server_id)
        if known is None or not _lists_the_same(known, event):
            available = tuple([ModelInfo(model.name, "", "", "") for model in event.available])
            active = tuple([ActiveModel(model.name, "") for model in event.active])
        else:
            available, active = known.available, known.active
        bare = ModelsSynced(event.server_id, event.probe_id, available, active)
        self._listings[event.server_id] = bare
        return bare

    def _begin(self, now_ns: int, *, follows: bool) -> None:
        """Begin a segment, between two calls, and forget the oldest ones."""
        try:
            state = fork(self.plain)
        except snapshot.SnapshotError as error:  # a defect, but none of serving
            self.defect = str(error)
            self._segments.clear()
            self._segment = None
            return
        carried = self._all_chunks()
        if self._segments:
            self._size += self._segments[-1].size
        n_models = sum([len(server.models) for server in self.fleet])
        n_under_way = len(self.ledger.requests) + len(self.ledger.attempts)
        state_size = _SERVER_BYTES * len(self.fleet.servers) + _MODEL_BYTES * n_models + _UNDER_WAY_BYTES * n_under_way
        self._segment = Segment(
            state,
            now_ns,
            carried if follows else None,
            tuple(self.ledger.requests),
            state_size,
            state_size + _CHUNK_BYTES * len(carried),
            max(self._limits.segment_requests, n_models),
        )
        self._segments.append(self._segment)
        self._idle = None
        self._listings = {i: listing for i, listing in self._listings.items() if i in self.fleet.servers}
        while len(self._segments) > 1 and self._is_too_much(self._segments[0]):
            oldest = self._segments.popleft()
            self._size -= oldest.size
            self._n_requests -= oldest.n_requests

    def _is_too_much(self, oldest: Segment) -> bool:
        limits = self._limits
        return self._size > limits.bytes_max or self._n_requests - oldest.n_requests >= limits.requests

    def _idle_on(self, segment: Segment) -> None:
        """Nothing is under way: forget what has been kept since then, and keep no more, once it is much."""
        if self._idle is None:
            self._idle = len(segment.calls), segment.size
            return
        n_calls, size = self._idle
        if segment.size - size >= max(self._limits.rest_bytes_min, segment.state_size):
            del segment.calls[n_calls:]
            segment.size = size
            self._segment = None
            _pack(segment)

    # --- telling -------------------------------------------------------------------------------------------

    @property
    def known(self) -> tuple[int, int] | None:
        """The lowest and the highest id of the requests of which all is known; None when there is none."""
        told = [segment for segment in self._segments if segment.n_requests]
        return (min(s.first for s in told), max(s.last for s in told)) if told else None

    def about(self, request_id: int) -> Excerpt | None:
        """Return the calls in which a request is told of, as far as is known by now; None when it is not known.

        The lines are written as they are asked for; it does not matter what is done meanwhile.
        """
        segments = list(self._segments)
        begun = next((i for i, segment in enumerate(segments) if _comes_in(segment, request_id)), -1)
        if begun < 0 and segments and request_id in segments[0].under_way:
            begun = 0
        if begun < 0:
            return None
        ended = next((i for i in range(begun + 1, len(segments)) if segments[i].carried is None), len(segments))
        first = segments[begun]
        parts = [(() if s is first or s.carried is None else s.carried, s.calls[:]) for s in segments[begun:ended]]
        return Excerpt(Start(_unpack(first.state), first.now_ns), _lines(first.now_ns, parts))


def _count(segment: Segment, event: RequestArrived, outcome: list[Command] | Raised) -> None:
    """Count a request that came."""
    request_id = event.request_id
    segment.n_requests += 1
    segment.first = min(segment.first, request_id) if segment.first else request_id
    segment.last = max(segment.last, request_id)
    if event.servers:
        segment.size += sum([_TEXT_BYTES + len(name) for name in event.servers])
    if type(outcome[0]) is not StartAttempt:
        segment.size += _length_of(outcome)


def _length_of(outcome: list[Command] | Raised) -> int:
    """Return how much is said in words; the message of a refusal says it once more."""
    if isinstance(outcome, str):
        return 0
    return sum([2 * len(command.why) for command in outcome if type(command) is RecordDecision])


def _comes_in(segment: Segment, request_id: int) -> bool:
    return segment.first <= request_id <= segment.last and any(
        isinstance(event, RequestArrived) and event.request_id == request_id and outcome
        for event, outcome, *_ in segment.calls
    )


def _lists_the_same(known: ModelsSynced, event: ModelsSynced) -> bool:
    return [m.name for m in known.available] == [m.name for m in event.available] and (
        [m.name for m in known.active] == [m.name for m in event.active]
    )


def _pack(segment: Segment) -> None:
    """Make a state small, when there is time for it: many times segments of one request each may follow."""
    if isinstance(segment.state, LoadBalancer):
        segment.state = zlib.compress(dumps(snapshot.take(segment.state)).encode(), 1)
        segment.size += len(segment.state) - segment.state_size
        segment.state_size = len(segment.state)


def _unpack(state: LoadBalancer | bytes) -> LoadBalancer:
    """Return a balancer in a state, without the words of servers, as in a log."""
    if isinstance(state, bytes):
        return snapshot.load(json.loads(zlib.decompress(state)))
    balancer = fork(state)
    for server in balancer.fleet:
        server.last_error = cut_text(server.last_error)
    return balancer


def _lines(now_ns: int, parts: list[tuple[Chunks, list[Call]]]) -> Iterator[str]:
    writing = Lines(now_ns)
    for carried, calls in parts:
        before = carried
        for event, outcome, at_ns, chunks in calls:
            yield writing.line(event, outcome, at_ns, (*before, *chunks))
            before = ()
