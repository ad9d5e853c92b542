"""Scenario files: what is wrong with them is said once, where it is, and nothing that could not be goes unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lbcore.parsing import Problem
from lbcore.schema import MS_NS, SECOND_NS
from lbio.cli import main
from simulator.cli import Wanted, simulate
from simulator.fault_tables import TABLES, FaultTable
from simulator.faults import Fault, FaultKind
from simulator.network import LinkFault, LinkFaultKind
from simulator.scenario import Scenario, parse_scenario
from tests.simulator.worlds import scenario, server, tables

# ruff: noqa: E501  # tables of exact messages: one case a line


def problems_of(raw: dict[str, Any]) -> list[str]:
    problems: list[Problem] = []
    assert parse_scenario(raw, "test", problems) is None
    return [str(problem) for problem in problems]


def with_fault(**fault: Any) -> Scenario:
    return scenario(tables("a", "b", fault=[fault]))


# --- faults ------------------------------------------------------------------------------------------------------


def test_a_fault_is_of_all_servers_unless_it_says_which() -> None:
    assert [len(spec.faults) for spec in with_fault(kind="hang").specs] == [1, 1]
    assert [len(spec.faults) for spec in with_fault(kind="hang", servers="all").specs] == [1, 1]
    assert [len(spec.faults) for spec in with_fault(kind="hang", servers=["b"]).specs] == [0, 1]


def test_a_fault_of_a_server_keeps_its_times_and_values() -> None:
    raw = {"kind": "flap", "from": "1s", "until": 3, "period": "500ms", "up": "100ms"}
    fault = Fault(FaultKind.FLAP, 1.0, 3.0, period_s=0.5, up_s=0.1)
    assert with_fault(**raw).specs[0].faults == (fault,)
    assert scenario(tables(fleet=[server("a", fault=raw)])).specs[0].faults == (fault,)


def test_a_fault_of_a_link_lasts_to_the_end_unless_it_says_until_when() -> None:
    found = with_fault(kind="partition", servers=["a"], **{"from": "1s"})
    assert found.link_faults == {"a": (LinkFault(LinkFaultKind.PARTITION, SECOND_NS, 10 * SECOND_NS),)}


def test_the_balancer_can_pause() -> None:
    assert with_fault(kind="pause", **{"from": "1s", "until": "3s"}).pauses == ((SECOND_NS, 3 * SECOND_NS),)


def test_a_kind_without_its_value_has_the_default_that_the_documentation_gives() -> None:
    assert with_fault(kind="slow").specs[0].faults == (Fault(FaultKind.SLOW, factor=20.0),)
    assert with_fault(kind="crawl").specs[0].faults == (Fault(FaultKind.CRAWL, factor=20.0),)
    assert with_fault(kind="flap").specs[0].faults == (Fault(FaultKind.FLAP, period_s=2.0, up_s=1.0),)
    assert with_fault(kind="cut-midstream").specs[0].faults == (Fault(FaultKind.CUT_MIDSTREAM, after_tokens=3),)
    assert with_fault(kind="latency").link_faults["a"][0].latency_ns == 50 * MS_NS
    assert with_fault(kind="loss").link_faults["a"][0].loss == 0.1


def test_the_documentation_has_every_key_of_a_fault_with_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text(encoding="utf-8")
    assert set(TABLES) == {*FaultKind, *LinkFaultKind, "pause"}
    for kind, table in TABLES.items():
        row = next(line for line in text.splitlines() if line.startswith("|") and f"`{kind}`" in line.split("|")[1])
        values = row.split("|")[2]
        for name in {*table.__dataclass_fields__} - {*FaultTable.__dataclass_fields__}:
            assert f"`{name.removesuffix('_ns')}`" in values, row
        assert ("`" in values) == (table is not FaultTable), row


@pytest.mark.parametrize(("fault", "problem"), [
    ({"kind": "hang", "from": "8s", "until": "5s"},
     'fault[0].until: "5s" is not after fault[0].from, which is "8s"; write more'),
    ({"kind": "hang", "from": 5, "until": 5}, "fault[0].until: 5 is not after fault[0].from, which is 5; write more"),
    ({"kind": "loss", "until": 0}, "fault[0].until: 0 is not after the start; write more"),
    ({"kind": "pause", "from": "40s"},
     'fault[0].from: "40s" is not before the end of the run; write less than 10s, or a longer duration'),
    ({"kind": "hang", "from": "10s", "until": "20s"},
     'fault[0].from: "10s" is not before the end of the run; write less than 10s, or a longer duration'),
])
def test_a_fault_that_could_never_be_on_is_refused(fault: dict[str, Any], problem: str) -> None:
    assert problems_of(tables(fault=[fault])) == [problem]


def test_a_fault_of_one_server_must_begin_within_the_run_too() -> None:
    assert problems_of(tables(fleet=[server("a", fault={"kind": "hang", "from": "10s"})])) == [
        'fleet[0].fault.from: "10s" is not before the end of the run; write less than 10s, or a longer duration']


@pytest.mark.parametrize(("fault", "problem"), [
    ({"kind": "hang", "factor": 3}, "fault[0].factor: 3 means nothing to hang; it is of slow and crawl"),
    ({"kind": "slow", "latency": "1s"}, 'fault[0].latency: "1s" means nothing to slow; it is of latency'),
    ({"kind": "loss", "after_tokens": 1},
     ("fault[0].after_tokens: 1 means nothing to loss; "
      "it is of cut-midstream, stall-midstream, error-midstream and end-midstream")),
    ({"kind": "pause", "servers": ["a"]}, "fault[0].servers: [...] means nothing to pause; it is of the balancer"),
])
def test_a_value_of_another_kind_of_fault_is_refused(fault: dict[str, Any], problem: str) -> None:
    assert problems_of(tables(fault=[fault])) == [problem]


@pytest.mark.parametrize(("fault", "problem"), [
    ({"kind": "los"}, 'fault[0].kind: "los" is not one of the choices; did you mean "loss"? The choices are "refuse", '),
    ({}, 'fault[0].kind: is missing; it says what goes wrong; write one of "refuse", '),
    ({"kind": "slow", "factr": 3}, "fault[0].factr: 3 is set, but there is no such key; did you mean fault[0].factor?"),
    ({"kind": "hang", "server": 1}, "fault[0].server: 1 is set, but there is no such key; did you mean fault[0].servers?"),
    ({"kind": "hang", "servers": "a"}, 'fault[0].servers: "a" is not a list of servers; write ["one", "two"], or "all"'),
    ({"kind": "hang", "servers": ["c"]}, 'fault[0].servers: "c" is not a server of the fleet; write one of "a", "b"'),
    ({"kind": "flap", "up": "3s"}, 'fault[0].up: "3s" is more than fault[0].period; write less'),
    ("hang", 'fault[0]: "hang" is not a table; write its keys in a table of their own'),
])
def test_each_mistake_in_a_fault_has_its_message(fault: Any, problem: str) -> None:
    (found,) = problems_of(tables(fault=[fault]))
    assert found.startswith(problem)


# --- no false problem after a real one -----------------------------------------------------------------------------


def test_a_misspelt_key_does_not_make_the_workload_endless() -> None:
    raw = tables()
    raw["abuot"] = raw.pop("about")
    assert [problem.partition(":")[0] for problem in problems_of(raw)] == ["abuot", "about"]


@pytest.mark.parametrize("duration", [{"duration": "30000"}, {}])
def test_a_duration_that_is_wrong_or_missing_is_told_once(duration: dict[str, Any]) -> None:
    raw = tables()
    del raw["duration"]
    assert [problem.partition(":")[0] for problem in problems_of({**raw, **duration})] == ["duration"]


def test_without_a_fleet_the_servers_of_faults_and_expectations_are_not_judged() -> None:
    raw = tables(fleet=[], fault=[{"kind": "hang", "servers": ["d"]}], expect={"servers": {"d": {"loads": 1}}})
    assert [problem.partition(":")[0] for problem in problems_of(raw)] == ["fleet"]


def test_models_that_are_wrong_do_not_make_those_loaded_absent() -> None:
    assert [problem.partition(":")[0] for problem in problems_of(tables(fleet=[server("a", models="x")]))] == [
        "fleet[0].models"]


# --- memory ------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_in_memory_is_refused() -> None:
    assert problems_of(tables(fleet=[server("a", vram=24)])) == [
        'fleet[0].models: "llama3.2:latest" takes 5GB, and vram is 24B; write more vram, such as "24GB", or a smaller size']


def test_models_that_do_not_fit_together_are_not_both_loaded() -> None:
    models = [{"name": name, "size": "15GB"} for name in ("x", "y")]
    workload = {"models": "x"}
    assert problems_of(tables(fleet=[server("a", models=models, loaded=["x", "y"])], workload=workload)) == [
        "fleet[0].loaded: [...] take 30GB together, and vram is 24GB; let fewer be loaded, or write more vram"]
    assert scenario(tables(fleet=[server("a", models=models, loaded=["x"])], workload=workload)).specs


def test_no_more_models_are_loaded_than_loaded_max() -> None:
    assert problems_of(tables(fleet=[server("a", models=["x", "y"], loaded=["x", "y"], loaded_max=1)])) == [
        "fleet[0].loaded: [...] are 2 models, and loaded_max is 1; let fewer be loaded, or raise loaded_max"]


def test_a_server_without_a_gpu_and_known_hardware_take_any_model() -> None:
    large = [{"name": "llama3.2", "size": "40GB"}]
    assert scenario(tables(fleet=[{"name": "a", "models": large, "vram": 0}])).specs
    assert scenario(tables(fleet=[{"name": "a", "models": large, "loaded": ["llama3.2"], "profile": "rtx4090"}])).specs


# --- warnings, and many files ------------------------------------------------------------------------------------


def test_a_model_that_nobody_has_is_warned_of() -> None:
    found = scenario(tables("a", workload={"models": {"mistral": 0.5, "LLAMA3.2": 0.5}}))
    assert found.warnings == (
        'workload: no server of the fleet has "mistral", so whoever asks for it gets an error',)
    assert scenario(tables("a")).warnings == ()


SMALL = """\
about = "small"
duration = "1s"
[[fleet]]
name = "a"
[workload]
kind = "even"
rate = 1.0
models = "MODEL"
"""


def test_a_warning_is_printed_beside_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL.replace("MODEL", "mistral"), encoding="utf-8")
    assert simulate(Wanted(paths=(path,))) == 0
    assert capsys.readouterr().err == (
        f'warning: {path}: workload: no server of the fleet has "mistral", so whoever asks for it gets an error\n')


def test_the_problems_of_all_files_of_a_folder_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text(SMALL + "rate = 2\n", encoding="utf-8")
    (tmp_path / "b.toml").write_text(SMALL, encoding="utf-8")
    (tmp_path / "c.toml").write_text(SMALL.replace("even", "evn").replace("1s", "1"), encoding="utf-8")
    assert simulate(Wanted(paths=(tmp_path,))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(": ")[0] for line in err.splitlines()] == [f"{tmp_path / name}.toml" for name in "acc"]


def test_a_request_is_explained_by_its_id_in_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL.replace("1s", "5s").replace("MODEL", "llama3.2"), encoding="utf-8")
    told = []
    for named in ("2", "#f08f-2"):
        assert main(["simulate", str(path), "--explain", named]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
