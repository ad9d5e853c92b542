"""What a relayed token costs, and what a proxy adds to the times that a client sees.

cpu: 200 streams of 100 tokens, 20 ms apart, against one server address and against four (then ollama-lb races). All
CPU time of a run over its tokens; what one more token costs, from the part of the run in which all streams are open and
none begins or ends; and what a chat of one token costs, 200 a second. Programs take turns; ratios are to nginx with as
many addresses in the same repetition. `tokens a read`: a program that is late, on a busy machine, relays several tokens
at once, which costs it less for each; where that is far from nginx's, the machine is measured.

times: see benchmarks/relay_times.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks import peers, relay_times
from benchmarks.kit import Figure, Report, finish, median, parser, ratios, spread, workspace
from benchmarks.processes import Talker, cpu_ns, load, raise_descriptors, upstream, warm_up
from benchmarks.streams import Load, scattered
from benchmarks.upstream import Pace

STREAMS, TOKENS, EVERY_MS = 200, 100, 20
REPEATS, QUICK_REPEATS = 5, 1
CPU_BAR = 1.2
_BEGIN_S = 0.4  # in which all streams begin
_SETTLE_S = 0.2  # before and after the steady part
_TOGETHER_MAX = 1.25  # tokens a read
_CHATS_S, _CHATS_A_SECOND = 1.0, 200
_FIGURES = {"whole_us": "a token, in all", "token_us": "one more token", "chat_us": "a chat of one token"}


@dataclass(frozen=True)
class Cost:
    """CPU time of one run, and what was relayed with it."""

    cpu_us: float
    tokens: int
    steady_cpu_us: float
    steady_tokens: int
    chats_cpu_us: float
    chats: int
    complete: int
    reads: int = 0  # in which the client got the tokens
    problems: tuple[str, ...] = ()

    @property
    def whole_us(self) -> float:
        """All CPU time, for each token."""
        return self.cpu_us / self.tokens if self.tokens else 0.0

    @property
    def token_us(self) -> float:
        """What one more token costs."""
        return self.steady_cpu_us / self.steady_tokens if self.steady_tokens else 0.0

    @property
    def chat_us(self) -> float:
        """What a chat of one token costs."""
        return self.chats_cpu_us / self.chats if self.chats else 0.0


@dataclass(frozen=True)
class Contender:
    """A program, and how many addresses of servers it has."""

    program: str
    start: peers.Starter
    n_servers: int = 1

    @property
    def name(self) -> str:
        """What its row is called."""
        return f"{self.program}, {self.n_servers} server{'s' * (self.n_servers > 1)}"

    @property
    def peer(self) -> str:
        """The row that it is compared with."""
        return Contender("nginx", self.start, self.n_servers).name


def contenders() -> tuple[list[Contender], list[str]]:
    """Return what can be measured here, and a word on what cannot."""
    here, missing = peers.patient()
    found = [
        Contender(name, here[name], n_servers)
        for name in ("ollama-lb", "nginx")
        if name in here
        for n_servers in (1, 4)
    ]
    if "nginx" in here:
        logging = partial(peers.nginx, patience_s=peers.LONG_S, access_log=True)
        found.append(Contender("nginx with access_log", logging))
    if "haproxy" in here:
        found.append(Contender("haproxy", here["haproxy"]))
    return found, missing


def cost(port: int, pid: int, servers: Talker, n_streams: int, n_tokens: int, seed: int) -> Cost:
    """Relay streams, and chats of one token, through the program at `port`, and return what they took."""
    wanted = Load(port, scattered(n_streams, _BEGIN_S, seed), Pace(n_tokens, EVERY_MS, EVERY_MS))
    steady_s = n_tokens * EVERY_MS / 1000 - _BEGIN_S - 2 * _SETTLE_S
    before = cpu_ns(pid)
    with load(wanted) as running:
        time.sleep(max(0.0, (running.begun_ns - time.monotonic_ns()) / 1e9) + _BEGIN_S + _SETTLE_S)
        steady, said = cpu_ns(pid), servers.ask("stats").get("tokens", 0)
        time.sleep(max(0.0, steady_s))
        steady_end, said_end = cpu_ns(pid), servers.ask("stats").get("tokens", 0)
        streams = running.result()
    time.sleep(0.2)  # what a program does when streams are over
    after = cpu_ns(pid)
    with load(Load(port, scattered(int(_CHATS_S * _CHATS_A_SECOND), _CHATS_S, seed), Pace(1, EVERY_MS))) as running:
        chats = running.result()
    time.sleep(0.2)
    return Cost(
        cpu_us=(after - before) / 1000,
        tokens=streams.tokens,
        steady_cpu_us=(steady_end - steady) / 1000,
        steady_tokens=said_end - said,
        chats_cpu_us=(cpu_ns(pid) - after) / 1000,
        chats=chats.complete,
        complete=streams.complete,
        reads=streams.reads,
        problems=tuple(sorted({*streams.problems, *chats.problems})[:3]),
    )


def report_of(found: Sequence[Contender], costs: dict[str, list[Cost]], n_streams: int, n_tokens: int) -> Report:
    """Put the runs of each program together, and judge ours."""
    title = f"relay: CPU us; {n_streams} streams x {n_tokens} tokens {EVERY_MS} ms apart, median (min-max)"
    columns: tuple[str, ...] = ("program",)
    for word in _FIGURES.values():
        columns += (word, "x nginx")
    report = Report("relay", title, (*columns, "tokens a read", "whole"))
    for each in found:
        name, got, peer = each.name, costs[each.name], costs.get(each.peer, [])
        row = [name]
        for figure, word in _FIGURES.items():
            values = [getattr(one, figure) for one in got]
            to_nginx = ratios(values, [getattr(one, figure) for one in peer])
            row += [spread(values), spread(to_nginx, 2)]
            report.figures[f"{name}: {word}"] = Figure(values, "us", judged=False)
            if each.program == "ollama-lb" and to_nginx:
                report.figures[f"{name}: {word}, to nginx"] = Figure(to_nginx, "x")
                if figure == "whole_us":
                    report.bars[f"{name}: {word} <= {CPU_BAR:g} x nginx"] = median(to_nginx) <= CPU_BAR
        together = [one.tokens / one.reads for one in got if one.reads]
        row.append(spread(together, 2))
        if together and median(together) > _TOGETHER_MAX:
            report.notes.append(f"{name}: {median(together):.1f} tokens a read: it was late, which made each cheaper")
        report.rows.append((*row, f"{sum(one.complete for one in got)}/{n_streams * len(got)}"))
        report.bars[f"{name}: all streams come whole"] = all(one.complete == n_streams for one in got)
        report.notes += [f"{name}: {problem}" for one in got for problem in one.problems]
        report.data[name] = [one.__dict__ for one in got]
    return report


def run(*, repeats: int = REPEATS, n_streams: int = STREAMS, n_tokens: int = TOKENS) -> Report:
    """Measure CPU time; the programs take turns."""
    raise_descriptors()
    found, missing = contenders()
    costs: dict[str, list[Cost]] = {each.name: [] for each in found}
    for seed in range(repeats):
        for each in found:
            with upstream(each.n_servers) as (ports, servers), workspace() as where, each.start(ports, where) as proxy:
                warm_up(proxy.port)
                costs[each.name].append(cost(proxy.port, proxy.pid, servers, n_streams, n_tokens, seed))
    report = report_of(found, costs, n_streams, n_tokens)
    report.notes += missing
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.relay --quick cpu")
    options.add_argument("parts", nargs="*", metavar="PART", help="of cpu, times; default: both")
    words = f"how often each is measured; default {REPEATS}, with --quick {QUICK_REPEATS}"
    options.add_argument("--repeats", type=int, help=words)
    words = "before all other programs of the machine, so that busy ones do not count (Linux, root)"
    options.add_argument("--realtime", action="store_true", help=words)
    args = options.parse_args(argv)
    if unknown := sorted(set(args.parts) - {"cpu", "times"}):
        options.error(f"no such part: {', '.join(unknown)}")
    if args.realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # what is started here inherits it
    repeats = args.repeats or (QUICK_REPEATS if args.quick else REPEATS)
    missed = 0
    if "cpu" in args.parts or not args.parts:
        missed |= finish(run(repeats=repeats), as_json=args.json)
    if "times" in args.parts or not args.parts:
        seconds = relay_times.QUICK_SECONDS if args.quick else relay_times.SECONDS
        missed |= finish(relay_times.run(repeats=repeats, seconds=seconds), as_json=args.json)
    return missed


if __name__ == "__main__":
    sys.exit(main())
