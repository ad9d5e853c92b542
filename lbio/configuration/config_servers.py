"""The servers of a configuration: `[[servers]]` tables, `-s URL=NAME` flags, the lines of a server file."""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lbcore.config import ServerSettings
from lbcore.parsing import ABSENT, Keys, Problem, RefusedError, parse_table, quote
from lbcore.schema import keys_of
from lbio.configuration.addresses import Address, ServerUrl, is_same_place, parse_name, parse_server_url
from lbio.configuration.config_keys import UPSTREAM_KEYS
from lbio.configuration.settings import UpstreamSettings
from lbio.wire.tls import check_ca_file

_T = TypeVar("_T")

SERVER_KEYS: Keys = (
    ("", "servers"), *(("servers", name) for cls in (ServerSettings, UpstreamSettings) for _, name in keys_of(cls)))
TABLES_FIX = 'write [[servers]] on a line of its own and below it url = "http://gpu1:11434"'

Keyed = tuple[str, ServerSettings]
"""A server and where it was named: `servers[2]`, `--servers[1]`, `servers.txt:7`.

While problems are collected, a url or a name that cannot be used is "", so that the rest can still be judged.
"""

_UNKNOWN_URL = "http://unknown"


def _attempt(parse: Callable[[str], _T], text: str, key: str, problems: list[Problem]) -> _T | None:
    """Return what `parse` makes of `text`; None and a problem if it refuses."""
    try:
        return parse(text)
    except RefusedError as error:
        problems.append(Problem(key, text, error.message, error.fix))
        return None


# --- from TOML ---------------------------------------------------------------------------------------------


def parse_servers(raw: Any, problems: list[Problem], also: Keys, base: Path | None) -> list[Keyed]:
    """Return the servers of `[[servers]]`; their certificate files are looked for relative to `base`."""
    if not isinstance(raw, list):
        problems.append(Problem("servers", raw, "is not a list of tables", TABLES_FIX))
        return []
    read = [(f"servers[{index}]", item) for index, item in enumerate(raw)]
    parsed = [(key, _parse_server(item, key, problems, also, base)) for key, item in read]
    servers = [(key, server) for key, server in parsed if server is not None]
    _refuse_duplicates(servers, problems)
    return servers


def _parse_server(raw: Any, key: str, problems: list[Problem], also: Keys,
                  base: Path | None) -> ServerSettings | None:
    if not isinstance(raw, Mapping):
        problems.append(Problem(key, raw, "is not a table", TABLES_FIX))
        return None
    raw = {name: value for name, value in raw.items() if name not in UPSTREAM_KEYS}  # which the core must not know
    server = parse_table(ServerSettings, raw, key, problems, also=also)
    if server is not None:
        url = _attempt(parse_server_url, server.url, f"{key}.url", problems)
    else:  # without a usable url; what else is wrong was told of just now
        server, url = parse_table(ServerSettings, {**raw, "url": _UNKNOWN_URL}, key, [], also=also), None
    if server is None:
        raise TypeError(ServerSettings)
    name = _attempt(parse_name, server.name, f"{key}.name", problems) if server.name else _default_name(url)
    ca_file = _find_ca_file(server.ca_file, f"{key}.ca_file", problems, base) if server.ca_file else ""
    return dataclasses.replace(server, url=str(url or ""), name=name or "", ca_file=ca_file)


def _default_name(url: ServerUrl | None) -> str:
    return "" if url is None else str(url.address)


def _find_ca_file(text: str, key: str, problems: list[Problem], base: Path | None) -> str:
    """Return the path of a certificate file, relative ones taken from the directory of the configuration."""
    if base is None:
        return text
    try:
        path = base / Path(text).expanduser()
        if not path.is_file():
            problems.append(Problem(key, text, "is no file", f"there is nothing readable at {path}"))
        else:
            check_ca_file(str(path))
    except ssl.SSLError:  # of which it says little that helps
        problems.append(Problem(key, text, "has no certificate in it", f"{path} is to be in PEM, as text that begins "
                                "with -----BEGIN CERTIFICATE-----"))
    except (OSError, RuntimeError) as error:  # it may not be read; its name is too long; "~" of nobody
        reason = getattr(error, "strerror", None) or str(error)
        problems.append(Problem(key, text, f"cannot be read: {reason}", "name a file of certificates in PEM"))
        return text
    return str(path)


def _refuse_duplicates(servers: Iterable[Keyed], problems: list[Problem]) -> None:
    urls: dict[str, str] = {}
    names: dict[str, str] = {}
    for key, server in servers:
        again = bool(server.url) and urls.setdefault(server.url, key) != key
        if again:
            problems.append(Problem(f"{key}.url", server.url, f"is also the url of {urls[server.url]}",
                                    "name each server once"))
        named = server.name and not (again and server.name == str(parse_server_url(server.url).address))
        if named and names.setdefault(server.name, key) != key:
            problems.append(Problem(f"{key}.name", server.name, f"is also the name of {names[server.name]}",
                                    "give each server a name of its own"))


# --- from the command line ---------------------------------------------------------------------------------


def parse_server_flags(specs: Sequence[str], server_file: Path | None, problems: list[Problem],
                       warnings: list[str]) -> list[Keyed]:
    """Return the servers of `--servers` and of the lines of `--server-file`, in that order."""
    lines = [(f"--servers[{index}]", text) for index, text in enumerate(specs)]
    if server_file is not None:
        lines.extend(_read_server_file(server_file, problems))
    parsed = [(key, _parse_spec(text, key, problems)) for key, text in lines]
    servers = [(key, server) for key, server in parsed if server is not None]
    return list(_without_duplicates(servers, warnings))


def _parse_spec(text: str, key: str, problems: list[Problem]) -> ServerSettings | None:
    """Return the server of "URL=NAME" or "URL"; the URL may leave `http://` out."""
    url_text, equals, name_text = (part.strip() for part in text.partition("="))
    if "://" in name_text and "://" not in url_text:
        problems.append(Problem(key, text, "has the name first", f"write {quote(f'{name_text}={url_text}')}"))
        return None
    if equals and not name_text:
        problems.append(Problem(key, text, 'has no name after "="', f"write {quote(url_text)} or add a name"))
        return None
    url = _attempt(lambda _: parse_server_url(url_text, scheme_optional=True), text, key, problems)
    name = _attempt(lambda _: parse_name(name_text), text, key, problems) if equals else _default_name(url)
    return ServerSettings(url=str(url or ""), name=name or "")


def _read_server_file(path: Path, problems: list[Problem]) -> list[tuple[str, str]]:
    """Return (file:line, text) of each line that names a server."""
    text = read_text(path, "--server-file", problems)
    if text is None:
        return []
    numbered = enumerate(text.split("\n"), 1)
    lines = [(f"{path}:{number}", spec) for number, line in numbered if (spec := _without_comment(line))]
    if not lines:
        problems.append(Problem("--server-file", str(path), "names no server", "write one URL=NAME a line"))
    return lines


def _without_comment(line: str) -> str:
    line = line.strip()
    return "" if line.startswith("#") else line.partition(" #")[0].partition("\t#")[0].strip()


def read_text(path: Path, key: str, problems: list[Problem]) -> str | None:
    """Return the text of a file without byte-order mark and with plain line ends; None if it cannot be read."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        value = ABSENT if key == str(path) else str(path)
        problems.append(Problem(key, value, f"cannot be read: {reason}", "name a file that exists"))
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.append(Problem(f"{path}:{line}", ABSENT, "is not UTF-8 text", "save the file as UTF-8"))
        return None


def _without_duplicates(servers: Iterable[Keyed], warnings: list[str]) -> Iterator[Keyed]:
    """Yield each server once, under a name of its own; `warnings` tells what was changed."""
    urls: dict[str, str] = {}
    names: set[str] = set()
    for key, server in servers:
        if server.url in urls:
            warnings.append(f"{key}: {server.url} is also named by {urls[server.url]}; used once")
            continue
        name = _free_name(server.name, names)
        if name != server.name:
            warnings.append(f"{key}: the name {quote(server.name)} is taken; "
                            f"{server.url} is called {quote(name)}")
        urls[server.url] = key
        names.add(name)
        yield key, dataclasses.replace(server, name=name)


def _free_name(name: str, taken: set[str]) -> str:
    number, free = 2, name
    while free in taken:
        number, free = number + 1, f"{name}-{number}"
    return free


# --- together ----------------------------------------------------------------------------------------------


def refuse_loops(servers: Iterable[Keyed], listen: Address, problems: list[Problem]) -> None:
    """Refuse a server that is ollama-lb itself: every request would go round for ever."""
    for key, server in servers:
        if server.url and is_same_place(listen, parse_server_url(server.url).address):
            where = f"{key}.url" if key.startswith("servers[") else key
            problems.append(Problem(where, server.url, f"is where ollama-lb itself listens ({listen})",
                                    "let one of the two use another port"))


def server_warnings(servers: Iterable[Keyed]) -> Iterator[str]:
    """Yield what is allowed, but probably not meant."""
    for key, server in servers:
        if not server.verify and server.url.startswith("https:"):
            yield f"{key}: verify = false: whoever answers at {server.url} is trusted"
        if server.ca_file and not (server.verify and server.url.startswith("https:")):
            yield f"{key}: ca_file is not used: {server.url} is not verified"
        if server.in_flight_max < server.slots:
            yield (f"{key}: in_flight_max = {server.in_flight_max} leaves some of its {server.slots} slots "
                   "always empty")
