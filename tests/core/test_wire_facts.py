"""Our own errors and lists against recordings of a real Ollama (tests/captures)."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lbcore import catalog
from lbcore.ollama import Shape, canonical_model, error_body, error_tail, find_route, model_not_found, shape_of
from lbcore.requests import SERVER_BUSY
from tests.playbook import fleet, loaded

CAPTURES = Path(__file__).parent.parent / "captures"


def recorded(name: str) -> tuple[str, int, str]:
    """Return path, status and body of a recorded exchange."""
    capture = json.loads((CAPTURES / f"{name}.json").read_text(encoding="utf-8"))
    head, _, body = "".join(read["data"] for read in capture["response"]).partition("\r\n\r\n")
    return capture["request"]["head"].split(" ")[1], int(head.split(" ")[1]), body


@pytest.mark.parametrize(
    "name",
    [
        "chat_no_model",
        "chat_server_busy",
        "chat_unknown_model",
        "generate_unknown_model",
        "v1_chat_no_messages",
        "v1_chat_unknown",
        "v1_embeddings_unknown",
        "v1_messages_bad",
        "v1_messages_unknown",
    ],
)
def test_our_errors_are_written_as_ollamas_own(name: str) -> None:
    path, status, body = recorded(name)
    error: Any = json.loads(body)["error"]
    message = error if isinstance(error, str) else error["message"]
    request_id = json.loads(body).get("request_id", "")
    assert error_body(shape_of(path), status, message, request_id).decode() == body.rstrip("\n")


@pytest.mark.parametrize("name", ["chat_unknown_model", "generate_unknown_model", "v1_chat_unknown"])
def test_a_model_nobody_has_is_told_of_in_ollamas_words(name: str) -> None:
    assert json.dumps(model_not_found("nope"))[1:-1] in recorded(name)[2]


def test_a_full_queue_is_told_of_in_ollamas_words() -> None:
    assert json.loads(recorded("chat_server_busy")[2]) == {"error": SERVER_BUSY}


@pytest.mark.parametrize(
    ("name", "shape"), [("chat", Shape.NATIVE), ("v1_chat", Shape.OPENAI), ("v1_messages", Shape.ANTHROPIC)]
)
def test_a_broken_stream_ends_in_the_framing_of_its_path_and_not_as_a_good_one(name: str, shape: Shape) -> None:
    path, _, _ = recorded(f"{name}_runner_killed_midstream")
    assert shape_of(path) is shape
    tail = error_tail(shape, "it broke").decode()
    assert tail.endswith("\n")
    assert not any(end in tail for end in ('"done":true', "[DONE]", "message_stop"))
    data = next(line.removeprefix("data: ") for line in tail.splitlines() if "{" in line)
    assert "it broke" in json.dumps(json.loads(data))


def test_a_broken_stream_of_responses_ends_with_an_event_of_that_name_as_clients_of_openai_expect() -> None:
    tail = error_tail(Shape.OPENAI, "it broke", ending=find_route("/v1/responses").ending).decode()
    event, data, *rest = tail.split("\n")
    assert (event, rest) == ("event: error", ["", ""])
    told = json.loads(data.removeprefix("data: "))
    assert told == {"type": "error", **json.loads(error_body(Shape.OPENAI, 500, "it broke"))}


def test_the_error_line_of_a_native_stream_is_the_recorded_ones_shape() -> None:
    _, _, body = recorded("chat_runner_killed_midstream")
    (line,) = [line for line in body.splitlines() if line.startswith('{"error"')]
    assert error_tail(Shape.NATIVE, json.loads(line)["error"]).decode() == line + "\n"


@pytest.mark.parametrize(("name", "path"), [("tags", "/api/tags"), ("ps_loaded", "/api/ps"), ("ps_empty", "/api/ps")])
def test_the_list_of_a_fleet_of_one_is_its_servers_own(name: str, path: str) -> None:
    recorded_path, _, body = recorded(name)
    assert recorded_path == path == find_route(path).name
    entries = [json.dumps(entry, separators=(",", ":")) for entry in json.loads(body)["models"]]
    book = fleet("a", have="tiny", active="tiny" if entries and path == "/api/ps" else "")
    for entry in entries:
        record = book.model("a", canonical_model(json.loads(entry)["name"]))
        if path == "/api/tags":
            (info,) = [record.available]
            assert info is not None
            record.available = type(info)("tiny:latest", "9c", json.loads(entry)["modified_at"], entry)
        else:
            record.active = type(loaded("x")[0])("tiny:latest", entry)
    merged = catalog.tags_json if path == "/api/tags" else catalog.ps_json
    assert merged(book.balancer.fleet).decode() == body


def test_the_list_of_loaded_models_does_not_depend_on_the_order_of_the_servers() -> None:
    book = fleet("a b c", have="m n", active="m n")
    servers = list(book.balancer.fleet)
    for i, server in enumerate(servers):
        for name in ("m", "n"):
            server.models[f"{name}:latest"].active = type(loaded("x")[0])(name, f'{{"name":"{name}","on":{i}}}')
    lists = set()
    for seed in range(20):
        Random(seed).shuffle(servers)
        lists.add(catalog.ps_json(servers))
    assert len(lists) == 1
    assert [entry["name"] for entry in json.loads(lists.pop())["models"]] == ["m", "n"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/models/m", "/v1/models/:model"),
        ("/v1/models/m:7b", "/v1/models/:model"),
        ("/v1/models", "/v1/models"),
        ("/v1/models/", "*"),
        ("/v1/models/a/b", "*"),
        ("/api/chat/x", "*"),
    ],
)
def test_a_route_with_a_name_in_its_path_takes_exactly_one_more_part(path: str, name: str) -> None:
    assert find_route(path).name == name
