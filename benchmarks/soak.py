"""Minutes of mixed load on four servers of which one or two are always broken: what is lost, and what grows.

Some requests a second (Poisson, open loop): chats streamed and not, /api/generate, /v1/chat/completions, embeddings,
a few and many, /api/tags, /api/show, pass-through; by clients that keep their connections, come once, leave before
the first token or within the stream, or read little. Every 5 seconds another fault begins on another server; one of
the four is a process of its own, which is ended and started again. Each failure is held against the faults that were
on: a stream that was committed to a server that broke may end early, with an error line; everything else that fails
is lost.

Memory and descriptors of the balancer are looked at every second. At the end, all is to be as it was at the begin.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import peers
from benchmarks.kit import (
    NS_PER_S,
    RESULTS,
    FakeFleet,
    Report,
    fake_fleet,
    finish,
    free_port,
    number,
    parser,
    percentile,
    workspace,
)
from benchmarks.load import arrivals
from benchmarks.soak_load import KINDS, Clients, Outcome
from benchmarks.soak_plot import draw
from benchmarks.soak_watch import OFF, WARM_UP, Sample, Span, Verdict, growth, log_of, plan, sample, verdict

MINUTES, QUICK_S = 10.0, 40.0
RATE = 30.0  # so that what is kept of the last 1,500 requests has filled long before the warm-up ends
EVERY_S = 5.0
N_SERVERS = 4
GROWTH_BAR = 0.02
JUDGED_FROM_S = 300.0  # of a shorter run the growth is shown, not judged: what is kept of requests is filling yet
SAMPLE_S = 1.0
PROGRESS_S = 5.0
_SETTLE_S = 45.0  # idle connections to servers are closed after 10 s, and looked for every 5 s
_POOL = '[pool]\nidle_timeout = "10s"'
_SLOTS = 8
_LOST_SHOWN = 50

_MODELS = [{"name": "llama3.2"}, {"name": "embedder", "capabilities": ["embedding"], "embedding_length": 64}]
_SPEC: dict[str, Any] = {"models": _MODELS, "start_loaded": ["llama3.2", "embedder"], "num_parallel": _SLOTS}


class Servers:
    """The servers: all but the last in one process, which are broken there, and the last, which is switched off."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._fleet = stack.enter_context(fake_fleet([{**_SPEC, "name": f"s{i}"} for i in range(N_SERVERS - 1)]))
        self._turn = threading.Lock()  # one talks to the fleet at a time
        self._last = stack.enter_context(contextlib.ExitStack())
        self._last_port = 0
        self._start_last()

    def _start_last(self) -> None:
        # A port of its own below those that the system gives to outgoing connections: it is free when it comes back.
        self._last_port = self._last_port or _steady_port()
        spec = {**_SPEC, "name": f"s{N_SERVERS - 1}", "port": self._last_port}
        self._last_fleet: FakeFleet = self._last.enter_context(fake_fleet([spec]))

    @property
    def ports(self) -> tuple[int, ...]:
        """Where they listen."""
        return (*self._fleet.ports, self._last_port)

    def begin(self, server: int, kind: str) -> None:
        """Break one."""
        if kind == OFF:
            self._last.close()
        else:
            self._tell(server, kind)

    def end(self, server: int, kind: str) -> None:
        """Heal it; return when it is there again."""
        if kind == OFF:
            self._start_last()
        else:
            self._tell(server, None)

    def _tell(self, server: int, kind: str | None) -> None:
        with self._turn:
            self._fleet.set_fault(server, kind)


def _steady_port() -> int:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    return free_port() % (first - 1024) // 2 + 1024 + (first - 1024) // 2


@dataclass
class Run:
    """A run under way, and all that it has seen."""

    proxy: peers.Proxy
    servers: Servers
    clients: Clients
    seconds: float
    rate: float
    begin_ns: int
    spans: list[Span] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    before: Sample | None = None
    after: Sample | None = None
    idle: dict[str, int] = field(default_factory=dict)

    async def go(self, moments: Sequence[float]) -> None:
        """Offer the load, break servers and watch; then wait until nothing is under way."""
        self.before = await asyncio.to_thread(sample, self.proxy.pid, self.begin_ns)
        watching = asyncio.create_task(self._watch())
        telling = asyncio.create_task(self._tell())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.clients.offer(moments, self.begin_ns))
            for each in plan(self.seconds, EVERY_S, N_SERVERS):
                tasks.create_task(self._break(each.server, each.kind, each.begin_s, each.lasts_s))
        telling.cancel()
        await self.clients.close()
        await self._settle()
        watching.cancel()
        self.after = await asyncio.to_thread(sample, self.proxy.pid, self.begin_ns)

    async def _break(self, server: int, kind: str, begin_s: float, lasts_s: float) -> None:
        await self._until(begin_s)
        span = Span(f"s{server}", kind, time.monotonic_ns())
        self.spans.append(span)
        await asyncio.to_thread(self.servers.begin, server, kind)
        await self._until(begin_s + lasts_s)
        await asyncio.to_thread(self.servers.end, server, kind)
        span.end_ns = time.monotonic_ns()

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - (time.monotonic_ns() - self.begin_ns) / NS_PER_S))

    async def _watch(self) -> None:
        while True:
            self.samples.append(await asyncio.to_thread(sample, self.proxy.pid, self.begin_ns))
            await asyncio.sleep(SAMPLE_S)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            counted = Counter(verdicts(self.clients.outcomes, self.spans))
            now = self.samples[-1]
            words = ", ".join(f"{count} {kind}" for kind, count in sorted(counted.items()))
            held = f"{now.rss / 2**20:.1f} MiB, {now.descriptors} descriptors"
            print(f"soak: {now.at_s:.0f} of {self.seconds:g} s: {words}; {held}", file=sys.stderr, flush=True)

    async def _settle(self) -> None:
        """Wait until nothing is under way and idle connections were closed; note what is left otherwise."""
        until_s = time.monotonic() + _SETTLE_S
        while time.monotonic() < until_s:
            status = await asyncio.to_thread(self.proxy.status)
            self.idle = {name: status[name] for name in ("requests", "queued", "attempts", "retries")}
            self.idle["in_flight"] = sum(server["in_flight"] for server in status["servers"])
            n_open = (await asyncio.to_thread(sample, self.proxy.pid, self.begin_ns)).descriptors
            if not any(self.idle.values()) and self.before is not None and n_open <= self.before.descriptors:
                return
            await asyncio.sleep(1)


_KIND_OF = {kind.name: kind for kind in KINDS}


def verdicts(outcomes: Sequence[Outcome], spans: Sequence[Span]) -> Iterator[Verdict]:
    """Judge requests, in their order."""
    return (verdict(_KIND_OF[outcome.kind], outcome, spans) for outcome in outcomes)


def report_of(run: Run) -> Report:
    """Put together what a run has seen."""
    outcomes = run.clients.outcomes
    judged = list(zip(outcomes, verdicts(outcomes, run.spans), strict=True))
    columns = ("requests", "n", *Verdict, "first byte p50 ms", "p99 ms", "max ms")
    title = f"soak: {run.seconds:g} s, {run.rate:g} requests/s, a fault every {EVERY_S:g} s"
    report = Report("soak", title, columns)
    for kind in KINDS:
        report.rows.append(_row(kind.name, [pair for pair in judged if pair[0].kind == kind.name]))
    report.rows.append(_row("all", judged))
    lost = [asdict(outcome) for outcome, found in judged if found in {Verdict.LOST, Verdict.SILENT}]
    counts = Counter(found for _, found in judged)
    report.bars[f"no request lost: {counts[Verdict.LOST]}"] = not counts[Verdict.LOST]
    report.bars[f"streams that were cut end with an error line: {counts[Verdict.SILENT]} do not"] = not counts[
        Verdict.SILENT
    ]
    _judge_held(run, report)
    report.notes.append(f"{len(run.spans)} faults: {', '.join(sorted({span.kind for span in run.spans}))}")
    report.notes += [f"LOST {each['kind']} of {each['server'] or '-'}: {each['problem'][:160]}" for each in lost[:10]]
    report.data = {
        "seconds": run.seconds,
        "counts": dict(counts),
        "lost": lost[:_LOST_SHOWN],
        "faults": [asdict(span) for span in run.spans],
        "samples": [asdict(each) for each in run.samples],
        "begin_ns": run.begin_ns,
        "at the end": run.idle,
    }
    _keep(run, report, lost)
    return report


def _row(name: str, judged: Sequence[tuple[Outcome, Verdict]]) -> tuple[str, ...]:
    counts = Counter(found for _, found in judged)
    waits = [(outcome.first_ns - outcome.planned_ns) / 1e6 for outcome, _ in judged if outcome.first_ns]
    times = (percentile(waits, 0.5), percentile(waits, 0.99), percentile(waits, 1.0))
    return (name, str(len(judged)), *(str(counts[kind]) for kind in Verdict), *map(number, times))


def _judge_held(run: Run, report: Report) -> None:
    before, after = run.before, run.after
    if before is None or after is None:
        raise RuntimeError("the run has not ended")
    grown = growth(run.samples, run.seconds)
    words = f"memory after the first {WARM_UP:.0%} of the time grows by <= {GROWTH_BAR:.0%}: {grown:+.1%}"
    if run.seconds >= JUDGED_FROM_S:
        report.bars[words] = grown <= GROWTH_BAR
    else:
        report.notes.append(f"{words} (not judged in less than {JUDGED_FROM_S:g} s)")
    report.bars[f"nothing is under way at the end: {run.idle}"] = not any(run.idle.values())
    n_before, n_after = before.descriptors, after.descriptors
    report.bars[f"descriptors are back: {n_before} before, {n_after} after"] = n_after <= n_before
    warm = [each.threads for each in run.samples if each.at_s < WARM_UP * run.seconds]
    most, n_threads = max(warm, default=before.threads), after.threads
    report.bars[f"threads: {most} at most in the warm-up, {n_threads} at the end"] = n_threads <= most
    peak = max(run.samples, key=lambda each: each.rss)
    mib = [f"{each.rss / 2**20:.1f} ({each.uss / 2**20:.1f})" for each in (before, peak, after)]
    report.notes.append(f"resident memory (its own) before, at its peak, after: {', '.join(mib)} MiB")


def _keep(run: Run, report: Report, lost: Sequence[dict[str, Any]]) -> None:
    """Write what helps to look into a run: its picture, and the log where something was lost."""
    RESULTS.mkdir(exist_ok=True)
    lost_ns = [each["planned_ns"] for each in lost]
    picture = RESULTS / "soak.png"
    if draw(picture, run.samples, run.spans, run.clients.outcomes, lost_ns, run.begin_ns, WARM_UP * run.seconds):
        report.notes.append(f"drawn: {picture}")
    if lost:
        shutil.copy(run.proxy.log, RESULTS / "soak.log")
        report.data["log"] = log_of(run.proxy.log, {each["request_id"] for each in lost if each["request_id"]})
        report.notes.append(f"the balancer's log: {RESULTS / 'soak.log'}")


def run(*, seconds: float = MINUTES * 60, rate: float = RATE, seed: int = 1) -> Report:
    """Measure."""
    with contextlib.ExitStack() as stack:
        servers = Servers(stack)
        where = stack.enter_context(workspace())
        proxy = stack.enter_context(peers.ollama_lb(servers.ports, where, _POOL, _SLOTS))
        begin_ns = time.monotonic_ns() + NS_PER_S // 2
        found = Run(proxy, servers, Clients(proxy.port, Random(seed)), seconds, rate, begin_ns)
        asyncio.run(found.go(arrivals(rate, seconds, seed)))
        return report_of(found)


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0.5 <= minutes <= 24 * 60:
        raise argparse.ArgumentTypeError("0.5 to 1440 are possible")
    return minutes


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.soak --minutes 60")
    options.add_argument("--minutes", type=_minutes, help=f"how long; default {MINUTES:g}, with --quick {QUICK_S:g} s")
    options.add_argument("--rate", type=float, default=RATE, help=f"requests a second; default {RATE:g}")
    options.add_argument("--seed", type=int, default=1, help="of the moments and kinds of requests; default 1")
    args = options.parse_args(argv)
    seconds = args.minutes * 60 if args.minutes else QUICK_S if args.quick else MINUTES * 60
    return finish(run(seconds=seconds, rate=args.rate, seed=args.seed), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
