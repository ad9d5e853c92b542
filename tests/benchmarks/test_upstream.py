"""The servers of the I/O benchmarks say what a real Ollama said, at the pace that is asked for."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from benchmarks.captured import LAST, chunk, chunks, kept_alive, response
from benchmarks.upstream import Connection, Pace, Server, pace_of, stamp

FIXED = {
    "GET /": "root_get",
    "GET /api/version": "version",
    "GET /api/tags": "tags",
    "GET /api/ps": "ps_forever",
    "POST /api/show": "show",
    "GET /v1/models": "v1_models",
}


def _head(request: str, body: bytes = b"") -> bytes:
    return f"{request} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _without_times(answer: bytes) -> bytes:
    answer = re.sub(rb"Date: [^\r]+", b"Date: D", answer)
    answer = re.sub(rb'"created_at":"[^"]+"', b'"created_at":"T"', answer)
    return re.sub(rb'"eval_count":\d+', b'"eval_count":N', answer)


async def _answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    if b"chunked" in head:
        return head + await reader.readuntil(LAST)
    found = re.search(rb"Content-Length: (\d+)", head)
    assert found
    return head + await reader.readexactly(int(found[1]))


def _with_server(
    use: Callable[[Server, asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]],
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = Server(loop)
        listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        async with asyncio.timeout(10):
            await use(server, reader, writer)
        writer.close()
        listening.close()

    uvloop.run(main())


async def _until(came: Callable[[], bool]) -> None:
    while not came():  # noqa: ASYNC110  nothing tells
        await asyncio.sleep(0.001)


def test_small_answers_are_those_of_a_real_ollama_on_a_connection_that_stays_open() -> None:
    async def use(_: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for request, capture in FIXED.items():
            writer.write(_head(request))
            expected = (
                response(capture).replace(b"Connection: close\r\n", b"", 1).replace(b"\r\nConnection: close", b"", 1)
            )
            assert _without_times(await _answer(reader)) == _without_times(expected)

    _with_server(use)


def test_a_chat_has_the_lines_and_the_framing_of_a_real_ollama() -> None:
    async def use(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_head("POST /api/chat", Pace(3, 2, 2).body()))
        head, _, body = (await _answer(reader)).partition(b"\r\n\r\n")
        real_head, _, real_body = response("chat_stream_warm").partition(b"\r\n\r\n")
        assert _without_times(head) == _without_times(real_head).replace(b"Connection: close\r\n", b"")
        lines, real = chunks(body), chunks(real_body)
        assert [_without_times(line) for line in lines] == [_without_times(real[0])] * 3 + [_without_times(real[-1])]
        assert b'"eval_count":3,' in lines[-1]
        assert body == b"".join(map(chunk, lines)) + LAST
        assert server.stats() == {"connections": 1, "chats": 1, "tokens": 3, "complete": 1, "held": 0}

    _with_server(use)


def test_requests_in_one_read_and_requests_in_pieces_are_all_answered() -> None:
    async def use(_: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = _head("POST /api/show", b'{"model": "tiny"}')
        writer.write(request + request + request[:30])
        await _answer(reader)
        await _answer(reader)
        writer.write(request[30:-5])
        await asyncio.sleep(0)
        writer.write(request[-5:])
        assert (await _answer(reader)).startswith(b"HTTP/1.1 200 OK")

    _with_server(use)


def test_a_path_that_ollama_does_not_know_is_answered_with_300_bytes() -> None:
    async def use(_: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_head("GET /api/unknown-path"))
        answer = await _answer(reader)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert answer.endswith(b"\r\n\r\n" + b"." * 300)

    _with_server(use)


def test_a_stream_that_is_held_waits_before_its_first_token_and_after_it() -> None:
    async def use(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_head("POST /api/chat", Pace(2, hold=2).body()))
        await _until(lambda: server.stats()["held"] == 1)
        assert "tokens" not in server.stats()
        assert server.release() == 1
        await reader.readuntil(b"\n\r\n")
        assert (server.stats()["tokens"], server.stats()["held"]) == (1, 1)
        server.release()
        await reader.readuntil(LAST)
        assert server.stats()["tokens"] == 2

    _with_server(use)


def test_a_client_that_leaves_is_counted_and_gets_no_more() -> None:
    async def use(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_head("POST /api/chat", Pace(1000, 1, 1).body()))
        await reader.readuntil(b"\n\r\n")
        writer.close()
        await _until(lambda: server.stats().get("left") == 1)
        said = server.stats()["tokens"]
        await asyncio.sleep(0.01)
        assert server.stats()["tokens"] == said

    _with_server(use)


def test_what_a_chat_asks_for_is_read_from_its_options() -> None:
    assert pace_of(Pace(7, 20, 30, 2).body()) == Pace(7, 20, 30, 2)
    assert pace_of(json.dumps({"model": "tiny", "messages": []}).encode()) == Pace()


def test_moments_are_written_as_ollama_does() -> None:
    assert stamp(1_763_935_118_740_406_004) == b"2025-11-23T21:58:38.740406004Z"


@pytest.mark.parametrize("capture", FIXED.values())
def test_captured_answers_are_framed_right(capture: str) -> None:
    head, _, body = kept_alive(response(capture), "D").partition(b"\r\n\r\n")
    assert b"\r\nDate: D\r\n" in head + b"\r\n"
    assert b"Connection" not in head
    if b"chunked" in head:
        assert b"".join(map(chunk, chunks(body))) + LAST == body
    else:
        assert b"Content-Length: %d" % len(body) in head
