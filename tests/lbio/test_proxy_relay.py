"""What a client gets is what the server sent, however either of them cuts it up."""

import itertools
import json

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lbio.kit import NDJSON, STREAM, balanced, chat_request, chunked, line, scripted, specs
from tests.lbio.sockets_kit import until
from tests.simulator.wire import Answer, parse, request

pytestmark = pytest.mark.anyio
FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
WHOLE = b"".join(STREAM)
RACE = {"racers_min": 2, "racers_max": 2, "budget": 63.0}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def cut(data: bytes, points: list[int]) -> list[bytes]:
    places = sorted({point % len(data) for point in points} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


def seen(answer: Answer) -> tuple[int, bytes, bool]:
    return answer.status, answer.body, answer.complete


# --- races -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_the_faster_of_two_wins_and_the_loser_is_closed_at_once() -> None:
    fleet = [*specs("slow", first_token_ms=400), *specs("fast", first_token_ms=20)]
    async with balanced(fleet, race=RACE) as rig:
        answer = await rig.chat()
        assert answer.header("X-Ollama-LB-Server") == "fast"
        assert answer.header("X-Ollama-LB-Attempts") == "2"
        slow = rig.fleet[0].stats
        await until(lambda: bool(slow.aborts))
        assert slow.aborts[0].stage == "generating"
        assert slow.tokens_generated == 0


@pytest.mark.parametrize("winner", ["most-tokens", "first-finish"])
async def test_a_winner_that_is_chosen_while_it_streams_arrives_whole(winner: str) -> None:
    fleet = [*specs("early", first_token_ms=10, token_ms=20), *specs("busy", first_token_ms=30, token_ms=2)]
    race = {**RACE, "winner": winner, "measure": "60ms"}
    async with balanced(fleet, race=race) as rig:
        answer = await rig.chat(options={"num_predict": 60})
        assert (answer.header("X-Ollama-LB-Server"), answer.complete) == ("busy", True)
        assert answer.body.count(b'"done":false') == 60
        assert answer.body.count(b'"done":true') == 1


async def test_the_losers_connection_is_closed_within_milliseconds() -> None:
    fleet = [*specs("slow", first_token_ms=2000), *specs("fast", first_token_ms=50, token_ms=20)]
    async with balanced(fleet, race=RACE) as rig, anyio.create_task_group() as tasks:
        tasks.start_soon(rig.chat)
        await until(lambda: bool(rig.fleet[1].stats.tokens_generated))
        begun = anyio.current_time()
        await until(lambda: bool(rig.fleet[0].stats.aborts))
        assert anyio.current_time() - begun < 0.03  # the figure itself, 5 ms, is measured in benchmarks/


# --- whole answers ---------------------------------------------------------------------------------------------


async def test_an_answer_that_is_not_streamed() -> None:
    async with balanced(specs("a")) as rig:
        answer = await rig.chat(stream=False)
    assert answer.chunks is None
    assert answer.complete
    assert json.loads(answer.body)["done"] is True


async def test_a_big_answer_arrives_whole() -> None:
    big = [line("x" * 100_000) for _ in range(60)] + [line("", done=True)]
    async with scripted() as (rig, (server,)):
        server.pieces = [NDJSON + b"Transfer-Encoding: chunked\r\n\r\n", chunked(big)]
        answer = await rig.chat()
    assert answer.body == b"".join(big)
    assert answer.complete


async def test_a_big_first_piece_larger_than_the_buffer_arrives_whole() -> None:
    big = [b'{"padding":"%s","done":false}\n' % (b"x" * 200_000), *STREAM]
    async with scripted(limits={"buffer_bytes_max": "16KiB"}) as (rig, (server,)):
        server.pieces = [NDJSON + b"Transfer-Encoding: chunked\r\n\r\n", chunked(big)]
        answer = await rig.chat()
    assert answer.body == b"".join(big)


FRAMINGS = {
    "chunked": (NDJSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(STREAM), False),
    "chunked with extension and trailer": (
        NDJSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunked([WHOLE]).replace(b"\r\n", b";a=b\r\n", 1)[:-2]
        + b"X-Trailer: 1\r\n\r\n",
        False,
    ),
    "length": (NDJSON + b"Content-Length: %d\r\n\r\n%s" % (len(WHOLE), WHOLE), False),
    "close": (NDJSON + b"Connection: close\r\n\r\n" + WHOLE, True),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n" + WHOLE, True),
}  # fmt: skip


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
@pytest.mark.parametrize("framing", FRAMINGS)
async def test_every_framing_of_the_server_gives_a_whole_answer(framing: str) -> None:
    raw, close = FRAMINGS[framing]
    async with scripted() as (rig, (server,)):
        server.pieces, server.close = [raw], close
        for _ in range(2):  # a kept connection is no different
            answer = await rig.chat()
            assert seen(answer) == (200, WHOLE, True)


async def test_interim_answers_are_skipped() -> None:
    async with scripted() as (rig, (server,)):
        server.pieces = [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n", *server.pieces]
        assert seen(await rig.chat()) == (200, WHOLE, True)


async def test_bytes_after_a_whole_answer_are_not_the_next_answer() -> None:
    async with scripted() as (rig, (server,)):
        raw, _ = FRAMINGS["length"]
        server.pieces = [raw + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"]
        for _ in range(2):
            assert seen(await rig.chat()) == (200, WHOLE, True)


async def test_what_comes_unasked_on_an_idle_connection_is_nobodys_answer() -> None:
    async with scripted() as (rig, (server,)):
        good = list(server.pieces)
        server.pieces, server.pause_s = [*good, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"], 0.02
        await rig.chat()
        await anyio.sleep(0.05)
        server.pieces, server.pause_s = good, 0.0
        assert seen(await rig.chat()) == (200, WHOLE, True)


async def test_a_stream_is_known_whatever_the_case_of_its_type() -> None:
    async with scripted() as (rig, (server,)):
        head = NDJSON.replace(b"application/x-ndjson", b"Application/X-NDJSON")
        server.pieces = [head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(STREAM[:2])]
        answer = await rig.chat()
    assert "error" in answer.lines[-1]


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_an_upstream_answer_byte_by_byte(framing: str) -> None:
    raw, close = FRAMINGS[framing]
    async with scripted() as (rig, (server,)):
        server.pieces, server.close = [raw[i : i + 1] for i in range(len(raw))], close
        assert seen(await rig.chat()) == (200, WHOLE, True)


@FEW
@given(st.sampled_from(["chunked", "length", "close"]), st.lists(st.integers(0, 2000), max_size=5))
def test_an_upstream_answer_cut_anywhere(framing: str, points: list[int]) -> None:
    async def story() -> None:
        raw, close = FRAMINGS[framing]
        async with scripted() as (rig, (server,)):
            server.pieces, server.close, server.pause_s = cut(raw, points), close, 0.001
            assert seen(await rig.chat()) == (200, WHOLE, True)

    anyio.run(story)


@FEW
@given(st.booleans(), st.lists(st.integers(0, 2000), max_size=5))
def test_a_request_cut_anywhere(in_chunks: bool, points: list[int]) -> None:
    async def story() -> None:
        raw = chunked_request() if in_chunks else chat_request()
        async with scripted() as (rig, (server,)):
            answer = parse(await rig.exchange(cut(raw, points), pause_s=0.001))
            assert seen(answer) == (200, WHOLE, True)
            assert json.loads(server.bodies[0])["model"] == "tiny"

    anyio.run(story)


async def test_a_request_byte_by_byte() -> None:
    raw = chunked_request()
    async with scripted() as (rig, (server,)):
        answer = parse(await rig.exchange([raw[i : i + 1] for i in range(len(raw))]))
        assert seen(answer) == (200, WHOLE, True)
        assert server.bodies == [b'{"model":"tiny","messages":[{"role":"user","content":"hi"}]}']


def chunked_request(headers: bytes = b"Connection: close\r\n") -> bytes:
    body = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}]}'
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n%sTransfer-Encoding: chunked\r\n\r\n" % headers
    return head + chunked([body[:10], body[10:11], body[11:]])


# --- connections -----------------------------------------------------------------------------------------------


async def test_a_client_of_http_1_0_gets_the_plain_bytes_and_a_close() -> None:
    async with balanced(specs("a")) as rig:
        raw = await rig.exchange([chat_request().replace(b"HTTP/1.1", b"HTTP/1.0")])
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head
    assert b"Connection: close" in head
    assert body.endswith(b"}\n")
    assert len(body.splitlines()) == 9


async def test_a_client_of_http_1_0_may_keep_its_connection() -> None:
    kept = b"GET / HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n"
    async with balanced(specs("a")) as rig:
        raw = await rig.exchange([kept + b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n"])
    assert raw.count(b"Ollama is running") == 2
    assert raw.count(b"Connection: keep-alive") == 1


async def test_head_gives_the_length_and_no_body() -> None:
    async with balanced(specs("a")) as rig:
        got, head = await rig.ask("GET", "/api/tags"), await rig.ask("HEAD", "/api/tags")
    assert head.status == 200
    assert head.body == b""
    assert head.header("Content-Length") == str(len(got.body))


async def test_pipelined_requests_are_answered_in_order() -> None:
    first = chat_request(close=False, content="first", stream=False)
    second = request("GET", "/api/version", close=False)
    third = chat_request(content="third", stream=False)
    async with balanced(specs("a", first_token_ms=30)) as rig:
        raw = await rig.exchange([first + second + third])
    assert raw.count(b"HTTP/1.1 200 OK") == 3
    assert raw.index(b'"done":true') < raw.index(b'{"version"') < raw.rindex(b'"done":true')


async def test_a_connection_carries_many_requests_one_after_the_other() -> None:
    async with balanced(specs("a")) as rig:
        raw = await rig.exchange([chat_request(close=False)] * 3 + [chat_request()], pause_s=0.03)
        assert raw.count(b"0\r\n\r\n") == 4
        assert rig.fleet[0].stats.requests["/api/chat"] == 4
        assert rig.fleet[0].stats.connections_total <= 2  # the probe's, and one for all four


async def test_a_client_that_expects_it_is_told_to_continue() -> None:
    raw = chat_request()
    head, _, body = raw.partition(b"\r\n\r\n")
    async with balanced(specs("a")) as rig:
        got = await rig.exchange([head + b"\r\nExpect: 100-continue\r\n\r\n", body], pause_s=0.02)
    assert got.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


async def test_an_expectation_with_the_body_at_once_does_no_harm() -> None:
    raw = chat_request().replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n", 1)
    async with balanced(specs("a")) as rig:
        got = await rig.exchange([raw])
    assert got.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").startswith(b"HTTP/1.1 200 OK\r\n")


async def test_a_pull_is_relayed_line_by_line_and_the_model_is_known_after_it() -> None:
    async with balanced(specs("a", load_ms=40)) as rig:
        answer = await rig.ask("POST", "/api/pull", {"model": "new"})
        assert answer.lines[0] == {"status": "pulling manifest"}
        assert answer.lines[-1] == {"status": "success"}
        await until(lambda: "new:latest" in rig.server("a").models)
        names = [model["name"] for model in json.loads((await rig.ask("GET", "/api/tags")).body)["models"]]
    assert "new:latest" in names
