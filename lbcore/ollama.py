"""The wire protocol's facts: routes, terminators, error shapes, model names and what a request body asks for.

Source of every rule: recorded traffic of a real Ollama (tests/captures) and its API documentation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final

from lbcore.config import RaceSettings, RouteSettings, Strategy


class Shape(StrEnum):
    """Whose error format a path speaks."""

    NATIVE = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class Ending(StrEnum):
    """What tells that a streamed answer is complete (a clean end of the body without it is truncation)."""

    FRAMING = "framing"  # nothing but the end of the HTTP body
    NDJSON_DONE = "ndjson-done"  # a line whose object has "done":true
    NDJSON_SUCCESS = "ndjson-success"  # a line whose object has "status":"success"
    SSE_DONE = "sse-done"  # data: [DONE]
    RESPONSE_COMPLETED = "response-completed"  # event: response.completed (or .incomplete)
    MESSAGE_STOP = "message-stop"  # event: message_stop


class RequestKind(StrEnum):
    """What a request wants from the model."""

    GENERATE = "generate"  # tokens, or any other answer
    LOAD = "load"  # an empty prompt: only load the model
    UNLOAD = "unload"  # an empty prompt with keep_alive 0: drop it from memory
    MANAGE = "manage"  # may change something on a server, so it is never sent twice


@dataclass(frozen=True, slots=True)
class Route:
    """One path of the API. `name` is its key in `[routes]`; a last part that begins with ":" stands for any."""

    name: str
    methods: tuple[str, ...]
    strategy: Strategy
    allowed: tuple[Strategy, ...]
    shape: Shape = Shape.NATIVE
    ending: Ending = Ending.FRAMING
    streams_by_default: bool = False
    generates: bool = False  # asks a model for tokens or embeddings, so it uses one of its slots
    changes: bool = False  # changes what a server has
    needs_model: bool = True  # only a server that has the model named in the body can do it
    uploads: bool = False  # the body of a POST is passed on as it comes: nobody holds it, so it is sent once
    batches: bool = False  # may ask for many answers at once, of which none depends on another
    plain: bool = False  # the answer is plain text, if that is what the client wants

    @property
    def takes_alias(self) -> bool:
        """Whether the model may be an alias; what changes or copies a model means the one of that name."""
        return self.generates or self.name == "/api/show"


_VIEW = (Strategy.AGGREGATE, Strategy.SEQUENTIAL)
_MANY = (Strategy.RACE, Strategy.HEDGE, Strategy.SEQUENTIAL)
_ONE = (Strategy.SEQUENTIAL,)
_ALL = (Strategy.BROADCAST, Strategy.SEQUENTIAL)
_PROGRESS = Ending.NDJSON_SUCCESS

ROUTES: tuple[Route, ...] = (
    Route("/", ("HEAD", "GET"), Strategy.LOCAL, (Strategy.LOCAL, Strategy.SEQUENTIAL)),
    Route("/api/version", ("HEAD", "GET"), Strategy.AGGREGATE, _VIEW),
    Route("/api/tags", ("HEAD", "GET"), Strategy.AGGREGATE, _VIEW),
    Route("/api/ps", ("GET",), Strategy.AGGREGATE, _VIEW),
    Route("/v1/models", ("GET",), Strategy.AGGREGATE, _VIEW, Shape.OPENAI, needs_model=False),
    Route("/v1/models/:model", ("GET",), Strategy.AGGREGATE, _VIEW, Shape.OPENAI, needs_model=False),
    Route("/api/show", ("POST",), Strategy.SEQUENTIAL, _ONE),
    Route(
        "/api/chat", ("POST",), Strategy.RACE, _MANY, ending=Ending.NDJSON_DONE, streams_by_default=True, generates=True
    ),
    Route(
        "/api/generate",
        ("POST",),
        Strategy.RACE,
        _MANY,
        ending=Ending.NDJSON_DONE,
        streams_by_default=True,
        generates=True,
    ),
    Route("/v1/chat/completions", ("POST",), Strategy.RACE, _MANY, Shape.OPENAI, Ending.SSE_DONE, generates=True),
    Route("/v1/completions", ("POST",), Strategy.RACE, _MANY, Shape.OPENAI, Ending.SSE_DONE, generates=True),
    Route("/v1/responses", ("POST",), Strategy.RACE, _MANY, Shape.OPENAI, Ending.RESPONSE_COMPLETED, generates=True),
    Route("/v1/messages", ("POST",), Strategy.RACE, _MANY, Shape.ANTHROPIC, Ending.MESSAGE_STOP, generates=True),
    Route("/api/embed", ("POST",), Strategy.SEQUENTIAL, _ONE, generates=True, batches=True),
    Route("/api/embeddings", ("POST",), Strategy.SEQUENTIAL, _ONE, generates=True),
    Route("/v1/embeddings", ("POST",), Strategy.SEQUENTIAL, _ONE, Shape.OPENAI, generates=True, batches=True),
    Route("/v1/audio/transcriptions", ("POST",), Strategy.SEQUENTIAL, _ONE, Shape.OPENAI, generates=True, plain=True),
    Route(
        "/api/pull",
        ("POST",),
        Strategy.BROADCAST,
        _ALL,
        ending=_PROGRESS,
        streams_by_default=True,
        changes=True,
        needs_model=False,
    ),
    Route(
        "/api/create",
        ("POST",),
        Strategy.BROADCAST,
        _ALL,
        ending=_PROGRESS,
        streams_by_default=True,
        changes=True,
        needs_model=False,
    ),
    Route("/api/push", ("POST",), Strategy.SEQUENTIAL, _ONE, ending=_PROGRESS, streams_by_default=True, changes=True),
    Route(
        "/api/blobs/:digest",
        ("HEAD", "POST"),
        Strategy.BROADCAST,
        _ALL,
        changes=True,
        needs_model=False,
        uploads=True,
    ),
    Route("/api/copy", ("POST",), Strategy.BROADCAST, _ALL, changes=True),
    Route("/api/delete", ("DELETE",), Strategy.BROADCAST, _ALL, changes=True),
)
"""The routes that have settings of their own; every other path is `PASS_THROUGH`."""

PASS_THROUGH: Final = Route("*", (), Strategy.SEQUENTIAL, _ONE, needs_model=False)

_BY_PATH: Final[Mapping[str, Route]] = {route.name: route for route in ROUTES}
_BY_PARENT: Final[Mapping[str, Route]] = {
    parent: route for route in ROUTES for parent, colon, _ in (route.name.partition(":"),) if colon
}


def find_route(path: str) -> Route:
    """Return the route of `path` (without its query), or `PASS_THROUGH`."""
    route = _BY_PATH.get(path)
    if route is not None:
        return route
    parent, slash, last = path.rpartition("/")
    return _BY_PARENT.get(parent + slash, PASS_THROUGH) if last else PASS_THROUGH


def shape_of(path: str) -> Shape:
    """Return whose error format `path` speaks, known to us as a route or not."""
    if path.startswith("/v1/messages"):
        return Shape.ANTHROPIC
    return Shape.OPENAI if path.startswith("/v1/") else Shape.NATIVE


def default_routes(race: RaceSettings) -> dict[str, RouteSettings]:
    """Return the settings of every route as they are when `[routes]` says nothing."""
    return {route.name: route_settings(route.strategy, race) for route in (*ROUTES, PASS_THROUGH)}


def route_settings(strategy: Strategy, race: RaceSettings) -> RouteSettings:
    """Return what `strategy` means under the operator's `[race]`."""
    if strategy is Strategy.RACE:
        return RouteSettings(
            strategy=strategy,
            winner=race.winner,
            racers_min=race.racers_min,
            racers_max=race.racers_max,
            hedges_max=race.hedges_max,
        )
    if strategy is Strategy.HEDGE:
        return RouteSettings(strategy=strategy, winner=race.winner, hedges_max=race.hedges_max)
    return RouteSettings(strategy=strategy)


# --- model names -------------------------------------------------------------------------------------------

_DEFAULT_HOST = "registry.ollama.ai/"
_DEFAULT_NAMESPACE = "library/"
MODEL_CHARS_MAX = 350 + 1 + 80 + 1 + 80 + 1 + 80
"""Host, namespace, model and tag of the longest name that Ollama accepts (its types/model/name.go)."""


@lru_cache(maxsize=1024)
def canonical_model(name: str) -> str:
    """Return the one spelling under which a model is known here.

    Ollama takes a name without a tag as `:latest`, compares names without regard to case, and lets
    `registry.ollama.ai/library/` be left out.
    """
    name = name.strip().lower()
    for prefix in ("https://", "http://", _DEFAULT_HOST, _DEFAULT_NAMESPACE):
        name = name.removeprefix(prefix)
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


# --- request bodies ----------------------------------------------------------------------------------------

RUNNER_OPTIONS = ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread")
"""Options whose change makes Ollama load the model anew (design §7.5)."""


@dataclass(frozen=True, slots=True)
class BodyFacts:
    """What a request body says that decides where it goes.

    `model` is as the client wrote it (None: the body names none, or cannot be read, and the answer is for an
    Ollama to give). `runner_key` is the canonical JSON of the runner options asked for.
    """

    model: str | None = None
    runner_key: str = ""
    stream: bool = False
    kind: RequestKind = RequestKind.GENERATE


def runner_key(options: Mapping[str, Any] | None) -> str:
    """Return the canonical spelling of those `options` that belong to the loaded runner; "" for none."""
    chosen = {k: options[k] for k in RUNNER_OPTIONS if options.get(k) is not None} if options else {}
    return json.dumps(chosen, sort_keys=True, separators=(",", ":")) if chosen else ""


_ZERO_DURATION = re.compile(
    r"[+-]?(?:0|(?:(?:0++(?:\.0*+)?|\.0++)(?:ns|us|µs|μs|ms|s|m|h))++)"
)  # as Go's ParseDuration reads it, and like it without looking at anything twice
KEEP_ALIVE_CHARS_MAX = 64
"""A longer text is not taken for a duration."""


def keep_alive_is_zero(value: object) -> bool:
    """Tell whether a `keep_alive` asks to unload at once: 0, "0", "0s", "0m" and the like."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return value == 0
    if not isinstance(value, str) or len(value) > KEEP_ALIVE_CHARS_MAX:
        return False
    return _ZERO_DURATION.fullmatch(value) is not None


_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def request_kind(route: Route, method: str, *, empty: bool, keep_alive: object) -> RequestKind:
    """Return what a request wants; `empty` = a native chat or generate request with neither prompt nor messages."""
    if (route.changes or route is PASS_THROUGH) and method not in _READING:
        return RequestKind.MANAGE
    if route.ending is not Ending.NDJSON_DONE or not empty:
        return RequestKind.GENERATE
    return RequestKind.UNLOAD if keep_alive_is_zero(keep_alive) else RequestKind.LOAD


# --- answers -----------------------------------------------------------------------------------------------

_OPENAI_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    404: "not_found_error",
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


def error_body(shape: Shape, status: int, message: str, request_id: str = "") -> bytes:
    """Return an error as the clients of `shape` expect it (captures: chat_no_model, v1_chat_unknown, …)."""
    return _json(_error_object(shape, status, message, request_id))


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _error_object(shape: Shape, status: int, message: str, request_id: str) -> dict[str, Any]:
    if shape is Shape.NATIVE:
        return {"error": message}
    kind = _OPENAI_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    if shape is Shape.OPENAI:
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def error_tail(shape: Shape, message: str, request_id: str = "", *, ending: Ending = Ending.FRAMING) -> bytes:
    """Return what is written into a stream that has already begun, so that its end is not taken for a good one.

    Where events have names (`ending`), so has this; OpenAI's own servers write theirs into /v1/responses like this.
    """
    what = _error_object(shape, 500, message, request_id)
    if shape is Shape.NATIVE:
        return _json(what) + b"\n"
    if shape is Shape.OPENAI and ending is not Ending.RESPONSE_COMPLETED:
        return b"data: " + _json(what) + b"\n\n"
    return b"event: error\ndata: " + _json({"type": "error", **what}) + b"\n\n"


def model_not_found(model: str) -> str:
    """Return Ollama's words for a model it does not have (capture: chat_unknown_model)."""
    return f"model '{model}' not found"
