"""`[[models]]`: where each model is to be, into `ModelSettings`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lbcore.config import ModelSettings
from lbcore.ollama import MODEL_CHARS_MAX, canonical_model
from lbcore.parsing import Keys, Problem, choice_fix, parse_table
from lbcore.schema import join, keys_of

MODEL_KEYS: Keys = (("", "models"), *(("models", name) for _, name in keys_of(ModelSettings)))

_FIX = 'write [[models]] on a line of its own and below it name = "llama3.2"'


def parse_models(
    raw: Any, servers: Collection[str], problems: list[Problem], also: Keys
) -> tuple[ModelSettings, ...]:
    """Return the models of `[[models]]`; `servers` are the names of those there are."""
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        problems.append(Problem("models", raw, "is not a list of tables", _FIX))
        return ()
    parsed = [(f"models[{index}]", _parse_model(item, f"models[{index}]", problems, also))
              for index, item in enumerate(raw)]  # fmt: skip
    models = [(key, model) for key, model in parsed if model is not None]
    named: dict[str, str] = {}
    for key, model in models:
        problems.extend(_wrong(key, model, servers))
        first = named.setdefault(canonical_model(model.name), key)
        if first != key:
            what = f"is also the model of {first}"
            problems.append(Problem(join(key, "name"), model.name, what, "say all of a model in one table"))
    return tuple(model for _, model in models)


def _parse_model(raw: Any, key: str, problems: list[Problem], also: Keys) -> ModelSettings | None:
    if not isinstance(raw, Mapping):
        problems.append(Problem(key, raw, "is not a table", _FIX))
        return None
    return parse_table(ModelSettings, raw, key, problems, also=also)


def _wrong(key: str, model: ModelSettings, servers: Collection[str]) -> list[Problem]:
    """Return what of a model cannot be meant."""
    name = model.name.strip()
    problems = []
    if not name or len(name) > MODEL_CHARS_MAX or any(char.isspace() for char in name):
        fix = 'write it as `ollama pull` takes it, such as "llama3.2" or "llama3.3:70b"'
        problems.append(Problem(join(key, "name"), model.name, "is no name of a model", fix))
    problems += [
        Problem(join(key, "servers"), unknown, "is no server of this file", choice_fix(unknown, list(servers)))
        for unknown in model.servers
        if unknown not in servers
    ]
    n_allowed = len(set(model.servers))
    if model.servers and model.copies is not None and model.copies > n_allowed:
        message = f"is more than the {n_allowed} of its servers"
        problems.append(Problem(join(key, "copies"), model.copies, message, "name more servers, or want fewer copies"))
    return problems
