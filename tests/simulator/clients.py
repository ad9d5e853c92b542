"""Workloads written as TOML, and clients that play them without a simulator."""

from __future__ import annotations

import heapq
import tomllib
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any

from lbcore.parsing import Problem
from simulator.workload import Workload, make_source, parse_workload
from simulator.workloads.asks import Ask, Source

S = 1_000_000_000
MS = 1_000_000
ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "traces"

ALL_KINDS = """\
[[workload]]
kind = "poisson"
rate = 5
requests = 300
models = { "llama3.2" = 0.8, "qwen2.5:0.5b" = 0.2 }
leave = { share = 0.3, after = { mean = "2s" } }
[[workload]]
kind = "gamma"
rate = 5
requests = 300
num_ctx = { default = 1, 8192 = 1 }
[[workload]]
kind = "mmpp"
rate_low = 1
rate_high = 9
dwell_low = "3s"
dwell_high = "1s"
requests = 300
[[workload]]
kind = "sessions"
users = 3
requests = 100
[[workload]]
kind = "sessions"
rate = 1
requests = 100
think = { median = "2s", p95 = "9s" }
[[workload]]
kind = "herd"
at = "7s"
requests = 10
poison = 0.5
"""


def parse(text: str, **options: Any) -> tuple[Workload, list[str]]:
    problems: list[Problem] = []
    found = parse_workload(tomllib.loads(text)["workload"], problems, **options)
    return found, [str(problem) for problem in problems]


def workload(text: str, folder: Path | None = None) -> Workload:
    found, problems = parse(text if text.startswith("[") else f"[workload]\n{text}", folder=folder)
    assert problems == []
    return found


def asks(text: str, seed: int = 1, folder: Path | None = None) -> list[Ask]:
    return list(make_source(workload(text, folder), seed).asks())


def talk(
    source: Source, answer_ns: Callable[[Ask], int] = lambda _: S, completed: Callable[[Ask], bool] = lambda _: True,
    at_most: int = 10_000,
) -> list[Ask]:
    """Play every client with answers that take `answer_ns`; return the asks in order of arrival."""
    first, order = source.asks(), count()
    coming: list[tuple[int, int, str, Ask]] = []
    told: list[Ask] = []

    def draw() -> None:
        for ask in islice(first, 1):
            heapq.heappush(coming, (ask.arrives_ns, next(order), "first", ask))

    draw()
    while coming and len(told) < at_most:
        at_ns, _, what, ask = heapq.heappop(coming)
        if what == "end":
            nxt = source.follow_up(ask, at_ns, completed=completed(ask))
            if nxt is not None:
                assert nxt.arrives_ns >= at_ns
                heapq.heappush(coming, (nxt.arrives_ns, next(order), "next", nxt))
            continue
        told.append(ask)
        heapq.heappush(coming, (at_ns + answer_ns(ask), next(order), "end", ask))
        if what == "first":
            draw()
    return told
