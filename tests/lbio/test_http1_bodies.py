"""Chunked decoding with h11 as the oracle, and the Reader under every way to cut the bytes."""

import time
from collections.abc import Callable

import anyio
import h11
import pytest
from hypothesis import example
from hypothesis import strategies as st

from lbio.http1 import (
    LAST_CHUNK,
    ChunkedDecoder,
    Framing,
    HttpError,
    IncompleteBody,
    Reader,
    RequestHead,
    ResponseHead,
    encode_chunk,
    parse_request_head,
    parse_response_head,
)
from tests.lbio.http1_strategies import (
    Pieces,
    byte_by_byte,
    chunked_bodies,
    corrupted,
    corruptions,
    cut,
    cuts,
    given,
    now,
    outcome,
    request_heads,
)
from tests.lbio.malformed import BEGINNINGS, CHUNKED_BODIES, REQUEST_HEADS

CHUNKED = parse_request_head(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
FIVE = parse_request_head(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n")
NO_BODY = parse_request_head(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
ANSWER_CHUNKED = parse_response_head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "GET")
ANSWER_FIVE = parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "GET")
UNTIL_CLOSE = parse_response_head(b"HTTP/1.1 200 OK\r\n\r\n", "GET")


def decode(pieces: list[bytes]) -> tuple[bytes, bytes, bool]:
    decoder = ChunkedDecoder()
    payload = b"".join([decoder.feed(piece) for piece in pieces])
    return payload, decoder.leftover, decoder.finished


def decode_by_h11(data: bytes) -> tuple[bytes, bytes, bool] | None:
    """Return what h11 makes of it, or None if it refuses."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    connection.next_event()
    payload = b""
    try:
        while isinstance(event := connection.next_event(), h11.Data):
            payload += event.data
    except h11.RemoteProtocolError:
        return None
    finished = isinstance(event, h11.EndOfMessage)
    return payload, bytes(connection.trailing_data[0]) if finished else b"", finished


@pytest.mark.parametrize(("raw", "status"), [pytest.param(*row[1:], id=row[0]) for row in CHUNKED_BODIES])
@pytest.mark.parametrize("slicing", [lambda raw: [raw], byte_by_byte], ids=["whole", "bytes"])
def test_malformed_chunks(raw: bytes, status: int, slicing: Callable[[bytes], list[bytes]]) -> None:
    with pytest.raises(HttpError) as caught:
        decode(slicing(raw))
    assert caught.value.status == status
    with pytest.raises(HttpError) as caught:
        now(Reader(Pieces(slicing(raw))).read_body(ANSWER_CHUNKED, None))
    assert caught.value.status == 502


@given(chunked_bodies, st.sampled_from([b"", b"G", b"GET / HTTP/1.1\r\n\r\n", b"\r\n"]), cuts)
def test_chunks_against_h11_however_they_are_cut(body: bytes, after: bytes, at: list[int]) -> None:
    expected = decode_by_h11(body + after)
    assert expected is not None
    assert expected[1:] == (after, True)
    for pieces in ([body + after], cut(body + after, at), byte_by_byte(body + after)):
        assert decode(pieces) == expected


@given(chunked_bodies, corruptions, cuts)
@example(b"0\r\n\r\n", [(1, 32)], [])
def test_corrupted_chunks_against_h11(body: bytes, changes: list[tuple[int, int]], at: list[int]) -> None:
    data = corrupted(body, changes)
    ours = outcome(lambda: decode([data]))
    if len(ours) == 3 and ours[2]:
        assert ours == decode_by_h11(data)
    by_pieces = outcome(lambda: decode(cut(data, at)))
    assert by_pieces == ours or (len(ours) == 2 and len(by_pieces) == 2)


def test_no_single_corrupted_byte_makes_us_accept_what_h11_refuses() -> None:
    body = b"5;a=b\r\nhello\r\n1a\r\n" + b"x" * 26 + b"\r\n0;c\r\nt: v\r\n\r\n"
    assert decode([body]) == decode_by_h11(body) == (b"hello" + b"x" * 26, b"", True)
    for position in range(len(body)):
        for value in range(256):
            data = corrupted(body, [(position, value)])
            ours = outcome(lambda data=data: decode([data]))  # type: ignore[misc]
            if len(ours) == 3 and ours[2]:
                assert ours == decode_by_h11(data)


@given(st.lists(st.binary(max_size=30)))
def test_what_we_encode_is_what_h11_decodes(pieces: list[bytes]) -> None:
    body = b"".join([encode_chunk(piece) for piece in pieces]) + LAST_CHUNK
    assert decode_by_h11(body) == (b"".join(pieces), b"", True)


def test_what_follows_the_end_is_kept() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(b"1\r\na\r\n0\r\n\r\nxy") == b"a"
    assert decoder.feed(b"z") == b""
    assert (decoder.finished, decoder.leftover) == (True, b"xyz")


@pytest.mark.parametrize("extension", [b";" + b"a" * 255, b";"])
def test_limits_are_met_exactly(extension: bytes) -> None:
    assert decode([b"0" * 15 + b"1" + extension + b"\r\na\r\n" + LAST_CHUNK])[2]
    trailer = b"a: " + b"b" * (8192 - 7) + b"\r\n\r\n"
    assert len(trailer) == 8192
    assert decode([b"0\r\n" + trailer])[2]
    assert decode(byte_by_byte(b"0\r\n" + trailer))[2]


def test_decoding_takes_linear_time() -> None:
    def seconds(count: int) -> float:
        data = b"1\r\na\r\n" * count + LAST_CHUNK
        started = time.perf_counter()
        assert len(decode([data])[0]) == count
        return time.perf_counter() - started

    small = min(seconds(10_000) for _ in range(3))
    assert min(seconds(160_000) for _ in range(2)) < small * 16 * 6  # quadratic would be 256 times


# --- the Reader ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("raw", "status"), [pytest.param(*row[1:], id=row[0]) for row in BEGINNINGS])
def test_beginnings_are_refused_without_waiting_for_more(raw: bytes, status: int) -> None:
    for pieces in ([raw], byte_by_byte(raw)):
        stream = Pieces(pieces)
        with pytest.raises(HttpError) as caught:
            now(Reader(stream).read_head(1000, role="request"))
        assert caught.value.status == status


def test_a_bare_line_end_is_refused_as_soon_as_it_is_seen() -> None:
    stream = Pieces(byte_by_byte(b"GET / HTTP/1.1\nHost: x\r\n\r\n"))
    with pytest.raises(HttpError):
        now(Reader(stream).read_head(1000, role="request"))
    assert stream.given == len(b"GET / HTTP/1.1\n")


async def read_heads(pieces: list[bytes]) -> None:
    reader = Reader(Pieces(pieces))
    while raw := await reader.read_head(100_000, role="request"):
        parse_request_head(raw)


@given(st.sampled_from([row[1] for row in REQUEST_HEADS if row[0] != "two heads"]), cuts)
def test_malformed_heads_are_refused_however_they_are_cut(raw: bytes, at: list[int]) -> None:
    for pieces in ([raw], cut(raw, at), byte_by_byte(raw)):
        with pytest.raises(HttpError):
            now(read_heads(pieces))


bodies = st.one_of(
    st.binary(max_size=200).map(lambda body: (b"Content-Length: %d\r\n" % len(body), body, body)),
    chunked_bodies.map(lambda body: (b"Transfer-Encoding: chunked\r\n", body, decode([body])[0])),
    st.just((b"", b"", b"")),
)


@given(st.lists(bodies, min_size=1, max_size=3), st.sampled_from([b"", b"\r\n", b"\r\n\r\n"]), cuts)
def test_pipelined_requests_however_they_are_cut(
    messages: list[tuple[bytes, bytes, bytes]], before: bytes, at: list[int]
) -> None:
    data = b"".join(before + b"PUT /x HTTP/1.1\r\nHost: h\r\n%s\r\n%s" % message[:2] for message in messages)
    for pieces in ([data], cut(data, at), byte_by_byte(data)):
        reader = Reader(Pieces(pieces))
        for _framing, _body, payload in messages:
            raw = now(reader.read_head(1000, role="request"))
            assert raw is not None
            assert now(reader.read_body(parse_request_head(raw), len(payload))) == payload
        assert now(reader.read_head(1000, role="request")) is None
        assert not reader.buffered


@given(request_heads, st.binary(max_size=20), cuts)
def test_heads_however_they_are_cut(head: bytes, after: bytes, at: list[int]) -> None:
    for pieces in ([head + after], cut(head + after, at), byte_by_byte(head + after)):
        reader = Reader(Pieces(pieces))
        assert now(reader.read_head(len(head), role="request")) == head
        rest = bytes(reader.buffered)
        assert after.startswith(rest)
        reader = Reader(Pieces(pieces[1:]), initial=pieces[0])
        assert now(reader.read_head(len(head), role="request")) == head
    with pytest.raises(HttpError) as caught:
        now(Reader(Pieces([head])).read_head(len(head) - 1, role="request"))
    assert caught.value.status == 431


async def collect(reader: Reader, head: RequestHead | ResponseHead) -> list[bytes]:
    return [piece async for piece in reader.body_chunks(head)]


@given(bodies, cuts)
def test_answers_however_they_are_cut(message: tuple[bytes, bytes, bytes], at: list[int]) -> None:
    framing, body, payload = message
    data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n%s\r\n%s" % (framing, body)
    for pieces in ([data], cut(data, at), byte_by_byte(data)):
        reader = Reader(Pieces(pieces))
        raw = now(reader.read_head(1000, role="response"))
        assert raw is not None
        assert parse_response_head(raw, "GET").framing is Framing.NONE
        raw = now(reader.read_head(1000, role="response"))
        assert raw is not None
        collected = now(collect(reader, parse_response_head(raw, "GET")))
        assert b"".join(collected) == payload
        assert all(collected)


def test_ends_before_between_and_inside() -> None:
    for role, status in (("request", 400), ("response", 502)):
        assert now(Reader(Pieces([])).read_head(100, role=role)) is None  # type: ignore[arg-type]
        with pytest.raises(HttpError) as caught:
            now(Reader(Pieces([b"HTTP/1."])).read_head(100, role=role))  # type: ignore[arg-type]
        assert caught.value.status == status
    assert now(Reader(Pieces([b"\r\n"])).read_head(100, role="request")) is None
    with pytest.raises(HttpError) as caught:
        now(Reader(Pieces([b"garbage"])).read_head(100, role="response"))
    assert caught.value.status == 502
    with pytest.raises(anyio.BrokenResourceError):
        now(Reader(Pieces([b"HTTP"], anyio.BrokenResourceError)).read_head(100, role="response"))


@pytest.mark.parametrize("head", [FIVE, ANSWER_FIVE, CHUNKED, ANSWER_CHUNKED])
@pytest.mark.parametrize("end", [anyio.EndOfStream, anyio.BrokenResourceError])
def test_a_cut_body_is_never_a_whole_one(head: RequestHead, end: type[Exception]) -> None:
    body = b"hello" if head.framing is Framing.LENGTH else b"5\r\nhello\r\n0\r\n\r\n"
    assert now(Reader(Pieces([body], end)).read_body(head, None)) == b"hello"
    for size in range(len(body)):
        with pytest.raises(IncompleteBody):
            now(Reader(Pieces([body[:size]], end)).read_body(head, None))


def test_a_body_until_close() -> None:
    assert now(collect(Reader(Pieces([b"a", b"bc"])), UNTIL_CLOSE)) == [b"a", b"bc"]
    with pytest.raises(IncompleteBody):
        now(collect(Reader(Pieces([b"a"], anyio.BrokenResourceError)), UNTIL_CLOSE))


def test_no_body_reads_nothing() -> None:
    stream = Pieces([b"GET"])
    assert now(Reader(stream).read_body(NO_BODY, 0)) == b""
    assert stream.given == 0


def test_a_body_that_is_too_large() -> None:
    stream = Pieces([b"hello"])
    with pytest.raises(HttpError) as caught:
        now(Reader(stream).read_body(FIVE, 4))
    assert (caught.value.status, stream.given) == (413, 0)
    with pytest.raises(HttpError) as caught:
        now(Reader(Pieces([b"hello"])).read_body(ANSWER_FIVE, 4))
    assert caught.value.status == 502
    stream = Pieces([b"3\r\nhel\r\n", b"2\r\nlo\r\n", b"1\r\n"])
    with pytest.raises(HttpError) as caught:
        now(Reader(stream).read_body(CHUNKED, 4))
    assert (caught.value.status, stream.given) == (413, 2)


def test_more_gives_what_is_buffered_first() -> None:
    reader = Reader(Pieces([b"HTTP/1.1 200 OK\r\n\r\nab", b"cd"]))
    now(reader.read_head(100, role="response"))
    assert [now(reader.more()) for _ in range(4)] == [b"ab", b"cd", b"", b""]


def test_a_large_body_is_collected_in_linear_time() -> None:
    body = b"x" * 32_000_000
    pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)]
    head = parse_request_head(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body))
    started = time.perf_counter()
    assert now(Reader(Pieces(pieces)).read_body(head, None)) == body
    assert time.perf_counter() - started < 10  # copying the whole for each piece would take minutes
