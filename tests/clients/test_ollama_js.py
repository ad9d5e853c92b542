"""`ollama` from npm, under node. Found in $OLLAMA_NPM_DIR or in node_modules at the root: `npm install ollama`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest

from simulator.faults import Fault, FaultKind
from tests.lbio.kit import Rig, balanced, specs

ROOT = Path(__file__).parents[2]


def package() -> Path | None:
    """Where the package is, if it is."""
    given = os.environ.get("OLLAMA_NPM_DIR")
    places = [Path(given), Path(given) / "node_modules" / "ollama"] if given else []
    places.append(ROOT / "node_modules" / "ollama")
    return next((place for place in places if (place / "package.json").exists() and place.name == "ollama"), None)


pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(package() is None, reason="no npm package `ollama` in $OLLAMA_NPM_DIR or node_modules"),
]
SCRIPT = """
const {Ollama} = require(process.argv[1]);
const ollama = new Ollama({host: process.argv[2]});
const messages = [{role: 'user', content: 'hello'}];
async function collect(stream) { const all = []; for await (const part of stream) all.push(part); return all; }
(async () => {
  try { console.log(JSON.stringify(await (async () => { %s })())); }
  catch (error) { console.log(JSON.stringify({thrown: error.message, status: error.status_code})); }
})();
"""


async def node(rig: Rig, code: str) -> Any:
    found = package()
    with anyio.fail_after(20):
        done = await anyio.run_process(["node", "-e", SCRIPT % code, str(found), rig.url])
    return json.loads(done.stdout)


async def run(code: str, *faults: Fault) -> Any:
    async with balanced(specs("a"), race={"racers_max": 1}) as rig:
        rig.fleet[0].set_fault(*faults)
        return await node(rig, code)


async def test_list_ps_and_show() -> None:
    found = await run("return [await ollama.list(), await ollama.ps(), await ollama.show({model: 'tiny'})]")
    assert [model["name"] for model in found[0]["models"] + found[1]["models"]] == ["tiny:latest"] * 2
    assert "completion" in found[2]["capabilities"]


async def test_chat() -> None:
    assert (await run("return await ollama.chat({model: 'tiny', messages})"))["done"] is True


async def test_chat_streamed() -> None:
    parts = await run("return await collect(await ollama.chat({model: 'tiny', messages, stream: true}))")
    assert [part["done"] for part in parts] == [False] * 8 + [True]


async def test_generate() -> None:
    assert (await run("return await ollama.generate({model: 'tiny', prompt: 'hello'})"))["response"]


async def test_an_unknown_model_is_thrown() -> None:
    thrown = await run("return await ollama.chat({model: 'nosuch', messages})")
    assert thrown == {"thrown": "model 'nosuch' not found", "status": 404}


@pytest.mark.parametrize("kind", [FaultKind.CUT_MIDSTREAM, FaultKind.END_MIDSTREAM, FaultKind.ERROR_MIDSTREAM])
async def test_a_broken_stream_is_thrown_with_its_error(kind: FaultKind) -> None:
    thrown = await run(
        "return await collect(await ollama.chat({model: 'tiny', messages, stream: true}))", Fault(kind, after_tokens=3)
    )
    assert "JSON" not in thrown["thrown"]
    assert thrown["thrown"]


async def test_an_aborted_stream_frees_the_server() -> None:
    code = """
    const stream = await ollama.chat({model: 'tiny', messages, stream: true});
    for await (const part of stream) { stream.abort(); break; }
    return 'left';
    """
    async with balanced(specs("a", token_ms=20, tokens=500)) as rig:
        assert await node(rig, code) == "left"
        assert rig.fleet[0].stats.aborted == 1
