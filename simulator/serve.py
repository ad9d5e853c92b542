"""Fake Ollama servers behind real HTTP/1.1 on loopback: the pure fakes, with a clock and sockets.

    async with serve_fleet([FakeSpec("a"), FakeSpec("b", token_ms=20)]) as fleet:
        print(fleet[0].url)
        fleet[1].set_fault(Fault(FaultKind.HANG))
        await fleet[0].stop()

What to answer and when is decided in `simulator.fakes.api` and `simulator.fake_ollama`, `simulator.fakes.live` sleeps
for it, and here it is framed and written as Go's HTTP server does. A client that leaves is noticed at once: its
slot is freed and no further token is made.
"""

import contextlib
import errno
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import anyio
from anyio.abc import TaskGroup

from lbio.http1 import (
    LAST_CHUNK,
    Framing,
    HttpError,
    IncompleteBody,
    Reader,
    RequestHead,
    encode_chunk,
    parse_request_head,
    serialize_response,
)
from lbio.wire.streams import TCP, Listener, Network, Stream
from simulator.fake_ollama import FakeSpec
from simulator.fakes.answers import http_date
from simulator.fakes.api import Generation, HeaderPairs, Lines, Reply, Request, fault_reply, generates, handle
from simulator.fakes.blobs import digested, is_blob, reads_blob
from simulator.fakes.live import Abort, Cut, LiveFake, Progress, Stats, now_ns
from simulator.fakes.recite import recite
from simulator.fakes.replies import Upload
from simulator.faults import Fault, FaultKind

__all__ = ["Abort", "FakeServer", "Stats", "now_ns", "serve_fleet"]

HEAD_BYTES_MAX = 65_536
BODY_BYTES_MAX = 256 * 1024 * 1024
GO_BUFFER_BYTES = 2048  # Go gives an answer a Content-Length if all of it fits in here
PIPELINED_BYTES_MAX = 1024 * 1024  # a client that sends more while it waits is no longer watched
RST_AVOIDANCE_S = 0.5  # as Go
REBIND_TRIES = 50
REBIND_PAUSE_S = 0.1

_Body = bytes | Upload | None
_LEFT = (anyio.BrokenResourceError, anyio.EndOfStream)  # by the client
_GONE = (*_LEFT, anyio.ClosedResourceError, IncompleteBody)
_HANGS = frozenset({FaultKind.HANG, FaultKind.HANG_CHAT})
_GARBAGE = b"\x00\xff\x13\x37 this is no HTTP \x80\x81\x82\r\n\r\n"


# --- Go's framing ------------------------------------------------------------------------------------------------


def _head(status: int, headers: HeaderPairs, wall_ns: int, *, length: int | None, chunked: bool, close: bool) -> bytes:
    lines = [*headers, (b"Date", http_date(wall_ns))]
    if length is not None:
        lines.append((b"Content-Length", b"%d" % length))
    if close:
        lines.append((b"Connection", b"close"))
    if chunked:
        lines.append((b"Transfer-Encoding", b"chunked"))
    return serialize_response(status, lines)


def _whole(reply: Reply, wall_ns: int, *, head_only: bool, close: bool) -> bytes:
    """Return a complete answer: with its length if Go's buffer holds it, else chunked."""
    chunked = reply.chunked or len(reply.body) > GO_BUFFER_BYTES
    length = None if chunked or reply.status == 204 or (head_only and not reply.body) else len(reply.body)
    chunked = chunked and not head_only
    head = _head(reply.status, reply.headers, wall_ns, length=length, chunked=chunked, close=close)
    if head_only:
        return head
    return head + (encode_chunk(reply.body) + LAST_CHUNK if chunked else reply.body)


# --- one request -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Exchange:
    """One request on its connection; the `Sink` of its answer."""

    stream: Stream
    reader: Reader
    request: Request
    serial: int
    live: LiveFake
    close: bool  # the connection, after the answer
    begun: bool = False  # the head of a stream is out
    progress: Progress = field(default_factory=Progress)

    async def reply(self, reply: Reply) -> None:
        """Send a complete answer."""
        head_only = self.request.method == "HEAD"
        await self.stream.send(_whole(reply, self._wall_ns(), head_only=head_only, close=self.close))

    async def chunks(self, headers: HeaderPairs, pieces: Sequence[bytes], *, last: bool = False) -> None:
        """Send pieces of a stream, a chunk each; the head comes before the first, the end after the last."""
        end = LAST_CHUNK if last else b""
        await self.stream.send(self._head_once(headers) + b"".join(map(encode_chunk, pieces)) + end)

    async def cut(self, headers: HeaderPairs, piece: bytes) -> None:
        """End the connection inside the chunk of `piece`. Raises Cut."""
        chunk = encode_chunk(piece)
        await self.stream.send(self._head_once(headers) + chunk[: len(chunk) // 2])
        raise Cut

    def _head_once(self, headers: HeaderPairs) -> bytes:
        if self.begun:
            return b""
        self.begun = True
        return _head(200, headers, self._wall_ns(), length=None, chunked=True, close=self.close)

    def _wall_ns(self) -> int:
        return self.live.moment(self.serial).wall_ns


async def _answer(exchange: _Exchange) -> None:
    """Answer a request; only one that takes time pays for a watch over its client."""
    live, stats, progress = exchange.live, exchange.live.stats, exchange.progress
    heavy = generates(exchange.request.path)
    if not heavy and live.effect().replaces(generates=False) is None:
        await _answer_now(exchange)
        return
    stats.concurrent += heavy
    stats.concurrent_max = max(stats.concurrent_max, stats.concurrent)
    try:
        if not await _while_connected(exchange, lambda: _answer_slowly(exchange)):
            stats.aborts.append(Abort(now_ns(), exchange.request.path, progress.stage, progress.made))
            stats.tokens_of_aborted += progress.made
            raise Cut
    finally:
        stats.concurrent -= heavy
        stats.tokens_undelivered += progress.made - progress.written


async def _while_connected(exchange: _Exchange, work: Callable[[], Awaitable[None]]) -> bool:
    """Do `work` unless the client leaves first; tell whether it was there to the end.

    Raises Cut if `work` does, or if the connection was closed on our side.
    """
    gone = cut = False

    async def watch() -> None:
        nonlocal gone, cut
        try:
            while len(exchange.reader.buffered) <= PIPELINED_BYTES_MAX:
                exchange.reader.buffered += await exchange.stream.receive()
        except _LEFT:
            gone = True
            group.cancel_scope.cancel()
        except anyio.ClosedResourceError:
            cut = True
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            await work()
        except _LEFT:
            gone = True
        except (Cut, anyio.ClosedResourceError):
            cut = True
        group.cancel_scope.cancel()
    if cut:
        raise Cut
    return not gone


async def _answer_slowly(exchange: _Exchange) -> None:
    """Answer as the faults have it."""
    live, path = exchange.live, exchange.request.path
    while True:
        effect = live.effect()
        kind = effect.replaces(generates=generates(path))
        if kind not in _HANGS:
            break
        await live.fault_change(effect)
    if kind is FaultKind.RESET:
        exchange.stream.abort()
        raise Cut
    if kind is FaultKind.GARBAGE:
        await exchange.stream.send(_GARBAGE)
        raise Cut
    if kind is not None:
        await exchange.reply(fault_reply(path, kind, live.moment(exchange.serial)))
    else:
        await _answer_now(exchange)


async def _answer_now(exchange: _Exchange) -> None:
    """Do what the API says; a generation takes its time then."""
    live = exchange.live
    moment = live.moment(exchange.serial)
    result = handle(live.fake, exchange.request, moment)
    if isinstance(result, Generation):
        await live.generate(result, moment, exchange, exchange.progress)
    elif isinstance(result, Lines):
        await recite(result, live.fake, exchange)
    else:
        live.notify(result.notices)
        await exchange.reply(result)


# --- one server --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Life:
    """What exists from one start to the next stop."""

    listener: Listener
    scope: anyio.CancelScope
    ended: anyio.Event
    streams: set[Stream] = field(default_factory=set)


class FakeServer:
    """One fake Ollama on a port. Made by `serve_fleet`, which owns it."""

    def __init__(self, spec: FakeSpec, group: TaskGroup, network: Network = TCP) -> None:
        self.spec = spec
        self.port = spec.port
        self.live = LiveFake(spec)
        self._group = group
        self._network = network
        self._wanted = False
        self._life: _Life | None = None
        self._placeholder: socket.socket | None = None
        self._settling = anyio.Lock()
        self._serial = 0

    def __repr__(self) -> str:
        state = "up" if self.up else "down"
        return f"<FakeServer {self.spec.name} {self.url} {state}, {self.stats.concurrent} in flight>"

    @property
    def url(self) -> str:
        """The address, without a path."""
        host = f"[{self.spec.host}]" if ":" in self.spec.host else self.spec.host
        return f"http://{host}:{self.port}"

    @property
    def stats(self) -> Stats:
        """What it has seen."""
        return self.live.stats

    @property
    def up(self) -> bool:
        """Whether it listens."""
        return self._life is not None and not self._life.scope.cancel_called

    def set_fault(self, *faults: Fault | None) -> None:
        """Replace all faults; their schedules count from now. None, or nothing, heals."""
        self.live.set_faults([fault for fault in faults if fault is not None])
        if self.live.effect().down:
            self._cut()

    async def start(self) -> None:
        """Listen again, on the same port; a restarted server holds only `start_loaded` in memory."""
        self._wanted = True
        if not self.port and self.live.effect().down:  # down from the start, but its address must be known
            listener = await self._network.listen(self.spec.host, 0)
            self.port = listener.addresses[0][1]
            listener.close()
            self._hold_port()
        await self._settle()

    async def stop(self) -> None:
        """Close the listener and every connection at once, as kill -9 would."""
        self.close()
        await self._settle()

    def close(self) -> None:
        """Stop without waiting for the tasks to end."""
        self._wanted = False
        self._cut()

    async def watch_faults(self) -> None:
        """Go down and come back as the schedules of the faults have it, for ever."""
        while True:
            effect = self.live.effect()
            await self._settle()
            await self.live.fault_change(effect)

    async def _settle(self) -> None:
        """Come up or go down, as the owner and the faults want it."""
        async with self._settling:
            wanted = self._wanted and not self.live.effect().down
            if not wanted:
                self._cut()
            if self._life is not None and self._life.scope.cancel_called:
                await self._life.ended.wait()
                self._life = None
            if wanted and self._life is None:
                await self._open()

    async def _open(self) -> None:
        listener = await self._listen()
        self.port = listener.addresses[0][1]
        self.live.reset()
        self._life = _Life(listener, anyio.CancelScope(), anyio.Event())
        self._group.start_soon(self._run, self._life)

    async def _listen(self) -> Listener:
        """Listen; on a port that was ours before, with patience."""
        tries_left = 0 if self.port == self.spec.port else REBIND_TRIES
        while True:
            try:
                listener = await self._network.listen(self.spec.host, self.port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not tries_left:
                    raise
                tries_left -= 1
                await anyio.sleep(REBIND_PAUSE_S)
            else:
                self.release_port()
                return listener

    def _cut(self) -> None:
        life = self._life
        if life is None or life.scope.cancel_called:
            return
        life.listener.close()
        for stream in tuple(life.streams):
            stream.close()
        life.scope.cancel()
        self._hold_port()

    def _hold_port(self) -> None:
        """Keep the port while down: the kernel may give a free one to any outgoing connection."""
        if sys.platform != "linux" or self._network is not TCP:
            return
        holder = socket.socket(socket.AF_INET6 if ":" in self.spec.host else socket.AF_INET)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((self.spec.host, self.port))  # without listen(): connections are refused
        except OSError:
            holder.close()
        else:
            self._placeholder = holder

    def release_port(self) -> None:
        """Let go of the port of a server that is down."""
        if self._placeholder is not None:
            self._placeholder.close()
            self._placeholder = None

    async def _run(self, life: _Life) -> None:
        try:
            with life.scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(self.live.keep_time)

                    def accept(stream: Stream) -> None:
                        life.streams.add(stream)
                        group.start_soon(self._serve_connection, stream, life)

                    await life.listener.accept_forever(accept)
        finally:
            life.listener.close()
            life.ended.set()

    async def _serve_connection(self, stream: Stream, life: _Life) -> None:
        self.stats.connections += 1
        self.stats.connections_total += 1
        reader = Reader(stream)
        try:
            while (raw := await reader.read_head(HEAD_BYTES_MAX, role="request")) is not None:
                head = parse_request_head(raw)
                body = await self._body(stream, reader, head)
                exchange = self._exchange(stream, reader, head, body)
                await _answer(exchange)
                if body is None:  # a close now would reset the connection, and the answer with it
                    await stream.send_eof()
                    await anyio.sleep(RST_AVOIDANCE_S)
                if exchange.close:
                    break
        except HttpError as error:
            text = ((b"Content-Type", b"text/plain; charset=utf-8"),)
            refusal = Reply(error.status, text, error.message.encode())
            with contextlib.suppress(*_GONE):
                await stream.send(_whole(refusal, self.live.moment(0).wall_ns, head_only=False, close=True))
        except (*_GONE, Cut):
            pass
        finally:
            stream.close()
            life.streams.discard(stream)
            self.stats.connections -= 1

    async def _body(self, stream: Stream, reader: Reader, head: RequestHead) -> _Body:
        """Read the body; of a blob only its digest is kept, and one that is not looked at stays unread: None."""
        blob = head.method == "POST" and is_blob(head.path) and head.framing is not Framing.NONE
        if blob and not reads_blob(self.live.fake, head.path):
            return None
        if head.expect_continue:
            await stream.send(serialize_response(100, []))
        return await (digested(reader.body_chunks(head)) if blob else reader.read_body(head, BODY_BYTES_MAX))

    def _exchange(self, stream: Stream, reader: Reader, head: RequestHead, body: _Body) -> _Exchange:
        self._serial += 1
        self.stats.requests[head.path] += 1
        origin = head.header(b"origin")
        request = Request(
            method=head.method,
            path=head.path,
            host=(head.header(b"host") or b"").decode("latin-1"),
            origin=None if origin is None else origin.decode("latin-1"),
            body=body if isinstance(body, bytes) else b"",
            content_type=(head.header(b"content-type") or b"").decode("latin-1"),
            upload=body if isinstance(body, Upload) else None,
        )
        close = body is None or not head.keep_alive
        return _Exchange(stream, reader, request, self._serial, self.live, close=close)


@contextlib.asynccontextmanager
async def serve_fleet(specs: Sequence[FakeSpec], network: Network = TCP) -> AsyncIterator[list[FakeServer]]:
    """Run one server for each spec, each on its port (0: any free one), until the block is left.

    Faults of the specs count from here. Raises OSError when a port cannot be had.
    """
    failure: Exception | None = None
    async with anyio.create_task_group() as group:
        fleet = [FakeServer(spec, group, network) for spec in specs]
        try:
            for server in fleet:
                await server.start()
                group.start_soon(server.watch_faults)
            yield fleet
        except Exception as error:  # noqa: BLE001  raised again below, where the group does not wrap it
            failure = error
        finally:
            for server in fleet:
                server.close()
                server.release_port()
            group.cancel_scope.cancel()
    if failure is not None:
        raise failure
