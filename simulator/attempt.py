"""One attempt in the simulated world: the twin of `lbio.attempt`, with planned moments for sockets. Times are ns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from lbcore.events import (
    AttemptConnected,
    AttemptFailed,
    Event,
    FirstTokenReceived,
    HeadReceived,
    Reason,
    StreamEnded,
)
from simulator.box import Box
from simulator.kernel import Kernel
from simulator.reports.results import AttemptResult
from simulator.workloads.asks import Ask

BYTES_PER_TOKEN = 4
"""Of a prompt, on its way to the server: English text, as the fakes count it."""
CHUNK_BYTES = 120
"""Of one token in a native stream: its JSON line with its framing."""


class Core(Protocol):
    """What an attempt needs of the world."""

    def dispatch(self, event: Event) -> None:
        """Give the core an event and carry out what it commands."""

    def note_chunk(self, attempt_id: int, n_bytes: int, n_tokens: int, at_ns: int) -> None:
        """Count a piece of an answer."""

    def gate(self, at_ns: int) -> int:
        """Return when the balancer gets to see what reaches it at a moment."""


class AttemptRun:
    """One attempt, from the connection to its end."""

    __slots__ = (
        "_arrives_ns",
        "_box",
        "_core",
        "_kernel",
        "_on_server",
        "_reaches_ns",
        "ask",
        "attempt_id",
        "begun",
        "closed",
        "ended_well",
        "gaps",
        "noted",
        "result",
        "status",
    )

    def __init__(self, ask: Ask, result: AttemptResult, box: Box, core: Core, kernel: Kernel) -> None:
        self.ask = ask
        self.attempt_id = result.attempt_id
        self.result = result
        self.begun = False  # the balancer has its first token
        self.closed = False  # nobody listens to it any more
        self.ended_well = False
        self.status = 0  # of a failure, 0: no answer
        self.noted = 0  # tokens that the core was told of
        self.gaps: list[tuple[float, int]] = []  # (tokens, ns between them), once it has left its server
        self._box = box
        self._core = core
        self._kernel = kernel
        self._reaches_ns = 0  # when the last message to the server arrives there
        self._arrives_ns = 0  # when the last message from it arrives here
        self._on_server = False

    def __repr__(self) -> str:
        return f"<AttemptRun {self.attempt_id} of {self.ask.id} on {self._box.spec.name}>"

    @property
    def server(self) -> str:
        """The name of its server."""
        return self._box.spec.name

    # --- from the balancer -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, on a connection that is there already if there is one, and send the request."""
        box, kernel = self._box, self._kernel
        if box.idle_connections:
            box.idle_connections -= 1
            kernel.at(kernel.now_ns, self._connected)
        elif not box.wire.is_silent(kernel.now_ns):  # else nobody ever answers
            there_ns = box.wire.arrival_ns(kernel.now_ns)
            kernel.at(there_ns, self._knock)

    def cancel(self) -> None:
        """Close the connection; the server hears of it when that has arrived."""
        if not self.closed:
            self.closed = True
            self._to_server(self._leave)

    def tokens_by(self, now_ns: int) -> tuple[int, int]:
        """Return how many tokens have reached the balancer, and when the last one did."""
        if self.ended_well or self.closed or not self._on_server:
            return self.noted, 0
        latency_ns = self._box.wire.link.latency_ns
        made, last_ns = self._box.fake.made(self.attempt_id, now_ns - latency_ns)
        return max(made, self.noted), min(now_ns, last_ns + latency_ns)

    def _knock(self) -> None:
        wire, now_ns = self._box.wire, self._kernel.now_ns
        if self._box.is_up:
            self._kernel.at(self._core.gate(wire.arrival_ns(now_ns)), self._connected)
        elif not wire.is_silent(now_ns):
            self._kernel.at(self._core.gate(wire.arrival_ns(now_ns)), self._refused)

    def _refused(self) -> None:
        self._report(AttemptFailed(self.attempt_id, Reason.CONNECT_REFUSED))

    def _connected(self) -> None:
        if self.closed:
            return
        self._core.dispatch(AttemptConnected(self.attempt_id))
        if not self.closed:
            self._to_server(self._receive, BYTES_PER_TOKEN * self.ask.prompt_tokens)

    def _to_server(self, do: Any, n_bytes: int = 0) -> None:
        now_ns = self._kernel.now_ns
        if self._box.wire.is_silent(now_ns):
            return
        self._reaches_ns = max(self._reaches_ns, self._box.wire.arrival_ns(now_ns, n_bytes))
        self._kernel.at(self._reaches_ns, do)

    def _receive(self) -> None:
        if not self.closed:
            self._on_server = True
            self._box.receive(self)

    def _leave(self) -> None:
        if self._on_server:
            self._off_server(self._kernel.now_ns)
            self._box.leave(self)

    # --- from the server -------------------------------------------------------------------------------------

    def on_started(self, now_ns: int) -> None:
        """It has a slot."""
        self.result.slot_ns = now_ns

    def on_first_token(self, now_ns: int) -> None:
        """Its first token is made."""
        self.result.first_token_ns = now_ns
        if self.ask.stream:
            self._to_balancer(now_ns, self._first_arrives)

    def on_whole(self, now_ns: int) -> None:
        """Its answer is whole."""
        self._off_server(now_ns)
        self._to_balancer(now_ns, self._whole_arrives)

    def on_failed(self, now_ns: int, reason: Reason, status: int, detail: str, *, answered: bool) -> None:
        """It is answered with an error, or its connection has ended."""
        self._off_server(now_ns)
        failed = AttemptFailed(self.attempt_id, reason, status, detail, answered=answered)
        self._to_balancer(now_ns, self._failure_arrives, failed)

    def on_lost(self, now_ns: int) -> None:
        """It is gone, and nobody will ever be told."""
        self._off_server(now_ns)

    def _off_server(self, now_ns: int) -> None:
        """Note what it has cost, as long as the server knows of it."""
        if not self._on_server:
            return
        self._on_server = False
        fake, result = self._box.fake, self.result
        result.tokens = fake.made(self.attempt_id, now_ns)[0] if result.slot_ns is not None else 0
        self.gaps = fake.gaps(self.attempt_id, now_ns)
        if result.slot_ns is not None:
            result.busy_ns = now_ns - result.slot_ns

    def _to_balancer(self, now_ns: int, do: Any, *args: Any) -> None:
        if self._box.wire.is_silent(now_ns):
            return
        self._arrives_ns = max(self._arrives_ns, self._core.gate(self._box.wire.arrival_ns(now_ns)))
        self._kernel.at(self._arrives_ns, do, *args)

    def _first_arrives(self) -> None:
        if self.closed:
            return
        self.begun = True
        self._core.dispatch(HeadReceived(self.attempt_id, 200))
        self._note(max(1, self.noted))
        self._report(FirstTokenReceived(self.attempt_id))

    def _whole_arrives(self) -> None:
        if self.closed:
            return
        if not self.ask.stream:
            self.begun = True
            self._core.dispatch(HeadReceived(self.attempt_id, 200))
            self._note(1)
            self._report(FirstTokenReceived(self.attempt_id))
        self._note(self.ask.output_tokens)
        self.ended_well = True
        if self._box.is_up:
            self._box.idle_connections += 1
        self._report(StreamEnded(self.attempt_id))

    def _failure_arrives(self, failed: AttemptFailed) -> None:
        if failed.status == 200 and not self.begun and not self.closed:  # cut before the first token, after the head
            self._core.dispatch(HeadReceived(self.attempt_id, 200))
        if self.begun and not self.closed:
            self._note(max(self.noted, self.result.tokens))
            if failed.reason is Reason.RESET:  # the head is there: its body is what ends too early
                failed = replace(failed, reason=Reason.TRUNCATED, status=200)
        self.status = failed.status
        self._report(failed)

    def _note(self, tokens: int) -> None:
        """Tell the core of tokens up to this count."""
        further = tokens - self.noted
        if further > 0:
            self.noted = tokens
            self._core.note_chunk(self.attempt_id, further * CHUNK_BYTES, further, self._kernel.now_ns)

    def sync(self, now_ns: int) -> None:
        """Tell the core of what has come since it was last told."""
        if not self.begun or self.closed or self.ended_well:
            return
        tokens, last_ns = self.tokens_by(now_ns)
        further = tokens - self.noted
        if further > 0:
            self.noted = tokens
            self._core.note_chunk(self.attempt_id, further * CHUNK_BYTES, further, last_ns)

    def _report(self, event: Event) -> None:
        if not self.closed:
            self._core.dispatch(event)
