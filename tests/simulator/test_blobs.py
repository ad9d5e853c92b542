"""Blobs on a fake server: uploaded, asked for, and made into a model."""

import hashlib
import tracemalloc
from typing import Any

import anyio
import pytest

from simulator.fake_ollama import FakeModel, FakeSpec
from simulator.serve import serve_fleet
from tests.simulator.wire import ask, body_of, connect, exchange, parse, receive_all, request

pytestmark = pytest.mark.anyio

SPEC = FakeSpec("x", models=(FakeModel("tiny"),), load_ms=5)
MIB = 1 << 20


def path_of(blob: bytes) -> str:
    return f"/api/blobs/sha256:{hashlib.sha256(blob).hexdigest()}"


async def test_a_blob_is_there_once_it_was_uploaded_even_after_a_restart() -> None:
    async with serve_fleet([SPEC]) as (server,):
        path = path_of(b"one")
        assert (await ask(server.url, "HEAD", path)).status == 404
        assert (await ask(server.url, "POST", path, b"one")).status == 201
        assert (await ask(server.url, "HEAD", path)).status == 200
        assert (await ask(server.url, "POST", path, b"one")).status == 200
        await server.stop()
        await server.start()
        assert (await ask(server.url, "HEAD", path)).status == 200


@pytest.mark.parametrize("method", ["HEAD", "POST"])
async def test_what_is_no_digest_is_refused(method: str) -> None:
    async with serve_fleet([SPEC]) as (server,):
        answer = await ask(server.url, method, "/api/blobs/sha256:12", b"x")
    assert answer.status == 400
    assert method == "HEAD" or body_of(answer) == {"error": "invalid digest format"}


async def test_a_post_without_a_body_is_an_empty_blob() -> None:
    async with serve_fleet([SPEC]) as (server,):
        assert (await ask(server.url, "POST", path_of(b""))).status == 201


async def test_other_methods_and_deeper_paths_are_refused() -> None:
    async with serve_fleet([SPEC]) as (server,):
        answer = await ask(server.url, "PUT", path_of(b"x"), b"x")
        assert (answer.status, answer.header("Allow")) == (405, "HEAD, POST")
        assert (await ask(server.url, "POST", path_of(b"x") + "/y", b"x")).status == 404


async def test_a_large_blob_is_counted_and_not_held() -> None:
    piece = bytes(MIB)
    sha = hashlib.sha256()
    for _ in range(32):
        sha.update(piece)
    head = f"POST /api/blobs/sha256:{sha.hexdigest()} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    async with serve_fleet([SPEC]) as (server,), await connect(server.url) as stream:
        await stream.send(f"{head}Content-Length: {32 * MIB}\r\n\r\n".encode())
        tracemalloc.start()
        for _ in range(32):
            await stream.send(piece)
        answer = parse(await receive_all(stream))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert server.live.fake.blobs == {f"sha256:{sha.hexdigest()}": 32 * MIB}
    assert answer.status == 201
    assert peak < 4 * MIB


async def test_who_sends_what_is_there_gets_the_answer_before_the_body_and_then_an_end() -> None:
    async with serve_fleet([SPEC]) as (server,):
        path = path_of(b"one")
        await ask(server.url, "POST", path, b"one")
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
        with anyio.fail_after(5):
            raw = await exchange(server.url, head.encode())
        assert raw.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nConnection: close\r\n" in raw


async def test_a_chunked_blob_after_100_continue() -> None:
    async with serve_fleet([SPEC]) as (server,):
        head = request("POST", path_of(b"abcdef"))[:-2]
        head += b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
        async with await connect(server.url) as stream:
            await stream.send(head)
            assert await stream.receive() == b"HTTP/1.1 100 Continue\r\n\r\n"
            await stream.send(b"2\r\nab\r\n4\r\ncdef\r\n0\r\n\r\n")
            assert parse(await receive_all(stream)).status == 201


def files(*blobs: bytes) -> dict[str, Any]:
    names = {f"{i}.gguf": path_of(blob).rpartition("/")[2] for i, blob in enumerate(blobs)}
    return {"model": "made", "files": names, "system": "Be brief."}


async def test_a_model_is_made_of_files() -> None:
    async with serve_fleet([SPEC]) as (server,):
        await ask(server.url, "POST", path_of(b"weights"), b"weights")
        answer = await ask(server.url, "POST", "/api/create", files(b"weights"))
        tags = body_of(await ask(server.url, "GET", "/api/tags"))
    stages = [line["status"].split(" sha256")[0] for line in answer.lines]
    assert stages[:3] == ["parsing GGUF", "using existing layer", "creating new layer"]
    assert stages[3:] == ["using existing layer", "writing manifest", "success"]
    assert {"made:latest": 7}.items() <= {model["name"]: model["size"] for model in tags["models"]}.items()


@pytest.mark.parametrize(("stream", "status"), [(True, 200), (False, 500)])
async def test_a_model_of_files_that_were_not_uploaded_is_refused_in_ollamas_words(stream: bool, status: int) -> None:
    async with serve_fleet([SPEC]) as (server,):
        answer = await ask(server.url, "POST", "/api/create", {**files(b"weights"), "stream": stream})
    told = answer.lines[-1] if stream else body_of(answer)
    path = path_of(b"weights").rpartition("/")[2].replace(":", "-")
    assert (answer.status, told) == (status, {"error": f"open /models/blobs/{path}: no such file or directory"})
