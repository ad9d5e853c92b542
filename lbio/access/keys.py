"""Who may do what: keys, the models and the rights that each has, and how often it may be used.

Pure; time is passed in.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from lbcore.ollama import PASS_THROUGH, canonical_model, find_route
from lbcore.parsing import RefusedError
from lbcore.schema import SECOND_NS
from lbio.configuration.settings import Right

TOKEN_PREFIX: Final = "olb_"
"""What every key begins with that is made here, so that a scanner for leaked secrets knows it."""
TOKEN_CHARS_MAX: Final = 512
ALL_MODELS: Final = "*"

_TOKEN_BYTES = 32
_SALT_BYTES = 16
_MINUTE_NS = 60 * SECOND_NS


# --- keys and their hashes ---------------------------------------------------------------------------------
#
# A salted SHA-256, not scrypt: what slows scrypt down protects words that people choose, of which a thief can try all.
# A key is 256 random bits, of which nobody can try a noticeable part. And every request has to be verified, those with
# a wrong key too: with scrypt each of these would cost 50 ms and 16 MiB, which is a way to stop the balancer.


def new_token() -> str:
    """Return a new key: 256 bits of randomness."""
    return TOKEN_PREFIX + base64.b32encode(secrets.token_bytes(_TOKEN_BYTES)).decode().rstrip("=").lower()


def new_hash(token: str) -> str:
    """Return what the configuration holds of a key: `sha256:SALT:DIGEST`."""
    salt = secrets.token_bytes(_SALT_BYTES)
    return f"sha256:{salt.hex()}:{digest_of(token.encode(), salt).hex()}"


def parse_hash(text: str) -> tuple[bytes, bytes]:
    """Return salt and digest of a hash as `new_hash` writes it. Raises RefusedError, which does not repeat the text."""
    kind, _, rest = text.partition(":")
    salt, _, digest = rest.partition(":")
    try:
        parsed = binascii.unhexlify(salt), binascii.unhexlify(digest)
    except ValueError:
        parsed = b"", b""
    if kind != "sha256" or len(parsed[0]) < _SALT_BYTES or len(parsed[1]) != hashlib.sha256().digest_size:
        raise RefusedError("is no hash of a key", "write what `ollama-lb key new NAME` prints, sha256:SALT:DIGEST")
    return parsed


def digest_of(token: bytes, salt: bytes) -> bytes:
    """Return the salted digest of a key."""
    return hashlib.sha256(salt + token).digest()


# --- what a key may do -------------------------------------------------------------------------------------


class Models:
    """The models that a key may use: names, and globs in which `*` stands for any text.

    A name without a tag means `:latest`, as everywhere; a glob may match with or without `:latest`.
    """

    __slots__ = ("_globs", "_names", "is_all")

    def __init__(self, patterns: Iterable[str]) -> None:
        written = [pattern.strip() for pattern in patterns]
        self.is_all = ALL_MODELS in written
        self._names = frozenset(canonical_model(name) for name in written if not _is_glob(name))
        globs = [fnmatch.translate(_short(canonical_model(glob), glob)) for glob in written if _is_glob(glob)]
        self._globs = [re.compile(glob) for glob in globs]

    def may(self, model: str) -> bool:
        """Tell whether a model, however its name is spelt, may be used."""
        if self.is_all:
            return True
        if "://" in model:  # an Ollama takes any scheme off, and would look for what stands behind the host
            return False
        name = canonical_model(model)
        if name in self._names:
            return True
        short = name.removesuffix(":latest")
        return any(glob.match(name) or glob.match(short) for glob in self._globs)


def _is_glob(pattern: str) -> bool:
    return any(char in pattern for char in "*?[")


def _short(canonical: str, written: str) -> str:
    """Return the canonical spelling without the tag that was not written."""
    return canonical if ":" in written.rsplit("/", 1)[-1] else canonical.removesuffix(":latest")


class Bucket:
    """Lets so many requests a minute through: as many at once, if none came for a minute (a token bucket)."""

    __slots__ = ("_cost_ns", "_full_ns", "per_minute")

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._cost_ns = _MINUTE_NS // per_minute
        self._full_ns = 0  # when it is full again: one number says how much is in it now

    def take(self, now_ns: int) -> int:
        """Take one request out; return 0, or how long it takes until there is one, ns."""
        full_ns = max(self._full_ns, now_ns) + self._cost_ns
        wait_ns = full_ns - now_ns - _MINUTE_NS
        if wait_ns > 0:
            return wait_ns
        self._full_ns = full_ns
        return 0


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key, but for the key itself."""

    name: str
    models: Models
    rights: frozenset[Right]
    bucket: Bucket | None = None


class Keyring:
    """All keys, found by what clients send.

    Every known key is looked at for every unknown one, in constant time, so that the time tells nothing of any. Whoever
    was found is remembered by a digest under a secret of this process; nobody else is, so this cannot grow beyond the
    number of keys.
    """

    def __init__(self, entries: Iterable[tuple[Key, bytes, bytes]]) -> None:
        self._entries: Sequence[tuple[Key, bytes, bytes]] = tuple(entries)  # with salt and digest
        self._secret = secrets.token_bytes(_TOKEN_BYTES)
        self._found: dict[bytes, Key] = {}

    def __repr__(self) -> str:
        return f"<Keyring {', '.join(key.name for key, _, _ in self._entries)}>"

    def find(self, token: bytes) -> Key | None:
        """Return the key that a client has sent, None when there is no such key."""
        if not 0 < len(token) <= TOKEN_CHARS_MAX:
            return None
        seen = hmac.digest(self._secret, token, "sha256")
        if seen in self._found:
            return self._found[seen]
        found: Key | None = None
        for key, salt, digest in self._entries:
            if hmac.compare_digest(digest_of(token, salt), digest) and found is None:
                found = key
        if found is not None:
            self._found[seen] = found
        return found


# --- what a request needs ----------------------------------------------------------------------------------

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_BLOBS = "/api/blobs/"
_HARMLESS = frozenset({"/api/me", "/api/experimental/web_search", "/api/experimental/web_fetch"})
"""What is passed through, is asked for with POST, and changes nothing."""


_BENDS = frozenset({"", ".", ".."})


def is_straight(plain: str) -> bool:
    """Tell whether a path leads where it says. A proxy before a server may follow `/v1/../api/pull` to `/api/pull`."""
    *parents, last = [part.partition(";")[0] for part in plain[1:].split("/")]
    return "\\" not in plain and _BENDS.isdisjoint(parents) and last not in {".", ".."}


def needed_right(method: str, path: str) -> Right | None:
    """Return the right that a request for a path of the API needs; None: it needs no key.

    An Ollama takes the percent signs out of a path before it looks at it, so what counts is what is left then. What may
    change something, as far as is known here, needs `manage`.
    """
    if path == "/" and method in {"GET", "HEAD"}:
        return None
    plain = unquote(path)
    route = find_route(plain)
    if route.changes or plain.startswith(_BLOBS) or not is_straight(plain):
        return Right.MANAGE
    if method in _READING or method in route.methods:
        return Right.USE
    if route is PASS_THROUGH and method == "POST" and (plain.startswith("/v1/") or plain in _HARMLESS):
        return Right.USE
    return Right.MANAGE
