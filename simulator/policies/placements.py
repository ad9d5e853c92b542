"""Who is asked under other policies than ours: subclasses of the core's `Placement`, for comparison only.

They decide nothing but the order of the servers. Who may be asked at all (alive, has the model, has room), health,
retries and the queue are the core's, so that policies differ in their choice alone. All of them put servers whose
streams broke lately behind the others, as the core does; beyond that they are as their sources describe them, and know
nothing of loaded models or of queues inside Ollama.

What a policy learns from (how long first tokens took), it reads from the requests it has placed; no event is needed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from math import ceil, exp, log
from random import Random
from statistics import median
from typing import NamedTuple, Protocol

from lbcore import selection
from lbcore.config import Config
from lbcore.fleet import Fleet
from lbcore.ollama import RequestKind
from lbcore.placement import Placement
from lbcore.records import Attempt, Request, Server
from lbcore.schema import SECOND_NS
from lbcore.states import AttemptState


class WorldView(Protocol):
    """What policies may ask the simulated world that know more than the core does."""

    def session_of(self, request_id: int) -> int:
        """Return what requests have in common whose prompts begin alike, such as their session; 0: nothing."""

    def first_token_ns(self, server_name: str, request_id: int, now_ns: int) -> int | None:
        """Return at which moment the server would give the first token if asked now.

        None: it would fail before, or break the stream before its end.
        """


class OtherPlacement(Placement):
    """A policy that is an order of the servers."""

    def order(self, candidates: Sequence[Server], request: Request, now_ns: int) -> list[Server]:
        """Return the candidates, the one to ask first in front; those whose streams broke lately come last."""
        trusted = [server for server in candidates if not selection.is_passed_over(server, now_ns)]
        ordered = self.arrange(trusted, request, now_ns)
        if len(trusted) < len(candidates):
            doubtful = [server for server in candidates if selection.is_passed_over(server, now_ns)]
            ordered += self.arrange(doubtful, request, now_ns)
        self.note_chosen(ordered[0], request)
        return ordered

    @abstractmethod
    def arrange(self, candidates: list[Server], request: Request, now_ns: int) -> list[Server]:
        """Return the candidates (may be none) in the policy's order."""

    def note_chosen(self, server: Server, request: Request) -> None:
        """Take note of who is asked now."""

    def shuffled(self, candidates: list[Server]) -> list[Server]:
        """Return the candidates in a random order, each equally likely."""
        return self._rng.sample(candidates, len(candidates))


class RoundRobin(OtherPlacement):
    """One after the other in the order they were named, for each model apart; slots do not count."""

    def __init__(self, config: Config, fleet: Fleet, rng: Random) -> None:
        super().__init__(config, fleet, rng)
        self._last: dict[str | None, int] = {}  # id of the server that was asked last

    def arrange(self, candidates: list[Server], request: Request, now_ns: int) -> list[Server]:  # noqa: ARG002
        """Return those after the last one asked, then the others."""
        last = self._last.get(request.model, 0)
        return sorted(candidates, key=lambda server: (server.id <= last, server.id))

    def note_chosen(self, server: Server, request: Request) -> None:
        """Go on behind this one."""
        self._last[request.model] = server.id


class Uniform(OtherPlacement):
    """Any of them, each equally likely."""

    def arrange(self, candidates: list[Server], request: Request, now_ns: int) -> list[Server]:  # noqa: ARG002
        """Return a random order."""
        return self.shuffled(candidates)


def load(server: Server) -> float:
    """Return how many of our requests are on a server for each of its slots (slots are the weight, as in LVS's wlc)."""
    return server.in_flight / server.slots


class LeastInFlight(OtherPlacement):
    """The one with the fewest requests in flight a slot; ties are broken at random."""

    def arrange(self, candidates: list[Server], request: Request, now_ns: int) -> list[Server]:  # noqa: ARG002
        """Return them by their load."""
        return sorted(self.shuffled(candidates), key=load)


class PowerOfTwo(OtherPlacement):
    """Two at random, of which the less loaded (Mitzenmacher, IEEE TPDS 12(10), 2001).

    The next choice is made between the one left over and a fresh one, and so on.
    """

    def arrange(self, candidates: list[Server], request: Request, now_ns: int) -> list[Server]:
        """Return the winners of pairs."""
        drawn = self.shuffled(candidates)
        ordered: list[Server] = []
        kept: Server | None = None
        for server in drawn:
            if kept is None:
                kept = server
                continue
            first, kept = (
                (kept, server)
                if self.cost(kept, request, now_ns) <= self.cost(server, request, now_ns)
                else (
                    server,
                    kept,
                )
            )
            ordered.append(first)
        return ordered if kept is None else [*ordered, kept]

    def cost(self, server: Server, request: Request, now_ns: int) -> float:  # noqa: ARG002
        """Return what is compared: less is better."""
        return load(server)


# --- learning from first tokens ----------------------------------------------------------------------------


class Seen(NamedTuple):
    """What came of one attempt that a policy has placed."""

    at_ns: int
    attempt_id: int
    server: Server
    model: str | None
    rif: int  # requests in flight on the server when it was asked, this one not counted
    took_ns: int
    failed: bool


class Watch:
    """Follows the attempts that a policy has placed until their first token."""

    def __init__(self) -> None:
        self._open: list[tuple[Request, Server, int]] = []

    def add(self, request: Request, server: Server) -> None:
        """Follow the attempt of this request that is about to be started on this server."""
        if request.generates and request.kind is RequestKind.GENERATE:
            self._open.append((request, server, server.in_flight))

    def news(self, now_ns: int) -> list[Seen]:
        """Return what has come since the last call, in order of time.

        When an attempt failed is not known to anyone later; but the policy is asked for another server at that very
        moment, if ever.
        """
        found: list[Seen] = []
        still_open: list[tuple[Request, Server, int]] = []
        for entry in self._open:
            request, server, rif = entry
            attempt = next((a for a in reversed(request.attempts) if a.server is server), None)
            if attempt is None:
                continue  # it was not started after all
            if attempt.first_token_ns is not None:
                found.append(self._seen(attempt, rif, attempt.first_token_ns, failed=False))
            elif attempt.state is AttemptState.FAILED:
                found.append(self._seen(attempt, rif, now_ns, failed=True))
            elif attempt.is_live:
                still_open.append(entry)
        self._open = still_open
        return sorted(found, key=lambda seen: seen[:2])

    @staticmethod
    def _seen(attempt: Attempt, rif: int, at_ns: int, *, failed: bool) -> Seen:
        took_ns = at_ns - attempt.started_ns
        return Seen(at_ns, attempt.id, attempt.server, attempt.request.model, rif, took_ns, failed)


DECAY_NS = 10 * SECOND_NS
"""Mean lifetime of a peak: Finagle's and linkerd's default."""
PENALTY = float((2**63 - 1) >> 16)
"""Cost of a server that was asked but has not answered yet (Finagle's figure)."""


class Peak:
    """An average of latencies that jumps to every peak and decays from there (Finagle, `PeakEwma.scala`)."""

    __slots__ = ("cost_ns", "stamp_ns")

    def __init__(self, now_ns: int) -> None:
        self.cost_ns = 0.0
        self.stamp_ns = now_ns

    def observe(self, took_ns: float, now_ns: int) -> None:
        """Take a latency; 0 lets time pass only. A sample weighs the more, the longer the last one was ago."""
        weight = exp(-max(now_ns - self.stamp_ns, 0) / DECAY_NS)
        self.cost_ns = took_ns if took_ns > self.cost_ns else self.cost_ns * weight + took_ns * (1.0 - weight)
        self.stamp_ns = max(now_ns, self.stamp_ns)


class PeakEwma(PowerOfTwo):
    """Two at random, of which the one with the smaller peak-sensitive latency times (in flight + 1).

    Finagle's `P2CPeakEwma`, which linkerd took over: cost = ewma * (outstanding + 1), where a latency above the average
    replaces it at once and one below pulls it down with exp(-age / 10 s); looking at it lets it decay too. Who has no
    history but work costs `PENALTY`. The latency is that of the first token, as linkerd measures streams; a failure's
    time counts like any other (Finagle leaves failures to its failure accrual, we to health). An endpoint is a server.
    """

    def __init__(self, config: Config, fleet: Fleet, rng: Random) -> None:
        super().__init__(config, fleet, rng)
        self._watch = Watch()
        self._peaks: dict[int, Peak] = {}

    def arrange(self, candidates: list[Server], request: Request, now_ns: int) -> list[Server]:
        """Learn, then choose."""
        for seen in self._watch.news(now_ns):
            self._peak(seen.server, seen.at_ns).observe(seen.took_ns, seen.at_ns)
        return super().arrange(candidates, request, now_ns)

    def cost(self, server: Server, request: Request, now_ns: int) -> float:  # noqa: ARG002
        """Return the latency to be expected, ns."""
        peak = self._peak(server, now_ns)
        peak.observe(0.0, now_ns)
        if peak.cost_ns == 0.0 and server.in_flight:
            return PENALTY + server.in_flight
        return peak.cost_ns * (server.in_flight + 1)

    def note_chosen(self, server: Server, request: Request) -> None:
        """Follow it."""
        self._watch.add(request, server)

    def _peak(self, server: Server, now_ns: int) -> Peak:
        return self._peaks.setdefault(server.id, Peak(now_ns))


POOL_MAX = 16
"""Probes that are looked at: the paper's pool size."""
RIF_QUANTILE = 2**-0.25
"""Above this quantile (0.84) of the requests in flight a server is hot: the paper's default."""
_LATENCIES_KEPT = 16
_RECENT_NS = 60 * SECOND_NS  # the paper speaks of recent requests; ours take seconds, not milliseconds


class Prequal(OtherPlacement):
    """The cold server with the least latency; when all are hot, the one with the fewest requests in flight.

    Wydrowski, Kleinberg, Rumble, Archer: Load is not what you should balance (NSDI 2024), the hot-cold lexicographic
    rule: of a pool of at most 16 probes, those with more requests in flight (RIF) than the 0.84 quantile are hot. The
    latency that a probe tells is the median of recent ones that began with about as many in flight as there are now.
    The paper's pool holds answers up to 1 s old, three new ones a request, each used a bounded number of times; one
    balancer that counts its own requests knows them as they are, so the pool is a random subset with its present
    values. The latency is that of the first token, for each model apart. With no recent one a server counts as the
    fastest of the pool, so that it is tried; equal latencies are decided by RIF, then at random.
    """

    def __init__(self, config: Config, fleet: Fleet, rng: Random) -> None:
        super().__init__(config, fleet, rng)
        self._watch = Watch()
        self._latencies: dict[tuple[int, str | None], deque[Seen]] = {}

    def arrange(self, candidates: list[Server], request: Request, now_ns: int) -> list[Server]:
        """Return the cold ones by latency, then the hot ones by RIF, then those that were not looked at."""
        for seen in self._watch.news(now_ns):
            if not seen.failed:
                kept = self._latencies.setdefault((seen.server.id, seen.model), deque(maxlen=_LATENCIES_KEPT))
                kept.append(seen)
        if len(candidates) < 2:
            return candidates
        drawn = self.shuffled(candidates)
        pool, rest = drawn[:POOL_MAX], drawn[POOL_MAX:]
        rifs = sorted(server.in_flight for server in pool)
        hot_above = rifs[int(RIF_QUANTILE * (len(rifs) - 1))]
        latencies = {server.id: self.latency_ns(server, request.model, now_ns) for server in pool}
        fastest_ns = min([known for known in latencies.values() if known is not None], default=0.0)

        def key(server: Server) -> tuple[bool, float, int]:
            hot = server.in_flight > hot_above
            latency_ns = latencies[server.id]
            return hot, 0.0 if hot else fastest_ns if latency_ns is None else latency_ns, server.in_flight

        return [*sorted(pool, key=key), *rest]

    def latency_ns(self, server: Server, model: str | None, now_ns: int) -> float | None:
        """Return the latency that a probe of the server would tell; None: it has served nothing lately."""
        kept = [s for s in self._latencies.get((server.id, model), ()) if s.at_ns >= now_ns - _RECENT_NS]
        if not kept:
            return None
        nearest = min(abs(seen.rif - server.in_flight) for seen in kept)
        return median(seen.took_ns for seen in kept if abs(seen.rif - server.in_flight) == nearest)

    def note_chosen(self, server: Server, request: Request) -> None:
        """Follow it."""
        self._watch.add(request, server)


# --- hedging, affinity, clairvoyance -----------------------------------------------------------------------


class HedgeAnywhere(Placement):
    """Hedges go to any other server with room, busy or not, and no budget bounds them.

    Dean & Barroso: The Tail at Scale (CACM 56(2), 2013): after the p95 of the latency, which bounds the extra work to
    about 5 %. The first server is chosen as we do.
    """

    def hedge(self, request: Request, now_ns: int) -> Server | None:
        """Return one more server to ask."""
        untried = selection.eligible(self._fleet.holders(request.model), request)
        usable = [server for server in untried if selection.has_room(server, request)]
        return self.order(usable, request, now_ns)[0] if usable else None


LOAD_FACTOR = 1.25
"""How far above the average load a server may go for the sake of affinity (haproxy's hash-balance-factor: 125)."""


class SessionAffinity(LeastInFlight):
    """The server that a session's model hashes to, unless it has more than its share of the load.

    Rendezvous hashing (Thaler & Ravishankar, IEEE/ACM ToN 6(1), 1998) weighted by slots, with bounded loads (Mirrokni,
    Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads, SODA 2018): whoever has less than 1.25 times the
    average in flight a slot, rounded up, comes in the order of its hashes; then the others, the least loaded first.
    Requests without a session go to the least loaded.
    """

    def __init__(self, config: Config, fleet: Fleet, rng: Random, world: WorldView) -> None:
        super().__init__(config, fleet, rng)
        self._world = world

    def arrange(self, candidates: list[Server], request: Request, now_ns: int) -> list[Server]:
        """Return those with room for the session in the order of their hashes, then the others."""
        session = self._world.session_of(request.id)
        by_load = super().arrange(candidates, request, now_ns)
        if not session or len(candidates) < 2:
            return by_load
        share = LOAD_FACTOR * (1 + sum(s.in_flight for s in candidates)) / sum(s.slots for s in candidates)
        within = [server for server in by_load if server.in_flight < ceil(share * server.slots)]
        within.sort(key=lambda server: _rendezvous(server, request.model, session))
        return within + [server for server in by_load if server not in within]


def _rendezvous(server: Server, model: str | None, session: int) -> float:
    """Return the server's bid for a session, the least wins: exponential with its slots as the rate."""
    digest = blake2b(f"{model}/{session}/{server.name}".encode(), digest_size=8).digest()
    return -log((int.from_bytes(digest) + 1) / 2**64) / server.slots


class Oracle(OtherPlacement):
    """The server that will give its first token soonest and will not break the stream, as the world knows it.

    A lower bound of the first-token time, approximately: each request is placed for its own good (greedy), which need
    not be for the good of all; it waits in our queue where the core says so; and it learns of a revived server as the
    core does, by a probe.
    """

    def __init__(self, config: Config, fleet: Fleet, rng: Random, world: WorldView) -> None:
        super().__init__(config, fleet, rng)
        self._world = world

    def order(self, candidates: Sequence[Server], request: Request, now_ns: int) -> list[Server]:
        """Return them by the moment of their first token; no need to distrust anyone."""
        return self.arrange(list(candidates), request, now_ns)

    def arrange(self, candidates: list[Server], request: Request, now_ns: int) -> list[Server]:
        """Return them by the moment of their first token, those that will fail last; ties go to the less loaded."""
        bids = [(self._bid(server, request, now_ns), load(server), server.id, server) for server in candidates]
        return [bid[3] for bid in sorted(bids, key=lambda bid: bid[:3])]

    def _bid(self, server: Server, request: Request, now_ns: int) -> tuple[bool, int]:
        if not request.generates:
            return False, 0
        first_ns = self._world.first_token_ns(server.name, request.id, now_ns)
        return first_ns is None, first_ns or 0
