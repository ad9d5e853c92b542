"""What a configuration comes to, for `ollama-lb check`: as lines for people and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lbcore.config import ModelSettings, RouteSettings, ServerSettings, Strategy, Winner
from lbcore.parsing import ABSENT, Problem, show
from lbcore.schema import format_value, walk
from lbcore.units import counted, format_duration, format_size
from lbio.access.credentials import SecretsError, read_secrets
from lbio.config_file import access_warnings, directory_problems
from lbio.configuration.settings import NO_UPSTREAM, AppConfig, KeySettings

_EXACT_BITS = 64


def found_at_start(app: AppConfig) -> tuple[Sequence[Problem], Sequence[str]]:
    """Return the problems and the warnings that `run` would meet, on this machine and as it is now."""
    problems = tuple(directory_problems(app))
    try:
        secrets = read_secrets(app)
    except SecretsError as error:
        return (*error.problems, *problems), ()
    return problems, (*access_warnings(app), *secrets.warnings)


def summary_lines(app: AppConfig) -> Iterator[str]:
    """Yield what would run: the address, the servers, each route, the warnings."""
    yield f"listen on {app.listen}"
    if app.record.path:
        size = format_size(app.record.bytes_max)
        yield f"record to {app.record.path}, {counted(app.record.files, 'file')} of at most {size}"
    yield ""
    yield "servers"
    yield from _columns([*(_server_row(server, app) for server in app.core.servers), *map(_fake_row, app.fleet)])
    if app.keys:
        yield ""
        yield "keys"
        yield from _columns([_key_row(key) for key in app.keys])
    if app.core.models:
        yield ""
        yield "models"
        yield from _columns([_model_row(model) for model in app.core.models])
    yield ""
    yield "routes"
    measure = format_duration(app.core.race.measure_ns)
    yield from _columns([(name, _route_text(route, measure)) for name, route in app.core.routes.items()])
    if app.core.aliases:
        yield ""
        yield "aliases"
        yield from _columns([(alias.name, ", else ".join(alias.models)) for alias in app.core.aliases.values()])
    if app.warnings:
        yield ""
        yield from (f"warning: {warning}" for warning in app.warnings)


def _server_row(server: ServerSettings, app: AppConfig) -> tuple[str, ...]:
    slots = counted(server.slots, "slot")
    sent = _sent(server, app)
    own = f"; is sent {' and '.join(sent)} of its own" if sent else ""
    return server.name, server.url, f"{slots} a model, at most {server.in_flight_max} in flight{own}"


def _sent(server: ServerSettings, app: AppConfig) -> list[str]:
    """Return the names of the headers that a server is sent; what they hold is nobody's business."""
    upstream = app.upstream.get(server.url, NO_UPSTREAM)
    return [*(["Authorization"] if upstream.bearer else []), *(name for name, _ in upstream.headers)]


def _key_row(key: KeySettings) -> tuple[str, ...]:
    per_minute = key.requests_per_minute
    limit = "" if per_minute is None else f"{counted(per_minute, 'request')} a minute"
    return key.name, f"may {' and '.join(key.allow)}", f"models {', '.join(key.models)}", limit


def _model_row(model: ModelSettings) -> tuple[str, ...]:
    copies = model.copies or len(model.servers) or 1
    where = f" of {', '.join(model.servers)}" if model.servers else ""
    extra = [text for text, holds in (("kept loaded", model.warm), ("pruned elsewhere", model.prune)) if holds]
    return model.name, f"on {counted(copies, 'server')}{where}", ", ".join(extra)


def _fake_row(table: Mapping[str, Any]) -> tuple[str, ...]:
    port = table.get("port", 0)
    return str(table.get("name")), f"http://127.0.0.1:{port}" if port else "a free port", "fake, started with ollama-lb"


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield rows with their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _route_text(route: RouteSettings, measure: str) -> str:
    """Return a route's settings in words: "race: 1 racer, up to 2 within the budget; 1 hedge; winner first-token"."""
    parts = [
        _racers_text(route) if route.strategy is Strategy.RACE else "",
        counted(route.hedges_max, "hedge") if route.strategy in {Strategy.RACE, Strategy.HEDGE} else "",
        _winner_text(route, measure) if route.strategy in {Strategy.RACE, Strategy.HEDGE} else "",
    ]
    told = "; ".join(part for part in parts if part)
    return f"{route.strategy}: {told}" if told else str(route.strategy)


def _racers_text(route: RouteSettings) -> str:
    least = counted(route.racers_min, "racer")
    return least if route.racers_min == route.racers_max else f"{least}, up to {route.racers_max} within the budget"


def _winner_text(route: RouteSettings, measure: str) -> str:
    within = f" within {measure}" if route.winner is Winner.MOST_TOKENS else ""
    return f"winner {route.winner}{within}"


# --- JSON --------------------------------------------------------------------------------------------------


def summary_object(app: AppConfig) -> dict[str, Any]:
    """Return the same as an object fit for JSON."""
    return {
        "ok": True,
        "problems": [],
        "warnings": list(app.warnings),
        "listen": app.listen,
        "record": app.record.path,
        "servers": [_server_object(server, app) for server in app.core.servers],
        "keys": [_key_object(key) for key in app.keys],
        "fleet": [str(table.get("name")) for table in app.fleet],
        "models": [dataclasses.asdict(model) for model in app.core.models],
        "alias": {alias.name: list(alias.models) for alias in app.core.aliases.values()},
        "routes": {name: dataclasses.asdict(route) for name, route in app.core.routes.items()},
    }


def _server_object(server: ServerSettings, app: AppConfig) -> dict[str, Any]:
    told = {field.key: format_value(field.setting.kind, value) for _, field, value in walk(server) if field.setting}
    sent = _sent(server, app)
    return {**told, "sends": sent} if sent else told


def _key_object(key: KeySettings) -> dict[str, Any]:
    source = next(name for name in ("hash", "env", "file") if getattr(key, name))
    said = {"name": key.name, "from": source, "models": list(key.models), "allow": list(key.allow)}
    return {**said, "requests_per_minute": key.requests_per_minute}


def problems_object(problems: Iterable[Problem]) -> dict[str, Any]:
    """Return what is wrong as an object fit for JSON."""
    return {"ok": False, "warnings": [], "problems": [_problem_object(problem) for problem in problems]}


def _problem_object(problem: Problem) -> dict[str, Any]:
    value = None if problem.value is ABSENT else problem.value
    if isinstance(value, Mapping | list | tuple):
        value = show(value)  # somewhere in it may be what nobody is to see
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)  # JSON has no word for it
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _EXACT_BITS:
        value = show(value)  # few that read JSON hold it
    return {"key": problem.key, "value": value, "message": problem.message, "fix": problem.fix, "text": str(problem)}
