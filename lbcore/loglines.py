"""One call of the core as one line of the event log, and back (pure; `lbcore.trace` says what a line holds).

Lines are written while clients wait, so what comes with every request has a writer of its own. All writers give what
`dumps` would.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring_ascii as quoted
from operator import attrgetter
from typing import Any, Final

from lbcore import commands, events
from lbcore.commands import AbortRequest, Command, RecordDecision, RejectRequest
from lbcore.config import ServerSettings
from lbcore.events import ActiveModel, Event, ModelInfo, Reason
from lbcore.ollama import RequestKind
from lbcore.redaction import cut_detail, cut_text

dumps: Final = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
"""Writes values of JSON as the log has them."""

EVENT_CODES: Final[Mapping[type, str]] = {
    events.RequestArrived: "arrived",
    events.DownstreamClosed: "closed",
    events.AttemptConnected: "connected",
    events.HeadReceived: "head",
    events.FirstTokenReceived: "token",
    events.BufferFilled: "full",
    events.StreamEnded: "ended",
    events.AttemptFailed: "failed",
    events.ProbeCompleted: "probed",
    events.ModelsSynced: "synced",
    events.JobProgressed: "job-goes-on",
    events.JobEnded: "job-ended",
    events.ServerAdded: "server",
    events.ServerRemovalRequested: "remove",
    events.SyncRequested: "sync",
    events.DrainDeadlinePassed: "drain",
}
COMMAND_CODES: Final[Mapping[type, str]] = {
    commands.StartAttempt: "start",
    commands.UseModel: "use",
    commands.CancelAttempt: "cancel",
    commands.CommitAttempt: "commit",
    commands.PassAnswer: "pass",
    commands.StartMerge: "merge",
    commands.EndMerge: "merged",
    commands.RejectRequest: "reject",
    commands.AbortRequest: "abort",
    commands.StartJob: "job",
    commands.CancelJob: "unjob",
    commands.StartProbe: "probe",
    commands.CancelProbe: "unprobe",
    commands.ForgetServer: "forget",
    commands.RecordDecision: "decision",
}
EVENT_OF: Final = {code: cls for cls, code in EVENT_CODES.items()}
COMMAND_OF: Final = {code: cls for cls, code in COMMAND_CODES.items()}

Chunks = Sequence[Sequence[Any]]
"""For each attempt: its id, bytes, tokens, the time of the last of them, paused or None."""

Raised = str
"""The name of the exception that came of a call, in the place of its commands."""


# --- one line ----------------------------------------------------------------------------------------------


def fields_of(cls: type) -> tuple[str, ...]:
    """Return the names of the fields of an event or command, in the order of a line."""
    return tuple(cls._fields) if hasattr(cls, "_fields") else tuple(f.name for f in dataclasses.fields(cls))


def _getter(cls: type) -> Callable[[Any], tuple[Any, ...]]:
    names = fields_of(cls)
    if not names:
        return lambda _: ()
    one = attrgetter(*names)
    return one if len(names) > 1 else lambda thing: (one(thing),)


_EVENT_FIELDS: Final = {cls: (code, _getter(cls)) for cls, code in EVENT_CODES.items()}
_COMMAND_FIELDS: Final = {cls: (code, _getter(cls)) for cls, code in COMMAND_CODES.items() if cls is not RecordDecision}


def as_array(command: Command) -> tuple[Any, ...]:
    """Return a command as the values of its array, without the words of servers."""
    if isinstance(command, RecordDecision):
        return ("decision", *command._replace(why=cut_text(command.why)))
    if isinstance(command, RejectRequest | AbortRequest):
        command = dataclasses.replace(command, message=cut_text(command.message))
    code, get = _COMMAND_FIELDS[type(command)]
    return (code, *get(command))


def _decision(command: RecordDecision) -> str:
    decision, request_id, server, why, before, after, took_ns, names = command
    why = quoted(cut_text(why) if ": " in why else why)
    listed = ",".join([quoted(name) for name in names]) if names else ""
    server, before, after = quoted(server), quoted(before), quoted(after)
    return f'["decision",{quoted(decision)},{request_id},{server},{why},{before},{after},{took_ns},[{listed}]]'


_COMMAND_WRITERS: Final[Mapping[type, Callable[[Any], str]]] = {
    **{cls: lambda command: dumps(as_array(command)) for cls in COMMAND_CODES},
    commands.StartAttempt: lambda c: f'["start",{c.request_id},{c.attempt_id},{c.server_id},{quoted(c.kind)}]',
    commands.CancelAttempt: lambda c: f'["cancel",{c.attempt_id},{quoted(c.reason)}]',
    commands.CommitAttempt: lambda c: f'["commit",{c.request_id},{c.attempt_id}]',
    RecordDecision: _decision,
}


def _of_attempt(code: str) -> Callable[[Any], str]:
    return lambda event: f'["{code}",{event.attempt_id}]'


_BOOL: Final = {True: "true", False: "false"}


def _arrived(event: events.RequestArrived) -> str:
    model = "null" if event.model is None else quoted(event.model)
    flags = f"{_BOOL[event.stream]},{_BOOL[event.generates]}"
    what = f"{quoted(event.route)},{model},{quoted(event.kind)},{flags},{quoted(event.runner_key)}"
    return f'["arrived",{event.request_id},{what},{dumps(event.servers) if event.servers else "[]"}]'


_EVENT_WRITERS: Final[Mapping[type, Callable[[Any], str]]] = {
    events.RequestArrived: _arrived,
    events.AttemptConnected: _of_attempt("connected"),
    events.HeadReceived: lambda event: f'["head",{event.attempt_id},{event.status}]',
    events.FirstTokenReceived: _of_attempt("token"),
    events.StreamEnded: _of_attempt("ended"),
}


class Lines:
    """Writes calls as lines and reads them; both depend on the lines before."""

    def __init__(self, now_ns: int) -> None:
        self._now_ns = now_ns
        self._listings: dict[int, tuple[list[str], list[str]]] = {}  # what each server was last seen to have

    def line(self, event: Event | None, outcome: list[Command] | Raised, now_ns: int, chunks: Chunks) -> str:
        """Return the line of a call."""
        delta_ns, self._now_ns = now_ns - self._now_ns, now_ns
        if event is None:
            told = "null"
        else:
            write = _EVENT_WRITERS.get(type(event))
            told = dumps(self._event(event)) if write is None else write(event)
        if isinstance(outcome, str):
            came = dumps(outcome)
        else:
            came = f"[{','.join([_COMMAND_WRITERS[type(c)](c) for c in outcome])}]" if outcome else "[]"
        if not chunks:
            return f"[{delta_ns},{told},{came}]\n"
        before = dumps([[*chunk[:3], now_ns - chunk[3], chunk[4]] for chunk in chunks])
        return f"[{delta_ns},{told},{came},{before}]\n"

    def _event(self, event: Event) -> tuple[Any, ...]:
        if isinstance(event, events.ModelsSynced):
            listing = [model.name for model in event.available], [model.name for model in event.active]
            known = self._listings.get(event.server_id) == listing
            self._listings[event.server_id] = listing
            return ("synced", event.server_id, event.probe_id, *(() if known else listing))
        if isinstance(event, events.ServerAdded):
            return ("server", dataclasses.asdict(event.settings))
        if isinstance(event, events.AttemptFailed | events.ProbeCompleted | events.JobEnded):
            event = dataclasses.replace(event, detail=cut_detail(event.reason, event.detail))
        code, get = _EVENT_FIELDS[type(event)]
        return (code, *get(event))

    def read(self, line: str) -> tuple[Event | None, Any, int, Chunks]:
        """Return what a line says: the event, what came of it, the time, the chunks before it."""
        delta_ns, told, came, *rest = json.loads(line)
        self._now_ns = now_ns = self._now_ns + delta_ns
        chunks = [
            [attempt_id, n_bytes, n_tokens, now_ns - ago, paused]
            for attempt_id, n_bytes, n_tokens, ago, paused in (rest[0] if rest else ())
        ]
        return None if told is None else self._read_event(*told), came, now_ns, chunks

    def _read_event(self, code: str, *fields: Any) -> Event:
        cls: Any = EVENT_OF[code]
        if cls is events.ModelsSynced:
            server_id, probe_id, *listing = fields
            available, active = listing or self._listings[server_id]
            self._listings[server_id] = available, active
            return events.ModelsSynced(
                server_id,
                probe_id,
                tuple([ModelInfo(name, "", "", "") for name in available]),
                tuple([ActiveModel(name, "") for name in active]),
            )
        if cls is events.ServerAdded:
            return events.ServerAdded(ServerSettings(**fields[0]))
        event: Event = cls(*fields)
        if isinstance(event, events.RequestArrived):
            return dataclasses.replace(event, kind=RequestKind(event.kind), servers=tuple(event.servers))
        if isinstance(event, events.AttemptFailed | events.ProbeCompleted | events.JobEnded):
            return event if event.reason is None else dataclasses.replace(event, reason=Reason(event.reason))
        return event
