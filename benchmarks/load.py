"""An open-loop client: streamed chats, each on a connection of its own and timed from its planned moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

BODY = json.dumps({"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}).encode()
_END = b"0\r\n\r\n"


@dataclass(slots=True)
class Outcome:
    """What became of one request. Moments are monotonic ns."""

    planned_ns: int
    sent_ns: int = 0
    first_ns: int = 0  # the first byte of the body arrived; 0: none did
    ended_ns: int = 0
    status: int = 0
    request_id: str = ""  # X-Ollama-LB-Request-Id
    server: str = ""  # X-Ollama-LB-Server
    done: bool = False  # 200, whole, with Ollama's last line
    error_line: bool = False  # the last line of the body tells of an error
    problem: str = ""
    tokens: int = 0

    @property
    def ttft_ms(self) -> float:
        """From the planned moment to the first byte of the body."""
        return (self.first_ns - self.planned_ns) / 1e6


@dataclass
class _Client(asyncio.Protocol):
    """One request; every byte is kept and looked at when it is over."""

    outcome: Outcome
    request: bytes
    over: asyncio.Future[None]
    _data: bytearray = field(default_factory=bytearray)
    _head_end: int = -1
    _transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport
            self.outcome.sent_ns = time.monotonic_ns()
            transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self._data += data
        outcome = self.outcome
        if self._head_end < 0:
            self._head_end = self._data.find(b"\r\n\r\n")
        if self._head_end >= 0 and not outcome.first_ns and len(self._data) > self._head_end + 4:
            outcome.first_ns = time.monotonic_ns()
        if self._data.endswith(_END) or self._is_whole():
            self.finish("")

    def connection_lost(self, exc: Exception | None) -> None:
        self.finish(f"connection lost: {exc or 'closed early'}")

    def finish(self, problem: str) -> None:
        """Judge what came."""
        if self.over.done():
            return
        self.over.set_result(None)
        self.outcome.ended_ns = time.monotonic_ns()
        if self._transport is not None:
            self._transport.abort()
        self._judge(problem)

    def _header(self, name: bytes) -> str:
        for line in bytes(self._data[: self._head_end]).split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name:
                return value.strip().decode("latin-1")
        return ""

    def _is_whole(self) -> bool:
        """Tell whether a body with a length is all there: error answers have one."""
        if self._head_end < 0 or b"ontent-" not in self._data[: self._head_end]:
            return False
        length = self._header(b"content-length")
        return length.isdigit() and len(self._data) >= self._head_end + 4 + int(length)

    def _judge(self, problem: str) -> None:
        outcome = self.outcome
        if self._head_end >= 0:
            status = self._data[:12].split(b" ")
            outcome.status = int(status[1]) if len(status) > 1 and status[1].isdigit() else 0
            outcome.request_id = self._header(b"x-ollama-lb-request-id")
            outcome.server = self._header(b"x-ollama-lb-server")
        body = bytes(self._data[self._head_end + 4 :]) if self._head_end >= 0 else b""
        lines = [line for line in body.splitlines() if line.startswith(b"{")]
        outcome.tokens = sum(1 for line in lines if b'"done":false' in line)
        last = lines[-1] if lines else b""
        outcome.error_line = last.startswith(b'{"error"')
        outcome.done = outcome.status == 200 and b'"done":true' in last and not problem
        if not outcome.done:
            outcome.problem = problem or (last[:160].decode(errors="replace") if last else "ended without its end")


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the moments of a Poisson process, in seconds."""
    rng, moment, moments = Random(seed), 0.0, []
    while (moment := moment + rng.expovariate(rate)) < seconds:
        moments.append(moment)
    return moments


async def ask(port: int, planned_ns: int | None = None, *, patience_s: float = 30.0, body: bytes = BODY) -> Outcome:
    """Send one chat and see it through."""
    loop = asyncio.get_running_loop()
    outcome = Outcome(time.monotonic_ns() if planned_ns is None else planned_ns)
    head = f"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    client = _Client(outcome, request, loop.create_future())
    try:
        await loop.create_connection(lambda: client, "127.0.0.1", port)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(client.over), patience_s)
    except OSError as error:
        client.finish(f"cannot connect: {error}")
    client.finish("timed out")
    return outcome


async def offer(ports: Sequence[int], moments: Sequence[float], begin_ns: int) -> list[Outcome]:
    """Send a chat at each moment after `begin_ns`, to the ports in turn, whatever became of the earlier ones."""
    tasks = []
    for index, moment in enumerate(moments):
        planned_ns = begin_ns + round(moment * 1e9)
        await asyncio.sleep(max(0.0, (planned_ns - time.monotonic_ns()) / 1e9))
        tasks.append(asyncio.create_task(ask(ports[index % len(ports)], planned_ns)))
    return list(await asyncio.gather(*tasks))
