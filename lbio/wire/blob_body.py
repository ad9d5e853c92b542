"""A request body on its way to several servers at once: one reader, many writers, bounded, the slowest decides.

What was read and not yet taken by every server stands in one window. While that is full, nothing is read from the
client, which feels it; so a body of any size takes the same memory. Servers join before the first byte is taken, each
at its own pace from there on; one that leaves is waited for no longer.
"""

from __future__ import annotations

import anyio
from anyio.abc import ByteStream

from lbio.http1 import LAST_CHUNK, encode_chunk
from lbio.wire.sockets import send_while_taken

WINDOW_BYTES = 256 << 10
"""How far the fastest server may be ahead of the slowest; what is held may be one read from the client more."""
PIECE_BYTES = 64 << 10
"""What a server takes at once, and holds until it is sent."""


class BlobBody:
    """The body of one request, as much of it as is on its way.

    `length` is in bytes, None when only its end will tell. A server that takes nothing for `patience_s` is given up.
    """

    __slots__ = ("_begin", "_ended", "_more", "_room", "_takers", "_wanted", "_window", "length", "patience_s")

    def __init__(self, length: int | None, patience_s: float) -> None:
        self.length = length
        self.patience_s = patience_s
        self._window = bytearray()
        self._begin = 0  # where in the body the window begins
        self._ended = False
        self._takers: list[Taker] = []
        self._wanted = anyio.Event()  # one of them could be sent something
        self._more = anyio.Event()  # has come, or the end: renewed whenever it is set
        self._room = anyio.Event()  # is in the window: likewise

    def __repr__(self) -> str:
        return f"<BlobBody {self._end} of {self.length or '?'} bytes, {len(self._window)} held for {self._takers}>"

    @property
    def _end(self) -> int:
        return self._begin + len(self._window)

    # --- the reader ----------------------------------------------------------------------------------------

    async def wait_wanted(self) -> None:
        """Wait until somebody can take the first byte."""
        await self._wanted.wait()

    def put(self, piece: bytes) -> None:
        """Add what has come, however full the window is: `has_room` tells whether more may be read."""
        self._window += piece
        self._tell_more()

    @property
    def has_room(self) -> bool:
        """Whether the window is not full."""
        return len(self._window) < WINDOW_BYTES

    async def wait_room(self) -> None:
        """Wait until the slowest has taken enough; for ever when nobody takes anything any more."""
        while not self.has_room:
            await self._room.wait()

    def end(self) -> None:
        """All of it has come."""
        self._ended = True
        self._tell_more()

    def _tell_more(self) -> None:
        self._more.set()
        self._more = anyio.Event()

    # --- the writers ---------------------------------------------------------------------------------------

    def join(self) -> Taker:
        """Let one more server take the body. Raises RuntimeError when its beginning has gone."""
        if self._begin:
            raise RuntimeError(f"{self!r}: its beginning is not held any more")
        taker = Taker(self)
        self._takers.append(taker)
        return taker

    async def take(self, taker: Taker) -> bytes:
        """Return what follows for a taker as soon as there is something, b"" at the end.

        Raises anyio.ClosedResourceError when it has left, or all is over: what it would get then is not what follows.
        """
        self._wanted.set()
        while taker.at == self._end and not self._ended and taker in self._takers:
            await self._more.wait()
        if taker not in self._takers:
            raise anyio.ClosedResourceError
        first = taker.at - self._begin
        with memoryview(self._window) as window:
            return bytes(window[first : first + PIECE_BYTES])

    def let_go(self) -> None:
        """Forget what all have taken. Without takers nothing is: another one may join in place of the last."""
        if not self._takers:
            return
        n_taken = min([taker.at for taker in self._takers]) - self._begin
        if n_taken:
            del self._window[:n_taken]
            self._begin += n_taken
            if self.has_room:
                self._room.set()
                self._room = anyio.Event()

    def leave(self, taker: Taker) -> None:
        """Wait for one of them no longer; harmless when it has left."""
        if taker in self._takers:
            self._takers.remove(taker)
            self.let_go()

    def close(self) -> None:
        """Let go of everything: the request is over."""
        self._takers.clear()
        self._window = bytearray()
        self._tell_more()


class Taker:
    """One server's share in a body."""

    __slots__ = ("_body", "at")

    def __init__(self, body: BlobBody) -> None:
        self._body = body
        self.at = 0  # so many bytes were taken

    def __repr__(self) -> str:
        return f"<Taker at {self.at}>"

    async def take(self) -> bytes:
        """Return the next piece as soon as there is one, b"" at the end. Raises anyio.ClosedResourceError."""
        piece = await self._body.take(self)
        self.at += len(piece)
        self._body.let_go()
        return piece

    async def send_to(self, stream: ByteStream) -> None:
        """Send all of the body, as it comes.

        Raises TimeoutError when the server takes nothing for as long as the patience lasts, and what `stream` raises.
        """
        patience_s = self._body.patience_s
        is_chunked = self._body.length is None
        while piece := await self.take():
            await send_while_taken(stream, encode_chunk(piece) if is_chunked else piece, patience_s)
        if is_chunked:
            await send_while_taken(stream, LAST_CHUNK, patience_s)

    def leave(self) -> None:
        """Take no more; harmless when done before."""
        self._body.leave(self)
