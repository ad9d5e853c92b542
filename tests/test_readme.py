"""Every command of the README is run: here, by `.ci/run`, or it is one that needs the reader's own servers.

The commands that need servers run against the demo fleet, on another port and without waiting for ever.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbio.answers.status import COLUMNS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
OLLAMA_LB = [sys.executable, "-m", "lbio"]

BY_CI = {
    # .ci/run does the same steps: a fresh virtual environment, the install, the test command
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest -n auto",
}
PLOT_INSTALL = "pip install '.[plot]'"  # the extra `test`, which `.ci/run` installs, has the same in it
INSTALL_AND_RUN = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/ollama-lb run configs/demo.toml"
STARTED = {"ollama-lb run -s http://gpu1:11434=gpu1 -s http://gpu2:11434=gpu2", "ollama-lb run my.toml"}
ONE_AFTER_ANOTHER = [
    "ollama-lb init -s http://gpu1:11434=gpu1 -s http://gpu2:11434=gpu2 > my.toml",
    "ollama-lb check my.toml",
]
KEY = "ollama-lb key new alice --models llama3.2 --models 'qwen3:*' --requests-per-minute 60 >> my.toml"
PLAN = "ollama-lb models plan my.toml"
FLEET = "ollama-lb fleet configs/demo.toml"
ALL_SCENARIOS = "ollama-lb simulate configs/scenarios"  # tests/simulator/test_scenarios.py runs each of them
SIMULATED = [command for command in COMMANDS if command.startswith("ollama-lb simulate") and command != ALL_SCENARIOS]
BENCH = "ollama-lb bench configs/bench/quick.toml"
NEEDS_CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
AGAINST_THE_DEMO = [command for command in COMMANDS if command.startswith("curl")]
WITH_A_KEY = next(command for command in AGAINST_THE_DEMO if "OLLAMA_API_KEY" in command)
PINNED = next(command for command in AGAINST_THE_DEMO if "X-Ollama-LB-Server" in command)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _start(arguments: list[str], cwd: Path) -> tuple[subprocess.Popen[str], str]:
    port = _free_port()
    process = subprocess.Popen(
        [*OLLAMA_LB, *arguments, "--listen", f"127.0.0.1:{port}"],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "listens on" in process.stdout.readline()
    return process, f"http://127.0.0.1:{port}"


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def test_each_command_is_accounted_for() -> None:
    known = {
        *BY_CI,
        INSTALL_AND_RUN,
        PLOT_INSTALL,
        *STARTED,
        *ONE_AFTER_ANOTHER,
        KEY,
        PLAN,
        FLEET,
        ALL_SCENARIOS,
        BENCH,
        *SIMULATED,
        *AGAINST_THE_DEMO,
    }
    assert [command for command in COMMANDS if command not in known] == []
    assert known <= set(COMMANDS)


def test_ci_runs_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in BY_CI:
        for step in ("-m venv", "pip install", "'.[test]'", "-m pytest -n auto"):
            assert step in command
            assert step.replace("pip install", "pip install") in script


def test_who_has_the_tests_has_the_pictures() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {*extras["plot"]} <= {*extras["test"]}


def test_init_and_check(tmp_path: Path) -> None:
    for command in ONE_AFTER_ANOTHER:
        words = shlex.split(command.partition(" > ")[0])
        done = subprocess.run(
            [*OLLAMA_LB, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30
        )
        if " > " in command:
            (tmp_path / command.rpartition(" > ")[2]).write_text(done.stdout, encoding="utf-8")
    assert "my.toml: ok" in done.stdout


@pytest.mark.parametrize("command", sorted(STARTED))
def test_run_starts_with_servers_that_are_not_there(command: str, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('[[servers]]\nurl = "http://127.0.0.1:9"\nname = "gpu1"\n', encoding="utf-8")
    words = [
        word.replace("gpu1:11434", "127.0.0.1:9").replace("gpu2:11434", "127.0.0.1:8") for word in shlex.split(command)
    ]
    process, _ = _start(words[1:], tmp_path)
    _stop(process)


@pytest.mark.parametrize("command", SIMULATED)
def test_a_simulation_ends_well(command: str, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    words = [*OLLAMA_LB, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert "one-server-hangs" in done.stdout
    assert done.stderr == ""
    assert (tmp_path / "run.png").exists() == ("--plot" in command)


def test_a_bench_ranks_the_policies() -> None:
    words = [*OLLAMA_LB, *shlex.split(BENCH)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240)
    assert "slow-x20 at 31% load" in done.stdout
    assert "healthy at 85% load" in done.stdout
    assert done.stderr == ""


def test_fleet_prints_the_addresses() -> None:
    with subprocess.Popen(
        [*OLLAMA_LB, *shlex.split(FLEET)[1:]], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().split() == ["SERVER", "URL", "MODELS"]
        assert "http://127.0.0.1:" in process.stdout.readline()
        _stop(process)


def test_every_column_of_the_status_is_explained() -> None:
    explained = re.findall(r"^\| `([A-Z /]+)` \| \S", README, re.MULTILINE)
    assert explained[: len(COLUMNS)] == list(COLUMNS)


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    process, url = _start(["run", "configs/demo.toml"], ROOT)
    time.sleep(0.3)
    yield url
    _stop(process)


def _curl(command: str, demo: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command.replace("http://127.0.0.1:11434", demo))
    return subprocess.run([*words, "-sS", "--max-time", "10"], capture_output=True, text=True, check=True)


@NEEDS_CURL
def test_status_is_a_table(demo: str) -> None:
    assert "SERVER" in _curl(AGAINST_THE_DEMO[0], demo).stdout


@NEEDS_CURL
def test_management_commands_answer_as_described(demo: str) -> None:
    added, removed, synced = [_curl(command, demo).stdout for command in AGAINST_THE_DEMO[1:4]]
    assert "not added" in added  # there is no gpu3 here
    assert "no server called 'gpu3'" in removed
    assert '"servers":4' in synced


@NEEDS_CURL
def test_a_server_that_is_named_gives_its_own_view(demo: str) -> None:
    assert json.loads(_curl(PINNED, demo).stdout)["models"]


def test_what_placement_would_do_is_told(tmp_path: Path) -> None:
    block = README.partition("## Models where they belong")[2].partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "my.toml").write_text(f'[[servers]]\nurl = "http://127.0.0.1:1"\n{block}', encoding="utf-8")
    command = [*OLLAMA_LB, *shlex.split(PLAN)[1:]]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30)
    assert told.returncode == 1, told.stderr  # nobody is there
    assert re.search(r"^llama3.2 +0 of 2 ", told.stdout, re.MULTILINE)
    assert "cannot be read: 127.0.0.1:1" in told.stdout


@NEEDS_CURL
def test_a_key_is_made_and_used(tmp_path: Path) -> None:
    made = subprocess.run(
        [*OLLAMA_LB, *shlex.split(KEY.partition(" >> ")[0])[1:]], capture_output=True, text=True, check=True, timeout=30
    )
    token = re.findall(r"olb_\w+", made.stderr)[0]
    demo = (ROOT / "configs" / "demo.toml").read_text(encoding="utf-8")
    (tmp_path / "my.toml").write_text(demo + made.stdout, encoding="utf-8")
    process, url = _start(["run", "my.toml"], tmp_path)
    time.sleep(0.3)
    try:
        listed = json.loads(_curl(WITH_A_KEY.replace("$OLLAMA_API_KEY", token), url).stdout)["models"]
        assert {model["name"].partition(":")[0] for model in listed} <= {"llama3.2", "qwen3"}
        assert "not known" in _curl(WITH_A_KEY, url).stdout
    finally:
        _stop(process)


def test_the_line_that_the_demo_prints_works(tmp_path: Path) -> None:
    process, _ = _start(["run", str(ROOT / "configs" / "demo.toml")], tmp_path)
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("try it:"))
    time.sleep(0.3)
    answer = subprocess.run(
        [*shlex.split(line.removeprefix("try it:")), "-sS", "--max-time", "20"],
        capture_output=True,
        text=True,
        check=True,
    )
    _stop(process)
    assert '"done":true' in answer.stdout.splitlines()[-1]
