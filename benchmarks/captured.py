"""Answers of a real Ollama, byte for byte, from `tests/captures`: what the servers of the benchmarks say."""

from __future__ import annotations

import json
import re
from pathlib import Path

CAPTURES = Path(__file__).parent.parent / "tests" / "captures"
MODEL = "tiny"  # the only one the captured Ollama has, loaded for ever
_CLOSE = b"Connection: close\r\n"
_DATE = re.compile(rb"\r\nDate: [^\r]+")
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def response(name: str) -> bytes:
    """Return one captured response, head and body as they stood on the wire.

    In the capture of a long one, a path was made shorter and the size of its only chunk was left: that is set right.
    """
    found = json.loads((CAPTURES / f"{name}.json").read_text(encoding="utf-8"))
    whole = b"".join(read["data"].encode() for read in found["response"])
    head, mark, body = whole.partition(_CHUNKED)
    if mark and len(found["response"]) == 1:
        body = chunk(body.partition(b"\r\n")[2].removesuffix(b"\r\n" + LAST)) + LAST
    return head + mark + body


def kept_alive(answer: bytes, date: str) -> bytes:
    """Return a response as Ollama gives it on a connection that stays open, at another time."""
    head, blank, body = answer.partition(b"\r\n\r\n")
    head = _DATE.sub(b"\r\nDate: " + date.encode(), head)
    return (head + b"\r\n").replace(_CLOSE, b"", 1)[:-2] + blank + body


def chunk(line: bytes) -> bytes:
    """Return a line as one chunk of HTTP/1.1, as Ollama sends each."""
    return b"%x\r\n%s\r\n" % (len(line), line)


def chunks(body: bytes) -> list[bytes]:
    """Return the contents of a chunked body, without the empty one that ends it."""
    found = []
    while body and body != LAST:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        found.append(rest[:length])
        body = rest[length + 2 :]
    return found
