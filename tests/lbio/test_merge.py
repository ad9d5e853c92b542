"""What the client of a broadcast gets while it reads slowly: things happen inside its writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import pytest

from lbcore.ollama import find_route
from lbio.answers.merge import Merge
from lbio.client import ClientStream
from lbio.exchange import ClientRequest, head_parts
from lbio.http1 import parse_request_head
from lbio.wire.bodies import read_facts

pytestmark = pytest.mark.anyio

SUCCESS = b'{"status":"success"}\n'
MANIFEST = b'{"status":"pulling manifest"}\n'


class SlowClient:
    """Takes what is written; what is to happen during its first writes does."""

    def __init__(self, *during: Callable[[], None]) -> None:
        self._during = list(during)
        self.got = b""

    async def write(self, data: bytes) -> None:
        self.got += data
        if self._during:
            self._during.pop(0)()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.got.partition(b"\r\n\r\n")[2].splitlines()]


def merge_of(*servers: str) -> Merge:
    body = b'{"model":"m"}'
    head = parse_request_head(b"POST /api/pull HTTP/1.1\r\nHost: a\r\nContent-Length: 13\r\n\r\n")
    route = find_route("/api/pull")
    facts = read_facts(route, "POST", body)
    request = ClientRequest(1, "1", head, route, route.shape, facts, body, head_parts(head, []))
    return Merge(request, servers, lambda: None)


def whole(merge: Merge, server: str) -> None:
    """Let a server say all that it has to say."""
    merge.feed(server, MANIFEST + SUCCESS)
    merge.end(server, status=200, body=b"")


async def written(merge: Merge, *during: Callable[[], None]) -> SlowClient:
    client = SlowClient(*during)
    await merge.stream(cast("ClientStream", client), (), chunked=False)
    return client


@pytest.mark.parametrize("n_writes_before", [0, 1])
async def test_a_merge_that_ends_while_the_client_is_written_to_still_gets_its_last_line(n_writes_before: int) -> None:
    merge = merge_of("a", "b")
    merge.feed("a", MANIFEST)

    def rest() -> None:
        whole(merge, "a")
        whole(merge, "b")
        merge.finish()

    more: list[Callable[[], None]] = [lambda: merge.feed("b", MANIFEST)] * n_writes_before
    client = await written(merge, *more, rest)
    assert client.lines[-1] == {"status": "success", "servers": {"a": "success", "b": "success"}}
    assert [line.get("status") for line in client.lines].count("success") == 1


async def test_a_merge_that_is_broken_off_while_the_client_is_written_to_says_why() -> None:
    merge = merge_of("a", "b")
    merge.feed("a", MANIFEST)
    client = await written(merge, lambda: merge.abort("shutting down"))
    assert client.lines[-1] == {"error": "shutting down"}
