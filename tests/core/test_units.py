"""The pure decisions as tables: health, sampling, budgets, timers, model names, bodies' facts, merged catalogs."""

from __future__ import annotations

from itertools import permutations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore import catalog, selection
from lbcore.admission import RACE_BURST, RaceBudget, RetryBudget
from lbcore.config import Config, HealthSettings, RaceSettings, RetrySettings, RouteSettings, ServerSettings
from lbcore.events import ModelInfo, Reason, RequestArrived
from lbcore.health import BLAME, after_failure, after_success, distrust_ns, next_probe_pause_ns, retry_after_s
from lbcore.ollama import (
    ROUTES,
    RequestKind,
    Shape,
    canonical_model,
    error_body,
    find_route,
    keep_alive_is_zero,
    request_kind,
    runner_key,
    shape_of,
)
from lbcore.records import ModelStats, Quantile, Request, Server
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.states import Reliability, ServerState
from lbcore.timers import TimerKind, Timers
from lbcore.units import counted

HEALTH = HealthSettings()
MODEL = "m:latest"


# --- health -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "fastest", "expected"),
    [
        (0.0, False, 1.0),
        (0.99, True, 1.0),
        (1.0, False, 3.0),
        (1.0, True, 5.0),
        (97.0, True, 100.0),
        (100.0, False, 100.0),
    ],
)
def test_success_raises_health_to_its_cap_and_revives_at_one(value: float, fastest: bool, expected: float) -> None:
    assert after_success(value, HEALTH, fastest=fastest) == expected


def test_failure_halves_health() -> None:
    assert after_failure(100.0, HEALTH) == 50.0


def test_distrust_doubles_up_to_32_times() -> None:
    assert [distrust_ns(n, HEALTH) // HEALTH.second_chance_ns for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 32, 32]


def test_pauses_between_probes_of_a_dead_server_double_to_the_longest() -> None:
    pauses = [0]
    for _ in range(6):
        pauses.append(next_probe_pause_ns(pauses[-1], 1, 15))
    assert pauses[1:] == [1, 2, 4, 8, 15, 15]


def test_each_reason_has_its_blame() -> None:
    assert set(BLAME) == set(Reason)


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    assert [retry_after_s(ns) for ns in (0, MS_NS, SECOND_NS, SECOND_NS + 1)] == [1, 1, 1, 2]


# --- selection ----------------------------------------------------------------------------------------------------


def _servers(*healths: float) -> list[Server]:
    servers = []
    for i, health in enumerate(healths, 1):
        server = Server(i, ServerSettings(url=f"http://s{i}:11434", name=f"s{i}"))
        server.health, server.state = health, ServerState.HEALTHY
        record = server.model(MODEL)
        record.loaded = True
        record.note_first_token(100 * MS_NS, 0)
        servers.append(server)
    return servers


def _request() -> Request:
    return Request(RequestArrived(1, "/api/chat", "m", stream=True, generates=True), MODEL, RouteSettings(), 0)


def _firsts(servers: list[Server], n: int = 4000, now_ns: int = 0) -> list[float]:
    rng, config, request = Random(5), Config(), _request()
    firsts = [selection.order(servers, request, config, rng, now_ns)[0] for _ in range(n)]
    return [firsts.count(server) / n for server in servers]


def test_within_a_rank_servers_are_drawn_in_proportion_to_their_health() -> None:
    assert _firsts(_servers(1.0, 2.0, 5.0)) == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.025)


def test_the_second_is_drawn_from_the_rest_in_proportion_too() -> None:
    servers, rng = _servers(1.0, 1.0, 2.0), Random(5)
    seconds = [selection.order(servers, _request(), Config(), rng, 0)[1].id for _ in range(4000)]
    # P(third is second) = P(first first) * 2/3 + P(second first) * 2/3 = 1/2 * 2/3
    assert seconds.count(3) / 4000 == pytest.approx(1 / 3, abs=0.025)


def test_a_server_much_slower_to_its_first_token_is_asked_last() -> None:
    servers = _servers(1.0, 100.0)
    servers[1].models[MODEL].ttft_samples.clear()
    servers[1].models[MODEL].note_first_token(900 * MS_NS, 0)
    assert _firsts(servers, 100) == [1.0, 0.0]


def test_what_is_known_of_a_server_fades_with_time() -> None:
    servers = _servers(1.0, 1.0)
    servers[1].models[MODEL].known_ns = 900 * MS_NS
    later = 4 * Config().selection.forget_ns  # 800 ms above the best are 50 ms now
    assert _firsts(servers, 1000, now_ns=later) == pytest.approx([0.5, 0.5], abs=0.06)


def test_a_loaded_model_goes_before_one_on_disk_and_an_idle_slot_before_a_queue() -> None:
    servers = _servers(1.0, 1.0, 1.0)
    servers[1].models[MODEL].loaded = False
    servers[2].models[MODEL].in_flight = 1
    assert _firsts(servers, 100) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("reliability", "in_flight", "now_ns", "expected"),
    [
        (Reliability.RELIABLE, 1, 0, False),
        (Reliability.UNRELIABLE, 0, 9, True),
        (Reliability.UNRELIABLE, 0, 10, False),
        (Reliability.SECOND_CHANCE, 1, 99, True),
        (Reliability.SECOND_CHANCE, 0, 99, False),
    ],
)
def test_who_is_passed_over(reliability: Reliability, in_flight: int, now_ns: int, expected: bool) -> None:
    (server,) = _servers(1.0)
    server.reliability, server.in_flight, server.trusted_from_ns = reliability, in_flight, 10
    assert selection.is_passed_over(server, now_ns) is expected


# --- estimates, budgets, timers -----------------------------------------------------------------------------------


def test_the_median_of_five_lets_one_long_prompt_count_for_nothing() -> None:
    record = _servers(1.0)[0].models[MODEL]
    for sample_ms in (100, 20_000, 100, 100):
        record.note_first_token(sample_ms * MS_NS, 0)
    assert record.ttft_ns == 100 * MS_NS


def test_the_p95_needs_eight_samples() -> None:
    quantile, told = Quantile(), []
    for i in range(8):
        quantile.add(i)
        told.append(quantile.p95)
    assert told == [None] * 7 + [7]
    assert ModelStats().first_token.p95 is None


def test_the_race_budget_is_earned_by_requests_and_has_a_cap() -> None:
    budget = RaceBudget(RaceSettings(budget=0.5))
    assert sum(budget.spend() for _ in range(100)) == int(RACE_BURST)
    for _ in range(5):
        budget.earn()
    assert [budget.spend() for _ in range(3)] == [True, True, False]


def test_without_a_race_budget_nobody_races() -> None:
    assert not RaceBudget(RaceSettings(budget=0.0)).spend()


def test_as_many_retries_as_two_servers_can_fail_at_once_may_be_under_way() -> None:
    budget = RetryBudget(RetrySettings(budget=0.2, budget_min=3))
    for _ in range(20):
        assert budget.allows()
        budget.begin()
    assert not budget.allows()


def test_retries_that_fail_are_a_share_of_all_requests_and_those_that_help_are_free() -> None:
    budget = RetryBudget(RetrySettings(budget=0.25, budget_min=100))
    for _ in range(20):
        assert budget.allows()
        budget.begin()
    assert not budget.allows()
    for _ in range(4):
        budget.earn()
    assert budget.allows()
    budget.begin()
    assert not budget.allows()
    budget.give_back()
    assert budget.allows()
    for _ in range(1000):
        budget.earn()
    assert budget.credits == 20.0


def test_without_a_share_only_the_retries_under_way_are_bounded() -> None:
    budget = RetryBudget(RetrySettings(budget=0.0, budget_min=1))
    for _ in range(100):
        assert budget.allows()
        budget.begin()
        assert not budget.allows()
        budget.under_way -= 1


@given(
    st.lists(st.tuples(st.sampled_from(["arm", "cancel", "pop"]), st.integers(0, 5), st.integers(0, 50)), max_size=200)
)
def test_timers_fire_as_a_sorted_list_would_have_it(steps: list[tuple[str, int, int]]) -> None:
    timers, oracle, seq = Timers(), {}, 0
    for what, owner, when in steps:
        if what == "arm":
            seq += 1
            timers.arm(TimerKind.HEDGE, owner, when)
            oracle[owner] = (when, seq)
        elif what == "cancel":
            timers.cancel(TimerKind.HEDGE, owner)
            oracle.pop(owner, None)
        else:
            due = min(((*value, key) for key, value in oracle.items() if value[0] <= when), default=None)
            popped = timers.pop_due(when)
            assert popped == (None if due is None else (TimerKind.HEDGE, due[2]))
            if due is not None:
                del oracle[due[2]]
        assert timers.next_deadline() == min((value[0] for value in oracle.values()), default=None)
        assert len(timers) == len(oracle)


# --- Ollama's facts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3.2", "llama3.2:latest"),
        ("Llama3.2:1B", "llama3.2:1b"),
        ("registry.ollama.ai/library/tiny", "tiny:latest"),
        ("library/tiny:q4", "tiny:q4"),
        ("me/tiny", "me/tiny:latest"),
        ("host:5000/me/tiny", "host:5000/me/tiny:latest"),
    ],
)
def test_a_model_has_one_name_here(name: str, expected: str) -> None:
    assert canonical_model(name) == expected


def test_only_runner_options_make_a_runner() -> None:
    assert runner_key(None) == runner_key({"seed": 1, "temperature": 0.5, "num_ctx": None}) == ""
    assert runner_key({"num_gpu": 1, "num_ctx": 8192}) == runner_key({"num_ctx": 8192, "num_gpu": 1, "seed": 3}) != ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((zero, True) for zero in (0, 0.0, "0", "0s", "0h0m0.0s", "-0s", "00.s.0m0ms")),
        *((other, False) for other in (-1, "5m", "", "s", None, False, "10s", "0x")),
    ],
)
def test_which_keep_alive_unloads(value: object, expected: bool) -> None:
    assert keep_alive_is_zero(value) is expected


def test_what_a_request_wants() -> None:
    chat, other = find_route("/api/chat"), find_route("/api/delete")
    assert request_kind(chat, "POST", empty=False, keep_alive=0) is RequestKind.GENERATE
    assert request_kind(chat, "POST", empty=True, keep_alive=None) is RequestKind.LOAD
    assert request_kind(chat, "POST", empty=True, keep_alive="0s") is RequestKind.UNLOAD
    assert request_kind(other, "DELETE", empty=False, keep_alive=None) is RequestKind.MANAGE
    assert request_kind(find_route("/api/x"), "GET", empty=False, keep_alive=None) is RequestKind.GENERATE


def test_paths_speak_their_shapes() -> None:
    shapes = {
        "/api/chat": Shape.NATIVE,
        "/v1/models": Shape.OPENAI,
        "/v1/messages": Shape.ANTHROPIC,
        "/nope": Shape.NATIVE,
    }
    assert {path: shape_of(path) for path in shapes} == shapes
    assert all(route.strategy in route.allowed for route in ROUTES)
    assert error_body(Shape.NATIVE, 404, "model 'nope' not found") == b'{"error":"model \'nope\' not found"}'


# --- the merged catalog -------------------------------------------------------------------------------------------


def test_the_merge_lists_each_model_once_the_newest_entry_whatever_the_order() -> None:
    servers = _servers(1.0, 1.0, 1.0)
    for server, modified_at in zip(
        servers, ("2026-01-01T12:00:00Z", "2026-01-01T15:00:00+02:00", "2026-01-01T11:00:00Z"), strict=True
    ):
        entry = f'{{"name":"m","from":"{server.name}"}}'
        server.models[MODEL].available = ModelInfo("m", f"sha-{server.name}", modified_at, entry)
    merged = {catalog.tags_json(order) for order in permutations(servers)}
    assert merged == {b'{"models":[{"name":"m","from":"s2"}]}'}
    servers[1].state = ServerState.DEAD
    assert b"s1" in catalog.tags_json(servers)


def test_the_highest_version_is_by_number_and_a_release_beats_its_candidates() -> None:
    servers = _servers(1.0, 1.0, 1.0)
    for server, version in zip(servers, ("0.9.10", "0.12.6-rc1", "0.12.6"), strict=True):
        server.version = version
    assert catalog.highest_version(servers) == "0.12.6"
    assert catalog.highest_version([]) is None


# --- words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "noun", "words"), [
    (0, "slot", "0 slots"), (1, "slot", "1 slot"), (2, "slot", "2 slots"), (1, "retry", "1 retry"),
    (2, "retry", "2 retries"),
])  # fmt: skip
def test_things_are_counted_in_words(number: int, noun: str, words: str) -> None:
    assert counted(number, noun) == words
