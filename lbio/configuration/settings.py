"""What an operator may decide about the I/O half, as the same kind of tables as `lbcore.config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lbcore.config import Config
from lbcore.schema import MS_NS, SECOND_NS, Kind, count, duration, section, setting, size

DEFAULT_LISTEN = "0.0.0.0:11434"
"""Ollama's own port, on every interface: a balancer is there to be reached."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


class Forwarded(StrEnum):
    """What servers are told about the client's address."""

    X_FORWARDED_FOR = "x-forwarded-for"
    FORWARDED = "forwarded"
    NONE = "none"


class AdminAccess(StrEnum):
    """Who may use the management endpoints."""

    LOOPBACK = "loopback"
    ANY = "any"


class LogLevel(StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """For whom log lines are written."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """Connections from clients (`[client]`)."""

    head_timeout_ns: int = duration(
        "for a whole request head, from its first byte on; guards against clients that trickle one to "
        "hold a connection",
        30 * SECOND_NS, low=10 * MS_NS)
    body_timeout_ns: int = duration(
        "between two reads of a request body; an upload that stalls longer gets 408",
        60 * SECOND_NS, low=10 * MS_NS)
    idle_timeout_ns: int = duration(
        "a kept-alive connection without a request is closed after this; longer than the 60s of common "
        "proxies, so that they close first",
        75 * SECOND_NS, low=10 * MS_NS)
    write_timeout_ns: int = duration(
        "a client that reads nothing for this long has left: its request is cancelled, which frees the "
        "server",
        60 * SECOND_NS, low=10 * MS_NS)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """Bounds on what one client, and all of them, may take (`[limits]`)."""

    head_bytes_max: int = size(
        "request line and headers; more gets 431",
        64 * KIB, low=1 * KIB, high=16 * MIB)
    body_bytes_max: int = size(
        "one request body, held so that it can be sent again to another server; more gets 413. Images "
        "are the large ones; blobs are passed on as they come, whatever their size",
        64 * MIB, low=1 * KIB)
    bodies_bytes_max: int = size(
        "all request bodies held at once, whole or not; more get 503, so that memory stays bounded",
        1 * GIB, low=1 * KIB)
    buffer_bytes_max: int = size(
        "what is held of each attempt's answer until a winner is known; then that server is not read "
        "from, and waits",
        1 * MIB, low=1 * KIB, high=1 * GIB)
    connections_max: int = count(
        "clients connected at once; more get 503 with Retry-After. Never more than half of the file descriptors "
        "that the system allows (`ulimit -Hn`): each may need a connection to a server too",
        10_000, low=1, high=1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """Connections to servers that are kept for the next request (`[pool]`)."""

    idle_max: int = count("idle connections kept to each server; 0 keeps none", 32, high=10_000)
    idle_timeout_ns: int = duration(
        "an idle connection is closed after this; firewalls forget one that is silent for minutes",
        30 * SECOND_NS, low=10 * MS_NS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """What servers are told about clients (`[proxy]`)."""

    forwarded: Forwarded = setting(
        Kind.CHOICE,
        "the header in which servers get the client's address; forwarded is RFC 7239; none hides it",
        Forwarded.X_FORWARDED_FOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminSettings:
    """The management endpoints: /status, /explain/ID, /add_server, /sync_servers, DELETE /servers/NAME (`[admin]`)."""

    allow: AdminAccess = setting(
        Kind.CHOICE,
        "who may see /status and /explain, and add, sync and remove servers; any lets everyone who reaches this "
        "address do so",
        AdminAccess.LOOPBACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """The log, on standard error (`[log]`)."""

    level: LogLevel = setting(Kind.CHOICE, "the least severe lines that are written", LogLevel.INFO)
    format: LogFormat = setting(
        Kind.CHOICE,
        "text for people, json (one object a line) for log collectors",
        LogFormat.TEXT)
    decisions: bool = setting(
        Kind.FLAG,
        "one line for each decision at level info: who raced, who won and when, whose health changed "
        "and why",
        default=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSettings:
    """The event log, for `ollama-lb replay` (`[record]`)."""

    path: str = setting(
        Kind.TEXT,
        "file to which every event and decision is written, so that an incident can be replayed: sizes, times, ids and "
        "model names, never a prompt or an answer; from where ollama-lb is started. Empty: nothing is recorded",
        "")
    bytes_max: int = size(
        "when the file is larger it becomes path.1, path.1 becomes path.2, and a new one is begun, which can be "
        "replayed by itself; some 0.8 KB a request",
        64 * MIB, low=1 * MIB, high=64 * GIB)
    files: int = count("files kept, the one that is written included", 4, low=1, high=1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedSettings:
    """Requests for embeddings (`[embed]`)."""

    split_above: int = count(
        "requests with more inputs than this are divided over the servers that have the same build of the model loaded "
        "and a slot idle, none getting fewer than half of it. Fewer are not worth a second server: at 10 ms each, one "
        "is done with them in less than a second. 0: never",
        64, high=1_000_000)


class Right(StrEnum):
    """What a key may be allowed to do."""

    USE = "use"
    MANAGE = "manage"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySettings:
    """A key that a client may have (`[[keys]]`), and where the key itself, or a hash of it, is found."""

    name: str = setting(Kind.TEXT, "how logs call who has this key")
    hash: str = setting(
        Kind.TEXT,
        "what `ollama-lb key new NAME` prints; the key cannot be found from it. This, env or file: exactly one",
        "")
    env: str = setting(Kind.TEXT, "name of the environment variable that holds the key", "")
    file: str = setting(
        Kind.TEXT,
        "file that holds the key and nothing else, looked for from the directory of this one; for its owner alone "
        "(chmod 600)",
        "")
    models: tuple[str, ...] = setting(
        Kind.TEXTS,
        "models that it may use and see; * stands for any text, a name without a tag means :latest, as everywhere",
        ("*",))
    allow: tuple[str, ...] = setting(
        Kind.TEXTS,
        '"use": all that changes nothing of what servers have; "manage": pull, push, create, copy, delete, blobs, and '
        "the management endpoints, from anywhere",
        ("use",))
    requests_per_minute: int | None = setting(
        Kind.COUNT,
        "more get 429 with Retry-After; a minute's worth may come at once. Left out: no limit",
        None, low=1, high=1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSettings:
    """What is sent to one server, and to no other, so that it lets us in (in `[[servers]]`)."""

    bearer: str = setting(
        Kind.TEXT,
        'sent to this server alone, as "Authorization: Bearer ...", in place of what the client sent: "env:NAME" of an '
        'environment variable, "file:PATH" (from the directory of this file), or the secret itself. Empty: nothing',
        "")
    headers: tuple[tuple[str, str], ...] = setting(
        Kind.PAIRS,
        'other headers that are sent to this server alone, such as { "X-Api-Key" = "env:GPU1_KEY" }; values as above',
        ())

    def __repr__(self) -> str:
        """Return what may be shown: a value may be the secret itself."""
        names = [name for name, _ in self.headers]
        return f"UpstreamSettings(bearer={'...' if self.bearer else ''!r}, headers={names})"


NO_UPSTREAM = UpstreamSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig:
    """Everything `ollama-lb run` needs to know; validated when it was parsed and not checked again.

    The fields that stand in no table of their own are top-level TOML keys. `keys` and `upstream` hold what the file
    says of secrets, which is mostly where they are. `core` holds `[[servers]]`, `[routes]` and the core's tables;
    `fleet` the `[[fleet]]` tables as written, which only the simulator understands.
    """

    listen: str = setting(
        Kind.TEXT,
        "the address clients use: host:port, [::1]:port, :port or port; port 0 takes a free one. "
        "0.0.0.0 is every IPv4 interface, 127.0.0.1 this machine only",
        DEFAULT_LISTEN)
    origins: tuple[str, ...] = setting(
        Kind.TEXTS,
        "the web pages that may use this API, as OLLAMA_ORIGINS has them: scheme://host[:port], in which one * stands "
        'for any text, or "*" for all pages. Always allowed: http and https on localhost, 127.0.0.1 and 0.0.0.0 with '
        "any port; app, file, tauri, vscode-webview and vscode-file with any host. Others get 403",
        ())
    drain_timeout_ns: int = duration(
        "at SIGTERM, how long answers that are streaming may take to finish before they are cut with an"
        " error line",
        30 * SECOND_NS)
    seed: int | None = setting(
        Kind.COUNT,
        "of the core's random choices; the same seed and the same events give the same decisions. Left "
        "out: drawn at start and logged",
        None, low=0, high=2**63 - 1)
    cli_extras: bool = setting(
        Kind.FLAG,
        "shows the fleet to the ollama command, and to no other client: `ollama ps` with a line for each server and "
        "model, `ollama list` with the number of servers in the place of the end of an ID, and a model `lb` to ask, "
        "`ollama run lb status`. Programs that use Ollama's package for Go look like the command",
        default=True)
    client: ClientSettings = section("connections from clients", ClientSettings)
    limits: LimitSettings = section("bounds on what one client, and all of them, may take", LimitSettings)
    pool: PoolSettings = section("connections to servers that are kept for the next request", PoolSettings)
    proxy: ProxySettings = section("what servers are told about clients", ProxySettings)
    admin: AdminSettings = section("the management endpoints", AdminSettings)
    embed: EmbedSettings = section("requests for embeddings", EmbedSettings)
    log: LogSettings = section("the log, on standard error", LogSettings)
    record: RecordSettings = section("the event log, for `ollama-lb replay`", RecordSettings)
    keys: tuple[KeySettings, ...] = ()
    upstream: Mapping[str, UpstreamSettings] = field(default_factory=dict)  # by url of the server; not for the core
    core: Config = field(default_factory=Config)
    fleet: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
