"""When clients come, whatever becomes of those before them (open loop): arrival processes. Pure; times are int ns.

`poisson`: independent clients. `gamma`: gaps with a coefficient of variation of their own (above 1: bursts; 1 is
Poisson). `mmpp`: a Poisson process that changes between two rates, staying exponentially long at each (a two-state
Markov-modulated Poisson process). `even`: equal gaps. `herd`: all at one instant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, repeat
from random import Random
from typing import Protocol

_NS_PER_S = 1_000_000_000


class Arrivals(Protocol):
    """A process of arrivals."""

    def times(self, rng: Random) -> Iterator[int]:
        """Return the arrivals without end, in order, from 0 on."""

    def scaled(self, factor: float) -> Arrivals:
        """Return the same process with `factor` times the rate."""


@dataclass(frozen=True, slots=True)
class Poisson:
    """Exponential gaps."""

    rate: float  # per s

    def times(self, rng: Random) -> Iterator[int]:
        """Return the arrivals."""
        mean_ns, now_ns = _NS_PER_S / self.rate, 0
        while True:
            now_ns += round(rng.expovariate(1.0) * mean_ns)
            yield now_ns

    def scaled(self, factor: float) -> Poisson:
        """Return it with another rate."""
        return replace(self, rate=self.rate * factor)


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma gaps: as many per s on average as `rate` says, in bursts where `cv` is above 1."""

    rate: float
    cv: float  # standard deviation of the gaps over their mean

    def times(self, rng: Random) -> Iterator[int]:
        """Return the arrivals."""
        shape = 1 / self.cv**2
        scale_ns, now_ns = _NS_PER_S / self.rate / shape, 0
        while True:
            now_ns += round(rng.gammavariate(shape, scale_ns))
            yield now_ns

    def scaled(self, factor: float) -> Gamma:
        """Return it with another rate and the same burstiness."""
        return replace(self, rate=self.rate * factor)


@dataclass(frozen=True, slots=True)
class Mmpp:
    """Poisson at two rates by turns; begins at the low one."""

    rate_low: float  # 0: nobody comes
    rate_high: float
    dwell_low_ns: int  # mean time at the low rate
    dwell_high_ns: int

    def times(self, rng: Random) -> Iterator[int]:
        """Return the arrivals."""
        now_ns, high = 0, False
        while True:
            ends_ns = now_ns + round(rng.expovariate(1.0) * (self.dwell_high_ns if high else self.dwell_low_ns))
            rate = self.rate_high if high else self.rate_low
            while rate > 0:
                at_ns = now_ns + round(rng.expovariate(1.0) * _NS_PER_S / rate)
                if at_ns >= ends_ns:
                    break  # exponential gaps have no memory: the rest is drawn anew at the other rate
                now_ns = at_ns
                yield now_ns
            now_ns, high = ends_ns, not high

    def scaled(self, factor: float) -> Mmpp:
        """Return it with other rates and the same dwell times."""
        return replace(self, rate_low=self.rate_low * factor, rate_high=self.rate_high * factor)


@dataclass(frozen=True, slots=True)
class Even:
    """Equal gaps, the first client at 0."""

    rate: float

    def times(self, _: Random) -> Iterator[int]:
        """Return the arrivals; they do not drift."""
        return (round(index * _NS_PER_S / self.rate) for index in count())

    def scaled(self, factor: float) -> Even:
        """Return it with another rate."""
        return replace(self, rate=self.rate * factor)


@dataclass(frozen=True, slots=True)
class Herd:
    """All at one instant."""

    def times(self, _: Random) -> Iterator[int]:
        """Return 0 for ever."""
        return repeat(0)

    def scaled(self, _: float) -> Herd:
        """Return it: its size is the number of requests, not a rate."""
        return self
