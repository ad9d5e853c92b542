"""Each policy's rule, as a story or a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

from lbcore.commands import AttemptKind
from lbcore.config import Policy, RouteSettings
from lbcore.events import Reason
from lbcore.placement import Placement
from lbcore.records import Request
from lbcore.schema import MS_NS, SECOND_NS
from simulator.policies.known import policy
from simulator.policies.placements import DECAY_NS, PENALTY, Peak, PeakEwma, Prequal
from tests.playbook import Playbook, arrival, open_books
from tests.simulator.policy_kit import View, asked, busy, next_id, serve, started, told
from tests.simulator.small_world import config_of


@pytest.fixture(autouse=True)
def _told_to_the_end() -> Generator[None]:
    open_books()
    yield
    for book in open_books():
        book.done()


# --- one after the other, at random, by load ---------------------------------------------------------------


def test_round_robin_goes_round() -> None:
    assert asked(told("round-robin"), 7) == ["a", "b", "c", "a", "b", "c", "a"]


def test_round_robin_passes_over_what_is_full_and_goes_round_for_each_model_apart() -> None:
    book = told("round-robin", have="m n", active="m n")
    busy(book, b=8)
    assert asked(book, 3) == ["a", "c", "a"]
    first_n = book.alone(next_id(book), "a", model="n")
    assert first_n.server == "a"
    assert asked(book, 1) == ["c"]


def test_round_robin_is_fair_to_one() -> None:
    counts = Counter(asked(told("round-robin", "a b c d e"), 53))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_random_asks_each_equally_often() -> None:
    counts = Counter(asked(told("random", "a b c d"), 800))
    for n in counts.values():
        assert abs(n - 200) < 5 * (800 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(
    ("slots", "in_flight", "expected"),
    [
        ({"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 1, "c": 0}, {"c"}),
        ({"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 3}, {"a", "b"}),
        ({"a": 4, "b": 1, "c": 1}, {"a": 2, "b": 1, "c": 1}, {"a"}),  # half full, against full
        ({"a": 4, "b": 1, "c": 1}, {"a": 4, "b": 1, "c": 0}, {"c"}),
    ],
)
def test_least_in_flight_counts_for_each_slot(
    slots: dict[str, int], in_flight: dict[str, int], expected: set[str]
) -> None:
    servers: dict[str, Any] = {name: {"slots": n} for name, n in slots.items()}
    book = told("least-in-flight", **servers)
    busy(book, **in_flight)
    seen = Counter(asked(book, 40))
    assert set(seen) == expected
    assert min(seen.values()) > 40 / len(expected) / 2


def test_power_of_two_never_asks_the_most_loaded_and_mostly_the_least() -> None:
    book = told("power-of-two")
    busy(book, a=3, b=2)
    seen = Counter(asked(book, 300))
    assert set(seen) == {"b", "c"}
    assert abs(seen["c"] - 200) < 5 * (300 * 2 / 9) ** 0.5  # two of the three pairs


def test_weighted_health_asks_loaded_models_first_then_by_health() -> None:
    book = told("weighted-health")
    book.model("c").loaded = False
    book.server("a").health = 90.0
    book.server("b").health = 10.0
    order: Counter[tuple[str, ...]] = Counter()
    for _ in range(400):
        request = Request(arrival(1), "m:latest", RouteSettings(), 0)
        order[tuple(s.name for s in book.balancer.placement.order(list(book.balancer.fleet), request, 0))] += 1
    assert set(order) == {("a", "b", "c"), ("b", "a", "c")}
    assert abs(order["a", "b", "c"] - 360) < 5 * (400 * 0.09) ** 0.5


def test_weighted_health_is_configuration_alone() -> None:
    assert policy("weighted-health").configure(config_of(2)).selection.policy is Policy.HEALTH
    assert policy("weighted-health").place() is Placement


# --- peak EWMA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "cost_ms"),
    [  # (at ms, latency ms)
        ([(0, 100)], 100.0),
        ([(0, 100), (0, 700)], 700.0),  # a peak counts at once
        ([(0, 700), (0, 100)], 700.0),  # and does not go at once
        ([(0, 700), (10_000, 100)], 700 / 2.718281828 + 100 * (1 - 1 / 2.718281828)),
        ([(0, 700), (10_000, 0)], 700 / 2.718281828),  # looking at it lets it decay
        ([(0, 700), (5_000, 0), (10_000, 0)], 700 / 2.718281828),  # how often does not matter
        ([(0, 700), (1_000_000, 100)], 100.0),
    ],
)
def test_a_peak_jumps_up_and_decays(samples: list[tuple[int, int]], cost_ms: float) -> None:
    peak = Peak(0)
    for at_ms, took_ms in samples:
        peak.observe(took_ms * MS_NS, at_ms * MS_NS)
    assert peak.cost_ns / MS_NS == pytest.approx(cost_ms, rel=1e-6)
    assert DECAY_NS == 10 * SECOND_NS


def test_peak_ewma_asks_the_fast_one_until_its_queue_outweighs_the_other() -> None:
    book = told("peak-ewma", "a b")
    first, second = book.alone(next_id(book)), book.alone(next_id(book))
    assert {first.server, second.server} == {"a", "b"}, "who has work and no history is asked last"
    slow, fast = (first, second)
    serve(book, fast, 100)
    serve(book, slow, 350)  # so it took 450 ms
    assert asked(book, 5, ends=False) == [fast.server] * 4 + [slow.server], "450 ms alone, or 97 ms behind four"
    cost_ns = _peaks(book).cost(book.server(fast.server), book.request(3), book.now_ns)
    assert cost_ns == pytest.approx(100 * MS_NS * 5, rel=0.05)


def _peaks(book: Playbook) -> PeakEwma:
    assert isinstance(book.balancer.placement, PeakEwma)
    return book.balancer.placement


def test_peak_ewma_asks_a_slow_one_again_once_its_peak_has_faded() -> None:
    book = told("peak-ewma", "a b")
    _peaks(book)._peak(book.server("a"), 0).observe(2_000 * MS_NS, 0)
    _peaks(book)._peak(book.server("b"), 0).observe(100 * MS_NS, 0)
    names = asked(book, 8, after_ms=1000)
    assert names == ["b"] * 7 + ["a"], "b takes 1 s now, and 2 s have faded to that after 10 s * ln 2"


def test_peak_ewma_counts_the_time_of_a_failure_and_penalises_who_has_work_but_no_history() -> None:
    book = told("peak-ewma", "a b")
    first = book.alone(next_id(book))
    other = "b" if first.server == "a" else "a"
    placement = _peaks(book)
    assert placement.cost(book.server(first.server), book.request(1), book.now_ns) == PENALTY + 1
    assert placement.cost(book.server(other), book.request(1), book.now_ns) == 0.0
    book.head(first).after(3000)
    book.failed(first, Reason.FIRST_TOKEN_TIMEOUT)
    assert [attempt.server for attempt in started(book)] == [other]
    placement.arrange([], book.request(1), book.now_ns)  # it learned when it was asked for another one
    assert placement.cost(book.server(first.server), book.request(1), book.now_ns) == pytest.approx(3000 * MS_NS)


# --- Prequal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probes", "expected"),
    [  # (requests in flight, latency in ms or None)
        ([(0, 100), (0, 50), (0, 80)], "b"),  # all cold: the fastest
        ([(5, 10), (0, 100), (0, 90)], "c"),  # a is hot, whatever its latency
        ([(3, 10), (2, 100), (1, 90), (1, 200)], "c"),
        ([(2, 10), (2, 50), (2, 80)], "a"),  # equal: nobody is above the quantile
        ([(1, 100), (1, None), (0, 80)], "c"),  # unknown counts as the fastest, ties go to fewer in flight
        ([(0, 100), (0, None), (1, 80)], "b"),
        ([(0, None), (1, None), (2, None)], "a"),
    ],
)
def test_prequal_takes_the_fastest_of_the_cold(probes: list[tuple[int, int | None]], expected: str) -> None:
    names = "abcd"[: len(probes)]
    book = told("prequal", " ".join(names))
    placement = book.balancer.placement
    assert isinstance(placement, Prequal)
    latencies = dict(zip(names, (latency for _, latency in probes), strict=True))
    placement.latency_ns = lambda server, model, now_ns: (  # type: ignore[method-assign]
        None if latencies[server.name] is None else float(latencies[server.name] or 0) * MS_NS
    )
    busy(book, **dict(zip(names, (rif for rif, _ in probes), strict=True)))
    request = Request(arrival(1), "m:latest", RouteSettings(), 0)
    for _ in range(20):
        ordered = placement.order(list(book.balancer.fleet), request, 0)
        assert ordered[0].name == expected
    rifs = [server.in_flight for server in ordered]
    hot = [rif for rif in rifs if rif > sorted(rifs)[int(0.84 * (len(rifs) - 1))]]
    assert rifs[len(rifs) - len(hot) :] == sorted(hot), "hot ones come last, by their requests in flight"


def test_prequal_knows_the_latency_at_the_present_load_and_forgets_it() -> None:
    book = told("prequal", "a")
    placement = book.balancer.placement
    assert isinstance(placement, Prequal)
    for took_ms in (100, 120, 110):  # with nothing else in flight
        serve(book, book.alone(next_id(book)), took_ms)
    busy(book, a=2)
    serve(book, book.alone(next_id(book)), 900)  # behind two others
    failed = book.alone(next_id(book))
    book.failed(failed, Reason.CLIENT_ERROR, 400).skip()
    asked(book, 1, ends=False)  # now it learns of what has come
    a = book.server("a")
    known = {}
    for in_flight in (0, 1, 2, 7):
        a.in_flight, before = in_flight, a.in_flight
        known[in_flight] = placement.latency_ns(a, "m:latest", book.now_ns)
        later = placement.latency_ns(a, "m:latest", book.now_ns + 61 * SECOND_NS)
        assert later is None
        a.in_flight = before
    assert known == {0: 110 * MS_NS, 1: 115 * MS_NS, 2: 900 * MS_NS, 7: 900 * MS_NS}, "as many in flight, or nearly"
    assert placement.latency_ns(a, "n:7b", book.now_ns) is None


def test_prequal_looks_at_sixteen_servers_at_most() -> None:
    names = " ".join(f"s{i}" for i in range(40))
    book = told("prequal", names)
    request = Request(arrival(1), "m:latest", RouteSettings(), 0)
    firsts = Counter(book.balancer.placement.order(list(book.balancer.fleet), request, 0)[0].name for _ in range(400))
    assert len(firsts) > 30, "it is a random subset"


# --- races and hedges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4])
def test_race_k_races_always_and_wherever(k: int) -> None:
    book = told(f"race-{k}", "a b c d e")
    for _ in range(6):  # beyond the slots
        assert len({attempt.server for attempt in book.race(next_id(book))}) == k


def test_race_k_replaces_a_racer_that_fails() -> None:
    book = told("race-2", "a b c")
    first, second = book.race(1)
    book.failed(first, Reason.RESET)
    (replacement,) = started(book)
    assert replacement.server not in {first.server, second.server}


def test_race_budget_does_not_race_where_slots_are_busy_and_race_k_does() -> None:
    for name, n in (("race-budget", 1), ("race-2", 2)):
        book = told(name, "a b")
        busy(book, a=1, b=1)
        assert len(book.race(next_id(book))) == n


@pytest.mark.parametrize(("name", "hedges"), [("hedge-p95", True), ("hedge-adaptive", False)])
def test_hedge_p95_goes_to_busy_servers_too_and_hedge_adaptive_to_idle_ones_only(name: str, hedges: bool) -> None:
    book = told(name, "a b", factor=4)
    busy(book, b=1)
    request_id = next_id(book)
    book.alone(request_id, "a")
    book.after(1000)  # the delay while the p95 is not known
    if hedges:
        book.started(request_id, AttemptKind.HEDGE, "b")
    book.done()


@pytest.mark.parametrize("name", ["hedge-p95", "hedge-adaptive"])
def test_a_hedge_follows_after_the_p95_and_only_one(name: str) -> None:
    book = told(name, "a b c", factor=4)
    stats = book.balancer.fleet.model_stats("m:latest")
    for took_ms in range(20, 420, 20):
        stats.first_token.add(took_ms * MS_NS)
    book.alone(1, "a")
    assert stats.first_token.p95 is not None
    delay_ms = stats.first_token.p95 / MS_NS
    book.after(delay_ms - 1).done()
    book.after(1)
    book.started(1, AttemptKind.HEDGE, "b")
    book.after(1000).done()


# --- session affinity --------------------------------------------------------------------------------------


def test_a_session_stays_with_its_server() -> None:
    world = View()
    book = told("session-affinity", "a b c d", world=world)
    home: dict[int, set[str]] = {}
    for i in range(120):
        world.sessions[i + 1] = 1 + i % 20
        home.setdefault(1 + i % 20, set()).update(asked(book, 1))
    assert all(len(servers) == 1 for servers in home.values())
    assert len(set.union(*home.values())) == 4, "sessions are spread"


def test_a_session_moves_when_its_server_has_more_than_its_share() -> None:
    world = View()
    book = told("session-affinity", "a b", world=world)
    world.sessions = dict.fromkeys(range(1, 100), 5)
    first = asked(book, 1)[0]
    seen = Counter(asked(book, 12, ends=False))
    assert set(seen) == {"a", "b"}
    assert seen[first] >= seen["b" if first == "a" else "a"]
    for n in seen.values():
        assert n <= -(-1.25 * 12 // 2)


def test_when_a_server_goes_only_its_sessions_move() -> None:
    world = View()
    book = told("session-affinity", "a b c d", world=world)
    placement = book.balancer.placement
    servers = list(book.balancer.fleet)
    moved = 0
    for session in range(1, 200):
        world.sessions[1] = session
        request = Request(arrival(1), "m:latest", RouteSettings(), 0)
        before = placement.order(servers, request, 0)
        after = placement.order([s for s in servers if s.name != "b"], request, 0)
        assert after == [s for s in before if s.name != "b"]
        moved += before[0].name == "b"
    assert 20 < moved < 80


def test_sessions_are_spread_by_slots() -> None:
    world = View()
    book = told("session-affinity", "a b", world=world, a={"slots": 3})
    first: Counter[str] = Counter()
    for session in range(1, 1001):
        world.sessions[1] = session
        request = Request(arrival(1), "m:latest", RouteSettings(), 0)
        first[book.balancer.placement.order(list(book.balancer.fleet), request, 0)[0].name] += 1
    assert abs(first["a"] - 750) < 5 * (1000 * 0.75 * 0.25) ** 0.5


def test_without_a_session_the_least_loaded_is_asked() -> None:
    world = View()
    book = told("session-affinity", "a b", world=world)
    busy(book, a=1)
    world.sessions = dict.fromkeys(range(1, 100), 0)
    assert asked(book, 5) == ["b"] * 5


# --- the oracle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_ms", "in_flight", "expected"),
    [
        ({"a": 300, "b": 100, "c": 200}, {}, "b c a"),
        ({"a": 300, "b": None, "c": 200}, {}, "c a b"),  # b would fail or break
        ({"a": 100, "b": 100, "c": 100}, {"a": 1, "b": 1}, "c a b"),
        ({"a": None, "b": None, "c": None}, {"a": 1}, "b c a"),
    ],
)
def test_the_oracle_asks_whoever_is_soonest(
    first_ms: dict[str, int | None], in_flight: dict[str, int], expected: str
) -> None:
    book = told("oracle", world=View(first_ms))
    busy(book, **in_flight)
    request = Request(arrival(99), "m:latest", RouteSettings(), 0)
    ordered = book.balancer.placement.order(list(book.balancer.fleet), request, 0)
    assert [s.name for s in ordered] == expected.split()
    assert asked(book, 1) == expected.split()[:1]


def test_the_oracle_learns_soon_that_a_server_is_back() -> None:
    probe = policy("oracle").configure(config_of(2)).probe
    assert probe.interval_dead_ns == probe.interval_dead_max_ns == SECOND_NS // 4
