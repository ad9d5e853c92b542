"""What changes the models on a fake's disk."""

import json
from typing import Any

import pytest

from simulator.fake_ollama import FakeModel, FakeOllama, FakeSpec
from simulator.fakes.api import Lines, Moment, Reply, Request, handle
from simulator.fakes.manage import put
from simulator.serve import serve_fleet
from tests.simulator.wire import ask, body_of

SPEC = FakeSpec("x", models=(FakeModel("tiny", size_bytes=1_000_000),), load_ms=20)
NOW = Moment(now_ns=0, wall_ns=1_795_471_120_000_000_000, serial=1)


def lines_of(path: str, fake: FakeOllama | None = None, /, **body: object) -> Lines:
    return lines_for(Request("POST", path, body=json.dumps(body).encode()), fake)


def lines_for(request: Request, fake: FakeOllama | None = None) -> Lines:
    found = handle(fake or FakeOllama(SPEC, 0), request, NOW)
    assert isinstance(found, Lines)
    return found


def told(lines: Lines) -> list[dict[str, Any]]:
    assert all(step.line.endswith(b"\n") for step in lines.steps)
    return [json.loads(step.line) for step in lines.steps]


def statuses(lines: Lines) -> list[str]:
    """What was said, without repetitions; a transfer without its digest."""
    said = [line["status"].split()[0] if "digest" in line else line["status"] for line in told(lines)]
    return [status for index, status in enumerate(said) if index == 0 or said[index - 1] != status]


def test_a_pull_tells_of_each_stage() -> None:
    assert statuses(lines_of("/api/pull", model="new")) == [
        "pulling manifest", "pulling", "verifying sha256 digest", "writing manifest", "success"]  # fmt: skip


def test_a_pull_tells_how_far_each_layer_has_come() -> None:
    layers: dict[str, list[dict[str, Any]]] = {}
    for line in told(lines_of("/api/pull", model="new")):
        if "digest" in line:
            layers.setdefault(line["digest"], []).append(line)
    for digest, lines in layers.items():
        assert digest.startswith("sha256:")
        assert {line["status"] for line in lines} == {f"pulling {digest[7:19]}"}
        done = [line.get("completed", 0) for line in lines]
        assert done == sorted(set(done))
        assert {line["total"] for line in lines} == {done[-1]}
    largest = max(layers.values(), key=len)
    assert "completed" not in largest[0]
    assert len(largest) > 10


def test_a_pull_takes_as_long_as_a_load() -> None:
    n_waits = sum(step.after_ns > 0 for step in lines_of("/api/pull", model="new").steps)
    took_ns = sum(step.after_ns for step in lines_of("/api/pull", model="new").steps)
    assert n_waits >= 20
    assert 20_000_000 <= took_ns <= 25_000_000


def test_a_model_that_is_there_is_pulled_at_once() -> None:
    lines = lines_of("/api/pull", model="tiny")
    assert sum(step.after_ns for step in lines.steps) == 0
    assert all(line["completed"] == line["total"] for line in told(lines) if "digest" in line)


@pytest.mark.parametrize("name", ["new", "NEW:latest", "registry.ollama.ai/library/new"])
def test_a_model_that_was_pulled_is_on_disk(name: str) -> None:
    fake = FakeOllama(SPEC, 0)
    lines = lines_of("/api/pull", fake, name=name)
    assert fake.find("new") is None
    put(fake, lines)
    found = fake.find("new")
    assert found is not None
    assert found.modified_at == "2026-11-23T21:58:40Z"


@pytest.mark.parametrize(("name", "url"), [
    ("nope", "https://registry.ollama.ai/v2/library/nope/manifests/latest"),
    ("me/Nope:7b", "https://registry.ollama.ai/v2/me/Nope/manifests/7b"),
    ("hf.co/me/nope:q4", "https://hf.co/v2/me/nope/manifests/q4"),
])  # fmt: skip
def test_a_model_that_no_registry_has(name: str, url: str) -> None:
    fake = FakeOllama(SPEC, 0)
    lines = lines_of("/api/pull", fake, model=name)
    assert told(lines)[0] == {"status": "pulling manifest"}
    assert url in told(lines)[-1]["error"]
    put(fake, lines)
    assert fake.find(name) is None


@pytest.mark.parametrize(("name", "status"), [("new", 200), ("nope", 500)])
def test_without_a_stream_only_the_end_is_told(name: str, status: int) -> None:
    lines = lines_of("/api/pull", model=name, stream=False)
    assert lines.single is not None
    assert lines.single.status == status
    assert json.loads(lines.single.body) == (told(lines)[-1] if status == 500 else {"status": "success"})


def test_a_push_tells_of_each_stage() -> None:
    assert statuses(lines_of("/api/push", model="tiny")) == [
        "retrieving manifest", "pushing", "pushing manifest", "success"]  # fmt: skip


def test_a_model_is_made_from_another() -> None:
    fake = FakeOllama(SPEC, 0)
    lines = lines_of("/api/create", fake, model="terse", **{"from": "tiny", "system": "You are terse."})
    stages = [status.split(" sha256")[0] for status in statuses(lines)]
    assert stages[:3] == ["using existing layer", "creating new layer", "using existing layer"]
    assert stages[3:] == ["writing manifest", "success"]
    put(fake, lines)
    made = fake.find("terse")
    assert made is not None
    assert made.size_bytes == 1_000_000


def test_a_model_is_made_from_one_that_is_pulled_first() -> None:
    lines = lines_of("/api/create", None, model="terse", **{"from": "new"})
    assert statuses(lines)[:2] == ["pulling manifest", "pulling"]
    assert statuses(lines)[-1] == "success"


@pytest.mark.parametrize(("path", "body", "message"), [
    ("/api/pull", {}, "invalid model name"),
    ("/api/push", {}, "model is required"),
    ("/api/create", {"from": "tiny"}, "invalid model name"),
    ("/api/create", {"model": "x"}, "neither 'from' or 'files' was specified"),
    ("/api/pull", {"model": 5},
     "json: cannot unmarshal number into Go struct field PullRequest.model of type string"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_ollamas_words(path: str, body: dict[str, object], message: str) -> None:
    found = handle(FakeOllama(SPEC, 0), Request("POST", path, body=json.dumps(body).encode()), NOW)
    assert isinstance(found, Reply)
    assert (found.status, json.loads(found.body)) == (400, {"error": message})


@pytest.mark.parametrize("stream", [True, False])
def test_a_local_page_may_pull(*, stream: bool) -> None:
    body = json.dumps({"model": "new", "stream": stream}).encode()
    lines = lines_for(Request("POST", "/api/pull", origin="http://localhost:3000", body=body))
    headers = lines.headers if lines.single is None else lines.single.headers
    assert (b"Access-Control-Allow-Origin", b"http://localhost:3000") in headers


@pytest.mark.anyio
async def test_a_pull_over_http() -> None:
    async with serve_fleet([SPEC]) as (server,):
        answer = await ask(server.url, "POST", "/api/pull", {"model": "new"})
        tags = body_of(await ask(server.url, "GET", "/api/tags"))
    assert (answer.status, answer.header("Content-Type")) == (200, "application/x-ndjson")
    assert answer.complete
    assert answer.lines[-1] == {"status": "success"}
    assert answer.chunks is not None
    assert len(answer.chunks) == len(answer.lines)
    assert sorted(model["name"] for model in tags["models"]) == ["new:latest", "tiny:latest"]


@pytest.mark.anyio
async def test_a_pull_over_http_without_a_stream() -> None:
    async with serve_fleet([SPEC]) as (server,):
        answer = await ask(server.url, "POST", "/api/pull", {"model": "new", "stream": False})
        tags = body_of(await ask(server.url, "GET", "/api/tags"))
    assert body_of(answer) == {"status": "success"}
    assert len(tags["models"]) == 2
