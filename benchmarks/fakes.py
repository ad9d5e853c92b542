"""Fake Ollama servers as a program of their own: `python -m benchmarks.fakes '[{"name": "a"}, …]'`.

Prints `{"ports": […]}`, then answers lines on standard input, each with one line:
`{"do": "fault", "server": 0, "kind": "hang", "factor": 20}`, `{"do": "fault", "server": 0, "kind": null}`,
`{"do": "stats"}`. Moments are monotonic ns, comparable between processes. Ends when standard input does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import anyio
import anyio.to_thread

from simulator.fakes.specs import FakeModel, FakeSpec
from simulator.faults import Fault, FaultKind
from simulator.serve import FakeServer, Stats, now_ns, serve_fleet

_DEFAULTS: dict[str, Any] = {
    "start_loaded": ("llama3.2",),
    "num_parallel": 4,
    "first_token_ms": 50.0,
    "token_ms": 5.0,
    "tokens": 40,
    "keep_alive_s": 3600.0,
}


def _seen(stats: Stats) -> dict[str, Any]:
    names = ("tokens_generated", "tokens_undelivered", "tokens_of_aborted", "concurrent_max", "connections_total")
    aborts = [asdict(abort) for abort in stats.aborts]
    return {**{name: getattr(stats, name) for name in names}, "requests": dict(stats.requests), "aborts": aborts}


def _answer(fleet: Sequence[FakeServer], wanted: dict[str, Any]) -> dict[str, Any]:
    if wanted["do"] == "stats":
        return {"servers": [_seen(server.stats) for server in fleet]}
    kind = wanted["kind"]
    more = {name: value for name, value in wanted.items() if name not in {"do", "server", "kind"}}
    fleet[wanted["server"]].set_fault(None if kind is None else Fault(FaultKind(kind), **more))
    return {"at_ns": now_ns()}


async def _main(specs: Sequence[FakeSpec]) -> None:
    async with serve_fleet(specs) as fleet:
        print(json.dumps({"ports": [server.port for server in fleet]}), flush=True)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            print(json.dumps(_answer(fleet, json.loads(line))), flush=True)


def _spec(fields: dict[str, Any]) -> FakeSpec:
    """Return a server; its models are objects of FakeModel's fields."""
    models = {"models": tuple(FakeModel(**model) for model in fields["models"])} if "models" in fields else {}
    return FakeSpec(**{**_DEFAULTS, **fields, **models})


if __name__ == "__main__":
    # Not uvloop: its clock, which the fakes sleep by, has a resolution of 1 ms.
    anyio.run(_main, [_spec(fields) for fields in json.loads(sys.argv[1])])
