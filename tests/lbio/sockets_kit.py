"""What the tests of sockets share: the backends, connected pairs, a listener with an end, addresses that hang."""

import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import anyio
import pytest

from lbio.wire.streams import SocketListener, SocketStream, connect

BIG = bytes(range(256)) * 16384  # 4 MiB, more than any socket buffer here
BACKENDS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(
        ("asyncio", {"use_uvloop": True}),
        id="uvloop",
        marks=pytest.mark.skipif(sys.platform == "win32", reason="uvloop does not exist on Windows"),
    ),
    pytest.param(("trio", {}), id="trio"),
]


@contextlib.contextmanager
def pair() -> Iterator[tuple[SocketStream, SocketStream]]:
    left, right = (SocketStream(sock) for sock in socket.socketpair())
    try:
        yield left, right
    finally:
        left.close()
        right.close()


@contextlib.asynccontextmanager
async def listening(on_connection: Callable[[SocketStream], object]) -> AsyncIterator[SocketListener]:
    listener = await SocketListener.listen("127.0.0.1", 0)
    async with anyio.create_task_group() as group:
        group.start_soon(listener.accept_forever, on_connection)
        try:
            yield listener
        finally:
            listener.close()


@contextlib.asynccontextmanager
async def tcp_pair() -> AsyncIterator[tuple[SocketStream, SocketStream]]:
    accepted: list[SocketStream] = []
    arrived = anyio.Event()

    def on_connection(stream: SocketStream) -> None:
        accepted.append(stream)
        arrived.set()

    async with listening(on_connection) as listener:
        client = await connect(*listener.addresses[0])
        await arrived.wait()
        try:
            yield client, accepted[0]
        finally:
            client.close()
            accepted[0].close()


async def receive_all(stream: SocketStream) -> bytes:
    data = bytearray()
    with contextlib.suppress(anyio.EndOfStream):
        while True:
            data += await stream.receive()
    return bytes(data)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0


@contextlib.contextmanager
def black_hole(host: str, port: int) -> Iterator[None]:
    """An address that answers no SYN: its backlog is full."""
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        hole.bind((host, port))
        hole.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((host, port))
        time.sleep(0.01)  # let the kernel settle
        yield


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds. Raises TimeoutError after 5 s."""
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110  nothing else says when the other side of a socket is ready
            await anyio.sleep(0.005)
