"""A watcher counts tokens and finds the end or the error of a stream, however it was cut up."""

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.ollama import Ending
from lbio.wire.watchers import Watcher
from tests.simulator.wire import load, parse

TOKEN = b'{"model":"m","message":{"role":"assistant","content":"x"},"done":false}\n'
DONE = b'{"model":"m","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop"}\n'
SSE_TOKEN = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
MESSAGE_TOKEN = b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n'
SSE_LAST = b'data: {"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
SSE_USAGE = b'data: {"model":"m","choices":[],"usage":{"completion_tokens":4}}\n\n'
SSE_DEAD = b'data: {"model":"","choices":[{"index":0,"delta":{"content":""},"finish_reason":null}]}\n\n'
SSE_ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
SSE_THOUGHT = SSE_ROLE.replace(b'"content":""', b'"content":"","reasoning":"hm"')
SSE_CALL = b'{"tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}'
SSE_QUOTES = b"data: %s\n\n" % json.dumps(
    {"model": "m", "choices": [{"delta": {"content": '"finish_reason":"stop","choices":[]'}}]}
).encode()
TEXT_TOKEN = b'data: {"choices":[{"text":"x","index":0,"finish_reason":null}],"model":"m"}\n\n'
TEXT_LAST = b'data: {"choices":[{"text":"","index":0,"finish_reason":"length"}],"model":"m"}\n\n'
MESSAGE_FRAME = (
    b"event: message_start\ndata: {}\n\nevent: content_block_start\ndata: {}\n\nevent: ping\ndata: {}\n\n",
    b"event: content_block_stop\ndata: {}\n\nevent: message_delta\ndata: {}\n\nevent: message_stop\ndata: {}\n\n",
)
MESSAGE_QUOTES = b'{"t":"event: content_block_delta\\ndata: ",'
RESPONSE_TOKEN = b'event: response.output_text.delta\ndata: {"delta":"x"}\n\n'
CHAT, CHAT_SSE, MESSAGES = Ending.NDJSON_DONE, Ending.SSE_DONE, Ending.MESSAGE_STOP

Verdict = tuple[bool, bool, int]


def verdict(watcher: Watcher) -> Verdict:
    return watcher.complete, watcher.failed, watcher.n_tokens


def watched(ending: Ending, *pieces: bytes) -> Verdict:
    watcher = Watcher(ending)
    total = sum(watcher.feed(piece) for piece in pieces)
    assert total == watcher.n_tokens
    return verdict(watcher)


def quoted(text: str) -> bytes:
    return json.dumps({"message": {"content": text}, "done": False}).encode() + b"\n"


ARGUMENTS = b'{"done":true,"error":"x","status":"success"}'
TRICK = b'{"message":{"tool_calls":[{"function":{"arguments":%s}}]},"done":false}\n' % ARGUMENTS

STORIES: list[tuple[str, Ending, bytes, Verdict]] = [
    ("nothing", CHAT, b"", (False, False, 0)),
    ("one token", CHAT, TOKEN, (False, False, 1)),
    ("a whole stream", CHAT, TOKEN * 3 + DONE, (True, False, 3)),
    ("blanks", CHAT, b'{"done" :\t true}\n', (True, False, 0)),
    ("not yet a line", CHAT, DONE[:-1], (False, False, 0)),
    ("an error", CHAT, TOKEN + b'{"error":"boom"}\n', (False, True, 1)),
    ("an error with blanks", CHAT, b'{ "error" : "boom" }\n', (False, True, 0)),
    ("done inside tool-call arguments", CHAT, TRICK, (False, False, 1)),
    ("done inside a text", CHAT, quoted('"done":true'), (False, False, 1)),
    ("an error inside a text", CHAT, quoted('{"error":"boom"}'), (False, False, 1)),
    ("an empty error", CHAT, b'{"error":"","done":false}\n', (False, False, 1)),
    ("done that is no boolean", CHAT, b'{"done":"true"}\n{"done":1}\n', (False, False, 2)),
    ("a list", CHAT, b'["done",true]\n[{"done":true}]\n', (False, False, 2)),
    ("broken JSON", CHAT, b'{"done":true\n', (False, False, 1)),
    ("a pull", Ending.NDJSON_SUCCESS, b'{"status":"pulling"}\n{"status":"success"}\n', (True, False, 1)),
    ("a failed pull", Ending.NDJSON_SUCCESS, b'{"error":"no such model"}\n', (False, True, 0)),
    ("SSE", CHAT_SSE, SSE_TOKEN * 2 + b"data: [DONE]\n\n", (True, False, 2)),
    ("SSE without its end", CHAT_SSE, SSE_TOKEN * 2, (False, False, 2)),
    ("SSE that speaks of its end", CHAT_SSE, SSE_TOKEN.replace(b"x", b"data: [DONE]"), (False, False, 1)),
    ("SSE with an error", CHAT_SSE, SSE_TOKEN + b'data: {"error":{"message":"boom"}}\n\n', (False, True, 1)),
    ("SSE that says why it ends", CHAT_SSE, SSE_TOKEN + SSE_LAST + SSE_USAGE + b"data: [DONE]\n\n", (True, False, 1)),
    ("SSE with blanks", CHAT_SSE, SSE_LAST.replace(b'":', b'" : ').replace(b'"stop', b' "stop'), (False, False, 0)),
    ("SSE whose last chunk has a token", CHAT_SSE, SSE_LAST.replace(b"{}", b'{"content":"x"}'), (False, False, 1)),
    ("SSE that ends with empty content", CHAT_SSE, SSE_LAST.replace(b"{}", b'{"content":""}'), (False, False, 0)),
    ("SSE that ends with a tool's call", CHAT_SSE, SSE_LAST.replace(b"{}", SSE_CALL), (False, False, 1)),
    ("SSE that speaks of why it ends", CHAT_SSE, SSE_QUOTES, (False, False, 1)),
    ("SSE of a runner that died", CHAT_SSE, SSE_TOKEN + SSE_DEAD, (False, False, 1)),
    ("SSE that only says who speaks", CHAT_SSE, SSE_ROLE + SSE_ROLE.replace(b'""', b"null"), (False, False, 0)),
    ("SSE that says first who speaks", CHAT_SSE, SSE_ROLE + SSE_TOKEN * 2 + b"data: [DONE]\n\n", (True, False, 2)),
    ("SSE with an empty chunk amid others", CHAT_SSE, SSE_TOKEN + SSE_ROLE + SSE_TOKEN, (False, False, 3)),
    ("SSE that begins with a comment", CHAT_SSE, b": wait\n\n: wait\n\n" + SSE_TOKEN, (False, False, 1)),
    ("SSE that begins with what it used", CHAT_SSE, SSE_USAGE + SSE_TOKEN, (False, False, 1)),
    ("SSE that begins with a thought", CHAT_SSE, SSE_ROLE + SSE_THOUGHT, (False, False, 1)),
    ("SSE that begins with a call", CHAT_SSE, SSE_ROLE.replace(b'{"role":"assistant","content":""}', SSE_CALL),
     (False, False, 1)),
    ("SSE in words that nobody knows", CHAT_SSE, b"data: hello\n\n", (False, False, 1)),
    ("SSE whose text says who speaks", CHAT_SSE, SSE_TOKEN.replace(b"x", b'\\"role\\":'), (False, False, 1)),
    ("completions that begin with nothing", CHAT_SSE, TEXT_TOKEN.replace(b'"x"', b'""') + TEXT_TOKEN,
     (False, False, 1)),
    ("completions", CHAT_SSE, TEXT_TOKEN + TEXT_LAST + b"data: [DONE]\n\n", (True, False, 1)),
    ("messages with all that is around", MESSAGES, (MESSAGE_TOKEN * 2).join(MESSAGE_FRAME), (True, False, 2)),
    ("messages that speak of a token", MESSAGES, MESSAGE_TOKEN.replace(b"{", MESSAGE_QUOTES), (False, False, 1)),
    ("responses with all that is around", Ending.RESPONSE_COMPLETED,
     b"event: response.created\ndata: {}\n\n" + RESPONSE_TOKEN * 2 + b"event: response.output_text.done\ndata: {}\n\n",
     (False, False, 2)),
    ("messages", MESSAGES, MESSAGE_TOKEN + b"event: message_stop\ndata: {}\n\n", (True, False, 1)),
    ("messages with an error", MESSAGES, MESSAGE_TOKEN + b"event: error\ndata: {}\n\n", (False, True, 1)),
    ("messages that speak of it", MESSAGES, MESSAGE_TOKEN.replace(b"{", b'{"t":"event: error",'), (False, False, 1)),
    ("responses", Ending.RESPONSE_COMPLETED, b"event: response.completed\ndata: {}\n\n", (True, False, 0)),
    ("cut-off responses", Ending.RESPONSE_COMPLETED, b"event: response.incomplete\ndata: {}\n\n", (True, False, 0)),
    ("failed responses", Ending.RESPONSE_COMPLETED, b"event: response.failed\ndata: {}\n\n", (False, True, 0)),
    ("an error among responses", Ending.RESPONSE_COMPLETED, b"event: error\ndata: {}\n\n", (False, True, 0)),
    ("no terminator needed", Ending.FRAMING, b"anything", (True, False, 0)),
]
NAMES = [story[0] for story in STORIES]


@pytest.mark.parametrize(("_name", "ending", "data", "expected"), STORIES, ids=NAMES)
def test_in_one_piece(_name: str, ending: Ending, data: bytes, expected: Verdict) -> None:
    assert watched(ending, data) == expected


@pytest.mark.parametrize(("_name", "ending", "data", "expected"), STORIES, ids=NAMES)
def test_byte_by_byte(_name: str, ending: Ending, data: bytes, expected: Verdict) -> None:
    assert watched(ending, *(data[i : i + 1] for i in range(len(data)))) == expected


EVENTS = [story for story in STORIES if story[1] not in {CHAT, Ending.NDJSON_SUCCESS}]


@pytest.mark.parametrize(("_name", "ending", "data", "expected"), EVENTS, ids=[story[0] for story in EVENTS])
def test_events_are_read_alike_with_cr_and_without_blanks(
    _name: str, ending: Ending, data: bytes, expected: Verdict
) -> None:
    crlf, dense = data.replace(b"\n", b"\r\n"), data.replace(b"data: ", b"data:").replace(b"event: ", b"event:")
    for written in (crlf, dense, dense.replace(b"\n", b"\r\n")):
        assert watched(ending, written) == expected
        assert watched(ending, *(written[i : i + 1] for i in range(len(written)))) == expected


@pytest.mark.parametrize(("ending", "data"), [
    (CHAT, TOKEN + DONE[:-1]), (CHAT_SSE, SSE_TOKEN + b"data: [DONE]\n"), (CHAT_SSE, SSE_TOKEN + b"data: [DONE]"),
    (MESSAGES, MESSAGE_TOKEN + b"event: message_stop\ndata: {}\n"),
])  # fmt: skip
def test_what_is_left_at_the_end_is_a_line_too(ending: Ending, data: bytes) -> None:
    watcher = Watcher(ending)
    assert watcher.feed(data) == 1
    assert not watcher.terminated
    watcher.end()
    watcher.end()
    assert verdict(watcher) == (True, False, 1)
    assert watcher.terminated


def test_half_a_line_at_the_end_is_no_end() -> None:
    watcher = Watcher(CHAT)
    watcher.feed(TOKEN + DONE[:-3])
    watcher.end()
    assert verdict(watcher) == (False, False, 1)


@given(st.data())
def test_any_split_gives_the_same_verdict_and_count(data: st.DataObject) -> None:
    ending = data.draw(st.sampled_from(sorted(set(Ending) - {Ending.FRAMING})))
    payload = b"".join(data.draw(st.lists(st.sampled_from([d for _, e, d, _ in STORIES if e is ending]), max_size=5)))
    points = data.draw(st.lists(st.integers(0, len(payload)), max_size=6))
    places = sorted({0, len(payload), *points})
    pieces = [payload[a:b] for a, b in itertools.pairwise(places)]
    assert watched(ending, *pieces) == watched(ending, payload)


@given(st.lists(st.text(max_size=40), max_size=6))
def test_no_text_is_taken_for_an_end(texts: list[str]) -> None:
    assert watched(CHAT, b"".join(quoted(text) for text in texts)) == (False, False, len(texts))


@pytest.mark.parametrize(("name", "ending", "complete", "failed"), [
    ("chat_stream_warm", CHAT, True, False),
    ("generate_stream", CHAT, True, False),
    ("v1_chat_stream", CHAT_SSE, True, False),
    ("v1_completions_stream", CHAT_SSE, True, False),
    ("v1_messages_stream", MESSAGES, True, False),
    ("v1_responses_stream", Ending.RESPONSE_COMPLETED, True, False),
    ("chat_runner_killed_midstream", CHAT, False, True),
    ("chat_sigterm_midstream", CHAT, False, False),
    ("v1_chat_runner_killed_midstream", CHAT_SSE, False, False),
    ("v1_messages_runner_killed_midstream", MESSAGES, False, False),
])  # fmt: skip
def test_recordings(name: str, ending: Ending, complete: bool, failed: bool) -> None:
    answer = parse(load(name).response)
    found = watched(ending, answer.body)
    assert found[:2] == (complete, failed)


@pytest.mark.parametrize(("name", "ending", "n_tokens"), [
    ("chat_stream_warm", CHAT, 4),
    ("generate_stream", CHAT, 4),
    ("v1_chat_stream", CHAT_SSE, 4),
    ("v1_chat_stream_usage", CHAT_SSE, 4),
    ("v1_completions_stream", CHAT_SSE, 4),
    ("v1_messages_stream", MESSAGES, 4),
    ("v1_responses_stream", Ending.RESPONSE_COMPLETED, 4),
])  # fmt: skip
def test_as_many_tokens_as_the_recording_says(name: str, ending: Ending, n_tokens: int) -> None:
    assert watched(ending, parse(load(name).response).body)[2] == n_tokens


def test_no_token_is_counted_for_a_runner_that_died() -> None:
    body = parse(load("v1_chat_runner_killed_midstream").response).body
    n_empty = body.count(b'"delta":{"content":""}')
    assert n_empty == 1
    assert watched(CHAT_SSE, body)[2] == body.count(b"data: ") - n_empty


@pytest.mark.parametrize(("data", "expected"), [
    (b"", True), (TOKEN, True), (TOKEN + b"{", False), (b"{", False), (TOKEN[:-1], False),
])  # fmt: skip
def test_it_knows_whether_a_line_is_begun(data: bytes, expected: bool) -> None:
    watcher = Watcher(CHAT)
    watcher.feed(data)
    assert watcher.at_line_start is expected


def test_a_line_without_end_is_not_kept_without_bound() -> None:
    watcher = Watcher(CHAT)
    for _ in range(10):
        watcher.feed(b"x" * (1 << 20))
    assert len(watcher.partial) <= 5 << 20


def test_a_very_long_last_line_is_still_an_end() -> None:
    """/api/generate's last line carries the whole context."""
    last = b'{"response":"","done":true,"context":[' + b",".join([b"12345"] * 300_000) + b"]}\n"
    pieces = [last[i : i + 65536] for i in range(0, len(last), 65536)]
    assert watched(CHAT, *pieces) == (True, False, 0)


def test_a_long_line_in_small_pieces_is_read_in_linear_time() -> None:
    watcher = Watcher(Ending.NDJSON_DONE)
    began = time.perf_counter()
    for _ in range(8000):
        watcher.feed(b"x" * 512)
    assert time.perf_counter() - began < 0.5
    assert watcher.feed(b'\n{"done":true}\n') == 1
    assert watcher.complete
