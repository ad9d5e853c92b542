"""The last requests are remembered as a log would tell of them, and no more of them than fits."""

from __future__ import annotations

import dataclasses
import json
import sys
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from lbcore import events, snapshot
from lbcore.balancer import LoadBalancer
from lbcore.commands import CancelAttempt
from lbcore.config import Config
from lbcore.errors import UnknownEventError
from lbcore.events import Reason
from lbcore.explain import Explanation, explain_at
from lbcore.memory import Limits, Memory
from lbcore.trace import Recorder, Replay
from tests.core import test_machine
from tests.core.test_determinism import digest_of_a_run
from tests.playbook import A, Playbook, arrival, fleet, many

SMALL = Limits(requests=40, segment_requests=10, rest_bytes_min=4000)


class Remembered(Memory):
    """A memory of a recorder that keeps all its lines."""

    made: list[Remembered]

    def __init__(self, config: Config, rng: Random) -> None:
        self.lines: list[str] = []
        super().__init__(Recorder(LoadBalancer(config, rng), self.lines.append), SMALL)
        self.made.append(self)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Remembered]:
    """Remember what the machine and the long run do."""
    kept: list[Remembered] = []
    monkeypatch.setattr(Remembered, "made", kept, raising=False)
    monkeypatch.setattr(test_machine, "LoadBalancer", Remembered)
    monkeypatch.setattr("tests.core.test_determinism.LoadBalancer", Remembered)
    return kept


def bare(explanation: Explanation) -> dict[str, Any]:
    """Return what is told of a request, but for where it stands."""
    found = dataclasses.asdict(explanation)
    for part in (*found["choices"], *found["story"]):
        del part["line"]
    return found


def remembered(memory: Memory, request_id: int) -> Explanation:
    found = memory.about(request_id)
    assert found is not None
    return explain_at(found.lines, request_id, found.start)


def arrived(lines: list[str]) -> list[int]:
    """Return the requests of a log, in their order."""
    calls = [json.loads(line)[1] for line in lines[2:]]
    return list(dict.fromkeys(call[1] for call in calls if call is not None and call[0] == "arrived"))


def check(memory: Remembered, sample: int = 1) -> None:
    """Compare what is remembered of requests with what the whole log tells of them."""
    for request_id in arrived(memory.lines)[-30::sample]:
        assert bare(remembered(memory, request_id)) == bare(explain_at(memory.lines, request_id))


def with_memory(names: str = "a b", limits: Limits = SMALL, **sections: Any) -> tuple[Playbook, Memory]:
    book = fleet(names, **sections)
    memory = Memory(book.balancer, limits)
    book.balancer = memory
    return book, memory


def serve(book: Playbook, request_id: int) -> None:
    """Tell of a request that is answered by one server, from its arrival to its end."""
    attempt = book.alone(request_id)
    book.token(attempt).skip()
    book.after(10).ends(attempt).skip()


ALONE = many(racers_max=1, hedges_max=0)


# --- what is remembered ----------------------------------------------------------------------------------------


class RememberedMachine(test_machine.Machine):
    """The machine of the core's tests, remembered and explained at the end."""

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "balancer"):
            assert isinstance(self.balancer, Remembered)
            check(self.balancer)


def test_whatever_happened_is_remembered_as_a_log_tells_it(made: list[Remembered]) -> None:
    run_state_machine_as_test(
        RememberedMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.reuse, Phase.generate],
        ),
    )


def test_the_end_of_a_long_run_is_remembered_as_its_log_tells_it(made: list[Remembered]) -> None:
    digest_of_a_run(5, 1500)
    (memory,) = made
    check(memory, sample=7)
    requests = arrived(memory.lines)
    assert memory.known is not None
    first, last = memory.known
    assert last == requests[-1]
    assert 40 <= last - first + 1 <= 40 + 2 * 12  # the models of all servers
    assert memory.about(first - 1) is None or first - 1 in memory._segments[0].under_way


def test_the_last_thousand_requests_are_known_and_not_more_than_half_as_many_again() -> None:
    book, memory = with_memory("a", Limits(), routes=ALONE)
    for request_id in range(1, 2201):
        serve(book, request_id)
    assert memory.known is not None
    first, last = memory.known
    assert last == 2200
    assert 1000 <= last - first + 1 <= 1500
    assert remembered(memory, first).ended
    assert remembered(memory, last).same
    assert not remembered(memory, first - 1).about  # the last thing before the segment was its arrival
    assert memory.about(first - 2) is None
    assert memory.about(last + 1) is None


def test_a_request_may_begin_in_one_segment_and_end_in_a_later_one() -> None:
    book, memory = with_memory("a b", routes=ALONE)
    long = book.alone(1, "a")
    book.token(long).skip()
    for request_id in range(2, 31):
        book.tokens(long, 3).after(1)
        attempt = book.alone(request_id)
        book.token(attempt).skip()
        book.ends(attempt).skip()
    book.tokens(long, 1).after(5).ends(long).skip()
    assert len(memory._segments) > 2
    found = remembered(memory, 1)
    assert (found.ended, found.same) == (True, True)
    assert "why='88 tokens'" in found.story[-1].outcome[0]


def test_tokens_that_came_just_before_a_segment_began_are_counted_once() -> None:
    book, memory = with_memory("a", Limits(segment_requests=2), routes=ALONE, a={"in_flight_max": 9})
    first = book.alone(1)
    book.token(first).skip()
    book.tokens(first, 5)
    second = book.alone(2)  # begins a segment after it
    book.tokens(first, 7)
    third = book.alone(3)
    book.ends(first).skip()
    assert "why='12 tokens'" in remembered(memory, 1).story[-1].outcome[0]
    for attempt in (second, third):
        book.token(attempt).skip()
        book.tokens(attempt, 2)
    book.ends(third).skip()
    assert remembered(memory, 1).same
    assert "why='2 tokens'" in remembered(memory, 3).story[-1].outcome[0]


def test_one_that_is_under_way_is_explained_as_far_as_it_is() -> None:
    book, memory = with_memory("a", routes=ALONE)
    attempt = book.alone(1)
    assert [moment.event.split("(")[0] for moment in remembered(memory, 1).story] == ["RequestArrived"]
    book.token(attempt).skip()
    found = remembered(memory, 1)
    assert (len(found.story), found.ended, found.same) == (4, False, True)


def test_what_goes_on_while_it_is_told_does_not_change_what_is_told() -> None:
    book, memory = with_memory("a", routes=ALONE)
    serve(book, 1)
    attempt = book.alone(2)
    found = memory.about(2)
    assert found is not None
    head = next(found.lines)
    for request_id in range(3, 100):
        serve(book, request_id)
    assert memory.about(1) is None
    assert not explain_at([head, *found.lines], 2, found.start).ended
    book.token(attempt).skip()


def test_a_stream_older_than_all_that_is_kept_is_told_of_from_there_on() -> None:
    book, memory = with_memory("a b", routes=ALONE, b={"in_flight_max": 9})
    long = book.alone(1)
    book.token(long).skip()
    for request_id in range(2, 90):
        serve(book, request_id)
    book.failed(long, Reason.TRUNCATED).skip()
    found = remembered(memory, 1)
    assert (found.about, found.ended, found.same) == ("", True, True)
    assert [moment.event.split("(")[0] for moment in found.story] == ["AttemptFailed"]


def test_silence_that_ends_a_stream_is_seen_in_what_is_remembered() -> None:
    book, memory = with_memory("a", routes=ALONE)
    attempt = book.alone(1)
    book.token(attempt).skip()
    book.after(59_000).tokens(attempt, 1)
    book.after(2_000)
    book.balancer.note_paused(attempt.id, paused=True, now_ns=book.now_ns)
    book.after(70_000)
    book.balancer.note_paused(attempt.id, paused=False, now_ns=book.now_ns)
    book.after(61_000)
    assert CancelAttempt(attempt.id, Reason.SILENCE_TIMEOUT) in book.skip()
    found = remembered(memory, 1)
    assert (found.ended, found.same) == (True, True)


def test_the_words_of_servers_and_what_they_say_of_models_are_not_told() -> None:
    book, memory = with_memory("a b", routes=ALONE)
    attempt = book.alone(1)
    book >> events.AttemptFailed(attempt.id, Reason.GARBAGE, 0, "your secret")
    book.skip()
    found = memory.about(1)
    assert found is not None
    text = "".join(found.lines) + json.dumps(snapshot.take(found.start.balancer))
    assert "secret" not in text
    assert "sha-m" not in text


def test_what_is_no_event_is_refused_and_not_kept() -> None:
    book, memory = with_memory()
    for _ in range(2):
        with pytest.raises(UnknownEventError):
            memory.handle("nonsense", 0)  # type: ignore[arg-type]
        book.race(1)
    assert remembered(memory, 1).same


def test_a_defect_of_the_core_is_kept_too() -> None:
    book, memory = with_memory("a", routes=ALONE)
    attempt = book.alone(1)
    with pytest.raises(TypeError):
        memory.handle(events.AttemptConnected([1]), book.now_ns)  # type: ignore[arg-type]
    assert memory._segments[-1].calls[-1][1] == "TypeError"
    book.token(attempt).skip()


def test_it_shows_all_that_a_balancer_shows() -> None:
    book, memory = with_memory()
    parts = {name: part for name, part in snapshot.attributes(memory.plain) if not name.startswith("_")}
    assert {name: getattr(memory, name) for name in parts} == parts
    assert book.balancer is memory


# --- how much is kept ------------------------------------------------------------------------------------------


def flood(book: Playbook, n: int) -> None:
    """Tell of so many events that mean nothing."""
    for _ in range(n):
        book.balancer.handle(events.AttemptConnected(999), book.now_ns)


def test_nothing_is_kept_before_the_first_request() -> None:
    book, memory = with_memory("a")
    flood(book, 100)
    assert memory.known is None
    assert not memory._segments
    assert memory.about(1) is None


def test_a_flood_of_events_costs_requests_and_not_memory() -> None:
    limits = Limits(bytes_max=1 << 20)
    book, memory = with_memory("a", limits, routes=ALONE)
    attempt = book.alone(1)
    for request_id in range(2, 40):
        serve(book, request_id) if request_id % 2 else None
        flood(book, 500)
        assert sum(segment.size for segment in memory._segments) < limits.bytes_max * 5 // 4
    assert memory.known is not None
    assert memory.known[0] > 2
    book.token(attempt).skip()


def test_long_texts_count_for_what_they_are() -> None:
    limits = Limits(bytes_max=1 << 20)
    book, memory = with_memory("a", limits)
    for request_id in range(1, 100):
        book >> arrival(request_id, servers=("x" * 20_000,))
        book.skip()
    kept = sum(len(segment.calls) for segment in memory._segments)
    assert kept * 20_000 < limits.bytes_max * 5 // 4


def test_what_is_estimated_is_about_what_it_takes() -> None:
    book, memory = with_memory("a b c", Limits(), routes=many(racers_min=2, racers_max=2))
    for request_id in range(1, 400):
        first, second = book.race(request_id)
        book.head(first, second)
        book >> events.FirstTokenReceived(first.id)
        book.skip()
        book.ends(first).skip()
    (segment,) = memory._segments
    seen: dict[int, object] = {}

    def size_of(thing: Any) -> int:
        if id(thing) in seen or isinstance(thing, type) or type(thing).__module__ == "enum":
            return 0
        seen[id(thing)] = thing
        slots = getattr(thing, "__slots__", ())
        inner = thing if isinstance(thing, list | tuple) else [getattr(thing, name) for name in slots]
        return sys.getsizeof(thing) + sum(map(size_of, inner))

    assert 0.5 < size_of(segment.calls) / (segment.size - segment.state_size) < 1.5


def test_a_time_of_rest_is_not_kept() -> None:
    book, memory = with_memory("a", routes=ALONE)
    serve(book, 1)
    (segment,) = memory._segments
    n_calls = len(segment.calls)
    for _ in range(1000):
        book.after(3_600_000).skip()
        book.sync("a").skip()
    assert len(segment.calls) == n_calls
    serve(book, 2)
    serve(book, 3)
    assert len(memory._segments) == 2
    for request_id in (1, 2, 3):
        assert (remembered(memory, request_id).ended, remembered(memory, request_id).same) == (True, True)


def test_a_short_rest_begins_no_segment() -> None:
    book, memory = with_memory("a", routes=ALONE)
    for request_id in range(1, 5):
        serve(book, request_id)
        book.after(3_600_000).skip()
        book.sync("a").skip()
    assert len(memory._segments) == 1
    assert remembered(memory, 4).same


def test_listings_that_stay_the_same_are_kept_once() -> None:
    book, memory = with_memory("a", routes=ALONE)
    attempt = book.alone(1)
    for active in ("m", "m", ""):
        book >> events.SyncRequested()
        book.skip()
        book.sync("a", active=active).skip()
    kept = [event for event, *_ in memory._segments[0].calls if isinstance(event, events.ModelsSynced)]
    assert kept[0].available is kept[1].available
    assert kept[0].active is kept[1].active
    assert kept[2].active == ()
    assert kept[0].available[0].entry == ""
    book.token(attempt).skip()
    assert remembered(memory, 1).same


def test_a_state_of_a_new_kind_is_a_defect_and_serving_goes_on() -> None:
    book, memory = with_memory("a", routes=ALONE)
    serve(book, 1)
    book.balancer.fleet.stats["stranger"] = object()  # type: ignore[assignment]
    for request_id in range(2, 30):
        serve(book, request_id)
    assert "object" in memory.defect
    assert memory.about(1) is None
    assert memory.known is None


def test_the_state_of_the_last_segment_goes_on_as_the_balancer_does() -> None:
    book, memory = with_memory("a b", routes=ALONE)
    attempts: list[A] = []
    for request_id in range(1, 25):
        attempts.append(book.alone(request_id)) if request_id % 5 == 0 else serve(book, request_id)
    found = memory.about(24)
    assert found is not None
    replay = Replay(found.lines, start=found.start)
    assert all(step.same for step in replay)
    assert replay.balancer.timers.deadlines() == memory.timers.deadlines()
    for attempt in attempts:
        book.token(attempt).skip()
