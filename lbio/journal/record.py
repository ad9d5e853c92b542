"""The event log on disk (`[record]`): written by a thread, rotated, bounded; a failing disk never disturbs serving.

A file begins with the whole state, so each can be replayed by itself. When lines are lost, as on a full disk, what
follows could not be replayed; so nothing more is written then until a new file can be begun, and that is tried again
every `RETRY_S`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from lbcore.balancer import LoadBalancer
from lbcore.parsing import Problem
from lbcore.snapshot import SnapshotError
from lbcore.trace import Recorder
from lbio.configuration.settings import RecordSettings

_log = logging.getLogger("ollama_lb")


class RecordError(Exception):
    """Nothing can be recorded where the configuration says."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class Recording:
    """The log of one balancer: `begin`, then the recorder writes here; `close` at the end."""

    WAITING_MAX: Final = 32 << 20
    """Characters that may wait for the disk; if there are more, lines are lost."""
    RETRY_S: Final = 10.0
    """How long a disk that took nothing is left alone."""

    def __init__(self, settings: RecordSettings) -> None:
        self.n_lost = 0  # calls that were not recorded since the disk failed
        self._settings = settings
        self._recorder: Recorder | None = None
        self._thread: _Thread | None = None
        self._n_put = 0  # characters
        self._size = 0  # of the file, as far as it is known here
        self._size_max = settings.bytes_max
        self._beginning = False

    def begin(self, balancer: LoadBalancer, seed: int) -> LoadBalancer:
        """Return what stands in for the balancer from now on: itself if nothing is to be recorded.

        Raises RecordError when the file cannot be written.
        """
        if not self._settings.path:
            return balancer
        path = Path(self._settings.path).expanduser()
        files = _Files(path, self._settings.files)
        try:
            files.begin()
        except OSError as error:
            there = path.parent.is_dir()
            fix = "name a file in a directory that this user may write to" if there else f"mkdir -p {path.parent}"
            message = f"cannot be written: {error.strerror or error}"
            raise RecordError(Problem("record.path", self._settings.path, message, fix)) from None
        self._thread = _Thread(files)
        self._beginning = True
        try:
            self._recorder = Recorder(balancer, self.write, seed=seed, started=_time_of_day)
        except SnapshotError as error:  # a defect, but none of serving
            self._thread = None
            _log.warning("nothing is recorded: %s", error)
            return balancer
        self._begun()
        self._thread.start()
        return self._recorder

    def write(self, line: str) -> None:
        """Take one line of the log; never waits, never fails."""
        thread = self._thread
        if thread is None:
            return
        if self._beginning:
            self._put(thread, line)
        elif thread.broken:
            self.n_lost += 1
            if time.monotonic() >= thread.retry_s and self._n_put - thread.n_taken < self.WAITING_MAX // 2:
                self._begin_anew(thread)
        else:
            self._put(thread, line)
            if self._n_put - thread.n_taken > self.WAITING_MAX:
                thread.give_up("the disk is too slow")
            elif self._size >= self._size_max:
                self._begin_anew(thread)

    def _put(self, thread: _Thread, line: str) -> None:
        self._n_put += len(line)
        self._size += len(line)
        thread.put(line)

    def _begin_anew(self, thread: _Thread) -> None:
        """Begin a file that can be replayed by itself."""
        if self._recorder is None:
            return
        thread.begin(self.n_lost)
        self.n_lost = self._size = 0
        self._beginning = True
        try:
            self._recorder.begin()
        except SnapshotError as error:
            _log.warning("nothing is recorded any more: %s", error)
            self.close()
        self._begun()

    def _begun(self) -> None:
        self._beginning = False
        self._size_max = max(self._settings.bytes_max, 2 * self._size)  # or a large state would be all there is

    def close(self) -> None:
        """Write what waits, within a few seconds; harmless when nothing is recorded."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()
            if self.n_lost:
                _log.warning("%d calls were not recorded", self.n_lost)


def _time_of_day() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class _Files:
    """The file and those before it, which are called path.1, path.2 and so on."""

    def __init__(self, path: Path, n_files: int) -> None:
        self.path = path
        self._n_files = n_files
        self._fd = -1
        self._is_worth_keeping = True  # what is there at the start, and what was written since

    def begin(self) -> None:
        """Begin a new file, the one before it becomes path.1. Raises OSError."""
        self.close()
        if self._is_worth_keeping:
            self._rotate()
        self._is_worth_keeping = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NONBLOCK", 0)
        self._fd = os.open(self.path, flags, 0o600)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise OSError("it is no regular file")
        if hasattr(os, "fchmod"):
            os.fchmod(self._fd, 0o600)

    def _rotate(self) -> None:
        """Move each file on by one; the last is overwritten. A path that is no file is left for `open` to complain."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0 or self._n_files == 1:
            return
        names = [self.path, *(self.path.with_name(f"{self.path.name}.{i}") for i in range(1, self._n_files))]
        for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)

    def write(self, data: bytes) -> None:
        """Write all of it. Raises OSError."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._is_worth_keeping = True

    def close(self) -> None:
        """Close what is open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_NEW_FILE: Final = object()


class _Thread:
    """Writes lines to the files, in blocks.

    When the disk takes no more it is `broken`: what is still put is dropped up to the next `begin`.
    """

    PAUSE_S: Final = 0.1
    """How long lines wait for others, so that a block is written for all of them."""
    BLOCK: Final = 1 << 18
    CLOSE_S: Final = 3.0

    def __init__(self, files: _Files) -> None:
        self.broken = False
        self.retry_s = 0.0  # on the clock of `time.monotonic`
        self.n_taken = 0  # characters
        self._files = files
        self._waiting: deque[str | object] = deque()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._skipping = False  # what is met is of a file that could not be written
        self._has_warned = False
        self._n_lost = 0  # before the file that is begun
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    # --- called by the event loop -------------------------------------------------------------------------

    def put(self, line: str) -> None:
        """Take a line."""
        self._waiting.append(line)
        if not self._wake.is_set():
            self._wake.set()

    def begin(self, n_lost: int) -> None:
        """What is put from now on belongs to a new file; so many calls were lost before it."""
        self._n_lost += n_lost
        self._waiting.append(_NEW_FILE)
        self.broken = False

    def give_up(self, why: str) -> None:
        """Drop what follows, until a new file is begun; say so once, however often that fails."""
        self.retry_s = time.monotonic() + Recording.RETRY_S
        self.broken = True
        if not self._has_warned:
            self._has_warned = True
            _log.warning("nothing is recorded in %s: %s (tried again from time to time)", self._files.path, why)

    def stop(self) -> None:
        """Write what waits and end, if the disk lets us."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(self.CLOSE_S)

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait()
            self._stopping.wait(self.PAUSE_S)
            self._wake.clear()
            self._write_waiting()
        self._write_waiting()
        with contextlib.suppress(OSError):
            self._files.close()

    def _write_waiting(self) -> None:
        while self._waiting:
            try:
                if self._waiting[0] is _NEW_FILE:
                    self._waiting.popleft()
                    self._skipping = True  # unless it can be begun
                    self._files.begin()
                    self._skipping = False
                else:
                    self._write_block()
            except OSError as error:
                self._skipping = True
                self.give_up(error.strerror or str(error))

    def _write_block(self) -> None:
        """Write lines of one file."""
        block: list[str] = []
        size = 0
        while self._waiting and size < self.BLOCK and isinstance(line := self._waiting[0], str):
            block.append(line)
            size += len(line)
            self._waiting.popleft()
        self.n_taken += size
        if self._skipping:
            return
        self._files.write("".join(block).encode())
        if self._has_warned and not self.broken:
            self._has_warned = False
            _log.warning("recording again; %d calls were not recorded", self._n_lost)
            self._n_lost = 0
