"""One request as the I/O layer holds it while the core decides about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import anyio

from lbcore.commands import RejectRequest
from lbcore.ollama import BodyFacts, Route, Shape
from lbio.access.credentials import NO_CREDENTIALS, Credentials
from lbio.http1 import Headers, RequestHead, serialize_request
from lbio.wire.blob_body import BlobBody
from lbio.wire.model_place import ModelPlace

if TYPE_CHECKING:
    from lbio.answers.merge import Merge
    from lbio.attempt import AttemptRun


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """What a client asked: read whole, but for an upload, and not changed any more."""

    request_id: int
    tag: str  # how the request is called in headers and logs
    head: RequestHead
    route: Route
    shape: Shape
    facts: BodyFacts
    body: bytes
    head_parts: tuple[bytes, bytes]  # as servers get it: what stands before and after the value of `Host`
    servers: tuple[str, ...] = ()  # the only ones that may be asked, as the client wants it or for the sake of a part
    upload: BlobBody | None = None  # instead of `body`: one that is passed on as it comes
    key: str = ""  # the name of the client's key
    place: ModelPlace | None = None  # of an alias: where the body names it

    def head_for(self, authority: bytes, credentials: Credentials = NO_CREDENTIALS) -> bytes:
        """Return the request head for one server."""
        before, after = self.head_parts
        return before + authority + credentials.written_into(after)

    def naming(self, model: str) -> ClientRequest:
        """Return the same request for another model, where it is known where the body names that."""
        if self.place is None:
            return self
        body, place = self.place.renamed(self.body, model)
        before, after = self.head_parts
        after = after.replace(_LENGTH % len(self.body), _LENGTH % len(body), 1)
        return replace(self, body=body, place=place, head_parts=(before, after))


_LARGE_BODY_BYTES = 4096
_LENGTH = b"\r\nContent-Length: %d\r\n"

def head_parts(head: RequestHead, headers: Headers) -> tuple[bytes, bytes]:
    """Return the head that servers get, written and checked once for all of them, in two parts around their names.

    Raises ValueError for what must not be written.
    """
    written = serialize_request(head.method, head.origin_form, [(b"Host", b"-"), *headers])
    before, _, after = written.partition(b"\r\nHost: -\r\n")
    return before + b"\r\nHost: ", b"\r\n" + after


class Receiver(Protocol):
    """Who gets the answer that was chosen: the client's relay, or what puts parts together."""

    def feed(self, payload: bytes) -> None:
        """Take the next piece of the body, perhaps an empty one; `answer.ended` tells whether it is the last."""

    def wake(self) -> None:
        """Look again: the answer has broken off, was aborted, or the client has left."""


class Exchange:
    """What the core has decided about one request so far. Written by the driver, read by the client's connection."""

    __slots__ = (
        "aborted",
        "chosen",
        "decided",
        "left",
        "merge",
        "n_attempts",
        "on_chosen",
        "passed_on",
        "rejected",
        "relay",
        "request",
        "runs",
        "sent_as",
    )

    def __init__(self, request: ClientRequest) -> None:
        self.request = request
        self.runs: dict[int, AttemptRun] = {}  # those whose answer may still be wanted
        self.decided = anyio.Event()
        self.chosen: AttemptRun | None = None  # whose answer the client gets
        self.on_chosen: Callable[[Exchange, AttemptRun], None] | None = None  # begins `relay`
        self.relay: Receiver | None = None  # who gets it
        self.merge: Merge | None = None  # instead of a chosen one, when all answers make one
        self.passed_on = False  # it is an error, held whole
        self.rejected: RejectRequest | None = None  # an answer of our own instead
        self.aborted: str | None = None  # why a committed stream ends early
        self.left = False  # the client has
        self.n_attempts = 0
        self.sent_as = ""  # the model that servers are asked for, if it is not what the client has written

    def use(self, model: str) -> None:
        """Ask servers for this model from now on; none is being asked."""
        self.request = self.request.naming(model)
        self.sent_as = model

    def choose(self, run: AttemptRun, *, passed_on: bool) -> None:
        """Give the client this attempt's answer."""
        self.chosen = run
        self.passed_on = passed_on
        if self.on_chosen is not None:
            self.on_chosen(self, run)
        self.decided.set()

    def reject(self, command: RejectRequest) -> None:
        """Give the client an error of our own."""
        self.rejected = command
        self.decided.set()

    def close(self) -> None:
        """Let go of all that is large: cancelled tasks refer to an exchange until the next search for cycles."""
        self.runs.clear()
        self.chosen = self.relay = self.merge = self.on_chosen = None
        if self.request.upload is not None:
            self.request.upload.close()
        if len(self.request.body) > _LARGE_BODY_BYTES:
            self.request = replace(self.request, body=b"")

    def abort(self, why: str) -> None:
        """End the committed stream as broken."""
        self.aborted = why
        if self.merge is not None:
            self.merge.abort(why)
            self.decided.set()
        self.wake()

    def leave(self) -> None:
        """Whoever waits for something is to wait no more: the client has left."""
        self.left = True
        self.decided.set()
        if self.merge is not None:
            self.merge.finish()
        self.wake()

    def wake(self) -> None:
        """Let who gets the answer look again."""
        if self.relay is not None:
            self.relay.wake()
