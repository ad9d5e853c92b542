"""The command line: exit codes, one line a problem, never a traceback."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import types
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lbcore import __version__
from lbcore.compiled import is_compiled
from lbcore.config import Config
from lbcore.units import format_duration
from lbio.cli import main
from lbio.config_file import load, parse
from lbio.configuration.config_text import document
from lbio.configuration.settings import AppConfig
from simulator.policies.known import POLICIES
from tests.lbio.sockets_kit import free_port

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = '[[servers]]\nurl = "http://gpu1:11434"\nname = "gpu1"\n'
COMMANDS = ("run", "check", "init", "key", "models", "fleet", "replay", "simulate", "bench", "what-if", "why")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(GOOD, encoding="utf-8")
    return path


class FakeService:
    """Stands for `lbio.service`: notes what it was asked to run."""

    def __init__(self) -> None:
        self.app: AppConfig | None = None
        self.fleet: Any = None

    def run(self, app: AppConfig, *, fleet: Any) -> int:
        self.app, self.fleet = app, fleet
        return 7


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    fake = FakeService()
    module = types.ModuleType("lbio.service")
    module.run = fake.run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lbio.service", module)
    return fake


def cli(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lbio.cli", *map(str, args)], capture_output=True, text=True,
                          check=False, timeout=30)


# --- in a process of its own -------------------------------------------------------------------------------


def test_the_version_says_which_core_runs() -> None:
    done = cli("--version")
    core = "compiled" if is_compiled() else "pure Python"
    assert (done.returncode, done.stdout) == (0, f"ollama-lb {__version__} (core: {core})\n")


@pytest.mark.parametrize("args", [
    ("check", "no.toml"), ("run", "no.toml"), ("fleet", "no.toml"), ("run",), ("run", "-s", "ftp://x"), ("check",),
    ("init", "--timeout", "soon"), ("nonsense",), ("run", "--nonsense"), ("run", "--server-file", "."),
])
def test_mistakes_end_with_2_and_no_traceback(args: tuple[str, ...]) -> None:
    done = cli(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr


def test_check_reports_each_problem_on_a_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[race]\nmesure = "2s"\n[[servers]]\nurl = "gpu3:11434"\n', encoding="utf-8")
    done = cli("check", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        'race.mesure: "2s" is set, but there is no such key; did you mean race.measure?',
        'servers[0].url: "gpu3:11434" has no scheme; write "http://gpu3:11434"',
    ]


KINDS = {"simulate": "scenarios/healthy.toml", "bench": "bench/quick.toml", "run": "demo.toml"}


@pytest.mark.parametrize("command", ["run", "check", "fleet", "simulate", "bench"])
def test_a_file_for_another_command_is_refused_in_one_line_that_names_it(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = command if command in KINDS else "run"
    for other, name in KINDS.items():
        if other != own:
            path = CONFIGS / name
            assert main([command, str(path)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"{path}: is a")
            assert line.endswith(f"; run it with: ollama-lb {other} {path}")


def test_check_passes_a_good_file(config: Path) -> None:
    done = cli("check", config)
    assert (done.returncode, done.stderr) == (0, "")


def test_check_refuses_a_directory_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path, logs = tmp_path / "my.toml", Path("logs")
    path.write_text(f"listen = '[::1]:1'\n[record]\npath = '{logs}/events.jsonl'\n{GOOD}", encoding="utf-8")
    assert main(["check", str(path)]) == 2
    said = f'record.path: "{logs}/events.jsonl" cannot be written: there is no directory {logs}; mkdir -p {logs}'
    assert said in capsys.readouterr().err
    assert main(["check", str(path), "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["text"] == said
    logs.mkdir()
    assert main(["check", str(path)]) == 0
    assert "record" not in capsys.readouterr().err


def test_help_says_in_a_line_what_each_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli("--help").stdout.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == sorted(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_help_of_simulate_names_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--help"]) == 0
    words = capsys.readouterr().out.replace("-\n", "-")
    assert f"configured: {', '.join(POLICIES)}." in " ".join(words.split()).replace("- ", "-")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fleet_serves_until_a_signal(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "lbio.cli", "fleet", str(CONFIGS / "demo.toml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline() for _ in range(6)]
        url = lines[1].split()[1]
        with urllib.request.urlopen(f"{url}/api/tags", timeout=10) as answer:  # noqa: S310  # http, as written above
            models = [model["name"] for model in json.load(answer)["models"]]
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        assert process.stderr.read() == ""
    assert sorted(models) == ["llama3.2:latest", "qwen2.5:0.5b"]
    assert [line.split()[0] for line in lines] == ["SERVER", "swift", "steady", "slow", "flaky", "try:"]
    assert lines[5].startswith(f"try: curl -N {url}/api/chat -d ")


def test_fleet_tells_of_a_busy_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = tmp_path / "fleet.toml"
        path.write_text(f'[[fleet]]\nname = "a"\nport = {taken.getsockname()[1]}\n', encoding="utf-8")
        done = cli("fleet", path)
    assert done.returncode == 1
    assert done.stderr.startswith("cannot serve the fake servers: ")
    assert len(done.stderr.splitlines()) == 1


# --- in this process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"  ollama-lb {command} " in text[text.index("Example"):]


def test_check_tells_what_would_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(GOOD + '[[servers]]\nurl = "https://far"\nverify = false\nslots = 4\n'
                      '[race]\nwinner = "most-tokens"\n[routes]\n"/api/generate" = "hedge"\n', encoding="utf-8")
    assert main(["check", str(config), "-l", "127.0.0.1:5"]) == 0
    assert capsys.readouterr().out == f"""\
{config}: ok
listen on 127.0.0.1:5

servers
  gpu1     http://gpu1:11434  1 slot a model, at most 8 in flight
  far:443  https://far:443    4 slots a model, at most 8 in flight

routes
  /                         local
  /api/version              aggregate
  /api/tags                 aggregate
  /api/ps                   aggregate
  /v1/models                aggregate
  /v1/models/:model         aggregate
  /api/show                 sequential
  /api/chat                 race: 1 racer, up to 2 within the budget; 1 hedge; winner most-tokens within 2s
  /api/generate             hedge: 1 hedge; winner most-tokens within 2s
  /v1/chat/completions      race: 1 racer, up to 2 within the budget; 1 hedge; winner most-tokens within 2s
  /v1/completions           race: 1 racer, up to 2 within the budget; 1 hedge; winner most-tokens within 2s
  /v1/responses             race: 1 racer, up to 2 within the budget; 1 hedge; winner most-tokens within 2s
  /v1/messages              race: 1 racer, up to 2 within the budget; 1 hedge; winner most-tokens within 2s
  /api/embed                sequential
  /api/embeddings           sequential
  /v1/embeddings            sequential
  /v1/audio/transcriptions  sequential
  /api/pull                 broadcast
  /api/create               broadcast
  /api/push                 sequential
  /api/blobs/:digest        broadcast
  /api/copy                 broadcast
  /api/delete               broadcast
  *                         sequential

warning: servers[1]: verify = false: whoever answers at https://far:443 is trusted
"""


@pytest.mark.parametrize(("flag", "key", "default_ns"), [
    ("--timeout ", "timeouts.silence", Config().timeouts.silence_ns),
    ("--timeout-ft ", "timeouts.first_token_warm", Config().timeouts.first_token_warm_ns),
    ("--timeout-ft ", "One that must load the model:", Config().timeouts.first_token_cold_ns),
    ("--time-measure ", "race.measure", Config().race.measure_ns),
])
def test_help_of_times_names_key_and_default(flag: str, key: str, default_ns: int,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    help_of_flag = re.split(r" --?\w", text.partition(flag)[2])[0]
    assert key in help_of_flag
    assert format_duration(default_ns) in help_of_flag.partition(key)[2]


def test_check_does_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-s", "http://gpu1:11434=gpu1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "flags: ok"
    assert "  gpu1  http://gpu1:11434  1 slot a model, at most 8 in flight" in lines


def test_check_with_neither_file_nor_servers_says_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 2
    assert "-s http://gpu1:11434=gpu1" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["http://gpu1:11434", "https://gpu1=gpu1", "gpu1:11434", "10.0.0.7:11434=gpu1"])
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_server_in_place_of_the_file_is_told_to_be_a_flag(command: str, text: str,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, text]) == 2
    assert capsys.readouterr().err == f"{text}: is a server, not a file; give it as a flag: -s {text}\n"


def test_a_file_that_is_called_like_a_server_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpu1:11434").write_text(GOOD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["check", "gpu1:11434"]) == 0


@pytest.mark.parametrize("name", ["prod", "seed", "demo"])
def test_the_configs_of_the_project_are_good(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(CONFIGS / f"{name}.toml")]) == 0
    assert "ok" in capsys.readouterr().out


def test_check_in_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(config), "--json"]) == 0
    good = json.loads(capsys.readouterr().out)
    assert good["ok"] is True
    assert good["servers"] == [{"url": "http://gpu1:11434", "name": "gpu1", "slots": 1, "in_flight_max": 8,
                                "verify": True, "ca_file": ""}]
    assert good["routes"]["/api/chat"] == {"strategy": "race", "winner": "first-token", "racers_min": 1,
                                           "racers_max": 2, "hedges_max": 1}


def test_check_tells_what_aliases_come_to(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(GOOD + '[alias]\n"gpt-4o" = "big"\nbig = ["a:70b", "b"]\n', encoding="utf-8")
    assert main(["check", str(config)]) == 0
    assert "\naliases\n  gpt-4o  a:70b, else b\n  big     a:70b, else b\n" in capsys.readouterr().out
    assert main(["check", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["alias"] == {"gpt-4o": ["a:70b", "b"], "big": ["a:70b", "b"]}
    config.write_text(GOOD + '[alias]\na = "b"\nb = "a"\n', encoding="utf-8")
    assert main(["check", str(config)]) == 2
    assert 'alias.a: goes in a circle: "a" -> "b" -> "a"' in capsys.readouterr().err


def test_problems_in_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(GOOD + "seed = 1\n[race]\nbudget = nan\nmeasure = 2020-01-01\n", encoding="utf-8")
    assert main(["check", str(config), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    bad = json.loads(captured.out)
    assert bad["ok"] is False
    assert [(problem["key"], problem["value"]) for problem in bad["problems"]] == [
        ("servers[0].seed", 1), ("race.measure", "2020-01-01"), ("race.budget", "nan")]
    assert bad["problems"][0]["text"] == "servers[0].seed: 1 is set, but there is no such key; did you mean seed?"


def test_check_reports_the_fleet_too(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text('[[fleet]]\nname = "a"\nfault = { kind = "flop" }\n', encoding="utf-8")
    assert main(["check", str(config)]) == 2
    assert 'did you mean "flap"?' in capsys.readouterr().err


def test_init_writes_what_the_flags_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "-s", "gpu1=a", "-s", "gpu2=a", "-l", ":5", "--timeout", "90"]) == 0
    captured = capsys.readouterr()
    assert captured.err == 'warning: --servers[1]: the name "a" is taken; http://gpu2:11434 is called "a-2"\n'
    assert tomllib.loads(captured.out) == {
        "listen": "0.0.0.0:5", "timeouts": {"silence": "90s"},
        "servers": [{"url": "http://gpu1:11434", "name": "a"}, {"url": "http://gpu2:11434", "name": "a-2"}]}
    path = tmp_path / "mine.toml"
    path.write_text(captured.out, encoding="utf-8")
    assert main(["check", str(path)]) == 0


def test_init_without_servers_writes_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "warning: no server is named: gpu1 and gpu2 are examples\n"
    assert [server["name"] for server in tomllib.loads(captured.out)["servers"]] == ["gpu1", "gpu2"]


def test_init_full_writes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--full"]) == 0
    assert capsys.readouterr().out == document()
    assert main(["init", "--full", "-s", "b=c", "--time-measure", "3"]) == 0
    text = capsys.readouterr().out
    app = parse(tomllib.loads(text))
    assert app.core.race.measure_ns == 3_000_000_000
    assert [server.name for server in app.core.servers] == ["c"]


def test_run_hands_over_configuration_and_fleet(service: FakeService) -> None:
    assert main(["run", str(CONFIGS / "demo.toml"), "--listen", "0"]) == 7
    assert service.app is not None
    assert service.app.listen == "0.0.0.0:0"
    assert service.fleet is not None  # what starts the four fakes; tests of the demo run it


def test_run_without_a_file(service: FakeService) -> None:
    assert main(["run", "--servers", "http://a=x", "--timeout-ft", "5s"]) == 7
    assert service.app is not None
    assert service.app.core.timeouts.first_token_warm_ns == 5_000_000_000
    assert service.fleet is None


def test_run_takes_a_server_file(service: FakeService, tmp_path: Path, config: Path) -> None:
    path = tmp_path / "servers.txt"
    path.write_text("# mine\nhttp://b=y\n", encoding="utf-8")
    assert main(["run", str(config), "-s", "http://a=x", "--server-file", str(path)]) == 7
    assert service.app is not None
    assert [server.name for server in service.app.core.servers] == ["x", "y"]


def test_an_interrupt_is_quiet(service: FakeService, config: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["lbio.service"], "run", interrupt)
    assert main(["run", str(config)]) == 130
    assert capsys.readouterr().err.strip() == ""


def test_fleet_without_fakes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", str(config)]) == 2
    assert capsys.readouterr().err == 'fleet: no fake server is named; write [[fleet]] and below it name = "one"\n'


def test_no_server_says_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 2
    assert "-s http://gpu1:11434=gpu1" in capsys.readouterr().err


def test_load_of_a_config_without_flags_is_what_run_gets(service: FakeService, config: Path) -> None:
    main(["run", str(config)])
    assert service.app == load(config)


# --- what it is started with -------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["check", "init"])
def test_a_full_disk_is_one_line_and_1(command: str, config: Path) -> None:
    args = [command, str(config)] if command == "check" else [command]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run([sys.executable, "-m", "lbio", *args], stdout=full, stderr=subprocess.PIPE, text=True,
                              check=False, timeout=30)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: No space left on device"
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors, signals")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_it_runs_and_ends_well_when_started_without_standard_files(closed: str) -> None:
    port = free_port()
    command = f'exec "{sys.executable}" -m lbio run -l 127.0.0.1:{port} -s http://127.0.0.1:1=gone {closed}'
    with subprocess.Popen(["/bin/sh", "-c", command]) as process:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


def test_an_interrupt_while_it_is_loaded_is_quiet() -> None:
    script = """if True:
        import sys
        class Interrupted:
            def find_spec(self, name, path=None, target=None):
                if name == "click":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupted())
        from lbio.__main__ import main
        sys.exit(main())"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (130, "")


def test_the_installed_program_is_the_same() -> None:
    project = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"ollama-lb": "lbio.__main__:main"}
