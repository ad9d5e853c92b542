"""More behaviours that the core promises: servers coming, dying and going; the queue; the end."""

from __future__ import annotations

from lbcore import events
from lbcore.commands import (
    AbortRequest,
    AttemptKind,
    CancelAttempt,
    CancelProbe,
    CommitAttempt,
    Decision,
    ForgetServer,
    StartProbe,
)
from lbcore.events import Reason
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.states import Reliability, ServerState
from tests.playbook import (
    HealthSettings,
    Playbook,
    ProbeSettings,
    QueueSettings,
    RaceSettings,
    arrival,
    decision,
    fleet,
    lost,
    rejected,
)

LONELY = RaceSettings(racers_max=1, hedges_max=0)
PROBE = ProbeSettings(interval_ns=10 * SECOND_NS, interval_dead_ns=SECOND_NS, interval_dead_max_ns=15 * SECOND_NS)


# --- probes -------------------------------------------------------------------------------------------------------


def test_a_server_that_was_never_reached_is_probed_after_longer_and_longer_pauses() -> None:
    book = Playbook("a", probe=PROBE)
    pauses = []
    for _ in range(7):
        book.timeout() << book.probed("a")
        failed_ns = book.now_ns
        book.probe_failed("a")
        pauses.append(((book.balancer.next_deadline() or 0) - failed_ns) // SECOND_NS)
    assert pauses == [1, 2, 4, 8, 15, 15, 15]


def test_a_server_that_was_never_reached_is_told_of_once() -> None:
    book = Playbook("a", probe=PROBE)
    told = []
    for _ in range(3):
        book.timeout() << book.probed("a")
        book.probe_failed("a")
        told += [(record.decision, record.why) for record in book._decisions]
    assert told == [(Decision.SERVER_UNREAD, "connection refused")]


def test_a_server_that_is_added_in_vain_is_told_of_with_the_reason() -> None:
    book = fleet("a") >> events.ServerAdded(Playbook.settings("b"))
    book.probe_failed("b") << decision(Decision.SERVER_UNREAD, server="b", why="connection refused")


def test_a_server_that_was_read_before_is_told_of_as_dead_and_not_as_unread() -> None:
    book = fleet("a", probe=PROBE)
    told = []
    for _ in range(3):
        book.timeout() << book.probed("a")
        book.probe_failed("a")
        told += [record.decision for record in book._decisions]
    assert told == [Decision.HEALTH, Decision.SERVER_DIED]


def test_the_first_sync_is_told_in_words() -> None:
    book = Playbook("a b", probe=PROBE)
    book.timeout() << book.probed("a") << book.probed("b")
    book.sync("a", "m") << decision(Decision.SYNCED, server="a", why="1 model, 1 loaded")
    book.sync("b", "m n", "") << decision(Decision.SYNCED, server="b", why="2 models, 0 loaded")


def test_a_probe_that_takes_too_long_is_given_up_and_counts_as_failed() -> None:
    book = Playbook("a", probe=PROBE)
    book.timeout() << book.probed("a")
    probe_id = book.server("a").probe_id
    book.after(4999).done()
    book.after(1) << CancelProbe(book.server("a").id, probe_id)
    assert book.server("a").probe_failures == 1
    book.after(1000) << book.probed("a")


def test_one_failed_probe_halves_health_and_the_second_kills_whatever_it_was() -> None:
    book = fleet("a", probe=PROBE)
    book.server("a").health = 100.0
    book.timeout() << book.probed("a")
    book.probe_failed("a")
    assert (book.server("a").health, book.server("a").is_alive) == (50.0, True)
    book.after(1000) << book.probed("a")
    book.probe_failed("a")
    assert (book.server("a").health, book.server("a").is_alive) == (0.5, False)


def test_a_live_server_is_read_again_and_again() -> None:
    book = fleet("a", probe=PROBE)
    for i in range(1, 4):
        book.timeout() << book.probed("a")
        assert book.now_ns == i * 10 * SECOND_NS
        book.sync("a")


def test_a_failure_has_its_server_looked_at_at_once_but_not_twice() -> None:
    book = fleet("a b", a={"slots": 4}, race=LONELY)
    book.server("a").health = 100.0
    one, two = book.alone(1, "a"), book.alone(2, "a")
    book.failed(one, Reason.RESET) << book.probed("a")
    book.started(1, AttemptKind.RETRY, "b")
    book.failed(two, Reason.RESET)
    book.started(2, AttemptKind.RETRY, "b")


def test_an_operator_may_have_all_servers_read_now() -> None:
    book = fleet("a b c", race=LONELY)
    streaming = book.alone(1, "a")
    book.token(streaming) << CommitAttempt(1, streaming.id)
    book >> events.ServerRemovalRequested(book.server("a").id)
    book >> events.SyncRequested()
    book << book.probed("b") << book.probed("c")
    book >> events.SyncRequested()
    book.done()  # they are being read


def test_what_a_server_has_is_what_its_last_sync_said() -> None:
    book = fleet("a", have="m n", active="m")
    book >> events.SyncRequested()
    book << book.probed("a")
    book.sync("a", have="n", active="n")
    assert not book.server("a").has("m:latest")
    assert book.model("a", "n:latest").loaded


# --- dead servers -------------------------------------------------------------------------------------------------


def test_a_dead_server_is_a_last_resort_and_lives_again_when_it_answers() -> None:
    book = fleet("a", race=LONELY)
    book.failed(book.alone(1), Reason.CONNECT_REFUSED) << book.probed("a") << rejected(1, 502, "a: ")
    book.probe_failed("a")
    assert not book.server("a").is_alive
    only = book.alone(2)
    book.token(only) << CommitAttempt(2, only.id)
    book.ends(only)
    assert (book.server("a").is_alive, book.server("a").health) == (True, 1.0)


def test_after_all_live_ones_a_dead_server_is_asked() -> None:
    book = fleet("a b", race=LONELY)
    for _ in range(2):
        book >> events.SyncRequested()
        book.skip()
        book.probe_failed("a").skip()
        book.sync("b")
    assert not book.server("a").is_alive
    only = book.alone(1, "b")
    book.failed(only, Reason.BUSY, 503)
    book.started(1, AttemptKind.RETRY, "a")


def test_who_was_busy_is_asked_last_for_a_moment_and_then_again() -> None:
    book = fleet("a b", race=LONELY)

    def served(request_id: int) -> str:
        only = book.alone(request_id)
        book.token(only) << CommitAttempt(request_id, only.id)
        book.ends(only)
        book.skip()
        return only.server

    primary = book.alone(1)
    other = "b" if primary.server == "a" else "a"
    book.failed(primary, Reason.BUSY, 503)
    retry = book.started(1, AttemptKind.RETRY, other)
    book.token(retry) << CommitAttempt(1, retry.id)
    book.ends(retry)
    book.skip()
    assert {served(request_id) for request_id in range(2, 20)} == {other}
    assert book.server(primary.server).health == 1.0
    book.after(1100)
    assert primary.server in {served(request_id) for request_id in range(20, 80)}


def test_who_dies_of_its_answers_again_and_again_is_revived_ever_later_though_its_probes_look_well() -> None:
    book = fleet("a b", race=LONELY, probe=PROBE)

    def fails(request_id: int) -> None:
        """Let a request fail on a, if it is asked, and be answered by b."""
        book.model("a").failing_until_ns = 0  # that it is asked last for a while is another story
        only = book.alone(request_id)
        if only.server == "a":
            book.failed(only, Reason.SERVER_ERROR, 500)
            only = book.started(request_id, AttemptKind.RETRY, "b")
        book.token(only) << CommitAttempt(request_id, only.id)
        book.ends(only)
        book.skip()

    request_id = 0
    pauses_ms: list[float] = []
    for _ in range(4):
        while book.server("a").is_alive:
            request_id += 1
            fails(request_id)
        died_ns = book.now_ns
        book.sync("a").skip()
        while not book.server("a").is_alive:
            book.after(1000).skip()
            if book.server("a").probe_id:
                book.sync("a").skip()
        pauses_ms.append((book.now_ns - died_ns) / MS_NS)
    assert pauses_ms == [0, 1000, 2000, 4000]


def test_now_and_then_a_dead_server_gets_a_racers_place_and_may_be_resurrected() -> None:
    book = fleet("a b", health=HealthSettings(resurrect=1.0), race=RaceSettings(hedges_max=0))
    for _ in range(2):
        book >> events.SyncRequested()
        book.skip()
        book.probe_failed("b").skip()
        book.sync("a")
    first, outcast = book.race(1)
    assert (first.server, outcast.server) == ("a", "b")
    book.token(outcast) << CommitAttempt(1, outcast.id) << lost(first)
    book.ends(outcast)
    assert book.server("b").is_alive


def test_with_no_server_at_all_it_says_so() -> None:
    book = Playbook("")
    book >> arrival(1)
    book << rejected(1, 502, "no server is configured")


def test_when_nobody_is_reachable_it_says_what_was_heard_of_each() -> None:
    book = Playbook("a b", race=LONELY)
    book.timeout().skip()
    book.probe_failed("a").probe_failed("b", Reason.TLS_FAILED)
    book >> arrival(1)
    book << rejected(1, 502, "a: connection refused", "b: TLS failed")


def test_each_further_break_doubles_the_distrust() -> None:
    book = fleet("a", race=LONELY)
    lengths = []
    for i in range(1, 4):
        only = book.alone(i)
        book.token(only) << CommitAttempt(i, only.id)
        book.failed(only, Reason.TRUNCATED).skip()
        lengths.append((book.server("a").trusted_from_ns - book.now_ns) // SECOND_NS)
        book.sync("a")
    assert lengths == [30, 60, 120]
    only = book.alone(9)
    book.token(only) << CommitAttempt(9, only.id)
    book.ends(only)
    assert (book.server("a").reliability, book.server("a").breaks) == (Reliability.RELIABLE, 0)


# --- the queue ----------------------------------------------------------------------------------------------------


def test_first_come_first_served_for_each_model_but_models_do_not_wait_for_each_other() -> None:
    book = Playbook("a", a={"in_flight_max": 1}, race=LONELY)
    book.timeout().skip()
    book.sync("a", have="m n", active="m n")
    m, n = book.alone(1, model="m"), book.alone(2, model="n")
    book >> arrival(3, model="m") >> arrival(4, model="m") >> arrival(5, model="n")
    book.token(n) << CommitAttempt(2, n.id)
    book.ends(n)
    book.started(5)
    book.token(m) << CommitAttempt(1, m.id)
    book.ends(m)
    third = book.started(3)
    book.token(third) << CommitAttempt(3, third.id)
    book.ends(third)
    book.started(4)


def test_a_newcomer_does_not_overtake_those_who_wait() -> None:
    book = fleet("a", a={"in_flight_max": 1}, race=LONELY)
    first = book.alone(1)
    book >> arrival(2)
    book.token(first) << CommitAttempt(1, first.id)
    book.ends(first)
    book.started(2)
    book >> arrival(3)
    book.done()


def test_those_who_wait_are_served_by_a_server_that_comes_back() -> None:
    book = fleet("a b", a={"in_flight_max": 1}, b={"in_flight_max": 1}, race=LONELY)
    for _ in range(2):
        book >> events.SyncRequested()
        book.skip()
        book.probe_failed("b").skip()
        book.sync("a")
    book.alone(1, "a")
    book >> arrival(2)
    book >> events.SyncRequested()
    book.skip()
    book.sync("b")
    book.started(2, server="b")


def test_those_who_wait_are_served_by_a_server_that_is_added() -> None:
    book = fleet("a", a={"in_flight_max": 1}, race=LONELY)
    book.alone(1)
    book >> arrival(2)
    book >> events.ServerAdded(Playbook.settings("new"))
    book << book.probed("new")
    book.sync("new")
    book.started(2, server="new")


def test_those_who_wait_are_served_when_a_sync_brings_their_model() -> None:
    book = fleet("a", race=LONELY)
    book.after(5000)
    book >> arrival(1, model="new")
    book << book.probed("a")
    book << decision(Decision.QUEUED, request_id=1, why="asked for the model")
    book.sync("a", have="m new", active="m")
    book.started(1, server="a")


def test_one_who_leaves_the_queue_makes_room_in_it() -> None:
    book = fleet("a", a={"in_flight_max": 1}, race=LONELY, queue=QueueSettings(length_max=1))
    book.alone(1)
    book >> arrival(2) >> events.DownstreamClosed(2) >> arrival(3)
    book.done()
    assert book.outcome(2) is Decision.ABORTED
    book >> arrival(4)
    book << rejected(4, 503, "server busy")


# --- coming and going ---------------------------------------------------------------------------------------------


def test_a_second_server_of_the_same_name_is_not_taken_in() -> None:
    book = fleet("a")
    book >> events.ServerAdded(Playbook.settings("a"))
    book.done()
    assert len(book.balancer.fleet.servers) == 1


def test_an_idle_server_is_forgotten_at_once_when_removed_and_its_probe_cancelled() -> None:
    book = fleet("a b")
    server = book.server("a")
    book >> events.SyncRequested()
    book.skip()
    probe_id = server.probe_id
    book >> events.ServerRemovalRequested(server.id)
    book << CancelProbe(server.id, probe_id) << ForgetServer(server.id)
    book >> events.ServerRemovalRequested(server.id)
    book.done()
    book >> events.ProbeCompleted(server.id, probe_id, version="0.9.0")
    book.done()


def test_a_name_may_be_taken_again_and_gets_a_new_id() -> None:
    book = fleet("a b")
    old = book.server("a").id
    book >> events.ServerRemovalRequested(old)
    book << ForgetServer(old)
    book >> events.ServerAdded(Playbook.settings("a"))
    new = book.server("a").id
    assert new > old
    book << StartProbe(new, book.server("a").probe_id)


def test_a_draining_server_gets_no_retry_no_hedge_and_no_last_resort() -> None:
    race = RaceSettings(racers_max=1, hedge_delay_initial_ns=SECOND_NS)
    book = fleet("a b", race=race)
    streaming = book.alone(1, "a")
    book.token(streaming) << CommitAttempt(1, streaming.id)
    book >> events.ServerRemovalRequested(book.server("a").id)
    other = book.alone(2, "b")
    book.head(other).after(2000).done()
    book.failed(other, Reason.RESET) << book.probed("b") << rejected(2, 502, "b: ")
    assert book.server("a").state is ServerState.DRAINING


def test_a_broken_stream_of_a_draining_server_harms_nothing() -> None:
    book = fleet("a b", race=LONELY)
    streaming = book.alone(1, "a")
    book.token(streaming) << CommitAttempt(1, streaming.id)
    server_id = book.server("a").id
    book >> events.ServerRemovalRequested(server_id)
    book.failed(streaming, Reason.RESET) << ForgetServer(server_id)
    assert isinstance(book.skip()[0], AbortRequest)
    assert [server.name for server in book.balancer.fleet] == ["b"]


def test_at_the_end_everything_gets_its_answer_and_every_load_is_cut() -> None:
    race = RaceSettings(racers_min=2, hedges_max=0)
    book = fleet("a b", a={"in_flight_max": 2}, b={"in_flight_max": 2}, race=race)
    book.model("b").loaded = False
    streaming, load = book.race(1)
    book.token(streaming) << CommitAttempt(1, streaming.id)  # b loads on
    racing = book.race(2)
    book >> arrival(3)
    book.done()
    book >> events.DrainDeadlinePassed()
    book << CancelAttempt(streaming.id, Reason.DRAINED) << AbortRequest(1, "the load balancer is shutting down")
    for attempt in racing:
        book << CancelAttempt(attempt.id, Reason.DRAINED)
    book << rejected(2, 503, "shutting down") << rejected(3, 503, "shutting down")
    book << CancelAttempt(load.id, Reason.DRAINED)
    assert [book.outcome(i) for i in (1, 2, 3)] == [Decision.FAILED, Decision.FAILED, Decision.REJECTED]


# --- what is nobody's fault ---------------------------------------------------------------------------------------


def test_a_server_that_could_not_be_asked_is_not_blamed_by_attempt_or_probe() -> None:
    book = fleet("a", probe=PROBE)
    health = book.server("a").health
    book.failed(book.alone(1), Reason.EXHAUSTED) << rejected(1, 503, "run out")
    for _ in range(3):
        book.timeout() << book.probed("a")
        book.probe_failed("a", Reason.EXHAUSTED).done()
    assert (book.server("a").health, book.server("a").probe_failures) == (health, 0)
    assert "run out" in book.server("a").last_error
