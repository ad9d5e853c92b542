"""Active checks: read a server's version, its models and its loaded models, and tell the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import anyio
import msgspec

from lbcore.events import ActiveModel, Event, ModelInfo, ModelsSynced, ProbeCompleted, Reason
from lbcore.ollama import MODEL_CHARS_MAX, Ending
from lbio.http1 import HttpError, IncompleteBody, serialize_request
from lbio.upstream import Answer, ConnectError, Connection, Endpoint, read_response_head

_HEAD_BYTES_MAX = 65536
_BODY_BYTES_MAX = 32 << 20  # thousands of models


class Core(Protocol):
    """What a probe needs of the driver."""

    def dispatch(self, event: Event) -> None:
        """Give the core an event and carry out what it commands."""


class _ProbeError(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Version(msgspec.Struct):
    version: str


class _Models(msgspec.Struct):
    models: list[msgspec.Raw] | None = None


class _Entry(msgspec.Struct):
    name: str
    digest: str = ""
    modified_at: str = ""


class Probe:
    """The task of one probe. Its time limit is the core's."""

    __slots__ = ("_connection", "_core", "_endpoint", "_scope", "_via", "probe_id", "server_id")

    def __init__(self, server_id: int, probe_id: int, endpoint: Endpoint, core: Core, via: str) -> None:
        self.server_id = server_id
        self.probe_id = probe_id
        self._endpoint = endpoint
        self._core = core
        self._via = via.encode()
        self._scope = anyio.CancelScope()
        self._connection: Connection | None = None

    def cancel(self) -> None:
        """Stop; the connection is closed as the task ends."""
        self._scope.cancel()

    async def run(self, log_defect: Callable[[BaseException], None]) -> None:
        """Probe once and report."""
        with self._scope:
            try:
                version, available, active = await self._read_all()
            except _ProbeError as error:
                self._core.dispatch(ProbeCompleted(self.server_id, self.probe_id, error.reason, detail=str(error)))
            except Exception as error:  # noqa: BLE001  one probe must not end the program
                log_defect(error)
                detail = f"{type(error).__name__} in the load balancer"
                self._core.dispatch(ProbeCompleted(self.server_id, self.probe_id, Reason.GARBAGE, detail=detail))
            else:
                self._core.dispatch(ProbeCompleted(self.server_id, self.probe_id, version=version))
                self._core.dispatch(ModelsSynced(self.server_id, self.probe_id, available, active))

    async def _read_all(self) -> tuple[str, tuple[ModelInfo, ...], tuple[ActiveModel, ...]]:
        """Read all three, on a fresh connection: a probe is to show that connecting works, too."""
        try:
            version: _Version = _decoded(await self._get("/api/version"), _Version, "/api/version")
            tags: _Models = _decoded(await self._get("/api/tags"), _Models, "/api/tags")
            ps: _Models = _decoded(await self._get("/api/ps", may_be_missing=True), _Models, "/api/ps")
            return version.version, _available(tags), _active(ps)
        finally:
            if self._connection is not None:
                self._connection.close()

    async def _get(self, path: str, *, may_be_missing: bool = False) -> bytes:
        try:
            if self._connection is None:
                self._connection = await self._endpoint.dial()
            asked = serialize_request("GET", path, self._endpoint.own_headers(self._via))
            await self._connection.stream.send(asked)
            head = await read_response_head(self._connection, "GET", _HEAD_BYTES_MAX)
            if head is None:
                raise _ProbeError(Reason.RESET, path)
            answer = Answer(self._connection, head, Ending.FRAMING)
            while not answer.ended:
                answer.held += await answer.read()
                if len(answer.held) > _BODY_BYTES_MAX:
                    raise _ProbeError(Reason.GARBAGE, f"{path}: more than {_BODY_BYTES_MAX >> 20} MiB")
        except ConnectError as error:
            raise _ProbeError(error.reason, str(error)) from error
        except HttpError as error:
            raise _ProbeError(Reason.GARBAGE, f"{path}: {error.message}") from error
        except (IncompleteBody, anyio.BrokenResourceError) as error:
            raise _ProbeError(Reason.RESET, f"{path}: {error}") from error
        if not answer.is_reusable:
            self._connection.close()
            self._connection = None
        if head.status == 404 and may_be_missing:
            return b"{}"
        if head.status == 508:
            raise _ProbeError(Reason.SERVER_ERROR, "it leads back to this load balancer, itself or by way of another")
        if head.status != 200:
            raise _ProbeError(Reason.SERVER_ERROR, f"{path}: status {head.status}")
        return bytes(answer.held)


def _decoded(body: bytes, kind: Any, path: str) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (ValueError, RecursionError) as error:  # of which msgspec's errors and bad UTF-8 are some
        raise _ProbeError(Reason.GARBAGE, f"{path}: not what an Ollama answers: {error}") from error


def _available(tags: _Models) -> tuple[ModelInfo, ...]:
    return tuple(ModelInfo(entry.name, entry.digest, entry.modified_at, text) for entry, text in _entries(tags))


def _active(ps: _Models) -> tuple[ActiveModel, ...]:
    return tuple(ActiveModel(entry.name, text) for entry, text in _entries(ps))


def _entries(listed: _Models) -> list[tuple[_Entry, str]]:
    """Return the models of a list; one whose name is longer than any can be asked for by is as good as not there."""
    entries = [_entry(raw) for raw in listed.models or []]
    return [(entry, text) for entry, text in entries if len(entry.name) <= MODEL_CHARS_MAX]


def _entry(raw: msgspec.Raw) -> tuple[_Entry, str]:
    """Return what matters of a model, and all of it as it was written: msgspec has not looked at the rest."""
    written = bytes(raw)
    entry = _decoded(written, _Entry, "a model")
    try:
        return entry, written.decode()
    except UnicodeDecodeError as error:
        raise _ProbeError(Reason.GARBAGE, f"{entry.name}: not what an Ollama answers: {error}") from error
