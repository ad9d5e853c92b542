"""Where the asks of a run come from: what a workload says, and the sources that make its asks from it.

Every ask is made when it is drawn, so that a workload costs memory only for the conversations under way (and for the
names of a trace's sessions). Ids are 1, 2, 3 ... in the order in which asks are made, follow-ups included: they are
unique, and the same in every run that does the same. What an ask contains depends on the seed and on its place alone
(the how-manieth arrival, or the session and its turn), never on when the answers to others came. Arrivals, lengths and
traits are drawn from generators of their own, so that a change of one setting changes nothing else.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice, repeat
from operator import attrgetter
from pathlib import Path
from random import Random
from typing import NamedTuple, Protocol

from simulator.fleet import DEFAULT_MODEL
from simulator.workloads.arrivals import Arrivals, Poisson
from simulator.workloads.asks import BLOCK_TOKENS, Ask, Source
from simulator.workloads.lengths import Amount, Mix
from simulator.workloads.traces import Row, format_of, read_trace

# --- the settings --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leave:
    """How many clients give up, and when: after their request, unless its answer is complete by then."""

    share: float
    after: Amount  # ns


@dataclass(frozen=True, slots=True)
class Traits:
    """What is drawn for every request, whenever it comes."""

    models: Mix[str] | None = None  # None: the trace's own, or `DEFAULT_MODEL`
    num_ctx: Mix[int | None] | None = None
    route: str = "/api/chat"
    stream: float = 1.0
    poison: float = 0.0
    leave: Leave | None = None


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests that come whatever becomes of those before them."""

    traits: Traits
    arrivals: Arrivals
    prompt: Amount
    output: Amount
    start_ns: int = 0
    requests: int | None = None
    duration_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Sessions:
    """Conversations; `users` or `rate`."""

    traits: Traits
    prompt: Amount  # of the first turn
    new: Amount  # tokens that each later turn adds to the history
    output: Amount
    turns: Amount
    think: Amount  # ns
    users: int | None = None
    rate: float | None = None
    prompt_max: int = 32_768
    start_ns: int = 0
    requests: int | None = None
    duration_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests as a file has them."""

    traits: Traits
    path: Path
    format_name: str = ""
    rename: tuple[tuple[str, str], ...] = ()
    start_ns: int = 0
    duration_ns: int | None = None
    speed: float = 1.0
    limit: int | None = None
    repeat: int = 1
    sort: bool = False


Settings = OpenLoop | Sessions | Trace
Workload = tuple[Settings, ...]


def scaled(workload: Workload, factor: float) -> Workload:
    """Return the workload at `factor` times its load: higher rates, more users, a faster trace. A herd stays as it is.

    Numbers of requests and durations stay too.
    """
    return tuple(_scaled(settings, factor) for settings in workload)


def _scaled(settings: Settings, factor: float) -> Settings:
    if isinstance(settings, OpenLoop):
        return replace(settings, arrivals=settings.arrivals.scaled(factor))
    if isinstance(settings, Trace):
        return replace(settings, speed=settings.speed * factor)
    users = None if settings.users is None else max(1, round(settings.users * factor))
    return replace(settings, users=users, rate=None if settings.rate is None else settings.rate * factor)


def models_of(settings: Settings) -> tuple[str, ...]:
    """Return the models that are asked for; none when only the trace's file knows."""
    if settings.traits.models is not None:
        return settings.traits.models.values
    return () if isinstance(settings, Trace) else (DEFAULT_MODEL,)


# --- the sources ---------------------------------------------------------------------------------------------------

_TABLE_BITS = 80  # blocks of different tables, or passes of a trace, are never the same
_PASS_BITS = 60
_SESSION_BITS = 20  # blocks of one session; at 512 tokens each, more than any prompt has


def make_source(workload: Workload, seed: int) -> Source:
    """Return a source of the workload's asks; it serves one run."""
    return _Source(workload, seed)


class _Place(NamedTuple):
    """Which of how many tables of a workload this is; sessions of different tables never have the same number."""

    table: int  # from 0 on
    of: int
    seed: int

    def rng(self, stream: str) -> Random:
        """Return the generator of one kind of draws; seeding by text does not depend on hash randomization."""
        return Random(f"{self.seed}/{self.table}/{stream}")

    def session(self, number: int) -> int:
        """Return the number, unique in the workload, of this table's session `number`, from 0 on."""
        return number * self.of + self.table + 1


class _Part(Protocol):
    """The source of one table's asks; it takes their ids from `ids`."""

    notes: list[str]

    def asks(self, ids: Iterator[int]) -> Iterator[Ask]: ...

    def follow_up(self, ask: Ask, ended_ns: int, ids: Iterator[int], *, completed: bool) -> Ask | None: ...


class _Source:
    """The asks of all tables, merged by time."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._parts = [_part(settings, _Place(index, len(workload), seed)) for index, settings in enumerate(workload)]
        self._ids = count(1)
        self._begun = False

    def asks(self) -> Iterator[Ask]:
        """Return the asks whose moment does not depend on any answer; once."""
        if self._begun:
            raise RuntimeError("a source serves one run: make another")
        self._begun = True
        if len(self._parts) == 1:
            return self._parts[0].asks(self._ids)
        merged = heapq.merge(*(part.asks(repeat(0)) for part in self._parts), key=attrgetter("arrives_ns"))
        return (replace(ask, id=next(self._ids)) for ask in merged)

    def follow_up(self, ask: Ask, ended_ns: int, *, completed: bool) -> Ask | None:
        """Return what the client of `ask` asks next; None: nothing more."""
        if not ask.session:
            return None
        part = self._parts[(ask.session - 1) % len(self._parts)]
        return part.follow_up(ask, ended_ns, self._ids, completed=completed)

    @property
    def notes(self) -> list[str]:
        """What was left out of traces so far, in words."""
        return [note for part in self._parts for note in part.notes]


def _part(settings: Settings, place: _Place) -> _Part:
    if isinstance(settings, OpenLoop):
        return _OpenLoopPart(settings, place)
    return _SessionsPart(settings, place) if isinstance(settings, Sessions) else _TracePart(settings, place)


class _Draws:
    """What is drawn for every request besides its lengths: one number for each trait, whether it is used or not."""

    def __init__(self, traits: Traits) -> None:
        self._traits = traits

    def model(self, u: float, default: str = DEFAULT_MODEL) -> str:
        """Return the model asked."""
        return self._traits.models.at(u) if self._traits.models else default

    def num_ctx(self, u: float) -> int | None:
        """Return the context asked for."""
        return self._traits.num_ctx.at(u) if self._traits.num_ctx else None

    def stream(self, u: float) -> bool:
        """Return whether the answer is to be streamed."""
        return u < self._traits.stream

    def poison(self, u: float) -> bool:
        """Return whether the request crashes its runner."""
        return u < self._traits.poison

    def leaves_after_ns(self, u: float) -> int | None:
        """Return when the client gives up; the rest of `u` is as uniform as `u` was."""
        leave = self._traits.leave
        return leave.after.at(u / leave.share) if leave and u < leave.share else None

    @property
    def route(self) -> str:
        """Where requests go."""
        return self._traits.route


class _OpenLoopPart:
    def __init__(self, settings: OpenLoop, place: _Place) -> None:
        self._settings = settings
        self._place = place
        self.notes: list[str] = []

    def asks(self, ids: Iterator[int]) -> Iterator[Ask]:
        settings, draws = self._settings, _Draws(self._settings.traits)
        lengths, traits = self._place.rng("lengths").random, self._place.rng("traits").random
        for at_ns in islice(settings.arrivals.times(self._place.rng("arrivals")), settings.requests):
            if settings.duration_ns is not None and at_ns >= settings.duration_ns:
                return
            yield Ask(
                next(ids),
                settings.start_ns + at_ns,
                draws.model(traits()),
                settings.prompt.at(lengths()),
                settings.output.at(lengths()),
                draws.route,
                draws.stream(traits()),
                draws.num_ctx(traits()),
                leaves_after_ns=draws.leaves_after_ns(traits()),
                poison=draws.poison(traits()),
            )

    def follow_up(self, _: Ask, __: int, ___: Iterator[int], *, completed: bool) -> None:
        """Nothing follows."""


class _TracePart:
    def __init__(self, settings: Trace, place: _Place) -> None:
        self._settings = settings
        self._place = place
        self._sessions: dict[str, int] = {}
        self.notes: list[str] = []

    def asks(self, ids: Iterator[int]) -> Iterator[Ask]:
        settings, draws = self._settings, _Draws(self._settings.traits)
        traits, rename = self._place.rng("traits").random, dict(settings.rename)
        for at_ns, lap, row in self._rows():
            if settings.duration_ns is not None and at_ns >= settings.duration_ns:
                return
            model = rename.get(row.model, row.model) or DEFAULT_MODEL
            stream, num_ctx, leave = traits(), traits(), traits()
            yield Ask(
                next(ids),
                settings.start_ns + at_ns,
                draws.model(traits(), model),
                row.prompt_tokens,
                row.output_tokens,
                row.route or draws.route,
                draws.stream(stream) if row.stream is None else row.stream,
                draws.num_ctx(num_ctx) if row.num_ctx is None else row.num_ctx,
                self._session(row, lap),
                self._blocks(row, lap),
                draws.leaves_after_ns(leave) if row.leaves_after_ns is None else row.leaves_after_ns,
                draws.poison(traits()),
            )

    def _rows(self) -> Iterator[tuple[int, int, Row]]:
        """Yield every row with its time since the start, and the lap it is in; a lap ends a mean gap after its last."""
        settings = self._settings
        from_first = format_of(settings.path, settings.format_name).from_first
        held: list[Row] | None = [] if settings.sort and settings.repeat > 1 else None
        lap_ns, lap_length_ns = 0, 0
        for lap in range(settings.repeat):
            zero_ns, first_ns, last_ns, n = 0, 0, 0, 0
            for row in islice(held if lap and held is not None else self._read(lap, held), settings.limit):
                if not n:
                    first_ns = row.at_ns
                    zero_ns = first_ns if from_first or lap else 0
                last_ns, n = row.at_ns, n + 1
                yield self._sped_up(lap_ns + row.at_ns - zero_ns), lap, row
            if not lap:
                lap_length_ns = last_ns - first_ns + (last_ns - first_ns) // max(1, n - 1)
                lap_ns = first_ns - zero_ns
            lap_ns += lap_length_ns

    def _read(self, lap: int, held: list[Row] | None) -> Iterator[Row]:
        settings = self._settings
        notes = self.notes if lap == 0 else None
        rows = read_trace(settings.path, settings.format_name, sort=settings.sort, notes=notes)
        if held is None:
            return rows
        held.extend(rows)
        return iter(held)

    def _sped_up(self, at_ns: int) -> int:
        return at_ns if self._settings.speed == 1.0 else round(at_ns / self._settings.speed)

    def _session(self, row: Row, lap: int) -> int:
        if not row.session:
            return 0
        name = row.session if not lap else f"{lap}/{row.session}"
        return self._place.session(self._sessions.setdefault(name, len(self._sessions)))

    def _blocks(self, row: Row, lap: int) -> tuple[int, ...]:
        """Return the row's blocks; each lap begins with nothing in any cache, as the first did."""
        base = (self._place.table << _TABLE_BITS) + (lap << _PASS_BITS)
        return tuple(base + block for block in row.blocks) if base else row.blocks

    def follow_up(self, _: Ask, __: int, ___: Iterator[int], *, completed: bool) -> None:
        """Nothing follows: the trace has it all."""


@dataclass(slots=True)
class _Session:
    """A conversation under way."""

    number: int  # among its table's, from 0 on
    rng: Random
    model: str
    num_ctx: int | None
    turns_left: int
    prompt_tokens: int = 0  # of the last turn
    output_tokens: int = 0


class _SessionsPart:
    """Conversations.

    The prompt of a turn is the last one's prompt and answer, and new words. So the `blocks` of a turn stand for its
    prompt *and its answer*, to the nearest block: what a server that answered it holds, and what the next turn's
    prompt begins with. A turn that failed is asked again, with the same prompt and the same blocks, and counts as one
    of the session's turns. A prompt of `prompt_max` was cut at its beginning and shares nothing.
    """

    def __init__(self, settings: Sessions, place: _Place) -> None:
        self._settings = settings
        self._place = place
        self._draws = _Draws(settings.traits)
        self._under_way: dict[int, _Session] = {}
        self._n_made = 0
        self.notes: list[str] = []

    def asks(self, ids: Iterator[int]) -> Iterator[Ask]:
        for number, at_ns in self._beginnings():
            session = self._begin(number)
            ask = self._turn(session, self._settings.start_ns + at_ns, ids)
            if ask is None:
                return
            yield ask

    def _beginnings(self) -> Iterable[tuple[int, int]]:
        """Return the number of each session that begins by itself, and when."""
        settings = self._settings
        if settings.users is None:
            return enumerate(Poisson(settings.rate or 1.0).times(self._place.rng("arrivals")))
        u = self._place.rng("arrivals").random  # the run finds its users somewhere in their thoughts, not all at once
        first_ns = [(round(settings.think.at(u()) * u()), user) for user in range(settings.users)]
        return ((user, at_ns) for at_ns, user in sorted(first_ns))

    def follow_up(self, ask: Ask, ended_ns: int, ids: Iterator[int], *, completed: bool) -> Ask | None:
        """Return the next turn, or the first of the same user's next session."""
        session = self._under_way.pop((ask.session - 1) // self._place.of, None)
        if session is None:
            return None
        at_ns = ended_ns + self._settings.think.at(session.rng.random())
        if session.turns_left:
            return self._turn(session, at_ns, ids, again=not completed)
        if self._settings.users is None:
            return None
        return self._turn(self._begin(session.number + self._settings.users), at_ns, ids)

    def _begin(self, number: int) -> _Session:
        rng = self._place.rng(f"session {number}")
        return _Session(
            number,
            rng,
            self._draws.model(rng.random()),
            self._draws.num_ctx(rng.random()),
            self._settings.turns.at(rng.random()),
        )

    def _turn(self, session: _Session, at_ns: int, ids: Iterator[int], *, again: bool = False) -> Ask | None:
        settings, draws, u = self._settings, self._draws, session.rng.random
        ends_ns = None if settings.duration_ns is None else settings.start_ns + settings.duration_ns
        if self._n_made == settings.requests or (ends_ns is not None and at_ns >= ends_ns):
            return None
        new, output = u(), settings.output.at(u())
        if not again:
            history = session.prompt_tokens + session.output_tokens
            new_tokens = settings.new.at(new) if history else settings.prompt.at(new)
            session.prompt_tokens, session.output_tokens = history + new_tokens, output
        session.turns_left -= 1
        self._n_made += 1
        self._under_way[session.number] = session
        return Ask(
            next(ids),
            at_ns,
            session.model,
            min(session.prompt_tokens, settings.prompt_max),
            session.output_tokens,
            draws.route,
            draws.stream(u()),
            session.num_ctx,
            self._place.session(session.number),
            self._blocks(session),
            draws.leaves_after_ns(u()),
            draws.poison(u()),
        )

    def _blocks(self, session: _Session) -> tuple[int, ...]:
        if session.prompt_tokens > self._settings.prompt_max:
            return ()
        base = (self._place.table << _TABLE_BITS) + ((session.number + 1) << _SESSION_BITS)
        n_blocks = (session.prompt_tokens + session.output_tokens + BLOCK_TOKENS // 2) // BLOCK_TOKENS
        return tuple(range(base, base + n_blocks))
