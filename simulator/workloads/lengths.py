"""How long, how much, how often: amounts drawn from distributions, and choices from weighted mixes. Pure.

Every draw turns one uniform number into one value (the inverse of the distribution function), so that changing one
setting of a workload leaves every other draw as it was.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from statistics import NormalDist
from typing import Any, Generic, TypeVar

from lbcore.parsing import Problem, RefusedError, parse_table, parse_value
from lbcore.schema import SECOND_NS, Setting, count, duration, fields_of, join

_T = TypeVar("_T")

TOKENS_MAX = 1_000_000
WAIT_MAX_NS = 7 * 86_400 * SECOND_NS

_NORMAL = NormalDist()
_P95 = _NORMAL.inv_cdf(0.95)


class Form(StrEnum):
    """The family of a distribution."""

    FIXED = "fixed"
    UNIFORM = "uniform"
    LOGNORMAL = "lognormal"
    EXPONENTIAL = "exponential"


@dataclass(frozen=True, slots=True)
class Amount:
    """A whole number drawn from a distribution and clamped to `low`..`high`; its unit is that of its setting."""

    form: Form
    low: int
    high: int
    middle: float = 0.0  # FIXED: the value; LOGNORMAL: the median; EXPONENTIAL: the mean
    spread: float = 0.0  # LOGNORMAL: sigma of the logarithm

    def at(self, u: float) -> int:
        """Return the value below which a share `u`, in [0, 1), of all draws lies."""
        if self.form is Form.FIXED:
            return int(self.middle)
        if self.form is Form.UNIFORM:
            return self.low + min(self.high - self.low, int(u * (self.high - self.low + 1)))
        if self.form is Form.EXPONENTIAL:
            return self._clamped(-self.middle * math.log1p(-u))
        return self._clamped(self.middle * math.exp(self.spread * _NORMAL.inv_cdf(max(u, 1e-12))))

    def _clamped(self, value: float) -> int:
        return max(self.low, min(self.high, round(value)))


def fixed(value: int) -> Amount:
    """Return the amount that is always `value`."""
    return Amount(Form.FIXED, value, value, value)


def lognormal(median: float, p95: float, low: int, high: int) -> Amount:
    """Return a lognormal amount by its median and the value that 95 % of the draws stay below."""
    return Amount(Form.LOGNORMAL, low, high, median, math.log(p95 / median) / _P95)


def exponential(mean: float, low: int, high: int) -> Amount:
    """Return an exponential amount."""
    return Amount(Form.EXPONENTIAL, low, high, mean)


# --- as tables ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensTable:
    """A distribution of token counts (or of other whole numbers from 1 on)."""

    median: int | None = count("lognormal: half of the draws are less", None, low=1, high=TOKENS_MAX)
    p95: int | None = count("lognormal: 95 % of the draws are less", None, low=1, high=TOKENS_MAX)
    mean: int | None = count("exponential: the mean", None, low=1, high=TOKENS_MAX)
    min: int | None = count("the least; with max alone: uniform", None, low=1, high=TOKENS_MAX)
    max: int | None = count("the most", None, low=1, high=TOKENS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimesTable:
    """A distribution of durations."""

    median_ns: int | None = duration("lognormal: half of the draws are less", None, low=1, high=WAIT_MAX_NS)
    p95_ns: int | None = duration("lognormal: 95 % of the draws are less", None, low=1, high=WAIT_MAX_NS)
    mean_ns: int | None = duration("exponential: the mean", None, low=1, high=WAIT_MAX_NS)
    min_ns: int | None = duration("the least; with max alone: uniform", None, high=WAIT_MAX_NS)
    max_ns: int | None = duration("the most", None, high=WAIT_MAX_NS)


_FORMS = "{ median = , p95 = }, { mean = } or { min = , max = }"


def parse_tokens(raw: Any, key: str, problems: list[Problem]) -> Amount | None:
    """Return a number of tokens or a table of them as an amount; append every problem found."""
    return _parse_amount(raw, key, problems, TokensTable, 1, TOKENS_MAX, "a whole number")


def parse_times(raw: Any, key: str, problems: list[Problem]) -> Amount | None:
    """Return a duration or a table of them as an amount in ns; append every problem found."""
    return _parse_amount(raw, key, problems, TimesTable, 0, WAIT_MAX_NS, 'a duration such as "10s"')


def _parse_amount(
    raw: Any, key: str, problems: list[Problem], table: Any, low: int, high: int, plain: str
) -> Amount | None:
    if not isinstance(raw, Mapping):
        try:
            return fixed(parse_value(Setting(_kind_of(table), "", low, high), raw))
        except RefusedError as error:
            problems.append(Problem(key, raw, error.message, f"{error.fix}, or a table: {_FORMS}"))
            return None
    n_before = len(problems)
    parsed = parse_table(table, raw, key, problems)
    if len(problems) > n_before:
        return None
    values = {field.key: getattr(parsed, field.name) for field in fields_of(table)}
    return _amount_of(values, raw, key, problems, low, high, plain)


def _kind_of(table: Any) -> Any:
    declared = fields_of(table)[0].setting
    return declared.kind if declared else None


def _amount_of(
    values: Mapping[str, int | None], raw: Any, key: str, problems: list[Problem], low: int, high: int, plain: str
) -> Amount | None:
    median, p95, mean = values["median"], values["p95"], values["mean"]
    least = low if values["min"] is None else values["min"]
    most = high if values["max"] is None else values["max"]
    if least > most:
        problems.append(Problem(join(key, "min"), raw["min"], f"is more than {join(key, 'max')}", "write less"))
        return None
    if median is not None and p95 is not None and mean is None:
        if p95 < median:
            problems.append(Problem(join(key, "p95"), raw["p95"], f"is less than {join(key, 'median')}", "write more"))
            return None
        return lognormal(median, p95, least, most)
    if mean is not None and median is None and p95 is None:
        return exponential(mean, least, most)
    if values["min"] is not None and values["max"] is not None and mean is median is p95:
        return Amount(Form.UNIFORM, least, most)
    problems.append(Problem(key, raw, "is no distribution", f"write {plain}, {_FORMS}"))
    return None


# --- mixes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mix(Generic[_T]):
    """A choice among values, each with its share of the draws."""

    values: tuple[_T, ...]
    bounds: tuple[float, ...]  # the shares, summed up; the last is 1.0

    def at(self, u: float) -> _T:
        """Return the value whose share covers `u`, in [0, 1)."""
        return self.values[min(bisect_right(self.bounds, u), len(self.values) - 1)]


def mix_of(weights: Mapping[_T, float]) -> Mix[_T]:
    """Return the mix of the keys of `weights`, which need not sum to 1; none may be negative, one must be positive."""
    total = math.fsum(weights.values())
    sums = [partial / total for partial in accumulate(weights.values())]
    return Mix(tuple(weights), (*sums[:-1], 1.0))


def parse_weights(raw: Mapping[str, Any], key: str, problems: list[Problem]) -> dict[str, float] | None:
    """Return the weights of a table `{ name = weight }`; append every problem found."""
    weights: dict[str, float] = {}
    for name, value in raw.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
            problems.append(Problem(join(key, name), value, "is not a weight", "write a number such as 0.8"))
        else:
            weights[name] = float(value)
    if len(weights) < len(raw):
        return None
    if not math.fsum(weights.values()) > 0:
        problems.append(Problem(key, raw, "has no weight above 0", 'write weights, such as { "llama3.2" = 0.8, ... }'))
        return None
    return weights
