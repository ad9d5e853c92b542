"""Sends lines in their time, under a running clock (anyio's)."""

import anyio

from simulator.fake_ollama import NS_PER_S, FakeOllama
from simulator.fakes.live import Sink
from simulator.fakes.manage import put
from simulator.fakes.replies import Lines


async def recite(lines: Lines, fake: FakeOllama, sink: Sink) -> None:
    """Send all the lines, each when it is due, or at the end the reply that stands for them."""
    last = len(lines.steps) - 1
    for index, step in enumerate(lines.steps):
        if step.after_ns:
            await anyio.sleep(step.after_ns / NS_PER_S)
        if index == last:
            put(fake, lines)
        if lines.single is None:
            await sink.chunks(lines.headers, [step.line], last=index == last)
    if lines.single is not None:
        await sink.reply(lines.single)
