"""The log: a file that takes nothing holds up nobody, order is kept, and what is dropped is counted."""

import contextlib
import http.server
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbcore.commands import Decision, RecordDecision
from lbio.configuration.settings import LogSettings
from lbio.journal.late_writer import LateWriter
from lbio.journal.logs import Log
from tests.lbio.kit import PROBES, line

if sys.platform == "win32":
    pytest.skip("pipes of a bounded size", allow_module_level=True)

import fcntl

PIPE_BYTES = 4096


def small_pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reading, writing


def fill(writing: int) -> None:
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 1024)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"\n")
    os.set_blocking(writing, True)


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, __file__, 0, text, (), None)


class Collecting(io.RawIOBase):
    """Takes at most seven bytes at a time."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: object) -> int:
        assert isinstance(data, bytes)
        self.data += data[:7]
        return len(data[:7])


def test_records_are_written_in_order_and_whole() -> None:
    file = Collecting()
    writer = LateWriter(file)
    texts = [f"line {number} é \udcff" for number in range(100)]
    for text in texts:
        writer.handle(record(text))
    writer.flush()
    assert file.data.decode().splitlines() == [text.replace("\udcff", "\\udcff") for text in texts]


def test_a_record_that_cannot_be_formatted_costs_one_line() -> None:
    file = Collecting()
    writer = LateWriter(file)
    writer.handle(logging.LogRecord("test", logging.INFO, __file__, 0, "%d", ("no number",), None))
    writer.handle(record("next"))
    writer.flush()
    assert file.data == b"a line of the log could not be written: TypeError\nnext\n"


def test_a_full_pipe_holds_up_nobody_and_what_is_dropped_is_counted() -> None:
    reading, writing = small_pipe()
    fill(writing)
    with os.fdopen(writing, "wb", buffering=0) as file, os.fdopen(reading, "rb", buffering=0) as pipe:
        writer = LateWriter(file, records_max=20)
        writer.handle(record("first"))
        time.sleep(10 * LateWriter.PAUSE_S)  # the thread stands in its write now
        began = time.monotonic()
        for number in range(50):
            writer.handle(record(f"line {number}"))
        assert time.monotonic() - began < 0.5
        writer.flush()
        assert time.monotonic() - began < LateWriter.FLUSH_S + 0.5
        received = b""
        while b"missing" not in received:
            received += pipe.read(65536)
        lines = received.decode().strip("x\n").splitlines()
        assert lines[:-1] == ["first", *(f"line {number}" for number in range(20))]
        assert lines[-1].startswith("30 lines of the log are missing")
        writer.handle(record("again"))
        assert pipe.read(65536) == b"again\n"


def test_a_closed_pipe_is_no_reason_to_stop() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as file:
        writer = LateWriter(file)
        writer.handle(record("for nobody"))
        writer.flush()
        writer.handle(record("for nobody"))
        writer.flush()
        assert not writer._waiting


def test_a_file_that_would_block_is_tried_again() -> None:
    reading, writing = small_pipe()
    fill(writing)
    os.set_blocking(writing, False)
    with os.fdopen(writing, "wb", buffering=0) as file, os.fdopen(reading, "rb", buffering=0) as pipe:
        writer = LateWriter(file)
        writer.handle(record("patience"))
        time.sleep(2 * LateWriter.RETRY_S)
        received = b""
        while not received.endswith(b"patience\n"):
            received += pipe.read(65536)


# --- the process -----------------------------------------------------------------------------------------------


class Chatting(http.server.BaseHTTPRequestHandler):
    """A whole small Ollama."""

    def do_GET(self) -> None:
        self._answer(PROBES[self.path], "application/json")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(line("", done=True), "application/x-ndjson")

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def chatting() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Chatting) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def chat(url: str) -> bytes:
    body = b'{"model":"tiny","messages":[]}'
    with urllib.request.urlopen(f"{url}/api/generate", body, timeout=5) as answer:  # noqa: S310
        found: bytes = answer.read()
        return found


@contextlib.contextmanager
def running(server: str, stderr: int, where: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the balancer with its log in JSON on `stderr`; the process, and where it listens."""
    config = where / "my.toml"
    servers = f'[[servers]]\nurl = "{server}"\nname = "one"\n'
    config.write_text(f'listen = "127.0.0.1:0"\n[log]\nformat = "json"\n{servers}', encoding="utf-8")
    command = [sys.executable, "-m", "lbio.cli", "run", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().split()[-1]
        finally:
            process.kill()


def test_a_log_that_nobody_reads_stops_no_chat_and_no_end(tmp_path: Path) -> None:
    reading, writing = small_pipe()
    with chatting() as server, running(server, writing, tmp_path) as (process, url):
        for _ in range(60):  # several times what the pipe holds
            assert b'"done":true' in chat(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0
    os.close(reading)
    os.close(writing)


def test_the_last_decisions_are_written_before_the_end(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, chatting() as at, running(at, log.fileno(), tmp_path) as (run, url):
        for _ in range(3):
            chat(url)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=10) == 0
    lines = [json.loads(text) for text in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
    told = [found["decision"] for found in lines if "request" in found and found["decision"] != "queued"]
    assert told == ["started", "committed", "finished"] * 3
    moments = [found["time"] for found in lines]
    assert moments == sorted(moments)
    assert lines[-1]["message"] == "SIGTERM: shutting down"


def test_a_decision_is_told_by_any_handler(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ollama_lb"):
        Log(LogSettings()).decision(RecordDecision(Decision.SERVER_DIED, server="gpu1", why="it left"))
    assert [(found.levelname, found.getMessage()) for found in caplog.records] == [
        ("WARNING", "gpu1 is dead: it left")
    ]


def test_a_server_that_was_never_reached_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ollama_lb"):
        Log(LogSettings()).decision(RecordDecision(Decision.SERVER_UNREAD, server="gpu1", why="connection refused"))
    assert [(found.levelname, found.getMessage()) for found in caplog.records] == [
        ("WARNING", "gpu1 cannot be read: connection refused (probed again while it is in the fleet)")
    ]


def test_a_server_that_is_merely_slower_than_others_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ollama_lb"):
        Log(LogSettings()).decision(RecordDecision(Decision.DOUBTED, server="gpu1", why="4 races lost in a row"))
    assert [(found.levelname, found.getMessage()) for found in caplog.records] == [
        ("INFO", "gpu1 doubted: 4 races lost in a row")
    ]


def test_a_hedge_says_who_is_asked_beside_those_before(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ollama_lb"):
        Log(LogSettings()).decision(RecordDecision(Decision.HEDGED, names=("gpu2",), why="gpu1: connection refused"))
    assert [found.getMessage() for found in caplog.records] == ["gpu2 asked too: gpu1: connection refused"]
