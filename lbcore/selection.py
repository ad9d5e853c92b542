"""Who is asked, and in which order (pure; the random generator is passed in).

Candidates are ranked by the first-token time to be expected of them, in steps of a factor of two; within a rank those
with the least in flight for their slots come first; among these they are sampled by health: weighted sampling without
replacement, one after the other, as far as it is asked for (the order has the distribution of Efraimidis & Spirakis
2006, which draws for all at once). So a server that is a little slower keeps its share, and one that is far slower,
must load the model first or has a queue is asked when the others cannot. That the least loaded come before the
healthiest is what docs/policies.md measures. With `policy = "health"` a server's health is divided by what is in flight
on it instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Final, overload

from lbcore.config import Config, Policy
from lbcore.records import LOAD_UNKNOWN_NS, SERVICE_UNKNOWN_NS, TTFT_UNKNOWN_NS, Request, Server, ServerModel
from lbcore.states import Reliability

LAST_RANKS: Final = 1000  # behind all others, in the same order among themselves
LOADS: Final = 1 << 29  # more than any load: the rank decides first; products are quick below 2 ** 30 when compiled
WEIGHT_MIN: Final = 1e-6  # of a server that has never been alive
_RELIABLE: Final = Reliability.RELIABLE  # bound once: a look-up in the enum's class costs more than what it is used for
_SECOND_CHANCE: Final = Reliability.SECOND_CHANCE
_BY_HEALTH: Final = Policy.HEALTH


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
    if server.reliability is _RELIABLE:
        return False
    return now_ns < server.trusted_from_ns or (server.reliability is _SECOND_CHANCE and server.in_flight > 0)


def faded_ns(record: ServerModel, best_ns: float, now_ns: int, forget_ns: int) -> float:
    """Return what is left of a first-token time that is long compared to `best_ns`, ns.

    What was measured or inferred fades towards `best_ns` with the half-life `forget_ns`, so that what is slow now is
    tried again later.
    """
    faded: float = 0.5 ** ((now_ns - record.seen_ns) / forget_ns)
    return best_ns + (record.known_ns - best_ns) * faded


def expected_ns(server: Server, record: ServerModel, runner_key: str, first_token_ns: float, now_ns: int) -> float:
    """Return when a first token can be expected, ns from now: the queue, the load and the prompt.

    A server that has just failed is taken to fail until its time is over.
    """
    expected = first_token_ns + max(0, record.failing_until_ns - now_ns)
    waiting = record.in_flight - server.slots + 1
    if waiting > 0:
        expected += waiting * (record.service_ns or SERVICE_UNKNOWN_NS) / server.slots
    if not record.is_warm(runner_key):
        loads_before = sum(1 for other in server.models.values() if other.loading and other is not record)
        expected += (1 + loads_before) * (record.load_ns or LOAD_UNKNOWN_NS)
    return expected


def order(
    candidates: Sequence[Server],
    request: Request,
    config: Config,
    rng: Random,
    now_ns: int,
    records: Sequence[ServerModel] | None = None,
) -> Sequence[Server]:
    """Return the candidates, the one to ask first in front; `records` are theirs of the model, if at hand.

    They are drawn as far as they are looked at, one random number for each, and none for the last of a rank; so look
    before anything changes.
    """
    if len(candidates) == 1:
        return candidates
    model = request.model
    if model is None or not request.generates:
        ranks = [0] * len(candidates)
    else:
        ranks = ranks_of(candidates, records or [s.models[model] for s in candidates], request, config, now_ns)
    by_load = config.selection.policy is not _BY_HEALTH
    keys = []
    for server, key in zip(candidates, ranks, strict=True):
        if server.reliability is not _RELIABLE and is_passed_over(server, now_ns):
            key += LAST_RANKS  # noqa: PLW2901
        keys.append(key * LOADS + (server.in_flight << 10) // server.slots if by_load else key)  # `load_of`
    return Drawn(len(candidates), _draw(candidates, keys, rng))


def weight_of(server: Server) -> float:
    """Return the weight with which a server is drawn among those of its rank."""
    return (server.health or WEIGHT_MIN) / (1 + server.in_flight)


def load_of(server: Server) -> int:
    """Return what is in flight on a server, in 1024ths of its slots."""
    return (server.in_flight << 10) // server.slots


class Drawn(Sequence[Server]):
    """So many servers in the order in which they are drawn; mostly one or two of many are looked at, and drawn."""

    __slots__ = ("_drawn", "_n", "_source")

    def __init__(self, n: int, source: Iterator[Server]) -> None:
        self._n = n
        self._drawn: list[Server] = []
        self._source = source

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> Server: ...
    @overload
    def __getitem__(self, index: slice) -> list[Server]: ...
    def __getitem__(self, index: int | slice) -> Server | list[Server]:
        drawn = self._drawn
        if index == len(drawn) < self._n:  # mostly the next one is asked for
            drawn.append(server := next(self._source))
            return server
        if isinstance(index, slice) or not 0 <= index < len(drawn):
            drawn.extend(self._source)
        return drawn[index]


def _draw(candidates: Sequence[Server], ranks: list[int], rng: Random) -> Iterator[Server]:
    """Yield servers by rank; within a rank in random order, each next one in proportion to its weight."""
    rest = ranks
    while rest:
        rank = min(rest)
        group = [server for server, its_rank in zip(candidates, ranks, strict=True) if its_rank == rank]
        if len(group) > 1:  # `weight_of`, without a call for each
            weights = [(s.health or WEIGHT_MIN) / (1 + s.in_flight) for s in group]
        while len(group) > 1:
            left = rng.random() * sum(weights)
            i = 0
            for i, weight in enumerate(weights):  # noqa: B007, the index at the break is what is sought
                left -= weight
                if left < 0.0:
                    break
            del weights[i]
            yield group.pop(i)
        yield group[0]
        rest = [its_rank for its_rank in ranks if its_rank > rank]


def ranks_of(
    candidates: Sequence[Server], records: Sequence[ServerModel], request: Request, config: Config, now_ns: int
) -> list[int]:
    """Return for each candidate how often its expected first-token time doubles the best one's."""
    runner_key = request.runner_key
    settings = config.selection
    if settings.policy is _BY_HEALTH:
        return [0 if record.is_warm(runner_key) else 1 for record in records]
    expected: list[float] = [record.known_ns for record in records]
    best_ns = min(expected)
    if not best_ns:
        best_ns = min(filter(None, expected), default=TTFT_UNKNOWN_NS)
        expected = [known_ns or best_ns for known_ns in expected]
    twice_ns = 2 * best_ns  # below, the rank is the same whatever has faded
    if max(expected) >= twice_ns:
        for i, known_ns in enumerate(expected):
            if known_ns >= twice_ns:
                expected[i] = faded_ns(records[i], best_ns, now_ns, settings.forget_ns)
    for i in [
        i
        for i, record in enumerate(records)
        if record.in_flight >= candidates[i].slots
        or not record.loaded
        or record.failing_until_ns > now_ns
        or (record.runner_key != runner_key and record.runner_key is not None)
    ]:
        expected[i] = expected_ns(candidates[i], records[i], runner_key, expected[i], now_ns)
    soonest = max(min(expected), 1.0)
    limit = 2 * soonest
    return [0 if e < limit else int(e / soonest).bit_length() - 1 for e in expected]
