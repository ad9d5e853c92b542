"""curl, as in the README, and as people debug with it."""

import json
import shutil
import subprocess

import anyio
import pytest

from tests.lbio.kit import balanced, specs
from tests.simulator.wire import chat

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")]


async def curl(*args: str) -> subprocess.CompletedProcess[bytes]:
    return await anyio.run_process(["curl", "-sS", "-m", "15", *args], check=False)


async def test_a_chat_streams() -> None:
    async with balanced(specs("a")) as rig:
        done = await curl("-N", f"{rig.url}/api/chat", "-d", json.dumps(chat()))
    assert done.returncode == 0
    assert [json.loads(line)["done"] for line in done.stdout.splitlines()] == [False] * 8 + [True]


async def test_http_1_0() -> None:
    async with balanced(specs("a")) as rig:
        done = await curl("--http1.0", f"{rig.url}/api/chat", "-d", json.dumps(chat()))
    assert done.returncode == 0
    assert done.stdout.count(b"\n") == 9


async def test_a_large_body_with_an_expectation() -> None:
    async with balanced(specs("a")) as rig:
        body = json.dumps(chat(content="x" * 2_000_000, stream=False))
        done = await anyio.run_process(
            ["curl", "-sS", "-m", "15", "-H", "Expect: 100-continue", f"{rig.url}/api/chat", "--data-binary", "@-"],
            input=body.encode(),
            check=False,
        )
    assert done.returncode == 0
    assert json.loads(done.stdout)["done"] is True


async def test_head() -> None:
    async with balanced(specs("a")) as rig:
        done = await curl("-I", rig.url)
    assert done.stdout.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_several_over_one_connection() -> None:
    async with balanced(specs("a")) as rig:
        done = await curl(f"{rig.url}/", f"{rig.url}/api/version", f"{rig.url}/", "-w", "%{num_connects}")
    assert done.stdout == b'Ollama is running1{"version":"0.12.6"}0Ollama is running0'


async def test_an_unknown_model_fails_with_its_status() -> None:
    async with balanced(specs("a")) as rig:
        done = await curl("-f", f"{rig.url}/api/chat", "-d", json.dumps(chat(model="nosuch")))
    assert done.returncode == 22


async def test_the_status_table() -> None:
    async with balanced(specs("a")) as rig:
        done = await curl("-H", "Accept: text/plain", f"{rig.url}/status")
    assert done.stdout.startswith(b"SERVER")
