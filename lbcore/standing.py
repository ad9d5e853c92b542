"""The order of `lbcore.selection` for many servers, kept up to date by what has changed instead of looked for anew.

    standing = Standing(servers, records, runner_key, settings)
    standing.note(touched, moved)              # something about these servers may have changed
    standing.settle(now_ns)
    drawn = standing.draw(rng)                 # the same servers as `selection.order` gives, at the same random numbers

For every server it keeps what `selection.ranks_of` would find, and which servers share a rank and a load. One that has
changed is looked at anew (O(1), and two sums over blocks of 32); all of them are when the soonest one has changed,
which among n equals is once in n changes. Ranks that change as time goes by, since what is known fades and failures are
forgotten, hold until a moment that is computed with them.

Nothing here depends on the way that led to a state: one made anew gives the same order, to the last bit. So it is a
cache, and not part of a snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf, log
from random import Random
from typing import Final, overload

from lbcore.blocks import Least, Lots
from lbcore.config import Policy, SelectionSettings
from lbcore.records import TTFT_UNKNOWN_NS, Server, ServerModel
from lbcore.selection import LAST_RANKS, LOADS, WEIGHT_MIN, Drawn, expected_ns, faded_ns, is_passed_over
from lbcore.states import Reliability

_OUT: Final = -1  # the key of a server that may not be asked
_LN2: Final = log(2.0)
_SURELY: Final = 1.0 - 1e-9  # a rank is said to hold only as far as rounding cannot matter
_MOVES: Final = 0.998  # ranks allow for that much of the soonest time, where it shrinks
_EARLY_NS: Final = 1024  # so large a moment in ns is not exact as a float
_RELIABLE: Final = Reliability.RELIABLE


class Standing:
    """Live servers with their records of one model, in the order in which they are to be asked.

    Without a runner key it is for requests that generate nothing: then neither times nor room matter.
    """

    __slots__ = (
        "_bases",
        "_best_ns",
        "_by_health",
        "_drawn",
        "_expected",
        "_forget_ns",
        "_groups",
        "_in_slots",
        "_keys",
        "_known",
        "_may",
        "_moved",
        "_places",
        "_records",
        "_runner_key",
        "_servers",
        "_shrinks",
        "_soonest_ns",
        "_spare",
        "_stale",
        "_touched",
        "_unready",
        "_until",
        "_window",
        "count",
        "in_slots",
    )

    def __init__(
        self,
        servers: Sequence[Server],
        records: Sequence[ServerModel],
        runner_key: str | None,
        settings: SelectionSettings,
    ) -> None:
        n = len(servers)
        self._servers = servers
        self._records = records
        self._runner_key = runner_key
        self._forget_ns = settings.forget_ns
        self._by_health = settings.policy is Policy.HEALTH
        self._places = {server.id: i for i, server in enumerate(servers)}
        self._touched: dict[int, Server] = {}  # as `note` was told
        self._moved: dict[int, Server] = {}
        self._drawn: list[int] = []  # places of those that are in no group, since they were drawn
        self._stale: dict[int, None] = dict.fromkeys(range(n))  # places to be looked at anew; in a certain order
        self._may = [False] * n  # be asked
        self._known = Least(n)  # first-token times, as far as they are known
        self._expected = Least(n)  # first-token times to be expected, as when they were last looked at
        self._shrinks: dict[int, float] = {}  # places where they shrink by time alone, ns for each ns, at that moment
        self._until = Least(n)  # how long their rank holds, where it may change by time alone
        self._best_ns: float = float(TTFT_UNKNOWN_NS)
        self._soonest_ns: float = inf
        self._window = inf, inf  # as long as the soonest time is in there, all other ranks hold
        self._keys = [_OUT] * n  # of the groups they are in: rank and load
        self._bases = [_OUT] * n  # the key without the load, where that is all that another request changes
        self._groups: dict[int, Lots] = {}
        self._spare: list[Lots] = []
        self._unready: dict[int, None] = {}  # places of those that would not start at once, or are passed over
        self._in_slots = [0] * n
        self.count = 0
        """How many may be asked."""
        self.in_slots = 0
        """Requests in slots of servers that have the model loaded, whether they may be asked or not."""
    def note(self, touched: Mapping[int, Server], moved: Mapping[int, Server]) -> None:
        """Take note of servers (by id) that may have changed: anything about them, or load and health alone (moved)."""
        self._touched.update(touched)
        self._moved.update(moved)

    def settle(self, now_ns: int, without: Iterable[Server] = ()) -> None:
        """Bring everything up to date, as if some servers were not there; until the next call."""
        stale = self._stale
        places = self._places
        for server_id in self._touched:
            if server_id in places:
                stale[places[server_id]] = None
        self._touched.clear()
        left_out = [places[server.id] for server in without if server.id in places]
        for place in left_out:
            stale[place] = None
        if self._until.least() <= now_ns:
            stale.update(dict.fromkeys(self._until.up_to(now_ns)))
        self._shift()
        if not stale:
            return
        best_ns = self._best_ns
        self._see(stale, left_out)
        known_ns = self._known.least()
        self._best_ns = known_ns if known_ns < inf else TTFT_UNKNOWN_NS
        if self._best_ns != best_ns:
            stale.update(dict.fromkeys(self._known.from_on(2 * min(best_ns, self._best_ns))))
        self._expect(stale, now_ns)
        low_ns, high_ns = self._window
        self._soonest_ns = max(self._expected.least(), 1.0)
        if not low_ns <= self._soonest_ns <= high_ns:
            self._expect(list(self._shrinks), now_ns)
            self._soonest_ns = soonest_ns = max(self._expected.least(), 1.0)
            shrinks = self._expected.values.index(soonest_ns) in self._shrinks if soonest_ns > 1.0 else False
            self._window = soonest_ns * _MOVES if shrinks else soonest_ns, soonest_ns
            stale.update(dict.fromkeys(self._shrinks))
            stale.update(dict.fromkeys(self._expected.from_on(2 * min(low_ns, self._window[0]))))
        self._rank(stale, now_ns)
        stale.clear()
        for place in left_out:
            stale[place] = None

    def draw(self, rng: Random) -> Iterator[Server]:
        """Yield the servers in order, as they are drawn; to be used up before the next call of `settle`."""
        groups = self._groups
        while groups:
            group = groups[min(groups)]
            place = group.draw(rng.random() if group.count > 1 else 0.0)
            self._move(place, _OUT, 0.0)
            self._drawn.append(place)
            yield self._servers[place]

    def begins_ready(self) -> bool:
        """Tell whether the first one drawn is the same if only those are there that would start at once.

        So it is when the group drawn from has no others, and the times by which all are ranked are those of a server
        that would. False where that is not known for sure.
        """
        best_ns = self._best_ns
        if not self._groups or best_ns != self._known.least():
            return False
        fastest = self._known.values.index(best_ns)
        if fastest in self._unready or self._expected.values[fastest] != best_ns:
            return False
        keys, first = self._keys, min(self._groups)
        return all(keys[place] != first for place in self._unready)

    def listed(self) -> list[Server]:
        """Return those that may be asked, in the order in which they were named."""
        return [server for server, may in zip(self._servers, self._may, strict=True) if may]

    def ranks(self) -> list[int]:
        """Return the ranks as `selection.ranks_of` does, of those that may be asked and are not passed over."""
        return [key if self._by_health else key // LOADS for key in self._keys if 0 <= key < LAST_RANKS * LOADS]

    def as_told(self, now_ns: int) -> tuple[object, ...]:
        """Return all that the order follows from, to compare it with that of another one."""
        self.settle(now_ns)
        places = {key: [(i, w) for i, w in enumerate(lots.weights) if w] for key, lots in self._groups.items()}
        return places, self.count, self.in_slots

    def _shift(self) -> None:
        """Put those back that were drawn, and those elsewhere of which load or health has changed, if that is all."""
        places, stale, bases, records = self._places, self._stale, self._bases, self._records
        loose = dict.fromkeys(self._drawn)
        for server_id in self._moved:
            if server_id in places:
                loose[places[server_id]] = None
        self._drawn.clear()
        self._moved.clear()
        for place in loose:
            server = self._servers[place]
            if bases[place] == _OUT or place in stale:
                stale[place] = None
                continue
            in_flight, slots = records[place].in_flight, server.slots
            if in_flight >= slots or in_flight >= server.in_flight_max:
                stale[place] = None
                continue
            self.in_slots += in_flight - self._in_slots[place]
            self._in_slots[place] = in_flight
            in_flight = server.in_flight
            weight = (server.health or WEIGHT_MIN) / (1 + in_flight)
            self._move(place, bases[place] + (in_flight << 10) // slots, weight)

    def _see(self, some: Iterable[int], left_out: Sequence[int]) -> None:
        """Look who may be asked, and what is known of them."""
        servers, records, all_may, known = self._servers, self._records, self._may, self._known
        times = known.values
        plain = self._runner_key is not None
        for place in some:
            may = True
            known_ns: float = inf
            if records:
                server, record = servers[place], records[place]
                in_flight = record.in_flight
                in_slots = min(in_flight, server.slots) if record.loaded else 0
                if in_slots != self._in_slots[place]:
                    self.in_slots += in_slots - self._in_slots[place]
                    self._in_slots[place] = in_slots
                if plain:
                    known_ns = record.known_ns or inf
                    may = in_flight < server.in_flight_max
            if left_out and place in left_out:
                may = False
            if not may:
                known_ns = inf
            if may is not all_may[place]:
                all_may[place] = may
                self.count += 1 if may else -1
            if times[place] != known_ns:
                known.put(place, known_ns)

    def _expect(self, some: Iterable[int], now_ns: int) -> None:
        """Note when first tokens can be expected: what `selection.ranks_of` finds."""
        servers, records, all_may, all_shrink, unready = (
            self._servers, self._records, self._may, self._shrinks, self._unready,
        )  # fmt: skip
        runner_key, best_ns, forget_ns = self._runner_key, self._best_ns, self._forget_ns
        expected, times = self._expected, self._expected.values
        for place in some:
            time_ns: float = inf
            shrinks = 0.0
            is_ready = True
            if not all_may[place]:
                pass
            elif runner_key is None:
                time_ns = 1.0
            elif self._by_health:
                server, record = servers[place], records[place]
                is_ready = record.is_warm(runner_key)
                time_ns = 1.0 if is_ready else 2.0
                is_ready = is_ready and record.in_flight < server.slots
            else:
                server, record = servers[place], records[place]
                time_ns = record.known_ns or best_ns
                if time_ns >= 2 * best_ns:
                    time_ns = faded_ns(record, best_ns, now_ns, forget_ns)
                    shrinks = (time_ns - best_ns) * _LN2 / forget_ns
                is_ready = (
                    record.in_flight < server.slots
                    and record.loaded
                    and (record.runner_key is None or record.runner_key == runner_key)
                )
                if not is_ready or record.failing_until_ns > now_ns:
                    time_ns = expected_ns(server, record, runner_key, time_ns, now_ns)
                    if record.failing_until_ns > now_ns:
                        shrinks += 1.0
            if times[place] != time_ns:
                expected.put(place, time_ns)
            if shrinks:
                all_shrink[place] = shrinks
            elif place in all_shrink:
                del all_shrink[place]
            if not is_ready:
                unready[place] = None
            elif place in unready:
                del unready[place]

    def _rank(self, some: Iterable[int], now_ns: int) -> None:
        """Put servers where they belong, and note how long that holds."""
        servers, all_may, all_shrink, bases = self._servers, self._may, self._shrinks, self._bases
        best_ns, soonest_ns, (low_ns, high_ns) = self._best_ns, self._soonest_ns, self._window
        times, until = self._expected.values, self._until
        untils = until.values
        plain = self._runner_key is not None and not self._by_health
        for place in some:
            if not all_may[place]:
                until.put(place, inf)
                bases[place] = _OUT
                self._move(place, _OUT, 0.0)
                continue
            server = servers[place]
            time_ns = times[place]
            rank = 0 if time_ns < 2 * soonest_ns else int(time_ns / soonest_ns).bit_length() - 1
            until_ns: float = inf
            if low_ns < high_ns and time_ns >= low_ns * (2 << rank) * _SURELY:
                until_ns = float(now_ns)  # the soonest may shrink so far that this one falls behind by one more
            elif place in all_shrink:
                shrinks = all_shrink[place]
                if rank or high_ns > best_ns:  # else it never falls below the soonest
                    # It shrinks ever more slowly, so that its rank holds until then at least.
                    left_ns = time_ns * _SURELY - high_ns * (1 << rank)
                    until_ns = float(now_ns + int(max(left_ns, 0.0) / shrinks))
            bases[place] = _OUT
            if server.reliability is not _RELIABLE:
                if is_passed_over(server, now_ns):
                    rank += LAST_RANKS
                    self._unready[place] = None
                    if now_ns < server.trusted_from_ns:
                        until_ns = min(until_ns, server.trusted_from_ns)
            elif plain and place not in self._unready:
                bases[place] = rank * LOADS
            until_ns -= _EARLY_NS
            if not now_ns < untils[place] <= until_ns:  # to look again too early does no harm
                until.put(place, until_ns)
            in_flight = server.in_flight
            key = rank if self._by_health else rank * LOADS + (in_flight << 10) // server.slots
            self._move(place, key, (server.health or WEIGHT_MIN) / (1 + in_flight))

    def _move(self, place: int, key: int, weight: float) -> None:
        """Put a server into a group, with its weight, and out of the one that it was in."""
        groups, before = self._groups, self._keys[place]
        if before != key:
            self._keys[place] = key
            if before != _OUT:
                left = groups[before]
                left.put(place, 0.0)
                left.count -= 1
                if not left.count:
                    self._spare.append(groups.pop(before))
            if key == _OUT:
                return
            joined = groups.get(key)
            if joined is None:
                joined = groups[key] = self._spare.pop() if self._spare else Lots(len(self._keys))
            joined.count += 1
            joined.put(place, weight)
        elif key != _OUT:
            groups[key].put(place, weight)


class Among(Sequence[Server]):
    """Those of a standing who may be asked now, some left out; they are counted, and listed only for who looks at them.

    To be used before anything changes.
    """

    __slots__ = ("_listed", "_n", "standing")

    def __init__(self, standing: Standing, now_ns: int, without: Iterable[Server] = ()) -> None:
        standing.settle(now_ns, without)
        self.standing = standing
        self._n = standing.count
        self._listed: list[Server] | None = None

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> Server: ...
    @overload
    def __getitem__(self, index: slice) -> list[Server]: ...
    def __getitem__(self, index: int | slice) -> Server | list[Server]:
        return self.listed()[index]

    def __iter__(self) -> Iterator[Server]:
        return iter(self.listed())

    def listed(self) -> list[Server]:
        """Return them."""
        if self._listed is None:
            self._listed = self.standing.listed()
        return self._listed

    def order(self, rng: Random) -> Sequence[Server]:
        """Return them as `selection.order` does."""
        return Drawn(self._n, self.standing.draw(rng))
