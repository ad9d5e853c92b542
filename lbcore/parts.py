"""How one request for many answers, none of which depends on another, is divided over servers (pure)."""

from __future__ import annotations

from collections.abc import Iterable

from lbcore import selection
from lbcore.records import Server


def ready_at_once(holders: Iterable[Server], model: str, runner_key: str, now_ns: int) -> list[Server]:
    """Return the servers that would start on one more request for a model at once, and are to be trusted with it.

    One that must load the model first would keep the others' answers waiting, and might drop another model for it.
    """
    return [
        server
        for server in holders
        if (record := server.models.get(model)) is not None
        and record.is_warm(runner_key)
        and record.in_flight < server.slots
        and record.failing_until_ns <= now_ns
        and not (server.doubted or server.outdated or selection.is_passed_over(server, now_ns))
    ]


def part_count(n_inputs: int, split_above: int, n_servers: int) -> int:
    """Return in how many parts so many inputs go: one for each server, but none with less than half of `split_above`.

    1: they stay together.
    """
    if not 0 < split_above < n_inputs:
        return 1
    smallest = max(1, split_above // 2)
    return max(1, min(n_servers, n_inputs // smallest))


def shares(n_inputs: int, n_parts: int) -> list[int]:
    """Return how many inputs each part has, in order; they differ by one at most."""
    least, more = divmod(n_inputs, n_parts)
    return [least + (index < more) for index in range(n_parts)]
