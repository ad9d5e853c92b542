"""The secrets themselves: read at the start from where the configuration says they are, and held here alone.

They are in no settings, so that nothing that shows or records settings can show them.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lbcore.parsing import ABSENT, Problem
from lbio.access.keys import TOKEN_CHARS_MAX, Bucket, Key, Keyring, Models, digest_of, parse_hash
from lbio.configuration.config_keys import ENV, FILE
from lbio.configuration.settings import AppConfig, KeySettings, Right, UpstreamSettings
from lbio.http1 import HeaderPairs

CLIENT_KEYS = frozenset({b"authorization", b"x-api-key"})
"""The headers in which clients send a key."""

_FILE_BYTES_MAX = 65536
_TOKEN_CHARS_MIN = 16
_SALT_BYTES = 16
_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")


class SecretsError(Exception):
    """Secrets that the configuration speaks of are not where it says; `problems` has all of them."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """Headers that go to one server and to no other."""

    pairs: HeaderPairs = ()
    replaced: frozenset[bytes] = frozenset()  # headers of clients, in lower case, that do not reach this server

    def __repr__(self) -> str:
        return f"<Credentials {b', '.join(name for name, _ in self.pairs).decode()}>"

    def written_into(self, lines: bytes) -> bytes:
        """Return the lines of a head from the end of that of `Host` on, with ours in the place of the client's."""
        if not self.pairs:
            return lines
        theirs = [line for line in lines[2:-2].split(b"\r\n") if line]
        kept = [line for line in theirs if line.partition(b":")[0].lower() not in self.replaced]
        return b"\r\n".join((b"", *kept, *(b"%s: %s" % pair for pair in self.pairs), b"", b""))


NO_CREDENTIALS = Credentials()


@dataclass(frozen=True, slots=True)
class Secrets:
    """All that was read."""

    keyring: Keyring | None = None  # None: whoever reaches us may do everything
    upstream: Mapping[str, Credentials] = field(default_factory=dict)  # by url of the server
    warnings: tuple[str, ...] = ()


def read_secrets(app: AppConfig, environ: Mapping[str, str] = os.environ) -> Secrets:
    """Return the secrets that a configuration speaks of. Raises SecretsError with all that is wrong."""
    reader = _Reader(environ)
    entries = [entry for index, key in enumerate(app.keys) for entry in reader.key(key, f"keys[{index}]")]
    names = {server.url: f"servers[{index}]" for index, server in enumerate(app.core.servers)}
    upstream = {url: reader.credentials(said, names[url]) for url, said in app.upstream.items() if url in names}
    if reader.problems:
        raise SecretsError(reader.problems)
    return Secrets(Keyring(entries) if app.keys else None, upstream, tuple(reader.warnings))


class _Reader:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self._environ = environ
        self._tokens: dict[str, str] = {}  # who has which

    def key(self, said: KeySettings, where: str) -> Iterator[tuple[Key, bytes, bytes]]:
        """Yield a key with salt and digest, if there is one."""
        bucket = None if said.requests_per_minute is None else Bucket(said.requests_per_minute)
        key = Key(said.name, Models(said.models), frozenset(map(Right, said.allow)), bucket)
        if said.hash:
            yield key, *parse_hash(said.hash)
            return
        at = f"{where}.{'env' if said.env else 'file'}"
        token = self._variable(said.env, at) if said.env else self._file(said.file, at)
        if token is None:
            return
        if len(token) > TOKEN_CHARS_MAX or " " in token:
            self.problems.append(Problem(at, ABSENT, "holds no key", "`ollama-lb key new NAME` makes one"))
        elif self._tokens.setdefault(token, where) != where:
            self.problems.append(Problem(at, ABSENT, f"is the key of {self._tokens[token]} too", "make another one"))
        else:
            if len(token) < _TOKEN_CHARS_MIN:
                self.warnings.append(f"{at}: is shorter than {_TOKEN_CHARS_MIN} characters, and so can be guessed")
            salt = secrets.token_bytes(_SALT_BYTES)
            yield key, salt, digest_of(token.encode(), salt)

    def credentials(self, said: UpstreamSettings, where: str) -> Credentials:
        """Return what is sent to one server."""
        pairs = []
        if said.bearer and (token := self._value(said.bearer, f"{where}.bearer")) is not None:
            pairs.append((b"Authorization", b"Bearer " + token.encode()))
        for name, source in said.headers:
            if (value := self._value(source, f"{where}.headers.{name}")) is not None:
                pairs.append((name.encode(), value.encode()))
        return Credentials(tuple(pairs), CLIENT_KEYS | {name.lower() for name, _ in pairs} if pairs else frozenset())

    def _value(self, source: str, where: str) -> str | None:
        if source.startswith(ENV):
            return self._variable(source.removeprefix(ENV), where)
        return self._file(source.removeprefix(FILE), where) if source.startswith(FILE) else self._checked(source, where)

    def _variable(self, name: str, where: str) -> str | None:
        value = self._environ.get(name)
        if value is None:
            self.problems.append(Problem(where, name, "is not set", f"start ollama-lb with {name} in its environment"))
            return None
        return self._checked(value.strip(), where)

    def _file(self, name: str, where: str) -> str | None:
        path = Path(name).expanduser()
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read(_FILE_BYTES_MAX + 1)
        except (OSError, ValueError) as error:
            words = getattr(error, "strerror", None) or str(error)
            self.problems.append(Problem(where, name, f"cannot be read: {words}", "name a file that holds it"))
            return None
        if os.name != "nt" and stat.S_IMODE(mode) & 0o077:
            self.warnings.append(f"{where}: others may read {path}: chmod 600 {path}")
        return self._checked(data.decode(errors="replace").strip(), where)

    def _checked(self, value: str, where: str) -> str | None:
        if len(value) > _FILE_BYTES_MAX or _VALUE.fullmatch(value) is None:
            words = "is not one line of plain text" if value else "is empty"
            self.problems.append(Problem(where, ABSENT, words, "write the secret and nothing else"))
            return None
        return value
