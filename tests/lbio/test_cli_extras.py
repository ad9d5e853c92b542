"""The fleet inside the `ollama` CLI, over real sockets; and that no other client sees any of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lbio.access.keys import new_hash
from lbio.answers.cli_view import answer_cli
from lbio.answers.lb_model import words_of
from lbio.answers.lb_texts import models_text, status_text
from simulator.fake_ollama import FakeModel
from simulator.faults import Fault, FaultKind
from tests.lbio.kit import PROBES, TINY, Rig, balanced, scripted, specs
from tests.lbio.sockets_kit import until
from tests.playbook import fleet
from tests.simulator.wire import Answer, body_of

pytestmark = pytest.mark.anyio

CLI = "ollama/0.12.6 (amd64 linux) Go/go1.24.1"
OTHERS = ["ollama-python/0.6.0 (x86_64 linux)", "curl/8.5.0", "Ollama/1", ""]
LB = FakeModel("lb", size_bytes=1_000_000)
OTHER = FakeModel("other", size_bytes=1_000_000)
TOKENS = {"boss": "olb_boss", "user": "olb_user", "some": "olb_some"}
KEYS: list[dict[str, Any]] = [
    {"name": "boss", "hash": new_hash(TOKENS["boss"]), "allow": ["use", "manage"]},
    {"name": "user", "hash": new_hash(TOKENS["user"])},
    {"name": "some", "hash": new_hash(TOKENS["some"]), "models": ["tiny"]},
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def ask(rig: Rig, method: str, path: str, body: object = None, *headers: str, agent: str = CLI) -> Answer:
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    lines += [f"User-Agent: {agent}"] * bool(agent) + [f"Content-Length: {len(data)}"] * bool(data)
    return await rig.send("\r\n".join([*lines, "", ""]).encode() + data, method)


async def names(rig: Rig, path: str, *headers: str, agent: str = CLI) -> list[str]:
    return [entry["name"] for entry in body_of(await ask(rig, "GET", path, None, *headers, agent=agent))["models"]]


async def ids(rig: Rig, *headers: str, agent: str = CLI) -> dict[str, str]:
    """Return what `ollama list` prints as ID, by model."""
    found = body_of(await ask(rig, "GET", "/api/tags", None, *headers, agent=agent))["models"]
    return {entry["name"]: entry["digest"][:12] for entry in found}


async def say(rig: Rig, words: str, *headers: str, agent: str = CLI, model: str = "lb") -> str:
    """Ask as `ollama run lb WORDS` does, and return what it would print."""
    asked = {"model": model, "prompt": f" {words}", "suffix": "", "options": {}}
    answer = await ask(rig, "POST", "/api/generate", asked, *headers, agent=agent)
    assert answer.status == 200, answer
    assert answer.header("Content-Type") == "application/x-ndjson"
    assert [line["done"] for line in answer.lines] == [False, True]
    return "".join(line["response"] for line in answer.lines)


# --- ollama ps, ollama list ------------------------------------------------------------------------------------


async def test_ps_lists_each_server_that_has_a_model_loaded() -> None:
    async with balanced([*specs("a", "b"), *specs("c", start_loaded=())]) as rig:
        assert await names(rig, "/api/ps") == ["tiny:latest (a)", "tiny:latest (b)"]
        for agent in OTHERS:
            assert await names(rig, "/api/ps", agent=agent) == ["tiny:latest"]


async def test_list_tells_on_how_many_servers_a_model_is() -> None:
    more = specs("c", models=(TINY, OTHER))
    async with balanced([*specs("a", "b"), *more]) as rig:
        plain = await ids(rig, agent="curl/8")
        tiny, other = (plain[name][:8] for name in ("tiny:latest", "other:latest"))
        assert await ids(rig) == {"tiny:latest": f"{tiny} 3/3", "other:latest": f"{other} 1/3"}
        assert await names(rig, "/api/tags") == await names(rig, "/api/tags", agent="curl/8")
        for agent in OTHERS:
            assert await ids(rig, agent=agent) == plain


async def test_a_server_that_is_dead_is_one_without_the_model() -> None:
    async with balanced(specs("a", "b")) as rig:
        rig.fleet[1].set_fault(Fault(FaultKind.RESET))
        await rig.ask("POST", "/sync_servers")
        await until(lambda: not rig.server("b").is_alive)
        assert (await ids(rig))["tiny:latest"].endswith(" 1/2")
        assert await names(rig, "/api/ps") == ["tiny:latest (a)"]


async def test_who_names_a_server_gets_what_it_says() -> None:
    async with balanced(specs("a", "b")) as rig:
        pin = "X-Ollama-LB-Server: a"
        assert await names(rig, "/api/ps", pin) == ["tiny:latest"]
        assert await ids(rig, pin) == await ids(rig, pin, agent="curl/8")


async def test_one_server_alone_needs_no_marks() -> None:
    async with balanced(specs("a")) as rig:
        assert await names(rig, "/api/ps") == ["tiny:latest"]
        assert await ids(rig) == await ids(rig, agent="curl/8")


async def test_a_route_that_is_to_go_to_one_server_goes_there() -> None:
    routes = {"/api/ps": "sequential", "/api/tags": "sequential"}
    async with balanced(specs("a", "b"), routes=routes) as rig:
        assert await names(rig, "/api/ps") == ["tiny:latest"]
        assert await ids(rig) == await ids(rig, agent="curl/8")


async def test_a_key_for_some_models_sees_only_these() -> None:
    async with balanced(specs("a", "b", models=(TINY, OTHER), start_loaded=("tiny", "other")), keys=KEYS) as rig:
        some = f"Authorization: Bearer {TOKENS['some']}"
        assert await names(rig, "/api/ps", some) == ["tiny:latest (a)", "tiny:latest (b)"]
        assert [*await ids(rig, some)] == ["tiny:latest"]
        assert len(await names(rig, "/api/ps", f"Authorization: Bearer {TOKENS['user']}")) == 4


async def test_an_alias_is_marked_with_the_servers_of_what_it_stands_for() -> None:
    fakes = [*specs("a", models=(TINY, OTHER)), *specs("b"), *specs("c")]
    async with balanced(fakes, alias={"smart": ["missing", "other", "tiny"], "quick": "tiny"}) as rig:
        marks = {name: digest[-3:] for name, digest in (await ids(rig)).items()}
        assert marks == {"tiny:latest": "3/3", "other:latest": "1/3", "smart": "1/3", "quick": "3/3"}


async def test_one_setting_turns_all_of_it_off() -> None:
    async with balanced(specs("a", "b"), cli_extras=False) as rig:
        assert await names(rig, "/api/ps") == ["tiny:latest"]
        assert await ids(rig) == await ids(rig, agent="curl/8")
        assert (await ask(rig, "POST", "/api/show", {"name": "lb"})).status == 404


@pytest.mark.parametrize("number", [b"9" * 6000, b"1e999", b"1.50"])
async def test_what_servers_write_of_a_model_is_passed_on_as_it_is(
    number: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = b'{"name":"tiny:latest","digest":"abc","size":%s}' % number
    for path in ("/api/tags", "/api/ps"):
        monkeypatch.setitem(PROBES, path, b'{"models":[%s]}' % entry)
    async with scripted(2) as (rig, _):
        for path, n_lines in (("/api/tags", 1), ("/api/ps", 2)):
            answer = await ask(rig, "GET", path)
            assert answer.status == 200
            assert answer.body.count(b'"size":%s}' % number) == n_lines


@pytest.mark.parametrize("n", [2, 12, 1000])
def test_a_mark_takes_the_end_of_what_is_printed(n: int) -> None:
    book = fleet(" ".join(f"s{i}" for i in range(n)), factor=0)
    answer = answer_cli("/api/tags", book.balancer.fleet)
    assert answer is not None
    (entry,) = json.loads(answer.body)["models"]
    assert entry["digest"][:12].endswith(f" {n}/{n}")


# --- ollama run lb ---------------------------------------------------------------------------------------------


async def test_lb_tells_how_all_is() -> None:
    async with balanced(specs("a", "b")) as rig:
        await rig.chat()
        assert (await say(rig, "status")).startswith("2 servers: 2 healthy\nunder way: 0 requests (0 queued), ")
        table = await say(rig, "servers")
        assert table.splitlines()[0].split() == ["SERVER", "STATE", "HEALTH", "IN", "FLIGHT", "MODELS", "LOADED"]
        assert (await say(rig, "MODELS")).splitlines()[1].split() == ["tiny:latest", "2/2", "0", "a,", "b"]
        story = await say(rig, "why 1")
        assert story.startswith("+0.000 ms  RequestArrived(request_id=1, route='/api/chat', model='tiny'")
        assert (await say(rig, "why 17")).startswith("request 17 is not known")
        assert rig.n_requests == 0


@pytest.mark.parametrize("words", ["help", "", "what are you?", "why", "status now", "why 1 2"])
async def test_whatever_else_is_said_gets_help(words: str) -> None:
    async with balanced(specs("a")) as rig:
        assert "why REQUEST_ID  why a request went where it went" in await say(rig, words or "?")


async def test_lb_is_talked_with() -> None:
    async with balanced(specs("a", "b")) as rig:
        said = [
            {"role": "user", "content": "help"},
            {"role": "assistant", "content": "…"},
            {"role": "user", "content": "status\n"},
        ]
        answer = await ask(rig, "POST", "/api/chat", {"model": "LB:latest", "messages": said})
        assert answer.text.startswith("2 servers: 2 healthy\n")
        assert answer.lines[-1]["done_reason"] == "stop"
        whole = body_of(await ask(rig, "POST", "/api/chat", {"model": "lb", "messages": said, "stream": False}))
        assert whole["message"]["role"] == "assistant"
        assert (whole["model"], whole["done"], whole["eval_count"]) == ("lb", True, 0)


async def test_lb_is_loaded_unloaded_and_shown_like_any_model() -> None:
    async with balanced(specs("a")) as rig:
        loaded = body_of(await ask(rig, "POST", "/api/generate", {"model": "lb"}))
        assert (loaded["response"], loaded["done_reason"]) == ("", "load")
        unloaded = body_of(await ask(rig, "POST", "/api/chat", {"model": "lb", "messages": [], "keep_alive": 0}))
        assert (unloaded["message"]["content"], unloaded["done_reason"]) == ("", "unload")
        shown = body_of(await ask(rig, "POST", "/api/show", {"model": "", "name": "lb"}))
        assert (shown["capabilities"], shown["details"]["family"]) == (["completion"], "ollama-lb")
        assert "lb:latest" not in await names(rig, "/api/tags")


async def test_other_clients_know_of_no_such_model() -> None:
    async with balanced(specs("a", "b")) as rig:
        for agent in OTHERS:
            for path in ("/api/show", "/api/generate", "/api/chat"):
                answer = await ask(rig, "POST", path, {"model": "lb", "prompt": "status"}, agent=agent)
                assert answer.status == 404
                assert body_of(answer)["error"] in {"model 'lb' not found", "model 'lb:latest' not found"}
        pinned = await ask(rig, "POST", "/api/generate", {"model": "lb", "prompt": "x"}, "X-Ollama-LB-Server: a")
        assert pinned.status == 404


async def test_a_model_that_a_server_calls_lb_comes_first() -> None:
    async with balanced(specs("a", "b", models=(TINY, LB), start_loaded=("lb",))) as rig:
        answer = await ask(rig, "POST", "/api/generate", {"model": "lb", "prompt": "status"})
        assert len(answer.lines) > 2
        assert "servers" not in "".join(line["response"] for line in answer.lines)


async def test_an_alias_that_is_called_lb_comes_first() -> None:
    async with balanced(specs("a", "b"), alias={"lb": "tiny"}) as rig:
        answer = await ask(rig, "POST", "/api/generate", {"model": "lb", "prompt": "status"})
        assert "servers" not in "".join(line["response"] for line in answer.lines)
        shown = body_of(await ask(rig, "POST", "/api/show", {"model": "lb"}))
        assert shown["details"]["family"] != "ollama-lb"


async def test_who_may_not_manage_is_told_why() -> None:
    async with balanced(specs("a")) as rig:
        text = await say(rig, "status", "X-Forwarded-For: 10.0.0.9")
        assert text.startswith("management is allowed from this machine only, and this request came through a proxy")
        assert (await ask(rig, "POST", "/api/show", {"model": "lb"}, "X-Forwarded-For: 10.0.0.9")).status == 200
    async with balanced(specs("a"), admin={"allow": "any"}) as rig:
        assert (await say(rig, "status", "X-Forwarded-For: 10.0.0.9")).startswith("1 server: 1 healthy")


async def test_with_keys_it_takes_one_that_may_manage() -> None:
    async with balanced(specs("a"), keys=KEYS) as rig:
        assert (await say(rig, "status", f"Authorization: Bearer {TOKENS['boss']}")).startswith("1 server: 1 healthy")
        for name in ("user", "some"):
            text = await say(rig, "status", f"Authorization: Bearer {TOKENS[name]}")
            assert text == f"the key of '{name}' may not manage, which is needed for that"
        assert (await ask(rig, "POST", "/api/generate", {"model": "lb", "prompt": "status"})).status == 401


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt": "why  3f2a-17 \\n"}', ["why", "3f2a-17"]),
        (b'{"messages": [{"role": "system", "content": "x"}]}', []),
        (b'{"messages": [{"role": "user", "content": ["x"]}]}', []),
        (b'{"messages": 5}', []),
        (b"nonsense", []),
        (b'{"prompt": "' + b"x" * (1 << 20) + b'"}', []),
    ],
)
def test_what_was_typed_last_is_read_whatever_comes(body: bytes, words: list[str]) -> None:
    assert words_of(body) == words


def test_an_empty_fleet_is_told_of() -> None:
    since = {"seconds": 1.0, "requests": {"done": 0}, "attempts": {"primary": 0}, "wasted_tokens": 0, "late_events": 0}
    told = {
        "servers": [], "models": [], "warnings": ["something"], "requests": 0, "queued": 0, "attempts": 0, "retries": 0,
        "since_start": since,
    }  # fmt: skip
    assert status_text(told).startswith("no server\nunder way: 0 requests")
    assert status_text(told).endswith("warning: something")
    assert models_text(told) == "no live server has a model"
