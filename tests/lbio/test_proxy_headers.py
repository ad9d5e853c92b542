"""Which headers go through the balancer, and which it adds."""

import gzip

import pytest

from tests.lbio.kit import NDJSON, STREAM, balanced, chunked, scripted, specs
from tests.simulator.wire import chat, request

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def with_headers(*lines: str) -> bytes:
    raw = request("POST", "/api/chat", chat())
    return raw.replace(b"\r\n", "".join(f"\r\n{line}" for line in lines).encode() + b"\r\n", 1)


async def test_the_server_gets_its_own_authority_as_host() -> None:
    async with scripted() as (rig, (server,)):
        await rig.chat()
        assert [value for name, value in server.headers() if name == "host"] == [server.url.removeprefix("http://")]


async def test_end_to_end_headers_reach_the_server_unchanged() -> None:
    async with scripted() as (rig, (server,)):
        await rig.send(with_headers("Authorization: Bearer x", "User-Agent: me/1", "X-A: 1", "X-A: 2", "X-Empty:"))
        got = server.headers()
    assert {("authorization", "Bearer x"), ("user-agent", "me/1"), ("x-empty", "")} <= set(got)
    assert [value for name, value in got if name == "x-a"] == ["1", "2"]


async def test_hop_by_hop_headers_do_not_reach_the_server() -> None:
    gone = [
        "Keep-Alive: 5",
        "TE: trailers",
        "Trailer: X",
        "Upgrade: h2c",
        "Proxy-Connection: x",
        "Proxy-Authorization: x",
    ]
    async with scripted() as (rig, (server,)):
        await rig.send(with_headers(*gone, "X-Named: 1", "Connection: X-Named, Upgrade"))
        names = {name for name, _ in server.headers()}
    assert not names & {"x-named", "connection", *(line.partition(":")[0].lower() for line in gone)}


async def test_the_origin_stays_here() -> None:
    async with scripted() as (rig, (server,)):
        assert (await rig.send(with_headers("Origin: http://localhost:3000"))).status == 200
        assert "origin" not in {name for name, _ in server.headers()}


async def test_headers_in_our_name_are_not_believed() -> None:
    async with scripted() as (rig, (server,)):
        await rig.send(with_headers("X-Ollama-LB-Request-Id: forged"))
        assert not [name for name, _ in server.headers() if name.startswith("x-ollama-lb")]


@pytest.mark.parametrize(("forwarded", "name", "alone", "after"), [
    ("x-forwarded-for", "x-forwarded-for", "127.0.0.1", "10.0.0.1, 127.0.0.1"),
    ("forwarded", "forwarded", "for=127.0.0.1", "for=10.0.0.1, for=127.0.0.1"),
])  # fmt: skip
async def test_the_server_is_told_who_asks(forwarded: str, name: str, alone: str, after: str) -> None:
    async with scripted(proxy={"forwarded": forwarded}) as (rig, (server,)):
        await rig.chat()
        assert (name, alone) in server.headers()
        before = "for=10.0.0.1" if forwarded == "forwarded" else "10.0.0.1"
        await rig.send(with_headers(f"{name}: {before}"))
        assert [value for found, value in server.headers() if found == name] == [after]


async def test_the_server_is_told_what_it_came_through() -> None:
    async with scripted() as (rig, (server,)):
        await rig.send(with_headers("Via: 1.0 nginx"))
        assert [value for name, value in server.headers() if name == "via"] == [
            f"1.0 nginx, 1.1 {rig.service.driver.via}"
        ]


async def test_the_server_is_not_told_who_asks_when_that_is_configured() -> None:
    async with scripted(proxy={"forwarded": "none"}) as (rig, (server,)):
        await rig.chat()
        assert not {"x-forwarded-for", "forwarded"} & {name for name, _ in server.headers()}


async def test_answers_say_who_gave_them_and_are_numbered() -> None:
    async with balanced(specs("a")) as rig:
        answers = [await rig.chat() for _ in range(3)]
    assert {answer.header("X-Ollama-LB-Server") for answer in answers} == {"a"}
    assert {answer.header("X-Ollama-LB-Attempts") for answer in answers} == {"1"}
    ids = [answer.header("X-Ollama-LB-Request-Id") for answer in answers]
    assert None not in ids
    assert len(set(ids)) == 3


async def test_an_error_of_our_own_is_numbered_too() -> None:
    async with balanced(specs("a")) as rig:
        answer = await rig.chat(model="nosuch")
    assert answer.status == 404
    assert answer.header("X-Ollama-LB-Request-Id")


async def test_the_servers_headers_reach_the_client_but_for_those_of_its_connection() -> None:
    async with scripted() as (rig, (server,)):
        more = b"X-Kept: 1\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nKeep-Alive: timeout=5\r\nX-Named: 2\r\n"
        more += b"Connection: X-Named\r\nX-Ollama-LB-Server: forged\r\nTransfer-Encoding: chunked\r\n\r\n"
        server.pieces = [NDJSON + more + chunked(STREAM)]
        answer = await rig.chat()
    names = [name for name, _ in answer.headers]
    assert answer.header("X-Kept") == "1"
    assert names.count("Set-Cookie") == 2
    assert not {"X-Named", "Keep-Alive"} & set(names)
    assert [value for name, value in answer.headers if name.lower() == "x-ollama-lb-server"] == ["s0"]


async def test_the_query_reaches_the_server() -> None:
    async with scripted() as (rig, (server,)):
        await rig.ask("POST", "/api/chat?a=b%20c", chat())
        assert server.heads[-1].startswith(b"POST /api/chat?a=b%20c HTTP/1.1\r\n")


async def test_an_absolute_target_is_understood() -> None:
    async with balanced(specs("a")) as rig:
        raw = request("POST", "http://somewhere:1/api/chat", chat())
        assert (await rig.send(raw)).status == 200


@pytest.mark.parametrize(("target", "sent"), [
    ("http://somewhere:1/api/chat", b"/api/chat"), ("HTTP://u:p@inside.example/api/chat?a=http://b", b"/api/chat?a=http://b"),
])
async def test_a_server_is_asked_under_its_own_name_whatever_the_target_says(target: str, sent: bytes) -> None:
    async with scripted() as (rig, (server,)):
        await rig.send(request("POST", target, chat()))
        assert server.heads[-1].startswith(b"POST %s HTTP/1.1\r\nHost: 127.0.0.1:" % sent)


# --- answers that somebody in between has compressed -----------------------------------------------------------

GZIPPED = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
SQUEEZED = [gzip.compress(b"".join(STREAM))]


@pytest.mark.parametrize(("path", "goes_on"), [
    ("/api/chat", False), ("/v1/chat/completions", False), ("/api/embed", False), ("/api/show", True),
])  # fmt: skip
async def test_an_answer_that_is_watched_is_not_to_be_compressed(path: str, goes_on: bool) -> None:
    async with scripted() as (rig, (server,)):
        await rig.send(with_headers("Accept-Encoding: gzip").replace(b"/api/chat", path.encode(), 1))
        assert (("accept-encoding", "gzip") in server.headers()) is goes_on


@pytest.mark.parametrize("kind", [b"application/x-ndjson", b"text/event-stream"])
async def test_a_compressed_answer_is_passed_on_as_it_is(kind: bytes) -> None:
    async with scripted() as (rig, (server,)):
        server.pieces = [GZIPPED % kind + chunked(SQUEEZED)]
        answer = await rig.chat()
        assert (answer.header("Content-Encoding"), gzip.decompress(answer.body)) == ("gzip", b"".join(STREAM))
        assert rig.server("s0").health > 1


async def test_a_compressed_answer_that_breaks_is_cut_without_a_plain_line_in_it() -> None:
    async with scripted() as (rig, (server,)):
        server.pieces, server.close = [GZIPPED % b"application/x-ndjson" + chunked(SQUEEZED)[:40]], True
        data = await rig.exchange([request("POST", "/api/chat", chat())])
    assert data.startswith(b"HTTP/1.1 200 ")
    assert b"error" not in data
    assert not data.endswith(b"0\r\n\r\n")
