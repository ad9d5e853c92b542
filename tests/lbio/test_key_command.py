"""`ollama-lb key new`, and what `check` and the start tell of keys."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from lbio.access.credentials import read_secrets
from lbio.cli import main
from lbio.config_file import access_warnings, parse

SERVER = '[[servers]]\nurl = "http://gpu1:11434"\nname = "gpu1"\n'
OPEN = (
    "no [[keys]]: whoever reaches 0.0.0.0:11434 may use its models and change them; "
    "`ollama-lb key new NAME` makes a key, --listen 127.0.0.1:11434 lets only this machine in"
)


def test_a_key_is_shown_once_and_only_its_hash_is_for_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--models", "llama3.2,qwen3:*", "--allow", "use", "--allow", "manage", "--requests-per-minute", "60"]
    assert main(["key", "new", "alice", *words]) == 0
    told = capsys.readouterr()
    (token,) = re.findall(r"olb_\w+", told.err)
    assert token not in told.out
    app = parse({**tomllib.loads(told.out), **tomllib.loads(SERVER)})
    (key,) = app.keys
    assert (key.name, key.models, key.allow, key.requests_per_minute) == (
        "alice",
        ("llama3.2", "qwen3:*"),
        ("use", "manage"),
        60,
    )
    keyring = read_secrets(app, {}).keyring
    assert keyring is not None
    assert keyring.find(token.encode()) is not None


def test_what_is_left_out_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "new", "a b"]) == 0
    assert list(tomllib.loads(capsys.readouterr().out)["keys"][0]) == ["name", "hash"]


@pytest.mark.parametrize(
    "words",
    [[], [""], ["x" * 65], ["a", "--models", "x://y"], ["a", "--allow", "x"], ["a", "--requests-per-minute", "0"]],
)
def test_mistakes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "new", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err


def test_a_key_can_be_appended_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.toml"
    path.write_text(SERVER, encoding="utf-8")
    assert main(["check", str(path)]) == 0
    assert f"\nwarning: {OPEN}\n" in capsys.readouterr().out
    assert main(["key", "new", "alice", "--models", "a", "--requests-per-minute", "60"]) == 0
    with path.open("a", encoding="utf-8") as file:
        file.write(capsys.readouterr().out)
    assert main(["check", str(path)]) == 0
    told = capsys.readouterr().out
    assert "warning" not in told
    assert "\nkeys\n  alice  may use  models a  60 requests a minute\n" in told
    assert main(["check", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keys"] == [
        {"name": "alice", "from": "hash", "models": ["a"], "allow": ["use"], "requests_per_minute": 60}
    ]


def test_check_tells_which_headers_a_server_is_sent_and_not_what_is_in_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.toml"
    path.write_text(f'{SERVER}bearer = "one-secret"\nheaders = {{ X-A = "other-secret" }}\n', encoding="utf-8")
    assert main(["check", str(path)]) == 0
    told = capsys.readouterr().out
    assert "is sent Authorization and X-A of its own" in told
    assert main(["check", str(path), "--json"]) == 0
    told += capsys.readouterr().out
    assert '"sends": ["Authorization", "X-A"]' in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("listen", "warned"),
    [("0.0.0.0:1", True), (":1", True), ("[::]:1", True), ("gpu1:1", True), ("10.0.0.7:1", True),
     ("127.0.0.1:1", False), ("localhost:1", False), ("[::1]:1", False)],
)
def test_who_listens_to_all_without_keys_is_warned(listen: str, warned: bool) -> None:
    app = parse({**tomllib.loads(SERVER), "listen": listen})
    assert bool([*access_warnings(app)]) == warned
    with_key = parse({**tomllib.loads(SERVER), "listen": listen, "keys": [{"name": "a", "env": "A"}]})
    assert [*access_warnings(with_key)] == []


def test_with_keys_management_is_not_open_to_all() -> None:
    raw = {**tomllib.loads(SERVER), "admin": {"allow": "any"}}
    assert parse(raw).warnings
    assert parse({**raw, "keys": [{"name": "a", "env": "A"}]}).warnings == ()
