"""The behaviours that the core promises, one story each; tests/core/test_fine_points.py has the finer ones."""

from __future__ import annotations

import pytest

from lbcore import events, selection
from lbcore.commands import AbortRequest, AttemptKind, CancelAttempt, CommitAttempt, Decision, PassAnswer, StartAttempt
from lbcore.config import Winner
from lbcore.errors import UnknownEventError
from lbcore.events import Reason
from lbcore.ollama import RequestKind
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.states import Reliability
from tests.playbook import (
    HealthSettings,
    Playbook,
    QueueSettings,
    RaceSettings,
    RetrySettings,
    TimeoutSettings,
    arrival,
    decision,
    fleet,
    lost,
    models,
    rejected,
)

LONELY = RaceSettings(racers_max=1, hedges_max=0)
PAIR = RaceSettings(racers_min=2, hedges_max=0)


# --- races and hedges ---------------------------------------------------------------------------------------------


def test_the_first_token_wins_and_the_loser_is_cancelled_at_that_instant() -> None:
    book = fleet("a b", race=PAIR)
    first, second = book.race(1)
    book.after(50).token(second) << CommitAttempt(1, second.id) << lost(first)
    book.ends(second)
    assert book.outcome(1) is Decision.FINISHED


def test_of_two_first_tokens_in_the_same_tick_the_one_told_first_wins() -> None:
    book = fleet("a b", race=PAIR)
    first, second = book.race(1)
    book.head(first, second)
    book >> events.FirstTokenReceived(second.id)
    book << CommitAttempt(1, second.id) << lost(first)
    book >> events.FirstTokenReceived(first.id)  # too late, and harmless
    book.done()


def test_an_extra_racer_goes_only_where_a_slot_is_idle() -> None:
    book = fleet("a b", factor=1, race=RaceSettings(hedges_max=0, utilisation_max=1.0))
    book.race(1)
    book >> arrival(2)  # both slots are taken
    commands = book.skip()
    assert len(commands) == 1


def test_an_extra_racer_goes_only_where_the_model_is_loaded() -> None:
    book = fleet("a b", race=RaceSettings(hedges_max=0))
    book.model("b").loaded = False
    book.alone(1, "a")


def test_on_a_busy_fleet_nobody_races() -> None:
    book = fleet("a b c d", factor=1, race=RaceSettings(hedges_max=0, utilisation_max=0.3))
    book.race(1)  # 2 of 4 slots in use
    book >> arrival(2)
    assert len(book.skip()) == 1


def test_a_hedge_asks_one_more_server_after_the_delay() -> None:
    book = fleet("a b", race=RaceSettings(racers_max=1, hedge_delay_initial_ns=SECOND_NS))
    first = book.alone(1, "a")
    book.after(999).done()
    book.after(1)
    hedge = book.started(1, AttemptKind.HEDGE, "b")
    book.token(hedge) << CommitAttempt(1, hedge.id) << lost(first)
    book.ends(hedge)


def test_on_a_busy_fleet_nobody_hedges_until_slots_are_free_again() -> None:
    race = RaceSettings(racers_max=1, hedge_delay_initial_ns=SECOND_NS, hedge_utilisation_max=0.5)
    book = fleet("a b c", factor=1, race=race)
    (first,), (second,) = book.race(1), book.race(2)
    book.token(second) << CommitAttempt(2, second.id)
    book.after(1500).done()  # 2 of 3 slots in use
    book.ends(second)
    book.after(500)
    book.started(1, AttemptKind.HEDGE)
    assert first.server != second.server


def test_a_server_in_doubt_is_hedged_however_busy_the_fleet_is() -> None:
    race = RaceSettings(racers_max=1, hedge_delay_initial_ns=SECOND_NS, hedge_utilisation_max=0.0)
    book = fleet("a b", race=race)
    book.alone(1, "a")
    book.doubt("a")
    book.after(1000)
    book.started(1, AttemptKind.HEDGE, "b")


def test_the_hedge_delay_is_the_p95_of_recent_first_tokens_within_its_bounds() -> None:
    race = RaceSettings(racers_max=1, hedge_delay_min_ns=100 * MS_NS, hedge_delay_max_ns=10 * SECOND_NS)
    book = fleet("a b", factor=1000, race=race)
    for i in range(1, 9):
        only = book.alone(i, "a")
        book.after(300).token(only) << CommitAttempt(i, only.id)
        book.ends(only)
    book.alone(9, "a")
    book.after(299).done()
    book.after(1)
    book.started(9, AttemptKind.HEDGE, "b")


def test_most_tokens_within_the_window_win() -> None:
    race = RaceSettings(winner=Winner.MOST_TOKENS, measure_ns=2 * SECOND_NS, racers_min=2, hedges_max=0)
    book = fleet("a b", race=race)
    first, second = book.race(1)
    book.token(first).token(second)
    book.tokens(first, 3).tokens(second, 5)
    book.after(1999).done()
    book.after(1) << CommitAttempt(1, second.id) << lost(first)
    book.ends(second)


def test_the_first_to_finish_wins() -> None:
    book = fleet("a b", race=RaceSettings(winner=Winner.FIRST_FINISH, racers_min=2, hedges_max=0))
    first, second = book.race(1)
    book.token(first).token(second).done()
    book.ends(second) << CommitAttempt(1, second.id) << lost(first)


def test_what_cannot_be_held_any_more_wins() -> None:
    book = fleet("a b", race=RaceSettings(winner=Winner.FIRST_FINISH, racers_min=2, hedges_max=0))
    first, second = book.race(1)
    book.token(first)
    book >> events.BufferFilled(first.id)
    book << CommitAttempt(1, first.id) << lost(second)


def test_races_lost_without_a_byte_lead_to_a_probe_and_no_more_lonely_choices() -> None:
    book = fleet("a b", factor=1, race=PAIR, health=HealthSettings(losses_max=3, resurrect=0.0))
    loser_id = book.server("b").id
    for i in range(1, 4):
        book >> arrival(i)
        started = [command for command in book.skip() if isinstance(command, StartAttempt)]
        (loser,) = [command.attempt_id for command in started if command.server_id == loser_id]
        (winner,) = [command.attempt_id for command in started if command.server_id != loser_id]
        book.after(50) >> events.AttemptConnected(winner) >> events.HeadReceived(winner, 200)
        book >> events.FirstTokenReceived(winner)
        assert CancelAttempt(loser, Reason.LOST_RACE) in book.skip()
        book >> events.StreamEnded(winner)
    assert book.server("b").doubted
    assert book.server("b").probe_id
    floor_ns = book.model("b").floor_ns
    assert floor_ns > 0
    book.model("b").raise_floor(floor_ns - 1, book.now_ns)
    assert book.model("b").floor_ns == floor_ns  # evidence only raises it


# --- failures before the commit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reason", [Reason.CONNECT_REFUSED, Reason.RESET, Reason.GARBAGE, Reason.TRUNCATED, Reason.BUSY]
)
def test_a_failure_before_the_commit_goes_to_the_next_server(reason: Reason) -> None:
    book = fleet("a b", race=LONELY)
    first = book.alone(1, "a")
    book >> events.AttemptFailed(first.id, reason)
    if reason is not Reason.BUSY:
        book << book.probed("a")
    second = book.started(1, AttemptKind.RETRY, "b")
    book.token(second) << CommitAttempt(1, second.id)
    book.ends(second)
    assert (book.server("a").health < 1.0) == (reason is not Reason.BUSY)


def test_when_all_give_the_same_error_it_is_passed_on_and_nobody_is_blamed() -> None:
    book = fleet("a b", race=LONELY)
    first = book.alone(1, "a")
    book.failed(first, Reason.SERVER_ERROR, 500)
    second = book.started(1, AttemptKind.RETRY, "b")
    book.failed(second, Reason.SERVER_ERROR, 500) << PassAnswer(1, second.id)
    assert [server.health for server in book.balancer.fleet] == [1.0, 1.0]


def test_a_server_is_blamed_for_a_5xx_once_another_has_answered_well() -> None:
    book = fleet("a b", race=LONELY)
    book.server("a").health = 8.0
    first = book.alone(1, "a")
    book.failed(first, Reason.SERVER_ERROR, 500)
    second = book.started(1, AttemptKind.RETRY, "b")
    assert book.server("a").health == 8.0
    book.token(second) << CommitAttempt(1, second.id)
    book.ends(second) << book.probed("a")
    assert book.server("a").health == 4.0


def test_a_refusal_is_the_clients_fault_and_final() -> None:
    book = fleet("a b", race=LONELY)
    first = book.alone(1, "a")
    book.failed(first, Reason.CLIENT_ERROR, 400) << PassAnswer(1, first.id)
    assert book.server("a").health == 1.0
    assert book.outcome(1) is Decision.FINISHED


def test_a_server_that_lacks_the_model_after_all_is_corrected_and_the_next_one_asked() -> None:
    book = fleet("a b", race=LONELY)
    first = book.alone(1, "a")
    book.failed(first, Reason.MODEL_NOT_FOUND, 404) << book.probed("a")
    book.started(1, AttemptKind.RETRY, "b")
    assert not book.server("a").has("m:latest")


def test_what_may_have_changed_something_is_not_sent_twice() -> None:
    book = fleet("a b", race=LONELY)
    first = book.alone(1, route="*", kind=RequestKind.MANAGE, stream=False)
    book.failed(first, Reason.RESET) << book.probed(first.server)
    book << rejected(1, 502, first.server)


def test_the_retry_budget_bounds_a_storm() -> None:
    book = fleet("a b", a={"slots": 8}, race=LONELY, retry=RetrySettings(budget=0.0, budget_min=1))
    one, two = book.alone(1, "a"), book.alone(2, "a")
    book.failed(one, Reason.SERVER_ERROR, 500)
    book.started(1, AttemptKind.RETRY, "b")
    book.failed(two, Reason.SERVER_ERROR, 500) << PassAnswer(2, two.id)


def test_when_all_time_out_it_is_a_504_that_names_them() -> None:
    timeouts = TimeoutSettings(connect_ns=SECOND_NS)
    book = fleet("a b", race=LONELY, timeouts=timeouts)
    first = book.alone(1, "a")
    book.after(1000) << CancelAttempt(first.id, Reason.CONNECT_TIMEOUT) << book.probed("a")
    second = book.started(1, AttemptKind.RETRY, "b")
    book.after(1000) << CancelAttempt(second.id, Reason.CONNECT_TIMEOUT) << book.probed("b")
    book << rejected(1, 504, "a: connect timeout", "b: connect timeout")


def test_a_warm_model_has_less_time_for_its_first_token_than_a_cold_one() -> None:
    timeouts = TimeoutSettings(first_token_warm_ns=2 * SECOND_NS, first_token_cold_ns=5 * SECOND_NS)
    book = fleet("a", race=LONELY, timeouts=timeouts)
    book.model("a").runner_key = ""
    warm, cold = book.alone(1), book.alone(2, runner_key='{"num_ctx":8192}')
    book >> events.AttemptConnected(warm.id) >> events.AttemptConnected(cold.id)
    book.after(2000)
    assert CancelAttempt(warm.id, Reason.FIRST_TOKEN_TIMEOUT) in book.skip()
    book.after(2999)
    assert not [c for c in book.skip() if isinstance(c, CancelAttempt)]
    book.after(1)
    assert CancelAttempt(cold.id, Reason.FIRST_TOKEN_TIMEOUT) in book.skip()


# --- after the commit ---------------------------------------------------------------------------------------------


def test_a_stream_that_breaks_is_aborted_and_its_server_passed_over_until_a_second_chance() -> None:
    book = fleet("a b", race=LONELY)
    only = book.alone(1, "a")
    book.token(only) << CommitAttempt(1, only.id)
    book >> events.AttemptFailed(only.id, Reason.TRUNCATED)
    commands = book.skip()
    assert isinstance(commands[0], AbortRequest)
    book.sync("a")
    assert book.server("a").reliability is Reliability.UNRELIABLE
    other = book.alone(2, "b")  # though a is faster
    book.token(other) << CommitAttempt(2, other.id)
    book.ends(other)
    book.now_ns += 31 * SECOND_NS
    chance = book.alone(3, "a")
    assert book.server("a").reliability is Reliability.SECOND_CHANCE
    book.token(chance) << CommitAttempt(3, chance.id)
    assert book.server("a").reliability is Reliability.SECOND_CHANCE
    book.ends(chance)
    assert book.server("a").reliability is Reliability.RELIABLE


def test_silence_is_a_failure_unless_the_client_is_the_slow_one() -> None:
    book = fleet("a", race=LONELY, timeouts=TimeoutSettings(silence_ns=SECOND_NS))
    only = book.alone(1)
    book.token(only) << CommitAttempt(1, only.id)
    book.balancer.note_paused(only.id, paused=True, now_ns=book.now_ns)
    book.after(5000).skip()
    assert book.outcome(1) is None
    book.balancer.note_paused(only.id, paused=False, now_ns=book.now_ns)
    book.after(2000).skip()
    assert book.outcome(1) is Decision.FAILED


def test_a_client_that_leaves_is_nobodys_failure() -> None:
    book = fleet("a b", race=PAIR)
    first, second = book.race(1)
    book >> events.DownstreamClosed(1)
    book << CancelAttempt(first.id, Reason.CLIENT_LEFT) << CancelAttempt(second.id, Reason.CLIENT_LEFT)
    assert [server.health for server in book.balancer.fleet] == [1.0, 1.0]


# --- models, queue, servers ---------------------------------------------------------------------------------------


def test_a_load_goes_to_one_server_and_an_unload_to_all_that_have_it_loaded() -> None:
    book = fleet("a b", race=PAIR)
    book.alone(1, kind=RequestKind.LOAD, stream=False)
    book >> arrival(2, kind=RequestKind.UNLOAD, stream=False)
    assert len(book.skip()) == 2


def test_a_lost_race_never_cancels_a_load() -> None:
    book = fleet("a b", race=PAIR)
    book.model("b").loaded = False
    first, loader = book.race(1)
    book.token(first) << CommitAttempt(1, first.id)  # and nothing else
    book.ends(first)
    book >> events.AttemptConnected(loader.id) >> events.HeadReceived(loader.id, 200)
    book >> events.FirstTokenReceived(loader.id)
    book << book.probed("b") << lost(loader)
    assert book.model("b").loaded


def test_requests_beyond_the_room_wait_in_line_and_the_queue_has_an_end() -> None:
    book = fleet("a", a={"in_flight_max": 1}, race=LONELY, queue=QueueSettings(length_max=2))
    first = book.alone(1)
    book >> arrival(2) >> arrival(3) >> arrival(4)
    book << rejected(4, 503, "server busy")
    book >> events.DownstreamClosed(1)
    book << CancelAttempt(first.id, Reason.CLIENT_LEFT)
    book.started(2)


def test_one_who_waits_too_long_gets_503() -> None:
    queue = QueueSettings(timeout_ns=2 * SECOND_NS)
    book = fleet("a", a={"in_flight_max": 1}, race=LONELY, queue=queue)
    book.alone(1)
    book >> arrival(2)
    book.after(2000) << rejected(2, 503, "server busy")


def test_a_server_is_dead_until_it_was_read_and_keeps_what_it_has_earned() -> None:
    book = Playbook("a")
    book.timeout().skip()
    assert not book.server("a").is_alive
    book.sync("a")
    assert book.server("a").health == 1.0
    book.server("a").health = 42.0
    book >> events.SyncRequested()
    book.skip()
    book.sync("a")
    assert book.server("a").health == 42.0


def test_a_dead_server_is_tried_again_within_its_bound() -> None:
    book = fleet("a")
    for _ in range(8):
        book.timeout().skip()
        book.probe_failed("a").skip()
    assert not book.server("a").is_alive
    deadline = book.balancer.next_deadline()
    assert deadline is not None
    assert deadline - book.now_ns <= book.config.probe.interval_dead_max_ns


def test_requests_that_wait_for_a_server_that_dies_are_taken_elsewhere() -> None:
    book = fleet("a b", race=LONELY)
    book.alone(1, "a")
    for _ in range(2):
        book >> events.SyncRequested()
        book.skip()
        book.probe_failed("a").skip()
    kinds = [attempt.kind for attempt in book.request(1).attempts]
    assert kinds == [AttemptKind.PRIMARY, AttemptKind.HEDGE]


def test_a_drained_server_finishes_what_it_streams_and_is_then_forgotten() -> None:
    book = fleet("a b", race=LONELY)
    only = book.alone(1, "a")
    book.token(only) << CommitAttempt(1, only.id)
    book >> events.ServerRemovalRequested(book.server("a").id)
    book.alone(2, "b")
    book.ends(only)
    assert [type(c).__name__ for c in book.skip()] == ["ForgetServer"]
    assert [server.name for server in book.balancer.fleet] == ["b"]


def test_a_model_nobody_has_is_looked_for_once_more_and_then_asked_of_one_server() -> None:
    book = fleet("a b", race=LONELY)
    book.after(5000).skip()
    book >> arrival(1, model="new")
    probes = book.skip()
    assert len(probes) == 2
    book.sync("a")
    assert book.outcome(1) is None
    book >> events.ProbeCompleted(book.server("b").id, book.server("b").probe_id, version="0.9.0")
    book >> events.ModelsSynced(book.server("b").id, book.server("b").last_probe_id, models("m"))
    only = book.started(1)
    book.failed(only, Reason.MODEL_NOT_FOUND, 404)
    book.skip()
    assert book.outcome(1) is Decision.FINISHED  # its 404 was passed on


def test_events_about_what_is_unknown_change_nothing() -> None:
    book = fleet("a")
    for event in (
        events.AttemptConnected(99),
        events.StreamEnded(99),
        events.DownstreamClosed(99),
        events.BufferFilled(99),
    ):
        book >> event
    book.done()
    assert book.balancer.ledger.late_events == 4
    with pytest.raises(UnknownEventError):
        book.balancer.handle("nonsense", book.now_ns)  # type: ignore[arg-type]


def test_decisions_say_who_won_after_how_long_and_why() -> None:
    book = fleet("a b", race=PAIR)
    first, second = book.race(1)
    book.after(50).token(first) << CommitAttempt(1, first.id) << lost(second)
    book << decision(Decision.COMMITTED, server="a", why="first-token", took_ns=50 * MS_NS)
    book.ends(first)
    book << decision(Decision.HEALTH, server="a", before="1.00", after="5.00", why="won a race")


def test_a_first_token_from_a_server_that_broke_streams_meanwhile_waits_a_moment_for_another() -> None:
    book = fleet("a b", a={"slots": 4}, race=PAIR)
    streaming, loser = book.race(1)
    book.token(streaming) << CommitAttempt(1, streaming.id) << lost(loser)
    first, second = book.race(2)
    book >> events.AttemptFailed(streaming.id, Reason.TRUNCATED)
    book.skip()
    book.sync("a")
    book.token(first).done()  # a is not trusted now
    book.token(second) << CommitAttempt(2, second.id) << lost(first)
    book.ends(second)


def test_a_distrusted_server_is_no_hedge_and_a_chance_cut_short_is_no_trust() -> None:
    book = fleet("a b", race=RaceSettings(racers_max=1, hedge_delay_initial_ns=SECOND_NS))
    only = book.alone(1, "a")
    book.token(only) << CommitAttempt(1, only.id)
    book >> events.AttemptFailed(only.id, Reason.TRUNCATED)
    book.skip()
    book.sync("a")
    book.alone(2, "b")
    book.after(1500).done()  # no hedge to a
    book.server("a").reliability = Reliability.SECOND_CHANCE  # as if it had been chosen, and cancelled
    assert selection.is_passed_over(book.server("a"), book.now_ns)
    book >> events.DownstreamClosed(2)
    book.skip()
