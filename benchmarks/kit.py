"""What every measurement needs: figures, tables, results on disk, and other programs as subprocesses."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
MS_NS = 1_000_000
NS_PER_S = 1_000_000_000
NO_VALUE = math.nan


# --- figures -----------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of all do not exceed (nearest rank); nan of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else NO_VALUE


def median(values: Sequence[float]) -> float:
    """Return the middle value; nan of nothing."""
    return percentile(values, 0.5)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return `median (min-max)`, or the only value."""
    if len(values) < 2:
        return number(median(values), digits)
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def ratios(values: Sequence[float], to: Sequence[float]) -> list[float]:
    """Return each value to the one of the same repetition; none when there is nothing to compare with."""
    return [value / base for value, base in zip(values, to, strict=False) if base]


def number(value: float, digits: int = 1) -> str:
    """Return a figure for a table; `-` for none."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def machine() -> dict[str, Any]:
    """Say where and beside what a measurement was made."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# --- results -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A figure of each repetition, for `python -m benchmarks compare`. `judged`: it does not depend on the moment."""

    values: list[float]
    unit: str
    higher_is_better: bool = False
    judged: bool = True


@dataclass
class Report:
    """One measurement's outcome: rows for people, `data` for programs, and whether each bar was met."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bars: dict[str, bool] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=machine)

    def as_object(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        found = {"name": self.name, "title": self.title, "machine": self.machine, "bars": self.bars}
        figures = {name: asdict(figure) for name, figure in self.figures.items()}
        told = {"columns": self.columns, "rows": self.rows, "notes": self.notes}
        return {**found, **told, "figures": figures, "data": self.data}

    def _footer(self) -> list[str]:
        bars = [f"{'met   ' if met else 'MISSED'}  {bar}" for bar, met in self.bars.items()]
        here = self.machine
        where = f"{here['cpu']}, {here['cores']} cores, Python {here['python']}, load {here['load_average_1m']}"
        return [*bars, *self.notes, f"measured {here['when']} on {where}"]

    def show(self) -> None:
        """Print it for people."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        self._fill(table)
        console = Console()
        console.width = max(console.width, 190)  # a narrow terminal or a pipe folds lines; figures are not cut
        console.print(table)
        for line in self._footer():
            console.print(line, highlight=False, soft_wrap=True, markup=False)

    def markdown(self) -> str:
        """Return it as a Markdown section."""
        table = Table(box=MARKDOWN)
        self._fill(table)
        console = Console(width=240, file=None, record=True, quiet=True)
        console.print(table)
        lines = [line.rstrip() for line in console.export_text().splitlines() if line.strip()]
        return "\n".join([f"## {self.title}", "", *lines, "", *(f"- {line}" for line in self._footer()), ""])

    def _fill(self, table: Table) -> None:
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)

    def save(self) -> Path:
        """Write `results/NAME.json`."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        path.write_text(json.dumps(self.as_object(), indent=1, default=str) + "\n", encoding="utf-8")
        return path


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """Return a parser with what all measurements take."""
    made = argparse.ArgumentParser(
        description=description, epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    made.add_argument("--quick", action="store_true", help="a shorter, rougher run")
    return made


def finish(report: Report, *, as_json: bool) -> int:
    """Print and save a report; 1 when a bar was missed."""
    if as_json:
        print(json.dumps(report.as_object(), default=str))
    else:
        report.show()
    report.save()
    return 0 if all(report.bars.values()) else 1


# --- subprocesses ------------------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_listening(port: int, process: subprocess.Popen[Any], log: Path, *, patience_s: float = 10.0) -> None:
    """Return once something accepts on `port`. Raises RuntimeError, with the program's log, when nothing does."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} does not listen on {port}:\n{log.read_text(encoding='utf-8')[-2000:]}")


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """End a process of ours when the block is left."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Give a directory that is gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="ollama-lb-bench-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def find_program(name: str) -> str | None:
    """Return where a peer is installed, /usr/sbin included."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")))


class FakeFleet:
    """Fake Ollama servers in a process of their own, controlled by lines of JSON (see benchmarks/fakes.py)."""

    def __init__(self, process: subprocess.Popen[str], ports: Sequence[int]) -> None:
        self._process = process
        self.ports = tuple(ports)

    def _ask(self, **wanted: Any) -> Any:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the fakes have no pipes")
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def set_fault(self, server: int, kind: str | None, **more: float) -> int:
        """Break a server, or heal it with None; return the moment, monotonic ns."""
        at_ns: int = self._ask(do="fault", server=server, kind=kind, **more)["at_ns"]
        return at_ns

    def stats(self) -> list[dict[str, Any]]:
        """Return what each server has seen."""
        found: list[dict[str, Any]] = self._ask(do="stats")["servers"]
        return found


@contextlib.contextmanager
def fake_fleet(specs: Sequence[dict[str, Any]]) -> Iterator[FakeFleet]:
    """Run fake servers. `specs`: the fields of FakeSpec that differ from the defaults of benchmarks/fakes.py."""
    command = [sys.executable, "-m", "benchmarks.fakes", json.dumps(list(specs))]
    root = Path(__file__).parent.parent
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process,
        ended(process),
    ):
        line = process.stdout.readline() if process.stdout is not None else ""
        if not line:
            raise RuntimeError("the fake servers did not start")
        yield FakeFleet(process, json.loads(line)["ports"])
