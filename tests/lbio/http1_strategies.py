"""What the tests of HTTP share: valid messages for hypothesis, ways to cut and corrupt them, a fake stream."""

import itertools
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import anyio
import hypothesis
from anyio.abc import ByteReceiveStream
from hypothesis import strategies as st

from lbio.http1 import HttpError

T = TypeVar("T")


def given(*strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """hypothesis.given without a deadline: what else the machine does is no failure of ours."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return hypothesis.settings(deadline=None)(hypothesis.given(*strategies)(test))

    return decorate


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run what never waits, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("it waited")


class Pieces(ByteReceiveStream):
    """Gives out the pieces one by one, then the end or an error."""

    def __init__(self, pieces: list[bytes], end: type[Exception] = anyio.EndOfStream) -> None:
        self.pieces: Iterator[bytes] = iter([piece for piece in pieces if piece])
        self.end = end
        self.given = 0

    async def receive(self, max_bytes: int = 65536) -> bytes:
        for piece in self.pieces:
            assert len(piece) <= max_bytes
            self.given += 1
            return piece
        raise self.end

    async def aclose(self) -> None:
        pass


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted({position % (len(data) + 1) for position in at}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def outcome(parse: Callable[[], T]) -> T | tuple[int, str]:
    try:
        return parse()
    except HttpError as error:
        return error.status, error.message


tokens = st.text("abcXYZ019-_!", min_size=1, max_size=12).map(str.encode)
texts = st.one_of(
    st.just(b""),
    st.binary(min_size=1, max_size=30).map(lambda raw: bytes(b for b in raw if b >= 0x20 and b != 0x7F).strip()),
)
plain_headers = st.lists(
    st.tuples(tokens, texts).filter(
        lambda pair: pair[0].lower() not in {b"host", b"content-length", b"transfer-encoding", b"expect"}
    ),
    max_size=6,
)
framings = st.sampled_from(
    [b"", b"Content-Length: 0\r\n", b"content-LENGTH:  17 \r\n", b"Transfer-Encoding: Chunked\r\n"]
)
cuts = st.lists(st.integers(0, 10_000), max_size=12)


def lines(pairs: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"%s:%s\r\n" % pair for pair in pairs)


request_heads = st.builds(
    lambda method, target, version, before, framing, extra, after: (
        b"%s %s HTTP/1.%d\r\n" % (method, target, version)
        + lines(before)
        + b"Host: h:1\r\n"
        + (framing if version or b"Tr" not in framing else b"")
        + extra
        + lines(after)
        + b"\r\n"
    ),
    st.sampled_from([b"GET", b"POST", b"HEAD", b"DELETE", b"x-y"]),
    st.sampled_from([b"/", b"/api/chat", b"/a?b=c?d", b"http://h:1/x?y", b"HTTPS://h?y", b"//a/b"]),
    st.integers(0, 2),
    plain_headers,
    framings,
    st.sampled_from([b"", b"Expect: 100-Continue\r\n", b"Connection: Keep-Alive, x\r\n", b"Connection: a ,CLOSE\r\n"]),
    plain_headers,
)
response_heads = st.builds(
    lambda version, status, framing, headers: (
        b"HTTP/1.%d %s\r\n" % (version, status)
        + (framing if version or b"Tr" not in framing else b"")
        + lines(headers)
        + b"\r\n"
    ),
    st.integers(0, 1),
    st.sampled_from(
        [b"200 OK", b"200", b"200 ", b"100 Continue", b"204 No", b"304 x", b"404 Not Found", b"999 \xe9 y"]
    ),
    framings,
    plain_headers,
)
corruptions = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=2)


def corrupted(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for position, value in changes:
        changed[position % len(data)] = value
    return bytes(changed)


chunk_lists = st.lists(
    st.tuples(
        st.binary(min_size=1, max_size=40),
        st.sampled_from([b"", b";a", b';a="b c"', b";\xff\t ;"]),
        st.integers(0, 3),
    ),
    max_size=6,
)
trailers = st.lists(st.tuples(tokens, texts), max_size=3).map(lines)
chunked_bodies = st.builds(
    lambda chunks, extension, trailer: (
        b"".join(b"%s%x%s\r\n%s\r\n" % (b"0" * pad, len(c), ext, c) for c, ext, pad in chunks)
        + b"0%s\r\n%s\r\n" % (extension, trailer)
    ),
    chunk_lists,
    st.sampled_from([b"", b";last", b"000"]),
    trailers,
)
