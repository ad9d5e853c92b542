"""What benchmarks/soak.py makes of its run: what the balancer holds over time, and whose fault each failure is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from benchmarks.kit import NO_VALUE, NS_PER_S, median
from benchmarks.processes import memory
from benchmarks.soak_load import Kind, Outcome

WARM_UP = 0.2  # of the time, in which what is kept of the last requests fills, and caches do
WINDOW = 0.2  # of the time after it: its first and its last part are compared
OFF = "off"  # the server's process is ended, and started again
START_S = 2.5  # what that takes on a busy machine, and is part of the fault

BREAKING = frozenset(
    {OFF, "refuse", "cut-midstream", "stall-midstream", "end-midstream", "error-midstream"}
)  # faults that end streams under way
ROTATION = (
    "refuse",
    "hang",
    "error-500",
    "cut-midstream",
    "busy-503",
    "slow",
    OFF,
    "garbage",
    "stall-midstream",
    "hang-chat",
    "reset",
    "end-midstream",
    "error-midstream",
)


# --- what it holds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What a process holds at a moment, s since the begin."""

    at_s: float
    rss: int  # bytes
    uss: int  # of these, its own
    descriptors: int
    threads: int


def sample(pid: int, begin_ns: int) -> Sample:
    """Look at a process."""
    held = memory(pid)
    n_descriptors = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    threads = sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
    return Sample((time.monotonic_ns() - begin_ns) / NS_PER_S, held["rss"], held["uss"], n_descriptors, threads)


def growth(samples: Sequence[Sample], seconds: float) -> float:
    """Return by what share the memory has grown from the first window after the warm-up to the last one."""
    warm_s = WARM_UP * seconds
    span_s = WINDOW * (seconds - warm_s)
    first = [each.rss for each in samples if warm_s <= each.at_s < warm_s + span_s]
    last = [each.rss for each in samples if seconds - span_s <= each.at_s < seconds]
    return median(last) / median(first) - 1 if first and last else NO_VALUE


# --- what was broken, and what it explains -----------------------------------------------------------------------


@dataclass
class Span:
    """A fault, on from `begin_ns` to `end_ns` (0: still on)."""

    server: str
    kind: str
    begin_ns: int
    end_ns: int = 0

    def overlaps(self, begin_ns: int, end_ns: int) -> bool:
        """Whether it was on at any moment of these."""
        return self.begin_ns <= end_ns and (not self.end_ns or self.end_ns >= begin_ns)


@dataclass(frozen=True)
class Plan:
    """One fault to come: at which moment, for how long, s."""

    server: int
    kind: str
    begin_s: float
    lasts_s: float


def plan(seconds: float, every_s: float, n_servers: int) -> list[Plan]:
    """Return the faults of a run: a kind after the other, a server after the other.

    The last server is the one that is switched off, and has no other fault. Every second fault stays for two turns, so
    that two servers are bad at once; the others are well. The last fault ends before the last turn.
    """
    plans = []
    for index in range(int(seconds / every_s) - 2):
        kind = ROTATION[index % len(ROTATION)]
        server = n_servers - 1 if kind == OFF else index % (n_servers - 1)
        lasts_s = every_s * (1 + index % 2) - (START_S if kind == OFF else 0.0)
        plans.append(Plan(server, kind, index * every_s, lasts_s))
    return plans


class Verdict(StrEnum):
    """What a request's end means."""

    WHOLE = "whole"
    LEFT = "left"  # the client has, as it was to
    EXPLAINED = "explained"  # a stream under way on a server that broke, ended with an error line
    SILENT = "silent"  # the same, without one
    LOST = "lost"


def verdict(kind: Kind, outcome: Outcome, spans: Sequence[Span]) -> Verdict:
    """Judge a request."""
    if outcome.whole or outcome.left:
        return Verdict.WHOLE if outcome.whole else Verdict.LEFT
    broken = any(
        span.kind in BREAKING and span.server == outcome.server and span.overlaps(outcome.planned_ns, outcome.ended_ns)
        for span in spans
    )
    if not (kind.streams and outcome.committed and broken):
        return Verdict.LOST
    return Verdict.EXPLAINED if outcome.error_line else Verdict.SILENT


def log_of(log: Path, request_ids: set[str]) -> list[str]:
    """Return the lines of a log that tell of these requests."""
    if not request_ids:
        return []
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if any(f'"{name}"' in line for name in request_ids)]
    return []
