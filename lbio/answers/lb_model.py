"""The model `lb`, which no server has: what the `ollama` CLI asks it is answered here, `ollama run lb status`."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from lbcore.explain import Explanation
from lbcore.ollama import BodyFacts, RequestKind
from lbio.answers.explained import UNDER_WAY
from lbio.answers.lb_texts import HELP, Told, models_text, servers_text, status_text
from lbio.answers.local import LocalAnswer, json_answer
from lbio.journal.explanations import explanation_lines

NAME: Final = "lb:latest"
"""Its canonical name."""

SHOW: Final = "/api/show"
ROUTES: Final = frozenset({SHOW, "/api/generate", "/api/chat"})
"""Where the CLI names the model that it runs."""

_NDJSON = b"application/x-ndjson"
_BODY_BYTES_MAX = 1 << 20  # of a conversation that is looked at
_NOTHING_MEASURED = dict.fromkeys(
    ("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"), 0
)
_SHOWN = {
    "modelfile": "# ollama-lb itself: ollama run lb help\n",
    "parameters": "",
    "template": "",
    "details": {
        "parent_model": "",
        "format": "",
        "family": "ollama-lb",
        "families": ["ollama-lb"],
        "parameter_size": "",
        "quantization_level": "",
    },
    "capabilities": ["completion"],
}  # without "model_info", of which the CLI takes all to be there, or nothing

_TABLES: Mapping[str, Callable[[Told], str]] = {
    "status": status_text,
    "servers": servers_text,
    "models": models_text,
}


class _Message(msgspec.Struct):
    role: str = ""
    content: str = ""


class _Asked(msgspec.Struct):
    prompt: str = ""
    messages: list[_Message] = []


_decode = msgspec.json.Decoder(_Asked).decode


class LbModel:
    """Says what it is asked for. `told` gives what /status tells, `explain` the story of a request, or an error."""

    def __init__(
        self, told: Callable[[], Told], explain: Callable[[str], Awaitable[Explanation | LocalAnswer]]
    ) -> None:
        self._told = told
        self._explain = explain

    async def answer(self, route: str, facts: BodyFacts, body: bytes, why_not: str) -> LocalAnswer:
        """Answer a request of the CLI. With `why_not` all that is said is that."""
        if route == SHOW:
            return json_answer(200, {**_SHOWN, "modified_at": _now()})
        if facts.kind in {RequestKind.LOAD, RequestKind.UNLOAD}:
            return _spoken(route, facts, "", "load" if facts.kind is RequestKind.LOAD else "unload")
        return _spoken(route, facts, why_not or await self._say(words_of(body)), "stop")

    async def _say(self, words: Sequence[str]) -> str:
        topic = words[0].lower() if words else ""
        if topic == "why" and len(words) == 2:
            story = await self._explain(words[1])
            if isinstance(story, LocalAnswer):
                return str(json.loads(story.body)["error"])
            return "\n".join(explanation_lines(story, UNDER_WAY))
        table = _TABLES.get(topic) if len(words) == 1 else None
        return HELP if table is None else table(self._told())


def words_of(body: bytes) -> list[str]:
    """Return what was typed last; [] when that cannot be read, or is nothing."""
    if len(body) > _BODY_BYTES_MAX:
        return []
    try:
        asked = _decode(body)
    except (ValueError, RecursionError):  # of which msgspec's errors and bad UTF-8 are some
        return []
    said = (message.content for message in reversed(asked.messages) if message.role == "user")
    return (asked.prompt or next(said, "")).split()


def _spoken(route: str, facts: BodyFacts, text: str, reason: str) -> LocalAnswer:
    """Return a text as a model says it: in a stream of two lines, or at once."""
    about = {"model": facts.model, "created_at": _now()}
    end = {"done": True, "done_reason": reason, **(_NOTHING_MEASURED if reason == "stop" else {})}
    if not facts.stream:
        return json_answer(200, {**about, **_said(route, text), **end})
    lines = ({**about, **_said(route, text), "done": False}, {**about, **_said(route, ""), **end})
    return LocalAnswer(200, _NDJSON, "".join(f"{_dumps(line)}\n" for line in lines).encode())


def _said(route: str, text: str) -> dict[str, Any]:
    return {"response": text} if route == "/api/generate" else {"message": {"role": "assistant", "content": text}}


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
