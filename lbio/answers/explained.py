"""`GET /explain/ID`: why one of the last requests went where it went.

It is found out by replaying what is remembered (`lbcore.memory`), in slices: there are streams to be served meanwhile,
and a thread would take the interpreter from them for much longer at a time.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Generator, Sequence
from typing import TypeVar

import anyio

from lbcore.explain import Explanation, UnknownRequestError, explaining
from lbcore.memory import Memory
from lbcore.ollama import Shape
from lbio.answers.local import JSON, TEXT, LocalAnswer, error_answer
from lbio.journal.explanations import explanation_lines

SLICE_S = 0.002
"""So long at most is everything else kept waiting; what comes between two looks at the clock takes a few times less."""
PAUSE_S = 0.001
"""Between two slices, so that one who asks and asks again leaves a third of the time, and more, to others."""

_ID_CHARS_MAX = 64
_DIVIDED_MAX = 1000
UNDER_WAY = "it is still under way"
"""Said of a request whose end is not known yet."""

_T = TypeVar("_T")


class Explainer:
    """Tells why, from what a balancer remembers; one at a time. `boot` begins the ids of requests since its start."""

    def __init__(self, memory: Memory, boot: str) -> None:
        self._memory = memory
        self._boot = boot
        self._turn = anyio.Lock()
        self._parts: dict[int, tuple[str, ...]] = {}

    def note_parts(self, request_id: int, parts: Sequence[str]) -> None:
        """Take note that a request went in parts, which have ids of their own; the last ones are known."""
        self._parts[request_id] = tuple(parts)
        if len(self._parts) > _DIVIDED_MAX:
            del self._parts[next(iter(self._parts))]

    async def answer(self, name: str, *, as_text: bool) -> LocalAnswer:
        """Explain the request that is called `3f2a-17`, or 17; 404 when it is not known, or not any more."""
        told = await self.explain(name)
        if isinstance(told, LocalAnswer):
            return told
        if as_text:
            lines = explanation_lines(told, UNDER_WAY)
            return LocalAnswer(200, TEXT, "".join(f"{line}\n" for line in lines).encode())
        return LocalAnswer(200, JSON, json.dumps(dataclasses.asdict(told), ensure_ascii=False).encode())

    async def explain(self, name: str) -> Explanation | LocalAnswer:
        """Return the story of a request, or the error that says why there is none."""
        request_id = self._number(name)
        if isinstance(request_id, LocalAnswer):
            return request_id
        async with self._turn:
            found = self._memory.about(request_id)
            if found is None:
                return self._unknown(request_id)
            try:
                return await in_slices(explaining(found.lines, request_id, found.start))
            except UnknownRequestError:
                return _error(404, f"request {request_id} came before all that is remembered; it is still under way")

    def _number(self, name: str) -> int | LocalAnswer:
        boot, _, digits = name.removeprefix("#").rpartition("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
            return _error(
                400,
                f"'{name[:_ID_CHARS_MAX]}' is no id of a request: these are like {self._boot}-17, or 17, and stand in "
                "the header X-Ollama-LB-Request-Id and in the log",
            )
        if boot and boot != self._boot:
            return _error(
                404,
                f"request {name[:_ID_CHARS_MAX]} is of another start of ollama-lb, or of another one: since this start "
                f"ids begin with {self._boot}-",
            )
        return int(digits)

    def _unknown(self, request_id: int) -> LocalAnswer:
        if request_id in self._parts:
            parts = ", ".join(self._parts[request_id])
            return _error(404, f"request {request_id} went in parts, which are explained one by one: {parts}")
        if self._memory.defect:
            return _error(404, f"nothing is remembered: {self._memory.defect}")
        known = self._memory.known
        if known is None:
            return _error(404, f"there is no request {request_id}: there was none at all since the start")
        if request_id > known[1] and self._memory.is_too_busy:
            return _error(404, f"request {request_id} is not known: too many are under way at once for that")
        what = "is forgotten" if request_id < known[0] else "is not known: there was none of this id"
        return _error(404, f"request {request_id} {what}; those from {known[0]} to {known[1]} are known")


def _error(status: int, message: str) -> LocalAnswer:
    return error_answer(Shape.NATIVE, status, message)


async def in_slices(steps: Generator[object, None, _T]) -> _T:
    """Run a generator to its end, with pauses in which others get their turn; return what it returns."""
    while True:
        until = time.perf_counter() + SLICE_S
        try:
            next(steps)
            while time.perf_counter() < until:
                next(steps)
        except StopIteration as done:
            result: _T = done.value
            return result
        await anyio.sleep(PAUSE_S)
