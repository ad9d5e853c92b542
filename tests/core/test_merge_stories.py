"""Requests that go to all servers concerned, whose answers are merged; and those for servers that the client names."""

from __future__ import annotations

import pytest

from lbcore import events
from lbcore.commands import (
    AbortRequest,
    AttemptKind,
    CancelAttempt,
    CommitAttempt,
    Decision,
    EndMerge,
    PassAnswer,
    StartMerge,
)
from lbcore.config import Strategy
from lbcore.events import Reason
from lbcore.ollama import RequestKind
from lbcore.states import Reliability
from tests.playbook import A, Playbook, arrival, decision, fleet, many, rejected

MANAGE = RequestKind.MANAGE


def change(book: Playbook, path: str, request_id: int = 1, *, stream: bool = False, servers: str = "") -> list[A]:
    """Tell of a request that changes something, and return the attempts of its merge."""
    pins = tuple(servers.split())
    book >> arrival(request_id, route=path, kind=MANAGE, stream=stream, servers=pins)
    asked = [s for s in book.balancer.fleet if s.is_alive and (not pins or s.name in pins)]
    if path in {"/api/copy", "/api/delete"} and not pins:
        asked = [s for s in asked if s.has("m:latest")]
    book << StartMerge(request_id, tuple(s.id for s in asked))
    return [book.started(request_id, server=s.name) for s in asked]


def test_a_copy_goes_to_every_server_that_has_the_model_and_ends_when_all_have_answered() -> None:
    book = fleet("a b c")
    book.server("c").models.clear()
    book.balancer.fleet._changed()
    first, second = change(book, "/api/copy")
    assert (first.server, second.server) == ("a", "b")
    book.head(first, second).ends(second) << book.probed("b")
    book.ends(first) << book.probed("a") << EndMerge(1)
    book << decision(Decision.FINISHED, why="on all 2 servers")
    assert book.outcome(1) is Decision.FINISHED


def test_a_delete_goes_also_where_the_model_may_have_come_since_the_server_was_read() -> None:
    """Who copies and then deletes at once leaves nothing behind."""
    book = fleet("a b c", have="m n")
    for name in ("b", "c"):
        book.server(name).models.pop("m:latest")
    book.balancer.fleet._changed()
    book.server("b").outdated = True
    book >> arrival(1, route="/api/delete", kind=MANAGE, stream=False)
    book << StartMerge(1, (book.server("a").id, book.server("b").id))
    first, second = book.started(1, server="a"), book.started(1, server="b")
    book.head(first).ends(first) << book.probed("a")
    book.failed(second, Reason.MODEL_NOT_FOUND, 404).skip()
    assert book.outcome(1) is Decision.FINISHED


def test_a_pull_goes_to_every_live_server_whether_it_has_the_model_or_not() -> None:
    book = fleet("a b", have="n", active="")
    assert [attempt.server for attempt in change(book, "/api/pull", stream=True)] == ["a", "b"]


def test_a_server_that_fails_does_not_stop_the_others() -> None:
    book = fleet("a b")
    first, second = change(book, "/api/pull", stream=True)
    book.token(first).done()
    book.failed(second, Reason.ERROR_LINE, 200, answered=True).done()
    book.ends(first) << book.probed("a") << EndMerge(1)
    book << decision(Decision.FAILED, why="failed on 1 of 2 servers: b: error line in the stream")


def test_nothing_is_committed_while_answers_are_merged_and_nobody_else_is_asked() -> None:
    book = fleet("a b c")
    first, second = change(book, "/api/pull", stream=True, servers="a b")
    book.token(first).done().token(second).done()
    book.failed(first, Reason.RESET) << book.probed("a")
    book.done()
    book.ends(second) << book.probed("b") << EndMerge(1)


def test_one_server_alone_answers_for_itself() -> None:
    book = fleet("a")
    only = book.alone(1, "a", route="/api/pull", kind=MANAGE)
    book.token(only) << CommitAttempt(1, only.id)


def test_what_nobody_is_known_to_have_is_refused_in_the_words_of_one_server() -> None:
    book = fleet("a b", have="n", active="")
    book.after(2000) >> arrival(1, route="/api/delete", kind=MANAGE, stream=False)
    book.skip()
    book.sync("a", "n", "").sync("b", "n", "")
    only = book.started(1)
    book.head(only).failed(only, Reason.MODEL_NOT_FOUND, 404) << PassAnswer(1, only.id)


def test_a_client_that_leaves_stops_the_pulls() -> None:
    book = fleet("a b")
    first, second = change(book, "/api/pull", stream=True)
    book.token(first) >> events.DownstreamClosed(1)
    book << CancelAttempt(first.id, Reason.CLIENT_LEFT) << CancelAttempt(second.id, Reason.CLIENT_LEFT)


def test_a_pull_may_be_silent_while_a_server_checks_what_it_has_got_and_then_nobody_is_to_blame() -> None:
    book = fleet("a b")
    first, second = change(book, "/api/pull", stream=True)
    book.token(first).token(second)
    book.after(899_000).done()
    book.ends(first) << book.probed("a")
    book.after(1_000) << CancelAttempt(second.id, Reason.SILENCE_TIMEOUT) << EndMerge(1)
    assert book.server("b").is_alive
    assert book.server("b").reliability is Reliability.RELIABLE


def test_a_push_that_the_registry_refuses_is_not_the_servers_fault() -> None:
    book = fleet("a")
    only = book.alone(1, "a", route="/api/push", kind=MANAGE)
    book.token(only) << CommitAttempt(1, only.id)
    book.failed(only, Reason.ERROR_LINE, 200) << AbortRequest(1, "the stream broke: a: error line in the stream")
    assert book.server("a").is_alive
    assert book.server("a").reliability is Reliability.RELIABLE


def test_a_drain_that_takes_too_long_breaks_a_merged_answer_off() -> None:
    book = fleet("a b")
    first, second = change(book, "/api/pull", stream=True)
    book.token(first) >> events.DrainDeadlinePassed()
    book << CancelAttempt(first.id, Reason.DRAINED) << CancelAttempt(second.id, Reason.DRAINED)
    book << AbortRequest(1, "the load balancer is shutting down")


# --- blobs -----------------------------------------------------------------------------------------------------

BLOBS = "/api/blobs/:digest"


def paused(book: Playbook, *attempts: A, paused: bool = True) -> None:
    """Tell that the request is, or is not any more, being sent."""
    for attempt in attempts:
        book.balancer.note_paused(attempt.id, paused=paused, now_ns=book.now_ns)


def test_a_blob_goes_to_every_live_server() -> None:
    book = fleet("a b", have="n", active="")
    first, second = change(book, BLOBS)
    book.head(first, second).ends(first) << book.probed("a")
    book.ends(second) << book.probed("b") << EndMerge(1)


def test_a_blob_may_take_as_long_as_it_is_being_sent_and_the_time_for_an_answer_runs_from_then_on() -> None:
    book = fleet("a b")
    first, second = change(book, BLOBS)
    book >> events.AttemptConnected(first.id) >> events.AttemptConnected(second.id)
    paused(book, first, second)
    book.after(2_000_000).done()
    paused(book, first, second, paused=False)
    book.after(899_000).done()
    book >> events.HeadReceived(first.id, 201)
    book.ends(first) << book.probed("a")
    book.after(1_000) << CancelAttempt(second.id, Reason.ANSWER_TIMEOUT) << EndMerge(1)
    assert book.server("b").is_alive


def test_a_server_that_answers_late_after_a_long_upload_has_time_for_the_rest_of_its_answer() -> None:
    book = fleet("a")
    only = book.alone(1, "a", route=BLOBS, kind=MANAGE, stream=False)
    book >> events.AttemptConnected(only.id)
    paused(book, only)
    book.after(899_000)
    paused(book, only, paused=False)
    book.after(500) >> events.HeadReceived(only.id, 201)
    book.after(10_000).done()
    book.ends(only) << book.probed("a") << CommitAttempt(1, only.id)


def test_what_was_not_sent_at_all_goes_to_the_next_server_and_what_was_half_sent_does_not() -> None:
    routes = many(BLOBS, strategy=Strategy.SEQUENTIAL)
    book = fleet("a b", routes=routes)
    first = book.alone(1, route=BLOBS, kind=MANAGE, stream=False)
    book.failed(first, Reason.CONNECT_REFUSED) << book.probed(first.server)
    second = book.started(1, AttemptKind.RETRY)
    book.done()
    book >> events.AttemptConnected(second.id)
    book.failed(second, Reason.BUSY, 503) << PassAnswer(1, second.id)


def test_a_blob_that_is_not_everywhere_is_no_failure() -> None:
    book = fleet("a b")
    book >> arrival(1, None, route=BLOBS, stream=False) << StartMerge(1, (1, 2))
    first, second = book.started(1, server="a"), book.started(1, server="b")
    book.failed(first, Reason.ELSEWHERE, 404).done()
    book.head(second).ends(second) << EndMerge(1)
    assert book.outcome(1) is Decision.FINISHED
    assert book.server("a").health == 1.0


def test_what_all_servers_refuse_is_no_failure_but_what_one_of_them_refuses_is() -> None:
    book = fleet("a b")
    for request_id, n_refused, outcome in ((1, 2, Decision.FINISHED), (2, 1, Decision.FAILED)):
        attempts = change(book, BLOBS, request_id)
        for attempt in attempts[n_refused:]:
            book.head(attempt).ends(attempt).skip()
        for attempt in attempts[:n_refused]:
            book.failed(attempt, Reason.CLIENT_ERROR, 400)
        book << EndMerge(request_id)
        assert book.outcome(request_id) is outcome


def test_a_question_for_a_blob_is_put_to_each_server_once_though_one_dies() -> None:
    book = fleet("a b c")
    book >> arrival(1, None, route=BLOBS, stream=False, servers=("a", "b")) << StartMerge(1, (1, 2))
    first, second = book.started(1, server="a"), book.started(1, server="b")
    for _ in range(2):
        book.doubt("a")
        book.doubt("b")
    book.failed(first, Reason.RESET) << book.probed("a")
    book.done()
    book.failed(second, Reason.RESET) << book.probed("b") << EndMerge(1)


# --- the servers that a client names ---------------------------------------------------------------------------


def test_a_pinned_request_goes_to_the_server_that_is_named_though_another_is_faster() -> None:
    book = fleet("a b c")
    assert book.alone(1, "c", servers=("c",)).server == "c"


def test_a_pinned_request_races_among_those_that_are_named() -> None:
    book = fleet("a b c")
    assert {attempt.server for attempt in book.race(1, servers=("b", "c"))} == {"b", "c"}


def test_a_pinned_request_is_retried_nowhere_else() -> None:
    book = fleet("a b")
    only = book.alone(1, "b", servers=("b",))
    book.head(only).failed(only, Reason.SERVER_ERROR, 500) << PassAnswer(1, only.id)


def test_a_pinned_server_that_lacks_the_model_says_so_itself() -> None:
    book = fleet("a b")
    book.server("b").models.clear()
    book.balancer.fleet._changed()
    only = book.alone(1, "b", servers=("b",))
    book.head(only).failed(only, Reason.MODEL_NOT_FOUND, 404) << PassAnswer(1, only.id)


@pytest.mark.parametrize("path", ["/api/chat", "/api/pull", "/api/tags", "/x"])
def test_a_pinned_server_that_is_dead_is_an_error_that_says_so(path: str) -> None:
    book = fleet("a b")
    book.server("b").probe_failures = 1
    book >> events.SyncRequested()
    book.skip()
    book.sync("a").probe_failed("b").skip()
    book >> events.SyncRequested()
    book.skip()
    book.sync("a").probe_failed("b").skip()
    book >> arrival(1, route=path, servers=("b",))
    book << rejected(1, 502, "X-Ollama-LB-Server: server b is dead: connection refused")


def test_a_pinned_server_that_does_not_exist_is_an_error_that_names_those_that_do() -> None:
    book = fleet("a b")
    book >> arrival(1, servers=("a", "d"))
    book << rejected(1, 400, 'there is no server "d"; there are a, b')


def test_an_unload_with_a_pin_goes_there_only() -> None:
    book = fleet("a b")
    assert book.alone(1, "b", kind=RequestKind.UNLOAD, servers=("b",)).server == "b"
