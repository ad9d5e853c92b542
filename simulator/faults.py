"""What can be wrong with a server, as data: faults, when each is on, and what they add up to.

Pure. Times are int nanoseconds since the faults were set (for a fleet: since it started).

Scopes: DOWN kinds and HANG, GARBAGE, RESET hit every request, probes too; the others only those that ask a
model for something (`/api/chat`, `/v1/messages`, ...), so that the probes of such a server look well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

_NS_PER_S = 1_000_000_000


class FaultKind(StrEnum):
    """The ways in which a server fails."""

    REFUSE = "refuse"  # the listener and all connections are closed: connection refused
    FLAP = "flap"  # REFUSE for period_s - up_s of every period_s, up first
    HANG = "hang"  # accepts and never answers, probes neither
    HANG_CHAT = "hang-chat"  # answers probes, never a chat
    SLOW = "slow"  # first token and every further token take `factor` times as long
    CRAWL = "crawl"  # only further tokens do
    ERROR_500 = "error-500"
    BUSY_503 = "busy-503"
    GARBAGE = "garbage"  # bytes that are not HTTP, then a close
    RESET = "reset"  # a TCP reset as soon as the request is in
    CUT_MIDSTREAM = "cut-midstream"  # the connection ends inside the chunked body, as chat_sigterm_midstream
    STALL_MIDSTREAM = "stall-midstream"  # nothing more is sent, the connection stays
    ERROR_MIDSTREAM = "error-midstream"  # ends as chat_runner_killed_midstream: an error line, a clean end
    END_MIDSTREAM = "end-midstream"  # a clean end without the terminator


BREAKS = frozenset(
    {
        FaultKind.CUT_MIDSTREAM,
        FaultKind.STALL_MIDSTREAM,
        FaultKind.ERROR_MIDSTREAM,
        FaultKind.END_MIDSTREAM,
    }
)
HITS_PROBES = frozenset({FaultKind.HANG, FaultKind.GARBAGE, FaultKind.RESET})
_DOWN = frozenset({FaultKind.REFUSE, FaultKind.FLAP})
# What is answered instead of the answer. The first of these that is on decides.
_INSTEAD = (
    FaultKind.RESET,
    FaultKind.GARBAGE,
    FaultKind.HANG,
    FaultKind.HANG_CHAT,
    FaultKind.ERROR_500,
    FaultKind.BUSY_503,
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, on from `from_s` until `until_s` (seconds; None: from the start, for ever)."""

    kind: FaultKind
    from_s: float | None = None
    until_s: float | None = None
    factor: float = 20.0  # SLOW, CRAWL
    after_tokens: int = 3  # the *_MIDSTREAM kinds: tokens sent before it breaks; 0 breaks before the first
    period_s: float = 2.0  # FLAP
    up_s: float = 1.0  # FLAP: how long it is up in each period

    def __post_init__(self) -> None:
        if not self.period_s > 0 or not 0 <= self.up_s <= self.period_s:
            raise ValueError(f"{self.kind}: 0 <= up_s <= period_s and period_s > 0 must hold")
        if self.factor <= 0 or self.after_tokens < 0:
            raise ValueError(f"{self.kind}: factor must be positive and after_tokens not negative")


@dataclass(frozen=True, slots=True)
class Effect:
    """What the faults that are on at one moment add up to."""

    down: bool = False
    instead: FaultKind | None = None  # RESET, GARBAGE, HANG, HANG_CHAT, ERROR_500 or BUSY_503
    first_token_factor: float = 1.0
    token_factor: float = 1.0
    breaks: FaultKind | None = None  # one of BREAKS
    after_tokens: int = 0

    def replaces(self, *, generates: bool) -> FaultKind | None:
        """Return what a request gets instead of its answer, if anything."""
        return self.instead if generates or self.instead in HITS_PROBES else None

    def breaks_at(self, tokens_sent: int) -> FaultKind | None:
        """Return how a stream that has sent so many tokens breaks now, if it does."""
        return self.breaks if self.breaks is not None and tokens_sent >= self.after_tokens else None


NO_EFFECT = Effect()


def active(faults: Sequence[Fault], t_ns: int) -> Effect:
    """Return what `faults` amount to at `t_ns`: factors multiply, of several breaks the earliest counts."""
    on = [fault for fault in faults if _is_on(fault, t_ns)]
    if not on:
        return NO_EFFECT
    kinds = {fault.kind for fault in on}
    breaking = min((f for f in on if f.kind in BREAKS), key=lambda f: f.after_tokens, default=None)
    slow = _product(on, FaultKind.SLOW)
    return Effect(
        down=not kinds.isdisjoint(_DOWN),
        instead=next((kind for kind in _INSTEAD if kind in kinds), None),
        first_token_factor=slow,
        token_factor=slow * _product(on, FaultKind.CRAWL),
        breaks=breaking.kind if breaking else None,
        after_tokens=breaking.after_tokens if breaking else 0,
    )


def next_change_ns(faults: Sequence[Fault], t_ns: int) -> int | None:
    """Return the first moment after `t_ns` at which `active` may answer differently; None: never again."""
    moments = [moment for fault in faults for moment in _changes(fault, t_ns) if moment > t_ns]
    return min(moments, default=None)


def _ns(seconds: float) -> int:
    return round(seconds * _NS_PER_S)


def _start_ns(fault: Fault) -> int:
    return 0 if fault.from_s is None else _ns(fault.from_s)


def _is_on(fault: Fault, t_ns: int) -> bool:
    since_ns = t_ns - _start_ns(fault)
    if since_ns < 0 or (fault.until_s is not None and t_ns >= _ns(fault.until_s)):
        return False
    return fault.kind is not FaultKind.FLAP or since_ns % _ns(fault.period_s) >= _ns(fault.up_s)


def _changes(fault: Fault, t_ns: int) -> list[int]:
    """Return candidate moments of change around and after `t_ns`, not all of them later than it."""
    start_ns = _start_ns(fault)
    moments = [start_ns]
    if fault.until_s is not None:
        moments.append(_ns(fault.until_s))
    if fault.kind is FaultKind.FLAP and (fault.until_s is None or t_ns < _ns(fault.until_s)):
        period_ns = _ns(fault.period_s)
        begun_ns = start_ns + max(0, t_ns - start_ns) // period_ns * period_ns
        moments += [begun_ns + _ns(fault.up_s), begun_ns + period_ns]
    return moments


def _product(faults: Sequence[Fault], kind: FaultKind) -> float:
    factor = 1.0
    for fault in faults:
        if fault.kind is kind:
            factor *= fault.factor
    return factor
