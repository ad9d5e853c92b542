"""Stories of a server that fails all it is asked while others are well: nobody is to notice, and nothing is flooded."""

from __future__ import annotations

from typing import Any

from lbcore.commands import AttemptKind, Decision, PassAnswer
from lbcore.events import Reason
from tests.playbook import A, Playbook, QueueSettings, RaceSettings, RetrySettings, arrival, decision, fleet

LONELY = RaceSettings(racers_max=1, hedges_max=0)
ROOMY = {"slots": 8}


def failing(**sections: Any) -> Playbook:
    """Return a fleet in which "a" has failed request 1, whose retry keeps "b" full."""
    book = fleet("a b", a=ROOMY, b={"in_flight_max": 1}, race=LONELY, **sections)
    book.failed(book.alone(1, "a"), Reason.SERVER_ERROR, 500)
    book.started(1, AttemptKind.RETRY, "b")
    return book


def test_all_that_a_server_fails_at_once_is_asked_elsewhere() -> None:
    book = fleet("a b", a=ROOMY, b=ROOMY, race=LONELY)
    attempts = []
    for request_id in range(1, 9):
        book >> arrival(request_id)
        attempts.append(book.started(request_id))
    for request_id, attempt in enumerate(attempts, 1):
        if attempt.server == "a":
            book.failed(attempt, Reason.SERVER_ERROR, 500)
            book.started(request_id, AttemptKind.RETRY, "b")
    assert sum(attempt.server == "a" for attempt in attempts) > 3


def test_that_the_budget_is_spent_is_said_in_plain_words() -> None:
    book = fleet("a b", race=LONELY, retry=RetrySettings(budget=0.0, budget_min=0))
    first = book.alone(1, "a")
    book.failed(first, Reason.SERVER_ERROR, 500)
    book << decision(Decision.RETRIED, why="the budget is spent; 0 retries under way", names=())
    book << PassAnswer(1, first.id)


def test_requests_that_fail_together_count_as_one_failure() -> None:
    book = fleet("a b", a=ROOMY, b=ROOMY, race=LONELY)
    one, two = book.alone(1, "a"), book.alone(2, "a")
    book.failed(one, Reason.SERVER_ERROR, 500).skip()
    book.failed(two, Reason.SERVER_ERROR, 500).skip()
    assert book.model("a").failures == 1
    assert book.model("a").failing_until_ns == book.now_ns + 1_000_000_000


def test_an_answer_to_what_was_asked_before_a_failure_does_not_excuse_it() -> None:
    book = fleet("a b", a=ROOMY, b=ROOMY, race=LONELY)
    one, two = book.alone(1, "a"), book.alone(2, "a")
    book.after(10).failed(one, Reason.SERVER_ERROR, 500).skip()
    book.token(two).skip()
    assert book.model("a").failures == 1


def test_a_server_that_has_failed_is_tried_with_one_request_at_a_time() -> None:
    book = failing()
    book.after(1001)
    book.alone(2, "a")
    book >> arrival(3)
    book << decision(Decision.QUEUED)


def test_an_answer_to_the_one_it_is_tried_with_opens_a_server_to_all() -> None:
    book = failing()
    book.after(1001)
    book.token(book.alone(2, "a")).skip()
    book.alone(3, "a")


def test_who_finds_room_only_where_requests_fail_waits_for_the_others() -> None:
    book = failing()
    book >> arrival(2)
    book << decision(Decision.QUEUED)
    retry = book.request(1).attempts[-1]
    book.token(A(retry.id, "b")).skip()
    book.ends(A(retry.id, "b"))
    book.skip()
    assert [attempt.server.name for attempt in book.request(2).attempts] == ["b"]


def test_who_waits_for_others_is_served_before_those_that_come_later() -> None:
    book = failing()
    book >> arrival(2)
    book.skip()
    book.after(1001)
    book >> arrival(3)
    book.skip()
    assert [attempt.server.name for attempt in book.request(2).attempts] == ["a"]
    assert not book.request(3).attempts


def test_who_has_waited_to_the_end_or_finds_the_queue_full_is_sent_where_requests_fail() -> None:
    book = failing(queue=QueueSettings(timeout_ns=500_000_000))
    book >> arrival(2)
    book.skip()
    book.after(500)
    book.started(2, AttemptKind.PRIMARY, "a")
    full = failing(queue=QueueSettings(length_max=0))
    full.alone(2, "a")


def test_where_all_fail_nobody_waits() -> None:
    book = fleet("a", a=ROOMY, race=LONELY)
    book.failed(book.alone(1), Reason.SERVER_ERROR, 500).skip()
    book.alone(2, "a")
