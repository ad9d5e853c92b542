"""The wires between the balancer and its servers: latency, loss, and what can go wrong with them. Pure; times in ns.

Loss is what TCP makes of it: the segment comes again after the retransmission timeout. In a partition nothing arrives
until it is over; then what was sent is sent again. A server that lost its power says nothing to anybody, ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random

RETRANSMIT_NS = 200_000_000
"""Linux's least retransmission timeout (TCP_RTO_MIN)."""


@dataclass(frozen=True, slots=True)
class Link:
    """The way to one server, the same in both directions."""

    latency_ns: int = 100_000  # one way; a switched network in a house or an office
    jitter_ns: int = 0  # mean of an exponential addition to it
    loss: float = 0.0  # share of the messages that need a retransmission
    bandwidth: float = 125e6  # bytes/s


class LinkFaultKind(StrEnum):
    """What can go wrong with a link."""

    PARTITION = "partition"  # nothing arrives until it is over
    POWER_OFF = "power-off"  # the server is gone without a word; when it is over, it starts anew
    LATENCY = "latency"  # `latency_ns` more, one way
    LOSS = "loss"  # `loss` of the messages


@dataclass(frozen=True, slots=True)
class LinkFault:
    """One fault of a link, on from `from_ns` until `until_ns`."""

    kind: LinkFaultKind
    from_ns: int
    until_ns: int
    latency_ns: int = 0
    loss: float = 0.0

    def is_on(self, now_ns: int) -> bool:
        """Tell whether it is on."""
        return self.from_ns <= now_ns < self.until_ns


class Wire:
    """One link with its faults. `arrival_ns` draws from the generator passed in."""

    __slots__ = ("faults", "link", "rng")

    def __init__(self, link: Link, faults: Sequence[LinkFault], rng: Random) -> None:
        self.link = link
        self.faults = tuple(faults)
        self.rng = rng

    def heal(self, now_ns: int) -> None:
        """End every fault now."""
        self.faults = tuple(replace(f, until_ns=min(f.until_ns, now_ns)) for f in self.faults if f.from_ns < now_ns)

    def is_cut(self, now_ns: int) -> bool:
        """Tell whether nothing arrives."""
        return any(f.is_on(now_ns) and f.kind in _CUTS for f in self.faults)

    def is_silent(self, now_ns: int) -> bool:
        """Tell whether the server has no power."""
        return any(f.is_on(now_ns) and f.kind is LinkFaultKind.POWER_OFF for f in self.faults)

    def arrival_ns(self, now_ns: int, n_bytes: int = 0) -> int:
        """Return when a message sent now arrives."""
        link, latency_ns, loss = self.link, self.link.latency_ns, self.link.loss
        sent_ns = now_ns
        for fault in self.faults:
            if not fault.is_on(sent_ns):
                continue
            if fault.kind in _CUTS:
                sent_ns = fault.until_ns + self.rng.randrange(RETRANSMIT_NS)
            latency_ns += fault.latency_ns
            loss = max(loss, fault.loss)
        if link.jitter_ns:
            latency_ns += round(self.rng.expovariate(1.0) * link.jitter_ns)
        wait_ns = RETRANSMIT_NS
        while loss and self.rng.random() < loss:
            sent_ns += wait_ns
            wait_ns *= 2
        return sent_ns + latency_ns + round(n_bytes * 1e9 / link.bandwidth)


_CUTS = frozenset({LinkFaultKind.PARTITION, LinkFaultKind.POWER_OFF})
