"""Stories about aliases: which model a request is for, and when it goes on to the next one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lbcore import events, snapshot
from lbcore.aliases import find_alias
from lbcore.commands import AttemptKind, CancelAttempt, CommitAttempt, Decision, PassAnswer, UseModel
from lbcore.comparison import compare
from lbcore.config_aliases import parse_aliases
from lbcore.events import Reason
from lbcore.explain import explain_at
from lbcore.ollama import RequestKind
from lbcore.parsing import Problem
from lbcore.trace import Recorder
from tests.playbook import Playbook, RaceSettings, RetrySettings, arrival, decision, rejected

LONELY = RaceSettings(racers_max=1, hedges_max=0)
BIG = {"big": ["large", "small"]}


def fleet_of(chains: Mapping[str, object], have: Mapping[str, str], **sections: Any) -> Playbook:
    """Return a fleet of which each server has models of its own, all loaded."""
    problems: list[Problem] = []
    aliases = parse_aliases(chains, problems)
    assert not problems
    book = Playbook(" ".join(have), race=LONELY, aliases=aliases, **sections)
    book.timeout().skip()
    for name, models in have.items():
        book.sync(name, models, models).skip()
    return book.done()


def killed(book: Playbook, name: str) -> Playbook:
    """Let a server die that has earned no health yet: a probe of it fails."""
    book >> events.SyncRequested()
    book.skip()
    book.probe_failed(name)
    assert not book.server(name).is_alive
    return book


def died(book: Playbook, name: str) -> Playbook:
    """Let a server die of which nobody wants anything."""
    return killed(book, name).done()


# --- which model -----------------------------------------------------------------------------------------------------


def test_the_first_model_that_a_live_server_has_is_asked_for() -> None:
    book = fleet_of(BIG, {"a": "small", "b": "large small"})
    book >> arrival(1, "big") << UseModel(1, "large")
    book.started(1, server="b")
    book << decision(Decision.STARTED, why="race, as large")


def test_without_a_live_server_that_has_the_first_the_second_is_asked_for() -> None:
    book = died(fleet_of(BIG, {"a": "large", "b": "small"}), "a")
    book >> arrival(1, "BIG:latest") << UseModel(1, "small")
    book.started(1, server="b")


def test_a_full_server_has_its_model_all_the_same() -> None:
    book = fleet_of(BIG, {"a": "large", "b": "small"}, a={"in_flight_max": 1})
    book >> arrival(1, "big") << UseModel(1, "large")
    first = book.started(1, server="a")
    book >> arrival(2, "big")
    book << decision(Decision.QUEUED, why="full")
    book.token(first) << CommitAttempt(1, first.id)
    book.ends(first) << UseModel(2, "large")
    book.started(2, server="a")


def test_who_leaves_the_queue_is_looked_at_anew() -> None:
    book = died(fleet_of(BIG, {"a": "large", "b": "small"}, b={"in_flight_max": 1}), "a")
    book >> arrival(1, "small")
    book.started(1, server="b")
    book >> arrival(2, "big") >> arrival(3, "small")
    book >> events.SyncRequested()
    book.skip()
    book.sync("a", "large", "large") << UseModel(2, "large")
    book.started(2, server="a")


def test_the_holder_of_another_model_may_be_full_before_it_in_the_queue() -> None:
    book = died(fleet_of(BIG, {"a": "large", "b": "small"}, b={"in_flight_max": 1}), "a")
    for request_id in (1, 2):
        book >> arrival(request_id, "small")
        book.skip()
    book >> arrival(3, "big") >> events.SyncRequested()
    book.skip()
    book.sync("a", "large", "large") << UseModel(3, "large")
    book.started(3, server="a")


def test_with_no_live_server_the_first_model_that_a_dead_one_had_is_tried_there() -> None:
    book = died(fleet_of({"big": ["nobodys", "large"]}, {"a": "large"}), "a")
    book >> arrival(1, "big") << UseModel(1, "large")
    book.started(1, server="a")
    book << decision(Decision.STARTED, why="a dead one is tried, as large")


def test_a_model_that_nobody_has_is_not_found_under_the_name_that_was_asked_for() -> None:
    book = fleet_of({"big": ["x", "y"]}, {"a": "small"})
    book >> arrival(1, "big") << UseModel(1, "x")
    only = book.started(1, server="a")
    book.failed(only, Reason.MODEL_NOT_FOUND, 404, answered=False) << rejected(1, 404, "model 'big' not found")


def test_a_model_with_others_to_fall_back_on_is_asked_for_as_it_is() -> None:
    book = fleet_of({"large": ["large", "small"]}, {"a": "large", "b": "small"})
    book >> arrival(1, "large")
    only = book.started(1, server="a")
    book << decision(Decision.STARTED, why="race")
    book.token(only) << CommitAttempt(1, only.id)
    book.ends(only).skip()
    book.server("a").health = 1.0
    died(book, "a")
    book >> arrival(2, "large:latest") << UseModel(2, "small")
    book.started(2, server="b")


def test_an_alias_goes_before_a_model_of_the_same_name() -> None:
    book = fleet_of({"large": "small"}, {"a": "large", "b": "small"})
    book >> arrival(1, "large") << UseModel(1, "small")
    book.started(1, server="b")


def test_what_manages_models_means_the_model_of_the_name_itself() -> None:
    book = fleet_of({"large": "small"}, {"a": "large", "b": "small"})
    book >> arrival(1, "large", route="/api/delete", kind=RequestKind.MANAGE, stream=False)
    book.started(1, server="a")
    assert find_alias(book.config, "/api/show", "LARGE") is not None
    assert find_alias(book.config, "/api/pull", "large") is None


def test_who_names_servers_gets_the_first_model_that_these_have() -> None:
    book = fleet_of(BIG, {"a": "large", "b": "small", "c": "other"})
    book >> arrival(1, "big", servers=("b",)) << UseModel(1, "small")
    book.started(1, server="b")
    book >> arrival(2, "big", servers=("c",)) << UseModel(2, "large")
    book.started(2, server="c")


def test_an_unload_of_an_alias_unloads_the_model_in_use() -> None:
    book = fleet_of(BIG, {"a": "large small", "b": "large"})
    book >> arrival(1, "big", kind=RequestKind.UNLOAD, stream=False) << UseModel(1, "large")
    book.started(1, server="a")
    book.started(1, server="b")
    book << decision(Decision.STARTED, why="unload wherever it is loaded, as large")


# --- the next one ----------------------------------------------------------------------------------------------------


def test_when_nobody_can_answer_the_next_model_is_tried() -> None:
    book = fleet_of(BIG, {"a": "large", "b": "small"})
    book >> arrival(1, "big") << UseModel(1, "large")
    only = book.started(1, server="a")
    book.failed(only, Reason.RESET) << book.probed("a") << UseModel(1, "small")
    book.started(1, AttemptKind.RETRY, "b")
    book << decision(Decision.RETRIED, why="as small, since a: connection lost before the answer", names=("b",))


def test_other_live_servers_that_have_the_model_come_before_the_next_one() -> None:
    book = fleet_of(BIG, {"a": "large", "b": "large", "c": "small"})
    book >> arrival(1, "big") << UseModel(1, "large")
    first = book.started(1)
    book.failed(first, Reason.SERVER_ERROR, 500)
    second = book.started(1, AttemptKind.RETRY)
    assert {first.server, second.server} == {"a", "b"}
    book.failed(second, Reason.SERVER_ERROR, 500) << UseModel(1, "small")
    book.started(1, AttemptKind.RETRY, "c")


def test_a_server_is_asked_again_for_another_model_and_not_blamed_for_the_first() -> None:
    book = fleet_of(BIG, {"a": "large small"})
    book >> arrival(1, "big") << UseModel(1, "large")
    first = book.started(1, server="a")
    book.failed(first, Reason.SERVER_ERROR, 500) << UseModel(1, "small")
    second = book.started(1, AttemptKind.RETRY, "a")
    book.token(second) << CommitAttempt(1, second.id)
    book.ends(second)
    assert book.server("a").health > 1.0


def test_each_model_is_tried_once_and_then_the_last_answer_is_passed_on() -> None:
    book = fleet_of(BIG, {"a": "large small"})
    book >> arrival(1, "big") << UseModel(1, "large")
    first = book.started(1)
    book.failed(first, Reason.SERVER_ERROR, 500) << UseModel(1, "small")
    second = book.started(1, AttemptKind.RETRY)
    book.failed(second, Reason.SERVER_ERROR, 500) << PassAnswer(1, second.id)


def test_a_refusal_of_the_request_is_final() -> None:
    book = fleet_of(BIG, {"a": "large", "b": "small"})
    book >> arrival(1, "big") << UseModel(1, "large")
    only = book.started(1)
    book.failed(only, Reason.CLIENT_ERROR, 400) << PassAnswer(1, only.id)


def test_the_retry_budget_bounds_it() -> None:
    book = fleet_of(BIG, {"a": "large", "b": "small"}, retry=RetrySettings(budget=0.0, budget_min=0))
    book >> arrival(1, "big") << UseModel(1, "large")
    only = book.started(1)
    book.failed(only, Reason.SERVER_ERROR, 500) << PassAnswer(1, only.id)


def test_a_server_that_turns_out_to_lack_the_model_leads_to_the_next_one() -> None:
    book = fleet_of(BIG, {"a": "large", "b": "small"})
    book >> arrival(1, "big") << UseModel(1, "large")
    only = book.started(1)
    book.failed(only, Reason.MODEL_NOT_FOUND, 404) << book.probed("a") << UseModel(1, "small")
    book.started(1, AttemptKind.RETRY, "b")


def test_who_waits_for_dead_servers_alone_gets_the_next_model() -> None:
    book = fleet_of(BIG, {"a": "large", "b": "small"})
    book >> arrival(1, "big") << UseModel(1, "large")
    only = book.started(1, server="a")
    killed(book, "a") << CancelAttempt(only.id, Reason.GIVEN_UP) << UseModel(1, "small")
    second = book.started(1, AttemptKind.RETRY, "b")
    book.token(second) << CommitAttempt(1, second.id)


def test_who_waits_for_a_dead_server_waits_on_while_the_next_model_has_no_room() -> None:
    book = fleet_of(BIG, {"a": "large", "b": "small"}, b={"in_flight_max": 1})
    other = book.alone(1, "b", model="small")
    book >> arrival(2, "big") << UseModel(2, "large")
    only = book.started(2, server="a")
    died(book, "a")
    book.token(other) << CommitAttempt(1, other.id)
    book.ends(other) << CancelAttempt(only.id, Reason.GIVEN_UP) << UseModel(2, "small")
    book.started(2, AttemptKind.RETRY, "b")


# --- told, and told again --------------------------------------------------------------------------------------------


def recorded(book: Playbook) -> list[str]:
    lines: list[str] = []
    book.balancer = Recorder(book.balancer, lines.append)
    return lines


def told_of_a_fallback() -> list[str]:
    book = fleet_of(BIG, {"a": "large", "b": "small"})
    lines = recorded(book)
    book >> arrival(1, "big") << UseModel(1, "large")
    first = book.started(1)
    book.balancer.begin()  # type: ignore[attr-defined]
    half = len(lines)
    book.failed(first, Reason.RESET).skip()
    second = book.request(1).attempts[-1]
    book >> events.AttemptConnected(second.id)
    book.done()
    assert compare(lines[half - 2 :]).difference is None
    return lines


def test_a_log_with_aliases_is_replayed_byte_for_byte_wherever_it_begins() -> None:
    lines = told_of_a_fallback()
    assert compare(lines[:3]).difference is None
    assert any('["use",1,"small"]' in line for line in lines)


def test_a_state_with_aliases_comes_back_whole() -> None:
    book = fleet_of(BIG, {"a": "large", "b": "small"})
    book >> arrival(1, "big") << UseModel(1, "large")
    book.started(1)
    state = snapshot.take(book.balancer)
    again = snapshot.load(json.loads(json.dumps(state)))
    assert snapshot.take(again) == state
    assert again.config.aliases == book.config.aliases


def test_it_is_told_which_model_was_chosen_and_why() -> None:
    book = fleet_of(BIG, {"a": "large", "b": "small"})
    lines = recorded(book)
    book >> arrival(1, "big") << UseModel(1, "large")
    first = book.started(1)
    book.failed(first, Reason.RESET).skip()
    told = explain_at(lines, 1)
    assert "UseModel(request_id=1, model='large')" in told.story[0].outcome
    assert "UseModel(request_id=1, model='small')" in told.story[1].outcome
    first_choice, second_choice = told.choices
    assert "'big' stands for large, else small; at present for large" in first_choice.notes
    assert "'big' stands for large, else small; at present for small" in second_choice.notes
    whys = {candidate.server: candidate.why for candidate in second_choice.candidates}
    assert whys["a"] == "it does not have the model"
    assert whys["b"].startswith("the only one to choose from")
