"""Many numbers of which one at a time changes, and the least, or one drawn in proportion to them, is asked for (pure).

They stand in blocks, of each of which the least, or the sum, is kept. A change looks at one block, and a question at
one and at what is kept of all. With some thousand numbers that is quicker here than a tree of them, each level of which
would be a step of the interpreter. What is kept depends on the numbers alone, not on how they came to be: to the last
bit, since sums are never changed but made anew.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from math import inf
from typing import Final

_BLOCK: Final = 32  # numbers in a block: near the square root of 1,000
_SHIFT: Final = 5


class Least:
    """Numbers of which the least is known; a change costs a look at one block."""

    __slots__ = ("_mins", "values")

    def __init__(self, n: int) -> None:
        n_blocks = -(-n // _BLOCK)
        self.values: list[float] = [inf] * n
        self._mins: list[float] = [inf] * n_blocks

    def put(self, i: int, value: float) -> None:
        """Change a number."""
        values = self.values
        if values[i] != value:
            values[i] = value
            block = i >> _SHIFT
            start = block << _SHIFT
            self._mins[block] = min(values[start : start + _BLOCK])

    def least(self) -> float:
        """Return the least number; infinite when there is none."""
        return min(self._mins)

    def from_on(self, limit: float) -> list[int]:
        """Return where numbers stand that are not less than a limit."""
        return [i for i, value in enumerate(self.values) if value >= limit]

    def up_to(self, limit: float) -> list[int]:
        """Return where numbers stand that are not greater than a limit."""
        found = []
        for block, least in enumerate(self._mins):
            if least <= limit:
                start = block << _SHIFT
                found += [i for i, value in enumerate(self.values[start : start + _BLOCK], start) if value <= limit]
        return found


class Lots:
    """Positive weights of some of n places, one of which is drawn in proportion to them."""

    __slots__ = ("_sums", "count", "weights")

    def __init__(self, n: int) -> None:
        n_blocks = -(-n // _BLOCK)
        self.weights = [0.0] * n
        self._sums = [0.0] * n_blocks
        self.count = 0
        """How many places have a weight; kept by who changes them."""

    def put(self, i: int, weight: float) -> None:
        """Change the weight of a place; 0.0 takes it out."""
        weights = self.weights
        if weights[i] != weight:
            weights[i] = weight
            block = i >> _SHIFT
            start = block << _SHIFT
            self._sums[block] = sum(weights[start : start + _BLOCK])

    def draw(self, share: float) -> int:
        """Return the place at a share of all weights, from 0.0 on and below 1.0, in the order of places."""
        ends = list(accumulate(self._sums))
        left = share * ends[-1]
        block = _first_beyond(ends, left)
        if block:
            left -= ends[block - 1]
        start = block << _SHIFT
        return start + _first_beyond(list(accumulate(self.weights[start : start + _BLOCK])), left)


def _first_beyond(ends: list[float], left: float) -> int:
    """Return where ascending sums first exceed `left`; by rounding none may, then where they reach their last value."""
    found = bisect_right(ends, left)
    return found if found < len(ends) else ends.index(ends[-1])
