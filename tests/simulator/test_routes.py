"""The fakes answer on every path of the API, and refuse the methods that an Ollama refuses there."""

import json
from typing import Any

import pytest

from lbcore.ollama import ROUTES, Route
from simulator.fake_ollama import FakeModel, FakeOllama, FakeSpec
from simulator.fakes.api import Generation, Lines, Moment, Reply, Request, handle

NOW = Moment(now_ns=0, wall_ns=1_795_471_120_000_000_000, serial=1)
ABLE = FakeModel("tiny", capabilities=("completion", "tools", "thinking", "vision", "audio", "insert", "embedding"))
FILLED = {":digest": "sha256:" + "0" * 64, ":model": "tiny"}
OTHERS: dict[str, tuple[str, ...]] = {
    "/api/status": ("GET",),
    "/api/me": ("POST",),
    "/api/signout": ("POST",),
    "/api/user/keys/abc": ("DELETE",),
    "/api/experimental/web_search": ("POST",),
    "/api/experimental/web_fetch": ("POST",),
    "/api/experimental/model-recommendations": ("GET",),
}
PATHS = {route.name: route.methods for route in ROUTES} | OTHERS


def filled(name: str) -> str:
    parent, colon, last = name.rpartition(":")
    return parent + FILLED[colon + last] if colon else name


def ask(method: str, path: str, body: bytes = b"", **about: Any) -> Reply | Generation | Lines:
    return handle(FakeOllama(FakeSpec("x", models=(ABLE,)), 0), Request(method, path, body=body, **about), NOW)


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in PATHS for method in PATHS[name]])
def test_every_path_is_there(name: str, method: str) -> None:
    answer = ask(method, filled(name), b"{}")
    assert not isinstance(answer, Reply) or b"page not found" not in answer.body
    assert not isinstance(answer, Reply) or answer.status != 405


@pytest.mark.parametrize("name", PATHS)
def test_other_methods_are_refused_with_those_that_are_not(name: str) -> None:
    answer = ask("PATCH", filled(name))
    assert isinstance(answer, Reply)
    assert (answer.status, answer.body) == (405, b"405 method not allowed")
    assert dict(answer.headers)[b"Allow"] == ", ".join(PATHS[name]).encode()


ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "prompt": "hello",
    "input": "hello",
    "max_tokens": 5,
}


def part(name: str, value: str) -> str:
    filename = '; filename="a"' if name == "file" else ""
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n{value}\r\n'


@pytest.mark.parametrize("route", [route for route in ROUTES if route.generates], ids=lambda route: route.name)
def test_a_model_that_can_do_it_is_put_to_work(route: Route) -> None:
    if route.name == "/v1/audio/transcriptions":
        body = (part("model", "tiny") + part("file", "RIFF") + "--b--\r\n").encode()
        answer = ask("POST", route.name, body, content_type="multipart/form-data; boundary=b")
    else:
        answer = ask("POST", route.name, json.dumps(ASKED).encode())
    assert isinstance(answer, Generation)
    assert answer.failure is None
    assert answer.answer.tokens


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "multipart: NextPart: EOF"),
        ([part("file", "x")], "model is required"),
        ([part("model", "tiny")], "file is required: http: no such file"),
        ([part("model", "tiny"), part("file", "")], "audio file is empty"),
    ],
)
def test_what_is_wrong_with_a_form_is_said(parts: list[str], said: str) -> None:
    body = ("".join(parts) + "--b--\r\n").encode() if parts else b""
    answer = ask("POST", "/v1/audio/transcriptions", body, content_type="multipart/form-data; boundary=b")
    assert isinstance(answer, Reply)
    assert answer.status == 400
    assert said in json.loads(answer.body)["error"]["message"]
