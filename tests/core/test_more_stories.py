"""More behaviours that the core promises: races, loads and failures; tests/core/test_server_stories.py has the rest."""

from __future__ import annotations

import pytest

from lbcore import events
from lbcore.commands import AbortRequest, AttemptKind, CancelAttempt, CommitAttempt, Decision, PassAnswer
from lbcore.config import Winner
from lbcore.events import Reason
from lbcore.ollama import RequestKind
from lbcore.records import Failure
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.states import Reliability
from tests.playbook import (
    HealthSettings,
    Playbook,
    RaceSettings,
    TimeoutSettings,
    arrival,
    fleet,
    loaded,
    lost,
    models,
    rejected,
)

LONELY = RaceSettings(racers_max=1, hedges_max=0)
PAIR = RaceSettings(racers_min=2, hedges_max=0)
MOST = RaceSettings(winner=Winner.MOST_TOKENS, racers_min=2, hedges_max=0)


# --- who races ----------------------------------------------------------------------------------------------------


def test_when_the_race_budget_is_spent_requests_run_alone_until_more_is_earned() -> None:
    race = RaceSettings(hedges_max=0, budget=0.5, utilisation_max=1.0)
    book = fleet("a b", race=race)
    sizes = []
    for i in range(1, 31):
        book >> arrival(i)
        sizes.append(len(book.skip()))
        book >> events.DownstreamClosed(i)
        book.skip()
    assert sizes[:10] == [2] * 10  # what was saved up
    assert sorted(sizes[-10:]) == [1] * 5 + [2] * 5  # one in two earns a racer


def test_racers_min_is_had_whatever_it_costs() -> None:
    race = RaceSettings(racers_min=3, racers_max=3, hedges_max=0, budget=0.0, utilisation_max=0.0)
    book = fleet("a b c", race=race)
    assert [attempt.server for attempt in book.race(1)] == ["a", "b", "c"]
    assert [attempt.server for attempt in book.race(2)] != []


def test_a_hedge_waits_for_an_idle_slot() -> None:
    race = RaceSettings(racers_max=1, hedge_delay_initial_ns=SECOND_NS, hedge_delay_max_ns=SECOND_NS)
    book = fleet("a b", a={"slots": 2}, factor=1000, race=race)
    one, two = book.alone(1, "a"), book.alone(2, "a")
    book.head(one, two).after(1000)  # both are hedged, but b has one slot
    hedge = book.started(1, AttemptKind.HEDGE, "b")
    book.head(hedge).after(3000).done()
    book >> events.DownstreamClosed(1)
    book << CancelAttempt(one.id, Reason.CLIENT_LEFT) << CancelAttempt(hedge.id, Reason.CLIENT_LEFT)
    book.after(1000)
    book.started(2, AttemptKind.HEDGE, "b")


def test_a_doubted_server_chosen_first_gets_a_companion_even_without_budget() -> None:
    book = fleet("a b", race=RaceSettings(hedges_max=0, budget=0.0))
    book.doubt("a")
    assert [attempt.server for attempt in book.race(1)] == ["a", "b"]


def test_an_answer_ends_doubt() -> None:
    book = fleet("a b", race=RaceSettings(hedges_max=0, budget=0.0))
    book.doubt("a")
    first, second = book.race(1)
    book.token(first) << CommitAttempt(1, first.id) << lost(second)
    assert not book.server("a").doubted


# --- who wins -----------------------------------------------------------------------------------------------------


def test_most_tokens_does_not_wait_when_nobody_else_is_left() -> None:
    book = fleet("a b", race=MOST)
    first, second = book.race(1)
    book.token(first).done()
    book.failed(second, Reason.BUSY, 503) << CommitAttempt(1, first.id)


def test_most_tokens_does_not_wait_for_the_window_when_one_has_ended_well() -> None:
    book = fleet("a b", race=MOST)
    first, second = book.race(1)
    book.token(first).token(second).tokens(second, 9).done()
    book.ends(first) << CommitAttempt(1, first.id) << lost(second)
    assert book.outcome(1) is Decision.FINISHED


def test_most_tokens_by_the_same_count_is_decided_by_the_first_token() -> None:
    book = fleet("a b", race=MOST)
    first, second = book.race(1)
    book.after(10).token(second)
    book.after(10).token(first)
    book.tokens(first, 4).tokens(second, 4)
    book.after(1990) << CommitAttempt(1, second.id) << lost(first)


def test_a_whole_answer_is_won_by_the_first_to_end_whatever_the_rule() -> None:
    book = fleet("a b", race=MOST)
    first, second = book.race(1, stream=False)
    book.token(first).done()
    book.token(second).done()
    book.after(5000).done()
    book.ends(second) << CommitAttempt(1, second.id) << lost(first)


def test_tokens_of_losers_are_counted_as_wasted() -> None:
    book = fleet("a b", race=MOST)
    first, second = book.race(1)
    book.token(first).token(second).tokens(first, 3).tokens(second, 5)
    book.after(2000) << CommitAttempt(1, second.id) << lost(first)
    book.ends(second)
    assert book.balancer.ledger.wasted_tokens == 3


def test_the_time_a_loser_had_is_a_lower_bound_scaled_by_the_winners_usual_time() -> None:
    book = fleet("a b", factor=1, race=PAIR)
    first, second = book.race(1)
    winner = first if first.server == "a" else second
    loser = second if winner is first else first
    book.after(200).token(winner) << CommitAttempt(1, winner.id) << lost(loser)
    record = book.model(loser.server)
    assert record.floor_ns == 200 * MS_NS  # usual 200 ms now, and the loser had just as long
    assert record.ttft_ns == 100 * MS_NS  # what was measured is not touched
    assert record.known_ns == 200 * MS_NS


# --- loads --------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_before_the_commit_takes_its_load_with_it() -> None:
    book = fleet("a", race=LONELY, active="")
    loader = book.alone(1)
    book.head(loader)
    book >> events.DownstreamClosed(1)
    book << CancelAttempt(loader.id, Reason.CLIENT_LEFT)
    assert book.model("a").loading == 0


def test_other_runner_options_make_a_loaded_model_cold() -> None:
    book = fleet("a b", race=LONELY)
    book.model("a").runner_key = ""
    book.model("b").runner_key = '{"num_ctx":8192}'
    book.alone(1, "b", runner_key='{"num_ctx":8192}')  # though a is faster
    book.alone(2, "a")


def test_a_model_that_answers_is_loaded_with_the_options_asked_for() -> None:
    book = fleet("a", race=LONELY, active="")
    loader = book.alone(1, runner_key='{"num_ctx":8192}')
    assert book.model("a").loading == 1
    book.head(loader).after(7000) >> events.FirstTokenReceived(loader.id)
    book << book.probed("a") << CommitAttempt(1, loader.id)
    record = book.model("a")
    assert (record.loaded, record.runner_key, record.load_ns, record.loading) == (True, '{"num_ctx":8192}', 7e9, 0)
    assert record.ttft_ns is None  # a load is no first-token time


def test_an_unload_that_fails_somewhere_has_still_worked() -> None:
    book = fleet("a b", race=LONELY)
    book >> arrival(1, kind=RequestKind.UNLOAD, stream=False)
    first, second = book.started(1), book.started(1)
    book.failed(first, Reason.RESET) << book.probed(first.server)
    book.head(second)
    book.ends(second) << book.probed(second.server) << CommitAttempt(1, second.id)
    assert book.outcome(1) is Decision.FINISHED
    assert not book.model(second.server).loaded


def test_an_unload_that_fails_everywhere_says_so() -> None:
    book = fleet("a b", race=LONELY)
    book >> arrival(1, kind=RequestKind.UNLOAD, stream=False)
    first, second = book.started(1), book.started(1)
    book.failed(first, Reason.RESET) << book.probed(first.server)
    book.failed(second, Reason.RESET) << book.probed(second.server) << rejected(1, 502, "a: ", "b: ")


def test_what_changes_a_server_goes_elsewhere_when_surely_nothing_was_done_and_is_read_anew_when_it_was() -> None:
    book = fleet("a b", race=LONELY)
    first = book.alone(1, route="*", kind=RequestKind.MANAGE, stream=False)
    book.failed(first, Reason.CONNECT_REFUSED) << book.probed(first.server)
    second = book.started(1, AttemptKind.RETRY)
    book.head(second)
    book.ends(second) << book.probed(second.server) << CommitAttempt(1, second.id)


def test_a_server_error_to_what_may_have_changed_something_is_passed_on_at_once() -> None:
    book = fleet("a b", race=LONELY)
    first = book.alone(1, route="*", kind=RequestKind.MANAGE, stream=False)
    book.failed(first, Reason.SERVER_ERROR, 500) << PassAnswer(1, first.id)


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_racer_that_fails_is_replaced_at_once_where_a_slot_is_idle() -> None:
    book = fleet("a b c", race=PAIR)
    first, second = book.race(1)
    book.failed(first, Reason.BUSY, 503)
    third = book.started(1, AttemptKind.HEDGE, "c")
    book.failed(second, Reason.BUSY, 503).done()  # nobody is left to ask
    book.token(third) << CommitAttempt(1, third.id)
    assert [server.health for server in book.balancer.fleet] == [1.0, 1.0, 1.0]  # 503 means elsewhere


def test_when_all_are_busy_the_last_answer_is_passed_on_as_it_was() -> None:
    book = fleet("a b", race=LONELY)
    first = book.alone(1, "a")
    book.failed(first, Reason.BUSY, 503)
    second = book.started(1, AttemptKind.RETRY, "b")
    book.failed(second, Reason.BUSY, 503) << PassAnswer(1, second.id)
    assert book.outcome(1) is Decision.FAILED


def test_an_answer_given_before_others_were_out_of_reach_is_passed_on() -> None:
    book = fleet("a b", race=LONELY)
    first = book.alone(1, "a")
    book.failed(first, Reason.SERVER_ERROR, 500)
    second = book.started(1, AttemptKind.RETRY, "b")
    book.failed(second, Reason.CONNECT_REFUSED) << book.probed("b") << PassAnswer(1, first.id)
    assert book.server("a").health == 1.0  # nobody has answered well: no contrast


def test_when_nobody_answers_it_is_a_502_that_names_what_happened_on_each() -> None:
    book = fleet("a b", race=LONELY)
    first = book.alone(1, "a")
    book.failed(first, Reason.CONNECT_REFUSED) << book.probed("a")
    second = book.started(1, AttemptKind.RETRY, "b")
    book.failed(second, Reason.RESET) << book.probed("b")
    book << rejected(1, 502, "a: connection refused", "b: connection lost before the answer")


@pytest.mark.parametrize(("cold", "limit_ms"), [(False, 5000), (True, 7000)])
def test_a_whole_answer_has_its_own_limit_and_a_load_comes_on_top(*, cold: bool, limit_ms: int) -> None:
    timeouts = TimeoutSettings(answer_ns=5 * SECOND_NS, first_token_cold_ns=2 * SECOND_NS)
    book = fleet("a", race=LONELY, timeouts=timeouts, active="" if cold else "m")
    only = book.alone(1, stream=False)
    book.head(only).after(limit_ms - 1).done()
    book.after(1) << CancelAttempt(only.id, Reason.ANSWER_TIMEOUT) << book.probed("a") << rejected(1, 504, "a: ")


def test_every_chunk_puts_silence_off() -> None:
    book = fleet("a", race=LONELY, timeouts=TimeoutSettings(silence_ns=SECOND_NS))
    only = book.alone(1)
    book.token(only) << CommitAttempt(1, only.id)
    for _ in range(5):
        book.after(900).tokens(only, 1).done()
    book.after(999).done()
    book.after(1) << CancelAttempt(only.id, Reason.SILENCE_TIMEOUT)
    assert isinstance(book.skip()[0], AbortRequest)


def test_a_racer_that_falls_silent_before_the_commit_is_blamed_and_the_other_goes_on() -> None:
    book = fleet("a b", race=MOST, timeouts=TimeoutSettings(silence_ns=SECOND_NS))
    first, second = book.race(1)
    book.token(first)
    book.head(second).after(1000) << CancelAttempt(first.id, Reason.SILENCE_TIMEOUT) << book.probed("a")
    assert book.server("a").reliability is Reliability.UNRELIABLE
    book >> events.FirstTokenReceived(second.id)
    book << CommitAttempt(1, second.id)


def test_an_error_line_after_the_commit_is_the_servers_failure() -> None:
    book = fleet("a", race=LONELY)
    only = book.alone(1)
    book.token(only) << CommitAttempt(1, only.id)
    book.failed(only, Reason.ERROR_LINE, 200)
    assert [type(c).__name__ for c in book.skip()] == ["AbortRequest", "StartProbe"]
    assert book.outcome(1) is Decision.FAILED
    assert (book.server("a").health, book.server("a").reliability) == (0.5, Reliability.UNRELIABLE)


def test_the_last_events_of_what_was_cancelled_mean_nothing() -> None:
    book = fleet("a b", race=PAIR)
    first, second = book.race(1)
    book.token(first) << CommitAttempt(1, first.id) << lost(second)
    health = book.server("b").health
    book.failed(second, Reason.RESET).done()
    book.ends(second).done()
    assert book.server("b").health == health


# --- found in the second review -----------------------------------------------------------------------------------


def test_a_stream_that_breaks_when_the_distrust_of_an_earlier_one_is_over_renews_it() -> None:
    book = fleet("a b", a={"slots": 4}, race=LONELY, health=HealthSettings(resurrect=0.0))
    book.server("a").health = 100.0
    one, two = book.alone(1, "a"), book.alone(2, "a")
    for i, stream in enumerate((one, two), 1):
        book.token(stream) << CommitAttempt(i, stream.id)
    book.failed(one, Reason.RESET).skip()
    book.sync("a")
    for _ in range(50):  # nobody asks anything meanwhile; the second stream goes on
        book.after(1000).tokens(two, 1)
    book.failed(two, Reason.RESET).skip()
    book.sync("a")
    book.alone(3, "b")  # a has broken a stream this very moment


def test_a_request_whose_streaming_racer_fails_is_asked_of_another() -> None:
    race = RaceSettings(winner=Winner.FIRST_FINISH, racers_min=2, hedge_delay_initial_ns=SECOND_NS)
    book = fleet("a b c", race=race)
    first, silent = book.race(1)
    book.head(silent).after(500).token(first)
    book.after(600).done()  # there is an answer to wait for
    book.failed(first, Reason.BUSY, 503)
    book.started(1, AttemptKind.HEDGE, "c")


def test_a_404_for_a_model_nobody_was_thought_to_have_corrects_nothing_and_probes_nobody() -> None:
    book = fleet("a", race=LONELY)
    only = book.alone(1, model="nobody-has-it")
    book.failed(only, Reason.MODEL_NOT_FOUND, 404) << PassAnswer(1, only.id)


def test_a_sync_that_belongs_to_no_probe_is_nothing() -> None:
    book = Playbook("a")
    book.timeout().skip()
    book >> events.ModelsSynced(book.server("a").id, 0, models("m"), loaded("m"))
    assert not book.server("a").is_alive


def test_a_detached_load_ends_when_the_model_is_seen_loaded() -> None:
    book = fleet("a b", race=PAIR)
    book.model("b").loaded = False
    first, loader = book.race(1, stream=False)
    book.head(first, loader)
    book.ends(first) << CommitAttempt(1, first.id)
    book >> events.SyncRequested()
    book.skip()
    book.sync("b") << lost(loader)  # else it would generate a whole answer for nobody


def test_one_token_is_one_token_in_the_log() -> None:
    book = fleet("a", race=LONELY)
    for i, breaks in enumerate((False, True), 1):
        only = book.alone(i)
        book.token(only) << CommitAttempt(i, only.id)
        book.tokens(only, 1)
        if breaks:
            book.failed(only, Reason.RESET)
        else:
            book.ends(only)
        told = [record.why for record in book._decisions if record.decision in {Decision.FINISHED, Decision.FAILED}]
        assert [why.rpartition(" after ")[2] for why in told] == ["1 token"]
        book.skip()


@pytest.mark.parametrize(("detail", "words"), [
    ("404 page not found", "the request was refused 404: page not found"),
    ("no", "the request was refused 404: no"), ("", "the request was refused 404"),
])  # fmt: skip
def test_the_status_is_told_once(detail: str, words: str) -> None:
    assert Failure("a", Reason.CLIENT_ERROR, 404, detail).words == words
