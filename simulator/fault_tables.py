"""`[[fault]]` tables, and those of `[[fleet]]`, into faults of servers, links and the balancer. Pure.

What each kind of fault may say is in `TABLES`. Every problem is found; a fault that could never be on is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lbcore.parsing import ABSENT, Keys, Problem, choice_fix, parse_table, show
from lbcore.schema import MS_NS, SECOND_NS, count, duration, fields_of, join, keys_of, ratio
from lbcore.units import format_duration
from simulator.faults import BREAKS, Fault, FaultKind
from simulator.network import LinkFault, LinkFaultKind

# schema functions declare fields; they do not make shared mutable values

PAUSE = "pause"
"""The kind of fault that hits the balancer itself: its machine is suspended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultTable:
    """What a fault of any kind may say beside its `kind`."""

    from_ns: int | None = duration("since the start, when it begins", None)
    until_ns: int | None = duration("since the start, when it ends", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowTable(FaultTable):
    """Slowness."""

    factor: float = ratio("how many times slower", 20.0, low=0.001, high=1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakTable(FaultTable):
    """A stream that breaks."""

    after_tokens: int = count("tokens sent before it breaks", 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlapTable(FaultTable):
    """Down and up by turns."""

    period_ns: int = duration("how often it goes down", 2 * SECOND_NS, low=MS_NS)
    up_ns: int = duration("how long it is up in each period", SECOND_NS)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable(FaultTable):
    """A longer way."""

    latency_ns: int = duration("how much more, one way", 50 * MS_NS)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTable(FaultTable):
    """A bad line."""

    loss: float = ratio("share of the messages that are sent again", 0.1, high=0.9)


TABLES: Mapping[str, type[FaultTable]] = {
    **dict.fromkeys((*FaultKind, *LinkFaultKind, PAUSE), FaultTable),
    **dict.fromkeys(sorted(BREAKS), BreakTable),
    FaultKind.SLOW: SlowTable,
    FaultKind.CRAWL: SlowTable,
    FaultKind.FLAP: FlapTable,
    LinkFaultKind.LATENCY: LatencyTable,
    LinkFaultKind.LOSS: LossTable,
}
"""What each kind may say."""

_OF_KINDS: Mapping[str, tuple[str, ...]] = {
    name: tuple(kind for kind, table in TABLES.items() if ("", name) in keys_of(table))
    for name in dict.fromkeys(field.key for table in TABLES.values() for field in fields_of(table))
}
"""The kinds that each key is of."""


def fault_keys(key: str) -> Keys:
    """Return every key that a fault may have: what a misspelt or misplaced one may mean."""
    return tuple((key, name) for name in ("kind", *_OF_KINDS))


# --- one table ---------------------------------------------------------------------------------------------------


def parse_server_faults(raw: Any, key: str, problems: list[Problem], *, end_ns: int | None = None) -> tuple[Fault, ...]:
    """Return the faults of one server: one table, or a list of them. `end_ns` is when the run ends, if it does."""
    tables = [(f"{key}[{i}]", table) for i, table in enumerate(raw)] if isinstance(raw, list) else [(key, raw)]
    read = (_parse_fault(table, path, problems, tuple(FaultKind), end_ns) for path, table in tables)
    return tuple(_server_fault(*found) for found in read if found is not None)


def _parse_fault(
    raw: Any, key: str, problems: list[Problem], kinds: Sequence[str], end_ns: int | None, also: Sequence[str] = ()
) -> tuple[str, FaultTable] | None:
    """Return the kind of a fault and what is said of it; None when it cannot be used."""
    if not isinstance(raw, Mapping):
        problems.append(Problem(key, raw, "is not a table", "write its keys in a table of their own"))
        return None
    kind = raw.get("kind", ABSENT)
    if kind not in kinds:
        message = "is missing; it says what goes wrong" if kind is ABSENT else "is not one of the choices"
        problems.append(Problem(join(key, "kind"), kind, message, choice_fix(kind, kinds)))
        return None
    of_others = [name for name, of in _OF_KINDS.items() if name in raw and kind not in of]
    problems += [
        Problem(join(key, name), raw[name], f"means nothing to {kind}", f"it is of {_listed(_OF_KINDS[name])}")
        for name in of_others
    ]
    rest = {name: value for name, value in raw.items() if name not in {"kind", *also, *of_others}}
    before = len(problems)
    table = parse_table(TABLES[kind], rest, key, problems, also=tuple((key, name) for name in ("kind", *also)))
    if table is None or len(problems) > before:
        return None
    if isinstance(table, FlapTable) and table.up_ns > table.period_ns:
        written = raw.get("up", "1s")
        problems.append(Problem(join(key, "up"), written, f"is more than {join(key, 'period')}", "write less"))
    _refuse_never(table, raw, key, end_ns, problems)
    return (str(kind), table) if len(problems) == before else None


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _refuse_never(
    table: FaultTable, raw: Mapping[str, Any], key: str, end_ns: int | None, problems: list[Problem]
) -> None:
    """Refuse a fault that would never be on, so that nobody trusts a run without it."""
    from_ns = table.from_ns or 0
    if end_ns is not None and from_ns >= end_ns:
        fix = f"write less than {format_duration(end_ns)}, or a longer duration"
        problems.append(Problem(join(key, "from"), raw["from"], "is not before the end of the run", fix))
    elif table.until_ns is not None and table.until_ns <= from_ns:
        begins = f"{join(key, 'from')}, which is {show(raw['from'])}" if "from" in raw else "the start"
        problems.append(Problem(join(key, "until"), raw["until"], f"is not after {begins}", "write more"))


def _server_fault(kind: str, table: FaultTable) -> Fault:
    values = {field.name: getattr(table, field.name) for field in fields_of(type(table))}
    return Fault(FaultKind(kind), **{_in_seconds(name): _seconds(name, value) for name, value in values.items()})


def _in_seconds(name: str) -> str:
    return f"{name.removesuffix('_ns')}_s" if name.endswith("_ns") else name


def _seconds(name: str, value: Any) -> Any:
    return value / SECOND_NS if name.endswith("_ns") and value is not None else value


# --- those of a scenario -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Faults:
    """All `[[fault]]` tables of a scenario."""

    servers: dict[str, list[Fault]] = field(default_factory=dict)  # by the server's name
    links: dict[str, list[LinkFault]] = field(default_factory=dict)
    pauses: list[tuple[int, int]] = field(default_factory=list)  # of the balancer: from, until


def parse_faults(raw: Any, names: Sequence[str], end_ns: int | None, problems: list[Problem]) -> Faults:
    """Return what goes wrong with servers, links and the balancer; append every problem found.

    `names` are the servers; none when these are not known, and then nobody is said not to be among them. `end_ns` is
    when the run ends; None when that is not known.
    """
    found = Faults({name: [] for name in names}, {name: [] for name in names})
    for index, table in enumerate(raw if isinstance(raw, list) else [raw]):
        _add_fault(found, table, f"fault[{index}]" if isinstance(raw, list) else "fault", end_ns, problems)
    return found


def _add_fault(found: Faults, raw: Any, key: str, end_ns: int | None, problems: list[Problem]) -> None:
    parsed = _parse_fault(raw, key, problems, tuple(TABLES), end_ns, also=("servers",))
    given = raw.get("servers") if isinstance(raw, Mapping) else None
    if isinstance(raw, Mapping) and raw.get("kind") == PAUSE:
        if given is not None:
            problems.append(Problem(join(key, "servers"), given, f"means nothing to {PAUSE}", "it is of the balancer"))
        names = []
    else:
        names = _names(given, join(key, "servers"), list(found.servers), problems)
    if parsed is None:
        return
    kind, table = parsed
    from_ns, until_ns = table.from_ns or 0, table.until_ns if table.until_ns is not None else end_ns or 0
    if kind == PAUSE:
        found.pauses.append((from_ns, until_ns))
    elif kind in list(LinkFaultKind):
        latency_ns = table.latency_ns if isinstance(table, LatencyTable) else 0
        loss = table.loss if isinstance(table, LossTable) else 0.0
        for name in names:
            found.links[name].append(LinkFault(LinkFaultKind(kind), from_ns, until_ns, latency_ns, loss))
    else:
        for name in names:
            found.servers[name].append(_server_fault(kind, table))


def _names(raw: Any, key: str, known: Sequence[str], problems: list[Problem]) -> list[str]:
    """Return the servers that a fault is of: all of them unless it says which."""
    if raw is None or raw == "all":
        return list(known)
    if not isinstance(raw, list) or not all(isinstance(name, str) for name in raw):
        problems.append(Problem(key, raw, "is not a list of servers", 'write ["one", "two"], or "all"'))
        return []
    unknown = [name for name in raw if name not in known] if known else []
    problems += [Problem(key, name, "is not a server of the fleet", choice_fix(name, known)) for name in unknown]
    return [name for name in raw if name in known]
