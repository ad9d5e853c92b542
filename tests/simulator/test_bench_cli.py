"""`ollama-lb bench`: what it prints and writes, and its exit codes."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import pytest

import simulator.sweep
from lbio.cli import main
from simulator.sweep import Done, Job
from tests.simulator.test_sweep import BENCH, SCENARIO


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    (tmp_path / "two.toml").write_text(SCENARIO, encoding="utf-8")
    path = tmp_path / "bench.toml"
    path.write_text(BENCH.replace("seeds = 3", "seeds = 2"), encoding="utf-8")
    return path


def run(*args: str | Path) -> int:
    return main(["bench", *map(str, args)])


def test_a_table_for_people_and_files_for_programs(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bench, "--workers", "1", "--csv", tmp_path / "t.csv", "--plot", tmp_path / "p") == 0
    told = capsys.readouterr()
    assert "two at 30% load" in told.out
    assert "means over 2 seeds" in told.out
    assert max(map(len, told.out.splitlines())) <= 80
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [(row["policy"], row["load"], row["seeds"]) for row in rows] == [
        (policy, load, "2") for load in ("0.3", "0.6") for policy in ("race-budget", "oracle")
    ]
    assert (tmp_path / "p-load.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "p-pareto.png").stat().st_size > 1000


def test_there_is_no_picture_against_one_load(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.write_text(bench.read_text(encoding="utf-8").replace("[0.3, 0.6]", "[0.3]"), encoding="utf-8")
    assert run(bench, "--workers", "1", "--plot", tmp_path / "p") == 0
    assert capsys.readouterr().err == (
        f"wrote {tmp_path / 'p-pareto.png'}, not p-load.png, since each scenario has one load\n"
    )
    assert not (tmp_path / "p-load.png").exists()


def test_the_same_bytes_with_other_workers_and_from_results(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "runs.jsonl"
    outputs = []
    for flags in ((), ("--workers", "2", "--results", results), ("--results", results)):
        assert run(bench, "--json", "--csv", tmp_path / "t.csv", *(flags or ("--workers", "1"))) == 0
        told = capsys.readouterr()
        outputs.append((told.out, (tmp_path / "t.csv").read_bytes()))
    assert outputs[0] == outputs[1] == outputs[2]
    assert f"8 of 8 runs are known from {results}" in told.err
    assert json.loads(told.out)["violations"] == []


def test_a_folder_stands_for_its_bench_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench").mkdir()
    assert run(tmp_path / "bench") == 2
    assert "has no bench file in it" in capsys.readouterr().err
    (tmp_path / "two.toml").write_text(SCENARIO, encoding="utf-8")
    text = BENCH.replace('"two.toml"', '"../two.toml"').replace("3", "1", 1).replace("[0.3, 0.6]", "[0.3]")
    (tmp_path / "bench" / "one.toml").write_text(text, encoding="utf-8")
    assert run(tmp_path / "bench", "--workers", "1") == 0


def test_what_cannot_be_used_is_said_before_anything_is_run(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator.sweep, "run_job", None)
    assert run(tmp_path / "none.toml") == 2
    assert "cannot be read: no such file or directory; name a bench file" in capsys.readouterr().err
    assert run(bench, "--csv", tmp_path / "none" / "t.csv") == 2
    assert "--csv: " in capsys.readouterr().err
    assert run(bench, "--results", tmp_path) == 2
    assert "--results: " in capsys.readouterr().err
    bench.write_text(BENCH.replace("oracle", "orakle"), encoding="utf-8")
    assert run(bench) == 2
    assert capsys.readouterr().err == (
        f'{bench}: policies[1]: "orakle" is no policy; did you mean "oracle"? The choices are "round-robin", "random", '
        '"least-in-flight", "power-of-two", "weighted-health", "peak-ewma", "prequal", "race-2", "race-3", "race-4", '
        '"race-budget", "hedge-p95", "hedge-adaptive", "session-affinity", "oracle", "original", "configured"\n'
    )


@pytest.mark.parametrize("done", [Done({"requests": 1.0}, ("a slot too many",)), Done({}, (), "KeyError: 3")])
def test_a_violation_or_a_crash_is_told_with_its_run_and_exits_with_1(
    done: Done, bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(job: Job) -> Done:
        return done if (job.policy, job.seed) == ("oracle", 2) else Done({"requests": 1.0})

    monkeypatch.setattr(simulator.sweep, "run_job", bad)
    assert run(bench, "--workers", "1") == 1
    words = done.error or done.violations[0]
    assert f"two, oracle, load 0.3, seed 2: {words}\n" in capsys.readouterr().err


# --- Dask --------------------------------------------------------------------------------------------------------


class FakeClient:
    """Stands for `distributed.Client`, as far as bench uses it."""

    def __init__(self, address: str, timeout: float) -> None:
        if address != "tcp://here:8786":
            raise OSError(f"Timed out trying to connect to {address} after {timeout} s")
        self.pool = ThreadPoolExecutor(2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.shutdown()

    def nthreads(self) -> dict[str, int]:
        return {"tcp://worker:1": 2}

    def get_executor(self) -> ThreadPoolExecutor:
        return self.pool


def fake_import(name: str, **known: Any) -> Any:
    if name in known:
        return known[name]
    raise ModuleNotFoundError(name)


def test_a_dask_cluster_gives_the_same_bytes(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(bench, "--json", "--workers", "1") == 0
    alone = capsys.readouterr().out
    module = SimpleNamespace(Client=FakeClient)
    monkeypatch.setattr(
        "simulator.sweeps.bench.importlib.import_module", lambda name: fake_import(name, distributed=module)
    )
    assert run(bench, "--json", "--dask", "tcp://here:8786") == 0
    assert capsys.readouterr().out == alone
    assert run(bench, "--dask", "tcp://nowhere:1") == 2
    assert "--dask: tcp://nowhere:1 cannot be reached: Timed out" in capsys.readouterr().err


def test_without_dask_it_says_how_to_get_it(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulator.sweeps.bench.importlib.import_module", fake_import)
    assert run(bench, "--dask", "tcp://here:8786") == 2
    assert capsys.readouterr().err == "--dask: dask.distributed is not installed; pip install 'ollama-lb[dask]'\n"


@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="dask.distributed is not installed")
@pytest.mark.filterwarnings("default")  # Dask's own are not ours to mend
def test_a_real_local_dask_cluster(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distributed = importlib.import_module("distributed")
    assert run(bench, "--json", "--workers", "1") == 0
    alone = capsys.readouterr().out
    options: dict[str, Any] = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(protocol="tcp", host="127.0.0.1", **options) as cluster:
        assert run(bench, "--json", "--dask", cluster.scheduler_address) == 0
    assert capsys.readouterr().out == alone
