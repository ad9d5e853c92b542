"""Ollama servers that cost next to nothing: `python -m benchmarks.upstream 4` runs four, on ports of their own.

What they say is what a real Ollama said (see benchmarks/captured.py), with the times of now. A chat asks for its pace
in its `options`, which Ollama ignores when it does not know them:

    num_predict     tokens, 100 by default
    bench_first_ms  until the first token
    bench_every_ms  between two tokens, 1 at least
    bench_hold      how often the stream waits for `release`: 1 before its first token, 2 after it as well

`created_at` is the moment at which a line is sent, so that a client can tell how long each token took to reach it.
A path that Ollama does not know is answered with 200 and some 300 bytes.

Prints `{"ports": [...]}`, then answers each line on standard input with one line: `stats`, what has been seen since the
start; `release`, how many streams went on. Ends when standard input does. Timers are exact to 1 ms.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import uvloop

from benchmarks.captured import LAST, chunk, chunks, kept_alive, response

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nDate: x\r\nContent-Length: 300\r\n\r\n" + b"." * 300
_FIXED = {
    b"/": "root_get",
    b"/api/version": "version",
    b"/api/tags": "tags",
    b"/api/ps": "ps_forever",
    b"/api/show": "show",
    b"/v1/models": "v1_models",
}
_MEMO_MAX = 1000
NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Pace:
    """How a chat is answered. Times in ms."""

    tokens: int = 100
    first_ms: int = 0
    every_ms: int = 0
    hold: int = 0

    def body(self) -> bytes:
        """Return the request that asks for it."""
        options = {"num_predict": self.tokens, "bench_first_ms": self.first_ms, "bench_every_ms": self.every_ms}
        messages = [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}]
        wanted = {"model": "tiny", "messages": messages, "options": {**options, "bench_hold": self.hold}}
        return json.dumps(wanted).encode()


def pace_of(body: bytes) -> Pace:
    """Read what a chat asks for."""
    options = json.loads(body).get("options") or {}
    names = {"num_predict": "tokens", "bench_first_ms": "first_ms", "bench_every_ms": "every_ms", "bench_hold": "hold"}
    return Pace(**{name: int(options[key]) for key, name in names.items() if key in options})


@lru_cache(maxsize=2)
def _seconds(seconds: int) -> bytes:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode()


def stamp(now_ns: int) -> bytes:
    """Return a moment as Ollama writes it, with all nine digits."""
    return b"%s.%09dZ" % (_seconds(now_ns // NS_PER_S), now_ns % NS_PER_S)


class Words:
    """What is said: made anew once a second, since heads have the date in them."""

    def __init__(self) -> None:
        self._captured = {target: response(name) for target, name in _FIXED.items()}
        self._head, _, body = response("chat_stream_warm").partition(b"\r\n\r\n")
        lines = chunks(body)
        self._token = self._open(lines[0])
        self._done = lines[-1]
        self._second = 0
        self.head = b""
        self.fixed: dict[bytes, bytes] = {}
        self.plain = b""
        self.refresh()

    @staticmethod
    def _open(line: bytes) -> tuple[bytes, bytes]:
        """Return what comes before and after the moment in the chunk of a line."""
        stamped = re.sub(rb'"created_at":"[^"]+"', b'"created_at":"' + stamp(0) + b'"', line)
        before, _, after = chunk(stamped).partition(stamp(0))
        return before, after

    def refresh(self) -> None:
        """Follow the clock."""
        second = int(time.time())
        if second == self._second:
            return
        self._second = second
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second))
        self.fixed = {target: kept_alive(answer, date) for target, answer in self._captured.items()}
        self.head = kept_alive(self._head + b"\r\n\r\n", date)
        self.plain = kept_alive(_PLAIN, date)

    def token(self) -> bytes:
        """Return the chunk of one token that is sent now."""
        before, after = self._token
        return before + stamp(time.time_ns()) + after

    def done(self, tokens: int) -> bytes:
        """Return the chunk of the last line, sent now."""
        counted = re.sub(rb'"eval_count":\d+', b'"eval_count":%d' % tokens, self._done)
        before, after = self._open(counted)
        return before + stamp(time.time_ns()) + after


@dataclass
class Server:
    """What all connections share: the words, the timers and what was seen."""

    loop: asyncio.AbstractEventLoop
    words: Words = field(default_factory=Words)
    seen: Counter[str] = field(default_factory=Counter)
    held: list[Stream] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    _paces: dict[bytes, Pace] = field(default_factory=dict)
    _wheel: defaultdict[int, list[Stream]] = field(default_factory=lambda: defaultdict(list))
    _ticked: int = 0
    _timer: asyncio.TimerHandle | None = None

    def pace(self, body: bytes) -> Pace:
        """Read a chat's body, once for each that differs."""
        found = self._paces.get(body)
        if found is None:
            found = pace_of(body)
            if len(self._paces) < _MEMO_MAX:
                self._paces[body] = found
        return found

    def now_ms(self) -> int:
        """Return the time of the timers."""
        return time.monotonic_ns() // 1_000_000

    def wake(self, stream: Stream, due_ms: int) -> None:
        """Let a stream go on at a moment."""
        if self._timer is None:
            self._ticked = self.now_ms()
            self._timer = self.loop.call_later(0.001, self._tick)
        self._wheel[max(due_ms, self._ticked + 1)].append(stream)  # what is due now goes with the next tick

    def _tick(self) -> None:
        self.words.refresh()
        now_ms = self.now_ms()
        while self._ticked < now_ms:
            self._ticked += 1
            for stream in self._wheel.pop(self._ticked, ()):
                stream.speak(self._ticked)
        self._timer = self.loop.call_later(0.001, self._tick) if self._wheel else None

    def stats(self) -> dict[str, int]:
        """Return what has been seen, and how many streams are held."""
        return {**self.seen, "held": sum(1 for stream in self.held if not stream.over)}

    def release(self) -> int:
        """Let all held streams go on."""
        going, self.held = self.held, []
        now_ms = self.now_ms()
        for stream in going:
            self.wake(stream, now_ms + 1)
        return len(going)


class Stream:
    """The answer to one chat."""

    __slots__ = ("_holds", "_pace", "_said", "_server", "_transport", "over")

    def __init__(self, server: Server, pace: Pace, transport: asyncio.Transport) -> None:
        self._server = server
        self._pace = pace
        self._transport = transport
        self._said = 0
        self._holds = pace.hold
        self.over = False
        if pace.hold:
            self._hold()
        else:
            self._begin()

    def _hold(self) -> None:
        self._holds -= 1
        self._server.held.append(self)

    def _begin(self) -> None:
        if self._pace.first_ms:
            self._server.wake(self, self._server.now_ms() + self._pace.first_ms)
        else:
            self.speak(self._server.now_ms())

    def speak(self, due_ms: int) -> None:
        """Send the next token, or the end."""
        if self.over:
            return
        server, pace = self._server, self._pace
        if self._said == pace.tokens:
            self.over = True
            server.seen["complete"] += 1
            self._transport.write(server.words.done(pace.tokens))
            server.loop.call_soon(self._end)  # a write of its own, as Ollama's
            return
        self._transport.write(server.words.token() if self._said else server.words.head + server.words.token())
        self._said += 1
        server.seen["tokens"] += 1
        if self._holds:
            self._hold()
        else:
            server.wake(self, due_ms + pace.every_ms)

    def _end(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(LAST)


class Connection(asyncio.Protocol):
    """One connection: requests one after the other."""

    __slots__ = ("_received", "_server", "_stream", "_transport")

    def __init__(self, server: Server) -> None:
        self._server = server
        self._received = b""
        self._stream: Stream | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note who is there."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass
        self._server.seen["connections"] += 1

    def data_received(self, data: bytes) -> None:
        """Answer each request that is whole."""
        received = self._received + data
        while (end := received.find(b"\r\n\r\n") + 4) >= 4:
            found = _LENGTH.search(received, 0, end)
            whole = end + int(found[1]) if found else end
            if len(received) < whole:
                break
            self._answer(received.split(b" ", 2)[1], received[end:whole])
            received = received[whole:]
        self._received = received

    def _answer(self, target: bytes, body: bytes) -> None:
        server, transport = self._server, self._transport
        if transport is None:
            return
        if target == b"/api/chat":
            server.seen["chats"] += 1
            server.words.refresh()
            self._stream = Stream(server, server.pace(body), transport)
            return
        server.seen["small"] += 1
        words = server.words
        if not server.seen["small"] % 64:
            words.refresh()
        transport.write(words.fixed.get(target, words.plain))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Forget a stream whose client left."""
        if self._stream is not None and not self._stream.over:
            self._stream.over = True
            self._server.seen["left"] += 1


async def _commands(server: Server) -> None:
    reader = asyncio.StreamReader()
    await server.loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        answer: Any = server.release() if line.strip() == b"release" else server.stats()
        print(json.dumps(answer), flush=True)


async def _main(n_servers: int) -> None:
    loop = asyncio.get_running_loop()
    server = Server(loop)
    listening = [
        await loop.create_server(lambda: Connection(server), "127.0.0.1", 0, backlog=4096) for _ in range(n_servers)
    ]
    print(json.dumps({"ports": [each.sockets[0].getsockname()[1] for each in listening]}), flush=True)
    await _commands(server)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        print(__doc__)
        sys.exit(0 if "--help" in sys.argv else 2)
    uvloop.run(_main(int(sys.argv[1])))
