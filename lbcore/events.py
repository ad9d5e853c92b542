"""What happened, in the past tense. The driver builds these; `LoadBalancer.handle` takes them.

Identifiers: `request_id` is given by the driver, `attempt_id`, `server_id` and `probe_id` by the core; none is ever
reused, so an event that comes late names something that is gone and does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lbcore.config import ServerSettings
from lbcore.ollama import RequestKind


class Reason(StrEnum):
    """Why an attempt or a probe failed, or was cancelled."""

    CONNECT_REFUSED = "connection refused"
    CONNECT_FAILED = "cannot connect"
    CONNECT_TIMEOUT = "connect timeout"
    TLS_FAILED = "TLS failed"
    EXHAUSTED = "the load balancer has run out of connections"
    RESET = "connection lost before the answer"
    GARBAGE = "the answer is not HTTP"
    CLIENT_ERROR = "the request was refused"
    ELSEWHERE = "the server declined, another may not"
    MODEL_NOT_FOUND = "model not found"
    BUSY = "server busy"
    SERVER_ERROR = "server error"
    FIRST_TOKEN_TIMEOUT = "no first token in time"
    SILENCE_TIMEOUT = "silence between tokens"
    ANSWER_TIMEOUT = "no whole answer in time"
    PROBE_TIMEOUT = "probe timeout"
    ERROR_LINE = "error line in the stream"
    TRUNCATED = "the stream ended without its end"
    LOST_RACE = "lost the race"
    GIVEN_UP = "given up for another model"
    CLIENT_LEFT = "the client left"
    DRAINED = "shut down"
    STALLED = "no progress"


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A request was read, whole but for a body that is passed on as it comes.

    `model` is as the client wrote it, None when the body names none.
    `servers` are the names of those that the client wants to be asked, and no other; () when it leaves that to us.
    """

    request_id: int
    route: str
    model: str | None = None
    kind: RequestKind = RequestKind.GENERATE
    stream: bool = False
    generates: bool = False
    runner_key: str = ""
    servers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DownstreamClosed:
    """The client is gone (or has not read for so long that it counts as gone)."""

    request_id: int


@dataclass(frozen=True, slots=True)
class AttemptConnected:
    """The connection to the server stands (a pooled one: at once)."""

    attempt_id: int


@dataclass(frozen=True, slots=True)
class HeadReceived:
    """A response head below 400 came, and no token with it: else that says it all.

    Heads of 400 and more are reported whole, as `AttemptFailed`.
    """

    attempt_id: int
    status: int


@dataclass(frozen=True, slots=True)
class FirstTokenReceived:
    """The first token of a stream, or the first byte of a whole answer, came."""

    attempt_id: int


@dataclass(frozen=True, slots=True)
class BufferFilled:
    """An attempt that is not committed has answered more than may be held."""

    attempt_id: int


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The answer ended as its route says a good one ends; a bad end is `AttemptFailed`."""

    attempt_id: int


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """An attempt failed.

    `status` is the answer's, 0 when there was none; `answered` says that the driver holds a whole answer, which could
    be passed on as it is.
    """

    attempt_id: int
    reason: Reason
    status: int = 0
    detail: str = ""
    answered: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model on a server's disk (`/api/tags`); `entry` is its JSON object as the server wrote it."""

    name: str
    digest: str
    modified_at: str
    entry: str


@dataclass(frozen=True, slots=True)
class ActiveModel:
    """One loaded model (`/api/ps`); `entry` is its JSON object as the server wrote it."""

    name: str
    entry: str


@dataclass(frozen=True, slots=True)
class ProbeCompleted:
    """A probe has ended: well (`reason` None, with the server's version) or not."""

    server_id: int
    probe_id: int
    reason: Reason | None = None
    version: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ModelsSynced:
    """A probe has read what a server has on disk and what it has loaded."""

    server_id: int
    probe_id: int
    available: tuple[ModelInfo, ...] = ()
    active: tuple[ActiveModel, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerAdded:
    """An operator named one more server. Its name must be new."""

    settings: ServerSettings


@dataclass(frozen=True, slots=True)
class ServerRemovalRequested:
    """An operator wants a server drained and forgotten."""

    server_id: int


@dataclass(frozen=True, slots=True)
class SyncRequested:
    """An operator wants every server probed now."""


@dataclass(frozen=True, slots=True)
class DrainDeadlinePassed:
    """The balancer is shutting down and waits no longer for what is under way."""


@dataclass(frozen=True, slots=True)
class JobProgressed:
    """A job goes on: to be told of now and then, so that it is not given up."""

    job_id: int


@dataclass(frozen=True, slots=True)
class JobEnded:
    """A job has ended, well when there is no `reason`."""

    job_id: int
    reason: Reason | None = None
    detail: str = ""


Event = (
    RequestArrived
    | DownstreamClosed
    | AttemptConnected
    | HeadReceived
    | FirstTokenReceived
    | BufferFilled
    | StreamEnded
    | AttemptFailed
    | ProbeCompleted
    | ModelsSynced
    | JobProgressed
    | JobEnded
    | ServerAdded
    | ServerRemovalRequested
    | SyncRequested
    | DrainDeadlinePassed
)
