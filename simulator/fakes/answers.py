"""The bytes of an answer, in each of Ollama's dialects, as the recordings in tests/captures show them. Pure.

An `Answer` is all that is known when it begins; the functions of its `Dialect` turn it into the pieces that
Ollama writes: each `bytes` of a list is one HTTP chunk. Wall-clock times are int ns since 1970.
"""

import datetime as dt
import email.utils
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from simulator.fakes.specs import NS_PER_S

Pieces = list[bytes]

RUNNER_DIED = "an error was encountered while running the model: unexpected EOF"

# Short and long, several scripts, with what JSON must escape; at least two characters each.
WORDS = (
    " the", " of", " and", " river", " model", " quick", " stone", " light", " answer", " seven", " under",
    " window", " because", " always", " garden", " signal", " never", " north", " copper", " between", " slow",
    " café", " naïve", " für", " schließlich", " игра", " 良い", " 東京", " Ελλάδα", " \U0001f642", ' "so"',
    " a\\b", " <b>", " R&D", ", but", ", then", ". It", ". We", "\n\n", "ing", "ly", "tion", " 42", " (see)",
)  # fmt: skip
_WORD_LETTERS_MIN = min(map(len, WORDS))


def go_json(value: object) -> bytes:
    """Encode as Go's encoding/json does: compact, UTF-8, but with <, > and & escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character, escape in (("&", "\\u0026"), ("<", "\\u003c"), (">", "\\u003e")):
        text = text.replace(character, escape)
    return text.encode("utf-8", "replace")


def rfc3339(wall_ns: int) -> str:
    """Return a time as Go prints it: UTC, nanoseconds without trailing zeros."""
    seconds, ns = divmod(wall_ns, NS_PER_S)
    moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=seconds)
    fraction = f".{ns:09d}".rstrip("0").rstrip(".")
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def http_date(wall_ns: int) -> bytes:
    """Return a time as the Date header wants it."""
    return email.utils.formatdate(wall_ns // NS_PER_S, usegmt=True).encode()


def hex_id(*parts: object, digits: int = 24) -> str:
    """Return hex digits that depend on `parts` alone."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:digits]


# --- text --------------------------------------------------------------------------------------------------------


def words(key: str, seed: int, count: int) -> list[str]:
    """Return the first `count` tokens of the one answer that `key` has; a longer one begins with a shorter."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "replace")).digest()
    return random.Random(int.from_bytes(digest[:8])).choices(WORDS, k=count)


def continued(key: str, seed: int, count: int | None, natural: int, prefix: str) -> list[str]:
    """Return what follows `prefix`: if it is the beginning of the answer to `key`, the rest of that answer.

    So an answer that was cut off and is resumed elsewhere adds up to the answer that was not. `count` tokens
    are made, or, when None, as many as the whole answer's `natural` length leaves.
    """
    whole = words(key, seed, len(prefix) // _WORD_LETTERS_MIN + 1 + (natural if count is None else count))
    used = letters = 0
    while letters < len(prefix):
        letters += len(whole[used])
        used += 1
    if not "".join(whole[:used]).startswith(prefix):
        return words(f"{key}\0{prefix}", seed, natural if count is None else count)
    left = letters - len(prefix)  # letters of a token that the prefix stops within
    rest = [whole[used - 1][-left:]] if left else []
    rest += whole[used:]
    return rest[: max(0, natural - used + bool(left)) if count is None else count]


# --- answers -----------------------------------------------------------------------------------------------------


class Api(StrEnum):
    """The dialects in which tokens are asked for."""

    CHAT = "/api/chat"
    GENERATE = "/api/generate"
    OPENAI_CHAT = "/v1/chat/completions"
    OPENAI_COMPLETIONS = "/v1/completions"
    ANTHROPIC = "/v1/messages"
    EMBED = "/api/embed"
    EMBEDDINGS = "/api/embeddings"
    OPENAI_EMBEDDINGS = "/v1/embeddings"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, before its first token."""

    api: Api
    model: str  # as the client wrote it
    id: str
    tokens: tuple[str, ...]
    done_reason: str  # stop, length, load or unload
    stream: bool
    prompt_tokens: int
    begun_wall_ns: int
    usage: bool = False  # stream_options.include_usage
    context: bool = True  # /api/generate, unless raw
    logprobs: int | None = None  # /api/chat: give them, with so many alternatives each

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.tokens)


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time went, in ns, and when it ended."""

    total_ns: int
    load_ns: int
    prompt_ns: int
    eval_ns: int
    wall_ns: int


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one API speaks."""

    stream_headers: tuple[tuple[bytes, bytes], ...]
    single_type: bytes
    begin: Callable[[Answer], Pieces]  # sent with the first token
    token: Callable[[Answer, int, int], bytes]  # answer, index, wall_ns
    finish: Callable[[Answer, Timing], Pieces]
    single: Callable[[Answer, Timing], bytes]
    killed: Callable[[Answer], Pieces]  # what is still written when the runner dies mid-stream


def nothing(_answer: Answer) -> Pieces:
    """Return no piece: some dialects have none for the beginning, or for a death."""
    return []


def _native_head(answer: Answer, wall_ns: int) -> dict[str, Any]:
    return {"model": answer.model, "created_at": rfc3339(wall_ns)}


def _native_text(answer: Answer, text: str) -> dict[str, Any]:
    if answer.api is Api.CHAT:
        return {"message": {"role": "assistant", "content": text}}
    return {"response": text}


def _logprob(token: str) -> dict[str, Any]:
    chance = int(hex_id("logprob", token, digits=4), 16) / 0xFFFF
    return {"token": token, "logprob": -0.01 - chance, "bytes": list(token.encode("utf-8", "replace"))}


def _native_logprobs(answer: Answer, tokens: tuple[str, ...]) -> dict[str, Any]:
    if answer.logprobs is None or answer.api is not Api.CHAT:
        return {}
    others = [_logprob(word) for word in WORDS[: answer.logprobs]]
    return {"logprobs": [_logprob(token) | ({"top_logprobs": others} if others else {}) for token in tokens]}


def _native_token(answer: Answer, index: int, wall_ns: int) -> bytes:
    token = answer.tokens[index]
    line = _native_head(answer, wall_ns) | _native_text(answer, token) | {"done": False}
    return go_json(line | _native_logprobs(answer, (token,))) + b"\n"


def _native_done(answer: Answer, text: str, timing: Timing, tokens: tuple[str, ...] = ()) -> dict[str, Any]:
    line = _native_head(answer, timing.wall_ns) | _native_text(answer, text)
    line |= {"done": True, "done_reason": answer.done_reason}
    if answer.done_reason in {"load", "unload"}:
        return line
    if tokens:
        line |= _native_logprobs(answer, tokens)
    if answer.api is Api.GENERATE and answer.context:
        line["context"] = [518 + 37 * i % 31_000 for i in range(answer.prompt_tokens + len(answer.tokens))]
    figures = {
        "total_duration": timing.total_ns,
        "load_duration": timing.load_ns,
        "prompt_eval_count": answer.prompt_tokens,
        "prompt_eval_duration": timing.prompt_ns,
        "eval_count": len(answer.tokens),
        "eval_duration": timing.eval_ns,
    }
    return line | {name: value for name, value in figures.items() if value}


def _native_finish(answer: Answer, timing: Timing) -> Pieces:
    return [go_json(_native_done(answer, "", timing)) + b"\n"]


def _native_single(answer: Answer, timing: Timing) -> bytes:
    return go_json(_native_done(answer, answer.text, timing, answer.tokens))


def _native_killed(_answer: Answer) -> Pieces:
    return [go_json({"error": RUNNER_DIED}) + b"\n"]


def _sse(value: object) -> bytes:
    return b"data: " + go_json(value) + b"\n\n"


_DONE = b"data: [DONE]\n\n"


def _openai_usage(answer: Answer) -> dict[str, int]:
    made = len(answer.tokens)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": answer.prompt_tokens + made,
    }


def _openai_chunk(answer: Answer, choices: list[dict[str, Any]], model: str | None = None) -> dict[str, Any]:
    head = {
        "id": answer.id,
        "object": "chat.completion.chunk" if answer.api is Api.OPENAI_CHAT else "text_completion",
        "created": answer.begun_wall_ns // NS_PER_S,
    }
    who = {"model": answer.model if model is None else model, "system_fingerprint": "fp_ollama"}
    if answer.api is Api.OPENAI_CHAT:
        return head | who | {"choices": choices}
    return head | {"choices": choices} | who


def _openai_choice(answer: Answer, text: str | None, finish_reason: str | None, role: str = "") -> dict[str, Any]:
    if answer.api is Api.OPENAI_COMPLETIONS:
        return {"text": text or "", "index": 0, "finish_reason": finish_reason}
    delta = ({"role": role} if role else {}) | ({} if text is None else {"content": text})
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


def _openai_token(answer: Answer, index: int, _wall_ns: int) -> bytes:
    role = "" if index else "assistant"
    return _sse(_openai_chunk(answer, [_openai_choice(answer, answer.tokens[index], None, role)]))


def _openai_finish(answer: Answer, _timing: Timing) -> Pieces:
    last = _sse(_openai_chunk(answer, [_openai_choice(answer, None, answer.done_reason)]))
    usage = _sse(_openai_chunk(answer, []) | {"usage": _openai_usage(answer)}) if answer.usage else b""
    return [last + usage + _DONE]


def _openai_single(answer: Answer, _timing: Timing) -> bytes:
    if answer.api is Api.OPENAI_CHAT:
        kind = "chat.completion"
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.done_reason}
    else:
        kind = "text_completion"
        choice = {"text": answer.text, "index": 0, "finish_reason": answer.done_reason}
    whole = {
        "id": answer.id,
        "object": kind,
        "created": answer.begun_wall_ns // NS_PER_S,
        "model": answer.model,
        "system_fingerprint": "fp_ollama",
        "choices": [choice],
        "usage": _openai_usage(answer),
    }
    return go_json(whole) + b"\n"


def _openai_killed(answer: Answer) -> Pieces:
    return [_sse(_openai_chunk(answer, [_openai_choice(answer, "", None)], model=""))]


def _event(kind: str, **fields: object) -> bytes:
    return b"event: " + kind.encode() + b"\n" + _sse({"type": kind} | fields)


def _stop_reason(answer: Answer) -> str:
    return "max_tokens" if answer.done_reason == "length" else "end_turn"


def _anthropic_usage(answer: Answer) -> dict[str, int]:
    return {"input_tokens": answer.prompt_tokens, "output_tokens": len(answer.tokens)}


def _anthropic_message(answer: Answer) -> dict[str, Any]:
    return {"id": answer.id, "type": "message", "role": "assistant", "model": answer.model}


def _anthropic_begin(answer: Answer) -> Pieces:
    guess = max(1, answer.prompt_tokens // 4)  # Ollama, too, says less here than at the end
    message = _anthropic_message(answer) | {
        "content": [],
        "usage": {"input_tokens": guess, "output_tokens": 0},
    }
    block = {"type": "text", "text": ""}
    return [_event("message_start", message=message), _event("content_block_start", index=0, content_block=block)]


def _anthropic_token(answer: Answer, index: int, _wall_ns: int) -> bytes:
    return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": answer.tokens[index]})


def _anthropic_finish(answer: Answer, _timing: Timing) -> Pieces:
    delta = {"stop_reason": _stop_reason(answer)}
    return [
        _event("content_block_stop", index=0),
        _event("message_delta", delta=delta, usage=_anthropic_usage(answer)),
        _event("message_stop"),
    ]


def _anthropic_single(answer: Answer, _timing: Timing) -> bytes:
    whole = _anthropic_message(answer) | {
        "content": [{"type": "text", "text": answer.text}],
        "stop_reason": _stop_reason(answer),
        "usage": _anthropic_usage(answer),
    }
    return go_json(whole) + b"\n"


_SSE_HEADERS = ((b"Content-Type", b"text/event-stream"),)
NATIVE = Dialect(
    stream_headers=((b"Content-Type", b"application/x-ndjson"),),
    single_type=b"application/json; charset=utf-8",
    begin=nothing,
    token=_native_token,
    finish=_native_finish,
    single=_native_single,
    killed=_native_killed,
)
OPENAI = Dialect(
    stream_headers=_SSE_HEADERS,
    single_type=b"application/json",
    begin=nothing,
    token=_openai_token,
    finish=_openai_finish,
    single=_openai_single,
    killed=_openai_killed,
)
ANTHROPIC = Dialect(
    stream_headers=((b"Cache-Control", b"no-cache"), *_SSE_HEADERS),
    single_type=b"application/json",
    begin=_anthropic_begin,
    token=_anthropic_token,
    finish=_anthropic_finish,
    single=_anthropic_single,
    killed=nothing,
)
