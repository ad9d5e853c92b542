"""Which headers go on, in both directions, and which are added."""

from __future__ import annotations

from collections.abc import Iterable

from lbio.configuration.settings import Forwarded
from lbio.http1 import Framing, HeaderPairs, Headers, RequestHead, ResponseHead, serialize_response

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Headers that concern one connection only (RFC 9110 §7.6.1)."""

_NOT_UPSTREAM = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"origin"}
_NOT_UPSTREAM_PLAIN = _NOT_UPSTREAM | {b"accept-encoding"}
# Host is each server's own; Origin would be refused by an Ollama bound to loopback (design §7.13).
_NOT_DOWNSTREAM = HOP_BY_HOP | {b"content-length"}
_OURS = b"x-ollama-lb-"
_SAID_HERE = (_OURS, b"access-control-")  # see lbio.access.cors


def end_to_end(headers: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes] | set[bytes]) -> Headers:
    """Return the headers that go on: without `dropped`, and without those that `Connection` names."""
    pairs = list(headers)
    named = {token.strip().lower() for name, value in pairs if name == b"connection" for token in value.split(b",")}
    return [(name, value) for name, value in pairs if name not in dropped and name not in named]


def upstream_headers(
    head: RequestHead,
    n_body_bytes: int | None,
    client: str,
    forwarded: Forwarded,
    *,
    plain: bool = False,
    via: str = "",
) -> Headers:
    """Return the headers of the request as servers get it, but for `Host`.

    `n_body_bytes` None: nobody knows yet, so the body is chunked.
    `via` is what we are called in the list of those whom it has passed (RFC 9110 §7.6.3), by which we know it again.
    `plain`: the answer is to be read here, so a proxy in front of the server must not be told that it may compress it.
    """
    dropped = _NOT_UPSTREAM_PLAIN if plain else _NOT_UPSTREAM
    headers = [pair for pair in end_to_end(head.headers, dropped) if not pair[0].startswith(_OURS)]
    if forwarded is Forwarded.X_FORWARDED_FOR:
        headers = _appended(headers, b"x-forwarded-for", client.encode())
    elif forwarded is Forwarded.FORWARDED:
        node = f'"[{client}]"' if ":" in client else client
        headers = _appended(headers, b"forwarded", f"for={node}".encode())
    if via:
        headers = _appended(headers, b"via", f"{head.http_version} {via}".encode())
    if n_body_bytes is None:
        headers.append((b"Transfer-Encoding", b"chunked"))
    elif n_body_bytes or head.framing is not Framing.NONE:
        headers.append((b"Content-Length", b"%d" % n_body_bytes))
    return headers


def has_passed(head: RequestHead, via: str) -> bool:
    """Tell whether a request has been here before: a server that it was sent to has led it back."""
    name = via.encode()
    return any(found == b"via" and name in value for found, value in head.headers)


def _appended(headers: Headers, name: bytes, value: bytes) -> Headers:
    """Return the headers with `value` at the end of the list in `name`: proxies before us stay visible."""
    before = [v for n, v in headers if n == name]
    return [*[pair for pair in headers if pair[0] != name], (name, b", ".join([*before, value]))]


def downstream_headers(
    head: ResponseHead, request: RequestHead, *, close: bool, ours: HeaderPairs
) -> tuple[Headers, Framing]:
    """Return the headers of an answer as the client gets it, and how its body is framed.

    Framing is kept as the server chose it where the client can read it; a client of HTTP/1.0 reads to the end.
    """
    headers = [
        (canonical(name), value)
        for name, value in end_to_end(head.headers, _NOT_DOWNSTREAM)
        if not name.startswith(_SAID_HERE)
    ]
    headers += ours
    framing = head.framing
    if framing is Framing.LENGTH:
        headers.append((b"Content-Length", b"%d" % head.content_length))
    elif framing is Framing.NONE:
        length = head.header(b"content-length")
        if length is not None and request.method == "HEAD":
            headers.append((b"Content-Length", length))
    elif request.http_version == "1.0":
        framing = Framing.CLOSE
    else:
        framing = Framing.CHUNKED
        headers.append((b"Transfer-Encoding", b"chunked"))
    if close or framing is Framing.CLOSE:
        headers.append((b"Connection", b"close"))
    elif request.http_version == "1.0":
        headers.append((b"Connection", b"keep-alive"))
    return headers, framing


def written_head(
    head: ResponseHead, request: RequestHead, ours: HeaderPairs, *, close: bool
) -> tuple[bytes, Framing]:
    """Return the head of an answer as the client gets it, without its blank line, and how its body is framed.

    Servers say the same over and over, so it is kept with the head that it was made of.
    """

    def write() -> tuple[bytes, Framing]:
        headers, framing = downstream_headers(head, request, close=close, ours=ours)
        return serialize_response(head.status, headers, head.reason)[:-2], framing

    return head.noted((request.http_version, request.method == "HEAD", close, ours), write)


_CANONICAL: dict[bytes, bytes] = {}


def canonical(name: bytes) -> bytes:
    """Return a header's name as Ollama (Go) writes it: `content-type` -> `Content-Type`."""
    known = _CANONICAL.get(name)
    if known is None:
        known = b"-".join([part.capitalize() for part in name.split(b"-")])
        if len(_CANONICAL) < 256:
            _CANONICAL[name] = known
    return known
