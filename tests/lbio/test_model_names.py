"""The model in answers gets the name that was asked for; nothing else of an answer changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.ollama import Shape, shape_of
from lbio.http1 import ChunkedDecoder, Framing, parse_response_head
from lbio.wire.model_names import DEPTH_MAX, NAME_BYTES_MAX, Renamer, as_go_writes, renamed_in_error

RECORDED = sorted((Path(__file__).parents[1] / "captures").glob("*.json"))
ANSWERS = ("chat_", "generate_", "embed", "v1_chat", "v1_completions", "v1_messages", "v1_embeddings")
CAPTURES = [path for path in RECORDED if path.stem.startswith(ANSWERS)]
SENT, ASKED = b'"model":"tiny"', b'"model":"gpt-4o"'


def renamed(data: bytes, shape: Shape = Shape.NATIVE, *, lines: bool = False, size: int = 0) -> bytes:
    renamer = Renamer("gpt-4o", shape, lines=lines)
    pieces = [data[i : i + size] for i in range(0, len(data), size)] if size else [data]
    return b"".join(map(renamer.feed, pieces)) + renamer.end()


def capture(path: Path) -> tuple[str, bytes, bytes]:
    """The path asked for, the content type and the body of a recorded answer."""
    told = json.loads(path.read_text(encoding="utf-8"))
    method, target, _ = told["request"]["head"].split(" ", 2)
    raw = "".join(piece["data"] for piece in told["response"]).encode()
    head_raw, _, body = raw.partition(b"\r\n\r\n")
    head = parse_response_head(head_raw + b"\r\n\r\n", method)
    if head.framing is Framing.CHUNKED:
        body = ChunkedDecoder(502).feed(body)
    return target, head.header(b"content-type") or b"", body


def names_in(line: bytes) -> list[Any]:
    """Where a model may be called by its name, by the documentation of each API."""
    value = json.loads(line)
    if not isinstance(value, dict):
        return []
    inner = [value.get("response"), value.get("message")]
    return [each["model"] for each in (value, *inner) if isinstance(each, dict) and "model" in each]


@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.stem)
def test_every_recorded_answer_names_what_was_asked_for(path: Path) -> None:
    target, content_type, body = capture(path)
    lines = content_type.startswith((b"application/x-ndjson", b"text/event-stream"))
    after = renamed(body, shape_of(target), lines=lines)
    assert after == body.replace(SENT, ASKED)
    objects = [line.removeprefix(b"data: ") for line in (after.split(b"\n") if lines else [after])]
    told = [name for line in objects if line.startswith(b"{") for name in names_in(line)]
    assert set(told) <= {"gpt-4o", ""}  # "" is what a runner that has died leaves
    if b'"model"' in body:
        assert "gpt-4o" in told


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_however_it_is_cut_the_same_comes_of_it(size: int) -> None:
    for path in CAPTURES:
        target, content_type, body = capture(path)
        lines = content_type.startswith((b"application/x-ndjson", b"text/event-stream"))
        whole = renamed(body[:5000], shape_of(target), lines=lines)
        assert renamed(body[:5000], shape_of(target), lines=lines, size=size) == whole, path


def test_the_responses_api_names_it_in_its_events_and_in_its_answer() -> None:
    """As OpenAI documents it: there is no recording of it."""
    events = (
        b'event: response.created\ndata: {"type":"response.created","response":{"id":"r","model":"tiny"}}\n\n'
        b'event: response.output_text.delta\ndata: {"type":"x","delta":"\\"model\\":\\"tiny\\""}\n\n'
        b'event: response.completed\ndata: {"type":"response.completed","response":'
        b'{"output":[{"type":"message","model":"tiny","content":[{"text":"x"}]}],"model":"tiny"}}\n\n'
    )
    after = renamed(events, Shape.OPENAI, lines=True)
    inside = b'"type":"message","model":"tiny"'
    assert after == events.replace(SENT, ASKED).replace(b'"type":"message",' + ASKED, inside)
    assert after.count(inside) == 1
    assert renamed(b'{"id":"r","model":"tiny"}', Shape.OPENAI) == b'{"id":"r","model":"gpt-4o"}'


@pytest.mark.parametrize(
    "body",
    [
        b'{"message":{"content":"\\"model\\":\\"tiny\\", {\\"model\\":\\"tiny\\"}"}}',
        b'{"message":{"tool_calls":[{"function":{"name":"buy","arguments":{"model":"tiny"}}}]}}',
        b'{"type":"message","content":[{"type":"tool_use","input":{"model":"tiny"}}]}',
        b'{"response":"{","done":false}',
        b'{"a":"model","b":"tiny"}',
        b'{"model":""}',
        b'{"model":["tiny"]}',
        b'{"model":{"model":"tiny"}}',
        b'["model","tiny"]',
        b'"model":"tiny"',
        b"",
        b'{"model":"' + b"x" * (NAME_BYTES_MAX + 1) + b'"}',
        b"[" * (DEPTH_MAX + 2) + SENT,
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_what_the_model_writes_is_not_touched(body: bytes, lines: bool) -> None:
    for size in (0, 1, 5):
        assert renamed(body, Shape.ANTHROPIC, lines=lines, size=size) == body


def test_the_model_is_renamed_wherever_it_stands_and_whatever_it_is() -> None:
    assert renamed(b'{\n  "data": [{"model":"tiny"}],\n  "model" : "other"\n}') == (
        b'{\n  "data": [{"model":"tiny"}],\n  "model" : "gpt-4o"\n}'
    )


def test_a_line_that_is_cut_off_does_not_spoil_the_next() -> None:
    cut = b'{"model":"tiny","message":{"content":"abc\n{"model":"tiny"}\n'
    assert renamed(cut, lines=True) == b'{"model":"gpt-4o","message":{"content":"abc\n{"model":"gpt-4o"}\n'


TEXTS = st.text(alphabet='model":{}[],\\\n\tx é', max_size=12)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("model") | TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), max_size=3), st.integers(1, 20), st.booleans())
def test_any_object_however_it_is_cut_differs_in_its_model_alone(
    objects: list[dict[str, Any]], size: int, lines: bool
) -> None:
    plain = [{name: value for name, value in each.items() if name != "model"} for each in objects]

    def written(model: str) -> bytes:
        return b"".join(
            json.dumps({**each, "model": model, "more": {"model": "tiny"}}).encode() + b"\n"
            for each in (plain if lines else plain[:1])
        )

    assert renamed(written("tiny"), lines=lines, size=size) == written("gpt-4o")


def test_names_are_written_as_go_writes_them() -> None:
    assert as_go_writes('a"<b>&\u2028') == b'"a\\"\\u003cb\\u003e\\u0026\\u2028"'


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (b'{"error":"model \'tiny\' not found"}', b'{"error":"model \'gpt-4o\' not found"}'),
        (b'{"error":"model \'tiny:latest\' not found"}', b'{"error":"model \'gpt-4o\' not found"}'),
        (b'{"error":"model \\"tiny\\" not found"}', b'{"error":"model \\"gpt-4o\\" not found"}'),
        (b'{"error":"a tiny \'tiny2\' problem"}', b'{"error":"a tiny \'tiny2\' problem"}'),
    ],
)
def test_an_error_quotes_the_name_that_was_asked_for(body: bytes, after: bytes) -> None:
    assert renamed_in_error(body, "tiny", "gpt-4o") == after
