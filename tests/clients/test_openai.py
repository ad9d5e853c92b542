"""`openai` from PyPI, with `base_url` pointed at the fleet."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from simulator.fake_ollama import FakeSpec
from simulator.faults import Fault, FaultKind
from tests.clients.kit import HELLO, WEATHER, Called, able, fleet
from tests.lbio.kit import Rig
from tests.lbio.sockets_kit import until

openai = pytest.importorskip("openai", reason="the package openai is not installed")

pytestmark = pytest.mark.anyio
KINDS = pytest.mark.parametrize("kind", [openai.OpenAI, openai.AsyncOpenAI])
TOOL = {"type": "function", "function": WEATHER}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
BREAKS = [FaultKind.CUT_MIDSTREAM, FaultKind.END_MIDSTREAM, FaultKind.ERROR_MIDSTREAM]


@contextlib.asynccontextmanager
async def client(
    *faults: Fault, kind: Any = openai.AsyncOpenAI, specs: Sequence[FakeSpec] = (), **config: Any
) -> AsyncIterator[tuple[Rig, Called]]:
    """A client of a fleet."""
    async with fleet(specs, *faults, **config) as rig:
        asking = kind(base_url=f"{rig.url}/v1", api_key="any", max_retries=0)
        try:
            yield rig, Called(asking)
        finally:
            await Called(asking)("close")


# --- chat ----------------------------------------------------------------------------------------------------------


@KINDS
async def test_a_chat_is_answered(kind: Any) -> None:
    async with client(kind=kind) as (_, ask):
        answer = await ask("chat.completions.create", model="tiny", messages=HELLO)
    (choice,) = answer.choices
    assert (answer.model, choice.finish_reason) == ("tiny", "stop")
    assert choice.message.content
    assert answer.usage.completion_tokens == 8


@KINDS
async def test_a_chat_streams_token_by_token(kind: Any) -> None:
    async with client(kind=kind) as (_, ask):
        chunks = await ask("chat.completions.create", model="tiny", messages=HELLO, stream=True)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 8 + ["stop"]
    assert all(chunk.choices[0].delta.content for chunk in chunks[:-1])


async def test_a_stream_tells_its_usage_when_asked() -> None:
    wanted = {"include_usage": True}
    async with client() as (_, ask):
        chunks = await ask(
            "chat.completions.create", model="tiny", messages=HELLO, stream=True, stream_options=wanted
        )
    assert chunks[-1].usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_calls_the_tool_that_it_is_offered(stream: bool) -> None:
    async with client() as (_, ask):
        answer = await ask("chat.completions.create", model="tiny", messages=HELLO, tools=[TOOL], stream=stream)
    choices = [each.choices[0] for each in (answer if stream else [answer])]
    said = [choice.delta if stream else choice.message for choice in choices]
    (call,) = [call for each in said for call in each.tool_calls or ()]
    assert call.function.name == "weather"
    assert '"city":' in call.function.arguments
    assert choices[-1].finish_reason == "tool_calls"


async def test_what_a_tool_has_said_is_answered_with_a_text() -> None:
    told = [*HELLO, {"role": "tool", "tool_call_id": "call_1", "content": "sun"}]
    async with client() as (_, ask):
        answer = await ask("chat.completions.create", model="tiny", messages=told, tools=[TOOL])
    assert answer.choices[0].message.content


async def test_a_chat_about_an_image_is_answered() -> None:
    asked = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, IMAGE]}]
    async with client() as (_, ask):
        answer = await ask("chat.completions.create", model="tiny", messages=asked)
    assert answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_gives_its_thoughts_apart_from_its_text(stream: bool) -> None:
    async with client() as (_, ask):
        answer = await ask(
            "chat.completions.create", model="tiny", messages=HELLO, reasoning_effort="high", stream=stream
        )
    choices = [each.choices[0] for each in (answer if stream else [answer])]
    said = [choice.delta if stream else choice.message for choice in choices]
    assert "".join(getattr(each, "reasoning", None) or "" for each in said)
    assert "".join(each.content or "" for each in said)


async def test_a_chat_answers_in_the_format_that_is_wanted() -> None:
    schema = {"name": "weather", "schema": WEATHER["parameters"]}
    wanted = {"type": "json_schema", "json_schema": schema}
    async with client() as (_, ask):
        answer = await ask("chat.completions.create", model="tiny", messages=HELLO, response_format=wanted)
    assert answer.choices[0].message.content.startswith('{"city":')


# --- completions, responses ----------------------------------------------------------------------------------------


async def test_a_prompt_is_completed() -> None:
    async with client() as (_, ask):
        answer = await ask("completions.create", model="tiny", prompt="hello", max_tokens=4)
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"


async def test_a_completion_streams_token_by_token() -> None:
    async with client() as (_, ask):
        chunks = await ask("completions.create", model="tiny", prompt="hello", stream=True)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 8 + ["stop"]


@KINDS
async def test_a_response_is_created(kind: Any) -> None:
    async with client(kind=kind) as (_, ask):
        answer = await ask("responses.create", model="tiny", input="hello", instructions="be brief")
    assert (answer.status, answer.instructions) == ("completed", "be brief")
    assert answer.output_text
    assert answer.usage.output_tokens == 8


@KINDS
async def test_a_response_streams_event_by_event(kind: Any) -> None:
    async with client(kind=kind) as (_, ask):
        events = await ask("responses.create", model="tiny", input="hello", stream=True)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) == 8
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "".join(deltas)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_thinks_and_calls_the_tool_that_it_is_offered(stream: bool) -> None:
    tool = {"type": "function", "strict": False, **WEATHER}
    asked = {"model": "tiny", "input": "hello", "tools": [tool], "reasoning": {"effort": "high"}, "stream": stream}
    async with client() as (_, ask):
        answer = await ask("responses.create", **asked)
    whole = answer[-1].response if stream else answer
    thought, call = whole.output
    assert (thought.type, call.type, call.name) == ("reasoning", "function_call", "weather")
    assert '"city":' in call.arguments
    if stream:
        assert [event.sequence_number for event in answer] == list(range(len(answer)))


async def test_the_stream_helper_of_responses_accumulates_the_whole() -> None:
    async with client() as (_, ask), ask.client.responses.stream(model="tiny", input=[*HELLO]) as stream:
        final = await stream.get_final_response()
    assert final.output_text


# --- the rest ------------------------------------------------------------------------------------------------------


@KINDS
async def test_models_are_listed_once(kind: Any) -> None:
    async with client(kind=kind) as (_, ask):
        assert [model.id for model in (await ask("models.list")).data] == ["tiny:latest"]


async def test_a_model_is_retrieved() -> None:
    async with client() as (_, ask):
        assert (await ask("models.retrieve", "tiny")).id == "tiny"
        with pytest.raises(openai.NotFoundError):
            await ask("models.retrieve", "nosuch")


@pytest.mark.parametrize("wanted", ["json", "text"])
async def test_a_recording_is_transcribed(wanted: str) -> None:
    recording = ("speech.wav", b"RIFF" + bytes(50_000), "audio/wav")
    async with client() as (_, ask):
        answer = await ask("audio.transcriptions.create", model="tiny", file=recording, response_format=wanted)
    assert answer if wanted == "text" else answer.text


async def test_what_no_server_can_do_is_the_servers_own_404() -> None:
    async with client() as (_, ask):
        with pytest.raises(openai.NotFoundError):
            await ask("moderations.create", input="hello")


# --- another name --------------------------------------------------------------------------------------------------


async def test_a_client_that_insists_on_a_name_gets_it_wherever_a_model_is_named() -> None:
    asked: dict[str, Any] = {"model": "gpt-4o"}
    async with client(alias={"gpt-4o": "tiny"}) as (_, ask):
        chat = await ask("chat.completions.create", messages=HELLO, **asked)
        chunks = await ask("chat.completions.create", messages=HELLO, stream=True, **asked)
        texts = await ask("completions.create", prompt="hello", stream=True, **asked)
        response = await ask("responses.create", input="hello", **asked)
        events = await ask("responses.create", input="hello", stream=True, **asked)
        vectors = await ask("embeddings.create", input=["a", "b"], **asked)
        listed = await ask("models.list")
        model = await ask("models.retrieve", "gpt-4o")
        heard = await ask("audio.transcriptions.create", file=("a.wav", b"RIFF....WAVE"), **asked)
    whole = [event.response for event in events if hasattr(event, "response")]
    named = [chat, *chunks, *texts, response, *whole, vectors]
    assert whole
    assert {each.model for each in named} == {"gpt-4o"}
    assert {each.id for each in listed.data} == {"gpt-4o", "tiny:latest"}
    assert model.id == "gpt-4o"
    assert heard.text


# --- what goes wrong -----------------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "chat.completions.create": {"messages": HELLO},
    "completions.create": {"prompt": "hello"},
    "responses.create": {"input": "hello"},
}


@pytest.mark.parametrize("method", ASKED)
async def test_an_unknown_model_is_not_found(method: str) -> None:
    async with client() as (_, ask):
        with pytest.raises(openai.NotFoundError, match="model 'nosuch' not found"):
            await ask(method, model="nosuch", **ASKED[method])


@pytest.mark.parametrize("fault", BREAKS)
@pytest.mark.parametrize("method", ASKED)
async def test_a_broken_stream_is_an_error_and_never_taken_for_a_whole_one(method: str, fault: FaultKind) -> None:
    async with client(Fault(fault, after_tokens=3)) as (_, ask):
        with pytest.raises(openai.APIError):
            await ask(method, model="tiny", stream=True, **ASKED[method])


async def test_leaving_a_stream_frees_the_server() -> None:
    async with client(specs=able("a", token_ms=20, tokens=500)) as (rig, ask):
        stream = await ask.client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await until(lambda: rig.fleet[0].stats.aborted == 1)
