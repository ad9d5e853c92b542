"""Settings as data: every field of a settings dataclass carries its meaning, unit, range and reason.

One table (the dataclass) serves the parser, the error messages, `configs/prod.toml` and `--help`, so they
cannot disagree.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any, Final

from lbcore.units import format_duration, format_size

SECOND_NS: Final = 1_000_000_000
MS_NS: Final = 1_000_000


class Kind(StrEnum):
    """How a value is written in TOML and held in memory."""

    DURATION = "duration"  # "300ms", "5m", "1h30m" or a number of seconds; held as int nanoseconds
    SIZE = "size"  # "64MiB" or a number of bytes; held as int bytes
    COUNT = "count"  # int
    RATIO = "ratio"  # float
    FLAG = "flag"  # bool
    CHOICE = "choice"  # a StrEnum member
    TEXT = "text"  # str
    TEXTS = "texts"  # a list of text; held as a tuple of str
    PAIRS = "pairs"  # a table of text; held as a tuple of (key, text)


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """What one key of a settings table means; `low` and `high` are inclusive, in the unit held in memory."""

    kind: Kind
    why: str
    low: float | None = None
    high: float | None = None
    choices: type[StrEnum] | None = None


def setting(
    kind: Kind,
    why: str,
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: type[StrEnum] | None = None,
) -> Any:
    """Declare a dataclass field that is also a TOML key; without `default` the key is mandatory.

    A choice whose default is no member of its enum names the enum in `choices`.
    """
    choices = type(default) if kind is Kind.CHOICE and isinstance(default, StrEnum) else choices
    return dataclasses.field(default=default, metadata={"setting": Setting(kind, why, low, high, choices)})


def duration(why: str, default_ns: Any = dataclasses.MISSING, *, low: float = 0, high: float | None = None) -> Any:
    """Declare a duration, held in nanoseconds; the TOML key is the field's name without `_ns`."""
    return setting(Kind.DURATION, why, default_ns, low=low, high=high)


def count(why: str, default: Any = dataclasses.MISSING, *, low: int = 0, high: int | None = None) -> Any:
    """Declare a whole number."""
    return setting(Kind.COUNT, why, default, low=low, high=high)


def ratio(why: str, default: Any = dataclasses.MISSING, *, low: float = 0.0, high: float | None = None) -> Any:
    """Declare a real number."""
    return setting(Kind.RATIO, why, default, low=low, high=high)


def size(why: str, default_bytes: Any = dataclasses.MISSING, *, low: int = 0, high: int | None = None) -> Any:
    """Declare a number of bytes."""
    return setting(Kind.SIZE, why, default_bytes, low=low, high=high)


def section(why: str, factory: Callable[[], Any]) -> Any:
    """Declare a field that is a TOML table of its own, with every key optional."""
    return dataclasses.field(default_factory=factory, metadata={"section": why})


# --- the tables as data ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One key of a settings table as its dataclass field declares it: a `setting`, or a `section` of keys."""

    name: str  # of the dataclass field
    key: str  # in TOML
    why: str
    default: Any  # `dataclasses.MISSING` if it has none
    setting: Setting | None = None
    section: Any = None  # the dataclass of its keys

    @property
    def mandatory(self) -> bool:
        """Whether a table without this key is wrong."""
        return self.section is None and self.default is dataclasses.MISSING


def fields_of(cls: Any) -> tuple[Field, ...]:
    """Return the TOML keys of a settings dataclass in their order; fields declared otherwise are no keys."""
    declared = (field for field in dataclasses.fields(cls) if field.metadata.keys() & {"setting", "section"})
    return tuple(_field(field) for field in declared)


def _field(field: dataclasses.Field[Any]) -> Field:
    if "section" in field.metadata:
        factory: Any = field.default_factory
        return Field(field.name, field.name, field.metadata["section"], dataclasses.MISSING, section=factory)
    declared: Setting = field.metadata["setting"]
    return Field(field.name, field.name.removesuffix("_ns"), declared.why, field.default, declared)


_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def join(key: str, name: str) -> str:
    """Return the dotted TOML key of `name` in the table at `key`, quoted where TOML wants quotes."""
    part = name if _BARE_KEY.fullmatch(name) else json.dumps(name, ensure_ascii=False)
    return f"{key}.{part}" if key else part


def keys_of(cls: type, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the (table, name) of every section and setting of `cls`, which stands at `key`."""
    for field in fields_of(cls):
        yield key, field.key
        if field.section is not None:
            yield from keys_of(field.section, join(key, field.key))


# --- values as text ----------------------------------------------------------------------------------------

UNIT_NAMES: Mapping[Kind, str] = {
    Kind.DURATION: "duration",
    Kind.SIZE: "size",
    Kind.COUNT: "whole number",
    Kind.RATIO: "number",
    Kind.FLAG: "true or false",
    Kind.CHOICE: "one of",
    Kind.TEXT: "text",
    Kind.TEXTS: "list of text",
    Kind.PAIRS: "table of text",
}


def format_value(kind: Kind, value: Any) -> Any:
    """Return what TOML holds for a `value` in memory: a duration or size as its shortest text."""
    if kind is Kind.DURATION:
        return format_duration(int(value))
    if kind is Kind.SIZE:
        return format_size(int(value))
    if kind is Kind.TEXTS:
        return list(value)
    if kind is Kind.PAIRS:
        return dict(value)
    return str(value) if kind is Kind.CHOICE else value


def _bound(kind: Kind, value: float) -> str:
    if kind in {Kind.DURATION, Kind.SIZE}:
        return str(format_value(kind, value))
    return f"{value:g}" if abs(value) < 1e6 else str(int(value))


def describe_range(declared: Setting) -> str:
    """Return the range of a setting in readable units: "100ms or more", "from 0 to 1"; "" for none."""
    low = None if declared.low is None else _bound(declared.kind, declared.low)
    high = None if declared.high is None else _bound(declared.kind, declared.high)
    if low is not None and high is not None:
        return f"from {low} to {high}"
    if low is not None:
        return f"{low} or more"
    return "" if high is None else f"{high} or less"


def describe_setting(declared: Setting) -> str:
    """Return the unit and the allowed values: "duration, 1ms or more"; "one of text, json"."""
    if declared.choices is not None:
        return f"one of {', '.join(declared.choices)}"
    allowed = describe_range(declared)
    return UNIT_NAMES[declared.kind] + (f", {allowed}" if allowed else "")


def walk(instance: Any, key: str = "") -> Iterator[tuple[str, Field, Any]]:
    """Yield the (table, field, value) of every setting held by `instance`, whose own table is at `key`."""
    for field in fields_of(type(instance)):
        value = getattr(instance, field.name)
        if field.section is None:
            yield key, field, value
        else:
            yield from walk(value, join(key, field.key))
