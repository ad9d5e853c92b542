"""How `/v1/chat/completions`, `/v1/completions` and `/v1/audio/transcriptions` write answers (tests/captures). Pure."""

from dataclasses import replace
from typing import Any

from simulator.fakes.answers import (
    Answer,
    Api,
    Call,
    Dialect,
    Part,
    Pieces,
    Timing,
    go_json,
    sse,
)
from simulator.fakes.specs import NS_PER_S

SSE_HEADERS = ((b"Content-Type", b"text/event-stream"),)
_DONE = b"data: [DONE]\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    made = len(answer.tokens)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": answer.prompt_tokens + made,
    }


def _chunk(answer: Answer, choices: list[dict[str, Any]], model: str | None = None) -> dict[str, Any]:
    head = {
        "id": answer.id,
        "object": "chat.completion.chunk" if answer.api is Api.OPENAI_CHAT else "text_completion",
        "created": answer.begun_wall_ns // NS_PER_S,
    }
    who = {"model": answer.model if model is None else model, "system_fingerprint": "fp_ollama"}
    if answer.api is Api.OPENAI_CHAT:
        return head | who | {"choices": choices}
    return head | {"choices": choices} | who


def _choice(answer: Answer, text: str | None, finish_reason: str | None, **more: Any) -> dict[str, Any]:
    if answer.api is Api.OPENAI_COMPLETIONS:
        return {"text": text or "", "index": 0, "finish_reason": finish_reason}
    role = {"role": more.pop("role")} if "role" in more else {}
    delta = role | ({} if text is None else {"content": text}) | more
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


def _called(call: Call) -> list[dict[str, Any]]:
    function = {"name": call.name, "arguments": call.arguments_json}
    return [{"id": call.id, "index": 0, "type": "function", "function": function}]


def _token(answer: Answer, index: int, _wall_ns: int) -> Pieces:
    token, part = answer.tokens[index], answer.part(index)
    more: dict[str, Any] = {} if index else {"role": "assistant"}
    if part is Part.THOUGHT:
        more["reasoning"] = token
    elif answer.call is not None and part is Part.CALL:
        more["tool_calls"] = _called(answer.call)
    return [sse(_chunk(answer, [_choice(answer, token if part is Part.TEXT else "", None, **more)]))]


def _finish_reason(answer: Answer) -> str:
    return answer.done_reason if answer.call is None else "tool_calls"


def _finish(answer: Answer, _timing: Timing) -> Pieces:
    last = sse(_chunk(answer, [_choice(answer, None, _finish_reason(answer))]))
    usage = sse(_chunk(answer, []) | {"usage": _usage(answer)}) if answer.usage else b""
    return [last + usage + _DONE]


def _single(answer: Answer, _timing: Timing) -> bytes:
    if answer.api is Api.OPENAI_CHAT:
        kind = "chat.completion"
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        message |= {"reasoning": answer.thinking} if answer.thinking else {}
        message |= {"tool_calls": _called(answer.call)} if answer.call is not None else {}
        choice = {"index": 0, "message": message, "finish_reason": _finish_reason(answer)}
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
        "usage": _usage(answer),
    }
    return go_json(whole) + b"\n"


def _killed(answer: Answer) -> Pieces:
    return [sse(_chunk(answer, [_choice(answer, "", None)], model=""))]


OPENAI = Dialect(
    stream_headers=SSE_HEADERS,
    single_type=b"application/json",
    token=_token,
    finish=_finish,
    single=_single,
    killed=_killed,
)


def _transcribed(answer: Answer, _timing: Timing) -> bytes:
    return go_json({"text": answer.text.strip()}) + b"\n"


TRANSCRIPTION = Dialect(
    single_type=b"application/json",
    single=_transcribed,
)
TRANSCRIPTION_AS_TEXT = replace(
    TRANSCRIPTION,
    single_type=b"text/plain",
    single=lambda answer, _timing: answer.text.strip().encode("utf-8", "replace"),
)
