"""Keys over real sockets: who gets in, what reaches which server, and that no secret is found anywhere afterwards."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import ollama
import pytest

from lbcore.config import ServerSettings
from lbcore.events import ServerAdded, ServerRemovalRequested
from lbcore.ollama import canonical_model
from lbio.access.credentials import read_secrets
from lbio.access.keys import new_hash, new_token
from lbio.config_file import parse
from simulator.fake_ollama import FakeModel
from tests.lbio.kit import LIMIT_S, TINY, Rig, Scripted, balanced, client, first_probes, scripted, specs
from tests.lbio.sockets_kit import free_port
from tests.lbio.test_gate import as_go_reads
from tests.simulator.wire import Answer, body_of, chat

pytestmark = pytest.mark.anyio

# ruff: noqa: E501  # requests and tables of values: one a line

TOKENS = {name: new_token() for name in ("user", "admin", "some", "slow", "deployer")}
KEYS: list[dict[str, Any]] = [
    {"name": "user", "hash": new_hash(TOKENS["user"])},
    {"name": "admin", "hash": new_hash(TOKENS["admin"]), "allow": ["use", "manage"]},
    {"name": "some", "hash": new_hash(TOKENS["some"]), "allow": ["use", "manage"], "models": ["tiny", "mine*"]},
    {"name": "slow", "hash": new_hash(TOKENS["slow"]), "requests_per_minute": 2},
    {"name": "deployer", "hash": new_hash(TOKENS["deployer"]), "allow": ["manage"]},
]
OTHER = FakeModel("other", size_bytes=1_000_000)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def raw(method: str, path: str, key: str | None, body: bytes = b"", *lines: str) -> bytes:
    sent = [f"Authorization: Bearer {TOKENS.get(key, key)}"] if key else []
    length = [f"Content-Length: {len(body)}"] if body else []
    head = "\r\n".join((f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *sent, *length, *lines, "", ""))
    return head.encode() + body


async def ask(rig: Rig, method: str, path: str, key: str | None, body: object = None, *lines: str) -> Answer:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return await rig.send(raw(method, path, key, data, *lines), method)


# --- who gets in -----------------------------------------------------------------------------------------------


async def test_every_path_needs_a_key_but_the_sign_of_life_and_preflights() -> None:
    async with balanced(specs("a"), keys=KEYS) as rig:
        for method, path in (("GET", "/api/tags"), ("POST", "/api/chat"), ("GET", "/status"), ("POST", "/sync_servers"), ("GET", "/x"), ("PUT", "/")):
            for key in (None, "olb_wrong"):
                answer = await ask(rig, method, path, key)
                assert answer.status == 401
                assert str(answer.header("WWW-Authenticate")).startswith("Bearer")
        assert (await ask(rig, "GET", "/", None)).body == b"Ollama is running"
        assert (await ask(rig, "HEAD", "/", None)).status == 200
        assert (await ask(rig, "OPTIONS", "/api/chat", None, None, "Origin: http://localhost:3000", "Access-Control-Request-Method: POST")).status == 204
        assert (await ask(rig, "POST", "/api/chat", None, None, "Origin: https://evil.example")).status == 403
        refused = await ask(rig, "GET", "/api/tags", None, None, "Origin: http://localhost:3000")
        assert (refused.status, refused.header("Access-Control-Allow-Origin")) == (401, "http://localhost:3000")


async def test_who_has_a_key_is_served() -> None:
    async with balanced(specs("a", "b"), keys=KEYS) as rig:
        answer = await ask(rig, "POST", "/api/chat", "user", chat())
        assert (answer.status, answer.lines[-1]["done"]) == (200, True)
        assert (await ask(rig, "GET", "/api/tags", "user")).status == 200
        assert (await ask(rig, "GET", "/api/tags", None, None, f"X-API-Key: {TOKENS['user']}")).status == 200


async def test_rights() -> None:
    async with balanced(specs("a"), keys=KEYS) as rig:
        pull = {"model": "x", "stream": False}
        assert (await ask(rig, "POST", "/api/pull", "user", pull)).status == 403
        assert (await ask(rig, "POST", "/api/pull", "admin", pull)).status == 200
        assert (await ask(rig, "POST", "/api/pull", "deployer", pull)).status == 200
        assert (await ask(rig, "POST", "/api/chat", "deployer", chat())).status == 403
        assert (await ask(rig, "GET", "/status", "user")).status == 403
        assert (await ask(rig, "GET", "/status", "admin")).status == 200


async def test_management_with_a_key_may_come_from_anywhere() -> None:
    async with balanced(specs("a"), keys=KEYS) as rig:
        far = ("X-Forwarded-For: 10.0.0.7",)
        assert (await ask(rig, "GET", "/status", "admin", None, *far)).status == 200
        assert (await ask(rig, "GET", "/status", None, None, *far)).status == 401
        assert (await ask(rig, "GET", "/status", "admin", None, "Origin: https://evil.example")).status == 403
    async with balanced(specs("a")) as rig:  # without keys, as ever
        assert (await ask(rig, "GET", "/status", None, None, *far)).status == 403
        assert (await ask(rig, "GET", "/status", None)).status == 200


async def test_requests_a_minute() -> None:
    async with balanced(specs("a"), keys=KEYS) as rig:
        answers = [await ask(rig, "GET", "/api/tags", "slow") for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert 1 <= int(answers[-1].header("Retry-After") or 0) <= 30
        assert (await ask(rig, "GET", "/api/tags", "user")).status == 200


async def test_models() -> None:
    async with balanced(specs("a", models=(TINY, OTHER)), keys=KEYS) as rig:
        assert (await ask(rig, "POST", "/api/chat", "some", chat())).status == 200
        for path in ("/api/chat", "/v1/chat/completions", "/v1/messages", "/api/show", "/api/embed", "/api/pull", "/v1/other"):
            answer = await ask(rig, "POST", path, "some", {"model": "other", "messages": [{"role": "user", "content": "x"}]})
            assert answer.status == 403, path
            assert b"other" in answer.body
        assert (await ask(rig, "GET", "/v1/models/other", "some")).status == 403
        assert (await ask(rig, "GET", "/v1/models/tiny", "some")).status == 200
        assert (await ask(rig, "POST", "/api/show", "user", {"model": "other"})).status == 200


@pytest.mark.parametrize("lines", [(), ("X-Ollama-LB-Server: a",)])
@pytest.mark.parametrize("strategy", ["aggregate", "sequential"])
async def test_lists_show_no_other_models(strategy: str, lines: tuple[str, ...]) -> None:
    routes = dict.fromkeys(("/api/tags", "/api/ps", "/v1/models"), strategy)
    fakes = specs("a", "b", models=(TINY, OTHER), start_loaded=("tiny", "other"))
    async with balanced(fakes, keys=KEYS, routes=routes) as rig:
        for path in routes:
            all_of_them = await ask(rig, "GET", path, "user", None, *lines)
            some = await ask(rig, "GET", path, "some", None, *lines)
            assert b"other" in all_of_them.body
            assert b"other" not in some.body
            assert b"tiny" in some.body
            assert dict(some.headers)["Content-Type"] == dict(all_of_them.headers)["Content-Type"]
            assert (await ask(rig, "GET", path, "some", None, "X-Ollama-LB-Server: nosuch")).status == 502


# --- before the body -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "path", "status"), [(None, "/api/chat", 401), ("user", "/api/pull", 403), (None, "/api/blobs/sha256:0", 401)])
async def test_a_refusal_does_not_wait_for_the_body(key: str | None, path: str, status: int) -> None:
    async with balanced(specs("a"), keys=KEYS) as rig, client(rig) as asking:
        sent = f"Authorization: Bearer {TOKENS[key]}\r\n" if key else ""
        await asking.send(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{sent}Content-Length: 50000000\r\n\r\n".encode())
        answer = await asking.until(b"\r\n\r\n")
        assert b" %d " % status in answer
        assert b"Connection: close" in answer
        assert rig.service.front.bodies.held == 0


async def test_who_sends_all_of_a_large_body_first_still_gets_the_refusal() -> None:
    async with balanced(specs("a"), keys=KEYS) as rig:
        body = b"x" * (20 << 20)

        def post() -> httpx.Response:
            return httpx.post(f"{rig.url}/api/chat", content=body, timeout=LIMIT_S)

        assert (await anyio.to_thread.run_sync(post)).status_code == 401


async def test_a_refusal_of_a_small_request_keeps_the_connection() -> None:
    async with balanced(specs("a"), keys=KEYS) as rig, client(rig) as asking:
        for _ in range(3):
            await asking.send(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
            assert b" 401 " in await asking.until(b'KEY"}')
        await asking.send(f"GET /api/version HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {TOKENS['user']}\r\n\r\n".encode())
        assert b" 200 " in await asking.until(b"\r\n\r\n")


async def test_a_key_is_for_one_request() -> None:
    async with balanced(specs("a"), keys=KEYS) as rig, client(rig) as asking:
        await asking.send(f"GET /api/version HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {TOKENS['user']}\r\n\r\nGET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert b" 200 " in await asking.until(b"\r\n\r\n")
        assert b" 401 " in await asking.until(b" 401 ")


# --- what reaches servers --------------------------------------------------------------------------------------


async def test_a_clients_key_reaches_no_server() -> None:
    async with scripted(2, keys=KEYS) as (rig, servers):
        await ask(rig, "POST", "/api/chat", "user", chat(), f"X-Api-Key: {TOKENS['admin']}")
        await ask(rig, "GET", "/api/me", "user")
    seen = b"".join(b"".join((*server.heads, *server.probes)) for server in servers).lower()
    assert seen
    assert b"olb_" not in seen
    assert b"authorization" not in seen
    assert b"x-api-key" not in seen


async def test_without_keys_what_clients_send_goes_on() -> None:
    async with scripted(1) as (rig, (server,)):
        await rig.send(raw("POST", "/api/chat", "theirs", json.dumps(chat()).encode(), "X-Api-Key: theirs"), "POST")
    assert b"Bearer theirs" in server.heads[0]
    assert b"theirs" in server.heads[0].lower().partition(b"x-api-key")[2]


async def asked_servers(story: Callable[[Rig], Any], **config: Any) -> list[Scripted]:
    """Tell a story with three servers, of which the first two are sent something of their own, and then probe all."""
    async with scripted(3, **config) as (rig, servers):
        driver = rig.service.driver
        tables: list[dict[str, Any]] = [{"url": server.url} for server in servers]
        tables[0] |= {"bearer": "secret-of-s0"}
        tables[1] |= {"headers": {"X-Api-Key": "secret-of-s1", "X-Gpu": "one"}}
        driver._upstream = read_secrets(parse({"servers": tables}), {}).upstream
        for server in list(driver.balancer.fleet):  # anew, with what they are sent
            driver.dispatch(ServerRemovalRequested(server.id))
            driver.dispatch(ServerAdded(ServerSettings(url=server.settings.url, name=server.name)))
        for scripted_server in servers:
            scripted_server.probes.clear()
        await first_probes(rig.service)
        await story(rig)
        return servers


@pytest.mark.parametrize("config", [{}, {"keys": KEYS}])
async def test_what_a_server_is_sent(config: dict[str, Any]) -> None:
    async def story(rig: Rig) -> None:
        for name in ("s0", "s1", "s2"):
            sent = ("X-Ollama-LB-Server: " + name, "X-Gpu: theirs")
            await ask(rig, "POST", "/api/chat", "user", chat(), *sent)

    s0, s1, s2 = await asked_servers(story, **config)
    for heads in (s0.heads, s0.probes):
        assert heads
        for head in heads:
            assert head.count(b"Bearer secret-of-s0") == 1
            assert b"olb_" not in head
            assert b"of-s1" not in head
    for heads in (s1.heads, s1.probes):
        assert heads
        for head in heads:
            assert head.lower().count(b"x-api-key: secret-of-s1") == head.lower().count(b"x-gpu: one") == 1
            assert b"theirs" not in head
            assert b"olb_" not in head
            assert b"of-s0" not in head
    assert b"X-Gpu: theirs" in s2.heads[0] or b"x-gpu: theirs" in s2.heads[0]
    assert (b"olb_" in s2.heads[0]) == (not config)
    assert not any(b"secret-of" in head for head in (*s2.heads, *s2.probes))


async def test_no_random_request_reaches_a_server_beyond_its_keys_rights() -> None:
    rng = random.Random(11)
    names = ["tiny", "mine:1b", "other", "library/other", "x-mine://registry.ollama.ai/library/other"]
    paths = ["/api/chat", "/v1/chat/completions", "/api/show", "/api/copy", "/api/pull", "/api/delete", "/api/tags", "/api/%74ags", "/v1/models/other", "/api/unknown", "/v1/x", "/api/%70ull", "/api/create"]
    async with scripted(1, keys=KEYS, timeouts={"silence": "200ms"}) as (rig, (server,)):
        server.pieces = [b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n{"done": true}   ']
        n_reached = 0
        for _ in range(250):
            key, method, path = rng.choice([*TOKENS, None, "olb_wrong"]), rng.choice(["GET", "POST", "POST", "DELETE", "PUT"]), rng.choice(paths)
            members = [(rng.choice(["model", "Model", "name", "source", "destination", "from"]), rng.choice([*names, None, ""])) for _ in range(rng.randint(0, 3))]
            body = ("{" + ",".join(f'"{member}":{json.dumps(value)}' for member, value in members) + "}").encode()
            server.heads.clear()
            server.bodies.clear()
            answer = await ask(rig, method, path, key, body)
            if not server.heads:
                continue
            n_reached += 1
            assert key in TOKENS, answer
            plain = path.replace("%74", "t").replace("%70", "p")
            if method in {"PUT", "DELETE"} or plain in {"/api/pull", "/api/copy", "/api/delete", "/api/create"}:
                assert key in {"admin", "some", "deployer"}
            elif plain != "/api/unknown" and not (plain == "/api/tags" and method == "POST"):  # to which it says 405
                assert key != "deployer"
            if key == "some":
                assert plain not in {"/api/tags", "/v1/models/other"}
                wanted = {"model"} if plain in {"/api/chat", "/v1/chat/completions"} else {"model", "name", "source", "destination", "from"}
                seen = {name for member, name in as_go_reads(server.bodies[-1]).items() if member in wanted and name}
                assert {canonical_model(name) for name in seen} <= {"tiny:latest", "mine:1b"}
        assert n_reached > 30


# --- clients ---------------------------------------------------------------------------------------------------


async def in_thread(story: Callable[[], Any]) -> Any:
    """Tell a story to a synchronous client; an exception is returned, and not wrapped in a group."""

    def tell() -> Any:
        try:
            return story()
        except Exception as error:  # noqa: BLE001
            return error

    with anyio.fail_after(30):
        return await anyio.to_thread.run_sync(tell)


async def test_the_ollama_client() -> None:
    async with balanced(specs("a", "b", models=(TINY, OTHER)), keys=KEYS) as rig:

        def story(key: str | None) -> Any:
            headers = {"Authorization": f"Bearer {TOKENS[key]}"} if key else {}
            with ollama.Client(host=rig.url, headers=headers) as asking:
                listed = [model.model for model in asking.list().models]
                return listed, asking.chat("tiny", [{"role": "user", "content": "hi"}]).done

        listed, done = await in_thread(lambda: story("some"))
        assert (listed, done) == (["tiny:latest"], True)
        error = await in_thread(lambda: story(None))
        assert isinstance(error, ollama.ResponseError)
        assert (error.status_code, error.error) == (401, "a key is needed: send the header Authorization: Bearer KEY")


async def test_the_openai_client() -> None:
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    async with balanced(specs("a", "b", models=(TINY, OTHER)), keys=KEYS) as rig:

        def story(key: str, model: str) -> Any:
            with openai.OpenAI(base_url=f"{rig.url}/v1", api_key=TOKENS.get(key, key), max_retries=0) as asking:
                models = [found.id for found in asking.models.list()]
                said = asking.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])
                return models, said.choices[0].message.content

        models, said = await in_thread(lambda: story("some", "tiny"))
        assert models == ["tiny:latest"]
        assert said
        assert isinstance(await in_thread(lambda: story("olb_wrong", "tiny")), openai.AuthenticationError)
        assert isinstance(await in_thread(lambda: story("some", "other")), openai.PermissionDeniedError)
        await in_thread(lambda: story("slow", "tiny"))
        assert isinstance(await in_thread(lambda: story("slow", "tiny")), openai.RateLimitError)


async def test_the_anthropic_client() -> None:
    anthropic = pytest.importorskip("anthropic", reason="the anthropic client is not installed")
    async with balanced(specs("a"), keys=KEYS) as rig:

        def story(key: str) -> Any:
            with anthropic.Anthropic(base_url=rig.url, api_key=TOKENS.get(key, key), max_retries=0) as asking:
                return asking.messages.create(model="tiny", max_tokens=9, messages=[{"role": "user", "content": "hi"}])

        assert (await in_thread(lambda: story("user"))).content
        assert isinstance(await in_thread(lambda: story("olb_wrong")), anthropic.AuthenticationError)


# --- no secret anywhere ----------------------------------------------------------------------------------------


def test_no_secret_is_found_in_logs_status_check_or_record(tmp_path: Path) -> None:
    tokens = [new_token() for _ in range(3)]
    own = ["upstream-secret-one", "upstream-secret-two", "upstream-secret-three"]
    unknown = "olb_unknownunknownunknown"
    (tmp_path / "c.key").write_text(tokens[2], encoding="utf-8")
    port = free_port()
    config = tmp_path / "my.toml"
    config.write_text(f"""
listen = "127.0.0.1:{port}"
[log]
level = "debug"
format = "json"
[record]
path = "{tmp_path}/events.jsonl"
[[keys]]
name = "a"
hash = "{new_hash(tokens[0])}"
allow = ["use", "manage"]
[[keys]]
name = "b"
env = "B_KEY"
[[keys]]
name = "c"
file = "c.key"
[[servers]]
url = "http://127.0.0.1:9"
name = "gpu1"
bearer = "{own[0]}"
headers = {{ "X-One" = "{own[1]}", "X-Two" = "env:UP" }}
""", encoding="utf-8")
    environ = {**os.environ, "B_KEY": tokens[1], "UP": own[2]}
    lb = [sys.executable, "-m", "lbio"]
    told: list[str] = []
    for more in ([], ["--json"]):
        done = subprocess.run([*lb, "check", str(config), *more], capture_output=True, text=True, env=environ, check=True, timeout=60)
        told += [done.stdout, done.stderr]
    broken = tmp_path / "broken.toml"
    broken.write_text(config.read_text("utf-8").replace("bearer =", "baerer =").replace("hash =", "hsah =").replace('"env:UP"', "7"), encoding="utf-8")
    for more in ([], ["--json"]):
        done = subprocess.run([*lb, "check", str(broken), *more], capture_output=True, text=True, env=environ, check=False, timeout=60)
        assert done.returncode == 2
        told += [done.stdout, done.stderr]
    lines: list[str] = []
    with subprocess.Popen([*lb, "run", str(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ) as process:
        assert process.stdout is not None
        while "listens on" not in (line := process.stdout.readline()):
            lines.append(line)
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
        reader.start()
        url = f"http://127.0.0.1:{port}"
        for token in (*tokens, unknown):
            for path in ("/api/chat", "/v1/chat/completions", "/v1/messages", "/api/show"):
                answer = httpx.post(url + path, json=chat(), headers={"Authorization": f"Bearer {token}"}, timeout=LIMIT_S)
                told += [answer.text, str(answer.headers)]
            for path, kind in (("/status", "*/*"), ("/status", "text/plain"), ("/api/tags", "*/*")):
                answer = httpx.get(url + path, headers={"X-Api-Key": token, "Accept": kind}, timeout=LIMIT_S)
                told += [answer.text, str(answer.headers)]
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        reader.join(10)
    log = "".join(lines)
    assert '"key":"a"' in log
    assert "127.0.0.1 got 40" in log
    record = (tmp_path / "events.jsonl").read_text("utf-8")
    assert "gpu1" in record
    everything = "\n".join((*told, log, record))
    for secret in (*tokens, *own, unknown):
        assert secret not in everything, secret
    assert "gpu1" in everything


def test_a_missing_secret_ends_the_start(tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    config.write_text('listen = "127.0.0.1:0"\n[[keys]]\nname = "a"\nenv = "NO_SUCH_KEY"\n[[servers]]\nurl = "http://127.0.0.1:9"\n', encoding="utf-8")
    for command in ("run", "check"):
        done = subprocess.run([sys.executable, "-m", "lbio", command, str(config)], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 2
        assert 'keys[0].env: "NO_SUCH_KEY" is not set; start ollama-lb with NO_SUCH_KEY in its environment' in done.stderr


async def test_a_body_of_status_is_untouched_by_keys() -> None:
    async with balanced(specs("a"), keys=KEYS) as rig:
        assert body_of(await ask(rig, "GET", "/status", "admin"))["servers"][0]["name"] == "a"
