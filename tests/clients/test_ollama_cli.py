"""The `ollama` command itself, where it is found: $OLLAMA_CLI, or `ollama` on the PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import anyio.to_thread
import pytest

from tests.lbio.kit import Rig, balanced, specs

CLI = os.environ.get("OLLAMA_CLI") or shutil.which("ollama")

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(CLI is None, reason="there is no `ollama` command: neither in $OLLAMA_CLI nor on the PATH"),
]


async def ollama(rig: Rig, home: Path, *words: str) -> str:
    """Run the command against a balancer and return what it prints."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "OLLAMA_HOST": rig.url}
    done = await anyio.to_thread.run_sync(
        lambda: subprocess.run([str(CLI), *words], env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                               text=True, check=False, timeout=30)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def columns(printed: str) -> list[list[str]]:
    """Return the cells of each line, which at least two spaces or a tab divide."""
    return [[cell.strip() for cell in line.replace("\t", "    ").split("    ") if cell.strip()]
            for line in printed.splitlines()[1:]]  # fmt: skip


async def test_ps_has_a_line_for_each_server_and_model(tmp_path: Path) -> None:
    async with balanced(specs("gpu1", "gpu2")) as rig:
        lines = columns(await ollama(rig, tmp_path, "ps"))
    assert [line[0] for line in lines] == ["tiny:latest (gpu1)", "tiny:latest (gpu2)"]


async def test_list_has_how_many_servers_have_a_model(tmp_path: Path) -> None:
    async with balanced([*specs("gpu1", "gpu2"), *specs("gpu3", models=(), start_loaded=())]) as rig:
        (line,) = columns(await ollama(rig, tmp_path, "list"))
    assert line[0] == "tiny:latest"
    assert len(line[1]) == 12
    assert line[1].endswith(" 2/3")


async def test_the_names_that_are_listed_can_be_run(tmp_path: Path) -> None:
    async with balanced(specs("gpu1", "gpu2")) as rig:
        (line,) = columns(await ollama(rig, tmp_path, "list"))
        assert await ollama(rig, tmp_path, "run", line[0], "hello")
        first = (await ollama(rig, tmp_path, "ps")).splitlines()[1].split()[0]
        await ollama(rig, tmp_path, "stop", first)


async def test_run_lb_tells_of_the_fleet(tmp_path: Path) -> None:
    async with balanced(specs("gpu1", "gpu2")) as rig:
        await rig.chat()
        assert (await ollama(rig, tmp_path, "run", "lb", "status")).startswith("2 servers: 2 healthy\n")
        assert "gpu2    healthy" in await ollama(rig, tmp_path, "run", "lb", "servers")
        assert "tiny:latest  2/2" in await ollama(rig, tmp_path, "run", "lb", "models")
        assert "RequestArrived(request_id=1" in await ollama(rig, tmp_path, "run", "lb", "why", "1")
        assert "ollama run lb status" in await ollama(rig, tmp_path, "run", "lb", "help")
        assert "ollama-lb" in await ollama(rig, tmp_path, "show", "lb")


async def test_without_the_extras_it_sees_one_server(tmp_path: Path) -> None:
    async with balanced(specs("gpu1", "gpu2"), cli_extras=False) as rig:
        (line,) = columns(await ollama(rig, tmp_path, "ps"))
    assert line[0] == "tiny:latest"
