"""Several progress streams of `/api/pull` or `/api/create`, one from each server, merged into one (pure).

What clients do with such a stream decides what the merged one says. The `ollama` CLI draws one bar per digest, whose
total is that of the digest's first line, and one spinner with the last status that came without a digest. So:

- *Layers.* The total of a digest is final from its first line on: what one server tells, times the number of servers.
  `completed` is the sum of the best that each server has told, so that it never falls, whoever begins anew or fails.
- *Stages* (statuses without a digest). A server is at the stage that it told last, and past all that it told before, as
  well as past all that another server told before one of these: "using existing layer" is told by some servers only and
  is waited for by none. A stage is told once every server that is still at work has reached it. Layers come between
  stages, so none is told before the layers of an earlier one are there. Only the very first status is told at once,
  since nothing comes before it.
- *The end* is told by `Progress.closing` alone. A stream may say `success` and go on: a create whose base model must be
  pulled says it after the pull.

A line leaves for every line that comes, at most; one that would say what the last one did is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

LINE_BYTES_MAX = 65_536
"""A longer line is none of Ollama's, and is ignored."""
LAYERS_MAX = 256
"""So many digests are followed. Lines of others only become their server's state."""
STAGES_MAX = 256
"""So many statuses are put in order. Others only become their server's state."""
TEXT_CHARS_MAX = 200
ERROR_CHARS_MAX = 300
_TOTAL_MAX = 2**53 - 1  # what JavaScript still counts exactly; Go's limit is higher

_Stage = tuple[str, int]
"""A status, and how many times its server has come to it: a create that pulls writes two manifests."""


@dataclass(slots=True)
class _Server:
    """How far one server is."""

    state: str = "waiting"
    done: bool = False
    failure: str = ""  # why it is done without success
    said_success: bool = False  # and nothing after it
    n_bytes: int = 0  # it has, of all layers that are followed
    told: dict[_Stage, None] = field(default_factory=dict)  # in its order
    reached: set[_Stage] = field(default_factory=set)

    @property
    def stage(self) -> _Stage | None:
        return next(reversed(self.told), None)


@dataclass(slots=True)
class _Layer:
    """How much of one digest is where."""

    total: int  # that one server needs
    have: dict[str, int] = field(default_factory=dict)


class Progress:
    """The merge for one request that was sent to `servers`.

    `what` begins the closing words when not all have succeeded, such as "pull of llama3.2". Raises ValueError if there
    are no servers.
    """

    def __init__(self, servers: Sequence[str], what: str) -> None:
        if not servers:
            raise ValueError("no servers")
        self._what = _text(what, TEXT_CHARS_MAX)
        self._servers = {name: _Server() for name in servers}
        self._layers: dict[str, _Layer] = {}
        self._layers_bytes = 0  # that each server needs
        self._stages: set[_Stage] = set()
        self._shown: set[_Stage] = set()
        self._message: dict[str, str | int] = {}  # the last one, without the states of the servers
        self._line = b""

    def feed(self, server: str, line: bytes) -> bytes | None:
        """Take one line of a server, and return the merged line to send, if there is something new to say.

        Never raises, whatever the line; a server that was not named to the constructor is a KeyError.
        """
        teller = self._servers[server]
        told = _parse(line)
        if teller.done or told is None:
            return None
        if told.get("error"):
            return self.end(server, _text(told["error"], ERROR_CHARS_MAX))
        status, digest = _text(told.get("status"), TEXT_CHARS_MAX), _text(told.get("digest"), TEXT_CHARS_MAX)
        if not status and not digest:
            return None
        teller.said_success = status == "success" and not digest
        if teller.said_success:
            return None
        if digest:
            return self._say(self._layer(server, status, digest, told))
        teller.state = status
        self._reach(teller, status)
        return self._say(self._next_stage())

    def end(self, server: str, error: str | None) -> bytes | None:
        """Take note that a server's stream is over, and return the merged line to send, if any.

        `error` None: it came to its end, and has succeeded if the last that it said was `success`. What is known of a
        server that is done is not changed any more.
        """
        teller = self._servers[server]
        if teller.done:
            return None
        teller.done = True
        if error is not None:
            teller.failure = _text(error, ERROR_CHARS_MAX) or "no reason given"
        elif not teller.said_success:
            # some releases of Ollama say what went wrong in a status
            cause = teller.state.removeprefix("error: ")
            teller.failure = cause if cause != teller.state else "the answer ended without success"
        teller.state = f"failed: {teller.failure}" if teller.failure else "success"
        return self._say(self._next_stage())

    @property
    def ok(self) -> bool:
        """Whether all servers have succeeded."""
        return all(server.done and not server.failure for server in self._servers.values())

    def closing(self) -> bytes:
        """Return the last line of the merged stream. A server whose stream is not over has not succeeded."""
        return _encode({"status": "success"} if self.ok else {"error": self._error()}, self._states())

    # --- layers ------------------------------------------------------------------------------------------------------

    def _layer(self, name: str, status: str, digest: str, told: Mapping[str, Any]) -> dict[str, str | int]:
        """Take a line with a digest; return the message that says what is new, or nothing."""
        server = self._servers[name]
        total = min(_number(told.get("total")), _TOTAL_MAX // len(self._servers))
        layer = self._layers.get(digest)
        is_new = layer is None
        if layer is None:
            if not total or digest != told["digest"] or len(self._layers) >= LAYERS_MAX:
                server.state = status or server.state
                return {}
            layer = self._layers[digest] = _Layer(total)
            self._layers_bytes += total
        completed = _number(told.get("completed"))
        has_all = 0 < total <= completed  # by its own total, which should be that of the others
        gained = (layer.total if has_all else min(completed, layer.total)) - layer.have.get(name, 0)
        if gained > 0:
            layer.have[name] = layer.have.get(name, 0) + gained
            server.n_bytes += gained
        verb = status.partition(" ")[0] or "pulling"
        server.state = f"{verb} {100 * server.n_bytes // self._layers_bytes}%"
        if not is_new and gained <= 0:
            return {}
        message: dict[str, str | int] = {"status": status} if status else {}
        message |= {"digest": digest, "total": layer.total * len(self._servers)}
        if layer.have:  # Go leaves a zero out
            message["completed"] = sum(layer.have.values())
        return message

    # --- stages ------------------------------------------------------------------------------------------------------

    def _reach(self, server: _Server, status: str) -> None:
        """Take note of a status that a server has told, and of what it and others have thereby gone past."""
        if server.stage is not None and server.stage[0] == status:
            return
        stage = (status, 1 + sum(told == status for told, _ in server.told))
        if stage not in self._stages and len(self._stages) >= STAGES_MAX:
            return
        self._stages.add(stage)
        for other in self._servers.values():
            if stage in other.told:
                server.reached.update(_before(stage, other.told))
                other.reached.update(server.told)
        server.told[stage] = None
        server.reached.add(stage)

    def _next_stage(self) -> dict[str, str | int]:
        """Return the message of a stage that all servers at work have reached and that was not told yet, or nothing."""
        at_work = [server for server in self._servers.values() if not server.done]
        for stage in (server.stage for server in at_work):
            if stage is None or stage in self._shown:
                continue
            if not self._shown or all(stage in server.reached for server in at_work):
                self._shown.add(stage)
                return {"status": stage[0]}
        return {}

    # --- what is said ------------------------------------------------------------------------------------------------

    def _say(self, message: dict[str, str | int]) -> bytes | None:
        """Return the line of a message; without one that of the last message, if the state of a server has changed."""
        self._message = message or self._message
        if not self._message or all(server.done for server in self._servers.values()):
            return None  # the closing line says it
        line = _encode(self._message, self._states())
        if line == self._line:
            return None
        self._line = line
        return line

    def _states(self) -> dict[str, str]:
        return {name: server.state for name, server in self._servers.items()}

    def _error(self) -> str:
        """Return who has the model, and who has not and why. One server alone has said it all."""
        have: list[str] = []
        lack: dict[str, list[str]] = {}
        for name, server in self._servers.items():
            if server.done and not server.failure:
                have.append(name)
            else:
                lack.setdefault(server.failure or "not finished", []).append(name)
        if len(self._servers) == 1:
            return next(iter(lack))
        parts = [f"{_has(have)} it" if have else "no server has it"]
        parts += [f"{_has(names)} not: {cause}" for cause, names in lack.items()]
        return f"{self._what}: {'; '.join(parts)}"


def _has(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} has"
    return f"{', '.join(names[:-1])} and {names[-1]} have"


def _before(stage: _Stage, told: Mapping[_Stage, None]) -> Iterator[_Stage]:
    return takewhile(lambda earlier: earlier != stage, told)


# --- lines -------------------------------------------------------------------------------------------------------


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the object that a line is, if it is one."""
    if len(line) > LINE_BYTES_MAX:
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _text(value: object, chars_max: int) -> str:
    """Return a text that can be written, cut where it is too long; nothing for what is no text."""
    if not isinstance(value, str):
        return ""
    text = value if len(value) <= chars_max else value[: chars_max - 1] + "…"
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair has no bytes


def _number(value: object) -> int:
    """Return a number of bytes; none for what is no such number (`True` is none either)."""
    return max(0, value) if type(value) is int else 0


def _encode(message: Mapping[str, str | int], states: Mapping[str, str]) -> bytes:
    told = {**message, "servers": states}
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
