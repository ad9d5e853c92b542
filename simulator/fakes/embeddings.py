"""Embeddings as a fake Ollama gives them: they depend on the build of the model and on the text alone. Pure.

One input after the other is worked off, as a real server does with one slot: the first takes as long as a first token,
each other one as a token. Models have the capability `embedding` for it; others answer as the recorded server does.
"""

import base64
import hashlib
import math
import struct
from collections.abc import Mapping
from typing import Any

from simulator.fake_ollama import FakeModel, FakeOllama, Job, Work, keep_alive_ns, runner_options
from simulator.fakes.answers import Answer, Api, Dialect, Timing, go_json
from simulator.fakes.bodies import ApiError, check_options, named, parse
from simulator.fakes.listings import digest
from simulator.fakes.replies import Generation, Moment, Request
from simulator.fakes.specs import NS_PER_S

CAPABILITY = "embedding"
DIGITS = 7  # of each number, as float32 has them


def embed(fake: FakeOllama, request: Request, moment: Moment) -> Generation:
    """Answer a request for embeddings. Raises ApiError."""
    api = Api(request.path)
    fields = parse(request.body, "EmbedRequest")
    texts = _texts(api, fields)
    name = named(fields)
    model = fake.find(name)
    if model is None:
        raise ApiError(404, f'model "{name}" not found, try pulling it first')
    if CAPABILITY not in model.capabilities:
        status = 500 if api is Api.EMBEDDINGS else 501
        raise ApiError(status, "This server does not support embeddings. Start it with `--embeddings`")
    options = dict(fields.get("options") or {})
    check_options(options)
    sizes = [1 + len(text) // 4 for text in texts]
    if fields.get("truncate") is False and max(sizes, default=0) > model.num_ctx:
        raise ApiError(400, "the input length exceeds the context length")
    job = Job(
        moment.serial,
        model.name,
        runner_options(model, options),
        _keep_alive_ns(fields, fake),
        Work.GENERATE if texts else Work.LOAD,
        marks=(len(texts),) if texts else (),
        prompt_tokens=sum(sizes),
    )
    answer = Answer(
        api=api,
        model=name,
        id="",
        tokens=tuple(_written(model, text, fields) for text in texts),
        done_reason="stop" if texts else "load",
        stream=False,
        prompt_tokens=sum(sizes),
        begun_wall_ns=moment.wall_ns,
    )
    return Generation(job, answer)


def _keep_alive_ns(fields: Mapping[str, Any], fake: FakeOllama) -> int:
    try:
        return keep_alive_ns(fields.get("keep_alive"), round(fake.spec.keep_alive_s * NS_PER_S))
    except ValueError as error:
        raise ApiError(400, str(error), early=True) from error


def _texts(api: Api, fields: Mapping[str, Any]) -> list[str]:
    """Return the inputs of a request. Raises ApiError 400, in Ollama's words and order."""
    if api is Api.EMBEDDINGS:
        return [fields["prompt"]] if fields.get("prompt") else []
    found = fields.get("input")
    if api is Api.OPENAI_EMBEDDINGS:
        _check_openai(fields)
        found = [""] if found == "" else found
    if isinstance(found, str):
        return [found] if found else []
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ApiError(400, "invalid input type")
    return found


def _check_openai(fields: Mapping[str, Any]) -> None:
    written = fields.get("encoding_format") or "float"
    if written.lower() not in {"float", "base64"}:
        message = f"Invalid value for 'encoding_format' = {written}. Supported values: ['float', 'base64']."
        raise ApiError(400, message, early=True)
    if fields.get("input") is None or fields["input"] == []:
        raise ApiError(400, "invalid input", early=True)


# --- vectors -----------------------------------------------------------------------------------------------------


def vector(model: FakeModel, text: str, length: int) -> list[float]:
    """Return the embedding of a text: numbers made of it, of length one together."""
    seed = f"{digest(model)}\0{text}".encode("utf-8", "replace")
    numbers = struct.unpack(f"<{length}h", hashlib.shake_256(seed).digest(2 * length))
    norm = math.sqrt(sum(number * number for number in numbers)) or 1.0
    return [round(number / norm, DIGITS) for number in numbers]


def _written(model: FakeModel, text: str, fields: Mapping[str, Any]) -> str:
    """Return an embedding as JSON."""
    wanted = fields.get("dimensions") or 0
    length = wanted if 0 < wanted < model.embedding_length else model.embedding_length
    numbers = vector(model, text, length)
    if str(fields.get("encoding_format") or "").lower() == "base64":
        return f'"{base64.b64encode(struct.pack(f"<{length}f", *numbers)).decode()}"'
    return f"[{','.join(map(str, numbers))}]"


# --- dialects ----------------------------------------------------------------------------------------------------


def _with(fields: dict[str, Any], array: str, items: list[str]) -> bytes:
    """Return fields as JSON, with an array, which is JSON already, in the place of the None that they have for it."""
    return go_json(fields).replace(b'"%s":null' % array.encode(), f'"{array}":[{",".join(items)}]'.encode(), 1)


def _single(answer: Answer, timing: Timing) -> bytes:
    figures = {
        "total_duration": timing.total_ns,
        "load_duration": timing.load_ns,
        "prompt_eval_count": answer.prompt_tokens,
    }
    told = {name: value for name, value in figures.items() if value and answer.tokens}
    return _with({"model": answer.model, "embeddings": None} | told, "embeddings", list(answer.tokens))


def _single_old(answer: Answer, _timing: Timing) -> bytes:
    return f'{{"embedding":{answer.tokens[0] if answer.tokens else "[]"}}}'.encode()


def _single_openai(answer: Answer, _timing: Timing) -> bytes:
    data = [f'{{"object":"embedding","embedding":{it},"index":{index}}}' for index, it in enumerate(answer.tokens)]
    usage = {"prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens}
    return _with({"object": "list", "data": None, "model": answer.model, "usage": usage}, "data", data) + b"\n"


EMBED = Dialect(
    single_type=b"application/json; charset=utf-8",
    single=_single,
)
EMBEDDINGS = Dialect(
    single_type=b"application/json; charset=utf-8",
    single=_single_old,
)
OPENAI_EMBEDDINGS = Dialect(
    single_type=b"application/json",
    single=_single_openai,
)
