"""What a log tells of a fleet, and what another configuration or fleet would have come to."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lbcore.balancer import LoadBalancer
from lbcore.config import Config
from lbcore.config_routes import parse_routes
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.trace import Recorder
from simulator.policies.placements import WorldView
from simulator.reports.results import RunResult
from simulator.scenario import run_scenario
from simulator.sweeps.fit import Recorded, RecordedSource, fit, read_log
from simulator.sweeps.whatif import Change, WhatIfError, answer_of, parse_servers, what_if
from simulator.workloads.traces import read_trace
from tests.simulator.worlds import scenario, server, tables

FAST = server("fast") | {"first_token": "40ms", "token": "4ms", "prefill": 4000.0, "batch_slowdown": 0.1}
SLOW = server("slow") | {"first_token": "60ms", "token": "7ms", "prefill": 2500.0, "batch_slowdown": 0.2}


def record(**more: Any) -> tuple[RunResult, list[str]]:
    lines: list[str] = []

    def build(config: Config, rng: Random, _: WorldView) -> LoadBalancer:
        return Recorder(LoadBalancer(config, rng), lines.append, seed=1)

    workload = {"rate": 5.0, "prompt_tokens": {"median": 200, "p95": 800}, "output_tokens": {"min": 20, "max": 60}}
    raw = tables(fleet=[FAST, SLOW], duration="60s", **{"workload": workload, **more})
    return run_scenario(scenario(raw), build=build), lines


@pytest.fixture(scope="module")
def log() -> list[str]:
    return record()[1]


@pytest.fixture(scope="module")
def found(log: list[str]) -> Recorded:
    return read_log(log)


def test_all_requests_are_in_the_log_with_what_became_of_them() -> None:
    result, lines = record(workload={"rate": 12.0, "leave": {"share": 0.3, "after": "80ms"}})
    found = read_log(lines)
    asks = list(RecordedSource(found, fit(found)).asks())
    assert [ask.arrives_ns for ask in asks] == [request.ask.arrives_ns for request in result.requests]
    whole = [(a, r) for a, r in zip(asks, result.requests, strict=True) if r.outcome == "completed"]
    assert [ask.output_tokens for ask, _ in whole] == [request.tokens for _, request in whole]
    left = [(a, r) for a, r in zip(asks, result.requests, strict=True) if r.outcome == "left"]
    assert left
    assert [ask.leaves_after_ns for ask, _ in left] == [request.e2e_ns for _, request in left]


def test_a_log_is_a_trace_of_who_asked_for_what(tmp_path: Path) -> None:
    workload = {"rate": 5.0, "leave": {"share": 0.3, "after": "80ms"}, "num_ctx": {"default": 0.5, "8192": 0.5}}
    result, lines = record(workload=workload)
    path = tmp_path / "log.jsonl"
    path.write_text("".join(lines[:-3]) + lines[-3][:20])
    rows = list(read_trace(path))
    asked = {request.ask.arrives_ns: request for request in result.requests}
    assert len(rows) >= len(asked) - 3
    for row in rows:
        request = asked[row.at_ns]
        assert (row.model, row.num_ctx, row.stream) == (request.ask.model, request.ask.num_ctx, True)
        if request.outcome == "completed":
            assert (row.output_tokens, row.leaves_after_ns) == (request.tokens, None)
        else:
            assert (row.output_tokens, row.leaves_after_ns) == (request.tokens + 1, request.e2e_ns)


def test_speeds_are_found_again(found: Recorded) -> None:
    by_name = {spec.name: spec.speed("llama3.2:latest") for spec in fit(found).specs}
    assert by_name["fast"].token_ns == pytest.approx(4 * MS_NS, rel=0.1)
    assert by_name["slow"].token_ns == pytest.approx(7 * MS_NS, rel=0.1)
    assert 40 * MS_NS < by_name["fast"].first_token_ns < by_name["slow"].first_token_ns < 150 * MS_NS


def test_the_fit_reproduces_what_was_recorded(found: Recorded) -> None:
    answer = answer_of(found, Change())
    assert answer.verdict in {"good", "fair"}
    assert abs(answer.errors["ttft_p50_ms"]) < 0.1
    assert abs(answer.errors["e2e_p50_ms"]) < 0.1
    assert answer.changed == answer.fitted


def test_a_log_of_a_machine_that_has_been_up_for_days_says_the_same(log: list[str], found: Recorded) -> None:
    delta_ns, *rest = json.loads(log[2])
    shifted = [*log[:2], json.dumps([delta_ns + 10 * 86_400 * SECOND_NS, *rest]) + "\n", *log[3:]]
    assert answer_of(read_log(shifted), Change()) == answer_of(found, Change())


def test_twice_the_traffic_waits_longer(found: Recorded) -> None:
    answer = answer_of(found, Change(speed=6.0))
    assert answer.changed["utilisation_pct"] > 1.7 * answer.fitted["utilisation_pct"]
    assert answer.changed["ttft_p90_ms"] > answer.fitted["ttft_p90_ms"]


def test_another_fast_server_helps_and_one_less_does_not(found: Recorded) -> None:
    more = answer_of(found, Change(servers=("+other:fast", "-slow")))
    assert more.changed["e2e_p90_ms"] < more.fitted["e2e_p90_ms"]
    less = answer_of(found, Change(servers=("-fast",)))
    assert less.changed["e2e_p50_ms"] > 1.3 * less.fitted["e2e_p50_ms"]


def test_hardware_can_be_added_by_its_profile(found: Recorded) -> None:
    answer = answer_of(found, Change(servers=("+gpu5:rtx4090",)))
    assert answer.change == "+gpu5:rtx4090"
    assert answer.changed["completed"] == 1.0


def test_another_configuration_is_tried(found: Recorded) -> None:
    eager = found.config.race.__class__(racers_min=2, racers_max=2)
    config = Config(race=eager, routes=parse_routes({}, eager, [], ()))
    answer = answer_of(found, Change(config=config, config_name="eager.toml"))
    assert answer.changed["amplification"] > 1.9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-gone", "--servers -gone: no such server; there are fast, slow"),
        ("+fast:rtx4090", "--servers +fast:rtx4090: there is a server fast already"),
        ("gpu5", "--servers gpu5: write +NAME:PROFILE, +NAME:SERVER or -NAME, as in +gpu5:rtx4090"),
        ("+gpu5", "--servers +gpu5: write +NAME:PROFILE, +NAME:SERVER or -NAME, as in +gpu5:rtx4090"),
    ],
)
def test_a_change_that_cannot_be(found: Recorded, words: str, message: str) -> None:
    with pytest.raises(WhatIfError) as raised:
        answer_of(found, Change(servers=(words,)))
    assert str(raised.value) == message


def test_what_a_server_could_be_like_is_suggested(found: Recorded) -> None:
    with pytest.raises(WhatIfError) as raised:
        answer_of(found, Change(servers=("+gpu5:fats",)))
    what = '--servers +gpu5:fats: "fats" is no server of the log and no known hardware'
    assert str(raised.value).startswith(f'{what}; did you mean "fast"? The choices are "fast", "slow", "')


def test_a_server_that_was_down_is_down_again() -> None:
    _, lines = record(fault={"kind": "refuse", "servers": ["fast"], "from": "20s", "until": "40s"})
    (fast, _) = fit(read_log(lines)).specs
    (fault,) = fast.faults
    assert fault.kind == "refuse"
    assert fault.from_s is not None
    assert fault.until_s is not None
    assert 20 <= fault.from_s < 22
    assert 39 < fault.until_s < 56


def test_a_log_that_breaks_off_is_used_up_to_there(
    log: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(log)[:-30])
    assert what_if(path, Change()) == 0
    out = capsys.readouterr().out
    assert out.startswith("the fitted servers reproduce what was recorded: ")
    assert f"the log breaks off in line {len(log)}" in out


def test_json_says_the_same(log: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(log))
    assert what_if(path, Change(servers=parse_servers(["-slow, +b:fast"])), as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["change"] == "-slow, +b:fast"
    assert answer["fit"]["verdict"] in {"good", "fair"}
    assert answer["recorded"]["requests"] == answer["fitted"]["requests"]


@pytest.mark.parametrize(("text", "words"), [("", "is empty"), ("{}\n", "is not the header"), (None, "cannot be read")])
def test_what_is_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, words: str) -> None:
    path = tmp_path / "log.jsonl"
    if text is not None:
        path.write_text(text)
    assert what_if(path, Change()) == 2
    assert words in capsys.readouterr().err
