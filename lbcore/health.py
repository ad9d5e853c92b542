"""The health value, the reliability record, and who is to blame (pure; design §6, §7.14)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from lbcore.config import HealthSettings, ProbeSettings
from lbcore.events import Reason
from lbcore.schema import SECOND_NS

ALIVE_FROM: Final = 1.0
"""A server whose health is below this is dead; a revived one starts here."""

FAILING_NS: Final = SECOND_NS
"""How long others go first after a server has failed a request; doubles with each further failure, 16 times at most."""

_FAILURES_MAX: Final = 4

_BREAKS_MAX: Final = 5  # the pause of an unreliable, or dead, server doubles this often at most: 32 times the first


class Blame(Enum):
    """What a failed attempt does to the health of its server."""

    NONE = "nothing: the client's fault, or nobody's"
    CONTRAST = "a failure, once another server has answered the same request well"
    AT_ONCE = "a failure"


BLAME: Final[Mapping[Reason, Blame]] = {
    Reason.CONNECT_REFUSED: Blame.AT_ONCE,
    Reason.CONNECT_FAILED: Blame.AT_ONCE,
    Reason.CONNECT_TIMEOUT: Blame.AT_ONCE,
    Reason.TLS_FAILED: Blame.AT_ONCE,
    Reason.EXHAUSTED: Blame.NONE,
    Reason.RESET: Blame.AT_ONCE,
    Reason.GARBAGE: Blame.AT_ONCE,
    Reason.CLIENT_ERROR: Blame.NONE,
    Reason.ELSEWHERE: Blame.NONE,
    Reason.MODEL_NOT_FOUND: Blame.NONE,
    Reason.BUSY: Blame.NONE,
    Reason.SERVER_ERROR: Blame.CONTRAST,
    Reason.FIRST_TOKEN_TIMEOUT: Blame.AT_ONCE,
    Reason.SILENCE_TIMEOUT: Blame.AT_ONCE,
    Reason.ANSWER_TIMEOUT: Blame.AT_ONCE,
    Reason.PROBE_TIMEOUT: Blame.AT_ONCE,
    Reason.ERROR_LINE: Blame.CONTRAST,
    Reason.TRUNCATED: Blame.AT_ONCE,
    Reason.LOST_RACE: Blame.NONE,
    Reason.GIVEN_UP: Blame.NONE,
    Reason.CLIENT_LEFT: Blame.NONE,
    Reason.DRAINED: Blame.NONE,
    Reason.STALLED: Blame.NONE,
}

SETS_BACK: Final = frozenset({reason for reason, blame in BLAME.items() if blame is not Blame.NONE} | {Reason.BUSY})
"""Failures after which others go first for a while, whoever is to blame: asking there again at once is in vain.

A server that fails at once is idle, and would draw every request.
"""

TIMEOUTS: Final = frozenset(
    {Reason.CONNECT_TIMEOUT, Reason.FIRST_TOKEN_TIMEOUT, Reason.SILENCE_TIMEOUT, Reason.ANSWER_TIMEOUT}
)
"""Failures that make a request end with 504 when there were no others."""

UNSENT: Final = frozenset(
    {
        Reason.CONNECT_REFUSED,
        Reason.CONNECT_FAILED,
        Reason.CONNECT_TIMEOUT,
        Reason.TLS_FAILED,
        Reason.EXHAUSTED,
    }
)
"""Failures before anything of the request was sent: even one whose body is not held may be sent elsewhere."""

UNDONE: Final = UNSENT | {Reason.ELSEWHERE, Reason.MODEL_NOT_FOUND, Reason.BUSY}
"""Failures after which the server has surely done nothing: even a request that changes something may be sent again."""


def after_success(value: float, settings: HealthSettings, *, fastest: bool) -> float:
    """Return a server's health after it served a request well; a dead one is revived at 1.0."""
    if value < ALIVE_FROM:
        return ALIVE_FROM
    return min(settings.value_max, value + (settings.fastest if fastest else settings.success))


def after_failure(value: float, settings: HealthSettings) -> float:
    """Return a server's health after a failure."""
    return value / settings.failure_divisor


def distrust_ns(breaks: int, settings: HealthSettings) -> int:
    """Return how long a server is passed over after its `breaks`-th broken stream in a row, ns.

    Doubling ejection times are Envoy's outlier detection; that a second chance comes at all is the original's.
    """
    return settings.second_chance_ns << min(max(breaks - 1, 0), _BREAKS_MAX)


def failing_ns(failures: int) -> int:
    """Return how long others go first after a server's `failures`-th failure in a row, ns."""
    return FAILING_NS << min(max(failures - 1, 0), _FAILURES_MAX)


def revive_pause_ns(deaths: int, settings: ProbeSettings) -> int:
    """Return how long probes do not revive a server after its `deaths`-th death by failed requests in a row, ns.

    None the first time; then doubles from the pause between probes of a dead server to their longest (Envoy's ejection
    times).
    """
    if deaths < 2:
        return 0
    return min(settings.interval_dead_max_ns, settings.interval_dead_ns << min(deaths - 2, _BREAKS_MAX))


def next_probe_pause_ns(pause_ns: int, first_ns: int, longest_ns: int) -> int:
    """Return the pause before the next probe of a dead server: doubles from `first_ns` to `longest_ns`."""
    return min(longest_ns, max(first_ns, 2 * pause_ns))


def retry_after_s(wait_ns: int) -> int:
    """Return a `Retry-After` of at least one second."""
    return max(1, -(-wait_ns // SECOND_NS))
