"""The client's side of a connection: bounded reading, writing that feels a slow client, and noticing that it left."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TypeVar

import anyio
from anyio.abc import ByteStream, SocketAttribute

from lbcore.schema import SECOND_NS
from lbio.configuration.settings import ClientSettings, LimitSettings
from lbio.http1 import Framing, HttpError, IncompleteBody, Reader, RequestHead
from lbio.wire.blob_body import WINDOW_BYTES, BlobBody
from lbio.wire.sockets import SocketStream, send_while_taken
from lbio.wire.streams import close_now

_T = TypeVar("_T")
_WRITE_BYTES = 65536
"""What is sent in one go: between two of them, others have their turn."""
_PIPELINED_BYTES_MAX = 65536
LOOK_S = 1.0
"""How often a client that has sent more than that is looked for, s."""
_LINGER_S = 0.5
_LINGER_BYTES_MAX = 256 << 10
_DISCARD_S = 30.0  # as nginx does (lingering_time, lingering_timeout)
_DISCARD_SILENCE_S = 5.0
_DISCARD_BYTES_MAX = 1 << 30
"""How long, how patiently and how much of a body that was refused is read: many clients send all before they look."""


class ClientGone(Exception):  # noqa: N818  it is an outcome as much as an error
    """The client closed the connection, or has not read for so long that it counts as gone."""


class BodyBudget:
    """What all connections together hold of request bodies, counted as they come."""

    __slots__ = ("bytes_max", "held")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.held = 0

    def __repr__(self) -> str:
        return f"<BodyBudget {self.held} of {self.bytes_max} bytes>"

    def check(self, n_bytes: int) -> None:
        """Raise HttpError 503 when there is no room for `n_bytes` more."""
        if self.held + n_bytes > self.bytes_max:
            raise HttpError(503, "the request bodies held at present leave no room (limits.bodies_bytes_max)")

    def take(self, n_bytes: int) -> bool:
        """Count `n_bytes` more, of what is made of a body; False when there is no room for them."""
        has_room = self.held + n_bytes <= self.bytes_max
        if has_room:
            self.held += n_bytes
        return has_room

    def give_back(self, n_bytes: int) -> None:
        """Count them no more."""
        self.held -= n_bytes


class Lingering:
    """A connection of which our half has ended: the client may still read, and what it sends is thrown away.

    To be closed when the client ends its half, has sent too much, or has had time enough (`look`).
    """

    def __init__(self, stream: SocketStream, on_end: Callable[[Lingering], object]) -> None:
        self._stream = stream
        self._on_end = on_end
        self._until_s = monotonic() + _LINGER_S
        self._bytes_left = _LINGER_BYTES_MAX

    def take(self, data: bytes) -> None:
        """Throw away what the client sends."""
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            self.close()

    def take_end(self, why: str) -> None:  # noqa: ARG002  one way or the other
        """Close: the client has."""
        self.close()

    def look(self) -> None:
        """Close when it has had time enough."""
        if monotonic() > self._until_s:
            self.close()

    def close(self) -> None:
        """Close at once."""
        self._stream.close()
        self._on_end(self)


class ClientStream:
    """One client's connection."""

    __slots__ = (
        "_bodies",
        "_held",
        "_is_gone",
        "_is_over",
        "_limits",
        "_on_left",
        "_send_nowait",
        "_settings",
        "_stream",
        "_write_timeout_s",
        "_writing_scope",
        "in_body",
        "peer",
        "reader",
        "writing",
    )

    def __init__(self, stream: ByteStream, settings: ClientSettings, limits: LimitSettings, bodies: BodyBudget) -> None:
        self._stream = stream
        self._send_nowait = stream.send_nowait if isinstance(stream, SocketStream) else None
        self._settings = settings
        self._limits = limits
        self._bodies = bodies
        self._held = 0
        self.in_body = False  # the client has begun to send a body, of which not all was read
        self._write_timeout_s = settings.write_timeout_ns / SECOND_NS
        self.reader = Reader(stream)
        self.writing = False  # inside a write: if that is cut short, nothing can follow it
        self._writing_scope: anyio.CancelScope | None = None
        self._on_left: Callable[[], None] | None = None
        self._is_gone = False
        self._is_over = False  # it lingers, and is another's to close
        address = stream.extra(SocketAttribute.remote_address, ("?", 0))  # noqa: S610  not Django's
        self.peer = str(address[0]) if isinstance(address, tuple) else str(address)

    # --- reading -------------------------------------------------------------------------------------------

    async def read_head(self) -> bytes | None:
        """Return the next request head; None when the client left.

        Raises HttpError: 408 for a head that takes too long, and as `Reader.read_head`.
        """
        if not self.reader.buffered:
            self.reader.buffered += await self.reader.more()
            if not self.reader.buffered:
                return None
        limit = self._limits.head_bytes_max
        if b"\r\n\r\n" in self.reader.buffered:
            return await self.reader.read_head(limit, role="request")
        return await self._in_time(
            lambda: self.reader.read_head(limit, role="request"), self._settings.head_timeout_ns, "the request head"
        )

    async def read_body(self, head: RequestHead) -> bytes:
        """Return the whole body of a request; it counts as held until `let_go`.

        Raises HttpError: 408 when it stalls, 413 above the limit, 503 when all bodies together are above theirs;
        ClientGone when the client leaves inside it.
        """
        self.in_body = True
        body = await self._read_body(head)
        self.in_body = False
        return body

    async def _read_body(self, head: RequestHead) -> bytes:
        limit = self._limits.body_bytes_max
        too_large = HttpError(413, f"the request body is larger than limits.body_bytes_max ({limit} bytes)")
        if head.content_length > limit:
            raise too_large
        self._bodies.check(head.content_length)
        if head.expect_continue and not self.reader.buffered:
            await self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        buffered = self.reader.buffered
        if head.framing is Framing.LENGTH and len(buffered) >= head.content_length:
            whole = bytes(memoryview(buffered)[: head.content_length])
            del buffered[: head.content_length]
            self._hold(len(whole))
            return whole
        body = bytearray()
        pieces = self.reader.body_chunks(head)
        try:
            while True:
                piece = await self._in_time(pieces.__anext__, self._settings.body_timeout_ns, "the request body")
                if len(body) + len(piece) > limit:
                    raise too_large
                self._hold(len(piece))
                body += piece
        except StopAsyncIteration:
            return bytes(body)
        except IncompleteBody as error:
            raise ClientGone(str(error)) from error

    def skip_body(self, head: RequestHead) -> None:
        """Leave a body unread: unless it is here whole, nothing can follow it."""
        buffered = self.reader.buffered
        self.in_body = head.framing is Framing.CHUNKED or len(buffered) < head.content_length
        if not self.in_body:
            del buffered[: head.content_length]

    def expect_body(self, head: RequestHead) -> None:
        """Take note of a body that is not to be held but for a window of it. Raises HttpError 503 as `read_body`."""
        self.in_body = True
        self._hold(WINDOW_BYTES if head.framing is Framing.CHUNKED else min(WINDOW_BYTES, head.content_length))

    async def pass_body(self, head: RequestHead, body: BlobBody) -> None:
        """Pass a body on as it comes, and as fast as it is taken, to its end.

        Raises HttpError: 408 when the client stalls, 400 for bad chunks; ClientGone when it leaves.
        """
        await self._while_there(body.wait_wanted)
        if head.expect_continue and not self.reader.buffered:
            await self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        pieces = self.reader.body_chunks(head)
        try:
            while True:
                body.put(await self._in_time(pieces.__anext__, self._settings.body_timeout_ns, "the request body"))
                if not body.has_room:
                    await self._while_there(body.wait_room)
        except StopAsyncIteration:
            self.in_body = False
            body.end()
        except IncompleteBody as error:
            raise ClientGone(str(error)) from error

    async def _while_there(self, happened: Callable[[], Awaitable[None]]) -> None:
        """Wait for something while nothing is read, and so no event tells of the client's end. Raises ClientGone."""
        while True:
            with anyio.move_on_after(LOOK_S):
                await happened()
                return
            if self._has_left():
                raise ClientGone("the client has left inside the body")

    def _has_left(self) -> bool:
        return isinstance(self._stream, SocketStream) and self._stream.has_peer_ended()

    def _hold(self, n_bytes: int) -> None:
        self._bodies.check(n_bytes)
        self._bodies.held += n_bytes
        self._held += n_bytes

    def let_go(self) -> None:
        """Give back the room that the last body took, whole or not."""
        self._bodies.held -= self._held
        self._held = 0

    async def _in_time(self, read: Callable[[], Awaitable[_T]], limit_ns: int, what: str) -> _T:
        limit_s = limit_ns / SECOND_NS
        with anyio.move_on_after(limit_s):
            return await read()
        raise HttpError(408, f"{what} was not received within {limit_s:g} s")

    def watch_by_callback(self, on_left: Callable[[], None]) -> bool:
        """Call `on_left` once the client has left, until `unwatch`; what it sends is kept, within bounds.

        A client that closes its sending half counts as gone, as it does for Ollama (Go's HTTP server). False where
        nobody calls back, or where so much has been sent that no more is read: then it takes a task, and `watch`.
        """
        if not isinstance(self._stream, SocketStream) or len(self.reader.buffered) >= _PIPELINED_BYTES_MAX:
            return False
        self._on_left = on_left
        return self._stream.give_to(self)

    def unwatch(self) -> None:
        """Call nobody any more."""
        self._on_left = None
        if isinstance(self._stream, SocketStream):
            self._stream.keep()

    def take(self, data: bytes) -> None:
        """Keep what has come while an answer is under way: pipelined requests."""
        self.reader.buffered += data
        if len(self.reader.buffered) >= _PIPELINED_BYTES_MAX and isinstance(self._stream, SocketStream):
            # The rest stays unread, so that the client feels it. Its end comes behind that: `look` finds it.
            self._stream.keep()

    def take_end(self, why: str) -> None:  # noqa: ARG002  it has left, one way or the other
        """Take note that the client has left."""
        on_left, self._on_left = self._on_left, None
        if on_left is not None:
            on_left()

    def look(self) -> None:
        """Look, now and then, whether a client has left of which nothing more is read, or tells nothing more."""
        if self._on_left is None or not isinstance(self._stream, SocketStream):
            return
        self._stream.look()
        if len(self.reader.buffered) >= _PIPELINED_BYTES_MAX and self._has_left():
            self.take_end("")

    def leave(self) -> None:
        """Write nothing more: the client has left."""
        self._is_gone = True
        if self._writing_scope is not None:
            self._writing_scope.cancel()

    async def watch(self) -> None:
        """Return when the client has left; as `watch_by_callback`."""
        buffered = self.reader.buffered
        while len(buffered) < _PIPELINED_BYTES_MAX:
            try:
                buffered += await self._stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                return
        while not self._has_left():  # noqa: ASYNC110
            await anyio.sleep(LOOK_S)

    # --- writing -------------------------------------------------------------------------------------------

    @property
    def send_nowait(self) -> Callable[[bytes], int]:
        """As `write_nowait`, without a layer in between where there is none; raises what the stream does, too."""
        return self._send_nowait or self.write_nowait

    def write_nowait(self, data: bytes) -> int:
        """Write what fits into the socket's buffer; return how much that was. Raises ClientGone."""
        if self._is_gone:
            raise ClientGone
        if self._send_nowait is None:
            return 0
        try:
            return self._send_nowait(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise ClientGone(str(error)) from error

    async def write(self, data: bytes) -> None:
        """Write all of `data`. Raises ClientGone, also when the client reads nothing for the write timeout."""
        at = self.write_nowait(data)
        if at == len(data):
            return
        self.writing = True
        try:
            with anyio.CancelScope() as self._writing_scope:
                for begin in range(at, len(data), _WRITE_BYTES):
                    await send_while_taken(self._stream, data[begin : begin + _WRITE_BYTES], self._write_timeout_s)
            self._writing_scope = None
            if self._is_gone:
                raise ClientGone
        except TimeoutError as error:
            raise ClientGone(f"the client has not read for {self._write_timeout_s:g} s") from error
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise ClientGone(str(error)) from error
        self.writing = False

    # --- the end -------------------------------------------------------------------------------------------

    def linger(self, on_end: Callable[[Lingering], object]) -> Lingering | None:
        """Do as `finish`, but without a task; None where one is needed: a body to be read, or nobody calls back."""
        stream = self._stream
        if self.in_body or not isinstance(stream, SocketStream):
            return None
        lingering = Lingering(stream, on_end)
        try:
            stream.end_sending()
            if not stream.give_to(lingering):
                return None
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return None
        self._is_over = True
        return lingering

    async def finish(self) -> None:
        """Close so that the client can still read what was written last.

        Closing with unread input makes the kernel reset the connection, which can destroy an answer under way (RFC 9112
        §9.6): so end our half and read for a moment what still comes, or for longer the rest of a refused body.
        """
        limit_s, bytes_max = (_DISCARD_S, _DISCARD_BYTES_MAX) if self.in_body else (_LINGER_S, _LINGER_BYTES_MAX)
        try:
            await self._stream.send_eof()
            with anyio.move_on_after(limit_s):
                while bytes_max > 0:
                    with anyio.fail_after(_DISCARD_SILENCE_S):
                        bytes_max -= len(await self._stream.receive())
        except TimeoutError:
            pass
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        self.close()

    def close(self) -> None:
        """Close at once, unless it is left to linger."""
        if not self._is_over:
            close_now(self._stream)
