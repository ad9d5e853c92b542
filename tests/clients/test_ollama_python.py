"""`ollama` from PyPI, as its users use it."""

from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import ollama
import pytest

from simulator.fake_ollama import FakeModel
from simulator.faults import Fault, FaultKind
from tests.lbio.kit import balanced, specs

pytestmark = pytest.mark.anyio
HELLO = [{"role": "user", "content": "hello"}]


async def with_client(story: Callable[[ollama.Client], Any], *faults: Fault) -> Any:
    """Tell a story to the synchronous client, in a thread of its own."""
    async with balanced(specs("a"), race={"racers_max": 1}) as rig:
        rig.fleet[0].set_fault(*faults)

        def tell() -> Any:
            with ollama.Client(host=rig.url) as client:
                try:
                    return story(client)
                except Exception as error:  # noqa: BLE001  raised again below, where no task group wraps it
                    return error

        with anyio.fail_after(20):
            result = await anyio.to_thread.run_sync(tell)
    if isinstance(result, Exception):
        raise result
    return result


async def test_list() -> None:
    found = await with_client(lambda client: client.list())
    assert [model.model for model in found.models] == ["tiny:latest"]


async def test_ps() -> None:
    found = await with_client(lambda client: client.ps())
    assert [model.model for model in found.models] == ["tiny:latest"]


async def test_show() -> None:
    found = await with_client(lambda client: client.show("tiny"))
    assert "completion" in found.capabilities


async def test_chat() -> None:
    answer = await with_client(lambda client: client.chat("tiny", HELLO))
    assert answer.done
    assert answer.message.content


async def test_chat_streamed() -> None:
    parts = await with_client(lambda client: list(client.chat("tiny", HELLO, stream=True)))
    assert [part.done for part in parts] == [False] * 8 + [True]


async def test_generate() -> None:
    answer = await with_client(lambda client: client.generate("tiny", "hello"))
    assert answer.done
    assert answer.response


async def test_generate_streamed() -> None:
    parts = await with_client(lambda client: list(client.generate("tiny", "hello", stream=True)))
    assert parts[-1].done
    assert "".join(part.response for part in parts)


async def test_load_and_unload() -> None:
    def story(client: ollama.Client) -> tuple[str | None, str | None]:
        return client.generate("tiny", keep_alive=60).done_reason, client.generate("tiny", keep_alive=0).done_reason

    assert await with_client(story) == ("load", "unload")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_model_is_a_response_error(stream: bool) -> None:
    def story(client: ollama.Client) -> None:
        if stream:
            list(client.chat("nosuch", HELLO, stream=True))
        else:
            client.chat("nosuch", HELLO)

    with pytest.raises(ollama.ResponseError, match="model 'nosuch' not found") as caught:
        await with_client(story)
    assert caught.value.status_code == 404


@pytest.mark.parametrize("kind", [FaultKind.CUT_MIDSTREAM, FaultKind.END_MIDSTREAM, FaultKind.ERROR_MIDSTREAM])
async def test_a_broken_stream_is_a_response_error(kind: FaultKind) -> None:
    parts: list[Any] = []

    def story(client: ollama.Client) -> None:
        for part in client.chat("tiny", HELLO, stream=True):
            parts.append(part)  # noqa: PERF402  the end is an exception

    with pytest.raises(ollama.ResponseError):
        await with_client(story, Fault(kind, after_tokens=3))
    assert len(parts) == 3


async def test_the_asynchronous_client() -> None:
    async with balanced(specs("a", "b")) as rig:
        client = ollama.AsyncClient(host=rig.url)
        assert [model.model for model in (await client.list()).models] == ["tiny:latest"]
        assert [model.model for model in (await client.ps()).models] == ["tiny:latest"]
        assert (await client.show("tiny")).capabilities
        assert (await client.chat("tiny", HELLO)).done
        parts = [part async for part in await client.chat("tiny", HELLO, stream=True)]
        assert [part.done for part in parts] == [False] * 8 + [True]
        assert (await client.generate("tiny", "hello")).done
        with pytest.raises(ollama.ResponseError):
            await client.chat("nosuch", HELLO)
        await client._client.aclose()


async def test_many_asynchronous_chats_at_once() -> None:
    async with balanced(specs("a", "b", "c")) as rig:
        client = ollama.AsyncClient(host=rig.url)
        lengths: list[int] = []

        async def one() -> None:
            lengths.append(len([part async for part in await client.chat("tiny", HELLO, stream=True)]))

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for _ in range(30):
                    tasks.start_soon(one)
        await client._client.aclose()
    assert lengths == [9] * 30


async def test_embeddings_divided_over_servers_are_those_of_one_server() -> None:
    model = FakeModel("e5", size_bytes=1_000_000, capabilities=("embedding",), embedding_length=8)
    fleet = specs("a", "b", models=(model,), start_loaded=("e5",))
    texts = [f"text {number}" for number in range(100)]
    async with balanced(fleet) as rig:
        found = []
        for url in (rig.url, rig.fleet[0].url):
            client = ollama.AsyncClient(host=url)
            found.append(await client.embed("e5", texts))
            assert len((await client.embeddings("e5", "one")).embedding) == 8
            await client._client.aclose()
        assert rig.fleet[1].stats.requests["/api/embed"] == 1
    assert found[0].embeddings == found[1].embeddings
    assert found[0].prompt_eval_count == found[1].prompt_eval_count
