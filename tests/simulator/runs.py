"""Results of runs, made by hand and at random, for the tests of what is reported about them."""

from __future__ import annotations

import random

from lbcore.schema import MS_NS, SECOND_NS
from simulator.reports.results import (
    AttemptResult,
    Band,
    Gaps,
    HealthPoint,
    Outcome,
    RequestResult,
    RunResult,
    ServerResult,
)
from simulator.reports.summary import gap_bin
from simulator.workloads.asks import Ask


def small() -> RunResult:
    """Four requests on two servers: won and lost, failed over, refused, left. Every figure can be worked out."""

    def ask(number: int, at_ms: int, leaves_ns: int | None = None) -> Ask:
        return Ask(number, at_ms * MS_NS, "llama3.2", 100, 10, leaves_after_ns=leaves_ns)

    requests = [
        RequestResult(ask(1, 0), Outcome.COMPLETED, "", 200, 50 * MS_NS, "a", 51 * MS_NS, 151 * MS_NS, 10, 2),
        RequestResult(ask(2, 200), Outcome.COMPLETED, "", 200, 350 * MS_NS, "a", 351 * MS_NS, 451 * MS_NS, 10, 2),
        RequestResult(ask(3, 500), Outcome.REJECTED, "the queue is full", 503, ended_ns=500 * MS_NS),
        RequestResult(ask(4, 600, leaves_ns=SECOND_NS), Outcome.LEFT, "", 0, None, "", None, 1600 * MS_NS, 0, 1),
    ]
    attempts = [
        AttemptResult(1, 1, "a", "primary", 0, 1 * MS_NS, 50 * MS_NS, 150 * MS_NS, "succeeded", "", 10, True,
                      149 * MS_NS),
        AttemptResult(1, 2, "b", "racer", 0, 1 * MS_NS, 49 * MS_NS, 50 * MS_NS, "cancelled", "lost the race", 1,
                      busy_ns=49 * MS_NS),
        AttemptResult(2, 3, "b", "primary", 200 * MS_NS, None, None, 250 * MS_NS, "failed", "connection refused"),
        AttemptResult(2, 4, "a", "retry", 250 * MS_NS, 300 * MS_NS, 350 * MS_NS, 450 * MS_NS, "succeeded", "", 10,
                      True, 150 * MS_NS),
        AttemptResult(4, 5, "a", "primary", 600 * MS_NS, 601 * MS_NS, None, 1600 * MS_NS, "cancelled",
                      "the client left", 0, busy_ns=52 * MS_NS),
    ]  # fmt: skip
    gaps = Gaps(max_ns=20 * MS_NS)
    gaps.bins[gap_bin(10 * MS_NS)] += 17
    gaps.bins[gap_bin(20 * MS_NS)] += 1
    return RunResult(
        scenario="two-servers",
        seed=7,
        policy="race within budget",
        requests=requests,
        attempts=attempts,
        servers=[
            ServerResult("a", 1, 3, 20, 0, 351 * MS_NS, 52 * MS_NS, 1, 30 * MS_NS),
            ServerResult("b", 2, 2, 1, 1, 49 * MS_NS, 49 * MS_NS),
        ],
        health=[
            HealthPoint(0, "a", 0.0), HealthPoint(0, "b", 0.0), HealthPoint(0, "a", 1.0), HealthPoint(0, "b", 1.0),
            HealthPoint(250 * MS_NS, "b", 0.5), HealthPoint(450 * MS_NS, "a", 3.0),
        ],
        bands=[Band("b", "refuse", 200 * MS_NS, 1000 * MS_NS)],
        gaps=gaps,
        lines=[
            (0, 1, "#1 /api/chat llama3.2 -> a + b (fastest expected; race)"),
            (50 * MS_NS, 1, "#1 a won after 50 ms (first-token)"),
            (50 * MS_NS, 1, "#1 b cancelled after 50 ms: lost the race"),
            (200 * MS_NS, 2, "#2 /api/chat llama3.2 -> b (fastest expected)"),
            (240 * MS_NS, 0, "b is being looked at"),
            (250 * MS_NS, 2, "#2 b: connection refused (after 50 ms)"),
            (250 * MS_NS, 0, "b health 1.00 -> 0.50: connection refused"),
            (250 * MS_NS, 2, "#2 retried on a: connection refused"),
            (310 * MS_NS, 0, "b is being looked at again"),
            (310 * MS_NS, 0, "a health 1.00 -> 3.00: served a request"),
            (310 * MS_NS, 0, "bb is no server of this request"),
            (350 * MS_NS, 2, "#2 a won after 150 ms (first-token)"),
        ],
        ended_ns=2 * SECOND_NS,
        n_events=40,
        amplification=1.25,
    )  # fmt: skip


def big(n: int = 20_000, *, servers: int = 8, seed: int = 1, length_s: int = 3600) -> RunResult:
    """Return a run of `n` requests with one server down for a while, and one slow."""
    rng = random.Random(seed)
    names = [f"gpu{number}" for number in range(1, servers + 1)]
    run = RunResult("bad-servers", seed, "race within budget", ended_ns=length_s * SECOND_NS, amplification=1.1)
    run.servers = [ServerResult(name, 4) for name in names]
    down = Band(names[1], "refuse", length_s * SECOND_NS // 4, length_s * SECOND_NS // 2)
    slow = Band(names[-1], "slow x20", length_s * SECOND_NS // 3, length_s * SECOND_NS * 2 // 3)
    run.bands = [down, slow]
    health = dict.fromkeys(names, 1.0)
    run.health = [HealthPoint(0, name, 1.0) for name in names]
    arrivals = sorted(rng.randrange(length_s * SECOND_NS) for _ in range(n))
    for number, at_ns in enumerate(arrivals, start=1):
        request = RequestResult(Ask(number, at_ns, "llama3.2", rng.randrange(50, 4000), 100))
        run.requests.append(request)
        if rng.random() < 0.002:
            request.outcome, request.why, request.status, request.ended_ns = Outcome.REJECTED, "full", 503, at_ns
            continue
        for place, name in enumerate(rng.sample(names, 2 if rng.random() < 0.2 else 1)):
            _attempt(rng, run, request, name, racer=place > 0)
        for attempt in run.attempts[-request.n_attempts :]:
            _count(run, attempt, health)
    run.health.sort(key=lambda point: point.at_ns)
    return run


def _attempt(rng: random.Random, run: RunResult, request: RequestResult, name: str, *, racer: bool) -> None:
    at_ns, down, slow = request.ask.arrives_ns, run.bands[0], run.bands[1]
    request.n_attempts += 1
    attempt = AttemptResult(request.ask.id, len(run.attempts) + 1, name, "racer" if racer else "primary", at_ns)
    run.attempts.append(attempt)
    if name == down.server and down.from_ns <= at_ns < down.until_ns:
        attempt.ended_ns, attempt.outcome, attempt.why = at_ns + MS_NS, "failed", "connection refused"
        if request.n_attempts == 1:
            request.outcome, request.why, request.status = Outcome.FAILED, "connection refused", 502
            request.ended_ns = attempt.ended_ns
        return
    factor = 20 if name == slow.server and slow.from_ns <= at_ns < slow.until_ns else 1
    ttft_ns = round(rng.lognormvariate(4.5, 0.5) * MS_NS) * factor
    attempt.slot_ns = at_ns + round(rng.expovariate(1 / 5) * MS_NS) * factor
    attempt.first_token_ns = attempt.slot_ns + ttft_ns
    if request.outcome is Outcome.COMPLETED:
        attempt.ended_ns, attempt.outcome, attempt.why = attempt.first_token_ns, "cancelled", "lost the race"
        attempt.tokens = 1
    else:
        attempt.ended_ns = attempt.first_token_ns + rng.randrange(500, 4000) * MS_NS
        attempt.outcome, attempt.delivered, attempt.tokens = "succeeded", True, 100
        request.outcome, request.status, request.server, request.tokens = Outcome.COMPLETED, 200, name, 100
        request.committed_ns = request.first_token_ns = attempt.first_token_ns
        request.ended_ns = attempt.ended_ns
        run.gaps.bins[gap_bin((attempt.ended_ns - attempt.first_token_ns) // 100)] += 99
        run.gaps.max_ns = max(run.gaps.max_ns, (attempt.ended_ns - attempt.first_token_ns) // 100)
    attempt.busy_ns = attempt.ended_ns - attempt.slot_ns


def _count(run: RunResult, attempt: AttemptResult, health: dict[str, float]) -> None:
    server = next(server for server in run.servers if server.name == attempt.server)
    server.requests += 1
    server.tokens += attempt.tokens
    server.busy_ns += attempt.busy_ns
    if not attempt.delivered:
        server.tokens_wasted += attempt.tokens
        server.wasted_ns += attempt.busy_ns
    before = health[server.name]
    if attempt.outcome == "failed":
        health[server.name] = max(0.25, before / 2)
    elif attempt.delivered:
        health[server.name] = min(100.0, max(1.0, before + 2))
    if health[server.name] != before:
        run.health.append(HealthPoint(attempt.ended_ns, server.name, health[server.name]))
