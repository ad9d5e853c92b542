"""What the generating endpoints are asked for, read and checked as Ollama does. Pure.

The order of the checks is Ollama's, since with two mistakes in one request the first decides the answer.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from simulator.fake_ollama import FakeModel, FakeOllama, RunnerOptions, keep_alive_ns, runner_options
from simulator.fakes.answers import Api, Call
from simulator.fakes.bodies import ApiError, check_options, full_name, parse, text_field
from simulator.fakes.extras import Extras, extras
from simulator.fakes.forms import form_fields
from simulator.fakes.replies import Request
from simulator.fakes.sayings import say
from simulator.fakes.specs import NS_PER_S

_STRUCTS = {
    Api.CHAT: "ChatRequest",
    Api.GENERATE: "GenerateRequest",
    Api.OPENAI_CHAT: "ChatCompletionRequest",
    Api.OPENAI_COMPLETIONS: "CompletionRequest",
    Api.RESPONSES: "ResponsesRequest",
    Api.ANTHROPIC: "MessagesRequest",
}
_NATIVE = frozenset({Api.CHAT, Api.GENERATE})


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
    blind: bool = False  # there are images, or a recording, and the model cannot see or hear
    unload: bool = False
    logprobs: int | None = None  # wanted, with so many alternatives
    rendered: str | None = None  # `_debug_render_only`: all that is wanted is the prompt as the model sees it
    n_thoughts: int = 0  # of the tokens
    call: Call | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)  # the request


def wish(api: Api, request: Request, fake: FakeOllama) -> Wish:
    """Read a request to `api`. Raises ApiError."""
    fields = form_fields(request) if api is Api.TRANSCRIPTION else parse(request.body, _STRUCTS[api])
    _CHECKS.get(api, _no_check)(fields)
    native = api in _NATIVE
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
    wanted = extras(api, fields)
    if not unload:
        _check_capabilities(api, model, name, fields, wanted)
    options = dict(fields.get("options") or {}) if native else _from_compatible(fields)
    if unload:
        options = {}
    check_options(options)
    key = _key(turns, options)
    said = say(model, fake.spec, turns, options, wanted, key=_key) if turns or not native else None
    return Wish(
        api=api,
        model=model,
        model_as_written=name,
        options=runner_options(model, options),
        keep_alive_ns=alive_ns,
        tokens=() if said is None else said.tokens,
        done_reason="load" if said is None else said.reason,
        stream=fields.get("stream") is not False if native else fields.get("stream") is True,
        prompt_tokens=8 + sum(1 + len(text) // 4 for _role, text in turns),
        key=key,
        usage=not native and bool((fields.get("stream_options") or {}).get("include_usage")),
        raw=fields.get("raw") is True,
        blind=wanted.images and _sense(api) not in model.capabilities,
        unload=unload,
        logprobs=int(fields.get("top_logprobs") or 0) if fields.get("logprobs") is True else None,
        rendered=_rendered(turns) if fields.get("_debug_render_only") is True else None,
        n_thoughts=0 if said is None else said.n_thoughts,
        call=None if said is None else said.call,
        asked=fields,
    )


def _sense(api: Api) -> str:
    return "audio" if api is Api.TRANSCRIPTION else "vision"


def _rendered(turns: list[tuple[str, str]]) -> str:
    """Return the prompt that the template of `/api/show` makes; a trailing assistant message is left open."""
    opened = turns[-1][1] if turns and turns[-1][0] == "assistant" else ""
    done = turns[:-1] if opened else turns
    return "".join(f"[{role}]: {text}\n" for role, text in done) + f"[assistant]:{opened}"


# --- checks ------------------------------------------------------------------------------------------------------


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


def _check_responses(fields: Mapping[str, Any]) -> None:
    wanted = fields.get("input")
    items = wanted if isinstance(wanted, list) else []
    if wanted is not None and not isinstance(wanted, str | list):
        raise ApiError(400, "input must be a string or array", early=True)
    for at, item in enumerate(items):
        if not isinstance(item, dict) or not (item.get("type") or item.get("role")):
            raise ApiError(400, f"input[{at}]: input item missing required 'type' field", early=True)


_CHECKS: Mapping[Api, Callable[[Mapping[str, Any]], None]] = {
    Api.OPENAI_CHAT: _check_openai_chat,
    Api.RESPONSES: _check_responses,
    Api.ANTHROPIC: _check_anthropic,
}


def _check_capabilities(api: Api, model: FakeModel, name: str, fields: Mapping[str, Any], wanted: Extras) -> None:
    can = model.capabilities
    if "completion" not in can:  # it only embeds
        verb = "generate" if api in {Api.GENERATE, Api.OPENAI_COMPLETIONS} else "chat"
        raise ApiError(400, f'"{name}" does not support {verb}')
    if wanted.think and "thinking" not in can:
        raise ApiError(400, f'"{name}" does not support thinking')
    for asked, capability in ((fields.get("tools"), "tools"), (fields.get("suffix"), "insert")):
        if asked and capability not in can:
            raise ApiError(400, f"{full_name(model)} does not support {capability}")


# --- what was said before ----------------------------------------------------------------------------------------


def _from_compatible(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the native options that the fields of the compatible APIs amount to."""
    limits = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    limit = next((fields[name] for name in limits if fields.get(name)), None)
    return {"num_predict": limit, "seed": fields.get("seed")}


def _text(content: object) -> str:
    """Return a message's text, its parts joined."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(text_field(part, "text") for part in parts if isinstance(part, dict))


def _turns(api: Api, fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the conversation as (role, text); empty when nothing is asked."""
    if api in {Api.GENERATE, Api.OPENAI_COMPLETIONS, Api.TRANSCRIPTION}:
        prompt = text_field(fields, "prompt")
        system = [("system", text_field(fields, "system"))] if fields.get("system") else []
        raw = "raw-prompt" if fields.get("raw") is True else "prompt"
        return [*system, (raw, prompt)] if prompt else []
    if api is Api.RESPONSES:
        return _response_turns(fields)
    turns = [(text_field(message, "role"), _text(message.get("content"))) for message in fields.get("messages") or ()]
    if api is not Api.ANTHROPIC:
        return turns
    system = [("system", _text(fields["system"]))] if fields.get("system") else []
    return [*system, *(_told(message, turn) for message, turn in zip(fields["messages"], turns, strict=True))]


def _told(message: Mapping[str, Any], turn: tuple[str, str]) -> tuple[str, str]:
    """Return a turn of Anthropic's, in which it is the user who tells what a tool has said."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    results = [part for part in parts if isinstance(part, dict) and part.get("type") == "tool_result"]
    return ("tool", _text(results[0].get("content"))) if results else turn


def _response_turns(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    system = [("system", text_field(fields, "instructions"))] if fields.get("instructions") else []
    wanted = fields.get("input")
    if isinstance(wanted, str):
        return [*system, ("user", wanted)] if wanted else system
    items = wanted if isinstance(wanted, list) else []
    told = [("tool", _text(i.get("output"))) if i.get("type") == "function_call_output" else _spoken(i) for i in items]
    return [*system, *told]


def _spoken(item: Mapping[str, Any]) -> tuple[str, str]:
    return text_field(item, "role"), _text(item.get("content"))


def _key(turns: list[tuple[str, str]], options: Mapping[str, Any]) -> str:
    return json.dumps([turns, options.get("seed")])
