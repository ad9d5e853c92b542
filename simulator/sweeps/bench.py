"""`ollama-lb bench`: policies compared over scenarios, loads and seeds. `lbio.cli` declares the command."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from simulator.cli import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK, progress_bar
from simulator.inputs import InputError, toml_files
from simulator.reports.figures import SweepRow
from simulator.reports.sweep_report import print_sweep, sweep_csv, sweep_json
from simulator.sweep import Done, Job, Results, jobs_of, run_sweep, sweep_rows
from simulator.sweeps.bench_file import load_bench
from simulator.tables import new_console, printable

_SHOWN_MAX = 10
_DASK_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line asks for."""

    paths: tuple[Path, ...]
    results: Path | None = None
    csv: Path | None = None
    as_json: bool = False
    plot: Path | None = None  # what the names of the pictures begin with
    workers: int | None = None  # processes; None: one for each core
    dask: str = ""  # address of a scheduler; empty: this machine


def bench(wanted: Wanted) -> int:
    """Run what bench files ask for and print what came of it. Returns the exit status."""
    try:
        jobs = jobs_of(load_bench(toml_files(wanted.paths, "bench file")))
        _can_write(wanted.csv, "--csv")
        done = _run(jobs, wanted)
        rows = sweep_rows(jobs, done)
        wrong = _wrong(jobs, done)
        _show(rows, wrong, wanted)
    except InputError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        return EXIT_BAD_INPUT
    except BrokenExecutor as error:
        kept = f"; what had ended is in {wanted.results}" if wanted.results else ""
        click.echo(f"a worker died, as when memory is short: {error}{kept}", err=True)
        return EXIT_FAILED
    return EXIT_FAILED if wrong else EXIT_OK


def _can_write(path: Path | None, flag: str) -> None:
    """Refuse a path before hours are spent on what is to be written there."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InputError([f"{flag}: {path} cannot be written: name a file in a folder that exists"])


# --- running -----------------------------------------------------------------------------------------------------


def _run(jobs: Sequence[Job], wanted: Wanted) -> list[Done]:
    results = None if wanted.results is None else Results(wanted.results)
    known = {} if results is None else results.known
    for note in [] if results is None else results.notes:
        click.echo(note, err=True)
    n_missing = sum(job.key not in known for job in jobs)
    if n_missing < len(jobs):
        click.echo(f"{len(jobs) - n_missing:,} of {len(jobs):,} runs are known from {wanted.results}", err=True)
    with _executor(wanted, n_missing) as (executor, window), progress_bar() as progress:
        task = progress.add_task("runs", total=n_missing)

        def on_done(job: Job, done: Done) -> None:
            if results is not None:
                results.add(job, done)
            progress.update(task, advance=1, description=job.name)

        return run_sweep(jobs, executor, known=known, on_done=on_done, window=window)


@contextmanager
def _executor(wanted: Wanted, n_jobs: int) -> Iterator[tuple[Executor | None, int]]:
    """Give who runs the jobs (None: this process), and how many jobs to hand out at a time."""
    n_workers = min(wanted.workers or os.cpu_count() or 1, n_jobs)
    if wanted.dask and n_jobs:
        with _dask(wanted.dask) as found:
            yield found
    elif n_workers < 2:
        yield None, 1
    else:
        # fresh processes: a fork would take the thread of the progress bar by surprise
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(n_workers, context, _ignore_interrupts) as pool:
            yield pool, 4 * n_workers


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the process that handed out the work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _dask(address: str) -> Iterator[tuple[Executor, int]]:
    """Give the executor of a Dask cluster, whose workers must have the same version of this program."""
    try:
        distributed = importlib.import_module("distributed")
    except ImportError:
        fix = "pip install 'ollama-lb[dask]'"
        raise InputError([f"--dask: dask.distributed is not installed; {fix}"]) from None
    try:
        client: Any = distributed.Client(address, timeout=_DASK_TIMEOUT_S)
    except (OSError, ValueError) as error:
        fix = "write the address of a running scheduler, such as tcp://127.0.0.1:8786"
        raise InputError([f"--dask: {address} cannot be reached: {error}; {fix}"]) from None
    with client:
        n_threads = sum(client.nthreads().values())
        yield client.get_executor(), max(4, 4 * n_threads)


# --- showing -----------------------------------------------------------------------------------------------------


def _wrong(jobs: Sequence[Job], done: Sequence[Done]) -> list[str]:
    """Return every violation and error, with the run that it is of."""
    return [
        f"{job}: {words}"
        for job, of in zip(jobs, done, strict=True)
        for words in (*of.violations, *([of.error] if of.error else ()))
    ]


def _show(rows: Sequence[SweepRow], wrong: Sequence[str], wanted: Wanted) -> None:
    if wanted.csv is not None:
        try:
            wanted.csv.write_text(sweep_csv(rows), encoding="utf-8")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError([f"--csv: {wanted.csv} cannot be written: {reason}"]) from None
    if wanted.as_json:
        click.echo(sweep_json(rows, wrong))
    else:
        print_sweep(rows, new_console())
    for words in wrong[:_SHOWN_MAX]:
        click.echo(printable(words), err=True)
    if len(wrong) > _SHOWN_MAX:
        click.echo(f"... and {len(wrong) - _SHOWN_MAX:,} more; --json has them all", err=True)
    if wanted.plot is not None:
        _draw(rows, wanted.plot)


def _draw(rows: Sequence[SweepRow], prefix: Path) -> None:
    from simulator.reports.plots import PlotError, plot_pareto, plot_sweep  # noqa: PLC0415  only pictures need matplotlib

    suffix = prefix.suffix if prefix.suffix in {".png", ".svg", ".pdf"} else ".png"
    stem = prefix.with_suffix("") if prefix.suffix == suffix else prefix
    by_load, pareto = (stem.with_name(f"{stem.name}-{what}{suffix}") for what in ("load", "pareto"))
    loads: dict[str, set[float]] = {}
    for row in rows:
        loads.setdefault(row.scenario, set()).add(row.load)
    lines = [row for row in rows if len(loads[row.scenario]) > 1]  # a line needs two points
    try:
        plot_pareto(rows, pareto)
        if lines:
            plot_sweep(lines, by_load)
    except PlotError as error:
        raise InputError([f"--plot: {error}"]) from None
    why = f"{by_load}" if lines else f"not {by_load.name}, since each scenario has one load"
    click.echo(f"wrote {pareto}, {why}", err=True)
