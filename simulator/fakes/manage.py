"""What changes the models on a fake server's disk: pull, push, create, copy, delete. Pure.

A name with "nope" in it is one that no registry has; all others can be pulled. The lines are Ollama's own (captures:
pull_unreachable, push_unknown, create_from and others); a pull takes as long as its server takes to load a model.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from simulator.fake_ollama import NS_PER_MS, FakeModel, FakeOllama, canonical_name
from simulator.fakes.answers import go_json, hex_id, rfc3339
from simulator.fakes.bodies import ApiError, named, parse, text_field
from simulator.fakes.listings import digest
from simulator.fakes.replies import JSON, Lines, Moment, Reply, Request, Step
from simulator.fakes.specs import model_key

PULL_STEPS = 20
"""Into so many pieces of time the transfer of a model is divided."""

_SMALL_LAYERS = (("template", 1_429), ("license", 7_711), ("config", 485))  # name, bytes
_CREATING = ("system", "template", "license", "parameters", "messages", "adapters")  # each makes a layer of its own


class _RegistryError(Exception):
    """The registry, or the disk, does not have it, or cannot be reached."""


# --- transfers ---------------------------------------------------------------------------------------------------


def pull(fake: FakeOllama, request: Request, moment: Moment) -> Lines:
    """Fetch a model from the registry."""
    body = parse(request.body, "PullRequest")
    name = named(body, "invalid model name")
    model = _pulled(fake, name, moment)
    return _lines(body, _pull_steps(fake, name, model), model)


def _pulled(fake: FakeOllama, name: str, moment: Moment) -> FakeModel:
    """Return the model that a pull of `name` would put on disk."""
    known = fake.find(name) or FakeModel(canonical_name(name))
    return replace(known, name=canonical_name(name), modified_at=rfc3339(moment.wall_ns))


def _pull_steps(fake: FakeOllama, name: str, model: FakeModel) -> Iterator[Step]:
    """Yield the lines of a pull. Raises _RegistryError after the first."""
    pause_ns = 0 if fake.find(name) else round(fake.spec.load_ms * NS_PER_MS) // PULL_STEPS
    yield _said("pulling manifest")
    if "nope" in name.lower():
        host, path, tag = _registry_parts(name)
        raise _RegistryError(
            f'pull model manifest: Get "https://{host}/v2/{path}/manifests/{tag}": '
            f"dial tcp: lookup {host} on 127.0.0.1:53: no such host"
        )
    yield from _transfers("pulling", model, pause_ns)
    yield _said("verifying sha256 digest", pause_ns)
    yield _said("writing manifest")
    yield _said("success")


def push(fake: FakeOllama, request: Request, _moment: Moment) -> Lines:
    """Send a model to the registry; nobody keeps it there."""
    body = parse(request.body, "PushRequest")
    name = named(body)
    return _lines(body, _push_steps(fake, name))


def _push_steps(fake: FakeOllama, name: str) -> Iterator[Step]:
    yield _said("retrieving manifest")
    model = fake.find(name)
    if model is None:
        yield _said("couldn't retrieve manifest")
        path = "/".join(_registry_parts(name))
        raise _RegistryError(f"open /models/manifests/{path}: no such file or directory")
    yield from _transfers("pushing", model, round(fake.spec.load_ms * NS_PER_MS) // PULL_STEPS)
    yield _said("pushing manifest")
    yield _said("success")


def _transfers(verb: str, model: FakeModel, pause_ns: int) -> Iterator[Step]:
    """Yield how far each layer has come. Without a pause all of them are there already."""
    for layer, size in (("model", model.size_bytes), *_SMALL_LAYERS):
        pieces = PULL_STEPS if pause_ns and layer == "model" else 1
        for piece in range(1 if pieces == 1 else 0, pieces + 1):
            sha = _blob(model, layer)
            told: dict[str, Any] = {"status": f"{verb} {sha[:12]}", "digest": f"sha256:{sha}", "total": size}
            if piece:  # Go leaves a zero out
                told["completed"] = size * piece // pieces
            yield Step(pause_ns if piece else 0, go_json(told) + b"\n")


def _blob(model: FakeModel, layer: str) -> str:
    """Return the digest of a layer, the same as `/api/show` names for the model itself."""
    parts = ("blob", digest(model)) if layer == "model" else ("blob", digest(model), layer)
    return hex_id(*parts, digits=64)


def _registry_parts(name: str) -> tuple[str, str, str]:
    """Return host, path and tag of a name that may leave out all but the path's end."""
    path, _, tag = canonical_name(name).rpartition(":")
    parts = path.split("/")
    host = parts[0] if len(parts) > 2 else "registry.ollama.ai"
    return host, "/".join(parts[1:] if len(parts) > 2 else parts if len(parts) > 1 else ["library", path]), tag


# --- made here ---------------------------------------------------------------------------------------------------


def create(fake: FakeOllama, request: Request, moment: Moment) -> Lines:
    """Make a model from another one, or from files that were uploaded as blobs (`{name: digest}`)."""
    body = parse(request.body, "CreateRequest")
    name = named(body, "invalid model name")
    source, files = text_field(body, "from"), body.get("files")
    if not source and isinstance(files, dict) and files:
        digests = [str(each) for each in files.values()]
        size = sum(fake.blobs.get(each, 0) for each in digests)
        made = FakeModel(canonical_name(name), size_bytes=size, modified_at=rfc3339(moment.wall_ns))
        return _lines(body, _import_steps(fake, digests, made, body), made)
    if not source:
        raise ApiError(400, "neither 'from' or 'files' was specified")
    base = fake.find(source) or _pulled(fake, source, moment)
    model = replace(base, name=canonical_name(name), digest="", modified_at=rfc3339(moment.wall_ns))
    return _lines(body, _create_steps(fake, source, base, body), model)


def _create_steps(fake: FakeOllama, source: str, base: FakeModel, body: Mapping[str, Any]) -> Iterator[Step]:
    if fake.find(source) is None:
        yield from _pull_steps(fake, source, base)
    yield _said(f"using existing layer sha256:{_blob(base, 'model')}")
    yield from _finishing_steps(base, body)


def _import_steps(
    fake: FakeOllama, digests: Iterable[str], made: FakeModel, body: Mapping[str, Any]
) -> Iterator[Step]:
    """Yield the lines of a model made of GGUF files (Ollama's server/create.go). Raises _RegistryError."""
    for each in digests:
        yield _said("parsing GGUF")
        if each not in fake.blobs:
            raise _RegistryError(f"open /models/blobs/{each.replace(':', '-')}: no such file or directory")
    for each in digests:
        yield _said(f"using existing layer {each}")
    yield from _finishing_steps(made, body)


def _finishing_steps(base: FakeModel, body: Mapping[str, Any]) -> Iterator[Step]:
    for field in _CREATING:
        if body.get(field):
            sha = hex_id("layer", field, go_json(body[field]), digits=64)
            yield _said(f"creating new layer sha256:{sha}")
    yield _said(f"using existing layer sha256:{_blob(base, 'config')}")
    yield _said("writing manifest")
    yield _said("success")


def delete(fake: FakeOllama, request: Request, moment: Moment) -> Reply:
    """Remove a model."""
    name = named(parse(request.body, "DeleteRequest"))
    notices = fake.delete(name, moment.now_ns)
    if notices is None:
        raise ApiError(404, f"model '{name}' not found")
    return Reply(200, notices=tuple(notices))


def copy(fake: FakeOllama, request: Request, moment: Moment) -> Reply:
    """Give a model a second name."""
    body = parse(request.body, "CopyRequest")
    source, destination = text_field(body, "source"), text_field(body, "destination")
    if not source or not destination:
        raise ApiError(400, f'{"destination" if source else "source"} "" is invalid')
    if not fake.copy(source, destination, rfc3339(moment.wall_ns)):
        raise ApiError(404, f'model "{source}" not found')
    return Reply(200)


# --- lines -------------------------------------------------------------------------------------------------------


def _said(status: str, after_ns: int = 0) -> Step:
    return Step(after_ns, go_json({"status": status}) + b"\n")


def _lines(body: Mapping[str, Any], lines: Iterator[Step], puts: FakeModel | None = None) -> Lines:
    """Return the answer that `lines` make: a stream, or with `stream: false` only how it ended."""
    steps: list[Step] = []
    error = None
    try:
        steps.extend(lines)  # what came before an error stays
    except _RegistryError as failure:
        error = go_json({"error": str(failure)})
        steps.append(Step(0, error + b"\n"))
    single = None
    if body.get("stream") is False:
        single = Reply(200, JSON, go_json({"status": "success"})) if error is None else Reply(500, JSON, error)
    return Lines(tuple(steps), puts=puts if error is None else None, single=single)


def put(fake: FakeOllama, lines: Lines) -> None:
    """Do what has been done once the last line is due."""
    if lines.puts is not None:
        fake.disk[model_key(lines.puts.name)] = lines.puts
