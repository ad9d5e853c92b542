"""Stories found in a review of the core: requests that are left waiting, or given up, while a server could answer."""

from __future__ import annotations

from lbcore import events
from lbcore.commands import AttemptKind, CommitAttempt
from lbcore.events import Reason
from lbcore.ollama import RequestKind
from tests.playbook import Playbook, RaceSettings, arrival, fleet, lost

LONELY = RaceSettings(racers_max=1, hedges_max=0)
PAIR = RaceSettings(racers_min=2, hedges_max=0)


def killed(book: Playbook, name: str) -> None:
    """Let a server die: the probes under way of it fail, twice."""
    for _ in range(2):
        if not book.server(name).probe_id:
            book >> events.SyncRequested()
            book.skip()
        book.probe_failed(name).skip()
    assert not book.server(name).is_alive


def asked(book: Playbook, request_id: int) -> list[str]:
    """Return the servers that a request was sent to."""
    return [attempt.server.name for attempt in book.request(request_id).attempts]


# --- loads --------------------------------------------------------------------------------------------------------


def test_a_load_that_lost_its_race_ends_when_its_first_line_is_larger_than_the_buffer() -> None:
    book = fleet("a b", race=PAIR)
    book.model("b").loaded = False
    first, load = book.race(1)
    book.token(first) << CommitAttempt(1, first.id)
    book.head(load) >> events.BufferFilled(load.id)
    book << book.probed("b") << lost(load)


# --- the next server ----------------------------------------------------------------------------------------------


def test_a_pull_that_cannot_reach_its_server_goes_to_another() -> None:
    book = fleet("a b", race=LONELY)
    only = book.alone(1, model="new", route="*", kind=RequestKind.MANAGE)
    other = "b" if only.server == "a" else "a"
    book.failed(only, Reason.CONNECT_REFUSED) << book.probed(only.server)
    book.started(1, AttemptKind.RETRY, other)


def test_a_request_for_a_model_nobody_has_is_asked_of_another_server_when_the_first_cannot_be_reached() -> None:
    book = fleet("a b", race=LONELY)
    only = book.alone(1, model="new")
    other = "b" if only.server == "a" else "a"
    book.failed(only, Reason.CONNECT_REFUSED) << book.probed(only.server)
    book.started(1, AttemptKind.RETRY, other)


# --- rescue -------------------------------------------------------------------------------------------------------


def test_a_request_all_of_whose_racers_hang_on_servers_that_died_is_taken_elsewhere() -> None:
    book = fleet("a b c", race=PAIR)
    book.head(*book.race(1))
    killed(book, "a")
    assert asked(book, 1) == ["a", "b"]
    killed(book, "b")
    assert asked(book, 1) == ["a", "b", "c"]


def test_a_request_left_alone_with_a_racer_on_a_dead_server_is_taken_elsewhere() -> None:
    book = fleet("a b c", race=PAIR)
    first, second = book.race(1)
    book.head(first, second)
    killed(book, "b")
    book.failed(first, Reason.BUSY, 503)
    assert asked(book, 1) == ["a", "b", "c"]
    book.skip()


def test_a_request_that_hangs_on_a_dead_server_is_taken_to_the_first_that_revives() -> None:
    book = fleet("a b", race=LONELY)
    killed(book, "b")
    only = book.alone(1, "a")
    book.head(only)
    killed(book, "a")
    book.after(1000) >> events.SyncRequested()
    book.skip()
    book.sync("b")
    book.started(1, AttemptKind.HEDGE, "b")


def test_a_last_resort_that_hangs_is_not_waited_for_once_another_server_revives() -> None:
    book = fleet("a b", race=LONELY)
    killed(book, "a")
    killed(book, "b")
    book >> arrival(1)
    only = book.started(1)
    book.head(only)
    other = "b" if only.server == "a" else "a"
    book.after(1000) >> events.SyncRequested()
    book.skip()
    book.sync(other)
    book.started(1, AttemptKind.HEDGE, other)


def test_a_request_whose_server_died_while_all_others_were_full_is_taken_elsewhere_when_room_is_made() -> None:
    book = fleet("a b", b={"in_flight_max": 1}, race=LONELY)
    book.server("a").health = 1.0
    waiting = book.alone(1, "a")
    book.head(waiting)
    book.model("b").note_first_token(1, book.now_ns)
    streaming = book.alone(2, "b")
    book.token(streaming) << CommitAttempt(2, streaming.id)
    killed(book, "a")
    assert asked(book, 1) == ["a"]
    book.ends(streaming)
    book.started(1, AttemptKind.HEDGE, "b")
