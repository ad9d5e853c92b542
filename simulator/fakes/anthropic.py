"""How `/v1/messages` writes an answer (captures: v1_messages_stream, v1_messages_single and others). Pure."""

from typing import Any

from simulator.fakes.answers import Answer, Dialect, Part, Pieces, Timing, event, go_json
from simulator.fakes.openai import SSE_HEADERS


def _event(kind: str, **fields: object) -> bytes:
    return event(kind, {"type": kind} | fields)


def _stop_reason(answer: Answer) -> str:
    if answer.call is not None:
        return "tool_use"
    return "max_tokens" if answer.done_reason == "length" else "end_turn"


def _usage(answer: Answer) -> dict[str, int]:
    return {"input_tokens": answer.prompt_tokens, "output_tokens": len(answer.tokens)}


def _message(answer: Answer) -> dict[str, Any]:
    return {"id": answer.id, "type": "message", "role": "assistant", "model": answer.model}


def _begin(answer: Answer) -> Pieces:
    guess = max(1, answer.prompt_tokens // 4)  # Ollama, too, says less here than at the end
    usage = {"input_tokens": guess, "output_tokens": 0}
    return [_event("message_start", message=_message(answer) | {"content": [], "usage": usage})]


def _token(answer: Answer, index: int, _wall_ns: int) -> Pieces:
    """Return a token, and if it is the first of its block, what ends the block before and begins this one."""
    block, delta = _block(answer, index)
    at = list(answer.parts).index(answer.part(index))
    ended = [_event("content_block_stop", index=at - 1)] if answer.begins_part(index) and index else []
    begun = [_event("content_block_start", index=at, content_block=block)] if answer.begins_part(index) else []
    whole = [_event("content_block_stop", index=at)] if answer.part(index) is Part.CALL else []
    return [*ended, *begun, _event("content_block_delta", index=at, delta=delta), *whole]


def _block(answer: Answer, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how the block of a token begins, and the token."""
    token, part = answer.tokens[index], answer.part(index)
    if answer.call is not None and part is Part.CALL:
        call = {"type": "tool_use", "id": answer.call.id, "name": answer.call.name, "input": {}}
        return call, {"type": "input_json_delta", "partial_json": answer.call.arguments_json}
    if part is Part.THOUGHT:
        return {"type": "thinking", "thinking": ""}, {"type": "thinking_delta", "thinking": token}
    return {"type": "text", "text": ""}, {"type": "text_delta", "text": token}


def _finish(answer: Answer, _timing: Timing) -> Pieces:
    last = len(answer.parts) - 1
    is_open = last >= 0 and answer.call is None
    return [
        *([_event("content_block_stop", index=last)] if is_open else []),
        _event("message_delta", delta={"stop_reason": _stop_reason(answer)}, usage=_usage(answer)),
        _event("message_stop"),
    ]


def _single(answer: Answer, _timing: Timing) -> bytes:
    thoughts = [{"type": "thinking", "thinking": answer.thinking}] if answer.thinking else []
    text = [{"type": "text", "text": answer.text}] if answer.text else []
    call = answer.call
    calls = [{"type": "tool_use", "id": call.id, "name": call.name, "input": dict(call.arguments)}] if call else []
    content = [*thoughts, *text, *calls]
    whole = _message(answer) | {"content": content, "stop_reason": _stop_reason(answer), "usage": _usage(answer)}
    return go_json(whole) + b"\n"


ANTHROPIC = Dialect(
    stream_headers=((b"Cache-Control", b"no-cache"), *SSE_HEADERS),
    single_type=b"application/json",
    begin=_begin,
    token=_token,
    finish=_finish,
    single=_single,
)
