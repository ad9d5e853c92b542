"""What a relayed token costs, and what a proxy adds to the times that a client sees.

CPU: 200 streams of 100 tokens, 20 ms apart, against one server address and against four (then ollama-lb races). The
cost of a whole run over its tokens, and what a token costs while all streams run and none begins or ends.
Times: first tokens after 50 ms, at 10 and 100 open streams that begin by chance, and 1,000 that begin within a second;
beside the same load sent straight to the same server. `added` is the difference of the percentiles of both.
Programs take turns; figures are medians of the repetitions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks import peers
from benchmarks.kit import Report, finish, median, number, parser, percentile, spread, workspace
from benchmarks.processes import Talker, cpu_ns, load, raise_descriptors, upstream
from benchmarks.streams import Load, Seen, even, scattered
from benchmarks.upstream import Pace

STREAMS, TOKENS, EVERY_MS = 200, 100, 20
_BEGIN_S = 0.4  # in which all streams begin
_SETTLE_S = 0.2  # before and after the steady part
_SLOTS = 1024
_PATIENCE_S = 60

CPU_BAR = 1.2


@dataclass(frozen=True)
class Cost:
    """CPU time of one run, and what was relayed with it."""

    cpu_us: float
    tokens: int
    steady_cpu_us: float
    steady_tokens: int
    complete: int

    @property
    def whole_us(self) -> float:
        """All CPU time, for each token."""
        return self.cpu_us / self.tokens if self.tokens else 0.0

    @property
    def token_us(self) -> float:
        """What one more token costs."""
        return self.steady_cpu_us / self.steady_tokens if self.steady_tokens else 0.0

    @property
    def request_us(self) -> float:
        """What a request costs beside its tokens."""
        return (self.cpu_us - self.token_us * self.tokens) / self.complete if self.complete else 0.0


@dataclass(frozen=True)
class Contender:
    """A program, and the servers that it has."""

    name: str
    start: Callable[[Sequence[int], Path], AbstractContextManager[peers.Proxy]]
    n_servers: int = 1


def contenders() -> tuple[list[Contender], list[str]]:
    """Return what can be measured here, and a word on what cannot."""
    here, missing = peers.found()
    ollama_lb = partial(peers.ollama_lb, slots=_SLOTS, patience_s=_PATIENCE_S)
    found = [Contender("ollama-lb", ollama_lb), Contender("ollama-lb", ollama_lb, 4)]
    if "nginx" in here:
        nginx = partial(peers.nginx, patience_s=_PATIENCE_S)
        found += [Contender("nginx", nginx), Contender("nginx", nginx, 4)]
        found += [Contender("nginx, access_log", partial(nginx, access_log=True))]
    if "haproxy" in here:
        found += [Contender("haproxy", partial(peers.haproxy, patience_s=_PATIENCE_S))]
    return found, missing


def _warm_up(port: int) -> None:
    """Let a program import, connect and answer once; not counted."""
    with load(Load(port, even(20, 0.2), Pace(5, 0, 5))) as running:
        running.result()


def cost(port: int, pid: int, servers: Talker, n_streams: int, n_tokens: int) -> tuple[Cost, Seen]:
    """Relay streams through the program at `port` and return what it took."""
    wanted = Load(port, even(n_streams, _BEGIN_S), Pace(n_tokens, EVERY_MS, EVERY_MS))
    steady_s = n_tokens * EVERY_MS / 1000 - _BEGIN_S - 2 * _SETTLE_S
    before = cpu_ns(pid)
    with load(wanted) as running:
        time.sleep(max(0.0, (running.begun_ns - time.monotonic_ns()) / 1e9) + _BEGIN_S + _SETTLE_S)
        steady = cpu_ns(pid), servers.ask("stats").get("tokens", 0)
        time.sleep(max(0.0, steady_s))
        steady_end = cpu_ns(pid), servers.ask("stats").get("tokens", 0)
        seen = running.result()
    time.sleep(0.2)  # what a program does when a stream is over
    used = (cpu_ns(pid) - before) / 1000
    steady_used = (steady_end[0] - steady[0]) / 1000
    return Cost(used, seen.tokens, steady_used, steady_end[1] - steady[1], seen.complete), seen


def measure_costs(
    found: Sequence[Contender], n_repeats: int, n_streams: int, n_tokens: int
) -> tuple[dict[str, list[Cost]], list[str]]:
    """Let the programs take turns; what each run took, by the program's name, and what went wrong."""
    costs: dict[str, list[Cost]] = {}
    problems: list[str] = []
    for _ in range(n_repeats):
        for each in found:
            name = f"{each.name}, {each.n_servers} server{'s' * (each.n_servers > 1)}"
            with upstream(each.n_servers) as (ports, servers), workspace() as where, each.start(ports, where) as proxy:
                _warm_up(proxy.port)
                got, seen = cost(proxy.port, proxy.pid, servers, n_streams, n_tokens)
            costs.setdefault(name, []).append(got)
            problems += [f"{name}: {problem}" for problem in sorted(set(seen.problems))[:2]]
    return costs, problems


def costs_report(n_repeats: int, n_streams: int = STREAMS, n_tokens: int = TOKENS) -> Report:
    """Measure CPU time."""
    found, missing = contenders()
    costs, problems = measure_costs(found, n_repeats, n_streams, n_tokens)
    title = f"relay: CPU µs, {n_streams} streams x {n_tokens} tokens {EVERY_MS} ms apart, median (min-max)"
    columns = ("program", "a token, in all", "to nginx", "one more token", "to nginx", "a request", "to nginx", "whole")
    report = Report("relay", title, columns, notes=[*missing, *problems])
    for name, got in costs.items():
        peer = costs.get(f"nginx{name.removeprefix(name.split(',', maxsplit=1)[0])}", [])
        row = [name]
        for figure in ("whole_us", "token_us", "request_us"):
            values = [getattr(each, figure) for each in got]
            to = median([getattr(each, figure) for each in peer])
            row += [spread(values), number(median(values) / to, 2) if peer else "-"]
        report.rows.append((*row, f"{sum(each.complete for each in got)}/{n_streams * n_repeats}"))
        report.bars[f"{name}: all streams come whole"] = all(each.complete == n_streams for each in got)
        if name.startswith("ollama-lb") and peer:
            ratio = median([each.whole_us for each in got]) / median([each.whole_us for each in peer])
            report.bars[f"{name}: CPU a token <= {CPU_BAR:g} x nginx"] = ratio <= CPU_BAR
    figures = ("whole_us", "token_us", "request_us")
    report.data["cpu"] = {
        name: {figure: [getattr(each, figure) for each in got] for figure in figures} for name, got in costs.items()
    }
    return report


# --- times -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crowd:
    """How many streams there are, and what the times may be. Bars in ms, at p50 and p99."""

    name: str
    moments: Callable[[int], list[float]]
    pace: Pace
    bars: tuple[float | None, float]


def crowds(seconds: float) -> list[Crowd]:
    """Return the loads: streams of a second, as many of them a second as are to be open."""
    second = Pace(48, 50, 20)
    return [
        Crowd("10", lambda seed: scattered(round(10 * seconds), seconds, seed), second, (1.0, 5.0)),
        Crowd("100", lambda seed: scattered(round(100 * seconds), seconds, seed), second, (1.0, 5.0)),
        Crowd("1,000 within 1 s", lambda seed: scattered(1000, 1.0, seed), Pace(20, 50, 100), (None, 50.0)),
    ]


def _timed(port: int, crowd: Crowd, seed: int) -> Seen:
    with load(Load(port, crowd.moments(seed), crowd.pace, timed=True)) as running:
        return running.result()


def _pooled(found: Sequence[Seen]) -> Seen:
    pooled = Seen()
    for seen in found:
        for name, value in asdict(seen).items():
            setattr(pooled, name, getattr(pooled, name) + value)
    return pooled


def measure_times(found: Sequence[Contender], load_of: Crowd, n_repeats: int) -> dict[str, list[Seen]]:
    """Let the programs take turns, and no program at all, each with the same moments."""
    got: dict[str, list[Seen]] = {}
    for seed in range(n_repeats):
        for each in found:
            with upstream(1) as (ports, _), workspace() as where, each.start(ports, where) as proxy:
                _warm_up(proxy.port)
                got.setdefault(each.name, []).append(_timed(proxy.port, load_of, seed))
        with upstream(1) as (ports, _):
            _warm_up(ports[0])
            got.setdefault("direct", []).append(_timed(ports[0], load_of, seed))
    return got


def _figures(seen: Seen) -> dict[str, float]:
    names = ("ttft", "gaps", "transit", "late")
    return {
        f"{name}_p{round(share * 100)}": percentile(getattr(seen, f"{name}_ms"), share)
        for name in names
        for share in (0.5, 0.99)
    }


def times_report(n_repeats: int, seconds: float) -> Report:
    """Measure what is added to times."""
    found, missing = contenders()
    found = [each for each in found if each.n_servers == 1 and "log" not in each.name]
    columns: tuple[str, ...] = (
        "streams, program",
        "begun",
        "TTFT p50",
        "p99",
        "added p50",
        "p99",
        "gap p50",
        "p99",
        "added p50",
        "p99",
    )
    columns += ("on its way p50", "p99", "sent late p50", "p99", "whole")
    report = Report("relay-times", "relay: what is added to times, ms", columns, notes=missing)
    for crowd in crowds(seconds):
        got = measure_times(found, crowd, n_repeats)
        runs = {name: [_figures(seen) for seen in each] for name, each in got.items()}
        direct = runs["direct"]
        for name, figures in runs.items():
            pooled = _pooled(got[name])
            middle = {key: median([each[key] for each in figures]) for key in figures[0]}
            added = {
                key: [each[key] - base[key] for each, base in zip(figures, direct, strict=True)] for key in figures[0]
            }
            row = [f"{crowd.name}, {name}", str(len(pooled.late_ms))]
            for what in ("ttft", "gaps"):
                row += [number(middle[f"{what}_p50"], 2), number(middle[f"{what}_p99"], 2)]
                more = [spread(added[f"{what}_{share}"], 2) for share in ("p50", "p99")]
                row += ["-", "-"] if name == "direct" else more
            row += [number(middle[f"{what}_{share}"], 2) for what in ("transit", "late") for share in ("p50", "p99")]
            report.rows.append((*row, f"{pooled.complete}/{len(pooled.late_ms)}"))
            report.notes += [f"{crowd.name}, {name}: {each}" for each in sorted(set(pooled.problems))[:2]]
            if name == "ollama-lb":
                for share, bar in zip(("p50", "p99"), crowd.bars, strict=True):
                    if bar is not None:
                        met = median(added[f"ttft_{share}"]) <= bar
                        report.bars[f"{crowd.name} streams: TTFT {share} <= direct + {bar:g} ms"] = met
        report.data[crowd.name] = {
            name: {"runs": figures, "ttft_ms": _pooled(got[name]).ttft_ms} for name, figures in runs.items()
        }
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.relay --quick cpu")
    options.add_argument("parts", nargs="*", metavar="PART", help="of cpu, times; default: both")
    options.add_argument("--repeats", type=int, help="how often each is measured; default 5, with --quick 1")
    args = options.parse_args(argv)
    raise_descriptors()
    n_repeats = args.repeats or (1 if args.quick else 5)
    code = 0
    for part in args.parts or ("cpu", "times"):
        report = costs_report(n_repeats) if part == "cpu" else times_report(n_repeats, 2.0 if args.quick else 6.0)
        code |= finish(report, as_json=args.json)
    return code


if __name__ == "__main__":
    sys.exit(main())
