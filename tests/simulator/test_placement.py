"""Declared placement under faults: in the end all is where it is to be, and nothing was done twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbcore.commands import Work
from simulator.box import Box, Visitor
from simulator.job import JobRun
from simulator.scenario import Scenario, parse_scenario, run_scenario
from simulator.world import World

MODELS = ("k", "l", "m")
_FAULTS = ("refuse", "hang", "error-500", "reset", "garbage", "power-off", "partition", "flap")


def _scenario(tables: Mapping[str, Any]) -> Scenario:
    problems: list[Any] = []
    scenario = parse_scenario(tables, "drawn", problems)
    assert scenario is not None, problems
    return scenario


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    """A fleet of which each server has some models, some of which are declared, and faults for a while."""
    names = [f"s{index}" for index in range(draw(st.integers(1, 5)))]
    some = st.lists(st.sampled_from(MODELS), unique=True)
    fleet = []
    for name in names:
        models = [*draw(some), "other"]
        fleet.append({"name": name, "models": models, "load": draw(st.sampled_from(["100ms", "3s", "40s"]))})
    declared = []
    for model in draw(st.lists(st.sampled_from(MODELS), unique=True, min_size=1)):
        servers = draw(st.lists(st.sampled_from(names), unique=True))
        copies = draw(st.none() | st.integers(1, len(servers or names)))
        declared.append({"name": model, "servers": servers, "warm": draw(st.booleans()), "prune": draw(st.booleans()),
                         **({"copies": copies} if copies else {})})  # fmt: skip
    faults = []
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, 200))
        faults.append({"kind": draw(st.sampled_from(_FAULTS)), "servers": [draw(st.sampled_from(names))],
                       "from": f"{begin}s", "until": f"{begin + draw(st.integers(1, 100))}s"})  # fmt: skip
    return {
        "about": "drawn",
        "duration": "5m",
        "settle": "10m",
        "fleet": fleet,
        "models": declared,
        "placement": {"replace_after": draw(st.sampled_from(["0s", "30s", "1h"])), "retry_max": "60s", "stall": "60s"},
        "workload": {"kind": "poisson", "rate": 0.2, "models": "other", "output_tokens": 5},
        "fault": faults,
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tables(), st.integers(1, 1000))
def test_placement_converges_under_random_failures_and_pulls_nothing_twice_at_once(
    drawn: dict[str, Any], seed: int
) -> None:
    at_once: list[str] = []
    stay = Box.stay

    def watched(self: Box, visitor: Visitor) -> None:
        if isinstance(visitor, JobRun):
            jobs = [other for other in self._visitors.values() if isinstance(other, JobRun)]
            at_once.extend(f"{self}: {other.ask.model} and {visitor.ask.model}" for other in jobs)
        stay(self, visitor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Box, "stay", watched)
        result = run_scenario(_scenario(drawn), seed, audit=True)
    assert result.violations == []
    assert at_once == []


def _run(tables: Mapping[str, Any]) -> World:
    worlds: list[World] = []

    def build(config: Any, rng: Any, world: Any) -> Any:
        from lbcore.balancer import LoadBalancer  # noqa: PLC0415

        worlds.append(world)
        return LoadBalancer(config, rng)

    result = run_scenario(_scenario(tables), build=build, audit=True)
    assert result.violations == []
    return worlds[0]


def test_what_is_declared_is_on_the_disks_in_the_end_and_nothing_else_has_changed() -> None:
    world = _run({
        "about": "x", "duration": "2m",
        "fleet": [{"name": "a", "models": ["m", "other"]}, {"name": "b", "models": ["other"]},
                  {"name": "c", "models": ["k", "other"]}],
        "models": [{"name": "m", "servers": ["a", "b"], "warm": True}, {"name": "k", "servers": ["a"], "prune": True}],
        "workload": {"kind": "poisson", "rate": 0.5, "models": "other"},
    })  # fmt: skip
    disks = {name: sorted(box.fake.disk) for name, box in world.boxes.items()}
    assert disks == {
        "a": ["k:latest", "m:latest", "other:latest"],
        "b": ["m:latest", "other:latest"],
        "c": ["other:latest"],
    }
    assert all("m:latest" in world.boxes[name].fake.runners for name in "ab")


def test_a_model_stays_loaded_though_the_servers_drop_what_is_idle() -> None:
    world = _run({
        "about": "x", "duration": "30m",
        "fleet": [{"name": "a", "models": ["m", "other"], "keep_alive": "5m"}],
        "models": [{"name": "m", "warm": True}],
        "workload": {"kind": "poisson", "rate": 0.01, "models": "m", "output_tokens": 5},
    })  # fmt: skip
    assert "m:latest" in world.boxes["a"].fake.runners
    assert world.boxes["a"].result.loads == 1


def test_a_pull_that_its_server_does_not_go_on_with_is_given_up() -> None:
    world = _run({
        "about": "x", "duration": "3m", "settle": "10m",
        "fleet": [{"name": "a", "models": ["other"], "load": "60s"}],
        "models": [{"name": "m"}],
        "placement": {"stall": "30s", "retry_max": "30s"},
        "workload": {"kind": "poisson", "rate": 0.2, "models": "other"},
        "fault": [{"kind": "power-off", "servers": ["a"], "from": "20s", "until": "60s"}],
    })  # fmt: skip
    assert "m:latest" in world.boxes["a"].fake.disk
    assert not [job for job in world.balancer.provision.jobs.values() if job.work is Work.PULL]
