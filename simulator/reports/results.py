"""What came of a run: plain records, made by `simulator.world`, read by reports, checkers and sweeps. Pure.

All times are int ns of virtual time from the start of the run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from simulator.workloads.asks import Ask

GAP_STEP = 1.05
"""Ratio of two neighbouring bins of a `Gaps` histogram: quantiles read from it are true to 2.5 %."""


class Outcome(StrEnum):
    """What became of a request, as its client sees it."""

    COMPLETED = "completed"
    FAILED = "failed"  # an error, or a stream that broke
    REJECTED = "rejected"  # refused before any attempt (a full queue, nobody there)
    LEFT = "left"  # the client gave up
    UNFINISHED = "unfinished"  # still under way when the run was ended: a violation of liveness


@dataclass(slots=True)
class RequestResult:
    """One request."""

    ask: Ask
    outcome: Outcome = Outcome.UNFINISHED
    why: str = ""  # of FAILED and REJECTED: the error that the client was given
    status: int = 0  # HTTP status the client got; 0: none
    committed_ns: int | None = None
    server: str = ""  # whose answer the client got
    first_token_ns: int | None = None  # at the client
    ended_ns: int = 0
    tokens: int = 0  # delivered
    n_attempts: int = 0

    @property
    def ttft_ns(self) -> int | None:
        """Time from the arrival to the first token at the client."""
        return None if self.first_token_ns is None else self.first_token_ns - self.ask.arrives_ns

    @property
    def e2e_ns(self) -> int:
        """Time from the arrival to the end."""
        return self.ended_ns - self.ask.arrives_ns


@dataclass(slots=True)
class AttemptResult:
    """One attempt: what a strip of a Gantt chart shows."""

    request_id: int
    attempt_id: int
    server: str
    kind: str  # lbcore.commands.AttemptKind
    started_ns: int
    slot_ns: int | None = None  # when it got a slot of its server
    first_token_ns: int | None = None  # when the server made it
    ended_ns: int = 0
    outcome: str = ""  # "succeeded", "failed" or "cancelled"
    why: str = ""  # lbcore.events.Reason of a failure or a cancellation
    tokens: int = 0  # made by the server for it
    delivered: bool = False  # it was committed: its tokens went to the client
    busy_ns: int = 0  # slot time it took, prefill included


@dataclass(slots=True)
class ServerResult:
    """One server over the whole run."""

    name: str
    slots: int
    requests: int = 0  # attempts that reached it
    tokens: int = 0
    tokens_wasted: int = 0
    busy_ns: int = 0  # slot time, prefill included; at most slots * run length for each loaded model
    wasted_ns: int = 0  # of this, for attempts that were not delivered
    loads: int = 0
    load_ns: int = 0


@dataclass(slots=True)
class Band:
    """A stretch of time in which a fault was on."""

    server: str  # "" for the network or all servers
    kind: str
    from_ns: int
    until_ns: int


@dataclass(slots=True)
class Gaps:
    """A histogram of inter-token times, in bins `GAP_STEP` wide: constant memory whatever the number of tokens."""

    bins: Counter[int] = field(default_factory=Counter)  # exponent of GAP_STEP in ns -> tokens
    max_ns: int = 0


@dataclass(slots=True)
class HealthPoint:
    """A server's health value from `at_ns` on."""

    at_ns: int
    server: str
    value: float


@dataclass(slots=True)
class RunResult:
    """Everything known of one run. `lines` are the decisions as log lines, kept only when asked for."""

    scenario: str
    seed: int
    policy: str  # what distinguishes this run from others of the same scenario
    requests: list[RequestResult] = field(default_factory=list)
    attempts: list[AttemptResult] = field(default_factory=list)
    servers: list[ServerResult] = field(default_factory=list)
    health: list[HealthPoint] = field(default_factory=list)
    bands: list[Band] = field(default_factory=list)
    gaps: Gaps = field(default_factory=Gaps)
    violations: list[str] = field(default_factory=list)  # of safety or liveness, in words
    lines: list[tuple[int, int, str]] = field(default_factory=list)  # (at_ns, request id or 0, text)
    ended_ns: int = 0
    n_events: int = 0  # taken by the core
    amplification: float = 0.0  # attempts a request
