"""What a proxy adds to the times that a client sees: `python -m benchmarks.relay times`.

Streams with their first token after 50 ms: about 10 and 100 open at once, of a second each, which begin by chance (48
tokens, 20 ms apart), and 1,000 that begin within a second (20 tokens, 100 ms apart). The programs take turns with the
same load at the same moments sent straight to the server, `direct`.

TTFT: from when the client begins to connect, which it may do late (`sent late`), to the first byte. Gap: between two
tokens of a stream. `added`: its percentile less that of `direct` in the same repetition. On its way: from the moment
that the server has written into a token until it came, of which `direct` has a share as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from benchmarks import peers
from benchmarks.kit import Figure, Report, median, number, percentile, spread, workspace
from benchmarks.processes import load, raise_descriptors, upstream, warm_up
from benchmarks.streams import Load, Seen, scattered
from benchmarks.upstream import Pace

SECONDS, QUICK_SECONDS = 6.0, 2.0
DIRECT = "direct"
_SHARES = {"p50": 0.5, "p99": 0.99}
_WHATS = ("ttft", "gap", "way", "late")


@dataclass(frozen=True)
class Crowd:
    """How many streams there are, and what may be added to their TTFT at p50 and p99, ms."""

    name: str
    moments: Callable[[float, int], list[float]]
    pace: Pace
    bars: tuple[float | None, float]


_SECOND = Pace(48, 50, 20)
CROWDS = (
    Crowd("10", lambda seconds, seed: scattered(round(10 * seconds), seconds, seed), _SECOND, (1.0, 5.0)),
    Crowd("100", lambda seconds, seed: scattered(round(100 * seconds), seconds, seed), _SECOND, (1.0, 5.0)),
    Crowd("1,000 within 1 s", lambda _, seed: scattered(1000, 1.0, seed), Pace(20, 50, 100), (None, 50.0)),
)


def percentiles(seen: Seen) -> dict[str, float]:
    """Return the figures of one run, such as `ttft_p50`, ms."""
    values = dict(zip(_WHATS, (seen.ttft_ms, seen.gaps_ms, seen.transit_ms, seen.late_ms), strict=True))
    return {f"{what}_{name}": percentile(values[what], share) for what in _WHATS for name, share in _SHARES.items()}


def added(figures: Sequence[dict[str, float]], direct: Sequence[dict[str, float]], key: str) -> list[float]:
    """Return how much more than the direct run of its repetition each run has."""
    return [one[key] - base[key] for one, base in zip(figures, direct, strict=True)]


def pooled(runs: Sequence[Seen]) -> Seen:
    """Return what all repetitions saw, as one."""
    every = Seen()
    for seen in runs:
        for name, value in asdict(seen).items():
            setattr(every, name, getattr(every, name) + value)
    return every


def _timed(port: int, crowd: Crowd, seconds: float, seed: int) -> Seen:
    warm_up(port)
    with load(Load(port, crowd.moments(seconds, seed), crowd.pace, timed=True)) as running:
        return running.result()


def measure(programs: dict[str, peers.Starter], crowd: Crowd, repeats: int, seconds: float) -> dict[str, list[Seen]]:
    """Let the programs, and none, take turns; what each repetition saw."""
    got: dict[str, list[Seen]] = {name: [] for name in (*programs, DIRECT)}
    for seed in range(repeats):
        for name, start in programs.items():
            with upstream(1) as (ports, _), workspace() as where, start(ports, where) as proxy:
                got[name].append(_timed(proxy.port, crowd, seconds, seed))
        with upstream(1) as (ports, _):
            got[DIRECT].append(_timed(ports[0], crowd, seconds, seed))
    return got


def add_crowd(report: Report, crowd: Crowd, got: dict[str, list[Seen]]) -> None:
    """Put the runs of all programs before one crowd into the report, and judge ours."""
    runs = {name: [percentiles(seen) for seen in each] for name, each in got.items()}
    for name, figures in runs.items():
        every, title = pooled(got[name]), f"{crowd.name}, {name}"
        more = {key: added(figures, runs[DIRECT], key) for key in figures[0]}
        row = [title]
        for what, shares in (("ttft", ("p50", "p99")), ("gap", ("p99",))):
            row += [number(median([one[f"{what}_{share}"] for one in figures]), 2) for share in shares]
            row += ["-" if name == DIRECT else spread(more[f"{what}_{share}"], 2) for share in _SHARES]
        for key in ("way_p50", "way_p99", "late_p99"):
            row.append(number(median([one[key] for one in figures]), 2))
        report.rows.append((*row, f"{every.complete}/{len(every.late_ms)}"))
        report.notes += [f"{title}: {problem}" for problem in sorted(set(every.problems))[:3]]
        report.data[title] = {"runs": figures, "ttft_ms": every.ttft_ms}
        if name != DIRECT:
            report.bars[f"{title}: all streams come whole"] = every.complete == len(every.late_ms)
        if name == "ollama-lb":
            for (share, _), bar in zip(_SHARES.items(), crowd.bars, strict=True):
                report.figures[f"{title}: TTFT {share}, added"] = Figure(more[f"ttft_{share}"], "ms")
                report.figures[f"{title}: gap {share}, added"] = Figure(more[f"gap_{share}"], "ms")
                if bar is not None:
                    met = median(more[f"ttft_{share}"]) <= bar
                    report.bars[f"{crowd.name} streams: TTFT {share} <= direct + {bar:g} ms"] = met


def run(*, repeats: int, seconds: float = SECONDS) -> Report:
    """Measure all crowds."""
    raise_descriptors()
    programs, missing = peers.patient()
    columns: tuple[str, ...] = ("streams, program", "TTFT p50", "p99", "added p50", "added p99", "gap p99")
    columns += ("added p50", "added p99", "on its way p50", "p99", "sent late p99", "whole")
    title = "relay-times: what is added to times, ms, median (min-max)"
    report = Report("relay-times", title, columns, notes=missing)
    for crowd in CROWDS:
        add_crowd(report, crowd, measure(programs, crowd, repeats, seconds))
    return report
