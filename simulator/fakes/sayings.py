"""What a fake model says: words that depend on the request alone, thoughts, JSON, or the call of a tool. Pure."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from simulator.fake_ollama import FakeModel, FakeSpec, Prefill
from simulator.fakes.answers import Call, continued, go_json, hex_id, words
from simulator.fakes.extras import Extras

TOKENS_MAX = 100_000  # of one answer, whatever the client says
_JSON_TOKEN = re.compile(r".{1,4}", re.DOTALL)

Turns = list[tuple[str, str]]


class Saying(NamedTuple):
    """What is said, and why it ends."""

    tokens: tuple[str, ...]
    reason: str  # stop or length
    n_thoughts: int = 0
    call: Call | None = None


def say(
    model: FakeModel,
    spec: FakeSpec,
    turns: Turns,
    options: Mapping[str, Any],
    wanted: Extras,
    *,
    key: Callable[[Turns, Mapping[str, Any]], str],
) -> Saying:
    """Return what a model answers to `turns`; the same `key` has the same answer.

    A model that may call tools calls the first one it is offered, unless it was just told what one has said.
    """
    limit = options.get("num_predict")
    count = min(int(limit), TOKENS_MAX) if limit is not None and limit > 0 else None
    reason = "stop" if count is None else "length"
    role, prefix = turns[-1] if turns else ("", "")
    whole = f"{model.name}\0{key(turns, options)}"
    natural, seed = spec.tokens, spec.seed
    if wanted.tools and role != "tool":
        return _with_thoughts(_calling(wanted, whole), whole, seed, wanted)
    if wanted.schema is not None:
        written = _JSON_TOKEN.findall(go_json(made_up(wanted.schema, whole)).decode())
        return Saying(tuple(written[:count]), "stop" if count is None or count >= len(written) else "length")
    if role != "assistant" or not prefix or model.prefill is Prefill.IGNORE:
        tokens = tuple(words(whole, seed, natural if count is None else count))
        return Saying(tokens, reason, len(tokens) // 2 if wanted.think else 0)
    begun = f"{model.name}\0{key(turns[:-1], options)}"
    rest = continued(begun, seed, count, natural, prefix)
    if model.prefill is Prefill.ECHO and rest:
        rest[0] = prefix + rest[0]
    return Saying(tuple(rest), reason)


def _calling(wanted: Extras, key: str) -> Saying:
    name, schema = wanted.tools[0]
    arguments = made_up(schema, key)
    call = Call(f"call_{hex_id(key, digits=8)}", name, arguments if isinstance(arguments, dict) else {})
    return Saying((call.arguments_json,), "stop", 0, call)


def _with_thoughts(said: Saying, key: str, seed: int, wanted: Extras) -> Saying:
    thoughts = tuple(words(f"{key}\0thoughts", seed, 3)) if wanted.think else ()
    return said._replace(tokens=thoughts + said.tokens, n_thoughts=len(thoughts))


_DEPTH_MAX = 8
_PLAIN: Mapping[str, object] = {"integer": 7, "number": 1.5, "boolean": True, "null": None}


def made_up(schema: Mapping[str, Any], key: str, depth: int = 0) -> Any:
    """Return a value that a JSON schema allows, as far as it says `type`, `properties`, `items` and `enum`."""
    options = schema.get("enum")
    if isinstance(options, list) and options:
        return options[0]
    kind = schema.get("type")
    if kind == "string":
        return words(key, 0, 1)[0].strip()
    if isinstance(kind, str) and kind in _PLAIN:
        return _PLAIN[kind]
    if kind == "array":
        items = schema.get("items")
        return [made_up(items, key, depth + 1)] if isinstance(items, dict) and depth < _DEPTH_MAX else []
    properties = schema.get("properties")
    if not isinstance(properties, dict) or depth >= _DEPTH_MAX:
        return {}
    inner = {name: each if isinstance(each, dict) else {"type": "string"} for name, each in properties.items()}
    return {name: made_up(each, f"{key}\0{name}", depth + 1) for name, each in inner.items()}
