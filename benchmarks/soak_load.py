"""The mixed load of benchmarks/soak.py: what clients ask for, how they behave, and what became of each request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

KEPT_S = 30.0  # a client lets go of a connection that was idle for longer, well before the balancer does
SLOW_BUFFER_BYTES = 4096
_PATIENCE_S = 90.0
_PROMPT = "Tell me something of the sea. " * 8


@dataclass(frozen=True)
class Kind:
    """One sort of request, and how it is told that its answer is whole."""

    name: str
    weight: float
    method: str
    path: str
    body: dict[str, Any] | None = None
    status: int = 200
    ends: bytes = b""  # stands in the last line of a stream that is whole
    error: bytes = b""  # how the line begins that a stream ends with which is not
    leaves_after: int | None = None  # pieces of the answer; 0: before any
    pause_s: float = 0.0  # between two reads: a client that reads little

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream, which is committed with its first piece."""
        return bool(self.ends)


def _chat(tokens: int, *, stream: bool = True) -> dict[str, Any]:
    messages = [{"role": "user", "content": _PROMPT}]
    return {"model": "llama3.2", "messages": messages, "stream": stream, "options": {"num_predict": tokens}}


def _embed(n_inputs: int) -> dict[str, Any]:
    return {"model": "embedder", "input": [f"text {index}" for index in range(n_inputs)]}


_V1_CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": _PROMPT}], "max_tokens": 30}
_NATIVE: dict[str, Any] = {"ends": b'"done":true', "error": b'{"error"'}
_V1: dict[str, Any] = {"ends": b"data: [DONE]", "error": b'data: {"error"'}
_GENERATE = {"model": "llama3.2", "prompt": _PROMPT, "options": {"num_predict": 30}}

KINDS: tuple[Kind, ...] = (
    Kind("chat", 30, "POST", "/api/chat", _chat(40), **_NATIVE),
    Kind("long chat", 2, "POST", "/api/chat", _chat(800), **_NATIVE),
    Kind("chat, whole", 8, "POST", "/api/chat", _chat(20, stream=False)),
    Kind("generate", 10, "POST", "/api/generate", _GENERATE, **_NATIVE),
    Kind("v1 chat", 10, "POST", "/v1/chat/completions", {**_V1_CHAT, "stream": True}, **_V1),
    Kind("v1 chat, whole", 4, "POST", "/v1/chat/completions", _V1_CHAT),
    Kind("embed", 4, "POST", "/api/embed", _embed(2)),
    Kind("embed many", 2, "POST", "/api/embed", _embed(160)),
    Kind("tags", 8, "GET", "/api/tags"),
    Kind("show", 6, "POST", "/api/show", {"model": "llama3.2"}),
    Kind("pass-through", 5, "GET", "/api/not-known-here", status=404),
    Kind("leaves early", 4, "POST", "/api/chat", _chat(40), leaves_after=0, **_NATIVE),
    Kind("leaves mid-stream", 4, "POST", "/api/chat", _chat(40), leaves_after=5, **_NATIVE),
    Kind("reads little", 2, "POST", "/api/chat", _chat(200), pause_s=0.05, **_NATIVE),
)


@dataclass(slots=True)
class Outcome:
    """What became of one request. Moments are monotonic ns."""

    kind: str
    planned_ns: int
    first_ns: int = 0  # the first piece of the body was there
    ended_ns: int = 0
    status: int = 0
    server: str = ""  # X-Ollama-LB-Server
    request_id: str = ""
    reused: bool = False  # on a connection that had had other requests
    left: bool = False  # as it was to
    whole: bool = False
    error_line: bool = False
    problem: str = ""

    @property
    def committed(self) -> bool:
        """Whether the client had got a good head and something behind it."""
        return self.status == 200 and self.first_ns > 0


@dataclass(slots=True)
class Connection:
    """A client's connection; not for two requests at once."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since_s: float = 0.0

    async def close(self) -> None:
        """End it."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


async def connect(port: int, *, slow: bool) -> Connection:
    """Connect; one that is slow has small buffers. Raises OSError."""
    sock = socket.socket()
    try:
        if slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)
        sock.setblocking(False)  # noqa: FBT003  # that is how it is called
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        limit = SLOW_BUFFER_BYTES if slow else 65536
        return Connection(*await asyncio.open_connection(sock=sock, limit=limit))
    except OSError:
        sock.close()
        raise


def request_bytes(kind: Kind, port: int, *, close: bool) -> bytes:
    """Return a request as it goes over the wire."""
    lines = [f"{kind.method} {kind.path} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
    lines += ["Connection: close"] if close else []
    body = b"" if kind.body is None else json.dumps(kind.body).encode()
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join((*lines, "", "")).encode() + body


class BadAnswerError(Exception):
    """An answer that is no HTTP, or ended before its end."""


@dataclass(slots=True)
class Head:
    """What a client reads of an answer's head."""

    status: int
    fields: dict[str, str]

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return "chunked" in self.fields.get("transfer-encoding", "")

    @property
    def keeps(self) -> bool:
        """Whether the connection stays."""
        return self.fields.get("connection", "").lower() != "close"


def parse_head(raw: bytes) -> Head:
    """Read a head. Raises BadAnswerError."""
    first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    version, _, rest = first.partition(" ")
    if version != "HTTP/1.1" or not rest[:3].isdigit():
        raise BadAnswerError(f"no status line: {first[:80]}")
    pairs = (line.partition(":") for line in lines)
    return Head(int(rest[:3]), {name.lower(): value.strip() for name, _, value in pairs})


async def _read_body(connection: Connection, head: Head, kind: Kind, outcome: Outcome, tail: bytearray) -> None:
    """Read to the end, or until the client leaves; the end of what came is in `tail`."""
    pieces = 0
    left = int(head.fields.get("content-length", "0"))
    while True:
        if head.chunked:
            size = int((await connection.reader.readuntil(b"\r\n")).strip() or b"x", 16)
            piece = (await connection.reader.readexactly(size + 2))[:-2]
        else:
            piece = await connection.reader.read(min(left, 65536)) if left else b""
            left -= len(piece)
            if left and not piece:
                raise BadAnswerError("ended within its length")
        if not piece:
            return
        outcome.first_ns = outcome.first_ns or time.monotonic_ns()
        tail += piece
        del tail[:-8192]
        pieces += 1
        if kind.leaves_after is not None and pieces >= kind.leaves_after:
            outcome.left = True
            return
        if kind.pause_s:
            await asyncio.sleep(kind.pause_s)


def judge(kind: Kind, outcome: Outcome, tail: bytes) -> None:
    """Say whether an answer is whole, from the end of it and from what became of its connection (`problem`)."""
    lines = [line for line in tail.splitlines() if line.strip()]
    last = lines[-1] if lines else b""
    if kind.streams:
        outcome.error_line = bool(last.startswith(kind.error))
        has_end = kind.ends in last
    else:
        has_end = bool(tail)
    outcome.whole = outcome.status == kind.status and has_end and not outcome.problem
    if not outcome.whole and not outcome.left:
        said = f"{outcome.status} {last[:300].decode(errors='replace')}"
        outcome.problem = f"{outcome.problem}; {said}" if outcome.problem else said


@dataclass
class Clients:
    """All clients: those that keep their connections, and those that come once."""

    port: int
    rng: Random
    outcomes: list[Outcome] = field(default_factory=list)
    _kept: list[Connection] = field(default_factory=list)

    async def offer(self, moments: Sequence[float], begin_ns: int) -> None:
        """Send a request at each moment (s after `begin_ns`), whatever became of the earlier ones; wait for all."""
        weights = [kind.weight for kind in KINDS]
        async with asyncio.TaskGroup() as tasks:
            for moment in moments:
                planned_ns = begin_ns + round(moment * 1e9)
                await asyncio.sleep(max(0.0, (planned_ns - time.monotonic_ns()) / 1e9))
                (kind,) = self.rng.choices(KINDS, weights)
                tasks.create_task(self.ask(kind, planned_ns, keep=self.rng.random() < 0.6))

    async def ask(self, kind: Kind, planned_ns: int, *, keep: bool) -> None:
        """Send one request and see it through."""
        outcome = Outcome(kind.name, planned_ns)
        tail = bytearray()
        connection: Connection | None = None
        reusable = False
        try:
            async with asyncio.timeout(_PATIENCE_S):
                connection, outcome.reused = await self._connection(keep=keep, slow=bool(kind.pause_s))
                reusable = await self._exchange(connection, kind, outcome, tail, keep=keep)
        except TimeoutError:
            outcome.problem = "timed out"
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, BadAnswerError) as error:
            outcome.problem = f"{type(error).__name__}: {error}"
        outcome.ended_ns = time.monotonic_ns()
        judge(kind, outcome, bytes(tail))
        self.outcomes.append(outcome)
        if connection is not None:
            if reusable and keep and not kind.pause_s and not outcome.problem:
                connection.idle_since_s = time.monotonic()
                self._kept.append(connection)
            else:
                await connection.close()

    async def _connection(self, *, keep: bool, slow: bool) -> tuple[Connection, bool]:
        while self._kept and keep and not slow:
            connection = self._kept.pop()
            if time.monotonic() - connection.idle_since_s < KEPT_S:
                return connection, True
            await connection.close()
        return await connect(self.port, slow=slow), False

    async def _exchange(
        self, connection: Connection, kind: Kind, outcome: Outcome, tail: bytearray, *, keep: bool
    ) -> bool:
        """Send a request and read its answer; tell whether the connection can have another one."""
        connection.writer.write(request_bytes(kind, self.port, close=not keep and self.rng.random() < 0.5))
        await connection.writer.drain()
        if kind.leaves_after == 0:
            await asyncio.sleep(self.rng.uniform(0.0, 0.08))
            outcome.left = True
            return False
        head = parse_head(await connection.reader.readuntil(b"\r\n\r\n"))
        outcome.status = head.status
        outcome.server = head.fields.get("x-ollama-lb-server", "")
        outcome.request_id = head.fields.get("x-ollama-lb-request-id", "")
        await _read_body(connection, head, kind, outcome, tail)
        return head.keeps and not outcome.left

    async def close(self) -> None:
        """Let go of the connections that were kept."""
        while self._kept:
            await self._kept.pop().close()
