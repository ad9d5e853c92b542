"""Stories found in review: each was once told wrongly."""

import time

import pytest

from lbcore import events
from lbcore.catalog import tags_json
from lbcore.commands import AttemptKind, CancelAttempt, CommitAttempt, Decision, PassAnswer
from lbcore.config import Winner
from lbcore.events import Reason
from lbcore.ollama import RequestKind
from lbcore.records import Server
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.selection import is_passed_over
from lbcore.timers import TimerKind, Timers
from tests.playbook import (
    A,
    HealthSettings,
    Playbook,
    QueueSettings,
    RaceSettings,
    arrival,
    decision,
    fleet,
    loaded,
    lost,
    models,
    rejected,
)

LONELY = RaceSettings(racers_max=1, hedges_max=0)


def test_a_hedge_delay_of_zero_does_not_hang_the_balancer(monkeypatch: pytest.MonkeyPatch) -> None:
    race = RaceSettings(racers_max=1, hedge_delay_min_ns=0, hedge_delay_initial_ns=0)
    book = fleet("a", race=race)
    calls = 0

    def counted(self: Timers, kind: TimerKind, owner_id: int, deadline_ns: int) -> None:
        nonlocal calls
        calls += 1
        assert calls < 1000, "handle_timeout arms the hedge timer for ever"
        arm(self, kind, owner_id, deadline_ns)

    arm = Timers.arm
    book.alone(1)
    with monkeypatch.context() as patch:
        patch.setattr(Timers, "arm", counted)
        book.timeout()


def waits_for_somebody_to_hedge_to() -> tuple[Playbook, A]:
    """Let two requests wait for a, and the only slot of b be taken; the second one may be hedged to b after 4 ms."""
    race = RaceSettings(racers_max=1, hedge_delay_min_ns=0, hedge_delay_initial_ns=4 * MS_NS)
    book = fleet("a b", a={"slots": 2}, factor=1000, race=race)
    one = book.alone(1, "a")
    book.after(4)
    hedge = book.started(1, AttemptKind.HEDGE, "b")
    book.head(one, hedge, book.alone(2, "a"))
    return book, hedge


def test_the_hedge_timer_does_not_fire_hundreds_of_times_while_there_is_nobody_to_ask() -> None:
    book, _ = waits_for_somebody_to_hedge_to()
    fired = 0
    while book.balancer.next_deadline() is not None and book.now_ns < 9 * SECOND_NS:
        book.timeout()
        fired += 1
    assert fired < 20


@pytest.mark.parametrize(("free_ms", "hedged_ms"), [(3, 4), (5, 8), (30, 32), (3000, 3024)])
def test_who_can_be_asked_later_is_asked_after_as_long_again_at_most(free_ms: int, hedged_ms: int) -> None:
    book, hedge = waits_for_somebody_to_hedge_to()
    book.after(free_ms)  # so long has the first one the slot; from 1 s on, it is looked at every second
    book.failed(hedge, Reason.EXHAUSTED, 503).after(hedged_ms - free_ms)
    book.started(2, AttemptKind.HEDGE, "b")


def test_no_hedge_is_started_once_a_first_token_has_come() -> None:
    race = RaceSettings(winner=Winner.MOST_TOKENS, racers_min=2, hedge_delay_initial_ns=SECOND_NS)
    book = fleet("a b c", race=race)
    first, _ = book.race(1)
    book.after(500).token(first)
    book.after(1000).done()  # the hedge delay passes within the window in which tokens are counted


def test_a_draining_server_is_not_resurrected_because_it_is_doubted() -> None:
    book = fleet("a b", health=HealthSettings(resurrect=1.0), race=RaceSettings(racers_max=2, hedges_max=0))
    book.doubt("b")
    busy = book.balancer.fleet.servers[book.server("b").id]
    first, second = book.race(1)  # b is tried as an outcast
    assert second.server == "b"
    book >> events.ServerRemovalRequested(busy.id)
    book.alone(2, "a")
    book.token(first) << CommitAttempt(1, first.id) << lost(second)
    book.skip()


def test_tokens_of_an_answer_that_was_delivered_whole_are_not_wasted() -> None:
    book = fleet("a", race=LONELY)
    only = book.alone(1, stream=False)
    book.head(only).tokens(only, 40)
    book.ends(only) << CommitAttempt(1, only.id)
    assert book.balancer.ledger.wasted_tokens == 0


def test_unloading_teaches_nothing_about_first_tokens_loads_or_reliability() -> None:
    book = fleet("a", race=LONELY)
    before = book.model("a").ttft_ns
    only = book.alone(1, kind=RequestKind.UNLOAD)
    book.after(1).token(only)
    book.ends(only) << book.probed("a") << CommitAttempt(1, only.id)
    record = book.model("a")
    assert (record.load_ns, record.ttft_ns, record.service_ns) == (None, before, None)
    assert book.balancer.fleet.model_stats("m:latest").first_token.p95 is None


def test_unloading_a_model_with_other_options_teaches_nothing_about_its_load_time() -> None:
    book = fleet("a", race=LONELY)
    book.model("a").runner_key = '{"num_ctx":1}'
    only = book.alone(1, kind=RequestKind.UNLOAD)
    book.after(1).token(only).skip()
    book.ends(only).skip()
    assert book.model("a").load_ns is None


def test_loading_what_is_loaded_teaches_nothing_about_first_tokens() -> None:
    book = fleet("a", race=LONELY)
    before = book.model("a").ttft_ns
    for i in range(1, 20):
        only = book.alone(i, kind=RequestKind.LOAD)
        book.after(1).token(only) << CommitAttempt(i, only.id)
        book.ends(only)
    assert book.model("a").ttft_ns == before
    assert book.model("a").service_ns is None
    assert book.balancer.fleet.model_stats("m:latest").first_token.p95 is None


def test_loading_a_model_does_not_make_an_unreliable_server_reliable() -> None:
    book = fleet("a", race=LONELY)
    only = book.alone(1)
    book.token(only) << CommitAttempt(1, only.id)
    book.failed(only, Reason.RESET)
    book.skip()
    book.sync("a")
    load = book.alone(2, kind=RequestKind.LOAD)
    book.token(load) << CommitAttempt(2, load.id)
    book.ends(load)
    assert book.server("a").reliability == "SecondChanceGiven"


def test_a_retry_that_ends_well_is_not_said_to_have_won_a_race() -> None:
    book = fleet("a b", race=LONELY)
    first = book.alone(1, "a")
    book.failed(first, Reason.CONNECT_REFUSED)
    book << book.probed("a")
    second = book.started(1, AttemptKind.RETRY, "b")
    book.token(second) << CommitAttempt(1, second.id)
    before = book.server("b").health
    book.ends(second)
    assert book.server("b").health == before + book.config.health.success


def test_a_detached_load_that_ends_well_is_not_the_fastest() -> None:
    book = fleet("a b", active="", race=RaceSettings(racers_min=2, hedges_max=0))
    first, second = book.race(1, stream=False)
    book.head(first, second)
    book.ends(first) << book.probed(first.server) << CommitAttempt(1, first.id)  # second loads on
    before = book.server(second.server).health
    book.ends(second) << book.probed(second.server)
    assert book.server(second.server).health == before + book.config.health.success


def test_a_hedge_that_had_no_time_to_answer_is_not_evidence_against_its_server() -> None:
    race = RaceSettings(racers_max=1, hedge_delay_initial_ns=SECOND_NS, hedge_delay_max_ns=SECOND_NS)
    book = fleet("a b", factor=1000, race=race)
    for i in range(1, 8):
        first = book.alone(i, "a")
        book.head(first).after(1000)
        hedge = book.started(i, AttemptKind.HEDGE, "b")
        book.after(1) >> events.FirstTokenReceived(first.id)
        book << CommitAttempt(i, first.id) << lost(hedge)
        book.ends(first)
    assert not book.server("b").doubted
    assert book.server("b").losses == 0


def test_waiting_for_a_load_that_another_request_has_begun_is_not_losing() -> None:
    book = fleet("a b", active="m", race=RaceSettings(racers_min=2, hedges_max=0, utilisation_max=0.0))
    book.model("b").loaded = False
    for i in range(1, 8):
        first, _second = book.race(i)
        assert first.server == "a"
        book.after(200).token(first)
        book.skip()
        book.ends(first)
    assert not book.server("b").doubted


def test_a_load_is_not_cancelled_by_a_lost_race_when_the_request_that_began_it_has_gone() -> None:
    book = fleet("a b", active="m", race=RaceSettings(racers_min=2, hedges_max=0))
    book.model("b").loaded = False
    _, loader = book.race(1)
    first, waiting = book.race(2)
    assert (loader.server, waiting.server) == ("b", "b")
    book >> events.DownstreamClosed(1)
    book.skip()
    book.token(first) << CommitAttempt(2, first.id)  # and `waiting`, for which b loads now, goes on


def test_a_late_sync_of_a_probe_that_was_given_up_does_not_revive_a_server() -> None:
    book = Playbook("a")
    book.timeout() << book.probed("a")
    server = book.server("a")
    probe_id = server.probe_id
    book.timeout().skip()  # the probe takes too long
    book >> events.ModelsSynced(server.id, probe_id, models("m"), loaded("m"))
    assert not server.is_alive


def test_a_probe_that_nobody_has_started_ends_nothing() -> None:
    book = fleet("a")
    server = book.server("a")
    book >> events.ProbeCompleted(server.id, 0, Reason.CONNECT_REFUSED)
    assert server.probe_failures == 0
    busy = book.alone(1)
    book >> events.ServerRemovalRequested(server.id) >> events.ProbeCompleted(server.id, 0, version="x")
    book >> events.DownstreamClosed(1)
    book.skip()
    assert busy.server == "a"


def test_a_request_that_comes_before_anything_else_waits_for_the_first_probe() -> None:
    book = Playbook("a", race=LONELY)
    book >> arrival(1)
    book.skip()
    assert book.outcome(1) is None
    book.timeout().skip()
    book.sync("a")
    book.started(1, server="a")


def test_a_request_that_waits_for_the_first_probe_is_served_by_it() -> None:
    book = Playbook("a", race=LONELY)
    book.timeout().skip()
    book >> arrival(1)
    book.sync("a")
    book.started(1, server="a")


def test_requests_that_wait_for_a_server_which_dies_by_contrast_are_rescued() -> None:
    book = fleet("a b", a={"slots": 4}, race=LONELY)
    waiting = book.alone(1, "a")
    suspect = book.alone(2, "a")
    book.failed(suspect, Reason.SERVER_ERROR, 500)
    other = book.started(2, AttemptKind.RETRY, "b")
    book.token(other) << CommitAttempt(2, other.id)
    book.ends(other)  # now a is to blame, and dies of it
    assert not book.server("a").is_alive
    commands = book.skip()
    assert [c for c in commands if getattr(c, "kind", None) is AttemptKind.HEDGE], commands
    book >> events.DownstreamClosed(1)
    book.skip()
    assert waiting.server == "a"


def test_a_dead_server_is_not_flooded_by_the_queue_as_a_last_resort() -> None:
    book = Playbook("a", a={"in_flight_max": 2}, race=LONELY)
    book.timeout().skip()
    book.sync("a")
    one = book.alone(1)
    book.alone(2)
    for i in range(3, 20):
        book >> arrival(i)
    book.failed(one, Reason.CONNECT_REFUSED)
    book.skip()
    assert not book.server("a").is_alive
    assert book.server("a").in_flight <= 2
    for i in range(1, 20):
        book >> events.DownstreamClosed(i)
        book.skip()


def test_a_refusal_is_final_even_when_another_racer_breaks_after_it() -> None:
    book = fleet("a b c", race=RaceSettings(racers_min=2, hedges_max=0))
    first, second = book.race(1)
    book.failed(first, Reason.CLIENT_ERROR, 400)
    commands = book.skip()
    if PassAnswer(1, first.id) not in commands:
        book.failed(second, Reason.SERVER_ERROR, 500)
        book << PassAnswer(1, first.id)
        assert book.outcome(1) is Decision.FINISHED


def test_streams_that_break_together_double_the_distrust_only_once() -> None:
    book = fleet("a", race=LONELY)
    book.server("a").health = 100.0
    streams = [book.alone(i) for i in range(1, 6)]
    for i, stream in enumerate(streams, 1):
        book.token(stream) << CommitAttempt(i, stream.id)
    for stream in streams:
        book.failed(stream, Reason.RESET)
        book.skip()
    assert book.server("a").trusted_from_ns - book.now_ns == book.config.health.second_chance_ns


def test_a_second_chance_that_was_cancelled_does_not_end_the_distrust() -> None:
    book = fleet("a b", race=RaceSettings(racers_min=2, hedges_max=0))
    first, second = book.race(1)
    book.token(first) << CommitAttempt(1, first.id) << lost(second)
    book.failed(first, Reason.RESET)  # the faster server is distrusted
    book.skip()
    book.sync("a")
    primary, racer = book.race(2)
    assert (primary.server, racer.server) == ("b", "a")
    book.after(1).token(primary) << CommitAttempt(2, primary.id) << lost(racer)
    book.ends(primary)
    assert is_passed_over(book.server("a"), book.now_ns)  # it has not shown anything yet, and its time has not come


def test_the_merge_of_tags_does_not_depend_on_the_order_of_servers_that_agree_in_all_but_the_entry() -> None:
    servers = []
    for i, entry in enumerate(['{"name":"m","x":1}', '{"name":"m","x":2}'], 1):
        book = fleet("a", have="m")
        server: Server = book.server("a")
        info = events.ModelInfo("m", "sha", "2026-01-01T00:00:00Z", entry)
        server.model("m:latest").available = info
        server.id = i
        servers.append(server)
    assert tags_json(servers) == tags_json(servers[::-1])


def test_a_timestamp_without_a_zone_does_not_depend_on_where_the_balancer_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def merged(zone: str) -> bytes:
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        book = fleet("a b", have="m")
        for name, modified_at in (("a", "2026-01-01T12:00:00"), ("b", "2026-01-01T15:00:00Z")):
            entry = f'{{"from":"{name}"}}'
            book.server(name).model("m:latest").available = events.ModelInfo("m", "sha", modified_at, entry)
        return tags_json(book.balancer.fleet)

    results = {merged("UTC"), merged("Pacific/Honolulu"), merged("Asia/Tokyo")}
    monkeypatch.undo()
    time.tzset()
    assert len(results) == 1


def test_a_hedge_of_a_whole_answer_never_starts_sooner_than_the_smallest_delay() -> None:
    book = fleet("a b", race=RaceSettings(racers_max=1, hedge_delay_min_ns=50 * MS_NS))
    for i in range(1, 9):
        only = book.alone(i, stream=False)
        book.after(1).head(only)
        book.ends(only) << CommitAttempt(i, only.id)
    book.alone(9, stream=False)
    book.after(49).done()


def test_every_server_lacking_the_model_is_a_404_even_when_no_answer_is_held() -> None:
    book = fleet("a", race=LONELY)
    only = book.alone(1)
    book.failed(only, Reason.MODEL_NOT_FOUND, 404, answered=False) << book.probed("a")
    book << rejected(1, 404, "model 'm' not found")


def test_a_request_that_needs_no_slot_does_not_wait_behind_those_that_do() -> None:
    book = Playbook("a", a={"in_flight_max": 1}, race=LONELY, queue=QueueSettings(length_max=9))
    book.timeout().skip()
    for i in (1, 2):
        book >> arrival(i)
    book >> arrival(3, route="/api/show", stream=False)
    book.sync("a")
    book.started(1, server="a")
    book.started(3, server="a")


def test_a_paused_answer_that_is_read_slowly_is_not_the_servers_fault() -> None:
    book = fleet("a", race=LONELY)
    only = book.alone(1, stream=False)
    book.head(only) >> events.FirstTokenReceived(only.id) >> events.BufferFilled(only.id)
    book << CommitAttempt(1, only.id)
    book.balancer.note_paused(only.id, paused=True, now_ns=book.now_ns)
    book.after(3_000_000).done()
    assert book.request(1).committed is not None


def test_the_budget_for_races_holds_for_outcasts_too() -> None:
    book = fleet("a b", health=HealthSettings(resurrect=1.0), race=RaceSettings(budget=0.0, hedges_max=0))
    book.doubt("b")
    book.alone(1, "a")


def test_a_wasted_racer_place_is_not_paid_for() -> None:
    book = fleet("a b c", health=HealthSettings(resurrect=1.0), race=RaceSettings(hedges_max=0))
    book.doubt("c")
    before = book.balancer.placement.race_budget.credits
    _, outcast = book.race(1)
    assert outcast.server == "c"
    assert book.balancer.placement.race_budget.credits >= before - 1


def test_the_client_leaves_a_stream_whose_losers_still_load() -> None:
    book = fleet("a b", active="m", race=RaceSettings(racers_min=2, hedges_max=0))
    book.model("b").loaded = False
    first, loader = book.race(1)
    book.token(first) << CommitAttempt(1, first.id)
    book >> events.DownstreamClosed(1)
    book << CancelAttempt(first.id, Reason.CLIENT_LEFT)
    book >> events.AttemptConnected(loader.id) >> events.HeadReceived(loader.id, 200)
    book >> events.FirstTokenReceived(loader.id)
    book << book.probed("b") << lost(loader)
    book << decision(Decision.CANCELLED, server="b", why="loaded now")
