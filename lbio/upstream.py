"""Connections to servers: dialled, kept for the next request, and the answers read from them."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Callable

import anyio
from anyio.abc import ByteStream, SocketAttribute

from lbcore.events import Reason
from lbcore.ollama import Ending
from lbcore.schema import SECOND_NS
from lbio.access.credentials import NO_CREDENTIALS, Credentials
from lbio.configuration.addresses import parse_server_url
from lbio.configuration.settings import PoolSettings
from lbio.http1 import ChunkedDecoder, Framing, HttpError, IncompleteBody, Reader, ResponseHead, parse_response_head
from lbio.wire.blob_body import Taker
from lbio.wire.sockets import Sink
from lbio.wire.streams import Connect, SocketStream, close_now, connect, connect_tls, is_exhaustion
from lbio.wire.watchers import Watcher

_STREAM_TYPES = (b"application/x-ndjson", b"text/event-stream")
INTERIM_MAX = 8  # 1xx answers that are skipped before it is called garbage


class ConnectError(Exception):
    """A server could not be reached; `reason` says how."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Connection:
    """One connection to a server."""

    __slots__ = ("_has_stirred", "_is_watched", "_sock", "half_sent", "idle_since_ns", "reader", "stream")

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.reader = Reader(stream)
        self._sock = stream.extra(SocketAttribute.raw_socket, None)  # noqa: S610  not Django's
        self.idle_since_ns = 0
        self._is_watched = False  # while it is idle, the loop tells when something comes
        self._has_stirred = False  # something did
        self.half_sent = False  # a body was begun and not ended, so nothing can follow it

    def rest(self) -> None:
        """Be idle from now on: whatever comes, its end or bytes that nobody has asked for, is the end of its use."""
        self._is_watched = self.give_to(self)

    def take(self, data: bytes) -> None:  # noqa: ARG002  of no interest
        """Take note that something has come while it was idle."""
        self._has_stirred = True
        self.keep()

    def take_end(self, why: str) -> None:  # noqa: ARG002  of no interest
        """Take note that it has ended while it was idle."""
        self._has_stirred = True

    def is_quiet(self) -> bool:
        """Tell whether nothing has come on an idle connection: no end, and no bytes that nobody asked for.

        What a server sends unasked (a proxy's 408 before it closes, say) would be taken for the next request's answer.
        """
        if self._sock is None or self._is_watched:
            return not self._has_stirred
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def send_nowait(self, data: bytes) -> int:
        """Send what goes out at once; return how much that was. An error shows at the next call that waits."""
        if not isinstance(self.stream, SocketStream):
            return 0
        try:
            return self.stream.send_nowait(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return 0

    async def send_body(self, body: bytes) -> None:
        """Send a body for as long as the server takes it; its answer tells why it does not."""
        self.half_sent = True
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await self.stream.send(body)
            self.half_sent = False

    async def send_upload(self, taker: Taker) -> None:
        """Send a body as it comes, for as long as the server takes it. Raises TimeoutError when it stalls."""
        self.half_sent = True
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await taker.send_to(self.stream)
            self.half_sent = False

    def give_to(self, sink: Sink) -> bool:
        """Give the sink all that comes from now on; False where nobody calls back, so that a task has to wait."""
        return isinstance(self.stream, SocketStream) and self.stream.give_to(sink)

    def look(self) -> None:
        """Look, now and then, whether the loop still calls back."""
        if isinstance(self.stream, SocketStream):
            self.stream.look()

    def keep(self) -> None:
        """Give nothing to a sink any more."""
        if isinstance(self.stream, SocketStream):
            self.stream.keep()

    def close(self) -> None:
        """Close at once."""
        close_now(self.stream)


class Endpoint:
    """One server as the I/O layer knows it: where it is, and its idle connections."""

    def __init__(
        self,
        name: str,
        url: str,
        tls: ssl.SSLContext | None,
        pool: PoolSettings,
        clock: Callable[[], int],
        connect: Connect = connect,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        self.name = name
        self.credentials = credentials
        self.url = parse_server_url(url)
        self.authority = str(self.url.address).encode()
        self._tls = tls if self.url.scheme == "https" else None
        self._pool = pool
        self._clock = clock
        self._connect = connect
        self._idle: deque[Connection] = deque()
        self._n_dialling = 0  # spare ones
        self._closed = False

    def __repr__(self) -> str:
        return f"<Endpoint {self.name} {self.url} idle={len(self._idle)}>"

    def own_headers(self, via: bytes) -> list[tuple[bytes, bytes]]:
        """Return the headers of a request of our own; `via` is who we are (RFC 9110 §7.6.3)."""
        named = [(b"Host", self.authority), (b"User-Agent", b"ollama-lb"), (b"Via", b"1.1 " + via)]
        return [*named, *self.credentials.pairs]

    def pooled(self) -> Connection | None:
        """Return an idle connection, the one used last; None when there is none young enough."""
        self.sweep()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_quiet():
                connection.keep()  # what comes from now on is an answer, which waits until somebody takes it
                return connection
            connection.close()
        return None

    async def dial(self) -> Connection:
        """Connect. Raises ConnectError. How long that may take is the core's business."""
        host, port = self.url.address.host, self.url.address.port
        try:
            if self._tls is None:
                return Connection(await self._connect(host, port))
            return Connection(await connect_tls(host, port, self._tls, host))
        except ConnectionRefusedError as error:
            raise ConnectError(Reason.CONNECT_REFUSED, "") from error
        except ssl.SSLError as error:
            raise ConnectError(Reason.TLS_FAILED, _ssl_words(error)) from error
        except OSError as error:
            reason = Reason.EXHAUSTED if is_exhaustion(error) else Reason.CONNECT_FAILED
            raise ConnectError(reason, error.strerror or str(error)) from error

    def release(self, connection: Connection) -> None:
        """Keep a connection whose last answer was read to its end; closes it when enough are kept."""
        if self._closed or connection.reader.buffered or len(self._idle) >= self._pool.idle_max:
            connection.close()
            return
        connection.idle_since_ns = self._clock()
        connection.rest()
        self._idle.append(connection)

    async def dial_spare(self, patience_ns: int) -> None:
        """Connect in place of a connection that a lost race has cost, so that the next race need not wait for that."""
        if self._closed or len(self._idle) + self._n_dialling >= self._pool.idle_max:
            return
        self._n_dialling += 1
        try:
            with anyio.move_on_after(patience_ns / SECOND_NS):
                self.release(await self.dial())
        except ConnectError:
            pass  # the next attempt will find out, and tell
        finally:
            self._n_dialling -= 1

    def sweep(self) -> None:
        """Close what has been idle for too long."""
        oldest_ns = self._clock() - self._pool.idle_timeout_ns
        while self._idle and self._idle[0].idle_since_ns < oldest_ns:
            self._idle.popleft().close()

    def drop_idle(self) -> None:
        """Close all idle connections: one was found dead, so the server has probably been restarted."""
        while self._idle:
            self._idle.popleft().close()

    def close(self) -> None:
        """Close all idle connections and keep none from now on."""
        self._closed = True
        self.drop_idle()


def _ssl_words(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return error.reason or str(error)


class Answer:
    """An answer as it comes: its head, what is held of its body, how much of it there is and how it ends."""

    __slots__ = ("_decoder", "_is_cut", "_missing", "connection", "ended", "head", "held", "streams", "watcher")

    def __init__(self, connection: Connection, head: ResponseHead, ending: Ending) -> None:
        self.connection = connection
        self.head = head
        content_type = (head.header(b"content-type") or b"").lower()
        is_plain = (head.header(b"content-encoding") or b"identity").lower() == b"identity"
        self.streams = head.status < 300 and content_type.startswith(_STREAM_TYPES) and is_plain  # so, readable here
        self.watcher = Watcher(ending if self.streams else Ending.FRAMING)
        self.held = bytearray()
        self._missing = head.content_length
        self._is_cut = False
        self._decoder = ChunkedDecoder(502) if head.framing is Framing.CHUNKED else None
        self.ended = head.framing is Framing.NONE or (head.framing is Framing.LENGTH and not self._missing)

    async def read(self) -> bytes:
        """Return the next piece of the body, b"" at its end (`ended`) or when only framing came.

        Raises IncompleteBody, and HttpError for a body that is not HTTP.
        """
        try:
            data = await self.connection.reader.more()
        except anyio.BrokenResourceError as error:
            self.take_end(str(error) or "reset")  # TLS breaks without a word
            return b""
        except anyio.ClosedResourceError as error:  # by us
            raise IncompleteBody(str(error)) from error
        if data:
            return self.take(data)
        self.take_end("")
        return b""

    def take(self, data: bytes) -> bytes:
        """Take what came next; return what of it is body, perhaps nothing. Raises HttpError for what is not HTTP."""
        if self._decoder is not None:
            payload = self._decoder.feed(data)
            if self._decoder.finished:
                self.ended = True
                self.connection.reader.buffered += self._decoder.leftover
            return payload
        if self.head.framing is Framing.CLOSE:
            return data
        payload = data[: self._missing]
        self._missing -= len(payload)
        self.ended = self._missing == 0
        self.connection.reader.buffered += data[len(payload) :]
        return payload

    def take_end(self, why: str) -> None:
        """Nothing more comes: the server has ended the connection, or (`why`) it broke. Raises IncompleteBody."""
        if self._decoder is not None and self.watcher.terminated:
            self._is_cut = True  # all that is missing is the last chunk
        elif why or self.head.framing is not Framing.CLOSE:
            raise IncompleteBody(why or "the connection ended inside the body")
        self.ended = True

    @property
    def is_at_rest(self) -> bool:
        """Whether what has come so far ended with a chunk, and with a line."""
        return self._decoder is not None and self._decoder.is_at_rest and not self.watcher.partial and not self.ended

    @property
    def verdict(self) -> Reason | None:
        """What is wrong with an answer that has ended; None: nothing."""
        self.watcher.end()
        if self.watcher.failed:
            return Reason.ERROR_LINE
        return None if self.watcher.complete else Reason.TRUNCATED

    @property
    def is_reusable(self) -> bool:
        """Whether the connection may carry another request."""
        return self.ended and not self._is_cut and self.head.keep_alive and not self.connection.half_sent


async def read_response_head(connection: Connection, method: str, bytes_max: int) -> ResponseHead | None:
    """Return the head of the answer, interim (1xx) ones skipped; None when the server closed without a byte.

    Raises HttpError for what is not HTTP, anyio.BrokenResourceError for a reset.
    """
    for _ in range(INTERIM_MAX):
        raw = await connection.reader.read_head(bytes_max, role="response")
        if raw is None:
            return None
        head = parse_response_head(raw, method)
        if head.status >= 200:
            return head
    raise HttpError(502, "too many interim answers")
