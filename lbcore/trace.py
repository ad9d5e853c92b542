"""The event log: every call of the core and what came of it, as JSON lines that can be replayed (pure; no file here).

    recorder = Recorder(balancer, write)        # stands in for the balancer; `write` gets whole lines
    for step in Replay(lines): ...              # the same calls made again, and whether the same came of them

`lbcore.comparison` goes through a whole log, `lbcore.explain` tells of one request.

A log is a header, the balancer's state at that moment (`lbcore.snapshot`), then a line for each call:

    [time since the line before, ns, event or null, commands, chunks before it]

An event or command is an array: its code, then its fields in their order. `null` is `handle_timeout`. Chunks are the
calls of `note_chunk` and `note_paused` since they were last written, summed: [attempt, bytes, tokens, ns since the last
of them, paused or null]. The core looks at them only for the attempts of the request that an event is about, or when
timers fire or servers change; so they are written before the first call that could look at them, and no sooner.

Never a prompt or an answer: what servers said is cut (`lbcore.redaction`), of their models the names are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from lbcore import __version__, snapshot
from lbcore.balancer import LoadBalancer
from lbcore.commands import Command
from lbcore.compiling import mypyc_attr
from lbcore.config import Config
from lbcore.errors import CoreError
from lbcore.events import Event
from lbcore.loglines import Chunks, Lines, Raised, dumps
from lbcore.placement import Placement
from lbcore.witness import Witness

FORMAT = 1
"""Of the log; raised when an older reader could not understand it."""

MARK = "ollama-lb-log"
"""The key of the format in the header, by which a log is known."""


class LogError(CoreError):
    """A log cannot be read; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(line, message)
        self.line = line
        self.message = message


# --- recording ---------------------------------------------------------------------------------------------


@mypyc_attr(allow_interpreted_subclasses=True)
class Recorder(Witness):
    """Stands in for a balancer, and writes down every call and what came of it.

    `started` gives the time of day for the header, as text. `write` must not raise; it may call `begin`, which starts
    a log anew: from there on it can be replayed by itself. A `handle_timeout` that has nothing to do is not written.
    """

    def __init__(
        self,
        balancer: LoadBalancer,
        write: Callable[[str], None],
        *,
        seed: int | None = None,
        started: Callable[[], str] = str,
    ) -> None:
        super().__init__(balancer)
        self._write = write
        self._seed = seed
        self._started = started
        self._now_ns = 0
        self._lines = Lines(0)
        self.begin()

    def begin(self) -> None:
        """Write the header and the state as it is: a log starts here. Raises SnapshotError."""
        state = snapshot.take(self.plain)
        self._pending.clear()  # the state has them
        self._lines = Lines(self._now_ns)
        header = {
            MARK: FORMAT,
            "program": __version__,
            "started": self._started(),
            "seed": self._seed,
            "now_ns": self._now_ns,
        }
        self._write(dumps(header) + "\n")
        self._write(dumps(state) + "\n")

    def note(self, event: Event | None, outcome: list[Command] | Raised, now_ns: int, chunks: Chunks) -> None:
        """Write a call."""
        self._now_ns = now_ns
        self._write(self._lines.line(event, outcome, now_ns, chunks))


# --- replaying ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One call that was made again."""

    line: int
    now_ns: int
    event: Event | None
    recorded: str  # the line as it stands in the log
    replayed: str  # the line as it would be written now
    n_commands: int
    n_chunks: int

    @property
    def same(self) -> bool:
        """Whether the same came of it, byte for byte."""
        return self.recorded == self.replayed


class Start(NamedTuple):
    """A balancer as it was before the first of some calls, and the time of the last one before them."""

    balancer: LoadBalancer
    now_ns: int


class Replay:
    """Makes the calls of a log again: iterate over its steps. Raises LogError for what cannot be read.

    `balancer` is the replayed core, in the state after the last step; `before` is called ahead of each call with the
    event, its time and the line, so that one can look at the state in which it found the core. `truncated` is the
    number of the last line if the log breaks off in it, as when the program was killed. With a `start` the lines are
    calls and nothing else; its balancer is the one that is replayed.
    """

    def __init__(
        self,
        lines: Iterable[str],
        *,
        before: Callable[[Event | None, int, str], None] | None = None,
        placement_type: Callable[[Config, Any, Random], Placement] = Placement,
        start: Start | None = None,
    ) -> None:
        self._before = before
        self._numbered = enumerate(lines, 1)
        self.truncated: int | None = None
        self.header = self._read_header() if start is None else {"now_ns": start.now_ns}
        self._now_ns: int = self.header["now_ns"]
        self.balancer = self._read_state(placement_type) if start is None else start.balancer

    def _read_header(self) -> dict[str, Any]:
        number, line = next(self._numbered, (1, ""))
        if not line.strip():
            raise LogError(number, "it is empty: there is no header")
        try:
            header = json.loads(line)
            found = header[MARK]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise LogError(number, "this is not the header of an event log of ollama-lb") from None
        if found != FORMAT:
            raise LogError(number, f"the log has format {found!r}; this version reads format {FORMAT}")
        if not isinstance(header.get("now_ns"), int):
            raise LogError(number, "the header lacks now_ns")
        return dict(header)

    def _read_state(self, placement_type: Callable[[Config, Any, Random], Placement]) -> LoadBalancer:
        number, line = next(self._numbered, (2, ""))
        if not line.endswith("\n"):
            raise LogError(number, "the log ends before the state of the balancer does: there is nothing to replay")
        try:
            return snapshot.load(json.loads(line), placement_type)
        except (ValueError, RecursionError):
            raise LogError(number, "the state of the balancer is not JSON") from None
        except snapshot.SnapshotError as error:
            written_by = self.header.get("program")
            raise LogError(
                number,
                f"the state of the balancer cannot be read: {error} "
                f"(written by version {written_by}, this is {__version__})",
            ) from None

    def __iter__(self) -> Iterator[Step]:
        reading, writing = Lines(self._now_ns), Lines(self._now_ns)
        for number, line in self._numbered:
            try:
                event, _, now_ns, chunks = reading.read(line)
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                if not line.endswith("\n"):
                    self.truncated = number
                    return
                raise LogError(number, f"this is no call of the core ({type(error).__name__}: {error})") from None
            if self._before is not None:
                self._before(event, now_ns, line)
            recorded = line if line.endswith("\n") else f"{line}\n"
            outcome = self._call(event, now_ns, chunks)
            replayed = writing.line(event, outcome, now_ns, chunks)
            n_commands = 0 if isinstance(outcome, str) else len(outcome)
            yield Step(number, now_ns, event, recorded, replayed, n_commands, len(chunks))

    def _call(self, event: Event | None, now_ns: int, chunks: Chunks) -> list[Command] | Raised:
        balancer = self.balancer
        try:
            for attempt_id, n_bytes, n_tokens, at_ns, paused in chunks:
                balancer.note_chunk(attempt_id, n_bytes, n_tokens, at_ns)
                if paused is not None:
                    balancer.note_paused(attempt_id, paused=paused, now_ns=at_ns)
            return balancer.handle_timeout(now_ns) if event is None else balancer.handle(event, now_ns)
        except Exception as error:  # noqa: BLE001  it may have come of it then, too
            return type(error).__name__
