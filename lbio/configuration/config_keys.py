"""What a configuration says of secrets: `[[keys]]`, `bearer` and `headers` of servers. Where they are, mostly.

The secrets themselves are read at the start (`lbio.access.credentials`), so that a file can be read without them. No
problem that is told repeats what may be one: people write keys where the name of a variable belongs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lbcore.config import ServerSettings
from lbcore.parsing import ABSENT, Keys, Problem, RefusedError, choice_fix, nearest, parse_table, quote
from lbcore.schema import fields_of, keys_of
from lbio.access.keys import ALL_MODELS, TOKEN_PREFIX, parse_hash
from lbio.configuration.settings import NO_UPSTREAM, KeySettings, Right, UpstreamSettings
from lbio.wire.headers import HOP_BY_HOP

KEYS_KEYS: Keys = (("", "keys"), *(("keys", name) for _, name in keys_of(KeySettings)))
UPSTREAM_KEYS = frozenset(field.key for field in fields_of(UpstreamSettings))

ENV, FILE = "env:", "file:"
"""How a value begins that says where the secret is."""

_KEYS_FIX = "write [[keys]] on a line of its own and below it what `ollama-lb key new NAME` prints"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HEADER_NAME = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_NAME_CHARS_MAX = 64
_SECRET_CHARS_MIN = 20
_OURS = frozenset({"host", "content-length", "expect", "via", *(name.decode() for name in HOP_BY_HOP)})


def looks_secret(text: str) -> bool:
    """Tell whether a text is more likely a secret than the name of a variable or a file."""
    return text.startswith((TOKEN_PREFIX, "sk-")) or (
        len(text) >= _SECRET_CHARS_MIN and not set(text) & set("/._") and any(char.isdigit() for char in text))


# --- [[keys]] ----------------------------------------------------------------------------------------------


def parse_keys(raw: Any, problems: list[Problem], also: Keys, base: Path | None) -> tuple[KeySettings, ...]:
    """Return the keys of `[[keys]]`; files are looked for relative to `base`."""
    if not isinstance(raw, list):
        problems.append(Problem("keys", ABSENT, "is not a list of tables", _KEYS_FIX))
        return ()
    keys, names = [], dict[str, str]()
    for index, table in enumerate(raw):
        where = f"keys[{index}]"
        if not isinstance(table, Mapping):
            problems.append(Problem(where, ABSENT, "is not a table", _KEYS_FIX))
            continue
        key = parse_table(KeySettings, table, where, problems, also=also)
        if key is None:
            continue
        problems.extend(_problems(key, where))
        if names.setdefault(key.name, where) != where:
            problems.append(Problem(f"{where}.name", key.name, f"is also the name of {names[key.name]}",
                                    "give each key a name of its own"))
        keys.append(dataclasses.replace(key, file=_located(key.file, base)))
    return tuple(keys)


def _problems(key: KeySettings, where: str) -> Iterator[Problem]:
    if not key.name or len(key.name) > _NAME_CHARS_MAX or key.name.startswith(TOKEN_PREFIX):
        yield Problem(f"{where}.name", ABSENT, "is no name", f"write up to {_NAME_CHARS_MAX} characters, such as alice")
    given = [name for name in ("hash", "env", "file") if getattr(key, name)]
    if len(given) != 1:
        said = f"has {' and '.join(given)}" if given else "has neither hash nor env nor file"
        yield Problem(where, ABSENT, said, "write exactly one: what `ollama-lb key new NAME` prints has a hash")
    try:
        if key.hash:
            parse_hash(key.hash)
    except RefusedError as error:
        yield Problem(f"{where}.hash", ABSENT, error.message, error.fix)
    if key.env:
        yield from _variable_problems(key.env, f"{where}.env")
    if key.file and looks_secret(key.file):
        yield Problem(f"{where}.file", ABSENT, "looks like a key itself", "write the path of a file that holds it")
    yield from _model_problems(key.models, f"{where}.models")
    unknown = [word for word in key.allow if word not in list(Right)]
    for word in unknown:
        yield Problem(f"{where}.allow", word, "is not one of the choices", choice_fix(word, [*map(str, Right)]))
    if not key.allow:
        yield Problem(f"{where}.allow", key.allow, "allows nothing", 'write ["use"], or remove the key')


def _variable_problems(name: str, where: str) -> Iterator[Problem]:
    if _VARIABLE.fullmatch(name) is None or looks_secret(name):
        yield Problem(where, ABSENT, "is no name of a variable", "write the name of the variable that holds the key")


def _model_problems(models: Iterable[str], where: str) -> Iterator[Problem]:
    models = tuple(models)
    if not models:
        yield Problem(where, models, "names no model", f"write [{quote(ALL_MODELS)}] for all, or remove the key")
    for model in models:
        if not model.strip() or "," in model or " " in model.strip() or "://" in model:
            yield Problem(where, model, "is no name of a model", "write each as a text of its own, without a scheme")


def _located(path: str, base: Path | None) -> str:
    try:
        return path if not path or base is None else str(base / Path(path).expanduser())
    except RuntimeError:  # "~" of nobody
        return path


# --- what servers are sent ---------------------------------------------------------------------------------


def parse_upstream(raw: Any, servers: Iterable[tuple[str, ServerSettings]], problems: list[Problem], also: Keys,
                   base: Path | None) -> dict[str, UpstreamSettings]:
    """Return what is said in `[[servers]]` of secrets, by the url of the server."""
    tables = {f"servers[{index}]": table for index, table in enumerate(raw)} if isinstance(raw, list) else {}
    found = {}
    for where, server in servers:
        table = tables.get(where, {})
        own = {name: value for name, value in table.items() if name in UPSTREAM_KEYS}
        upstream = parse_table(UpstreamSettings, own, where, problems, also=also)
        if upstream is not None and upstream != NO_UPSTREAM:
            problems.extend(_upstream_problems(upstream, where))
            headers = tuple((name, _source(value, base)) for name, value in upstream.headers)
            found[server.url] = UpstreamSettings(bearer=_source(upstream.bearer, base), headers=headers)
    return found


def _upstream_problems(upstream: UpstreamSettings, where: str) -> Iterator[Problem]:
    if upstream.bearer.startswith(ENV):
        yield from _variable_problems(upstream.bearer.removeprefix(ENV), f"{where}.bearer")
    if upstream.bearer.lower().startswith("bearer "):
        yield Problem(f"{where}.bearer", ABSENT, 'begins with "Bearer"', "write what stands behind it")
    seen = {"authorization"} if upstream.bearer else set[str]()
    for name, value in upstream.headers:
        key, lowered = f"{where}.headers.{name}", name.lower()
        if _HEADER_NAME.fullmatch(name) is None:
            yield Problem(key, ABSENT, "is no name of a header", 'write it as in { "X-Api-Key" = "env:GPU1_KEY" }')
        if lowered in _OURS or lowered.startswith("x-ollama-lb-"):
            yield Problem(key, ABSENT, "is a header that is written here", "remove it")
        if lowered in seen:
            yield Problem(key, ABSENT, "is given twice", "write it once; bearer writes Authorization")
        if not value:
            yield Problem(key, ABSENT, "is empty", "write a value, or remove it")
        if value.startswith(ENV):
            yield from _variable_problems(value.removeprefix(ENV), key)
        seen.add(lowered)


def _source(value: str, base: Path | None) -> str:
    return FILE + _located(value.removeprefix(FILE), base) if value.startswith(FILE) else value


# --- what is told of what is wrong -------------------------------------------------------------------------

_OPEN = frozenset({"name", "models", "allow", "requests_per_minute"})
_SECRETIVE = re.compile(r"bearer|key|token|secret|passw|auth|hash|cred|header", re.IGNORECASE)


def without_secret(problem: Problem) -> Problem:
    """Return a problem without its value, if that may be a secret."""
    if problem.value is ABSENT or not _may_be_secret(problem):
        return problem
    names_keys = problem.fix.startswith(("did you mean", "the keys here"))
    fix = problem.fix if names_keys else "write it as configs/prod.toml has it"
    return dataclasses.replace(problem, value=ABSENT, fix=fix)


def _may_be_secret(problem: Problem) -> bool:
    root, *members = re.split(r"[.\[]", problem.key)
    name = next((member for member in members if not member[:1].isdigit()), root)
    if isinstance(problem.value, str) and problem.value.startswith(TOKEN_PREFIX):
        return True
    if root == "keys":
        return name not in _OPEN
    near = nearest(name, (*UPSTREAM_KEYS, "hash", "key", "token"), cutoff=0.7)
    known = {key for _, key in keys_of(ServerSettings)} if root == "servers" else set[str]()
    unknown = "no such key" in problem.message
    return name in UPSTREAM_KEYS or (unknown and name not in known and bool(near or _SECRETIVE.search(name)))
