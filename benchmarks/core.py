"""Events per second of the decision core, `LoadBalancer`, on one core of the machine; no I/O at all.

A day's work in small is recorded first: streamed chats arrive (Poisson), are raced, hedged, committed, relayed, some
fail, some clients leave, servers are probed. The core is deterministic, so the very same calls can then be replayed
to a fresh balancer, and only that replay is timed.

Plain Python is measured, and by turns the core compiled by mypyc, if that is there (`--compiled` has it made; see
`benchmarks.compiled`); each in a process of its own.

An *event* is one `handle(event)`, or one `handle_timeout()` at a due deadline. Both times include what the driver
does after each: `next_deadline()`. `note_chunk`, one call per token, is no event and is timed apart.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import heapq
import io
import json
import pstats
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import compiled
from benchmarks.kit import MS_NS, NS_PER_S, Figure, Report, ended, finish, median, parser, ratios, spread
from lbcore import events
from lbcore.balancer import LoadBalancer
from lbcore.commands import CancelAttempt, Command, CommitAttempt, StartAttempt, StartProbe
from lbcore.compiled import is_compiled
from lbcore.config import Config, RaceSettings, ServerSettings
from lbcore.ollama import RequestKind, default_routes

MODEL = "llama3.2:latest"
SLOTS = 4
TOKENS = 40
TOKEN_NS = 5 * MS_NS
UTILISATION = 0.15  # of the slots, by the answers alone; racers come on top
LEAVES = 0.01  # share of clients that leave
FAILS = 0.01  # share of attempts that fail before their first token, and as many mid-stream
BARS: Mapping[tuple[str, int], float] = {
    ("pure", 4): 100_000.0,
    ("pure", 8): 100_000.0,
    ("pure", 100): 100_000.0,
    ("compiled", 8): 200_000.0,
    ("compiled", 1000): 150_000.0,
}
"""Events/s by core and number of servers."""

_PROBE_MODELS = tuple(
    events.ModelInfo(name, f"sha-{name}", "2026-01-01T00:00:00Z", f'{{"name":"{name}"}}')
    for name in (MODEL, "qwen2.5:0.5b", "nomic-embed-text:latest")
)
_PROBE_ACTIVE = (events.ActiveModel(MODEL, f'{{"name":"{MODEL}"}}'),)

Call = tuple[events.Event | None, int]
"""An event, or None for `handle_timeout`, and its moment."""


def new_balancer(n_servers: int) -> LoadBalancer:
    """Return a balancer with default settings over so many servers."""
    servers = tuple(ServerSettings(url=f"http://s{i}:11434", name=f"s{i}", slots=SLOTS) for i in range(n_servers))
    return LoadBalancer(Config(servers=servers, routes=default_routes(RaceSettings())), Random(1))


@dataclass
class Recorder:
    """A world just rich enough to find out which calls the balancer gets."""

    n_servers: int
    calls: list[Call] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._rng = Random(2)
        self._balancer = new_balancer(self.n_servers)
        self._due: list[tuple[int, int, events.Event]] = []
        self._seq = 0
        self._committed: dict[int, int] = {}
        self._request_of: dict[int, int] = {}
        self._speed = [self._rng.choice((40, 50, 60, 80)) * MS_NS for _ in range(self.n_servers)]

    def record(self, n_calls: int) -> list[Call]:
        """Return at least so many calls, in order."""
        per_request_ns = 60 * MS_NS + TOKENS * TOKEN_NS
        every_ns = per_request_ns / (UTILISATION * SLOTS * self.n_servers)
        arrival_ns, request_id = NS_PER_S, 0
        while len(self.calls) < n_calls:
            timer_ns = self._balancer.next_deadline()
            event_ns = self._due[0][0] if self._due else None
            first = min(moment for moment in (arrival_ns, timer_ns, event_ns) if moment is not None)
            if first == timer_ns:
                self._call(None, first)
            elif first == event_ns:
                self._call(heapq.heappop(self._due)[2], first)
            else:
                request_id += 1
                kind = RequestKind.GENERATE
                self._call(events.RequestArrived(request_id, "/api/chat", MODEL, kind, True, True), first)  # noqa: FBT003
                if self._rng.random() < LEAVES:
                    self._later(first + self._rng.randrange(per_request_ns), events.DownstreamClosed(request_id))
                arrival_ns = first + round(self._rng.expovariate(1.0) * every_ns)
        return self.calls

    def _later(self, at_ns: int, event: events.Event) -> None:
        self._seq += 1
        heapq.heappush(self._due, (at_ns, self._seq, event))

    def _call(self, event: events.Event | None, now_ns: int) -> None:
        attempt_id = getattr(event, "attempt_id", None)
        if attempt_id is not None and attempt_id not in self._balancer.ledger.attempts:
            return  # the driver closed this one and reports nothing more
        if isinstance(event, events.DownstreamClosed) and event.request_id not in self._balancer.ledger.requests:
            return
        self.calls.append((event, now_ns))
        self.kinds["timeout" if event is None else type(event).__name__] += 1
        balancer = self._balancer
        commands = balancer.handle_timeout(now_ns) if event is None else balancer.handle(event, now_ns)
        for command in commands:
            self._carry_out(command, now_ns)

    def _carry_out(self, command: Command, now_ns: int) -> None:
        rng = self._rng
        if isinstance(command, StartAttempt):
            at_ns = now_ns + round(rng.uniform(0.05, 0.3) * MS_NS)
            self._later(at_ns, events.AttemptConnected(command.attempt_id))
            first_ns = at_ns + round(self._speed[command.server_id % self.n_servers] * rng.lognormvariate(0, 0.2))
            if rng.random() < FAILS:
                failed = events.AttemptFailed(command.attempt_id, events.Reason.RESET)
                self._later(first_ns, failed)
            else:
                self._later(first_ns, events.HeadReceived(command.attempt_id, 200))
                self._later(first_ns, events.FirstTokenReceived(command.attempt_id))
        elif isinstance(command, CommitAttempt):
            broken = rng.random() < FAILS
            ended_ns = now_ns + TOKEN_NS * (rng.randrange(1, TOKENS) if broken else TOKENS - 1)
            cut = events.AttemptFailed(command.attempt_id, events.Reason.TRUNCATED)
            self._later(ended_ns, cut if broken else events.StreamEnded(command.attempt_id))
        elif isinstance(command, StartProbe):
            server_id, probe_id = command.server_id, command.probe_id
            self._later(now_ns + MS_NS, events.ProbeCompleted(server_id, probe_id, version="0.12.6"))
            synced = events.ModelsSynced(server_id, probe_id, _PROBE_MODELS, _PROBE_ACTIVE)
            self._later(now_ns + MS_NS, synced)
        elif isinstance(command, CancelAttempt):
            pass  # what it would still have reported is dropped in `_call`


def replay(balancer: LoadBalancer, calls: list[Call]) -> int:
    """Make the recorded calls; return how many commands came of them."""
    handle, handle_timeout, next_deadline = balancer.handle, balancer.handle_timeout, balancer.next_deadline
    n_commands = 0
    for event, now_ns in calls:
        n_commands += len(handle_timeout(now_ns) if event is None else handle(event, now_ns))
        next_deadline()
    return n_commands


def _events_per_s(n_servers: int, calls: list[Call]) -> tuple[float, int]:
    balancer = new_balancer(n_servers)
    gc.collect()
    gc.freeze()  # the recording is the benchmark's garbage, not the core's
    began_ns = time.process_time_ns()
    n_commands = replay(balancer, calls)
    took_ns = time.process_time_ns() - began_ns
    gc.unfreeze()
    return len(calls) * NS_PER_S / took_ns, n_commands


def _note_chunk_ns(n_servers: int) -> float:
    """Return the cost of one `note_chunk` of a live attempt, ns, the loop around it taken off."""
    balancer = new_balancer(n_servers)
    recorder = Recorder(n_servers)
    replay(balancer, recorder.record(200 + 20 * n_servers))
    attempts = list(balancer.ledger.attempts)
    rounds = range(200_000 // len(attempts))
    note_chunk = balancer.note_chunk

    def timed(call: Any) -> int:
        began_ns = time.process_time_ns()
        for now_ns in rounds:
            for attempt_id in attempts:
                call(attempt_id, 120, 1, now_ns)
        return time.process_time_ns() - began_ns

    empty = timed(lambda _attempt_id, _n_bytes, _n_tokens, _now_ns: None)
    return max(0, timed(note_chunk) - empty // 2) / (len(rounds) * len(attempts))


class Measured:
    """A process that measures one of the two cores, again each time it is asked."""

    def __init__(self, core: Path | None, n_servers: int, n_events: int) -> None:
        command = [sys.executable, "-P", "-m", "benchmarks.core", "--measure", str(n_servers), str(n_events)]
        self.process = subprocess.Popen(
            command, env=compiled.environment(core), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.recorded: dict[str, Any] = self._answer()
        self.runs: list[dict[str, Any]] = []

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout is not None else ""
        if not line:
            raise RuntimeError("the measuring process has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def again(self) -> None:
        """Measure once more."""
        if self.process.stdin is None:
            raise RuntimeError("the measuring process has no pipe")
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.runs.append(self._answer())

    def all(self, name: str) -> list[float]:
        """Return one figure of all runs."""
        return [run[name] for run in self.runs]


def _measure(n_servers: int, n_events: int) -> None:
    """Be such a process."""
    recorder = Recorder(n_servers)
    calls = recorder.record(n_events)
    print(json.dumps({"compiled": is_compiled(), "n_calls": len(calls), "mix": dict(recorder.kinds)}), flush=True)
    for _ in sys.stdin:
        rate, n_commands = _events_per_s(n_servers, calls)
        found = {"events_per_s": rate, "n_commands": n_commands, "note_chunk_ns": _note_chunk_ns(n_servers)}
        print(json.dumps(found), flush=True)


def run(
    *, fleets: tuple[int, ...] = (4, 8, 100, 1000), n_events: int = 200_000, repeats: int = 7, core: Path | None = None
) -> Report:
    """Measure plain Python, and a compiled core if there is one: `core` is where."""
    columns = (
        "servers", "core", "events/s median (min-max)", "µs/event", "events/request", "commands/event", "note_chunk ns",
    )  # fmt: skip
    report = Report("core", "core: events/s of LoadBalancer on one core", columns)
    core = core or compiled.found()
    cores = {"pure": None} if core is None else {"pure": None, "compiled": core}
    for n_servers in fleets:
        with ExitStack() as stack:
            measured = {name: Measured(where, n_servers, n_events) for name, where in cores.items()}
            for each in measured.values():
                stack.enter_context(ended(each.process))
            for _ in range(repeats):
                for each in measured.values():
                    each.again()
        _tell(report, n_servers, measured)
    report.notes.append("CPU time of a process; an event: handle() or a due handle_timeout(), next_deadline() after")
    if core is None:
        report.notes.append("the compiled core was not measured: python -m benchmarks.core --compiled")
    return report


def _tell(report: Report, n_servers: int, measured: dict[str, Measured]) -> None:
    """Add what was measured of the cores with so many servers."""
    told = report.data[str(n_servers)] = {}
    for core, each in measured.items():
        if each.recorded["compiled"] != (core == "compiled"):
            raise RuntimeError(f"this is not the {core} core")
        rates, n_calls, mix = each.all("events_per_s"), each.recorded["n_calls"], each.recorded["mix"]
        told[core] = {"events_per_s": rates, "note_chunk_ns": each.all("note_chunk_ns"), "mix": mix}
        report.rows.append(
            (
                str(n_servers),
                core,
                spread(rates, 0),
                f"{1e6 / median(rates):.2f}",
                f"{n_calls / mix['RequestArrived']:.2f}",
                f"{each.runs[0]['n_commands'] / n_calls:.2f}",
                f"{median(each.all('note_chunk_ns')):.0f}",
            )
        )
        named = f"{core} core, {n_servers} servers"
        if (bar := BARS.get((core, n_servers))) is not None:
            report.bars[f"{named}: >= {bar:,.0f} events/s"] = median(rates) >= bar
        report.figures[named] = Figure(rates, "events/s", higher_is_better=True, judged=False)
    if "compiled" in measured:
        times = ratios(told["compiled"]["events_per_s"], told["pure"]["events_per_s"])
        report.figures[f"compiled to pure, {n_servers} servers"] = Figure(times, "x", higher_is_better=True)
        report.notes.append(f"{n_servers} servers: the compiled core decides {spread(times, 2)} times as many")
    mix, n_calls = told["pure"]["mix"], measured["pure"].recorded["n_calls"]
    shares = ", ".join(f"{kind} {count / n_calls:.1%}" for kind, count in Counter(mix).most_common())
    report.notes.append(f"{n_servers} servers, mix: {shares}")


def profile(n_servers: int, n_events: int = 200_000, lines: int = 30) -> str:
    """Return cProfile's table of a replay, by the time in each function itself."""
    calls = Recorder(n_servers).record(n_events)
    profiler = cProfile.Profile()
    profiler.runcall(partial(replay, new_balancer(n_servers), calls))
    out = io.StringIO()
    pstats.Stats(profiler, stream=out).strip_dirs().sort_stats("tottime").print_stats(lines)
    return f"{_by_kind(n_servers, calls)}\n{out.getvalue()}"


def _by_kind(n_servers: int, calls: list[Call]) -> str:
    """Return what each kind of event costs, without the profiler; two clock reads (some 0.1 µs) included."""
    balancer = new_balancer(n_servers)
    clock = time.perf_counter_ns
    total_ns: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event, now_ns in calls:
        began_ns = clock()
        if event is None:
            balancer.handle_timeout(now_ns)
        else:
            balancer.handle(event, now_ns)
        balancer.next_deadline()
        kind = "timeout" if event is None else type(event).__name__
        total_ns[kind] += clock() - began_ns
        count[kind] += 1
    whole_ns = sum(total_ns.values())
    lines = [f"{n_servers} servers{'':11} count   µs each   share of the time"]
    for kind, spent_ns in total_ns.most_common():
        each_us = spent_ns / count[kind] / 1000
        lines.append(f"{kind:18} {count[kind]:9,} {each_us:9.2f} {spent_ns / whole_ns:9.1%}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.core --profile 8")
    options.add_argument("--profile", type=int, metavar="SERVERS", help="print a cProfile table for so many servers")
    options.add_argument("--compiled", action="store_true", help="compile the core too, if that was not done before")
    options.add_argument("--measure", nargs=2, type=int, help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.profile:
        print(profile(args.profile))
        return 0
    if args.measure:
        _measure(*args.measure)
        return 0
    try:
        core = compiled.build() if args.compiled else None
    except compiled.CannotCompileError as error:
        options.error(f"the core cannot be compiled: {error}")
    report = run(n_events=50_000, repeats=3, core=core) if args.quick else run(core=core)
    return finish(report, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
