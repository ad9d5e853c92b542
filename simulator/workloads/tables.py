"""The keys of `[workload]` tables, as data: what each kind of workload may say, with unit, range and reason. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from lbcore.schema import MS_NS, Kind, count, duration, ratio, setting
from simulator.workloads.lengths import TOKENS_MAX, WAIT_MAX_NS

# ruff: noqa: RUF009  # schema functions declare fields; they do not make shared mutable values

REQUESTS_MAX = 100_000_000
_RATE_MIN = 1e-6


class WorkloadKind(StrEnum):
    """How clients come."""

    POISSON = "poisson"
    GAMMA = "gamma"
    MMPP = "mmpp"
    EVEN = "even"
    HERD = "herd"
    SESSIONS = "sessions"
    TRACE = "trace"


class GenerateRoute(StrEnum):
    """Where a client sends what it asks."""

    CHAT = "/api/chat"
    GENERATE = "/api/generate"
    V1_CHAT = "/v1/chat/completions"
    V1_COMPLETIONS = "/v1/completions"
    V1_RESPONSES = "/v1/responses"
    V1_MESSAGES = "/v1/messages"


class TraceFormat(StrEnum):
    """How a trace is written: the names of `simulator.workloads.traces.FORMATS`."""

    ANY = "any"  # told from its first line
    AZURE = "azure"
    BURSTGPT = "burstgpt"
    EVENTS = "events"
    MOONCAKE = "mooncake"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonTable:
    """What every kind of workload may say, apart from `LISTS`."""

    kind: WorkloadKind = setting(Kind.CHOICE, "how clients come", choices=WorkloadKind)
    route: GenerateRoute = setting(Kind.CHOICE, "where the requests go", GenerateRoute.CHAT)
    stream: float = ratio("share of requests whose answer is streamed", 1.0, high=1.0)
    poison: float = ratio("share of requests that crash the runner working on them", 0.0, high=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTable(CommonTable):
    """What clients may say who come whatever becomes of those before them."""

    start_ns: int = duration("since the start of the run, when it begins", 0, high=WAIT_MAX_NS)
    requests: int | None = count("how many requests in all", None, low=1, high=REQUESTS_MAX)
    duration_ns: int | None = duration("how long after its start new requests come", None, low=1, high=WAIT_MAX_NS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoissonTable(OpenTable):
    """Independent clients."""

    rate: float = ratio("requests per s", low=_RATE_MIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenTable(OpenTable):
    """Equal gaps."""

    rate: float = ratio("requests per s", low=_RATE_MIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class GammaTable(OpenTable):
    """Bursts."""

    rate: float = ratio("requests per s, on average", low=_RATE_MIN)
    cv: float = ratio(
        "standard deviation of the gaps over their mean; 1 is Poisson, more is burstier", 3.0, low=0.01, high=100.0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MmppTable(OpenTable):
    """Two rates by turns."""

    rate_low: float = ratio("requests per s in quiet times; 0 is nobody")
    rate_high: float = ratio("requests per s in busy times", low=_RATE_MIN)
    dwell_low_ns: int = duration("how long quiet times are, on average", low=MS_NS, high=WAIT_MAX_NS)
    dwell_high_ns: int = duration("how long busy times are, on average", low=MS_NS, high=WAIT_MAX_NS)


@dataclass(frozen=True, slots=True, kw_only=True)
class HerdTable(CommonTable):
    """Many requests at one instant."""

    at_ns: int = duration("since the start of the run, when all of them come", high=WAIT_MAX_NS)
    requests: int = count("how many", low=1, high=REQUESTS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionsTable(OpenTable):
    """Conversations: the next request of each waits for the answer to the last."""

    users: int | None = count(
        "how many people talk at a time; each begins a new session after the last", None, low=1, high=1_000_000
    )
    rate: float | None = ratio("sessions that begin per s (Poisson), instead of users", None, low=_RATE_MIN)
    prompt_max: int = count(
        "tokens at which a conversation is cut at its beginning, as a context is", 32_768, low=1, high=TOKENS_MAX
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceTable(CommonTable):
    """The arrivals and lengths of a trace."""

    path: str = setting(Kind.TEXT, "the file, from the folder of this one")
    format: TraceFormat = setting(Kind.CHOICE, "how it is written", TraceFormat.ANY)
    start_ns: int = duration("since the start of the run, when it begins", 0, high=WAIT_MAX_NS)
    duration_ns: int | None = duration("how long after its start new requests come", None, low=1, high=WAIT_MAX_NS)
    speed: float = ratio("how many times faster than recorded the requests come", 1.0, low=1e-6, high=1e6)
    limit: int | None = count("how many requests of the file, from its beginning", None, low=1, high=REQUESTS_MAX)
    repeat: int = count("how many times the trace runs, end to end", 1, low=1, high=100_000)
    sort: bool = setting(Kind.FLAG, "sort the rows by time first; the file is then held in memory", default=False)


TABLES: Mapping[WorkloadKind, type[CommonTable]] = {
    WorkloadKind.POISSON: PoissonTable,
    WorkloadKind.GAMMA: GammaTable,
    WorkloadKind.MMPP: MmppTable,
    WorkloadKind.EVEN: EvenTable,
    WorkloadKind.HERD: HerdTable,
    WorkloadKind.SESSIONS: SessionsTable,
    WorkloadKind.TRACE: TraceTable,
}

_ALL = ("models", "num_ctx", "leave")
_LENGTHS = ("prompt_tokens", "output_tokens")

LISTS: Mapping[WorkloadKind, tuple[str, ...]] = {
    **dict.fromkeys(WorkloadKind, (*_ALL, *_LENGTHS)),
    WorkloadKind.SESSIONS: (*_ALL, *_LENGTHS, "new_tokens", "turns", "think"),
    WorkloadKind.TRACE: (*_ALL, "rename"),
}
"""The keys of each kind whose values are tables, or may be."""
