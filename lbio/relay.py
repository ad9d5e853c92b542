"""The byte pump after an answer was chosen: what is held, every piece as it comes, and a good or an honest end."""

from __future__ import annotations

from typing import Protocol

from lbcore.events import Event, Reason
from lbcore.ollama import error_tail
from lbio.attempt import AttemptRun
from lbio.client import ClientStream
from lbio.exchange import Exchange
from lbio.http1 import (
    LAST_CHUNK,
    Framing,
    HeaderPairs,
    HttpError,
    IncompleteBody,
    ResponseHead,
    encode_chunk,
    serialize_response,
)
from lbio.upstream import Answer
from lbio.wire.headers import downstream_headers

_TAIL_BYTES_MAX = 65536
"""A line whose beginning is longer than this is passed on as it comes."""


class Core(Protocol):
    """What the relay needs of the driver."""

    def dispatch(self, event: Event) -> None:
        """Give the core an event and carry out what it commands."""

    def note_chunk(self, attempt_id: int, n_bytes: int, n_tokens: int) -> None:
        """Count a piece of an answer."""

    def note_paused(self, attempt_id: int, *, paused: bool) -> None:
        """Tell the core that an answer is, or is not, being read."""


class Relay:
    """Gives one client the answer that was chosen for it."""

    __slots__ = (
        "_answer",
        "_client",
        "_close",
        "_core",
        "_exchange",
        "_framing",
        "_is_line_open",
        "_problem",
        "_run",
        "_tail",
        "_unsent",
    )

    def __init__(self, exchange: Exchange, run: AttemptRun, answer: Answer, client: ClientStream, core: Core) -> None:
        self._exchange = exchange
        self._run = run
        self._answer = answer
        self._client = client
        self._core = core
        self._framing = Framing.NONE
        self._close = True
        self._unsent = b""
        self._problem: Exception | None = None  # why it could not begin
        self._tail = b""  # the beginning of a line, kept back until the rest of it has come
        self._is_line_open = False  # the client has got the beginning of a line

    def begin(self, *, close: bool, ours: HeaderPairs) -> None:
        """Write the head and what is held, as far as the socket takes it; what goes wrong shows in `run`.

        Called as the answer is chosen: the client has its first token before the losers are let go.
        """
        self._close = close
        try:
            answer = self._answer
            held = bytes(answer.held)
            answer.held.clear()
            lines = self._whole_lines(held)
            client_head = self._exchange.request.head
            headers, self._framing = downstream_headers(self._head(len(lines)), client_head, close=close, ours=ours)
            head = serialize_response(answer.head.status, headers, answer.head.reason)
            data = head + self._framed(lines)
            self._unsent = data[self._client.write_nowait(data) :]
        except Exception as error:  # noqa: BLE001  it is the client's connection that fails, not the core's commands
            self._problem = error

    def _head(self, n_bytes: int) -> ResponseHead:  # noqa: ARG002  for those that change the body
        """Return the head that the server gave; `n_bytes` of the body are at hand."""
        return self._answer.head

    async def run(self) -> bool:
        """Relay the rest; return whether the connection can carry another request. Raises ClientGone."""
        if self._problem is not None:
            raise self._problem
        with self._exchange.relay_scope:
            if self._unsent:
                await self._write(self._unsent)
                self._unsent = b""
            await self._pump()
        return await self._end() and not self._close and self._framing is not Framing.CLOSE

    async def _pump(self) -> None:
        answer, run, core = self._answer, self._run, self._core
        await run.hand_over()
        # Its task may have read on: it had been woken by a piece before another's event made it the winner.
        held = bytes(answer.held)
        answer.held.clear()
        await self._write_lines(held)
        try:
            while not answer.ended:
                payload = await answer.read()
                n_tokens = answer.watcher.feed(payload)
                core.note_chunk(run.attempt_id, len(payload), n_tokens)
                await self._write_lines(payload)
        except IncompleteBody as error:
            run.report_broken(Reason.TRUNCATED, str(error))
        except HttpError as error:
            run.report_broken(Reason.GARBAGE, error.message)
        else:
            if not self._exchange.passed_on:
                run.report_end(answer)

    async def _write_lines(self, payload: bytes) -> None:
        if lines := self._whole_lines(payload):
            await self._write(self._framed(lines))

    def _whole_lines(self, payload: bytes) -> bytes:
        """Return what of a stream can go on: whole lines (events), so that a break never leaves half of one behind.

        A server writes a line at once, so this delays nothing in practice; the rest follows with the answer's end.
        """
        data = self._tail + payload if self._tail else payload
        n_kept = 0 if self._answer.ended else len(self._answer.watcher.partial)
        if n_kept > _TAIL_BYTES_MAX:
            n_kept = 0
        self._is_line_open = n_kept == 0 and not self._answer.watcher.at_line_start
        if n_kept == 0:
            self._tail = b""
            return data
        self._tail = data[-n_kept:]
        return data[:-n_kept]

    async def _write(self, data: bytes) -> None:
        at = self._client.write_nowait(data)
        if at < len(data):
            # A slow client: nothing more is read from the server meanwhile, whose silence is then not its own.
            self._core.note_paused(self._run.attempt_id, paused=True)
            await self._client.write(data[at:])
            self._core.note_paused(self._run.attempt_id, paused=False)

    def _framed(self, payload: bytes) -> bytes:
        return encode_chunk(payload) if self._framing is Framing.CHUNKED else payload

    async def _end(self) -> bool:
        """Write the end of the body; return whether the client got a whole message."""
        answer, aborted = self._answer, self._exchange.aborted
        if aborted is None:
            if answer.ended and self._framing is Framing.CHUNKED:
                await self._client.write(LAST_CHUNK)
            return answer.ended
        if self._client.writing or self._unsent or not answer.streams or self._framing is Framing.LENGTH:
            return False  # the message cannot be completed: closing early is what tells the client
        # Else the server has told of the error itself, or of the end, and all that is missing is the end of the body.
        if not (answer.watcher.failed or answer.watcher.terminated):
            break_line = b"\n\n" if self._is_line_open else b""
            request = self._exchange.request
            tail = error_tail(request.shape, aborted, request.tag, ending=request.route.ending)
            await self._client.write(self._framed(break_line + tail))
        if self._framing is Framing.CHUNKED:
            await self._client.write(LAST_CHUNK)
        return True
