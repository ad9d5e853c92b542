"""Connections to servers: what comes on them is lost to nobody, and no break is taken for a good end."""

from typing import Any, cast

import anyio
import pytest

from lbcore.ollama import Ending
from lbio.configuration.settings import PoolSettings
from lbio.http1 import IncompleteBody, parse_response_head
from lbio.upstream import Answer, Connection, Endpoint
from tests.lbio.sockets_kit import BACKENDS, tcp_pair

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", BACKENDS)]

UNTIL_CLOSE = parse_response_head(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", "GET")


class Breaking:
    """A reader whose connection breaks, as TLS does: without a word."""

    buffered = bytearray()

    async def more(self) -> bytes:
        raise anyio.BrokenResourceError


async def test_a_break_without_a_word_is_no_end_of_a_body_that_a_close_ends() -> None:
    connection: Any = type("Broken", (), {"reader": Breaking()})()
    answer = Answer(cast("Connection", connection), UNTIL_CLOSE, Ending.FRAMING)
    with pytest.raises(IncompleteBody):
        await answer.read()


def endpoint() -> Endpoint:
    return Endpoint("a", "http://127.0.0.1:1", None, PoolSettings(), lambda: 0)


async def test_what_comes_on_a_pooled_connection_after_it_was_taken_is_the_answer() -> None:
    async with tcp_pair() as (client, server):
        kept = endpoint()
        kept.release(Connection(client))
        taken = kept.pooled()
        assert taken is not None
        await server.send(b"HTTP/1.1 413 X")  # before a task has sent the rest of a large body
        await anyio.sleep(0.02)
        assert await taken.reader.more() == b"HTTP/1.1 413 X"


@pytest.mark.parametrize("stirred_by", ["bytes", "an end", "a reset"])
async def test_a_connection_that_has_stirred_while_it_was_idle_is_not_used_again(stirred_by: str) -> None:
    async with tcp_pair() as (client, server):
        kept = endpoint()
        kept.release(Connection(client))
        if stirred_by == "bytes":
            await server.send(b"HTTP/1.1 408 X")
        elif stirred_by == "an end":
            server.close()
        else:
            server.abort()
        await anyio.sleep(0.02)
        assert kept.pooled() is None
