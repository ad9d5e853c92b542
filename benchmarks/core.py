"""Events per second of the decision core, `LoadBalancer`, on one core of the machine; no I/O at all.

A day's work in small is recorded first: streamed chats arrive (Poisson), are raced, hedged, committed, relayed, some
fail, some clients leave, servers are probed. The core is deterministic, so the very same calls can then be replayed
to a fresh balancer, and only that replay is timed.

An *event* is one `handle(event)`, or one `handle_timeout()` at a due deadline. Both times include what the driver
does after each: `next_deadline()`. `note_chunk`, one call per token, is no event and is timed apart.
"""

from __future__ import annotations

import cProfile
import gc
import heapq
import io
import pstats
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from benchmarks.kit import MS_NS, NS_PER_S, Report, finish, median, parser, spread
from lbcore import events
from lbcore.balancer import LoadBalancer
from lbcore.commands import CancelAttempt, Command, CommitAttempt, StartAttempt, StartProbe
from lbcore.config import Config, RaceSettings, ServerSettings
from lbcore.ollama import RequestKind, default_routes

MODEL = "llama3.2:latest"
SLOTS = 4
TOKENS = 40
TOKEN_NS = 5 * MS_NS
UTILISATION = 0.15  # of the slots, by the answers alone; racers come on top
LEAVES = 0.01  # share of clients that leave
FAILS = 0.01  # share of attempts that fail before their first token, and as many mid-stream
BAR = 100_000.0

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


def run(*, fleets: tuple[int, ...] = (4, 8, 100), n_events: int = 200_000, repeats: int = 7) -> Report:
    """Measure."""
    columns = ("servers", "events/s median (min-max)", "µs/event", "events/request", "commands/event", "note_chunk ns")
    report = Report("core", "core: events/s of LoadBalancer on one core", columns)
    for n_servers in fleets:
        recorder = Recorder(n_servers)
        calls = recorder.record(n_events)
        runs = [_events_per_s(n_servers, calls) for _ in range(repeats)]
        rates = [rate for rate, _ in runs]
        chunk_ns = [_note_chunk_ns(n_servers) for _ in range(3)]
        n_requests = recorder.kinds["RequestArrived"]
        report.rows.append(
            (
                str(n_servers),
                spread(rates, 0),
                f"{1e6 / median(rates):.2f}",
                f"{len(calls) / n_requests:.2f}",
                f"{runs[0][1] / len(calls):.2f}",
                f"{median(chunk_ns):.0f}",
            )
        )
        report.bars[f"{n_servers} servers: >= {BAR:,.0f} events/s"] = median(rates) >= BAR
        report.data[str(n_servers)] = {"events_per_s": rates, "note_chunk_ns": chunk_ns, "mix": dict(recorder.kinds)}
        mix = ", ".join(f"{kind} {count / len(calls):.1%}" for kind, count in recorder.kinds.most_common())
        report.notes.append(f"{n_servers} servers, mix: {mix}")
    report.notes.append("CPU time of this process; an event: handle() or a due handle_timeout(), next_deadline() after")
    return report


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
    args = options.parse_args(argv)
    if args.profile:
        print(profile(args.profile))
        return 0
    report = run(n_events=50_000, repeats=3) if args.quick else run()
    return finish(report, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
