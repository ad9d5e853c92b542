"""A client that opens many streams and costs next to nothing: `python -m benchmarks.streams` reads a line of JSON.

The line is a `Load`. Each stream is a chat on a connection of its own, begun at its planned moment whatever
became of the earlier ones. Prints `{"begun_ns": ...}` when the first may begin, and when all are over (or `patience_s`
have passed) a JSON object with a list for each of `Seen`'s fields. Moments are monotonic ns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import cast

import uvloop

from benchmarks.upstream import Pace

_LEAD_S = 0.05  # before the first planned moment
_PER_ADDRESS = 20_000  # connections from one address: there are some 28,000 ports
_STAMP = b'"created_at":"'
_SECONDS_AT = len(_STAMP) + 17  # where the seconds of the moment stand
_MINUTE_NS = 60_000_000_000


@dataclass(frozen=True)
class Load:
    """What is asked for. Moments in seconds after the begin."""

    port: int
    moments: Sequence[float]
    pace: Pace
    timed: bool = False  # note when each token came: costs some microseconds for each
    patience_s: float = 60.0

    def as_json(self) -> str:
        """Return it as the line that this program reads."""
        return json.dumps(asdict(self))


def load_of(text: str) -> Load:
    """Read what `as_json` wrote."""
    found = json.loads(text)
    return Load(**{**found, "pace": Pace(**found["pace"])})


def even(n_streams: int, seconds: float) -> list[float]:
    """Return moments that lie evenly in a span."""
    return [index * seconds / n_streams for index in range(n_streams)]


def scattered(n_streams: int, seconds: float, seed: int) -> list[float]:
    """Return moments that lie in a span by chance, as those of a Poisson process of this number do."""
    rng = Random(seed)
    return sorted(rng.uniform(0, seconds) for _ in range(n_streams))


@dataclass
class Seen:
    """What came of the streams, in the order of their moments."""

    late_ms: list[float] = field(default_factory=list)  # how long after its planned moment each was begun
    ttft_ms: list[float] = field(default_factory=list)  # from then to the first byte; only of those that got one
    total_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    reads: int = 0  # in which they came; fewer than tokens when somebody was late
    complete: int = 0
    problems: list[str] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)  # between two tokens of a stream
    transit_ms: list[float] = field(default_factory=list)  # from the moment that the server wrote into it until it came


class _Stream(asyncio.Protocol):
    """One chat. A token's line has two closing braces, and nothing else has any: bytes that cannot be cut in two."""

    __slots__ = (
        "_before",
        "_braces",
        "_first_ns",
        "_judged",
        "_last_ns",
        "_over",
        "_request",
        "_seen",
        "_sent_ns",
        "_timed",
    )

    def __init__(self, seen: Seen, request: bytes, over: asyncio.Future[None], *, timed: bool) -> None:
        self._seen = seen
        self._request = request
        self._over = over
        self._timed = timed
        self._before = b""
        self._braces = 0
        self._first_ns = 0
        self._last_ns = 0
        self._sent_ns = time.monotonic_ns()
        self._judged = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        cast("asyncio.Transport", transport).write(self._request)  # uvloop's are no subclass

    def data_received(self, data: bytes) -> None:
        """Count."""
        self._seen.reads += 1
        self._braces += data.count(b"}")
        if not self._first_ns:
            self._first_ns = time.monotonic_ns()
            self._seen.ttft_ms.append((self._first_ns - self._sent_ns) / 1e6)
            if not data.startswith(b"HTTP/1.1 200"):
                self.finish(data[:400].decode("latin-1"))
                return
        if self._timed:
            self._time(data)
        if data.endswith(b"\r\n") and (self._before + data).endswith(b"0\r\n\r\n"):
            self.finish("" if b'"done":true' in self._before + data else "ended without its last line")
        self._before = data if len(data) > 400 else self._before[-400:] + data

    def _time(self, data: bytes) -> None:
        now_ns, wall_ns = time.monotonic_ns(), time.time_ns() % _MINUTE_NS
        at = data.find(_STAMP)
        while at >= 0:
            digits = data[at + _SECONDS_AT : at + _SECONDS_AT + 12]
            if len(digits) == 12:
                sent_ns = int(digits[:2] + digits[3:]) if digits[2:3] == b"." else 0
                self._seen.transit_ms.append(((wall_ns - sent_ns) % _MINUTE_NS) / 1e6)
            if self._last_ns:
                self._seen.gaps_ms.append((now_ns - self._last_ns) / 1e6)
            self._last_ns = now_ns
            at = data.find(_STAMP, at + 1)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note a stream that was cut."""
        self.finish(f"connection lost: {exc or 'closed early'}")

    def finish(self, problem: str) -> None:
        """Judge, once."""
        if self._judged:
            return
        self._judged = True
        if not self._over.done():  # it is cancelled when the time is up
            self._over.set_result(None)
        seen = self._seen
        seen.total_ms.append((time.monotonic_ns() - self._sent_ns) / 1e6)
        seen.tokens += max(0, self._braces // 2 - (not problem))
        if problem:
            seen.problems.append(problem)
        else:
            seen.complete += 1


async def _one(load: Load, seen: Seen, request: bytes, index: int) -> None:
    loop = asyncio.get_running_loop()
    stream = _Stream(seen, request, loop.create_future(), timed=load.timed)
    source = (f"127.0.0.{2 + index // _PER_ADDRESS}", 0) if len(load.moments) > _PER_ADDRESS else None
    transport: asyncio.Transport | None = None
    try:
        transport, _ = await loop.create_connection(lambda: stream, "127.0.0.1", load.port, local_addr=source)
        await stream._over  # noqa: SLF001
    except OSError as error:
        stream.finish(f"cannot connect: {error}")
    except asyncio.CancelledError:
        stream.finish("timed out")
    finally:
        if transport is not None:
            transport.abort()


async def run(load: Load) -> Seen:
    """Open all streams and see them through."""
    body = load.pace.body()
    head = f"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1:{load.port}\r\nUser-Agent: ollama-python/0.5.1\r\n"
    head += f"Accept: application/json\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    request = head.encode() + body
    begin_ns = time.monotonic_ns() + round(_LEAD_S * 1e9)
    print(json.dumps({"begun_ns": begin_ns}), flush=True)
    seen = Seen()
    tasks = []
    for index, moment in enumerate(load.moments):
        planned_ns = begin_ns + round(moment * 1e9)
        if (wait_ns := planned_ns - time.monotonic_ns()) > 0:
            await asyncio.sleep(wait_ns / 1e9)
        seen.late_ms.append((time.monotonic_ns() - planned_ns) / 1e6)
        tasks.append(asyncio.create_task(_one(load, seen, request, index)))
    _, waiting = await asyncio.wait(tasks, timeout=load.patience_s)
    for task in waiting:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*waiting, return_exceptions=True)
    return seen


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(__doc__)
        sys.exit(0 if "--help" in sys.argv else 2)
    print(json.dumps(asdict(uvloop.run(run(load_of(sys.stdin.readline()))))), flush=True)
