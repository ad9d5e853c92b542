"""What a scenario expects of its figures: `[expect]` tables, read and checked. Pure.

    [expect]
    completed = 1.0                        # a plain number: at least, where more is better (shares answered, health),
    failed = 0                             # at most, where less is better (errors, latencies, waste),
    requests = 200                         # and exactly, for what is only counted
    ttft_p99_ms = { max = 120 }            # or say which: max, min, or both
    [expect.servers.gpu2]
    attempts_pct = { max = 5 }

The names are those of `simulator.reports.figures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbcore.parsing import Keys, Problem, RefusedError, choice_fix, parse_value, unknown_key
from lbcore.schema import Kind, Setting, join
from simulator.reports.figures import FIGURES, SERVER_FIGURES, SERVERS, Better, Figure

_BOUNDS: Keys = (("", "min"), ("", "max"))


@dataclass(frozen=True, slots=True)
class Expectation:
    """Bounds of one figure, both inclusive; None: any value will do."""

    name: str
    low: float | None = None
    high: float | None = None


def parse_expect(
    raw: Any, problems: list[Problem], *, servers: Sequence[str] = (), key: str = "expect", also: Keys = ()
) -> tuple[Expectation, ...]:
    """Return the expectations of the table at `key`; append every problem found.

    `servers` are the names of the fleet; `also` the other keys of the file, which a misplaced one may mean.
    """
    if not isinstance(raw, Mapping):
        problems.append(Problem(key, raw, "is not a table", 'write its keys in a table, "[expect]"'))
        return ()
    known = (*((key, name) for name in FIGURES), (key, SERVERS), *also)
    plain = {name: value for name, value in raw.items() if name != SERVERS}
    found = _parse_figures(plain, key, FIGURES, "", problems, known)
    if SERVERS in raw:
        found += _parse_servers(raw[SERVERS], join(key, SERVERS), problems, servers)
    return tuple(found)


def _parse_servers(raw: Any, key: str, problems: list[Problem], servers: Sequence[str]) -> list[Expectation]:
    """Return what is expected of single servers."""
    if not isinstance(raw, Mapping):
        problems.append(Problem(key, raw, "is not a table", f'write "[{key}.NAME]"'))
        return []
    found: list[Expectation] = []
    for server, table in raw.items():
        path = join(key, server)
        if servers and server not in servers:
            problems.append(Problem(path, table, "is set, but there is no such server", choice_fix(server, servers)))
        elif not isinstance(table, Mapping):
            problems.append(Problem(path, table, "is not a table", f'write "[{path}]"'))
        else:
            known = tuple((path, name) for name in SERVER_FIGURES)
            prefix = join(SERVERS, server)
            found += _parse_figures(table, path, SERVER_FIGURES, prefix, problems, known)
    return found


def _parse_figures(
    raw: Mapping[str, Any], key: str, figures: Mapping[str, Figure], prefix: str, problems: list[Problem], known: Keys
) -> list[Expectation]:
    found: list[Expectation] = []
    for name, value in raw.items():
        if name not in figures:
            problems.append(unknown_key(key, name, value, known))
            continue
        before = len(problems)
        low, high = _parse_bounds(value, join(key, name), figures[name], problems)
        if len(problems) == before:
            found.append(Expectation(join(prefix, name), low, high))
    return found


def _parse_bounds(value: Any, key: str, figure: Figure, problems: list[Problem]) -> tuple[float | None, float | None]:
    """Return the lowest and highest value that will do."""
    if not isinstance(value, Mapping):
        number = _parse_number(value, key, figure, problems)
        if figure.better is Better.NEITHER and not figure.whole and number is not None:
            fix = f"write {{ min = {value} }} or {{ max = {value} }}"
            problems.append(Problem(key, value, "does not say whether less or more is expected", fix))
        return (None if figure.better is Better.LESS else number), (None if figure.better is Better.MORE else number)
    known = tuple((key, name) for _, name in _BOUNDS)
    problems.extend(unknown_key(key, name, value[name], known) for name in value if ("", name) not in _BOUNDS)
    if not value:
        problems.append(Problem(key, value, "says nothing", "write { min = ... } or { max = ... }"))
    low, high = (
        _parse_number(value[name], join(key, name), figure, problems) if name in value else None for _, name in _BOUNDS
    )
    if low is not None and high is not None and low > high:
        problems.append(Problem(join(key, "min"), value["min"], f"is more than {join(key, 'max')}", "write less"))
    return low, high


def _parse_number(value: Any, key: str, figure: Figure, problems: list[Problem]) -> float | None:
    """Return a number within the figure's range."""
    high = None if math.isinf(figure.high) else figure.high
    try:
        number: float = parse_value(Setting(Kind.RATIO, figure.words, 0.0, high), value)
    except RefusedError as error:
        unit = f" ({figure.unit})" if figure.unit else ""
        problems.append(Problem(key, value, error.message, f"{error.fix}{unit}"))
        return None
    return number


# --- checking --------------------------------------------------------------------------------------------------


def check(expectations: Sequence[Expectation], flat: Mapping[str, float]) -> list[str]:
    """Return what is not as expected, in words; [] when all is."""
    return [words for expectation in expectations if (words := _check(expectation, flat))]


def _check(wanted: Expectation, flat: Mapping[str, float]) -> str:
    value = flat.get(wanted.name, math.nan)
    low = -math.inf if wanted.low is None else wanted.low
    high = math.inf if wanted.high is None else wanted.high
    if low <= value <= high:
        return ""
    if low == high:
        must = f"must be {plain(low)}"
    elif value < low or math.isinf(high):
        must = f"must be at least {plain(low)}"
    else:
        must = f"must be at most {plain(high)}"
    if math.isnan(value):
        return f"{wanted.name} has no value, {must}"
    return f"{wanted.name} is {_shown(value, low, high)}, {must}"


def plain(value: float) -> str:
    """Return a number as short as it can be written exactly."""
    return str(int(value)) if value == int(value) else repr(value)


def _shown(value: float, low: float, high: float) -> str:
    """Return a value with as few decimals as still show that it is out of bounds."""
    for digits in range(1 if value >= 1 else 3, 7):
        text = f"{value:.{digits}f}"
        if not low <= float(text) <= high:
            return text.rstrip("0").rstrip(".")
    return repr(value)
