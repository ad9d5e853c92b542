"""How `/api/chat` and `/api/generate` write an answer, as the recordings in tests/captures show it. Pure."""

from typing import Any

from simulator.fakes.answers import (
    RUNNER_DIED,
    WORDS,
    Answer,
    Api,
    Call,
    Dialect,
    Part,
    Pieces,
    Timing,
    go_json,
    hex_id,
    rfc3339,
)


def _head(answer: Answer, wall_ns: int) -> dict[str, Any]:
    return {"model": answer.model, "created_at": rfc3339(wall_ns)}


def _said(answer: Answer, text: str, thinking: str = "", call: Call | None = None) -> dict[str, Any]:
    thought = {"thinking": thinking} if thinking else {}
    if answer.api is Api.GENERATE:
        return {"response": text} | thought
    calls = {"tool_calls": [_called(call)]} if call is not None else {}
    return {"message": {"role": "assistant", "content": text} | thought | calls}


def _called(call: Call) -> dict[str, Any]:
    return {"id": call.id, "function": {"index": 0, "name": call.name, "arguments": dict(call.arguments)}}


def _logprob(token: str) -> dict[str, Any]:
    chance = int(hex_id("logprob", token, digits=4), 16) / 0xFFFF
    return {"token": token, "logprob": -0.01 - chance, "bytes": list(token.encode("utf-8", "replace"))}


def _logprobs(answer: Answer, tokens: tuple[str, ...]) -> dict[str, Any]:
    if answer.logprobs is None:
        return {}
    others = [_logprob(word) for word in WORDS[: answer.logprobs]]
    return {"logprobs": [_logprob(token) | ({"top_logprobs": others} if others else {}) for token in tokens]}


def _token(answer: Answer, index: int, wall_ns: int) -> Pieces:
    token, part = answer.tokens[index], answer.part(index)
    said = {
        Part.TEXT: lambda: _said(answer, token),
        Part.THOUGHT: lambda: _said(answer, "", token),
        Part.CALL: lambda: _said(answer, "", "", answer.call),
    }[part]()
    line = _head(answer, wall_ns) | said | {"done": False}
    return [go_json(line | _logprobs(answer, (token,))) + b"\n"]


def _done(answer: Answer, said: dict[str, Any], timing: Timing, tokens: tuple[str, ...] = ()) -> dict[str, Any]:
    line = _head(answer, timing.wall_ns) | said
    line |= {"done": True, "done_reason": answer.done_reason}
    if answer.done_reason in {"load", "unload"}:
        return line
    if tokens:
        line |= _logprobs(answer, tokens)
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


def _finish(answer: Answer, timing: Timing) -> Pieces:
    return [go_json(_done(answer, _said(answer, ""), timing)) + b"\n"]


def _single(answer: Answer, timing: Timing) -> bytes:
    said = _said(answer, answer.text, answer.thinking, answer.call)
    return go_json(_done(answer, said, timing, answer.tokens))


def _killed(_answer: Answer) -> Pieces:
    return [go_json({"error": RUNNER_DIED}) + b"\n"]


NATIVE = Dialect(
    stream_headers=((b"Content-Type", b"application/x-ndjson"),),
    single_type=b"application/json; charset=utf-8",
    token=_token,
    finish=_finish,
    single=_single,
    killed=_killed,
)
