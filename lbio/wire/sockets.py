"""One connected socket as a byte stream, without a transport in between.

anyio's TCP streams pause and resume a transport around each `receive()`, which costs twice what the rest of
the relay costs (design §8). Here there are two ways to read. Where the event loop calls back when a socket can be
read (asyncio and uvloop), it is told of the socket once; whatever comes is received in the callback and given to a
`Sink`, or to the task that waits in `receive`. Elsewhere (trio, Windows, where `lbio.wire.readiness` is told so)
`recv` is tried, and anyio is asked to wait when it would block.
"""

import asyncio
import contextlib
import select
import socket
import struct
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Final, Protocol

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream, SocketAttribute

from lbio.wire.readiness import loop_with_readers
from lbio.wire.watched import Watched

if sys.platform == "linux":
    import fcntl
    import termios

RECEIVE_BYTES: Final = 16384
"""What is received at once, and so worked on without a pause, however small the pieces are that it consists of."""

_TURN_S: Final = 0.002  # a task whose calls do not block leaves the loop to the others after this long


class Sink(Protocol):
    """Takes what a stream receives, piece by piece, as it comes. Must not raise."""

    def take(self, data: bytes) -> None:
        """Take the next piece, never an empty one."""

    def take_end(self, why: str) -> None:
        """Nothing more comes: the peer has ended the stream, or (`why`) it broke."""


class Stream(ByteStream):
    """A byte stream whose connection can be ended without waiting: a socket's, or in tests one in memory."""

    @abstractmethod
    def close(self) -> None:
        """Close at once, without waiting for anything; what was sent still arrives."""

    @abstractmethod
    def abort(self) -> None:
        """Close with a reset: what is unsent is thrown away, and the peer sees an error instead of an end."""


class SocketStream(Stream):
    """A byte stream over one connected socket, which it owns.

    `receive` and `send` raise anyio's errors: EndOfStream, BrokenResourceError (reset and the like),
    ClosedResourceError (closed here), BusyResourceError (two tasks at once). Cancelling `receive` loses no
    byte. Cancelling `send` leaves a prefix sent; `bytes_sent` (ever) tells how much.
    """

    __slots__ = (
        "_armed",
        "_early",
        "_has_taken",
        "_loop",
        "_remote",
        "_sending",
        "_sink",
        "_sock",
        "_turn_ends_s",
        "_waiter",
        "_watched",
        "bytes_sent",
    )

    def __init__(self, sock: socket.socket, remote_address: tuple[Any, ...] | None = None) -> None:
        sock.settimeout(0)
        with contextlib.suppress(OSError):  # not TCP, or the peer has reset it before we looked
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._watched = Watched(sock)
        self._remote = remote_address  # kept, since a socket forgets its peer once it is reset
        self._loop = loop_with_readers()  # None: nobody calls back
        self._armed = False  # the loop calls `_on_readable`
        self._has_taken = False  # something was given to a sink since the last look
        self._sink: Sink | None = None
        self._waiter: asyncio.Future[bytes] | None = None
        self._early = b""  # received for a task that was cancelled, or wanted less
        self._turn_ends_s = 0.0  # 0: no call has gone on without blocking
        self._sending = False
        self.bytes_sent = 0

    def __repr__(self) -> str:
        state = "closed" if self._watched.closed else "open"
        return f"<SocketStream to {self.remote_address} {state}, {self.bytes_sent} bytes sent>"

    # --- reading -------------------------------------------------------------------------------------------

    def give_to(self, sink: "Sink") -> bool:
        """Give all that comes to `sink`, from the event loop's callback on; False where nobody calls back."""
        if self._loop is None:
            return False
        if self._watched.closed:
            raise anyio.ClosedResourceError
        if self._waiter is not None:
            raise anyio.BusyResourceError("reading from")
        self._sink = sink
        self._arm(self._loop)
        if self._early:
            early, self._early = self._early, b""
            sink.take(early)
        return True

    def keep(self) -> None:
        """Give nothing to a sink any more: the rest is for `receive`, and stays with the system until then."""
        self._sink = None

    def look(self) -> None:
        """Look, now and then, whether the loop has gone silent: only where something has come since the last look.

        libuv, and so uvloop, tells of an error once and then no more, even if bytes are unread that came before it.
        """
        if self._armed and self._has_taken and self._loop is not None:
            try:
                self._loop.add_reader(self._sock.fileno(), self._on_readable)
            except RuntimeError:  # it has
                self._disarm()
                self._arm(self._loop)
        self._has_taken = False

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._armed:
            self._armed = True
            loop.add_reader(self._sock.fileno(), self._on_readable)

    def _disarm(self) -> None:
        if self._armed and self._loop is not None:
            self._armed = False
            if not self._loop.is_closed():
                self._loop.remove_reader(self._sock.fileno())

    def _on_readable(self) -> None:
        """Receive what is there, for whoever wants it; the loop is told to be quiet when nobody does."""
        sink, waiter = self._sink, self._waiter
        if sink is None and (waiter is None or waiter.done()):
            self._disarm()
            return
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            if sink is not None:
                self._end_sink(sink, str(error) or type(error).__name__)
            elif waiter is not None:
                waiter.set_exception(anyio.BrokenResourceError(str(error)))
            return
        if sink is None:
            if waiter is not None:
                waiter.set_result(data)
        elif data:
            self._has_taken = True
            sink.take(data)
        else:
            self._end_sink(sink, "")

    def _end_sink(self, sink: "Sink", why: str) -> None:
        """Nothing can come any more, and a descriptor that is always readable would keep the loop busy."""
        self._sink = None
        self._disarm()
        sink.take_end(why)

    async def receive(self, max_bytes: int = RECEIVE_BYTES) -> bytes:
        """Return 1 to `max_bytes` bytes, as soon as there are any."""
        if self._watched.closed:
            raise anyio.ClosedResourceError
        if self._loop is None:
            return await self._receive_by_trying(max_bytes)
        if self._waiter is not None or self._sink is not None:
            raise anyio.BusyResourceError("reading from")
        data, self._early = self._early, b""
        if data:
            if self._is_turn_over():
                await self._pause(data)
        elif not (data := await self._next(self._loop)):
            raise anyio.EndOfStream
        if len(data) > max_bytes:
            data, self._early = data[:max_bytes], data[max_bytes:]
        return data

    async def _next(self, loop: asyncio.AbstractEventLoop) -> bytes:
        """Return what the callback receives next."""
        self._turn_ends_s = 0.0
        self._has_taken = True
        self.look()  # where it has gone silent, nothing would come
        self._arm(loop)
        waiter = self._waiter = loop.create_future()
        try:
            data: bytes = await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._early = waiter.result()  # it had come before the cancellation did
            raise
        finally:
            self._waiter = None
        return data

    async def _pause(self, data: bytes) -> None:
        self._early = data
        await self._yield()
        self._early = b""

    def _is_turn_over(self) -> bool:
        """Tell whether the task has gone on for long enough without waiting; the first call begins its turn."""
        if not self._turn_ends_s:
            self._turn_ends_s = monotonic() + _TURN_S
            return False
        return monotonic() > self._turn_ends_s

    async def _receive_by_trying(self, max_bytes: int) -> bytes:
        if self._is_turn_over():
            await self._yield()
        while True:
            if self._watched.closed:
                raise anyio.ClosedResourceError
            try:
                data = self._sock.recv(max_bytes)
            except (BlockingIOError, InterruptedError):
                self._turn_ends_s = 0.0
                await self._watched.readable()
            except OSError as error:
                raise anyio.BrokenResourceError(str(error)) from error
            else:
                if not data:
                    raise anyio.EndOfStream
                return data

    # --- writing -------------------------------------------------------------------------------------------

    async def send(self, item: bytes) -> None:
        """Send all of `item`; waits while the peer is slow."""
        if self._sending:
            raise anyio.BusyResourceError("sending to")
        if self._is_turn_over():
            await self._yield()
        sent = self.send_nowait(item)
        if sent == len(item):
            return
        self._turn_ends_s = 0.0
        self._sending = True
        try:
            with memoryview(item) as view:
                while sent < len(item):
                    await self._watched.writable()
                    self._sending = False
                    sent += self.send_nowait(view[sent:])
                    self._sending = True
        finally:
            self._sending = False

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Send what fits into the socket's buffer and return how many bytes that was (0: it would block)."""
        if self._sending:
            raise anyio.BusyResourceError("sending to")
        if self._watched.closed:
            raise anyio.ClosedResourceError
        try:
            sent = self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise anyio.BrokenResourceError(str(error)) from error
        self.bytes_sent += sent
        return sent

    @property
    def bytes_taken(self) -> int:
        """How much of `bytes_sent` the peer's system has acknowledged; where that is not told, what ours has taken.

        A peer that reads a little at a time shows here long before there is room to send again.
        """
        if sys.platform == "linux" and not self._watched.closed:
            with contextlib.suppress(OSError):
                unsent = fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(struct.calcsize("i")))
                return self.bytes_sent - int(struct.unpack("i", unsent)[0])
        return self.bytes_sent

    def has_peer_ended(self) -> bool:
        """Tell whether the peer has ended or broken the stream, though bytes before that are unread (on Linux only).

        Not while more of them is under way than the system's buffer takes: the end comes behind them.
        """
        if self._watched.closed:
            return True
        if sys.platform != "linux":
            return False
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)  # which errors and hang-ups are told of besides
        return bool(poll.poll(0))

    async def _yield(self) -> None:
        """Give the other tasks a turn (and cancellation a chance): a fast peer must not hold the loop."""
        self._turn_ends_s = 0.0
        await anyio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """Half-close: the peer sees the end of the stream, and we can still receive."""
        self.end_sending()
        await anyio.lowlevel.checkpoint()

    def end_sending(self) -> None:
        """Do the same without a checkpoint."""
        if self._watched.closed:
            raise anyio.ClosedResourceError
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise anyio.BrokenResourceError(str(error)) from error

    async def aclose(self) -> None:
        """Close as `close` does, then yield as anyio's rules want it."""
        self.close()
        await anyio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close at once, without waiting for anything; tasks inside `receive` or `send` are woken."""
        self._end_reading()
        self._watched.close()

    def _end_reading(self) -> None:
        self._disarm()
        self._sink = None
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_exception(anyio.ClosedResourceError())

    def abort(self) -> None:
        """Close with a reset: what is unsent is thrown away, and the peer sees an error instead of an end."""
        if not self._watched.closed:
            layout = "hh" if sys.platform == "win32" else "ii"
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(layout, 1, 0))
            self._end_reading()
            self._watched.close(end=False)

    @property
    def local_address(self) -> tuple[str, int] | str:
        """Our host and port. Raises OSError once closed."""
        return readable_address(self._sock.getsockname())

    @property
    def remote_address(self) -> tuple[str, int] | str:
        """The peer's host and port, also after the connection has ended; "?" if it ended before we asked."""
        try:
            return readable_address(self._remote or self._sock.getpeername())
        except OSError:
            return "?"

    @property
    def raw_socket(self) -> socket.socket:
        """The socket, for a fast path of one's own; it stays ours to close."""
        return self._sock

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """Offer the same as anyio's SocketAttribute, so that it is found through a TLSStream too."""
        return {
            SocketAttribute.family: lambda: self._sock.family,
            SocketAttribute.local_address: lambda: self.local_address,
            SocketAttribute.raw_socket: lambda: self._sock,
            SocketAttribute.remote_address: lambda: self.remote_address,
        }


async def send_while_taken(stream: ByteStream, data: bytes, patience_s: float) -> None:
    """Send all of `data`, however slowly the peer reads, as long as it does.

    Raises TimeoutError when it takes nothing for `patience_s`, and what `stream` raises.
    """
    if isinstance(stream, SocketStream):
        data = data[stream.send_nowait(data) :]
    while data:
        sent, taken = _progress(stream)
        with anyio.move_on_after(patience_s):
            await stream.send(data)
            return
        sent_now, taken_now = _progress(stream)
        if (sent_now, taken_now) == (sent, taken):
            raise TimeoutError(f"nothing was taken for {patience_s:g} s")
        data = data[sent_now - sent :]


def _progress(stream: ByteStream) -> tuple[int, int]:
    """Return how much was ever sent, and how much of it has arrived."""
    return (stream.bytes_sent, stream.bytes_taken) if isinstance(stream, SocketStream) else (0, 0)


def readable_address(address: Any) -> tuple[str, int] | str:
    """Reduce a socket address to host and port; an IPv4 peer of a dual-stack socket is shown as IPv4."""
    if not isinstance(address, tuple):
        return str(address)
    host = str(address[0])
    if host.startswith("::ffff:") and "." in host:
        host = host.removeprefix("::ffff:")
    return host, int(address[1])
