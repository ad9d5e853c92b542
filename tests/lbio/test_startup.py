"""What the program imports before it is of use: the list, not the time (that is `python -m benchmarks.startup`)."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from lbio.cli import main

OWN = frozenset({"lbcore", "lbio", "ollama_lb_core__mypyc"})  # the last one only where the core is compiled
THEIRS = frozenset({"anyio", "click", "h11", "idna", "msgspec", "sniffio", "typing_extensions", "uvloop"})
"""What others have made and `run` may import, with what these import themselves."""

UNNEEDED = {  # by what comes before the first answer
    "lbio.configuration.config_text", "lbio.configuration.summary", "lbio.journal.replay",
    "http.client", "multiprocessing", "tempfile", "unittest", "urllib.request", "xml",
}  # fmt: skip

PROGRAM = """
import json, sys
before = set(sys.modules)
from lbio.cli import main
code = main(sys.argv[1:])
print(json.dumps(sorted(set(sys.modules) - before)))
sys.exit(code)
"""
"""Says at its end, in a last line, what was imported; not what Python itself does before."""


def _command(*args: str | Path) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *map(str, args)]


def _config_of_a_server_that_is_not_there(where: Path) -> Path:
    path = where / "my.toml"
    path.write_text('listen = "127.0.0.1:0"\n[[servers]]\nurl = "http://127.0.0.1:1"\nname = "gone"\n', "utf-8")
    return path


def _last_line(output: str) -> set[str]:
    return set(json.loads(output.splitlines()[-1]))


def _foreign(modules: set[str]) -> set[str]:
    """Return the packages among them that neither Python nor this project has made."""
    tops = {name.partition(".")[0] for name in modules}
    return {top for top in tops - sys.stdlib_module_names - OWN if not top.startswith(("_cython", "cython_runtime"))}


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["run", "--help"], ["check", "--help"]])
def test_help_imports_click_and_the_command_line_alone(args: Sequence[str]) -> None:
    done = subprocess.run(_command(*args), capture_output=True, text=True, check=True, timeout=30)
    imported = _last_line(done.stdout)
    assert _foreign(imported) == {"click"}
    own = {"cli", "subcommands", "configuration"}
    assert {name for name in imported if name.startswith("lbcore")} == {"lbcore", "lbcore.compiled"}
    assert {name.split(".")[1] for name in imported if name.startswith("lbio.")} == own
    assert imported & {"asyncio", "logging", "ssl", "tomllib", "urllib.request"} == set()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_run_imports_only_what_it_needs_for_an_answer(tmp_path: Path) -> None:
    config = _config_of_a_server_that_is_not_there(tmp_path)
    with subprocess.Popen(_command("run", config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        url = run.stdout.readline().split()[-1]
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  # http, as it has just said
            assert answer.read() == b"Ollama is running"
        run.send_signal(signal.SIGTERM)
        said, _ = run.communicate(timeout=10)
    imported = _last_line(said)
    assert _foreign(imported) <= THEIRS
    assert imported & UNNEEDED == set()


@pytest.mark.parametrize("args", [["check"], ["run"]])
def test_a_configuration_that_is_wrong_is_refused_without_the_service(args: Sequence[str], tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    config.write_text("nonsense = 1\n", "utf-8")
    done = subprocess.run(_command(*args, config), capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert _last_line(done.stdout) & {"asyncio", "lbio.service", "simulator", "uvloop"} == set()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_garbage_is_collected_once_it_serves_but_not_among_what_was_imported(tmp_path: Path) -> None:
    config = _config_of_a_server_that_is_not_there(tmp_path)
    program = """
import gc, sys
import lbio.service
from lbio.cli import main
lbio.service._greet = lambda *_, **__: print(gc.isenabled(), gc.get_freeze_count() > 10_000, flush=True)
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, "run", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        said = run.stdout.readline()
        run.send_signal(signal.SIGTERM)
    assert said == "True True\n"


def test_garbage_is_collected_again_after_a_start_that_failed(tmp_path: Path) -> None:
    assert main(["run", str(tmp_path / "no.toml")]) == 2
    assert gc.isenabled()
