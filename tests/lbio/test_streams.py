"""SocketStream over real sockets, on every backend: nothing lost, nothing twice, nobody left waiting."""

import contextlib
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import SocketAttribute

from lbio.wire.streams import SocketStream
from tests.lbio.sockets_kit import BACKENDS, BIG, pair, receive_all, tcp_pair

pytestmark = pytest.mark.anyio


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_bytes_and_the_end_arrive() -> None:
    async with tcp_pair() as (client, server):
        await client.send(b"hello")
        assert await server.receive(2) == b"he"
        assert await server.receive() == b"llo"
        await client.send(b"")
        await client.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await server.receive()
        await server.send(b"answer")  # half-closed is not closed
        assert await client.receive() == b"answer"
        assert (client.bytes_sent, server.bytes_sent) == (5, 6)


async def test_a_full_buffer_takes_partial_sends() -> None:
    async with tcp_pair() as (client, server):
        async with anyio.create_task_group() as group:

            async def send() -> None:
                await client.send(BIG)
                await client.send_eof()

            group.start_soon(send)
            await anyio.sleep(0.02)
            assert 0 < client.bytes_sent < len(BIG)
            assert await receive_all(server) == BIG
        assert client.bytes_sent == len(BIG)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
async def test_what_the_peer_has_taken_shows_before_there_is_room_to_send_again() -> None:
    async with tcp_pair() as (client, server):
        with anyio.move_on_after(0.1):
            await client.send(BIG * 4)
        sent, taken = client.bytes_sent, client.bytes_taken
        assert 0 < taken < sent
        for _ in range(8):
            await server.receive(65536)
        await anyio.sleep(0.01)
        assert client.bytes_taken > taken
        client.close()
        assert client.bytes_taken == client.bytes_sent == sent


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.parametrize("how", ["send_eof", "close", "abort"])
async def test_an_end_shows_though_there_are_bytes_before_it(how: str) -> None:
    async with tcp_pair() as (client, server):
        await client.send(b"unread")
        await anyio.sleep(0.01)
        assert not server.has_peer_ended()
        if how == "send_eof":
            await client.send_eof()
        else:
            getattr(client, how)()
        await anyio.sleep(0.01)
        assert server.has_peer_ended()
        assert client.has_peer_ended() is (how != "send_eof")


async def test_send_nowait_says_how_much_it_took() -> None:
    with pair() as (left, right):
        sent = 0
        while taken := left.send_nowait(memoryview(BIG)[sent:]):
            sent += taken
        assert 0 < sent < len(BIG)
        got = b""
        while len(got) < sent:
            got += await right.receive()
        assert got == BIG[:sent]


async def test_a_cancelled_receive_loses_nothing() -> None:
    with pair() as (left, right):
        async with anyio.create_task_group() as group:

            async def send() -> None:
                for number in range(100):
                    await left.send(b"%d," % number)
                    if number % 5 == 0:
                        await anyio.sleep(0.001)
                await left.send_eof()

            group.start_soon(send)
            got, ended, cancelled = b"", False, 0
            while not ended:
                with anyio.move_on_after(0.0003) as scope:
                    try:
                        got += await right.receive(3)
                    except anyio.EndOfStream:
                        ended = True
                cancelled += scope.cancelled_caught
        assert got == b"".join(b"%d," % number for number in range(100))
        assert cancelled > 0


async def test_a_cancelled_send_sends_nothing_twice() -> None:
    with pair() as (left, right):
        got = b""
        cancelled = 0
        while left.bytes_sent < len(BIG):
            with anyio.move_on_after(0.001) as scope:
                await left.send(BIG[left.bytes_sent :])
            cancelled += scope.cancelled_caught
            while len(got) < left.bytes_sent:
                got += await right.receive()
        left.close()
        assert got + await receive_all(right) == BIG
        assert cancelled > 1


async def test_a_peer_that_is_always_ready_does_not_hold_the_loop() -> None:
    with pair() as (left, right):
        longest_s = 0.0
        left.send_nowait(b"x" * 100)

        async def wait() -> None:
            nonlocal longest_s
            while True:
                began_s = time.monotonic()
                await anyio.lowlevel.checkpoint()
                longest_s = max(longest_s, time.monotonic() - began_s)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            for _ in range(100):
                assert await right.receive(1)
                time.sleep(0.001)  # noqa: ASYNC251  work on what was received
            group.cancel_scope.cancel()
        assert longest_s < 0.05  # and not the whole time


async def test_a_cancelled_task_whose_peer_is_always_ready_ends() -> None:
    with pair() as (left, right):
        left.send_nowait(b"x" * 100)
        with anyio.CancelScope() as scope:
            scope.cancel()
            for _ in range(100):
                await right.receive(1)
                time.sleep(0.001)  # noqa: ASYNC251
        assert scope.cancelled_caught


@pytest.mark.parametrize("action", ["close", "abort", "aclose"])
async def test_closing_wakes_who_waits(action: str) -> None:
    async with tcp_pair() as (client, server):
        errors: list[str] = []

        async def wait_for(call: Callable[[], Any]) -> None:
            try:
                await call()
            except anyio.ClosedResourceError:
                errors.append("closed")

        async with anyio.create_task_group() as group:
            group.start_soon(wait_for, server.receive)
            group.start_soon(wait_for, lambda: server.send(BIG))
            await anyio.sleep(0.02)
            if action == "aclose":
                await server.aclose()
            else:
                getattr(server, action)()
        assert errors == ["closed"] * 2
        assert server.raw_socket.fileno() == -1
        for call in (server.receive, server.send_eof, lambda: server.send(b"x")):
            with pytest.raises(anyio.ClosedResourceError):
                await call()
        with pytest.raises(anyio.ClosedResourceError):
            server.send_nowait(b"x")
        server.close()
        server.abort()
        assert "closed" in repr(server)
        if action == "abort":
            with pytest.raises(anyio.BrokenResourceError):
                await receive_all(client)


async def test_a_closed_streams_waiter_leaves_the_next_owner_of_its_number_alone() -> None:
    with pair() as (left, right), contextlib.ExitStack() as stack:

        async def wait(stream: SocketStream) -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await stream.receive()

        async with anyio.create_task_group() as group:
            group.start_soon(wait, left)
            await anyio.sleep(0.01)
            number = left.raw_socket.fileno()
            left.close()
            right.close()
            first, second = stack.enter_context(pair())  # gets the numbers that are free now
            if number not in {first.raw_socket.fileno(), left.raw_socket.fileno()}:
                pytest.skip("this system does not reuse numbers at once")
            group.start_soon(second.send, b"1")
            with anyio.fail_after(5):
                assert await first.receive() == b"1"


async def test_close_is_an_end_and_abort_is_a_reset() -> None:
    async with tcp_pair() as (client, server):
        server.close()
        with pytest.raises(anyio.EndOfStream):
            await client.receive()
    async with tcp_pair() as (client, server):
        server.abort()
        await anyio.sleep(0.01)
        with pytest.raises(anyio.BrokenResourceError):
            await client.receive()
        with pytest.raises(anyio.BrokenResourceError):
            await client.send(b"x")


async def test_two_tasks_at_once_are_refused() -> None:
    with pair() as (left, _right):
        async with anyio.create_task_group() as group:
            group.start_soon(left.receive)
            group.start_soon(left.send, BIG)
            await anyio.sleep(0.01)
            with pytest.raises(anyio.BusyResourceError):
                await left.receive()
            with pytest.raises(anyio.BusyResourceError):
                await left.send(b"x")
            with pytest.raises(anyio.BusyResourceError):
                left.send_nowait(b"x")
            group.cancel_scope.cancel()


async def test_attributes() -> None:
    async with tcp_pair() as (client, server):
        assert client.remote_address == server.local_address
        assert server.remote_address == client.local_address
        for attribute, value in (
            (SocketAttribute.family, socket.AF_INET),
            (SocketAttribute.local_address, client.local_address),
            (SocketAttribute.remote_address, client.remote_address),
            (SocketAttribute.raw_socket, client.raw_socket),
        ):
            assert client.extra(attribute) == value  # noqa: S610  not Django
        raw = client.raw_socket
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not raw.getblocking()
        remote = client.remote_address
        client.close()
        assert client.remote_address == remote  # a log line wants it afterwards


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.data = b""
        self.ends: list[str] = []

    def take(self, data: bytes) -> None:
        assert data
        self.data += data

    def take_end(self, why: str) -> None:
        self.ends.append(why)


async def given(stream: SocketStream, sink: Kept) -> None:
    """Give what comes to the sink; without callbacks, there is nothing to test."""
    if not stream.give_to(sink):
        pytest.skip("nobody calls back here")


async def test_a_sink_gets_all_that_comes_and_the_end_once() -> None:
    async with tcp_pair() as (client, server):
        sink = Kept()
        await given(server, sink)
        for _ in range(3):
            await client.send(b"abc")
            await anyio.sleep(0.01)
        await client.send_eof()
        await anyio.sleep(0.01)
        assert (sink.data, sink.ends) == (b"abc" * 3, [""])


async def test_a_sink_is_told_of_a_reset() -> None:
    async with tcp_pair() as (client, server):
        sink = Kept()
        await given(server, sink)
        client.abort()
        await anyio.sleep(0.01)
        assert sink.ends == ["[Errno 104] Connection reset by peer"]


async def test_what_comes_while_nobody_wants_it_waits() -> None:
    async with tcp_pair() as (client, server):
        sink = Kept()
        await given(server, sink)
        server.keep()
        await client.send(b"first")
        await anyio.sleep(0.01)
        assert sink.data == b""
        assert await server.receive() == b"first"
        await client.send(b"second")
        await anyio.sleep(0.01)
        await given(server, sink)
        await anyio.sleep(0.01)
        assert sink.data == b"second"


async def test_a_sink_and_a_task_do_not_read_at_once() -> None:
    with pair() as (left, _right):
        await given(left, Kept())
        with pytest.raises(anyio.BusyResourceError):
            await left.receive()
        left.keep()
        async with anyio.create_task_group() as group:
            group.start_soon(left.receive)
            await anyio.sleep(0.01)
            with pytest.raises(anyio.BusyResourceError):
                left.give_to(Kept())
            group.cancel_scope.cancel()
        left.close()
        with pytest.raises(anyio.ClosedResourceError):
            left.give_to(Kept())


async def test_a_sink_that_closes_its_stream_gets_nothing_more() -> None:
    async with tcp_pair() as (client, server):

        class Closing(Kept):
            def take(self, data: bytes) -> None:
                super().take(data)
                server.close()

        sink = Closing()
        await given(server, sink)
        await client.send(b"x")
        await anyio.sleep(0.01)
        assert (sink.data, sink.ends) == (b"x", [])
