"""Addresses: where to listen, servers' URLs and names."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.parsing import RefusedError
from lbio.configuration.addresses import Address, is_same_place, parse_listen, parse_name, parse_server_url

# tables of exact messages: one case a line


@pytest.mark.parametrize(("text", "expected"), [
    ("127.0.0.1:80", "127.0.0.1:80"), ("[::1]:80", "[::1]:80"), ("[0::0:1]:80", "[::1]:80"), (":8080", "0.0.0.0:8080"),
    ("8080", "0.0.0.0:8080"), ("LocalHost:0", "localhost:0"), (" gpu_1.lan:1 ", "gpu_1.lan:1"), ("[::]:1", "[::]:1"),
])
def test_where_to_listen(text: str, expected: str) -> None:
    assert str(parse_listen(text)) == expected
    assert str(parse_listen(expected)) == expected


LISTEN_FORMS = 'write it as "host:port", "[::1]:port", ":port" or "port"'
HOST_FORMS = 'write a host such as "gpu1", "10.0.0.7" or "[::1]"'


@pytest.mark.parametrize(("text", "message", "fix"), [
    ("127.0.0.1", "has no port", 'write "127.0.0.1:11434"'),
    ("::1", "has no port", 'write "[::1]:11434"'),
    ("[::1]", "has no port", 'write "[::1]:11434"'),
    ("", "has no port", LISTEN_FORMS),
    ("a:b:c", "has no port", LISTEN_FORMS),
    ("http://h:1/", 'begins with "http://"', 'write "h:1"'),
    ("http://", 'begins with "http://"', LISTEN_FORMS),
    ("h:65536", 'has port "65536"', "write a port from 0 to 65535"),
    ("99999", 'has port "99999"', "write a port from 0 to 65535"),
    ("h:", 'has port ""', "write a port from 0 to 65535"),
    ("h:²", 'has port "²"', "write a port from 0 to 65535"),
    ("*:80", 'has "*" in it, which is no host name or address', HOST_FORMS),
    ("1.2.3.400:80", 'has "1.2.3.400" in it, which is no IPv4 address', HOST_FORMS),
    ("[zz]:80", 'has "[zz]" in it, which is no IPv6 address', HOST_FORMS),
])
def test_where_one_cannot_listen(text: str, message: str, fix: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_listen(text)
    assert (caught.value.message, caught.value.fix) == (message, fix)


@pytest.mark.parametrize(("text", "expected"), [
    ("http://gpu1", "http://gpu1:11434"), ("HTTP://GPU1:80/", "http://gpu1:80"), ("https://gpu1", "https://gpu1:443"),
    ("http://[::1]", "http://[::1]:11434"), ("http://[0:0::1]:5", "http://[::1]:5"), (" http://a ", "http://a:11434"),
    ("http://münchen", "http://xn--mnchen-3ya:11434"), ("http://a:", "http://a:11434"), ("https://a.b.c:1", "https://a.b.c:1"),
])
def test_server_urls_have_one_spelling(text: str, expected: str) -> None:
    assert str(parse_server_url(text)) == expected
    assert str(parse_server_url(expected)) == expected


@pytest.mark.parametrize(("text", "message", "fix"), [
    ("gpu3:11434", "has no scheme", 'write "http://gpu3:11434"'),
    ("gpu3/", "has no scheme", 'write "http://gpu3"'),
    ("", "is empty", 'write "http://host:11434"'),
    ("ftp://x", 'has the scheme "ftp"', "write http:// or https://"),
    ("http://u:p@x:1", "has a user name in it, and Ollama has no users", 'write "http://x:1"'),
    ("http://x:1/api", 'has "/api" after the host', 'the path comes from the client; write "http://x:1"'),
    ("http://x?a=b", 'has "?a=b" after the host', 'the path comes from the client; write "http://x"'),
    ("http://x#a", 'has "#a" after the host', 'the path comes from the client; write "http://x"'),
    ("http://", "has no host", 'write "http://host:port"'),
    ("http://:11434", "has no host", 'write "http://host:port"'),
    ("http://x:0", 'has port "0"', "write a port from 1 to 65535"),
    ("http://x:http", 'has port "http"', "write a port from 1 to 65535"),
    ("http://::1:11434", "has an IPv6 address without brackets", 'write it as "http://[::1]:11434"'),
    ("http://[zz]", "is not a URL", 'write "http://host:port"'),
    ("http://a b", 'has "a b" in it, which is no host name or address', HOST_FORMS),
    ("http://-a", 'has "-a" in it, which is no host name or address', HOST_FORMS),
    ("a b", 'has "a b" in it, which is no host name or address', HOST_FORMS),
])
def test_bad_server_urls(text: str, message: str, fix: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_server_url(text)
    assert (caught.value.message, caught.value.fix) == (message, fix)


def test_the_command_line_takes_hosts_without_scheme() -> None:
    assert str(parse_server_url("gpu3:11434", scheme_optional=True)) == "http://gpu3:11434"


@given(st.one_of(st.text(max_size=30), st.text("htps:/[]@?#.0123456789ab %\\", max_size=30)))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    for read in (parse_listen, parse_server_url, lambda it: parse_server_url(it, scheme_optional=True), parse_name):
        with contextlib.suppress(RefusedError):
            parsed = str(read(text))
            assert str(read(parsed)) == parsed


@pytest.mark.parametrize(("listen", "server", "same"), [
    ("0.0.0.0:1", "127.0.0.1:1", True), ("0.0.0.0:1", "localhost:1", True), ("[::]:1", "[::1]:1", True),
    ("127.0.0.1:1", "0.0.0.0:1", True), ("127.0.0.1:1", "localhost:1", True), ("gpu1:1", "gpu1:1", True),
    ("10.0.0.1:1", "10.0.0.1:1", True), ("0.0.0.0:1", "0.0.0.0:1", True),
    ("0.0.0.0:1", "127.0.0.1:2", False), ("127.0.0.1:1", "127.0.0.2:1", False), ("0.0.0.0:1", "10.0.0.1:1", False),
    ("0.0.0.0:1", "gpu1:1", False), ("0.0.0.0:0", "127.0.0.1:1", False), ("10.0.0.1:1", "127.0.0.1:1", False),
])
def test_the_same_place(listen: str, server: str, same: bool) -> None:
    assert is_same_place(parse_listen(listen), parse_listen(server)) is same


@pytest.mark.parametrize("name", ["a b", "a,b", "a/b", "ä", "a\tb", "a\x7f", ""])
def test_names_fit_headers_and_paths(name: str) -> None:
    with pytest.raises(RefusedError):
        parse_name(name)


def test_an_address_knows_its_brackets() -> None:
    assert str(Address("::1", 5)) == "[::1]:5"
