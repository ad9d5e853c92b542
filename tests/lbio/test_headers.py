"""Which headers go on: tables, and properties for any headers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbio.configuration.settings import Forwarded
from lbio.http1 import Framing, RequestHead, ResponseHead, parse_request_head, parse_response_head
from lbio.wire.headers import HOP_BY_HOP, canonical, downstream_headers, end_to_end, upstream_headers

names = st.from_regex(rb"x-[a-z]{1,6}", fullmatch=True) | st.sampled_from(sorted(HOP_BY_HOP))
values = st.from_regex(rb"[a-z, ]{0,8}", fullmatch=True)
PLAIN = b"POST /api/chat HTTP/1.1\r\nHost: x\r\n"


def asked(headers: bytes = b"", version: bytes = b"1.1", method: bytes = b"POST") -> RequestHead:
    line = method + b" /api/chat HTTP/" + version + b"\r\nHost: x\r\n"
    return parse_request_head(line + headers + b"\r\n")


def answered(headers: bytes, status: bytes = b"200 OK", method: str = "POST") -> ResponseHead:
    return parse_response_head(b"HTTP/1.1 " + status + b"\r\n" + headers + b"\r\n", method)


@given(st.lists(st.tuples(names, values)))
def test_what_goes_on_keeps_its_order_and_is_not_of_the_connection(pairs: list[tuple[bytes, bytes]]) -> None:
    kept = end_to_end(pairs, HOP_BY_HOP)
    assert not {name for name, _ in kept} & HOP_BY_HOP
    rest = iter(pairs)
    assert all(pair in rest for pair in kept)
    named = {token.strip() for name, value in pairs if name == b"connection" for token in value.split(b",")}
    assert not {name for name, _ in kept} & named
    assert {name for name, _ in pairs} - HOP_BY_HOP - named == {name for name, _ in kept}


@pytest.mark.parametrize(("client", "mode", "expected"), [
    ("10.0.0.1", Forwarded.X_FORWARDED_FOR, [(b"x-forwarded-for", b"10.0.0.1")]),
    ("::1", Forwarded.X_FORWARDED_FOR, [(b"x-forwarded-for", b"::1")]),
    ("10.0.0.1", Forwarded.FORWARDED, [(b"forwarded", b"for=10.0.0.1")]),
    ("::1", Forwarded.FORWARDED, [(b"forwarded", b'for="[::1]"')]),
    ("10.0.0.1", Forwarded.NONE, []),
])  # fmt: skip
def test_how_the_client_is_named(client: str, mode: Forwarded, expected: list[tuple[bytes, bytes]]) -> None:
    assert upstream_headers(asked(), 0, client, mode) == expected


def test_two_lists_of_proxies_become_one() -> None:
    head = asked(b"X-Forwarded-For: a\r\nX-B: 1\r\nX-Forwarded-For: b\r\n")
    assert upstream_headers(head, 0, "c", Forwarded.X_FORWARDED_FOR) == [
        (b"x-b", b"1"),
        (b"x-forwarded-for", b"a, b, c"),
    ]


@pytest.mark.parametrize("connection", [b"host", b"content-length", b"x-forwarded-for", b"HOST, X-A"])
def test_a_client_cannot_make_us_drop_what_we_add(connection: bytes) -> None:
    head = asked(b"Connection: " + connection + b"\r\nX-A: 1\r\nContent-Length: 3\r\n")
    found = dict(upstream_headers(head, 3, "c", Forwarded.X_FORWARDED_FOR))
    assert found[b"Content-Length"] == b"3"
    assert found[b"x-forwarded-for"] == b"c"


@pytest.mark.parametrize(("headers", "n_bytes", "length"), [
    (b"", 0, None),
    (b"Content-Length: 0\r\n", 0, b"0"),
    (b"Content-Length: 5\r\n", 5, b"5"),
    (b"Transfer-Encoding: chunked\r\n", 5, b"5"),
    (b"Transfer-Encoding: chunked\r\n", 0, b"0"),
])  # fmt: skip
def test_bodies_are_sent_with_their_length(headers: bytes, n_bytes: int, length: bytes | None) -> None:
    found = dict(upstream_headers(asked(headers), n_bytes, "c", Forwarded.NONE))
    assert found.get(b"Content-Length") == length
    assert b"transfer-encoding" not in found


CHUNKED, LENGTH, CLOSE = b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Connection: close\r\n"


@pytest.mark.parametrize(("version", "headers", "framing", "present", "absent"), [
    (b"1.1", CHUNKED, Framing.CHUNKED, (b"Transfer-Encoding", b"chunked"), b"Content-Length"),
    (b"1.1", LENGTH, Framing.LENGTH, (b"Content-Length", b"5"), b"Transfer-Encoding"),
    (b"1.1", CLOSE, Framing.CHUNKED, (b"Transfer-Encoding", b"chunked"), b"Connection"),
    (b"1.0", CHUNKED, Framing.CLOSE, (b"Connection", b"close"), b"Transfer-Encoding"),
    (b"1.0", LENGTH, Framing.LENGTH, (b"Content-Length", b"5"), b"Transfer-Encoding"),
    (b"1.0", CLOSE, Framing.CLOSE, (b"Connection", b"close"), b"Transfer-Encoding"),
])  # fmt: skip
def test_framing(version: bytes, headers: bytes, framing: Framing, present: tuple[bytes, bytes], absent: bytes) -> None:
    found, how = downstream_headers(answered(headers), asked(b"", version), close=False, ours=())
    assert how is framing
    assert present in found
    assert absent not in dict(found)


def test_head_has_the_length_of_the_body_it_does_not_have() -> None:
    answer = answered(LENGTH, method="HEAD")
    found, how = downstream_headers(answer, asked(method=b"HEAD"), close=False, ours=())
    assert (how, dict(found)[b"Content-Length"]) == (Framing.NONE, b"5")


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_no_body_no_framing(status: bytes) -> None:
    found, how = downstream_headers(answered(b"", status), asked(), close=False, ours=())
    assert (found, how) == ([], Framing.NONE)


def test_a_close_is_announced() -> None:
    found, _ = downstream_headers(answered(LENGTH), asked(), close=True, ours=())
    assert (b"Connection", b"close") in found


@pytest.mark.parametrize(("name", "expected"), [
    (b"content-type", b"Content-Type"), (b"etag", b"Etag"), (b"x-a-b", b"X-A-B"), (b"date", b"Date")
])  # fmt: skip
def test_names_as_go_writes_them(name: bytes, expected: bytes) -> None:
    assert canonical(name) == expected
