"""The states of requests, attempts, servers and reliability records, and every legal transition, as data.

`step_*` are total: an input that is not in the table for the current state returns None, which the balancer
counts as a late event and otherwise ignores (an attempt's last events may cross its cancellation).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, TypeVar

_StateT = TypeVar("_StateT", bound=StrEnum)
_InputT = TypeVar("_InputT", bound=StrEnum)


def _by_state(
    table: Mapping[tuple[_StateT, _InputT], _StateT], states: type[_StateT]
) -> dict[_StateT, dict[_InputT, _StateT]]:
    """Return the same table as one row a state, empty for a final one: such a look-up makes no tuple to hash."""
    return {state: {given: to for (at, given), to in table.items() if at is state} for state in states}


class RequestState(StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    RACING = "racing"
    RELAYING = "relaying"
    DONE = "done"
    REJECTED = "rejected"
    FAILED = "failed"
    ABORTED = "aborted"


class RequestInput(StrEnum):
    """What can happen to a request."""

    START = "its first attempt was started"
    COMMIT = "one attempt was chosen for the client"
    FINISH = "the client has got, or is being handed, a whole answer"
    REJECT = "it was refused before any attempt"
    FAIL = "no good answer can be given"
    ABORT = "the client left"


REQUEST_TRANSITIONS: Mapping[tuple[RequestState, RequestInput], RequestState] = {
    (RequestState.QUEUED, RequestInput.START): RequestState.RACING,
    (RequestState.QUEUED, RequestInput.REJECT): RequestState.REJECTED,
    (RequestState.QUEUED, RequestInput.ABORT): RequestState.ABORTED,
    (RequestState.RACING, RequestInput.COMMIT): RequestState.RELAYING,
    (RequestState.RACING, RequestInput.FINISH): RequestState.DONE,  # a refusal (4xx) is passed on as it was
    (RequestState.RACING, RequestInput.FAIL): RequestState.FAILED,
    (RequestState.RACING, RequestInput.ABORT): RequestState.ABORTED,
    (RequestState.RELAYING, RequestInput.FINISH): RequestState.DONE,
    (RequestState.RELAYING, RequestInput.FAIL): RequestState.FAILED,
    (RequestState.RELAYING, RequestInput.ABORT): RequestState.ABORTED,
}

REQUEST_STEPS: Final = _by_state(REQUEST_TRANSITIONS, RequestState)
REQUEST_ENDS: Final = frozenset({RequestState.DONE, RequestState.REJECTED, RequestState.FAILED, RequestState.ABORTED})


class AttemptState(StrEnum):
    """Where an attempt is."""

    CONNECTING = "connecting"
    AWAITING_HEAD = "awaiting-head"
    STREAMING = "streaming"
    COMMITTED = "committed"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class AttemptInput(StrEnum):
    """What can happen to an attempt."""

    CONNECTED = "the server accepted the connection"
    HEAD = "a good response head came"
    FIRST_TOKEN = "the first token came"
    BUFFER_FULL = "as much of the answer is held as may be"
    COMMIT = "it was chosen for the client"
    END = "the answer ended well"
    FAIL = "it failed"
    CANCEL = "it is not needed any more"


_A, _I = AttemptState, AttemptInput
_LIVE = (_A.CONNECTING, _A.AWAITING_HEAD, _A.STREAMING, _A.COMMITTED)

ATTEMPT_TRANSITIONS: Mapping[tuple[AttemptState, AttemptInput], AttemptState] = {
    (_A.CONNECTING, _I.CONNECTED): _A.AWAITING_HEAD,
    (_A.AWAITING_HEAD, _I.HEAD): _A.STREAMING,
    (_A.AWAITING_HEAD, _I.FIRST_TOKEN): _A.STREAMING,  # which mostly comes with the head, so that says it all
    (_A.STREAMING, _I.FIRST_TOKEN): _A.STREAMING,
    (_A.STREAMING, _I.BUFFER_FULL): _A.STREAMING,
    (_A.STREAMING, _I.COMMIT): _A.COMMITTED,
    (_A.STREAMING, _I.END): _A.SUCCEEDED,
    (_A.COMMITTED, _I.END): _A.SUCCEEDED,
    **{(state, _I.FAIL): _A.FAILED for state in _LIVE},
    **{(state, _I.CANCEL): _A.CANCELLED for state in _LIVE},
}

ATTEMPT_STEPS: Final = _by_state(ATTEMPT_TRANSITIONS, AttemptState)
ATTEMPT_ENDS: Final = frozenset({AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.CANCELLED})


class ServerState(StrEnum):
    """Where a server is."""

    HEALTHY = "healthy"
    DEAD = "dead"
    DRAINING = "draining"


class ServerInput(StrEnum):
    """What can happen to a server."""

    REVIVE = "its health rose to 1.0 or more"
    DIE = "its health fell below 1.0, or too many probes failed in a row"
    DRAIN = "it is to be removed"


SERVER_TRANSITIONS: Mapping[tuple[ServerState, ServerInput], ServerState] = {
    (ServerState.DEAD, ServerInput.REVIVE): ServerState.HEALTHY,
    (ServerState.HEALTHY, ServerInput.DIE): ServerState.DEAD,
    (ServerState.DEAD, ServerInput.DRAIN): ServerState.DRAINING,
    (ServerState.HEALTHY, ServerInput.DRAIN): ServerState.DRAINING,
}


class Reliability(StrEnum):
    """Whether a server's streams can be trusted to reach their end (vocabulary of the original program)."""

    RELIABLE = "Reliable"
    UNRELIABLE = "Unreliable"
    SECOND_CHANCE = "SecondChanceGiven"


class ReliabilityInput(StrEnum):
    """What can happen to a reliability record."""

    BROKE = "a stream broke after its first token"
    CHOSEN = "it was chosen again"
    ENDED_WELL = "a stream ended well"


RELIABILITY_TRANSITIONS: Mapping[tuple[Reliability, ReliabilityInput], Reliability] = {
    (Reliability.RELIABLE, ReliabilityInput.BROKE): Reliability.UNRELIABLE,
    (Reliability.UNRELIABLE, ReliabilityInput.BROKE): Reliability.UNRELIABLE,
    (Reliability.SECOND_CHANCE, ReliabilityInput.BROKE): Reliability.UNRELIABLE,
    (Reliability.UNRELIABLE, ReliabilityInput.CHOSEN): Reliability.SECOND_CHANCE,
    (Reliability.SECOND_CHANCE, ReliabilityInput.ENDED_WELL): Reliability.RELIABLE,
}


def step_request(state: RequestState, given: RequestInput) -> RequestState | None:
    """Return the next state of a request, or None when `given` means nothing in `state`."""
    return REQUEST_STEPS[state].get(given)


def step_attempt(state: AttemptState, given: AttemptInput) -> AttemptState | None:
    """Return the next state of an attempt, or None when `given` means nothing in `state`."""
    return ATTEMPT_STEPS[state].get(given)


def step_server(state: ServerState, given: ServerInput) -> ServerState | None:
    """Return the next state of a server, or None when `given` means nothing in `state`."""
    return SERVER_TRANSITIONS.get((state, given))


def step_reliability(state: Reliability, given: ReliabilityInput) -> Reliability:
    """Return the next reliability record; what is not in the table changes nothing."""
    return RELIABILITY_TRANSITIONS.get((state, given), state)
