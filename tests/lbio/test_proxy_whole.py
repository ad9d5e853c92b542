"""Answers that are not streamed, loads and unloads, and paths that are passed through."""

from typing import Any

import anyio
import pytest

from simulator.fake_ollama import FakeModel
from simulator.faults import Fault, FaultKind
from tests.lbio.kit import LIMIT_S, TINY, Rig, balanced, scripted, specs
from tests.lbio.sockets_kit import until
from tests.simulator.wire import ask, body_of, chat

pytestmark = pytest.mark.anyio
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\n"
ANSWER = b'{"model":"tiny","message":{"role":"assistant","content":"%s"},"done":true}'
CALM: dict[str, Any] = {"race": {"racers_max": 1, "hedges_max": 1}, "health": {"resurrect": 0.0}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def loaded(rig: Rig) -> list[bool]:
    """Whether each server has `tiny` in memory."""
    return [b"tiny" in (await ask(fake.url, "GET", "/api/ps")).body for fake in rig.fleet]


async def test_an_answer_larger_than_the_buffer_is_relayed_whole() -> None:
    body = ANSWER % (b"x" * 3_000_000)
    async with scripted(limits={"buffer_bytes_max": "64KiB"}) as (rig, (server,)):
        server.pieces = [JSON + b"Content-Length: %d\r\n\r\n" % len(body), body]
        answer = await rig.chat(stream=False)
    assert answer.body == body
    assert answer.complete


async def test_a_whole_answer_that_is_cut_is_had_from_another_server() -> None:
    body = ANSWER % b"good"
    async with scripted(2, **CALM) as (rig, (bad, good)):
        bad.pieces, bad.close = [JSON + b"Content-Length: 100\r\n\r\n" + body[:20]], True
        good.pieces = [JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body]
        for _ in range(6):
            answer = await rig.chat(stream=False)
            assert (answer.status, answer.body) == (200, body)
            if bad.heads:
                break
        assert bad.heads


async def test_a_client_that_leaves_a_whole_answer_frees_the_server() -> None:
    async with balanced(specs("a", token_ms=50, tokens=100)) as rig:
        with anyio.move_on_after(0.1):
            await rig.chat(stream=False)
        await until(lambda: rig.fleet[0].stats.aborted == 1)
        assert rig.n_requests == 0


async def test_a_load_goes_to_one_server() -> None:
    async with balanced(specs("a", "b", start_loaded=())) as rig:
        answer = await rig.ask("POST", "/api/generate", {"model": "tiny"})
        assert body_of(answer)["done_reason"] == "load"
        assert sorted(await loaded(rig)) == [False, True]


async def test_an_unload_goes_to_all_that_have_it_loaded() -> None:
    async with balanced([*specs("a", "b"), *specs("c", start_loaded=())]) as rig:
        answer = await rig.ask("POST", "/api/chat", {"model": "tiny", "keep_alive": 0})
        assert (answer.status, body_of(answer)["done_reason"]) == (200, "unload")
        await until(lambda: all(fake.stats.requests["/api/chat"] for fake in rig.fleet[:2]))
        await until(lambda: rig.n_requests == 0)  # the other server's answer may still be under way
        with anyio.fail_after(LIMIT_S):
            while any(await loaded(rig)):  # noqa: ASYNC110  only asking tells
                await anyio.sleep(0.01)
        assert rig.fleet[2].stats.requests["/api/chat"] == 0


async def test_a_load_is_not_cancelled_by_a_lost_race() -> None:
    fleet = [*specs("cold", start_loaded=(), load_ms=200), *specs("warm", first_token_ms=20)]
    race = {"racers_min": 2, "racers_max": 2, "budget": 63.0}
    with anyio.fail_after(LIMIT_S):
        async with balanced(fleet, race=race) as rig:
            assert (await rig.chat()).header("X-Ollama-LB-Server") == "warm"
            if rig.fleet[0].stats.requests["/api/chat"]:
                await until(lambda: rig.fleet[0].stats.concurrent == 0)
                assert await loaded(rig) == [True, True]


async def test_a_passed_through_request_goes_to_a_server_that_has_its_model() -> None:
    other = specs("b", models=(FakeModel("other"),), start_loaded=())
    async with balanced([*specs("a"), *other]) as rig:
        for model, name in (("tiny", "a"), ("other", "b")):
            answer = await rig.ask("POST", "/api/embed", {"model": model, "input": "x"})
            assert answer.header("X-Ollama-LB-Server") == name


async def test_a_request_that_changes_something_is_not_sent_twice() -> None:
    async with balanced(specs("a", "b"), **CALM) as rig:
        for fake in rig.fleet:
            fake.set_fault(Fault(FaultKind.RESET))
        await rig.ask("POST", "/api/push", {"model": "tiny"})
        assert sum(fake.stats.requests["/api/push"] for fake in rig.fleet) <= 1
        await rig.ask("POST", "/api/copy", {"source": "tiny", "destination": "x"})
        assert max(fake.stats.requests["/api/copy"] for fake in rig.fleet) <= 1


async def test_tags_and_ps_show_each_model_once() -> None:
    fleet = [*specs("a"), *specs("b", models=(TINY, FakeModel("other")))]
    async with balanced(fleet) as rig:
        tags = body_of(await rig.ask("GET", "/api/tags"))["models"]
        running = body_of(await rig.ask("GET", "/api/ps"))["models"]
    assert sorted(model["name"] for model in tags) == ["other:latest", "tiny:latest"]
    assert {model["name"] for model in running} == {"tiny:latest"}


async def test_the_version_is_the_highest() -> None:
    fleet = [*specs("a", version="0.9.9"), *specs("b", version="0.12.6"), *specs("c", version="0.10.0")]
    async with balanced(fleet) as rig:
        assert body_of(await rig.ask("GET", "/api/version")) == {"version": "0.12.6"}


async def test_a_body_is_sent_to_the_server_byte_for_byte() -> None:
    raw = (
        b'{ "model":"tiny",\n "messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}], "stream" : true, "x": 1e40}\n'
    )
    async with scripted() as (rig, (server,)):
        await rig.ask("POST", "/api/chat", raw)
        assert server.bodies == [raw]


async def test_the_answer_names_the_model_as_the_client_wrote_it() -> None:
    async with balanced(specs("a")) as rig:
        for name in ("tiny", "tiny:latest"):
            assert {line["model"] for line in (await rig.ask("POST", "/api/chat", chat(model=name))).lines} == {name}
