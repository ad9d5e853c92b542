"""How soon after exec: help, a check, and the first answer over HTTP, beside nginx and haproxy.

Everything is started again and again, in turn, so that what disturbs one disturbs all. A command's time ends when its
process has ended. A program's ends when it has answered `GET /`: somebody knocks every millisecond from its start on.
Four servers that are there are fakes, in a process of their own; where four are not there, nobody listens, so that
nginx and haproxy answer with an error, and ollama-lb, which asks no server for `/`, as always. Python finds its byte
code on disk, as it does for a program that was installed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import peers
from benchmarks.kit import (
    MS_NS,
    FakeFleet,
    Report,
    ended,
    fake_fleet,
    finish,
    median,
    parser,
    spread,
    workspace,
)

REPEATS, QUICK_REPEATS = 21, 10
N_SERVERS = 4
HELP_BAR_MS, ANSWER_BAR_MS = 150.0, 400.0
BUSY = 0.15  # of its CPU time: who waits longer shares its core
THERE, ABSENT = f"{N_SERVERS} servers", f"{N_SERVERS} servers that are not there"

_PATIENCE_S = 20.0
_KNOCK_S = 0.001
_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

_OURS = [sys.executable, "-m", "lbio"]
_COMMANDS: dict[str, tuple[list[str], float | None]] = {  # and the bar, ms
    "python -c pass": ([sys.executable, "-c", "pass"], None),
    "ollama-lb --version": ([*_OURS, "--version"], HELP_BAR_MS),
    "ollama-lb --help": ([*_OURS, "--help"], HELP_BAR_MS),
}


@dataclass(frozen=True)
class Sample:
    """One start: from exec to the end or to the first answer."""

    wall_ms: float
    cpu_ms: float  # of the process alone, until then
    said: str = ""  # the status line of the answer


def ended_after(command: Sequence[str], env: Mapping[str, str]) -> Sample:
    """Run a command to its end. Raises RuntimeError when it fails."""
    begun_ns = time.monotonic_ns()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env) as process:
        _, status, used = os.wait4(process.pid, 0)
        wall_ms = (time.monotonic_ns() - begun_ns) / MS_NS
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return Sample(wall_ms, (used.ru_utime + used.ru_stime) * 1000)


def answered_after(proxy: peers.Proxy, env: Mapping[str, str]) -> Sample:
    """Start a server again, and end it once it has answered. Raises RuntimeError, with its log, when it does not."""
    with proxy.log.open("w") as out:
        begun_ns = time.monotonic_ns()
        with subprocess.Popen(proxy.command, stdout=out, stderr=out, env=env) as process, ended(process):
            said = _first_answer(proxy.port, process)
            wall_ms = (time.monotonic_ns() - begun_ns) / MS_NS
            cpu_ms = _cpu_ms(process.pid)
    if not said:
        raise RuntimeError(f"{proxy.command!r} did not answer:\n{proxy.log.read_text(encoding='utf-8')[-2000:]}")
    return Sample(wall_ms, cpu_ms, said)


def _first_answer(port: int, process: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S) as sock:
            sock.sendall(_REQUEST)
            if answer := sock.recv(65536):
                return answer.split(b"\r\n", 1)[0].decode("latin-1")
        time.sleep(_KNOCK_S)
    return ""


def _cpu_ms(pid: int) -> float:
    """Return the CPU time of a process's threads so far; what it has started beside itself is not in it."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks) / MS_NS


@contextlib.contextmanager
def _cases(where: Path) -> Iterator[dict[str, tuple[Callable[[], Sample], float | None]]]:
    """Give what is measured: how, and its bar in ms."""
    env = _environment(where)
    with contextlib.ExitStack() as stack:
        there = _proxies(stack.enter_context(_fleet()).ports, where / "there")
        with _fleet() as gone:
            absent = _proxies(gone.ports, where / "absent")
        config = there["ollama-lb"].command[-1]
        cases: dict[str, tuple[Callable[[], Sample], float | None]] = {}
        for name, (command, bar) in {**_COMMANDS, "ollama-lb check": ([*_OURS, "check", config], None)}.items():
            cases[name] = (functools.partial(ended_after, command, env), bar)
        for name in there:
            bar = ANSWER_BAR_MS if name == "ollama-lb" else None
            for which, proxies in ((THERE, there), (ABSENT, absent)):
                cases[f"{name}, {which}"] = (functools.partial(answered_after, proxies[name], env), bar)
        yield cases


def _fleet() -> AbstractContextManager[FakeFleet]:
    return fake_fleet([{"name": f"s{index}"} for index in range(N_SERVERS)])


def _proxies(ports: Sequence[int], where: Path) -> dict[str, peers.Proxy]:
    """Return the programs that can be run here; each has run once, and has its configuration."""
    proxies = {}
    for name, start in peers.found()[0].items():
        (where / name).mkdir(parents=True)
        with start(ports, where / name) as proxy:
            proxies[name] = proxy
    return proxies


def _environment(where: Path) -> dict[str, str]:
    """Return one in which Python keeps byte code, in a place of ours."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(where / "pycache")}


def report_of(found: dict[str, list[Sample]], bars: dict[str, float | None]) -> Report:
    """Put the samples of each case together, and judge their medians."""
    columns = ("what", "times", "wall ms", "CPU ms", "answer")
    report = Report("startup", "startup: from exec to the end, or to the first answer over HTTP", columns)
    for name, samples in found.items():
        walls, cpus = [sample.wall_ms for sample in samples], [sample.cpu_ms for sample in samples]
        said = ", ".join(sorted({sample.said.partition(" ")[2] for sample in samples}))
        report.rows.append((name, str(len(samples)), spread(walls), spread(cpus), said or "-"))
        report.data[name] = {"wall_ms": walls, "cpu_ms": cpus, "said": said}
        if (bar := bars[name]) is not None:
            report.bars[f"{name} <= {bar:g} ms: {median(walls):.0f} ms"] = median(walls) <= bar
            waited_ms = median(walls) - median(cpus)
            if waited_ms > BUSY * median(cpus):
                report.notes.append(f"NOISY: {name} waited {waited_ms:.0f} ms, mostly for a core; see --realtime")
    report.notes.append("median (min-max); CPU: of the process that was started, without nginx's worker")
    return report


def run(*, repeats: int = REPEATS) -> Report:
    """Measure all cases in turn; the first turn, in which Python compiles, is not counted."""
    with workspace() as where, _cases(where) as cases:
        found: dict[str, list[Sample]] = {name: [] for name in cases}
        for turn in range(repeats + 1):
            for name, (measure, _) in cases.items():
                sample = measure()
                if turn:
                    found[name].append(sample)
        report = report_of(found, {name: bar for name, (_, bar) in cases.items()})
    report.notes += peers.found()[1]
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.startup --repeats 31")
    options.add_argument("--repeats", type=int, help=f"how often each is started; default {REPEATS}")
    words = "before all other programs of the machine, so that busy ones do not count (Linux, root)"
    options.add_argument("--realtime", action="store_true", help=words)
    args = options.parse_args(argv)
    if args.realtime:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # what is started here inherits it
    return finish(run(repeats=args.repeats or (QUICK_REPEATS if args.quick else REPEATS)), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
