"""Blobs on their way to servers that are slow or fail, and from clients that leave, stall or speak nonsense."""

import contextlib

import anyio
import pytest

from simulator.faults import FaultKind
from tests.lbio.kit import Client, balanced, client, specs
from tests.lbio.test_proxy_blobs import (
    CALM,
    KIB,
    MIB,
    THERE,
    Upstream,
    blob_of,
    digest_of,
    fault,
    head_of,
    nothing_left,
    upload,
    upstreams,
    who_has,
)
from tests.simulator.wire import body_of, load, parse

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- servers that are slow, or fail ----------------------------------------------------------------------------


async def test_the_slowest_server_decides_how_fast_the_client_may_send() -> None:
    n_pieces = 64
    piece = bytes(MIB)
    async with upstreams(3) as (rig, servers), client(rig) as one:
        servers[1].goes_on = anyio.Event()
        sent = 0

        async def send() -> None:
            nonlocal sent
            for _ in range(n_pieces):
                await one.send(piece)
                sent += 1

        await one.send(head_of("sha256:x", f"Content-Length: {n_pieces * MIB}"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            await anyio.sleep(0.5)
            stood_at = sent
            await anyio.sleep(0.3)
            assert sent == stood_at < n_pieces // 2  # what the buffers of some sockets take
            assert len(servers[0].got) < n_pieces * MIB // 2
            servers[1].goes_on.set()
        assert parse(await one.rest()).status == 201
        assert [len(server.got) for server in servers] == [n_pieces * MIB] * 3


@pytest.mark.parametrize("dies_at", [0, 1, 5 * MIB])
async def test_a_server_that_dies_in_a_blob_does_not_stop_the_others(dies_at: int) -> None:
    blob = blob_of(10 * MIB)
    async with upstreams(3) as (rig, servers):
        servers[1].dies_at = dies_at
        answer = await rig.send(upload(blob))
        assert answer.status == 502
        told = body_of(answer)
        assert told["error"].startswith(f"blob {digest_of(blob)}: done on s0, s2; s1: ")
        assert (told["servers"]["s0"], told["servers"]["s2"]) == ("success", "success")
        assert servers[0].got == servers[2].got == blob
        await nothing_left(rig)


async def test_when_all_servers_die_the_client_is_told_at_once_and_no_more_is_read() -> None:
    async with upstreams(2) as (rig, servers), client(rig) as one:
        for server in servers:
            server.dies_at = MIB
        await one.send(head_of("sha256:x", f"Content-Length: {1 << 40}"))
        with contextlib.suppress(anyio.BrokenResourceError):
            for _ in range(8):
                await one.send(bytes(MIB))
        answer = parse(await one.until(b"\r\n\r\n") + one.data)
        assert answer.status == 502
        assert answer.header("Connection") == "close"
        await nothing_left(rig)


async def test_a_server_that_refuses_the_connection_is_named_and_the_others_have_it() -> None:
    blob = blob_of(MIB)
    async with balanced(specs("a", "b", "c"), **CALM) as rig:
        fault(rig.fleet[1], FaultKind.REFUSE)
        answer = await rig.send(upload(blob))
        assert answer.status == 502
        assert "done on a, c; b: connection refused" in body_of(answer)["error"]
        assert who_has(rig, blob) == ["a", "c"]


async def test_a_server_that_takes_nothing_is_given_up_and_the_others_have_it() -> None:
    blob = blob_of(32 * MIB)
    async with upstreams(3, timeouts={"silence": "300ms"}) as (rig, servers):
        servers[2].goes_on = anyio.Event()
        answer = await rig.send(upload(blob))
        assert answer.status == 502
        assert "done on s0, s1; s2: of the body nothing was taken for 0.3 s" in body_of(answer)["error"]
        assert servers[0].got == servers[1].got == blob


async def test_a_server_that_has_it_all_and_says_nothing_is_given_up_after_the_time_for_an_answer() -> None:
    async with upstreams(2, timeouts={"answer": "300ms"}) as (rig, servers):
        servers[1].answer = b""
        answer = await rig.send(upload(blob_of(1000)))
        assert answer.status == 502
        assert "done on s0; s1: no whole answer in time" in body_of(answer)["error"]


async def test_the_time_for_an_answer_begins_when_the_blob_is_sent() -> None:
    blob = blob_of(1000)
    async with balanced(specs("a", "b"), timeouts={"answer": "250ms"}) as rig, client(rig) as one:
        await one.send(head_of(digest_of(blob), f"Content-Length: {len(blob)}"))
        for at in range(0, 1000, 100):
            await one.send(blob[at : at + 100])
            await anyio.sleep(0.1)
        assert parse(await one.rest()).status == 201


async def test_a_server_that_has_it_answers_at_once_and_the_others_get_it_all() -> None:
    blob = blob_of(10 * MIB)
    async with upstreams(3) as (rig, servers):
        servers[0].answer, servers[0].answers_at = THERE, 0
        answer = await rig.send(upload(blob))
        assert (answer.status, answer.body) == (201, b"")
        assert len(servers[0].got) == 0
        assert servers[1].got == servers[2].got == blob


async def test_when_all_have_it_the_client_is_told_without_sending_the_rest() -> None:
    async with upstreams(2) as (rig, servers), client(rig) as one:
        for server in servers:
            server.answer, server.answers_at = THERE, 0
        await one.send(head_of("sha256:x", f"Content-Length: {1 << 40}", close=False) + bytes(1000))
        answer = parse(await one.rest())
        assert (answer.status, answer.header("Connection")) == (200, "close")
        await nothing_left(rig)


async def test_a_server_that_refuses_the_blob_early_is_named() -> None:
    blob = blob_of(10 * MIB)
    said = b'{"error":"no space left on device"}'
    async with upstreams(2) as (rig, servers):
        servers[1].answer = b"HTTP/1.1 500 Oh\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said)
        servers[1].answers_at = MIB
        answer = await rig.send(upload(blob))
        assert answer.status == 502
        assert "done on s0; s1: no space left on device" in body_of(answer)["error"]
        assert servers[0].got == blob


async def test_a_blob_that_is_not_what_it_is_called_is_refused_as_one_ollama_does() -> None:
    capture = load("blob_post_wrong_digest")
    async with balanced(specs("a", "b")) as rig:
        answer, expected = await rig.send(capture.request), parse(capture.response)
        assert (answer.status, answer.body) == (400, expected.body)
        assert answer.header("Content-Type") == expected.header("Content-Type")
        assert rig.healths() == {"a": 1.0, "b": 1.0}
        wrong = await rig.send(upload(b"x", digest="sha256:12"))
        assert (wrong.status, body_of(wrong)) == (400, {"error": "invalid digest format"})


async def test_with_nobody_there_the_client_is_told_before_it_sends_anything() -> None:
    async with balanced(specs("a", "b"), **CALM) as rig:
        for server in rig.fleet:
            fault(server, FaultKind.REFUSE)
        for _ in range(2):
            await rig.ask("POST", "/sync_servers")
        answer = await rig.send(head_of("sha256:x", "Content-Length: 1000000", "Expect: 100-continue"))
        assert answer.status == 502
        assert (await rig.send(upload(blob_of(3 * MIB)))).status == 502


# --- clients that leave, stall or speak nonsense ---------------------------------------------------------------


async def begun(one: Client, servers: list[Upstream]) -> None:
    """Send half a blob, and see it arrive."""
    await one.send(head_of("sha256:x", f"Content-Length: {2 * MIB}") + bytes(MIB))
    with anyio.fail_after(5):
        while any(len(server.got) < MIB for server in servers):  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def test_a_client_that_leaves_in_a_blob_leaves_nothing_behind_and_nobody_is_blamed() -> None:
    async with upstreams(3) as (rig, servers):
        async with client(rig) as one:
            await begun(one, servers)
        await nothing_left(rig)
        assert set(rig.healths().values()) == {1.0}
        with anyio.fail_after(5):
            while [server.n_cut for server in servers] != [1, 1, 1]:  # noqa: ASYNC110
                await anyio.sleep(0.01)


async def test_a_client_that_leaves_while_a_server_takes_nothing_is_noticed() -> None:
    async with upstreams(2) as (rig, servers):
        servers[1].goes_on = anyio.Event()
        async with client(rig) as one:
            await one.send(head_of("sha256:x", f"Content-Length: {MIB}") + bytes(300 * KIB))
            await anyio.sleep(0.1)
        await nothing_left(rig)
        assert set(rig.healths().values()) == {1.0}


@pytest.mark.parametrize("n_servers", [1, 2])
async def test_a_client_that_stalls_gets_408(n_servers: int) -> None:
    async with upstreams(n_servers, client={"body_timeout": "200ms"}) as (rig, servers), client(rig) as one:
        await begun(one, servers)
        answer = parse(await one.until(b"}") + one.data)
        assert answer.status == 408
        await nothing_left(rig)
        assert set(rig.healths().values()) == {1.0}


@pytest.mark.parametrize("n_servers", [1, 2])
async def test_a_client_that_speaks_nonsense_in_a_blob_gets_400_and_no_server_the_end_of_it(n_servers: int) -> None:
    async with upstreams(n_servers) as (rig, servers):
        answer = await rig.send(head_of("sha256:x", "Transfer-Encoding: chunked") + b"3\r\nabc\r\nzz\r\n")
        assert answer.status == 400
        assert "malformed chunk size" in body_of(answer)["error"]
        await nothing_left(rig)
        assert set(rig.healths().values()) == {1.0}
        assert all(server.n_cut or not server.heads for server in servers)
