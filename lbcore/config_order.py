"""Pairs of keys of a configuration of which one must not exceed the other (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lbcore.parsing import Problem, show
from lbcore.schema import Field, format_value, join, walk

Order = Sequence[tuple[str, str]]
"""Pairs of keys of which the first must not exceed the second."""

CORE_ORDER: Order = (
    ("race.racers_min", "race.racers_max"),
    ("race.hedge_delay_min", "race.hedge_delay_initial"),
    ("race.hedge_delay_initial", "race.hedge_delay_max"),
    ("health.success", "health.value_max"),
    ("health.fastest", "health.value_max"),
    ("probe.interval_dead", "probe.interval_dead_max"),
    ("timeouts.first_token_warm", "timeouts.first_token_cold"),
    ("placement.retry", "placement.retry_max"),
)


def check_order(raw: Mapping[str, Any], parts: Iterable[Any], order: Order, problems: list[Problem]) -> None:
    """Append a problem for each pair of `order` that is the wrong way round, if both are sound by themselves.

    `parts` are the settings that hold the keys, `raw` the tables they were read from.
    """
    wrong = {problem.key for problem in problems}
    held = {join(table, field.key): (field, value) for part in parts for table, field, value in walk(part)}
    for low_key, high_key in order:
        (low_field, low), (high_field, high) = held[low_key], held[high_key]
        if low > high and not {low_key, high_key} & wrong:
            message = (
                f"{_by_default(raw, low_key)}is more than {high_key}, which is "
                f"{_as_written(high_field, high)}{_by_default(raw, high_key)}"
            ).rstrip()
            value = low if low_field.setting is None else format_value(low_field.setting.kind, low)
            problems.append(Problem(low_key, value, message, "lower the one or raise the other"))


def _by_default(raw: Mapping[str, Any], key: str) -> str:
    """Return a remark for a value that the file does not mention."""
    table, _, name = key.rpartition(".")
    return "" if name in raw.get(table, {}) else "(the default) "


def _as_written(field: Field, value: Any) -> str:
    return show(value if field.setting is None else format_value(field.setting.kind, value)) + " "
