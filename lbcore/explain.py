"""Why a request went where it went: every choice made for it, from a log, with what spoke for and against each server.

Nothing is decided here. The log is replayed up to each call in which an attempt was started for the request (or it had
to wait), and the core's own rules (`lbcore.selection`, `lbcore.placement`) are asked about the state just before it.
Whatever knows the inside of these rules stands in this file alone.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lbcore import aliases, events, selection
from lbcore.admission import RACE_BURST
from lbcore.balancer import LoadBalancer
from lbcore.commands import AttemptKind
from lbcore.comparison import event_text, outcome_texts
from lbcore.config import Policy, Strategy
from lbcore.events import Event
from lbcore.ollama import RequestKind, canonical_model
from lbcore.placement import is_in_doubt
from lbcore.records import TTFT_UNKNOWN_NS, Request, Server, ServerModel
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.states import ServerState
from lbcore.trace import Replay, Start
from lbcore.units import counted


@dataclass(frozen=True, slots=True)
class Candidate:
    """One server at the moment of a choice. What is unknown or does not apply is None."""

    server: str
    chosen_as: str  # primary, racer, hedge, retry, or "" for not chosen
    why: str
    state: str
    health: float
    reliability: str
    doubted: bool
    in_flight: int  # of this model
    in_flight_others: int  # of the server's other models
    slots: int
    loaded: bool | None
    expected_ms: float | None  # to the first token
    rank: int | None  # how often that doubles the best one's
    weight: float | None  # in the draw within a rank
    chance: float | None  # to be drawn first


@dataclass(frozen=True, slots=True)
class Choice:
    """A call in which servers were chosen for the request, or in which none could be."""

    line: int
    at_ms: float  # since the request arrived
    event: str
    candidates: tuple[Candidate, ...]
    race_credits: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Moment:
    """One call that has to do with the request."""

    line: int
    at_ms: float
    event: str
    outcome: tuple[str, ...]  # only what is about the request


@dataclass(slots=True)
class Explanation:
    """The story of one request."""

    request_id: int
    about: str = ""  # its arrival
    choices: list[Choice] = field(default_factory=list)
    story: list[Moment] = field(default_factory=list)
    truncated: int | None = None
    ended: bool = False  # its end is told
    same: bool = True  # the replay did what was recorded, up to the end of the request


class UnknownRequestError(LookupError):
    """The log tells of no such request; its message says which ones it knows."""


_OUTCOMES = frozenset({"finished", "failed", "rejected", "aborted"})


def explain_at(lines: Iterable[str], request_id: int, start: Start | None = None) -> Explanation:
    """Replay a log and explain one request. Raises LogError, and UnknownRequestError when it is not in there."""
    steps = explaining(lines, request_id, start)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            told: Explanation = done.value
            return told


def explaining(
    lines: Iterable[str], request_id: int, start: Start | None = None
) -> Generator[None, None, Explanation]:
    """Do the same, call by call, for who has other things to do in between; the explanation is what it returns.

    With a `start` the lines are calls and nothing else.
    """
    told = Explanation(request_id)
    watcher = _Watcher(told)
    replay = Replay(
        lines,
        before=lambda event, now_ns, line: watcher.before(replay.balancer, event, now_ns, line),
        start=start,
    )
    watcher.known = dict.fromkeys(replay.balancer.ledger.requests)
    for step in replay:
        watcher.after(step.line, step.now_ns, step.recorded)
        told.same = told.same and step.same
        if told.ended:
            break
        yield
    told.truncated = replay.truncated
    if not told.story:
        raise UnknownRequestError(watcher.unknown())
    return told


class _Watcher:
    """Looks at each call before and after it is made again."""

    def __init__(self, told: Explanation) -> None:
        self.known: dict[int, None] = {}
        self._told = told
        self._arrived_ns: int | None = None
        self._chooses = False
        self._candidates: tuple[Candidate, ...] = ()
        self._notes: tuple[str, ...] = ()
        self._credits = 0.0
        self._attempts: dict[int, None] = {}

    def unknown(self) -> str:
        """Return what is said when the request never came up."""
        ids = list(self.known)
        if not ids:
            return f"there is no request {self._told.request_id} in this log; it has none at all"
        return f"there is no request {self._told.request_id} in this log; it has {min(ids)} to {max(ids)}"

    def before(self, balancer: LoadBalancer, event: Event | None, now_ns: int, line: str) -> None:
        """Look at the state in which a call finds the core, if servers are chosen for the request in it."""
        self._chooses = False
        wanted = self._told.request_id
        arrives = isinstance(event, events.RequestArrived)
        if isinstance(event, events.RequestArrived):
            self.known[event.request_id] = None
            arrives = event.request_id == wanted
            if arrives:
                self._told.about = event_text(line)
        if not arrives and f'["start",{wanted},' not in line:
            return
        came = json.loads(line)[2]
        started = [c for c in came if c[0] == "start" and c[1] == wanted] if isinstance(came, list) else []
        request = balancer.ledger.requests.get(wanted)
        if request is None and isinstance(event, events.RequestArrived):
            model = canonical_model(event.model) if event.model else None
            request = Request(event, model, balancer.config.route(event.route), now_ns)
            aliases.begin(request, balancer.config, balancer.fleet)
        if request is None or not (started or arrives):
            return
        self._chooses = True
        earned = balancer.config.race.budget if arrives else 0.0
        self._credits = min(balancer.placement.race_budget.credits + earned, max(RACE_BURST, earned))
        used = [c[2] for c in came if c[0] == "use" and c[1] == wanted] if isinstance(came, list) else []
        with _as_used(request, used[-1] if used else "", starts=bool(started)):
            self._candidates = tuple(_candidates(balancer, request, started, self._credits, now_ns))
            self._notes = tuple(_notes(balancer, request, started))

    def after(self, number: int, now_ns: int, line: str) -> None:
        """Take down what came of the call for the request."""
        wanted = self._told.request_id
        call = json.loads(line)
        told, came = call[1], call[2] if isinstance(call[2], list) else []
        own = [index for index, command in enumerate(came) if self._is_own(command)]
        named = (
            told is not None
            and len(told) > 1
            and (
                (told[0] in {"arrived", "closed"} and told[1] == wanted)
                or (told[0] in _OF_ATTEMPTS and told[1] in self._attempts)
            )
        )
        if not own and not named:
            return
        if self._arrived_ns is None:
            self._arrived_ns = now_ns
        at_ms = (now_ns - self._arrived_ns) / MS_NS
        texts = outcome_texts(line)
        self._told.story.append(Moment(number, at_ms, event_text(line), tuple(texts[index] for index in own)))
        if self._chooses:
            choice = Choice(number, at_ms, event_text(line), self._candidates, self._credits, self._notes)
            self._told.choices.append(choice)
        self._told.ended = any(came[i][0] == "decision" and came[i][1] in _OUTCOMES for i in own)

    def _is_own(self, command: list[Any]) -> bool:
        """Tell whether a command is about the request or one of its attempts."""
        code, first, *rest = command
        if code == "start" and first == self._told.request_id:
            self._attempts[rest[0]] = None
        if code == "cancel":
            return first in self._attempts
        about = rest[0] if code == "decision" else first if code in _OF_REQUESTS else 0
        return bool(about == self._told.request_id)


@contextmanager
def _as_used(request: Request, used: str, *, starts: bool) -> Iterator[None]:
    """Make a request for an alias look as it does when servers are chosen, which may be for another model than before.

    `used` is the model that the call commands to use; without that, what was sent, or the client has written, stays.
    """
    use = request.alias
    if use is not None and starts and not used and use.sent == use.asked:
        used = request.event.model or ""
    if use is None or not used or request.model == canonical_model(used):
        yield
        return
    before = request.model, use.name, use.attempts_from
    request.model, use.name, use.attempts_from = canonical_model(used), used, len(request.attempts)
    try:
        yield
    finally:
        request.model, use.name, use.attempts_from = before


_OF_ATTEMPTS = frozenset({"connected", "head", "token", "full", "ended", "failed"})
_OF_REQUESTS = frozenset({"start", "use", "commit", "pass", "reject", "abort"})


# --- the rules, asked once more --------------------------------------------------------------------------------


def _candidates(
    balancer: LoadBalancer, request: Request, started: list[list[Any]], race_credits: float, now_ns: int
) -> Iterable[Candidate]:
    """Yield every server with what spoke for or against it."""
    chosen_as = {server_id: str(kind) for _, _, _, server_id, kind in started}
    holders = selection.eligible(_holders(balancer, request), request)
    drawn = [server for server in holders if selection.has_room(server, request)]
    ranks = dict(zip((s.id for s in drawn), _ranks(balancer, drawn, request, now_ns), strict=True))
    weights = {server.id: selection.weight_of(server) for server in drawn}
    by_load = balancer.config.selection.policy is not Policy.HEALTH
    groups = {
        s.id: (selection.is_passed_over(s, now_ns), ranks[s.id], selection.load_of(s) if by_load else 0) for s in drawn
    }
    first_group = min(groups.values(), default=None)
    front = [server for server in drawn if groups[server.id] == first_group]
    total = sum(weights[server.id] for server in front) or 1.0
    known = [record.known_ns for server in holders if (record := _record(server, request)) and record.known_ns]
    best_ns = min(known, default=TTFT_UNKNOWN_NS)
    rivals = _Rivals(ranks, groups, started, race_credits)
    for server in balancer.fleet:
        record = _record(server, request)
        rank = ranks.get(server.id)
        expected_ns = None if record is None else _expected_ns(balancer, server, record, request, best_ns, now_ns)
        kind = chosen_as.get(server.id, "")
        why = _why_chosen(server, request, kind, rivals, now_ns) if kind else (
            _why_not(balancer, server, request, rivals, now_ns))  # fmt: skip
        yield Candidate(
            server.name,
            kind,
            why,
            server.state,
            round(server.health, 2),
            server.reliability,
            server.doubted,
            server.in_flight if record is None else record.in_flight,
            0 if record is None else server.in_flight - record.in_flight,
            server.slots,
            None if record is None else record.loaded,
            None if expected_ns is None else round(expected_ns / MS_NS, 1),
            rank,
            None if rank is None else round(weights[server.id], 3),
            round(weights[server.id] / total, 3) if server in front else None,
        )


def _holders(balancer: LoadBalancer, request: Request) -> list[Server]:
    """Return the live servers from among which is chosen: those that the client named, whatever they have."""
    names = request.event.servers
    if not names:
        return balancer.fleet.holders(request.model)
    return [server for server in balancer.fleet.holders(None) if server.name in names]


@dataclass(frozen=True, slots=True)
class _Rivals:
    """All that were drawn from, and who was chosen."""

    ranks: Mapping[int, int]
    groups: Mapping[int, tuple[bool, int, int]]  # passed over, rank, load: only those of one group are drawn from
    started: list[list[Any]]
    credits: float  # for racers and hedges

    def first_rank(self) -> int:
        """Return the rank of the server that was chosen first; the lowest one when it was not drawn."""
        first = self.started[0][3] if self.started else 0
        return self.ranks.get(first, min(self.ranks.values(), default=0))


def _record(server: Server, request: Request) -> ServerModel | None:
    return server.models.get(request.model or "") if request.generates else None


def _ranks(balancer: LoadBalancer, drawn: list[Server], request: Request, now_ns: int) -> list[int]:
    model = request.model
    if not drawn or model is None or not request.generates:
        return [0] * len(drawn)
    held = [server.models.get(model) or ServerModel() for server in drawn]  # who is named may not have it
    return selection.ranks_of(drawn, held, request, balancer.config, now_ns)


def _expected_ns(
    balancer: LoadBalancer, server: Server, record: ServerModel, request: Request, best_ns: float, now_ns: int
) -> float | None:
    if balancer.config.selection.policy is Policy.HEALTH:
        return None
    known_ns: float = record.known_ns or best_ns
    if known_ns >= 2 * best_ns:
        known_ns = selection.faded_ns(record, best_ns, now_ns, balancer.config.selection.forget_ns)
    return selection.expected_ns(server, record, request.runner_key, known_ns, now_ns)


def _why_chosen(server: Server, request: Request, kind: str, rivals: _Rivals, now_ns: int) -> str:
    if server.state is ServerState.DEAD:
        return "dead, and tried all the same: to find out whether it still is, or since nobody alive has the model"
    if server.id not in rivals.ranks:
        return "full, but there was nobody else" if kind == AttemptKind.RETRY else "nobody else was left to ask"
    how = _how_drawn(server, rivals)
    if kind == AttemptKind.RACER and server.doubted:
        return f"{how}; doubted, so beside another"
    if selection.is_passed_over(server, now_ns):
        return f"{how}; distrusted, but others could not be asked"
    return f"{how}; ready" if selection.is_ready(server, request) else f"{how}; not ready at once"


def _how_drawn(server: Server, rivals: _Rivals) -> str:
    """Return from among whom a server was drawn."""
    rank = rivals.ranks[server.id]
    of_rank = sum(other == rank for other in rivals.ranks.values())
    peers = sum(group == rivals.groups[server.id] for group in rivals.groups.values())
    if peers > 1:
        return f"drawn by weight from {peers} of rank {rank}"
    if of_rank > 1 and rivals.groups[server.id] == min(g for g in rivals.groups.values() if g[1] == rank):
        return f"the least in flight for its slots of {of_rank} of rank {rank}"
    return "the only one to choose from" if len(rivals.ranks) == 1 else f"rank {rank}"


def _why_not(balancer: LoadBalancer, server: Server, request: Request, rivals: _Rivals, now_ns: int) -> str:
    """Return the first thing that speaks against a server, in the order in which the core asks."""
    if server.state is ServerState.DRAINING:
        return "it is being removed"
    names = request.event.servers
    if names and server.name not in names:
        return f"the client named {', '.join(names)}"
    if server.state is ServerState.DEAD:
        return f"dead: {server.last_error or 'not probed yet'}"
    if not names and request.model is not None and not server.has(request.model):
        return "it does not have the model"
    if request.has_tried(server):
        return "it was asked already"
    record = _record(server, request)
    if not selection.has_room(server, request):
        in_flight = 0 if record is None else record.in_flight
        return f"full: {in_flight} in flight, {server.in_flight_max} allowed"
    if not rivals.started:
        return "nobody was asked"
    if selection.is_passed_over(server, now_ns):
        left_s = max(0, server.trusted_from_ns - now_ns) / SECOND_NS
        return (
            f"distrusted, streams broke there: passed over for {left_s:.1f} s" if left_s else "its second chance runs"
        )
    if rivals.started[0][4] == AttemptKind.HEDGE and not selection.is_ready(server, request):
        return "no hedge: the model is not loaded there, or its slots are busy"
    rank, first = rivals.ranks.get(server.id, 0), rivals.first_rank()
    if rank > first:
        return f"outranked: rank {rank} against {first}, each step doubles the expected first-token time"
    ahead = balancer.fleet.servers.get(rivals.started[0][3])
    by_load = balancer.config.selection.policy is not Policy.HEALTH and ahead is not None
    if by_load and ahead is not None and selection.load_of(server) > selection.load_of(ahead):
        how = f"more in flight for its slots than {ahead.name}"
    else:
        how = "not drawn first"
    return f"{how}; {_why_no_racer(balancer, server, request, rivals)}"


def _why_no_racer(balancer: LoadBalancer, server: Server, request: Request, rivals: _Rivals) -> str:
    """Return why a server that could have raced beside the first one does not."""
    route = request.route
    if request.kind is not RequestKind.GENERATE or route.strategy not in {Strategy.RACE, Strategy.HEDGE}:
        return "and nobody races here"
    if rivals.started[0][4] not in {AttemptKind.PRIMARY, AttemptKind.RACER}:
        return f"and only one is asked as a {rivals.started[0][4]}"
    if len(rivals.started) >= route.racers_max:
        return f"and {route.racers_max} race already" if route.racers_max > 1 else "and only one is asked at first"
    record = _record(server, request)
    if record is not None and not record.is_warm(request.runner_key):
        return "no racer: the model is not loaded there as asked"
    if not selection.is_ready(server, request):
        return "no racer: its slots are busy"
    if server.doubted:
        return "no racer: doubted, since it lost races without a byte"
    if rivals.credits < 1.0:
        return "no racer: the race budget is spent"
    return f"no racer: more than {balancer.config.race.utilisation_max:.0%} of the model's slots are in use"


def _notes(balancer: LoadBalancer, request: Request, started: list[list[Any]]) -> Iterable[str]:
    """Yield what is to be known of the whole choice."""
    ledger = balancer.ledger
    n_alive = sum(server.is_alive for server in balancer.fleet)
    under_way = counted(len(ledger.requests), "request")
    yield f"{n_alive} of {counted(len(balancer.fleet.servers), 'server')} alive, {under_way} under way before"
    if request.alias is not None:
        use = request.alias
        given_up = f"; given up: {', '.join(use.given_up)}" if use.given_up else ""
        yield f"'{request.event.model}' stands for {', else '.join(use.models)}; at present for {use.name}{given_up}"
    if len(ledger.queue):
        yield f"in the queue: {counted(len(ledger.queue), 'request')}"
    if started and started[0][4] == AttemptKind.HEDGE and request.live_attempts:
        hopeless = all(is_in_doubt(attempt.server) for attempt in request.live_attempts)
        yield "all servers asked so far are in doubt" if hopeless else "the servers asked so far are not in doubt"
    if started and started[0][4] == AttemptKind.RETRY:
        budget = ledger.retry_budget
        yield f"{counted(budget.under_way, 'retry')} under way, {budget.left} more allowed"
