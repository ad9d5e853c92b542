"""Deadlines of the core: a heap of (deadline, sequence number). The driver keeps one timer, for the earliest."""

from __future__ import annotations

import heapq
from enum import IntEnum

_SLACK = 64
"""Stale heap entries that are tolerated beyond the number of armed timers before the heap is rebuilt."""


class TimerKind(IntEnum):
    """What a timer is for. One owner has at most one timer of a kind."""

    ATTEMPT = 0  # connect, then first token or whole answer, then silence: an attempt is in one step at a time
    HEDGE = 1
    MEASURE = 2
    QUEUE = 3
    PROBE = 4  # a server's next probe is due, or its probe under way takes too long


class Timers:
    """Armed timers, each known by (kind, owner id). Ties are broken by the order of arming."""

    __slots__ = ("_armed", "_heap", "_seq")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, tuple[TimerKind, int]]] = []
        self._armed: dict[tuple[TimerKind, int], int] = {}  # sequence number of the entry that counts
        self._seq = 0

    def __len__(self) -> int:
        return len(self._armed)

    def __repr__(self) -> str:
        return f"<Timers {len(self._armed)} armed, next {self.next_deadline()}>"

    def arm(self, kind: TimerKind, owner_id: int, deadline_ns: int) -> None:
        """Arm, or arm anew, the owner's timer of this kind."""
        key = kind, owner_id
        self._seq = seq = self._seq + 1
        self._armed[key] = seq
        heapq.heappush(self._heap, (deadline_ns, seq, key))
        if len(self._heap) > 2 * len(self._armed) + _SLACK:
            self._heap = [entry for entry in self._heap if self._armed.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def cancel(self, kind: TimerKind, owner_id: int) -> None:
        """Disarm; harmless when nothing is armed."""
        self._armed.pop((kind, owner_id), None)

    def is_armed(self, kind: TimerKind, owner_id: int) -> bool:
        """Tell whether the owner has such a timer."""
        return (kind, owner_id) in self._armed

    def deadlines(self) -> dict[tuple[TimerKind, int], int]:
        """Return when each armed timer fires, for an audit."""
        return {key: deadline_ns for deadline_ns, seq, key in self._heap if self._armed.get(key) == seq}

    def next_deadline(self) -> int | None:
        """Return the earliest armed deadline, ns."""
        heap, armed = self._heap, self._armed
        while heap:
            deadline_ns, seq, key = heap[0]
            if armed.get(key) == seq:
                return deadline_ns
            heapq.heappop(heap)
        return None

    def pop_due(self, now_ns: int) -> tuple[TimerKind, int] | None:
        """Disarm and return the earliest timer that is due, or None."""
        deadline_ns = self.next_deadline()
        if deadline_ns is None or deadline_ns > now_ns:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._armed[key]
        return key
