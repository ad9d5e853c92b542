"""Addresses and names as people write them: where to listen, where a server is, what it is called.

Every function raises `RefusedError` with what is wrong and how to write it right.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from lbcore.parsing import RefusedError, quote

LISTEN_FORMS = 'write it as "host:port", "[::1]:port", ":port" or "port"'
DEFAULT_PORTS: Mapping[str, int] = {"http": 11434, "https": 443}

_WEB_PORTS: Mapping[str, str] = {"http": ":80", "https": ":443"}  # as an origin ends with them

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_PORT_MAX = 65535
_HOST_FIX = 'write a host such as "gpu1", "10.0.0.7" or "[::1]"'
_HOST_MAX = 253
_ALL_IPV4 = "0.0.0.0"  # noqa: S104  # what ":port" means


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port; an IPv6 `host` is held without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return `host:port`, with the brackets IPv6 needs."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """Where an Ollama is; `str()` is the one spelling under which it is known here."""

    scheme: str
    address: Address

    def __str__(self) -> str:
        """Return `scheme://host:port`."""
        return f"{self.scheme}://{self.address}"


def parse_host(text: str) -> str:
    """Return a host in its one spelling: lower case, IDNA-encoded, IPv6 compressed and without brackets."""
    if text.startswith("[") and text.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(text[1:-1]))
        except ValueError:
            raise RefusedError(f"has {quote(text)} in it, which is no IPv6 address", _HOST_FIX) from None
    try:
        host = text if text.isascii() else text.encode("idna").decode("ascii")
    except UnicodeError:
        raise RefusedError(f"has {quote(text)} in it, which is no host name or address", _HOST_FIX) from None
    labels = host.removesuffix(".").split(".")
    if len(host) > _HOST_MAX or not all(_LABEL.fullmatch(label) for label in labels):
        raise RefusedError(f"has {quote(text)} in it, which is no host name or address", _HOST_FIX)
    if labels[-1].isdecimal():
        return _ipv4(host)
    return host.lower()


def _ipv4(host: str) -> str:
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise RefusedError(f"has {quote(host)} in it, which is no IPv4 address", _HOST_FIX) from None


def _parse_port(text: str, low: int) -> int:
    digits = text.isascii() and text.isdecimal() and len(text) <= len(str(_PORT_MAX))
    if digits and low <= int(text) <= _PORT_MAX:
        return int(text)
    raise RefusedError(f"has port {quote(text)}", f"write a port from {low} to {_PORT_MAX}")


def parse_listen(text: str) -> Address:
    """Return the address of "host:port", "[::1]:port", ":port" or "port"; port 0 means any free one."""
    text = text.strip()
    if text.isascii() and text.isdecimal():
        return Address(_ALL_IPV4, _parse_port(text, 0))
    scheme = _SCHEME.match(text)
    if scheme:
        rest = text[scheme.end():].rstrip("/")
        raise RefusedError(f"begins with {quote(scheme[0])}", f"write {quote(rest)}" if rest else LISTEN_FORMS)
    host, colon, port = text.rpartition(":")
    bare_ipv6 = ":" in host and not host.startswith("[")
    if bare_ipv6 or not colon or port.endswith("]"):
        raise RefusedError("has no port", _listen_fix(text))
    return Address(parse_host(host) if host else _ALL_IPV4, _parse_port(port, 0))


def _listen_fix(text: str) -> str:
    """Return how to write the host `text`, if it is one, with a port."""
    try:
        host = parse_host(f"[{text}]" if ":" in text and not text.startswith("[") else text)
    except RefusedError:
        return LISTEN_FORMS
    return f"write {quote(str(Address(host, DEFAULT_PORTS['http'])))}"


def parse_server_url(text: str, *, scheme_optional: bool = False) -> ServerUrl:
    """Return where a server is; with `scheme_optional`, "host:port" is taken as http."""
    text = text.strip()
    if not text:
        raise RefusedError("is empty", 'write "http://host:11434"')
    scheme = _SCHEME.match(text)
    if scheme is None:
        url = _parse_parts("http", text)
        if scheme_optional:
            return url
        raise RefusedError("has no scheme", f"write {quote('http://' + text.rstrip('/'))}")
    name = scheme[1].lower()
    if name not in DEFAULT_PORTS:
        raise RefusedError(f"has the scheme {quote(name)}", "write http:// or https://")
    return _parse_parts(name, text[scheme.end():])


def _parse_parts(scheme: str, rest: str) -> ServerUrl:
    """Return the URL `scheme://rest`, of which only host and port may be given."""
    try:
        parts = urlsplit(f"{scheme}://{rest}")
    except ValueError:
        raise RefusedError("is not a URL", 'write "http://host:port"') from None
    login, _, authority = parts.netloc.rpartition("@")
    bare = f"{scheme}://{authority}"
    if login:
        raise RefusedError("has a user name in it, and Ollama has no users", f"write {quote(bare)}")
    if parts.path.strip("/") or parts.query or parts.fragment:
        extra = quote(rest[len(parts.netloc):])
        raise RefusedError(f"has {extra} after the host", f"the path comes from the client; write {quote(bare)}")
    host, port = _split_authority(authority)
    if not host:
        raise RefusedError("has no host", 'write "http://host:port"')
    number = _parse_port(port, 1) if port else DEFAULT_PORTS[scheme]
    return ServerUrl(scheme, Address(parse_host(host), number))


def _split_authority(authority: str) -> tuple[str, str]:
    """Return (host, port); the port is "" if there is none, and an IPv6 host keeps its brackets."""
    if authority.endswith("]") or ":" not in authority:
        return authority, ""
    host, _, port = authority.rpartition(":")
    if ":" in host and not host.startswith("["):
        raise RefusedError("has an IPv6 address without brackets", 'write it as "http://[::1]:11434"')
    return host, port


_ORIGIN_FIX = 'write "scheme://host" or "scheme://host:port", with * for any text, or "*" for all pages'


def parse_origin(text: str) -> str:
    """Return the origin of a web page, in which one `*` may stand for any text, as browsers write it; "*" is all."""
    origin = text.strip().lower()
    if "," in origin:
        raise RefusedError("has a comma in it", "write each origin as a text of its own")
    if origin.count("*") > 1:
        raise RefusedError("has more than one * in it", "write a text for each of them")
    scheme = _SCHEME.match(origin)
    if scheme is None and "*" not in origin:
        named = bool(origin) and not set(origin) & set(" :/")
        raise RefusedError("has no scheme", f"write {quote('https://' + origin)}" if named else _ORIGIN_FIX)
    bad = next((char for char in origin if not "!" <= char <= "~"), None)
    if bad is not None:
        raise RefusedError(f"has {quote(bad)} in it", "write the host as browsers send it, of ASCII (xn--...)")
    if scheme is not None:
        _refuse_unsent(origin, scheme[1], origin[scheme.end():])
    return origin


def _refuse_unsent(origin: str, scheme: str, rest: str) -> None:
    """Refuse what no browser sends as an origin: one without a host, with a path, or with the scheme's own port."""
    host, slash, path = rest.partition("/")
    if not host:
        raise RefusedError("has no host", _ORIGIN_FIX)
    if slash:
        raise RefusedError(f"has {quote(slash + path)} after the host", f"write {quote(f'{scheme}://{host}')}")
    if scheme in _WEB_PORTS and host.endswith(_WEB_PORTS[scheme]):
        bare = origin.removesuffix(_WEB_PORTS[scheme])
        raise RefusedError("names the usual port, which browsers leave out", f"write {quote(bare)}")


_NAME_FORBIDDEN = " ,/"


def parse_name(text: str) -> str:
    """Return a server's name, which must be fit for a header and for one segment of a URL path."""
    bad = next((char for char in text if not "!" <= char <= "~" or char in _NAME_FORBIDDEN), None)
    if bad is not None:
        raise RefusedError(f"has {quote(bad)} in it", "write a name of ASCII without space, comma and slash")
    if not text:
        raise RefusedError("is empty", "write a name, or leave it out to get host:port")
    return text


def is_same_place(listen: Address, server: Address) -> bool:
    """Tell whether `server` is what listens at `listen`, as far as their spelling tells."""
    if listen.port == 0 or listen.port != server.port:
        return False
    here, there = _ip(listen.host), _ip(server.host)
    if here is None or there is None:
        return listen.host == server.host
    return here == there or (there.is_unspecified and here.is_loopback) or (
        here.is_unspecified and (there.is_loopback or there.is_unspecified))


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Tell whether who listens at `host` can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
