"""Slow and clear versions of what lbcore does fast, for tests to compare with."""

from __future__ import annotations

from random import Random

from lbcore.config import Config, Policy
from lbcore.records import LOAD_UNKNOWN_NS, SERVICE_UNKNOWN_NS, TTFT_UNKNOWN_NS, Request, Server
from lbcore.states import Reliability


def rank(
    server: Server, candidates: list[Server], request: Request, config: Config, now_ns: int
) -> tuple[bool, int, float]:
    """Return what a candidate is ranked by.

    Passed over or not, then how often its time doubles the soonest one's, then (unless health decides alone) how much
    is in flight for its slots.
    """
    load = 0.0 if config.selection.policy is Policy.HEALTH else server.in_flight * 1024 // server.slots
    passed_over = server.reliability is not Reliability.RELIABLE and (
        now_ns < server.trusted_from_ns or (server.reliability is Reliability.SECOND_CHANCE and server.in_flight > 0)
    )
    if request.model is None or not request.generates:
        return passed_over, 0, load
    if config.selection.policy is Policy.HEALTH:
        return passed_over, 0 if server.models[request.model].is_warm(request.runner_key) else 1, load
    soonest_ns = max(1.0, min(_expected_ns(other, candidates, request, config, now_ns) for other in candidates))
    expected_ns = _expected_ns(server, candidates, request, config, now_ns)
    doublings = 0
    while expected_ns >= soonest_ns * 2 ** (doublings + 1):
        doublings += 1
    return passed_over, doublings, load


def _expected_ns(server: Server, candidates: list[Server], request: Request, config: Config, now_ns: int) -> float:
    model = request.model or ""
    known = [c.models[model].known_ns for c in candidates if c.models[model].known_ns > 0]
    best_ns = min(known) if known else TTFT_UNKNOWN_NS
    record = server.models[model]
    expected_ns: float = record.known_ns or best_ns
    if expected_ns >= 2 * best_ns:
        age = (now_ns - record.seen_ns) / config.selection.forget_ns
        expected_ns = best_ns + (record.known_ns - best_ns) * 0.5**age
    waiting = max(0, record.in_flight - server.slots + 1)
    expected_ns += waiting * (record.service_ns or SERVICE_UNKNOWN_NS) / server.slots
    if not record.is_warm(request.runner_key):
        loads = [other for other in server.models.values() if other.loading and other is not record]
        expected_ns += (1 + len(loads)) * (record.load_ns or LOAD_UNKNOWN_NS)
    if record.failing_until_ns > now_ns:
        expected_ns += record.failing_until_ns - now_ns
    return expected_ns


def order(candidates: list[Server], request: Request, config: Config, rng: Random, now_ns: int) -> list[Server]:
    """Return the candidates by rank, each next one of a rank drawn by its share of health for each request on it."""
    ranks = {server.id: rank(server, candidates, request, config, now_ns) for server in candidates}
    ordered: list[Server] = []
    while len(ordered) < len(candidates):
        rest = [server for server in candidates if server not in ordered]
        lowest = min(ranks[server.id] for server in rest)
        group = [server for server in rest if ranks[server.id] == lowest]
        weights = [(server.health or 1e-6) / (1 + server.in_flight) for server in group]
        left, chosen = rng.random() * sum(weights) if len(group) > 1 else 0.0, group[-1]
        for server, weight in zip(group, weights, strict=True):
            left -= weight
            if left < 0:
                chosen = server
                break
        ordered.append(chosen)
    return ordered
