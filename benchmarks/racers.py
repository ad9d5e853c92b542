"""Servers for races, all in one process that does next to nothing: `python -m benchmarks.racers 50 60 80 100`.

The fakes of the simulator take a millisecond of work for each request, which on a machine of few cores is a millisecond
taken from the balancer, as no server elsewhere would. Here everything is written beforehand, and timers are exact to
some tens of microseconds. The arguments are times to the first token, ms.

Prints `{"ports": […]}`, then for each line on standard input what has been seen since the last: a list of
`[what, server, at_ns, tokens]` in order, where `what` is `asked` (a chat has come in whole), `first` (the first token
goes out) or `closed` (the client ended the connection before the answer ended). Moments are monotonic ns.
Ends when standard input does.
"""

from __future__ import annotations

import heapq
import itertools
import json
import select
import socket
import sys
import time
from dataclasses import dataclass, field

TOKENS = 12
TOKEN_NS = 5_000_000

_MODEL = {"name": "llama3.2:latest", "model": "llama3.2:latest", "digest": "a" * 64, "size": 1}
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(**members: object) -> bytes:
    line = json.dumps({"model": "llama3.2", "created_at": "2026-01-01T00:00:00Z", **members}, separators=(",", ":"))
    return b"%x\r\n%s\n\r\n" % (len(line) + 1, line.encode())


_TOKEN = _chunk(message={"role": "assistant", "content": " word"}, done=False)
_END = _chunk(message={"role": "assistant", "content": ""}, done_reason="stop", done=True, eval_count=TOKENS)
_LAST = _END + b"0\r\n\r\n"


def _whole(found: object) -> bytes:
    body = json.dumps(found).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


_ANSWERS = {
    b"/api/version": _whole({"version": "0.12.6"}),
    b"/api/tags": _whole({"models": [_MODEL]}),
    b"/api/ps": _whole({"models": [{**_MODEL, "expires_at": "2318-01-01T00:00:00Z", "size_vram": 1}]}),
}


@dataclass
class _Connection:
    sock: socket.socket
    server: int
    received: bytes = b""
    tokens: int | None = None  # of the answer under way, sent so far


@dataclass
class _Racers:
    first_tokens_ns: list[int]
    listeners: dict[socket.socket, int] = field(default_factory=dict)
    connections: dict[socket.socket, _Connection] = field(default_factory=dict)
    due: list[tuple[int, int, _Connection]] = field(default_factory=list)  # a heap
    seen: list[tuple[str, int, int, int]] = field(default_factory=list)
    serials: itertools.count[int] = field(default_factory=itertools.count)

    def listen(self) -> list[int]:
        for server in range(len(self.first_tokens_ns)):
            self.listeners[socket.create_server(("127.0.0.1", 0), backlog=64)] = server
        return [listener.getsockname()[1] for listener in self.listeners]

    def note(self, what: str, connection: _Connection) -> None:
        self.seen.append((what, connection.server, time.monotonic_ns(), connection.tokens or 0))

    def run(self) -> None:
        while True:
            wait_s = max(0, self.due[0][0] - time.monotonic_ns()) / 1e9 if self.due else None
            ready, _, _ = select.select([sys.stdin, *self.listeners, *self.connections], [], [], wait_s)
            while self.due and self.due[0][0] <= time.monotonic_ns():
                due_ns, _, connection = heapq.heappop(self.due)
                self.speak(connection, due_ns)
            for sock in ready:
                if not isinstance(sock, socket.socket):
                    if not sys.stdin.readline():
                        return
                    print(json.dumps(self.seen), flush=True)
                    self.seen.clear()
                elif sock in self.listeners:
                    self.accept(sock)
                elif sock in self.connections:
                    self.receive(self.connections[sock])

    def accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        sock.settimeout(0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections[sock] = _Connection(sock, self.listeners[listener])

    def receive(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.drop(connection)
            return
        connection.received += data
        head, blank, body = connection.received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0] or 0)
        if not blank or len(body) < length:
            return
        connection.received = body[length:]
        target = head.split(b" ", 2)[1]
        if target in _ANSWERS:
            connection.sock.send(_ANSWERS[target])
            return
        connection.tokens = 0
        self.note("asked", connection)
        self.wake(connection, time.monotonic_ns() + self.first_tokens_ns[connection.server])

    def wake(self, connection: _Connection, due_ns: int) -> None:
        heapq.heappush(self.due, (due_ns, next(self.serials), connection))

    def speak(self, connection: _Connection, due_ns: int) -> None:
        if connection.tokens is None or connection.sock not in self.connections:
            return
        if not connection.tokens:
            self.note("first", connection)
        try:
            if connection.tokens == TOKENS:
                connection.tokens = None
                connection.sock.send(_LAST)
                return
            connection.sock.send(_TOKEN if connection.tokens else _HEAD + _TOKEN)
        except OSError:
            self.drop(connection)
            return
        connection.tokens += 1
        self.wake(connection, due_ns + TOKEN_NS)

    def drop(self, connection: _Connection) -> None:
        if connection.tokens is not None:
            self.note("closed", connection)
        del self.connections[connection.sock]
        connection.sock.close()


def _main() -> None:
    racers = _Racers([round(float(text) * 1e6) for text in sys.argv[1:]])
    print(json.dumps({"ports": racers.listen()}), flush=True)
    racers.run()


if __name__ == "__main__":
    _main()
