"""`[routes]`: which strategy each route has, as text or as a table, into `RouteSettings` and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lbcore.config import RaceSettings, RouteSettings, Strategy, Winner
from lbcore.ollama import PASS_THROUGH, ROUTES, Route, default_routes, route_settings
from lbcore.parsing import (
    ABSENT,
    Keys,
    Problem,
    RefusedError,
    choice_fix,
    parse_table,
    parse_value,
    unknown_key,
)
from lbcore.schema import Kind, Setting, fields_of, join, setting


def _as_in_race(name: str) -> Any:
    """Declare a key that is optional here and otherwise like the one in `[race]`."""
    declared: Setting = RaceSettings.__dataclass_fields__[name].metadata["setting"]
    return dataclasses.field(default=None, metadata={"setting": declared})


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """One route written as a table; what it leaves out comes from the route and from `[race]`."""

    strategy: Strategy | None = setting(Kind.CHOICE, "how requests are spread over the servers", None, choices=Strategy)
    winner: Winner | None = _as_in_race("winner")
    racers_min: int | None = _as_in_race("racers_min")
    racers_max: int | None = _as_in_race("racers_max")
    hedges_max: int | None = _as_in_race("hedges_max")


ROUTES_BY_NAME: Mapping[str, Route] = {route.name: route for route in (*ROUTES, PASS_THROUGH)}
ROUTE_KEYS: Keys = (("", "routes"), *(("routes", name) for name in ROUTES_BY_NAME))


_STRATEGY = next(field.setting for field in fields_of(RouteTable) if field.setting)
_RACE_KEYS = ("winner", "racers_min", "racers_max", "hedges_max")
_USED_BY: Mapping[Strategy, tuple[str, ...]] = {
    Strategy.RACE: _RACE_KEYS,
    Strategy.HEDGE: ("winner", "hedges_max"),
}
"""The keys that mean something to a strategy; to all others, none does."""


def parse_routes(raw: Any, race: RaceSettings, problems: list[Problem], also: Keys) -> Mapping[str, RouteSettings]:
    """Return the settings of every route, those that `raw` leaves out at their default."""
    routes = default_routes(race)
    if not isinstance(raw, Mapping):
        fix = 'write [routes] and below it "/api/chat" = "race"'
        problems.append(Problem("routes", raw, "is not a table", fix))
        return MappingProxyType(routes)
    for name, value in raw.items():
        route = ROUTES_BY_NAME.get(name)
        if route is None:
            problems.append(unknown_key("routes", name, value, ROUTE_KEYS))
        else:
            routes[name] = _parse_route(route, value, race, problems, also)
    return MappingProxyType(routes)


def _parse_route(route: Route, value: Any, race: RaceSettings, problems: list[Problem], also: Keys) -> RouteSettings:
    key = join("routes", route.name)
    if isinstance(value, Mapping):
        table = parse_table(RouteTable, value, key, problems, also=also) or RouteTable()
        written, where = value.get("strategy", ABSENT), join(key, "strategy")
    else:
        table, written, where = _table_of_text(value, key, problems), value, key
    strategy = table.strategy or route.strategy
    if strategy not in route.allowed:
        problems.append(
            Problem(
                where,
                written,
                "is not possible for this route",
                choice_fix("", [str(allowed) for allowed in route.allowed]),
            )
        )
        return route_settings(route.strategy, race)
    return _combine(table, strategy, key, race, problems)


def _table_of_text(value: Any, key: str, problems: list[Problem]) -> RouteTable:
    if _STRATEGY is None:
        raise TypeError(RouteTable)
    try:
        return RouteTable(strategy=parse_value(_STRATEGY, value))
    except RefusedError as error:
        problems.append(Problem(key, value, error.message, error.fix))
        return RouteTable()


def _combine(
    table: RouteTable, strategy: Strategy, key: str, race: RaceSettings, problems: list[Problem]
) -> RouteSettings:
    """Return what `table` says over what `[race]` says; refuse what the strategy would ignore."""
    given = {name: value for name in _RACE_KEYS if (value := getattr(table, name)) is not None}
    unused = [name for name in given if name not in _USED_BY.get(strategy, ())]
    problems.extend(
        Problem(
            join(key, name),
            given[name],
            f"means nothing to the strategy {strategy}",
            "remove it, or change the strategy",
        )
        for name in unused
    )
    settings = dataclasses.replace(route_settings(strategy, race), **given)
    own_racers = given.keys() & {"racers_min", "racers_max"}
    if settings.racers_min > settings.racers_max and own_racers and not unused:
        problems.append(
            Problem(
                join(key, "racers_min"),
                settings.racers_min,
                f"is more than racers_max, which is {settings.racers_max}",
                "write both",
            )
        )
    return settings


def dump_routes(routes: Mapping[str, RouteSettings], race: RaceSettings) -> dict[str, Any]:
    """Return the `[routes]` table that says how `routes` differ from their defaults."""
    defaults = default_routes(race)
    changed = {name: settings for name, settings in routes.items() if settings != defaults[name]}
    return {name: _dump_route(settings, race) for name, settings in changed.items()}


def _dump_route(settings: RouteSettings, race: RaceSettings) -> str | dict[str, Any]:
    base = route_settings(settings.strategy, race)
    differing = {name: getattr(settings, name) for name in _RACE_KEYS if getattr(settings, name) != getattr(base, name)}
    plain = {name: str(value) if isinstance(value, Winner) else value for name, value in differing.items()}
    return {"strategy": str(settings.strategy), **plain} if plain else str(settings.strategy)
