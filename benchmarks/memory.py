"""What a stream that waits costs in memory, and whether all of very many are answered.

Streams are opened one after the other and held by the server: `waiting` before their first token, then, once that has
come to all of them, `streaming` before their second. Memory is what is the program's own (USS, without what the kernel
holds for sockets), less what it had when it was idle, for each stream. Then all are answered, and counted.

The server has 10 addresses with 1,024 slots each, since no Ollama takes 10,000 at once. ollama-lb runs with
`race.racers_max = 1` and `race.hedges_max = 0`, so that each stream has one attempt, as nginx's have; the row `races`
has the defaults, where streams that wait are sent to two servers. A process needs two descriptors for each stream: the
number is lowered to what the system allows (`ulimit -Hn`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from benchmarks import peers
from benchmarks.kit import Figure, Report, finish, median, parser, ratios, spread, workspace
from benchmarks.processes import Running, Talker, load, memory, streams_max, upstream
from benchmarks.streams import Load, Seen, even
from benchmarks.upstream import Pace

N_SERVERS, SLOTS = 10, 1024
NUMBERS = (1_000, 10_000)
REPEATS, QUICK_REPEATS = 3, 1
RACING = "ollama-lb, races"
BAR_KIB = 16.0
_A_SECOND = 400  # streams opened
_STUCK_S = 15.0  # without another stream: no more will come
_ANSWER_S = 90.0  # for all to come to their end, after the last was opened
_PATIENCE_S = 300
_ALONE = f"[race]\nracers_max = 1\nhedges_max = 0\n[queue]\nlength_max = {NUMBERS[-1]}"


@dataclass(frozen=True)
class Got:
    """Memory for each stream, KiB, and how many streams came whole."""

    waiting_uss: float
    waiting_rss: float
    streaming_uss: float
    idle_mib: float
    streams: int
    complete: int
    problems: tuple[str, ...]


def contenders() -> tuple[dict[str, peers.Starter], list[str]]:
    """Return what can be measured here, and a word on what cannot."""
    here, missing = peers.found()
    ollama_lb = partial(peers.ollama_lb, slots=SLOTS, patience_s=_PATIENCE_S)
    found: dict[str, peers.Starter] = {
        "ollama-lb": partial(ollama_lb, extra=_ALONE),
        RACING: partial(ollama_lb, extra=f"[queue]\nlength_max = {NUMBERS[-1]}"),
    }
    if "nginx" in here:
        found["nginx"] = partial(peers.nginx, patience_s=_PATIENCE_S)
    if "haproxy" in here:
        found["haproxy"] = partial(peers.haproxy, patience_s=_PATIENCE_S)
    return found, missing


def _until_held(servers: Talker, wanted: int) -> bool:
    """Wait until the servers have that many streams that wait; False when no more come."""
    held, since = 0, time.monotonic()
    while held < wanted:
        now_held = servers.ask("stats").get("held", 0)
        if now_held > held:
            held, since = now_held, time.monotonic()
        if time.monotonic() - since > _STUCK_S:
            return False
        time.sleep(0.1)
    time.sleep(1.0)  # what is done after the last
    return True


def _see_through(running: Running, servers: Talker) -> Seen:
    """Release what waits until the load has ended: who lost a race was counted as waiting, so some came too late."""
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(running.result)
        while not seen.done():
            servers.ask("release")
            time.sleep(0.2)
        return seen.result()


def measure(start: peers.Starter, n_streams: int) -> Got:
    """Open the streams, measure, and let them be answered."""
    spread_s = n_streams / _A_SECOND
    with upstream(N_SERVERS) as (ports, servers), workspace() as where, start(ports, where) as proxy:
        with load(Load(proxy.port, even(50, 0.5), Pace(3, 5, 5))) as running:
            running.result()
        time.sleep(0.5)
        idle = memory(proxy.pid)
        with load(Load(proxy.port, even(n_streams, spread_s), Pace(3, 0, 5, hold=2), patience_s=_ANSWER_S)) as running:
            came = _until_held(servers, n_streams)
            waiting = memory(proxy.pid)
            servers.ask("release")
            time.sleep(0.5)
            came = _until_held(servers, n_streams) and came
            streaming = memory(proxy.pid)
            seen = _see_through(running, servers)
    problems = sorted(set(seen.problems))[:3] + ([] if came else ["the servers did not get all streams in time"])

    def each_kib(now: dict[str, int], what: str) -> float:
        return (now[what] - idle[what]) / 1024 / n_streams

    return Got(
        waiting_uss=each_kib(waiting, "uss"),
        waiting_rss=each_kib(waiting, "rss"),
        streaming_uss=each_kib(streaming, "uss"),
        idle_mib=idle["uss"] / 2**20,
        streams=n_streams,
        complete=seen.complete,
        problems=tuple(problems),
    )


def report_of(got: dict[tuple[int, str], list[Got]]) -> Report:
    """Put the repetitions together, by number of streams and program, and judge ours."""
    columns = (
        "streams, program",
        "waiting, KiB each",
        "x nginx",
        "of it RSS",
        "streaming, KiB each",
        "idle MiB",
        "whole",
    )
    report = Report("memory", "memory: of streams that wait, median (min-max)", columns)
    for (n_streams, program), each in got.items():
        name, sizes = f"{n_streams:,}, {program}", [one.waiting_uss for one in each]
        to_nginx = ratios(sizes, [one.waiting_uss for one in got.get((n_streams, "nginx"), [])])
        row = [name, spread(sizes), spread(to_nginx, 2), spread([one.waiting_rss for one in each])]
        row += [spread([one.streaming_uss for one in each]), spread([one.idle_mib for one in each])]
        report.rows.append((*row, f"{sum(one.complete for one in each)}/{n_streams * len(each)}"))
        report.notes += [f"{name}: {problem}" for one in each for problem in one.problems]
        report.data[name] = [one.__dict__ for one in each]
        report.figures[f"{name}: waiting"] = Figure(sizes, "KiB")
        report.figures[f"{name}: streaming"] = Figure([one.streaming_uss for one in each], "KiB")
        report.bars[f"{name}: all streams come whole"] = all(one.complete == n_streams for one in each)
        if program == "ollama-lb":
            report.bars[f"{name}: <= {BAR_KIB:g} KiB each"] = median(sizes) <= BAR_KIB
    return report


def run(*, repeats: int = REPEATS, numbers: Sequence[int] = NUMBERS) -> Report:
    """Measure all programs with each number of streams."""
    found, missing = contenders()
    most = streams_max()
    got: dict[tuple[int, str], list[Got]] = {}
    for n_streams in sorted({min(wanted, most) for wanted in numbers}):
        for _ in range(repeats):
            for name, start in found.items():
                if name != RACING or n_streams <= NUMBERS[0]:
                    got.setdefault((n_streams, name), []).append(measure(start, n_streams))
    report = report_of(got)
    report.notes += missing
    if max(numbers) > most:
        report.notes.append(f"{most:,} streams in the place of {max(numbers):,}: what the descriptors here allow")
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.memory --streams 1000 5000")
    options.add_argument("--streams", type=int, nargs="+", help="how many are opened; default 1000 10000, --quick 1000")
    words = f"how often each is measured; default {REPEATS}, with --quick {QUICK_REPEATS}"
    options.add_argument("--repeats", type=int, help=words)
    args = options.parse_args(argv)
    numbers = args.streams or (NUMBERS[:1] if args.quick else NUMBERS)
    repeats = args.repeats or (QUICK_REPEATS if args.quick else REPEATS)
    return finish(run(repeats=repeats, numbers=numbers), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
