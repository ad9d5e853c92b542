"""Sweeps: many runs on whatever executor there is, kept in a file as they end, put together in the order asked for.

Each job carries the text of its scenario, so that whoever runs it needs nothing but the program (and the traces that
the scenario names, at the same path). What comes out does not depend on who ran what when.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from lbcore import __version__
from lbcore.parsing import ABSENT, Problem
from simulator.cli import builder
from simulator.inputs import InputError, parse_scenario_text
from simulator.policies.known import policy
from simulator.reports.figures import FIGURES, SweepRow, sweep_row
from simulator.reports.summary import flat, summarise
from simulator.scenario import Scenario, run_scenario
from simulator.sweeps.bench_file import CONFIGURED, Case
from simulator.tables import finite
from simulator.workloads.sources import Trace, scaled

_WINDOW = 64  # jobs with the executor at a time: enough for its workers, and soon cancelled


@dataclass(frozen=True)
class Job:
    """One run: a case with one seed."""

    name: str
    path: str  # of the scenario's file; its folder is where traces are looked for
    text: str
    policy: str
    load: float
    factor: float
    seed: int
    audit: bool = False

    @cached_property
    def key(self) -> str:
        """Return what stands for the run in a file of results: it is the same when nothing of it has changed."""
        told = (_program(), self.text, _traces(self), self.policy, self.factor, self.seed, self.audit)
        return sha256(json.dumps(told).encode()).hexdigest()[:32]

    def __str__(self) -> str:
        """Return what it is, for messages."""
        return f"{self.name}, {self.policy}, load {self.load:g}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a job. A run that broke off with an error has no figures, and is not kept."""

    figures: Mapping[str, float]
    violations: tuple[str, ...] = ()
    error: str = ""


def jobs_of(cases: Iterable[Case]) -> list[Job]:
    """Return the runs of all cases, each once."""
    jobs = (
        Job(case.name, str(case.path), case.text, case.policy, case.load, case.factor, seed, case.audit)
        for case in cases
        for seed in case.seeds
    )
    return list(dict.fromkeys(jobs))


def run_job(job: Job) -> Done:
    """Run one job, in whatever process. Errors are part of what comes of it: one bad run must not end a sweep."""
    try:
        scenario = _scenario(job.text, job.path)
        scenario = replace(scenario, workload=scaled(scenario.workload, job.factor))
        build = None if job.policy == CONFIGURED else builder(policy(job.policy))
        result = run_scenario(scenario, job.seed, build=build, policy=job.policy, audit=job.audit)
        found = flat(summarise(result))
    except Exception as error:  # noqa: BLE001
        return Done({}, error=f"{type(error).__name__}: {error}")
    return Done({name: found[name] for name in FIGURES}, tuple(result.violations))


@lru_cache(maxsize=32)
def _scenario(text: str, path: str) -> Scenario:
    return parse_scenario_text(text, Path(path))


def run_sweep(
    jobs: Sequence[Job],
    executor: Executor | None = None,
    *,
    known: Mapping[str, Done] | None = None,
    on_done: Callable[[Job, Done], None] | None = None,
    window: int = _WINDOW,
) -> list[Done]:
    """Run the jobs that are not `known` (by key), and return what came of all, in the order of the jobs.

    Without an executor they run here, one after the other. `on_done` is told of each run as it ends. At most `window`
    jobs are with the executor at a time; when something goes wrong here, those that have not begun are cancelled.
    """
    found = dict(known or {})
    missing = iter({job.key: job for job in jobs if job.key not in found}.values())
    for job, done in _each(missing, executor, window):
        found[job.key] = done
        if on_done is not None:
            on_done(job, done)
    return [found[job.key] for job in jobs]


def _each(jobs: Iterator[Job], executor: Executor | None, window: int) -> Iterator[tuple[Job, Done]]:
    if executor is None:
        for job in jobs:
            yield job, run_job(job)
        return
    running: dict[Future[Done], Job] = {}
    try:
        while True:
            for job in islice(jobs, window - len(running)):
                running[executor.submit(run_job, job)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        for future in running:
            future.cancel()


def sweep_rows(jobs: Sequence[Job], done: Sequence[Done]) -> list[SweepRow]:
    """Return the cells that jobs and what came of them make, in the order in which the jobs name them."""
    cells: dict[tuple[str, float, str], list[Mapping[str, float]]] = {}
    for job, of in zip(jobs, done, strict=True):
        flats = cells.setdefault((job.name, job.load, job.policy), [])
        if of.figures:
            flats.append(of.figures)
    return [sweep_row(name, by, load, flats) for (name, load, by), flats in cells.items()]


# --- keys ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _program() -> str:
    """Return what stands for this program: its version, and the text of all that takes part in a run."""
    seen = sha256(__version__.encode())
    here = Path(__file__).parent
    for folder in (here.parent / "lbcore", here):
        for file in sorted(file for file in folder.rglob("*") if file.suffix in {".py", ".toml"}):
            seen.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return seen.hexdigest()


def _traces(job: Job) -> list[str]:
    """Return the digests of the traces that a job reads."""
    workload = _scenario(job.text, job.path).workload
    return [_digest(str(settings.path)) for settings in workload if isinstance(settings, Trace)]


@lru_cache(maxsize=32)
def _digest(path: str) -> str:
    return sha256(Path(path).read_bytes()).hexdigest()


# --- results on disk -------------------------------------------------------------------------------------------


class Results:
    """The runs that have ended, a line each, appended to a file as they end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Done] = {}
        self.notes: list[str] = []  # what was odd about the file
        try:
            whole = self._read(path.read_bytes() if path.exists() else b"")
            with path.open("ab") as file:  # better refused now than after the first run
                file.truncate(whole)
        except OSError as error:
            raise InputError([f"--results: {path} cannot be used: {(error.strerror or str(error)).lower()}"]) from None

    def _read(self, raw: bytes) -> int:
        """Take in what is there. Returns how many bytes are whole lines."""
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            self.notes.append(f"{self.path}: the last line is cut off, its run is done again")
        for number, line in enumerate(raw[:whole].splitlines(), start=1):
            try:
                key, done = _parse_line(line)
            except (ValueError, KeyError, TypeError, AttributeError):
                fix = "name a file of --results, or one that does not exist"
                problem = Problem(str(self.path), ABSENT, f"(line {number}) is not a result of bench", fix)
                raise InputError([f"--results: {problem}"]) from None
            self.known[key] = done
        return whole

    def add(self, job: Job, done: Done) -> None:
        """Keep what came of a job."""
        if not done.error:
            with self.path.open("ab") as file:
                file.write(_line(job, done))


def _line(job: Job, done: Done) -> bytes:
    told: dict[str, Any] = {"key": job.key, "scenario": job.name, "policy": job.policy, "load": job.load}
    told["seed"] = job.seed
    told["violations"] = done.violations
    told["figures"] = {name: finite(value) for name, value in done.figures.items()}
    return json.dumps(told, allow_nan=False).encode() + b"\n"


def _parse_line(line: bytes) -> tuple[str, Done]:
    told = json.loads(line)
    figures = {name: math.nan if value is None else float(value) for name, value in told["figures"].items()}
    return str(told["key"]), Done(figures, tuple(map(str, told["violations"])))
