"""What the driver must do, in the imperative, in the order given; and decisions worth a log line."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from lbcore.events import Reason


class AttemptKind(StrEnum):
    """Why an attempt was made."""

    PRIMARY = "primary"
    RACER = "racer"
    HEDGE = "hedge"
    RETRY = "retry"
    RESUME = "resume"


class StartAttempt(NamedTuple):  # this one and those below that are named tuples are made for every request
    """Send the request to a server."""

    request_id: int
    attempt_id: int
    server_id: int
    kind: AttemptKind


@dataclass(frozen=True, slots=True)
class UseModel:
    """What follows is to ask servers for this model, whatever the client has called it. Nobody is asked at present."""

    request_id: int
    model: str


class CancelAttempt(NamedTuple):
    """Close the attempt's connection now; nothing more is wanted of it."""

    attempt_id: int
    reason: Reason


class CommitAttempt(NamedTuple):
    """Give the client this attempt's head, what is held of its body, and all that follows."""

    request_id: int
    attempt_id: int


@dataclass(frozen=True, slots=True)
class PassAnswer:
    """Give the client the whole answer held of this failed attempt, unchanged; the request is over."""

    request_id: int
    attempt_id: int


@dataclass(frozen=True, slots=True)
class StartMerge:
    """The attempts that follow are all wanted: the client gets one answer made of theirs."""

    request_id: int
    server_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EndMerge:
    """All attempts of a merged answer have ended, well or not; the request is over."""

    request_id: int


@dataclass(frozen=True, slots=True)
class RejectRequest:
    """Answer with an error of our own; nothing was sent to the client yet. `retry_after_s` 0: no such header."""

    request_id: int
    status: int
    message: str
    retry_after_s: int = 0


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """The committed stream broke: end it so that the client cannot take it for complete."""

    request_id: int
    message: str


class Work(StrEnum):
    """What placement wants of a server."""

    PULL = "pull"
    WARM = "warm"  # load it, or let it stay loaded, without end
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class StartJob:
    """Let a server pull, load or delete a model, by its name as declared; `runner_key` are the options to load with."""

    job_id: int
    server_id: int
    work: Work
    model: str
    runner_key: str


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Close the job's connection; nothing more is wanted of it."""

    job_id: int


@dataclass(frozen=True, slots=True)
class StartProbe:
    """Read a server's version, models and loaded models."""

    server_id: int
    probe_id: int


@dataclass(frozen=True, slots=True)
class CancelProbe:
    """A probe took too long; close its connection."""

    server_id: int
    probe_id: int


@dataclass(frozen=True, slots=True)
class ForgetServer:
    """A drained server is gone: close what is pooled for it."""

    server_id: int


class Decision(StrEnum):
    """What a `RecordDecision` tells of."""

    QUEUED = "queued"
    STARTED = "started"
    HEDGED = "hedged"
    RETRIED = "retried"
    COMMITTED = "committed"
    CANCELLED = "cancelled"
    ATTEMPT_FAILED = "attempt-failed"
    FINISHED = "finished"
    REJECTED = "rejected"
    FAILED = "failed"
    ABORTED = "aborted"
    HEALTH = "health"
    RELIABILITY = "reliability"
    DOUBTED = "doubted"
    SYNCED = "synced"
    SERVER_ADDED = "server-added"
    SERVER_BACK = "server-back"
    SERVER_DIED = "server-died"
    SERVER_UNREAD = "server-unread"
    SERVER_DRAINING = "server-draining"
    SERVER_GONE = "server-gone"
    JOB_STARTED = "job-started"
    JOB_DONE = "job-done"
    JOB_FAILED = "job-failed"


class RecordDecision(NamedTuple):
    """One decision: about a request (`request_id`, else 0), mostly about a server (`server`, its name, else "").

    `why` is the rule in words. `before` and `after` are a value that changed; `took_ns` is the time the thing
    took so far; `names` are the servers concerned, in the order chosen.
    """

    decision: Decision
    request_id: int = 0
    server: str = ""
    why: str = ""
    before: str = ""
    after: str = ""
    took_ns: int = 0
    names: tuple[str, ...] = ()


Command = (
    StartAttempt
    | UseModel
    | CancelAttempt
    | CommitAttempt
    | PassAnswer
    | StartMerge
    | EndMerge
    | RejectRequest
    | AbortRequest
    | StartJob
    | CancelJob
    | StartProbe
    | CancelProbe
    | ForgetServer
    | RecordDecision
)
