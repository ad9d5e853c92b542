"""A TOML file and command-line flags into an `AppConfig`; or every problem there is with them."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbcore.config import Config
from lbcore.config_aliases import ALIAS_KEYS, parse_aliases
from lbcore.config_models import MODEL_KEYS, parse_models
from lbcore.config_order import CORE_ORDER, Order, check_order
from lbcore.config_routes import ROUTE_KEYS, parse_routes
from lbcore.file_kind import FileKind, other_kind
from lbcore.parsing import ABSENT, Keys, Problem, RefusedError, parse_table, show
from lbcore.schema import fields_of, join, keys_of
from lbcore.units import counted
from lbio.configuration.addresses import Address, is_loopback, parse_listen, parse_origin
from lbio.configuration.config_keys import KEYS_KEYS, parse_keys, parse_upstream, without_secret
from lbio.configuration.config_servers import (
    SERVER_KEYS,
    Keyed,
    parse_server_flags,
    parse_servers,
    read_text,
    refuse_loops,
    server_warnings,
)
from lbio.configuration.settings import DEFAULT_LISTEN, AdminAccess, AppConfig

__all__ = [
    "AppConfig",
    "ConfigError",
    "Overrides",
    "Problem",
    "access_warnings",
    "config_path",
    "directory_problems",
    "load",
    "parse",
]

FleetCheck = Callable[[Sequence[Mapping[str, Any]], list[Problem]], object]
"""Appends what is wrong with the `[[fleet]]` tables; only the simulator understands them."""


class ConfigError(Exception):
    """The configuration cannot be used; `problems` has all that is wrong with it, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What the command line says; it wins over the file. Times are seconds, or text with a unit."""

    listen: str | None = None
    servers: tuple[str, ...] = ()  # "URL=NAME" or "URL"
    server_file: Path | None = None
    timeout_s: float | str | None = None  # timeouts.silence; timeouts.connect is never above it
    timeout_ft_s: float | str | None = None  # timeouts.first_token_warm; first_token_cold is never below it
    time_measure_s: float | str | None = None  # race.measure

    @property
    def name_servers(self) -> bool:
        """Whether the servers of the file are replaced."""
        return bool(self.servers) or self.server_file is not None


NO_OVERRIDES = Overrides()

_FLAGS: Sequence[tuple[str, str, str, str]] = (
    ("timeout_s", "--timeout", "timeouts", "silence"),
    ("timeout_ft_s", "--timeout-ft", "timeouts", "first_token_warm"),
    ("time_measure_s", "--time-measure", "race", "measure"),
)
"""(field of `Overrides`, flag, table, key) of the flags that set one key."""

_ORDERED: Order = (*CORE_ORDER, ("limits.body_bytes_max", "limits.bodies_bytes_max"))

_CORE_TABLES = frozenset(field.key for field in fields_of(Config))
_OWN_PARSERS = frozenset({"servers", "models", "routes", "alias", "fleet", "keys"})
_ALL_KEYS: Keys = (*keys_of(AppConfig), *keys_of(Config), *SERVER_KEYS, *MODEL_KEYS, *ROUTE_KEYS, *ALIAS_KEYS,
                   *KEYS_KEYS, ("", "fleet"))

NO_SERVERS = Problem("servers", ABSENT, "no server is named",
                     'write [[servers]] and below it url = "http://gpu1:11434", or give the flag '
                     "-s http://gpu1:11434=gpu1")


# --- reading files -----------------------------------------------------------------------------------------


def load(path: Path | None, overrides: Overrides = NO_OVERRIDES, *, need_servers: bool = True,
         check_fleet: FleetCheck | None = None) -> AppConfig:
    """Return the configuration of the file at `path` (None: the defaults) under `overrides`. Raises `ConfigError`."""
    raw = {} if path is None else read_toml(path)
    if path is not None and (problem := other_kind(raw, str(path), FileKind.CONFIGURATION)) is not None:
        raise ConfigError([problem])
    base = None if path is None else path.resolve().parent
    return parse(raw, overrides, base=base, need_servers=need_servers, check_fleet=check_fleet)


_SERVER_LIKE = re.compile(r"[A-Za-z]+://.*|[\w.-]+:\d+(=.*)?")


def config_path(text: str, *, servers_allowed: bool = True) -> Path:
    """Return the file that an argument names; raise `ConfigError` if it is plainly a server's address instead."""
    path = Path(text)
    if _SERVER_LIKE.fullmatch(text) and not path.exists():
        fix = f"give it as a flag: -s {text}" if servers_allowed else "name a file with [[fleet]] in it"
        raise ConfigError([Problem(text, ABSENT, "is a server, not a file", fix)])
    return path


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file as they are written."""
    problems: list[Problem] = []
    text = read_text(path, str(path), problems)
    if text is None:
        raise ConfigError(problems)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError([Problem(str(path), ABSENT, "is nested too deeply", "write plain tables")]) from None
    except ValueError as error:  # TOMLDecodeError, or a number with thousands of digits
        raise ConfigError([_syntax_problem(path, str(error))]) from None


_AT_LINE = re.compile(r" \(at line (\d+), column (\d+)\)")


def _syntax_problem(path: Path, message: str) -> Problem:
    where = _AT_LINE.search(message)
    key = f"{path}:{where[1]}" if where else str(path)
    what = _AT_LINE.sub(r" (column \2)", message)
    twice = message.startswith("Cannot")
    fix = "each key and each table may stand there once" if twice else 'write key = value, with text in "quotes"'
    return Problem(key, ABSENT, f"is not TOML: {what}", fix)


# --- tables and flags into settings ------------------------------------------------------------------------


def parse(raw: Mapping[str, Any], overrides: Overrides = NO_OVERRIDES, *, base: Path | None = None,
          need_servers: bool = True, check_fleet: FleetCheck | None = None) -> AppConfig:
    """Return the configuration that the tables `raw` make under `overrides`, or raise `ConfigError`.

    `base` is the directory in which relative file names are looked for; None leaves them as they are.
    """
    problems: list[Problem] = []
    warnings: list[str] = []
    raw, flag_of = _overlay(raw, overrides)
    app, core = _parse_tables(raw, problems)
    core = _within_flags(core, overrides)
    listen = _parse_listen(app.listen, problems)
    origins = _parse_origins(app.origins, problems)
    servers = _servers(raw, overrides, problems, warnings, base)
    upstream = parse_upstream(raw.get("servers"), servers, problems, _ALL_KEYS, base)
    keys = parse_keys(raw.get("keys", []), problems, _ALL_KEYS, base)
    refuse_loops(servers, listen, problems)
    fleet = _fleet(raw, overrides, servers, problems, warnings)
    if fleet and check_fleet is not None:
        check_fleet(fleet, problems)
    fakes = (table.get("name") for table in fleet)
    names = [*(server.name for _, server in servers), *(name for name in fakes if isinstance(name, str))]
    models = parse_models(raw.get("models", []), names, problems, _ALL_KEYS)
    routes = parse_routes(raw.get("routes", {}), core.race, problems, _ALL_KEYS)
    aliases = parse_aliases(raw.get("alias", {}), problems)
    check_order(raw, (app, core), _ORDERED, problems)
    if need_servers and not (servers or fleet or problems):
        problems.append(NO_SERVERS)
    if problems:
        raise ConfigError(map(without_secret, _sorted(problems, raw, flag_of)))
    core = dataclasses.replace(core, servers=tuple(server for _, server in servers), models=models, routes=routes,
                               aliases=aliases)
    app = dataclasses.replace(app, listen=str(listen), origins=origins, keys=keys, upstream=upstream)
    app = dataclasses.replace(app, core=core, fleet=fleet)
    return dataclasses.replace(app, warnings=(*warnings, *server_warnings(servers), *_app_warnings(app),
                                              *_placement_warnings(app)))


def _overlay(raw: Mapping[str, Any], overrides: Overrides) -> tuple[dict[str, Any], dict[str, str]]:
    """Return `raw` with the flags written into it, and which flag has set which key."""
    merged = dict(raw)
    flag_of: dict[str, str] = {}
    if overrides.listen is not None:
        merged["listen"], flag_of["listen"] = overrides.listen, "--listen"
    elif isinstance(listen := merged.get("listen"), int) and not isinstance(listen, bool):
        merged["listen"] = show(listen)
    for field, flag, table, key in _FLAGS:
        value, under = getattr(overrides, field), merged.get(table, {})
        if value is not None and isinstance(under, Mapping):
            merged[table] = {**under, key: _number_or_text(value)}
            flag_of[join(table, key)] = flag
    return merged, flag_of


def _number_or_text(value: float | str) -> float | str:
    """Return the number that a flag's text is, if it is one: flags have no quotes to tell them apart."""
    if not isinstance(value, str):
        return value
    for number in (int, float):
        try:
            return number(value)
        except (ValueError, OverflowError):
            continue
    return value


def _parse_tables(raw: Mapping[str, Any], problems: list[Problem]) -> tuple[AppConfig, Config]:
    core_raw = {key: value for key, value in raw.items() if key in _CORE_TABLES}
    app_raw = {key: value for key, value in raw.items() if key not in _CORE_TABLES | _OWN_PARSERS}
    app = parse_table(AppConfig, app_raw, "", problems, also=_ALL_KEYS) or AppConfig()
    core = parse_table(Config, core_raw, "", problems, also=_ALL_KEYS) or Config()
    return app, core


def _within_flags(core: Config, overrides: Overrides) -> Config:
    """Return `core` with the timeouts that no flag sets kept in order with those that one does."""
    timeouts = core.timeouts
    if overrides.timeout_s is not None:
        timeouts = dataclasses.replace(timeouts, connect_ns=min(timeouts.connect_ns, timeouts.silence_ns))
    if overrides.timeout_ft_s is not None:
        cold_ns = max(timeouts.first_token_cold_ns, timeouts.first_token_warm_ns)
        timeouts = dataclasses.replace(timeouts, first_token_cold_ns=cold_ns)
    return dataclasses.replace(core, timeouts=timeouts)


def _parse_listen(text: str, problems: list[Problem]) -> Address:
    try:
        return parse_listen(text)
    except RefusedError as error:
        problems.append(Problem("listen", text, error.message, error.fix))
        return parse_listen(DEFAULT_LISTEN)


def _parse_origins(texts: Iterable[str], problems: list[Problem]) -> tuple[str, ...]:
    origins = []
    for index, text in enumerate(texts):
        try:
            origins.append(parse_origin(text))
        except RefusedError as error:
            problems.append(Problem(f"origins[{index}]", text, error.message, error.fix))
    return tuple(origins)


def _servers(raw: Mapping[str, Any], overrides: Overrides, problems: list[Problem], warnings: list[str],
             base: Path | None) -> list[Keyed]:
    if overrides.name_servers:
        return parse_server_flags(overrides.servers, overrides.server_file, problems, warnings)
    return parse_servers(raw.get("servers", []), problems, _ALL_KEYS, base)


def _fleet(raw: Mapping[str, Any], overrides: Overrides, servers: Iterable[Keyed], problems: list[Problem],
           warnings: list[str]) -> tuple[Mapping[str, Any], ...]:
    """Return the `[[fleet]]` tables as they are written."""
    tables = raw.get("fleet", [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        problems.append(Problem("fleet", tables, "is not a list of tables", "write [[fleet]] above each fake server"))
        return ()
    if tables and overrides.name_servers:
        warnings.append("--servers: the fake servers of [[fleet]] are not started")
        return ()
    named = {server.name: key for key, server in servers if server.name}
    for index, table in enumerate(tables):
        name = table.get("name")
        if isinstance(name, str) and name in named:
            problems.append(Problem(f"fleet[{index}].name", name, f"is also the name of {named[name]}",
                                    "give each server a name of its own"))
    return tuple(tables)


# --- checks across keys ------------------------------------------------------------------------------------


def _app_warnings(app: AppConfig) -> Iterable[str]:
    if app.admin.allow is AdminAccess.ANY and not app.keys:
        yield f'admin.allow = "any": whoever reaches {app.listen} may add and remove servers'


def _placement_warnings(app: AppConfig) -> Iterable[str]:
    n_servers = len(app.core.servers) + len(app.fleet)
    for index, model in enumerate(app.core.models):
        if model.copies is not None and model.copies > n_servers:
            yield (f"models[{index}].copies: {model.copies} are wanted of {counted(n_servers, 'server')}; "
                   "more may be added while it runs")


def access_warnings(app: AppConfig) -> Iterable[str]:
    """Yield a warning of a balancer that everybody may use and change who reaches it from other machines."""
    if not (app.keys or is_loopback(parse_listen(app.listen).host)):
        yield (f"no [[keys]]: whoever reaches {app.listen} may use its models and change them; "
               "`ollama-lb key new NAME` makes a key, --listen 127.0.0.1:11434 lets only this machine in")


def directory_problems(app: AppConfig) -> Iterable[Problem]:
    """Yield what `run` would fail at, on this machine and as it is now."""
    directory = Path(app.record.path).expanduser().parent
    if app.record.path and not directory.is_dir():
        yield Problem("record.path", app.record.path, f"cannot be written: there is no directory {directory}",
                      f"mkdir -p {directory}")


def _sorted(problems: Iterable[Problem], raw: Mapping[str, Any], flag_of: Mapping[str, str]) -> list[Problem]:
    """Return the problems in the order of the file, flags first and under their own names."""
    order = {key: index for index, key in enumerate(raw)}
    renamed = [dataclasses.replace(problem, key=flag_of.get(problem.key, problem.key)) for problem in problems]
    return sorted(renamed, key=lambda problem: order.get(re.split(r"[.\[]", problem.key)[0], -1))
