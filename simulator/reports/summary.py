"""What one run comes to: counts, latencies, waste, servers, health; and all of it as figures by name. Pure.

Quantiles are by nearest rank: the value that so many percent of all do not exceed, always one that occurred. Those of
the inter-token times are read from their histogram and true to 2.5 %. Times are int ns.

TTFT counts every request whose client got a first token, whatever became of it later; ITL every token delivered;
E2E only requests that were answered in full. A request that got nothing is in none of them: read them beside `failed`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lbcore.health import ALIVE_FROM
from lbcore.schema import MS_NS, SECOND_NS, join
from simulator.reports.figures import SERVERS
from simulator.reports.results import GAP_STEP, Gaps, HealthPoint, Outcome, RequestResult, RunResult, ServerResult

_N = TypeVar("_N", int, float)

SAMPLES = 24
"""Into so many equal stretches of time a server's health is divided for a table."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A latency. All None when nothing was measured."""

    n: int = 0
    p50_ns: int | None = None
    p90_ns: int | None = None
    p99_ns: int | None = None
    max_ns: int | None = None


@dataclass(frozen=True, slots=True)
class HealthSummary:
    """A server's health over time, from the first value known to the end of the run."""

    low: float  # since it first lived: every server starts dead
    mean: float  # over time
    last: float
    dead_ns: int  # time spent below 1.0
    samples: tuple[float, ...]  # the lowest value of each of `SAMPLES` stretches of the run; nan: not known yet


@dataclass(frozen=True, slots=True)
class ServerSummary:
    """One server."""

    name: str
    slots: int
    attempts: int
    tokens: int
    tokens_wasted: int
    busy_ns: int
    wasted_ns: int
    utilisation: float  # busy_ns of slots * run length; above 1 when several models were at work at once
    loads: int
    load_ns: int
    health: HealthSummary | None  # None: never recorded


@dataclass(frozen=True, slots=True)
class Summary:
    """One run."""

    scenario: str
    seed: int
    policy: str
    ended_ns: int
    n_events: int
    requests: int
    outcomes: Mapping[Outcome, int]  # every outcome is there
    whys: tuple[tuple[Outcome, str, int], ...]  # failures and rejections by what the client was told, most first
    ttft: Quantiles
    itl: Quantiles
    e2e: Quantiles
    attempts: int
    amplification: float
    tokens: int  # made by the servers
    tokens_delivered: int
    tokens_wasted: int
    busy_ns: int
    wasted_ns: int
    servers: tuple[ServerSummary, ...]
    violations: tuple[str, ...]

    def share(self, outcome: Outcome) -> float:
        """Return the share of the requests with an outcome; of no requests at all, all are completed."""
        if not self.requests:
            return float(outcome is Outcome.COMPLETED)
        return self.outcomes[outcome] / self.requests


def summarise(result: RunResult) -> Summary:
    """Return what a run comes to."""
    requests, servers = result.requests, result.servers
    outcomes = Counter(request.outcome for request in requests)
    health = _health_by_server(result.health, result.ended_ns)
    return Summary(
        scenario=result.scenario,
        seed=result.seed,
        policy=result.policy,
        ended_ns=result.ended_ns,
        n_events=result.n_events,
        requests=len(requests),
        outcomes={outcome: outcomes[outcome] for outcome in Outcome},
        whys=_whys(requests),
        ttft=quantiles(ttft for request in requests if (ttft := request.ttft_ns) is not None),
        itl=gap_quantiles(result.gaps),
        e2e=quantiles(request.e2e_ns for request in requests if request.outcome is Outcome.COMPLETED),
        attempts=sum(request.n_attempts for request in requests),
        amplification=result.amplification,
        tokens=sum(server.tokens for server in servers),
        tokens_delivered=sum(request.tokens for request in requests),
        tokens_wasted=sum(server.tokens_wasted for server in servers),
        busy_ns=sum(server.busy_ns for server in servers),
        wasted_ns=sum(server.wasted_ns for server in servers),
        servers=tuple(_server(server, result.ended_ns, health.get(server.name)) for server in servers),
        violations=tuple(result.violations),
    )


def _whys(requests: Iterable[RequestResult]) -> tuple[tuple[Outcome, str, int], ...]:
    told = (Outcome.FAILED, Outcome.REJECTED)
    counts = Counter((request.outcome, request.why) for request in requests if request.outcome in told)
    rows = [(outcome, why, n) for (outcome, why), n in counts.items()]
    return tuple(sorted(rows, key=lambda row: (-row[2], row[0], row[1])))


def _server(server: ServerResult, run_ns: int, health: HealthSummary | None) -> ServerSummary:
    return ServerSummary(
        name=server.name,
        slots=server.slots,
        attempts=server.requests,
        tokens=server.tokens,
        tokens_wasted=server.tokens_wasted,
        busy_ns=server.busy_ns,
        wasted_ns=server.wasted_ns,
        utilisation=ratio(server.busy_ns, server.slots * run_ns),
        loads=server.loads,
        load_ns=server.load_ns,
        health=health,
    )


# --- latencies -------------------------------------------------------------------------------------------------


def ratio(part: float, whole: float) -> float:
    """Return `part / whole`; 0 of nothing."""
    return part / whole if whole else 0.0


def _rank(n: int, percent: int) -> int:
    """Return the nearest rank, from 0 on, of a percentile; in whole numbers, so that it is exact."""
    return max(0, -(-n * percent // 100) - 1)


def percentile(values: Sequence[_N], percent: int) -> _N:
    """Return a percentile of some values, of which there is at least one, by nearest rank."""
    return sorted(values)[_rank(len(values), percent)]


def quantiles(values_ns: Iterable[int]) -> Quantiles:
    """Return the quantiles of some times, by nearest rank."""
    ordered = sorted(values_ns)
    if not ordered:
        return Quantiles()
    p50, p90, p99 = (percentile(ordered, percent) for percent in (50, 90, 99))
    return Quantiles(len(ordered), p50, p90, p99, ordered[-1])


def gap_bin(gap_ns: int) -> int:
    """Return the bin of `Gaps` that an inter-token time belongs to; `GAP_STEP` ** bin is its (geometric) middle."""
    return round(math.log(max(1, gap_ns)) / math.log(GAP_STEP))


def gap_quantiles(gaps: Gaps) -> Quantiles:
    """Return the quantiles of a histogram: the middle of the bin that holds the nearest rank."""
    n = sum(gaps.bins.values())
    if not n:
        return Quantiles()
    ordered = sorted(gaps.bins.items())
    p50, p90, p99 = (min(gaps.max_ns, _value_at(ordered, _rank(n, percent))) for percent in (50, 90, 99))
    return Quantiles(n, p50, p90, p99, gaps.max_ns)


def _value_at(ordered: Sequence[tuple[int, int]], rank: int) -> int:
    before = 0
    for exponent, n in ordered:
        before += n
        if before > rank:
            return round(math.pow(GAP_STEP, exponent))
    raise IndexError(rank)


# --- health ----------------------------------------------------------------------------------------------------


def _health_by_server(points: Sequence[HealthPoint], end_ns: int) -> dict[str, HealthSummary]:
    by_server: dict[str, list[tuple[int, float]]] = {}
    for point in sorted(points, key=lambda point: point.at_ns):
        by_server.setdefault(point.server, []).append((point.at_ns, point.value))
    return {server: health_summary(steps, end_ns) for server, steps in by_server.items()}


def health_summary(steps: Sequence[tuple[int, float]], end_ns: int) -> HealthSummary:
    """Return what a step function, as (from when, value) in order of time and not empty, comes to until `end_ns`."""
    end_ns = max(end_ns, steps[-1][0])
    samples = [math.nan] * SAMPLES
    area, dead_ns = 0.0, 0
    for index, (from_ns, value) in enumerate(steps):
        until_ns = steps[index + 1][0] if index + 1 < len(steps) else end_ns
        area += value * (until_ns - from_ns)
        dead_ns += until_ns - from_ns if value < ALIVE_FROM else 0
        if until_ns > from_ns:  # a value that was replaced at the same instant was never seen
            first = from_ns * SAMPLES // end_ns
            for sample in range(first, min(SAMPLES, -(-until_ns * SAMPLES // end_ns))):
                samples[sample] = value if math.isnan(samples[sample]) else min(samples[sample], value)
    known_ns, last = end_ns - steps[0][0], steps[-1][1]
    values = [value for _, value in steps]
    born = next((index for index, value in enumerate(values) if value >= ALIVE_FROM), 0)
    return HealthSummary(min(values[born:]), area / known_ns if known_ns else last, last, dead_ns, tuple(samples))


# --- figures by name -------------------------------------------------------------------------------------------


def flat(summary: Summary) -> dict[str, float]:
    """Return every figure of `simulator.reports.figures` by its name; nan where there is nothing to measure."""
    found: dict[str, float] = {"requests": summary.requests}
    found |= {str(outcome): summary.share(outcome) for outcome in Outcome}
    found |= {f"{outcome}_requests": summary.outcomes[outcome] for outcome in Outcome}
    for name, of in (("ttft", summary.ttft), ("itl", summary.itl), ("e2e", summary.e2e)):
        values = {"p50": of.p50_ns, "p90": of.p90_ns, "p99": of.p99_ns, "max": of.max_ns}
        found |= {f"{name}_{part}_ms": math.nan if ns is None else ns / MS_NS for part, ns in values.items()}
    healths = [server.health for server in summary.servers if server.health is not None]
    slots = sum(server.slots for server in summary.servers)
    found |= {
        "attempts": summary.attempts,
        "amplification": summary.amplification,
        "tokens": summary.tokens,
        "delivered_tokens": summary.tokens_delivered,
        "wasted_tokens": summary.tokens_wasted,
        "wasted_tokens_pct": 100 * ratio(summary.tokens_wasted, summary.tokens),
        "server_seconds": summary.busy_ns / SECOND_NS,
        "wasted_server_seconds": summary.wasted_ns / SECOND_NS,
        "wasted_server_seconds_pct": 100 * ratio(summary.wasted_ns, summary.busy_ns),
        "utilisation_pct": 100 * ratio(summary.busy_ns, slots * summary.ended_ns),
        "busiest_pct": 100 * max((server.utilisation for server in summary.servers), default=0.0),
        "loads": sum(server.loads for server in summary.servers),
        "health_min": min((health.low for health in healths), default=math.nan),
        "health_last_min": min((health.last for health in healths), default=math.nan),
        "dead_at_end": sum(health.last < ALIVE_FROM for health in healths),
        "violations": len(summary.violations),
        "events": summary.n_events,
        "duration_s": summary.ended_ns / SECOND_NS,
    }
    attempts = sum(server.attempts for server in summary.servers)
    for server in summary.servers:
        key = join(SERVERS, server.name)
        found |= {join(key, name): value for name, value in _server_figures(server, attempts).items()}
    return found


def _server_figures(server: ServerSummary, attempts: int) -> dict[str, float]:
    health = server.health
    return {
        "attempts": server.attempts,
        "attempts_pct": 100 * ratio(server.attempts, attempts),
        "tokens": server.tokens,
        "wasted_tokens": server.tokens_wasted,
        "utilisation_pct": 100 * server.utilisation,
        "loads": server.loads,
        "health_min": math.nan if health is None else health.low,
        "health_mean": math.nan if health is None else health.mean,
        "health_last": math.nan if health is None else health.last,
    }
