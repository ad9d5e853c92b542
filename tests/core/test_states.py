"""Every (state, input) pair of the four tables, legal and illegal, against tables written by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from enum import StrEnum
from random import Random

import pytest

from lbcore import events
from lbcore.balancer import LoadBalancer
from lbcore.commands import StartAttempt
from lbcore.config import Config, RaceSettings, ServerSettings
from lbcore.events import Event, Reason
from lbcore.ollama import default_routes
from lbcore.states import (
    AttemptInput,
    AttemptState,
    Reliability,
    ReliabilityInput,
    RequestInput,
    RequestState,
    ServerInput,
    ServerState,
    step_attempt,
    step_reliability,
    step_request,
    step_server,
)

# One row a state; the columns are the inputs in the order of their enum; "." means nothing happens.
REQUEST = """
            START   COMMIT    FINISH  REJECT    FAIL    ABORT
QUEUED      RACING  .         .       REJECTED  .       ABORTED
RACING      .       RELAYING  DONE    .         FAILED  ABORTED
RELAYING    .       .         DONE    .         FAILED  ABORTED
DONE        .       .         .       .         .       .
REJECTED    .       .         .       .         .       .
FAILED      .       .         .       .         .       .
ABORTED     .       .         .       .         .       .
"""
ATTEMPT = """
               CONNECTED      HEAD       FIRST_TOKEN  BUFFER_FULL  COMMIT     END        FAIL    CANCEL
CONNECTING     AWAITING_HEAD  .          .            .            .          .          FAILED  CANCELLED
AWAITING_HEAD  .              STREAMING  STREAMING    .            .          .          FAILED  CANCELLED
STREAMING      .              .          STREAMING    STREAMING    COMMITTED  SUCCEEDED  FAILED  CANCELLED
COMMITTED      .              .          .            .            .          SUCCEEDED  FAILED  CANCELLED
SUCCEEDED      .              .          .            .            .          .          .       .
FAILED         .              .          .            .            .          .          .       .
CANCELLED      .              .          .            .            .          .          .       .
"""
SERVER = """
          REVIVE   DIE   DRAIN
HEALTHY   .        DEAD  DRAINING
DEAD      HEALTHY  .     DRAINING
DRAINING  .        .     .
"""
RELIABILITY = """
               BROKE       CHOSEN         ENDED_WELL
RELIABLE       UNRELIABLE  .              .
UNRELIABLE     UNRELIABLE  SECOND_CHANCE  .
SECOND_CHANCE  UNRELIABLE  .              RELIABLE
"""


def _cells(table: str) -> dict[tuple[str, str], str | None]:
    header, *rows = [line.split() for line in table.strip().splitlines()]
    return {
        (state, column): None if cell == "." else cell
        for state, *cells in rows
        for column, cell in zip(header, cells, strict=True)
    }


@pytest.mark.parametrize(
    ("table", "states", "inputs", "step"),
    [
        (REQUEST, RequestState, RequestInput, step_request),
        (ATTEMPT, AttemptState, AttemptInput, step_attempt),
        (SERVER, ServerState, ServerInput, step_server),
    ],
    ids=["request", "attempt", "server"],
)
def test_every_pair_does_what_the_table_says(
    table: str, states: type[StrEnum], inputs: type[StrEnum], step: Callable[..., StrEnum | None]
) -> None:
    cells = _cells(table)
    assert set(cells) == {(s.name, i.name) for s, i in itertools.product(states, inputs)}  # no pair is left out
    for (state, given), expected in cells.items():
        following = step(states[state], inputs[given])
        assert (following.name if following is not None else None) == expected, (state, given)


def test_every_pair_of_the_reliability_record() -> None:
    cells = _cells(RELIABILITY)
    assert set(cells) == {(s.name, i.name) for s, i in itertools.product(Reliability, ReliabilityInput)}
    for (state, given), expected in cells.items():
        following = step_reliability(Reliability[state], ReliabilityInput[given])
        assert following.name == (expected or state), (state, given)


# --- the same through the balancer --------------------------------------------------------------------------------

EVENTS: dict[str, Callable[[int], Event]] = {
    "CONNECTED": events.AttemptConnected,
    "HEAD": lambda attempt_id: events.HeadReceived(attempt_id, 200),
    "FIRST_TOKEN": events.FirstTokenReceived,
    "BUFFER_FULL": events.BufferFilled,
    "END": events.StreamEnded,
    "FAIL": lambda attempt_id: events.AttemptFailed(attempt_id, Reason.RESET),
}
PATHS = {
    "CONNECTING": [],
    "AWAITING_HEAD": ["CONNECTED"],
    "STREAMING": ["CONNECTED", "HEAD"],
    "COMMITTED": ["CONNECTED", "HEAD", "FIRST_TOKEN"],
    "SUCCEEDED": ["CONNECTED", "HEAD", "FIRST_TOKEN", "END"],
    "FAILED": ["FAIL"],
}


def _balancer() -> tuple[LoadBalancer, int]:
    race = RaceSettings(racers_max=1, hedges_max=0)
    servers = (ServerSettings(url="http://a:11434", name="a"),)
    balancer = LoadBalancer(Config(servers=servers, race=race, routes=default_routes(race)), Random(1))
    balancer.handle_timeout(0)
    balancer.handle(events.ProbeCompleted(1, 1, version="0.9.0"), 0)
    on_disk = (events.ModelInfo("m", "sha", "2026-01-01T00:00:00Z", '{"name":"m"}'),)
    balancer.handle(events.ModelsSynced(1, 1, on_disk, (events.ActiveModel("m", '{"name":"m"}'),)), 0)
    commands = balancer.handle(events.RequestArrived(1, "/api/chat", "m", stream=True, generates=True), 0)
    (attempt_id,) = [command.attempt_id for command in commands if isinstance(command, StartAttempt)]
    return balancer, attempt_id


@pytest.mark.parametrize("state", PATHS)
@pytest.mark.parametrize("given", EVENTS)
def test_an_event_that_does_not_fit_changes_nothing_but_the_count_of_late_ones(state: str, given: str) -> None:
    balancer, attempt_id = _balancer()
    for step in PATHS[state]:
        balancer.handle(EVENTS[step](attempt_id), 1)
    before, late = repr(balancer), balancer.ledger.late_events
    commands = balancer.handle(EVENTS[given](attempt_id), 2)
    if _cells(ATTEMPT)[state, given] is None:
        assert (commands, repr(balancer), balancer.ledger.late_events) == ([], before, late + 1)
    else:
        assert balancer.ledger.late_events == late
