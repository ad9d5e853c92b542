"""What `ollama-lb bench` compares: bench files, read from TOML with every problem found.

    about = "what it is to show"
    seeds = 10                                  # runs of each case, with the seeds 1 to 10

    [[sweep]]                                   # every scenario under every policy at every load
    scenarios = ["../scenarios/healthy.toml"]   # paths start from this file
    policies = ["race-budget", "oracle"]        # unless told: all of simulator.policies.known
    loads = [0.3, 0.85]                         # shares of what the fleet can do (simulator.sweeps.capacity)

The keys of a `[[sweep]]` may stand above as well, for all of them; a file without any `[[sweep]]` is one sweep.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lbcore.file_kind import FileKind, other_kind
from lbcore.parsing import ABSENT, Problem, RefusedError, choice_fix, parse_table, parse_value
from lbcore.schema import Kind, Setting, count, fields_of, join, setting
from simulator.inputs import InputError, parse_scenario_text, read_text
from simulator.policies.known import POLICIES
from simulator.sweeps.capacity import LoadError, offered_load
from simulator.workloads.traces import TraceError

_T = TypeVar("_T")

CONFIGURED = "configured"
"""As the scenario's own file has it, under no other policy."""
LOAD_MAX = 10.0
_SEEDS_MAX = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTable:
    """The plain keys of a `[[sweep]]`."""

    seeds: int = count("runs of each case", 5, low=1, high=_SEEDS_MAX)
    seed: int = count("of the first of them", 1)
    audit: bool = setting(Kind.FLAG, "check every invariant after every event, which takes its time", default=False)


@dataclass(frozen=True, slots=True)
class Case:
    """A scenario under a policy at a load, for some seeds."""

    name: str  # of the scenario
    path: Path
    text: str  # of its file
    policy: str
    load: float  # share of what the fleet can do
    factor: float  # of the scenario's own rates
    seeds: range
    audit: bool = False


_LISTS = ("scenarios", "policies", "loads")


def load_bench(paths: Iterable[Path]) -> list[Case]:
    """Return the cases of bench files, in their order. Raises InputError with every problem, by file and key."""
    cases: list[Case] = []
    wrong: list[str] = []
    for path in paths:
        problems: list[Problem] = []
        try:
            raw = tomllib.loads(read_text(path, "bench file"))
        except InputError as error:
            wrong += error.problems
            continue
        except (ValueError, RecursionError) as error:
            wrong.append(str(Problem(str(path), ABSENT, f"is not TOML: {error}", "write key = value")))
            continue
        if (problem := other_kind(raw, str(path), FileKind.BENCH)) is not None:
            wrong.append(str(problem))
            continue
        cases += _parse_bench(raw, path.parent, problems)
        wrong += [f"{path}: {problem}" for problem in problems]
    texts: dict[str, Case] = {}
    for case in cases:
        other = texts.setdefault(case.name, case)
        if other.text != case.text:
            wrong.append(f"{case.path}: has the name of another scenario, {other.path}; rename one of them")
    if wrong:
        raise InputError(dict.fromkeys(wrong))
    return cases


@dataclass(frozen=True, slots=True)
class _Sweep:
    """The keys of one table, those above it included."""

    table: SweepTable
    scenarios: tuple[tuple[Path, str, float], ...] = ()  # path, text and own load of each
    policies: tuple[str, ...] = tuple(POLICIES)
    loads: tuple[float | None, ...] = (None,)

    def cases(self) -> Iterator[Case]:
        """Yield what is to be run, the policies beside each other."""
        seeds = range(self.table.seed, self.table.seed + self.table.seeds)
        for path, text, own in self.scenarios:
            for load in self.loads:
                shown, factor = (round(own, 3), 1.0) if load is None else (load, load / own)
                for policy in self.policies:
                    yield Case(path.stem, path, text, policy, shown, factor, seeds, self.table.audit)


def _parse_bench(raw: Mapping[str, Any], folder: Path, problems: list[Problem]) -> list[Case]:
    if not isinstance(raw.get("about", ""), str):
        problems.append(Problem("about", raw["about"], "is not text", "write what it is to show, in quotes"))
    rest = {key: value for key, value in raw.items() if key not in {"about", "sweep"}}
    above = _parse_sweep(rest, "", folder, problems, _Sweep(SweepTable()))
    tables = raw.get("sweep", [{}])
    sweeps = []
    for index, table in enumerate(tables if isinstance(tables, list) else [tables]):
        key = f"sweep[{index}]" if "sweep" in raw else ""
        if not isinstance(table, Mapping):
            problems.append(Problem(key, table, "is not a table", "write [[sweep]] and its keys below"))
            continue
        if "scenarios" not in {**rest, **table}:
            problems.append(Problem(join(key, "scenarios"), ABSENT, "is missing", "name at least one scenario file"))
        sweeps.append(_parse_sweep(table, key, folder, problems, above))
    return [case for sweep in sweeps for case in sweep.cases()]


def _parse_sweep(raw: Mapping[str, Any], key: str, folder: Path, problems: list[Problem], above: _Sweep) -> _Sweep:
    plain = {name: value for name, value in raw.items() if name not in _LISTS}
    also = tuple((key, name) for name in (*_LISTS, *(() if key else ("about", "sweep"))))
    table = parse_table(SweepTable, plain, key, problems, also=also)
    given = {field.name: getattr(table, field.name) for field in fields_of(SweepTable) if field.key in plain}
    policies = _list(raw, key, "policies", problems, _policy)
    loads = _list(raw, key, "loads", problems, _load)
    paths = _list(raw, key, "scenarios", problems, _path)
    read = (_scenario(folder / path, join(key, "scenarios"), path, problems) for path in paths or ())
    return _Sweep(
        replace(above.table, **given),
        above.scenarios if paths is None else tuple(found for found in read if found is not None),
        above.policies if policies is None else policies,
        above.loads if loads is None else loads,
    )


def _scenario(path: Path, key: str, given: str, problems: list[Problem]) -> tuple[Path, str, float] | None:
    try:
        text = read_text(path)
        return path, text, offered_load(parse_scenario_text(text, path))
    except InputError as error:
        problems += [Problem(key, given, f"cannot be run: {words}") for words in error.problems]
    except (LoadError, TraceError) as error:
        problems.append(Problem(key, given, str(error), "name a scenario with a steady workload"))
    return None


def _list(
    raw: Mapping[str, Any], key: str, name: str, problems: list[Problem], parse: Callable[[Any], _T]
) -> tuple[_T, ...] | None:
    """Return the values of a list, each once; None when it is not there."""
    if name not in raw:
        return None
    values, path = raw[name], join(key, name)
    if not isinstance(values, list) or not values:
        problems.append(Problem(path, values, "is not a list of anything", "write [...] with at least one value"))
        return ()
    found: list[_T] = []
    for index, value in enumerate(values):
        try:
            found.append(parse(value))
        except RefusedError as error:
            problems.append(Problem(f"{path}[{index}]", value, error.message, error.fix))
    return tuple(dict.fromkeys(found))


def _policy(value: Any) -> str:
    names = (*POLICIES, CONFIGURED)
    if value not in names:
        raise RefusedError("is no policy", choice_fix(value, names))
    return str(value)


def _load(value: Any) -> float:
    number: float = parse_value(Setting(Kind.RATIO, "", 0.001, LOAD_MAX), value)
    return number


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RefusedError("is not a path", "write the path of a scenario file in quotes")
    return value
