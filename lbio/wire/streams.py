"""Dialling and listening, TCP and TLS; the `SocketStream` of `lbio.wire.sockets` is offered here too."""

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Final, Protocol, Self

import anyio
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream

from lbio.configuration.addresses import Address
from lbio.wire.sockets import RECEIVE_BYTES, SocketStream, Stream
from lbio.wire.watched import Watched

__all__ = [
    "RECEIVE_BYTES",
    "TCP",
    "Connect",
    "Listener",
    "Network",
    "SocketListener",
    "SocketStream",
    "Stream",
    "close_now",
    "connect",
    "connect_tls",
    "is_exhaustion",
]

_log = logging.getLogger(__name__)

HAPPY_EYEBALLS_DELAY_S: Final = 0.25  # RFC 8305 §5
EXHAUSTED_PAUSE_S: Final = 0.1
ACCEPTS_PER_WAKEUP: Final = 64
_PORT_TRIES: Final = 20

_IN_PROGRESS = {errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EALREADY}
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
# accept(2): Linux reports here what befell the new connection, not the listener.
_STILLBORN = {errno.ECONNABORTED, errno.ECONNRESET, errno.EPROTO, errno.EPERM, errno.ETIMEDOUT} | {
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
}
_NO_SUCH_FAMILY = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}

_Address = tuple[socket.AddressFamily, tuple[Any, ...]]


def close_now(stream: ByteStream) -> None:
    """Close any stream made here, or one in memory, without waiting; a TLS one without its good-bye."""
    inner: Any = stream
    while isinstance(inner, TLSStream):
        inner = inner.transport_stream
    inner.close()


def is_exhaustion(error: OSError) -> bool:
    """Tell whether this machine has run out of something, such as descriptors: then no peer is to blame."""
    if not isinstance(error, socket.gaierror):
        return error.errno in _EXHAUSTED
    try:  # the resolver, which needs a socket too, has a reason of its own for each error
        socket.socket().close()
    except OSError as own:
        return own.errno in _EXHAUSTED
    return False


async def connect(host: str, port: int) -> SocketStream:
    """Connect to an IP literal or a name, racing a name's addresses as RFC 8305 has it.

    Raises OSError (ConnectionRefusedError, socket.gaierror and so on); if several addresses failed, the error
    of the first to fail, with the others as notes. No timeout: that is the caller's cancel scope.
    """
    addresses = _alternating(await _resolve(host, port, 0))
    if len(addresses) == 1:
        return await _connect_to(*addresses[0])
    winner: SocketStream | None = None
    failures: list[OSError] = []

    async def attempt(address: _Address, failed: anyio.Event) -> None:
        nonlocal winner
        try:
            stream = await _connect_to(*address)
        except OSError as error:
            failures.append(error)
            failed.set()
            return
        if winner is None:
            winner = stream
            group.cancel_scope.cancel()
        else:  # both became ready in the same turn of the loop
            stream.close()

    try:
        async with anyio.create_task_group() as group:
            for address in addresses:
                failed = anyio.Event()
                group.start_soon(attempt, address, failed)
                with anyio.move_on_after(HAPPY_EYEBALLS_DELAY_S):
                    await failed.wait()
    except BaseException:
        if winner is not None:  # cancelled from outside after it was found
            winner.close()
        raise
    if winner is not None:
        return winner
    for other in failures[1:]:
        failures[0].add_note(str(other))
    raise failures[0]


class _TLSStream(TLSStream):
    """One whose peer may speak nonsense after the handshake: that is a broken connection like any other."""

    async def receive(self, max_bytes: int = RECEIVE_BYTES) -> bytes:
        try:
            return await super().receive(max_bytes)
        except ssl.SSLError as error:
            raise anyio.BrokenResourceError(f"TLS: {error.reason or error}") from error

    async def send(self, item: bytes) -> None:
        try:
            await super().send(item)
        except ssl.SSLError as error:
            raise anyio.BrokenResourceError(f"TLS: {error.reason or error}") from error


async def connect_tls(host: str, port: int, ssl_context: ssl.SSLContext, server_hostname: str) -> ByteStream:
    """Connect and shake hands; the certificate must be for `server_hostname` if the context checks that.

    The end of the stream needs no TLS good-bye (few servers send one), so a body's framing must show that it
    is whole. Raises OSError, of which ssl.SSLError is one.
    """
    stream = await connect(host, port)
    try:
        return await _TLSStream.wrap(
            stream,
            server_side=False,
            hostname=server_hostname,
            ssl_context=ssl_context,
            standard_compatible=False,
        )
    except (anyio.BrokenResourceError, anyio.EndOfStream) as error:
        stream.close()
        raise ConnectionResetError(errno.ECONNRESET, f"{host}:{port} hung up in the TLS handshake") from error
    except BaseException:
        stream.close()
        raise


async def _connect_to(family: socket.AddressFamily, address: tuple[Any, ...]) -> SocketStream:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(0)
        code = sock.connect_ex(address)
        if code in _IN_PROGRESS:
            await anyio.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0 and _is_its_own_peer(sock):
            code = errno.ECONNREFUSED
    except BaseException:
        sock.close()
        raise
    if code != 0:
        sock.close()
        raise OSError(code, f"{os.strerror(code)} ({address[0]} port {address[1]})")
    return SocketStream(sock, address)


def _is_its_own_peer(sock: socket.socket) -> bool:
    """With nobody listening, TCP connects a socket to itself if the kernel happens to draw that very port."""
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:  # reset already: whoever did it was somebody else
        return False


async def _resolve(host: str, port: int, flags: int) -> list[_Address]:
    """Return the addresses of a host, an IP literal's without asking anybody. Raises OSError."""
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        try:
            found = await anyio.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
        except UnicodeError as error:
            raise socket.gaierror(socket.EAI_NONAME, f"{host!r} is not a host name") from error
        return [(info[0], info[4]) for info in found]
    if literal.version == 4:
        return [(socket.AF_INET, (host, port))]
    if not literal.scope_id:
        return [(socket.AF_INET6, (host, port, 0, 0))]
    # Only the resolver knows the number of `%eth0`; told that the host is numeric, it does not block.
    found_now = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    return [(info[0], info[4]) for info in found_now]


def _alternating(addresses: list[_Address]) -> list[_Address]:
    """Order by turns of family, so that a dead IPv6 network costs one delay and not one per address."""
    unique = list(dict.fromkeys(addresses))
    first = [address for address in unique if address[0] == unique[0][0]]
    others = [address for address in unique if address[0] != unique[0][0]]
    return [address for address in chain.from_iterable(zip_longest(first, others)) if address is not None]


class SocketListener:
    """Sockets that listen on every address of a host, all on one port."""

    def __init__(self, socks: list[socket.socket]) -> None:
        self._listening = [Watched(sock) for sock in socks]
        self._closing = anyio.Event()
        self._complained = False
        names: list[Any] = [sock.getsockname() for sock in socks]
        self.addresses: list[tuple[str, int]] = [(name[0], name[1]) for name in names]

    @classmethod
    async def listen(cls, host: str, port: int, backlog: int = 4096) -> Self:
        """Bind and listen; port 0 picks a free one, '::' takes IPv4 too where the system lets it.

        Addresses of a name whose family this machine lacks are left out. Raises OSError naming the address.
        """
        addresses = list(dict.fromkeys(await _resolve(host, port, socket.AI_PASSIVE)))
        for tries_left in reversed(range(_PORT_TRIES)):
            try:
                return cls(_bind_all(addresses, backlog, dual_stack=host == "::"))
            except OSError as error:
                # A free port of the first address may be taken on the second: draw another.
                if port or error.errno != errno.EADDRINUSE or not tries_left:
                    raise
        raise AssertionError

    async def accept_forever(self, on_connection: Callable[[SocketStream], object]) -> None:
        """Hand each new connection to `on_connection`, which owns it from then on, until `close`.

        What `on_connection` raises ends the listening. Running out of descriptors does not.
        """
        async with anyio.create_task_group() as group:
            for listening in self._listening:
                group.start_soon(self._accept_loop, listening, on_connection)

    async def _accept_loop(self, listening: Watched, on_connection: Callable[[SocketStream], object]) -> None:
        while not listening.closed:
            try:
                await listening.readable()
            except anyio.ClosedResourceError:
                return
            exhausted = self._accept_some(listening, on_connection)
            if exhausted is not None:
                if not self._complained:
                    _log.error("cannot accept connections: %s; waiting for some to end", exhausted)
                self._complained = True
                with anyio.move_on_after(EXHAUSTED_PAUSE_S):
                    await self._closing.wait()

    def _accept_some(self, listening: Watched, on_connection: Callable[[SocketStream], object]) -> OSError | None:
        """Accept what is there, within reason; return the error if the machine has run out of something."""
        for _ in range(ACCEPTS_PER_WAKEUP):
            if listening.closed:  # by on_connection
                return None
            try:
                sock, address = listening.sock.accept()
            except (BlockingIOError, InterruptedError):
                self._complained = False  # all that waited are in, so the next shortage is a new one
                return None
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    return error
                if error.errno not in _STILLBORN:
                    raise
            else:
                stream = SocketStream(sock, address if isinstance(address, tuple) else None)
                try:
                    on_connection(stream)
                except BaseException:
                    stream.close()
                    raise
        return None

    def close(self) -> None:
        """Stop accepting at once; connections that were handed over are not touched."""
        self._closing.set()
        for listening in self._listening:
            listening.close()


def _bind_all(addresses: list[_Address], backlog: int, *, dual_stack: bool) -> list[socket.socket]:
    socks: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, address in addresses:
            port = socks[0].getsockname()[1] if socks else address[1]
            try:
                socks.append(_bind(family, (address[0], port, *address[2:]), backlog, dual_stack=dual_stack))
            except OSError as error:
                if error.errno not in _NO_SUCH_FAMILY:
                    raise
                missing = missing or error
    except BaseException:
        for sock in socks:
            sock.close()
        raise
    if missing is not None and not socks:
        raise missing
    return socks


def _bind(family: socket.AddressFamily, address: tuple[Any, ...], backlog: int, *, dual_stack: bool) -> socket.socket:
    sock: socket.socket | None = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        if sys.platform == "win32":  # there, SO_REUSEADDR would let another program take the port over
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            with contextlib.suppress(OSError):  # some systems know only one of the two
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual_stack)
        sock.settimeout(0)
        sock.bind(address)
        sock.listen(backlog)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise OSError(error.errno, f"cannot listen on {Address(*address[:2])}: {error.strerror}") from error
    return sock


# --- where streams come from ----------------------------------------------------------------------------------------


class Listener(Protocol):
    """What accepts connections."""

    @property
    def addresses(self) -> Sequence[tuple[str, int]]:
        """Where it listens."""

    async def accept_forever(self, on_connection: Callable[[Stream], object]) -> None:
        """Hand each new connection to `on_connection`, which owns it from then on, until `close`."""

    def close(self) -> None:
        """Stop accepting at once; connections that were handed over are not touched."""


Connect = Callable[[str, int], Awaitable[Stream]]
"""Connects to a host and a port. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Network:
    """Where plain streams come from: the system's sockets, or in tests memory."""

    connect: Connect
    listen: Callable[[str, int], Awaitable[Listener]]


TCP = Network(connect, SocketListener.listen)
