"""Heads of HTTP/1.1 messages for both roles, parsed and checked by h11 under rules stricter than its own.

Two parsers that disagree about where a message ends are how requests are smuggled. So what a head may look
like is narrowed here on the raw bytes before h11 sees it, framing is decided once, in `_framing_headers`, and
whatever is ambiguous is refused instead of repaired. The same rules hold for answers; there the fault is the
server's, so the status is 502.

Parsing is pure, which makes it safe to remember: real traffic repeats its heads byte for byte, and a look-up
is some fifty times cheaper than h11. A memo is bounded and never holds a head that was refused. What else depends on
nothing but a head (the head that servers get, say) is kept with it, in its `notes`.
"""

import enum
import functools
import http
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import h11

Headers = list[tuple[bytes, bytes]]  # names lower-cased; order and duplicates kept
HeaderPairs = tuple[tuple[bytes, bytes], ...]

HEADER_LINES_MAX: Final = 256
MEMO_ENTRIES_MAX: Final = 1024
MEMO_HEAD_BYTES_MAX: Final = 4096  # longer heads are not remembered: 1024 of them stay below 4 MiB
NOTES_MAX: Final = 8  # kept with one head

_T = TypeVar("_T")

_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # h11 lets most through, Go (Ollama) does not
_FOLDED = re.compile(rb"\r\n[ \t]")
_SPACE_BEFORE_COLON = re.compile(rb"\r\n[^:\r\n]*[ \t]:")
_FRAMING = re.compile(rb"\r\n(host|content-length|transfer-encoding):[ \t]*([^\r\n]*)", re.IGNORECASE)
_REQUEST_LINE = re.compile(rb"([^ \r\n]+) ([^ \r\n]+) HTTP/([0-9])\.([0-9])\r\n")
_STATUS_LINE = re.compile(rb"HTTP/([0-9])\.([0-9]) [1-9][0-9]{2}[ \r]")
_HOST = re.compile(rb"[-A-Za-z0-9._~!$&'()*+,;=%:\[\]]*")
_ABSOLUTE = re.compile(r"https?://[^/?]+", re.IGNORECASE)
_UNSUPPORTED = frozenset({"CONNECT", "TRACE"})  # a server would send back, to the client, what it alone was sent
_DIGITS = re.compile(rb"[0-9]{1,18}")  # ASCII only, below 2**63
_REASON = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_NAME = re.compile(rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")


class HttpError(Exception):
    """The peer sent what we refuse; `status` is the answer to give, `message` names what is wrong."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class Framing(enum.Enum):
    """How the end of a body is found."""

    NONE = "none"  # no body at all
    LENGTH = "length"  # `content_length` bytes
    CHUNKED = "chunked"
    CLOSE = "close"  # until the connection ends; answers only


class _Noted:
    """A head, with what depends on it and nothing else that changes while the program runs."""

    __slots__ = ()
    notes: dict[Any, Any]

    def noted(self, key: object, find: Callable[[], _T]) -> _T:
        """Return what is kept under `key`, found when it is wanted for the first time; the oldest makes room."""
        found: _T | None = self.notes.get(key)
        if found is None:
            if len(self.notes) >= NOTES_MAX:
                del self.notes[next(iter(self.notes))]
            found = self.notes[key] = find()
        return found


@dataclass(frozen=True, slots=True)
class RequestHead(_Noted):
    """A request's line and headers. `content_length` is in bytes and 0 unless `framing` is LENGTH.

    `path` is the target up to '?'; `http://host/path` is reduced to its path.
    """

    method: str
    target: str
    headers: HeaderPairs
    http_version: str  # "1.0" or "1.1"
    framing: Framing
    content_length: int
    keep_alive: bool
    expect_continue: bool  # the client waits for a `100 Continue` before a body that is not empty
    path: str = field(init=False, compare=False)
    notes: dict[Any, Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", _origin_form(self.target).partition("?")[0])
        object.__setattr__(self, "notes", {})

    @property
    def origin_form(self) -> str:
        """The target without `http://host`: servers are asked under names of their own (RFC 9112 §3.2.2)."""
        return _origin_form(self.target)

    @property
    def query(self) -> str:
        """What follows the first '?', or ''."""
        return self.target.partition("?")[2]

    def header(self, name: bytes) -> bytes | None:
        """Return the first value of `name` (lower case), or None."""
        return _first(self.headers, name)


@dataclass(frozen=True, slots=True)
class ResponseHead(_Noted):
    """An answer's status line and headers. `content_length` is in bytes and 0 unless `framing` is LENGTH."""

    status: int
    reason: bytes
    headers: HeaderPairs
    http_version: str  # "1.0" or "1.1"
    framing: Framing
    content_length: int
    keep_alive: bool  # False whenever only a close ends the body
    notes: dict[Any, Any] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", {})

    def header(self, name: bytes) -> bytes | None:
        """Return the first value of `name` (lower case), or None."""
        return _first(self.headers, name)


Head = RequestHead | ResponseHead


_REQUESTS: dict[bytes, RequestHead] = {}
_RESPONSES: dict[bytes, ResponseHead] = {}
_RESPONSES_TO_HEAD: dict[bytes, ResponseHead] = {}


def known_request(raw: bytes) -> RequestHead | None:
    """Return a request head that was parsed before, byte for byte."""
    return _REQUESTS.get(raw)


def known_response(raw: bytes) -> ResponseHead | None:
    """Return the head of an answer to anything but HEAD that was parsed before, byte for byte."""
    return _RESPONSES.get(raw)


def parse_request_head(raw: bytes, *, memo: bool = True) -> RequestHead:
    """Parse a request head that ends with its blank line; `memo=False` neither reads nor fills the memo.

    Raises HttpError: 400, 417, 431, 501 or 505.
    """
    return _remembered(_REQUESTS, raw, _parse_request) if memo else _parse_request(raw)


def parse_response_head(raw: bytes, method: str, *, memo: bool = True) -> ResponseHead:
    """Parse the head of an answer to a request of that method. Raises HttpError(502)."""
    known, parse = (_RESPONSES_TO_HEAD, _parse_answer_to_head) if method == "HEAD" else (_RESPONSES, _parse_response)
    return _remembered(known, raw, parse) if memo else parse(raw)


def _remembered(known: dict[bytes, _T], raw: bytes, parse: Callable[[bytes], _T]) -> _T:
    """Return what is known, or else is found now; a head that is refused raises, and so is never remembered."""
    head = known.get(raw)
    if head is None:
        head = parse(raw)
        if len(raw) <= MEMO_HEAD_BYTES_MAX:
            if len(known) >= MEMO_ENTRIES_MAX:
                del known[next(iter(known))]  # the oldest
            known[raw] = head
    return head


def _parse_request(raw: bytes) -> RequestHead:
    _check_raw(raw, 400)
    line = _REQUEST_LINE.match(raw)
    if line is None:
        raise HttpError(400, f"malformed request line: {shown(_first_line(raw))}")
    http_version = _version(line[3], line[4], 505)
    method, target = line[1].decode("latin-1"), line[2].decode("latin-1")
    _check_target(method, target)
    hosts, lengths, codings = _framing_headers(raw)
    framing, content_length = _framing(lengths, codings, http_version, 400)
    if len(hosts) > 1 or (not hosts and http_version != "1.0"):
        raise HttpError(400, "more than one Host header" if hosts else "no Host header")
    if hosts and _HOST.fullmatch(hosts[0]) is None:
        raise HttpError(400, f"invalid Host: {shown(hosts[0])}")
    event = _next_event(h11.Connection(h11.SERVER), raw, 400)
    if not isinstance(event, h11.Request):
        raise HttpError(400, "incomplete request head")
    headers = tuple(event.headers)
    expectations = _tokens(headers, b"expect") if http_version != "1.0" else set()
    if expectations - {b"100-continue"}:
        raise HttpError(417, "the only expectation understood is 100-continue")
    if framing is Framing.CLOSE:  # without any framing header, a request has no body
        framing = Framing.NONE
    return RequestHead(
        method=method,
        target=target,
        headers=headers,
        http_version=http_version,
        framing=framing,
        content_length=content_length,
        keep_alive=_keep_alive(headers, http_version),
        expect_continue=bool(expectations) and (framing is Framing.CHUNKED or content_length > 0),
    )


def _parse_answer_to_head(raw: bytes) -> ResponseHead:
    return _parse_response(raw, to_head=True)


def _parse_response(raw: bytes, *, to_head: bool = False) -> ResponseHead:
    _check_raw(raw, 502)
    line = _STATUS_LINE.match(raw)
    if line is None:
        raise HttpError(502, f"malformed status line: {shown(_first_line(raw))}")
    http_version = _version(line[1], line[2], 502)
    _hosts, lengths, codings = _framing_headers(raw)
    framing, content_length = _framing(lengths, codings, http_version, 502)
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="HEAD" if to_head else "GET", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    event = _next_event(connection, raw, 502)
    if not isinstance(event, h11.Response | h11.InformationalResponse):
        raise HttpError(502, "incomplete answer head")
    headers = tuple(event.headers)
    if to_head or event.status_code < 200 or event.status_code in (204, 304):
        framing, content_length = Framing.NONE, 0
    return ResponseHead(
        status=event.status_code,
        reason=bytes(event.reason),
        headers=headers,
        http_version=http_version,
        framing=framing,
        content_length=content_length,
        keep_alive=framing is not Framing.CLOSE and _keep_alive(headers, http_version),
    )


def _check_raw(raw: bytes, status: int) -> None:
    if raw.find(b"\r\n\r\n") != len(raw) - 4:
        raise HttpError(status, "the head does not end with its first blank line")
    lines = raw.count(b"\r\n")
    if lines != raw.count(b"\r") or lines != raw.count(b"\n"):
        raise HttpError(status, "bare CR or LF in the head")
    if lines - 2 > HEADER_LINES_MAX:
        raise HttpError(431 if status == 400 else status, f"more than {HEADER_LINES_MAX} header lines")
    if (found := _CONTROL.search(raw)) is not None:
        raise HttpError(status, f"control character {found[0]!r} in the head")
    if _FOLDED.search(raw) is not None:
        raise HttpError(status, "header line that starts with a blank (obsolete folding)")
    if _SPACE_BEFORE_COLON.search(raw) is not None:
        raise HttpError(status, "blank between a header's name and its colon")


def _version(major: bytes, minor: bytes, status: int) -> str:
    if major != b"1":
        raise HttpError(status, f"HTTP/{major.decode()}.{minor.decode()} is not spoken here; use HTTP/1.1")
    return "1.0" if minor == b"0" else "1.1"


def _check_target(method: str, target: str) -> None:
    if method in _UNSUPPORTED:
        raise HttpError(501, f"{method} is not supported")
    if target == "*" and method == "OPTIONS":
        return
    if not _origin_form(target).startswith("/") or "#" in target:
        raise HttpError(400, f"the request target must be a path or an absolute URL, not {target[:100]!r}")
    if not target.isascii():
        raise HttpError(400, f"the request target must be ASCII, the rest percent-encoded, not {target[:100]!r}")


def _origin_form(target: str) -> str:
    """Cut `http://host` off an absolute-form target."""
    if target[:1] == "/" or (absolute := _ABSOLUTE.match(target)) is None:
        return target
    rest = target[absolute.end() :]
    return rest if rest[:1] == "/" else "/" + rest


def _framing_headers(raw: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Return the raw values of Host, Content-Length and Transfer-Encoding; h11 would merge repeated ones."""
    found: dict[bytes, list[bytes]] = {b"host": [], b"content-length": [], b"transfer-encoding": []}
    for name, value in _FRAMING.findall(raw):
        found[name.lower()].append(value.rstrip(b" \t"))
    return found[b"host"], found[b"content-length"], found[b"transfer-encoding"]


def _framing(lengths: list[bytes], codings: list[bytes], version: str, status: int) -> tuple[Framing, int]:
    if lengths and codings:
        raise HttpError(status, "both Content-Length and Transfer-Encoding")
    if len(lengths) > 1:
        raise HttpError(status, "more than one Content-Length")
    if lengths:
        if _DIGITS.fullmatch(lengths[0]) is None:
            raise HttpError(status, f"invalid Content-Length: {shown(lengths[0])}")
        return Framing.LENGTH, int(lengths[0])
    if not codings:
        return Framing.CLOSE, 0
    if version == "1.0":
        raise HttpError(status, "Transfer-Encoding in HTTP/1.0")
    names = [name.strip(b" \t").lower() for name in b",".join(codings).split(b",")]
    if names != [b"chunked"]:
        # RFC 9112 §6.3: unless `chunked` comes last, nobody can tell where the body ends.
        unknown = names[-1] == b"chunked" and names.count(b"chunked") == 1
        status = 501 if unknown and status == 400 else status
        raise HttpError(status, f"Transfer-Encoding {shown(b', '.join(codings))} is not supported")
    return Framing.CHUNKED, 0


def _next_event(connection: h11.Connection, raw: bytes, status: int) -> object:
    connection.receive_data(raw)
    try:
        return connection.next_event()
    except h11.RemoteProtocolError as error:
        raise HttpError(status, str(error)[:200]) from error


def _first(headers: HeaderPairs, name: bytes) -> bytes | None:
    for found, value in headers:
        if found == name:
            return value
    return None


def _tokens(headers: HeaderPairs, name: bytes) -> set[bytes]:
    """Return the members of a comma-separated header, lower-cased."""
    joined = b",".join(value for found, value in headers if found == name)
    return {token for part in joined.lower().split(b",") if (token := part.strip(b" \t"))}


def _keep_alive(headers: HeaderPairs, version: str) -> bool:
    tokens = _tokens(headers, b"connection")
    return b"close" not in tokens and (version != "1.0" or b"keep-alive" in tokens)


def _first_line(raw: bytes) -> bytes:
    return raw.partition(b"\r\n")[0]


def shown(text: bytes) -> str:
    """Return the beginning of what a peer sent, safe to print."""
    return repr(text[:100])[1:]


def serialize_request(method: str, target: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Write a request head, `Host` first. Raises ValueError for what h11 refuses: nothing can be injected."""
    return _serialized_request(method, target, tuple(headers))


@functools.lru_cache(maxsize=MEMO_ENTRIES_MAX // 4)
def _serialized_request(method: str, target: str, headers: HeaderPairs) -> bytes:
    try:
        event = h11.Request(method=method, target=target, headers=list(headers))
    except h11.LocalProtocolError as error:
        raise ValueError(str(error)) from error
    pairs = sorted(event.headers.raw_items(), key=lambda pair: pair[0].lower() != b"host")
    return b"%s %s HTTP/1.1\r\n%s\r\n" % (event.method, event.target, _header_lines(pairs))


def serialize_response(status: int, headers: Iterable[tuple[bytes, bytes]], reason: bytes = b"") -> bytes:
    """Write an answer's head exactly as asked; without a reason, the status' usual phrase.

    No header is added: framing is the caller's. Raises ValueError for what h11 refuses; it is not asked about headers
    that are as they should be, since that takes longer than all else that is done for an answer.
    """
    pairs = list(headers)
    phrase = reason or _usual_reason(status)
    if status >= 200 and _REASON.fullmatch(phrase) is not None and _are_plain(pairs):
        return b"HTTP/1.1 %d %s\r\n%s\r\n" % (status, phrase, _header_lines(pairs))
    kind = h11.InformationalResponse if status < 200 else h11.Response
    try:
        # Only h11's checks are wanted: its Connection.send() would also choose a framing of its own.
        event = kind(status_code=status, headers=pairs, reason=phrase)
    except h11.LocalProtocolError as error:
        raise ValueError(str(error)) from error
    if _REASON.fullmatch(event.reason) is None:  # h11 does not look at it
        raise ValueError(f"illegal reason phrase {event.reason!r}")
    return b"HTTP/1.1 %d %s\r\n%s\r\n" % (status, event.reason, _header_lines(event.headers.raw_items()))


def _are_plain(pairs: list[tuple[bytes, bytes]]) -> bool:
    """Tell whether there is nothing that h11 could refuse."""
    n_framing = 0
    for name, value in pairs:
        if _NAME.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
            return False
        lowered = name.lower()
        if lowered == b"content-length":
            n_framing += 1 if _DIGITS.fullmatch(value) is not None else 2
        elif lowered == b"transfer-encoding":
            n_framing += 1 if value == b"chunked" else 2
    return n_framing <= 1


def _header_lines(pairs: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%s: %s\r\n" % pair for pair in pairs])


@functools.cache
def _usual_reason(status: int) -> bytes:
    try:
        return http.HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""
