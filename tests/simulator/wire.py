"""A raw HTTP client and parser, on purpose not the project's own, and the recordings."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import ByteStream

CAPTURES = Path(__file__).parents[1] / "captures"
# Whoever recorded these shortened a path by 7 bytes, or an address by 4, and left the lengths as they were.
REPAIRS = {
    "show": (b"\r\n\r\na78\r\n", b"\r\n\r\na71\r\n"),
    "push_unknown": (b"\r\n6c\r\n", b"\r\n65\r\n"),
    "pull_unreachable": (b"\r\nac\r\n", b"\r\na8\r\n"),
    "pull_unreachable_single": (b"Content-Length: 171", b"Content-Length: 167"),
    "create_unknown_from": (b"\r\nb1\r\n", b"\r\nad\r\n"),
    "experimental": (b"Content-Length: 135", b"Content-Length: 131"),
}


@dataclass(frozen=True)
class Capture:
    name: str
    head: str
    body: str | None
    response: bytes

    @property
    def request(self) -> bytes:
        return self.head.encode() + b"\r\n" + (self.body or "").encode()


def load(name: str) -> Capture:
    found = json.loads((CAPTURES / f"{name}.json").read_text("utf-8"))
    request = found["request"]
    data = "".join(read["data"] for read in found["response"])
    response = data.encode().replace(*REPAIRS.get(name, (b"", b"")), 1)
    return Capture(name, request["head"], request["body"], response)


@dataclass(frozen=True)
class Answer:
    status_line: str
    headers: list[tuple[str, str]]
    body: bytes
    chunks: list[bytes] | None  # None: not chunked
    complete: bool  # the framing says so

    @property
    def status(self) -> int:
        return int(self.status_line.split()[1])

    def header(self, name: str) -> str | None:
        return next((value for found, value in self.headers if found == name), None)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The objects of an NDJSON stream, complete lines only."""
        return [json.loads(line) for line in self.body.split(b"\n")[:-1]]

    @property
    def text(self) -> str:
        return "".join(line["message"]["content"] for line in self.lines if "message" in line)


def parse(raw: bytes, method: str = "GET") -> Answer:
    head, separator, rest = raw.partition(b"\r\n\r\n")
    assert separator, f"no head in {raw[:100]!r}"
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = [(line.partition(": ")[0], line.partition(": ")[2]) for line in lines]
    named = dict(headers)
    if method == "HEAD" or " 204 " in status_line:
        return Answer(status_line, headers, rest, None, not rest)
    if named.get("Transfer-Encoding") != "chunked":
        return Answer(status_line, headers, rest, None, int(named.get("Content-Length", -1)) == len(rest))
    chunks = list(_chunks(rest))
    complete = bool(chunks) and chunks[-1] == b""
    chunks = [chunk for chunk in chunks if chunk]
    return Answer(status_line, headers, b"".join(chunks), chunks, complete)


def _chunks(rest: bytes) -> Iterator[bytes]:
    """Complete chunks; the last one, when it is there, as b""."""
    while rest:
        size_line, separator, after = rest.partition(b"\r\n")
        if not separator:
            return
        size = int(size_line, 16)
        if len(after) < size + 2:
            return
        assert after[size : size + 2] == b"\r\n"
        yield after[:size]
        rest = after[size + 2 :]


async def connect(url: str) -> ByteStream:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return await anyio.connect_tcp(host, int(port))


async def receive_all(stream: ByteStream) -> bytes:
    data = b""
    try:
        while True:
            data += await stream.receive()
    except anyio.EndOfStream:
        return data


async def exchange(url: str, request: bytes) -> bytes:
    """Send, and return all until the server closes."""
    async with await connect(url) as stream:
        await stream.send(request)
        return await receive_all(stream)


def request(method: str, path: str, body: object = None, *, close: bool = True) -> bytes:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost:11434"]
    lines += ["Connection: close"] * close + [f"Content-Length: {len(data)}"] * (body is not None)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def chat(content: str = "hello", model: str = "tiny", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}]} | fields


async def ask(url: str, method: str, path: str, body: object = None) -> Answer:
    return parse(await exchange(url, request(method, path, body)), method)


def body_of(answer: Answer) -> Any:
    return json.loads(answer.body)
