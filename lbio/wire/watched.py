"""A socket and the tasks that wait for it."""

import contextlib
import socket

import anyio


class Watched:
    """A socket and the tasks that wait for it.

    The event loop knows sockets by descriptor number. If the number went to another socket before a woken
    waiter has run, anyio's clean-up for the old one would unregister the new one, whose task would then sleep
    for ever. So while somebody waits, the connection is ended at once but the number is given back by the
    last waiter as it leaves, in the same turn of the loop.
    """

    __slots__ = ("closed", "sock", "waiting")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.closed = False
        self.waiting = 0

    async def readable(self) -> None:
        """Wait until there is something to receive. Raises anyio's ClosedResourceError, BusyResourceError."""
        self.waiting += 1
        try:
            await anyio.wait_readable(self.sock)
        finally:
            self._left()

    async def writable(self) -> None:
        """Wait until there is room to send. Raises anyio's ClosedResourceError, BusyResourceError."""
        self.waiting += 1
        try:
            await anyio.wait_writable(self.sock)
        finally:
            self._left()

    def _left(self) -> None:
        self.waiting -= 1
        if self.closed and not self.waiting:
            self.sock.close()

    def close(self, *, end: bool = True) -> None:
        """Close and wake the waiters (ClosedResourceError); `end=False`: the peer is to see no clean end."""
        if self.closed:
            return
        self.closed = True
        if not self.waiting:
            self.sock.close()
            return
        with contextlib.suppress(RuntimeError):  # no event loop any more, so nobody to wake either
            anyio.notify_closing(self.sock)
        if end:
            with contextlib.suppress(OSError):  # the peer may have ended it already
                self.sock.shutdown(socket.SHUT_RDWR)
