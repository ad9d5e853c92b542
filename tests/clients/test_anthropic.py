"""`anthropic` from PyPI, with `base_url` pointed at the fleet."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from simulator.fake_ollama import FakeSpec
from simulator.faults import Fault, FaultKind
from tests.clients.kit import HELLO, WEATHER, Called, able, fleet
from tests.lbio.kit import Rig
from tests.lbio.sockets_kit import until

anthropic = pytest.importorskip("anthropic", reason="the package anthropic is not installed")

pytestmark = pytest.mark.anyio
KINDS = pytest.mark.parametrize("kind", [anthropic.Anthropic, anthropic.AsyncAnthropic])
ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "messages": HELLO}
TOOL = {"name": "weather", "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}
THINKING = {"type": "enabled", "budget_tokens": 1024}


@contextlib.asynccontextmanager
async def client(
    *faults: Fault, kind: Any = anthropic.AsyncAnthropic, specs: Sequence[FakeSpec] = (), **config: Any
) -> AsyncIterator[tuple[Rig, Called]]:
    """A client of a fleet."""
    async with fleet(specs, *faults, **config) as rig:
        asking = kind(base_url=rig.url, api_key="any", max_retries=0)
        try:
            yield rig, Called(asking)
        finally:
            await Called(asking)("close")


@KINDS
async def test_a_message_is_answered(kind: Any) -> None:
    async with client(kind=kind) as (_, ask):
        answer = await ask("messages.create", **ASKED)
    (block,) = answer.content
    assert (answer.role, answer.model, answer.stop_reason, block.type) == ("assistant", "tiny", "max_tokens", "text")
    assert block.text
    assert answer.usage.output_tokens == 20


@KINDS
async def test_a_message_streams_event_by_event(kind: Any) -> None:
    async with client(kind=kind) as (_, ask):
        events = await ask("messages.create", stream=True, **ASKED)
    types = [event.type for event in events]
    assert types[:2] == ["message_start", "content_block_start"]
    assert types.count("content_block_delta") == 20
    assert types[-3:] == ["content_block_stop", "message_delta", "message_stop"]


async def test_a_client_that_insists_on_a_name_gets_it_in_whole_answers_and_in_streams() -> None:
    asked = {**ASKED, "model": "claude-3-5-haiku-latest"}
    async with client(alias={"claude-3-5-haiku-latest": "tiny"}) as (_, ask):
        answer = await ask("messages.create", **asked)
        begun, *_ = await ask("messages.create", stream=True, **asked)
    assert (answer.model, begun.message.model) == (asked["model"], asked["model"])


async def test_the_stream_helper_accumulates_the_whole() -> None:
    async with client() as (_, ask), ask.client.messages.stream(**ASKED) as stream:
        pieces = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert len(pieces) == 20
    assert final.content[0].text == "".join(pieces)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_message_thinks_and_calls_the_tool_that_it_is_offered(stream: bool) -> None:
    asked = {**ASKED, "max_tokens": 2000, "tools": [TOOL], "thinking": THINKING}
    async with client() as (_, ask):
        if stream:
            async with ask.client.messages.stream(**asked) as events:
                answer = await events.get_final_message()
        else:
            answer = await ask("messages.create", **asked)
    thought, call = answer.content
    assert thought.thinking
    assert (call.type, call.name, set(call.input)) == ("tool_use", "weather", {"city", "days"})
    assert answer.stop_reason == "tool_use"


async def test_what_a_tool_has_said_is_answered_with_a_text() -> None:
    used = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "sun"}
    told = [*HELLO, {"role": "assistant", "content": [used]}, {"role": "user", "content": [result]}]
    async with client() as (_, ask):
        answer = await ask("messages.create", **{**ASKED, "messages": told}, tools=[TOOL])
    assert answer.content[0].text


async def test_a_message_about_an_image_is_answered() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
    told = [{"role": "user", "content": [image, {"type": "text", "text": "what is it?"}]}]
    async with client() as (_, ask):
        answer = await ask("messages.create", **{**ASKED, "messages": told})
    assert answer.content[0].text


async def test_tokens_cannot_be_counted_since_no_server_can() -> None:
    async with client() as (rig, ask):
        with pytest.raises(anthropic.NotFoundError):
            await ask("messages.count_tokens", model="tiny", messages=HELLO)
        assert sum(server.stats.requests["/v1/messages/count_tokens"] for server in rig.fleet) == 1


async def test_an_unknown_model_is_not_found() -> None:
    async with client() as (_, ask):
        with pytest.raises(anthropic.NotFoundError, match="model 'nosuch' not found"):
            await ask("messages.create", **{**ASKED, "model": "nosuch"})


async def test_a_refusal_is_a_bad_request() -> None:
    async with client() as (_, ask):
        with pytest.raises(anthropic.BadRequestError, match="max_tokens is required"):
            await ask("messages.create", **{**ASKED, "max_tokens": 0})


@pytest.mark.parametrize("fault", [FaultKind.CUT_MIDSTREAM, FaultKind.END_MIDSTREAM, FaultKind.ERROR_MIDSTREAM])
async def test_a_broken_stream_is_an_error_and_never_taken_for_a_whole_one(fault: FaultKind) -> None:
    async with client(Fault(fault, after_tokens=3)) as (_, ask):
        with pytest.raises(anthropic.APIError):
            await ask("messages.create", stream=True, **ASKED)


async def test_leaving_a_stream_frees_the_server() -> None:
    async with client(specs=able("a", token_ms=20)) as (rig, ask):
        stream = await ask.client.messages.create(**{**ASKED, "max_tokens": 500}, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await until(lambda: rig.fleet[0].stats.aborted == 1)
