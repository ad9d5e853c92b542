"""Heads: the malformed corpus, h11 as the oracle, the memo, and what we write."""

import h11
import pytest
from h11._connection import _body_framing
from hypothesis import example
from hypothesis import strategies as st

from lbio.http1 import (
    Framing,
    HttpError,
    RequestHead,
    ResponseHead,
    Role,
    parse_request_head,
    parse_response_head,
    serialize_request,
    serialize_response,
)
from lbio.wire import http1_heads
from tests.lbio.http1_strategies import corrupted, corruptions, given, outcome, request_heads, response_heads
from tests.lbio.malformed import REQUEST_HEADS, RESPONSE_HEADS


@pytest.mark.parametrize(("raw", "status"), [pytest.param(*row[1:], id=row[0]) for row in REQUEST_HEADS])
def test_malformed_request_heads(raw: bytes, status: int) -> None:
    for _ in range(2):  # the second time would come from the memo
        with pytest.raises(HttpError) as caught:
            parse_request_head(raw)
        assert caught.value.status == status
        assert caught.value.message
        assert caught.value.message.isprintable()


@pytest.mark.parametrize(("raw", "status"), [pytest.param(*row[1:], id=row[0]) for row in RESPONSE_HEADS])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_malformed_response_heads(raw: bytes, status: int, method: str) -> None:
    with pytest.raises(HttpError) as caught:
        parse_response_head(raw, method)
    assert caught.value.status == status


def test_request_head() -> None:
    head = parse_request_head(
        b"POST /api/chat?a=1?b HTTP/1.1\r\nHoSt: h:1\r\nX: 1\r\nx:2 \r\nContent-Length: 7\r\nExpect: 100-Continue\r\n"
        b"Upgrade: h2c\r\nConnection: upgrade\r\n\r\n"
    )
    assert (head.method, head.target, head.path, head.query) == ("POST", "/api/chat?a=1?b", "/api/chat", "a=1?b")
    assert head.headers[:3] == ((b"host", b"h:1"), (b"x", b"1"), (b"x", b"2"))
    assert head.header(b"x") == b"1"
    assert head.header(b"y") is None
    assert (head.framing, head.content_length) == (Framing.LENGTH, 7)
    assert head.keep_alive
    assert head.expect_continue


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/", "/", ""),
        (b"/a/b?", "/a/b", ""),
        (b"http://h:1/x?y=/", "/x", "y=/"),
        (b"HTTP://h", "/", ""),
        (b"http://h?q", "/", "q"),
        (b"//a/b", "//a/b", ""),
        (b"/http://h/x", "/http://h/x", ""),
    ],
)
def test_targets(target: bytes, path: str, query: str) -> None:
    head = parse_request_head(b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % target)
    assert (head.path, head.query) == (path, query)


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: x, Close\r\n", False),
        (b"1.1", b"Connection: keep-alive\r\nConnection: close\r\n", False),
        (b"1.1", b"Connection: closed\r\n", True),
        (b"1.3", b"", True),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: Keep-Alive\r\n", True),
        (b"1.0", b"Connection: keep-alive, close\r\n", False),
    ],
)
def test_keep_alive(version: bytes, connection: bytes, keep_alive: bool) -> None:
    request = parse_request_head(b"GET / HTTP/%s\r\nHost: h\r\n%s\r\n" % (version, connection))
    response = parse_response_head(b"HTTP/%s 200 OK\r\nContent-Length: 0\r\n%s\r\n" % (version, connection), "GET")
    until_close = parse_response_head(b"HTTP/%s 200 OK\r\n%s\r\n" % (version, connection), "GET")
    assert (request.keep_alive, response.keep_alive, until_close.keep_alive) == (keep_alive, keep_alive, False)
    assert until_close.framing is Framing.CLOSE


@pytest.mark.parametrize(
    ("headers", "version", "expected"),
    [
        (b"Content-Length: 1\r\n", b"1.1", True),
        (b"Transfer-Encoding: chunked\r\n", b"1.1", True),
        (b"Content-Length: 0\r\n", b"1.1", False),
        (b"", b"1.1", False),
        (b"Content-Length: 1\r\n", b"1.0", False),
    ],
)
def test_expect_continue(headers: bytes, version: bytes, expected: bool) -> None:
    raw = b"POST / HTTP/%s\r\nHost: h\r\nExpect: 100-continue\r\n%s\r\n" % (version, headers)
    assert parse_request_head(raw).expect_continue is expected


def test_options_star_and_a_head_in_1_0_without_host() -> None:
    assert parse_request_head(b"OPTIONS * HTTP/1.1\r\nHost:\r\n\r\n").path == "*"
    assert parse_request_head(b"GET / HTTP/1.0\r\n\r\n").framing is Framing.NONE


@pytest.mark.parametrize(
    ("status", "method", "framing"),
    [(200, "GET", "LENGTH"), (200, "HEAD", "NONE"), (204, "GET", "NONE"), (304, "GET", "NONE"), (100, "GET", "NONE")],
)
def test_answers_without_a_body(status: int, method: str, framing: str) -> None:
    head = parse_response_head(b"HTTP/1.1 %d X\r\nContent-Length: 5\r\n\r\n" % status, method)
    assert (head.framing, head.content_length) == (Framing[framing], 5 if framing == "LENGTH" else 0)
    assert head.header(b"content-length") == b"5"
    assert head.keep_alive


def framing_by_h11(event: h11.Request | h11.Response, method: bytes) -> tuple[Framing, int]:
    name, arguments = _body_framing(method, event)
    if name == "content-length":
        return Framing.LENGTH, int(*arguments)
    return (Framing.CHUNKED if name == "chunked" else Framing.CLOSE), 0


def check_request(raw: bytes) -> bool:
    """Return whether it is accepted; then h11, asked anew, must have understood the same."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw)
    try:
        theirs = connection.next_event()
    except h11.RemoteProtocolError:
        theirs = h11.NEED_DATA
    ours = outcome(lambda: parse_request_head(raw, memo=False))
    if not isinstance(ours, RequestHead):
        return False
    assert isinstance(theirs, h11.Request)
    assert (ours.method.encode(), ours.target.encode()) == (theirs.method, theirs.target)
    assert list(ours.headers) == list(theirs.headers)
    framing, length = framing_by_h11(theirs, theirs.method)
    assert ours.content_length == length
    assert ours.framing is framing or (ours.framing is Framing.NONE and length == 0)
    assert connection.trailing_data == (b"", False)
    return True


def check_response(raw: bytes, method: str) -> bool:
    """The same for an answer."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(raw)
    try:
        theirs = connection.next_event()
    except h11.RemoteProtocolError:
        theirs = h11.NEED_DATA
    ours = outcome(lambda: parse_response_head(raw, method, memo=False))
    if not isinstance(ours, ResponseHead):
        return False
    assert isinstance(theirs, h11.Response | h11.InformationalResponse)
    assert (ours.status, ours.reason) == (theirs.status_code, theirs.reason)
    assert list(ours.headers) == list(theirs.headers)
    if isinstance(theirs, h11.InformationalResponse):
        assert ours.framing is Framing.NONE
    else:
        framing, length = framing_by_h11(theirs, method.encode())
        assert ours.content_length == length
        assert ours.framing is framing or (ours.framing is Framing.NONE and length == 0)
    return True


@given(request_heads, corruptions)
@example(b"GET / HTTP/1.1\r\nHost: h:1\r\n\r\n", [])
def test_request_heads_against_h11(valid: bytes, changes: list[tuple[int, int]]) -> None:
    assert check_request(corrupted(valid, changes)) or changes


@given(response_heads, corruptions, st.sampled_from(["GET", "HEAD"]))
def test_response_heads_against_h11(valid: bytes, changes: list[tuple[int, int]], method: str) -> None:
    assert check_response(corrupted(valid, changes), method) or changes


@pytest.mark.parametrize("role", ["request", "response"])
def test_no_corrupted_byte_makes_us_accept_what_h11_refuses(role: Role) -> None:
    request = b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nA: b\r\n\r\n"
    response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nA: b\r\n\r\n"
    valid = request if role == "request" else response
    accepted = 0
    for position in range(len(valid)):
        for value in range(256):
            raw = corrupted(valid, [(position, value)])
            accepted += check_request(raw) if role == "request" else check_response(raw, "GET")
    assert 1000 < accepted < len(valid) * 128


@given(st.one_of(request_heads, st.sampled_from([row[1] for row in REQUEST_HEADS])), corruptions)
def test_the_memo_changes_no_request(valid: bytes, changes: list[tuple[int, int]]) -> None:
    raw = corrupted(valid, changes)
    plain = outcome(lambda: parse_request_head(raw, memo=False))
    assert outcome(lambda: parse_request_head(raw)) == plain
    assert outcome(lambda: parse_request_head(raw)) == plain


@given(st.one_of(response_heads, st.sampled_from([row[1] for row in RESPONSE_HEADS])), corruptions)
def test_the_memo_changes_no_response(valid: bytes, changes: list[tuple[int, int]]) -> None:
    raw = corrupted(valid, changes)
    for method in ("GET", "HEAD", "POST", "GET"):
        plain = outcome(lambda method=method: parse_response_head(raw, method, memo=False))  # type: ignore[misc]
        assert outcome(lambda method=method: parse_response_head(raw, method)) == plain  # type: ignore[misc]


def test_the_memo_is_bounded_and_keeps_no_refused_head() -> None:
    known = http1_heads._REQUESTS
    known.clear()
    for number in range(1100):
        parse_request_head(b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n" % number)
    assert len(known) == 1024
    assert next(iter(known)) == b"GET /76 HTTP/1.1\r\nHost: h\r\n\r\n"  # the oldest have made room
    known.clear()
    for _name, raw, _status in REQUEST_HEADS:
        outcome(lambda raw=raw: parse_request_head(raw))  # type: ignore[misc]
    large = b"GET / HTTP/1.1\r\nHost: h\r\nA: %s\r\n\r\n" % (b"a" * 5000)
    assert parse_request_head(large) is not parse_request_head(large)
    parse_request_head(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", memo=False)
    assert not known


INJECTIONS = [
    (b"a", b"b\r\nc: d"),
    (b"a", b"b\nc"),
    (b"a", b"b\rc"),
    (b"a", b"b\x00"),
    (b"a", b" b"),
    (b"a\r\n", b"b"),
    (b"a b", b"c"),
    (b"a:", b"c"),
    (b"", b"c"),
    (b"content-length", b"x"),
    (b"content-length", b"1, 2"),
    (b"transfer-encoding", b"gzip"),
]


@pytest.mark.parametrize(("name", "value"), INJECTIONS)
def test_nothing_can_be_injected_through_a_header(name: bytes, value: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        serialize_request("GET", "/", [(b"host", b"h"), (name, value)])
    with pytest.raises(ValueError, match=r"\S"):
        serialize_response(200, [(name, value)])


def test_nothing_can_be_injected_through_a_line() -> None:
    for method, target in [
        ("GET /", "/"),
        ("GET\r\n", "/"),
        ("", "/"),
        ("GET", "/ x"),
        ("GET", "/\r\n"),
        ("GET", "/é"),
    ]:
        with pytest.raises(ValueError, match=r"\S"):
            serialize_request(method, target, [(b"host", b"h")])
    with pytest.raises(ValueError, match="Host"):
        serialize_request("GET", "/", [])
    for reason in (b"a\r\nb: c", b"a\nb", b"\x00"):
        with pytest.raises(ValueError, match="reason"):
            serialize_response(200, [], reason)


def test_serialized_heads() -> None:
    pairs = [(b"a", b"1"), (b"A", b"2"), (b"host", b"h"), (b"b", b"")]
    assert serialize_request("GET", "/x", pairs) == b"GET /x HTTP/1.1\r\nhost: h\r\na: 1\r\nA: 2\r\nb: \r\n\r\n"
    assert serialize_response(200, pairs[:2]) == b"HTTP/1.1 200 OK\r\na: 1\r\nA: 2\r\n\r\n"
    assert serialize_response(100, []) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert serialize_response(599, []) == b"HTTP/1.1 599 \r\n\r\n"
    assert serialize_response(200, [], b"\xe9 y") == b"HTTP/1.1 200 \xe9 y\r\n\r\n"


@given(request_heads, response_heads)
def test_what_we_write_is_what_we_read(request_raw: bytes, response_raw: bytes) -> None:
    request = parse_request_head(request_raw)
    again = parse_request_head(serialize_request(request.method, request.target, request.headers))
    assert (again.method, again.target) == (request.method, request.target)
    assert sorted(again.headers) == sorted(request.headers)
    response = parse_response_head(response_raw, "GET")
    written = serialize_response(response.status, response.headers, response.reason)
    assert parse_response_head(written, "GET").headers == response.headers
