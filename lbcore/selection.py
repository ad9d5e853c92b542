"""Who is asked, and in which order (pure; the random generator is passed in).

Candidates are ranked by the first-token time to be expected of them, in steps of a factor of two, and sampled within a
rank by health: weighted sampling without replacement over all of them (Efraimidis & Spirakis 2006, in its
exponential form). So a server that is a little slower keeps its share, and one that is far slower, must load the
model first or has a queue is asked when the others cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

from lbcore.config import Config, Policy
from lbcore.records import LOAD_UNKNOWN_NS, SERVICE_UNKNOWN_NS, TTFT_UNKNOWN_NS, Request, Server, ServerModel
from lbcore.states import Reliability

_DOUBT_RANKS = 2  # a doubted server counts as four times slower than it looks
_WEIGHT_MIN = 1e-6


def eligible(servers: Iterable[Server], request: Request) -> list[Server]:
    """Return the live servers that have what the request needs and were not asked yet."""
    model = request.model
    return [s for s in servers if s.is_alive and (model is None or s.has(model)) and not request.has_tried(s)]


def has_room(server: Server, request: Request) -> bool:
    """Tell whether one more request for this model may be sent to the server."""
    if not request.generates or request.model is None:
        return True
    record = server.models.get(request.model)
    return record is None or record.in_flight < server.settings.in_flight_max


def is_ready(server: Server, request: Request) -> bool:
    """Tell whether the server would start at once: the model loaded as asked, and a slot idle."""
    if request.model is None or not request.generates:
        return True
    record = server.models.get(request.model)
    return record is not None and record.is_warm(request.runner_key) and record.in_flight < server.settings.slots


def is_passed_over(server: Server, now_ns: int) -> bool:
    """Tell whether others go first, since streams broke here: until its time has come, and while its chance runs."""
    if server.reliability is Reliability.UNRELIABLE:
        return now_ns < server.trusted_from_ns
    return server.reliability is Reliability.SECOND_CHANCE and server.in_flight > 0


def estimate_ns(record: ServerModel, best_ns: float, now_ns: int, forget_ns: int) -> float:
    """Return the first-token time of a loaded, idle model, ns.

    What was measured or inferred fades towards `best_ns` with the half-life `forget_ns`, so that what is slow now is
    tried again later.
    """
    known = max(record.ttft_ns or 0, record.floor_ns)
    if known <= best_ns:
        return known or best_ns
    faded: float = 0.5 ** ((now_ns - record.seen_ns) / forget_ns)
    return best_ns + (known - best_ns) * faded


def expected_ns(server: Server, record: ServerModel | None, request: Request, first_token_ns: float) -> float:
    """Return when a first token can be expected, ns from now: the queue, the load and the prompt."""
    if record is None:
        return LOAD_UNKNOWN_NS + first_token_ns
    expected = first_token_ns
    waiting = record.in_flight - server.settings.slots + 1
    if waiting > 0:
        expected += waiting * (record.service_ns or SERVICE_UNKNOWN_NS) / server.settings.slots
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
    ranks = _ranks(candidates, request, config, now_ns)
    keys = [
        (is_passed_over(server, now_ns), rank, rng.expovariate(max(server.health, _WEIGHT_MIN)))
        for server, rank in zip(candidates, ranks, strict=True)
    ]
    by_key = sorted(range(len(candidates)), key=keys.__getitem__)
    return [candidates[i] for i in by_key]


def _ranks(candidates: Sequence[Server], request: Request, config: Config, now_ns: int) -> list[int]:
    if request.model is None or not request.generates:
        return [_DOUBT_RANKS if server.doubted else 0 for server in candidates]
    records = [server.models.get(request.model) for server in candidates]
    if config.selection.policy is Policy.HEALTH:
        return [0 if record is not None and record.is_warm(request.runner_key) else 1 for record in records]
    known = [max(r.ttft_ns or 0, r.floor_ns) for r in records if r is not None and r.ttft_ns]
    best_ns = float(min(known, default=TTFT_UNKNOWN_NS))
    forget_ns = config.selection.forget_ns
    expected = [
        expected_ns(
            server, record, request, best_ns if record is None else estimate_ns(record, best_ns, now_ns, forget_ns)
        )
        for server, record in zip(candidates, records, strict=True)
    ]
    soonest = max(min(expected), 1.0)
    return [
        int(e / soonest).bit_length() - 1 + (_DOUBT_RANKS if server.doubted else 0)
        for server, e in zip(candidates, expected, strict=True)
    ]
