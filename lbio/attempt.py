"""One attempt: send the request to one server, read its answer until it is chosen, and tell the core."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

import anyio

from lbcore.events import (
    AttemptConnected,
    AttemptFailed,
    BufferFilled,
    Event,
    FirstTokenReceived,
    HeadReceived,
    Reason,
    StreamEnded,
)
from lbcore.ollama import PASS_THROUGH, RequestKind
from lbio.exchange import ClientRequest, Exchange
from lbio.http1 import HttpError, IncompleteBody, ResponseHead
from lbio.upstream import Answer, ConnectError, Connection, Endpoint, read_response_head
from lbio.wire.blob_body import Taker

_JOIN_BYTES_MAX = 65536  # a head and a body up to this size are sent at once
_DETAIL_CHARS_MAX = 200
_NOT_FOUND = re.compile(rb'"model[^{}]{0,300}not found|not found, try pulling')
_MODEL_OUTPUT = (b"application/x-ndjson", b"application/json", b"text/event-stream")
_ELSEWHERE = frozenset({401, 403, 407, 408, 425, 429})


class Core(Protocol):
    """What an attempt needs of the driver."""

    def dispatch(self, event: Event) -> None:
        """Give the core an event and carry out what it commands."""

    def note_chunk(self, attempt_id: int, n_bytes: int, n_tokens: int) -> None:
        """Count a piece of an answer."""

    def note_paused(self, attempt_id: int, *, paused: bool) -> None:
        """Tell the core that an answer cannot be expected yet, or that it can."""


def reason_of(status: int, body: bytes | bytearray, *, passed_through: bool) -> Reason:
    """Return what an error status means for the question who could answer better."""
    if status == 404:
        if _NOT_FOUND.search(body[:4096]) is not None:
            return Reason.MODEL_NOT_FOUND
        # An unknown path is unknown to every Ollama; a known one may be too new for this server.
        return Reason.CLIENT_ERROR if passed_through else Reason.ELSEWHERE
    if status == 503:
        return Reason.BUSY
    if status in _ELSEWHERE:
        return Reason.ELSEWHERE
    return Reason.SERVER_ERROR if status >= 500 else Reason.CLIENT_ERROR


class AttemptRun:
    """The task of one attempt. Once chosen, its answer belongs to the client's connection, which reads the rest."""

    __slots__ = (
        "_buffer_bytes_max",
        "_connection",
        "_core",
        "_head_bytes_max",
        "_left",
        "_parked",
        "_reported",
        "_scope",
        "_taker",
        "_telling",
        "_unsent",
        "answer",
        "attempt_id",
        "chosen",
        "endpoint",
        "exchange",
        "sent_as",
    )

    def __init__(
        self,
        attempt_id: int,
        exchange: Exchange,
        endpoint: Endpoint,
        core: Core,
        head_bytes_max: int,
        buffer_bytes_max: int,
    ) -> None:
        self.attempt_id = attempt_id
        self.exchange = exchange
        self.endpoint = endpoint
        self.sent_as = exchange.sent_as  # the model that the server is asked for; "": the one that the client names
        self.answer: Answer | None = None
        self.chosen = False
        self._core = core
        self._head_bytes_max = head_bytes_max
        self._buffer_bytes_max = buffer_bytes_max
        self._scope = anyio.CancelScope()
        self._connection: Connection | None = None
        self._unsent: list[bytes] = []  # what of the request is still to be sent on the connection
        self._taker: Taker | None = None  # of a body that is passed on as it comes
        self._reported = False  # its end was told to the core
        self._parked = False  # its task waits for nothing but to be chosen or cancelled
        self._telling = False  # its task is telling the core something, and so is not waiting
        self._left = anyio.Event()  # the task reads no more

    def __repr__(self) -> str:
        return f"<AttemptRun {self.attempt_id} on {self.endpoint.name}{' chosen' if self.chosen else ''}>"

    # --- called by the driver, never waiting ---------------------------------------------------------------

    def begin(self) -> None:
        """Send the request now if an idle connection is there to take it, so that no racer waits for the others' tasks.

        A request that changes something is never put on such a one: if it has died, the request could have been
        carried out. A server joins those that take an upload before anything of that is taken.
        """
        if self.exchange.request.upload is not None:
            self._taker = self.exchange.request.upload.join()
        if self.exchange.request.facts.kind is RequestKind.MANAGE:
            return
        connection = self._connection = self.endpoint.pooled()
        if connection is not None:
            self._unsent = self._wire(self.exchange.request)
            self._unsent[0] = self._unsent[0][connection.send_nowait(self._unsent[0]) :]

    def choose(self, *, passed_on: bool) -> None:
        """Hand the answer over to the client's connection."""
        self.chosen = True
        self.exchange.choose(self, passed_on=passed_on)
        if not self._telling:
            self._scope.cancel()

    def cancel(self) -> bool:
        """Close the connection now; tell whether there was one."""
        self._reported = True
        if self._taker is not None:
            self._taker.leave()
        connection, self._connection = self._connection, None
        # The task waits for the connection, and wakes as that is closed; cancelling the scope as well would cost more
        # than all the rest of this, which the other losers of a race are waiting for.
        if connection is None or not connection.close() or self._parked:
            self._scope.cancel()
        if self.chosen:
            self.exchange.relay_scope.cancel()
        return connection is not None

    # --- the task ------------------------------------------------------------------------------------------

    async def run(self, log_defect: Callable[[BaseException], None]) -> None:
        """Run until the answer is chosen, has ended, or has failed."""
        with self._scope:
            try:
                await self._run()
            except anyio.ClosedResourceError:  # by `cancel`, which wakes the task before the cancellation does
                self._fail(Reason.RESET, "closed")
            except Exception as error:  # noqa: BLE001  one attempt must not end the program
                log_defect(error)
                self._fail(Reason.GARBAGE, f"{type(error).__name__} in the load balancer")
        self._left.set()
        if not self.chosen:
            self.retire()

    async def hand_over(self) -> None:
        """Return when the task of the attempt reads no more, so that its chooser can.

        It may have been chosen by another's event, while it was waiting for the next piece.
        """
        await self._left.wait()

    def retire(self) -> None:
        """Give the connection back if it can carry another request, close it if not; harmless when done before."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self.answer is not None and self.answer.is_reusable:
            self.endpoint.release(connection)
        else:
            connection.close()

    async def _run(self) -> None:
        if self._reported:
            return  # cancelled before it could begin
        try:
            head = await self._send()
        except ConnectError as error:
            self._fail(error.reason, str(error))
            return
        except HttpError as error:
            self._fail(Reason.GARBAGE, error.message)
            return
        except anyio.BrokenResourceError as error:
            self._fail(Reason.RESET, str(error))
            return
        connection = self._connection
        if head is None or connection is None:
            self._fail(Reason.RESET, "")
            return
        route = self.exchange.request.route
        if route.generates and head.status < 300 and not _is_model_output(head, plain=route.plain):
            # such as the page of a captive portal, which would win every race
            self._fail(Reason.GARBAGE, f"it is {(head.header(b'content-type') or b'of no type').decode('latin-1')}")
            return
        self.answer = Answer(connection, head, route.ending)
        try:
            await self._read(self.answer)
        except IncompleteBody as error:
            self._fail(Reason.TRUNCATED, str(error), status=head.status)
        except HttpError as error:
            self._fail(Reason.GARBAGE, error.message, status=head.status)

    async def _send(self) -> ResponseHead | None:
        """Send the request and return the head of the answer; None when the server closed without a byte.

        A pooled connection may have died while it was idle: then the request is sent once more on a fresh one.
        """
        request = self.exchange.request  # kept: the exchange lets go of the body once its client has been served
        pooled = self._connection
        if pooled is not None:
            self._tell(AttemptConnected(self.attempt_id))
            received = pooled.reader.bytes_received
            try:
                head = await self._ask(pooled)
            except anyio.BrokenResourceError:
                head = None
                if pooled.reader.bytes_received > received:
                    raise
            if head is not None:
                return head
            pooled.close()
            self.endpoint.drop_idle()
        self._connection = None
        self._connection = fresh = await self.endpoint.dial()
        self._unsent = self._wire(request)
        if pooled is None:
            self._tell(AttemptConnected(self.attempt_id))
        return await self._ask(fresh)

    def _wire(self, request: ClientRequest) -> list[bytes]:
        head, body = request.head_for(self.endpoint.authority, self.endpoint.credentials), request.body
        return [head + body] if len(body) <= _JOIN_BYTES_MAX else [head, body]

    async def _ask(self, connection: Connection) -> ResponseHead | None:
        connection.n_requests += 1
        unsent, self._unsent = self._unsent, []
        large_body = unsent.pop() if len(unsent) > 1 else b""
        try:
            for piece in unsent:
                if piece:
                    await connection.stream.send(piece)
        except anyio.BrokenResourceError:
            pass  # the server may have refused before the body was sent: its answer may still be there
        if self._taker is not None:
            return await self._read_head_while(connection, partial(self._upload, connection, self._taker))
        if large_body:
            return await self._read_head_while(connection, partial(connection.send_body, large_body))
        return await self._read_head(connection)

    async def _upload(self, connection: Connection, taker: Taker) -> None:
        """Send a body as it comes: how long that takes is for the client, and for the slowest server, to say."""
        self._core.note_paused(self.attempt_id, paused=True)
        try:
            await connection.send_upload(taker)
        except TimeoutError as error:
            self._fail(Reason.SILENCE_TIMEOUT, f"of the body {error}")
            connection.close()
        finally:
            taker.leave()
            self._core.note_paused(self.attempt_id, paused=False)

    async def _read_head(self, connection: Connection) -> ResponseHead | None:
        return await read_response_head(connection, self.exchange.request.head.method, self._head_bytes_max)

    async def _read_head_while(
        self, connection: Connection, send: Callable[[], Coroutine[Any, Any, None]]
    ) -> ResponseHead | None:
        """Send a large body, but no more of it once the server has refused it, or of an upload, has answered."""
        head: ResponseHead | None = None
        problems: list[Exception] = []  # raised where they arise, they would come out as a group
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            try:
                head = await self._read_head(connection)
            except (HttpError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                problems.append(error)
            if head is None or head.status >= 300 or self._taker is not None:
                tasks.cancel_scope.cancel()
        if problems:
            raise problems.pop()  # a name for it here would make a cycle, which keeps the body
        return head

    async def _read(self, answer: Answer) -> None:
        status = answer.head.status
        if status < 400:
            self._tell(HeadReceived(self.attempt_id, status))
        begun = False
        full = False
        merge = self.exchange.merge
        while not answer.ended:
            payload = await answer.read()
            n_tokens = answer.watcher.feed(payload)
            self._core.note_chunk(self.attempt_id, len(payload), n_tokens)
            if merge is not None and merge.is_stream and status < 400:
                merge.feed(self.endpoint.name, payload)
            else:
                answer.held += payload
            if not begun and status < 400 and (answer.watcher.n_tokens if answer.streams else payload):
                begun = True
                self._tell(FirstTokenReceived(self.attempt_id))
            if self._is_over():
                return
            if not full and len(answer.held) > self._buffer_bytes_max:
                full = True
                self._overflow(answer)
                if self._is_over():
                    return
                self._parked = True
                await anyio.sleep_forever()  # until it is chosen or cancelled; the server feels it as backpressure
        self.report_end(answer)

    def _is_over(self) -> bool:
        """Somebody else reads the answer now, or nobody does."""
        return self.chosen or self._reported

    def _overflow(self, answer: Answer) -> None:
        if answer.head.status < 400 and self.exchange.merge is not None:
            self._fail(Reason.GARBAGE, "a very long answer", status=answer.head.status)
        elif answer.head.status < 400:
            self._tell(BufferFilled(self.attempt_id))
        else:
            self._fail(
                reason_of(answer.head.status, answer.held, passed_through=False),
                "a very long error",
                status=answer.head.status,
            )

    def report_end(self, answer: Answer) -> None:
        """Tell the core, once, how the answer ended."""
        status, verdict = answer.head.status, answer.verdict
        if status >= 400:
            route = self.exchange.request.route  # of a blob, 404 is the answer
            reason = reason_of(status, answer.held, passed_through=route is PASS_THROUGH or route.uploads)
            self._fail(reason, shortened(answer.held), status=status, answered=True)
        elif verdict is not None:
            self._fail(verdict, "", status=status, answered=verdict is Reason.ERROR_LINE)
        elif not self._reported:
            self._reported = True
            if self.exchange.merge is not None:
                self.exchange.merge.end(self.endpoint.name, status=status, body=bytes(answer.held))
            self._tell(StreamEnded(self.attempt_id))

    def report_broken(self, reason: Reason, detail: str) -> None:
        """Tell the core that the committed answer broke off."""
        self._fail(reason, detail)

    def _fail(self, reason: Reason, detail: str, *, status: int = 0, answered: bool = False) -> None:
        if not self._reported:
            self._reported = True
            if self._taker is not None:  # before the core is told: another server may join in place of this one
                self._taker.leave()
            if self.exchange.merge is not None:
                held = bytes(self.answer.held) if answered and self.answer is not None else b""
                words = detail or reason
                self.exchange.merge.end(self.endpoint.name, reason=reason, words=words, status=status, body=held)
            self._tell(AttemptFailed(self.attempt_id, reason, status, detail, answered=answered))

    def _tell(self, event: Event) -> None:
        self._telling = True
        try:
            self._core.dispatch(event)
        finally:
            self._telling = False


def _is_model_output(head: ResponseHead, *, plain: bool) -> bool:
    said = (head.header(b"content-type") or b"").lower()
    return said.startswith(_MODEL_OUTPUT) or (plain and said.startswith(b"text/plain"))


def shortened(body: bytes | bytearray) -> str:
    """Return the words of an error body, for a log line."""
    match = re.search(rb'"(?:error|message)"\s*:\s*"((?:[^"\\]|\\.)*)', body[:4096])
    text = (match[1] if match is not None else bytes(body[:_DETAIL_CHARS_MAX])).decode(errors="replace")
    if match is not None and "\\" in text:
        with contextlib.suppress(ValueError):
            text = json.loads(f'"{text}"')
    return " ".join(text.split())[:_DETAIL_CHARS_MAX]
