"""Durations and sizes as people write them, held as exact whole numbers (nanoseconds, bytes).

`parse_*` raise `UnitError` with what is wrong and how to write it right; `format_*` give the shortest text
that `parse_*` reads back as the very same number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

_NS_PER: Mapping[str, int] = {
    "d": 86_400_000_000_000,
    "h": 3_600_000_000_000,
    "m": 60_000_000_000,
    "s": 1_000_000_000,
    "ms": 1_000_000,
    "us": 1_000,
    "ns": 1,
}
_BYTES_PER: Mapping[str, int] = {
    "TiB": 1 << 40,
    "TB": 10**12,
    "GiB": 1 << 30,
    "GB": 10**9,
    "MiB": 1 << 20,
    "MB": 10**6,
    "KiB": 1 << 10,
    "kB": 10**3,
    "B": 1,
}
_BYTES_PER_LOWER: Mapping[str, int] = {unit.lower(): factor for unit, factor in _BYTES_PER.items()}
_WORDS: Mapping[str, str] = {
    "d": "day days",
    "h": "hr hrs hour hours",
    "m": "min mins minute minutes",
    "s": "sec secs second seconds",
    "ms": "msec msecs millisecond milliseconds",
    "us": "µs μs",
}
_ALIASES: Mapping[str, str] = {word: unit for unit, words in _WORDS.items() for word in words.split()}

_NUMBER = r"[0-9]{1,30}(?:\.[0-9]{1,30})?"
_ONE_DURATION = re.compile(rf"\s*({_NUMBER})\s*([a-zµμ]+)\s*")
_ONE_SIZE = re.compile(rf"\s*({_NUMBER})\s*([A-Za-z]+)\s*")
_PLAIN_NUMBER = re.compile(rf"\s*[-+]?{_NUMBER}\s*")

DURATION_FORMS = '"300ms", "1.5s", "1h30m" or a number of seconds'
SIZE_FORMS = '"64MiB", "64MB" or a number of bytes'


class UnitError(ValueError):
    """A text or number is no duration or size; `message` continues a sentence that begins with the value."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix


def _finite(number: Any, forms: str) -> Fraction:
    """Return a bare TOML number exactly as it was written, if it can be an amount of anything."""
    if isinstance(number, float) and not math.isfinite(number):
        raise UnitError("is not finite", f"write {forms}")
    if number < 0:
        raise UnitError("is negative", f"write {forms}")
    return Fraction(repr(number)) if isinstance(number, float) else Fraction(number)


def _refuse_plain_text(text: str, unit: str, forms: str) -> None:
    """Refuse a number in quotes: nobody can tell whether its unit was forgotten."""
    if not _PLAIN_NUMBER.fullmatch(text):
        return
    bare = text.strip()
    if bare.startswith("-"):
        raise UnitError("is negative", f"write {forms}")
    bare = bare.removeprefix("+")
    raise UnitError("is text without a unit", f'write {bare} or "{bare}{unit}"')


def parse_duration(value: object) -> int:
    """Return the nanoseconds of "300ms", "1h30m" or a bare number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UnitError("is not a duration", f"write {DURATION_FORMS}")
    if not isinstance(value, str):
        return round(_finite(value, DURATION_FORMS) * _NS_PER["s"])
    _refuse_plain_text(value, "s", DURATION_FORMS)
    total, at = Fraction(0), 0
    while match := _ONE_DURATION.match(value, at):
        unit = _ALIASES.get(match[2], match[2])
        if unit not in _NS_PER:
            raise UnitError(f'has an unknown unit "{match[2]}"', f"the units are {', '.join(_NS_PER)}")
        total, at = total + Fraction(match[1]) * _NS_PER[unit], match.end()
    if at == 0 or at != len(value):
        negative = value.lstrip().startswith("-")
        raise UnitError("is negative" if negative else "is not a duration", f"write {DURATION_FORMS}")
    return round(total)


def parse_size(value: object) -> int:
    """Return the bytes of "64MiB", "64MB" or a bare number of bytes."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UnitError("is not a size", f"write {SIZE_FORMS}")
    if isinstance(value, str):
        _refuse_plain_text(value, "MiB", SIZE_FORMS)
        match = _ONE_SIZE.fullmatch(value)
        if not match:
            negative = value.lstrip().startswith("-")
            raise UnitError("is negative" if negative else "is not a size", f"write {SIZE_FORMS}")
        factor = _BYTES_PER_LOWER.get(match[2].lower())
        if factor is None:
            raise UnitError(f'has an unknown unit "{match[2]}"', f"the units are {', '.join(_BYTES_PER)}")
        exact = Fraction(match[1]) * factor
    else:
        exact = _finite(value, SIZE_FORMS)
    if exact.denominator != 1:
        raise UnitError("is not a whole number of bytes", f"write {SIZE_FORMS}")
    return exact.numerator


def _decimal(number: int, factor: int) -> str | None:
    """Return `number / factor` as an exact decimal of at least 1 with few digits, or None."""
    scaled = Fraction(number, factor)
    if scaled < 1 or (scaled * 1000).denominator != 1:
        return None
    whole, thousandths = divmod(int(scaled * 1000), 1000)
    return f"{whole}.{thousandths:03d}".rstrip("0").rstrip(".")


def _compound(number: int, factors: Mapping[str, int]) -> str:
    parts = []
    for unit, factor in factors.items():
        amount, number = divmod(number, factor)
        if amount:
            parts.append(f"{amount}{unit}")
    return "".join(parts)


def _spellings(number: int, factors: Mapping[str, int]) -> Iterator[str]:
    """Yield exact spellings in one unit, whole numbers in large units first."""
    yield from (f"{number // factor}{unit}" for unit, factor in factors.items() if number % factor == 0)
    yield from (f"{text}{unit}" for unit, factor in factors.items() if (text := _decimal(number, factor)))


_NS_PER_WRITTEN: Mapping[str, int] = {unit: factor for unit, factor in _NS_PER.items() if unit != "d"}


def format_duration(duration_ns: int) -> str:
    """Return the shortest text that means exactly `duration_ns`; days are read but not written."""
    if duration_ns == 0:
        return "0s"
    return min((*_spellings(duration_ns, _NS_PER_WRITTEN), _compound(duration_ns, _NS_PER_WRITTEN)), key=len)


def format_size(n_bytes: int) -> str:
    """Return the shortest text that means exactly `n_bytes`."""
    return "0B" if n_bytes == 0 else min(_spellings(n_bytes, _BYTES_PER), key=len)


_PLURALS: Mapping[str, str] = {"retry": "retries"}


def counted(number: int, noun: str) -> str:
    """Return a number of things in words: "1 slot", "2 slots", "0 retries"."""
    return f"{number} {noun if number == 1 else _PLURALS.get(noun, f'{noun}s')}"
