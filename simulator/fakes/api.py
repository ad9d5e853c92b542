"""What a fake Ollama answers to a request: routing, CORS, checks, errors in Ollama's words. Pure.

`handle` gives a `Reply`, complete; or a `Generation`: a job for the scheduler and the answer to be made once
it has started; or `Lines`, which come in their time. The recordings in tests/captures are the reference;
`simulator.fakes.wishes` reads what is to be generated, `simulator.fakes.manage` answers what changes the models on
disk, `simulator.fakes.blobs` takes the files of which models are made.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simulator.fake_ollama import FakeModel, FakeOllama, Job, Work, canonical_name
from simulator.fakes.account import ACCOUNT, KEY, is_key
from simulator.fakes.answers import RUNNER_DIED, Answer, Api, Timing, go_json, hex_id, rfc3339
from simulator.fakes.blobs import head_blob, is_blob, take_blob
from simulator.fakes.bodies import ApiError, named, parse
from simulator.fakes.dialects import dialect_of
from simulator.fakes.embeddings import embed
from simulator.fakes.listings import ps_line, shown, tags_line, v1_line
from simulator.fakes.manage import copy, create, delete, pull, push
from simulator.fakes.replies import (
    JSON,
    JSON_CHARSET,
    Generation,
    Handler,
    HeaderPairs,
    Lines,
    Moment,
    Reply,
    Request,
    Result,
    in_order,
)
from simulator.fakes.wishes import Wish, wish
from simulator.faults import FaultKind

__all__ = [
    "Generation",
    "HeaderPairs",
    "Lines",
    "Moment",
    "Reply",
    "Request",
    "busy_reply",
    "error_reply",
    "fault_reply",
    "generates",
    "handle",
    "single_reply",
    "stream_headers",
]

BUSY = "server busy, please try again.  maximum pending requests exceeded"
RUNNER_GONE = "llama runner process has terminated: exit status 2"

_TEXT: HeaderPairs = ((b"Content-Type", b"text/plain"),)
_CORS_HEADERS = (
    "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,"
    "X-Stainless-Async,X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,"
    "X-Stainless-Os,X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,"
    "X-Stainless-Runtime,X-Stainless-Runtime-Version,X-Stainless-Timeout"
)
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
_LOCAL_ORIGIN = re.compile(
    r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0)(:\d+)?|(app|file|tauri|vscode-webview|vscode-file)://.*"
)


def handle(fake: FakeOllama, request: Request, moment: Moment) -> Result:
    """Answer one request, or say what must be generated."""
    methods = _methods(request.path)
    if methods is None and len(request.path) > 1 and request.path.endswith("/"):
        target = request.path.rstrip("/")
        if _methods(target) is not None:
            return _redirect(request, target)
    handler = (methods or {}).get(request.method)
    allow: HeaderPairs = ()
    if methods is not None and handler is None:
        allow = ((b"Allow", ", ".join(methods).encode()),)
    cors, ended = _cors(request, allow)
    if ended is not None:
        return ended
    if not _local_host(request.host):
        return Reply(403, allow)
    if handler is None:
        body = b"404 page not found" if methods is None else b"405 method not allowed"
        return Reply(404 if methods is None else 405, in_order(cors + allow + _TEXT), body)
    try:
        result = handler(fake, request, moment)
    except ApiError as error:
        result = error_reply(request.path, error, moment)
    if not cors:
        return result
    if isinstance(result, Generation):
        return replace(result, headers=cors)
    if isinstance(result, Lines) and result.single is not None:
        single = replace(result.single, headers=in_order(cors + result.single.headers))
        return replace(result, single=single)
    return replace(result, headers=in_order(cors + result.headers))


def error_reply(path: str, error: ApiError, moment: Moment) -> Reply:
    """Return an error in the format of the path; the compatible APIs add a newline to errors from within."""
    if not path.startswith("/v1/"):
        return Reply(error.status, JSON_CHARSET, go_json({"error": error.message}))
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    kind = kinds.get(error.status, "api_error")
    if path.startswith("/v1/messages"):
        what: dict[str, Any] = {
            "type": "error",
            "error": {"type": kind, "message": error.message},
            "request_id": f"req_{hex_id('request', moment.serial)}",
        }
    else:
        what = {"error": {"message": error.message, "type": kind, "param": None, "code": None}}
    if error.early:
        return Reply(error.status, JSON_CHARSET, go_json(what))
    return Reply(error.status, JSON, go_json(what) + b"\n")


_FAULT_ERRORS = {
    FaultKind.ERROR_500: ApiError(500, RUNNER_GONE),
    FaultKind.BUSY_503: ApiError(503, BUSY),
    FaultKind.ERROR_MIDSTREAM: ApiError(500, RUNNER_DIED),
}


def fault_reply(path: str, kind: FaultKind, moment: Moment) -> Reply:
    """Return what a request gets whose server has this fault (ERROR_500, BUSY_503, ERROR_MIDSTREAM)."""
    return error_reply(path, _FAULT_ERRORS[kind], moment)


def busy_reply(path: str, moment: Moment) -> Reply:
    """Return what a request gets when the cold queue is full (capture: chat_server_busy)."""
    return error_reply(path, _FAULT_ERRORS[FaultKind.BUSY_503], moment)


def single_reply(generation: Generation, timing: Timing) -> Reply:
    """Return a finished answer in one piece."""
    dialect = dialect_of(generation.answer)
    headers = in_order(((b"Content-Type", dialect.single_type), *generation.headers))
    return Reply(200, headers, dialect.single(generation.answer, timing))


def stream_headers(generation: Generation) -> HeaderPairs:
    """Return the headers of a streamed answer, but for Date and framing."""
    return in_order(dialect_of(generation.answer).stream_headers + generation.headers)


def generates(path: str) -> bool:
    """Tell whether a path asks a model for something, so that faults of the runner concern it."""
    return path in _GENERATING


# --- who may ask -------------------------------------------------------------------------------------------------


def _local_host(host: str) -> bool:
    name = re.sub(r":\d*$", "", host).strip("[]").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name in {"", "localhost"} or name.endswith(_LOCAL_SUFFIXES)
    return address.is_loopback or address.is_private or address.is_unspecified


def _cors(request: Request, allow: HeaderPairs) -> tuple[HeaderPairs, Reply | None]:
    """Return the headers an Origin adds to the answer, and the answer if the Origin alone decides it."""
    origin = request.origin
    if not origin or origin in {f"http://{request.host}", f"https://{request.host}"}:
        return (), None
    if _LOCAL_ORIGIN.fullmatch(origin) is None:
        return (), Reply(403, allow)
    granted = ((b"Access-Control-Allow-Origin", origin.encode("latin-1", "replace")), (b"Vary", b"Origin"))
    if request.method != "OPTIONS":
        return granted, None
    preflight = (
        (b"Access-Control-Allow-Headers", _CORS_HEADERS.encode()),
        (b"Access-Control-Allow-Methods", b"GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"),
        (b"Access-Control-Max-Age", b"43200"),
    )
    varies = ((b"Vary", b"Access-Control-Request-Method"), (b"Vary", b"Access-Control-Request-Headers"))
    return (), Reply(204, in_order(granted + preflight + allow + varies))


def _redirect(request: Request, target: str) -> Reply:
    location = ((b"Location", target.encode("latin-1", "replace")),)
    if request.method != "GET":
        return Reply(307, location)
    page = f'<a href="{target}">Moved Permanently</a>.\n\n'.encode()
    return Reply(301, ((b"Content-Type", b"text/html; charset=utf-8"), *location), page)


# --- answers that need no runner ---------------------------------------------------------------------------------


def _json(value: object) -> Reply:
    return Reply(200, JSON_CHARSET, go_json(value))


def _json_line(value: object) -> Reply:
    return Reply(200, JSON, go_json(value) + b"\n")


def _root(_fake: FakeOllama, _request: Request, _moment: Moment) -> Reply:
    return Reply(200, ((b"Content-Type", b"text/plain; charset=utf-8"),), b"Ollama is running")


def _version(fake: FakeOllama, _request: Request, _moment: Moment) -> Reply:
    return _json({"version": fake.spec.version})


def _newest_first(fake: FakeOllama) -> list[FakeModel]:
    return sorted(fake.disk.values(), key=lambda model: model.modified_at, reverse=True)


def _tags(fake: FakeOllama, _request: Request, _moment: Moment) -> Reply:
    return _json({"models": [tags_line(model) for model in _newest_first(fake)]})


def _ps(fake: FakeOllama, _request: Request, moment: Moment) -> Reply:
    notices = fake.advance(moment.now_ns)
    models = [ps_line(entry, moment.wall_ns) for entry in fake.ps(moment.now_ns)]
    return Reply(200, JSON_CHARSET, go_json({"models": models}), notices=tuple(notices))


def _show(fake: FakeOllama, request: Request, _moment: Moment) -> Reply:
    name = named(parse(request.body, "ShowRequest"))
    model = fake.find(name)
    if model is None:
        raise ApiError(404, f"model '{canonical_name(name)}' not found")
    return _json(shown(model))


def _v1_models(fake: FakeOllama, _request: Request, _moment: Moment) -> Reply:
    return _json_line({"object": "list", "data": [v1_line(m, m.name) for m in _newest_first(fake)]})


def _v1_model(fake: FakeOllama, request: Request, _moment: Moment) -> Reply:
    name = request.path.removeprefix("/v1/models/")
    model = fake.find(name)
    if model is None:
        raise ApiError(404, f"model '{canonical_name(name)}' not found")
    return _json_line(v1_line(model, name))


# --- answers that need a runner ----------------------------------------------------------------------------------


def _generate(fake: FakeOllama, request: Request, moment: Moment) -> Result:
    wanted = wish(Api(request.path), request, fake)
    answer = _answer(wanted, moment)
    if wanted.rendered is not None and not wanted.unload:
        return _debug_info(wanted, wanted.rendered, moment)
    if wanted.unload:
        notices = fake.unload(wanted.model.name, moment.now_ns)
        timing = Timing(0, 0, 0, 0, moment.wall_ns)
        return Reply(200, JSON_CHARSET, dialect_of(answer).single(answer, timing), notices=tuple(notices))
    work = Work.LOAD if wanted.done_reason == "load" else Work.GENERATE
    marks = (len(wanted.tokens),) if work is Work.GENERATE and wanted.tokens else ()
    job = Job(
        moment.serial,
        wanted.model.name,
        wanted.options,
        wanted.keep_alive_ns,
        work,
        marks=marks,
        prompt_tokens=wanted.prompt_tokens,
    )
    return Generation(job, answer, failure=_blind(request.path, moment) if wanted.blind else None)


def _answer(wanted: Wish, moment: Moment) -> Answer:
    number = int(hex_id(wanted.key, moment.serial, digits=8), 16) % 1000
    ids = {
        Api.OPENAI_CHAT: f"chatcmpl-{number}",
        Api.OPENAI_COMPLETIONS: f"cmpl-{number}",
        Api.RESPONSES: f"resp_{number}",
    }
    return Answer(
        api=wanted.api,
        model=wanted.model_as_written,
        id=ids.get(wanted.api, f"msg_{hex_id(wanted.key, moment.serial)}"),
        tokens=wanted.tokens,
        done_reason="unload" if wanted.unload else wanted.done_reason,
        stream=wanted.stream and wanted.done_reason != "load",
        prompt_tokens=wanted.prompt_tokens,
        begun_wall_ns=moment.wall_ns,
        usage=wanted.usage,
        context=not wanted.raw,
        logprobs=wanted.logprobs,
        n_thoughts=wanted.n_thoughts,
        call=wanted.call,
        asked=wanted.asked,
    )


def _debug_info(wanted: Wish, rendered: str, moment: Moment) -> Reply:
    text: dict[str, Any] = {"response": ""}
    if wanted.api is Api.CHAT:
        text = {"message": {"role": "", "content": ""}}
    head = {"model": wanted.model_as_written, "created_at": rfc3339(moment.wall_ns)}
    return _json(head | text | {"done": False, "_debug_info": {"rendered_template": rendered}})


def _blind(path: str, moment: Moment) -> Reply:
    """Return what comes of images, or of a recording, for a model that can see and hear none (capture: chat_images)."""
    said = "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"
    inner = go_json({"error": {"code": 500, "message": said, "type": "server_error"}}).decode()
    if path.startswith("/v1/"):
        return error_reply(path, ApiError(500, inner), moment)
    return Reply(500, JSON, go_json({"error": inner}), chunked=True)


_EMBEDDING = frozenset({Api.EMBED, Api.EMBEDDINGS, Api.OPENAI_EMBEDDINGS})
_GENERATING: dict[str, Handler] = {str(api): embed if api in _EMBEDDING else _generate for api in Api}
_READ: dict[str, Handler] = {"/": _root, "/api/version": _version, "/api/tags": _tags}
_ROUTES: dict[str, Mapping[str, Handler]] = {
    **{path: {"HEAD": handler, "GET": handler} for path, handler in _READ.items()},
    **{path: {"POST": handler} for path, handler in _GENERATING.items()},
    "/api/ps": {"GET": _ps},
    "/api/show": {"POST": _show},
    "/api/pull": {"POST": pull},
    "/api/push": {"POST": push},
    "/api/create": {"POST": create},
    "/api/delete": {"DELETE": delete},
    "/api/copy": {"POST": copy},
    "/v1/models": {"GET": _v1_models},
    **ACCOUNT,
}
_V1_MODEL: dict[str, Handler] = {"GET": _v1_model}
_BLOB: dict[str, Handler] = {"HEAD": head_blob, "POST": take_blob}


def _methods(path: str) -> Mapping[str, Handler] | None:
    if path.startswith("/v1/models/") and len(path) > len("/v1/models/"):
        return _V1_MODEL
    if is_blob(path):
        return _BLOB
    if is_key(path):
        return KEY
    return _ROUTES.get(path)
