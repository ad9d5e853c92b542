"""The relay of a chosen answer to its client: what is held, every piece as it comes, and a good or an honest end."""

from __future__ import annotations

from typing import ClassVar, Protocol

import anyio

from lbcore.ollama import error_tail
from lbio.attempt import AttemptRun
from lbio.client import ClientGone, ClientStream
from lbio.exchange import Exchange
from lbio.http1 import (
    LAST_CHUNK,
    Framing,
    HeaderPairs,
    ResponseHead,
    encode_chunk,
    size_line,
)
from lbio.upstream import Answer
from lbio.wire.headers import written_head
from lbio.wire.watchers import Watcher

_TAIL_BYTES_MAX = 65536
"""A line whose beginning is longer than this is passed on as it comes."""


class Core(Protocol):
    """What the relay needs of the driver."""

    def note_chunk(self, attempt_id: int, n_bytes: int, n_tokens: int) -> None:
        """Count a piece of an answer."""

    def note_paused(self, attempt_id: int, *, paused: bool) -> None:
        """Tell the core that an answer is, or is not, being read."""


class Splice:
    """The sink of a stream that is being relayed: passes on, as it came, what is one chunk with one ordinary line.

    Such a line, one token, is all that mostly comes, and nothing of it needs to be taken apart or framed anew. All else
    is the attempt's to take. This runs once for each token, so it is one function, and what it needs is at hand.
    """

    __slots__ = ("_attempt_id", "_ending", "_note", "_relay", "_run", "_send", "_watcher")

    def __init__(self, relay: Relay, run: AttemptRun, watcher: Watcher, client: ClientStream, core: Core) -> None:
        self._relay = relay
        self._run = run
        self._attempt_id = run.attempt_id
        self._watcher = watcher
        self._ending = watcher.ordinary_ending + b"\r\n"
        self._send = client.send_nowait
        self._note = core.note_chunk

    def take(self, data: bytes) -> None:
        """Pass a piece on, or leave it to the attempt."""
        size = len(data)
        begin = size_line(size)
        if not (
            self._relay.at_rest
            and data.endswith(self._ending)
            and data.startswith(begin)
            and data.find(b"\n", len(begin)) == size - 3
            and b'"error"' not in data
            and begin
        ):
            self._run.take(data)
            return
        self._watcher.n_tokens += 1
        self._note(self._attempt_id, size - len(begin) - 2, 1)
        try:
            at = self._send(data)
        except (ClientGone, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            self._relay.lose(error)
        else:
            if at < size:
                self._relay.lag(data[at:])

    def take_end(self, why: str) -> None:
        """Leave the end to the attempt."""
        self._run.take_end(why)


class Relay:
    """Gives one client the answer that was chosen for it.

    What comes is written in the very call that brings it. What the client does not take at once is left to the client's
    own task (`run`), and nothing more is taken from the server until it has been written.
    """

    __slots__ = (
        "_answer",
        "_client",
        "_close",
        "_core",
        "_exchange",
        "_framing",
        "_is_closed",
        "_is_line_open",
        "_news",
        "_problem",
        "_run",
        "_scope",
        "_tail",
        "_unsent",
        "_write_nowait",
        "at_rest",
    )
    is_verbatim: ClassVar = True
    """The body goes on as it is, and nobody else needs to see it."""

    def __init__(self, exchange: Exchange, run: AttemptRun, answer: Answer, client: ClientStream, core: Core) -> None:
        self._exchange = exchange
        self._run = run
        self._answer = answer
        self._client = client
        self._write_nowait = client.write_nowait
        self._core = core
        self._framing = Framing.NONE
        self._close = True
        self._unsent = bytearray()  # what the client did not take
        self._scope: anyio.CancelScope | None = None  # of writing that
        self._news: anyio.Event | None = None  # the task waits for it
        self._problem: Exception | None = None  # why nothing can be written
        self._tail = b""  # the beginning of a line, kept back until the rest of it has come
        self._is_line_open = False  # the client has got the beginning of a line
        self._is_closed = False  # the end of the body was written, or is unsent
        self.at_rest = False  # all that has come is on its way, and ended with a line and a chunk

    # --- called as things happen, never waiting ------------------------------------------------------------

    def begin(self, *, close: bool, ours: HeaderPairs, about: bytes) -> None:
        """Write the head and what is held; what goes wrong shows in `run`.

        Called as the answer is chosen: the client has its first token before the losers are let go.
        `ours` are headers that many answers have, `about` are lines of the head that belong to this one.
        """
        self._close = close
        try:
            answer = self._answer
            held = bytes(answer.held)
            answer.held.clear()
            lines = self._whole_lines(held)
            head, self._framing = written_head(self._head(len(lines)), self._exchange.request.head, ours, close=close)
            self._write(b"".join((head, about, b"\r\n", self._framed(lines), self._closing())))
            if self.is_verbatim and self._framing is answer.head.framing is Framing.CHUNKED:
                self.at_rest = self._is_at_rest()
                self._run.give_to(Splice(self, self._run, answer.watcher, self._client, self._core))
        except Exception as error:  # noqa: BLE001  it is the client's connection that fails, not the core's commands
            self._problem = error
        if not self._unsent and self._problem is None:
            self._run.resume()  # it may have been paused for holding too much

    def _head(self, n_bytes: int) -> ResponseHead:  # noqa: ARG002  for those that change the body
        """Return the head that the server gave; `n_bytes` of the body are at hand."""
        return self._answer.head

    def feed(self, payload: bytes) -> None:
        """Write the next piece of the body, and after the last one the end of it, if that is a good one."""
        try:
            lines = self._whole_lines(payload)
            self._write(self._framed(lines) + self._closing())
        except Exception as error:  # noqa: BLE001  as above
            self._problem = error
        self.at_rest = self._is_at_rest()
        if self._problem is not None or self._unsent or self._answer.ended:
            self.wake()

    def lag(self, rest: bytes) -> None:
        """Take note that the client did not take all of what was spliced."""
        self._leave(rest)
        self.wake()

    def lose(self, error: Exception) -> None:
        """Take note that nothing can be written to the client any more."""
        self._problem = error
        self.wake()

    def wake(self) -> None:
        """Let the task look again."""
        if self._news is not None:
            self._news.set()
        must_stop = self._exchange.left or self._exchange.aborted is not None
        if self._scope is not None and must_stop:
            self._scope.cancel()

    def _is_at_rest(self) -> bool:
        return not self._tail and not self._unsent and self._answer.is_at_rest

    def _write(self, data: bytes) -> None:
        """Write what the client takes at once. Raises ClientGone."""
        if not data:
            return
        at = self._write_nowait(data) if not self._unsent else 0
        if at < len(data):
            self._leave(data[at:])

    def _leave(self, data: bytes) -> None:
        """Leave what the client does not take to its task; the server has to wait."""
        self._unsent += data
        self.at_rest = False
        self._run.pause()

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

    def _framed(self, payload: bytes) -> bytes:
        return encode_chunk(payload) if self._framing is Framing.CHUNKED else payload

    def _closing(self) -> bytes:
        """Return the end of the body once the answer has ended, and ended well."""
        answer, exchange = self._answer, self._exchange
        if not answer.ended or self._is_closed or exchange.aborted is not None:
            return b""
        if not (exchange.passed_on or answer.verdict is None):
            return b""  # the core has yet to be told, and to say what is to be done
        self._is_closed = True
        return LAST_CHUNK if self._framing is Framing.CHUNKED else b""

    # --- the client's task ---------------------------------------------------------------------------------

    async def run(self) -> bool:
        """See the relay to its end; return whether the connection can carry another request. Raises ClientGone."""
        while True:
            if self._problem is not None:
                raise self._problem
            if self._exchange.left:
                raise ClientGone
            if self._exchange.aborted is not None:
                break
            if self._unsent:
                await self._drain()
            elif self._run.is_read:
                break
            else:
                self._news = anyio.Event()
                await self._news.wait()
                self._news = None
        return await self._end() and not self._close and self._framing is not Framing.CLOSE

    async def _drain(self) -> None:
        """Write what a slow client has left; nothing is read from the server meanwhile: its silence is not its own."""
        self._core.note_paused(self._run.attempt_id, paused=True)
        data = bytes(self._unsent)
        with anyio.CancelScope() as self._scope:
            await self._client.write(data)
            del self._unsent[: len(data)]
        self._scope = None
        self._core.note_paused(self._run.attempt_id, paused=False)
        self.at_rest = self._is_at_rest()
        if not self._unsent:
            self._run.resume()

    async def _end(self) -> bool:
        """Write the end of the body if it is still missing; return whether the client got a whole message."""
        answer, aborted = self._answer, self._exchange.aborted
        if aborted is None or self._is_closed:
            if answer.ended and not self._is_closed and self._framing is Framing.CHUNKED:
                await self._client.write(LAST_CHUNK)
            return answer.ended and not self._unsent
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
