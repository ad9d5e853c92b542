"""What a race costs: its first token against the fastest racer's own, and how soon the losers are let go.

Every chat is sent to all four servers at once (`racers_min = 4`); every second one goes straight to the fastest
server instead, without a balancer in between, so that both see the same machine. One at a time: nothing here is
queueing. Two fleets: `spread` (first tokens after 50, 60, 80 and 100 ms) and `tie` (50 ms each). The servers
(benchmarks/racers.py) are one process that costs next to nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import peers
from benchmarks.kit import Report, ended, finish, number, parser, percentile, workspace
from benchmarks.load import Outcome, ask

FLEETS = {"spread": (50.0, 60.0, 80.0, 100.0), "tie": (50.0, 50.0, 50.0, 50.0)}
ADDED_BAR_MS = 2.0
CLOSED_BAR_MS = 5.0
_RACE_ALL = "[race]\nracers_min = 4\nracers_max = 4\nutilisation_max = 1.0\nbudget = 3.0\nhedges_max = 0"
_PAUSE_S = 0.01  # between two chats, so that the first is over for everybody

_Seen = tuple[str, int, int, int]  # what, server, when, tokens: see benchmarks/racers.py


@dataclass
class Measured:
    """One fleet's figures, ms."""

    direct: list[float] = field(default_factory=list)
    raced: list[float] = field(default_factory=list)
    there: list[float] = field(default_factory=list)  # until the first racer had the request
    all_there: list[float] = field(default_factory=list)  # until the last one had it
    back: list[float] = field(default_factory=list)  # from a racer's first token to the client's
    closed: list[float] = field(default_factory=list)  # from the same moment to the end that a loser saw
    failed: int = 0
    wasted: int = 0  # tokens that losers had sent

    def add(self, direct: Outcome, raced: Outcome, seen: Sequence[_Seen]) -> None:
        """Count a direct chat and the race after it."""
        if not direct.done or not raced.done:
            self.failed += 1
            return
        self.direct.append(direct.ttft_ms)
        self.raced.append(raced.ttft_ms)
        asked = [at_ns - raced.planned_ns for what, _, at_ns, _ in seen if what == "asked"]
        self.there.append(min(asked) / 1e6)
        self.all_there.append(max(asked) / 1e6)
        first_ns = min(at_ns for what, _, at_ns, _ in seen if what == "first")
        self.back.append((raced.first_ns - first_ns) / 1e6)
        losers = [(at_ns, tokens) for what, _, at_ns, tokens in seen if what == "closed"]
        self.closed += [(at_ns - first_ns) / 1e6 for at_ns, _ in losers]
        self.wasted += sum(tokens for _, tokens in losers)

    def added(self, share: float) -> float:
        """Return the difference of the percentiles."""
        return percentile(self.raced, share) - percentile(self.direct, share)


@contextlib.contextmanager
def _racers(first_tokens_ms: Sequence[float]) -> Iterator[tuple[list[int], Callable[[], list[_Seen]]]]:
    """Run the servers; their ports, and what returns all that they have seen since it was called last."""
    command = [sys.executable, "-m", "benchmarks.racers", *map(str, first_tokens_ms)]
    root = Path(__file__).parent.parent
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process,
        ended(process),
    ):
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the servers have no pipes")
        asking, answers = process.stdin, process.stdout

        def seen() -> list[_Seen]:
            print(file=asking, flush=True)
            return [(what, server, at_ns, tokens) for what, server, at_ns, tokens in json.loads(answers.readline())]

        yield json.loads(answers.readline())["ports"], seen


async def _alternate(port: int, fastest: int, seen: Callable[[], list[_Seen]], n_races: int) -> Measured:
    measured = Measured()
    for each in (fastest, port) * 3:
        await ask(each)  # not counted: connections, imports
    for _ in range(n_races):
        direct = await ask(fastest)
        time.sleep(_PAUSE_S)  # noqa: ASYNC251  nothing else runs here
        seen()
        raced = await ask(port)
        time.sleep(_PAUSE_S)  # noqa: ASYNC251
        measured.add(direct, raced, seen())
    return measured


def measure(first_tokens_ms: tuple[float, ...], n_races: int) -> Measured:
    """Race over a fleet with these first-token times, the fastest first."""
    with (
        _racers(first_tokens_ms) as (ports, seen),
        workspace() as where,
        peers.ollama_lb(ports, where, _RACE_ALL) as proxy,
    ):
        return asyncio.run(_alternate(proxy.port, ports[0], seen, n_races))


def run(*, n_races: int = 150) -> Report:
    """Measure both fleets."""
    columns: tuple[str, ...] = ("fleet", "races", "direct p50", "p99", "raced p50", "p99", "added p50", "p99")
    columns += ("asked p50", "last", "back p50", "p99", "losers closed p50", "p99", "max", "wasted tokens")
    report = Report("race", "race: four servers at once, against the fastest one alone, ms", columns)
    for name, first_tokens_ms in FLEETS.items():
        got = measure(first_tokens_ms, n_races)
        added = [got.added(share) for share in (0.5, 0.99)]
        figures = [percentile(values, share) for values in (got.direct, got.raced) for share in (0.5, 0.99)]
        figures += [*added, percentile(got.there, 0.5), percentile(got.all_there, 0.5)]
        figures += [percentile(got.back, share) for share in (0.5, 0.99)]
        figures += [percentile(got.closed, share) for share in (0.5, 0.99, 1.0)]
        wasted = f"{got.wasted / n_races:.2f}"
        report.rows.append((name, str(len(got.raced)), *(number(figure, 2) for figure in figures), wasted))
        report.bars[f"{name}: first token p50 <= the fastest racer's + {ADDED_BAR_MS:g} ms"] = added[0] <= ADDED_BAR_MS
        report.bars[f"{name}: first token p99 <= the fastest racer's + {ADDED_BAR_MS:g} ms"] = added[1] <= ADDED_BAR_MS
        in_time = percentile(got.closed, 0.99) <= CLOSED_BAR_MS
        report.bars[f"{name}: losers closed <= {CLOSED_BAR_MS:g} ms after the first token (p99)"] = in_time
        report.bars[f"{name}: every request completes"] = not got.failed
        report.data[name] = {**got.__dict__, "added": added}
    report.notes.append(
        "direct, raced: from connecting to the first byte of the body; added: difference of their percentiles"
    )
    report.notes.append(
        "asked: the first server has the request, last: all have it; back, closed: since the first token"
    )
    report.notes.append("left its server; wasted tokens: of losers, for each race")
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.race --races 300")
    options.add_argument("--races", type=int, help="how many for each fleet; default 150")
    words = "before all other programs of the machine, so that busy ones do not count (Linux, root)"
    options.add_argument("--realtime", action="store_true", help=words)
    args = options.parse_args(argv)
    if args.realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # what is started here inherits it
    return finish(run(n_races=args.races or (40 if args.quick else 150)), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
