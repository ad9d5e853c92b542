"""Is the simulator true? The same six scenarios in virtual time and over real HTTP, and how far they differ.

Both runs take the same requests (moments, prompt lengths, answer lengths) from the same source, the same fleet, the
same faults on the same schedule and the same configuration. Over HTTP the fake servers are one process, `ollama-lb run`
another and the client a third; time 0 is when the balancer's first probes arrive, as it is in virtual time.

What a real request costs beyond what the servers take (the client's connection, sockets, Python, timers that fire
late) is not modelled: the simulated links have the 0.1 ms of `simulator.network`. It counts as error, and so does all
noise of the machine; the healthy scenario's median shows how much that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import tomli_w

from benchmarks.kit import (
    MS_NS,
    NS_PER_S,
    Report,
    ended,
    finish,
    free_port,
    machine,
    number,
    parser,
    percentile,
    workspace,
)
from benchmarks.load import Outcome, ask
from benchmarks.stages import raw_of, scenario_of, tables
from lbcore.balancer import LoadBalancer
from lbcore.config import Config
from simulator.policies.placements import WorldView
from simulator.reports.results import Outcome as Fate
from simulator.scenario import Scenario, run_scenario
from simulator.workload import make_source
from simulator.workloads.asks import Ask

REQUESTS, QUICK_REQUESTS = 1000, 200
SEED = 1
CORE_SEEDS = 5
"""Runs in virtual time with different seeds of the core, pooled; over HTTP noise decides what comes first anyhow."""
SHARES = (0.5, 0.9, 0.99)
BARS = {0.5: 10.0, 0.9: 10.0, 0.99: 15.0}  # %
NOISY_MS = 40.0  # a tenth of a first token
CONFIG_TABLES = ("race", "selection", "health", "probe", "timeouts", "retry", "queue")
_PATIENCE_S = 300.0


@dataclass(frozen=True)
class Sample:
    """What clients saw in one run, or in several pooled, and what it cost."""

    requests: int
    completed: int
    attempts: int  # that reached a server
    tokens: int  # made
    tokens_wasted: int  # of these, for attempts that were cancelled
    ttft_ms: list[float]
    e2e_ms: list[float]  # of those that completed


# --- in virtual time -------------------------------------------------------------------------------------------------


def simulated(scenario: Scenario, core_seeds: Sequence[int]) -> Sample:
    """Run in virtual time, once for each seed of the core."""
    ttft_ms: list[float] = []
    e2e_ms: list[float] = []
    n_requests = attempts = tokens = wasted = 0
    for core_seed in core_seeds:
        result = run_scenario(scenario, SEED, build=partial(_with_seed, core_seed))
        n_requests += len(result.requests)
        attempts += sum(server.requests for server in result.servers)
        tokens += sum(server.tokens for server in result.servers)
        wasted += sum(server.tokens_wasted for server in result.servers)
        ttft_ms += [r.ttft_ns / MS_NS for r in result.requests if r.ttft_ns is not None]
        e2e_ms += [r.e2e_ns / MS_NS for r in result.requests if r.outcome is Fate.COMPLETED]
    return Sample(n_requests, len(e2e_ms), attempts, tokens, wasted, ttft_ms, e2e_ms)


def _with_seed(core_seed: int, config: Config, _rng: Random, _world: WorldView) -> LoadBalancer:
    return LoadBalancer(config, Random(core_seed))


# --- over HTTP -------------------------------------------------------------------------------------------------------


@dataclass
class _Stage:
    """The servers of one run."""

    name: str
    fakes: subprocess.Popen[str]

    def line(self) -> dict[str, Any]:
        """Return what the servers say next."""
        text = self.fakes.stdout.readline() if self.fakes.stdout is not None else ""
        if not text:
            raise RuntimeError("the fake servers have ended")
        found: dict[str, Any] = json.loads(text)
        return found

    def done(self) -> dict[str, Any]:
        """Return what the servers have done until now."""
        if self.fakes.stdin is not None:
            self.fakes.stdin.write("\n")
            self.fakes.stdin.flush()
        return self.line()


@contextlib.contextmanager
def _served(name: str, n_requests: int) -> Iterator[_Stage]:
    command = [sys.executable, "-m", "benchmarks.stages", name, str(n_requests)]
    root = Path(__file__).parent.parent
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process,
        ended(process),
    ):
        yield _Stage(name, process)


@contextlib.contextmanager
def _balanced(stage: _Stage, n_requests: int, where: Path) -> Iterator[int]:
    """Run `ollama-lb run` with the scenario's tables; its port."""
    port = free_port()
    servers = [
        {"url": f"http://127.0.0.1:{at}", "name": spec.name, "slots": spec.num_parallel}
        for at, spec in zip(stage.line()["ports"], scenario_of(stage.name, n_requests).specs, strict=True)
    ]
    raw = raw_of(stage.name, n_requests)
    config = {key: raw[key] for key in CONFIG_TABLES if key in raw}
    path, log = where / f"{stage.name}.toml", where / f"{stage.name}.log"
    text = tomli_w.dumps({"listen": f"127.0.0.1:{port}", "seed": SEED, **config, "servers": servers})
    path.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "lbio", "run", str(path)]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process, ended(process):
        yield port


def body_of(one: Ask) -> bytes:
    """Return a chat whose prompt and answer have the ask's lengths, counted as `simulator.fakes.bodies` does."""
    text = "x" * 4 * (one.prompt_tokens - 9)
    options = {"num_predict": one.output_tokens} | ({} if one.num_ctx is None else {"num_ctx": one.num_ctx})
    body = {"model": one.model, "messages": [{"role": "user", "content": text}], "options": options}
    return json.dumps(body if one.stream else {**body, "stream": False}).encode()


async def _offer(port: int, asks: Sequence[Ask], began_ns: int) -> list[Outcome]:
    tasks = []
    for one in asks:
        planned_ns = began_ns + one.arrives_ns
        await asyncio.sleep(max(0.0, (planned_ns - time.monotonic_ns()) / NS_PER_S))
        tasks.append(asyncio.create_task(ask(port, planned_ns, patience_s=_PATIENCE_S, body=body_of(one))))
    return list(await asyncio.gather(*tasks))


async def _offer_all(loads: Sequence[tuple[int, Sequence[Ask], int]]) -> list[list[Outcome]]:
    return list(await asyncio.gather(*(_offer(*load) for load in loads)))


def served(names: Sequence[str], n_requests: int) -> dict[str, tuple[Sample, float]]:
    """Run scenarios over HTTP, all at the same time; return what clients saw, and how late they were sent (p99, ms)."""
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(workspace())
        stages = [stack.enter_context(_served(name, n_requests)) for name in names]
        ports = [stack.enter_context(_balanced(stage, n_requests, where)) for stage in stages]
        loads = [
            (
                port,
                list(make_source(scenario_of(stage.name, n_requests).workload, SEED).asks()),
                stage.line()["began_ns"],
            )
            for stage, port in zip(stages, ports, strict=True)
        ]
        got = asyncio.run(_offer_all(loads))
        done = [stage.done() for stage in stages]
    return {name: _seen(outcomes, cost) for name, outcomes, cost in zip(names, got, done, strict=True)}


def _seen(got: Sequence[Outcome], cost: Mapping[str, int]) -> tuple[Sample, float]:
    ttft_ms = [outcome.ttft_ms for outcome in got if outcome.first_ns and outcome.status == 200]
    e2e_ms = [(outcome.ended_ns - outcome.planned_ns) / MS_NS for outcome in got if outcome.done]
    late_ms = percentile([(o.sent_ns - o.planned_ns) / MS_NS for o in got if o.sent_ns], 0.99)
    spent = (cost["attempts"], cost["tokens"], cost["tokens_of_aborted"])
    return Sample(len(got), len(e2e_ms), *spent, ttft_ms, e2e_ms), late_ms


# --- the comparison --------------------------------------------------------------------------------------------------


def _compare(name: str, real: Sample, late_ms: float, n_requests: int, report: Report) -> None:
    scenario = scenario_of(name, n_requests)
    pooled = simulated(scenario, range(CORE_SEEDS))
    singles = [simulated(scenario, (seed,)) for seed in range(CORE_SEEDS)]
    found: dict[str, object] = {"sent_late_p99_ms": late_ms}
    found["requests"], found["completed"] = real.requests, real.completed
    found["completed_simulated_share"] = pooled.completed / pooled.requests
    for figure, of in (("TTFT", "ttft_ms"), ("E2E", "e2e_ms")):
        cells: list[str] = []
        for share in SHARES:
            seen, said = percentile(getattr(real, of), share), percentile(getattr(pooled, of), share)
            error = (said - seen) / seen * 100
            runs = [percentile(getattr(single, of), share) for single in singles]
            cells += [number(seen), number(said), f"{error:+.1f}"]
            found[f"{of}_p{share * 100:g}"] = {"http": seen, "simulated": said, "error_pct": error, "of_seeds": runs}
            report.bars[f"{name}: {figure} p{share * 100:g} within {BARS[share]:g} %: {error:+.1f} %"] = (
                abs(error) <= BARS[share]
            )
            if share == SHARES[-1]:
                cells.append(f"{(max(runs) - min(runs)) / 2 / said * 100:.1f}")
        done = f"{real.completed / real.requests:.1%}, {pooled.completed / pooled.requests:.1%}"
        report.rows.append((name, figure, done, *cells))
    costs = [(one.attempts / one.requests, one.tokens_wasted / one.tokens * 100) for one in (real, pooled)]
    found["attempts_per_request"], found["tokens_wasted_pct"] = zip(*costs, strict=True)
    (attempts, wasted), (attempts_said, wasted_said) = costs
    report.notes.append(
        f"{name}: attempts a request {attempts:.2f}, simulated {attempts_said:.2f}; "
        f"tokens wasted {wasted:.1f} %, simulated {wasted_said:.1f} %"
    )
    if late_ms > NOISY_MS:
        report.notes.append(f"NOISY: {name}: the client sent {late_ms:.0f} ms late (p99): its times mean little")
    report.data[name] = {**found, "http": asdict(real)}


def run(
    *,
    n_requests: int = REQUESTS,
    names: Sequence[str] = (),
    together: int = 1,
) -> Report:
    """Run and compare the scenarios, so many of them at the same time."""
    columns: tuple[str, ...] = ("scenario", "figure", "completed")
    for share in SHARES:
        columns += (f"p{share * 100:g} HTTP", "simulated", "error %")
    columns += ("p99 of seeds ±%",)
    report = Report("fidelity", f"fidelity: simulated against real HTTP (ms), {n_requests} requests each", columns)
    report.notes.append(
        f"error: (simulated - HTTP) / HTTP; simulated: {CORE_SEEDS} seeds of the core pooled; ±%: theirs alone"
    )
    report.notes.append(
        "TTFT and E2E from the planned moment; what loopback and Python cost is not modelled: it is error"
    )
    left = list(names or tables(n_requests))
    late: list[str] = []
    while left:
        found = served(left[:together], n_requests)
        for name, (sample, late_ms) in found.items():
            _compare(name, sample, late_ms, n_requests, report)
            late.append(f"{name} {late_ms:.1f} ms (load {machine()['load_average_1m']})")
            print(f"fidelity: {name} done", file=sys.stderr, flush=True)
        left = left[together:]
    report.notes.append(f"sent late, p99: {', '.join(late)}")
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.fidelity --quick healthy hedges")
    known = list(tables(1))
    options.add_argument("names", nargs="*", metavar="SCENARIO", help=f"of {', '.join(known)}; default: all")
    options.add_argument("--requests", type=int, help=f"of each scenario; default {REQUESTS}")
    options.add_argument(
        "--together", type=int, default=1, metavar="N", help="scenarios at the same time; more disturb each other"
    )
    args = options.parse_args(argv)
    if unknown := sorted(set(args.names) - set(known)):
        options.error(f"no such scenario: {', '.join(unknown)}")
    report = run(
        n_requests=args.requests or (QUICK_REQUESTS if args.quick else REQUESTS),
        names=args.names,
        together=max(1, args.together),
    )
    return finish(report, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
