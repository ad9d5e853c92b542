"""Another model in the body of a request: nothing else of it changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.ollama import find_route
from lbio.wire.bodies import read_facts
from lbio.wire.model_place import MEMBERS_MAX, PlacelessError, find_place

CHAT = find_route("/api/chat")
JSON = b"application/json"


def renamed(body: bytes, model: str, content_type: bytes = JSON) -> bytes:
    body, place = find_place(body, content_type)
    once, place = place.renamed(body, "another, for a while")
    twice, _ = place.renamed(once, model)
    return twice


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"gpt-4o","stream":true}', b'{"model":"llama3.2","stream":true}'),
        (b' {\n\t"a" : 1.50 ,\r\n "model" :\t"gpt-4o" }\n', b' {\n\t"a" : 1.50 ,\r\n "model" :\t"llama3.2" }\n'),
        (b'{"mod\\u0065l":"gpt-4o"}', b'{"mod\\u0065l":"llama3.2"}'),
        (b'{"name":"gpt-4o"}', b'{"name":"llama3.2"}'),
        (b'{"name":"gpt-4o","model":""}', b'{"name":"llama3.2","model":""}'),
        (b'{"model":"gpt-4o","name":"gpt-4o"}', b'{"model":"llama3.2","name":"gpt-4o"}'),
        (
            b'{"messages":[{"model":"gpt-4o","content":"\\"model\\":\\"gpt-4o\\""}],"model":"gpt-4o"}',
            b'{"messages":[{"model":"gpt-4o","content":"\\"model\\":\\"gpt-4o\\""}],"model":"llama3.2"}',
        ),
        (b'{"model":"gpt-4o","p":"cut \\ud83d"}', b'{"model":"llama3.2","p":"cut \\ud83d"}'),
        (b'{"p":"\xff","model":"gpt-4o"}', b'{"p":"\xff","model":"llama3.2"}'),
        (b'{"n":1e5,"z":-0.0,"model":"gpt-4o","n2":12}', b'{"n":1e5,"z":-0.0,"model":"llama3.2","n2":12}'),
    ],
)
def test_only_the_name_is_another(before: bytes, after: bytes) -> None:
    assert renamed(before, "llama3.2") == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"Model":"gpt-4o","n":1.5}', {"model": "x", "n": 1.5}),
        (b'{"model":"a","n":2,"model":"gpt-4o"}', {"model": "x", "n": 2}),
        (b'{"a":1,"model":"gpt-4o","a":[1,2]}', {"model": "x", "a": [1, 2]}),
        (b'{"model":"a","MODEL":"gpt-4o"}', {"model": "x"}),
        (b'{"NAME":"gpt-4o"} and more', {"model": "x"}),
        (b'{"a":12,"model":"gpt-4o","a":1}', {"model": "x", "a": 1}),
    ],
)
def test_what_is_written_in_an_odd_way_is_written_anew_as_go_reads_it(before: bytes, after: object) -> None:
    assert json.loads(renamed(before, "x")) == after


@pytest.mark.parametrize(
    "body",
    [
        b'{"source":"gpt-4o"}',
        b'{"Model":"gpt-4o","p":"' + b"x" * (256 << 10) + b'"}',
        b'{"model":"gpt-4o","p":[' + b'{"a":1},' * MEMBERS_MAX + b'{"a":1,"a":1}]}',
        b'{"model":"gpt-4o"',
    ],
    ids=["source", "large and odd", "very many members", "cut off"],
)
def test_what_cannot_be_told_is_refused(body: bytes) -> None:
    with pytest.raises(PlacelessError):
        find_place(body, JSON)


def test_a_large_body_is_not_taken_apart() -> None:
    image = b"A" * (8 << 20)
    body = b'{"messages":[{"images":["%s"]}],"model":"gpt-4o"}' % image
    assert renamed(body, "m") == body.replace(b"gpt-4o", b"m")


def test_the_field_of_a_form_is_replaced() -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nmodel\r\ngpt-4o\r\n'
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt-4o\r\n--b--\r\n'
    )
    after = renamed(form, "whisper", b"multipart/form-data; boundary=b")
    assert after == form.replace(b'"model"\r\n\r\ngpt-4o', b'"model"\r\n\r\nwhisper')


def test_a_form_without_the_field_is_refused() -> None:
    with pytest.raises(PlacelessError):
        find_place(b"--b--\r\n", b"multipart/form-data; boundary=b")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "name", "a"]), inner),
    max_leaves=8,
)
MEMBERS = st.dictionaries(st.sampled_from(["a", "b", "messages", "name", "models", "Ä"]) | st.text(max_size=4), VALUES)


@given(MEMBERS, MEMBERS, st.sampled_from([None, 1]), st.booleans())
def test_the_new_body_differs_in_nothing_but_the_model(
    before: dict[str, Any], after: dict[str, Any], indent: int | None, ascii_only: bool
) -> None:
    def is_plain(name: str) -> bool:
        return name.lower() not in {"model", "name"}

    first = {name: value for name, value in before.items() if is_plain(name)}
    second = {name: value for name, value in after.items() if is_plain(name) and name not in first}

    def written(model: str) -> bytes:
        whole = {**first, "model": model, **second}
        return json.dumps(whole, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")

    body = renamed(written("gpt-4o"), "hf.co/x:y")
    assert body == written("hf.co/x:y")
    assert read_facts(CHAT, "POST", body).model == "hf.co/x:y"
