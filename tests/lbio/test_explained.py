"""`GET /explain/ID` and `ollama-lb why`: the story of one of the last requests, from a balancer that is running."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from lbio.answers import explained
from lbio.answers.explained import in_slices
from lbio.cli import main
from lbio.journal.replay import replay
from lbio.subcommands.ask_running import CannotAskError, fetch, token_of
from simulator.faults import Fault, FaultKind
from tests.lbio.kit import Rig, balanced, chat_request, client, specs
from tests.lbio.sockets_kit import free_port, until
from tests.simulator.wire import Answer, body_of, chat, request

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def id_of(answer: Answer) -> str:
    found = answer.header("X-Ollama-LB-Request-Id")
    assert found is not None
    return found


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def explain(path: str, *headers: str, method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode()


async def story(rig: Rig, name: str) -> dict[str, Any]:
    answer = await rig.send(explain(f"/explain/{name}"))
    assert answer.status == 200, answer
    told = body_of(answer)
    assert isinstance(told, dict)
    return told


# --- GET /explain/ID -------------------------------------------------------------------------------------------


async def test_an_answer_is_explained_by_its_id_or_its_number() -> None:
    async with balanced(specs("a", "b"), race={"racers_max": 1, "hedges_max": 0}) as rig:
        tag = id_of(await rig.chat())
        told = await story(rig, tag)
        assert told == await story(rig, "1")
        assert told == await story(rig, f"%23{tag}")
    assert (told["request_id"], told["ended"], told["same"]) == (1, True, True)
    (choice,) = told["choices"]
    assert {candidate["server"] for candidate in choice["candidates"]} == {"a", "b"}
    kinds = [moment["event"].split("(")[0] for moment in told["story"]]
    assert [kind for kind in kinds if kind != "HeadReceived"] == [  # a head that comes with the token is not told of
        "RequestArrived", "AttemptConnected", "FirstTokenReceived", "StreamEnded",
    ]  # fmt: skip


async def test_text_is_what_replay_prints_of_the_same_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.jsonl"
    fault = Fault(FaultKind.ERROR_500)
    async with balanced(specs("a", "b"), record={"path": str(path)}, race={"racers_max": 1}) as rig:
        rig.fleet[0].set_fault(fault)
        await rig.chat()
        tag = id_of(await rig.chat())
        answer = await rig.send(explain(f"/explain/{tag}", "Accept: text/plain"))
    assert answer.header("Content-Type") == "text/plain; charset=utf-8"
    capsys.readouterr()
    assert replay(path, at=2) == 0

    def without_lines(text: str) -> list[str]:
        return [line.partition("   (line ")[0] for line in text.splitlines()]

    assert without_lines(answer.body.decode()) == without_lines(capsys.readouterr().out)


async def test_one_under_way_is_explained_as_far_as_it_is() -> None:
    async with balanced(specs("a", first_token_ms=300)) as rig, client(rig) as asking:
        await asking.send(chat_request())
        await until(lambda: rig.fleet[0].stats.concurrent == 1)
        assert (await story(rig, "1"))["ended"] is False
        text = (await rig.send(explain("/explain/1", "Accept: text/plain"))).body.decode()
        assert text.endswith("\nit is still under way\n")


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("2", 404, "request 2 is not known: there was none of this id; those from 1 to 1 are known"),
        ("ffff-1x", 400, "is no id of a request: these are like "),
        ("0", 404, "request 0 is forgotten; those from 1 to 1 are known"),
        ("", 400, "is no id of a request"),
        ("no-1", 404, "is of another start of ollama-lb, or of another one: since this start ids begin with "),
    ],
)
async def test_what_is_not_known_is_refused_with_what_is(name: str, status: int, words: str) -> None:
    async with balanced(specs("a")) as rig:
        await rig.chat()
        answer = await rig.send(explain(f"/explain/{name}"))
    assert answer.status == status
    assert words in body_of(answer)["error"]


async def test_before_the_first_request_none_is_known() -> None:
    async with balanced(specs("a")) as rig:
        answer = await rig.send(explain("/explain/1"))
    assert answer.status == 404
    assert body_of(answer)["error"] == "there is no request 1: there was none at all since the start"


async def test_head_and_other_methods() -> None:
    async with balanced(specs("a")) as rig:
        await rig.chat()
        head = await rig.send(explain("/explain/1", method="HEAD"), method="HEAD")
        posted = await rig.ask("POST", "/explain/1")
    assert (head.status, head.body) == (200, b"")
    assert (posted.status, posted.header("Allow")) == (405, "GET")


async def test_who_may_not_manage_may_not_ask_why() -> None:
    async with balanced(specs("a")) as rig:
        await rig.chat()
        foreign = await rig.send(explain("/explain/1", "X-Forwarded-For: 10.0.0.9"))
    assert foreign.status == 403
    assert "management is allowed from this machine only" in body_of(foreign)["error"]


async def test_streams_go_on_while_a_request_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices are so short here that each call replayed is one of its own."""
    monkeypatch.setattr(explained, "SLICE_S", 0.0)
    async with balanced(specs("a", token_ms=2)) as rig:
        for _ in range(5):
            await rig.chat()
        told: list[dict[str, Any]] = []

        async def ask() -> None:
            told.append(await story(rig, "5"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            tasks.start_soon(ask)
            answer = await rig.chat()
    assert answer.lines[-1]["done"] is True
    assert [one["ended"] for one in told] == [True, True]


async def test_a_long_computation_lets_others_have_their_turn() -> None:
    def slow() -> Generator[None, None, str]:
        for _ in range(20):
            time.sleep(explained.SLICE_S / 2)
            yield
        return "done"

    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            before = time.perf_counter()
            await anyio.lowlevel.checkpoint()
            longest_s = max(longest_s, time.perf_counter() - before)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        assert await in_slices(slow()) == "done"
        tasks.cancel_scope.cancel()
    assert longest_s < 10 * explained.SLICE_S


# --- ollama-lb why ---------------------------------------------------------------------------------------------


async def run(*args: str) -> int:
    """Run the command line in a thread, while the balancer runs here."""
    return await anyio.to_thread.run_sync(lambda: main(["why", *args]))


async def test_why_prints_the_story(capsys: pytest.CaptureFixture[str]) -> None:
    async with balanced(specs("a", "b")) as rig:
        tag = id_of(await rig.chat())
        assert await run(f"#{tag}", "--url", rig.url) == 0
        out = capsys.readouterr().out
        assert out.startswith("+0.000 ms  RequestArrived(request_id=1, route='/api/chat', model='tiny'")
        assert "SERVER  CHOSEN" in out
        assert await run(tag, "--url", rig.url.removeprefix("http://"), "--json") == 0
        assert json.loads(capsys.readouterr().out)["request_id"] == 1


async def test_why_says_what_it_could_not_find(capsys: pytest.CaptureFixture[str]) -> None:
    async with balanced(specs("a")) as rig:
        await rig.chat()
        assert await run("17", "--url", rig.url) == 1
        assert capsys.readouterr().err == (
            "request 17 is not known: there was none of this id; those from 1 to 1 are known\n"
        )
        assert await run("nonsense", "--url", rig.url) == 2
        assert "'nonsense' is no id of a request" in capsys.readouterr().err


async def test_why_that_cannot_ask_anybody_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert await run("17", "--url", f"127.0.0.1:{port}") == 2
    assert f"http://127.0.0.1:{port} cannot be asked: Connection refused" in capsys.readouterr().err
    assert await run("17", "--url", "ftp://x") == 2
    assert '--url: "ftp://x" has the scheme "ftp"; write http:// or https://' in capsys.readouterr().err
    async with balanced(specs("a")) as rig:
        assert await run("17", "--url", rig.fleet[0].url) == 2
        assert "answered with 404 and no words of ollama-lb: is it one?" in capsys.readouterr().err


async def test_why_sends_the_key_of_a_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BOSS", "a-key-that-manages")
    monkeypatch.setenv("WORKER", "a-key-that-does-not")
    keys = [{"name": "boss", "env": "BOSS", "allow": ["use", "manage"]}, {"name": "worker", "env": "WORKER"}]
    async with balanced(specs("a"), keys=keys) as rig:
        authorized = chat(model="tiny")
        raw = request("POST", "/api/chat", authorized, close=True).replace(
            b"\r\n\r\n", b"\r\nAuthorization: Bearer a-key-that-does-not\r\n\r\n", 1
        )
        assert (await rig.send(raw)).status == 200
        assert await run("1", "--url", rig.url, "--key-env", "BOSS") == 0
        assert "RequestArrived(request_id=1" in capsys.readouterr().out
        assert await run("1", "--url", rig.url, "--key-env", "WORKER") == 2
        assert "the key of 'worker' may not manage, which GET /explain/1 needs" in capsys.readouterr().err
        assert await run("1", "--url", rig.url) == 2
        said = 'a key is needed: set OLLAMA_API_KEY to a key with "manage", or name the environment variable'
        assert said in (err := capsys.readouterr().err)
        assert err.endswith(" that holds one with --key-env NAME\n")
        monkeypatch.setenv("OLLAMA_API_KEY", "a-key-that-manages")
        assert await run("1", "--url", rig.url) == 0
        assert await run("1", "--url", rig.url, "--key-env", "NOBODY") == 2
        assert "--key-env: the environment variable NOBODY is not set, or empty" in capsys.readouterr().err


def test_a_key_that_cannot_be_one_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAD", "one\nX-Other: two")
    with pytest.raises(CannotAskError, match="characters that no key has"):
        token_of("BAD")


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "--help"]) == 0
    assert "  ollama-lb why 3f2a-17\n" in capsys.readouterr().out


async def test_what_breaks_off_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            stream, _ = listener.accept()
            stream.recv(1000)
            stream.close()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, hang_up)
            with pytest.raises(CannotAskError, match="cannot be asked: Remote end closed connection"):
                await anyio.to_thread.run_sync(lambda: fetch(f"127.0.0.1:{port_of(listener)}", "/status", "text/plain"))
