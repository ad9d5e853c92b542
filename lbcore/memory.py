"""What was decided for the last requests, kept so that any of them can be explained: all that a log would hold.

    memory = Memory(balancer)               # stands in for the balancer
    lines = memory.lines_about(request_id)  # a log in which it is told of; None: it is not known, or not any more

Nothing is written before somebody asks: the calls are kept as they were made, in segments that begin with the state of
the balancer, so that the oldest can be forgotten. While nothing is under way nothing is kept, once that has come to as
much as a state does: the next request begins a segment. Memory is bounded by the number of requests, and by bytes as
they are estimated here; where a flood of events, or requests with much to tell of, come to more than that, fewer
requests are known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from lbcore import snapshot
from lbcore.balancer import LoadBalancer
from lbcore.commands import Command, RecordDecision
from lbcore.events import ActiveModel, Event, ModelInfo, ModelsSynced, RequestArrived
from lbcore.loglines import Chunks, Lines, Raised, dumps
from lbcore.trace import header_line
from lbcore.witness import Witness

_CALL_BYTES = 320
_COMMAND_BYTES = 160
_CHUNK_BYTES = 160


Call = tuple[Event | None, list[Command] | Raised, int, Chunks]
"""An event, None for `handle_timeout`, what came of it, its time, and the chunks before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is kept."""

    requests: int = 1000
    """So many can be explained, at least, and those of one segment more at most."""
    segment_requests: int = 500
    bytes_max: int = 32 << 20
    """Of all segments, about; one of them has an eighth of that."""
    rest_bytes_min: int = 32 << 10
    """What is kept of a time in which nothing is under way; more, if the state comes to more."""


_LIMITS = Limits()


@dataclass(slots=True)
class Segment:
    """Calls that follow each other, and the state before the first of them."""

    state: str
    now_ns: int
    carried: Chunks | None  # which the state has, but not the segment before; None: that one does not lead up to it
    under_way: tuple[int, ...]  # requests that came before
    size: int  # bytes, about
    first: int = 0  # the lowest and the highest id of those that came; 0: none
    last: int = 0
    n_requests: int = 0
    calls: list[Call] = field(default_factory=list)


class Memory(Witness):
    """Stands in for a balancer, or a witness of one, and keeps what it did.

    `defect` says why nothing is kept, if the state is of a kind that cannot be.
    """

    def __init__(self, balancer: LoadBalancer, limits: Limits = _LIMITS) -> None:
        super().__init__(balancer)
        self.defect = ""
        self._limits = limits
        self._segments: deque[Segment] = deque()
        self._size = 0  # of all but the last, whose grows
        self._n_requests = 0
        self._rests = True
        self._idle: tuple[int, int] | None = None  # since nothing is under way: calls before that, and their size
        self._listings: dict[int, ModelsSynced] = {}  # the last one of each server, as it is kept

    # --- keeping -------------------------------------------------------------------------------------------

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """As `LoadBalancer.handle`."""
        if self._rests:
            if type(event) is not RequestArrived or self.defect:
                return self.balancer.handle(event, now_ns)
            self._begin(now_ns, follows=False)
        return super().handle(event, now_ns)

    def handle_timeout(self, now_ns: int) -> list[Command]:
        """As `LoadBalancer.handle_timeout`."""
        if not self._rests and not self.ledger.requests and not self.ledger.attempts:
            self._idle_on()
        return self.balancer.handle_timeout(now_ns) if self._rests else super().handle_timeout(now_ns)

    def note(self, event: Event | None, outcome: list[Command] | Raised, now_ns: int, chunks: Chunks) -> None:
        """Keep a call."""
        if self._rests:  # the state could not be kept
            return
        segment = self._segments[-1]
        size = _CALL_BYTES + _CHUNK_BYTES * len(chunks)
        if not isinstance(outcome, str):
            for command in outcome:
                size += _COMMAND_BYTES
                if isinstance(command, RecordDecision):
                    size += 2 * len(command.why)  # which the message of a refusal has once more
        if isinstance(event, RequestArrived) and outcome:  # else it came before
            size += self._arrived(segment, event)
        elif isinstance(event, ModelsSynced):
            event = self._bare(event)
        segment.calls.append((event, outcome, now_ns, chunks))
        segment.size += size
        if segment.n_requests >= self._limits.segment_requests or segment.size >= self._limits.bytes_max >> 3:
            self._begin(now_ns, follows=True)

    def _arrived(self, segment: Segment, event: RequestArrived) -> int:
        """Count a request; return what it takes beside what each does."""
        self._idle = None
        self._n_requests += 1
        segment.n_requests += 1
        request_id = event.request_id
        segment.first = min(segment.first, request_id) if segment.first else request_id
        segment.last = max(segment.last, request_id)
        return sum(map(len, event.servers)) if event.servers else 0

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
            state = dumps(snapshot.take(self.plain))
        except snapshot.SnapshotError as error:  # a defect, but none of serving
            self.defect = str(error)
            self._segments.clear()
            self._rests = True
            return
        carried = self._all_chunks()
        if self._segments:
            self._size += self._segments[-1].size
        under_way = tuple(self.ledger.requests)
        size = len(state) + _CHUNK_BYTES * len(carried)
        self._segments.append(Segment(state, now_ns, carried if follows else None, under_way, size))
        self._rests = False
        self._idle = None
        self._listings = {i: listing for i, listing in self._listings.items() if i in self.fleet.servers}
        while len(self._segments) > 1 and self._is_too_much(self._segments[0]):
            oldest = self._segments.popleft()
            self._size -= oldest.size
            self._n_requests -= oldest.n_requests

    def _is_too_much(self, oldest: Segment) -> bool:
        return (
            self._size > self._limits.bytes_max
            or self._n_requests - oldest.n_requests >= self._limits.requests
        )

    def _idle_on(self) -> None:
        """Nothing is under way: forget what has been kept since then, and keep no more, once it is much."""
        segment = self._segments[-1]
        if self._idle is None:
            self._idle = len(segment.calls), segment.size
            return
        n_calls, size = self._idle
        if segment.size - size >= max(self._limits.rest_bytes_min, len(segment.state)):
            del segment.calls[n_calls:]
            segment.size = size
            self._rests = True

    # --- telling -------------------------------------------------------------------------------------------

    @property
    def known(self) -> tuple[int, int] | None:
        """The lowest and the highest id of the requests of which all is known; None when there is none."""
        told = [segment for segment in self._segments if segment.n_requests]
        return (min(s.first for s in told), max(s.last for s in told)) if told else None

    def lines_about(self, request_id: int) -> Iterator[str] | None:
        """Return the lines of a log in which a request is told of, as far as that is known by now; None if it is not.

        They are written as they are asked for, and may be asked for later: it does not matter what is done meanwhile.
        """
        segments = list(self._segments)
        begun = next((i for i, segment in enumerate(segments) if _comes_in(segment, request_id)), -1)
        if begun < 0 and segments and request_id in segments[0].under_way:
            begun = 0
        if begun < 0:
            return None
        ended = next((i for i in range(begun + 1, len(segments)) if segments[i].carried is None), len(segments))
        return _lines([(segment, segment.calls[:]) for segment in segments[begun:ended]])


def _comes_in(segment: Segment, request_id: int) -> bool:
    return segment.first <= request_id <= segment.last and any(
        isinstance(event, RequestArrived) and event.request_id == request_id and outcome
        for event, outcome, *_ in segment.calls
    )


def _lists_the_same(known: ModelsSynced, event: ModelsSynced) -> bool:
    return [m.name for m in known.available] == [m.name for m in event.available] and (
        [m.name for m in known.active] == [m.name for m in event.active]
    )


def _lines(segments: list[tuple[Segment, list[Call]]]) -> Iterator[str]:
    first = segments[0][0]
    yield header_line(first.now_ns)
    yield f"{first.state}\n"
    writing = Lines(first.now_ns)
    for segment, calls in segments:
        carried: Chunks = () if segment is first or segment.carried is None else segment.carried
        for event, outcome, now_ns, chunks in calls:
            yield writing.line(event, outcome, now_ns, (*carried, *chunks))
            carried = ()
