"""`ollama` from npm, under node. Found in $OLLAMA_NPM_DIR or in node_modules at the root: `npm install ollama`."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from simulator.fake_ollama import FakeSpec
from simulator.faults import Fault, FaultKind
from tests.clients.kit import WEATHER, able, fleet
from tests.lbio.kit import Rig

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
const model = 'tiny', stream = true, parameters = %s;
const tools = [{type: 'function', function: {name: 'weather', description: '', parameters}}];
async function collect(stream) { const all = []; for await (const part of stream) all.push(part); return all; }
const tell = found => console.log(JSON.stringify(found === undefined ? null : found));
(async () => {
  try { tell(await (async () => { %s })()); }
  catch (error) { tell({thrown: error.message, status: error.status_code}); }
})();
"""


async def node(rig: Rig, code: str) -> Any:
    script = SCRIPT % (json.dumps(WEATHER["parameters"]), code)
    with anyio.fail_after(20):
        done = await anyio.run_process(["node", "-e", script, str(package()), rig.url])
    return json.loads(done.stdout.splitlines()[-1])  # the package writes there as well


async def run(code: str, *faults: Fault, specs: Sequence[FakeSpec] = ()) -> Any:
    async with fleet(specs, *faults) as rig:
        return await node(rig, code)


# --- generating ----------------------------------------------------------------------------------------------------


async def test_a_chat_is_answered() -> None:
    answer = await run("return await ollama.chat({model, messages})")
    assert answer["done"] is True
    assert answer["message"]["content"]


async def test_a_chat_streams_token_by_token() -> None:
    parts = await run("return await collect(await ollama.chat({model, messages, stream}))")
    assert [part["done"] for part in parts] == [False] * 8 + [True]


async def test_a_chat_calls_the_tool_that_it_is_offered() -> None:
    parts = await run("return await collect(await ollama.chat({model, messages, tools, stream}))")
    (call,) = [call for part in parts for call in part["message"].get("tool_calls", [])]
    assert (call["function"]["name"], set(call["function"]["arguments"])) == ("weather", {"city", "days"})


async def test_a_chat_about_an_image_is_answered() -> None:
    code = """
    const image = new Uint8Array([137, 80, 78, 71]);
    return await ollama.chat({model, messages: [{role: 'user', content: 'what is it?', images: [image]}]});
    """
    assert (await run(code))["message"]["content"]


async def test_a_chat_gives_its_thoughts_apart_from_its_text() -> None:
    message = (await run("return await ollama.chat({model, messages, think: true})"))["message"]
    assert message["thinking"]
    assert message["content"]


async def test_a_chat_answers_in_the_format_that_is_wanted() -> None:
    message = (await run("return await ollama.chat({model, messages, format: parameters})"))["message"]
    assert set(json.loads(message["content"])) == {"city", "days"}


async def test_a_chat_gives_the_logarithms_of_probabilities() -> None:
    answer = await run("return await ollama.chat({model, messages, logprobs: true, top_logprobs: 2})")
    assert [len(each["top_logprobs"]) for each in answer["logprobs"]] == [2] * 8


async def test_options_reach_the_server() -> None:
    answer = await run("return await ollama.chat({model, messages, options: {num_predict: 3}})")
    assert (answer["eval_count"], answer["done_reason"]) == (3, "length")


async def test_a_prompt_is_completed() -> None:
    assert (await run("return await ollama.generate({model, prompt: 'hello', suffix: '}'})"))["response"]


async def test_a_completion_streams_token_by_token() -> None:
    parts = await run("return await collect(await ollama.generate({model, prompt: 'hello', stream}))")
    assert [part["done"] for part in parts] == [False] * 8 + [True]


async def test_texts_are_embedded() -> None:
    code = """
    const {embeddings} = await ollama.embed({model, input: ['hello', 'world']});
    const {embedding} = await ollama.embeddings({model, prompt: 'hello'});
    return [...embeddings, embedding].map(vector => vector.length);
    """
    assert await run(code) == [16, 16, 16]


async def test_a_model_is_loaded_and_unloaded() -> None:
    code = """
    const load = await ollama.generate({model, prompt: '', keep_alive: 60});
    const unload = await ollama.generate({model, prompt: '', keep_alive: 0});
    return [load.done_reason, unload.done_reason];
    """
    assert await run(code, specs=able(start_loaded=())) == ["load", "unload"]


# --- looking -------------------------------------------------------------------------------------------------------


async def test_models_are_listed_once_on_disk_and_in_memory() -> None:
    found = await run("return [await ollama.list(), await ollama.ps()]")
    assert [[model["name"] for model in each["models"]] for each in found] == [["tiny:latest"]] * 2


async def test_a_model_is_shown() -> None:
    assert "tools" in (await run("return await ollama.show({model})"))["capabilities"]


async def test_the_version_is_told() -> None:
    assert (await run("return await ollama.version()"))["version"]


# --- managing ------------------------------------------------------------------------------------------------------


async def names(code: str) -> tuple[Any, list[set[str]]]:
    """What a script gives, and what each server has on its disk then."""
    async with fleet() as rig:
        found = await node(rig, code)
        return found, [{model.name for model in server.live.fake.disk.values()} for server in rig.fleet]


async def test_a_model_is_pulled_onto_every_server() -> None:
    parts, found = await names("return await collect(await ollama.pull({model: 'new', stream}))")
    assert parts[-1]["status"] == "success"
    assert found == [{"tiny:latest", "new:latest"}] * 2


async def test_a_model_is_pushed() -> None:
    parts, _ = await names("return await collect(await ollama.push({model, stream}))")
    assert parts[-1]["status"] == "success"


async def test_a_model_is_made_of_another_on_every_server() -> None:
    told, found = await names("return await ollama.create({model: 'mario', from: 'tiny', system: 'You are Mario.'})")
    assert told["status"] == "success"
    assert found == [{"tiny:latest", "mario:latest"}] * 2


async def test_a_model_is_copied_on_every_server() -> None:
    _, found = await names("return await ollama.copy({source: 'tiny', destination: 'twin'})")
    assert found == [{"tiny:latest", "twin:latest"}] * 2


async def test_a_model_is_deleted_on_every_server() -> None:
    _, found = await names("return await ollama.delete({model})")
    assert found == [set()] * 2


# --- what is not the server's to answer ----------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["webSearch({query: 'x'})", "webFetch({url: 'https://ollama.com'})"])
async def test_the_web_is_asked_at_ollama_com_and_never_here(call: str) -> None:
    code = """
    globalThis.asked = '';
    const own = new Ollama({host: process.argv[2], fetch: async url => { asked = url; throw new Error('not here'); }});
    try { await own.%s; } catch (error) {}
    return asked;
    """
    assert str(await run(code % call)).startswith("https://ollama.com/api/web_")


async def test_a_path_that_no_server_knows_is_the_servers_own_404() -> None:
    code = "return await ollama.systemone({model, state: 'text', questions: {q: {type: 'noul', instructions: '?'}}})"
    assert (await run(code))["status"] == 404


# --- what goes wrong -----------------------------------------------------------------------------------------------


async def test_an_unknown_model_is_thrown() -> None:
    thrown = await run("return await ollama.chat({model: 'nosuch', messages})")
    assert thrown == {"thrown": "model 'nosuch' not found", "status": 404}


@pytest.mark.parametrize("kind", [FaultKind.CUT_MIDSTREAM, FaultKind.END_MIDSTREAM, FaultKind.ERROR_MIDSTREAM])
async def test_a_broken_stream_is_thrown_with_its_error(kind: FaultKind) -> None:
    thrown = await run(
        "return await collect(await ollama.chat({model, messages, stream}))", Fault(kind, after_tokens=3)
    )
    assert "JSON" not in thrown["thrown"]
    assert thrown["thrown"]


async def test_an_aborted_stream_frees_the_server() -> None:
    code = """
    const stream = await ollama.chat({model: 'tiny', messages, stream: true});
    for await (const part of stream) { stream.abort(); break; }
    return 'left';
    """
    async with fleet(able("a", token_ms=20, tokens=500)) as rig:
        assert await node(rig, code) == "left"
        assert rig.fleet[0].stats.aborted == 1


HERE = Path(__file__).read_text(encoding="utf-8")


async def test_every_method_of_the_client_is_told_of_here() -> None:
    """A new one is noticed when the package is updated."""
    code = """
    const all = [];
    for (let each = ollama; each !== Object.prototype; each = Object.getPrototypeOf(each))
      all.push(...Object.getOwnPropertyNames(each).filter(name => typeof each[name] === 'function'));
    return [...new Set(all)].filter(name => name !== 'constructor' && name !== 'fetch');
    """
    inner = {"processStreamableRequest", "encodeImage", "fileExists", "abort"}
    methods = set(await run(code)) - inner
    assert {name for name in methods if not any(f"{how}{name}(" in HERE for how in ("ollama.", '"'))} == set()
