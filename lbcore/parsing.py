"""TOML tables into settings dataclasses, by the tables of `lbcore.schema`.

Every problem is found, not just the first, and says how to write it right.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, TypeVar

from lbcore.schema import (
    SECOND_NS,
    UNIT_NAMES,
    Field,
    Kind,
    Setting,
    describe_range,
    fields_of,
    join,
    keys_of,
)
from lbcore.units import UnitError, parse_duration, parse_size

_T = TypeVar("_T")

Keys = Sequence[tuple[str, str]]
"""Keys that exist, as (table, name): what a misspelt one may mean."""

ABSENT: Any = type("Absent", (), {"__repr__": lambda _: "ABSENT"})()
"""The value of a problem that is about no value: a missing key, an unreadable file."""


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the settings: where, what, and how to write it right."""

    key: str
    value: Any
    message: str
    fix: str = ""

    def __str__(self) -> str:
        """Return one line, fit for a terminal."""
        shown = "" if self.value is ABSENT else f"{show(self.value)} "
        return f"{self.key}: {shown}{self.message}" + (f"; {self.fix}" if self.fix else "")


class RefusedError(ValueError):
    """A value cannot be taken; becomes a `Problem` where its key is known."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix


_SHOWN_MAX = 80


def quote(text: str) -> str:
    """Return `text` in double quotes, on one line, safe for any terminal."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def show(value: Any) -> str:
    """Return `value` in one short line as TOML would write it."""
    if isinstance(value, Mapping):
        return "{...}" if value else "{}"
    if isinstance(value, list | tuple):
        return "[...]" if value else "[]"
    if isinstance(value, str):
        return quote(value if len(value) <= _SHOWN_MAX else f"{value[:_SHOWN_MAX]}...")
    return str(value).lower() if isinstance(value, bool) else _shown_number(value)


def _shown_number(value: Any) -> str:
    """Return a number (or a date); one of thousands of digits, which Python writes in no other way, as hexadecimal."""
    try:
        text = str(value)
    except ValueError:
        text = hex(value)
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."


# --- one value ---------------------------------------------------------------------------------------------


def _count(value: Any, _: Setting) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise RefusedError("is not a whole number", _number_fix(value, whole=True))


def _ratio(value: Any, _: Setting) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RefusedError("is not a number", _number_fix(value, whole=False))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RefusedError("is not finite", "write a number such as 0.5")
    return number


def _number_fix(value: Any, *, whole: bool) -> str:
    """Return how to write the number that `value` seems to mean."""
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        number = math.nan
    if math.isfinite(number) and number.is_integer():
        return f"write {int(number)}"
    if math.isfinite(number) and not whole:
        return f"write {number}"
    unquoted = ", without quotes" if isinstance(value, str) else ""
    return f"write a {'whole number such as 3' if whole else 'number such as 0.5'}{unquoted}"


_FLAGS: Mapping[str, str] = {
    "true": "true",
    "yes": "true",
    "on": "true",
    "1": "true",
    "false": "false",
    "no": "false",
    "off": "false",
    "0": "false",
}


def _flag(value: Any, _: Setting) -> bool:
    if isinstance(value, bool):
        return value
    meant = _FLAGS.get((value if isinstance(value, str) else show(value)).lower())
    fix = f"write {meant}, without quotes" if meant else "write true or false"
    raise RefusedError("is not true or false", fix)


def _choice(value: Any, declared: Setting) -> StrEnum:
    if declared.choices is None:
        raise TypeError(declared)
    members = [str(member) for member in declared.choices]
    if isinstance(value, str) and value in members:
        return declared.choices(value)
    raise RefusedError("is not one of the choices", choice_fix(value, members))


def choice_fix(value: Any, members: Sequence[str]) -> str:
    """Return how to write a choice: the member that is probably meant, or all of them."""
    near = nearest(value, members) if isinstance(value, str) else []
    listed = ", ".join(quote(member) for member in members)
    return f"did you mean {quote(near[0])}? The choices are {listed}" if near else f"write one of {listed}"


def _text(value: Any, _: Setting) -> str:
    if not isinstance(value, str):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fix = f'write it in quotes: "{show(value)}"' if number else "write text in quotes"
        raise RefusedError("is not text", fix)
    if not value.isprintable():
        raise RefusedError("has unprintable characters in it", "write one line of plain text")
    return value


def _texts(value: Any, declared: Setting) -> tuple[str, ...]:
    if isinstance(value, str):
        raise RefusedError("is not a list", f"write it in brackets: [{quote(value)}]")
    if not isinstance(value, list | tuple):
        raise RefusedError("is not a list of text", 'write texts in quotes and brackets, such as ["a", "b"]')
    texts = []
    for each in value:
        try:
            texts.append(_text(each, declared))
        except RefusedError as error:
            raise RefusedError(f"has {show(each)} in it, which {error.message}", error.fix) from None
    return tuple(texts)


def _pairs(value: Any, declared: Setting) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping):
        raise RefusedError("is not a table", 'write it in braces: { "a" = "b" }')
    pairs = []
    for name, each in value.items():
        try:
            pairs.append((name, _text(each, declared)))
        except RefusedError as error:
            raise RefusedError(f"has {quote(name)} in it, which {error.message}", "write text in quotes") from None
    return tuple(pairs)


_PARSERS: Mapping[Kind, Callable[[Any, Setting], Any]] = {
    Kind.DURATION: lambda value, _: parse_duration(value),
    Kind.SIZE: lambda value, _: parse_size(value),
    Kind.COUNT: _count,
    Kind.RATIO: _ratio,
    Kind.FLAG: _flag,
    Kind.CHOICE: _choice,
    Kind.TEXT: _text,
    Kind.TEXTS: _texts,
    Kind.PAIRS: _pairs,
}

_HIGHEST: Mapping[Kind, float] = {
    Kind.DURATION: 365 * 86_400 * SECOND_NS,
    Kind.SIZE: 1 << 60,
    Kind.COUNT: 10**9,
    Kind.RATIO: 1e9,
}
"""No setting that declares no `high` is larger than this, so that sums of settings stay sane."""


def parse_value(declared: Setting, value: Any) -> Any:
    """Return `value` as it is held in memory, or raise `RefusedError`."""
    try:
        parsed = _PARSERS[declared.kind](value, declared)
    except UnitError as error:
        raise RefusedError(error.message, error.fix) from None
    if declared.kind in _HIGHEST:
        _refuse_outside(declared, parsed)
    return parsed


def _refuse_outside(declared: Setting, parsed: float) -> None:
    high = _HIGHEST[declared.kind] if declared.high is None else declared.high
    if (declared.low is None or declared.low <= parsed) and parsed <= high:
        return
    too_high = parsed > high
    allowed = describe_range(dataclasses.replace(declared, high=high) if too_high else declared)
    unit = UNIT_NAMES[declared.kind]
    fix = f"write a {unit} {allowed}" if allowed.startswith("from") else f"write a {unit} of {allowed}"
    raise RefusedError("is too large" if too_high else "is too small", fix)


# --- whole tables ------------------------------------------------------------------------------------------


def parse_table(cls: type[_T], raw: Any, key: str, problems: list[Problem], *, also: Keys = ()) -> _T | None:
    """Return `raw`, the TOML table at `key`, as a `cls`; append every problem found on the way.

    A value with a problem is replaced by its default, so that the rest can still be judged; None means that a
    mandatory key is missing or wrong. `also` names the keys of the rest of the file, which a misplaced key
    may mean.
    """
    known = tuple(dict.fromkeys((*keys_of(cls, key), *also)))
    return _parse_table(cls, raw, key, problems, known)


def _parse_table(cls: type[_T], raw: Any, key: str, problems: list[Problem], known: Keys) -> _T | None:
    if not isinstance(raw, Mapping):
        problems.append(Problem(key, raw, "is not a table", "write its keys in a table of their own"))
        raw = {}
    fields = fields_of(cls)
    names = {field.key for field in fields}
    problems.extend(_unknown_keys(key, {name: raw[name] for name in raw if name not in names}, known))
    values: dict[str, Any] = {}
    for field in fields:
        _parse_field(field, raw, key, problems, known, values)
    complete = all(field.name in values for field in fields if field.mandatory)
    return cls(**values) if complete else None


def _parse_field(
    field: Field, raw: Mapping[str, Any], key: str, problems: list[Problem], known: Keys, values: dict[str, Any]
) -> None:
    path = join(key, field.key)
    if field.key not in raw:
        if field.mandatory:
            problems.append(Problem(path, ABSENT, "is missing", f"it says {field.why}"))
    elif field.section is not None:
        parsed = _parse_table(field.section, raw[field.key], path, problems, known)
        values.update({} if parsed is None else {field.name: parsed})
    elif field.setting is not None:
        try:
            values[field.name] = parse_value(field.setting, raw[field.key])
        except RefusedError as error:
            problems.append(Problem(path, raw[field.key], error.message, error.fix))


def _unknown_keys(table: str, unknown: Mapping[str, Any], known: Keys) -> Iterator[Problem]:
    """Yield a problem for each key that does not exist; the list of those that do stands in the first of them alone."""
    told = False
    for name, value in unknown.items():
        problem = unknown_key(table, name, value, known)
        lists = problem.fix.startswith(_LISTED)
        yield dataclasses.replace(problem, fix="") if lists and told else problem
        told = told or lists


_LISTED = "the keys here are "


def unknown_key(table: str, name: str, value: Any, known: Keys) -> Problem:
    """Return the problem of a key that does not exist, with the `known` one that was probably meant."""
    tables = {table, _INDEX.sub("", table)}  # servers[0], and servers: what all of a list have
    here = list(dict.fromkeys(key for above, key in known if above in tables))
    elsewhere = [pair for pair in known if pair[1] == name]
    meant = elsewhere or [(table, key) for key in _begun(name, here) or nearest(name, here)] or _almost(name, known)
    if isinstance(value, Mapping) and (near := nearest(name, here, cutoff=0.9)):
        meant = [(table, near[0])]  # [timeout] is [timeouts], not a duration of that name somewhere else
    fix = f"{_LISTED}{', '.join(here)}" if here else ""
    if meant:
        fix = f"did you mean {' or '.join(join(*pair) for pair in meant[:3])}?"
    return Problem(join(table, name), value, "is set, but there is no such key", fix)


_INDEX = re.compile(r"\[\d+\]")


def _begun(name: str, here: Iterable[str]) -> list[str]:
    """Return the keys of which `name` is the first word, or words: `drain` of `drain_timeout`."""
    return [key for key in here if _plain(key).startswith(f"{_plain(name)}_")]


def _almost(name: str, known: Keys) -> list[tuple[str, str]]:
    """Return the key of another table that is spelt almost like `name`."""
    near = nearest(name, [key for _, key in known], cutoff=0.8)
    return [pair for pair in known if pair[1] in near]


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Return the one of `words` that `word` most likely means, whatever its case and dashes; [] for none."""
    plain = {_plain(other): other for other in words}
    near = difflib.get_close_matches(_plain(word), list(plain), n=1, cutoff=cutoff)
    return [plain[match] for match in near]


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").removesuffix("_ns").removesuffix("_ms")
