"""A world just rich enough to drive a balancer of any policy: servers of different speed, faults, clients that leave.

No queues and no batches: that is the simulator's task. Here it only matters that everything happens that can happen,
that every step is audited, and that a run can be repeated.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from lbcore import commands as cmd
from lbcore import events
from lbcore.commands import Decision
from lbcore.config import Config, ProbeSettings, RaceSettings, ServerSettings
from lbcore.events import Reason
from lbcore.invariants import Auditor
from lbcore.ollama import RequestKind, default_routes
from lbcore.schema import MS_NS, SECOND_NS
from simulator.policies.known import POLICIES, policy

MODELS = ("m:latest", "n:7b")
SPEEDS_MS = (40, 60, 80, 120, 400)
TOKEN_NS = 20 * MS_NS


def config_of(n_servers: int, *, slots: int = 2) -> Config:
    """Return a fleet with default settings, but for quicker probes."""
    servers = tuple(ServerSettings(url=f"http://s{i}:1", name=f"s{i}", slots=slots) for i in range(n_servers))
    probe = ProbeSettings(interval_ns=2 * SECOND_NS, interval_dead_ns=SECOND_NS // 2, interval_dead_max_ns=SECOND_NS)
    return Config(servers=servers, routes=default_routes(RaceSettings()), probe=probe)


@dataclass
class SmallWorld:
    """Drives one balancer. `faults` is the share of attempts and probes that fail, and of clients that leave."""

    name: str
    n_servers: int = 5
    seed: int = 1
    faults: float = 0.05
    gap_ms: int = 60
    digest: str = ""
    asked: Counter[str] = field(default_factory=Counter)  # attempts by server
    outcomes: Counter[Decision] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._rng = Random(self.seed)
        self._due: list[tuple[int, int, events.Event]] = []
        self._seq = 0
        self._told = hashlib.sha256()
        self.balancer = policy(self.name).build(config_of(self.n_servers), Random(self.seed), self)
        self._auditor = Auditor(self.balancer)

    def session_of(self, request_id: int) -> int:
        """Return one of seven sessions, or none."""
        return request_id % 8

    def first_token_ns(self, server_name: str, request_id: int, now_ns: int) -> int | None:
        """Return what the server's speed says; some answers are foretold to fail."""
        index = int(server_name[1:])
        if (request_id + index) % 11 == 0:
            return None
        return now_ns + SPEEDS_MS[index % len(SPEEDS_MS)] * MS_NS

    def run(self, n_requests: int) -> SmallWorld:
        """Let so many requests come and everything end."""
        self._step(self.balancer.handle_timeout(0), 0)
        arrives_ns = SECOND_NS
        request_id = now_ns = 0
        while request_id < n_requests or self.balancer.ledger.requests:
            deadline_ns = self.balancer.next_deadline()
            event_ns = self._due[0][0] if self._due else None
            coming = arrives_ns if request_id < n_requests else None
            now_ns = min(moment for moment in (deadline_ns, event_ns, coming) if moment is not None)
            assert now_ns < 3600 * SECOND_NS, f"{self.balancer} does not come to an end"
            if now_ns == deadline_ns:
                self._step(self.balancer.handle_timeout(now_ns), now_ns)
            elif now_ns == event_ns:
                self._tell(heapq.heappop(self._due)[2], now_ns)
            else:
                request_id += 1
                self._arrive(request_id, now_ns)
                arrives_ns = now_ns + self._rng.randrange(2 * self.gap_ms * MS_NS)
        self.digest = self._told.hexdigest()
        self.outcomes = Counter(self._auditor.ended.values())
        return self

    def _arrive(self, request_id: int, now_ns: int) -> None:
        rng = self._rng
        model, stream = rng.choice(MODELS), rng.random() < 0.9
        kind = RequestKind.LOAD if rng.random() < 0.02 else RequestKind.GENERATE
        route = "/api/chat" if rng.random() < 0.9 else "/v1/messages"
        event = events.RequestArrived(request_id, route, model, kind, stream, generates=True)
        self._step(self.balancer.handle(event, now_ns), now_ns)
        if rng.random() < self.faults:
            self._later(now_ns + rng.randrange(SECOND_NS), events.DownstreamClosed(request_id))

    def _later(self, at_ns: int, event: events.Event) -> None:
        self._seq += 1
        heapq.heappush(self._due, (at_ns, self._seq, event))

    def _tell(self, event: events.Event, now_ns: int) -> None:
        attempt = self.balancer.ledger.attempts.get(getattr(event, "attempt_id", 0))
        if attempt is not None:
            self.balancer.note_chunk(attempt.id, 100, 1 + attempt.id % 3, now_ns)
        elif hasattr(event, "attempt_id"):
            return  # it was cancelled
        self._step(self.balancer.handle(event, now_ns), now_ns)

    def _step(self, commands: list[cmd.Command], now_ns: int) -> None:
        self._auditor.check(commands, now_ns)
        for command in commands:
            self._told.update(repr(command).encode())
            if isinstance(command, cmd.StartAttempt):
                self._start(command, now_ns)
            elif isinstance(command, cmd.StartProbe):
                self._probe(command, now_ns)

    def _start(self, start: cmd.StartAttempt, now_ns: int) -> None:
        rng, attempt_id = self._rng, start.attempt_id
        self.asked[self.balancer.fleet.servers[start.server_id].name] += 1
        speed_ns = SPEEDS_MS[(start.server_id - 1) % len(SPEEDS_MS)] * MS_NS
        at_ns = now_ns + MS_NS
        if rng.random() < self.faults:
            reason, status = rng.choice(
                ((Reason.CONNECT_REFUSED, 0), (Reason.RESET, 0), (Reason.SERVER_ERROR, 500), (Reason.BUSY, 503))
            )
            self._later(at_ns, events.AttemptFailed(attempt_id, reason, status, "", answered=status > 0))
            return
        self._later(at_ns, events.AttemptConnected(attempt_id))
        if rng.random() < self.faults / 3:
            return  # it hangs
        at_ns += round(speed_ns * rng.lognormvariate(0, 0.2))
        self._later(at_ns, events.HeadReceived(attempt_id, 200))
        self._later(at_ns, events.FirstTokenReceived(attempt_id))
        at_ns += rng.randrange(1, 40) * TOKEN_NS
        broken = rng.random() < self.faults
        cut = events.AttemptFailed(attempt_id, Reason.TRUNCATED)
        self._later(at_ns, cut if broken else events.StreamEnded(attempt_id))

    def _probe(self, start: cmd.StartProbe, now_ns: int) -> None:
        at_ns = now_ns + MS_NS
        if self._rng.random() < self.faults:
            self._later(at_ns, events.ProbeCompleted(start.server_id, start.probe_id, Reason.CONNECT_REFUSED))
            return
        on_disk = tuple(events.ModelInfo(name, f"sha-{name}", "2026-01-01T00:00:00Z", "{}") for name in MODELS)
        active = tuple(events.ActiveModel(name, "{}") for name in MODELS if self._rng.random() < 0.8)
        self._later(at_ns, events.ProbeCompleted(start.server_id, start.probe_id, version="0.9.0"))
        self._later(at_ns, events.ModelsSynced(start.server_id, start.probe_id, on_disk, active))


def digests(n_requests: int = 30) -> str:
    """Return a hash of all commands of a run under every policy."""
    return " ".join(SmallWorld(name, seed=7).run(n_requests).digest[:16] for name in POLICIES)
