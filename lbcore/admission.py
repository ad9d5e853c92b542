"""What bounds the work: the queue of requests, the race budget and the retry budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from lbcore.compiling import mypyc_attr
from lbcore.config import RaceSettings, RetrySettings
from lbcore.records import Request

RACE_BURST: Final = 10.0
"""Unused race budget is kept up to this many attempts."""
RETRY_BURST: Final = 20.0
"""Unused retry budget is kept up to this many retries: two servers can fail at once all that they have in flight."""


@mypyc_attr(allow_interpreted_subclasses=True)
class AdmissionQueue:
    """Requests waiting for room, first come first served for each model."""

    __slots__ = ("length_max", "waiting")

    def __init__(self, length_max: int) -> None:
        self.waiting: dict[int, Request] = {}
        """By id, in the order they came."""
        self.length_max = length_max

    def __len__(self) -> int:
        return len(self.waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.waiting.values())

    def __contains__(self, request: Request) -> bool:
        return request.id in self.waiting

    @property
    def is_full(self) -> bool:
        """No more may wait."""
        return len(self.waiting) >= self.length_max

    def push(self, request: Request) -> None:
        """Put a request at the end."""
        self.waiting[request.id] = request

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it stands; harmless when it does not wait."""
        self.waiting.pop(request.id, None)

    def pop_ready(self, can_start: Callable[[Request], bool]) -> Iterator[Request]:
        """Take out, in order, the requests for which `can_start` holds.

        Behind one that cannot start, no other for the same model is asked: first come, first served.
        """
        blocked: set[tuple[str | None, bool, bool]] = set()
        for request in list(islice(self.waiting.values(), len(self.waiting))):
            key = request.model, request.generates, request.awaits_sync
            if key in blocked:
                continue
            if can_start(request):
                self.remove(request)
                yield request
            else:
                blocked.add(key)


@mypyc_attr(allow_interpreted_subclasses=True)
class RaceBudget:
    """Credits for extra attempts: each request earns `budget`, each racer or hedge spends one (a token bucket)."""

    __slots__ = ("_credits_max", "_per_request", "credits")

    def __init__(self, settings: RaceSettings) -> None:
        self._per_request = settings.budget
        self._credits_max = max(RACE_BURST, settings.budget)
        self.credits = RACE_BURST if settings.budget > 0 else 0.0
        """Extra attempts that may be started now."""

    def earn(self) -> None:
        """Count one request."""
        self.credits += self._per_request
        if self.credits > self._credits_max:  # half the time of `min`  # noqa: PLR1730
            self.credits = self._credits_max

    def spend(self) -> bool:
        """Pay for one extra attempt; False when there is no credit."""
        if self.credits < 1.0:
            return False
        self.credits -= 1.0
        return True


@mypyc_attr(allow_interpreted_subclasses=True)
class RetryBudget:
    """Retries that do not help, against a share of all requests (a token bucket, as in Finagle).

    Each request earns `budget`, each retry spends one, and one that is answered gives it back. So what is under way and
    what was in vain are bounded together, and a server among good ones that fails all it has in flight costs nothing. A
    bound on what is under way alone (as in Envoy) gives up requests then, though others are idle, and does not see
    servers that fail at once, when few are under way at a time. It counts where there is no share.
    """

    __slots__ = ("_settings", "credits", "under_way")

    def __init__(self, settings: RetrySettings) -> None:
        self._settings = settings
        self.under_way = 0
        self.credits = RETRY_BURST
        """Retries that may still fail."""

    def earn(self) -> None:
        """Count one request."""
        self.credits += self._settings.budget
        if self.credits > RETRY_BURST:  # noqa: PLR1730
            self.credits = RETRY_BURST

    def begin(self) -> None:
        """Count a retry that starts."""
        self.under_way += 1
        self.credits -= 1.0

    def give_back(self) -> None:
        """Count a retry that has helped."""
        self.credits = min(RETRY_BURST, self.credits + 1.0)

    @property
    def left(self) -> int:
        """How many retries may start now. Without a share, `budget_min` bounds what is under way."""
        if self._settings.budget > 0:
            return int(self.credits)
        return max(0, self._settings.budget_min - self.under_way)

    def allows(self) -> bool:
        """Tell whether one more retry may start."""
        return self.left > 0
