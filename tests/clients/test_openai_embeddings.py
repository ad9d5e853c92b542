"""`openai` from PyPI asks for embeddings; skipped where it is not installed."""

from typing import Any

import pytest

from simulator.fake_ollama import FakeModel
from tests.lbio.kit import balanced, specs

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.anyio

E5 = FakeModel("e5", size_bytes=1_000_000, capabilities=("embedding",), embedding_length=8)


@pytest.mark.parametrize("written", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
async def test_embeddings_divided_over_servers_are_those_of_one_server(written: dict[str, Any]) -> None:
    texts = [f"text {number}" for number in range(100)]
    async with balanced(specs("a", "b", models=(E5,), start_loaded=("e5",))) as rig:
        found = []
        for url in (rig.url, rig.fleet[0].url):
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                found.append(await client.embeddings.create(model="e5", input=texts, **written))
        assert rig.fleet[1].stats.requests["/v1/embeddings"] == 1
    assert [item.index for item in found[0].data] == list(range(100))
    assert [item.embedding for item in found[0].data] == [item.embedding for item in found[1].data]
    assert found[0].usage == found[1].usage


async def test_an_invalid_input_is_a_bad_request() -> None:
    async with balanced(specs("a", "b", models=(E5,), start_loaded=("e5",))) as rig:
        client = openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="invalid input"):
            await client.embeddings.create(model="e5", input=[[1, 2]] * 100)
        await client.close()
