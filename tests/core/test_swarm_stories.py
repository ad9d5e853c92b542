"""Stories that the swarm of random scenarios has found (`ollama-lb simulate --swarm`), told as short as they get."""

from __future__ import annotations

import pytest

from lbcore import events
from lbcore.commands import AttemptKind, CommitAttempt
from lbcore.events import Reason
from lbcore.schema import SECOND_NS
from tests.core.test_stories_review import killed
from tests.playbook import (
    A,
    Playbook,
    QueueSettings,
    RaceSettings,
    TimeoutSettings,
    arrival,
    fleet,
    loaded,
    lost,
    models,
)

LONELY = RaceSettings(racers_max=1, hedges_max=0)
PAIR = RaceSettings(racers_min=2, hedges_max=0)
LARGE = '{"num_ctx":8192}'


def pair(book: Playbook, request_id: int, runner_key: str = "") -> tuple[A, A]:
    """Let a and b race, and return the attempts on a and on b."""
    first, second = book.race(request_id, runner_key=runner_key)
    return (first, second) if first.server == "a" else (second, first)


def waits_for_a_load_with_other_options() -> tuple[Playbook, int]:
    """Let b load m twice, for two requests with different options: the first load is done, the second under way."""
    book = fleet("a b", active="m", race=PAIR)
    book.model("b").loaded = False
    first, loader = book.race(1)
    other, waiting = book.race(2, runner_key=LARGE)
    assert (loader.server, waiting.server) == ("b", "b")
    book.token(loader) << book.probed("b") << CommitAttempt(1, loader.id) << lost(first)
    book.token(other) << CommitAttempt(2, other.id)  # and `waiting`, for which b loads now, goes on
    return book, waiting.id


def test_a_lost_race_cancels_no_load_that_other_options_have_made_necessary() -> None:
    book, waiting = waits_for_a_load_with_other_options()
    assert book.balancer.ledger.attempts[waiting].detached


def test_a_load_with_other_options_goes_on_though_the_model_is_listed_as_loaded() -> None:
    book, waiting = waits_for_a_load_with_other_options()
    server = book.server("b")
    book >> events.ProbeCompleted(server.id, server.probe_id)
    book >> events.ModelsSynced(server.id, server.last_probe_id, models("m"), loaded("m"))
    book.done()
    assert waiting in book.balancer.ledger.attempts


def test_who_wants_other_options_makes_ollama_load_though_others_still_wait_for_a_slot() -> None:
    book = fleet("a b", active="m", race=PAIR)
    book.model("b").loaded = False
    _, loader = book.race(1)
    _, has_no_slot = book.race(2)
    assert (loader.server, has_no_slot.server) == ("b", "b")
    book.token(loader).skip()  # loaded: the second one waits for a slot, no more for the load
    first, other = book.race(3, runner_key=LARGE)
    book.token(first if first.server == "a" else other).skip()
    assert book.balancer.ledger.attempts[other.id if other.server == "b" else first.id].detached


def test_who_wants_other_options_makes_ollama_load_though_who_loaded_before_still_waits() -> None:
    book, waiting = waits_for_a_load_with_other_options()
    model = book.model("b")
    model.loaded, model.runner_key = True, LARGE  # loaded meanwhile, but no slot was free for it
    on_a, on_b = pair(book, 3)
    book.token(on_a).skip()
    assert book.balancer.ledger.attempts[on_b.id].detached
    assert waiting in book.balancer.ledger.attempts


@pytest.mark.parametrize("early", [True, False])
def test_who_came_first_makes_ollama_load_anew_what_was_evicted_though_another_was_to_load_next(*, early: bool) -> None:
    book = fleet("a b", active="m", race=PAIR)
    book.model("b").loaded = False
    _, loader = pair(book, 1)
    on_a, waits_for_a_slot = pair(book, 2)
    if early:
        pair(book, 3, LARGE)
    book.token(loader).skip()
    if not early:
        pair(book, 3, LARGE)
    book.ends(loader)  # what b will load next is what the third one wants
    book.sync("b", active="").skip()  # but it has loaded another model since, and dropped this one
    book.token(on_a).skip()
    assert book.balancer.ledger.attempts[waits_for_a_slot.id].detached


def test_a_retry_that_went_to_a_dead_server_is_taken_back_by_the_first_that_revives() -> None:
    book = fleet("a b c", race=LONELY)
    only = book.alone(1)
    dead = [name for name in "abc" if name != only.server]
    for name in dead:
        killed(book, name)
    book.failed(only, Reason.CONNECT_REFUSED).skip()
    tried = [attempt.server.name for attempt in book.request(1).attempts]
    assert len(tried) == 2
    (left,) = (name for name in "abc" if name not in tried)
    book >> events.SyncRequested()
    book.skip()
    book.sync(left)
    book.started(1, AttemptKind.HEDGE, left)


def test_who_has_waited_to_the_end_gets_the_room_that_is_made_in_that_very_moment() -> None:
    timeouts = TimeoutSettings(connect_ns=3 * SECOND_NS)
    queue = QueueSettings(timeout_ns=3 * SECOND_NS)
    book = fleet("a", a={"in_flight_max": 1}, race=LONELY, timeouts=timeouts, queue=queue)
    book.alone(1)
    book >> arrival(2)
    book.skip()
    book.after(3000).skip()  # the first could not connect for as long as the second may wait
    assert [attempt.server.name for attempt in book.request(2).attempts] == ["a"]
