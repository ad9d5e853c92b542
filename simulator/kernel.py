"""Virtual time: a heap of (time, sequence number). What happens at the same moment happens in the order of planning.

As in SimPy, a run is what the seed and the order of `at` make of it, and nothing else.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Kernel:
    """The clock and what is planned. `now_ns` only moves forward, from one planned moment to the next."""

    __slots__ = ("_heap", "_seq", "n_steps", "now_ns")

    def __init__(self) -> None:
        self.now_ns = 0
        self.n_steps = 0
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._seq = 0

    def at(self, at_ns: int, do: Callable[..., None], *args: Any) -> None:
        """Plan `do(*args)` for a moment; one that has passed means now, after all that is planned for now."""
        self._seq += 1
        heapq.heappush(self._heap, (max(at_ns, self.now_ns), self._seq, do, args))

    def after(self, delay_ns: int, do: Callable[..., None], *args: Any) -> None:
        """Plan `do(*args)` for `delay_ns` from now."""
        self.at(self.now_ns + delay_ns, do, *args)

    @property
    def next_ns(self) -> int | None:
        """When something is planned next; None: never."""
        return self._heap[0][0] if self._heap else None

    def step(self) -> bool:
        """Do the next thing; False when nothing is planned."""
        if not self._heap:
            return False
        at_ns, _, do, args = heapq.heappop(self._heap)
        self.now_ns = at_ns
        self.n_steps += 1
        do(*args)
        return True

    def run_until(self, until_ns: int, *, over: Callable[[], bool] | None = None) -> None:
        """Do all that is planned up to a moment, or until `over` says so; the clock then stands there."""
        while self._heap and self._heap[0][0] <= until_ns:
            self.step()
            if over is not None and over():
                return
        self.now_ns = max(self.now_ns, until_ns)
