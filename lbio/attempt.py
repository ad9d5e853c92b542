"""One attempt: send the request to one server, take its answer as it comes, and tell the core."""

from __future__ import annotations

import contextlib
from typing import Protocol

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
from lbio.http1 import INSIDE_HEAD, HttpError, IncompleteBody, ResponseHead, parse_response_head
from lbio.upstream import INTERIM_MAX, Answer, ConnectError, Connection, Endpoint
from lbio.verdicts import is_model_output, reason_of, shortened
from lbio.wire.blob_body import Taker
from lbio.wire.sockets import Sink

_JOIN_BYTES_MAX = 65536  # a head and a body up to this size are sent at once


class Core(Protocol):
    """What an attempt needs of the driver."""

    def dispatch(self, event: Event) -> None:
        """Give the core an event and carry out what it commands."""

    def note_chunk(self, attempt_id: int, n_bytes: int, n_tokens: int) -> None:
        """Count a piece of an answer."""

    def note_paused(self, attempt_id: int, *, paused: bool) -> None:
        """Tell the core that an answer cannot be expected yet, or that it can."""

    def spawn(self, run: AttemptRun) -> None:
        """Run the task of an attempt."""

    def note_over(self, run: AttemptRun) -> None:
        """Look whether the core still knows an attempt."""

    def note_defect(self, error: BaseException) -> None:
        """Tell of a defect of the program: one attempt must not end it."""


class AttemptRun:
    """One attempt, and the sink of what its server sends: that is held until it is chosen, then it is for the relay.

    Where the connection's stream calls back, this takes no task. A task dials, sends what does not go out at once, and
    takes what comes where nobody calls back (`run`).
    """

    __slots__ = (
        "_begun", "_buffer_bytes_max", "_calls_back", "_connection", "_core", "_has_head", "_head_bytes_max",
        "_is_connected", "_is_fresh", "_n_interim", "_reported", "_resumed", "_scope", "_sending", "_sink",
        "_taker", "_unsent", "answer", "attempt_id", "chosen", "endpoint", "exchange", "is_read", "sent_as",
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
        self._sink: Sink = self  # who takes what comes
        self.is_read = False  # nothing more is taken: the answer has ended or broken off, or is not wanted
        self._core = core
        self._head_bytes_max = head_bytes_max
        self._buffer_bytes_max = buffer_bytes_max
        self._connection: Connection | None = None
        self._is_fresh = False  # the connection was made for this attempt
        self._is_connected = False  # the core was told so
        self._calls_back = False  # the connection's stream gives us what comes
        self._unsent: list[bytes] = []  # what of the request is still to be sent on the connection
        self._taker: Taker | None = None  # of a body that is passed on as it comes
        self._scope: anyio.CancelScope | None = None  # of the task
        self._sending: anyio.CancelScope | None = None  # of that part of it which sends the request
        self._resumed: anyio.Event | None = None  # nothing is taken before that
        self._n_interim = 0  # 1xx answers so far
        self._has_head = False  # the head was told to the core, or the first token that came with it
        self._begun = False  # the first token was told to the core
        self._reported = False  # its end was told to the core

    def __repr__(self) -> str:
        return f"<AttemptRun {self.attempt_id} on {self.endpoint.name}{' chosen' if self.chosen else ''}>"

    # --- called by the driver, never waiting ---------------------------------------------------------------

    def begin(self) -> None:
        """Send the request now if an idle connection is there to take it, so that no racer waits for the others.

        A request that changes something is never put on such a one: if it has died, the request could have been
        carried out. A server joins those that take an upload before anything of that is taken.
        """
        if self.exchange.request.upload is not None:
            self._taker = self.exchange.request.upload.join()
        if self.exchange.request.facts.kind is RequestKind.MANAGE:
            return
        connection = self._connection = self.endpoint.pooled()
        if connection is not None:
            first, *rest = self._wire(self.exchange.request)
            first = first[connection.send_nowait(first) :]
            self._unsent = [first, *rest] if first or rest else []

    def go_on(self) -> None:
        """Take the answer from now on: without a task if the request is out and the stream calls back."""
        if self._connection is not None and not self.is_read:
            self._note_connected()
        if self.is_read:  # cancelled before it could begin
            return
        if self._connection is not None and not self._unsent and self._taker is None:
            self._calls_back = self._connection.give_to(self._sink)
        if not self._calls_back:
            self._core.spawn(self)

    def choose(self, *, passed_on: bool) -> None:
        """Give its answer to the client."""
        self.chosen = True
        self.exchange.choose(self, passed_on=passed_on)

    def cancel(self) -> bool:
        """Close the connection now; tell whether there was one."""
        self._reported = self.is_read = True
        if self._taker is not None:
            self._taker.leave()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._scope is not None:
            self._scope.cancel()
        if self.chosen:
            self.exchange.wake()
        return connection is not None

    def look(self) -> None:
        """Look, now and then, whether the connection is still heard."""
        if self._calls_back and self._connection is not None:
            self._connection.look()

    def retire(self) -> None:
        """Give the connection back if it can carry another request, close it if not; harmless when done before."""
        connection, self._connection = self._connection, None
        self.is_read = True
        self._sink = self  # else the relay and this would hold each other
        if connection is None:
            return
        is_reusable = self.answer is not None and self.answer.is_reusable
        self.endpoint.release(connection) if is_reusable else connection.close()

    # --- called by who gets the answer ---------------------------------------------------------------------

    def pause(self) -> None:
        """Take nothing more until `resume`; the server feels it as backpressure."""
        self._resumed = self._resumed or anyio.Event()
        if self._connection is not None and self._calls_back:
            self._connection.keep()

    def give_to(self, sink: Sink) -> None:
        """Let another take what comes."""
        self._sink = sink
        if self._connection is not None and self._calls_back and not self.is_read and self._resumed is None:
            self._connection.give_to(sink)

    def resume(self) -> None:
        """Go on where it was paused."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None
            self.give_to(self._sink)

    # --- the task ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Dial if there is no connection, send what is unsent, and take the answer where nobody calls back."""
        with anyio.CancelScope() as self._scope:
            try:
                while not self.is_read and not self._calls_back:
                    connection = self._connection
                    if connection is None:
                        connection = await self._dial()
                    if not self.is_read:
                        await self._serve(connection)
            except ConnectError as error:
                self._fail(error.reason, str(error))
            except Exception as error:  # noqa: BLE001  one attempt must not end the program
                self._note_defect(error)
        self._scope = None

    async def _dial(self) -> Connection:
        request = self.exchange.request  # kept: the exchange lets go of the body once its client has been served
        connection = self._connection = await self.endpoint.dial()
        self._is_fresh = True
        self._unsent = self._wire(request)
        self._note_connected()
        return connection

    def _wire(self, request: ClientRequest) -> list[bytes]:
        head, body = request.head_for(self.endpoint.authority, self.endpoint.credentials), request.body
        return [head + body] if len(body) <= _JOIN_BYTES_MAX else [head, body]

    async def _serve(self, connection: Connection) -> None:
        """Send the request, and meanwhile take the answer: it may be a refusal of a large body."""
        self._calls_back = connection.give_to(self._sink)
        if self._calls_back:
            await self._send(connection)
        elif self._taker is None and len(self._unsent) < 2:
            await self._send(connection)
            await self._pump(connection)
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._send, connection)
                await self._pump(connection)
                if self._sending is not None:
                    self._sending.cancel()

    async def _send(self, connection: Connection) -> None:
        unsent, self._unsent = self._unsent, []
        large_body = unsent.pop() if len(unsent) > 1 else b""
        with anyio.CancelScope() as self._sending:
            # A server may have refused before all was sent: then its answer may still be there.
            with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                for piece in unsent:
                    await connection.stream.send(piece)
            if self._taker is not None:
                await self._upload(connection, self._taker)
            elif large_body:
                await connection.send_body(large_body)
        self._sending = None

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

    async def _pump(self, connection: Connection) -> None:
        """Take what comes, piece by piece, where nobody calls back."""
        while not self.is_read and self._connection is connection:
            if self._resumed is not None:
                await self._resumed.wait()
                continue
            try:
                data = await connection.reader.more()
            except anyio.BrokenResourceError as error:
                self._sink.take_end(str(error) or "reset")
            except anyio.ClosedResourceError:  # by `cancel`
                return
            else:
                self._sink.take(data) if data else self._sink.take_end("")

    # --- what the server sends -----------------------------------------------------------------------------

    def take(self, data: bytes) -> None:
        """Take the next piece of the answer."""
        answer = self.answer
        try:
            if answer is None:
                self._take_head(data)
            else:
                self._take_body(answer, data)
        except HttpError as error:
            self._break(Reason.GARBAGE, error.message)
        except Exception as error:  # noqa: BLE001  one attempt must not end the program
            self._note_defect(error)

    def take_end(self, why: str) -> None:
        """Nothing more comes; `why`: the connection broke."""
        try:
            if self.answer is not None:
                self.answer.take_end(why)
                self._took(self.answer, b"")
            else:
                self._end_before_head(why)
        except IncompleteBody as error:
            self._break(Reason.TRUNCATED, str(error))
        except Exception as error:  # noqa: BLE001  as above
            self._note_defect(error)

    def _end_before_head(self, why: str) -> None:
        """Ask once more on a fresh connection if a pooled one has died while it was idle; it is nobody's fault."""
        connection = self._connection
        has_begun = self._n_interim > 0 or (connection is not None and bool(connection.reader.buffered))
        if has_begun and not why:
            self._break(Reason.GARBAGE, INSIDE_HEAD)
        elif has_begun or self._is_fresh or connection is None:
            self._break(Reason.RESET, why)
        else:
            connection.close()
            self.endpoint.drop_idle()
            self._connection = None
            self._calls_back = False
            if self._sending is not None:
                self._sending.cancel()
            if self._scope is None:
                self._core.spawn(self)

    def _take_head(self, data: bytes) -> None:
        connection = self._connection
        if connection is None:
            return
        connection.reader.buffered += data
        while (raw := connection.reader.take_head(self._head_bytes_max, role="response")) is not None:
            head = parse_response_head(raw, self.exchange.request.head.method)
            if head.status >= 200:
                self._begin_answer(connection, head)
                return
            self._n_interim += 1
            if self._n_interim >= INTERIM_MAX:
                raise HttpError(502, "too many interim answers")

    def _begin_answer(self, connection: Connection, head: ResponseHead) -> None:
        route = self.exchange.request.route
        if route.generates and head.status < 300 and not is_model_output(head, plain=route.plain):
            # such as the page of a captive portal, which would win every race
            self._fail(Reason.GARBAGE, f"it is {(head.header(b'content-type') or b'of no type').decode('latin-1')}")
            return
        answer = self.answer = Answer(connection, head, route.ending)
        if self._sending is not None and (head.status >= 300 or self._taker is not None):
            self._sending.cancel()  # no more of the body is wanted
        if connection.reader.buffered and not answer.ended:
            rest = bytes(connection.reader.buffered)
            connection.reader.buffered.clear()
            self._take_body(answer, rest)
        else:
            self._took(answer, b"")

    def _take_body(self, answer: Answer, data: bytes) -> None:
        payload = answer.take(data)
        n_tokens = answer.watcher.feed(payload)
        self._core.note_chunk(self.attempt_id, len(payload), n_tokens)
        self._took(answer, payload)

    def _took(self, answer: Answer, payload: bytes) -> None:
        """Hand on, or hold, what came of the body, and tell the core what there is to tell."""
        if not self.chosen:
            self._hold(answer, payload)
            payload = b""
        if answer.ended and not self.is_read:
            self.report_end(answer)
        relay = self.exchange.relay
        if self.chosen and relay is not None:
            if payload or answer.ended:
                relay.feed(payload)
        elif len(answer.held) > self._buffer_bytes_max and not self.is_read:
            self._overflow(answer)

    def _hold(self, answer: Answer, payload: bytes) -> None:
        status, merge = answer.head.status, self.exchange.merge
        if merge is not None and merge.is_stream and status < 400:
            merge.feed(self.endpoint.name, payload)
        else:
            answer.held += payload
        if self._begun or status >= 400:
            return
        if answer.watcher.n_tokens if answer.streams else payload:
            self._begun = True
            self._core.dispatch(FirstTokenReceived(self.attempt_id))
        elif not self._has_head:
            self._core.dispatch(HeadReceived(self.attempt_id, status))
        self._has_head = True

    def _overflow(self, answer: Answer) -> None:
        if answer.head.status >= 400:
            reason = reason_of(answer.head.status, answer.held, passed_through=False)
            self._fail(reason, "a very long error", status=answer.head.status)
        elif self.exchange.merge is not None:
            self._fail(Reason.GARBAGE, "a very long answer", status=answer.head.status)
        else:
            self.pause()  # until it is chosen, which may be now, or cancelled
            self._core.dispatch(BufferFilled(self.attempt_id))

    # --- its end, told to the core once --------------------------------------------------------------------

    def report_end(self, answer: Answer) -> None:
        """Tell the core how the answer ended."""
        self._stop()
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
            self._end(StreamEnded(self.attempt_id))

    def _break(self, reason: Reason, detail: str) -> None:
        """The answer broke off."""
        self._stop()
        status = self.answer.head.status if self.answer is not None and not self.chosen else 0
        self._fail(reason, detail, status=status)
        if self.chosen:
            self.exchange.wake()

    def _stop(self) -> None:
        """Take nothing more."""
        self.is_read = True
        if self._connection is not None:
            self._connection.keep()

    def _note_defect(self, error: Exception) -> None:
        self._core.note_defect(error)
        self._break(Reason.GARBAGE, f"{type(error).__name__} in the load balancer")

    def _fail(self, reason: Reason, detail: str, *, status: int = 0, answered: bool = False) -> None:
        if not self._reported:
            self._reported = True
            if self._taker is not None:  # before the core is told: another server may join in place of this one
                self._taker.leave()
            if self.exchange.merge is not None:
                held = bytes(self.answer.held) if answered and self.answer is not None else b""
                words = detail or reason
                self.exchange.merge.end(self.endpoint.name, reason=reason, words=words, status=status, body=held)
            self._end(AttemptFailed(self.attempt_id, reason, status, detail, answered=answered))

    def _end(self, event: Event) -> None:
        self._core.dispatch(event)
        if not self.chosen:
            self.retire()
        self._core.note_over(self)

    def _note_connected(self) -> None:
        if not self._is_connected:
            self._is_connected = True
            self._core.dispatch(AttemptConnected(self.attempt_id))
