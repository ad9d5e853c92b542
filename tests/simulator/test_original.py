"""The original program's rules, as stories; `simulator.policies.original` says what is known of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from random import Random
from typing import Any

import pytest

from lbcore import events
from lbcore.commands import AbortRequest, CancelAttempt, CommitAttempt, Decision, PassAnswer, StartProbe
from lbcore.config import HealthSettings, RouteSettings, Winner
from lbcore.events import Reason
from lbcore.ollama import RequestKind
from lbcore.records import Request
from lbcore.schema import SECOND_NS
from lbcore.states import Reliability, ServerState
from simulator.policies.known import policy
from simulator.policies.original import Original
from tests.playbook import HOUR_NS, Playbook, ProbeSettings, arrival, decision, lost, open_books, rejected
from tests.simulator.policy_kit import told as told_of
from tests.simulator.small_world import config_of


@pytest.fixture(autouse=True)
def _told_to_the_end() -> Generator[None]:
    open_books()
    yield
    for book in open_books():
        book.done()


def told(names: str = "a b c", **sections: Any) -> Playbook:
    """Open a book about the original with a synced fleet."""
    book = told_of("original", names, **sections)
    assert isinstance(book.balancer, Original)
    return book


def health(book: Playbook) -> dict[str, float]:
    return {server.name: server.health for server in book.balancer.fleet}


# --- who is asked ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_servers", "n_racers"), [(1, 1), (2, 2), (3, 3), (5, 5), (6, 6), (9, 6)])
def test_a_chat_goes_to_three_to_six_servers(n_servers: int, n_racers: int) -> None:
    book = told(" ".join("abcdefghi"[:n_servers]))
    for request_id in range(1, 15):  # however busy they are
        assert len({attempt.server for attempt in book.race(request_id)}) == n_racers


def test_servers_that_must_load_the_model_only_fill_up_to_three() -> None:
    book = told("a b c d e f")
    for name in "bcdef":
        book.model(name).loaded = False
    chosen = [attempt.server for attempt in book.race(1)]
    assert len(chosen) == 3
    assert chosen[0] == "a", "what has it loaded comes first"


def test_servers_are_drawn_by_health() -> None:
    book = told("a b")
    book.server("a").health, book.server("b").health = 90.0, 10.0
    request = Request(arrival(1), "m:latest", RouteSettings(), 0)
    firsts = Counter(book.balancer.placement.order(list(book.balancer.fleet), request, 0)[0].name for _ in range(1000))
    assert abs(firsts["a"] - 900) < 5 * (1000 * 0.09) ** 0.5


def test_one_racer_may_be_a_dead_server() -> None:
    book = told("a b c d e f g", health=HealthSettings(resurrect=1.0))
    book.server("c").state, book.server("c").health = ServerState.DEAD, 0.5
    book.balancer.fleet.judge(book.server("c"))
    book.balancer.fleet._changed()
    chosen = [attempt.server for attempt in book.race(1)]
    assert len(chosen) == 6
    assert chosen[-1] == "c"


def test_other_routes_go_to_one_server() -> None:
    book = told()
    assert len(book.race(1, route="/api/show")) == 1
    (only,) = book.race(2, route="/api/embed")
    book.token(only) << CommitAttempt(2, only.id)  # and nothing is waited for


def test_there_is_no_queue_and_nobody_is_an_error() -> None:
    book = told()
    book >> arrival(1, "unknown") << rejected(1, 404, "unknown")
    for server in book.balancer.fleet:
        server.state, server.health = ServerState.DEAD, 0.5
        book.balancer.fleet.judge(server)
    book.balancer.fleet._changed()
    book >> arrival(2) << rejected(2, 502, "no server is reachable")
    assert book.outcome(2) is Decision.REJECTED


# --- who wins ----------------------------------------------------------------------------------------------


def test_the_client_waits_for_the_slowest_first_token_and_two_seconds() -> None:
    book = told()
    a, b, c = book.race(1)
    book.after(100).token(a).done()
    book.after(100).token(b).done()
    book.after(9_800).token(c).done()  # 10 s in all
    book.tokens(a, 500).tokens(b, 600).tokens(c, 3)
    book.after(1_999).done()
    book.after(1) << CommitAttempt(1, b.id) << lost(a) << lost(c)
    book << decision(Decision.COMMITTED, server=b.server, took_ns=12 * SECOND_NS)
    book.ends(b) << decision(Decision.FINISHED)


def test_a_racer_that_hangs_holds_the_client_for_thirty_seconds() -> None:
    book = told()
    a, b, c = book.race(1)
    book.token(a).tokens(a, 5)
    book.token(b).tokens(b, 4)
    book.head(c).after(29_999).done()
    book.tokens(a, 1).tokens(b, 1)
    book.after(1)
    assert book.skip() == [CancelAttempt(c.id, Reason.FIRST_TOKEN_TIMEOUT)], "they were heard of just now"
    book.after(2_000) << CommitAttempt(1, a.id) << lost(b)
    assert health(book)[c.server] == 0.5


def test_a_load_is_waited_for_and_cut_after_thirty_seconds() -> None:
    book = told("a b c", active="")
    a, b, c = book.race(1)
    book.head(c).after(8_000).token(a).done()
    book.after(2_000).token(b).done()
    book.after(19_999).done()  # c still loads
    book.after(1) << CancelAttempt(c.id, Reason.FIRST_TOKEN_TIMEOUT)
    book.after(2_000) << CommitAttempt(1, a.id) << lost(b)


def test_the_window_is_cut_short_only_when_everything_has_ended() -> None:
    book = told("a b")
    a, b = book.race(1)
    book.token(a).tokens(a, 10).ends(a).done()
    book.token(b).tokens(b, 20).done()
    book.after(1_000).ends(b) << CommitAttempt(1, b.id)
    assert book.outcome(1) is Decision.FINISHED
    assert health(book) == {a.server: 3.0, b.server: 5.0}


def test_a_racer_that_fails_is_not_replaced() -> None:
    book = told("a b c d e f g h")
    racers = book.race(1)
    for racer in racers[:-1]:
        book.failed(racer, Reason.CONNECT_REFUSED).done()
    book.token(racers[-1]).done()
    book.after(2_000) << CommitAttempt(1, racers[-1].id)


def test_when_all_fail_the_last_answer_is_passed_on_or_the_failures_are_named() -> None:
    book = told("a b")
    a, b = book.race(1)
    book.failed(a, Reason.SERVER_ERROR, 500).done()
    book.failed(b, Reason.RESET) << PassAnswer(1, a.id)
    assert book.outcome(1) is Decision.FAILED
    for server in book.balancer.fleet:
        server.state, server.health = ServerState.HEALTHY, 4.0
        book.balancer.fleet.judge(server)
    book.balancer.fleet._changed()
    c, d = book.race(2)
    book.failed(c, Reason.RESET).done()
    book.failed(d, Reason.RESET) << rejected(2, 502, "a: ", "b: ")


def test_a_refusal_is_the_answer_once_all_have_ended() -> None:
    book = told("a b")
    a, b = book.race(1)
    book.failed(a, Reason.CLIENT_ERROR, 400).done()
    book.failed(b, Reason.CLIENT_ERROR, 400) << PassAnswer(1, b.id)
    assert book.outcome(1) is Decision.FINISHED
    assert health(book) == {"a": 1.0, "b": 1.0}


def test_a_broken_stream_is_the_clients_loss() -> None:
    book = told("a b")
    a, b = book.race(1)
    book.token(a).tokens(a, 5)
    book.token(b).after(2_000) << CommitAttempt(1, a.id) << lost(b)
    book.failed(a, Reason.TRUNCATED)
    (command,) = book.skip()
    assert isinstance(command, AbortRequest)
    assert book.server(a.server).reliability is Reliability.UNRELIABLE
    assert health(book)[a.server] == 0.5


def test_an_unreliable_server_is_drawn_last_until_a_stream_ends_well() -> None:
    book = told("a b")
    book.server("a").reliability, book.server("a").breaks = Reliability.UNRELIABLE, 1
    a = next(attempt for attempt in book.race(1) if attempt.server == "a")
    assert a.id == 2, "b was drawn first"
    assert book.server("a").reliability is Reliability.SECOND_CHANCE
    book.token(a).ends(a).done()
    assert book.server("a").reliability is Reliability.RELIABLE
    book >> events.DownstreamClosed(1)
    assert isinstance(book.skip()[0], CancelAttempt)


def test_who_leaves_takes_all_attempts_along_and_nobody_is_blamed() -> None:
    book = told()
    racers = book.race(1)
    book >> events.DownstreamClosed(1)
    for racer in racers:
        book << CancelAttempt(racer.id, Reason.CLIENT_LEFT)
    assert set(health(book).values()) == {1.0}
    assert book.outcome(1) is Decision.ABORTED


def test_shutting_down_ends_everything() -> None:
    book = told("a b")
    a, b = book.race(1)
    book.token(a).ends(a).done()
    book.token(b).after(2_000) << CommitAttempt(1, a.id) << lost(b)
    racers = book.race(2)
    book >> events.DrainDeadlinePassed()
    for racer in racers:
        book << CancelAttempt(racer.id, Reason.DRAINED)
    book << rejected(2, 503)


# --- health ------------------------------------------------------------------------------------------------


def test_servers_start_dead_and_every_sync_forgets_what_was_earned() -> None:
    balancer = policy("original").build(config_of(2), Random(1))
    assert {server.state for server in balancer.fleet} == {ServerState.DEAD}
    book = told("a b", probe=ProbeSettings(interval_ns=10 * SECOND_NS))
    for request_id in (1, 2, 3):
        a, b = book.race(request_id)
        book.token(a).tokens(a, 5)
        book.token(b).tokens(b, 4)
        book.after(2_000) << CommitAttempt(request_id, a.id) << lost(b)
        book.ends(a)
    assert sum(health(book).values()) == 2 * 1.0 + 3 * 4.0, "the fastest earns 4, a loser nothing"
    book.after(4_000)
    assert {type(command) for command in book.skip()} == {StartProbe}
    book.sync("a").sync("b").done()
    assert health(book) == {"a": 1.0, "b": 1.0}


def test_one_failure_after_a_sync_is_death_until_the_next_sync_and_nothing_else_looks() -> None:
    book = told("a b c", probe=ProbeSettings(interval_ns=10 * SECOND_NS))
    a, *_ = book.race(1)
    book.failed(a, Reason.SERVER_ERROR, 500).done()  # no probe is started by that
    assert not book.server(a.server).is_alive
    assert {attempt.server for attempt in book.race(2)} == {"a", "b", "c"} - {a.server}
    book.after(10_000).skip()
    book.sync(a.server).skip()
    assert health(book)[a.server] == 1.0


def test_a_failed_sync_halves_and_the_beat_stays() -> None:
    book = told("a b", probe=ProbeSettings(interval_ns=10 * SECOND_NS))
    book.after(10_000).skip()
    book.probe_failed("a").done()
    book.sync("b").done()
    assert health(book) == {"a": 0.5, "b": 1.0}
    book.after(9_999).done()
    book.after(1)
    assert len(book.skip()) == 2


def test_an_operator_may_ask_for_a_sync_and_add_and_remove_servers() -> None:
    book = told("a b")
    book >> events.SyncRequested()
    assert len(book.skip()) == 2
    book.sync("a").sync("b").done()
    book >> events.ServerAdded(Playbook.settings("c"))
    book.after(0)
    book << book.probed("c")
    book.sync("c").done()
    assert len(book.race(1)) == 3
    book >> events.ServerRemovalRequested(book.server("c").id)
    assert len(book.race(2)) == 2


def test_its_configuration_is_that_of_seed_toml_and_more() -> None:
    config = policy("original").configure(config_of(2))
    route = config.route("/api/chat")
    assert (route.racers_min, route.racers_max, route.hedges_max, route.winner) == (3, 6, 0, Winner.MOST_TOKENS)
    assert config.race.measure_ns == 2 * SECOND_NS
    assert config.timeouts.connect_ns == config.timeouts.first_token_cold_ns == 30 * SECOND_NS
    assert config.probe.interval_dead_max_ns == config.probe.interval_ns < HOUR_NS


def test_late_and_strange_events_change_nothing() -> None:
    book = told("a b")
    a, b = book.race(1)
    book >> arrival(1) >> events.DownstreamClosed(9) >> events.StreamEnded(99) >> events.AttemptConnected(99)
    book >> events.BufferFilled(a.id) >> events.FirstTokenReceived(b.id)  # neither has a head yet
    assert book.balancer.ledger.late_events == 6
    book >> arrival(2, kind=RequestKind.UNLOAD)
    assert len(book.skip()) == 1
