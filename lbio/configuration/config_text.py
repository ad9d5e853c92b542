"""An `AppConfig` as TOML: only what differs from the defaults (`dump`), or every key explained (`document`)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import tomli_w

from lbcore.config import Alias, ModelSettings, ServerSettings
from lbcore.config_aliases import dump_aliases
from lbcore.config_routes import dump_routes
from lbcore.ollama import PASS_THROUGH, ROUTES, Route
from lbcore.parsing import quote, show
from lbcore.schema import Field, Setting, describe_setting, fields_of, format_value, join, walk
from lbio.configuration.addresses import parse_server_url
from lbio.configuration.settings import NO_UPSTREAM, AppConfig, KeySettings

# --- what differs ------------------------------------------------------------------------------------------


def dump(app: AppConfig) -> str:
    """Return the TOML text that `parse` reads back as `app`; its warnings come back by themselves."""
    tree: dict[str, Any] = {}
    for part in (app, app.core):
        defaults = {(table, field.key): value for table, field, value in walk(type(part)())}
        for table, field, value in walk(part):
            if value != defaults[table, field.key]:
                below = tree.setdefault(table, {}) if table else tree
                below[field.key] = _written(field, value)
    scalars = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    tables = {"fleet": list(app.fleet), "routes": dump_routes(app.core.routes, app.core.race),
              "alias": dump_aliases(app.core.aliases),
              **{key: value for key, value in tree.items() if key not in scalars}}
    texts = [
        tomli_w.dumps(scalars),
        *map(dump_key, app.keys),
        *(_short_block("servers", _dump_server(server, app)) + "\n" for server in app.core.servers),
        *(_short_block("models", _differing(model, ModelSettings(name=""))) + "\n" for model in app.core.models),
        tomli_w.dumps({key: value for key, value in tables.items() if value}),
    ]
    return "\n".join(text for text in texts if text)


def dump_key(key: KeySettings) -> str:
    """Return the TOML text of one key."""
    return _short_block("keys", _differing(key, KeySettings(name=""))) + "\n"


def _written(field: Field, value: Any) -> Any:
    return value if field.setting is None else format_value(field.setting.kind, value)


def _dump_server(server: ServerSettings, app: AppConfig) -> dict[str, Any]:
    default = ServerSettings(url=server.url, name=str(parse_server_url(server.url).address))
    return {**_differing(server, default), **_differing(app.upstream.get(server.url, NO_UPSTREAM), NO_UPSTREAM)}


def _differing(settings: Any, default: Any) -> dict[str, Any]:
    """Return the keys of a table that must be written."""
    return {field.key: _written(field, value) for _, field, value in walk(settings)
            if field.mandatory or value != getattr(default, field.name)}


# --- every key explained -----------------------------------------------------------------------------------

_HEAD = """\
The configuration of ollama-lb, every key once: what it means, its unit or its choices, its default.
Only [[servers]] is mandatory: a key that is left out has its default, and here all others stand at it.

durations: "300ms", "1.5s", "5m", "1h30m", or a number of seconds
sizes:     "64KiB", "64MiB", "1GiB", "64MB" (millions), or a number of bytes

ollama-lb check FILE  tells what a file comes to, and all that is wrong with it.
"""
_WIDTH = 108
_ROUTE_WIDTH = 42
EXAMPLE_SERVERS = (ServerSettings(url="http://gpu1:11434", name="gpu1"),
                   ServerSettings(url="http://gpu2:11434", name="gpu2"))

_SERVERS_HEAD = "The Ollama servers; one [[servers]] each. The second shows the least that is needed."
EXAMPLE_KEY = KeySettings(name="alice")
_KEYS_HEAD = """\
The keys of clients; one [[keys]] each. Without any, whoever reaches this address may do everything. \
`ollama-lb key new NAME` makes one, and prints what to write here.
"""
EXAMPLE_MODEL = ModelSettings(name="llama3.2")
_MODELS_HEAD = """\
The models that are to be on the servers; one [[models]] each. What is missing is pulled; models that stand nowhere \
here are left alone. `ollama-lb models plan FILE` tells what would be done, and does nothing.
"""
_ROUTES_HEAD = """\
How each route is forwarded; what is not listed here, "*" decides.

local: answered here. aggregate: made of what is known of all servers. sequential: one server after the other \
until one answers. race: several at once. hedge: the next one only after the hedge delay. \
broadcast: all that are concerned.

A table says more and takes the rest from [race]:
"/api/chat" = { strategy = "race", winner = "first-token", racers_max = 3, hedges_max = 0 }
"""

_ALIAS_HEAD = """\
Names that stand for models, such as one that a program insists on. Servers are asked for the first of the list that a \
live one has, and when that fails, for the next; the answer names what the client has asked for. Lists show an alias \
while a live server has one of its models. Pull, push, create, copy and delete mean the model of the name itself.

A model may have others to fall back on: then its own name stands first in its list. Another alias in a list stands \
for its own list. An alias goes before a model of the same name. Names with a dot or a colon need quotes.
"""
EXAMPLE_ALIASES = (Alias("gpt-4o", ("llama3.2",)), Alias("llama3.3:70b", ("llama3.3:70b", "llama3.2")))


def document(app: AppConfig | None = None) -> str:
    """Return TOML text that has every key once, with a comment; `configs/prod.toml` is this for the defaults."""
    app = AppConfig() if app is None else app
    servers = app.core.servers or EXAMPLE_SERVERS
    blocks = [_comment(_HEAD), *_settings_blocks(app), _rule(_KEYS_HEAD), *_keys_blocks(app)]
    blocks += [_rule(_SERVERS_HEAD), *_server_blocks(servers, app), _rule(_ROUTES_HEAD), _routes_block(app)]
    blocks += [_rule(_MODELS_HEAD), *_models_blocks(app)]
    blocks += [_rule(_ALIAS_HEAD), _alias_block(app)]
    for part in (app.core, app):
        for field in fields_of(type(part)):
            if field.section is not None:
                blocks += [_rule(f"{field.why[:1].upper()}{field.why[1:]}."), f"[{field.key}]"]
                blocks += _settings_blocks(getattr(part, field.name))
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def _comment(text: str) -> str:
    """Return `text` as comment lines of bearable length; its own line ends are kept."""
    lines = [wrapped for line in text.strip("\n").split("\n")
             for wrapped in textwrap.wrap(line, _WIDTH - 2, break_long_words=False, break_on_hyphens=False) or [""]]
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _rule(text: str) -> str:
    return f"# {'-' * (_WIDTH - 2)}\n{_comment(text)}"


def _settings_blocks(instance: Any) -> Iterator[str]:
    """Yield comment and line of each key that stands directly in the table of `instance`."""
    for field in fields_of(type(instance)):
        if field.setting is not None:
            yield _key_block(field, field.setting, getattr(instance, field.name))


def _key_block(field: Field, declared: Setting, value: Any) -> str:
    comment = _comment(f"{field.why}\n{_allowed(field, declared)}")
    if value is None:  # TOML has no word for it
        return f"{comment}\n# {field.key} = 1"
    return f"{comment}\n{field.key} = {_toml(format_value(declared.kind, value))}"


def _allowed(field: Field, declared: Setting) -> str:
    """Return unit or choices and the default: `duration, 1ms or more; default "3s"`."""
    if field.mandatory:
        default = "mandatory"
    elif field.default is None:
        default = "no default"
    else:
        default = f"default {_toml(format_value(declared.kind, field.default))}"
    return f"{describe_setting(declared)}; {default}"


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{join('', key)} = {_toml(it)}" for key, it in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return quote(value) if isinstance(value, str) else show(value)


def _server_blocks(servers: tuple[ServerSettings, ...], app: AppConfig) -> Iterator[str]:
    """Yield the first server with every key explained, and each further one as short as it can be."""
    yield "[[servers]]"
    yield from _settings_blocks(servers[0])
    yield from _settings_blocks(app.upstream.get(servers[0].url, NO_UPSTREAM))
    for server in servers[1:]:
        yield _short_block("servers", _dump_server(server, app))


def _keys_blocks(app: AppConfig) -> Iterator[str]:
    """Yield every key of `[[keys]]` explained, in comments: one that stands there would lock everybody else out."""
    yield _commented("keys", EXAMPLE_KEY)
    yield from map(dump_key, app.keys)


def _models_blocks(app: AppConfig) -> Iterator[str]:
    """Yield every key of `[[models]]` explained, in comments: one that stands there would be pulled."""
    yield _commented("models", EXAMPLE_MODEL)
    for model in app.core.models:
        yield _short_block("models", _differing(model, ModelSettings(name="")))


def _commented(table: str, example: Any) -> str:
    text = "\n\n".join((f"[[{table}]]", *_settings_blocks(example)))
    return "\n".join(line if line.startswith("#") or not line else f"# {line}" for line in text.split("\n"))


def _short_block(table: str, values: Mapping[str, Any]) -> str:
    return "\n".join((f"[[{table}]]", *(f"{key} = {_toml(value)}" for key, value in values.items())))


def _routes_block(app: AppConfig) -> str:
    changed = dump_routes(app.core.routes, app.core.race)
    lines = [_route_line(route, changed.get(route.name, str(route.strategy))) for route in (*ROUTES, PASS_THROUGH)]
    return "\n".join(("[routes]", *lines))


def _alias_block(app: AppConfig) -> str:
    """Return the aliases; without any, examples in comments."""
    shown = app.core.aliases or {alias.name: alias for alias in EXAMPLE_ALIASES}
    lines = (f"{join('', name)} = {_toml(models)}" for name, models in dump_aliases(shown).items())
    return "\n".join(("[alias]", *(lines if app.core.aliases else (f"# {line}" for line in lines))))


def _route_line(route: Route, value: str | Mapping[str, Any]) -> str:
    pairs = ", ".join(f"{key} = {_toml(it)}" for key, it in value.items()) if isinstance(value, Mapping) else ""
    text = f"{{ {pairs} }}" if pairs else _toml(value)
    allowed = f"one of {', '.join(route.allowed)}" if len(route.allowed) > 1 else f"only {route.strategy}"
    return f"{join('', route.name)} = {text}".ljust(_ROUTE_WIDTH) + f"  # {allowed}; default {route.strategy}"


