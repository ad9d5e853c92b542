"""Which web pages may use the API, and what browsers are told of it. Pure.

Everything here is as Ollama has it: gin-contrib/cors with its options (captures: options_cors, options_cors_foreign,
get_with_foreign_origin), and behind that its check of `Host` (capture: foreign_host). A page from elsewhere is refused,
and not merely kept from reading: what it asks for would already be done.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from lbio.answers.local import LocalAnswer
from lbio.http1 import HeaderPairs

BUILT_IN = (
    *(
        f"{scheme}://{host}{port}"
        for host in ("localhost", "127.0.0.1", "0.0.0.0")  # noqa: S104  an origin, not an address to listen on
        for scheme in ("http", "https")
        for port in ("", ":*")
    ),
    "app://*",
    "file://*",
    "tauri://*",
    "vscode-webview://*",
    "vscode-file://*",
)
"""Origins that need no configuration."""

_METHODS = b"GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"
_HEADERS = (
    b"Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,X-Stainless-Async,"
    b"X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,"
    b"X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,"
    b"X-Stainless-Runtime-Version,X-Stainless-Timeout"
)
_MAX_AGE_S = 12 * 3600
_ALLOW_ORIGIN = b"Access-Control-Allow-Origin"

_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `Origin` and `Host` decide: `answer` is given instead of any other, `headers` go with whichever is given."""

    answer: LocalAnswer | None = None
    headers: HeaderPairs = ()


NOTHING = Verdict()
"""The request goes on as if there were no browsers."""


class Cors:
    """Judges requests by the web page that makes them.

    `origins` may be used by pages besides `BUILT_IN`; one `*` in each stands for any text, and "*" alone allows all.
    `own_name`: what this machine is called, when we can be reached from it alone. Then a `Host` of elsewhere is a name
    that somebody has pointed here (DNS rebinding), whose pages look to a browser as if they were ours. None: any does.
    """

    def __init__(self, origins: Sequence[str] = (), *, own_name: str | None = None) -> None:
        patterns = [origin.encode() for origin in (*BUILT_IN, *origins)]
        self._exact = frozenset(pattern for pattern in patterns if b"*" not in pattern)
        self._wild = [(before, after) for before, star, after in (p.partition(b"*") for p in patterns) if star]
        self._allows_all = "*" in origins
        self._own_name = own_name
        self.checks_host = own_name is not None

    def allows(self, origin: bytes) -> bool:
        """Tell whether pages of this origin may use the API."""
        return self._allows_all or origin in self._exact or any(
            origin.startswith(before) and origin.endswith(after) and len(origin) >= len(before) + len(after)
            for before, after in self._wild
        )

    def judge(self, method: str, origin: bytes, host: bytes, methods: Sequence[str]) -> Verdict:
        """Judge a request; `origin` and `host` are its headers, b"" for none.

        `methods` are those of its path; () for one that has no route of its own, of which only the servers know them.
        """
        headers: HeaderPairs = ()
        if origin and origin not in (b"http://" + host, b"https://" + host):
            if not self.allows(origin):
                return Verdict(_empty(403, method, methods))
            if method == "OPTIONS":
                return Verdict(self._preflight(origin, methods))
            headers = ((_ALLOW_ORIGIN, b"*"),) if self._allows_all else ((_ALLOW_ORIGIN, origin), (b"Vary", b"Origin"))
        answer = self._judge_host(method, host, methods) if self.checks_host else None
        return Verdict(answer, headers) if headers or answer is not None else NOTHING

    def _judge_host(self, method: str, host: bytes, methods: Sequence[str]) -> LocalAnswer | None:
        name = _name_in(host)
        if name is None:  # no DNS can point an address anywhere
            return None
        if name not in {"", "localhost", self._own_name} and not name.endswith(_LOCAL_SUFFIXES):
            return _empty(403, method, methods)
        return _empty(204, method, methods) if method == "OPTIONS" else None

    def _preflight(self, origin: bytes, methods: Sequence[str]) -> LocalAnswer:
        varies: HeaderPairs = ()
        if not self._allows_all:
            varies = (
                (b"Vary", b"Origin"),
                (b"Vary", b"Access-Control-Request-Method"),
                (b"Vary", b"Access-Control-Request-Headers"),
            )
        return LocalAnswer(204, b"", b"", (
            (b"Access-Control-Allow-Headers", _HEADERS),
            (b"Access-Control-Allow-Methods", _METHODS),
            (_ALLOW_ORIGIN, b"*" if self._allows_all else origin),
            (b"Access-Control-Max-Age", b"%d" % _MAX_AGE_S),
            *_allow("OPTIONS", methods),
            *varies,
        ))


def _empty(status: int, method: str, methods: Sequence[str]) -> LocalAnswer:
    return LocalAnswer(status, b"", b"", _allow(method, methods))


def _allow(method: str, methods: Sequence[str]) -> HeaderPairs:
    """Return the header that every answer to a method has which the path does not allow."""
    return ((b"Allow", ", ".join(methods).encode()),) if methods and method not in methods else ()


# --- Host --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _name_in(authority: bytes) -> str | None:
    """Return the name that a `Host` has, in lower case ("?" for such as "["); None for an IP address."""
    try:
        host = urlsplit("//" + authority.decode("latin-1")).hostname or ""
    except ValueError:
        return "?"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host
    return None
