"""What clients do in a run: `[workload]` tables into settings, with every problem found.

Several `[[workload]]` tables are merged by time. The keys of each kind are in `simulator.workloads.tables`;
`make_source` makes the asks. Pure but for a look at the first line of a trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbcore.parsing import ABSENT, Keys, Problem, parse_table
from lbcore.schema import SECOND_NS, join, ratio
from simulator.fleet import DEFAULT_MODEL
from simulator.workloads.arrivals import Arrivals, Even, Gamma, Herd, Mmpp, Poisson
from simulator.workloads.lengths import (
    WAIT_MAX_NS,
    Amount,
    Mix,
    exponential,
    fixed,
    lognormal,
    mix_of,
    parse_times,
    parse_tokens,
    parse_weights,
)
from simulator.workloads.sources import (
    Leave,
    OpenLoop,
    Sessions,
    Settings,
    Trace,
    Traits,
    Workload,
    make_source,
    models_of,
    scaled,
)
from simulator.workloads.tables import (
    LISTS,
    TABLES,
    CommonTable,
    EvenTable,
    GammaTable,
    HerdTable,
    MmppTable,
    OpenTable,
    PoissonTable,
    TraceFormat,
    WorkloadKind,
)
from simulator.workloads.traces import TraceError, format_of

__all__ = ["Workload", "make_source", "models_of", "parse_workload", "scaled"]

DEFAULT_PROMPT = lognormal(1020, 4083, 1, 131_072)
DEFAULT_OUTPUT = lognormal(129, 451, 1, 131_072)
"""Median and p95 of the Azure 2023 conversation trace."""


@dataclass(slots=True)
class _Reading:
    """One table on its way."""

    raw: Any
    key: str
    problems: list[Problem]
    folder: Path
    duration_ns: int | None  # of the run: when nothing else ends a workload


def parse_workload(
    raw: Any, problems: list[Problem], *, folder: Path | None = None, duration_ns: int | None = None
) -> Workload:
    """Return what `[workload]`, or every `[[workload]]`, says; append every problem found.

    `folder` is where paths of traces start from; `duration_ns` ends a workload that says neither `requests` nor
    `duration`. The result is complete only if no problem was found.
    """
    tables = raw if isinstance(raw, list) else [raw]
    keys = [f"workload[{index}]" for index in range(len(tables))] if isinstance(raw, list) else ["workload"]
    if not tables:
        problems.append(Problem("workload", raw, "is empty", "write a [workload] table"))
    found = [
        _parse_one(_Reading(table, key, problems, folder or Path(), duration_ns))
        for table, key in zip(tables, keys, strict=True)
    ]
    return tuple(settings for settings in found if settings is not None)


def _parse_one(at: _Reading) -> Settings | None:
    kind = _kind_of(at)
    if kind is None:
        return None
    names = LISTS[kind]
    table = parse_table(
        TABLES[kind],
        {name: value for name, value in at.raw.items() if name not in names},
        at.key,
        at.problems,
        also=_other_keys(at.key, kind),
    )
    traits = _traits(at, table)
    if kind is WorkloadKind.TRACE:
        return _trace(at, table, traits)
    if kind is WorkloadKind.SESSIONS:
        return _sessions(at, table, traits)
    return _open_loop(at, table, traits)


def _other_keys(key: str, kind: WorkloadKind) -> Keys:
    """Return what a misspelt key may mean beside the plain ones."""
    tables = (("leave", "share"), ("leave", "after"))
    return (*((key, name) for name in LISTS[kind]), *((join(key, table), name) for table, name in tables))


def _kind_of(at: _Reading) -> WorkloadKind | None:
    if not isinstance(at.raw, Mapping):
        at.problems.append(Problem(at.key, at.raw, "is not a table", "write its keys in a table of their own"))
        return None
    only_kind = {"kind": at.raw["kind"]} if "kind" in at.raw else {}
    table = parse_table(CommonTable, only_kind, at.key, at.problems)
    return None if table is None else table.kind


def _traits(at: _Reading, table: CommonTable | None) -> Traits:
    models, num_ctx, leave = _models(at), _num_ctx(at), _leave(at)
    if table is None:
        return Traits(models, num_ctx, leave=leave)
    return Traits(models, num_ctx, str(table.route), table.stream, table.poison, leave)


def _models(at: _Reading) -> Mix[str] | None:
    raw, key = at.raw.get("models", ABSENT), join(at.key, "models")
    if raw is ABSENT:
        return None
    if isinstance(raw, Mapping):
        weights = parse_weights(raw, key, at.problems)
        return mix_of(weights) if weights else None
    if not isinstance(raw, str) or not raw:
        fix = f'write "{DEFAULT_MODEL}", or weights: {{ "{DEFAULT_MODEL}" = 0.8, "qwen2.5:0.5b" = 0.2 }}'
        at.problems.append(Problem(key, raw, "is not the name of a model", fix))
        return None
    return mix_of({raw: 1.0})


def _num_ctx(at: _Reading) -> Mix[int | None] | None:
    raw, key = at.raw.get("num_ctx", ABSENT), join(at.key, "num_ctx")
    if raw is ABSENT:
        return None
    if not isinstance(raw, Mapping):
        amount = parse_tokens(raw, key, at.problems)
        return None if amount is None else mix_of({amount.at(0.0): 1.0})
    weights = parse_weights(raw, key, at.problems)
    bad = [name for name in raw if name != "default" and not (name.isascii() and name.isdigit() and len(name) < 8)]
    at.problems.extend(
        Problem(
            join(key, name),
            raw[name],
            "is not the weight of a number of tokens",
            "write weights such as { default = 0.9, 8192 = 0.1 }",
        )
        for name in bad
    )
    if weights is None or bad:
        return None
    return mix_of({None if name == "default" else int(name): weight for name, weight in weights.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class _LeaveTable:
    share: float = ratio("share of clients that leave when their answer takes too long", 1.0, high=1.0)


def _leave(at: _Reading) -> Leave | None:
    raw, key = at.raw.get("leave", ABSENT), join(at.key, "leave")
    if raw is ABSENT:
        return None
    plain = {name: value for name, value in raw.items() if name != "after"} if isinstance(raw, Mapping) else raw
    table = parse_table(_LeaveTable, plain, key, at.problems, also=((key, "after"),))
    if not isinstance(raw, Mapping):
        return None
    if "after" not in raw:
        at.problems.append(Problem(join(key, "after"), ABSENT, "is missing", "it says how long a client waits"))
        return None
    after = parse_times(raw["after"], join(key, "after"), at.problems)
    return None if table is None or after is None else Leave(table.share, after)


def _tokens(at: _Reading, name: str, default: Amount) -> Amount:
    found = parse_tokens(at.raw[name], join(at.key, name), at.problems) if name in at.raw else default
    return found or default


def _must_end(at: _Reading, requests: int | None, duration_ns: int | None) -> int | None:
    """Return when a workload ends, since its start; None: by its number of requests."""
    if not at.raw.keys() & {"requests", "duration"} and at.duration_ns is None:
        at.problems.append(Problem(at.key, at.raw, "never ends", 'write requests = 1000 or duration = "10m"'))
    return at.duration_ns if requests is None and duration_ns is None else duration_ns


def _open_loop(at: _Reading, table: Any, traits: Traits) -> OpenLoop | None:
    prompt = _tokens(at, "prompt_tokens", DEFAULT_PROMPT)
    output = _tokens(at, "output_tokens", DEFAULT_OUTPUT)
    if table is None:
        return None
    if isinstance(table, HerdTable):
        return OpenLoop(traits, Herd(), prompt, output, table.at_ns, table.requests)
    ends_ns = _must_end(at, table.requests, table.duration_ns)
    return OpenLoop(traits, _arrivals(table), prompt, output, table.start_ns, table.requests, ends_ns)


def _arrivals(table: OpenTable) -> Arrivals:
    match table:
        case PoissonTable():
            return Poisson(table.rate)
        case GammaTable():
            return Gamma(table.rate, table.cv)
        case MmppTable():
            return Mmpp(table.rate_low, table.rate_high, table.dwell_low_ns, table.dwell_high_ns)
        case EvenTable():
            return Even(table.rate)
    raise TypeError(table)


def _sessions(at: _Reading, table: Any, traits: Traits) -> Sessions | None:
    prompt = _tokens(at, "prompt_tokens", DEFAULT_PROMPT)
    output = _tokens(at, "output_tokens", DEFAULT_OUTPUT)
    new = _tokens(at, "new_tokens", prompt)
    turns = _tokens(at, "turns", fixed(5))
    think = parse_times(at.raw.get("think", {"mean": "10s"}), join(at.key, "think"), at.problems)
    if table is None:
        return None
    if ("users" in at.raw) == ("rate" in at.raw):
        message = "says both users and rate" if "users" in at.raw else "says neither users nor rate"
        at.problems.append(Problem(at.key, at.raw, message, "write users = 20, or rate = 0.5 sessions per s"))
    ends_ns = _must_end(at, table.requests, table.duration_ns)
    return Sessions(
        traits,
        prompt,
        new,
        output,
        turns,
        think or exponential(10 * SECOND_NS, 0, WAIT_MAX_NS),
        table.users,
        table.rate,
        table.prompt_max,
        table.start_ns,
        table.requests,
        ends_ns,
    )


def _trace(at: _Reading, table: Any, traits: Traits) -> Trace | None:
    rename = _rename(at)
    if table is None:
        return None
    path = at.folder / table.path
    name = "" if table.format is TraceFormat.ANY else str(table.format)
    try:
        format_of(path, name)
    except TraceError as error:
        place = f"(line {error.line}{error.column and f', column {error.column}'}) " if error.line else ""
        at.problems.append(Problem(join(at.key, "path"), table.path, place + error.message, error.fix))
    return Trace(
        traits,
        path,
        name,
        rename,
        table.start_ns,
        table.duration_ns,
        table.speed,
        table.limit,
        table.repeat,
        table.sort,
    )


def _rename(at: _Reading) -> tuple[tuple[str, str], ...]:
    raw = at.raw.get("rename", {})
    if not isinstance(raw, Mapping) or not all(isinstance(name, str) and name for name in raw.values()):
        fix = f'write {{ "ChatGPT" = "{DEFAULT_MODEL}" }}'
        at.problems.append(Problem(join(at.key, "rename"), raw, "is not a table of model names", fix))
        return ()
    return tuple(raw.items())
