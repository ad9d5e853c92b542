"""What the tests of real clients share: servers that can do all that is asked, and one way to call any client."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import anyio
import anyio.to_thread

from simulator.fake_ollama import FakeModel, FakeSpec
from simulator.faults import Fault
from tests.lbio.kit import FAST, LIMIT_S, Rig, balanced

ABLE = FakeModel(
    "tiny",
    size_bytes=1_000_000,
    embedding_length=16,
    capabilities=("completion", "tools", "thinking", "vision", "audio", "insert", "embedding"),
)
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    },
}
PIXEL = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\6\0\0\0\x1f\x15\xc4\x89\0\0\0\rIDATx\xdac\xfc\xcf\xc0\0\0\3\1\1\0"
    b"\xc9\xfe\x92\xef\0\0\0\0IEND\xaeB`\x82"
)


def able(*names: str, **fields: Any) -> list[FakeSpec]:
    """Fast servers of these names, whose model can do everything."""
    return [dataclasses.replace(FAST, name=name, models=(ABLE,), **fields) for name in names or ("a", "b")]


@contextlib.asynccontextmanager
async def fleet(specs: Sequence[FakeSpec] = (), *faults: Fault, **config: Any) -> AsyncIterator[Rig]:
    """Run a balancer before two such servers (or `specs`), all of which have these faults."""
    async with balanced(specs or able(), **config) as rig:
        for server in rig.fleet:
            server.set_fault(*faults)
        with anyio.fail_after(2 * LIMIT_S):
            yield rig


class Called:
    """A client whose methods are awaited, be it a synchronous or an asynchronous one; streams come as lists.

    `path` leads to the method: `client("chat.completions.create", model=…)`.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    async def __call__(self, path: str, *args: Any, **kwargs: Any) -> Any:
        method: Any = self.client
        for name in path.split("."):
            method = getattr(method, name)
        outcome = await anyio.to_thread.run_sync(lambda: _outcome(lambda: method(*args, **kwargs)))
        if isinstance(outcome, Exception):
            raise outcome
        result = await outcome if isinstance(outcome, Awaitable) else outcome
        return [each async for each in result] if isinstance(result, AsyncIterator) else result


def _outcome(call: Callable[[], Any]) -> Any:
    """Return what a call gives, a stream to its end; or what it raises, so that no task group wraps it."""
    try:
        result = call()
        return list(result) if isinstance(result, Iterator) else result
    except Exception as error:  # noqa: BLE001  raised again by the caller
        return error
