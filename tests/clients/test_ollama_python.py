"""`ollama` from PyPI, as its users use it: every method of `Client` and of `AsyncClient`, over a fleet."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import httpx
import ollama
import pytest

from simulator.fake_ollama import FakeSpec
from simulator.faults import Fault, FaultKind
from tests.clients.kit import HELLO, PIXEL, WEATHER, Called, able, fleet
from tests.lbio.kit import Rig
from tests.lbio.sockets_kit import until

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("kind", [ollama.Client, ollama.AsyncClient])]
Kind = type[ollama.Client] | type[ollama.AsyncClient]
TOOL = {"type": "function", "function": WEATHER}
SCHEMA = WEATHER["parameters"]
ALONE: dict[str, Any] = {"race": {"racers_max": 1, "hedges_max": 0}}


@contextlib.asynccontextmanager
async def client(
    kind: Kind, *faults: Fault, specs: Sequence[FakeSpec] = (), **config: Any
) -> AsyncIterator[tuple[Rig, Called]]:
    """A client of a fleet."""
    async with fleet(specs, *faults, **config) as rig:
        asking = kind(host=rig.url)
        try:
            yield rig, Called(asking)
        finally:
            await Called(asking)("close")


# --- generating ----------------------------------------------------------------------------------------------------


async def test_a_chat_is_answered(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        answer = await ask("chat", "tiny", HELLO)
    assert answer.done
    assert answer.model == "tiny"
    assert answer.message.content


async def test_a_chat_streams_token_by_token(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        parts = await ask("chat", "tiny", HELLO, stream=True)
    assert [part.done for part in parts] == [False] * 8 + [True]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_calls_the_tool_that_it_is_offered(kind: Kind, stream: bool) -> None:
    async with client(kind) as (_, ask):
        answer = await ask("chat", "tiny", HELLO, tools=[TOOL], stream=stream)
    messages = [part.message for part in (answer if stream else [answer])]
    (call,) = [call for message in messages for call in message.tool_calls or ()]
    assert call.function.name == "weather"
    assert set(call.function.arguments) == {"city", "days"}


async def test_what_a_tool_has_said_is_answered_with_a_text(kind: Kind) -> None:
    told = [*HELLO, {"role": "assistant", "content": ""}, {"role": "tool", "tool_name": "weather", "content": "sun"}]
    async with client(kind) as (_, ask):
        answer = await ask("chat", "tiny", told, tools=[TOOL])
    assert answer.message.content
    assert not answer.message.tool_calls


async def test_a_chat_about_an_image_is_answered(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        answer = await ask("chat", "tiny", [{"role": "user", "content": "what is it?", "images": [PIXEL]}])
    assert answer.message.content


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_gives_its_thoughts_apart_from_its_text(kind: Kind, stream: bool) -> None:
    async with client(kind) as (_, ask):
        answer = await ask("chat", "tiny", HELLO, think=True, stream=stream)
    messages = [part.message for part in (answer if stream else [answer])]
    assert "".join(message.thinking or "" for message in messages)
    assert "".join(message.content or "" for message in messages)


@pytest.mark.parametrize("wanted", ["json", SCHEMA])
async def test_a_chat_answers_in_the_format_that_is_wanted(kind: Kind, wanted: Any) -> None:
    async with client(kind) as (_, ask):
        answer = await ask("chat", "tiny", HELLO, format=wanted)
    assert answer.message.content.startswith('{"')
    if wanted is SCHEMA:
        assert '"city":' in answer.message.content


async def test_a_chat_gives_the_logarithms_of_probabilities(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        answer = await ask("chat", "tiny", HELLO, logprobs=True, top_logprobs=2)
    assert len(answer.logprobs) == 8
    assert len(answer.logprobs[0].top_logprobs) == 2


async def test_options_reach_the_server(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        answer = await ask("chat", "tiny", HELLO, options={"num_predict": 3})
    assert (answer.eval_count, answer.done_reason) == (3, "length")


async def test_a_prompt_is_completed(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        answer = await ask("generate", "tiny", "hello", system="be brief")
    assert answer.done
    assert answer.response
    assert answer.context


async def test_a_completion_streams_token_by_token(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        parts = await ask("generate", "tiny", "hello", stream=True)
    assert [part.done for part in parts] == [False] * 8 + [True]
    assert "".join(part.response for part in parts)


@pytest.mark.parametrize(
    "asked", [{"suffix": "}"}, {"raw": True}, {"images": [PIXEL]}, {"think": True}, {"format": "json"}], ids=str
)
async def test_a_completion_takes_all_that_it_can_be_given(kind: Kind, asked: dict[str, Any]) -> None:
    async with client(kind) as (_, ask):
        answer = await ask("generate", "tiny", "hello", **asked)
    assert answer.response
    assert bool(answer.thinking) == ("think" in asked)


async def test_texts_are_embedded(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        one, two = await ask("embed", "tiny", "hello"), await ask("embed", "tiny", ["hello", "world"], dimensions=4)
        assert [len(vector) for vector in one.embeddings] == [16]
        assert [len(vector) for vector in two.embeddings] == [4, 4]
        assert len((await ask("embeddings", "tiny", "hello")).embedding) == 16


async def test_embeddings_divided_over_servers_are_those_of_one_server(kind: Kind) -> None:
    texts = [f"text {number}" for number in range(100)]
    async with client(kind) as (rig, ask), contextlib.AsyncExitStack() as stack:
        alone = kind(host=rig.fleet[0].url)
        stack.push_async_callback(Called(alone), "close")
        ours, theirs = await ask("embed", "tiny", texts), await Called(alone)("embed", "tiny", texts)
        assert rig.fleet[1].stats.requests["/api/embed"] == 1
    assert ours.embeddings == theirs.embeddings
    assert ours.prompt_eval_count == theirs.prompt_eval_count


async def test_a_model_is_loaded_and_unloaded(kind: Kind) -> None:
    async with client(kind, specs=able(start_loaded=())) as (_, ask):
        assert (await ask("generate", "tiny", keep_alive=60)).done_reason == "load"
        assert (await ask("chat", "tiny", keep_alive=60)).done_reason == "load"
        assert (await ask("generate", "tiny", keep_alive=0)).done_reason == "unload"


# --- looking -------------------------------------------------------------------------------------------------------


async def test_models_are_listed_once(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        assert [model.model for model in (await ask("list")).models] == ["tiny:latest"]


async def test_loaded_models_are_listed_once(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        assert [model.model for model in (await ask("ps")).models] == ["tiny:latest"]


async def test_a_model_is_shown(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        shown = await ask("show", "tiny")
    assert "tools" in shown.capabilities
    assert shown.modelinfo


# --- managing ------------------------------------------------------------------------------------------------------


async def names(ask: Called) -> set[str]:
    return {model.model for model in (await ask("list")).models}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_is_pulled_onto_every_server(kind: Kind, stream: bool) -> None:
    async with client(kind) as (rig, ask):
        told = await ask("pull", "new", stream=stream)
        assert (told[-1] if stream else told).status == "success"
        assert await names(ask) == {"tiny:latest", "new:latest"}
        assert all(server.live.fake.find("new") for server in rig.fleet)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_is_pushed(kind: Kind, stream: bool) -> None:
    async with client(kind) as (_, ask):
        told = await ask("push", "tiny", stream=stream)
    assert (told[-1] if stream else told).status == "success"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_is_made_of_another_on_every_server(kind: Kind, stream: bool) -> None:
    async with client(kind) as (rig, ask):
        told = await ask("create", "mario", from_="tiny", system="You are Mario.", stream=stream)
        assert (told[-1] if stream else told).status == "success"
        assert await names(ask) == {"tiny:latest", "mario:latest"}
        assert all(server.live.fake.find("mario") for server in rig.fleet)


async def test_a_model_is_made_of_a_file_that_was_uploaded(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"GGUF" + bytes(300_000))
    async with client(kind) as (rig, ask):
        digest = await ask("create_blob", path)
        assert (await ask("create", "mine", files={path.name: digest})).status == "success"
        assert await names(ask) == {"tiny:latest", "mine:latest"}
        assert all(digest in server.live.fake.blobs for server in rig.fleet)


async def test_a_model_is_copied_and_deleted_on_every_server(kind: Kind) -> None:
    async with client(kind) as (rig, ask):
        assert (await ask("copy", "tiny", "twin")).status == "success"
        assert all(server.live.fake.find("twin") for server in rig.fleet)
        assert (await ask("delete", "twin")).status == "success"
        assert await names(ask) == {"tiny:latest"}
        assert not any(server.live.fake.find("twin") for server in rig.fleet)


# --- what is not the server's to answer ----------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "asked"), [("web_search", "ollama"), ("web_fetch", "https://ollama.com")])
async def test_the_web_is_asked_at_ollama_com_and_never_here(kind: Kind, method: str, asked: str) -> None:
    urls: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        urls.append(str(request.url))
        return httpx.Response(200, json={"results": [], "title": "", "content": "", "links": []})

    asking = kind("http://balancer:1", headers={"Authorization": "Bearer key"}, transport=httpx.MockTransport(answer))
    await Called(asking)(method, asked)
    await Called(asking)("close")
    assert urls == [f"https://ollama.com/api/{method}"]


async def test_a_path_that_no_server_knows_is_the_servers_own_404(kind: Kind) -> None:
    questions = {"q": {"type": "noul", "instructions": "is it?"}}
    async with client(kind) as (rig, ask):
        with pytest.raises(ollama.ResponseError, match="404 page not found") as caught:
            await ask("systemone", "tiny", "text", questions)
        assert caught.value.status_code == 404
        assert sum(server.stats.requests["/v1/systemone"] for server in rig.fleet) == 1


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_model_is_a_response_error(kind: Kind, stream: bool) -> None:
    async with client(kind) as (_, ask):
        with pytest.raises(ollama.ResponseError, match="model 'nosuch' not found") as caught:
            await ask("chat", "nosuch", HELLO, stream=stream)
    assert caught.value.status_code == 404


@pytest.mark.parametrize("fault", [FaultKind.CUT_MIDSTREAM, FaultKind.END_MIDSTREAM, FaultKind.ERROR_MIDSTREAM])
async def test_a_broken_stream_is_a_response_error(kind: Kind, fault: FaultKind) -> None:
    async with client(kind, Fault(fault, after_tokens=3)) as (_, ask):
        with pytest.raises(ollama.ResponseError):
            await ask("chat", "tiny", HELLO, stream=True)


async def test_a_model_that_no_registry_has_is_a_response_error(kind: Kind) -> None:
    async with client(kind) as (_, ask):
        with pytest.raises(ollama.ResponseError, match="no such host"):
            await ask("pull", "nope", stream=True)


async def test_a_server_that_dies_is_not_noticed(kind: Kind) -> None:
    async with client(kind, **ALONE) as (rig, ask):
        await rig.fleet[0].stop()
        for _ in range(4):
            assert (await ask("chat", "tiny", HELLO)).done


async def test_leaving_a_stream_frees_the_server(kind: Kind) -> None:
    async with fleet(able("a", token_ms=20, tokens=500)) as rig:
        if kind is ollama.AsyncClient:
            async with ollama.AsyncClient(host=rig.url) as asking:
                await anext(await asking.chat("tiny", HELLO, stream=True))
        else:
            await anyio.to_thread.run_sync(leave, rig.url)
        await until(lambda: rig.fleet[0].stats.aborted == 1)


def leave(url: str) -> None:
    with ollama.Client(host=url) as asking:
        next(iter(asking.chat("tiny", HELLO, stream=True)))


async def test_many_chats_at_once_are_all_answered(kind: Kind) -> None:
    async with client(kind, specs=able("a", "b", "c")) as (_, ask):
        lengths: list[int] = []

        async def one() -> None:
            lengths.append(len(await ask("chat", "tiny", HELLO, stream=True)))

        async with anyio.create_task_group() as tasks:
            for _ in range(30):
                tasks.start_soon(one)
    assert lengths == [9] * 30


def test_every_method_of_the_client_is_told_of_here(kind: Kind) -> None:
    """A new one is noticed when the package is updated."""
    told = Path(__file__).read_text(encoding="utf-8")
    methods = [name for name in vars(kind) if not name.startswith("_")]
    assert [name for name in methods if f'"{name}"' not in told] == []
