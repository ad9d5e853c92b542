"""Request bodies of the generating endpoints, read and checked as Ollama does. Pure.

The order of the checks is Ollama's, since with two mistakes in one request the first decides the answer.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from simulator.fake_ollama import FakeModel, FakeOllama, Prefill, RunnerOptions, keep_alive_ns, runner_options
from simulator.fakes.answers import Api, continued, words
from simulator.fakes.specs import NS_PER_S


class ApiError(Exception):
    """An answer that is an error. `early`: before the body has reached the handler proper."""

    def __init__(self, status: int, message: str, *, early: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.early = early


_GO_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "bool"),
    (str, "string"),
    (int, "number"),
    (float, "number"),
    (list, "array"),
    (dict, "object"),
)
_OBJECT = "map[string]interface {}"
_MANAGED = {"model": (str, "string"), "name": (str, "string"), "stream": (bool, "bool")}
_FIELDS: Mapping[str, Mapping[str, tuple[type, str]]] = {
    "ChatRequest": {
        "model": (str, "string"),
        "messages": (list, "[]api.Message"),
        "stream": (bool, "bool"),
        "top_logprobs": (int, "int"),
        "options": (dict, _OBJECT),
    },
    "GenerateRequest": {
        "model": (str, "string"),
        "prompt": (str, "string"),
        "suffix": (str, "string"),
        "stream": (bool, "bool"),
        "raw": (bool, "bool"),
        "options": (dict, _OBJECT),
    },
    "ChatCompletionRequest": {
        "model": (str, "string"),
        "messages": (list, "[]openai.Message"),
        "stream": (bool, "bool"),
        "stream_options": (dict, "openai.StreamOptions"),
        "max_completion_tokens": (int, "int"),
        "max_tokens": (int, "int"),
    },
    "CompletionRequest": {
        "model": (str, "string"),
        "prompt": (str, "string"),
        "stream": (bool, "bool"),
        "stream_options": (dict, "openai.StreamOptions"),
        "max_tokens": (int, "int"),
    },
    "EmbedRequest": {
        "model": (str, "string"),
        "prompt": (str, "string"),
        "truncate": (bool, "bool"),
        "dimensions": (int, "int"),
        "encoding_format": (str, "string"),
        "options": (dict, _OBJECT),
    },
    "PullRequest": _MANAGED,
    "PushRequest": _MANAGED,
    "CreateRequest": _MANAGED | {"from": (str, "string")},
    "MessagesRequest": {
        "model": (str, "string"),
        "messages": (list, "[]anthropic.MessageParam"),
        "stream": (bool, "bool"),
        "max_tokens": (int, "int"),
    },
}
_STRUCTS = {
    Api.CHAT: "ChatRequest",
    Api.GENERATE: "GenerateRequest",
    Api.OPENAI_CHAT: "ChatCompletionRequest",
    Api.OPENAI_COMPLETIONS: "CompletionRequest",
    Api.ANTHROPIC: "MessagesRequest",
}
_INTEGER_OPTIONS = frozenset(
    {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep"}
    | {"seed", "num_predict", "top_k", "repeat_last_n"}
)
TOKENS_MAX = 100_000  # of one answer, whatever the client says
_FLOAT_OPTIONS = frozenset(
    {"temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty"}
)


def parse(body: bytes, struct: str) -> dict[str, Any]:
    """Return a body as an object whose known fields have the right types. Raises ApiError 400, in Go's words."""
    if not body.strip():
        raise ApiError(400, "missing request body", early=True)
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, _go_syntax_error(body, error), early=True) from error
    if not isinstance(found, dict):
        raise ApiError(400, f"json: cannot unmarshal {_kind(found)} into Go value of type api.{struct}", early=True)
    fields = _FIELDS.get(struct, {})
    for name, (kind, go_type) in fields.items():
        value = found.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool)):
            raise ApiError(400, _mismatch(value, struct, name, go_type), early=True)
    if "messages" not in fields:
        found.pop("messages", None)  # Go ignores what a struct does not have
    for message in found.get("messages") or ():
        if not isinstance(message, dict):
            raise ApiError(400, _mismatch(message, struct, "messages", "api.Message"), early=True)
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def text_field(body: Mapping[str, Any], name: str) -> str:
    """Return a field that should be text, "" if it is anything else."""
    value = body.get(name)
    return value if isinstance(value, str) else ""


def named(body: Mapping[str, Any], missing: str = "model is required") -> str:
    """Return the model that a body names. Raises ApiError 400 with what is said when there is none."""
    name = text_field(body, "model") or text_field(body, "name")
    if not name:
        raise ApiError(400, missing)
    return name


def full_name(model: FakeModel) -> str:
    """Return a model's name with everything that may be left out."""
    return model.name if model.name.count("/") > 1 else f"registry.ollama.ai/library/{model.name}"


def _kind(value: object) -> str:
    return next((name for kind, name in _GO_KINDS if isinstance(value, kind)), "null")


def _mismatch(value: object, struct: str, name: str, go_type: str) -> str:
    return f"json: cannot unmarshal {_kind(value)} into Go struct field {struct}.{name} of type {go_type}"


def _go_syntax_error(body: bytes, error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "invalid character"
    rest = error.doc[error.pos :].strip()
    if not rest or error.msg.startswith("Unterminated string"):
        return "unexpected EOF"
    where = "looking for beginning of value" if body.lstrip()[:1] not in b"{[" else "in object"
    return f"invalid character '{rest[0]}' {where}"


# --- what is wished for ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wish:
    """What a valid request asks for, the answer's tokens included."""

    api: Api
    model: FakeModel
    model_as_written: str
    options: RunnerOptions
    keep_alive_ns: int
    tokens: tuple[str, ...]
    done_reason: str  # stop, length, or load: nothing but the model is wanted
    stream: bool
    prompt_tokens: int
    key: str  # the prompt, canonical: the same key has the same answer
    usage: bool = False
    raw: bool = False
    images: bool = False
    unload: bool = False
    logprobs: int | None = None  # wanted, with so many alternatives
    rendered: str | None = None  # `_debug_render_only`: all that is wanted is the prompt as the model sees it


def wish(api: Api, body: bytes, fake: FakeOllama) -> Wish:
    """Read the body of a request to `api`. Raises ApiError."""
    fields = parse(body, _STRUCTS[api])
    _CHECKS.get(api, _no_check)(fields)
    native = api in {Api.CHAT, Api.GENERATE}
    default_ns = round(fake.spec.keep_alive_s * NS_PER_S)
    try:
        alive_ns = keep_alive_ns(fields.get("keep_alive") if native else None, default_ns)
    except ValueError as error:
        raise ApiError(400, str(error), early=True) from error
    name = text_field(fields, "model")
    if not name:
        raise ApiError(400, "model is required")
    model = fake.find(name)
    if model is None:
        raise ApiError(404, f"model '{name}' not found")
    turns = _turns(api, fields)
    unload = native and not turns and alive_ns == 0
    if not unload:
        _check_capabilities(model, name, fields)
    options = dict(fields.get("options") or {}) if native else _from_compatible(fields)
    if unload:
        options = {}
    check_options(options)
    tokens, reason = _tokens(turns, options, model, fake) if turns or not native else ((), "load")
    return Wish(
        api=api,
        model=model,
        model_as_written=name,
        options=runner_options(model, options),
        keep_alive_ns=alive_ns,
        tokens=tokens,
        done_reason=reason,
        stream=fields.get("stream") is not False if native else fields.get("stream") is True,
        prompt_tokens=8 + sum(1 + len(text) // 4 for _role, text in turns),
        key=_key(turns, options),
        usage=not native and bool((fields.get("stream_options") or {}).get("include_usage")),
        raw=fields.get("raw") is True,
        images="vision" not in model.capabilities and _has_images(fields),
        unload=unload,
        logprobs=int(fields.get("top_logprobs") or 0) if fields.get("logprobs") is True else None,
        rendered=_rendered(turns) if fields.get("_debug_render_only") is True else None,
    )


def _rendered(turns: list[tuple[str, str]]) -> str:
    """Return the prompt that the template of `/api/show` makes; a trailing assistant message is left open."""
    opened = turns[-1][1] if turns and turns[-1][0] == "assistant" else ""
    done = turns[:-1] if opened else turns
    return "".join(f"[{role}]: {text}\n" for role, text in done) + f"[assistant]:{opened}"


def _no_check(_fields: Mapping[str, Any]) -> None:
    pass


def _check_openai_chat(fields: Mapping[str, Any]) -> None:
    if not fields.get("messages"):
        raise ApiError(400, "[] is too short - 'messages'", early=True)


def _check_anthropic(fields: Mapping[str, Any]) -> None:
    for wrong, message in (
        (not fields.get("model"), "model is required"),
        ((fields.get("max_tokens") or 0) <= 0, "max_tokens is required and must be positive"),
        (not fields.get("messages"), "messages is required"),
    ):
        if wrong:
            raise ApiError(400, message, early=True)


_CHECKS: Mapping[Api, Callable[[Mapping[str, Any]], None]] = {
    Api.OPENAI_CHAT: _check_openai_chat,
    Api.ANTHROPIC: _check_anthropic,
}


def _check_capabilities(model: FakeModel, name: str, fields: Mapping[str, Any]) -> None:
    can = model.capabilities
    if fields.get("think") and "thinking" not in can:
        raise ApiError(400, f'"{name}" does not support thinking')
    for field, capability, word in (("tools", "tools", "tools"), ("suffix", "insert", "insert")):
        if fields.get(field) and capability not in can:
            raise ApiError(400, f"{full_name(model)} does not support {word}")


_NUMBER_MAX = 2.0**63  # Go's int64 holds no more


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of the wrong type; the client's fault, though Ollama says 500 (chat_bad_option)."""
    for name, value in options.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _NUMBER_MAX
        if value is None or (number and (name in _INTEGER_OPTIONS or name in _FLOAT_OPTIONS)):
            continue
        if name in _INTEGER_OPTIONS:
            raise ApiError(500, f'option "{name}" must be of type integer')
        if name in _FLOAT_OPTIONS:
            raise ApiError(500, f'option "{name}" must be of type float32')


def _from_compatible(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the native options that the fields of the compatible APIs amount to."""
    limit = fields.get("max_tokens") or fields.get("max_completion_tokens")
    return {"num_predict": limit, "seed": fields.get("seed")}


def _text(content: object) -> str:
    """Return a message's text, its parts joined."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(text_field(part, "text") for part in parts if isinstance(part, dict))


def _has_images(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("images")) or any(message.get("images") for message in fields.get("messages") or ())


def _turns(api: Api, fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the conversation as (role, text); empty when nothing is asked."""
    if api in {Api.GENERATE, Api.OPENAI_COMPLETIONS}:
        prompt = text_field(fields, "prompt")
        system = [("system", text_field(fields, "system"))] if fields.get("system") else []
        raw = "raw-prompt" if fields.get("raw") is True else "prompt"
        return [*system, (raw, prompt)] if prompt else []
    turns = [(text_field(message, "role"), _text(message.get("content"))) for message in fields.get("messages") or ()]
    system = [("system", _text(fields["system"]))] if api is Api.ANTHROPIC and fields.get("system") else []
    return system + turns


def _key(turns: list[tuple[str, str]], options: Mapping[str, Any]) -> str:
    return json.dumps([turns, options.get("seed")])


def _tokens(
    turns: list[tuple[str, str]], options: Mapping[str, Any], model: FakeModel, fake: FakeOllama
) -> tuple[tuple[str, ...], str]:
    """Return the answer's tokens and why it ends."""
    limit = options.get("num_predict")
    count = min(int(limit), TOKENS_MAX) if limit is not None and limit > 0 else None
    reason = "stop" if count is None else "length"
    natural, seed = fake.spec.tokens, fake.spec.seed
    role, prefix = turns[-1] if turns else ("", "")
    if role != "assistant" or not prefix or model.prefill is Prefill.IGNORE:
        key = f"{model.name}\0{_key(turns, options)}"
        return tuple(words(key, seed, natural if count is None else count)), reason
    key = f"{model.name}\0{_key(turns[:-1], options)}"
    tokens = continued(key, seed, count, natural, prefix)
    if model.prefill is Prefill.ECHO and tokens:
        tokens[0] = prefix + tokens[0]
    return tuple(tokens), reason
