"""`https://` servers: verified against the authority that is named, or not at all with a warning."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.streams.tls import TLSStream

from lbcore.events import Reason
from lbio.config_file import parse
from lbio.http1 import Reader, parse_request_head
from lbio.service import Service, start
from lbio.wire.streams import SocketListener, SocketStream, connect

CERTIFICATE = Path(__file__).parent / "localhost.pem"
CHAT = b'{"model":"tiny","message":{"role":"assistant","content":"hi"},"done":true}\n'
TOKEN = CHAT.replace(b"true", b"false")
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "/api/version": b'{"version":"0.9.0"}',
    "/api/tags": b'{"models":[{"name":"tiny:latest"}]}',
    "/api/ps": b'{"models":[{"name":"tiny:latest"}]}',
    "/api/chat": CHAT,
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def _serve(stream: SocketStream, context: ssl.SSLContext) -> None:
    """A server of four answers behind TLS."""
    left = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, ssl.SSLZeroReturnError)
    with contextlib.suppress(*left):  # the last one, also inside the handshake, is that of Python 3.11.2
        tls = await TLSStream.wrap(stream, server_side=True, ssl_context=context, standard_compatible=False)
        reader = Reader(tls)
        while (raw := await reader.read_head(65536, role="request")) is not None:
            head = parse_request_head(raw)
            asked = await reader.read_body(head, None)
            if b'"nonsense"' in asked:
                await tls.send(STREAM_HEAD + b"%x\r\n%s\r\n" % (len(TOKEN), TOKEN))
                await anyio.sleep(0.02)
                await stream.send(b"this is not TLS" * 10)
                continue
            body = ANSWERS[head.path]
            kind = b"application/x-ndjson" if body is CHAT else b"application/json"
            await tls.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (kind, len(body), body)
            )
    stream.close()


@contextlib.asynccontextmanager
async def _balancer(**server: Any) -> AsyncIterator[tuple[Service, list[str]]]:
    """A balancer in front of one TLS server; also the warnings of its configuration."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    listener = await SocketListener.listen("127.0.0.1", 0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.accept_forever, lambda stream: tasks.start_soon(_serve, stream, context))
        url = f"https://localhost:{listener.addresses[0][1]}"
        app = parse({"listen": "127.0.0.1:0", "servers": [{"url": url, "name": "secure", **server}]})
        async with start(app) as service:
            with anyio.fail_after(5):
                await service.driver.wait_probed(lambda s: s.last_sync_ns is None and s.probe_failures == 0)
            yield service, list(app.warnings)
        listener.close()
        tasks.cancel_scope.cancel()


async def _chat(service: Service, content: bytes = b"x") -> bytes:
    host, port = service.addresses[0]
    client = await connect(host, port)
    body = b'{"model":"tiny","messages":[{"role":"user","content":"%s"}]}' % content
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    await client.send(head + body)
    answer = b""
    with anyio.fail_after(5), contextlib.suppress(anyio.EndOfStream):
        while True:
            answer += await client.receive()
    client.close()
    return answer


@pytest.mark.anyio
async def test_a_server_whose_authority_is_named_is_used() -> None:
    async with _balancer(ca_file=str(CERTIFICATE)) as (service, warnings):
        assert warnings == []
        answer = await _chat(service)
    assert answer.startswith(b"HTTP/1.1 200")
    assert CHAT in answer


@pytest.mark.anyio
async def test_a_certificate_of_an_unknown_authority_is_refused() -> None:
    async with _balancer() as (service, _):
        (server,) = service.driver.balancer.fleet
        assert not server.is_alive
        assert Reason.TLS_FAILED in server.last_error
        answer = await _chat(service)
    assert answer.startswith(b"HTTP/1.1 502")
    assert b"TLS failed" in answer


@pytest.mark.anyio
async def test_without_verification_it_is_used_with_a_warning() -> None:
    async with _balancer(verify=False) as (service, warnings):
        assert any("verify" in warning for warning in warnings)
        answer = await _chat(service)
    assert CHAT in answer


@pytest.mark.anyio
async def test_a_large_body_goes_through_while_the_answer_is_awaited() -> None:
    async with _balancer(ca_file=str(CERTIFICATE)) as (service, _):
        assert CHAT in await _chat(service, b"x" * (8 << 20))


@pytest.mark.anyio
async def test_what_is_not_tls_in_the_middle_breaks_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with _balancer(ca_file=str(CERTIFICATE)) as (service, _):
        answer = await _chat(service, b"nonsense")
        (server,) = service.driver.balancer.fleet
        assert server.health < 1
    assert b'{"error":"the stream broke: ' in answer
    assert answer.endswith(b"0\r\n\r\n")
    assert not [message for message in caplog.messages if "internal error" in message]


@pytest.mark.anyio
async def test_an_authority_that_cannot_be_used_is_told_before_anything_starts() -> None:
    server = {"url": "https://a", "name": "a", "ca_file": str(Path(__file__))}
    app = parse({"listen": "127.0.0.1:0", "servers": [server]})
    with pytest.raises(OSError, match=r"test_proxy_tls\.py of a cannot be used"):
        async with start(app):
            pass
