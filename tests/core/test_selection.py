"""The order in which servers are asked, against its slow and clear version."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lbcore import selection
from lbcore.config import Config, Policy, RouteSettings, SelectionSettings, ServerSettings
from lbcore.events import RequestArrived
from lbcore.records import Request, Server
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.states import Reliability, ServerState
from tests.core import oracle

MODEL = "m:latest"
NOW_NS = 1000 * SECOND_NS

SERVERS = st.lists(
    st.fixed_dictionaries(
        {
            "health": st.sampled_from([0.0, 1.0, 1.5, 40.0, 100.0]),
            "reliability": st.sampled_from([Reliability.RELIABLE] * 3 + list(Reliability)),
            "trusted_from_ns": st.sampled_from([0, NOW_NS + 1]),
            "slots": st.integers(1, 3),
            "in_flight": st.integers(0, 4),
            "loaded": st.sampled_from([True, True, True, False]),
            "runner_key": st.sampled_from([None, None, "", "other"]),
            "known_ns": st.sampled_from([0, 1, 50, 99, 100, 199, 200, 399, 5000]).map(lambda ms: ms * MS_NS),
            "seen_ns": st.integers(0, NOW_NS),
            "service_ns": st.sampled_from([None, 1.0, 3e9]),
            "load_ns": st.sampled_from([None, 1.0, 4e9]),
            "loads": st.integers(0, 1),
            "failing_until_ns": st.sampled_from([0, 0, NOW_NS, NOW_NS + 300 * MS_NS]),
        }
    ),
    min_size=1,
    max_size=9,
)


def server_of(i: int, facts: dict[str, Any]) -> Server:
    server = Server(i, ServerSettings(url=f"http://s{i}:1", name=f"s{i}", slots=facts["slots"]))
    server.state = ServerState.HEALTHY
    record, other = server.model(MODEL), server.model("other:latest")
    other.loading = facts["loads"]
    for name in ("health", "reliability", "trusted_from_ns", "in_flight"):
        setattr(server, name, facts[name])
    for name in ("in_flight", "loaded", "runner_key", "known_ns", "seen_ns", "service_ns", "load_ns"):
        setattr(record, name, facts[name])
    record.failing_until_ns = facts.get("failing_until_ns", 0)
    return server


@given(
    facts=SERVERS,
    generates=st.sampled_from([True, True, True, False]),
    policy=st.sampled_from([Policy.EXPECTED, Policy.EXPECTED, Policy.HEALTH]),
    seed=st.integers(0, 1000),
    looks=st.lists(st.integers(-9, 8), max_size=4),
)
def test_the_order_is_that_of_its_clear_version_however_it_is_looked_at(
    facts: list[dict[str, Any]], generates: bool, policy: Policy, seed: int, looks: list[int]
) -> None:
    servers = [server_of(i, some) for i, some in enumerate(facts, 1)]
    config = Config(selection=SelectionSettings(policy=policy))
    arrived = RequestArrived(1, "/api/chat", "m", stream=True, generates=generates)
    request = Request(arrived, MODEL, RouteSettings(), 0)
    expected = oracle.order(servers, request, config, Random(seed), NOW_NS)
    drawn = selection.order(servers, request, config, Random(seed), NOW_NS)
    n = len(servers)
    assert len(drawn) == n
    for look in looks:
        if -n <= look < n:
            assert drawn[look] is expected[look]
    assert drawn[:2] == expected[:2]
    assert list(drawn) == expected


def test_only_who_is_looked_at_costs_a_random_number() -> None:
    facts = dict.fromkeys(("trusted_from_ns", "in_flight", "known_ns", "seen_ns", "loads"), 0)
    server_facts = {**facts, "health": 1.0, "slots": 1, "loaded": True, "reliability": Reliability.RELIABLE}
    servers = [
        server_of(i, {**server_facts, "runner_key": None, "service_ns": None, "load_ns": None}) for i in range(1, 101)
    ]
    request = Request(RequestArrived(1, "/api/chat", "m", generates=True), MODEL, RouteSettings(), 0)
    rng, same = Random(1), Random(1)
    drawn = selection.order(servers, request, Config(), rng, 0)
    assert drawn[0] is not drawn[1]
    same.random()
    same.random()
    assert rng.random() == same.random()
