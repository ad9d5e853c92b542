"""Blobs over real sockets: streamed to all servers at once, held nowhere, and asked for everywhere."""

import contextlib
import hashlib
import os
import random
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from lbio.http1 import IncompleteBody, Reader, parse_request_head
from lbio.wire.streams import SocketStream
from simulator.faults import Fault, FaultKind
from simulator.serve import FakeServer
from tests.lbio.kit import PROBES, Rig, balanced, client, played, specs
from tests.simulator.wire import Answer, body_of, load, parse, request

pytestmark = pytest.mark.anyio

PIN = "X-Ollama-LB-Server"
KIB, MIB = 1 << 10, 1 << 20
CALM: dict[str, Any] = {"health": {"resurrect": 0}}
CREATED = b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"
THERE = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def blob_of(n_bytes: int) -> bytes:
    return random.Random(n_bytes).randbytes(n_bytes)


def digest_of(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def head_of(digest: str, *lines: str, method: str = "POST", close: bool = True) -> bytes:
    lines = (f"{method} /api/blobs/{digest} HTTP/1.1", "Host: localhost", *lines, *["Connection: close"] * close)
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def upload(blob: bytes, *lines: str, digest: str = "", close: bool = True) -> bytes:
    return head_of(digest or digest_of(blob), f"Content-Length: {len(blob)}", *lines, close=close) + blob


def chunked_upload(blob: bytes, chunk_bytes: int) -> Iterator[bytes]:
    yield head_of(digest_of(blob), "Transfer-Encoding: chunked")
    for at in range(0, len(blob), chunk_bytes):
        chunk = blob[at : at + chunk_bytes]
        yield b"%x\r\n%s\r\n" % (len(chunk), chunk)
    yield b"0\r\n\r\n"


def who_has(rig: Rig, blob: bytes) -> list[str]:
    kept = (digest_of(blob), len(blob))
    return [fake.spec.name for fake in rig.fleet if kept in fake.live.fake.blobs.items()]


def fault(server: FakeServer, kind: FaultKind) -> None:
    server.set_fault(Fault(kind))


async def nothing_left(rig: Rig) -> None:
    """Wait until no request and no attempt is under way."""
    ledger = rig.service.driver.balancer.ledger
    with anyio.fail_after(5):
        while rig.n_requests or ledger.attempts or rig.service.driver._runs:  # noqa: ASYNC110
            await anyio.sleep(0.01)


# --- servers that take a body as the test wants ----------------------------------------------------------------


class Upstream:
    """Answers probes as an Ollama, and takes uploads: at its own pace, to the end or not."""

    def __init__(self) -> None:
        self.answer = CREATED
        self.goes_on = anyio.Event()  # reads nothing of a body before that
        self.goes_on.set()
        self.dies_at: int | None = None  # of the bytes of a body: the connection is reset
        self.answers_at: int | None = None  # of them: the rest stays unread
        self.got = bytearray()
        self.heads: list[bytes] = []
        self.n_cut = 0  # uploads that ended in the middle
        self.url = ""

    async def serve(self, stream: SocketStream) -> None:
        try:
            reader = Reader(stream)
            while (raw := await reader.read_head(1 << 20, role="request")) is not None:
                head = parse_request_head(raw)
                if head.path in PROBES:
                    body = PROBES[head.path]
                    await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                    continue
                self.heads.append(bytes(raw))
                self.got.clear()
                await self.goes_on.wait()
                if not await self._take(stream, reader.body_chunks(head)):
                    break
        except IncompleteBody:
            self.n_cut += 1
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        finally:
            stream.close()

    async def _take(self, stream: SocketStream, pieces: AsyncIterator[bytes]) -> bool:
        while True:
            if self.dies_at is not None and len(self.got) >= self.dies_at:
                stream.abort()
                return False
            if self.answers_at is not None and len(self.got) >= self.answers_at:
                await stream.send(self.answer)
                await anyio.sleep(60)  # until it is cancelled, or the connection is closed
                return False
            piece = await anext(pieces, b"")
            if not piece:
                await stream.send(self.answer)
                return True
            self.got += piece


@contextlib.asynccontextmanager
async def upstreams(n: int, **config: Any) -> AsyncIterator[tuple[Rig, list[Upstream]]]:
    """Run a balancer in front of `n` of them called s0, s1, …"""
    async with played([Upstream() for _ in range(n)], **{**CALM, **config}) as (rig, servers):
        yield rig, servers


# --- to all servers --------------------------------------------------------------------------------------------


async def test_a_blob_reaches_every_server_byte_for_byte() -> None:
    blob = blob_of(3 * MIB + 5)
    async with balanced(specs("a", "b", "c")) as rig:
        answer = await rig.send(upload(blob))
        assert (answer.status, answer.body, answer.header("Content-Length")) == (201, b"", "0")
        assert answer.header(PIN) == "a, b, c"
        assert who_has(rig, blob) == ["a", "b", "c"]
        again = await rig.send(upload(blob))
        assert (again.status, again.body) == (200, b"")


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 100_000])
async def test_a_chunked_blob_is_chunked_anew_however_it_was_cut(chunk_bytes: int) -> None:
    blob = blob_of(min(2500 * chunk_bytes, MIB))
    async with upstreams(3) as (rig, servers):
        answer = parse(await rig.exchange([b"".join(chunked_upload(blob, chunk_bytes))]))
        assert answer.status == 201
        assert [bytes(server.got) for server in servers] == [blob] * 3
        assert all(b"\r\nTransfer-Encoding: chunked\r\n" in server.heads[0] for server in servers)
        assert not any(b"ontent-length" in server.heads[0].lower() for server in servers)


async def test_a_blob_that_comes_byte_by_byte() -> None:
    blob = blob_of(300)
    async with upstreams(2) as (rig, servers):
        raw = b"".join(chunked_upload(blob, 3))
        answer = parse(await rig.exchange([raw[i : i + 1] for i in range(len(raw))]))
        assert answer.status == 201
        assert [bytes(server.got) for server in servers] == [blob] * 2


async def test_the_length_that_the_client_gave_is_told_to_the_servers_and_expect_is_answered_here() -> None:
    blob = blob_of(100_000)
    async with upstreams(2) as (rig, servers):
        head, _, body = upload(blob, "Expect: 100-continue").partition(b"\r\n\r\n")
        async with client(rig) as one:
            await one.send(head + b"\r\n\r\n")
            await one.until(b"HTTP/1.1 100 Continue\r\n\r\n")
            await one.send(body)
            assert parse(await one.rest()).status == 201
        for server in servers:
            assert server.got == blob
            assert b"\r\nContent-Length: 100000\r\n" in server.heads[0]
            assert b"xpect" not in server.heads[0]


async def test_no_limit_for_bodies_that_are_held_concerns_a_blob() -> None:
    blob = blob_of(2 * MIB)
    limits = {"body_bytes_max": "1KiB", "bodies_bytes_max": "300KiB"}
    async with balanced(specs("a", "b"), limits=limits) as rig:
        assert (await rig.send(upload(blob))).status == 201


async def test_what_is_under_way_of_all_blobs_counts_as_held() -> None:
    limits = {"body_bytes_max": "1KiB", "bodies_bytes_max": "300KiB"}
    async with upstreams(2, limits=limits) as (rig, servers):
        servers[0].goes_on = anyio.Event()
        async with client(rig) as one:
            await one.send(head_of(digest_of(b""), "Transfer-Encoding: chunked"))
            with anyio.fail_after(5):
                while not servers[0].heads:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            answer = await rig.send(upload(blob_of(MIB)))
            assert answer.status == 503
            assert "bodies_bytes_max" in body_of(answer)["error"]
        await nothing_left(rig)
        assert rig.service.front.bodies.held == 0


async def test_an_empty_blob_and_one_without_a_length() -> None:
    async with balanced(specs("a", "b")) as rig:
        for raw in (upload(b""), head_of(digest_of(b""))):
            assert (await rig.send(raw)).status in {200, 201}
        assert who_has(rig, b"") == ["a", "b"]


async def test_a_connection_carries_one_blob_after_the_other() -> None:
    blobs = [blob_of(n) for n in (300_000, 1, 70_000)]
    async with balanced(specs("a", "b")) as rig, client(rig) as one:
        for blob in blobs:
            await one.send(upload(blob, close=False))
            assert b" 201 Created" in await one.until(b"\r\n\r\n")
            assert who_has(rig, blob) == ["a", "b"]


async def test_a_model_is_made_of_a_blob_on_every_server() -> None:
    blob = blob_of(1000)
    files = {"model": "made", "files": {"x.gguf": digest_of(blob)}}
    async with balanced(specs("a", "b")) as rig:
        refused = await rig.ask("POST", "/api/create", files)
        assert "no such file or directory" in refused.lines[-1]["error"]
        await rig.send(upload(blob))
        made = await rig.ask("POST", "/api/create", files)
        assert made.lines[-1] == {"status": "success", "servers": dict.fromkeys("ab", "success")}
        assert "made:latest" in {model["name"] for model in body_of(await rig.ask("GET", "/api/tags"))["models"]}


async def test_a_blob_goes_only_to_the_servers_that_the_client_names() -> None:
    blob = blob_of(1000)
    async with balanced(specs("a", "b", "c")) as rig:
        assert (await rig.send(upload(blob, f"{PIN}: a,c"))).header(PIN) == "a, c"
        assert (await rig.send(upload(blob_of(1001), f"{PIN}: b"))).header(PIN) == "b"
        assert who_has(rig, blob) == ["a", "c"]
        assert who_has(rig, blob_of(1001)) == ["b"]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
async def test_a_large_blob_takes_little_memory() -> None:
    piece = blob_of(MIB)
    sha = hashlib.sha256()
    for _ in range(128):
        sha.update(piece)
    async with balanced(specs("a", "b", "c")) as rig:
        async with client(rig) as one:
            await one.send(head_of(f"sha256:{sha.hexdigest()}", f"Content-Length: {128 * MIB}"))
            before_bytes = most_bytes = resident_bytes()
            with anyio.fail_after(60):
                for _ in range(128):
                    await one.send(piece)
                    most_bytes = max(most_bytes, resident_bytes())
                answer = parse(await one.rest())
        assert answer.status == 201
        assert most_bytes - before_bytes < 12 * MIB


# --- one server ------------------------------------------------------------------------------------------------


async def test_one_server_alone_answers_for_itself() -> None:
    blob = blob_of(3 * MIB)
    async with balanced(specs("a"), limits={"body_bytes_max": "1KiB"}) as rig:
        first, again = [await rig.send(upload(blob)) for _ in range(2)]
        assert (first.status, first.body, first.header(PIN)) == (201, b"", "a")
        assert (again.status, again.body) == (200, b"")
        assert who_has(rig, blob) == ["a"]


async def test_one_after_the_other_a_blob_of_which_nothing_was_sent_goes_to_the_next() -> None:
    blob = blob_of(3 * MIB)
    routes = {"/api/blobs/:digest": "sequential"}
    async with balanced(specs("a", "b"), routes=routes, **CALM) as rig:
        await rig.send(upload(b"x"))
        (first,) = who_has(rig, b"x")
        fault(next(fake for fake in rig.fleet if fake.spec.name == first), FaultKind.REFUSE)
        answer = await rig.send(upload(blob))
        assert (answer.status, answer.header("X-Ollama-LB-Attempts")) in {(201, "1"), (201, "2")}
        assert len(who_has(rig, blob)) == 1


@pytest.mark.parametrize("status", [503, 404])
async def test_what_was_half_sent_is_not_sent_again(status: int) -> None:
    async with upstreams(2, routes={"/api/blobs/:digest": "sequential"}) as (rig, servers):
        for server in servers:
            server.answer = b"HTTP/1.1 %d Oh\r\nContent-Length: 2\r\n\r\n{}" % status
            server.answers_at = 1000
        answer = await rig.send(upload(blob_of(3 * MIB)))
        assert (answer.status, answer.body, answer.header("X-Ollama-LB-Attempts")) == (status, b"{}", "1")


# --- whether it is there ---------------------------------------------------------------------------------------


async def ask_for(rig: Rig, blob: bytes) -> Answer:
    return await rig.send(head_of(digest_of(blob), method="HEAD"), "HEAD")


async def test_a_blob_is_there_only_when_all_servers_have_it() -> None:
    async with balanced(specs("a", "b", "c")) as rig:
        blob = blob_of(1000)
        missing, recorded = await ask_for(rig, blob), parse(load("blob_head_missing").response, "HEAD")
        for name in ("Content-Type", "Content-Length"):
            assert missing.header(name) == recorded.header(name)
        assert (missing.status, missing.body) == (404, b"")
        await rig.send(upload(blob, f"{PIN}: a,b"))
        assert (await ask_for(rig, blob)).status == 404
        await rig.send(upload(blob))
        there = await ask_for(rig, blob)
        assert (there.status, there.header(PIN)) == (200, "a, b, c")


async def test_a_server_that_does_not_answer_may_not_have_it() -> None:
    blob = blob_of(1000)
    async with balanced(specs("a", "b"), **CALM) as rig:
        await rig.send(upload(blob))
        fault(rig.fleet[1], FaultKind.RESET)
        assert (await ask_for(rig, blob)).status == 404
        fault(rig.fleet[0], FaultKind.RESET)
        assert (await ask_for(rig, blob)).status == 502


async def test_what_one_server_alone_says_is_the_answer_and_no_dead_one_is_asked_too() -> None:
    async with balanced(specs("a", "b"), **CALM) as rig:
        fault(rig.fleet[1], FaultKind.REFUSE)
        for _ in range(2):
            await rig.ask("POST", "/sync_servers")
        answer = await ask_for(rig, blob_of(10))
        assert (answer.status, answer.header("X-Ollama-LB-Attempts")) == (404, "1")
        assert answer.header("Content-Length") == "102"


async def test_other_methods_are_refused_whatever_they_send() -> None:
    async with balanced(specs("a", "b")) as rig:
        answer = await rig.send(request("PUT", "/api/blobs/sha256:x", b"x"))
        assert (answer.status, answer.header("Allow")) == (405, "HEAD, POST")
