"""The load balancer as a state machine: events in, commands out; nothing here waits, reads a clock or does I/O.

    commands = balancer.handle(event, now_ns)
    commands = balancer.handle_timeout(now_ns)
    deadline = balancer.next_deadline()

Same settings, seed and events give the same commands, byte for byte. Times are int nanoseconds of the driver's choice
of origin, never going backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from lbcore import events
from lbcore.attempts import Attempts
from lbcore.broadcast import Broadcast
from lbcore.commands import Command
from lbcore.compiling import mypyc_attr
from lbcore.config import Config
from lbcore.errors import UnknownEventError
from lbcore.events import Event
from lbcore.fleet import Fleet
from lbcore.ledger import Ledger
from lbcore.placement import Placement
from lbcore.provision import Provision
from lbcore.records import Server
from lbcore.requests import Requests
from lbcore.timers import TimerKind, Timers


@mypyc_attr(allow_interpreted_subclasses=True)
class LoadBalancer:
    """All decisions of ollama-lb. `ledger` holds what is under way, `fleet` the servers.

    `placement_type` makes the part that chooses servers: another one is another policy.
    """

    def __init__(
        self,
        config: Config,
        rng: Random,
        placement_type: Callable[[Config, Fleet, Random], Placement] = Placement,
    ) -> None:
        self.config = config
        self.timers = Timers()
        self.next_deadline = self.timers.next_deadline
        """`next_deadline()` tells when `handle_timeout` is due next, ns, or None; called after each event."""
        self._out: list[Command] = []
        self.fleet = Fleet(config, self.timers, self._out)
        self.ledger = Ledger(config, self.fleet, self.timers, self._out)
        self.placement = placement_type(config, self.fleet, rng)
        self.provision = Provision(config, self.fleet, self.timers, self._out)
        self._broadcast = Broadcast(self.fleet, self.ledger, self.placement, self.provision, self._out)
        self._requests = Requests(
            config, self.fleet, self.ledger, self.placement, self._broadcast, self.timers, self._out
        )
        self._attempts = Attempts(
            config, self.fleet, self.ledger, self._requests, self._broadcast, self.timers, self._out
        )
        self._handlers: dict[type, Callable[[Any, int], None]] = {
            events.RequestArrived: self._requests.on_arrived,
            events.DownstreamClosed: self._requests.on_downstream_closed,
            events.DrainDeadlinePassed: self._requests.on_drain_deadline_passed,
            events.AttemptConnected: self._attempts.on_connected,
            events.HeadReceived: self._attempts.on_head,
            events.FirstTokenReceived: self._attempts.on_first_token,
            events.BufferFilled: self._attempts.on_buffer_filled,
            events.StreamEnded: self._attempts.on_ended,
            events.AttemptFailed: self._attempts.on_failed,
            events.ProbeCompleted: self._on_probe_completed,
            events.ModelsSynced: self._on_models_synced,
            events.JobProgressed: self._on_job_progressed,
            events.JobEnded: self._on_job_ended,
            events.ServerAdded: self._on_server_added,
            events.ServerRemovalRequested: self._on_server_removal_requested,
            events.SyncRequested: self._on_sync_requested,
        }
        self._timeouts: dict[TimerKind, Callable[[int, int], None]] = {
            TimerKind.ATTEMPT: self._attempts.on_timer,
            TimerKind.MEASURE: self._attempts.on_measure_timer,
            TimerKind.HEDGE: self._requests.on_hedge_timer,
            TimerKind.QUEUE: self._on_queue_timer,
            TimerKind.PROBE: self._on_probe_timer,
            TimerKind.JOB: self.provision.on_stalled,
            TimerKind.REVIEW: lambda _owner, now_ns: self.provision.review(now_ns),
        }

    def __repr__(self) -> str:
        ledger = self.ledger
        under_way = f"{len(ledger.requests)} requests, {len(ledger.attempts)} attempts, {len(ledger.queue)} queued"
        return f"<LoadBalancer {under_way}, {list(self.fleet)}>"

    # --- the contract ----------------------------------------------------------------------------------------

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """Take one event and return what to do, in order.

        Total: an event about something that is over, or that does not fit its state, changes nothing. Raises
        UnknownEventError for an object that is not an event.
        """
        try:
            handler = self._handlers[type(event)]
        except KeyError:
            raise UnknownEventError(event) from None
        handler(event, now_ns)
        if self.ledger.room_made:
            self._use_room(now_ns)
        out = self._out
        if not out:
            return []
        commands = out[:]
        out.clear()
        return commands

    def handle_timeout(self, now_ns: int) -> list[Command]:
        """Take every timer that is due; a spurious call returns nothing."""
        while (due := self.timers.pop_due(now_ns)) is not None:
            self._timeouts[due[0]](due[1], now_ns)
        if self.ledger.room_made:
            self._use_room(now_ns)
        commands = self._out[:]
        self._out.clear()
        return commands

    def note_chunk(self, attempt_id: int, n_bytes: int, n_tokens: int, now_ns: int) -> None:
        """Count a piece of an answer (hot path: no event, no allocation)."""
        attempt = self.ledger.attempts.get(attempt_id)
        if attempt is not None:
            attempt.n_bytes += n_bytes
            attempt.n_tokens += n_tokens
            attempt.last_chunk_ns = now_ns

    def note_paused(self, attempt_id: int, *, paused: bool, now_ns: int) -> None:
        """Tell that the driver reads, or does not read, an answer: silence of its own making is not the server's.

        It does not, either, while it is not done with sending the request.
        """
        attempt = self.ledger.attempts.get(attempt_id)
        if attempt is not None:
            attempt.paused = paused
            attempt.last_chunk_ns = now_ns

    def _use_room(self, now_ns: int) -> None:
        """Look at the queue, since an attempt has ended or a server has changed."""
        self.ledger.room_made = False
        if self._requests.stuck:
            self._requests.rescue_stuck(now_ns)
        if self.ledger.queue.waiting:
            self._requests.serve_queue(now_ns)

    def _on_queue_timer(self, request_id: int, now_ns: int) -> None:
        if self.ledger.room_made:  # by another timer of the same moment: who waits may have it
            self._use_room(now_ns)
        self._requests.on_queue_timer(request_id, now_ns)

    # --- servers ---------------------------------------------------------------------------------------------

    def _on_probe_completed(self, event: events.ProbeCompleted, now_ns: int) -> None:
        server = self.fleet.on_probe_completed(event, now_ns)
        if server is not None and event.reason is not None:  # after a good one, ModelsSynced follows
            self._after_failed_probe(server, now_ns)

    def _on_probe_timer(self, server_id: int, now_ns: int) -> None:
        server = self.fleet.on_probe_timer(server_id, now_ns)
        if server is not None:
            self._after_failed_probe(server, now_ns)

    def _after_failed_probe(self, server: Server, now_ns: int) -> None:
        if not server.is_alive:
            self._requests.rescue_from(server, now_ns)
        self.ledger.room_made = True  # what waited for this probe waits no longer
        self.provision.review(now_ns)

    def _on_models_synced(self, event: events.ModelsSynced, now_ns: int) -> None:
        server = self.fleet.on_models_synced(event, now_ns)
        if server is not None:
            self._attempts.look_at_loads(server, now_ns)
            self.provision.review(now_ns)
        self.ledger.room_made = True

    def _on_job_progressed(self, event: events.JobProgressed, now_ns: int) -> None:
        self.ledger.late_events += not self.provision.on_progressed(event, now_ns)

    def _on_job_ended(self, event: events.JobEnded, now_ns: int) -> None:
        self.ledger.late_events += not self.provision.on_ended(event, now_ns)

    def _on_server_added(self, event: events.ServerAdded, now_ns: int) -> None:
        if self.fleet.by_name(event.settings.name) is None:
            self.fleet.add(event.settings, now_ns)
        else:
            self.ledger.late_events += 1

    def _on_server_removal_requested(self, event: events.ServerRemovalRequested, _now_ns: int) -> None:
        server = self.fleet.servers.get(event.server_id)
        if server is None:
            self.ledger.late_events += 1
            return
        self.provision.cancel_on(server)
        self.fleet.drain(server)
        self.ledger.room_made = True

    def _on_sync_requested(self, _event: events.SyncRequested, now_ns: int) -> None:
        for server in list(self.fleet):
            server.revive_from_ns = 0  # an operator knows better
            self.fleet.probe_now(server, now_ns)
