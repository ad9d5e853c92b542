"""`ollama-lb fleet`: the fake servers of a file, without a balancer. `lbio.cli` declares the command."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractContextManager

import anyio
import click

from simulator.fakes.specs import FakeSpec
from simulator.serve import FakeServer, serve_fleet


def serve_until_told(specs: Sequence[FakeSpec]) -> int:
    """Serve them until SIGINT or SIGTERM; return the exit code, 1 when they cannot be served."""
    failures: list[OSError] = []
    try:
        anyio.run(_serve_fleet, specs)
    except* OSError as group:
        failures.extend(_leaves(group))
    for failure in failures:
        click.echo(f"cannot serve the fake servers: {failure.strerror or failure}", err=True)
    return 1 if failures else 0


def _leaves(group: BaseExceptionGroup[OSError]) -> Iterable[OSError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


async def _serve_fleet(specs: Sequence[FakeSpec]) -> None:
    with _stop_signals() as signals:  # before anything is printed: whoever has read it may send one
        async with serve_fleet(specs) as servers:
            click.echo("\n".join(_fleet_lines(servers)))
            sys.stdout.flush()
            async for _ in signals:
                return


def _stop_signals() -> AbstractContextManager[AsyncIterator[object]]:
    """Receive SIGINT and SIGTERM; where these cannot be received, wait until KeyboardInterrupt ends the loop."""

    async def never() -> AsyncIterator[object]:
        await anyio.sleep_forever()
        yield None

    if sys.platform == "win32":
        return contextlib.nullcontext(never())
    return anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM)


def _fleet_lines(servers: Sequence[FakeServer]) -> Iterable[str]:
    """Yield the address of each fake server, and a request to paste."""
    rows = [("SERVER", "URL", "MODELS")]
    rows += [(of.spec.name, of.url, ", ".join(model.name for model in of.spec.models)) for of in servers]
    name_width, url_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, url, has in rows:
        yield f"{name.ljust(name_width)}  {url.ljust(url_width)}  {has}"
    first = servers[0]
    model = first.spec.models[0].name if first.spec.models else "llama3.2"
    body = f'{{"model":"{model}","messages":[{{"role":"user","content":"hello"}}]}}'
    yield f"try: curl -N {first.url}/api/chat -d '{body}'"
