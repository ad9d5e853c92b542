"""Clients and servers that send a great deal: nobody else is to notice."""

import contextlib
import gc
import logging
import socket
import threading
import tracemalloc
from collections.abc import Iterator

import anyio
import pytest

from tests.lbio.kit import LIMIT_S, Rig, balanced, client, scripted, specs
from tests.lbio.sockets_kit import until
from tests.simulator.wire import request

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_names_that_clients_make_up_are_shortened_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ollama_lb")
    async with balanced(specs("a")) as rig:
        await rig.send(request("POST", "/api/" + "p" * 10_000, {"model": "tiny"}, close=True), "POST")
        for length in (500, 100_000):
            await rig.ask("POST", "/api/show", {"model": "m" * length})
    told = [record.getMessage() for record in caplog.records]
    assert any("/api/ppp" in text for text in told)
    assert any("mmm" in text for text in told)
    assert max(map(len, told)) < 1000


async def test_bodies_count_as_they_come() -> None:
    async with scripted(limits={"body_bytes_max": "8KiB", "bodies_bytes_max": "8KiB"}) as (rig, _):
        async with client(rig) as one, client(rig) as other:
            head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            for unfinished in (one, other):
                await unfinished.send(head)
                await unfinished.send(b"1400\r\n" + b"a" * 0x1400 + b"\r\n")
            assert b"HTTP/1.1 503 " in await other.until(b"\r\n\r\n")
            assert rig.service.front.bodies.held <= 8192
            refused = await rig.ask("POST", "/api/chat", b"a" * 6000)
            assert (refused.status, refused.header("Retry-After")) == (503, "1")
        await until(lambda: rig.service.front.bodies.held == 0)


async def test_a_body_is_let_go_of_as_soon_as_it_is_answered() -> None:
    async with scripted(2) as (rig, servers):
        await rig.chat()
        gc.collect()
        gc.disable()  # cycles that refer to it would keep it until the next search for them
        tracemalloc.start()
        try:
            for _ in range(4):
                await rig.chat(content="a" * 1_000_000)
                for server in servers:
                    server.bodies.clear()
            await until(lambda: tracemalloc.get_traced_memory()[0] < 1_000_000)
        finally:
            tracemalloc.stop()
            gc.enable()


@contextlib.contextmanager
def flooding(rig: Rig, first: bytes, again: bytes) -> Iterator[None]:
    """A client that sends as fast as it can, and reads all answers, in threads of its own."""
    sock = socket.create_connection(rig.service.addresses[0])

    def send() -> None:
        with contextlib.suppress(OSError):
            sock.sendall(first)
            while True:
                sock.sendall(again)

    def receive() -> None:
        with contextlib.suppress(OSError):
            while sock.recv(1 << 20):
                pass

    threads = [threading.Thread(target=send), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        sock.close()


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000),
        (b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 10_000),
    ],
    ids=["pipelined", "tiny chunks"],
)
async def test_a_client_at_full_speed_does_not_hold_up_the_others(first: bytes, again: bytes) -> None:
    async with balanced(specs("a")) as rig:
        with flooding(rig, first, again):
            await anyio.sleep(0.2)
            for _ in range(3):
                with anyio.fail_after(0.5):
                    assert (await rig.ask("GET", "/")).status == 200


LARGE = b'{"model":"tiny","messages":["' + b"a" * (12 << 20) + b'"]}'  # more than sockets buffer


async def test_a_server_may_refuse_a_large_body_before_it_has_come() -> None:
    async with scripted() as (rig, (server,)):
        good, server.pieces = server.pieces, [b"HTTP/1.1 413 X\r\nContent-Length: 9\r\n\r\ntoo large"]
        server.reads_body, server.pause_s = False, LIMIT_S  # and keeps the connection
        with anyio.fail_after(LIMIT_S / 2):
            answer = await rig.ask("POST", "/api/chat", LARGE)
        assert (answer.status, answer.body) == (413, b"too large")
        server.reads_body, server.pieces, server.pause_s = True, good, 0
        assert (await rig.chat()).complete  # not on the connection that is in the midst of a body


async def test_a_large_body_arrives_whole_and_its_connection_is_used_again() -> None:
    async with scripted() as (rig, (server,)):
        used: list[object] = []
        for _ in range(2):
            assert (await rig.ask("POST", "/api/chat", LARGE)).complete
            (endpoint,) = rig.service.driver._endpoints.values()
            used += endpoint._idle
        assert server.bodies == [LARGE, LARGE]
        assert len(used) == 2
        assert used[0] is used[1]
