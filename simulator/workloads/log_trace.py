"""Our own event logs as traces: who asked for what, when, and how long the answers were.

A log has no lengths of prompts, so they count as one token; `ollama-lb what-if` infers from the times of a log what
they cost. Only requests whose answer came to its end are rows, and those whose client left, with the moment it did: of
any other nobody knows how long the answer would have been.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lbcore.commands import CommitAttempt, Decision, RecordDecision
from lbcore.events import RequestArrived
from lbcore.loglines import COMMAND_CODES, EVENT_CODES
from lbcore.trace import MARK
from simulator.workloads.trace_rows import BadLineError, Parse, Row

_ARRIVED = EVENT_CODES[RequestArrived]
_COMMIT = COMMAND_CODES[CommitAttempt]
_DECISION = COMMAND_CODES[RecordDecision]


@dataclass(slots=True)
class _Open:
    """A request that has not ended yet."""

    at_ns: int
    row: Row
    attempt: int = 0  # the committed one


class _Log:
    """Reads call after call (`lbcore.loglines`), and keeps what is open."""

    def __init__(self, now_ns: int) -> None:
        self._now_ns = now_ns
        self._open: dict[int, _Open] = {}
        self._tokens: dict[int, int] = {}  # by attempt

    def parse(self, line: str) -> Row | None:
        """Return the row of the request that ends with this call, if one does."""
        try:
            return self._call(*json.loads(line))
        except (ValueError, TypeError, LookupError, RecursionError):
            if line.startswith("{"):
                return None  # the state at the beginning, or the header of a log that begins anew
            raise BadLineError("", "is no call of the core") from None

    def _call(self, delta_ns: int, event: Any, commands: Any, chunks: Any = ()) -> Row | None:
        self._now_ns += delta_ns
        for attempt, _, tokens, *_ in chunks:
            self._tokens[attempt] = self._tokens.get(attempt, 0) + tokens
        if event is not None and event[0] == _ARRIVED:
            _, request, route, model, kind, stream, generates, key, _ = event
            if generates and kind == "generate" and model is not None:
                num_ctx = json.loads(key).get("num_ctx") if key else None
                row = Row(self._now_ns, 1, 1, model, route=route, stream=stream, num_ctx=num_ctx)
                self._open[request] = _Open(self._now_ns, row)
        ended = None
        for command in commands if isinstance(commands, list) else ():
            if command[0] == _COMMIT and command[1] in self._open:
                self._open[command[1]].attempt = command[2]
            elif command[0] == _DECISION and command[1] in _ENDS and command[2] in self._open:
                ended = self._end(self._open.pop(command[2]), Decision(command[1]))
        return ended

    def _end(self, request: _Open, decision: Decision) -> Row | None:
        tokens = self._tokens.pop(request.attempt, 0)
        if decision is Decision.FINISHED and tokens:
            return request.row._replace(output_tokens=tokens)
        if decision is Decision.ABORTED:
            left_ns = self._now_ns - request.at_ns
            return request.row._replace(output_tokens=tokens + 1, leaves_after_ns=left_ns)
        return None


_ENDS = frozenset({Decision.FINISHED, Decision.FAILED, Decision.REJECTED, Decision.ABORTED})


def event_log(header: str) -> Parse:
    """Return what reads the lines of a log after its header."""
    try:
        now_ns = json.loads(header)["now_ns"]
    except (ValueError, TypeError, LookupError):
        raise BadLineError("", "is no header of an event log") from None
    return _Log(now_ns).parse


def is_event_log(line: str) -> bool:
    """Tell whether a line is the header of an event log."""
    return line.startswith(f'{{"{MARK}"')
