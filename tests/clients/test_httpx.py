"""httpx: kept connections, streams, HEAD, and leaving early."""

import json

import anyio
import httpx
import pytest

from tests.lbio.kit import balanced, specs
from tests.lbio.sockets_kit import until
from tests.simulator.wire import chat

pytestmark = pytest.mark.anyio


async def test_requests_share_a_connection() -> None:
    async with balanced(specs("a")) as rig, httpx.AsyncClient(base_url=rig.url) as client:
        for _ in range(3):
            assert (await client.post("/api/chat", json=chat(stream=False))).json()["done"] is True
        assert (await client.head("/api/tags")).status_code == 200
        assert len(rig.service.front.connections) == 1


async def test_a_stream_line_by_line() -> None:
    async with (
        balanced(specs("a")) as rig,
        httpx.AsyncClient(base_url=rig.url) as client,
        client.stream("POST", "/api/chat", json=chat()) as answer,
    ):
        lines = [json.loads(line) async for line in answer.aiter_lines()]
    assert [line["done"] for line in lines] == [False] * 8 + [True]


async def test_a_body_sent_in_chunks() -> None:
    async def body() -> object:
        for byte in json.dumps(chat(stream=False)).encode():
            yield bytes([byte])

    async with balanced(specs("a")) as rig, httpx.AsyncClient(base_url=rig.url) as client:
        answer = await client.post("/api/chat", content=body())  # type: ignore[arg-type]
    assert answer.json()["done"] is True


async def test_leaving_a_stream_frees_the_server() -> None:
    async with balanced(specs("a", token_ms=20, tokens=500)) as rig, httpx.AsyncClient(base_url=rig.url) as client:
        async with client.stream("POST", "/api/chat", json=chat()) as answer:
            await anext(answer.aiter_lines())
        await until(lambda: rig.fleet[0].stats.aborted == 1)
        assert rig.n_requests == 0


async def test_many_at_once() -> None:
    async with balanced(specs("a", "b")) as rig, httpx.AsyncClient(base_url=rig.url, timeout=20) as client:
        statuses: list[int] = []

        async def one() -> None:
            statuses.append((await client.post("/api/generate", json={"model": "tiny", "prompt": "x"})).status_code)

        async with anyio.create_task_group() as tasks:
            for _ in range(40):
                tasks.start_soon(one)
    assert statuses == [200] * 40


async def test_openai_and_anthropic_streams_have_their_ends() -> None:
    async with balanced(specs("a")) as rig, httpx.AsyncClient(base_url=rig.url) as client:
        openai = await client.post("/v1/chat/completions", json=chat(stream=True))
        anthropic = await client.post("/v1/messages", json=chat(stream=True, max_tokens=20))
    assert openai.text.endswith("data: [DONE]\n\n")
    assert "event: message_stop\n" in anthropic.text
