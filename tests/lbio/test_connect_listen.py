"""Dialling, TLS and listening over real sockets, on every backend: the right address, and nothing leaked."""

import contextlib
import errno
import logging
import os
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.tls import TLSStream

from lbio.wire import streams
from lbio.wire.streams import SocketListener, SocketStream, close_now, connect, connect_tls
from tests.lbio.sockets_kit import BACKENDS, BIG, black_hole, free_port, listening, open_descriptors, until

pytestmark = pytest.mark.anyio

CERTIFICATE = Path(__file__).with_name("localhost.pem")
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="uses what only Linux does with 127/8 and backlogs")


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def resolve_to(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    async def getaddrinfo(_host: object, port: int, **_: object) -> list[Any]:
        await anyio.lowlevel.checkpoint()
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (host, port, 0, 0))
            if ":" in host
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))
            for host in hosts
        ]

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)


async def test_a_refused_connection_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with pytest.raises(ConnectionRefusedError, match=f"127.0.0.1 port {port}"):
        await connect("127.0.0.1", port)
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    before = open_descriptors()
    with pytest.raises(ConnectionRefusedError, match=r"127\.0\.0\.1") as caught:
        await connect("both", port)
    assert any("127.0.0.2" in note for note in caught.value.__notes__)
    assert open_descriptors() == before


def test_a_socket_connected_to_itself_is_not_a_server() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        assert streams._is_its_own_peer(sock)
    with socket.socket() as sock:
        assert not streams._is_its_own_peer(sock)


async def test_literals_ask_no_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> None:
        await anyio.lowlevel.checkpoint()
        raise AssertionError

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)
    for host in ("127.0.0.1", "::1"):
        with pytest.raises(OSError, match="port"):
            await connect(host, free_port())


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70 + ".example", "a..b"])
async def test_what_is_no_host_is_an_oserror(host: str) -> None:
    with pytest.raises(socket.gaierror):
        await connect(host, 80)


@LINUX_ONLY
async def test_the_next_address_starts_after_a_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "127.0.0.3", "127.0.0.1")
    async with listening(SocketStream.close) as listener:
        port = listener.addresses[0][1]
        with black_hole("127.0.0.3", port):
            before = open_descriptors()
            started = time.monotonic()
            stream = await connect("both", port)
            assert 0.2 < time.monotonic() - started < 3
            assert stream.remote_address == ("127.0.0.1", port)
            stream.close()
            await anyio.sleep(0.01)
            assert open_descriptors() == before


@LINUX_ONLY
async def test_the_next_address_starts_at_once_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HAPPY_EYEBALLS_DELAY_S", 60.0)
    resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1")
    async with listening(SocketStream.close) as listener:
        with anyio.fail_after(5):
            stream = await connect("both", listener.addresses[0][1])
        stream.close()


@LINUX_ONLY
async def test_a_cancelled_connect_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HAPPY_EYEBALLS_DELAY_S", 0.01)
    resolve_to(monkeypatch, "127.0.0.3", "127.0.0.4")
    port = free_port()
    with black_hole("127.0.0.3", port), black_hole("127.0.0.4", port):
        before = open_descriptors()
        for host in ("both", "127.0.0.3"):
            with anyio.move_on_after(0.05) as scope:
                await connect(host, port)
            assert scope.cancelled_caught
        assert open_descriptors() == before


@LINUX_ONLY
async def test_a_connect_cancelled_as_it_succeeds_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2")
    real = streams._connect_to

    async def connect_and_cancel(*address: Any) -> SocketStream:
        stream = await real(*address)
        scope.cancel()
        return stream

    monkeypatch.setattr(streams, "_connect_to", connect_and_cancel)
    async with listening(SocketStream.close) as listener:
        before = open_descriptors()
        with anyio.CancelScope() as scope:
            await connect("both", listener.addresses[0][1])
        assert scope.cancelled_caught
        await anyio.sleep(0.02)
        assert open_descriptors() == before


def test_families_take_turns() -> None:
    def address(host: str) -> Any:
        return (socket.AF_INET6 if ":" in host else socket.AF_INET, (host, 1))

    given = [address(host) for host in ("::1", "::2", "::3", "1.1.1.1", "::1", "2.2.2.2")]
    hosts = [sockaddr[0] for _family, sockaddr in streams._alternating(given)]
    assert hosts == ["::1", "1.1.1.1", "::2", "2.2.2.2", "::3"]


# --- TLS ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def tls_server() -> AsyncIterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    async with anyio.create_task_group() as group:

        async def echo(stream: SocketStream) -> None:
            with contextlib.suppress(ssl.SSLError, anyio.EndOfStream, anyio.BrokenResourceError):
                async with await TLSStream.wrap(
                    stream, server_side=True, ssl_context=context, standard_compatible=False
                ) as tls:
                    while True:
                        await tls.send(await tls.receive())
            stream.close()

        async with listening(lambda stream: group.start_soon(echo, stream)) as listener:
            yield listener.addresses[0][1]


async def test_tls() -> None:
    trusting = ssl.create_default_context(cafile=CERTIFICATE)
    async with tls_server() as port:
        stream = await connect_tls("127.0.0.1", port, trusting, "localhost")
        await stream.send(BIG[:100_000])
        got = b""
        while len(got) < 100_000:
            got += await stream.receive()
        assert got == BIG[:100_000]
        assert stream.extra(SocketAttribute.remote_address) == ("127.0.0.1", port)  # noqa: S610  not Django
        close_now(stream)
        with pytest.raises(anyio.ClosedResourceError):
            await stream.receive()
        before = open_descriptors()
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect_tls("127.0.0.1", port, trusting, "other.example")
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect_tls("127.0.0.1", port, ssl.create_default_context(), "localhost")
        await anyio.sleep(0.02)
        assert open_descriptors() <= before


@pytest.mark.parametrize("leave", [SocketStream.close, SocketStream.abort])
async def test_a_server_that_leaves_the_handshake_is_an_oserror(leave: Callable[[SocketStream], None]) -> None:
    async with listening(leave) as listener:
        with pytest.raises(ConnectionResetError):
            await connect_tls(*listener.addresses[0], ssl.create_default_context(), "localhost")


# --- SocketListener -----------------------------------------------------------------------------------------


async def test_close_stops_accepting_at_once() -> None:
    accepted: list[SocketStream] = []
    listener = await SocketListener.listen("127.0.0.1", 0)
    async with anyio.create_task_group() as group:
        group.start_soon(listener.accept_forever, accepted.append)
        stream = await connect(*listener.addresses[0])
        await anyio.sleep(0.01)
        assert len(accepted) == 1
        listener.close()
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            await connect(*listener.addresses[0])
    # the group has ended, so accept_forever has; what it handed over lives on
    await stream.send(b"x")
    assert await accepted[0].receive() == b"x"
    for left in (stream, accepted[0]):
        left.close()


async def test_close_from_inside_on_connection() -> None:
    listener = await SocketListener.listen("127.0.0.1", 0)

    def on_connection(stream: SocketStream) -> None:
        stream.close()
        listener.close()

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(listener.accept_forever, on_connection)
            (await connect(*listener.addresses[0])).close()


async def test_many_connections_at_once_are_all_accepted() -> None:
    accepted: list[SocketStream] = []
    async with listening(accepted.append) as listener:
        clients = [await connect(*listener.addresses[0]) for _ in range(200)]
        await until(lambda: len(accepted) == 200)
    for stream in clients + accepted:
        stream.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED])
async def test_accepting_survives(code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(streams, "EXHAUSTED_PAUSE_S", 0.01)
    real, failures = socket.socket.accept, [OSError(code, os.strerror(code))] * 3

    def accept(sock: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return real(sock)

    monkeypatch.setattr(socket.socket, "accept", accept)
    accepted: list[SocketStream] = []
    with caplog.at_level(logging.INFO, "lbio.wire.streams"):
        async with listening(accepted.append) as listener:
            client = await connect(*listener.addresses[0])
            await until(lambda: bool(accepted))
    assert not failures
    assert len(caplog.records) == (0 if code == errno.ECONNABORTED else 1)
    client.close()
    accepted[0].close()


async def test_close_ends_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "EXHAUSTED_PAUSE_S", 60.0)

    def accept(_: socket.socket) -> Any:
        raise OSError(errno.EMFILE, "too many")

    with anyio.fail_after(5):
        async with listening(SocketStream.close) as listener:
            monkeypatch.setattr(socket.socket, "accept", accept)
            (await connect(*listener.addresses[0])).close()
            await anyio.sleep(0.02)


async def test_what_on_connection_raises_ends_the_listening() -> None:
    def on_connection(_: SocketStream) -> None:
        raise ZeroDivisionError

    async def run() -> None:
        async with listening(on_connection) as listener:
            stream = await connect(*listener.addresses[0])
            try:
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
            finally:
                stream.close()

    with pytest.raises(ExceptionGroup) as caught:
        await run()
    assert caught.group_contains(ZeroDivisionError)


@LINUX_ONLY
async def test_all_addresses_of_a_name_get_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.2", "192.0.2.1", "127.0.0.1")
    listener = await SocketListener.listen("both", 0)
    (first, port), (second, other_port) = listener.addresses
    assert (first, second) == ("127.0.0.1", "127.0.0.2")
    assert port == other_port != 0
    listener.close()
    resolve_to(monkeypatch, "192.0.2.1")
    with pytest.raises(OSError, match=r"192\.0\.2\.1"):
        await SocketListener.listen("none", 0)


async def test_a_busy_port_is_named() -> None:
    listener = await SocketListener.listen("0.0.0.0", 0)
    port = listener.addresses[0][1]
    with pytest.raises(OSError, match=f"cannot listen on 0.0.0.0:{port}: ") as caught:
        await SocketListener.listen("0.0.0.0", port)
    assert caught.value.errno == errno.EADDRINUSE
    listener.close()
    again = await SocketListener.listen("0.0.0.0", port)
    again.close()


async def test_dual_stack() -> None:
    try:
        listener = await SocketListener.listen("::", 0)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    accepted: list[SocketStream] = []
    async with anyio.create_task_group() as group:
        group.start_soon(listener.accept_forever, accepted.append)
        client = await connect("127.0.0.1", listener.addresses[0][1])
        await anyio.sleep(0.02)
        listener.close()
    assert accepted[0].remote_address == client.local_address
    client.close()
    accepted[0].close()
