"""A body on its way to several takers: over streams in memory, under a clock that jumps."""

import gc
import random
import tracemalloc
from collections.abc import Sequence

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbio.http1 import ChunkedDecoder
from lbio.wire.blob_body import PIECE_BYTES, WINDOW_BYTES, BlobBody, Taker
from lbio.wire.streams import Stream
from tests.lbio.virtual import MemoryNetwork, MemoryStream, in_virtual_time

KIB = 1 << 10


def made(n_bytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(n_bytes)


async def fill(body: BlobBody, data: bytes, piece_bytes: int = 16 * KIB) -> None:
    """Read as a client's connection does."""
    await body.wait_wanted()
    for at in range(0, len(data), piece_bytes):
        body.put(data[at : at + piece_bytes])
        await body.wait_room()
    body.end()


async def take_all(taker: Taker, into: bytearray, pause_s: float = 0) -> None:
    while piece := await taker.take():
        assert len(piece) <= PIECE_BYTES
        into += piece
        await anyio.sleep(pause_s)


async def connected() -> tuple[MemoryStream, Stream]:
    network = MemoryNetwork()
    listener = await network.listen("", 0)
    there: list[Stream] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.accept_forever, there.append)
        here = await network.connect("", listener.addresses[0][1])
        await anyio.wait_all_tasks_blocked()
        listener.close()
    assert isinstance(here, MemoryStream)
    return here, there[0]


async def received(stream: Stream, into: bytearray, pause_s: float = 0) -> None:
    try:
        while True:
            into += await stream.receive()
            await anyio.sleep(pause_s)
    except anyio.EndOfStream:
        pass


# --- the window ------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_every_taker_gets_every_byte_in_order() -> None:
    body, data = BlobBody(None, 60), made(3 * WINDOW_BYTES + 17)
    got = [bytearray() for _ in range(3)]
    async with anyio.create_task_group() as tasks:
        for each, pause_s in zip(got, (0, 0.01, 0.5), strict=True):
            tasks.start_soon(take_all, body.join(), each, pause_s)
        tasks.start_soon(fill, body, data)
    assert [bytes(each) for each in got] == [data] * 3


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 70_000), max_size=40),
    pauses=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_whatever_the_pieces_and_the_paces(sizes: Sequence[int], pauses: Sequence[Sequence[int]]) -> None:
    data = made(sum(sizes))

    async def story() -> None:
        body = BlobBody(len(data), 60)
        got = [bytearray() for _ in pauses]
        held: list[int] = []

        async def write() -> None:
            await body.wait_wanted()
            at = 0
            for size in sizes:
                body.put(data[at : at + size])
                at += size
                held.append(len(body._window))
                await body.wait_room()
            body.end()

        async def take(taker: Taker, into: bytearray, own: Sequence[int]) -> None:
            turn = 0
            while piece := await taker.take():
                into += piece
                turn += 1
                await anyio.sleep(own[turn % len(own)])

        async with anyio.create_task_group() as tasks:
            for each, own in zip(got, pauses, strict=True):
                tasks.start_soon(take, body.join(), each, own)
            tasks.start_soon(write)
        assert [bytes(each) for each in got] == [data] * len(pauses)
        assert max(held, default=0) < WINDOW_BYTES + 70_000

    in_virtual_time(story)()


@in_virtual_time
async def test_the_slowest_decides_how_fast_is_read() -> None:
    body, n_bytes = BlobBody(None, 60), 10 * WINDOW_BYTES
    fast, slow = bytearray(), bytearray()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_all, body.join(), fast)
        tasks.start_soon(take_all, body.join(), slow, 1)
        tasks.start_soon(fill, body, bytes(n_bytes))
        await anyio.sleep(20.5)
        assert len(slow) == 21 * PIECE_BYTES
        assert len(slow) < len(fast) <= len(slow) + WINDOW_BYTES + 16 * KIB
    assert len(slow) == len(fast) == n_bytes


@in_virtual_time
async def test_nothing_is_read_past_the_window_while_one_has_taken_nothing() -> None:
    body = BlobBody(None, 60)
    got, dialling = bytearray(), body.join()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_all, body.join(), got)
        tasks.start_soon(fill, body, bytes(2 * WINDOW_BYTES))
        await anyio.sleep(1000)
        assert len(got) == WINDOW_BYTES
        dialling.leave()  # it could not connect
    assert len(got) == 2 * WINDOW_BYTES


@in_virtual_time
async def test_who_leaves_is_waited_for_no_longer_and_may_leave_again() -> None:
    body = BlobBody(None, 60)
    got, leaver = bytearray(), body.join()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_all, body.join(), got)
        tasks.start_soon(fill, body, bytes(4 * WINDOW_BYTES))
        await leaver.take()
        await anyio.sleep(1)
        leaver.leave()
        leaver.leave()
    assert len(got) == 4 * WINDOW_BYTES


@in_virtual_time
async def test_when_all_have_left_nothing_more_is_read() -> None:
    body, taker = BlobBody(None, 60), None
    taker = body.join()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fill, body, bytes(4 * WINDOW_BYTES))
        await taker.take()
        taker.leave()
        await anyio.sleep(1000)
        assert len(body._window) == WINDOW_BYTES
        tasks.cancel_scope.cancel()


@in_virtual_time
async def test_another_may_join_in_place_of_one_that_has_taken_nothing_but_not_later() -> None:
    body, data = BlobBody(None, 60), made(100)
    body.join().leave()
    got = bytearray()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take_all, body.join(), got)
        tasks.start_soon(fill, body, data)
    assert got == data
    with pytest.raises(RuntimeError, match="beginning is not held"):
        body.join()


@in_virtual_time
async def test_an_empty_body_has_only_an_end() -> None:
    body = BlobBody(0, 60)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fill, body, b"")
        assert await body.join().take() == b""


@in_virtual_time
async def test_a_body_that_comes_byte_by_byte_is_held_in_no_more_memory_and_taken_in_larger_pieces() -> None:
    body = BlobBody(None, 60)
    taker = body.join()
    async with anyio.create_task_group() as tasks:
        first = [b""]

        async def take_first() -> None:
            first[0] = await taker.take()

        tasks.start_soon(take_first)
        await anyio.wait_all_tasks_blocked()
        gc.collect()
        tracemalloc.start()
        for _ in range(200_000):
            body.put(b"x")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(first[0]) == PIECE_BYTES
    assert peak < 2 * WINDOW_BYTES


@in_virtual_time
async def test_who_has_left_gets_nothing_that_looks_like_the_end() -> None:
    for is_over in (False, True):
        body = BlobBody(None, 60)
        taker, other = body.join(), body.join()
        body.put(b"ab")
        assert await taker.take() == await other.take() == b"ab"
        waited: list[str] = []

        async def wait(taker: Taker, waited: list[str]) -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await taker.take()
            waited.append("closed")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, taker, waited)
            await anyio.wait_all_tasks_blocked()
            if is_over:
                body.close()
            else:
                taker.leave()
            body.put(b"c")
        assert waited == ["closed"]
        with pytest.raises(anyio.ClosedResourceError):
            await taker.take()


@in_virtual_time
async def test_a_closed_body_holds_nothing() -> None:
    body = BlobBody(None, 60)
    body.join()
    body.put(bytes(1000))
    body.close()
    assert "0 held for []" in repr(body)


# --- over connections ------------------------------------------------------------------------------------------


@in_virtual_time
async def test_with_a_length_the_bytes_are_sent_as_they_are() -> None:
    data, got = made(500 * KIB), bytearray()
    body = BlobBody(len(data), 60)
    here, there = await connected()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(received, there, got, 0.1)
        tasks.start_soon(fill, body, data)
        await body.join().send_to(here)
        await here.aclose()
    assert got == data


@in_virtual_time
async def test_without_a_length_they_are_chunked_and_the_last_chunk_comes_after_the_end_only() -> None:
    data, got = made(500 * KIB), bytearray()
    body = BlobBody(None, 60)
    here, there = await connected()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(received, there, got)
        tasks.start_soon(body.join().send_to, here)
        body.put(data)
        await anyio.sleep(1)
        assert not got.endswith(b"0\r\n\r\n")
        body.end()
        await anyio.sleep(1)
        here.close()
    decoder = ChunkedDecoder()
    assert decoder.feed(bytes(got)) == data
    assert decoder.finished
    assert not decoder.leftover


@in_virtual_time
async def test_a_server_that_takes_nothing_is_given_up_after_the_patience() -> None:
    body = BlobBody(None, 60)
    here, _there = await connected()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fill, body, bytes(4 * WINDOW_BYTES))
        begun_s = anyio.current_time()
        with pytest.raises(TimeoutError, match="nothing was taken for 60 s"):
            await body.join().send_to(here)
        assert anyio.current_time() == begun_s + 60
        tasks.cancel_scope.cancel()


@in_virtual_time
async def test_a_client_that_is_slow_costs_no_servers_patience() -> None:
    body, got = BlobBody(None, 60), bytearray()
    here, there = await connected()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(received, there, got)
        tasks.start_soon(body.join().send_to, here)
        for _ in range(10):
            await anyio.sleep(1000)
            body.put(b"x")
        body.end()
        await anyio.sleep(1)
        here.close()
    assert got == b"1\r\nx\r\n" * 10 + b"0\r\n\r\n"
