"""A balancer's state as JSON, and the balancer made of it: whatever happens then, both want the same done."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import lbcore
from lbcore import events, snapshot
from lbcore.balancer import LoadBalancer
from lbcore.commands import Command
from lbcore.config import Config
from lbcore.events import Event, Reason
from lbcore.fork import fork
from lbcore.loglines import as_array
from lbcore.snapshot import SnapshotError, fields_of, load, take
from tests.core import test_machine
from tests.core.test_determinism import digest_of_a_run
from tests.playbook import arrival, fleet, many

# They use a balancer, or are none of its business.
ABOVE = {
    f"lbcore.{name}"
    for name in ("progress", "loglines", "trace", "comparison", "explain", "invariants", "memory", "witness", "fork")
}
STATELESS = {
    "Setting", "Field", "Route", "Ending", "BodyFacts", "Problem", "RouteTable",  # known before anything happens
    "Pools", "Holders", "Standing", "Least", "Lots", "Among", "Drawn",  # caches
    "Place", "Step",  # made anew when they are needed
}  # fmt: skip


def reloaded(balancer: LoadBalancer) -> LoadBalancer:
    """Return the balancer that comes back from a file."""
    return load(json.loads(json.dumps(take(balancer))))


AGAIN = {"a snapshot": reloaded, "a fork": fork}
"""How a second balancer is made that is to go on as the first."""


class Twins(LoadBalancer):
    """A balancer beside one that is loaded anew, from the state of the first, every few calls."""

    every = 1
    again = "a snapshot"

    def __init__(self, config: Config, rng: Random) -> None:
        super().__init__(config, rng)
        self._twin = LoadBalancer(config, Random(12345))
        self._n_calls = 0
        self._load()

    def _load(self) -> None:
        self._n_calls += 1
        if self._n_calls % self.every == 0 or self._n_calls == 1:
            plain = _plain(self)
            self._twin = AGAIN[self.again](plain)
            assert take(self._twin) == take(plain)

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        got = super().handle(event, now_ns)
        assert [*map(as_array, self._twin.handle(event, now_ns))] == [*map(as_array, got)]
        self._load()
        return got

    def handle_timeout(self, now_ns: int) -> list[Command]:
        got = super().handle_timeout(now_ns)
        assert [*map(as_array, self._twin.handle_timeout(now_ns))] == [*map(as_array, got)]
        self._load()
        return got

    def next_deadline(self) -> int | None:
        due_ns = super().next_deadline()
        assert self._twin.next_deadline() == due_ns
        return due_ns

    def note_chunk(self, attempt_id: int, n_bytes: int, n_tokens: int, now_ns: int) -> None:
        super().note_chunk(attempt_id, n_bytes, n_tokens, now_ns)
        self._twin.note_chunk(attempt_id, n_bytes, n_tokens, now_ns)

    def note_paused(self, attempt_id: int, *, paused: bool, now_ns: int) -> None:
        super().note_paused(attempt_id, paused=paused, now_ns=now_ns)
        self._twin.note_paused(attempt_id, paused=paused, now_ns=now_ns)


def _plain(twins: Twins) -> LoadBalancer:
    """Return a view of the twins without what only they have."""
    plain: LoadBalancer = snapshot.blank(LoadBalancer)
    for name, value in snapshot.attributes(twins):
        if name not in {"_twin", "_n_calls"}:
            snapshot.put(plain, name, value)
    return plain


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("every", [1, 7])
def test_a_second_balancer_goes_on_as_the_first_whatever_happens(
    every: int, again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Twins, "every", every)
    monkeypatch.setattr(Twins, "again", again)
    monkeypatch.setattr(test_machine, "LoadBalancer", Twins)
    run_state_machine_as_test(
        test_machine.Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.reuse, Phase.generate],
        ),
    )


def test_a_long_run_is_the_same_when_the_balancer_is_loaded_anew_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = digest_of_a_run(3, 1500)
    monkeypatch.setattr(Twins, "every", 100)
    monkeypatch.setattr("tests.core.test_determinism.LoadBalancer", Twins)
    assert digest_of_a_run(3, 1500) == alone


@pytest.mark.parametrize("again", AGAIN)
def test_what_refers_to_one_thing_does_so_again(again: str) -> None:
    book = fleet("a b", routes=many(racers_min=2, racers_max=2))
    first, _ = book.race(1)
    other = AGAIN[again](book.balancer)
    attempt = other.ledger.attempts[first.id]
    assert attempt.request is other.ledger.requests[1]
    assert attempt in attempt.request.live_attempts
    assert attempt.server is other.fleet.servers[1]
    assert attempt.target is attempt.server.models["m:latest"]


def test_what_one_balancer_does_changes_nothing_of_a_fork_of_it() -> None:
    book = fleet("a b", routes=many(racers_min=2, racers_max=2))
    first, second = book.race(1)
    other = fork(book.balancer)
    before = take(other)
    book.head(first, second)
    book.failed(first, Reason.RESET).skip()
    book.race(2)
    book.after(60_000).skip()
    assert take(other) == before


def test_what_servers_said_is_not_in_it() -> None:
    book = fleet("a b", routes=many(racers_min=2, racers_max=2))
    first, second = book.race(1)
    book >> events.AttemptFailed(first.id, Reason.SERVER_ERROR, 500, "tell me a secret", answered=True)
    book.skip()
    book >> events.AttemptFailed(second.id, Reason.GARBAGE, 0, "about a secret")
    book.skip()
    book >> arrival(2)
    book.skip()
    text = json.dumps(take(book.balancer))
    assert "secret" not in text
    assert "sha-m" not in text
    assert json.dumps("the answer is not HTTP: …")[1:-1] in text


# --- what it does not know -----------------------------------------------------------------------------------


def _classes_of_the_core() -> Iterator[type]:
    for info in pkgutil.iter_modules(lbcore.__path__):
        module = importlib.import_module(f"lbcore.{info.name}")
        for thing in vars(module).values():
            if isinstance(thing, type) and thing.__module__ == module.__name__:
                yield thing


def _holds_state(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) or bool(fields_of(cls))


def test_every_class_that_holds_state_is_known() -> None:
    """A new one belongs into `snapshot.CLASSES`, or into `STATELESS` if no balancer ever refers to it."""
    parts = {type(part).__name__ for _, part in snapshot.parts_of(fleet("a").balancer)}
    unknown = [
        cls.__name__
        for cls in _classes_of_the_core()
        if _holds_state(cls) and cls.__module__ not in {"lbcore.commands", "lbcore.events", *ABOVE}
    ]
    assert [name for name in unknown if name not in {*snapshot.CLASSES, *STATELESS, *parts}] == []


class Stranger:
    """What no snapshot knows."""


def test_a_part_or_record_with_something_unknown_in_it_is_refused() -> None:
    book = fleet("a b")
    book.balancer.fleet.stats["m"] = Stranger()  # type: ignore[assignment]
    for write in (take, fork):
        with pytest.raises(SnapshotError, match=r"Stranger in the state of the core is not known"):
            write(book.balancer)
    del book.balancer.fleet.stats["m"]
    book.server("a").models["x"] = Stranger()  # type: ignore[assignment]
    with pytest.raises(SnapshotError, match="Stranger"):
        take(book.balancer)


def test_a_state_without_a_slot_that_there_is_now_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = take(fleet("a").balancer)
    real = fields_of
    monkeypatch.setattr(
        snapshot, "fields_of", lambda cls: (*real(cls), "new") if cls.__name__ == "Server" else real(cls)
    )
    with pytest.raises(SnapshotError, match="Server has other fields in this version"):
        load(state)


NOT_STATES: list[Any] = [
    None, 1, "x", [], {}, {"classes": {}}, {"classes": {}, "config": {"v": ["Config", []]}, "parts": {}},
    {"classes": {"Config": []}, "config": 1, "parts": {}}, {"classes": {"os": []}, "config": 1, "parts": {}},
    {"classes": [], "config": {"e": ["Server", "x"]}, "parts": {}},
]  # fmt: skip


@pytest.mark.parametrize("state", NOT_STATES)
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(SnapshotError):
        load(state)


def test_an_attribute_of_another_version_is_refused() -> None:
    state = take(fleet("a").balancer)
    state["parts"]["fleet"]["gone"] = 1
    with pytest.raises(SnapshotError, match="Fleet has no 'gone' in this version"):
        load(state)
