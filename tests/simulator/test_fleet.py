"""`[[fleet]]` tables into fake servers."""

from __future__ import annotations

from typing import Any

import pytest

from lbcore.parsing import Problem
from simulator.fakes.specs import FakeModel, FakeSpec
from simulator.faults import Fault, FaultKind
from simulator.fleet import parse_fleet


def parse(*tables: dict[str, Any]) -> tuple[tuple[FakeSpec, ...], list[str]]:
    problems: list[Problem] = []
    specs = parse_fleet(tables, problems)
    return specs, [str(problem) for problem in problems]


def test_a_name_is_enough() -> None:
    specs, problems = parse({"name": "a"})
    assert problems == []
    assert specs == (FakeSpec("a", models=(FakeModel("llama3.2:latest"),), tokens=60),)


def test_every_key_is_read() -> None:
    specs, problems = parse({
        "name": "a", "port": 8080, "slots": 4, "queue_max": 9, "in_flight_max": 3, "loaded_max": 2,
        "vram": "8GB", "first_token": "80ms",
        "token": "7.5ms", "load": "1s", "tokens": 12, "keep_alive": "1m", "version": "1.2.3", "seed": 5,
        "models": ["x", "y:1b"], "loaded": ["X:latest"],
        "fault": [{"kind": "flap", "period": "20s", "up": "12s"},
                  {"kind": "slow", "factor": 3, "from": 1, "until": "2s"}],
    })
    assert problems == []
    assert specs == (FakeSpec(
        "a", models=(FakeModel("x"), FakeModel("y:1b")), start_loaded=("X:latest",), num_parallel=4, max_queue=9,
        in_flight_max=3, max_loaded=2, vram_bytes=8_000_000_000,
        first_token_ms=80.0, token_ms=7.5, load_ms=1000.0, tokens=12, keep_alive_s=60.0,
        version="1.2.3", seed=5, port=8080, faults=(
            Fault(FaultKind.FLAP, period_s=20.0, up_s=12.0),
            Fault(FaultKind.SLOW, factor=3.0, from_s=1.0, until_s=2.0))),)


def test_a_model_can_do_what_its_table_says() -> None:
    specs, problems = parse({"name": "a", "models": [{"name": "x", "can": ["tools", "audio"]}, "y"]})
    assert problems == []
    assert [model.capabilities for model in specs[0].models] == [("completion", "tools", "audio"), ("completion",)]


def test_one_fault_is_a_table() -> None:
    specs, problems = parse({"name": "a", "fault": {"kind": "hang"}})
    assert problems == []
    assert specs[0].faults == (Fault(FaultKind.HANG),)


SKILLS_FIX = 'did you mean "tools"? The choices are "tools", "thinking", "vision", "audio", "insert"'
MODELS_FIX = 'write ["llama3.2:latest"]'


@pytest.mark.parametrize(("table", "problem"), [
    ({"slot": 1}, "fleet[0].slot: 1 is set, but there is no such key; did you mean fleet[0].slots?"),
    ({"faults": []}, "fleet[0].faults: [] is set, but there is no such key; did you mean fleet[0].fault?"),
    ({"kind": "flap"}, 'fleet[0].kind: "flap" is set, but there is no such key; did you mean fleet[0].fault.kind?'),
    ({"models": "x"}, f'fleet[0].models: "x" is not a list of model names; {MODELS_FIX}'),
    ({"models": [1]}, f"fleet[0].models: [...] is not a list of model names; {MODELS_FIX}"),
    ({"models": [{"name": "x", "can": ["tool"]}]},
     f'fleet[0].models[0].can: "tool" is nothing that a model can do; {SKILLS_FIX}'),
    ({"loaded": ["x"]}, 'fleet[0].loaded: "x" is not among this server\'s models; add it to models'),
    ({"port": 70000}, "fleet[0].port: 70000 is too large; write a whole number from 0 to 65535"),
    ({"fault": "flap"}, 'fleet[0].fault: "flap" is not a table; write its keys in a table of their own'),
    ({"fault": {"kind": "flap", "up": "3s"}}, 'fleet[0].fault.up: "3s" is more than fleet[0].fault.period; write less'),
    ({"fault": [{"kind": "slow", "factr": 2}]},
     "fleet[0].fault[0].factr: 2 is set, but there is no such key; did you mean fleet[0].fault[0].factor?"),
    ({"name": "a b"}, 'fleet[0].name: "a b" is no name for a server; write ASCII without space, comma and slash'),
])
def test_each_mistake_has_its_message(table: dict[str, Any], problem: str) -> None:
    problems = parse({"name": "a", **table})[1]
    assert problem in problems
    assert len(problems) <= 2  # a string instead of a table also lacks its mandatory key


def test_names_and_ports_are_given_once() -> None:
    assert parse({"name": "a", "port": 9}, {"name": "a", "port": 9}, {"name": "b"}, {"name": "c"})[1] == [
        'fleet[1].name: "a" is also the name of fleet[0]; give each server a name of its own',
        "fleet[1].port: 9 is also the port of fleet[0]; write 0 for a free port",
    ]
