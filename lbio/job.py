"""One piece of work for placement: let a server pull, load or delete a model, and tell the core how it went."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any, Protocol

import anyio

from lbcore.commands import StartJob, Work
from lbcore.events import Event, JobEnded, JobProgressed, Reason
from lbcore.ollama import Ending
from lbio.http1 import HttpError, IncompleteBody, serialize_request
from lbio.upstream import Answer, ConnectError, Connection, Endpoint, read_response_head
from lbio.verdicts import reason_of, shortened

_HEAD_BYTES_MAX = 65536
_WORDS_BYTES = 4096  # what is kept of the end of an answer, in which it says what went wrong
_LAYER_BYTES_MIN = 1 << 20  # smaller ones come and go in a moment
_TELL_S = 5.0
"""The core is told of progress this often at most."""
_PROGRESS = re.compile(rb'"total":([0-9]{1,18}),"completed":([0-9]{1,18})')


class Core(Protocol):
    """What a job needs of the driver."""

    def dispatch(self, event: Event) -> None:
        """Give the core an event and carry out what it commands."""


def request_of(work: Work, model: str, runner_key: str) -> tuple[str, str, dict[str, Any]]:
    """Return method, path and body of the request that does it."""
    if work is Work.PULL:
        return "POST", "/api/pull", {"model": model}
    if work is Work.DELETE:
        return "DELETE", "/api/delete", {"model": model}
    options = {"options": json.loads(runner_key)} if runner_key else {}
    return "POST", "/api/generate", {"model": model, "keep_alive": -1, "stream": False, **options}


_ONLY_EMBEDS = "does not support generate"
"""In Ollama's words for a model that cannot be loaded by an empty prompt."""


def other_request_of(work: Work, detail: str, asked: dict[str, Any]) -> tuple[str, str, dict[str, Any]] | None:
    """Return the request that does the same where the first was refused; None when there is no other way."""
    if work is not Work.WARM or _ONLY_EMBEDS not in detail:
        return None
    same = {name: value for name, value in asked.items() if name != "stream"}
    return "POST", "/api/embed", {**same, "input": []}


class JobRun:
    """The task of one job. How long it may take is for the core to say."""

    def __init__(self, command: StartJob, endpoint: Endpoint, core: Core, via: str) -> None:
        self.id = command.job_id
        self.share: float | None = None  # of the largest layer, 0 to 1
        self._work = command.work
        self._ask = request_of(command.work, command.model, command.runner_key)
        self._endpoint = endpoint
        self._core = core
        self._via = via.encode()
        self._scope = anyio.CancelScope()
        self._told_s = time.monotonic()

    def cancel(self) -> None:
        """Stop; the connection is closed as the task ends, which ends a pull."""
        self._scope.cancel()

    async def run(self, log_defect: Callable[[BaseException], None]) -> None:
        """Do it and report."""
        with self._scope:
            reason, detail = await self._run(log_defect)
            other = other_request_of(self._work, detail, self._ask[2]) if reason is Reason.CLIENT_ERROR else None
            if other is not None:
                self._ask = other
                reason, detail = await self._run(log_defect)
            self._core.dispatch(JobEnded(self.id, reason, detail))

    async def _run(self, log_defect: Callable[[BaseException], None]) -> tuple[Reason | None, str]:
        connection: Connection | None = None
        try:
            connection = await self._endpoint.dial()
            return await self._ask_on(connection)
        except ConnectError as error:
            return error.reason, str(error)
        except HttpError as error:
            return Reason.GARBAGE, error.message
        except (IncompleteBody, anyio.BrokenResourceError) as error:
            return Reason.TRUNCATED, str(error)
        except Exception as error:  # noqa: BLE001  one job must not end the program
            log_defect(error)
            return Reason.GARBAGE, f"{type(error).__name__} in the load balancer"
        finally:
            if connection is not None:
                connection.close()

    async def _ask_on(self, connection: Connection) -> tuple[Reason | None, str]:
        method, path, asked = self._ask
        body = json.dumps(asked).encode()
        headers = [
            *self._endpoint.own_headers(self._via),
            (b"Content-Type", b"application/json"),
            (b"Content-Length", b"%d" % len(body)),
        ]
        await connection.stream.send(serialize_request(method, path, headers) + body)
        head = await read_response_head(connection, method, _HEAD_BYTES_MAX)
        if head is None:
            return Reason.RESET, path
        answer = Answer(connection, head, Ending.NDJSON_SUCCESS if self._work is Work.PULL else Ending.FRAMING)
        while not answer.ended:
            payload = await answer.read()
            answer.watcher.feed(payload)
            answer.held = (answer.held + payload)[-_WORDS_BYTES:]
            self._note_progress(payload)
        if head.status == 404 and self._work is Work.DELETE:
            return None, ""
        if head.status >= 300:
            return reason_of(head.status, answer.held, passed_through=False), shortened(answer.held)
        return answer.verdict, shortened(answer.held) if answer.verdict is not None else ""

    def _note_progress(self, payload: bytes) -> None:
        for total, completed in _PROGRESS.findall(payload):
            if int(total) >= _LAYER_BYTES_MIN:
                self.share = int(completed) / int(total)
        if time.monotonic() - self._told_s >= _TELL_S:
            self._told_s = time.monotonic()
            self._core.dispatch(JobProgressed(self.id))
