"""The table of policies, and what holds of all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, given, settings
from hypothesis.stateful import run_state_machine_as_test

from lbcore.balancer import LoadBalancer
from lbcore.commands import Decision
from lbcore.config import Config, RaceSettings, RetrySettings, RouteSettings, Strategy
from lbcore.events import Reason
from lbcore.ollama import default_routes
from lbcore.placement import Placement
from lbcore.records import Request
from lbcore.schema import SECOND_NS
from lbcore.states import Reliability
from lbio.config_file import load
from simulator.policies.known import POLICIES, PolicyError, policy
from simulator.policies.placements import OtherPlacement
from tests.core import test_machine
from tests.playbook import A, arrival
from tests.simulator.policy_kit import View, asked, busy, next_id, started, told
from tests.simulator.small_world import SmallWorld, config_of, digests

ROOT = Path(__file__).parents[2]
OTHERS = [name for name, spec in POLICIES.items() if not spec.ships and name not in {"original", "hedge-p95"}]
"""The policies that are an order of the servers, other than ours."""


# --- the table ---------------------------------------------------------------------------------------------


def test_the_table_names_every_policy_of_the_issue() -> None:
    assert list(POLICIES) == [
        "round-robin",
        "random",
        "least-in-flight",
        "power-of-two",
        "weighted-health",
        "peak-ewma",
        "prequal",
        "race-2",
        "race-3",
        "race-4",
        "race-budget",
        "hedge-p95",
        "hedge-adaptive",
        "session-affinity",
        "oracle",
        "original",
    ]
    for name, spec in POLICIES.items():
        assert spec.name == name
        assert spec.about
        assert "\n" not in spec.about
        assert spec.source
        assert not spec.ships or (spec.placement is Placement and not spec.needs_world)


def test_an_unknown_policy_is_told_and_all_are_named() -> None:
    with pytest.raises(PolicyError, match=r'"fastest"; write one of "round-robin", .*"original"$'):
        policy("fastest")


@pytest.mark.parametrize("name", ["oracle", "session-affinity"])
def test_a_policy_that_asks_the_world_needs_one(name: str) -> None:
    assert policy(name).needs_world
    with pytest.raises(PolicyError, match=name):
        policy(name).build(config_of(2), Random(1))


@pytest.mark.parametrize("name", POLICIES)
def test_configuring_twice_is_configuring_once_and_leaves_the_rest_alone(name: str) -> None:
    before = config_of(3)
    spec = policy(name)
    once = spec.configure(before)
    assert spec.configure(once) == once
    assert once.health == before.health
    assert [s.url for s in once.servers] == [s.url for s in before.servers]
    if name != "original":
        assert once.servers == before.servers
        assert (once.timeouts, once.retry, once.queue) == (before.timeouts, before.retry, before.queue)
        assert once.probe.interval_ns == before.probe.interval_ns
    assert spec.build(before, Random(1), View()).config == once


@pytest.mark.parametrize("name", POLICIES)
def test_only_what_races_or_hedges_by_name_does(name: str) -> None:
    race = RaceSettings(racers_max=5)
    before = Config(race=race, routes={**default_routes(race), "/api/show": RouteSettings(strategy=Strategy.HEDGE)})
    routes = policy(name).configure(before).routes
    strategy = Strategy.HEDGE if name.startswith("hedge") else Strategy.SEQUENTIAL
    if name.startswith("race") or name == "original":
        strategy = Strategy.RACE
    assert {routes[path].strategy for path in ("/api/chat", "/api/generate", "/v1/messages")} == {strategy}
    assert routes["/api/show"] == RouteSettings()
    assert routes["/api/tags"].strategy is Strategy.AGGREGATE


def test_a_config_without_routes_is_given_the_default_ones() -> None:
    assert policy("race-2").configure(Config()).route("/api/chat").racers_min == 2


def test_race_budget_is_what_prod_toml_says() -> None:
    prod = load(ROOT / "configs" / "prod.toml").core
    ours = policy("race-budget").configure(config_of(2))
    assert (ours.race, ours.selection, dict(ours.routes)) == (prod.race, prod.selection, dict(prod.routes))


# --- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_an_order_neither_loses_nor_doubles_a_server(name: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 20))
    balancer = policy(name).build(config_of(n), Random(data.draw(st.integers(0, 9))), View())
    servers = list(balancer.fleet)
    placement = balancer.placement
    assert isinstance(placement, OtherPlacement)
    for step in range(data.draw(st.integers(1, 4))):
        for server in servers:
            server.in_flight = data.draw(st.integers(0, 9))
            server.health = data.draw(st.sampled_from([0.0, 1.0, 100.0]))
            server.reliability = data.draw(st.sampled_from(Reliability))
            server.trusted_from_ns = data.draw(st.sampled_from([0, 10**12]))
        candidates = data.draw(st.lists(st.sampled_from(servers), min_size=1, unique_by=lambda s: s.id))
        model = data.draw(st.sampled_from(["m:latest", "n:7b", None]))
        request = Request(arrival(step + 1, model), model, RouteSettings(), step * SECOND_NS)
        before = list(candidates)
        ordered = placement.order(candidates, request, step * SECOND_NS)
        assert candidates == before
        assert sorted(s.id for s in ordered) == sorted(s.id for s in candidates)


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "oracle"])
def test_a_server_whose_stream_broke_is_asked_last(name: str) -> None:
    book = told(name)
    for server in book.balancer.fleet:
        server.health = 100.0
    first = book.alone(next_id(book))
    book.token(first).skip()
    book.failed(first, Reason.TRUNCATED).skip()
    assert book.server(first.server).is_alive
    assert first.server not in asked(book, 12)
    busy(book, **{server.name: 8 for server in book.balancer.fleet if server.name != first.server})
    assert asked(book, 1) == [first.server]


@pytest.mark.parametrize("name", [*OTHERS, "weighted-health"])
def test_what_races_not_asks_one_and_retries_elsewhere(name: str) -> None:
    book = told(name, retry=RetrySettings(budget=1.0))
    names = [book.alone(1).server]
    for attempt_id in (1, 2):
        book.after(1000).failed(A(attempt_id, names[-1]), Reason.RESET)
        names += [attempt.server for attempt in started(book)]
    assert sorted(names) == ["a", "b", "c"]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_audit_holds_whatever_happens(name: str, seed: int) -> None:
    world = SmallWorld(name, seed=seed, faults=0.08).run(100)
    assert sum(world.outcomes.values()) == 100
    assert world.outcomes[Decision.FINISHED] > 60


@pytest.mark.parametrize("name", POLICIES)
def test_without_faults_everything_ends_well_and_the_same_seed_gives_the_same_bytes(name: str) -> None:
    once, again, other = (SmallWorld(name, seed=seed, faults=0.0).run(40) for seed in (3, 3, 4))
    assert once.outcomes == {Decision.FINISHED: 40}
    assert once.digest == again.digest != other.digest


def test_processes_with_different_hash_seeds_give_the_same_commands() -> None:
    code = "from tests.simulator.small_world import digests; print(digests())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("0", "4711")
    ]
    assert runs[0] == runs[1] == digests()


@pytest.mark.parametrize("name", [name for name in POLICIES if name in OTHERS or name == "hedge-p95"])
def test_any_number_of_things_may_happen_in_any_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = policy(name).place(View())
    monkeypatch.setattr(test_machine, "LoadBalancer", lambda config, rng: LoadBalancer(config, rng, place))
    # not shrunk: it takes minutes, and the core's own test of the same machine does it
    phases = (Phase.explicit, Phase.reuse, Phase.generate)
    bounded = settings(test_machine.TestMachine.settings, max_examples=12, stateful_step_count=30, phases=phases)
    run_state_machine_as_test(test_machine.Machine, settings=bounded)
