"""HTTP/1.1 for both roles, and all of it that the rest of the house uses: heads, bodies, buffered reading.

Heads live in `lbio.wire.http1_heads` and are offered here under the same names. Bodies are read here, with a
chunked decoder of our own: h11's needs a connection with the whole dialogue behind it, and accepts more than
we want to.
"""

import functools
import re
from collections.abc import AsyncIterator, Callable
from typing import Final, Literal, Self

import anyio
from anyio.abc import AnyByteReceiveStream

from lbio.wire.http1_heads import (
    Framing,
    Head,
    HeaderPairs,
    Headers,
    HttpError,
    RequestHead,
    ResponseHead,
    known_request,
    known_response,
    parse_request_head,
    parse_response_head,
    serialize_request,
    serialize_response,
    shown,
)

__all__ = [
    "INSIDE_HEAD",
    "LAST_CHUNK",
    "ChunkedDecoder",
    "Framing",
    "Head",
    "HeaderPairs",
    "Headers",
    "HttpError",
    "IncompleteBody",
    "Reader",
    "RequestHead",
    "ResponseHead",
    "Role",
    "encode_chunk",
    "parse_request_head",
    "parse_response_head",
    "serialize_request",
    "serialize_response",
    "size_line",
]

Role = Literal["request", "response"]

LAST_CHUNK: Final = b"0\r\n\r\n"
TRAILER_BYTES_MAX: Final = 8192
_LEADING_CRLF_BYTES_MAX: Final = 8  # RFC 9112 §2.2: some clients send a CRLF too many after a POST body

INSIDE_HEAD: Final = "the connection ended inside the head"
_BAD: Final[dict[Role, int]] = {"request": 400, "response": 502}
_KNOWN: Final[dict[Role, Callable[[bytes], Head | None]]] = {"request": known_request, "response": known_response}
_BARE_CR_OR_LF = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_TEXT = rb"[\t\x20-\x7e\x80-\xff]"
_TOKEN = rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]+"
# Extensions: at most 256 bytes with their ';'. No blank before it: h11 and Go disagree on what that means.
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;" + _TEXT + rb"{0,255})?\r\n")
_CHUNK_SIZE_BEGUN = re.compile(rb"(?:[0-9A-Fa-f]{1,16}(?:;" + _TEXT + rb"{0,255})?\r?)?")
_TRAILER_LINE = re.compile(rb"(?:(" + _TOKEN + rb"):" + _TEXT + rb"*)?\r\n")


class IncompleteBody(Exception):  # noqa: N818  it is an outcome as much as an error: the peer left
    """The connection ended, or was reset, before the end of a body."""


def encode_chunk(data: bytes) -> bytes:
    """Frame one chunk; empty data gives nothing, since an empty chunk would end the body."""
    return b"%x\r\n%s\r\n" % (len(data), data) if data else b""


@functools.lru_cache(maxsize=4096)
def size_line(n_bytes: int) -> bytes:
    """Return how a single chunk begins that is `n_bytes` long with its framing; b"" if none can be."""
    for n_digits in range(1, 16):
        n_payload = n_bytes - n_digits - 4
        if n_payload > 0 and len(b"%x" % n_payload) == n_digits:
            return b"%x\r\n" % n_payload
    return b""


def _whole_chunks(data: bytes, at: int, payload: list[bytes]) -> int:
    """Take the chunks from `at` on that have come whole, in one go since there may be many; return where they end."""
    match, starts, take = _CHUNK_SIZE.match, data.startswith, payload.append
    while at < len(data) and (size := match(data, at)) is not None:
        begin = size.end()
        end = begin + int(size[1], 16)
        if end == begin or not starts(b"\r\n", end):
            break
        take(data[begin:end])
        at = end + 2
    return at


class ChunkedDecoder:
    """Takes a chunked body apart as it comes, in linear time, holding at most one incomplete line."""

    __slots__ = ("_error_status", "_expect", "_missing", "_pending", "_trailer_bytes", "finished", "leftover")

    def __init__(self, error_status: int = 400) -> None:
        self._error_status = error_status
        self._expect: Literal["size", "data", "data-end", "trailer"] = "size"
        self._missing = 0  # bytes of the current chunk still to come
        self._pending = b""  # the beginning of a line
        self._trailer_bytes = 0
        self.finished = False
        self.leftover = b""  # what followed the end of the body

    def feed(self, data: bytes) -> bytes:
        """Return the payload found in `data` (perhaps none). Raises HttpError (400, or as constructed)."""
        if self._pending:
            data = self._pending + data
            self._pending = b""
        payload: list[bytes] = []
        at = 0
        while at < len(data):
            if self.finished:
                self.leftover += data[at:]
                break
            if self._expect == "data":
                piece = data[at : at + self._missing]
                payload.append(piece)
                at += len(piece)
                self._missing -= len(piece)
                if not self._missing:
                    self._expect = "data-end"
            elif self._expect == "size" and (whole := _whole_chunks(data, at, payload)) > at:
                at = whole
            elif (after := self._line(data, at)) < 0:
                self._pending = data[at:]
                break
            else:
                at = after
        return payload[0] if len(payload) == 1 else b"".join(payload)

    @property
    def is_at_rest(self) -> bool:
        """Whether what has come so far ended with a chunk."""
        return self._expect == "size" and not self._pending

    def _line(self, data: bytes, at: int) -> int:
        """Consume the line that starts at `at`; return where it ends, or -1 while it is incomplete."""
        if self._expect == "size":
            if (size := _CHUNK_SIZE.match(data, at)) is not None:
                self._missing = int(size[1], 16)
                self._expect = "data" if self._missing else "trailer"
                return size.end()
            if _CHUNK_SIZE_BEGUN.fullmatch(data, at) is None:
                raise HttpError(self._error_status, f"malformed chunk size: {shown(data[at : at + 40])}")
        elif self._expect == "data-end":
            if data.startswith(b"\r\n", at):
                self._expect = "size"
                return at + 2
            if not b"\r\n".startswith(data[at : at + 2]):
                raise HttpError(self._error_status, "a chunk is longer than its size says")
        elif (end := data.find(b"\n", at, at + TRAILER_BYTES_MAX) + 1) > 0:
            self._trailer(data[at:end])
            return end
        elif self._trailer_bytes + len(data) - at > TRAILER_BYTES_MAX:
            raise HttpError(self._error_status, f"trailers of more than {TRAILER_BYTES_MAX} bytes")
        return -1

    def _trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line)
        field = _TRAILER_LINE.fullmatch(line)
        # A length in the trailers has no meaning except to a parser that can be fooled by it.
        if field is None or (field[1] or b"").lower() in {b"content-length", b"transfer-encoding"}:
            raise HttpError(self._error_status, f"malformed trailer: {shown(line)}")
        if self._trailer_bytes > TRAILER_BYTES_MAX:
            raise HttpError(self._error_status, f"trailers of more than {TRAILER_BYTES_MAX} bytes")
        self.finished = field[1] is None


class Reader:
    """Reads heads and bodies from one stream, keeping what came too early (`buffered`) for the next call.

    Errors of the stream itself pass through, except inside a body: there a reset is an IncompleteBody too.
    A call that is cancelled may have lost bytes of a *body*; such a connection is not to be used again.
    """

    __slots__ = ("_n_seen", "_n_skipped", "_stream", "buffered")

    def __init__(self, stream: AnyByteReceiveStream, initial: bytes = b"") -> None:
        self._stream = stream
        self.buffered = bytearray(initial)
        self._n_seen = 0  # bytes of a head that were looked at
        self._n_skipped = 0  # bytes of CR LF before it

    async def more(self) -> bytes:
        """Return the next raw bytes, buffered ones first; b"" when the peer has ended the stream."""
        if self.buffered:
            data = bytes(self.buffered)
            self.buffered.clear()
            return data
        return await self._receive()

    async def _receive(self) -> bytes:
        try:
            return await self._stream.receive()
        except anyio.EndOfStream:
            return b""

    async def read_head(self, bytes_max: int, *, role: Role) -> bytes | None:
        """Return the raw head with its blank line, or None if the stream ended before its first byte.

        Raises HttpError: as `take_head`, and for an end inside the head.
        """
        while (head := self.take_head(bytes_max, role=role)) is None:
            if not (data := await self._receive()):
                if not self.buffered:
                    return None
                raise HttpError(_BAD[role], INSIDE_HEAD)
            self.buffered += data
        return head

    def take_head(self, bytes_max: int, *, role: Role) -> bytes | None:
        """Take the raw head, with its blank line, if it has come whole; None: more is needed.

        Raises HttpError: 400 for a bare CR or LF as soon as it is seen, or for what cannot be HTTP; 431 above
        `bytes_max`; always 502 for an answer. A head that is known needs no look: it was looked at before.
        """
        buffer = self.buffered
        seen = self._n_seen
        if seen == 0 and 4 <= (end := buffer.find(b"\r\n\r\n") + 4) <= bytes_max:
            head = bytes(memoryview(buffer)[:end])
            if _KNOWN[role](head) is not None:
                return self._taken(head)
        skippable = _LEADING_CRLF_BYTES_MAX if role == "request" else 0
        while buffer.startswith(b"\r\n") and self._n_skipped < skippable:
            del buffer[:2]
            self._n_skipped += 2
        end = buffer.find(b"\r\n\r\n", max(0, seen - 3)) + 4
        size = end if end >= 4 else len(buffer)
        if _BARE_CR_OR_LF.search(buffer, max(0, seen - 1), size) is not None:
            raise HttpError(_BAD[role], "bare CR or LF in the head")
        if size > bytes_max:
            raise HttpError(431 if role == "request" else 502, f"a head of more than {bytes_max} bytes")
        if seen == 0 and buffer != b"\r":
            _check_first_bytes(bytes(buffer[:7]), role)
        if end >= 4:
            return self._taken(bytes(memoryview(buffer)[:end]))
        self._n_seen = 0 if buffer == b"\r" else len(buffer)
        return None

    def _taken(self, head: bytes) -> bytes:
        del self.buffered[: len(head)]
        self._n_seen = self._n_skipped = 0
        return head

    async def read_body(self, head: Head, bytes_max: int | None) -> bytes:
        """Return the whole body (`bytes_max` None: without a limit).

        Raises HttpError: 413 (502 for an answer) above the limit, before reading if the length is declared;
        400 (502) for bad chunks. Raises IncompleteBody.
        """
        status = 413 if isinstance(head, RequestHead) else 502
        if bytes_max is not None and head.content_length > bytes_max:
            raise HttpError(status, f"a body of more than {bytes_max} bytes")
        body = bytearray()  # not a list: a peer that sends byte by byte would make the list outweigh the body
        async for piece in self.body_chunks(head):
            if bytes_max is not None and len(body) + len(piece) > bytes_max:
                raise HttpError(status, f"a body of more than {bytes_max} bytes")
            body += piece
        return bytes(body)

    def body_chunks(self, head: Head) -> AsyncIterator[bytes]:
        """Iterate over the payload as it comes. Raises IncompleteBody; HttpError 400 (502) for bad chunks."""
        return _BodyChunks(self, head)


def _check_first_bytes(first: bytes, role: Role) -> None:
    """Refuse at once what can never become a head, instead of waiting for a blank line until the timeout."""
    if role == "response":
        if not b"HTTP/1.".startswith(first):
            raise HttpError(502, f"the answer is not HTTP/1.x: it starts with {shown(first)}")
    elif first[:1] == b"\x16":
        raise HttpError(400, "this looks like TLS, but the port speaks plain HTTP")
    elif first and re.match(_TOKEN, first) is None:
        raise HttpError(400, f"the request is not HTTP: it starts with {shown(first)}")


class _BodyChunks:
    """A plain iterator: an async generator that is left early would need an `aclosing` around each use."""

    __slots__ = ("_decoder", "_framing", "_missing", "_reader")

    def __init__(self, reader: Reader, head: Head) -> None:
        self._reader = reader
        self._framing = head.framing
        self._missing = head.content_length
        self._decoder = ChunkedDecoder(400 if isinstance(head, RequestHead) else 502)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not (
            self._framing is Framing.NONE
            or (self._framing is Framing.LENGTH and not self._missing)
            or self._decoder.finished
        ):
            try:
                data = await self._reader.more()
            except anyio.BrokenResourceError as error:
                raise IncompleteBody(f"the connection broke inside the body: {error}") from error
            if not data and self._framing is not Framing.CLOSE:
                missing = f", {self._missing} bytes missing" if self._framing is Framing.LENGTH else ""
                raise IncompleteBody(f"the connection ended inside the body{missing}")
            if payload := self._payload(data):
                return payload
            if not data:
                break
        raise StopAsyncIteration

    def _payload(self, data: bytes) -> bytes:
        """Return the part of `data` that is payload and give back what follows the body."""
        if self._framing is Framing.CHUNKED:
            payload = self._decoder.feed(data)
            self._reader.buffered[:0] = self._decoder.leftover
        elif self._framing is Framing.LENGTH:
            payload = data[: self._missing]
            self._missing -= len(payload)
            self._reader.buffered[:0] = data[len(payload) :]
        else:
            payload = data
        return payload
