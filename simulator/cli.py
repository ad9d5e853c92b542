"""`ollama-lb simulate`: scenarios from files, run and judged. `lbio.cli` declares the command and its flags."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lbcore.balancer import LoadBalancer
from lbcore.config import Config
from lbcore.trace import Recorder
from simulator.inputs import InputError, load_scenario, load_scenarios, toml_files
from simulator.policies.known import PolicyError, PolicySpec, policy
from simulator.policies.placements import WorldView
from simulator.report import Verdict, judge, print_run, print_scenarios, print_seeds, to_json
from simulator.reports.results import RunResult
from simulator.reports.story import explain
from simulator.reports.summary import summarise
from simulator.scenario import Build, Scenario, run_scenario
from simulator.tables import new_console

__all__ = ["InputError", "Wanted", "load_scenario", "simulate"]

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line asks for."""

    paths: tuple[Path, ...]
    seed: int | None = None  # None: the scenario's own
    seeds: int = 1
    policy: str = ""  # empty: as configured
    audit: bool = True
    as_json: bool = False
    plot: Path | None = None
    trace: Path | None = None
    explain: int | None = None
    workers: int | None = None  # processes; None: one for each core


def simulate(wanted: Wanted) -> int:
    """Run what is wanted and print what came of it. Returns the exit status."""
    try:
        _refuse_many(wanted)
        scenarios = load_scenarios(toml_files(wanted.paths))
        for path, scenario in scenarios:
            for warning in scenario.warnings:
                click.echo(f"warning: {path}: {warning}", err=True)
        spec = policy(wanted.policy) if wanted.policy else None
        jobs = [
            Job(path, (scenario.seed if wanted.seed is None else wanted.seed) + i, wanted.policy, wanted.audit)
            for path, scenario in scenarios
            for i in range(wanted.seeds)
        ]
        if len(jobs) == 1:
            return _one_run(wanted, *scenarios[0], jobs[0], spec)
    except InputError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        return EXIT_BAD_INPUT
    except PolicyError as error:
        click.echo(f"--policy: {error}", err=True)
        return EXIT_BAD_INPUT
    verdicts = list(_run_all(jobs, wanted.workers))
    if wanted.as_json:
        click.echo(to_json(verdicts))
    elif len(scenarios) == 1:
        print_seeds(verdicts, new_console())
    else:
        cases = [verdicts[i : i + wanted.seeds] for i in range(0, len(verdicts), wanted.seeds)]
        print_scenarios(cases, new_console())
    return EXIT_FAILED if any(verdict.failures for verdict in verdicts) else EXIT_OK


def _refuse_many(wanted: Wanted) -> None:
    of_one = wanted.plot is not None or wanted.trace is not None or wanted.explain is not None
    if of_one and (wanted.seeds > 1 or len(toml_files(wanted.paths)) > 1):
        raise InputError(["--plot, --trace and --explain show one run: name one scenario, and no --seeds"])


# --- running -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """One run, in whatever process."""

    path: Path
    seed: int
    policy: str
    audit: bool


def run_job(job: Job) -> Verdict:
    """Run and judge. The same job gives the same verdict, wherever it runs."""
    scenario = load_scenario(job.path)
    build = builder(policy(job.policy)) if job.policy else None
    result = run_scenario(scenario, job.seed, build=build, policy=job.policy, audit=job.audit)
    return judge(summarise(result), scenario.expectations, str(job.path))


def builder(spec: PolicySpec) -> Build:
    """Return what makes balancers that work by a policy."""

    def build(config: Config, rng: Random, world: WorldView) -> LoadBalancer:
        return spec.build(config, rng, world)

    return build


def _run_all(jobs: Sequence[Job], workers: int | None) -> Iterator[Verdict]:
    """Yield the verdicts in the order of the jobs, whatever order they end in."""
    n_workers = min(workers or os.cpu_count() or 1, len(jobs))
    with progress_bar() as progress:
        task = progress.add_task("runs", total=len(jobs))
        with _pool(n_workers) as pool:
            verdicts = pool.map(run_job, jobs) if pool is not None else map(run_job, jobs)
            for verdict in verdicts:
                progress.advance(task)
                yield verdict


@contextmanager
def _pool(n_workers: int) -> Iterator[Executor | None]:
    if n_workers == 1:
        yield None
        return
    with ProcessPoolExecutor(n_workers) as pool:
        yield pool


def progress_bar() -> Progress:
    """Return a bar on standard error that is gone once it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=new_console(sys.stderr), transient=True, disable=not sys.stderr.isatty())


def _one_run(wanted: Wanted, path: Path, scenario: Scenario, job: Job, spec: PolicySpec | None) -> int:
    """Run one scenario once, with everything that can be shown of a single run."""
    with progress_bar() as progress, _log(wanted.trace) as write:
        task = progress.add_task(scenario.name, total=scenario.duration_ns)
        result = run_scenario(
            scenario,
            job.seed,
            build=_recorded(spec, write, job.seed)
            if write is not None
            else builder(spec)
            if spec is not None
            else None,
            policy=job.policy,
            keep_lines=wanted.explain is not None,
            audit=job.audit,
            on_progress=lambda now_ns: progress.update(task, completed=now_ns),
        )
    verdict = judge(summarise(result), scenario.expectations, str(path))
    if wanted.plot is not None:
        _plot(result, wanted.plot)
    if wanted.explain is not None:
        _explain(result, wanted.explain)
    elif wanted.as_json:
        click.echo(to_json([verdict]))
    else:
        print_run(verdict, new_console())
    return EXIT_FAILED if verdict.failures else EXIT_OK


def _recorded(spec: PolicySpec | None, write: Callable[[str], None], seed: int) -> Build:
    """Return what makes balancers of which every call is written down."""

    def build(config: Config, rng: Random, world: WorldView) -> LoadBalancer:
        balancer = spec.build(config, rng, world) if spec is not None else LoadBalancer(config, rng)
        return Recorder(balancer, write, seed=seed)

    return build


@contextmanager
def _log(path: Path | None) -> Iterator[Callable[[str], None] | None]:
    if path is None:
        yield None
        return
    try:
        file: IO[str] = path.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError([f"--trace: {path} cannot be written: {(error.strerror or str(error)).lower()}"]) from None
    with file:
        yield lambda line: _write(file, line)


def _write(file: IO[str], line: str) -> None:
    file.write(line)


def _plot(result: RunResult, path: Path) -> None:
    from simulator.reports.plots import PlotError  # noqa: PLC0415  only who wants pictures needs matplotlib
    from simulator.reports.run_plot import plot_run  # noqa: PLC0415

    try:
        plot_run(result, path)
    except PlotError as error:
        raise InputError([f"--plot: {error}"]) from None


def _explain(result: RunResult, request_id: int) -> None:
    try:
        click.echo("\n".join(explain(result, request_id)))
    except LookupError as error:
        raise InputError([f"--explain: {error.args[0]}"]) from None
