"""Connections from clients: requests read one after the other, each answered here or by a server."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from email.utils import formatdate
from functools import partial
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream

from lbcore.commands import RejectRequest
from lbcore.ollama import Shape, shape_of
from lbcore.schema import SECOND_NS
from lbio.access.keys import Key
from lbio.answers.local import LocalAnswer, error_answer
from lbio.answers.own import MODEL_HEADER, SERVER_HEADER, Ask
from lbio.answers.parts import Parts, Plan
from lbio.answers.renaming import RenamingRelay, renamed_answer
from lbio.answers.shows import ShowRelay
from lbio.attempt import AttemptRun
from lbio.client import ClientGone, ClientStream
from lbio.exchange import ClientRequest, Exchange
from lbio.http1 import Framing, HeaderPairs, HttpError, RequestHead, parse_request_head, serialize_response
from lbio.known import Known, View
from lbio.relay import Relay
from lbio.upstream import Answer
from lbio.wire.blob_body import BlobBody

if TYPE_CHECKING:
    from lbio.front import Front

_JOIN_BYTES_MAX = 65536
"""An answer of ours up to this size is written at once with its head; a larger one is not copied for that."""

TAG_HEADER = b"X-Ollama-LB-Request-Id"
N_HEADER = b"X-Ollama-LB-Attempts"
_SHUTTING_DOWN = "the load balancer is shutting down"


class ClientConnection:
    """One connection from a client."""

    def __init__(self, stream: ByteStream, front: Front) -> None:
        app = front.driver.app
        self._client = ClientStream(stream, app.client, app.limits, front.bodies)
        self._front = front
        self._driver = front.driver
        self._is_idle = True  # but for what of a request may have come
        self._idle_since_ns = front.driver.clock()
        self._cors_headers: HeaderPairs = ()  # of the answer to this request
        self._key: Key | None = None  # of this request
        self._is_over = False  # no further request is read

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way, nor has begun to come."""
        return self._is_over or (self._is_idle and not self._client.reader.buffered)

    def close(self) -> None:
        """Close at once."""
        self._client.close()

    def look(self, oldest_ns: int) -> None:
        """Close if nothing has come since then, and nothing was asked; else look whether the client has left."""
        if self.is_idle and not self._is_over and self._idle_since_ns < oldest_ns:
            self.close()
        else:
            self._client.look()

    async def refuse(self) -> None:
        """Say that there are too many connections already."""
        answer = error_answer(Shape.NATIVE, 503, "too many connections (limits.connections_max)", retry_after_s=1)
        with contextlib.suppress(ClientGone):
            await self._respond(answer, None, close=True)
        await self._client.finish()

    async def run(self) -> None:
        """Answer request after request."""
        try:
            while await self._serve_one() and not self._front.draining:
                self._is_idle = True
                self._idle_since_ns = self._driver.clock()
                if self._client.reader.buffered:  # the next request is here already, but the others come first
                    await anyio.lowlevel.checkpoint()
            self._end()
            if not self._front.linger(self._client):
                await self._client.finish()
        except (ClientGone, anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream):
            pass

    def _end(self) -> None:
        self._is_over = True
        self._front.note_served()

    async def _serve_one(self) -> bool:
        """Read and answer one request; return whether another may follow."""
        head: RequestHead | None = None
        self._cors_headers = ()
        try:
            try:
                raw = await self._client.read_head()
                if raw is None:
                    return False
                self._is_idle = False
                head = parse_request_head(raw)
                known = self._front.known(head)
                verdict = known.verdict
                self._cors_headers = verdict.headers
                if self._front.gate is not None:
                    admitted = self._front.admit(head, self._client.peer, verdict)
                    if isinstance(admitted, LocalAnswer):
                        self._client.skip_body(head)
                        return await self._respond(admitted, head)
                    self._key = admitted
                body = b"" if head.framing is Framing.NONE else await self._read_body(head, known)
            except HttpError as error:
                self._is_idle = False
                shape = shape_of(head.path) if head is not None else Shape.NATIVE
                retry_after_s = 1 if error.status == 503 else 0
                answer = error_answer(shape, error.status, error.message, retry_after_s=retry_after_s)
                await self._respond(answer, None, close=True)
                return False
            if verdict.answer is not None:
                return await self._respond(verdict.answer, head)
            if known.view is not None and self._is_current(known.view):
                await self._client.write(known.view.data)
                return True
            ask = Ask(head, known, body, self._client.peer, self._key)
            found = await self._front.own.find(ask) if known.stages else None
            if found is None:
                return await self._forward(ask)
            return await self._respond(found, head, view_of=known if found.is_view else None)
        finally:
            self._client.let_go()

    async def _read_body(self, head: RequestHead, known: Known) -> bytes:
        """Return the body of a request; b"" for an upload, which is not read before somebody takes it."""
        if not known.uploads:
            return await self._client.read_body(head)
        self._client.expect_body(head)
        return b""

    # --- answers of our own --------------------------------------------------------------------------------

    async def _respond(
        self,
        answer: LocalAnswer,
        head: RequestHead | None,
        *,
        close: bool = False,
        extra: HeaderPairs = (),
        view_of: Known | None = None,
    ) -> bool:
        close = close or self._must_close(head)
        headers = [*answer.headers, *extra, *self._cors_headers]
        if answer.content_type:
            headers.insert(0, (b"Content-Type", answer.content_type))
        headers.append((b"Date", formatdate(usegmt=True).encode()))
        if answer.status != 204:  # which has no body (RFC 9110 §8.6)
            headers.append((b"Content-Length", b"%d" % len(answer.body)))
        headers += _connection_header(head, close=close)
        body = b"" if head is not None and head.method == "HEAD" else answer.body
        written = serialize_response(answer.status, headers)
        if view_of is not None and not close:
            view_of.view = View(self._driver.balancer.fleet.version, int(time.time()), written + body)
        if len(body) <= _JOIN_BYTES_MAX:
            await self._client.write(written + body)
        else:
            await self._client.write(written)
            await self._client.write(body)
        return not close

    def _is_current(self, view: View) -> bool:
        """Tell whether an answer made of the catalog can be given again: that is the same, and so is the `Date`."""
        fleet, front = self._driver.balancer.fleet, self._front
        return view.version == fleet.version and view.second == int(time.time()) and not front.draining

    def _must_close(self, head: RequestHead | None) -> bool:
        return head is None or not head.keep_alive or self._front.draining or self._client.in_body

    # --- answers of servers --------------------------------------------------------------------------------

    async def _forward(self, ask: Ask) -> bool:
        """Let the core decide who answers; return whether another request may follow."""
        named = self._front.next_id()
        if ask.route.batches:
            asked = self._front.own.for_model_now(ask)
            plan = self._front.splitter.plan(asked)
            keep = await self._in_parts(asked, plan, named, ask.facts.model or "") if plan is not None else None
            if keep is not None:
                return keep
        return await self._whole(ask, named)

    async def _in_parts(self, ask: Ask, plan: Plan, named: tuple[int, str], asked: str) -> bool | None:
        """Have a request done in parts, and give the client the one answer; None: it is to go whole.

        `asked` is the model as the client has called it.
        """
        front, (number, tag) = self._front, named
        bodies = plan.inputs.bodies(plan.shares)
        try:
            requests = [self._part_of(ask, plan, bodies.pop(0)) for _ in plan.shares]
        except ValueError:  # an illegal header, of which the whole request tells
            return None
        front.admin.explainer.note_parts(number, [request.tag for request in requests])
        parts = Parts(self._driver, front.splitter, front.bodies, plan, requests, tag)
        keep: bool | None = False
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch_parts, parts, tasks.cancel_scope)
                answer = await parts.run()
                if answer is None and front.draining:
                    answer = error_answer(ask.route.shape, 503, _SHUTTING_DOWN, retry_after_s=1)
                by = ((SERVER_HEADER, parts.servers.encode()),) if parts.servers else ()
                used = ask.facts.model or ""
                if answer is not None and used != asked:
                    answer = renamed_answer(answer, used, asked, ask.route.shape)
                    by = (*by, (MODEL_HEADER, used.encode()))
                ours = (*by, *_about(tag, parts.n_attempts))
                keep = None if answer is None else await self._respond(answer, ask.head, extra=ours)
                tasks.cancel_scope.cancel()
        except* (ClientGone, anyio.BrokenResourceError, anyio.ClosedResourceError):
            keep = False
        finally:
            parts.close()
        return keep

    async def _watch_parts(self, parts: Parts, whole: anyio.CancelScope) -> None:
        await self._client.watch()
        parts.close()
        self._end()
        whole.cancel()

    async def _whole(self, ask: Ask, named: tuple[int, str]) -> bool:
        """Relay the answer that is chosen; a client that leaves ends it at once."""
        head = ask.head
        try:
            request = self._client_request(ask, named)
        except ValueError as error:
            return await self._respond(error_answer(shape_of(head.path), 400, f"illegal header: {error}"), head)
        exchange = self._driver.open(request)
        exchange.on_chosen = partial(self._begin_relay, ask)
        on_left = partial(self._leave, exchange)
        if request.upload is not None or not self._client.watch_by_callback(on_left):
            return await self._whole_while_watching(exchange)
        try:
            await exchange.decided.wait()
            return not exchange.left and await self._give(exchange)
        except (ClientGone, anyio.BrokenResourceError, anyio.ClosedResourceError):
            return False
        finally:
            self._client.unwatch()
            self._driver.close(exchange)

    async def _whole_while_watching(self, exchange: Exchange) -> bool:
        """Do the same where a task is needed that reads from the client meanwhile."""
        keep = False
        reading = anyio.CancelScope()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, exchange, reading, tasks.cancel_scope)
                await exchange.decided.wait()
                reading.cancel()
                keep = await self._give(exchange)
                tasks.cancel_scope.cancel()
        except* (ClientGone, anyio.BrokenResourceError, anyio.ClosedResourceError):
            keep = False
        finally:
            self._driver.close(exchange)
        return keep

    def _leave(self, exchange: Exchange) -> None:
        """The client has left: its attempts are cancelled now, and not when the client's task gets its turn."""
        self._client.leave()
        exchange.leave()
        self._driver.close(exchange)
        self._end()

    async def _give(self, exchange: Exchange) -> bool:
        """Give the client what was decided on; return whether another request may follow."""
        if isinstance(exchange.relay, Relay):
            return await exchange.relay.run()
        if exchange.merge is None or exchange.rejected is not None:
            return await self._refuse(exchange)
        merge, head = exchange.merge, exchange.request.head
        ours = ((SERVER_HEADER, ", ".join(merge.servers).encode()), *_of(exchange))
        if not merge.begun:
            return await self._respond(merge.answer(), head, extra=ours)
        chunked = head.http_version != "1.0"
        close = self._must_close(head) or not chunked
        ours = (*ours, *self._cors_headers, *_connection_header(head, close=close))
        await merge.stream(self._client, ours, chunked=chunked)
        return not close

    async def _watch(self, exchange: Exchange, reading: anyio.CancelScope, whole: anyio.CancelScope) -> None:
        with contextlib.suppress(ClientGone):
            if exchange.request.upload is not None:
                with reading:
                    await self._pass_body(exchange, exchange.request.upload)
                if self._client.in_body:
                    return  # it was decided without the rest of it, which nobody reads any more
            await self._client.watch()
        self._driver.close(exchange)  # now, and not when the cancelled task gets its turn
        self._end()
        whole.cancel()

    async def _pass_body(self, exchange: Exchange, upload: BlobBody) -> None:
        """Pass an upload on to its end; one that cannot be read ends the request. Raises ClientGone."""
        try:
            await self._client.pass_body(exchange.request.head, upload)
        except HttpError as error:
            if not exchange.decided.is_set():
                self._driver.close(exchange)
                exchange.reject(RejectRequest(exchange.request.request_id, error.status, error.message))

    def _part_of(self, ask: Ask, plan: Plan, body: bytes) -> ClientRequest:
        part = self._client_request(ask, self._front.next_id(), body)
        return replace(part, servers=plan.servers)

    def _client_request(self, ask: Ask, named: tuple[int, str], body: bytes | None = None) -> ClientRequest:
        """Return what the core and the servers get. Raises ValueError for an illegal header."""
        (number, tag), head, route, known = named, ask.head, ask.route, ask.known
        body = ask.body if body is None else body
        upload: BlobBody | None = None
        n_bytes: int | None = len(body)
        if known.uploads and head.framing is not Framing.NONE:
            n_bytes = head.content_length if head.framing is Framing.LENGTH else None
            upload = BlobBody(n_bytes, self._driver.balancer.config.timeouts.silence_ns / SECOND_NS)
        plain = route.generates or ask.show_key is not None
        make = partial(self._front.head_parts, head, n_bytes, self._client.peer, plain=plain)
        parts = known.parts((n_bytes, self._client.peer, plain), make)
        key = ask.key.name if ask.key is not None else ""
        servers = ask.servers
        if servers:  # of more names than there are servers, one is unknown, and that is all that is to be said of them
            servers = servers[: len(self._driver.balancer.fleet.servers) + 1]
        facts, shape = ask.facts, known.shape
        return ClientRequest(number, tag, head, route, shape, facts, body, parts, servers, upload, key, ask.place)

    def _begin_relay(self, ask: Ask, exchange: Exchange, run: AttemptRun) -> None:
        if run.answer is not None:
            relay = exchange.relay = self._new_relay(ask, exchange, run, run.answer)
            used = ((MODEL_HEADER, run.sent_as.encode()),) if run.sent_as else ()
            ours = ((SERVER_HEADER, run.endpoint.name.encode()), *used, *self._cors_headers)
            about = b"%s: %s\r\n%s: %d\r\n" % (TAG_HEADER, exchange.request.tag.encode(), N_HEADER, exchange.n_attempts)
            relay.begin(close=self._must_close(exchange.request.head), ours=ours, about=about)

    def _new_relay(self, ask: Ask, exchange: Exchange, run: AttemptRun, answer: Answer) -> Relay:
        if ask.show_key is not None and run.sent_as == ask.show_model and answer.head.status < 400:
            shows, key = self._front.own.shows, ask.show_key
            return ShowRelay(exchange, run, answer, self._client, self._driver, shows, key)
        if run.sent_as:
            return RenamingRelay(exchange, run, answer, self._client, self._driver, ask.facts.model or "")
        return Relay(exchange, run, answer, self._client, self._driver)

    async def _refuse(self, exchange: Exchange) -> bool:
        request, refusal = exchange.request, exchange.rejected
        status, message = (refusal.status, refusal.message) if refusal is not None else (502, "no answer")
        retry_after_s = refusal.retry_after_s if refusal is not None else 0
        answer = error_answer(request.shape, status, message, request.tag, retry_after_s=retry_after_s)
        return await self._respond(answer, request.head, extra=_of(exchange))


def _of(exchange: Exchange) -> HeaderPairs:
    return _about(exchange.request.tag, exchange.n_attempts)


def _about(tag: str, n_attempts: int) -> HeaderPairs:
    return ((TAG_HEADER, tag.encode()), (N_HEADER, b"%d" % n_attempts))


def _connection_header(head: RequestHead | None, *, close: bool) -> list[tuple[bytes, bytes]]:
    if close:
        return [(b"Connection", b"close")]
    if head is not None and head.http_version == "1.0":
        return [(b"Connection", b"keep-alive")]
    return []
