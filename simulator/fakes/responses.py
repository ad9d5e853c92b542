"""How `/v1/responses` writes an answer (captures: v1_responses_single, v1_responses_stream). Pure.

Each event of a stream has a number, so each token knows how many events came before it.
"""

from typing import Any

from simulator.fakes.answers import Answer, Dialect, Part, Pieces, Timing, event, go_json
from simulator.fakes.openai import SSE_HEADERS
from simulator.fakes.specs import NS_PER_S

_Event = tuple[str, dict[str, Any]]


def _response(answer: Answer, status: str, output: list[dict[str, Any]], wall_ns: int | None) -> dict[str, Any]:
    """Return the whole as it is at the beginning, and at the end (`wall_ns`)."""
    asked, made = answer.asked, len(answer.tokens)
    reasoning, text = asked.get("reasoning"), asked.get("text")
    usage = {
        "input_tokens": answer.prompt_tokens,
        "output_tokens": made,
        "total_tokens": answer.prompt_tokens + made,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    return {
        "id": answer.id,
        "object": "response",
        "created_at": answer.begun_wall_ns // NS_PER_S,
        "completed_at": None if wall_ns is None else wall_ns // NS_PER_S,
        "status": status,
        "incomplete_details": None,
        "model": answer.model,
        "previous_response_id": None,
        "instructions": asked.get("instructions") or None,
        "output": output,
        "error": None,
        "tools": asked.get("tools") or [],
        "tool_choice": "auto",
        "truncation": asked.get("truncation") or "disabled",
        "parallel_tool_calls": True,
        "text": text if isinstance(text, dict) and text.get("format") else {"format": {"type": "text"}},
        "top_p": _or_one(asked.get("top_p")),
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "top_logprobs": 0,
        "temperature": _or_one(asked.get("temperature")),
        "reasoning": reasoning if isinstance(reasoning, dict) and reasoning else None,
        "usage": None if wall_ns is None else usage,
        "max_output_tokens": asked.get("max_output_tokens"),
        "max_tool_calls": None,
        "store": False,
        "background": False,
        "service_tier": "default",
        "metadata": {},
        "safety_identifier": None,
        "prompt_cache_key": None,
    }


def _or_one(value: object) -> object:
    return 1 if value is None else value


def _ids(answer: Answer) -> dict[Part, str]:
    number = answer.id.removeprefix("resp_")
    return {Part.THOUGHT: f"rs_{number}", Part.TEXT: f"msg_{number}", Part.CALL: f"fc_{number}_0"}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _item(answer: Answer, part: Part) -> dict[str, Any]:
    """Return an item of the output once it is complete."""
    named = {"id": _ids(answer)[part]}
    if part is Part.THOUGHT:
        summary = [{"type": "summary_text", "text": answer.thinking}]
        return named | {"type": "reasoning", "summary": summary, "encrypted_content": answer.thinking}
    if answer.call is not None and part is Part.CALL:
        call = {"call_id": answer.call.id, "name": answer.call.name, "arguments": answer.call.arguments_json}
        return named | {"type": "function_call", "status": "completed"} | call
    said = {"role": "assistant", "content": [_text_part(answer.text)]}
    return named | {"type": "message", "status": "completed"} | said


def _output(answer: Answer) -> list[dict[str, Any]]:
    return [_item(answer, part) for part in answer.parts]


def _single(answer: Answer, timing: Timing) -> bytes:
    output = _output(answer) or [_item(answer, Part.TEXT)]
    return go_json(_response(answer, "completed", output, timing.wall_ns)) + b"\n"


# --- streams -----------------------------------------------------------------------------------------------------


def _opening(answer: Answer) -> list[_Event]:
    response = _response(answer, "in_progress", [], None)
    return [("response.created", {"response": response}), ("response.in_progress", {"response": response})]


def _of_token(answer: Answer, index: int) -> list[_Event]:
    """Return the events of a token: the end of the item before and the beginning of its own are two of them."""
    part = answer.part(index)
    if not answer.begins_part(index):
        return [_delta(answer, index)]
    before = _closing(answer, answer.part(index - 1)) if index else []
    after = _closing(answer, part) if part is Part.CALL else []
    return [*before, *_beginning(answer, part), _delta(answer, index), *after]


def _at(answer: Answer, part: Part) -> dict[str, Any]:
    return {"item_id": _ids(answer)[part], "output_index": list(answer.parts).index(part)}


def _delta(answer: Answer, index: int) -> _Event:
    part, token = answer.part(index), answer.tokens[index]
    at = _at(answer, part)
    if part is Part.THOUGHT:
        return "response.reasoning_summary_text.delta", at | {"summary_index": 0, "delta": token}
    if answer.call is not None and part is Part.CALL:
        return "response.function_call_arguments.delta", at | {"delta": answer.call.arguments_json}
    return "response.output_text.delta", at | {"content_index": 0, "delta": token, "logprobs": []}


_EMPTY: dict[Part, dict[str, Any]] = {
    Part.THOUGHT: {"summary": []},
    Part.TEXT: {"status": "in_progress", "content": []},
    Part.CALL: {"status": "in_progress", "arguments": ""},
}


def _beginning(answer: Answer, part: Part) -> list[_Event]:
    at = _at(answer, part)
    item = {key: value for key, value in (_item(answer, part) | _EMPTY[part]).items() if key != "encrypted_content"}
    added = ("response.output_item.added", {"output_index": at["output_index"], "item": item})
    if part is not Part.TEXT:
        return [added]
    return [added, ("response.content_part.added", at | {"content_index": 0, "part": _text_part("")})]


def _closing(answer: Answer, part: Part) -> list[_Event]:
    at = _at(answer, part)
    done = ("response.output_item.done", {"output_index": at["output_index"], "item": _item(answer, part)})
    if part is Part.THOUGHT:
        text = at | {"summary_index": 0, "text": answer.thinking}
        return [("response.reasoning_summary_text.done", text), done]
    if answer.call is not None and part is Part.CALL:
        return [("response.function_call_arguments.done", at | {"arguments": answer.call.arguments_json}), done]
    text = at | {"content_index": 0, "text": answer.text, "logprobs": []}
    whole = at | {"content_index": 0, "part": _text_part(answer.text)}
    return [("response.output_text.done", text), ("response.content_part.done", whole), done]


def _written(events: list[_Event], number: int) -> Pieces:
    """Return events with their numbers; Go sorts the names of the members."""
    return [
        event(kind, _sorted(fields | {"type": kind, "sequence_number": at}))
        for at, (kind, fields) in enumerate(events, number)
    ]


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(each) for each in value] if isinstance(value, list) else value


_N_EVENTS = {Part.THOUGHT: (1, 2), Part.TEXT: (2, 3), Part.CALL: (1, 2)}
"""How many events begin a part, and how many end it."""
_N_OPENING = 2


def _n_before(answer: Answer, index: int) -> int:
    """Return how many events come before those of a token."""
    begun = [part for part, first in answer.parts.items() if first < index]
    ended = begun if index > 0 and answer.part(index - 1) is Part.CALL else begun[:-1]
    n_around = sum(_N_EVENTS[part][0] for part in begun) + sum(_N_EVENTS[part][1] for part in ended)
    return _N_OPENING + index + n_around


def _begin(answer: Answer) -> Pieces:
    return _written(_opening(answer), 0)


def _token(answer: Answer, index: int, _wall_ns: int) -> Pieces:
    return _written(_of_token(answer, index), _n_before(answer, index))


def _finish(answer: Answer, timing: Timing) -> Pieces:
    n_tokens = len(answer.tokens)
    is_open = n_tokens > 0 and answer.call is None
    closing = _closing(answer, answer.part(n_tokens - 1)) if is_open else []
    response = _response(answer, "completed", _output(answer), timing.wall_ns)
    return _written([*closing, ("response.completed", {"response": response})], _n_before(answer, n_tokens))


RESPONSES = Dialect(
    stream_headers=((b"Cache-Control", b"no-cache"), *SSE_HEADERS),
    single_type=b"application/json",
    begin=_begin,
    token=_token,
    finish=_finish,
    single=_single,
)
