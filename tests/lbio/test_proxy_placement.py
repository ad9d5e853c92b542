"""Declared placement over real sockets: what is missing is pulled and kept loaded, what is too much is deleted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import anyio
import pytest
from click.testing import CliRunner

from lbcore.commands import Work
from lbio.cli import cli
from lbio.job import request_of
from simulator.fakes.specs import FakeModel, model_key
from simulator.faults import Fault, FaultKind
from simulator.serve import serve_fleet
from tests.lbio.kit import LIMIT_S, Rig, balanced, specs

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def holders(rig: Rig, model: str) -> list[str]:
    return [fake.spec.name for fake in rig.fleet if model_key(model) in fake.live.fake.disk]


async def until(true: Any) -> None:
    """Wait until something holds."""
    with anyio.fail_after(LIMIT_S):
        while not true():  # noqa: ASYNC110  what is waited for is no event of ours
            await anyio.sleep(0.02)


async def models_of(rig: Rig) -> list[dict[str, Any]]:
    answer = await rig.ask("GET", "/status")
    return json.loads(answer.body)["models"]  # type: ignore[no-any-return]


async def test_a_declared_model_is_pulled_where_it_is_missing_and_kept_loaded() -> None:
    async with balanced(specs("a", "b", "c"), models=[{"name": "new", "copies": 2, "warm": True}]) as rig:
        await until(lambda: all("new:latest" in rig.fleet[i].live.fake.runners for i in (0, 1)))
        assert holders(rig, "new") == ["a", "b"]
        await until(lambda: not rig.service.driver.jobs)
        (told,) = await models_of(rig)
        assert (told["name"], told["copies"], told["servers"]) == ("new", 2, ["a", "b"])
        assert (told["on_disk"], told["under_way"]) == (["a", "b"], [])


async def test_a_model_that_only_embeds_is_kept_loaded_too() -> None:
    e5 = FakeModel("e5", size_bytes=1_000_000, capabilities=("embedding",))
    wanted = [{"name": "e5", "warm": True, "copies": 2}]
    async with balanced(specs("a", "b", models=(e5,), start_loaded=()), models=wanted) as rig:
        await until(lambda: all("e5:latest" in fake.live.fake.runners for fake in rig.fleet))
        await until(lambda: not rig.service.driver.jobs)
        assert all(rig.server(name).models["e5:latest"].loaded for name in "ab")
        assert [fake.stats.requests["/api/embed"] for fake in rig.fleet] == [1, 1]


async def test_what_is_too_much_is_deleted_only_where_that_is_wanted() -> None:
    wanted = [{"name": "tiny", "servers": ["b"], "prune": True}, {"name": "other", "servers": ["b"]}]
    async with balanced(specs("a", "b", "c"), models=wanted) as rig:
        await until(lambda: holders(rig, "tiny") == ["b"])
        await until(lambda: holders(rig, "other") == ["b"])


async def test_what_is_under_way_and_what_has_failed_are_told() -> None:
    slow = [*specs("a", load_ms=3000), *specs("b")]
    async with balanced(slow, models=[{"name": "new", "servers": ["a"]}, {"name": "nope", "servers": ["b"]}]) as rig:
        driver = rig.service.driver
        await until(lambda: any(job.share is not None for job in driver.jobs.values()))
        await until(lambda: driver.balancer.provision.setbacks)
        new, nope = await models_of(rig)
        assert [(job["server"], job["work"]) for job in new["under_way"]] == [("a", "pull")]
        assert 0 <= new["under_way"][0]["done"] <= 1
        assert [(w["server"], w["work"], w["times"]) for w in nope["waiting"]] == [("b", "pull", 1)]
        assert "no such host" in nope["waiting"][0]["why"]
        table = (await rig.send(b"GET /status HTTP/1.1\r\nHost: localhost\r\nAccept: text/plain\r\n"
                                b"Connection: close\r\n\r\n")).body.decode()  # fmt: skip
        assert "PLACED ON" in table
        assert "pull on a" in table
        assert re.search(r"^pull nope on b: error line in the stream: .* \(again in \d+ s\)$", table, re.MULTILINE)


async def test_a_pull_ends_when_its_server_is_removed() -> None:
    async with balanced(specs("a", "b", load_ms=600), models=[{"name": "new"}]) as rig:
        await until(lambda: rig.service.driver.jobs)
        assert (await rig.ask("DELETE", "/servers/a")).status == 200
        await anyio.sleep(1)
        assert "new:latest" not in rig.fleet[0].live.fake.disk
        await until(lambda: holders(rig, "new") == ["b"])


async def test_a_server_that_dies_inside_a_pull_is_left_alone_for_a_while() -> None:
    async with balanced(specs("a", "b", load_ms=400), models=[{"name": "new"}]) as rig:
        await until(lambda: rig.service.driver.jobs)
        rig.fleet[0].set_fault(Fault(FaultKind.REFUSE))
        await until(lambda: holders(rig, "new") == ["b"])


@pytest.mark.parametrize(
    ("work", "runner_key", "wanted"),
    [
        (Work.PULL, "", ("POST", "/api/pull", {"model": "m"})),
        (Work.DELETE, "", ("DELETE", "/api/delete", {"model": "m"})),
        (Work.WARM, "", ("POST", "/api/generate", {"model": "m", "keep_alive": -1, "stream": False})),
        (
            Work.WARM,
            '{"num_ctx":8192}',
            (
                "POST",
                "/api/generate",
                {"model": "m", "keep_alive": -1, "stream": False, "options": {"num_ctx": 8192}},
            ),
        ),
    ],
)
def test_servers_are_sent_what_a_client_would_send(work: Work, runner_key: str, wanted: object) -> None:
    assert request_of(work, "m", runner_key) == wanted


async def test_models_tells_where_they_are_now() -> None:
    async with balanced(specs("a", "b"), models=[{"name": "tiny", "copies": 2}]) as rig:

        def run(*args: str) -> Any:
            return CliRunner().invoke(cli, ["models", "--url", rig.url, *args], standalone_mode=False)

        told = await anyio.to_thread.run_sync(run)
        assert told.return_value == 0, told.output
        assert re.search(r"^tiny +2 of 2 +a, b +a, b +a, b +-$", told.output, re.MULTILINE), told.output
        assert re.search(r"^tiny:latest +2/2 +0 +a, b$", told.output, re.MULTILINE), told.output
        as_json = json.loads((await anyio.to_thread.run_sync(run, "--json")).output)
        assert [model["name"] for model in as_json["models"]] == ["tiny"]
    told = await anyio.to_thread.run_sync(run)
    assert told.return_value == 2
    assert "cannot be asked" in told.stderr


def test_models_says_by_which_command_a_file_is_read() -> None:
    told = CliRunner().invoke(cli, ["models", "my.toml"])
    assert told.exit_code == 2
    assert "No such command 'my.toml'. Did you mean `ollama-lb models plan my.toml`?" in told.stderr
    assert "models plan plam" not in CliRunner().invoke(cli, ["models", "plam"]).stderr


async def test_models_says_how_to_give_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOSS", "a-key-that-manages")
    async with balanced(specs("a"), keys=[{"name": "boss", "env": "BOSS", "allow": ["manage"]}]) as rig:

        def run(*args: str) -> Any:
            return CliRunner().invoke(cli, ["models", "--url", rig.url, *args], standalone_mode=False)

        told = await anyio.to_thread.run_sync(run)
        assert told.return_value == 2
        assert told.stderr.startswith('a key is needed: set OLLAMA_API_KEY to a key with "manage", or ')
        assert (await anyio.to_thread.run_sync(run, "--key-env", "BOSS")).return_value == 0


async def test_models_plan_tells_what_would_be_done_and_does_nothing(tmp_path: Path) -> None:
    async with serve_fleet(specs("a", "b")) as fleet:
        config = tmp_path / "lb.toml"
        servers = "\n".join(f'[[servers]]\nurl = "{server.url}"\nname = "{server.spec.name}"' for server in fleet)
        config.write_text(f'{servers}\n[[models]]\nname = "new"\ncopies = 2\nwarm = true\n[[models]]\nname = "tiny"\n')

        def run(*args: str) -> Any:
            return CliRunner().invoke(cli, ["models", "plan", str(config), *args], standalone_mode=False)

        told = await anyio.to_thread.run_sync(run)
        assert told.return_value == 0
        assert "would pull new on a: placed on a, b, missing here" in told.output
        assert "tiny   1 of 1  a          a, b     a, b" in told.output
        as_json = json.loads((await anyio.to_thread.run_sync(run, "--json")).output)
        assert [(s["work"], s["server"]) for s in as_json["steps"]] == [
            ("pull", "a"),
            ("pull", "b"),
            ("warm", "a"),
            ("warm", "b"),
        ]
        assert all("new:latest" not in server.live.fake.disk for server in fleet)


def test_models_plan_of_servers_that_cannot_be_reached_says_so(tmp_path: Path) -> None:
    config = tmp_path / "lb.toml"
    config.write_text('[[servers]]\nurl = "http://127.0.0.1:1"\n[[models]]\nname = "m"\n')
    told = CliRunner().invoke(cli, ["models", "plan", str(config)], standalone_mode=False)
    assert told.return_value == 1
    assert "cannot be read: 127.0.0.1:1: connection refused" in told.output
    assert "no server could be read: what would be done cannot be told" in told.output


def test_models_plan_of_fake_servers_alone_says_that_they_do_not_run(tmp_path: Path) -> None:
    config = tmp_path / "lb.toml"
    config.write_text('[[fleet]]\nname = "a"\n[[models]]\nname = "m"\n')
    told = CliRunner().invoke(cli, ["models", "plan", str(config)], standalone_mode=False)
    assert told.return_value == 1
    assert told.output.startswith("no [[servers]]")


async def test_models_plan_tells_of_deletions_that_come_last(tmp_path: Path) -> None:
    async with serve_fleet(specs("a", "b")) as fleet:
        config = tmp_path / "lb.toml"
        servers = "\n".join(f'[[servers]]\nurl = "{server.url}"\nname = "{server.spec.name}"' for server in fleet)
        config.write_text(f'{servers}\n[[servers]]\nurl = "http://127.0.0.1:1"\nname = "c"\n'
                          '[[models]]\nname = "tiny"\nservers = ["a"]\nprune = true\n'
                          '[[models]]\nname = "new"\nservers = ["b"]\n')  # fmt: skip

        def run() -> Any:
            return CliRunner().invoke(cli, ["models", "plan", str(config), "--json"], standalone_mode=False)

        told = json.loads((await anyio.to_thread.run_sync(run)).output)
        assert {(s["work"], s["model"], s["server"]) for s in told["steps"]} == {
            ("delete", "tiny", "b"),
            ("pull", "new", "b"),
        }
        assert list(told["unread"]) == ["c"]


async def test_an_alias_of_nothing_is_worth_a_warning() -> None:
    async with balanced(specs("a"), alias={"good": "tiny", "bad": ["tyni", "tin"]}) as rig:
        told = json.loads((await rig.ask("GET", "/status")).body)
        assert told["warnings"] == ["alias bad: no live server has tyni or tin"]


def test_models_plan_of_a_bad_file_names_the_key(tmp_path: Path) -> None:
    config = tmp_path / "lb.toml"
    config.write_text('[[servers]]\nurl = "http://a"\nname = "gpu1"\n[[models]]\nname = "m"\nservers = ["gpu2"]\n'
                      '[[models]]\nname = "M:latest"\ncopies = 0\n[[models]]\nname = "a b"\n')  # fmt: skip
    told = CliRunner().invoke(cli, ["models", "plan", str(config)], standalone_mode=False)
    assert told.return_value == 2
    assert 'models[0].servers: "gpu2" is no server of this file; did you mean "gpu1"?' in told.stderr
    assert "models[1].copies: 0 is too small" in told.stderr
    assert 'models[1].name: "M:latest" is also the model of models[0]' in told.stderr
    assert 'models[2].name: "a b" is no name of a model' in told.stderr
