"""Who is asked, and in which order (pure; the random generator is passed in).

Candidates are ranked by the first-token time to be expected of them, in steps of a factor of two, and sampled within a
rank by health: weighted sampling without replacement over all of them (Efraimidis & Spirakis 2006, in its exponential
form). A server's weight is shared by what is in flight on it, or the healthiest would get all until it is full. So a
server that is a little slower keeps its share, and one that is far slower, must load the model first or has a queue is
asked when the others cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from random import Random

from lbcore.config import Config, Policy
from lbcore.records import LOAD_UNKNOWN_NS, SERVICE_UNKNOWN_NS, TTFT_UNKNOWN_NS, Request, Server, ServerModel
from lbcore.states import Reliability

_LAST_RANKS = 1000  # behind all others, in the same order among themselves
_WEIGHT_MIN = 1e-6  # of a server that has never been alive


def eligible(holders: list[Server], request: Request) -> list[Server]:
    """Return those of the live servers that have what the request needs (`Fleet.holders`) that were not asked yet."""
    if not request.attempts:
        return holders
    return [server for server in holders if not request.has_tried(server)]


def has_room(server: Server, request: Request) -> bool:
    """Tell whether one more request for this model may be sent to the server."""
    if not request.generates or request.model is None:
        return True
    record = server.models.get(request.model)
    return record is None or record.in_flight < server.in_flight_max


def with_room(candidates: list[Server], request: Request) -> list[Server]:
    """Return those of the candidates that have room for one more request for this model."""
    model = request.model
    if model is None or not request.generates:
        return candidates
    return [server for server in candidates if server.models[model].in_flight < server.in_flight_max]


def is_ready(server: Server, request: Request) -> bool:
    """Tell whether the server would start at once: the model loaded as asked, and a slot idle."""
    if request.model is None or not request.generates:
        return True
    record = server.models.get(request.model)
    return record is not None and record.is_warm(request.runner_key) and record.in_flight < server.slots


def is_passed_over(server: Server, now_ns: int) -> bool:
    """Tell whether others go first, since streams broke here: until its time has come, and while its chance runs."""
    if server.reliability is Reliability.RELIABLE:
        return False
    running = server.reliability is Reliability.SECOND_CHANCE and server.in_flight > 0
    return running or now_ns < server.trusted_from_ns


def faded_ns(record: ServerModel, best_ns: float, now_ns: int, forget_ns: int) -> float:
    """Return what is left of a first-token time that is long compared to `best_ns`, ns.

    What was measured or inferred fades towards `best_ns` with the half-life `forget_ns`, so that what is slow now is
    tried again later.
    """
    faded: float = 0.5 ** ((now_ns - record.seen_ns) / forget_ns)
    return best_ns + (record.known_ns - best_ns) * faded


def expected_ns(server: Server, record: ServerModel, request: Request, first_token_ns: float) -> float:
    """Return when a first token can be expected, ns from now: the queue, the load and the prompt."""
    expected = first_token_ns
    waiting = record.in_flight - server.slots + 1
    if waiting > 0:
        expected += waiting * (record.service_ns or SERVICE_UNKNOWN_NS) / server.slots
    if not record.is_warm(request.runner_key):
        loads_before = sum(1 for other in server.models.values() if other.loading and other is not record)
        expected += (1 + loads_before) * (record.load_ns or LOAD_UNKNOWN_NS)
    return expected


def order(candidates: Sequence[Server], request: Request, config: Config, rng: Random, now_ns: int) -> list[Server]:
    """Return the candidates, the one to ask first in front.

    Draws one random number per candidate, in the order given, so that a run can be repeated.
    """
    if len(candidates) == 1:
        return list(candidates)
    draw = rng.random
    keys: list[tuple[int, float, int]] = []
    for i, rank in enumerate(_ranks(candidates, request, config, now_ns)):
        server = candidates[i]
        if server.reliability is not Reliability.RELIABLE and is_passed_over(server, now_ns):
            rank += _LAST_RANKS  # noqa: PLW2901
        keys.append((rank, -log(1.0 - draw()) * (1 + server.in_flight) / (server.health or _WEIGHT_MIN), i))
    keys.sort()
    return [candidates[key[2]] for key in keys]


def _ranks(candidates: Sequence[Server], request: Request, config: Config, now_ns: int) -> list[int]:
    """Return for each candidate how often its expected first-token time doubles the best one's."""
    model, runner_key = request.model, request.runner_key
    if model is None or not request.generates:
        return [0] * len(candidates)
    records = [server.models[model] for server in candidates]
    if config.selection.policy is Policy.HEALTH:
        return [0 if record.is_warm(runner_key) else 1 for record in records]
    best_ns = min([record.known_ns for record in records if record.known_ns], default=TTFT_UNKNOWN_NS)
    expected: list[float] = []
    for server, record in zip(candidates, records, strict=True):
        first_token_ns: float = record.known_ns or best_ns
        if first_token_ns >= 2 * best_ns:  # below, the rank is the same whatever has faded
            first_token_ns = faded_ns(record, best_ns, now_ns, config.selection.forget_ns)
        if (
            record.in_flight >= server.slots
            or not record.loaded
            or (record.runner_key != runner_key and record.runner_key is not None)
        ):
            first_token_ns = expected_ns(server, record, request, first_token_ns)
        expected.append(first_token_ns)
    soonest = max(min(expected), 1.0)
    return [0 if e < 2 * soonest else int(e / soonest).bit_length() - 1 for e in expected]
