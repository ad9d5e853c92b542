"""Many short runs of scenarios drawn at random, every invariant and promise checked after every step.

The seed of a run says all of it: `ollama-lb simulate --swarm 1 --seed 12345` is the same run on any machine.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import click
import tomli_w
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lbcore.parsing import Problem
from simulator.reports.results import RunResult
from simulator.scenario import Scenario, parse_scenario, run_scenario
from simulator.sweeps.dice import SeededDice, Tables, draw_scenario
from simulator.tables import new_console

_CHUNK = 8  # runs that a process is given at a time
_SHOWN_MAX = 3  # violations of one run


@dataclass(frozen=True, slots=True)
class SwarmRun:
    """What came of one seed. `violations` are in words; empty when all is well."""

    seed: int
    violations: tuple[str, ...]
    n_requests: int
    n_attempts: int
    n_events: int
    cpu_s: float


def swarm_scenario(seed: int) -> Tables:
    """Return the scenario of a seed, as the tables of a file. It carries the seed, so the file alone is the run."""
    return {"about": f"swarm {seed}", **draw_scenario(SeededDice(seed)), "seed": seed}


def parse_tables(tables: Tables, name: str) -> Scenario:
    """Return the scenario that drawn tables describe. Raises ValueError: what is drawn must be sound."""
    problems: list[Problem] = []
    scenario = parse_scenario(tables, name, problems)
    if scenario is None:
        raise ValueError("; ".join(map(str, problems)))
    return scenario


def run_tables(tables: Tables, name: str, *, keep_lines: bool = False) -> RunResult:
    """Run drawn tables with everything checked."""
    return run_scenario(parse_tables(tables, name), audit=True, keep_lines=keep_lines)


def run_seed(seed: int) -> SwarmRun:
    """Run one seed. An exception is a violation too: neither the core nor its world may raise any."""
    began_s = process_time()
    try:
        result = run_tables(swarm_scenario(seed), f"swarm-{seed}")
    except Exception as error:  # noqa: BLE001  whatever it is, the seed that does it is what counts
        where = traceback.format_exception_only(error)[-1].strip()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        crash = f"raised {where} ({Path(frame.filename).name}:{frame.lineno})"
        return SwarmRun(seed, (crash,), 0, 0, 0, process_time() - began_s)
    return SwarmRun(
        seed,
        tuple(result.violations),
        len(result.requests),
        len(result.attempts),
        result.n_events,
        process_time() - began_s,
    )


def run_swarm(seeds: Sequence[int], workers: int | None = None) -> Iterator[SwarmRun]:
    """Yield what came of each seed, in their order, whatever the number of processes (None: one for each core)."""
    n_workers = min(workers or os.cpu_count() or 1, max(1, len(seeds) // _CHUNK))
    if n_workers == 1:
        yield from map(run_seed, seeds)
        return
    with ProcessPoolExecutor(n_workers) as pool:
        yield from pool.map(run_seed, seeds, chunksize=_CHUNK)


# --- the command line ----------------------------------------------------------------------------------------------


def reproduce(seed: int) -> str:
    """Return the command that does the run of a seed again."""
    return f"ollama-lb simulate --swarm 1 --seed {seed}"


def as_file(seed: int) -> str:
    """Return the scenario of a seed as a TOML file."""
    return f"# {reproduce(seed)}\n{tomli_w.dumps(swarm_scenario(seed))}"


def swarm(n_runs: int, first_seed: int, *, save: Path | None = None, workers: int | None = None) -> int:
    """Run seeds from `first_seed` on, tell of every violation, and return the exit status."""
    console = new_console()
    runs: list[SwarmRun] = []
    n_bad = 0
    with _progress() as progress:
        task = progress.add_task("runs", total=n_runs)
        for run in run_swarm(range(first_seed, first_seed + n_runs), workers):
            progress.advance(task)
            runs.append(run)
            if run.violations:
                n_bad += 1
                _tell(run, save)
    requests, attempts, events = (sum(getattr(r, n) for r in runs) for n in ("n_requests", "n_attempts", "n_events"))
    bad = f"{n_bad or 'no'} run{'' if n_bad == 1 else 's'} with a violation"
    cpu_s = sum(run.cpu_s for run in runs)
    console.print(
        f"{n_runs} runs, {requests} requests, {attempts} attempts, {events} events: {bad}; {cpu_s:.1f} CPU seconds",
        highlight=False,
        soft_wrap=True,
    )
    return 1 if n_bad else 0


def _tell(run: SwarmRun, save: Path | None) -> None:
    click.echo(f"seed {run.seed}: {reproduce(run.seed)}")
    for violation in run.violations[:_SHOWN_MAX]:
        click.echo(f"  {violation}")
    if len(run.violations) > _SHOWN_MAX:
        click.echo(f"  and {len(run.violations) - _SHOWN_MAX} more")
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        path = save / f"swarm-{run.seed}.toml"
        path.write_text(as_file(run.seed), encoding="utf-8")
        click.echo(f"  written to {path}")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=new_console(sys.stderr), transient=True, disable=not sys.stderr.isatty())
