"""One bad server of four, over real HTTP: what clients see through ollama-lb, nginx and haproxy.

Four fake servers (first token 50 ms, then 39 tokens 5 ms apart, 4 slots each) for each program, in a process of their
own; 10 streams of /api/chat a second (Poisson, open loop, the same moments for all); all programs at the same time,
so that what disturbs one disturbs all. In the middle half of each run the first server is broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import peers
from benchmarks.kit import (
    RESULTS,
    FakeFleet,
    Report,
    fake_fleet,
    finish,
    machine,
    median,
    number,
    parser,
    percentile,
    workspace,
)
from benchmarks.load import Outcome, arrivals, ask, offer

RATE = 10.0
SECONDS, QUICK_SECONDS = 24.0, 8.0
RATIO_BAR, RATIO_STRETCH = 2.0, 1.5
STAGGER_NS = 11_000_000  # between the programs, so that their requests do not fall on the same instant
NOISY_MS = 10.0
KILLED = "killed"

SCENARIOS: dict[str, str | None] = {
    "healthy": None,
    KILLED: "refuse",
    "hanging": "hang",
    "hanging-chat": "hang-chat",
    "error-500": "error-500",
    "busy-503": "busy-503",
    "garbage": "garbage",
    "slow-20x": "slow",
    "cut": "cut-midstream",
    "stalled": "stall-midstream",
    "ended-early": "end-midstream",
}
MIDSTREAM = frozenset({"cut", "stalled", "ended-early"})


@dataclass(frozen=True)
class Figures:
    """What one program made of one scenario."""

    scenario: str
    program: str
    requests: int
    completed: int
    failed: int
    failed_silently: int  # without an error line or an error status
    failed_committed: int  # of ollama-lb's failed: streams that were committed to the bad server
    failed_after_fall: int  # of these, committed after its health or reliability had fallen
    ttft_p50_ms: float
    ttft_p99_ms: float
    ttft_max_ms: float
    late_p99_ms: float  # how late the load generator itself sent: the noise of the machine
    wasted_tokens: int  # made by the fakes for clients that left (races lost, hedges, breaks)
    problems: tuple[str, ...]


def _judge(scenario: str, proxy: peers.Proxy | None, program: str, got: Sequence[Outcome], fleet: FakeFleet) -> Figures:
    failed = [outcome for outcome in got if not outcome.done]
    # A request that never got a byte waited until it was over.
    waits = [o.ttft_ms if o.first_ns else (o.ended_ns - o.planned_ns) / 1e6 for o in got]
    committed = after_fall = 0
    if proxy is not None and program == "ollama-lb":
        committed, after_fall = _blame(proxy, failed)
        if failed:
            RESULTS.mkdir(exist_ok=True)
            shutil.copy(proxy.log, RESULTS / f"chaos-{scenario}.log")
    silent = [o for o in failed if not o.error_line]
    return Figures(
        scenario=scenario,
        program=program,
        requests=len(got),
        completed=len(got) - len(failed),
        failed=len(failed),
        failed_silently=len(silent),
        failed_committed=committed,
        failed_after_fall=after_fall,
        ttft_p50_ms=median(waits),
        ttft_p99_ms=percentile(waits, 0.99),
        ttft_max_ms=max(waits),
        late_p99_ms=percentile([(o.sent_ns - o.planned_ns) / 1e6 for o in got if o.sent_ns], 0.99),
        wasted_tokens=sum(server["tokens_of_aborted"] for server in fleet.stats()),
        problems=tuple(sorted({o.problem[:200] for o in failed})[:5]),
    )


def _blame(proxy: peers.Proxy, failed: Sequence[Outcome]) -> tuple[int, int]:
    """Return how many failed streams were the bad server's, and how many of them were begun after it had fallen."""
    decisions = proxy.decisions()
    fell = [
        d["time"]
        for d in decisions
        if d.get("server") == "s0"
        and (
            (d.get("decision") == "health" and _fell(d))
            or (d.get("decision") == "reliability" and "nreliable" in str(d.get("after")))
        )
    ]
    fell_at = min(fell, default=float("inf"))
    at = {
        d.get("request"): d["time"] for d in decisions if d.get("decision") == "committed" and d.get("server") == "s0"
    }
    bad = [at[o.request_id] for o in failed if o.request_id in at]
    return len(bad), sum(1 for moment in bad if moment > fell_at)


def _fell(decision: dict[str, Any]) -> bool:
    with contextlib.suppress(ValueError):
        return float(decision.get("after", "")) < float(decision.get("before", ""))
    return bool(decision.get("after") == "dead")


async def _drive(
    targets: dict[str, Sequence[int]],
    fleets: Sequence[FakeFleet],
    kind: str | None,
    moments: Sequence[float],
    span: float,
) -> dict[str, list[Outcome]]:
    for ports in targets.values():
        await ask(ports[0])  # not counted: whatever a program, and this one, does only once
    begin_ns = time.monotonic_ns() + 200_000_000
    loads = {
        name: asyncio.create_task(offer(ports, moments, begin_ns + index * STAGGER_NS))
        for index, (name, ports) in enumerate(targets.items())
    }
    if kind is not None:
        for share, now in ((0.25, kind), (0.75, None)):
            await asyncio.sleep((begin_ns - time.monotonic_ns()) / 1e9 + share * span)
            for fleet in fleets:
                fleet.set_fault(0, now)
    return {name: await load for name, load in loads.items()}


def run_scenario(scenario: str, seconds: float, seed: int) -> list[Figures]:
    """Run one scenario through all programs, and when healthy also without any ("direct")."""
    kind = SCENARIOS[scenario]
    starters, _ = peers.found()
    with contextlib.ExitStack() as stack:
        fleets: dict[str, FakeFleet] = {}
        proxies: dict[str, peers.Proxy] = {}
        targets: dict[str, Sequence[int]] = {}
        for program, start in starters.items():
            fleets[program] = stack.enter_context(fake_fleet([{"name": f"s{i}"} for i in range(4)]))
            where = stack.enter_context(workspace())
            proxies[program] = stack.enter_context(start(fleets[program].ports, where))
            targets[program] = (proxies[program].port,)
        if kind is None:
            fleets["direct"] = stack.enter_context(fake_fleet([{"name": f"s{i}"} for i in range(4)]))
            targets["direct"] = fleets["direct"].ports
        got = asyncio.run(_drive(targets, list(fleets.values()), kind, arrivals(RATE, seconds, seed), seconds))
        return [_judge(scenario, proxies.get(name), name, got[name], fleets[name]) for name in targets]


def _row(figures: Figures, healthy: dict[str, float]) -> tuple[str, ...]:
    ours = figures.program == "ollama-lb"
    return (
        figures.scenario,
        figures.program,
        f"{figures.completed}/{figures.requests}",
        str(figures.failed),
        str(figures.failed_silently),
        f"{figures.failed_committed}/{figures.failed_after_fall}" if ours else "-",
        number(figures.ttft_p50_ms),
        number(figures.ttft_p99_ms),
        number(figures.ttft_p99_ms / healthy.get(figures.program, float("nan")), 2),
        number(figures.ttft_max_ms),
        str(figures.wasted_tokens),
        number(figures.late_p99_ms),
    )


def _bars(figures: Figures, ratio: float) -> dict[str, bool]:
    """Return the bars of one scenario of ollama-lb's."""
    name = figures.scenario
    if name in MIDSTREAM:
        only = figures.failed == figures.failed_committed and not figures.failed_after_fall
        return {
            f"{name}: only streams committed to it before its fall fail": only,
            f"{name}: each failure carries an error line": not figures.failed_silently,
        }
    bars = {
        f"{name}: p99 TTFT <= {RATIO_BAR:g} x healthy (stretch {RATIO_STRETCH:g} x): {ratio:.2f} x": ratio <= RATIO_BAR
    }
    if name == KILLED:
        fine = figures.failed == figures.failed_committed and not figures.failed_silently
        return {f"{name}: all complete but what streamed from it when it died, with an error line": fine, **bars}
    return {f"{name}: every request completes": not figures.failed, **bars}


def run(*, seconds: float = SECONDS, names: Sequence[str] = tuple(SCENARIOS), seed: int = 1) -> Report:
    """Measure; "healthy" is always run, since the others are ratios to it."""
    columns: tuple[str, ...] = ("scenario", "program", "completed", "failed", "silent", "committed/after fall")
    columns += ("TTFT p50 ms", "p99 ms", "p99/healthy", "max ms", "wasted tokens", "sent late p99 ms")
    report = Report("chaos", f"chaos: one bad server of four, {RATE:g} requests/s, {seconds:g} s", columns)
    healthy: dict[str, float] = {}
    for scenario in ("healthy", *(name for name in names if name != "healthy")):
        before = machine()["load_average_1m"]
        for figures in run_scenario(scenario, seconds, seed):
            if scenario == "healthy":
                healthy[figures.program] = figures.ttft_p99_ms
            report.rows.append(_row(figures, healthy))
            if figures.late_p99_ms > NOISY_MS:
                late = f"{figures.late_p99_ms:.0f} ms late"
                report.notes.append(f"NOISY: {scenario}/{figures.program} was sent {late} (p99): its times mean little")
            report.data[f"{scenario}/{figures.program}"] = {**asdict(figures), "load_before": before}
            if figures.program == "ollama-lb":
                report.bars.update(_bars(figures, figures.ttft_p99_ms / healthy[figures.program]))
        print(f"chaos: {scenario} done", file=sys.stderr, flush=True)
    report.notes += peers.found()[1]
    report.notes.append(
        "TTFT from the planned moment; 'silent': failed without an error line; nginx and haproxy 10 s patient"
    )
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.chaos --quick hanging cut")
    options.add_argument("names", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    options.add_argument("--seconds", type=float, help=f"length of each run; default {SECONDS:g}")
    args = options.parse_args(argv)
    if unknown := sorted(set(args.names) - set(SCENARIOS)):
        options.error(f"no such scenario: {', '.join(unknown)}")
    seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    return finish(run(seconds=seconds, names=args.names or tuple(SCENARIOS)), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
