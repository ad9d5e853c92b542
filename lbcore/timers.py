"""Deadlines of the core: a heap of (deadline, sequence number). The driver keeps one timer, for the earliest."""

from __future__ import annotations

from enum import IntEnum
from heapq import heapify, heappop, heappush
from typing import Any, Final

_SLACK: Final = 64
"""Stale heap entries that are tolerated beyond the number of armed timers before the heap is rebuilt."""


_Entry = tuple[int, Any, Any, Any]
"""Deadline, sequence number, kind and owner; not `int`, since a compiled core would make numbers of them, and back."""


class TimerKind(IntEnum):
    """What a timer is for. One owner has at most one timer of a kind."""

    ATTEMPT = 0  # connect, then first token or whole answer, then silence: an attempt is in one step at a time
    HEDGE = 1
    MEASURE = 2
    QUEUE = 3
    PROBE = 4  # a server's next probe is due, or its probe under way takes too long
    JOB = 5  # a pull, load or deletion that placement wants tells of no progress
    REVIEW = 6  # of the placement of models; its owner is 0


class Timers:
    """Armed timers, each known by (kind, owner id). Ties are broken by the order of arming.

    A cancelled timer stays in the heap until it comes to the top, or until such entries are too many.
    """

    __slots__ = ("_armed", "_heap", "_seq")

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._armed: tuple[dict[int, int], ...] = tuple({} for _ in TimerKind)
        """For each kind: by owner, the sequence number of the entry that counts."""
        self._seq = 0

    def __len__(self) -> int:
        return sum(map(len, self._armed))

    def __repr__(self) -> str:
        return f"<Timers {len(self)} armed, next {self.next_deadline()}>"

    def arm(self, kind: TimerKind, owner_id: int, deadline_ns: int) -> None:
        """Arm, or arm anew, the owner's timer of this kind."""
        self._seq = seq = self._seq + 1
        self._armed[kind][owner_id] = seq
        heappush(self._heap, (deadline_ns, seq, kind, owner_id))
        if seq % _SLACK == 0 and len(self._heap) > 2 * len(self) + _SLACK:
            self._heap = [entry for entry in self._heap if self._armed[entry[2]].get(entry[3]) == entry[1]]
            heapify(self._heap)

    def cancel(self, kind: TimerKind, owner_id: int) -> None:
        """Disarm; harmless when nothing is armed."""
        self._armed[kind].pop(owner_id, None)

    def is_armed(self, kind: TimerKind, owner_id: int) -> bool:
        """Tell whether the owner has such a timer."""
        return owner_id in self._armed[kind]

    def deadlines(self) -> dict[tuple[TimerKind, int], int]:
        """Return when each armed timer fires, for an audit."""
        return {
            (kind, owner_id): deadline_ns
            for deadline_ns, seq, kind, owner_id in self._heap
            if self._armed[kind].get(owner_id) == seq
        }

    def next_deadline(self) -> int | None:
        """Return the earliest armed deadline, ns."""
        heap, armed = self._heap, self._armed
        while heap:
            deadline_ns, seq, kind, owner_id = heap[0]
            if armed[kind].get(owner_id) == seq:
                return deadline_ns
            heappop(heap)
        return None

    def due(self, now_ns: int) -> list[tuple[TimerKind, int]]:
        """Return what `pop_due` will give, in no order: for who must know it before."""
        heap, armed = self._heap, self._armed
        found = []
        looked_at = [0]
        for i in looked_at:  # which grows on the way: what is not due has nothing below it that is
            if i < len(heap) and heap[i][0] <= now_ns:
                _, seq, kind, owner_id = heap[i]
                if armed[kind].get(owner_id) == seq:
                    found.append((kind, owner_id))
                looked_at += (2 * i + 1, 2 * i + 2)
        return found

    def pop_due(self, now_ns: int) -> tuple[TimerKind, int] | None:
        """Disarm and return the earliest timer that is due, or None."""
        deadline_ns = self.next_deadline()
        if deadline_ns is None or deadline_ns > now_ns:
            return None
        _, _, kind, owner_id = heappop(self._heap)
        del self._armed[kind][owner_id]
        return kind, owner_id
