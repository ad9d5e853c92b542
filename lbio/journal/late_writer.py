"""A log handler that never keeps its caller waiting: records are formatted and written by a thread, a moment later."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections import deque
from typing import Any, Final


class LateWriter(logging.Handler):
    """Writes records to an unbuffered file in the order they came.

    Formatting and writing take longer than what they tell of, so they wait until that is likely to be over. And a file
    that takes nothing (a full pipe that nobody reads, a stopped terminal) stops only this thread: what is more than
    `records_max` by then is dropped, and a line says how much that was. `flush`, and with it the end of the program,
    waits for such a file `FLUSH_S` at most.
    """

    PAUSE_S: Final = 0.05
    FLUSH_S: Final = 1.0
    RETRY_S: Final = 0.05
    TOGETHER: Final = 32  # records formatted and written at once: the other threads wait that long

    def __init__(self, file: io.RawIOBase, records_max: int = 10_000) -> None:
        super().__init__()
        self._file = file
        self._records_max = records_max
        self._waiting: deque[Any] = deque()
        self._n_lost = 0
        self._busy = False
        self._wake = threading.Event()
        self._hurry = threading.Event()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def emit(self, record: Any) -> None:
        """Take one record, or whatever else the formatter knows, or drop it."""
        if len(self._waiting) >= self._records_max:
            self._n_lost += 1
            return
        self._waiting.append(record)
        if not self._wake.is_set():
            self._wake.set()

    def flush(self) -> None:
        """Wait until all is written, within `FLUSH_S`."""
        until_s = time.monotonic() + self.FLUSH_S
        self._hurry.set()
        while (self._waiting or self._busy) and time.monotonic() < until_s:
            time.sleep(0.001)
        self._hurry.clear()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._hurry.wait(self.PAUSE_S)
            self._wake.clear()
            while self._waiting:
                self._busy = True
                lines = [self._line(self._waiting.popleft()) for _ in range(min(len(self._waiting), self.TOGETHER))]
                if self._n_lost and not self._waiting:
                    lines.append(self._line(self._loss()))
                self._write(b"".join(lines))
            self._busy = False

    def _line(self, record: Any) -> bytes:
        try:
            text = self.format(record)
        except Exception as error:  # noqa: BLE001  one line less, and not all that follow it
            text = f"a line of the log could not be written: {type(error).__name__}"
        return f"{text}\n".encode(errors="backslashreplace")

    def _loss(self) -> logging.LogRecord:
        n_lost, self._n_lost = self._n_lost, 0
        words = f"{n_lost} lines of the log are missing before this one: they were not read in time"
        return logging.LogRecord("ollama_lb", logging.WARNING, __file__, 0, words, (), None)

    def _write(self, data: bytes) -> None:
        """Write all of it, however long that takes; a file that is broken takes nothing."""
        try:
            while data:
                n_written = self._file.write(data)
                if n_written is None:  # somebody has made the file non-blocking
                    time.sleep(self.RETRY_S)
                data = data[n_written or 0 :]
        except (OSError, ValueError):
            pass
