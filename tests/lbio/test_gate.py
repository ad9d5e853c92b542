"""The gate: what a request needs a key for, and what it is told without; and `[[keys]]` in the configuration."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.ollama import ROUTES, canonical_model, find_route
from lbcore.schema import SECOND_NS
from lbio.access.credentials import Credentials, Secrets, SecretsError, read_secrets
from lbio.access.gate import Gate
from lbio.access.keys import Key, new_token
from lbio.answers.local import LocalAnswer
from lbio.config_file import ConfigError, parse
from lbio.configuration.settings import AppConfig, Right, UpstreamSettings
from tests.lbio.test_keys import HASH, MANAGE, SERVER, TOKEN, USE, head, key, ring

# ruff: noqa: E501  # tables of values: one case a line

# --- the gate --------------------------------------------------------------------------------------------------


def is_admin(path: str) -> bool:
    return path == "/status"


def answer_of(admitted: Key | LocalAnswer | None) -> LocalAnswer:
    assert isinstance(admitted, LocalAnswer)
    return admitted


@pytest.mark.parametrize(("line", "known"), [
    ("Authorization: Bearer {}", True), ("authorization: bearer   {}", True), ("X-Api-Key: {}", True), ("x-api-key: {}", True),
    ("Authorization: Basic {}", False), ("Authorization: {}", False), ("Proxy-Authorization: Bearer {}", False),
    ("Authorization: Bearer {}x", False), ("Cookie: key={}", False), ("Authorization: Bearer a, Bearer {}", False),
])
def test_how_a_key_is_sent(line: str, known: bool) -> None:
    found, tokens = ring(key())
    admitted = Gate(found, is_admin).admit(head("POST", "/api/chat", line.format(tokens["alice"])), 0)
    assert (admitted is not None and not isinstance(admitted, LocalAnswer)) == known


def test_either_of_two_keys_will_do() -> None:
    found, tokens = ring(key())
    sent = ("Authorization: Bearer other", f"X-Api-Key: {tokens['alice']}")
    assert isinstance(Gate(found, is_admin).admit(head("POST", "/v1/messages", *sent), 0), Key)


@pytest.mark.parametrize(("path", "shape"), [
    ("/api/chat", {"error": "MESSAGE"}),
    ("/v1/chat/completions", {"error": {"message": "MESSAGE", "type": "authentication_error", "param": None, "code": None}}),
    ("/v1/messages", {"type": "error", "error": {"type": "authentication_error", "message": "MESSAGE"}, "request_id": ""}),
    ("/status", {"error": "MESSAGE"}),
])
@pytest.mark.parametrize(("sent", "challenge", "message"), [
    ((), b"Bearer", "a key is needed: send the header Authorization: Bearer KEY"),
    (("Authorization: Bearer x",), b'Bearer error="invalid_token"', "this key is not known here"),
])
def test_401(path: str, shape: dict[str, Any], sent: tuple[str, ...], challenge: bytes, message: str) -> None:
    answer = answer_of(Gate(ring(key())[0], is_admin).admit(head("POST", path, *sent), 0))
    assert answer.status == 401
    assert (b"WWW-Authenticate", challenge) in answer.headers
    assert json.loads(answer.body) == json.loads(json.dumps(shape).replace("MESSAGE", message))


def test_403_names_what_is_not_allowed() -> None:
    found, tokens = ring(key("user"), key("deployer", rights=(MANAGE,)))
    gate = Gate(found, is_admin)
    for name, path, words in (("user", "/api/pull", "may not manage, which POST /api/pull needs"), ("user", "/status", "may not manage"), ("deployer", "/api/chat", "may not use")):
        answer = answer_of(gate.admit(head("POST", path, f"X-Api-Key: {tokens[name]}"), 0))
        assert answer.status == 403
        assert words in json.loads(answer.body)["error"]
        assert f"'{name}'" in json.loads(answer.body)["error"]


def test_429_says_when_again() -> None:
    found, tokens = ring(key(per_minute=2))
    gate, asked = Gate(found, is_admin), head("POST", "/v1/chat/completions", f"X-Api-Key: {tokens['alice']}")
    admitted = [gate.admit(asked, now_ns) for now_ns in (0, 0, SECOND_NS, 30 * SECOND_NS)]
    answer = answer_of(admitted.pop(2))
    assert all(isinstance(each, Key) for each in admitted)
    assert (answer.status, answer.headers) == (429, ((b"Retry-After", b"29"),))
    assert json.loads(answer.body)["error"]["type"] == "rate_limit_error"


def test_what_is_refused_costs_nothing() -> None:
    found, tokens = ring(key(per_minute=1))
    gate, sent = Gate(found, is_admin), f"X-Api-Key: {tokens['alice']}"
    for _ in range(5):
        assert answer_of(gate.admit(head("POST", "/api/pull", sent), 0)).status == 403
    assert isinstance(gate.admit(head("POST", "/api/chat", sent), 0), Key)


def test_a_sign_of_life_needs_no_key_as_long_as_it_is_nothing_else() -> None:
    gate = Gate(ring(key())[0], is_admin)
    assert gate.admit(head("GET", "/"), 0) is gate.admit(head("HEAD", "/"), 0) is None
    assert answer_of(gate.admit(head("GET", "/", n_body=5), 0)).status == 401
    assert answer_of(gate.admit(head("GET", "/", "X-Ollama-LB-Server: gpu1"), 0)).status == 401


def test_refusals_are_told_once_a_second() -> None:
    gate = Gate(ring(key())[0], is_admin)
    asked = head()
    answer = answer_of(gate.admit(asked, 0))
    told = [gate.words(answer, asked, "10.0.0.7", now_ns) for now_ns in (0, 1, 2, SECOND_NS)]
    assert told == ["10.0.0.7 got 401 for POST /api/chat", None, None, "10.0.0.7 got 401 for POST /api/chat (2 more since the last such line)"]


def test_a_name_that_cannot_be_written_is_refused_all_the_same() -> None:
    gate, some = Gate(ring()[0], is_admin), key(models=("mine",))
    answer = gate.refuse_models(some, head("POST", "/api/chat"), b'{"model":"yours\\ud800"}')
    assert answer is not None
    assert b"yours?" in answer.body


@pytest.mark.parametrize(("method", "path", "body", "refused"), [
    ("POST", "/api/chat", b'{"model":"mine"}', False),
    ("POST", "/api/chat", b'{"model":"Mine:latest"}', False),
    ("POST", "/api/chat", b'{"model":"yours"}', True),
    ("POST", "/api/chat", b"{}", False),
    ("POST", "/api/chat", b"", False),
    ("POST", "/api/chat", b"{", True),
    ("POST", "/api/copy", b'{"source":"mine","destination":"yours"}', True),
    ("POST", "/api/copy", b'{"source":"yours","destination":"mine"}', True),
    ("GET", "/v1/models/mine", b"", False),
    ("GET", "/v1/models/yours", b"", True),
    ("GET", "/v1/models/m%69ne", b"", False),
    ("GET", "/v1/models/me%2Fmine", b"", True),
    ("GET", "/api/%74ags", b"", True),
    ("POST", "/api/c%68at", b'{"model":"mine"}', True),
    ("GET", "/v1//models", b"", True),
    ("GET", "/v1/./models/yours", b"", True),
    ("POST", "/v1/x/../chat", b'{"model":"mine"}', True),
    ("GET", "/api/me", b"", False),
    ("POST", "/api/blobs/sha256:0", b'{"model":"yours"}', False),
    ("POST", "/v1/x", b'{"model":"yours"}', True),
    ("POST", "/status", b'{"model":"yours"}', False),
])
def test_a_key_for_some_models(method: str, path: str, body: bytes, refused: bool) -> None:
    gate, some = Gate(ring()[0], is_admin), key(models=("mine",))
    answer = gate.refuse_models(some, head(method, path), body)
    assert (answer is not None) == refused
    assert gate.refuse_models(key(), head(method, path), body) is None
    if answer is not None:
        assert answer.status == 403
        assert b"alice" in answer.body


NAMES: list[Any] = ["mine", "MINE", "mine:1b", "yours", "library/mine", "x://registry.ollama.ai/library/yours", "me/mine", "", None, 3, {}]
MEMBERS = ["model", "Model", "name", "source", "destination", "from", "messages", "mod\\u0065l", "\u017fource"]
JSON_BODIES = st.lists(st.tuples(st.sampled_from(MEMBERS), st.sampled_from(NAMES)), max_size=4).map(
    lambda pairs: ("{" + ",".join(f'"{name}":{json.dumps(value)}' for name, value in pairs) + "}").encode())


def as_go_reads(body: bytes) -> dict[str, str]:
    """The members of an object as Go sees them: case does not count, the last one does, and null changes nothing."""
    seen: dict[str, str] = {}
    for name, value in json.loads(body, object_pairs_hook=list):
        if isinstance(value, str):
            seen[name.casefold()] = value
    return seen


@given(
    st.sampled_from(["GET", "HEAD", "POST", "DELETE", "PUT", "OPTIONS"]),
    st.sampled_from([*(route.name for route in ROUTES), "/status", "/api/blobs/x", "/api/%70ull", "/v1/models/yours", "/api/x"]),
    JSON_BODIES,
    st.sampled_from([(), (USE,), (MANAGE,), (USE, MANAGE)]),
    st.sampled_from([("*",), ("mine",), ("mine*", "me/*")]),
)
def test_rights_are_never_exceeded(method: str, path: str, body: bytes, rights: tuple[Right, ...], models: tuple[str, ...]) -> None:
    found, tokens = ring(key(models=models, rights=rights))
    gate, asked = Gate(found, is_admin), head(method, path, f"X-Api-Key: {tokens['alice']}", n_body=len(body))
    admitted = gate.admit(asked, 0)
    if isinstance(admitted, LocalAnswer) or gate.refuse_models(key(models=models, rights=rights), asked, body) is not None:
        return
    assert rights
    plain = path.replace("%70", "p")
    if plain.startswith(("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs", "/status")) or method in {"PUT", "DELETE"}:
        assert MANAGE in rights
    if find_route(plain).generates and method == "POST":
        assert USE in rights
    if models != ("*",) and not plain.startswith(("/status", "/api/blobs")):
        wanted = {"model"} if find_route(plain).generates else {"model", "name", "source", "destination", "from"}
        for member, name in as_go_reads(body).items():
            if member in wanted and name:
                assert canonical_model(name) in ({"mine:latest"} if models == ("mine",) else {"mine:latest", "mine:1b", "me/mine:latest"})


# --- the configuration -----------------------------------------------------------------------------------------


def problems_of(*tables: Any, **more: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse({"servers": [SERVER], "keys": list(tables), **more})
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(("table", "problem"), [
    ({"hash": HASH}, "keys[0].name: is missing; it says how logs call who has this key"),
    ({"name": "", "hash": HASH}, "keys[0].name: is no name; write up to 64 characters, such as alice"),
    ({"name": "a"}, "keys[0]: has neither hash nor env nor file; write exactly one: what `ollama-lb key new NAME` prints has a hash"),
    ({"name": "a", "env": "A", "file": "b"}, "keys[0]: has env and file; write exactly one: what `ollama-lb key new NAME` prints has a hash"),
    ({"name": "a", "hash": TOKEN}, "keys[0].hash: is no hash of a key; write what `ollama-lb key new NAME` prints, sha256:SALT:DIGEST"),
    ({"name": "a", "env": TOKEN}, "keys[0].env: is no name of a variable; write the name of the variable that holds the key"),
    ({"name": "a", "env": "secret word"}, "keys[0].env: is no name of a variable; write the name of the variable that holds the key"),
    ({"name": "a", "file": TOKEN}, "keys[0].file: looks like a key itself; write the path of a file that holds it"),
    ({"name": "a", "key": TOKEN, "hash": HASH}, "keys[0].key: is set, but there is no such key; did you mean keys?"),
    ({"name": "a", "hash": HASH, "models": []}, 'keys[0].models: [] names no model; write ["*"] for all, or remove the key'),
    ({"name": "a", "hash": HASH, "models": ["a,b"]}, 'keys[0].models: "a,b" is no name of a model; write each as a text of its own, without a scheme'),
    ({"name": "a", "hash": HASH, "models": "a"}, 'keys[0].models: "a" is not a list; write it in brackets: ["a"]'),
    ({"name": "a", "hash": HASH, "allow": []}, 'keys[0].allow: [] allows nothing; write ["use"], or remove the key'),
    ({"name": "a", "hash": HASH, "allow": ["manag"]}, 'keys[0].allow: "manag" is not one of the choices; did you mean "manage"? The choices are "use", "manage"'),
    ({"name": "a", "hash": HASH, "requests_per_minute": 0}, "keys[0].requests_per_minute: 0 is too small; write a whole number from 1 to 1000000"),
    ("x", "keys[0]: is not a table; write [[keys]] on a line of its own and below it what `ollama-lb key new NAME` prints"),
])
def test_each_mistake_in_a_key_has_its_message(table: Any, problem: str) -> None:
    assert problems_of(table) == [problem]


def test_names_of_keys_are_different() -> None:
    assert problems_of({"name": "a", "hash": HASH}, {"name": "a", "env": "A"}) == [
        'keys[1].name: "a" is also the name of keys[0]; give each key a name of its own']


SECRET = "hunter2-sk-0123456789"


@pytest.mark.parametrize("raw", [
    {"servers": [{**SERVER, "baerer": SECRET}]}, {"servers": [{**SERVER, "token": SECRET}]}, {"servers": [{**SERVER, "api_key": SECRET}]},
    {"servers": [{**SERVER, "bearer": f"{SECRET}\n"}]}, {"servers": [{**SERVER, "bearer": [SECRET]}]}, {"servers": [{**SERVER, "header": {"X-Api-Key": SECRET}}]},
    {"servers": [{**SERVER, "headers": SECRET}]}, {"servers": [{**SERVER, "headers": {"X-A": [SECRET]}}]}, {"servers": [{**SERVER, "headers": {"Host": SECRET}}]},
    {"servers": [{**SERVER, "bearer": SECRET, "headers": {"authorization": SECRET}}]}, {"servers": [{**SERVER, "bearer": f"Bearer {SECRET}"}]},
    {"servers": {**SERVER, "bearer": SECRET}}, {"server": [{**SERVER, "bearer": SECRET}]}, {"bearer": SECRET}, {"keys": {"a": SECRET}}, {"keys": [SECRET]}, {"key": [{"hash": SECRET}]},
    {"keys": [{"name": "a", "secret": SECRET}]}, {"keys": [{"name": "a", "hash": SECRET}]}, {"keys": [{"name": "a", "hash": {"a": SECRET}}]}, {"keys": [{"name": "a", "env": SECRET}]},
    {"admin": {"token": SECRET}}, {"api_keys": {"a": SECRET}}, {"servers": [{**SERVER, "bearer": f"env:{SECRET}"}]},
])
def test_no_problem_repeats_what_may_be_a_secret(raw: dict[str, Any]) -> None:
    from lbio.configuration.summary import problems_object  # noqa: PLC0415

    with pytest.raises(ConfigError) as caught:
        parse({"servers": [SERVER], **raw})
    assert SECRET not in str(caught.value)
    assert SECRET not in json.dumps(problems_object(caught.value.problems), default=str)


def secrets_of(environ: dict[str, str] | None = None, **raw: Any) -> Secrets:
    return read_secrets(parse({"servers": [SERVER], **raw}), environ or {})


def test_without_keys_there_is_no_ring() -> None:
    assert secrets_of() == Secrets()


def test_keys_from_everywhere(tmp_path: Path) -> None:
    other, third, path = new_token(), new_token(), tmp_path / "key"
    path.write_text(f"{third}\n", encoding="utf-8")
    path.chmod(0o600)
    read = secrets_of({"B_KEY": f" {other}\n"}, keys=[
        {"name": "a", "hash": HASH, "models": ["x"], "allow": ["manage"]}, {"name": "b", "env": "B_KEY", "requests_per_minute": 5}, {"name": "c", "file": str(path)}])
    assert read.keyring is not None
    assert read.warnings == ()
    found = [read.keyring.find(token.encode()) for token in (TOKEN, other, third)]
    assert [each.name for each in found if each is not None] == ["a", "b", "c"]
    first, second, _ = found
    assert first is not None
    assert second is not None
    assert (first.rights, first.models.may("y"), first.bucket) == (frozenset({MANAGE}), False, None)
    assert second.bucket is not None
    assert second.bucket.per_minute == 5


def test_files_are_looked_for_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(TOKEN, encoding="utf-8")
    app = parse({"servers": [{**SERVER, "bearer": "file:key"}], "keys": [{"name": "a", "file": "key"}]}, base=tmp_path)
    read = read_secrets(app, {})
    assert read.keyring is not None
    assert read.keyring.find(TOKEN.encode()) is not None
    assert read.upstream["http://gpu1:11434"].pairs == ((b"Authorization", f"Bearer {TOKEN}".encode()),)


def test_a_file_that_others_may_read_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(TOKEN, encoding="utf-8")
    path.chmod(0o640)
    assert secrets_of(keys=[{"name": "a", "file": str(path)}]).warnings == (f"keys[0].file: others may read {path}: chmod 600 {path}",)


def test_a_key_that_can_be_guessed_is_warned_of() -> None:
    assert secrets_of({"A": "hunter2"}, keys=[{"name": "a", "env": "A"}]).warnings == ("keys[0].env: is shorter than 16 characters, and so can be guessed",)


@pytest.mark.parametrize(("environ", "raw", "problem"), [
    ({}, {"keys": [{"name": "a", "env": "A_KEY"}]}, 'keys[0].env: "A_KEY" is not set; start ollama-lb with A_KEY in its environment'),
    ({"A": ""}, {"keys": [{"name": "a", "env": "A"}]}, "keys[0].env: is empty; write the secret and nothing else"),
    ({"A": "x\ny"}, {"keys": [{"name": "a", "env": "A"}]}, "keys[0].env: is not one line of plain text; write the secret and nothing else"),
    ({"A": "two words"}, {"keys": [{"name": "a", "env": "A"}]}, "keys[0].env: holds no key; `ollama-lb key new NAME` makes one"),
    ({"A": TOKEN}, {"keys": [{"name": "a", "env": "A"}, {"name": "b", "env": "A"}]}, "keys[1].env: is the key of keys[0] too; make another one"),
    ({}, {"keys": [{"name": "a", "file": "/nonexistent/key"}]}, 'keys[0].file: "/nonexistent/key" cannot be read: No such file or directory; name a file that holds it'),
    ({}, {"servers": [{**SERVER, "bearer": "env:GPU1"}]}, 'servers[0].bearer: "GPU1" is not set; start ollama-lb with GPU1 in its environment'),
    ({"G": "é"}, {"servers": [{**SERVER, "headers": {"X-A": "env:G"}}]}, "servers[0].headers.X-A: is not one line of plain text; write the secret and nothing else"),
])
def test_each_secret_that_is_not_there_has_its_message(environ: dict[str, str], raw: dict[str, Any], problem: str) -> None:
    with pytest.raises(SecretsError) as caught:
        secrets_of(environ, **raw)
    assert str(caught.value) == problem


@pytest.mark.parametrize(("own", "problem"), [
    ({"bearer": "Bearer x"}, 'servers[0].bearer: begins with "Bearer"; write what stands behind it'),
    ({"headers": {"a b": "x"}}, 'servers[0].headers.a b: is no name of a header; write it as in { "X-Api-Key" = "env:GPU1_KEY" }'),
    ({"headers": {"Host": "x"}}, "servers[0].headers.Host: is a header that is written here; remove it"),
    ({"headers": {"X-Ollama-LB-Server": "x"}}, "servers[0].headers.X-Ollama-LB-Server: is a header that is written here; remove it"),
    ({"bearer": "x", "headers": {"authorization": "y"}}, "servers[0].headers.authorization: is given twice; write it once; bearer writes Authorization"),
    ({"headers": {"X-A": "x", "x-a": "y"}}, "servers[0].headers.x-a: is given twice; write it once; bearer writes Authorization"),
    ({"headers": {"X-A": ""}}, "servers[0].headers.X-A: is empty; write a value, or remove it"),
])
def test_each_mistake_in_what_a_server_is_sent_has_its_message(own: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"servers": [{**SERVER, **own}]})
    assert str(caught.value) == problem


def test_what_a_server_is_sent_is_not_shown() -> None:
    app = parse({"servers": [{**SERVER, "bearer": SECRET, "headers": {"X-A": SECRET}}]})
    assert app.upstream == {"http://gpu1:11434": UpstreamSettings(bearer=SECRET, headers=(("X-A", SECRET),))}
    read = read_secrets(app, {})
    assert SECRET not in f"{app!r} {read!r} {app.core!r}"


def test_ours_stands_in_the_place_of_the_clients() -> None:
    own = read_secrets(parse({"servers": [{**SERVER, "bearer": "b", "headers": {"X-A": "a"}}]}), {}).upstream["http://gpu1:11434"]
    lines = b"\r\nAuthorization: Bearer theirs\r\nx-api-key: theirs\r\nX-a: theirs\r\nX-B: theirs\r\n\r\n"
    assert own.written_into(lines) == b"\r\nX-B: theirs\r\nAuthorization: Bearer b\r\nX-A: a\r\n\r\n"
    assert own.written_into(b"\r\n\r\n") == b"\r\nAuthorization: Bearer b\r\nX-A: a\r\n\r\n"
    assert Credentials().written_into(lines) == lines


def test_the_settings_of_the_core_have_no_secrets() -> None:
    app = parse({"servers": [{**SERVER, "bearer": SECRET}]})
    assert not hasattr(app.core.servers[0], "bearer")
    assert AppConfig().upstream == {}


def test_random_keys_are_found_among_many() -> None:
    rng = random.Random(7)
    found, tokens = ring(*(key(f"k{number}") for number in range(200)))
    for name in rng.sample(sorted(tokens), 20):
        seen = found.find(tokens[name].encode())
        assert seen is not None
        assert seen.name == name
