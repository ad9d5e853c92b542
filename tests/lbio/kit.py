"""What the tests of the whole I/O layer share: a fleet with a balancer before it, scripted servers, clients."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import anyio

from lbcore.records import Server
from lbio.config_file import parse
from lbio.http1 import Reader, parse_request_head
from lbio.service import Service, start
from lbio.wire.streams import SocketListener, SocketStream
from simulator.fake_ollama import FakeModel, FakeSpec
from simulator.serve import FakeServer, serve_fleet
from tests.simulator.wire import Answer, ask, chat, connect, request
from tests.simulator.wire import parse as parse_answer

TINY = FakeModel("tiny", size_bytes=1_000_000)
FAST = FakeSpec("a", models=(TINY,), start_loaded=("tiny",), first_token_ms=2, token_ms=0.5, load_ms=5, tokens=8)
LIMIT_S = 10
"""No test takes longer; one that would has hung."""

QUIET: dict[str, Any] = {
    "listen": "127.0.0.1:0",
    "seed": 1,
    "drain_timeout": "2s",
    "log": {"level": "error"},
    "probe": {"interval": "60s", "interval_dead": "50ms", "interval_dead_max": "100ms", "timeout": "500ms"},
}


def specs(*names: str, **fields: Any) -> list[FakeSpec]:
    """Fast servers of these names which have `tiny` loaded."""
    return [dataclasses.replace(FAST, name=name, **fields) for name in names]


def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged, other values replaced."""
    result = dict(base)
    for key, value in more.items():
        before = result.get(key)
        result[key] = merged(before, value) if isinstance(value, dict) and isinstance(before, dict) else value
    return result


@dataclasses.dataclass
class Rig:
    """A running balancer and the servers behind it."""

    service: Service
    fleet: list[FakeServer]

    @property
    def url(self) -> str:
        return self.service.url

    def server(self, name: str) -> Server:
        """What the core knows of a server."""
        found = self.service.driver.balancer.fleet.by_name(name)
        assert found is not None
        return found

    def healths(self) -> dict[str, float]:
        return {server.name: server.health for server in self.service.driver.balancer.fleet}

    async def ask(self, method: str, path: str, body: object = None) -> Answer:
        with anyio.fail_after(LIMIT_S):
            return await ask(self.url, method, path, body)

    async def chat(self, **fields: Any) -> Answer:
        return await self.ask("POST", "/api/chat", chat(**fields))

    async def send(self, raw: bytes, method: str = "GET") -> Answer:
        """Send bytes as they are; the answer, when the balancer has closed."""
        return parse_answer(await self.exchange([raw]), method)

    async def exchange(self, pieces: Iterable[bytes], *, pause_s: float = 0) -> bytes:
        """Send the pieces one by one; all that comes until the balancer closes."""
        data = bytearray()

        async def receive(stream: anyio.abc.ByteStream) -> None:
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                while True:
                    data.extend(await stream.receive())

        with anyio.fail_after(LIMIT_S):
            async with await connect(self.url) as stream, anyio.create_task_group() as group:
                group.start_soon(receive, stream)
                for piece in pieces:
                    with contextlib.suppress(anyio.BrokenResourceError):
                        await stream.send(piece)
                    await anyio.sleep(pause_s)
        return bytes(data)

    @property
    def n_requests(self) -> int:
        return self.service.driver.n_requests

    def queued(self) -> int:
        return len(self.service.driver.balancer.ledger.queue)


@contextlib.asynccontextmanager
async def balanced(fakes: Sequence[FakeSpec], *, warm: bool = True, **config: Any) -> AsyncIterator[Rig]:
    """Run these servers and a balancer in front of them; `warm`: the first probes have ended."""
    async with serve_fleet(fakes) as fleet:
        servers = [{"url": server.url, "name": server.spec.name} for server in fleet]
        async with before(servers, warm=warm, **config) as service:
            yield Rig(service, fleet)


@contextlib.asynccontextmanager
async def before(servers: Sequence[Mapping[str, Any]], *, warm: bool = True, **config: Any) -> AsyncIterator[Service]:
    """Run a balancer in front of servers that are there already."""
    extra = config.pop("server", {})
    app = parse(merged({**QUIET, "servers": [{**server, **extra} for server in servers]}, config))
    async with start(app) as service:
        if warm:
            await first_probes(service)
        yield service


async def first_probes(service: Service) -> None:
    with anyio.fail_after(LIMIT_S):
        await service.driver.wait_probed(lambda s: s.last_sync_ns is None and s.probe_failures == 0)


# --- a server whose every byte is written in the test --------------------------------------------------------

PROBES = {
    "/api/version": b'{"version":"0.9.0"}',
    "/api/tags": b'{"models":[{"name":"tiny:latest"}]}',
    "/api/ps": b'{"models":[{"name":"tiny:latest"}]}',
}
NDJSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"


def line(text: str, *, done: bool = False) -> bytes:
    """One line of a chat's stream."""
    ending = b"true" if done else b"false"
    return b'{"model":"tiny","message":{"role":"assistant","content":"%s"},"done":%s}\n' % (text.encode(), ending)


STREAM = [line("one"), line("two"), line("three"), line("", done=True)]


def chunked(pieces: Sequence[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


class Scripted:
    """Answers probes as an Ollama, and anything else with `pieces`, each in a write of its own."""

    def __init__(self) -> None:
        self.pieces: Sequence[bytes] = [NDJSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(STREAM)]
        self.pause_s = 0.0
        self.close = False  # after the answer
        self.reads_body = True
        self.heads: list[bytes] = []  # of what was asked, probes apart
        self.bodies: list[bytes] = []
        self.probes: list[bytes] = []
        self.written = 0  # bytes of answers, as far as the socket took them
        self.closed_by_peer = 0
        self.url = ""

    async def serve(self, stream: SocketStream) -> None:
        try:
            reader = Reader(stream)
            while (raw := await reader.read_head(1 << 20, role="request")) is not None:
                head = parse_request_head(raw)
                if head.path in PROBES:
                    self.probes.append(bytes(raw))
                    body = PROBES[head.path]
                    await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                    continue
                self.heads.append(bytes(raw))
                self.bodies.append(bytes(await reader.read_body(head, None)) if self.reads_body else b"")
                for piece in self.pieces:
                    await stream.send(piece)
                    self.written += len(piece)
                    await anyio.sleep(self.pause_s)
                if self.close:
                    break
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            self.closed_by_peer += 1
        finally:
            stream.close()

    def headers(self) -> list[tuple[str, str]]:
        """Those of the last request, names in lower case."""
        lines = self.heads[-1].decode().rstrip("\r\n").split("\r\n")[1:]
        return [(name.lower(), value.strip()) for name, _, value in (text.partition(":") for text in lines)]


class Upstream(Protocol):
    """What a test plays for a server."""

    url: str

    async def serve(self, stream: SocketStream) -> None: ...


UpstreamT = TypeVar("UpstreamT", bound=Upstream)


@contextlib.asynccontextmanager
async def scripted(n: int = 1, **config: Any) -> AsyncIterator[tuple[Rig, list[Scripted]]]:
    """Run a balancer in front of `n` scripted servers called s0, s1, …"""
    async with played([Scripted() for _ in range(n)], **config) as (rig, servers):
        yield rig, servers


@contextlib.asynccontextmanager
async def played(servers: list[UpstreamT], **config: Any) -> AsyncIterator[tuple[Rig, list[UpstreamT]]]:
    """Run a balancer in front of these servers, which are called s0, s1, …"""
    async with anyio.create_task_group() as tasks:
        for server in servers:
            listener = await SocketListener.listen("127.0.0.1", 0)
            server.url = f"http://127.0.0.1:{listener.addresses[0][1]}"
            tasks.start_soon(_accept, listener, server, tasks)
        named = [{"url": server.url, "name": f"s{i}"} for i, server in enumerate(servers)]
        async with before(named, **config) as service:
            yield Rig(service, []), servers
        tasks.cancel_scope.cancel()


async def _accept(listener: SocketListener, server: Upstream, tasks: anyio.abc.TaskGroup) -> None:
    try:
        await listener.accept_forever(lambda stream: tasks.start_soon(server.serve, stream))
    finally:
        listener.close()


# --- clients -------------------------------------------------------------------------------------------------


class Client:
    """A connection to the balancer that is read as far as the test wants."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self.stream = stream
        self.data = bytearray()

    async def send(self, data: bytes) -> None:
        await self.stream.send(data)

    async def until(self, text: bytes) -> bytes:
        """Read until `text` has come; what came up to and with it, which is then forgotten."""
        with anyio.fail_after(LIMIT_S):
            while text not in self.data:
                self.data += await self.stream.receive()
        end = self.data.index(text) + len(text)
        found = bytes(self.data[:end])
        del self.data[:end]
        return found

    async def rest(self) -> bytes:
        """Read to the end."""
        with anyio.fail_after(LIMIT_S), contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                self.data += await self.stream.receive()
        return bytes(self.data)


@contextlib.asynccontextmanager
async def client(rig: Rig) -> AsyncIterator[Client]:
    async with await connect(rig.url) as stream:
        yield Client(stream)


def chat_request(*, close: bool = True, **fields: Any) -> bytes:
    return request("POST", "/api/chat", chat(**fields), close=close)


def length_of(head: bytes) -> int:
    return int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
