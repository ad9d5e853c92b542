"""What other processes use: CPU time and memory, from /proc; and our own helpers, which talk in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.kit import ended
from benchmarks.streams import Load, Seen, even
from benchmarks.upstream import Pace

ROOT = Path(__file__).parent.parent
_PROC = Path("/proc")
_SPARE_DESCRIPTORS = 100


def family(pid: int) -> list[int]:
    """Return a process and its children, such as nginx's worker."""
    found = [pid]
    for path in _PROC.glob(f"{pid}/task/*/children"):
        for child in path.read_text(encoding="ascii").split():
            found += family(int(child))
    return found


def cpu_ns(pid: int) -> int:
    """Return the CPU time of a process, its threads and its children so far."""
    total = 0
    for each in family(pid):
        for path in _PROC.glob(f"{each}/task/*/schedstat"):
            with contextlib.suppress(OSError):  # a thread that has just ended
                total += int(path.read_text(encoding="ascii").split()[0])
    return total


def memory(pid: int) -> dict[str, int]:
    """Return `uss` (private) and `rss` of a process and its children, bytes."""
    found = {"uss": 0, "rss": 0}
    for each in family(pid):
        for line in (_PROC / str(each) / "smaps_rollup").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in {"Private_Clean", "Private_Dirty"}:
                found["uss"] += int(value.split()[0]) * 1024
            elif name == "Rss":
                found["rss"] += int(value.split()[0]) * 1024
    return found


def raise_descriptors() -> int:
    """Allow this process and those that it starts as many files as the system does; return how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def streams_max() -> int:
    """Return how many streams a proxy can have, which needs two descriptors for each."""
    return (raise_descriptors() - _SPARE_DESCRIPTORS) // 2


class Talker:
    """A helper that answers each line that it is told with one line of JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def hear(self) -> Any:
        """Return its next line. Raises RuntimeError when it has ended."""
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise RuntimeError(f"{self._process.args!r} has ended")
        return json.loads(line)

    def ask(self, command: str) -> Any:
        """Tell it a line and return its answer."""
        self.tell(command)
        return self.hear()

    def tell(self, command: str) -> None:
        """Tell it a line."""
        if self._process.stdin is not None:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()


@contextlib.contextmanager
def _helper(*arguments: str) -> Iterator[Talker]:
    command = [sys.executable, "-m", *arguments]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process,
        ended(process),
    ):
        yield Talker(process)


@contextlib.contextmanager
def upstream(n_servers: int) -> Iterator[tuple[list[int], Talker]]:
    """Run benchmarks/upstream.py; its ports, and itself."""
    with _helper("benchmarks.upstream", str(n_servers)) as talker:
        yield talker.hear()["ports"], talker


class Running:
    """A load under way."""

    def __init__(self, talker: Talker) -> None:
        self._talker = talker
        self.begun_ns: int = talker.hear()["begun_ns"]

    def result(self) -> Seen:
        """Wait for its end."""
        return Seen(**self._talker.hear())


@contextlib.contextmanager
def load(wanted: Load) -> Iterator[Running]:
    """Run benchmarks/streams.py."""
    with _helper("benchmarks.streams") as talker:
        talker.tell(wanted.as_json())
        yield Running(talker)


def warm_up(port: int) -> None:
    """Let a program import, connect and answer; not counted."""
    with load(Load(port, even(20, 0.2), Pace(5, 0, 5))) as running:
        running.result()
