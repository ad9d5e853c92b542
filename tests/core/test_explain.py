"""Why a request went where it went, told from a log."""

from __future__ import annotations

import pytest

from lbcore import events
from lbcore.events import Reason
from lbcore.explain import Choice, UnknownRequestError, explain_at
from lbcore.schema import MS_NS
from lbcore.trace import Recorder
from tests.core.test_stories_review import killed
from tests.playbook import Playbook, RaceSettings, RetrySettings, arrival, fleet, many


def recorded(names: str = "a b c", **sections: object) -> tuple[Playbook, list[str]]:
    book = fleet(names, **sections)  # type: ignore[arg-type]
    lines: list[str] = []
    book.balancer = Recorder(book.balancer, lines.append)
    return book, lines


def said(choice: Choice) -> dict[str, str]:
    """Return what is said of each server."""
    return {c.server: f"{c.chosen_as}: {c.why}" if c.chosen_as else c.why for c in choice.candidates}


def test_a_choice_tells_of_every_server() -> None:
    book, lines = recorded("a b c d e", routes=many(racers_max=1), d={"in_flight_max": 1})
    book >> events.SyncRequested()
    book.skip()
    book.sync("c", have="other", active="").skip()
    for name in "abd":
        book.sync(name).skip()
    for _ in range(2):
        book.probe_failed("e").skip()
        book >> events.SyncRequested()
        book.skip()
    book.model("a").note_first_token(400 * MS_NS * 4**3, 0)  # so that d is asked first
    book.model("b").note_first_token(400 * MS_NS * 4**4, 0)
    book.balancer.begin()  # type: ignore[attr-defined]
    first, second = book.alone(1), book.alone(2)
    assert (first.server, second.server) == ("d", "a")
    told = explain_at(lines[-4:], 2)
    (choice,) = told.choices
    words = said(choice)
    assert words["a"].startswith("primary: rank 0")
    assert words["b"] == "outranked: rank 2 against 0, each step doubles the expected first-token time"
    assert words["c"] == "it does not have the model"
    assert words["d"] == "full: 1 in flight, 1 allowed"
    assert words["e"].startswith("dead: connection refused")
    assert told.about.startswith("RequestArrived(request_id=2")


def test_the_story_goes_on_with_every_call_about_the_request() -> None:
    book, lines = recorded("a b", routes=many(racers_min=2, racers_max=2))
    first, second = book.race(1)
    book.race(2)
    book.after(10).head(first)
    book >> events.FirstTokenReceived(first.id)
    book.skip()
    book.after(20).ends(first)
    book.skip()
    told = explain_at(lines, 1)
    assert [moment.event.split("(")[0] for moment in told.story] == [
        "RequestArrived",
        "AttemptConnected",
        "HeadReceived",
        "FirstTokenReceived",
        "StreamEnded",
    ]
    assert told.story[-1].at_ms == 30
    assert any("cancelled" in text for text in told.story[3].outcome)
    assert f"CancelAttempt(attempt_id={second.id}, reason='lost the race')" in told.story[3].outcome
    assert all("request_id=2" not in text for moment in told.story for text in moment.outcome)
    assert said(told.choices[0])["b"].startswith("racer: ")


def test_a_retry_is_a_choice_of_its_own() -> None:
    book, lines = recorded("a b", routes=many(racers_min=1, racers_max=1))
    (first,) = book.race(1)
    book.failed(first, Reason.RESET)
    book.skip()
    told = explain_at(lines, 1)
    assert [moment.event.split("(")[0] for moment in told.story] == ["RequestArrived", "AttemptFailed"]
    assert said(told.choices[1])["b"].startswith("retry: the only one to choose from")
    assert said(told.choices[1])["a"] == "it was asked already"
    assert "0 retries under way, 20 more allowed" in told.choices[1].notes


def test_a_full_fleet_makes_it_wait() -> None:
    book, lines = recorded("a", a={"in_flight_max": 1}, routes=many(racers_max=1))
    book.race(1)
    book.race(2)
    (choice,) = explain_at(lines, 2).choices
    assert said(choice) == {"a": "full: 1 in flight, 1 allowed"}


def test_why_nobody_races_beside_it() -> None:
    book, lines = recorded("a b", factor=1, race=RaceSettings(budget=0.0), routes=many(racers_max=2, hedges_max=0))
    (first,) = book.race(1)
    other = "b" if first.server == "a" else "a"
    (choice,) = explain_at(lines, 1).choices
    assert said(choice)[other] == "not drawn first; no racer: the race budget is spent"
    chances = [candidate.chance for candidate in choice.candidates]
    assert chances == [0.5, 0.5]


def test_the_load_that_speaks_against_a_server_is_shown() -> None:
    """Its other models count for it too, so that what is in flight of this one alone would contradict the reason."""
    book, lines = recorded("a b c", factor=1, race=RaceSettings(budget=0.0), routes=many(racers_max=2, hedges_max=0))
    book >> events.SyncRequested()
    book.skip()
    book.sync("a", have="m other", active="m other").skip()
    book.alone(1, "a", model="other")
    book.race(2)
    (choice,) = explain_at(lines, 2).choices
    told = {candidate.server: candidate for candidate in choice.candidates}
    assert (told["a"].in_flight, told["a"].in_flight_others, told["a"].chance) == (0, 1, None)
    assert told["a"].why.startswith("more in flight for its slots than ")
    (chosen,) = [candidate for candidate in choice.candidates if candidate.chosen_as]
    assert chosen.why.startswith("drawn by weight from 2 of rank 0")
    assert [told[name].chance for name in "bc"] == [0.5, 0.5]


def test_one_request_is_one_request() -> None:
    book, lines = recorded("a")
    book.race(1)
    book.race(2)
    (choice,) = explain_at(lines, 2).choices
    assert choice.notes[0] == "1 of 1 server alive, 1 request under way before"


def test_a_server_that_broke_streams_is_said_to_be_distrusted() -> None:
    book, lines = recorded("a b", factor=1, routes=many(racers_max=1, hedges_max=0), retry=RetrySettings())
    (first,) = book.race(1)
    book.token(first).skip()
    book.failed(first, Reason.TRUNCATED).skip()
    book.after(1000)
    book.skip()
    (second,) = book.race(2)
    assert second.server != first.server
    (choice,) = explain_at(lines, 2).choices
    verdict = said(choice)[first.server]
    assert "distrusted, streams broke there: passed over for 29.0 s" in verdict or "dead" in verdict


def test_a_hedge_is_explained_at_its_time() -> None:
    book, lines = recorded("a b", routes=many(racers_max=1, hedges_max=1))
    book.race(1)
    book.timeout()
    book.skip()
    told = explain_at(lines, 1)
    assert told.choices[1].event == "handle_timeout"
    assert told.choices[1].at_ms > 0
    assert said(told.choices[1])["b"].startswith("hedge: ")


def test_a_request_that_is_not_there_is_refused_with_those_that_are() -> None:
    book, lines = recorded("a")
    with pytest.raises(UnknownRequestError, match="it has none at all"):
        explain_at(lines, 7)
    book.race(1)
    book.now_ns += MS_NS
    with pytest.raises(UnknownRequestError, match="it has 1 to 1"):
        explain_at(lines, 7)


def test_who_the_client_did_not_name_is_said_not_to_be_named() -> None:
    book, lines = recorded("a b c")
    book >> arrival(1, servers=("b",))
    book.skip()
    (choice,) = explain_at(lines, 1).choices
    assert said(choice) == {
        "a": "the client named b",
        "b": "primary: the only one to choose from; ready",
        "c": "the client named b",
    }
    assert [candidate.chance for candidate in choice.candidates] == [None, 1.0, None]


def test_a_pinned_server_that_is_dead_is_the_reason() -> None:
    book, lines = recorded("a b")
    killed(book, "b")
    book >> arrival(1, servers=("b",))
    book.skip()
    told = explain_at(lines, 1)
    assert [candidate.why.partition(":")[0] for candidate in told.choices[0].candidates] == [
        "the client named b",
        "dead",
    ]
