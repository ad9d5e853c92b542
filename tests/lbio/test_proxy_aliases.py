"""Aliases over real sockets: what servers are asked for, and by which name clients are answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import ollama
import pytest

from lbcore.comparison import compare
from lbio.access.keys import new_hash, new_token
from simulator.fake_ollama import FakeModel
from simulator.faults import Fault, FaultKind
from tests.lbio.kit import LIMIT_S, NDJSON, Rig, Scripted, balanced, chat_request, chunked, scripted, specs
from tests.lbio.test_proxy_embed import embedders
from tests.simulator.wire import Answer, chat, request

pytestmark = pytest.mark.anyio

LARGE = FakeModel("large", size_bytes=1_000_000, digest="a" * 64)
SMALL = FakeModel("small", size_bytes=1_000_000, digest="b" * 64)
ALIASES: dict[str, Any] = {
    "gpt-4o": "small",
    "big": ["large", "small"],
    "large": ["large", "small"],
}
LARGE_ONE = specs("l", models=(LARGE,), start_loaded=("large",))
SMALL_ONE = specs("s", models=(SMALL,), start_loaded=("small",))
FLEET = [*LARGE_ONE, *SMALL_ONE]
TINY_ALIAS = {"gpt-4o": "tiny"}
MODEL = "X-Ollama-LB-Model"
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
POST = b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
PATHS = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/messages")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def names_in(answer: Answer) -> set[str]:
    """Return what the model is called in an answer, in all its lines and events."""
    found = set()
    for line in answer.body.split(b"\n"):
        text = line.removeprefix(b"data: ")
        if text.startswith(b"{"):
            value = json.loads(text)
            inner = value.get("message")
            found |= {each["model"] for each in (value, inner) if isinstance(each, dict) and "model" in each}
    return found


def asked_for(path: str, model: str, *, stream: bool) -> dict[str, Any]:
    prompt = {"prompt": "hi"} if path.endswith(("generate", "completions")) else {}
    messages = {"messages": [{"role": "user", "content": "hi"}]} if "prompt" not in prompt or "chat" in path else {}
    return {"model": model, "stream": stream, "max_tokens": 8, **prompt, **messages}


async def killed(rig: Rig, name: str) -> None:
    """Let a server be gone, and the balancer know it."""
    fake = next(fake for fake in rig.fleet if fake.spec.name == name)
    fake.set_fault(Fault(FaultKind.REFUSE))
    with anyio.fail_after(LIMIT_S):
        while rig.server(name).is_alive:
            await rig.ask("POST", "/sync_servers")


# --- generating ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_is_answered_under_the_name_that_it_asked_for(path: str, stream: bool) -> None:
    async with balanced(FLEET, alias=ALIASES) as rig:
        answer = await rig.ask("POST", path, asked_for(path, "gpt-4o", stream=stream))
        assert (answer.status, answer.complete) == (200, True)
        assert names_in(answer) == {"gpt-4o"}
        assert (answer.header("X-Ollama-LB-Server"), answer.header(MODEL)) == ("s", "small")
        plain = await rig.ask("POST", path, asked_for(path, "small", stream=stream))
        assert names_in(plain) == {"small"}
        assert plain.header(MODEL) is None


async def test_the_name_is_given_back_as_the_client_has_written_it() -> None:
    async with balanced(FLEET, alias=ALIASES) as rig:
        answer = await rig.chat(model="GPT-4o:latest")
        assert names_in(answer) == {"GPT-4o:latest"}


async def test_an_embedding_names_it_too() -> None:
    body = b'{"object":"list","data":[{"embedding":[0.5,1]}],"model":"tiny"}'
    async with scripted(alias=TINY_ALIAS) as (rig, (server,)):
        server.pieces = [JSON_HEAD % len(body), body]
        for path in ("/api/embed", "/v1/embeddings"):
            answer = await rig.ask("POST", path, {"model": "gpt-4o", "input": ["a", "b"]})
            assert (answer.status, answer.complete, names_in(answer)) == (200, True, {"gpt-4o"})


async def test_many_embeddings_are_divided_over_servers_that_have_the_model_in_use() -> None:
    texts = {"model": "gpt-embed", "input": [f"text {number}" for number in range(24)]}
    embed = {"split_above": 8}
    async with balanced(embedders("a", "b"), alias={"gpt-embed": "e5", "e5": ["e5", "other"]}, embed=embed) as rig:
        real = await rig.ask("POST", "/v1/embeddings", {**texts, "model": "e5"})
        answer = await rig.ask("POST", "/v1/embeddings", texts)
        assert (answer.status, answer.header("X-Ollama-LB-Attempts"), answer.header(MODEL)) == (200, "2", "e5")
        assert answer.body == real.body.replace(b'"model":"e5"', b'"model":"gpt-embed"')
        assert (real.header("X-Ollama-LB-Attempts"), real.header(MODEL)) == ("2", None)


async def test_loads_and_unloads_act_on_the_model_in_use() -> None:
    async with balanced(FLEET, alias=ALIASES) as rig:
        loaded = await rig.ask("POST", "/api/generate", {"model": "big"})
        unloaded = await rig.ask("POST", "/api/generate", {"model": "big", "keep_alive": 0})
        for answer, reason in ((loaded, "load"), (unloaded, "unload")):
            told = json.loads(answer.body)
            assert (told["model"], told["done_reason"], answer.header("X-Ollama-LB-Server")) == ("big", reason, "l")


async def test_when_the_holder_of_the_first_model_is_gone_the_second_answers() -> None:
    async with balanced(FLEET, alias=ALIASES) as rig:
        assert (await rig.chat(model="big")).header(MODEL) == "large"
        own = await rig.chat(model="large")
        assert (own.header("X-Ollama-LB-Server"), own.header(MODEL), names_in(own)) == ("l", None, {"large"})
        await killed(rig, "l")
        for model in ("big", "large"):
            answer = await rig.chat(model=model)
            assert (answer.header(MODEL), names_in(answer), answer.complete) == ("small", {model}, True)


async def test_when_the_holder_of_the_first_model_fails_the_second_is_tried_at_once() -> None:
    async with balanced(FLEET, alias=ALIASES) as rig:
        rig.fleet[0].set_fault(Fault(FaultKind.ERROR_500))
        answer = await rig.chat(model="big")
        assert (answer.status, answer.header(MODEL), names_in(answer)) == (200, "small", {"big"})
        assert answer.header("X-Ollama-LB-Attempts") == "2"


async def test_a_pinned_server_is_asked_for_what_it_has() -> None:
    async with balanced(FLEET, alias=ALIASES) as rig:
        body = json.dumps(chat(model="big")).encode()
        head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        answer = await rig.send(head.encode() + b"X-Ollama-LB-Server: s\r\n\r\n" + body, "POST")
        assert (answer.header("X-Ollama-LB-Server"), answer.header(MODEL)) == ("s", "small")


async def test_a_client_of_http_1_0_reads_to_the_end() -> None:
    async with balanced(FLEET, alias=ALIASES) as rig:
        body = json.dumps(asked_for("/v1/chat/completions", "gpt-4o", stream=False)).encode()
        head = b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
        answer = await rig.send(head + body, "POST")
        assert (answer.status, names_in(answer)) == (200, {"gpt-4o"})


# --- byte for byte ---------------------------------------------------------------------------------------------


def sent(server: Scripted) -> tuple[bytes, dict[str, str]]:
    return server.bodies[-1], dict(server.headers())


async def test_servers_get_the_body_as_it_came_but_for_the_name() -> None:
    body = (
        b'{ "options":{"a":1.50,"model":"gpt-4o"},\n"model" :\t"gpt-4o",'
        b'"images":["AAAA"] , "messages":[{"content":"\\u00e9"}]}'
    )
    async with scripted(alias=TINY_ALIAS) as (rig, (server,)):
        await rig.exchange([POST % b"/api/chat" + b"Content-Length: %d\r\n\r\n" % len(body), body])
        got, headers = sent(server)
        assert got == body.replace(b'\t"gpt-4o"', b'\t"tiny"')
        assert headers["content-length"] == str(len(got))


async def test_a_chunked_body_and_a_pooled_connection() -> None:
    body = json.dumps(chat(model="gpt-4o")).encode()
    async with scripted(alias=TINY_ALIAS) as (rig, (server,)):
        for _ in range(2):
            head = POST % b"/api/chat" + b"Transfer-Encoding: chunked\r\n\r\n"
            await rig.exchange([head, chunked([body[:7], body[7:]])])
        assert server.bodies == [body.replace(b"gpt-4o", b"tiny")] * 2


async def test_the_field_of_a_form_is_replaced() -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt-4o\r\n--b--\r\n'
    async with scripted(alias=TINY_ALIAS) as (rig, (server,)):
        head = POST % b"/v1/audio/transcriptions"
        kind = b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n" % len(form)
        await rig.exchange([head + kind + form])
        assert sent(server)[0] == form.replace(b"gpt-4o", b"tiny")


async def test_a_body_in_which_no_other_name_can_be_put_is_refused() -> None:
    body = b'{"Model":"gpt-4o","messages":[{"role":"user","content":"%s"}]}' % (b"x" * 100)
    large = body.replace(b'"Model"', b'"model":"gpt-4o","Model"').replace(b"x" * 100, b"x" * (300 << 10))
    async with scripted(alias=TINY_ALIAS) as (rig, (server,)):
        await rig.send(request("POST", "/api/chat", json.loads(body), close=True), "POST")
        assert json.loads(sent(server)[0])["model"] == "tiny"
        head = POST % b"/v1/chat/completions" + b"Content-Length: %d\r\n\r\n" % len(large)
        answer = await rig.send(head + large, "POST")
        assert answer.status == 400
        assert "'gpt-4o' is an alias here" in json.loads(answer.body)["error"]["message"]


async def test_what_the_model_writes_comes_as_it_is_however_the_server_cuts_it() -> None:
    text = b'"content":"\\"model\\":\\"tiny\\"","tool_calls":[{"model":"tiny"}]'
    told = b'{"model":"tiny","message":{' + text + b'},"done":%s}\n'
    stream = (told % b"false") * 3 + told % b"true"
    pieces = [stream[i : i + 11] for i in range(0, len(stream), 11)]
    wire = NDJSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(pieces)
    async with scripted(alias=TINY_ALIAS) as (rig, (server,)):
        server.pieces = [wire[i : i + 700] for i in range(0, len(wire), 700)]
        server.pause_s = 0.001
        answer = await rig.send(chat_request(model="gpt-4o"), "POST")
        assert answer.complete
        assert answer.body == stream.replace(b'{"model":"tiny","message"', b'{"model":"gpt-4o","message"')


async def test_a_whole_answer_that_is_here_keeps_a_length() -> None:
    body = b'{"model":"tiny","message":{"content":"x"},"done":true}'
    async with scripted(alias=TINY_ALIAS) as (rig, (server,)):
        server.pieces = [JSON_HEAD % len(body) + body]
        answer = await rig.send(chat_request(model="gpt-4o", stream=False), "POST")
        assert (answer.chunks, answer.complete) == (None, True)
        assert answer.body == body.replace(b"tiny", b"gpt-4o")


async def test_an_answer_that_is_longer_than_what_is_held_is_chunked() -> None:
    body = b'{"embeddings":[[%s1]],"model":"tiny"}' % (b"0.25," * 40_000)
    async with scripted(alias=TINY_ALIAS, limits={"buffer_bytes_max": "4KiB"}) as (rig, (server,)):
        server.pieces = [JSON_HEAD % len(body) + body]
        answer = await rig.ask("POST", "/api/embed", {"model": "gpt-4o", "input": "x"})
        assert answer.chunks is not None
        assert answer.complete
        assert answer.body == body.replace(b"tiny", b"gpt-4o")


async def test_a_stream_that_breaks_ends_as_one_that_is_broken() -> None:
    async with balanced(SMALL_ONE, alias=ALIASES) as rig:
        rig.fleet[0].set_fault(Fault(FaultKind.CUT_MIDSTREAM, after_tokens=2))
        answer = await rig.chat(model="gpt-4o")
        assert names_in(answer) == {"gpt-4o"}
        assert "error" in answer.lines[-1]


# --- errors and views --------------------------------------------------------------------------------------------


async def test_a_model_that_is_not_there_is_missed_under_the_name_that_was_asked_for() -> None:
    async with balanced(SMALL_ONE, alias={"gone": "nowhere"}) as rig:
        for path in (*PATHS, "/api/show"):
            answer = await rig.ask("POST", path, asked_for(path, "gone", stream=False))
            assert answer.status == 404
            assert b"nowhere" not in answer.body
            assert b"'gone'" in answer.body


async def test_lists_have_what_can_be_asked_for() -> None:
    async with balanced(FLEET, alias={**ALIASES, "gone": "nowhere"}) as rig:
        tags = {each["name"]: each for each in json.loads((await rig.ask("GET", "/api/tags")).body)["models"]}
        assert set(tags) == {"gpt-4o", "big", "large:latest", "small:latest"}
        assert tags["gpt-4o"] == {**tags["small:latest"], "name": "gpt-4o", "model": "gpt-4o"}
        assert tags["big"]["digest"] == tags["large:latest"]["digest"]
        listed = json.loads((await rig.ask("GET", "/v1/models")).body)["data"]
        assert {each["id"] for each in listed} == set(tags)
        assert json.loads((await rig.ask("GET", "/v1/models/gpt-4o")).body)["id"] == "gpt-4o"
        assert (await rig.ask("GET", "/v1/models/gone")).status == 404
        running = json.loads((await rig.ask("GET", "/api/ps")).body)["models"]
        assert {each["name"] for each in running} == {"large:latest", "small:latest"}
        await killed(rig, "l")
        tags = {each["name"]: each for each in json.loads((await rig.ask("GET", "/api/tags")).body)["models"]}
        assert set(tags) == {"gpt-4o", "big", "large", "small:latest"}
        assert {each["digest"] for each in tags.values()} == {SMALL.digest}


async def test_the_ollama_command_sees_on_how_many_servers_the_model_in_use_is() -> None:
    async with balanced(FLEET, alias=ALIASES) as rig:
        agent = b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nUser-Agent: ollama/0.12.6\r\n\r\n"
        listed = {each["name"]: each["digest"] for each in json.loads((await rig.send(agent)).body)["models"]}
        assert set(listed) == {"gpt-4o", "big", "large:latest", "small:latest"}
        assert {digest[:12].strip() for digest in listed.values()} == {f"{'a' * 8} 1/2", f"{'b' * 8} 1/2"}


async def test_show_is_of_the_model_in_use_and_kept_as_long_as_that_is_the_same() -> None:
    async with balanced(FLEET, alias=ALIASES) as rig:
        answers = [await rig.ask("POST", "/api/show", {"model": "big"}) for _ in range(2)]
        assert [answer.header(MODEL) for answer in answers] == ["large", "large"]
        assert answers[0].body == answers[1].body
        assert rig.fleet[0].stats.requests["/api/show"] == 1
        await killed(rig, "l")
        after = await rig.ask("POST", "/api/show", {"model": "big"})
        assert (after.status, after.header(MODEL)) == (200, "small")


async def test_what_manages_models_means_the_real_one() -> None:
    async with balanced(FLEET, alias={"small": "large"}) as rig:
        assert (await rig.ask("DELETE", "/api/delete", {"model": "small"})).status == 200
        assert "small:latest" not in rig.fleet[1].live.fake.disk
        assert (await rig.ask("DELETE", "/api/delete", {"model": "gpt-4o"})).status == 404


async def test_a_key_is_judged_by_the_name_that_is_asked_for() -> None:
    token = new_token()
    keys = [{"name": "some", "hash": new_hash(token), "models": ["gpt-4o"]}]

    async with balanced(FLEET, alias=ALIASES, keys=keys) as rig:

        async def ask(method: str, path: str, body: object = None) -> Answer:
            data = json.dumps(body).encode() if body is not None else b""
            length = f"Content-Length: {len(data)}\r\n" if data else ""
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nx-api-key: {token}\r\n"
            return await rig.send(f"{head}{length}\r\n".encode() + data, method)

        assert (await ask("POST", "/api/chat", chat(model="gpt-4o"))).status == 200
        assert (await ask("POST", "/api/chat", chat(model="small"))).status == 403
        assert (await ask("POST", "/api/chat", chat(model="big"))).status == 403
        told = json.loads((await ask("GET", "/api/tags")).body)["models"]
        assert [each["name"] for each in told] == ["gpt-4o"]


# --- clients, and the log ----------------------------------------------------------------------------------------


async def test_the_python_client_sees_nothing_but_the_alias() -> None:
    def story(url: str) -> tuple[list[str | None], set[str | None], str | None]:
        with ollama.Client(host=url) as client:
            parts = list(client.chat("gpt-4o", [{"role": "user", "content": "hi"}], stream=True))
            listed = [each.model for each in client.list().models]
            return listed, {part.model for part in parts}, client.generate("gpt-4o", "hi").model

    async with balanced(SMALL_ONE, alias={"gpt-4o": "small"}) as rig:
        with anyio.fail_after(LIMIT_S):
            listed, streamed, whole = await anyio.to_thread.run_sync(story, rig.url)
    assert (set(listed), streamed, whole) == ({"gpt-4o", "small:latest"}, {"gpt-4o"}, "gpt-4o")


async def test_an_event_log_with_aliases_is_replayed_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    async with balanced(FLEET, alias=ALIASES, record={"path": str(path)}) as rig:
        await rig.chat(model="big")
        rig.fleet[0].set_fault(Fault(FaultKind.ERROR_500))
        await rig.chat(model="big")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert compare(lines).difference is None
    assert sum('["use",' in line for line in lines) == 3


