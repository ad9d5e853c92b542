"""The order of many servers, kept up to date, against the order of the same servers looked for anew."""

from __future__ import annotations

from itertools import accumulate
from math import inf
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from lbcore import pools, selection
from lbcore.blocks import Least, Lots
from lbcore.config import Config, Policy, RouteSettings, SelectionSettings
from lbcore.errors import InvariantError
from lbcore.events import RequestArrived
from lbcore.invariants import audit
from lbcore.records import Request, Server, ServerModel
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.standing import Among, Standing
from lbcore.states import Reliability
from tests.core import test_machine
from tests.core.test_determinism import digest_of_a_run
from tests.core.test_selection import MODEL, SERVERS, server_of
from tests.playbook import fleet

CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "health": st.sampled_from([0.0, 1.0, 1.5, 40.0, 100.0]),
    "reliability": st.sampled_from(list(Reliability)),
    "trusted_from_s": st.integers(0, 30),
    "in_flight": st.integers(0, 4),
    "others": st.integers(0, 2),
    "known_ms": st.sampled_from([0, 1, 50, 60, 99, 100, 150, 199, 200, 399, 5000]),
    "failing_s": st.sampled_from([0, 1, 16]),
    "service_ns": st.sampled_from([None, 1.0, 3e9]),
    "load_ns": st.sampled_from([None, 1.0, 4e9]),
    "loaded": st.booleans(),
    "runner_key": st.sampled_from([None, "", "other"]),
    "loads": st.integers(0, 1),
}
STEPS = st.lists(
    st.one_of(
        st.sampled_from(list(CHANGES)).flatmap(
            lambda name: st.tuples(st.just(name), st.integers(0, 39), CHANGES[name])
        ),
        st.tuples(st.just("time"), st.sampled_from([0, 1, 10 * MS_NS, SECOND_NS, 30 * SECOND_NS]), st.just(0)),
        st.tuples(st.just("look"), st.integers(0, 3), st.lists(st.integers(0, 39), max_size=2, unique=True)),
    ),
    max_size=40,
)


_PLAIN: dict[str, Any] = {
    **dict.fromkeys(("trusted_from_ns", "in_flight", "known_ns", "seen_ns", "loads"), 0),
    **dict.fromkeys(("runner_key", "service_ns", "load_ns")),
    "health": 1.0,
    "slots": 1,
    "loaded": True,
    "reliability": Reliability.RELIABLE,
}


def _change(server: Server, record: ServerModel, name: str, value: Any, now_ns: int) -> None:
    """Let something happen to a server, as the core does it."""
    if name == "in_flight":
        server.in_flight += value - record.in_flight
        record.in_flight = value
    elif name == "others":
        server.in_flight = record.in_flight + value
    elif name == "trusted_from_s":
        server.trusted_from_ns = now_ns + value * SECOND_NS
    elif name == "known_ms":
        record.known_ns, record.seen_ns = value * MS_NS, now_ns
    elif name == "failing_s":
        record.failing_until_ns = now_ns + value * SECOND_NS
    elif name == "loads":
        server.models["other:latest"].loading = value
    else:
        setattr(server if name in {"health", "reliability"} else record, name, value)


@given(
    facts=st.lists(SERVERS.flatmap(st.sampled_from), min_size=1, max_size=40),
    in_flight_max=st.sampled_from([2, 4, 8]),
    generates=st.sampled_from([True, True, True, False]),
    policy=st.sampled_from([Policy.EXPECTED, Policy.EXPECTED, Policy.HEALTH]),
    steps=STEPS,
)
def test_the_order_that_is_kept_is_the_one_that_is_looked_for(
    facts: list[dict[str, Any]], in_flight_max: int, generates: bool, policy: Policy, steps: list[Any]
) -> None:
    now_ns = 1000 * SECOND_NS
    servers = [server_of(i, some) for i, some in enumerate(facts, 1)]
    for server in servers:
        server.in_flight_max = in_flight_max
        server.in_flight = server.models[MODEL].in_flight
    config = Config(selection=SelectionSettings(policy=policy))
    request = Request(RequestArrived(1, "/api/chat", "m", generates=generates), MODEL, RouteSettings(), 0)
    records = [server.models[MODEL] for server in servers]

    def made_anew() -> Standing:
        return Standing(servers, records, "" if generates else None, config.selection)

    kept = made_anew()
    for seed, (name, at, value) in enumerate([*steps, ("look", 2, [0, 5])]):
        if name == "time":
            now_ns += at
        elif name != "look":
            server = servers[at % len(servers)]
            _change(server, server.models[MODEL], name, value, now_ns)
            noted = {server.id: server}
            if name in {"in_flight", "others", "loads", "health"}:
                kept.note({}, noted)
            else:
                kept.note(noted, {})
        else:
            tried = [servers[i] for i in value if i < len(servers)]
            usable = selection.with_room([s for s in servers if s not in tried], request)
            among = Among(kept, now_ns, tried)
            assert len(among) == len(usable)
            assert kept.in_slots == sum(
                min(r.in_flight, s.slots) for s, r in zip(servers, records, strict=True) if r.loaded
            )
            if usable:
                ready = [
                    s for s in usable if selection.is_ready(s, request) and not selection.is_passed_over(s, now_ns)
                ]
                expected = selection.order(usable, request, config, Random(seed), now_ns)
                if kept.begins_ready():
                    assert expected[0] is selection.order(ready, request, config, Random(seed), now_ns)[0]
                drawn = among.order(Random(seed))
                again = Among(made_anew(), now_ns, tried).order(Random(seed))
                n = at or len(usable)  # mostly the first few are looked at, and the others stay where they were
                assert list(drawn[:n] if at else drawn) == list(expected)[:n] == list(again)[:n]


@given(
    known_ms=st.lists(st.integers(60, 900), min_size=2, max_size=12),
    full=st.lists(st.booleans(), min_size=12, max_size=12),
    failing_ms=st.lists(st.sampled_from([0, 0, 0, 0, 100, 500, 2000]), min_size=12, max_size=12),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("time"), st.floats(0, 5).map(lambda power: round(MS_NS * 10.0**power)), st.just(0)),
            st.tuples(st.just("full"), st.integers(0, 11), st.integers(0, 1)),
            st.tuples(st.just("known"), st.integers(0, 11), st.integers(20, 900)),
        ),
        min_size=1,
        max_size=20,
    ),
)
def test_times_that_fade_are_ranked_at_every_moment_as_they_are_then(
    known_ms: list[int], full: list[bool], failing_ms: list[int], steps: list[tuple[str, int, int]]
) -> None:
    """The fast ones are full, or fail, so that even the soonest time is one that shrinks."""
    now_ns = 1000 * SECOND_NS
    servers = [server_of(i, {**_PLAIN, "known_ns": ms * MS_NS, "service_ns": 5e9}) for i, ms in enumerate(known_ms)]
    records = [server.models[MODEL] for server in servers]
    config = Config()
    request = Request(RequestArrived(1, "/api/chat", "m", generates=True), MODEL, RouteSettings(), 0)
    for server, record, is_full, ms in zip(servers, records, full, failing_ms, strict=False):
        record.seen_ns, record.failing_until_ns = now_ns, now_ns + ms * MS_NS
        record.in_flight = server.in_flight = int(is_full)
    kept = Standing(servers, records, "", config.selection)
    for seed, (name, at, value) in enumerate(steps):
        server = servers[at % len(servers)]
        record = server.models[MODEL]
        if name == "time":
            now_ns += at
        elif name == "full":
            record.in_flight = server.in_flight = value
            kept.note({}, {server.id: server})
        else:
            record.known_ns, record.seen_ns = value * MS_NS, now_ns
            kept.note({server.id: server}, {})
        expected = selection.order(servers, request, config, Random(seed), now_ns)
        assert list(Among(kept, now_ns).order(Random(seed))) == list(expected)


@pytest.mark.parametrize("seed", range(60))
def test_a_rank_changes_in_the_moment_in_which_it_has_to(seed: int) -> None:
    """Among servers whose times stand near the limits of ranks, looked at in small and in large steps."""
    rng, now_ns = Random(seed), 1000 * SECOND_NS
    servers, config = [], Config()
    for i in range(12):
        known_ms = rng.choice([100, 140, 199, 200, 250, 300, 400])
        near_ms = rng.choice([100, 140, 150, 200, 250]) * 2 ** rng.randrange(1, 4) * rng.uniform(0.997, 1.003)
        facts = {"known_ns": known_ms * MS_NS, "service_ns": max(1.0, (near_ms - known_ms) * MS_NS)}
        servers.append(server_of(i, {**_PLAIN, **facts, "in_flight": rng.randrange(2)}))
        record = servers[-1].models[MODEL]
        record.seen_ns = now_ns - rng.randrange(400) * SECOND_NS
        record.failing_until_ns = now_ns + rng.choice([0, 0, 0, 0, 0, 300, 3000]) * MS_NS
    request = Request(RequestArrived(1, "/api/chat", "m", generates=True), MODEL, RouteSettings(), 0)
    kept = Standing(servers, [server.models[MODEL] for server in servers], "", config.selection)
    for _ in range(120):
        if rng.random() < 0.1:
            server = servers[rng.randrange(12)]
            server.in_flight = server.models[MODEL].in_flight = 1 - server.in_flight
            kept.note({}, {server.id: server})
        now_ns += round(MS_NS * 10 ** rng.uniform(0, 4.2))
        kept.settle(now_ns)
        expected = selection.ranks_of(servers, [s.models[MODEL] for s in servers], request, config, now_ns)
        assert kept.ranks() == expected


def _standing_of(*facts: dict[str, Any]) -> tuple[Standing, list[Server]]:
    """Return servers and their order."""
    servers = [server_of(i, {**_PLAIN, **some}) for i, some in enumerate(facts)]
    return Standing(servers, [server.models[MODEL] for server in servers], "", SelectionSettings()), servers


def test_who_is_just_soon_enough_falls_behind_when_the_soonest_gets_sooner() -> None:
    fast = {"known_ns": 50 * MS_NS, "in_flight": 1, "service_ns": 5e9}
    fading = {"known_ns": 200 * MS_NS}
    just_soon_enough = {"known_ns": 60 * MS_NS, "in_flight": 1, "service_ns": 339.9 * MS_NS}
    standing, _ = _standing_of(fast, fading, just_soon_enough)
    standing.settle(0)
    assert standing.ranks() == [4, 0, 0]
    standing.settle(SECOND_NS // 5)
    assert standing.ranks() == [4, 0, 1]


def test_the_first_is_not_surely_the_first_that_is_ready_where_the_fastest_is_not() -> None:
    passed_over = {"known_ns": 100 * MS_NS, "reliability": Reliability.UNRELIABLE, "trusted_from_ns": SECOND_NS}
    standing, _ = _standing_of(passed_over, {"known_ns": 190 * MS_NS}, {"known_ns": 350 * MS_NS})
    standing.settle(0)
    assert not standing.begins_ready()
    standing.settle(SECOND_NS)
    assert standing.begins_ready()


def test_the_first_is_not_surely_the_first_that_is_ready_beside_one_that_is_not() -> None:
    full = {"known_ns": 100 * MS_NS, "in_flight": 1, "service_ns": 1.0}
    standing, servers = _standing_of(full, {"known_ns": 100 * MS_NS})
    servers[1].in_flight = 1  # for another model
    standing.settle(0)
    assert not standing.begins_ready()


def test_few_of_many_are_looked_at_and_drawn() -> None:
    rng, same = Random(1), Random(1)
    servers = [server_of(i, _PLAIN) for i in range(1000)]
    standing = Standing(servers, [server.models[MODEL] for server in servers], "", SelectionSettings())
    standing.settle(0)
    drawn = standing.draw(rng)
    assert next(drawn) is not next(drawn)
    same.random()
    same.random()
    assert rng.random() == same.random()


def test_a_look_at_others_changes_nothing() -> None:
    """What was drawn, or left out, is back at the next look."""
    servers = [server_of(i, _PLAIN) for i in range(1, 41)]
    standing = Standing(servers, [server.models[MODEL] for server in servers], "", SelectionSettings())
    orders = []
    for tried in ([], servers[:3], []):
        standing.settle(0, tried)
        orders.append(list(standing.draw(Random(1))))
    assert orders[0] == orders[2]
    assert sorted(s.id for s in orders[1]) == list(range(4, 41))


@pytest.mark.parametrize("few", [0, 3])
def test_the_core_decides_the_same_however_few_are_many(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [digest_of_a_run(seed) for seed in range(3)]
    monkeypatch.setattr(pools, "FEW", few)
    assert [digest_of_a_run(seed) for seed in range(3)] == expected


def test_whatever_happens_the_order_of_many_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit after every step compares it with one made anew."""
    monkeypatch.setattr(pools, "FEW", 0)
    run_state_machine_as_test(
        test_machine.Machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.reuse, Phase.generate],
        ),
    )


def test_the_audit_tells_of_an_order_that_is_out_of_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "FEW", 0)
    book = fleet("a b")
    first, _ = book.race(1)
    audit(book.balancer, book.now_ns)
    book.balancer.fleet.moved.clear()
    book.server(first.server).health = 7.0  # of which nobody was told
    with pytest.raises(InvariantError, match="the order of the holders of m:latest"):
        audit(book.balancer, book.now_ns)


# --- their parts -------------------------------------------------------------------------------------------


@given(
    puts=st.lists(st.tuples(st.integers(0, 69), st.one_of(st.just(inf), st.floats(0, 1e12))), max_size=200),
    limit=st.floats(0, 1e12),
)
def test_the_least_of_many_numbers_is_known(puts: list[tuple[int, float]], limit: float) -> None:
    kept, naive = Least(70), [inf] * 70
    for i, value in puts:
        kept.put(i, value)
        naive[i] = value
    assert kept.values == naive
    assert kept.least() == min(naive)
    assert kept.up_to(limit) == [i for i, value in enumerate(naive) if value <= limit]
    assert kept.from_on(limit) == [i for i, value in enumerate(naive) if value >= limit]


@given(
    puts=st.lists(st.tuples(st.integers(0, 69), st.sampled_from([0.0, 1e-6, 0.5, 1.0, 3.0, 100.0])), max_size=200),
    share=st.floats(0, 1, exclude_max=True),
)
def test_a_place_is_drawn_in_proportion_to_its_weight(puts: list[tuple[int, float]], share: float) -> None:
    kept, naive = Lots(70), [0.0] * 70
    for i, weight in [*puts, (69, 1.0)]:
        kept.put(i, weight)
        naive[i] = weight
    ends = list(accumulate(naive))
    place, at = kept.draw(share), share * ends[-1]
    assert naive[place] > 0
    assert (ends[place - 1] if place else 0.0) <= at * (1 + 1e-9)
    assert at <= ends[place] * (1 + 1e-9)


def test_rounding_draws_the_last_place_and_none_beyond() -> None:
    lots = Lots(70)
    lots.put(3, 1.0)
    lots.put(40, 1.0)
    assert lots.draw(1.0) == 40
