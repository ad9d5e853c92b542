"""`langchain-ollama` from PyPI: what a framework makes of the fleet."""

import contextlib
import gc
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.to_thread
import ollama
import pytest

from simulator.faults import Fault, FaultKind
from tests.clients.kit import WEATHER, Called, fleet

langchain_ollama = pytest.importorskip("langchain_ollama", reason="the package langchain-ollama is not installed")

pytestmark = pytest.mark.anyio
TOOL = {"type": "function", "function": WEATHER}


@contextlib.asynccontextmanager
async def model(kind: str = "ChatOllama", *faults: Fault, **more: Any) -> AsyncIterator[Any]:
    """A model of the framework's over a fleet."""
    async with fleet((), *faults) as rig:
        made = await in_thread(lambda: getattr(langchain_ollama, kind)(base_url=rig.url, model="tiny", **more))
        try:
            yield made
        finally:
            for inner in (made._client, made._async_client):
                await Called(inner)("close")


async def in_thread(call: Callable[[], Any]) -> Any:
    """Do what waits for the balancer without a word to the event loop."""
    outcome = await anyio.to_thread.run_sync(lambda: tried(call))
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def tried(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # noqa: BLE001  raised again where no task group wraps it
        return error


async def test_a_chat_is_answered() -> None:
    async with model() as chat:
        answer = await chat.ainvoke("hello")
    assert answer.content
    assert answer.response_metadata["done_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] == 8


async def test_a_chat_streams_token_by_token() -> None:
    async with model() as chat:
        chunks = [chunk async for chunk in chat.astream("hello")]
    assert sum(bool(chunk.content) for chunk in chunks) == 8


async def test_several_prompts_go_out_at_once() -> None:
    async with model() as chat:
        answers = await chat.abatch(["one", "two", "three"])
    assert all(answer.content for answer in answers)


async def test_a_bound_tool_is_called() -> None:
    async with model() as chat:
        answer = await chat.bind_tools([TOOL]).ainvoke("hello")
    (call,) = answer.tool_calls
    assert (call["name"], set(call["args"])) == ("weather", {"city", "days"})


async def test_a_structured_output_has_the_wanted_structure() -> None:
    schema = {"title": "weather", **WEATHER["parameters"]}
    async with model() as chat:
        answer = await chat.with_structured_output(schema).ainvoke("hello")
    assert set(answer) == {"city", "days"}


async def test_thoughts_come_apart_from_the_text() -> None:
    async with model(reasoning=True) as chat:
        answer = await chat.ainvoke("hello")
    assert answer.additional_kwargs["reasoning_content"]
    assert answer.content


async def test_a_prompt_is_completed() -> None:
    async with model("OllamaLLM") as llm:
        assert await llm.ainvoke("hello")


async def test_documents_and_queries_are_embedded() -> None:
    async with model("OllamaEmbeddings") as embeddings:
        assert [len(vector) for vector in await embeddings.aembed_documents(["one", "two"])] == [16, 16]
        assert len(await embeddings.aembed_query("one")) == 16


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_the_model_is_looked_for_at_the_start_if_that_is_wanted() -> None:
    async with model(validate_model_on_init=True) as chat:
        assert (await chat.ainvoke("hello")).content
    async with fleet() as rig:
        assert "nosuch" in await anyio.to_thread.run_sync(refusal, rig.url)


def refusal(url: str) -> str:
    """Why there can be no model of a name that nobody has; what it leaves open then is closed here."""
    try:
        langchain_ollama.ChatOllama(base_url=url, model="nosuch", validate_model_on_init=True)
    except ValueError as error:
        words = str(error)
    gc.collect()
    return words


async def test_a_broken_stream_is_an_error() -> None:
    async with model("ChatOllama", Fault(FaultKind.CUT_MIDSTREAM, after_tokens=3)) as chat:
        with pytest.raises(ollama.ResponseError):
            await chat.ainvoke("hello")
