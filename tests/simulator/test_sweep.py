"""Sweeps: the same results whoever runs them, in whatever order, in one go or several; loads; bench files."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from lbcore.schema import SECOND_NS
from simulator.fakes.specs import FakeModel, FakeSpec
from simulator.inputs import InputError
from simulator.reports.summary import flat, summarise
from simulator.reports.sweep_report import sweep_csv, sweep_json
from simulator.scenario import Scenario, run_scenario
from simulator.sweep import Done, Job, Results, jobs_of, run_job, run_sweep, sweep_rows
from simulator.sweeps.bench_file import Case, load_bench
from simulator.sweeps.capacity import LoadError, capacity_of, mean_of, offered_load
from simulator.workloads.lengths import exponential, fixed, lognormal
from simulator.workloads.sources import scaled
from tests.simulator.worlds import scenario, tables

SCENARIO = """\
about = "two servers, one of them slow for a while"
duration = "2s"
[[fleet]]
name = "a"
slots = 4
loaded = ["llama3.2:latest"]
[[fleet]]
name = "b"
slots = 4
loaded = ["llama3.2:latest"]
[workload]
kind = "poisson"
rate = 10.0
prompt_tokens = 100
output_tokens = 40
[[fault]]
kind = "slow"
servers = ["b"]
from = "500ms"
until = "1500ms"
"""
BENCH = """\
seeds = 3
scenarios = ["two.toml"]
policies = ["race-budget", "oracle"]
loads = [0.3, 0.6]
"""


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    (tmp_path / "two.toml").write_text(SCENARIO, encoding="utf-8")
    path = tmp_path / "bench.toml"
    path.write_text(BENCH, encoding="utf-8")
    return path


@pytest.fixture
def jobs(bench: Path) -> list[Job]:
    return jobs_of(load_bench([bench]))


def output(jobs: list[Job], done: list[Done]) -> str:
    rows = sweep_rows(jobs, done)
    return sweep_csv(rows) + sweep_json(rows)


# --- the same results --------------------------------------------------------------------------------------------


class Shuffling(Executor):
    """Runs what it is given when it has three of them, in a random order; stands for any executor, a cluster's too."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.rng = random.Random(1)
        self.most = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        self.most = max(self.most, len(self.waiting))
        if len(self.waiting) == 3:
            self.rng.shuffle(self.waiting)
            while self.waiting:
                ended, work = self.waiting.pop()
                ended.set_result(work())
        return future


def test_whoever_runs_it_in_whatever_order_the_bytes_are_the_same(jobs: list[Job], tmp_path: Path) -> None:
    alone = output(jobs, run_sweep(jobs))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        assert output(jobs, run_sweep(jobs, pool)) == alone
    shuffling = Shuffling()
    assert output(jobs, run_sweep(jobs, shuffling, window=6)) == alone
    assert shuffling.most == 3
    backwards = run_sweep(jobs[::-1])
    assert output(jobs, backwards[::-1]) == alone
    path = tmp_path / "runs.jsonl"
    first = Results(path)
    run_sweep(jobs[3:8], on_done=first.add)
    second = Results(path)
    ran: list[Job] = []
    done = run_sweep(jobs, known=second.known, on_done=lambda job, _: ran.append(job))
    assert ran == jobs[:3] + jobs[8:]
    assert output(jobs, done) == alone


def test_a_sweep_puts_the_policies_of_a_load_beside_each_other(jobs: list[Job]) -> None:
    rows = sweep_rows(jobs, run_sweep(jobs))
    assert [(row.scenario, row.load, row.policy) for row in rows] == [
        ("two", 0.3, "race-budget"), ("two", 0.3, "oracle"), ("two", 0.6, "race-budget"), ("two", 0.6, "oracle"),
    ]  # fmt: skip
    assert {row.figure("requests").runs for row in rows} == {3}
    assert rows[0].figure("requests").mean == rows[1].figure("requests").mean
    assert rows[2].figure("requests").mean > 1.5 * rows[0].figure("requests").mean


def test_a_run_is_that_of_the_scenario_at_its_load(jobs: list[Job]) -> None:
    job = jobs[0]
    case = scenario(tables("a", "b"))
    assert job.factor == pytest.approx(0.3 * 8 / 0.245 / 10)
    done = run_job(job)
    assert not done.violations
    assert done.figures["requests"] == pytest.approx(2 * 10 * job.factor, rel=0.5)
    assert "servers.a.tokens" not in done.figures
    assert set(done.figures) <= set(flat(summarise(run_scenario(case, 1))))


def test_jobs_that_had_not_begun_are_cancelled_when_something_goes_wrong(jobs: list[Job]) -> None:
    class FullError(RuntimeError):
        pass

    def no_room(_job: Job, _done: Done) -> None:
        raise FullError

    with ThreadPoolExecutor(1) as pool, pytest.raises(FullError):
        run_sweep(jobs, pool, on_done=no_room)


def test_a_run_that_breaks_off_is_told_of_and_not_kept(jobs: list[Job], tmp_path: Path) -> None:
    bad = Job("two", "two.toml", SCENARIO, "no-such-policy", 0.3, 1.0, 1)
    results = Results(tmp_path / "runs.jsonl")
    done = run_sweep([bad, jobs[0]], on_done=results.add)
    assert done[0].error.startswith('PolicyError: no policy is called "no-such-policy"')
    assert list(Results(results.path).known) == [jobs[0].key]
    rows = sweep_rows([bad, jobs[0]], done)
    assert rows[0].figures == {}


# --- results on disk ---------------------------------------------------------------------------------------------


def test_a_truncated_last_line_is_run_again(jobs: list[Job], tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    results = Results(path)
    whole = run_sweep(jobs[:2], on_done=results.add)
    path.write_bytes(path.read_bytes()[:-10])
    again = Results(path)
    assert again.notes == [f"{path}: the last line is cut off, its run is done again"]
    assert list(again.known) == [jobs[0].key]
    run_sweep(jobs[:2], known=again.known, on_done=again.add)
    assert Results(path).known == {job.key: of for job, of in zip(jobs, whole, strict=False)}


def test_nan_survives(tmp_path: Path, jobs: list[Job]) -> None:
    results = Results(tmp_path / "runs.jsonl")
    results.add(jobs[0], Done({"ttft_p99_ms": float("nan"), "requests": 0}, ("one thing",)))
    assert "NaN" not in results.path.read_text()
    [done] = Results(results.path).known.values()
    assert done.figures["ttft_p99_ms"] != done.figures["ttft_p99_ms"]
    assert done.violations == ("one thing",)


@pytest.mark.parametrize("line", ["{}", "[1]", "not JSON", '{"key": "x", "figures": 3, "violations": []}'])
def test_a_file_of_something_else_is_refused_and_left_alone(line: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"runs\.jsonl: \(line 1\) is not a result of bench; name"):
        Results(path)
    assert path.read_text() == f"{line}\n"


def test_the_key_of_a_run_changes_with_what_the_run_depends_on(jobs: list[Job]) -> None:
    job = jobs[0]
    others = [
        Job(job.name, job.path, job.text, "random", job.load, job.factor, job.seed),
        Job(job.name, job.path, job.text + "\n", job.policy, job.load, job.factor, job.seed),
        Job(job.name, job.path, job.text, job.policy, job.load, job.factor * 2, job.seed),
        Job(job.name, job.path, job.text, job.policy, job.load, job.factor, job.seed + 1),
        Job(job.name, job.path, job.text, job.policy, job.load, job.factor, job.seed, audit=True),
    ]
    assert len({job.key, *(other.key for other in others)}) == 6
    assert Job("other", job.path, job.text, job.policy, 0.31, job.factor, job.seed).key == job.key


def test_the_key_of_a_run_changes_with_the_trace_that_it_reads(tmp_path: Path) -> None:
    keys = []
    text = SCENARIO.replace(
        '"poisson"\nrate = 10.0\nprompt_tokens = 100\noutput_tokens = 40', '"trace"\npath = "t.csv"'
    )
    for tokens in (10, 20):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        rows = "".join(f"2023-11-16 18:17:0{s}.0000000,{tokens},20\n" for s in range(4))
        (folder / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
        job = Job("two", str(folder / "two.toml"), text, "random", 0.3, 1.0, 1)
        keys.append(job.key)
        assert run_job(job).figures["requests"] == 4
    assert keys[0] != keys[1]


# --- loads -------------------------------------------------------------------------------------------------------


def test_the_load_of_steady_servers_is_the_share_of_their_slots_in_use() -> None:
    case = scenario(tables("a", "b", workload={"rate": 10.0}))
    assert offered_load(case) == pytest.approx(10 * 0.245 / 8)
    busy = scenario(tables("a", "b", duration="60s", workload={"rate": 20.0}))
    figures = flat(summarise(run_scenario(busy, 1)))
    wasted = figures["utilisation_pct"] * figures["wasted_server_seconds_pct"] / 100
    assert (figures["utilisation_pct"] - wasted) / 100 == pytest.approx(offered_load(busy), rel=0.1)


@pytest.mark.parametrize(
    "workload",
    [
        {"kind": "gamma", "rate": 10.0, "cv": 3.0},
        {"kind": "even", "rate": 10.0},
        {"kind": "mmpp", "rate_low": 5.0, "rate_high": 15.0, "dwell_low": "1s", "dwell_high": "1s"},
    ],
)
def test_every_arrival_process_has_a_load(workload: dict[str, Any]) -> None:
    raw = tables("a", "b")
    raw["workload"] = {**workload, "prompt_tokens": 100, "output_tokens": 40}
    case = scenario(raw)
    assert offered_load(case) == pytest.approx(10 * 0.245 / 8)


def test_loads_scale_with_the_workload() -> None:
    case = scenario(tables("a", "b"))
    for factor in (0.5, 2.0):
        assert mean_load(case, factor) == pytest.approx(factor * offered_load(case))


def mean_load(case: Scenario, factor: float) -> float:
    return offered_load(replace(case, workload=scaled(case.workload, factor)))


def test_users_of_a_closed_loop_ask_as_often_as_they_are_answered() -> None:
    raw = tables("a", "b")
    lengths = {"turns": 3, "prompt_tokens": 100, "output_tokens": 40}
    raw["workload"] = {"kind": "sessions", "users": 10, "think": "1s", **lengths}
    assert offered_load(scenario(raw)) == pytest.approx(10 / 1.245 * 0.245 / 8)
    raw["workload"] = {"kind": "sessions", "rate": 2.0, **lengths}
    assert offered_load(scenario(raw)) == pytest.approx(6 * 0.245 / 8)


def test_a_herd_is_no_load_and_a_model_that_nobody_has_cannot_be_one() -> None:
    raw = tables("a", "b")
    raw["workload"] = {"kind": "herd", "at": "1s", "requests": 10}
    with pytest.raises(LoadError, match="has no rate"):
        offered_load(scenario(raw))
    with pytest.raises(LoadError, match="no server has"):
        offered_load(scenario(tables("a", workload={"models": "nobody:1b"})))


def test_what_a_server_can_do() -> None:
    model = (FakeModel("m"),)
    steady = FakeSpec("a", model, num_parallel=4, first_token_ms=50, token_ms=5)
    assert capacity_of(steady, {"m": 1.0}, 100, 40) == pytest.approx(4 / 0.245)
    assert capacity_of(steady, {"m": 0.5, "n": 0.5}, 100, 40) == pytest.approx(4 / 0.245)
    assert capacity_of(steady, {"n": 1.0}, 100, 40) == 0
    batched = FakeSpec("a", model, num_parallel=4, first_token_ms=50, token_ms=5, batch_slowdown=0.1)
    assert capacity_of(batched, {"m": 1.0}, 100, 40) == pytest.approx(4 / (0.05 + 0.195 * 1.3))
    reader = FakeSpec("a", model, num_parallel=4, first_token_ms=0, token_ms=0, prefill_rate=1000)
    assert capacity_of(reader, {"m": 1.0}, 100, 40) == pytest.approx(8.0)  # x / (1 - x) = 4 at x = 0.8


def test_means() -> None:
    assert mean_of(fixed(7)) == 7
    assert mean_of(exponential(10 * SECOND_NS, 0, 10**15)) == pytest.approx(10 * SECOND_NS, rel=0.01)
    assert mean_of(lognormal(129, 451, 1, 131_072)) == pytest.approx(129 * 1.34, rel=0.02)


# --- bench files -------------------------------------------------------------------------------------------------


def test_a_bench_file_is_a_product_and_what_stands_above_counts_below(bench: Path) -> None:
    bench.write_text(
        'seeds = 2\nseed = 7\npolicies = ["random"]\nscenarios = ["two.toml"]\n[[sweep]]\n[[sweep]]\naudit = true\n'
        'seeds = 1\nloads = [0.2, 0.2, 0.4]\npolicies = ["oracle", "configured"]\n'
    )
    first, *others = load_bench([bench])
    assert (first.policy, first.load, first.factor, first.seeds, first.audit) == (
        "random", 0.306, 1.0, range(7, 9), False,
    )  # fmt: skip
    assert [(case.policy, case.load, case.seeds) for case in others] == [
        (policy, load, range(7, 8)) for load in (0.2, 0.4) for policy in ("oracle", "configured")
    ]
    assert all(case.audit for case in others)
    assert run_job(jobs_of(others)[1]).violations == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "scenarios: is missing; name at least one scenario file"),
        ("[[sweep]]", "sweep[0].scenarios: is missing"),
        ('scenarios = ["none.toml"]', 'scenarios: "none.toml" cannot be run: '),
        ('scenarios = ["two.toml"]\nseeds = 0', "seeds: 0 is too small"),
        ('scenarios = ["two.toml"]\nsedes = 3', "sedes: 3 is set, but there is no such key; did you mean seeds?"),
        ('[[sweep]]\nscenarios = ["two.toml"]\npolices = []', "sweep[0].polices: [] is set, but there is no such key;"),
        (
            'scenarios = ["two.toml"]\npolicies = ["orcale"]',
            'policies[0]: "orcale" is no policy; did you mean "oracle"',
        ),
        ('scenarios = ["two.toml"]\nloads = [30]', "loads[0]: 30 is too large; write a number from 0.001 to 10"),
        ('scenarios = ["two.toml"]\nloads = 0.3', "loads: 0.3 is not a list of anything; write [...]"),
        ("scenarios = [3]", "scenarios[0]: 3 is not a path"),
        ("sweep = [3]", "sweep[0]: 3 is not a table; write [[sweep]]"),
        ("about = 3", "about: 3 is not text"),
        ("a = ", "is not TOML"),
        ('scenarios = ["herd.toml"]', "has no rate of requests that could be a load; name a scenario with"),
        ('scenarios = ["wrong.toml"]', "duratoin"),
        ('scenarios = ["two.toml", "sub/two.toml"]', "has the name of another scenario"),
    ],
)
def test_what_is_wrong_with_a_bench_file_is_said_with_file_and_key(text: str, said: str, bench: Path) -> None:
    folder = bench.parent
    herd = SCENARIO.replace('"poisson"\nrate = 10.0', '"herd"\nat = "1s"\nrequests = 5')
    (folder / "herd.toml").write_text(herd, encoding="utf-8")
    (folder / "wrong.toml").write_text(SCENARIO.replace("duration", "duratoin"), encoding="utf-8")
    (folder / "sub").mkdir()
    (folder / "sub" / "two.toml").write_text(SCENARIO + "\n", encoding="utf-8")
    bench.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_bench([bench])
    assert any(said in problem for problem in caught.value.problems), caught.value.problems
    assert all(problem.startswith(str(folder)) for problem in caught.value.problems)


def test_the_bench_files_that_ship_can_be_read() -> None:
    configs = Path(__file__).parents[2] / "configs" / "bench"
    cases: list[Case] = load_bench(sorted(configs.glob("*.toml")))
    assert {case.policy for case in cases} >= {"race-budget", "oracle", "original"}
    assert len(jobs_of(cases)) > 100
