"""How it ends: streams finish, or are cut honestly; the process exits as its signals ask."""

import contextlib
import dataclasses
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import anyio
import pytest

from lbio.configuration.settings import AppConfig
from lbio.service import _drain, start
from simulator.serve import serve_fleet
from tests.lbio.kit import LIMIT_S, PROBES, balanced, before, chat_request, client, first_probes, scripted, specs
from tests.lbio.sockets_kit import free_port, until
from tests.simulator.wire import ask, chat, connect, parse, receive_all, request

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def stream_through_shutdown(*, token_ms: float, drain: str) -> bytes:
    """Ask, shut down after the first token, and return all that the client gets."""
    got = bytearray()
    begun = anyio.Event()

    async def ask_and_read(url: str) -> None:
        async with await connect(url) as stream:
            await stream.send(chat_request(close=False))
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    got.extend(await stream.receive())
                    if b'"done":false' in got:
                        begun.set()

    fakes = specs("a", token_ms=token_ms, tokens=10)
    with anyio.fail_after(LIMIT_S):
        async with serve_fleet(fakes) as (fake,), anyio.create_task_group() as tasks:  # noqa: SIM117
            async with before([{"url": fake.url, "name": "a"}], drain_timeout=drain) as service:
                tasks.start_soon(ask_and_read, service.url)
                await begun.wait()
    return bytes(got)


@pytest.mark.anyio
async def test_how_many_requests_are_waited_for_and_cut_is_told_in_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        await stream_through_shutdown(token_ms=500, drain="50ms")
    assert [message for message in caplog.messages if message.startswith("shutting down")] == [
        "shutting down: waiting up to 0.05 s for 1 request", "shutting down: cutting 1 request"]


@pytest.mark.anyio
async def test_a_connection_that_streams_at_the_drain_is_closed_after_its_answer() -> None:
    async with balanced(specs("a", token_ms=10)) as rig, client(rig) as asking:
        await asking.send(chat_request(close=False))
        await asking.until(b'"done":false')
        rig.service.front.drain()
        with anyio.fail_after(2):
            assert (await asking.rest()).endswith(b"0\r\n\r\n")


@pytest.mark.anyio
async def test_a_stream_finishes_within_the_drain_timeout() -> None:
    answer = parse(await stream_through_shutdown(token_ms=10, drain="5s"))
    assert answer.complete
    assert answer.lines[-1]["done"] is True


@pytest.mark.anyio
async def test_a_stream_that_takes_longer_is_cut_with_an_error_line() -> None:
    answer = parse(await stream_through_shutdown(token_ms=1000, drain="50ms"))
    assert answer.complete
    assert list(answer.lines[-1]) == ["error"]


@pytest.mark.anyio
async def test_who_has_no_answer_yet_gets_an_error_when_it_is_cut() -> None:
    got = b""
    with anyio.fail_after(LIMIT_S):
        async with scripted(drain_timeout="30ms") as (rig, (server,)):
            server.pieces, server.pause_s = [b"HTTP/1.1 200 OK\r\n"], 30
            stream = await connect(rig.url)
            await stream.send(chat_request())
            await until(lambda: len(server.heads) == 1)
            async with anyio.create_task_group() as tasks:

                async def rest() -> None:
                    nonlocal got
                    got = await receive_all(stream)

                tasks.start_soon(rest)
                await _drain(rig.service.front, rig.service.app.drain_timeout_ns)
            await stream.aclose()
    answer = parse(got)
    assert answer.status in {502, 503}
    assert json.loads(answer.body)["error"]


@pytest.mark.anyio
@pytest.mark.parametrize("n_sent", [10, 100], ids=["inside the head", "inside the body"])
async def test_a_request_that_is_being_sent_is_waited_for(n_sent: int) -> None:
    raw = chat_request(close=False)
    async with balanced(specs("a"), drain_timeout="5s") as rig, client(rig) as sending:
        await sending.send(raw[:n_sent])
        await until(lambda: rig.service.front.n_busy == 1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_drain, rig.service.front, rig.service.app.drain_timeout_ns)
            await anyio.sleep(0.05)
            await sending.send(raw[n_sent:])
            answer = parse(await sending.rest())
        assert answer.complete
        assert answer.lines[-1]["done"] is True
        assert rig.service.front.n_busy == 0


@pytest.mark.anyio
async def test_a_request_that_is_never_sent_whole_is_waited_for_until_the_drain_timeout() -> None:
    async with balanced(specs("a")) as rig, client(rig) as sending:
        await sending.send(chat_request()[:100])
        await until(lambda: rig.service.front.n_busy == 1)
        begun = anyio.current_time()
        await _drain(rig.service.front, 100_000_000)
        assert 0.09 < anyio.current_time() - begun < 0.5


@pytest.mark.anyio
async def test_idle_connections_are_closed_at_once() -> None:
    async with balanced(specs("a"), drain_timeout="5s") as rig, client(rig) as idle:
        await idle.send(request("GET", "/", close=False))
        await idle.until(b"running")
        rig.service.front.drain()
        begun = anyio.current_time()
        assert await idle.rest() == b""
        assert anyio.current_time() - begun < 0.5


@pytest.mark.anyio
async def test_nothing_is_left_open_after_the_end() -> None:
    async with balanced(specs("a")) as rig:
        await rig.chat()
        service = rig.service
        assert not service.driver._exchanges
        assert not service.driver._runs
        assert not service.driver._probes
        await until(lambda: not service.front.connections)


@pytest.mark.anyio
async def test_a_fleet_that_cannot_be_reached_does_not_keep_it_from_starting() -> None:
    async with before([{"url": f"http://127.0.0.1:{free_port()}", "name": "gone"}], warm=False) as service:
        assert (await ask(service.url, "GET", "/")).body == b"Ollama is running"
        await first_probes(service)
        assert (await ask(service.url, "POST", "/api/chat", chat())).status == 502
        assert (await ask(service.url, "GET", "/api/tags")).status == 502


@pytest.mark.anyio
async def test_a_busy_port_is_an_oserror_that_names_it() -> None:
    async with balanced(specs("a")) as rig:
        address = rig.url.removeprefix("http://")
        with pytest.raises(OSError, match=address.partition(":")[2]):
            async with start(_on(rig.service.app, address)):
                pass


def _on(app: AppConfig, address: str) -> AppConfig:
    return dataclasses.replace(app, listen=address)


# --- the process -----------------------------------------------------------------------------------------------


def running(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lbio.cli", "run", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def greeted(process: subprocess.Popen[str]) -> str:
    """Wait for the greeting; the address in it."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("ollama-lb listens on http://"), line
    return line.split()[-1]


HANG_UP = [] if sys.platform == "win32" or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]


@POSIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, *HANG_UP])
def test_a_signal_ends_it_with_0(number: signal.Signals) -> None:
    with running("-l", "127.0.0.1:0", "-s", f"http://127.0.0.1:{free_port()}=gone") as process:
        url = greeted(process)
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
            assert answer.read() == b"Ollama is running"
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


@POSIX
def test_a_terminal_that_is_closed_does_not_end_what_was_started_with_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # children inherit it, as those of nohup do
    try:
        process = running("-l", "127.0.0.1:0", "-s", f"http://127.0.0.1:{free_port()}=gone")
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        url = greeted(process)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
            assert answer.read() == b"Ollama is running"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


class Hanging(http.server.BaseHTTPRequestHandler):
    """Answers probes, and a chat never."""

    def do_GET(self) -> None:
        body = PROBES[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.asked.set()  # type: ignore[attr-defined]
        self.rfile.read()  # until the balancer closes
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@POSIX
def test_a_second_signal_ends_it_at_once() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hanging) as server:
        server.asked = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with running("-l", "127.0.0.1:0", "-s", f"http://127.0.0.1:{server.server_port}=slow") as process:
            url = greeted(process)
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as asking:
                asking.sendall(chat_request())
                assert server.asked.wait(10)  # type: ignore[attr-defined]
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
                assert process.poll() is None
                begun = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=10) == 1
                assert time.monotonic() - begun < 1
        server.shutdown()


def test_a_busy_port_is_one_clear_line_and_1() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running("-l", f"127.0.0.1:{port}", "-s", "http://127.0.0.1:1=gone") as process:
            out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert out == ""
    (line,) = err.splitlines()
    assert str(port) in line
    assert "in use" in line
    assert "--listen" in line


def test_an_address_that_does_not_exist_is_one_clear_line_and_1() -> None:
    with running("-l", "no.such.host.invalid:80", "-s", "http://127.0.0.1:1=gone") as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    (line,) = err.splitlines()
    assert "cannot listen on no.such.host.invalid:80: " in line


def test_a_busy_port_of_a_fake_server_is_one_clear_line_and_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = tmp_path / "fleet.toml"
        path.write_text(f'[[fleet]]\nname = "a"\nport = {taken.getsockname()[1]}\n', encoding="utf-8")
        with running(str(path), "-l", "127.0.0.1:0") as process:
            out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    (line,) = err.splitlines()
    assert "in use" in line
    assert "--listen" not in line
