"""`[alias]`: names that stand for others, each a text or a list, into chains of models without an alias, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from types import MappingProxyType
from typing import Any

from lbcore.config import Alias
from lbcore.ollama import MODEL_CHARS_MAX, canonical_model
from lbcore.parsing import ABSENT, Keys, Problem, RefusedError, parse_value, quote
from lbcore.schema import Kind, Setting, join

ALIAS_KEYS: Keys = (("", "alias"),)

_TEXTS = Setting(Kind.TEXTS, "models")
_UNUSABLE = re.compile(r'[\s,*"\\]|://')
_EXAMPLE = '"gpt-4o" = "llama3.2", or "gpt-4o" = ["llama3.3:70b", "llama3.2"]'


def parse_aliases(raw: Any, problems: list[Problem]) -> Mapping[str, Alias]:
    """Return the aliases by their canonical names, each with the models it comes to; append every problem found.

    In a chain, another alias stands for its own chain, and an alias's own name for the model of that name.
    """
    if not isinstance(raw, Mapping):
        problems.append(Problem("alias", raw, "is not a table", f"write [alias] and below it {_EXAMPLE}"))
        return MappingProxyType({})
    written: dict[str, Alias] = {}
    for name, value in raw.items():
        key = join("alias", name)
        found = list(_problems_of(name, value, key))
        same = written.get(canonical_model(name))
        if not found and same is not None:
            found = [Problem(key, ABSENT, f"is the same name as {join('alias', same.name)}", "write one of them")]
        problems += found
        if not found:
            models = [value] if isinstance(value, str) else value
            written[canonical_model(name)] = Alias(name, tuple(models))
    return MappingProxyType(_flattened(written, problems))


def _problems_of(name: str, value: Any, key: str) -> Iterator[Problem]:
    if not _is_usable(name):
        yield Problem(key, ABSENT, "is no name that a client could ask for", "write it as in a request: gpt-4o")
    if isinstance(value, Mapping):
        meant = quote(f"{name}.{next(iter(value), '1')}")
        yield Problem(key, value, "is a table", f'a name with a dot in it needs quotes: {meant} = "llama3.2"')
        return
    try:
        models = parse_value(_TEXTS, [value] if isinstance(value, str) else value)
    except RefusedError as error:
        yield Problem(key, value, error.message, f"write {_EXAMPLE}")
        return
    if not models:
        yield Problem(key, value, "names no model", f"write {_EXAMPLE}")
    for model in models:
        if not _is_usable(model):
            yield Problem(key, model, "is no name of a model", "write it as `ollama list` shows it")


def _is_usable(name: str) -> bool:
    return bool(name) and name.isprintable() and len(name) <= MODEL_CHARS_MAX and _UNUSABLE.search(name) is None


def _flattened(written: dict[str, Alias], problems: list[Problem]) -> dict[str, Alias]:
    """Return the aliases with the models that each comes to at last, in the order of the file."""
    flat: dict[str, Alias] = {}
    for asked in _from_the_end(written, problems):
        models: dict[str, str] = {}
        for name in written[asked].models:
            model = canonical_model(name)
            for each in (name,) if model == asked or model not in flat else flat[model].models:
                models.setdefault(canonical_model(each), each)
        flat[asked] = Alias(written[asked].name, tuple(models.values()))
    return {asked: flat[asked] for asked in written if asked in flat}


def _from_the_end(written: Mapping[str, Alias], problems: list[Problem]) -> Sequence[str]:
    """Return the aliases, those before others that stand in their chains; what goes in a circle is a problem."""
    leads_to = {
        asked: [model for name in alias.models if (model := canonical_model(name)) in written and model != asked]
        for asked, alias in written.items()
    }
    while True:
        try:
            return list(TopologicalSorter(leads_to).static_order())
        except CycleError as error:
            circle = error.args[1][::-1]  # each is named in the chain of the one before
            first = min(range(len(circle) - 1), key=lambda at: list(written).index(circle[at]))
            circle = [*circle[first:-1], *circle[: first + 1]]
            told = " -> ".join(quote(written[asked].name) for asked in circle)
            key = join("alias", written[circle[0]].name)
            problems.append(Problem(key, ABSENT, f"goes in a circle: {told}", "let one of them name a model"))
            leads_to = {
                asked: [model for model in models if model not in circle]
                for asked, models in leads_to.items()
                if asked not in circle
            }


def dump_aliases(aliases: Mapping[str, Alias]) -> dict[str, str | list[str]]:
    """Return the `[alias]` table that `parse_aliases` reads back as these."""
    return {
        alias.name: alias.models[0] if len(alias.models) == 1 else list(alias.models) for alias in aliases.values()
    }
