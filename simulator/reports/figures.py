"""The figures of a run by name: what each means, which way is better, and what several runs come to. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

SERVERS = "servers"
"""Figures of one server are called `servers.NAME.FIGURE`."""


class Better(Enum):
    """Which way a figure is better: what a plain number in `[expect]` means, and which run of several is the worst."""

    MORE = "at least"
    LESS = "at most"
    NEITHER = "exactly"


@dataclass(frozen=True, slots=True)
class Figure:
    """What one figure is."""

    words: str
    better: Better = Better.LESS
    high: float = math.inf  # the largest value that it can have; the smallest is 0
    whole: bool = False  # it is counted
    unit: str = ""


def _latencies(name: str, words: str) -> dict[str, Figure]:
    """Return the four figures of one latency."""
    parts = {"p50": "median", "p90": "90th percentile", "p99": "99th percentile", "max": "longest"}
    return {f"{name}_{part}_ms": Figure(f"{words}, {said}", unit="ms") for part, said in parts.items()}


def _share(words: str, better: Better = Better.LESS) -> Figure:
    return Figure(f"share of the requests {words}", better, high=1.0)


def _count(words: str, better: Better = Better.NEITHER) -> Figure:
    return Figure(words, better, whole=True)


FIGURES: Mapping[str, Figure] = {
    "requests": _count("requests that arrived"),
    "completed": _share("that were answered in full", Better.MORE),
    "failed": _share("that got an error or a broken stream"),
    "rejected": _share("that were refused before any attempt"),
    "left": _share("whose client gave up"),
    "unfinished": _share("still under way at the end of the run"),
    "completed_requests": _count("requests that were answered in full"),
    "failed_requests": _count("requests that got an error or a broken stream"),
    "rejected_requests": _count("requests that were refused before any attempt"),
    "left_requests": _count("requests whose client gave up"),
    "unfinished_requests": _count("requests still under way at the end of the run"),
    **_latencies("ttft", "time to first token at the client"),
    **_latencies("itl", "time between two tokens at the client"),
    **_latencies("e2e", "time from arrival to the end of a complete answer"),
    "attempts": _count("attempts made for all requests"),
    "amplification": Figure("attempts a request"),
    "tokens": _count("tokens made by all servers"),
    "delivered_tokens": _count("tokens that reached their clients", Better.MORE),
    "wasted_tokens": _count("tokens made for attempts that were not delivered", Better.LESS),
    "wasted_tokens_pct": Figure("share of all tokens that were made in vain", high=100.0, unit="%"),
    "server_seconds": Figure("slot time used, prefill included", Better.NEITHER, unit="s"),
    "wasted_server_seconds": Figure("slot time used for attempts that were not delivered", unit="s"),
    "wasted_server_seconds_pct": Figure("share of the slot time that was used in vain", high=100.0, unit="%"),
    "utilisation_pct": Figure("slot time used of what there was", Better.NEITHER, unit="%"),
    "busiest_pct": Figure("utilisation of the busiest server", unit="%"),
    "loads": _count("times a model was loaded", Better.LESS),
    "health_min": Figure("lowest health of any server at any moment", Better.MORE),
    "health_last_min": Figure("lowest health of any server at the end", Better.MORE),
    "dead_at_end": _count("servers that are dead at the end", Better.LESS),
    "violations": _count("violations of safety and liveness", Better.LESS),
    "events": _count("events that the core took"),
    "duration_s": Figure("length of the run", Better.NEITHER, unit="s"),
}
"""Every figure of a run, in the order of reports."""

SERVER_FIGURES: Mapping[str, Figure] = {
    "attempts": _count("attempts that reached it"),
    "attempts_pct": Figure("share of all attempts", Better.NEITHER, high=100.0, unit="%"),
    "tokens": _count("tokens it made"),
    "wasted_tokens": _count("tokens it made for attempts that were not delivered", Better.LESS),
    "utilisation_pct": Figure("slot time used of what it had", Better.NEITHER, unit="%"),
    "loads": _count("times it loaded a model", Better.LESS),
    "health_min": Figure("its lowest health", Better.MORE),
    "health_mean": Figure("its mean health over time", Better.MORE),
    "health_last": Figure("its health at the end", Better.MORE),
}
"""Every figure of one server."""


def figure_of(name: str) -> Figure:
    """Return what a figure is, also one of a server. Raises KeyError for a name that does not exist."""
    return SERVER_FIGURES[name.rpartition(".")[2]] if name.startswith(f"{SERVERS}.") else FIGURES[name]


# --- several seeds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure over several runs. All nan and seed -1 when no run has a value."""

    median: float  # of an even number of runs: the mean of the two in the middle
    low: float
    high: float
    worst: float
    worst_seed: int  # the first of those with the worst value
    runs: int  # that have a value: a latency has none when no request got so far


def merge(runs: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, Spread]:
    """Return what the figures of several runs, as (seed, figures), come to; in the order of the first run."""
    names = dict.fromkeys(name for _, flat in runs for name in flat)
    return {name: _spread(name, [(seed, flat[name]) for seed, flat in runs if name in flat]) for name in names}


def _spread(name: str, values: Iterable[tuple[int, float]]) -> Spread:
    known = [(seed, value) for seed, value in values if not math.isnan(value)]
    if not known:
        return Spread(math.nan, math.nan, math.nan, math.nan, -1, 0)
    ordered = sorted(value for _, value in known)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    worst = ordered[0] if figure_of(name).better is Better.MORE else ordered[-1]
    worst_seed = next(seed for seed, value in known if value == worst)
    return Spread(median, ordered[0], ordered[-1], worst, worst_seed, len(known))


# --- sweeps ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean of a figure over seeds, with its 95 % confidence interval (Student's t, cut off at 0).

    Of fewer runs than `INTERVAL_RUNS_MIN` it is the mean alone: the t of two is 12.7, and their interval says nothing.
    """

    mean: float
    low: float
    high: float
    runs: int

    @property
    def has_interval(self) -> bool:
        """Whether `low` and `high` say more than the mean."""
        return self.runs >= INTERVAL_RUNS_MIN


INTERVAL_RUNS_MIN = 3
NO_ESTIMATE = Estimate(math.nan, math.nan, math.nan, 0)

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom (NIST/SEMATECH e-Handbook, table 1.3.6.7.2).
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of one figure's values, one a seed; nan is left out."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return NO_ESTIMATE
    mean = math.fsum(known) / len(known)
    if len(known) < INTERVAL_RUNS_MIN:
        return Estimate(mean, mean, mean, len(known))
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    df = len(known) - 1
    t = _T95[df - 1] if df <= len(_T95) else 1.960 + 2.46 / df  # true to 0.1 % beyond the table
    half = t * math.sqrt(variance / len(known))
    return Estimate(mean, max(0.0, mean - half), mean + half, len(known))


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One cell of a sweep: a policy on a scenario (fleet and trace) at a load, over all its seeds."""

    scenario: str
    policy: str
    load: float  # offered work as a share of what the fleet can do; 1.0 is saturation
    figures: Mapping[str, Estimate]

    def figure(self, name: str) -> Estimate:
        """Return a figure; one without a value when no run has it."""
        return self.figures.get(name, NO_ESTIMATE)


def sweep_row(scenario: str, policy: str, load: float, flats: Sequence[Mapping[str, float]]) -> SweepRow:
    """Return one cell of a sweep from the figures of its runs, one a seed."""
    names = dict.fromkeys(name for flat in flats for name in flat)
    figures = {name: estimate([flat[name] for flat in flats if name in flat]) for name in names}
    return SweepRow(scenario, policy, load, figures)


def ratio_to(rows: Sequence[SweepRow], row: SweepRow, name: str, reference: str = "oracle") -> float:
    """Return a figure's mean as a multiple of the reference policy's on the same scenario and load; nan for none."""
    for other in rows:
        if (other.policy, other.scenario, other.load) == (reference, row.scenario, row.load):
            base = other.figure(name).mean
            return row.figure(name).mean / base if base else math.nan
    return math.nan
