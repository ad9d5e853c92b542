"""What can be passed on as it came is: with the same bytes, tokens and verdicts as if it were taken apart."""

import itertools
import json
import re
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.ollama import Ending
from lbio.attempt import AttemptRun
from lbio.client import ClientGone, ClientStream
from lbio.exchange import Exchange
from lbio.http1 import ChunkedDecoder, encode_chunk, parse_request_head, parse_response_head, size_line
from lbio.relay import Relay
from lbio.upstream import Answer, Connection
from tests.lbio.kit import chunked, line, scripted

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
ASKED = parse_request_head(b"POST /api/chat HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n")

texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(['"done":true', ',"done":false}', '"error":"x"', "\n", '\\"', ',"done":false}\n\r\n0\r\n\r\n']),
)
objects = st.fixed_dictionaries(
    {"message": st.fixed_dictionaries({"content": texts})},
    optional={"error": texts, "status": st.sampled_from(["success", "x"]), "x,": texts, 'x"': st.just(1)},
)
dones = st.sampled_from([b',"done":false}', b',"done":true}', b',"done": false}', b"}", b',"x":{"done":false}}'])


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """Return a line such as servers write them, or nearly so."""
    value = json.dumps(draw(objects), separators=(",", ":"), ensure_ascii=draw(st.booleans())).encode()
    return value[:-1] + draw(dones) + draw(st.sampled_from([b"\n", b"\n", b"\n", b"", b"\r\n", b"\n\n"]))


@given(st.integers(min_value=0, max_value=300_000))
def test_the_size_line_of_a_single_chunk_follows_from_its_length(n_bytes: int) -> None:
    begin = size_line(n_bytes)
    if begin:
        assert len(begin) + int(begin, 16) + 2 == n_bytes
    else:
        assert all(len(encode_chunk(b"x" * n)) != n_bytes for n in (n_bytes - 5, n_bytes - 6, n_bytes - 7) if n > 0)


class Taking:
    """A client that takes so many bytes at once and then no more until its task writes."""

    def __init__(self, room: int) -> None:
        self.data = b""
        self.room = room
        self.writing = False

    def send_nowait(self, data: bytes) -> int:
        return self.write_nowait(data)

    def write_nowait(self, data: bytes) -> int:
        if self.room < 0:
            raise ClientGone
        taken = data[: self.room]
        self.data += taken
        self.room -= len(taken)
        return len(taken)


class Running:
    """An attempt, as far as the relay needs one."""

    attempt_id = 1
    is_read = False
    paused = False

    def __init__(self, rig: "Rig") -> None:
        self.sink: Any = self
        self.n_taken = 0
        self._rig = rig

    def give_to(self, sink: Any) -> None:
        self.sink = sink

    def take(self, data: bytes) -> None:
        self.n_taken += 1
        payload = self._rig.answer.take(data)
        self._rig.note_chunk(1, len(payload), self._rig.answer.watcher.feed(payload))
        self._rig.relay.feed(payload)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


class Rig:
    """A relay between raw bytes of a server and a client that keeps what it is given."""

    def __init__(self, ending: Ending = Ending.NDJSON_DONE) -> None:
        self.client, self.run = Taking(1 << 30), Running(self)
        self.noted = [0, 0]
        request: Any = type("Asked", (), {"head": ASKED})()
        self.exchange = Exchange(request)
        connection: Any = type("Silent", (), {"reader": type("Reader", (), {"buffered": bytearray()})()})()
        head = parse_response_head(HEAD, "POST")
        self.answer = Answer(cast("Connection", connection), head, ending)
        run, client = cast("AttemptRun", self.run), cast("ClientStream", self.client)
        self.relay = Relay(self.exchange, run, self.answer, client, self)
        self.n_given = 0

    def note_chunk(self, attempt_id: int, n_bytes: int, n_tokens: int) -> None:
        assert attempt_id == 1
        self.noted[0] += n_bytes
        self.noted[1] += n_tokens

    def note_paused(self, attempt_id: int, *, paused: bool) -> None:
        raise AssertionError(f"{attempt_id} {paused}")

    @property
    def n_spliced(self) -> int:
        return self.n_given - self.run.n_taken

    def begin(self) -> None:
        self.relay.begin(close=False, ours=(), about=b"")

    def take(self, data: bytes, *, splices: bool = True) -> None:
        self.n_given += 1
        (self.run.sink if splices else self.run).take(data)

    @property
    def body(self) -> bytes:
        decoder = ChunkedDecoder(502)
        body = decoder.feed(self.client.data.partition(b"\r\n\r\n")[2])
        assert decoder.finished is self.answer.ended
        return body


WHOLE = chunked([line("a"), line("b"), line("c" * 300), line("d"), line("", done=True)])


@given(st.lists(st.integers(min_value=1, max_value=len(WHOLE) - 1), max_size=12), st.booleans())
def test_however_it_is_cut_the_client_gets_the_same_body(at: list[int], per_chunk: bool) -> None:
    ends = [found.end() for found in re.finditer(rb"\n\r\n", WHOLE)] if per_chunk else []
    points = sorted({0, len(WHOLE), *at, *ends})
    bodies = []
    for splices in (True, False):
        rig = Rig()
        rig.begin()
        for begin, end in itertools.pairwise(points):
            rig.take(WHOLE[begin:end], splices=splices)
        bodies.append((rig.body, rig.answer.watcher.n_tokens, rig.answer.ended, rig.noted))
    assert bodies[0] == bodies[1]
    body = b"".join([line("a"), line("b"), line("c" * 300), line("d"), line("", done=True)])
    assert bodies[0] == (body, 4, True, [len(body), 4])


@given(st.lists(lines(), max_size=6), st.sampled_from([Ending.NDJSON_DONE, Ending.SSE_DONE, Ending.NDJSON_SUCCESS]))
def test_an_ordinary_line_counts_as_it_would_if_it_were_read(pieces: list[bytes], ending: Ending) -> None:
    quick, slow = Rig(ending), Rig(ending)
    quick.begin()
    slow.begin()
    for piece in pieces:
        quick.take(encode_chunk(piece))
        slow.take(encode_chunk(piece), splices=False)
        assert state(quick) == state(slow)


def state(rig: Rig) -> tuple[object, ...]:
    seen = rig.answer.watcher
    told = (seen.n_tokens, seen.complete, seen.failed, bytes(seen.partial), seen.at_line_start, rig.noted)
    return (*told, rig.body, rig.relay._tail, rig.relay._is_line_open)


def test_ordinary_chunks_are_passed_on_untouched_and_the_others_are_not() -> None:
    rig = Rig()
    rig.begin()
    for piece in (line("a"), line("b"), line("c")[:-9]):
        rig.take(encode_chunk(piece))
    assert rig.n_spliced == 2
    rig.take(encode_chunk(line("c")[-9:] + line("d")))  # the rest of one line, and another one
    assert rig.n_spliced == 2
    rig.take(encode_chunk(line("e")))
    assert rig.n_spliced == 3
    rig.take(encode_chunk(line("f") + line("g")))
    rig.take(encode_chunk(b'{"error":"x","done":false}\n'))
    rig.take(encode_chunk(line("", done=True)))
    assert rig.n_spliced == 3


def test_what_the_client_does_not_take_is_kept_and_the_server_waits() -> None:
    rig = Rig()
    rig.begin()
    rig.client.room = 10
    rig.take(encode_chunk(line("a")))
    assert rig.run.paused
    rig.client.room = 1 << 20
    rig.take(encode_chunk(line("b")))  # which had come by then
    assert rig.client.data.endswith(encode_chunk(line("a"))[:10])
    assert bytes(rig.relay._unsent) == encode_chunk(line("a"))[10:] + encode_chunk(line("b"))


def test_a_client_that_has_left_shows_in_its_task() -> None:
    rig = Rig()
    rig.begin()
    rig.client.room = -1
    rig.take(encode_chunk(line("a")))
    assert isinstance(rig.relay._problem, ClientGone)


@pytest.mark.anyio
async def test_a_stream_of_ordinary_chunks_arrives_whole_with_the_end_in_one_piece() -> None:
    async with scripted() as (rig, (server,)):
        server.pieces = [HEAD, *[encode_chunk(line(f"{n}")) for n in range(20)], chunked([line("", done=True)])]
        server.pause_s = 0.001
        answer = await rig.chat()
    assert answer.complete
    assert answer.body == b"".join([*[line(f"{n}") for n in range(20)], line("", done=True)])
