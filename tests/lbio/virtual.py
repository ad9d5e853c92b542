"""The whole HTTP path in virtual time: balancer and fake servers over streams in memory, under trio's MockClock.

Whenever every task waits, the clock jumps to the next moment at which one of them goes on: an hour takes no time, and
what takes 60 s takes exactly 60 s. Nothing here costs time unless it sleeps: the network has no latency.
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence, Sized
from typing import Any

import anyio
import anyio.lowlevel
import trio
import trio.testing
from anyio.abc import SocketAttribute

from lbcore.records import Server
from lbio.config_file import parse
from lbio.service import Service, start
from lbio.wire.streams import RECEIVE_BYTES, Network, Stream
from simulator.fake_ollama import FakeSpec
from simulator.serve import FakeServer, now_ns, serve_fleet
from tests.lbio.kit import chat_request, length_of, merged
from tests.simulator.wire import Answer
from tests.simulator.wire import parse as parse_answer

HOST = "127.0.0.1"
ROOM_BYTES = 65536
"""What a stream holds of what its owner has not read, as the buffers of two sockets do."""
DAY_S = 86_400
"""No story lasts longer; one that would waits for something that never comes."""

Story = Callable[[], Awaitable[None]]


def in_virtual_time(story: Story) -> Callable[[], None]:
    """Make a test of a story: the clock begins at 0 and jumps."""

    @functools.wraps(story)
    def test() -> None:
        async def bounded() -> None:
            with anyio.fail_after(DAY_S):
                await story()

        clock = trio.testing.MockClock(autojump_threshold=0)
        anyio.run(bounded, backend="trio", backend_options={"clock": clock})

    del test.__wrapped__  # pytest is to see a plain function
    return test


# --- the network -------------------------------------------------------------------------------------------------


class MemoryStream(Stream):
    """One end of a connection; closing it with unread input is a reset, which destroys what is under way."""

    def __init__(self, here: tuple[str, int], there: tuple[str, int], room_bytes: int) -> None:
        self.here = here
        self.there = there
        self.peer: MemoryStream = self  # until `pair`
        self.closed = False
        self._room_bytes = room_bytes
        self._inbox = bytearray()
        self._ended = False  # the peer sends no more
        self._is_reset = False
        self._changed = anyio.Event()

    def __repr__(self) -> str:
        return f"<MemoryStream {self.here[1]} to {self.there[1]} {'closed' if self.closed else 'open'}>"

    async def receive(self, max_bytes: int = RECEIVE_BYTES) -> bytes:
        await anyio.lowlevel.checkpoint()
        while True:
            self._check()
            if self._inbox:
                data = bytes(self._inbox[:max_bytes])
                del self._inbox[:max_bytes]
                self.peer._wake()
                return data
            if self._ended:
                raise anyio.EndOfStream
            await self._changed.wait()

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        while item:
            self._check()
            if self.peer.closed:
                raise anyio.BrokenResourceError("the peer has closed")
            room = self._room_bytes - len(self.peer._inbox)
            if room > 0:
                self.peer._inbox += item[:room]
                self.peer._wake()
                item = item[room:]
            else:
                await self._changed.wait()

    async def send_eof(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._check()
        self.peer._end(reset=False)

    async def aclose(self) -> None:
        self.close()
        await anyio.lowlevel.checkpoint()

    def close(self) -> None:
        self._close(reset=bool(self._inbox))

    def abort(self) -> None:
        self._close(reset=True)

    def _close(self, *, reset: bool) -> None:
        if not self.closed:
            self.closed = True
            self._wake()
            self.peer._end(reset=reset)

    def _end(self, *, reset: bool) -> None:
        self._ended = True
        self._is_reset = self._is_reset or reset
        self._wake()

    def _check(self) -> None:
        if self.closed:
            raise anyio.ClosedResourceError
        if self._is_reset:
            raise anyio.BrokenResourceError("reset by the peer")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {
            SocketAttribute.local_address: lambda: self.here,
            SocketAttribute.remote_address: lambda: self.there,
        }


class MemoryListener:
    """Where connections arrive."""

    def __init__(self, net: "MemoryNetwork", port: int) -> None:
        self.addresses = [(HOST, port)]
        self.closed = False
        self._net = net
        self._waiting: deque[MemoryStream] = deque()
        self._changed = anyio.Event()

    def knock(self, stream: MemoryStream) -> None:
        self._waiting.append(stream)
        self._changed.set()

    async def accept_forever(self, on_connection: Callable[[Stream], object]) -> None:
        while not self.closed:
            while self._waiting:
                on_connection(self._waiting.popleft())
            self._changed = anyio.Event()
            await self._changed.wait()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._changed.set()
            del self._net.listeners[self.addresses[0][1]]
            for stream in self._waiting:
                stream.abort()


class MemoryNetwork:
    """One machine's ports."""

    def __init__(self) -> None:
        self.listeners: dict[int, MemoryListener] = {}
        self.silent: set[int] = set()  # ports whose machine is off: nobody answers
        self.streams: list[MemoryStream] = []  # of those who connected
        self.as_network = Network(self.connect, self.listen)
        self._ports = itertools.count(20_001)

    async def listen(self, host: str, port: int) -> MemoryListener:
        await anyio.lowlevel.checkpoint()
        port = port or next(self._ports)
        if port in self.listeners:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        listener = self.listeners[port] = MemoryListener(self, port)
        return listener

    async def connect(self, host: str, port: int, *, room_bytes: int = ROOM_BYTES) -> MemoryStream:
        await anyio.lowlevel.checkpoint()
        if port in self.silent:
            await anyio.sleep_forever()
        listener = self.listeners.get(port)
        if listener is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        here, there = (HOST, next(self._ports)), (HOST, port)
        near, far = MemoryStream(here, there, room_bytes), MemoryStream(there, here, room_bytes)
        near.peer, far.peer = far, near
        self.streams.append(near)
        listener.knock(far)
        return near

    def open_to(self, port: int) -> int:
        """How many connections to a port have not been closed by both sides."""
        return sum(1 for s in self.streams if s.there[1] == port and not (s.closed and s.peer.closed))


# --- what stands on it -------------------------------------------------------------------------------------------


class Caller:
    """A client's connection to the balancer."""

    def __init__(self, stream: MemoryStream) -> None:
        self.stream = stream
        self.data = bytearray()

    async def send(self, data: bytes) -> None:
        await self.stream.send(data)

    async def until(self, text: bytes) -> bytes:
        """Read until `text` has come; what came up to and with it, which is then forgotten."""
        while text not in self.data:
            self.data += await self.stream.receive()
        end = self.data.index(text) + len(text)
        found = bytes(self.data[:end])
        del self.data[:end]
        return found

    async def rest(self) -> bytes:
        """Read to the end."""
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                self.data += await self.stream.receive()
        return bytes(self.data)

    async def get(self, path: str) -> bytes:
        """Ask for something that is answered with a length, and keep the connection; its body."""
        await self.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        length = length_of(await self.until(b"\r\n\r\n"))
        while len(self.data) < length:
            self.data += await self.stream.receive()
        body = bytes(self.data[:length])
        del self.data[:length]
        return body


@dataclasses.dataclass
class Rig:
    """A running balancer and the servers behind it."""

    net: MemoryNetwork
    service: Service
    fleet: list[FakeServer]

    @property
    def port(self) -> int:
        return self.service.addresses[0][1]

    @property
    def n_requests(self) -> int:
        return self.service.driver.n_requests

    def fake(self, name: str) -> FakeServer:
        return next(server for server in self.fleet if server.spec.name == name)

    def server(self, name: str) -> Server:
        """What the core knows of a server."""
        found = self.service.driver.balancer.fleet.by_name(name)
        assert found is not None
        return found

    async def connect(self, *, room_bytes: int = ROOM_BYTES) -> Caller:
        return Caller(await self.net.connect(HOST, self.port, room_bytes=room_bytes))

    async def chat(self, **fields: Any) -> Answer:
        """A chat on a connection of its own."""
        caller = await self.connect()
        try:
            await caller.send(chat_request(**fields))
            return parse_answer(await caller.rest(), "POST")
        finally:
            caller.stream.close()

    async def get(self, path: str) -> bytes:
        caller = await self.connect()
        try:
            return await caller.get(path)
        finally:
            caller.stream.close()

    async def wait_for(self, condition: Callable[[], bool], *, every_s: float = 0.01) -> float:
        """Wait until something is so; how long that took."""
        began_s = anyio.current_time()
        while not condition():  # noqa: ASYNC110  what is waited for tells nobody, and a look costs no time
            await anyio.sleep(every_s)
        return anyio.current_time() - began_s

    def left_overs(self) -> list[str]:
        """What is still there although nobody asks for anything."""
        driver, ledger = self.service.driver, self.service.driver.balancer.ledger
        kept: dict[str, Sized] = {
            "requests": ledger.requests,
            "attempts": ledger.attempts,
            "queued": ledger.queue,
            "exchanges": driver._exchanges,
            "runs": driver._runs,
            "client connections": self.service.front.connections,
        }
        return [f"{what}: {left}" for what, left in kept.items() if len(left)]


@contextlib.asynccontextmanager
async def virtual(fakes: Sequence[FakeSpec], **config: Any) -> AsyncIterator[Rig]:
    """Run these servers and a balancer with production's defaults in front of them; the first probes have ended."""
    net = MemoryNetwork()
    async with serve_fleet(fakes, net.as_network) as fleet:
        servers = [{"url": server.url, "name": server.spec.name, "slots": server.spec.num_parallel} for server in fleet]
        base = {"listen": f"{HOST}:0", "seed": 1, "log": {"level": "error"}, "servers": servers}
        async with start(parse(merged(base, config)), clock=now_ns, network=net.as_network) as service:
            await service.driver.wait_probed(lambda s: s.last_sync_ns is None and s.probe_failures == 0)
            yield Rig(net, service, fleet)


def tasks_living() -> int:
    """How many tasks there are."""
    return trio.lowlevel.current_statistics().tasks_living


def took(began_s: float) -> float:
    """How long ago that was."""
    return anyio.current_time() - began_s
