"""Text, encoding and the checks of requests, without sockets."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.fake_ollama import FakeModel, FakeOllama, FakeSpec, Work
from simulator.fakes.answers import WORDS, continued, go_json, http_date, rfc3339, words
from simulator.fakes.api import Generation, Lines, Moment, Reply, Request, handle

S = 1_000_000_000
EYES = FakeModel("eyes", capabilities=("completion", "vision", "tools", "thinking"))
SPEC = FakeSpec("x", models=(FakeModel("tiny"), EYES))
NOW = Moment(now_ns=0, wall_ns=1_795_471_120 * S, serial=1)
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]


def ask(method: str, path: str, body: object = None, **about: Any) -> Reply | Generation | Lines:
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return handle(FakeOllama(SPEC, 0), Request(method, path, body=data, **about), NOW)


def reply(method: str, path: str, body: object = None, **about: Any) -> Reply:
    answer = ask(method, path, body, **about)
    assert isinstance(answer, Reply)
    return answer


def generation(path: str, **body: object) -> Generation:
    answer = ask("POST", path, {"model": "tiny"} | body)
    assert isinstance(answer, Generation), answer
    return answer


@pytest.mark.parametrize(
    ("wall_ns", "text"),
    [
        (1_795_471_120_174_816_380, "2026-11-23T21:58:40.17481638Z"),
        (1_795_471_120_000_000_000, "2026-11-23T21:58:40Z"),
        (1_795_471_120_000_000_001, "2026-11-23T21:58:40.000000001Z"),
        (1_795_471_118_746_449_818 + 2**63 - 1, "2319-03-05T21:45:55.601225625Z"),
    ],
)
def test_times_as_go_prints_them(wall_ns: int, text: str) -> None:
    assert rfc3339(wall_ns) == text
    assert http_date(1_795_471_120 * S) == b"Mon, 23 Nov 2026 21:58:40 GMT"


def test_json_as_go_encodes_it() -> None:
    encoded = '{"a":"\\u003cb\\u003e \\u0026 \'é\' \U0001f642 \\"q\\""}'
    assert go_json({"a": "<b> & 'é' \U0001f642 \"q\""}) == encoded.encode()


def test_words_need_two_letters_for_resumes() -> None:
    assert min(map(len, WORDS)) == 2
    assert len(set(WORDS)) == len(WORDS)


@given(st.text(), st.integers(0, 3), st.integers(0, 50), st.integers(0, 50))
def test_a_longer_answer_begins_with_the_shorter(key: str, seed: int, one: int, two: int) -> None:
    short, long = sorted((words(key, seed, one), words(key, seed, two)), key=len)
    assert long[: len(short)] == short


@given(st.text(), st.integers(1, 60), st.data())
def test_a_resumed_answer_adds_up(key: str, natural: int, data: st.DataObject) -> None:
    whole = "".join(words(key, 0, natural))
    prefix = whole[: data.draw(st.integers(0, len(whole)))]
    assert prefix + "".join(continued(key, 0, None, natural, prefix)) == whole
    assert len(continued(key, 0, 5, natural, prefix)) == 5


@given(st.text(min_size=1), st.integers(1, 20))
def test_any_prefix_can_be_continued(prefix: str, natural: int) -> None:
    rest = continued("key", 0, None, natural, prefix)
    whole = "".join(words("key", 0, natural))
    assert len(rest) == natural or whole.startswith(prefix)


@pytest.mark.parametrize(
    ("path", "body", "count", "reason"),
    [
        ("/api/chat", {"messages": HELLO}, SPEC.tokens, "stop"),
        ("/api/chat", {"messages": HELLO, "options": {"num_predict": 7}}, 7, "length"),
        ("/api/chat", {"messages": HELLO, "options": {"num_predict": -1}}, SPEC.tokens, "stop"),
        ("/api/generate", {"prompt": "x", "options": {"num_predict": 3}}, 3, "length"),
        ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 9}, 9, "length"),
        ("/v1/chat/completions", {"messages": HELLO, "max_completion_tokens": 9}, 9, "length"),
        ("/v1/completions", {"prompt": "x"}, SPEC.tokens, "stop"),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 2}, 2, "length"),
    ],
)
def test_lengths(path: str, body: dict[str, object], count: int, reason: str) -> None:
    answer = generation(path, **body).answer
    assert (len(answer.tokens), answer.done_reason) == (count, reason)
    assert answer.stream == path.startswith("/api")


def test_seed_and_system_change_the_text_and_stream_does_not() -> None:
    plain = generation("/api/chat", messages=HELLO).answer.text
    assert generation("/api/chat", messages=HELLO, stream=False).answer.text == plain
    assert generation("/v1/chat/completions", messages=HELLO).answer.text == plain
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert generation("/v1/chat/completions", messages=parts).answer.text == plain
    assert generation("/api/chat", messages=HELLO, options={"seed": 5}).answer.text != plain
    system = [{"role": "system", "content": "terse"}, *HELLO]
    assert generation("/api/chat", messages=system).answer.text != plain


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize("keep_alive", [0, "0", "0s"])
def test_load_and_unload(path: str, keep_alive: object) -> None:
    load = generation(path)
    assert (load.job.work, load.answer.stream, load.answer.done_reason) == (Work.LOAD, False, "load")
    assert json.loads(reply("POST", path, {"model": "tiny", "keep_alive": keep_alive}).body)["done_reason"] == "unload"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "missing request body"),
        (b"  ", 400, "missing request body"),
        (b'{"model": "tin', 400, "unexpected EOF"),
        (b'{"model": "tiny", "messages": [{}], "options": {"num_predict": 1e999}}', 500,
         'option "num_predict" must be of type integer'),
        (b'{"model": "tiny", "messages": [{}], "options": {"num_ctx": 1' + b"0" * 400 + b"}}", 500,
         'option "num_ctx" must be of type integer'),
        (b"nonsense", 400, "invalid character 'n' looking for beginning of value"),
        (b"[1]", 400, "json: cannot unmarshal array into Go value of type api.ChatRequest"),
        ({"model": 5}, 400,
         "json: cannot unmarshal number into Go struct field ChatRequest.model of type string"),
        ({"model": "tiny", "stream": "yes"}, 400,
         "json: cannot unmarshal string into Go struct field ChatRequest.stream of type bool"),
        ({"model": "tiny", "messages": ["x"]}, 400,
         "json: cannot unmarshal string into Go struct field ChatRequest.messages of type api.Message"),
        ({"model": ""}, 400, "model is required"),
        ({"model": "nope", "messages": HELLO, "think": True}, 404, "model 'nope' not found"),
        ({"model": "tiny", "messages": HELLO, "options": {"temperature": "hot"}}, 500,
         'option "temperature" must be of type float32'),
        ({"model": "tiny", "messages": HELLO, "keep_alive": "5"}, 400, 'time: missing unit in duration "5"'),
    ],
)  # fmt: skip
def test_errors_in_ollamas_words(body: object, status: int, message: str) -> None:
    answer = reply("POST", "/api/chat", body)
    assert (answer.status, json.loads(answer.body)) == (status, {"error": message})


def test_capabilities_let_through() -> None:
    asked = {"model": "eyes", "messages": [HELLO[0] | {"images": ["aGk="]}], "tools": [{}], "think": True}
    answer = ask("POST", "/api/chat", asked)
    assert isinstance(answer, Generation)
    assert answer.failure is None
    assert generation("/api/chat", messages=asked["messages"]).failure is not None


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:11434", 200), ("127.0.0.1", 200), ("127.8.8.8:1", 200), ("[::1]:11434", 200), ("10.0.0.7:1", 200),
        ("box.local", 200), ("a.internal:80", 200), ("", 200), ("ollama.example", 403), ("8.8.8.8", 403),
        ("localhost.example", 403),
    ],
)  # fmt: skip
def test_hosts(host: str, status: int) -> None:
    assert reply("GET", "/api/version", host=host).status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200), ("https://127.0.0.1", 200), ("app://x", 200), ("vscode-webview://x", 200),
        ("https://example.com", 403), ("http://localhost.example.com", 403), ("null", 403),
    ],
)  # fmt: skip
def test_origins(origin: str, status: int) -> None:
    answer = reply("GET", "/api/version", origin=origin)
    assert answer.status == status
    assert ((b"Access-Control-Allow-Origin", origin.encode()) in answer.headers) == (status == 200)


def test_routing() -> None:
    assert reply("PUT", "/api/chat").status == 405
    assert reply("OPTIONS", "/api/chat").status == 405  # without an Origin it is no preflight
    assert reply("POST", "/api/chat/").status == 307
    assert reply("GET", "/api/tags/").status == 301
    assert reply("GET", "/nope/").status == 404
    assert reply("GET", "/v1/models/eyes:latest").status == 200


@given(st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["model", "messages", "prompt", "options", "num_ctx", "num_predict", "content", "role",
                         "keep_alive", "stream_options", "max_tokens", "seed", "system", "use_mmap", "num_gpu"]),
        inner, max_size=4),
    max_leaves=8,
).map(lambda value: {"model": "tiny"} | value if isinstance(value, dict) else value), st.sampled_from([
    "/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/messages", "/api/show",
    "/api/copy", "/api/embed", "/api/pull", "/api/push", "/api/create",
]))  # fmt: skip
@settings(max_examples=200)
def test_no_body_breaks_it(body: object, path: str) -> None:
    answer = ask("POST", path, body)
    assert isinstance(answer, Generation | Lines) or answer.status in {200, 400, 404, 500, 501}
