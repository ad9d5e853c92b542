"""What is read of a request's body decides where it goes; an Ollama decides whether the body is good."""

import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.ollama import MODEL_CHARS_MAX, BodyFacts, RequestKind, find_route, runner_key
from lbio.wire.bodies import read_facts

CHAT, GENERATE = find_route("/api/chat"), find_route("/api/generate")
LOAD, UNLOAD, GEN, MANAGE = RequestKind.LOAD, RequestKind.UNLOAD, RequestKind.GENERATE, RequestKind.MANAGE
HELLO = [{"role": "user", "content": "hello"}]


def facts(body: object, path: str = "/api/chat", method: str = "POST") -> BodyFacts:
    return read_facts(find_route(path), method, body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.mark.parametrize(("path", "body", "kind"), [
    ("/api/chat", {"model": "m", "messages": HELLO}, GEN),
    ("/api/chat", {"model": "m", "messages": []}, LOAD),
    ("/api/chat", {"model": "m", "messages": None}, LOAD),
    ("/api/chat", {"model": "m"}, LOAD),
    ("/api/chat", {"model": "m", "keep_alive": 0}, UNLOAD),
    ("/api/chat", {"model": "m", "keep_alive": "0"}, UNLOAD),
    ("/api/chat", {"model": "m", "keep_alive": "0s"}, UNLOAD),
    ("/api/chat", {"model": "m", "keep_alive": "0h0m0.0s"}, UNLOAD),
    ("/api/chat", {"model": "m", "keep_alive": 0.0}, UNLOAD),
    ("/api/chat", {"model": "m", "keep_alive": -1}, LOAD),
    ("/api/chat", {"model": "m", "keep_alive": "5m"}, LOAD),
    ("/api/chat", {"model": "m", "keep_alive": "10m"}, LOAD),
    ("/api/chat", {"model": "m", "keep_alive": "0.5s"}, LOAD),
    ("/api/chat", {"model": "m", "messages": HELLO, "keep_alive": 0}, GEN),
    ("/api/generate", {"model": "m", "prompt": "x"}, GEN),
    ("/api/generate", {"model": "m", "prompt": ""}, LOAD),
    ("/api/generate", {"model": "m"}, LOAD),
    ("/api/generate", {"model": "m", "keep_alive": 0}, UNLOAD),
    ("/api/generate", {"model": "m", "prompt": " "}, GEN),
    ("/v1/chat/completions", {"model": "m", "messages": []}, GEN),
    ("/api/embed", {"model": "m"}, GEN),
    ("/api/show", {"model": "m"}, GEN),
    ("/api/pull", {"model": "m"}, MANAGE),
    ("/api/delete", {"model": "m"}, MANAGE),
])  # fmt: skip
def test_kind(path: str, body: dict[str, Any], kind: RequestKind) -> None:
    assert facts(body, path).kind is kind


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_bad_utf8_in_a_short_text_does_not_make_it_empty(path: str) -> None:
    found = facts(b'{"model": "m", "messages": "\xff", "prompt": "\xff"}', path)
    assert (found.model, found.kind) == ("m", GEN)


@pytest.mark.parametrize("body", [
    b'{"Model": "m", "messages": []}', b'{"MODEL": "m"}', b'{"name": "m"}', b'{"model": "", "name": "m"}',
    b'{"model": "m"} trailing garbage', b' \n\t{"model": "m"}{"model": "n"}', b'{"model": "m", "model": "m"}',
    b'{"model": "\\u006d"}', b'{"model": "m", "messages": [{"content": "\\ud800"}]}',
    b'{"model": "m", "extra": ' + b"[" * 500 + b"]" * 500 + b"}",
])  # fmt: skip
def test_lenient_as_go_is(body: bytes) -> None:
    assert facts(body).model == "m"


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"5", b"null", b'"model"', b"{}", b'{"model": 5}', b'{"model": null}', b'{"model": ["m"]}',
    b"\xff", b'{"model": "\xff"}', b"{" * 100_000, b'{"a":' * 100_000, b"model=m", b'{"model" "m"}',
])  # fmt: skip
def test_what_cannot_be_read_names_no_model(body: bytes) -> None:
    found = facts(body)
    assert (found.model, found.kind, found.runner_key) == (None, GEN, "")


@pytest.mark.parametrize(("path", "body", "stream"), [
    ("/api/chat", {"model": "m", "messages": HELLO}, True),
    ("/api/chat", {"model": "m", "messages": HELLO, "stream": None}, True),
    ("/api/chat", {"model": "m", "messages": HELLO, "stream": False}, False),
    ("/v1/chat/completions", {"model": "m", "messages": HELLO}, False),
    ("/v1/chat/completions", {"model": "m", "messages": HELLO, "stream": True}, True),
    ("/api/chat", {"model": "m"}, False),
    ("/api/show", {"model": "m", "stream": True}, False),
])  # fmt: skip
def test_stream(path: str, body: dict[str, Any], stream: bool) -> None:
    assert facts(body, path).stream is stream


def test_runner_options_make_the_key_and_others_do_not() -> None:
    plain = facts({"model": "m", "options": {"temperature": 1}})
    large = facts({"model": "m", "options": {"num_ctx": 8192, "seed": 1}})
    assert plain.runner_key == ""
    assert large.runner_key == facts({"model": "m", "options": {"seed": 2, "num_ctx": 8192}}).runner_key != ""


def test_the_key_does_not_depend_on_the_order() -> None:
    one, two = {"num_ctx": 1, "num_gpu": 2}, {"num_gpu": 2, "num_ctx": 1}
    assert facts({"model": "m", "options": one}).runner_key == facts({"model": "m", "options": two}).runner_key


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
bodies = st.fixed_dictionaries(
    {"model": st.text(min_size=1, max_size=8)},
    optional={
        "messages": st.lists(json_values, max_size=2) | st.none(),
        "prompt": st.text(max_size=4) | st.none(),
        "stream": st.booleans() | st.none(),
        "keep_alive": st.sampled_from([None, 0, -1, 5, 0.5, "0", "0s", "5m"]),
        "options": st.dictionaries(st.sampled_from(["num_ctx", "num_gpu", "seed"]), st.integers(0, 9)) | st.none(),
        "extra": json_values,
    },
)


def oracle(body: dict[str, Any]) -> BodyFacts:
    """The same, by json.loads and plain Python, for /api/chat."""
    empty = not body.get("messages") and not body.get("prompt")
    kind = GEN if not empty else UNLOAD if body.get("keep_alive") in {0, "0", "0s"} else LOAD
    stream = body.get("stream") is not False and kind is GEN
    return BodyFacts(body["model"], runner_key(body.get("options")), stream, kind)


@given(bodies, st.booleans(), st.sampled_from([None, 1, 2]), st.booleans())
def test_the_same_as_json_loads(body: dict[str, Any], ascii_only: bool, indent: int | None, capital: bool) -> None:
    text = json.dumps(body, ensure_ascii=ascii_only, indent=indent)
    if capital:
        text = text.replace('"model"', '"Model"', 1)
    assert read_facts(CHAT, "POST", text.encode()) == oracle(json.loads(json.dumps(body)))


@given(st.binary(max_size=60))
def test_no_body_is_too_strange(body: bytes) -> None:
    read_facts(CHAT, "POST", body)
    read_facts(GENERATE, "POST", b"{" + body)


# --- bodies that are meant to hurt ---------------------------------------------------------------------------

MANY = b"[" + b"{}," * 350_000 + b"{}]"  # 1 MiB that would be 25 MiB of objects


def test_a_long_keep_alive_is_read_in_linear_time() -> None:
    body = b'{"model":"m","keep_alive":"' + b"0" * 30_000 + b'x"}'
    began = time.perf_counter()
    assert facts(body).kind is LOAD
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize("name", ["x" * (MODEL_CHARS_MAX + 1), "x" * 100_000, "\U0001f600" * (MODEL_CHARS_MAX + 1)])
@pytest.mark.parametrize("key", ["model", "Model", "name"])
def test_a_name_longer_than_any_server_takes_is_none(name: str, key: str) -> None:
    assert facts({key: name}).model is None
    assert facts({key: name[: MODEL_CHARS_MAX // 2]}).model is not None


def test_a_name_too_long_is_not_replaced_by_another() -> None:
    assert facts({"model": "x" * 100_000, "name": "m"}).model is None


def test_a_long_option_is_not_kept() -> None:
    assert facts({"model": "m", "options": {"num_ctx": "9" * 1000, "num_gpu": 1}}).runner_key == '{"num_gpu":1}'


@pytest.mark.parametrize("body", [
    b'{"x":' + MANY + b"}", b'{"model":"m","options":{"a":' + MANY + b"}}", b'{"model":' + MANY + b"}",
    b'{"model":"m","options":{"num_ctx":' + MANY + b"}}", b'{"model":"m","keep_alive":' + MANY + b"}",
    b'{"model":"m"}' + MANY, b'{"model":"' + b"x" * len(MANY) + b'"}', b'{"model":"m","options":' + MANY + b"}",
])  # fmt: skip
def test_no_body_becomes_many_objects(body: bytes) -> None:
    tracemalloc.start()
    try:
        facts(body)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body)
    finally:
        tracemalloc.stop()


def test_half_an_emoji_does_not_hide_the_model_of_a_large_body() -> None:
    found = facts({"model": "m", "messages": [{"content": "\ud83d", "images": ["A" * 1_000_000]}]})
    assert (found.model, found.kind) == ("m", GEN)


# --- forms -------------------------------------------------------------------------------------------------------

FORM = b"multipart/form-data; boundary=x"


def form(*fields: bytes) -> bytes:
    """Return a form with these fields, each its headers and its value."""
    return b"".join(b"--x\r\nContent-Disposition: " + field + b"\r\n" for field in fields) + b"--x--\r\n"


RECORDING = b'form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n' + b"\0\xff\r\n" * 1000


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (form(b'form-data; name="model"\r\n\r\nwhisper', RECORDING), "whisper"),
        (form(RECORDING, b'form-data; name="model"\r\n\r\nwhisper:1'), "whisper:1"),
        (form(RECORDING, b"form-data; name=model\r\nContent-Type: text/plain\r\n\r\nwhisper"), "whisper"),
        (form(b'form-data; name="model"\r\n\r\n'), None),
        (form(b'form-data; name="model_name"\r\n\r\nwhisper'), None),
        (form(b'form-data; name="model"\r\n\r\n' + b"m" * 5000), None),
        (form(RECORDING), None),
        (b"form-data" * 100_000, None),
        (b"", None),
    ],
)
def test_the_model_of_a_form_is_its_field_wherever_it_stands(body: bytes, model: str | None) -> None:
    facts = read_facts(find_route("/v1/audio/transcriptions"), "POST", body, FORM)
    assert facts.model == model
    assert not facts.stream


def test_a_form_of_very_many_fields_is_read_in_no_time() -> None:
    body = form(RECORDING) + b'form-data; name="model"\r\n' * 300_000
    began = time.perf_counter()
    assert read_facts(find_route("/v1/audio/transcriptions"), "POST", body, FORM).model is None
    assert time.perf_counter() - began < 0.5
