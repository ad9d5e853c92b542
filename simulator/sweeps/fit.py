"""What an event log tells of a fleet: who asked, how fast each server was with each model, when it was down. Pure.

A log has times and token counts, and no prompts. So a prompt is measured by the time it took: the part of a first-token
time above the server's usual least is its reading, in units of `READ_RATE` a second on the average server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from lbcore.config import Config
from lbcore.events import RequestArrived
from lbcore.ollama import RequestKind
from lbcore.records import Attempt, Request, Server
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.states import AttemptState, RequestState, ServerState
from lbcore.trace import Replay
from simulator.fakes.engine import Speed
from simulator.fakes.specs import FakeModel, FakeSpec
from simulator.faults import Fault, FaultKind
from simulator.reports.results import Outcome, RequestResult
from simulator.reports.summary import percentile
from simulator.workloads.asks import Ask

READ_RATE = 1000.0
"""Units of prompt that the average server reads in a second: one is a millisecond there."""
SAMPLES_MIN = 5
"""Fewer answers than this tell nothing of a server; the average of the others is taken for it."""
_LEAST_AT = 10  # percentile of first-token times that a prompt of no length would have
_MOST_AT = 99  # what is above waited for something else than its prompt


@dataclass(slots=True)
class Seen:
    """One attempt as it went."""

    attempt: Attempt
    company: int  # requests in flight for its model on its server when it began, itself included
    ended_ns: int = 0


@dataclass(slots=True)
class Recorded:
    """A log, read through."""

    config: Config
    began_ns: int
    ended_ns: int = 0
    truncated: int | None = None  # the line in which it breaks off
    attempts: list[Seen] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)  # request id -> ns
    first_tokens: dict[int, int] = field(default_factory=dict)  # request id -> when it was committed, ns
    down: dict[str, list[list[int]]] = field(default_factory=dict)  # server -> [from, until] ns
    models: dict[str, list[str]] = field(default_factory=dict)  # server -> names on disk, at any time
    loaded: dict[str, list[str]] = field(default_factory=dict)  # server -> names in memory when it was first read


def read_log(lines: Iterable[str]) -> Recorded:
    """Read a log by replaying it. Raises `lbcore.trace.LogError`."""
    replay = Replay(lines)
    balancer = replay.balancer
    found = Recorded(balancer.config, replay.header["now_ns"])
    live: dict[int, Seen] = {}
    open_requests: dict[int, Request] = {}
    for n_steps, step in enumerate(replay):
        now_ns = found.ended_ns = step.now_ns
        if not n_steps:
            found.began_ns = now_ns  # a log that begins with the program has 0 in its header, whatever its clock says
        for attempt in list(balancer.ledger.attempts.values())[-8:]:
            if attempt.id not in live:
                company = attempt.target.in_flight if attempt.target is not None else 1
                live[attempt.id] = Seen(attempt, company)
        for attempt_id in [i for i in live if i not in balancer.ledger.attempts]:
            seen = live.pop(attempt_id)
            seen.ended_ns = now_ns
            found.attempts.append(seen)
        if isinstance(step.event, RequestArrived) and step.event.request_id in balancer.ledger.requests:
            request = balancer.ledger.requests[step.event.request_id]
            open_requests[request.id] = request
            found.requests.append(request)
        for request in [r for r in open_requests.values() if r.committed is not None or not _is_open(r)]:
            if request.committed is not None and request.id not in found.first_tokens:
                found.first_tokens[request.id] = now_ns
            if not _is_open(request):
                found.ends[request.id] = now_ns
                del open_requests[request.id]
        _note_servers(found, balancer.fleet, now_ns)
    found.truncated = replay.truncated
    return found


def _is_open(request: Request) -> bool:
    return request.state in {RequestState.QUEUED, RequestState.RACING, RequestState.RELAYING}


def _note_servers(found: Recorded, servers: Iterable[Server], now_ns: int) -> None:
    for server in servers:
        spans = found.down.setdefault(server.name, [])
        dead = server.state is ServerState.DEAD
        if dead and (not spans or spans[-1][1]):
            spans.append([now_ns, 0])
        elif not dead and spans and not spans[-1][1]:
            spans[-1][1] = now_ns
        names = found.models.setdefault(server.name, [])
        if server.models and server.name not in found.loaded:
            found.loaded[server.name] = [name for name, record in server.models.items() if record.loaded]
        if len(server.models) > len(names):
            names += [name for name in server.models if name not in names]


# --- speeds ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Samples:
    """What was measured of one model on one server; times in ns."""

    first: list[int] = field(default_factory=list)  # warm first-token times with a slot idle
    alone: list[int] = field(default_factory=list)  # of these, those that had no company, which may slow reading down
    lost: list[int] = field(default_factory=list)  # how long those had run that lost a race without a token
    cold: list[int] = field(default_factory=list)  # first-token times of those that had the model loaded
    gaps: list[tuple[int, float]] = field(default_factory=list)  # (company, ns between tokens)


def _samples(found: Recorded) -> dict[tuple[str, str], _Samples]:
    measured: dict[tuple[str, str], _Samples] = {}
    for seen in found.attempts:
        attempt = seen.attempt
        request = attempt.request
        if request.model is None or request.kind is not RequestKind.GENERATE or not request.stream:
            continue
        of = measured.setdefault((attempt.server.name, request.model), _Samples())
        if attempt.first_token_ns is None:
            if attempt.state is AttemptState.CANCELLED and not attempt.cold:
                of.lost.append(seen.ended_ns - attempt.started_ns)
            continue
        took_ns = attempt.first_token_ns - attempt.started_ns
        if attempt.loader:
            of.cold.append(took_ns)
        elif not attempt.cold and seen.company <= attempt.server.slots:
            of.first.append(took_ns)
            if seen.company == 1:
                of.alone.append(took_ns)
        if attempt.state is AttemptState.SUCCEEDED and attempt.n_tokens > 1:
            span_ns = attempt.last_chunk_ns - attempt.first_token_ns
            of.gaps.append((min(seen.company, attempt.server.slots), span_ns / (attempt.n_tokens - 1)))
    return measured


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return the time between tokens alone, ns, and the share that each further stream adds.

    Least squares through the median of each number of streams, weighted by how often it was seen: a stream that
    stalled, or waited for a suspended machine, says nothing of the speed.
    """
    by_company: dict[int, list[float]] = {}
    for company, gap_ns in points:
        by_company.setdefault(company, []).append(gap_ns)
    medians = [(company, percentile(gaps, 50), len(gaps)) for company, gaps in sorted(by_company.items())]
    n = sum(weight for _, _, weight in medians)
    mean_k = sum(k * weight for k, _, weight in medians) / n
    mean_gap = sum(gap * weight for _, gap, weight in medians) / n
    spread = sum(weight * (k - mean_k) ** 2 for k, _, weight in medians)
    slope = sum(weight * (k - mean_k) * (gap - mean_gap) for k, gap, weight in medians) / spread if spread else 0.0
    slope = max(0.0, slope)
    alone = max(1.0, mean_gap - slope * (mean_k - 1))
    return alone, slope / alone


@dataclass(frozen=True, slots=True)
class Fit:
    """Service times fitted to a log."""

    specs: tuple[FakeSpec, ...]
    read_ns: dict[tuple[str, str], float]  # mean time that a prompt takes, by server and model
    mean_read_ns: float
    guessed: tuple[str, ...]  # servers and models too little was seen of, in words


def fit(found: Recorded) -> Fit:
    """Return servers that behave as those of the log did."""
    measured = _samples(found)
    known: dict[tuple[str, str], Speed] = {}
    read_ns: dict[tuple[str, str], float] = {}
    for key, of in measured.items():
        if len(of.first) >= SAMPLES_MIN and len(of.gaps) >= SAMPLES_MIN:
            first = of.alone if len(of.alone) >= SAMPLES_MIN else of.first
            least_ns = percentile(first, _LEAST_AT)
            most_ns = percentile(first, _MOST_AT)
            read_ns[key] = max(1.0, _mean([max(0.0, min(took_ns, most_ns) - least_ns) for took_ns in first]))
            token_ns, slowdown = _line(of.gaps)
            load_ns = max(0.0, percentile(of.cold, 50) - least_ns) if of.cold else 0.0
            known[key] = _speed(least_ns, token_ns, slowdown, load_ns)
    mean_read_ns = _mean(list(read_ns.values())) if read_ns else float(MS_NS)
    loads = [speed.load_fixed_ns for speed in known.values() if speed.load_fixed_ns]
    load_ns = round(_mean(loads)) if loads else Speed().load_fixed_ns
    for key, speed in known.items():
        rate = READ_RATE * mean_read_ns / read_ns[key]
        known[key] = replace(speed, prefill_rate=rate, load_fixed_ns=speed.load_fixed_ns or load_ns)
    guessed: list[str] = []
    lost = {key: of.lost for key, of in measured.items() if of.lost}
    specs = tuple(_spec(found, server.name, server.slots, known, lost, guessed) for server in found.config.servers)
    return Fit(specs, read_ns, mean_read_ns, tuple(guessed))


def _speed(first_token_ns: float, token_ns: float, batch_slowdown: float, load_ns: float) -> Speed:
    """Return a speed. What company does to the reading of prompts is in the times that were measured of them."""
    return Speed(
        round(first_token_ns),
        READ_RATE,
        round(token_ns),
        batch_slowdown,
        load_fixed_ns=round(load_ns),
        shared_prefill=False,
    )


def average(speeds: Sequence[Speed]) -> Speed:
    """Return the speed of an average server."""
    return _speed(
        _mean([s.first_token_ns for s in speeds]),
        _mean([s.token_ns for s in speeds]),
        _mean([s.batch_slowdown for s in speeds]),
        _mean([s.load_fixed_ns for s in speeds]),
    )


def _spec(
    found: Recorded,
    name: str,
    slots: int,
    known: dict[tuple[str, str], Speed],
    lost: dict[tuple[str, str], list[int]],
    guessed: list[str],
) -> FakeSpec:
    speeds: list[tuple[str, Speed]] = []
    for model in found.models.get(name, []):
        speed = known.get((name, model))
        if speed is None:
            others = [s for (_, its_model), s in known.items() if its_model == model] or list(known.values())
            speed = _at_least_as_slow(average(others) if others else Speed(), lost.get((name, model), []))
            if others:
                guessed.append(f"{name} with {model}")
        speeds.append((model, speed))
    faults = tuple(_down(found, span) for span in found.down.get(name, []) if span[0] > found.began_ns)
    return FakeSpec(
        name,
        models=tuple(FakeModel(model) for model, _ in speeds),
        start_loaded=tuple(model for model in found.loaded.get(name, []) if model in found.models.get(name, [])),
        num_parallel=slots,
        vram_bytes=0,
        max_loaded=1000,
        speeds=tuple(speeds),
        faults=faults,
    )


def _at_least_as_slow(speed: Speed, lost: Sequence[int]) -> Speed:
    """Return a speed at which the races that were lost without a token would have been lost."""
    if not lost:
        return speed
    factor = max(1.0, percentile(lost, 90) / max(1, speed.first_token_ns))
    return replace(
        speed,
        first_token_ns=round(speed.first_token_ns * factor),
        prefill_rate=speed.prefill_rate / factor,
        token_ns=round(speed.token_ns * factor),
    )


def _down(found: Recorded, span: Sequence[int]) -> Fault:
    until_ns = span[1] or found.ended_ns
    return Fault(
        FaultKind.REFUSE,
        (span[0] - found.began_ns) / SECOND_NS,
        (max(until_ns, span[0] + 1) - found.began_ns) / SECOND_NS,
    )


# --- requests ----------------------------------------------------------------------------------------------------


class RecordedSource:
    """The requests of a log, as they came; `speed` times faster."""

    def __init__(self, found: Recorded, fitted: Fit, speed: float = 1.0) -> None:
        self._found = found
        self._fitted = fitted
        self._speed = speed

    def asks(self) -> Iterator[Ask]:
        """Return the asks, by time."""
        tokens = [r.committed.n_tokens for r in self._found.requests if _is_whole(r) and r.committed is not None]
        usual = max(1, round(percentile(tokens, 50))) if tokens else 1
        number = 0
        for request in self._found.requests:
            if request.kind is not RequestKind.GENERATE or request.model is None or not request.generates:
                continue
            number += 1
            committed = request.committed
            whole = committed is not None and _is_whole(request)
            left_ns = None
            if request.state is RequestState.ABORTED and request.id in self._found.ends:
                left_ns = self._found.ends[request.id] - request.arrived_ns
            yield Ask(
                number,
                round((request.arrived_ns - self._found.began_ns) / self._speed),
                request.model,
                self._prompt(committed),
                max(1, committed.n_tokens if whole and committed is not None else usual),
                route=request.event.route,
                stream=request.stream,
                leaves_after_ns=left_ns,
            )

    def _prompt(self, attempt: Attempt | None) -> int:
        """Return how long the prompt was, in units that the average server reads `READ_RATE` of in a second."""
        fitted = self._fitted
        if attempt is None or attempt.first_token_ns is None or attempt.cold or attempt.request.model is None:
            return max(1, round(fitted.mean_read_ns / MS_NS))
        key = attempt.server.name, attempt.request.model
        spec = next((spec for spec in fitted.specs if spec.name == key[0]), None)
        if spec is None or key not in fitted.read_ns:
            return max(1, round(fitted.mean_read_ns / MS_NS))
        speed = spec.speed(key[1])
        took_ns = attempt.first_token_ns - attempt.started_ns - speed.first_token_ns
        most_ns = 20 * fitted.read_ns[key]  # what waited for a slot looks like a very long prompt
        return max(1, round(min(max(0, took_ns), most_ns) / SECOND_NS * speed.prefill_rate))

    def follow_up(self, ask: Ask, ended_ns: int, *, completed: bool) -> None:  # noqa: ARG002
        """Return None: what came next in a conversation is in the log as well."""
        return


def _is_whole(request: Request) -> bool:
    return request.state is RequestState.DONE and request.committed is not None


def recorded_results(found: Recorded) -> list[RequestResult]:
    """Return what became of the requests of a log, as a run of the simulator would tell it."""
    results: list[RequestResult] = []
    for request in found.requests:
        if request.kind is not RequestKind.GENERATE or request.model is None or not request.generates:
            continue
        ask = Ask(request.id, request.arrived_ns - found.began_ns, request.model, 0, 0, stream=request.stream)
        ended_ns = found.ends.get(request.id, found.ended_ns) - found.began_ns
        committed_ns = found.first_tokens.get(request.id)
        result = RequestResult(ask, _OUTCOMES.get(request.state, Outcome.UNFINISHED), ended_ns=ended_ns)
        if committed_ns is not None and request.stream:
            result.first_token_ns = committed_ns - found.began_ns
        result.n_attempts = len(request.attempts)
        result.tokens = request.committed.n_tokens if request.committed is not None else 0
        results.append(result)
    return results


_OUTCOMES = {
    RequestState.DONE: Outcome.COMPLETED,
    RequestState.FAILED: Outcome.FAILED,
    RequestState.REJECTED: Outcome.REJECTED,
    RequestState.ABORTED: Outcome.LEFT,
}
