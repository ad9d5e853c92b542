"""What a race costs: its first token against the fastest racer's own, and how soon the losers are let go.

Every chat is sent to all four fake servers at once (`racers_min = 4`); every second one goes straight to the fastest
server instead, without a balancer in between, so that both see the same machine. One at a time: nothing here is
queueing. Two fleets: `spread` (first tokens after 50, 60, 80 and 100 ms) and `tie` (50 ms each).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from dataclasses import dataclass
from typing import Any

from benchmarks import peers
from benchmarks.kit import Report, fake_fleet, finish, number, parser, percentile, workspace
from benchmarks.load import Outcome, ask

FLEETS = {"spread": (50.0, 60.0, 80.0, 100.0), "tie": (50.0, 50.0, 50.0, 50.0)}
ADDED_BAR_MS = 2.0
CLOSED_BAR_MS = 5.0
_RACE_ALL = "[race]\nracers_min = 4\nracers_max = 4\nutilisation_max = 1.0\nbudget = 3.0\nhedges_max = 0"


@dataclass
class Measured:
    """One fleet's figures, ms."""

    direct: list[float]
    raced: list[float]
    closed: list[float]  # from the commit, as ollama-lb logged it, to the close as the loser saw it
    failed: int
    wasted_seen: int  # tokens of losers that the balancer had read
    wasted_made: int  # tokens that losers had made when they noticed

    @property
    def added(self) -> list[float]:
        """Each race's first token less that of the direct request just before it."""
        return [raced - direct for raced, direct in zip(self.raced, self.direct, strict=True)]


async def _alternate(proxy: peers.Proxy, fastest: int, n_races: int) -> tuple[list[Outcome], list[Outcome]]:
    direct, raced = [], []
    for port in (fastest, proxy.port) * 3:
        await ask(port)  # not counted: connections, imports
    for _ in range(n_races):
        direct.append(await ask(fastest))
        raced.append(await ask(proxy.port))
    return direct, raced


def _closed_ms(decisions: list[dict[str, Any]], servers: list[dict[str, Any]]) -> list[float]:
    """Return how long after the commit each loser saw its connection close, ms.

    The log has wall-clock time, the fakes monotonic; the difference between the two clocks is read now.
    """
    offset_ns = time.time_ns() - time.monotonic_ns()
    commits = sorted(round(d["time"] * 1e9) - offset_ns for d in decisions if d.get("decision") == "committed")
    aborts = sorted(abort["at_ns"] for server in servers for abort in server["aborts"])
    closed: list[float] = []
    for moment in aborts:
        before = [commit for commit in commits if commit <= moment]
        if before:
            closed.append((moment - before[-1]) / 1e6)
    return closed


def measure(first_tokens_ms: tuple[float, ...], n_races: int) -> Measured:
    """Race over a fleet with these first-token times, the fastest first."""
    specs = [{"name": f"s{i}", "first_token_ms": first, "tokens": 12} for i, first in enumerate(first_tokens_ms)]
    with contextlib.ExitStack() as stack:
        fleets = [stack.enter_context(fake_fleet([spec])) for spec in specs]  # no server waits for another's work
        ports = [fleet.ports[0] for fleet in fleets]
        proxy = stack.enter_context(peers.ollama_lb(ports, stack.enter_context(workspace()), _RACE_ALL))
        direct, raced = asyncio.run(_alternate(proxy, ports[0], n_races))
        servers = [fleet.stats()[0] for fleet in fleets]
        both = [pair for pair in zip(direct, raced, strict=True) if pair[0].done and pair[1].done]
        return Measured(
            direct=[outcome.ttft_ms for outcome, _ in both],
            raced=[outcome.ttft_ms for _, outcome in both],
            closed=_closed_ms(proxy.decisions(), servers),
            failed=n_races - len(both),
            wasted_seen=proxy.status()["wasted_tokens"],
            wasted_made=sum(server["tokens_of_aborted"] for server in servers),
        )


def run(*, n_races: int = 150) -> Report:
    """Measure both fleets."""
    columns: tuple[str, ...] = (
        "fleet",
        "races",
        "direct p50 ms",
        "direct p99",
        "raced p50 ms",
        "raced p99",
        "added p50 ms",
    )
    columns += ("added p99 ms", "added pair p99", "losers closed p50 ms", "p99 ms", "max ms", "wasted tokens/race")
    report = Report("race", "race: four servers at once, against the fastest one alone", columns)
    for name, first_tokens_ms in FLEETS.items():
        got = measure(first_tokens_ms, n_races)
        added = [percentile(got.raced, share) - percentile(got.direct, share) for share in (0.5, 0.99)]
        direct = [number(percentile(got.direct, share), 2) for share in (0.5, 0.99)]
        raced = [number(percentile(got.raced, share), 2) for share in (0.5, 0.99)]
        closed = [number(percentile(got.closed, share), 2) for share in (0.5, 0.99, 1.0)]
        wasted = f"{got.wasted_made / n_races:.2f}"
        differences = [number(value, 2) for value in (*added, percentile(got.added, 0.99))]
        report.rows.append((name, str(len(got.raced)), *direct, *raced, *differences, *closed, wasted))
        report.bars[f"{name}: first token p50 <= the fastest racer's + {ADDED_BAR_MS:g} ms"] = added[0] <= ADDED_BAR_MS
        report.bars[f"{name}: first token p99 <= the fastest racer's + {ADDED_BAR_MS:g} ms"] = added[1] <= ADDED_BAR_MS
        in_time = percentile(got.closed, 0.99) <= CLOSED_BAR_MS
        report.bars[f"{name}: losers closed <= {CLOSED_BAR_MS:g} ms after the commit (p99)"] = in_time
        report.bars[f"{name}: every request completes"] = not got.failed
        report.data[name] = {**got.__dict__, "added": got.added}
    report.notes.append("added: difference of the percentiles; 'pair': p99 of (race - the direct request before it)")
    report.notes.append("closed: from the commit in ollama-lb's log to the close as the loser's server saw it")
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.race --races 300")
    options.add_argument("--races", type=int, help="how many for each fleet; default 150")
    args = options.parse_args(argv)
    return finish(run(n_races=args.races or (40 if args.quick else 150)), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
