"""The event log on disk: what was served can be replayed, files are bounded, and no disk disturbs serving."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import anyio
import pytest

from lbcore import events
from lbcore.balancer import LoadBalancer
from lbcore.comparison import Comparison, compare
from lbcore.config import Config, ServerSettings
from lbcore.ollama import default_routes
from lbcore.snapshot import SnapshotError
from lbio.configuration.settings import RecordSettings
from lbio.journal import record
from lbio.journal.record import RecordError, Recording
from tests.lbio.kit import balanced, chat_request, client, specs
from tests.playbook import MODEL, RaceSettings, arrival

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record._Thread, "PAUSE_S", 0.001)
    monkeypatch.setattr(Recording, "RETRY_S", 0.05)


def replayed(path: Path) -> Comparison:
    """Replay a file, which must be whole and the same."""
    with path.open(encoding="utf-8") as file:
        found = compare(file)
    assert found.difference is None
    assert found.truncated is None
    return found


def logs(path: Path) -> list[Path]:
    """Return the files of a log, the newest first."""
    return [p for p in (path, *(path.with_name(f"{path.name}.{i}") for i in range(1, 20))) if p.exists()]


# --- a whole balancer ------------------------------------------------------------------------------------------


async def test_what_was_served_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    fakes = specs("a", "b", "c")
    async with balanced(fakes, record={"path": str(path)}) as rig:
        async with anyio.create_task_group() as group:
            for i in range(30):
                group.start_soon(_chat, rig, i)
        async with client(rig) as leaving:
            await leaving.send(chat_request(messages=[{"role": "user", "content": "SECRET " * 50}]))
            await leaving.until(b'"done":false')
        await rig.ask("GET", "/status")
        await rig.ask("POST", "/sync_servers")
        await rig.ask("DELETE", "/servers/a")
    found = replayed(path)
    assert found.n_requests == 31
    assert found.header["started"].startswith("20")
    assert found.header["seed"] == 1
    assert found.calls["remove"] == 1
    text = path.read_text(encoding="utf-8")
    assert "SECRET" not in text
    assert "hello" not in text
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def _chat(rig: Any, i: int) -> None:
    answer = await rig.chat(stream=bool(i % 4))
    assert answer.status == 200


async def test_errors_of_servers_are_replayed_without_their_words(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    async with balanced(specs("a", "b"), record={"path": str(path)}) as rig:
        answer = await rig.ask("POST", "/api/chat", {"model": "tiny", "messages": "SECRET", "stream": True})
        assert answer.status >= 400
        assert (await rig.ask("POST", "/api/chat", {"model": "unknown", "messages": []})).status == 404
    assert replayed(path).n_requests == 2
    assert "SECRET" not in path.read_text(encoding="utf-8")


# --- files -----------------------------------------------------------------------------------------------------


class Driven:
    """A balancer that is recorded, and clients of it."""

    def __init__(self, settings: RecordSettings, *, seed: int = 3) -> None:
        self.recording = Recording(settings)
        servers = tuple(ServerSettings(url=f"http://{name}:1", name=name, in_flight_max=100) for name in "abc")
        config = Config(servers=servers, routes=default_routes(RaceSettings()))
        self.plain = LoadBalancer(config, Random(seed))
        self.balancer = self.recording.begin(self.plain, seed)
        self.now_ns = 1_000_000
        self.n_requests = 0
        self.balancer.handle_timeout(self.now_ns)
        for server in list(self.balancer.fleet):
            listed = (events.ModelInfo(MODEL, "d", "2026-01-01T00:00:00Z", "{}"),)
            self.balancer.handle(events.ProbeCompleted(server.id, server.probe_id, version="1"), self.now_ns)
            self.balancer.handle(events.ModelsSynced(server.id, server.last_probe_id, listed), self.now_ns)

    def serve(self, n: int) -> None:
        """Serve so many requests, from the first byte to the last; a few stay under way."""
        for _ in range(n):
            self.now_ns += 1_000_000
            self.n_requests += 1
            self.balancer.handle(arrival(self.n_requests, MODEL), self.now_ns)
            for attempt in list(self.balancer.ledger.attempts.values())[:-3]:
                for kind in (events.AttemptConnected, events.FirstTokenReceived, events.StreamEnded):
                    if kind is events.FirstTokenReceived:
                        self.balancer.handle(events.HeadReceived(attempt.id, 200), self.now_ns)
                    self.balancer.note_chunk(attempt.id, 100, 1, self.now_ns)
                    self.balancer.handle(kind(attempt.id), self.now_ns)

    def close(self) -> None:
        self.recording.close()


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[Callable[..., Driven]]:
    made: list[Driven] = []

    def make(**settings: Any) -> Driven:
        made.append(Driven(RecordSettings(**{"path": str(tmp_path / "log"), **settings})))
        return made[-1]

    yield make
    for it in made:
        it.close()


def test_nothing_is_recorded_unless_asked_for(driven: Callable[..., Driven], tmp_path: Path) -> None:
    it = driven(path="")
    assert it.balancer is it.plain
    it.close()
    assert list(tmp_path.iterdir()) == []


def test_files_are_rotated_and_each_can_be_replayed(driven: Callable[..., Driven], tmp_path: Path) -> None:
    it = driven(bytes_max=100_000, files=3)
    for _ in range(50):
        it.serve(20)
        time.sleep(0.002)
    it.close()
    kept = logs(tmp_path / "log")
    assert len(kept) == 3
    assert len(list(tmp_path.iterdir())) == 3
    assert all(100_000 <= path.stat().st_size < 110_000 for path in kept[1:])
    assert [replayed(path).n_requests > 20 for path in kept[1:]] == [True, True]
    replayed(kept[0])
    assert it.recording.n_lost == 0
    newest_first = [replayed(path).header["now_ns"] for path in kept]
    assert newest_first == sorted(newest_first, reverse=True)


def test_one_file_alone_is_begun_anew(driven: Callable[..., Driven], tmp_path: Path) -> None:
    it = driven(bytes_max=100_000, files=1)
    it.serve(500)
    it.close()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    replayed(tmp_path / "log")


def test_a_small_limit_is_no_reason_to_write_nothing_but_states(driven: Callable[..., Driven], tmp_path: Path) -> None:
    it = driven(bytes_max=1, files=3)
    it.serve(300)
    it.close()
    assert all(replayed(path).n_calls > 50 for path in logs(tmp_path / "log")[1:])


def test_the_log_of_the_run_before_is_kept(driven: Callable[..., Driven], tmp_path: Path) -> None:
    for _ in range(6):
        it = driven()
        it.serve(5)
        it.close()
    assert [replayed(path).n_requests for path in logs(tmp_path / "log")] == [5, 5, 5, 5]


def test_what_waits_is_written_soon(driven: Callable[..., Driven], tmp_path: Path) -> None:
    it = driven()
    it.serve(5)
    _until(lambda: (tmp_path / "log").read_text(encoding="utf-8").count('"arrived"') == 5)


def _until(holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < until_s, "it never came to that"
        time.sleep(0.002)


# --- disks -----------------------------------------------------------------------------------------------------


class Disk:
    """Stands between the log and the disk: full, or hanging, for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: int | None = None
        self.moves = threading.Event()
        self.moves.set()
        self._write, self._open = os.write, os.open
        monkeypatch.setattr("lbio.journal.record.os.write", self._writes)
        monkeypatch.setattr("lbio.journal.record.os.open", self._opens)

    def _fail(self) -> None:
        self.moves.wait()
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))

    def _writes(self, fd: int, data: Any) -> int:
        self._fail()
        return self._write(fd, data)

    def _opens(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if self.error not in {None, errno.ENOSPC}:
            self._fail()
        return self._open(path, flags, mode)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EISDIR])
def test_a_disk_that_fails_is_told_of_once_and_served_on(
    driven: Callable[..., Driven], disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    it = driven()
    it.serve(20)
    _until(lambda: replayed_calls(tmp_path / "log") > 20)
    disk.error = error
    it.serve(5)
    _until(lambda: bool(caplog.records))
    for _ in range(40):  # it is tried again in the meantime
        it.serve(1)
        time.sleep(0.005)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert os.strerror(error) in caplog.messages[0]
    assert str(tmp_path / "log") in caplog.messages[0]
    assert it.balancer.ledger.requests, "it serves on"
    disk.error = None

    def goes_on() -> bool:
        it.serve(1)
        return any("recording again" in message for message in caplog.messages)

    _until(goes_on)
    it.serve(30)
    it.close()
    newest, before, *older = logs(tmp_path / "log")
    assert older == [], "what was tried in vain is not kept"
    assert replayed(newest).n_requests >= 30
    with before.open(encoding="utf-8") as file:
        assert compare(file).n_calls > 20
    assert len(caplog.messages) == 2
    n_lost = int(caplog.messages[1].split("; ")[1].split()[0])
    assert n_lost > 40


def replayed_calls(path: Path) -> int:
    """Return how many calls are written so far."""
    return len(path.read_text(encoding="utf-8").splitlines()) - 2


def test_a_disk_that_hangs_costs_neither_time_nor_memory(
    driven: Callable[..., Driven], disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Recording, "WAITING_MAX", 200_000)
    monkeypatch.setattr(record._Thread, "CLOSE_S", 0.2)
    it = driven(bytes_max=50_000)
    disk.moves.clear()
    began_s = time.monotonic()
    it.serve(2000)
    assert time.monotonic() - began_s < 5
    thread = it.recording._thread
    assert thread is not None
    assert sum(len(line) for line in thread._waiting if isinstance(line, str)) < 300_000
    assert [m for m in caplog.messages if "too slow" in m]
    assert it.recording.n_lost > 100
    disk.moves.set()

    def goes_on() -> bool:
        it.serve(1)
        return any("recording again" in message for message in caplog.messages)

    _until(goes_on)
    it.serve(10)
    it.close()
    assert len(caplog.messages) == 2
    for path in logs(tmp_path / "log"):
        replayed(path)


def test_the_end_does_not_wait_for_a_disk_that_hangs(
    driven: Callable[..., Driven], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record._Thread, "CLOSE_S", 0.1)
    it = driven()
    disk.moves.clear()
    it.serve(10)
    began_s = time.monotonic()
    it.close()
    assert time.monotonic() - began_s < 2
    disk.moves.set()


def test_a_state_that_cannot_be_written_ends_the_recording_and_nothing_else(
    driven: Callable[..., Driven], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    it = driven(bytes_max=60_000)
    it.serve(5)
    it.balancer.fleet.stats["stranger"] = object()  # type: ignore[assignment]
    it.serve(500)
    assert [m for m in caplog.messages if m.startswith("nothing is recorded any more: a builtins.object")]
    assert len(caplog.messages) == 1
    replayed(logs(tmp_path / "log")[-1])


def test_a_state_that_cannot_be_written_at_the_start(
    driven: Callable[..., Driven], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise SnapshotError("no")

    monkeypatch.setattr("lbcore.snapshot.take", refuse)
    it = driven()
    assert it.balancer is it.plain
    assert caplog.messages == ["nothing is recorded: no"]


@pytest.mark.parametrize("what", ["directory", "missing", "fifo", "file below a file", "long"])
def test_where_nothing_can_be_written(driven: Callable[..., Driven], tmp_path: Path, what: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    if what == "fifo":
        os.mkfifo(tmp_path / "fifo")
    path = {"missing": "no/log", "file below a file": "file/log", "long": "x" * 300}.get(what, what)
    with pytest.raises(RecordError, match=r'record\.path: ".*" cannot be written: ') as raised:
        driven(path=str(tmp_path / path))
    assert raised.value.problem.key == "record.path"


CONFIG = 'listen = "127.0.0.1:{port}"\n[[servers]]\nurl = "http://127.0.0.1:9"\n[record]\npath = "{path}"\n'


def test_run_ends_with_2_where_nothing_can_be_written(tmp_path: Path) -> None:
    config = tmp_path / "my.toml"
    config.write_text(CONFIG.format(port=0, path=tmp_path))
    command = [sys.executable, "-m", "lbio", "run", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert f'record.path: "{tmp_path}" cannot be written: Is a directory' in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_costs_no_log(tmp_path: Path) -> None:
    """A program that is started over and over in vain must not rotate away what is worth keeping."""
    log = tmp_path / "log"
    log.write_text("kept")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = tmp_path / "my.toml"
        config.write_text(CONFIG.format(port=taken.getsockname()[1], path=log))
        command = [sys.executable, "-m", "lbio", "run", str(config)]
        assert subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 1
    assert log.read_text() == "kept"
