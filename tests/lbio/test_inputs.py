"""Requests for embeddings taken apart, and their answers put together."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbcore.parts import shares
from lbio.wire.inputs import FORMS, INPUTS_MAX, Form, find_inputs, join, read_portion

NATIVE, OPENAI = FORMS["/api/embed"], FORMS["/v1/embeddings"]
SPACES = st.text(" \t\r\n", max_size=3).map(str.encode)
TEXTS = st.lists(st.text(max_size=12), min_size=1, max_size=40)


def cut(body: bytes, form: Form, n_parts: int) -> list[bytes]:
    inputs = find_inputs(body, form)
    assert inputs is not None
    return inputs.bodies(shares(len(inputs), n_parts))


@st.composite
def spaced(draw: st.DrawFn, value: object) -> bytes:
    """JSON with blanks wherever they may stand."""
    if isinstance(value, list):
        items = [draw(SPACES) + draw(spaced(item)) + draw(SPACES) for item in value]
        return b"[" + (b",".join(items) or draw(SPACES)) + b"]"
    if isinstance(value, dict):
        names = [draw(SPACES) + json.dumps(key).encode() + draw(SPACES) for key in value]
        items = [draw(SPACES) + draw(spaced(item)) + draw(SPACES) for item in value.values()]
        members = [name + b":" + item for name, item in zip(names, items, strict=True)]
        return b"{" + (b",".join(members) or draw(SPACES)) + b"}"
    return json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


# --- requests --------------------------------------------------------------------------------------------------


@given(st.data(), TEXTS, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_the_parts_have_the_inputs_in_their_order_and_all_else_as_it_was(
    data: st.DataObject, texts: list[str], n_parts: int
) -> None:
    asked = {"model": "m", "options": {"input ": [1]}, "input": texts, "truncate": False, "keep_alive": "5m"}
    order = data.draw(st.permutations(list(asked)))
    body = data.draw(spaced({name: asked[name] for name in order}))
    parts = cut(body, NATIVE, min(n_parts, len(texts)))
    read = [json.loads(part) for part in parts]
    assert list(itertools.chain.from_iterable(part["input"] for part in read)) == texts
    assert all(part | {"input": texts} == asked for part in read)
    assert max(len(part["input"]) for part in read) - min(len(part["input"]) for part in read) <= 1


def test_what_stands_around_the_inputs_is_the_same_to_the_byte() -> None:
    body = b' {"options" : {"x":1e400,"y":1.00},\n"input":[ "a","\\u00e9\xc3\xa9" , "c"] , "model":"m"}\n'
    assert cut(body, NATIVE, 2) == [
        b' {"options" : {"x":1e400,"y":1.00},\n"input":["a","\\u00e9\xc3\xa9"] , "model":"m"}\n',
        b' {"options" : {"x":1e400,"y":1.00},\n"input":["c"] , "model":"m"}\n',
    ]


@pytest.mark.parametrize(
    "text", ['a"b', "a\\", '\\"input\\":[', "]", '","', "\u2028", "input", '"input":["x"]',
             'x",', '\\",', 'x" ,', '",",', ",", '"', "\\\\", '\\\\",', ""]
)
def test_a_text_may_hold_whatever_json_can(text: str) -> None:
    texts = [text, "b", text]
    body = json.dumps({"model": "m", "input": texts}).encode()
    assert [json.loads(part)["input"] for part in cut(body, NATIVE, 3)] == [[text], ["b"], [text]]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[]", b"null", b'"input":["a","b"]',
        b'{"model":"m","input":"a"}', b'{"model":"m","input":[]}', b'{"model":"m","input":null}',
        b'{"model":"m","input":["a",1]}', b'{"model":"m","input":["a",null]}', b'{"model":"m","input":["a",["b"]]}',
        b'{"model":"m","input":[1,2]}', b'{"model":"m","input":[[1],"a"]}', b'{"model":"m","input":[[1,2],[3]]}',
        b'{"model":"m","input":["a",1,"b"]}', b'{"model":"m","input":["a",{"b":"c"},"d"]}',
        b'{"model":"m","input":["a","\\ud83d"]}', b'{"model":"m","input":{"a":["b"]}}',
        b'{"model":"m","input":["a","b"],"stream":false}', b'{"model":"m","input":["a","b"],"later":1}',
        b'{"model":"m","Input":["a","b"]}', b'{"model":"m","input":["a","b"],"INPUT":["c"]}',
        b'{"model":"m","input":["a"],"input":["b","c"]}', b'{"model":"m","options":{"input":["a"]},"input":["b","c"]}',
        b'{"model":"m","options":{"input":["a","b"]},"\\u0069nput":["c","d"]}',
        b'{"model":1,"input":["a","b"]}', b'{"input":["a","b"]}',
        b'{"model":"m","input":["a","b"]', b'{"model":"m","input":["a","b"]}}', b'{"model":"m","input":["a","b"]} x',
        b'{"model":"m","input":["a","b",]}', b'{"model":"m","input":["a" "b"]}', b'{"model":"m","input":["a","b"',
        b'{"model":"m","input":["a","\n"]}', b'{"model":"m","input":["a","\\q"]}',
        b'{"model":"m","input":["a","\\u12"]}',
        b'\xef\xbb\xbf{"model":"m","input":["a","b"]}', b'{"model":"m",//\n"input":["a","b"]}',
        b'{"x":' + b"[" * 100_000, b"\x1f\x8b\x08\x00" + bytes(20),
        b'{"model":"m","input":["a","b"],"options":{"x":"' + b"y" * 100_000 + b'"}}',
    ],
)  # fmt: skip
def test_what_is_not_understood_for_sure_stays_whole(body: bytes) -> None:
    assert find_inputs(body, NATIVE) is None
    assert find_inputs(body, OPENAI) is None


def test_more_inputs_than_could_be_answered_stay_whole() -> None:
    def body(n_inputs: int) -> bytes:
        return b'{"model":"m","input":[' + b",".join([b'""'] * n_inputs) + b"]}"

    assert find_inputs(body(INPUTS_MAX), NATIVE) is not None
    assert find_inputs(body(INPUTS_MAX + 1), NATIVE) is None


# --- answers ---------------------------------------------------------------------------------------------------


def native(vectors: list[list[float]], total: int, **more: Any) -> bytes:
    answer = {"model": "m", "embeddings": vectors, "total_duration": total, "load_duration": 7, **more}
    return json.dumps(answer, separators=(",", ":")).encode()


def openai(items: list[Any], tokens: int, **more: Any) -> bytes:
    data = [{"object": "embedding", "embedding": item, "index": index} for index, item in enumerate(items)]
    answer = {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    return json.dumps(answer | more, separators=(",", ":")).encode() + b"\n"


def joined(texts: list[bytes], form: Form, sizes: list[int]) -> bytes | None:
    portions = [
        read_portion(text, form, sum(sizes[:index]), size)
        for index, (text, size) in enumerate(zip(texts, sizes, strict=True))
    ]
    found = [portion for portion in portions if portion is not None]
    return join(found, form) if len(found) == len(portions) else None


VECTORS = st.lists(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4), min_size=1, max_size=30)


@given(st.data(), VECTORS, st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_answers_to_parts_make_the_answer_to_the_whole(
    data: st.DataObject, vectors: list[list[float]], n_parts: int
) -> None:
    sizes = shares(len(vectors), min(n_parts, len(vectors)))
    ends = list(itertools.accumulate(sizes))
    slices = [vectors[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    counts = [data.draw(st.integers(0, 10**6)) for _ in sizes]
    times = [data.draw(st.integers(0, 10**12)) for _ in sizes]
    texts = [native(it, t, prompt_eval_count=n) for it, t, n in zip(slices, times, counts, strict=True)]
    assert joined(texts, NATIVE, sizes) == native(vectors, max(times), prompt_eval_count=sum(counts))
    texts = [openai(*it) for it in zip(slices, counts, strict=True)]
    assert joined(texts, OPENAI, sizes) == openai(vectors, sum(counts))


@given(st.data(), VECTORS)
@settings(max_examples=100, deadline=None)
def test_blanks_in_answers_do_not_matter(data: st.DataObject, vectors: list[list[float]]) -> None:
    for form, text in ((NATIVE, native(vectors, 1)), (OPENAI, openai(vectors, 3))):
        first, second = [data.draw(spaced(json.loads(text))) for _ in range(2)]
        whole = joined([first, second], form, [len(vectors)] * 2)
        assert whole is not None
        told = json.loads(whole)
        if form is NATIVE:
            assert told["embeddings"] == vectors * 2
        else:
            assert [item["index"] for item in told["data"]] == list(range(2 * len(vectors)))
            assert [item["embedding"] for item in told["data"]] == vectors * 2


def test_base64_is_copied_as_it_is() -> None:
    whole = joined([openai(["AACAPw==", "//+/"], 4), openai(["AA/="], 2)], OPENAI, [2, 1])
    assert whole == openai(["AACAPw==", "//+/", "AA/="], 6)


def test_numbers_are_copied_as_they_are_written() -> None:
    first, second = b'{"embeddings":[[1.0,-0,1e-07],[]]}', b'{"embeddings":[[0.10000000149011612]]}'
    assert joined([first, second], NATIVE, [2, 1]) == b'{"embeddings":[[1.0,-0,1e-07],[],[0.10000000149011612]]}'


def test_what_is_not_known_is_as_in_the_first_part() -> None:
    texts = [native([[1.0]], 3, news={"a": [1]}, prompt_eval_count=2), native([[2.0]], 5, news={"b": [2]})]
    assert joined(texts, NATIVE, [1, 1]) == native([[1.0], [2.0]], 5, news={"a": [1]}, prompt_eval_count=2)


def test_usage_that_is_no_number_is_as_in_the_first_part() -> None:
    used: list[dict[str, Any]] = [{"prompt_tokens": 3, "of": {"x": 1}}, {"prompt_tokens": 5}]
    texts = [openai([[1.0]], 0, usage=used[0]), openai([[2.0]], 0, usage=used[1])]
    assert joined(texts, OPENAI, [1, 1]) == openai([[1.0], [2.0]], 0, usage={"prompt_tokens": 8, "of": {"x": 1}})


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{}", b"null", b"not JSON", b'{"embeddings":null}', b'{"embeddings":{}}', b'{"embeddings":[[1],[2]]}',
        b'{"embeddings":[]}', b'{"embeddings":[[1]],"embeddings":[[1]]}', b'{"embeddings":[[1]}',
        b'{"embeddings":[[1]],"x":"' + b"y" * 100_000 + b'"}', b'{"error":"x"}', b'{"embeddings":[[1]]}{}',
        b'{"data":[{"embedding":[1]}]}', b'{"data":[{"embedding":[1],"index":1.5}]}', b'{"data":[]}',
    ],
)  # fmt: skip
def test_an_answer_that_is_not_as_expected_is_not_joined(text: bytes) -> None:
    assert read_portion(text, NATIVE, 0, 1) is None
    assert read_portion(text, OPENAI, 0, 1) is None


def test_a_duration_that_is_no_number_is_not_joined() -> None:
    assert joined([b'{"embeddings":[[1]],"total_duration":"1s"}'] * 2, NATIVE, [1, 1]) is None
