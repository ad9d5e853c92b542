"""One answer made of those of several servers: what the client of a broadcast gets.

A stream of progress (pull, create) begins with the first line of any server and ends when all have ended. Any other
answer, and a stream that no server has begun, is judged as a whole: what all servers say alike is passed on as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from urllib.parse import unquote

import anyio

from lbcore.events import Reason
from lbcore.ollama import Ending, error_body
from lbcore.progress import LINE_BYTES_MAX, Progress
from lbio.answers.local import JSON, LocalAnswer, error_answer, json_answer
from lbio.client import ClientStream
from lbio.exchange import ClientRequest
from lbio.http1 import LAST_CHUNK, HeaderPairs, encode_chunk, serialize_response

_SUBJECT = re.compile(rb'"digest":"[^"]*"|.*(?=,"servers":)')
"""What a line speaks of: of a client that reads slowly, only the last line about each waits."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How one server has ended: with an answer (`status` and `body`), or with `words` for what went wrong."""

    reason: Reason | None
    words: str
    status: int
    body: bytes


class Merge:
    """What the servers of one broadcast have said so far."""

    def __init__(self, request: ClientRequest, servers: Sequence[str], on_begun: Callable[[], None]) -> None:
        route, facts = request.route, request.facts
        self.servers = tuple(servers)
        self._request = request
        self._what = f"{route.name.rpartition('/')[2]} of '{facts.model or '?'}'"
        if route.uploads:
            self._what = f"blob {_digest(request)}"
        self._progress = Progress(self.servers, self._what) if facts.stream else None
        self._partial = dict.fromkeys(self.servers, b"")  # the beginning of a line
        self._outcomes: dict[str, _Outcome] = {}
        self._lines: dict[bytes, bytes] = {}  # not written yet, by what they speak of
        self._on_begun = on_begun
        self._news = anyio.Event()
        self._aborted: str | None = None
        self.begun = False  # the client gets a stream
        self.ended = False

    def __repr__(self) -> str:
        return f"<Merge {self._what}: {len(self._outcomes)} of {len(self.servers)} have ended>"

    # --- what servers say, told by the driver and its attempts -----------------------------------------------

    @property
    def is_stream(self) -> bool:
        """Whether lines are wanted as they come."""
        return self._progress is not None

    def feed(self, server: str, data: bytes) -> None:
        """Take the next piece of a server's stream."""
        if self._progress is None:
            return
        *lines, rest = (self._partial[server] + data).split(b"\n")
        self._partial[server] = rest if len(rest) <= LINE_BYTES_MAX else b""
        for line in lines:
            self._say(self._progress.feed(server, line))

    def end(self, server: str, *, reason: Reason | None = None, words: str = "", status: int, body: bytes) -> None:
        """Take a server's end, good when there is no `reason`; what comes after the first one does not count."""
        if server in self._outcomes:
            return
        self._outcomes[server] = _Outcome(reason, words, status, body)
        if self._progress is not None:
            self.feed(server, b"\n")
            self._say(self._progress.end(server, words if reason is not None else None))

    def finish(self) -> None:
        """All servers have ended."""
        self.ended = True
        self._news.set()

    def abort(self, why: str) -> None:
        """End the answer now, as an error."""
        self._aborted = why
        self.finish()

    def _say(self, line: bytes | None) -> None:
        if line is None:
            return
        found = _SUBJECT.search(line)
        subject = found[0] if found is not None else line
        self._lines.pop(subject, None)
        self._lines[subject] = line
        self._news.set()
        if not self.begun:
            self.begun = True
            self._on_begun()

    # --- what the client gets --------------------------------------------------------------------------------

    async def stream(self, client: ClientStream, headers: HeaderPairs, *, chunked: bool) -> None:
        """Write the merged stream to its end. Raises ClientGone."""
        head = [
            *headers,
            (b"Content-Type", b"application/x-ndjson"),
            (b"Date", formatdate(usegmt=True).encode()),
            *([(b"Transfer-Encoding", b"chunked")] if chunked else []),
        ]
        unsent = serialize_response(200, head)
        is_last = False
        while not is_last:
            is_last = self.ended  # it may end while this is written: then the end is written next
            self._news = anyio.Event()
            lines = b"".join([*self._lines.values(), self._closing() if is_last else b""])
            self._lines.clear()
            if unsent or lines:
                await client.write(unsent + (encode_chunk(lines) if chunked and lines else lines))
                unsent = b""
            if not is_last:
                await self._news.wait()
        if chunked:
            await client.write(LAST_CHUNK)

    def _closing(self) -> bytes:
        if self._aborted is not None or self._progress is None:
            return error_body(self._request.shape, 500, self._aborted or "") + b"\n"
        return self._progress.closing()

    def answer(self) -> LocalAnswer:
        """Return the answer as a whole."""
        if self._aborted is not None:
            return error_answer(self._request.shape, 503, self._aborted)
        outcomes = [self._outcomes[name] for name in self.servers]
        bad = [outcome for outcome in outcomes if not self._is_good(outcome)]
        said = {(outcome.status, outcome.body) for outcome in outcomes}
        lacking = all(outcome.reason is Reason.MODEL_NOT_FOUND for outcome in outcomes)
        if self._request.head.method == "HEAD" and any(outcome.status in {200, 404} for outcome in outcomes):
            return self._is_everywhere(outcomes)
        if (len(said) == 1 or lacking) and outcomes[0].status >= 400:  # they are of one mind
            return LocalAnswer(outcomes[0].status, JSON, outcomes[0].body)
        if not bad:
            return self._good_answer()
        done = [name for name in self.servers if self._is_good(self._outcomes[name])]
        failed = [f"{name}: {self._outcomes[name].words}" for name in self.servers if name not in done]
        message = f"{self._what}: {'done on ' + ', '.join(done) if done else 'done nowhere'}; {'; '.join(failed)}"
        return json_answer(502, {"error": message, "servers": self._states()})

    def _is_good(self, outcome: _Outcome) -> bool:
        """Tell whether all is as it should be: where a model is not, it need not be deleted or copied."""
        return outcome.reason is None or (outcome.reason is Reason.MODEL_NOT_FOUND and self._request.route.needs_model)

    def _good_answer(self) -> LocalAnswer:
        if self._request.route.ending is Ending.NDJSON_SUCCESS:
            return json_answer(200, {"status": "success", "servers": self._states()})
        return LocalAnswer(201 if any(outcome.status == 201 for outcome in self._outcomes.values()) else 200, b"", b"")

    def _is_everywhere(self, outcomes: Sequence[_Outcome]) -> LocalAnswer:
        """Answer whether a blob is there: it is to be sent unless all have it (capture: blob_head_missing)."""
        if all(outcome.reason is None for outcome in outcomes):
            return LocalAnswer(200, b"", b"")
        return error_answer(self._request.shape, 404, f'blob "{_digest(self._request)}" not found')

    def _states(self) -> dict[str, str]:
        return {name: outcome.words or "success" for name, outcome in self._outcomes.items()}


def _digest(request: ClientRequest) -> str:
    """Return what a blob's path calls it."""
    return unquote(request.head.path.rpartition("/")[2])
