"""Request bodies as JSON: fields of the right types, or an error in Go's words. Pure."""

import json
from collections.abc import Mapping
from typing import Any

from simulator.fake_ollama import FakeModel


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
    "ResponsesRequest": {
        "model": (str, "string"),
        "stream": (bool, "bool"),
        "max_output_tokens": (int, "int"),
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


# --- options -----------------------------------------------------------------------------------------------------

_INTEGER_OPTIONS = frozenset(
    {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep"}
    | {"seed", "num_predict", "top_k", "repeat_last_n"}
)
_FLOAT_OPTIONS = frozenset(
    {"temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty"}
)
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
