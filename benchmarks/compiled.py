"""The core compiled by mypyc (setup.py), beside plain Python: whether both decide the same, byte for byte.

    python -m benchmarks.compiled            compile the core as it stands, if need be, and compare
    python -m benchmarks.core --compiled     how many events a second each decides

It is compiled in a directory of its own, so that nothing else runs on it, and kept until the core changes. Compared are
all commands of a day's work in small (`benchmarks.core`) and the state after it, and all that comes of some random
scenarios.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from benchmarks.kit import RESULTS
from lbcore.compiled import is_compiled

ROOT = Path(__file__).parent.parent
BUILDS = RESULTS / ".compiled"
N_CALLS = 20_000
N_SCENARIOS = 20
_FLEETS = (4, 100, 1000)
_STATE_EVERY = 2_000
_SHOWN_BEFORE = 100


class CannotCompileError(Exception):
    """There is no compiler, or it has failed; says why."""


# --- the two cores -----------------------------------------------------------------------------------------------


def _sources() -> list[Path]:
    return [ROOT / "setup.py", *sorted((ROOT / "lbcore").glob("*.py*"))]


def _key() -> str:
    """Return what a build depends on, in short."""
    told = hashlib.sha256(f"{sys.version} {importlib.metadata.version('mypy')}".encode())
    for path in _sources():
        told.update(path.name.encode() + b"\0" + path.read_bytes())
    return told.hexdigest()[:16]


def why_not() -> str:
    """Return what is missing for a build; "" if nothing is."""
    for package in ("mypy", "setuptools"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed"
    compiler = os.environ.get("CC", "").split()[:1] or ["cc"]
    return "" if os.name == "nt" or shutil.which(compiler[0]) else f"there is no C compiler ({compiler[0]})"


def found() -> Path | None:
    """Return the directory in which the core as it stands is compiled already; None if it is not."""
    path = BUILDS / _key() if not why_not() else None
    return path if path is not None and path.is_dir() else None


def build() -> Path:
    """Compile the core, if that was not done before, and return the directory. Raises CannotCompileError."""
    if reason := why_not():
        raise CannotCompileError(reason)
    if (known := found()) is not None:
        return known
    BUILDS.mkdir(parents=True, exist_ok=True)
    print("compiling the core: this takes a minute or two …", file=sys.stderr, flush=True)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=BUILDS) as made:
        work = _copied(Path(made))
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        environment = {**os.environ, "OLLAMA_LB_COMPILE": "1", "PYTHONPATH": ""}
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotCompileError(f"the compiler says:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        shutil.rmtree(work / "build")
        for old in BUILDS.iterdir():
            if old != work and len(old.name) == len(_key()):
                shutil.rmtree(old, ignore_errors=True)
        work.rename(BUILDS / _key())
        work.mkdir()  # for who wants to remove it
    print(f"compiled in {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
    return BUILDS / _key()


def _copied(to: Path) -> Path:
    (to / "lbcore").mkdir()
    for path in _sources():
        shutil.copy(path, to / path.relative_to(ROOT))
    return to


def environment(core: Path | None) -> dict[str, str]:
    """Return the variables with which `python -P` takes the core from a directory, and all else from here.

    None: the plain core of this checkout, unless that was compiled in its place: then a copy of its sources.
    """
    if core is None and is_compiled():
        core = BUILDS / "plain"
        shutil.rmtree(core, ignore_errors=True)
        core.mkdir(parents=True)
        _copied(core)
    first = [] if core is None else [str(core)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*first, str(ROOT)])}


# --- whether they are the same -----------------------------------------------------------------------------------


def tell(n_calls: int, n_scenarios: int) -> Iterator[str]:
    """Yield all that the core at hand decides, in lines; the first says which core it is."""
    from benchmarks.core import Recorder, new_balancer  # noqa: PLC0415  the other process has no use for them
    from lbcore.snapshot import take  # noqa: PLC0415
    from simulator.sweeps.swarm import run_tables, swarm_scenario  # noqa: PLC0415

    yield "compiled" if is_compiled() else "plain"
    for n_servers in _FLEETS:
        balancer = new_balancer(n_servers)
        for n, (event, now_ns) in enumerate(Recorder(n_servers).record(n_calls)):
            commands = balancer.handle_timeout(now_ns) if event is None else balancer.handle(event, now_ns)
            yield f"{now_ns} {event} {commands} {balancer.next_deadline()}"
            if n % _STATE_EVERY == 0:
                yield json.dumps(take(balancer))
        yield json.dumps(take(balancer))
    for seed in range(1, n_scenarios + 1):
        result = run_tables(swarm_scenario(seed), f"seed {seed}", keep_lines=True)
        yield from map(repr, result.lines)
        yield f"seed {seed}: {result}"


def difference(core: Path, n_calls: int = N_CALLS, n_scenarios: int = N_SCENARIOS) -> tuple[int, str]:
    """Return how many lines both cores have told alike, and the first that differs in words; "" if none does."""
    command = [sys.executable, "-P", "-m", "benchmarks.compiled", "--tell", str(n_calls), str(n_scenarios)]

    def start(where: Path | None) -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=environment(where), stdout=subprocess.PIPE, text=True)

    with start(None) as plain, start(core) as compiled:
        if plain.stdout is None or compiled.stdout is None:
            raise RuntimeError("the cores have no pipes")
        kinds = plain.stdout.readline(), compiled.stdout.readline()
        if kinds != ("plain\n", "compiled\n"):
            raise RuntimeError(f"these are not the two cores: {kinds}")
        n_lines = 0
        for n_lines, (one, other) in enumerate(zip_longest(plain.stdout, compiled.stdout, fillvalue="nothing"), 1):
            if one != other:
                plain.kill()
                compiled.kill()
                return n_lines - 1, first_difference(one, other)
    if plain.returncode or compiled.returncode:
        raise RuntimeError(f"the cores ended with {plain.returncode} and {compiled.returncode}")
    return n_lines, ""


def first_difference(one: str, other: str) -> str:
    """Return where two lines differ, and what stands there."""
    alike = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
    at = max(0, alike - _SHOWN_BEFORE)
    plain, compiled = (line[at : at + 4 * _SHOWN_BEFORE].strip() for line in (one, other))
    return f"at character {at} of a line:\n  plain:    {plain}\n  compiled: {compiled}"


def main(argv: list[str] | None = None) -> int:
    """Compare; 1 when something differs, 2 when there is no compiled core."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tell", nargs=2, type=int, help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    if args.tell:
        for line in tell(*args.tell):
            print(line)
        return 0
    try:
        core = build()
    except CannotCompileError as error:
        print(error, file=sys.stderr)
        return 2
    n_lines, words = difference(core)
    if words:
        words = f"after {n_lines:,} lines that are the same, they differ {words}"
    print(words or f"both cores tell the same, byte for byte: {n_lines:,} lines")
    return 1 if words else 0


if __name__ == "__main__":
    sys.exit(main())
