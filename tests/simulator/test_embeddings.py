"""Embeddings of the fake servers: of the build and the text alone, in Ollama's words."""

import base64
import json
import math
import struct
from typing import Any

import pytest

from lbcore.parsing import Problem
from simulator.fake_ollama import FakeModel, FakeOllama, FakeSpec
from simulator.fakes.answers import Timing
from simulator.fakes.api import Generation, Moment, Reply, Request, handle, single_reply
from simulator.fleet import parse_fleet
from tests.simulator.wire import load

E5 = FakeModel("e5", capabilities=("embedding",), embedding_length=8, num_ctx=16)
MOMENT = Moment(0, 0, 1)


def answer(path: str, body: object, model: FakeModel = E5) -> tuple[int, Any]:
    fake = FakeOllama(FakeSpec("a", models=(model, FakeModel("tiny"))), 0)
    result = handle(fake, Request("POST", path, body=json.dumps(body).encode()), MOMENT)
    if isinstance(result, Generation):
        result = single_reply(result, Timing(5, 3, 1, 1, 0))
    assert isinstance(result, Reply)
    return result.status, json.loads(result.body)


def test_an_embedding_depends_on_the_text_alone() -> None:
    _, one = answer("/api/embed", {"model": "e5", "input": ["a", "b", "a"]})
    _, two = answer("/api/embed", {"model": "e5:latest", "input": "b"})
    first, second, third = one["embeddings"]
    assert first == third
    assert [second] == two["embeddings"] != [first]
    assert math.isclose(math.hypot(*first), 1.0, abs_tol=1e-5)
    assert one | {"embeddings": 0} == {
        "model": "e5", "embeddings": 0, "total_duration": 5, "load_duration": 3, "prompt_eval_count": 3,
    }  # fmt: skip


def test_another_build_gives_others() -> None:
    other = FakeModel("e5", digest="f" * 64, capabilities=("embedding",), embedding_length=8)
    asked = {"model": "e5", "input": ["a"]}
    assert answer("/api/embed", asked)[1]["embeddings"] != answer("/api/embed", asked, other)[1]["embeddings"]


def test_the_same_in_the_words_of_openai() -> None:
    vectors = answer("/api/embed", {"model": "e5", "input": ["a", "b"]})[1]["embeddings"]
    status, told = answer("/v1/embeddings", {"model": "e5", "input": ["a", "b"]})
    data = [{"object": "embedding", "embedding": vector, "index": index} for index, vector in enumerate(vectors)]
    usage = {"prompt_tokens": 2, "total_tokens": 2}
    assert (status, told) == (200, {"object": "list", "data": data, "model": "e5", "usage": usage})
    _, told = answer("/v1/embeddings", {"model": "e5", "input": "a", "encoding_format": "base64"})
    numbers = struct.unpack("<8f", base64.b64decode(told["data"][0]["embedding"]))
    assert numbers == pytest.approx(vectors[0])


def test_the_old_path_gives_one() -> None:
    vectors = answer("/api/embed", {"model": "e5", "input": "a"})[1]["embeddings"]
    assert answer("/api/embeddings", {"model": "e5", "prompt": "a"}) == (200, {"embedding": vectors[0]})


def test_dimensions_shorten_it() -> None:
    assert len(answer("/api/embed", {"model": "e5", "input": "a", "dimensions": 3})[1]["embeddings"][0]) == 3


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/api/embed", {"input": ["a", 1]}, (400, {"error": "invalid input type"})),
        ("/api/embed", {"input": []}, (200, {"model": "e5", "embeddings": []})),
        ("/api/embed", {}, (200, {"model": "e5", "embeddings": []})),
        ("/api/embed", {"input": ["a", "long " * 20], "truncate": False},
         (400, {"error": "the input length exceeds the context length"})),
        ("/api/embeddings", {}, (200, {"embedding": []})),
    ],
)  # fmt: skip
def test_other_inputs(path: str, body: dict[str, Any], expected: tuple[int, Any]) -> None:
    assert answer(path, {"model": "e5", **body}) == expected


@pytest.mark.parametrize("body", [{}, {"input": []}, {"input": "a", "encoding_format": "x"}, {"input": [[1, 2]]}])
def test_what_openai_calls_invalid(body: dict[str, Any]) -> None:
    status, told = answer("/v1/embeddings", {"model": "e5", **body})
    assert (status, told["error"]["type"]) == (400, "invalid_request_error")


def test_a_model_for_text_gives_none() -> None:
    recorded = json.loads(load("embed").response.partition(b"\r\n\r\n")[2])
    assert answer("/api/embed", {"model": "tiny", "input": "a"}) == (501, recorded)


def test_an_embedding_model_of_a_fleet_file() -> None:
    problems: list[Problem] = []
    (spec,) = parse_fleet([{"name": "a", "models": [{"name": "e5", "embedding": 384}, "tiny"]}], problems)
    assert problems == []
    assert [(model.capabilities, model.embedding_length) for model in spec.models] == [
        (("embedding",), 384), (("completion",), 4096),
    ]  # fmt: skip
