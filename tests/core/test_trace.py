"""What was recorded is replayed to the same commands, byte for byte, whatever happened; and differences are shown."""

from __future__ import annotations

import json
from random import Random
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from lbcore import events, snapshot
from lbcore.balancer import LoadBalancer
from lbcore.commands import (
    AttemptKind,
    CancelAttempt,
    Command,
    CommitAttempt,
    Decision,
    RecordDecision,
    RejectRequest,
    StartAttempt,
)
from lbcore.comparison import compare
from lbcore.config import Config, Winner
from lbcore.errors import UnknownEventError
from lbcore.events import Event, Reason
from lbcore.loglines import COMMAND_CODES, EVENT_CODES, Lines, as_array, dumps, fields_of
from lbcore.ollama import RequestKind
from lbcore.trace import LogError, Recorder, Replay
from tests.core import test_machine
from tests.core.test_determinism import digest_of_a_run
from tests.playbook import Playbook, arrival, fleet, many

SECRET = "a secret: server error 500: no, "


class Recorded(Recorder):
    """A recorder that keeps its lines; details are what servers say of prompts."""

    logs: list[Recorded]

    def __init__(self, config: Config, rng: Random) -> None:
        self.lines: list[str] = []
        super().__init__(LoadBalancer(config, rng), self.lines.append, seed=1, started=lambda: "now")
        self.logs.append(self)

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        if isinstance(event, events.AttemptFailed):
            event = events.AttemptFailed(event.attempt_id, event.reason, event.status, SECRET, event.answered)
        elif isinstance(event, events.ProbeCompleted) and event.reason is not None:
            event = events.ProbeCompleted(event.server_id, event.probe_id, event.reason, "", SECRET)
        return super().handle(event, now_ns)


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Record what the machine and the long run do."""
    kept: list[Recorded] = []
    monkeypatch.setattr(Recorded, "logs", kept, raising=False)
    monkeypatch.setattr(test_machine, "LoadBalancer", Recorded)
    monkeypatch.setattr("tests.core.test_determinism.LoadBalancer", Recorded)
    return kept


def check(recorded: Recorded) -> None:
    """Replay what was recorded, and look at the state that it leads to."""
    replay = Replay(recorded.lines)
    for step in replay:
        assert step.recorded == step.replayed
    assert replay.truncated is None
    for attempt_id, (n_bytes, n_tokens, now_ns, paused) in recorded._pending.items():
        replay.balancer.note_chunk(attempt_id, n_bytes, n_tokens, now_ns)
        if paused is not None:
            replay.balancer.note_paused(attempt_id, paused=paused, now_ns=now_ns)
    assert replay.balancer.timers.deadlines() == recorded.timers.deadlines()
    states = [snapshot.take(balancer)["parts"] for balancer in (replay.balancer, recorded.balancer)]
    for state in states:
        del state["timers"]  # may hold what is not armed any more, until it is met
    assert states[0] == states[1]


def own_words(line: str) -> bool:
    """Tell whether a line is about failures that are explained by us."""
    return any(reason in line for reason in ("connect", "TLS", "timeout", "no first token", "silence", "in time"))


class RecordedMachine(test_machine.Machine):
    """The machine of the core's tests, recorded and replayed at the end."""

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "balancer"):
            assert isinstance(self.balancer, Recorded)
            check(self.balancer)
            self.balancer.begin()
            self.balancer.handle(events.SyncRequested(), self.now_ns)
            assert compare(self.balancer.lines[-3:]).n_calls == 1


def test_whatever_happened_is_replayed_to_the_same_commands_and_the_same_state(logs: list[Recorded]) -> None:
    run_state_machine_as_test(
        RecordedMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.reuse, Phase.generate],
        ),
    )


def test_a_long_run_is_replayed(logs: list[Recorded]) -> None:
    digest_of_a_run(5, 4000)
    (recorded,) = logs
    check(recorded)
    found = compare(recorded.lines)
    assert found.difference is None
    assert found.n_calls == len(recorded.lines) - 2
    assert found.n_requests > 500
    assert found.n_chunks > 500
    assert found.header["seed"] == 1
    assert all("a secret" not in line or own_words(line) for line in recorded.lines)


def test_a_log_that_is_begun_anew_can_be_replayed_by_itself(logs: list[Recorded]) -> None:
    digest_of_a_run(6, 500)
    (recorded,) = logs
    recorded.note_chunk(next(iter(recorded.ledger.attempts), 1), 5, 5, recorded._now_ns)
    n_lines = len(recorded.lines)
    recorded.begin()
    for request_id in range(10_000, 10_020):
        now_ns = recorded._now_ns + 1000
        recorded.handle(arrival(request_id, "llama3.2"), now_ns)
        recorded.handle_timeout(now_ns + 5_000_000_000)
    found = compare(recorded.lines[n_lines:])
    assert found.difference is None
    assert found.n_requests == 20


def recorded_fleet(names: str = "a b", **sections: Any) -> tuple[Playbook, list[str]]:
    """Return a synced fleet, and the log of what is told from here on."""
    book = fleet(names, **sections)
    lines: list[str] = []
    book.balancer = Recorder(book.balancer, lines.append)
    return book, lines


def a_story() -> list[str]:
    """Return the log of two requests."""
    book, lines = recorded_fleet(routes=many(racers_min=2, racers_max=2))
    first, second = book.race(1)
    book.after(5).head(first, second)
    book.after(95) >> events.FirstTokenReceived(first.id)
    book << CommitAttempt(1, first.id)
    book.skip()
    book.after(10).tokens(first, 3).after(10).tokens(first, 4)
    book.after(10).ends(first)
    book.race(2)
    return lines


def test_every_event_and_command_has_a_code() -> None:
    assert set(EVENT_CODES) == set(get_args(Event))
    assert set(COMMAND_CODES) == set(get_args(Command))


def test_the_writers_for_what_comes_often_give_what_the_others_would() -> None:
    often: list[Event] = [
        events.RequestArrived(7, "/api/ch\u00e4t", None, RequestKind.LOAD, stream=True, runner_key='{"num_ctx":1}'),
        events.RequestArrived(7, "/", 'quo"ted\n', generates=True),
        events.AttemptConnected(1),
        events.HeadReceived(2, 200),
        events.FirstTokenReceived(3),
        events.StreamEnded(4),
    ]
    for event in often:
        fields = [getattr(event, name) for name in fields_of(type(event))]
        assert Lines(0).line(event, [], 5, []) == dumps([5, [EVENT_CODES[type(event)], *fields], []]) + "\n"
    commands: list[Command] = [
        StartAttempt(1, 2, 3, AttemptKind.HEDGE),
        CancelAttempt(4, Reason.LOST_RACE),
        CommitAttempt(5, 6),
        RecordDecision(Decision.STARTED, 1, "a", 'server error: "x"', "1.0", "2.0", 17, ("a", "b\u00fc")),
        RecordDecision(Decision.QUEUED),
        RejectRequest(1, 502, "no: server error 500: x", 3),
    ]
    assert Lines(0).line(None, commands, 5, []) == dumps([5, None, [*map(as_array, commands)]]) + "\n"


def test_lines_are_as_documented() -> None:
    header, _, *calls = [json.loads(line) for line in a_story()]
    assert header["ollama-lb-log"] == 1
    arrived, connected, *_ = calls
    assert arrived[:2] == [0, ["arrived", 1, "/api/chat", "m", "generate", True, True, "", []]]
    assert arrived[2][0] == ["start", 1, 1, 1, "primary"]
    assert connected == [5_000_000, ["connected", 1], []]
    ended = next(call for call in calls if call[1] and call[1][0] == "ended")
    assert ended[0] == 30_000_000
    assert ended[3] == [[1, 700, 7, 10_000_000, None]]


def test_a_spurious_timeout_is_not_written() -> None:
    book, lines = recorded_fleet()
    n_lines = len(lines)
    assert book.balancer.handle_timeout(book.now_ns) == []
    assert len(lines) == n_lines


def test_a_timer_that_looks_at_chunks_finds_them_in_a_replay() -> None:
    book, lines = recorded_fleet("a", routes=many(racers_max=1, hedges_max=0))
    attempt = book.alone(1)
    book.token(attempt) << CommitAttempt(1, attempt.id)
    book.after(59_000).tokens(attempt, 1)
    book.after(2_000)  # the timer fires, and is armed anew
    book.balancer.note_paused(attempt.id, paused=True, now_ns=book.now_ns)
    book.after(70_000)  # not read by us: no silence of the server
    book.balancer.note_paused(attempt.id, paused=False, now_ns=book.now_ns)
    book.after(59_000).done()
    book.after(2_000)
    assert CancelAttempt(attempt.id, Reason.SILENCE_TIMEOUT) in book.skip()
    assert sum(len(json.loads(line)) == 4 for line in lines[2:]) == 3
    assert compare(lines).difference is None
    for i, line in enumerate(lines[2:], 2):
        if len(json.loads(line)) == 4:
            without = dumps(json.loads(line)[:3]) + "\n"
            assert compare([*lines[:i], without, *lines[i + 1 :]]).difference is not None


def test_the_end_of_a_window_counts_tokens_in_a_replay_too() -> None:
    routes = many(racers_min=2, racers_max=2, winner=Winner.MOST_TOKENS)
    book, lines = recorded_fleet(routes=routes)
    first, second = book.race(1)
    book.token(first).token(second)
    book.after(1000).tokens(first, 3).tokens(second, 5)
    book.after(1001) << CommitAttempt(1, second.id)
    book.skip()
    assert compare(lines).difference is None


def test_what_is_no_event_is_refused_and_not_written() -> None:
    book, lines = recorded_fleet()
    with pytest.raises(UnknownEventError):
        book.balancer.handle("nonsense", 0)  # type: ignore[arg-type]
    assert len(lines) == 2


def test_a_listing_is_written_once_while_it_stays_the_same() -> None:
    book, lines = recorded_fleet("a")
    for active in ("m", "m", ""):
        book >> events.SyncRequested()
        book.skip()
        book.sync("a", active=active)
        book.skip()
    synced = [json.loads(line)[1] for line in lines[2:] if json.loads(line)[1][0] == "synced"]
    assert [told[3:] for told in synced] == [[["m"], ["m"]], [], [["m"], []]]
    assert compare(lines).difference is None


def test_a_server_that_is_added_is_written_whole() -> None:
    book, lines = recorded_fleet("a")
    book >> events.ServerAdded(Playbook.settings("new", slots=3))
    book.skip()
    book >> events.ServerRemovalRequested(book.server("new").id)
    book.skip()
    assert json.loads(lines[2])[1][1]["slots"] == 3
    assert compare(lines).difference is None


def test_a_defect_of_the_core_is_replayed_too() -> None:
    book, lines = recorded_fleet("a")
    bad = events.AttemptConnected([1])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        book.balancer.handle(bad, 0)
    assert json.loads(lines[-1])[1:] == [["connected", [1]], "TypeError"]
    assert compare(lines).difference is None


def test_words_of_servers_are_cut_and_the_rest_is_compared() -> None:
    book, lines = recorded_fleet("a", routes=many())
    attempt = book.alone(1)
    book >> events.AttemptFailed(attempt.id, Reason.GARBAGE, 0, "your secret; was it?")
    assert "your secret; was it?" in str(book.skip())
    text = "".join(lines)
    assert "secret" not in text
    assert json.dumps("no server could answer: a: the answer is not HTTP: …")[1:-1] in text
    assert compare(lines).difference is None


# --- differences ---------------------------------------------------------------------------------------------


def test_the_first_difference_is_shown_with_what_went_before() -> None:
    lines = a_story()
    changed = lines[:]
    index = next(i for i, line in enumerate(lines) if '"commit"' in line)
    changed[index] = changed[index].replace('["commit",1,1]', '["commit",1,2]')
    found = compare(changed).difference
    assert found is not None
    assert found.line == index + 1
    assert found.at_s == pytest.approx(0.1)
    assert found.event == "FirstTokenReceived(attempt_id=1)"
    assert found.expected[found.index] == "CommitAttempt(request_id=1, attempt_id=2)"
    assert found.got[found.index] == "CommitAttempt(request_id=1, attempt_id=1)"
    assert found.context[0].startswith("line 3, 0.000000 s: RequestArrived(request_id=1, route='/api/chat'")


@pytest.mark.parametrize("more", [True, False])
def test_a_command_more_or_less_is_a_difference(more: bool) -> None:
    lines = a_story()
    call = json.loads(lines[2])
    call[2] = [*call[2], ["probe", 1, 1]] if more else call[2][:-1]
    lines[2] = json.dumps(call, separators=(",", ":")) + "\n"
    found = compare(lines).difference
    assert found is not None
    assert (found.line, found.index) == (3, min(len(found.expected), len(found.got)))


def test_another_time_is_a_difference_only_if_something_else_comes_of_it() -> None:
    lines = a_story()
    lines[3] = lines[3].replace("[5000000,", "[5000001,")
    found = compare(lines).difference
    assert found is not None  # all later times are told in commands
    assert found.line > 4


# --- logs that cannot be read --------------------------------------------------------------------------------


def test_a_last_line_that_breaks_off_is_told_and_the_rest_replayed() -> None:
    lines = a_story()
    for length in range(1, len(lines[-1]) - 1):
        found = compare([*lines[:-1], lines[-1][:length]])
        assert found.truncated == len(lines)
        assert found.n_calls == len(lines) - 3
    assert compare([*lines[:-1], lines[-1].rstrip("\n")]).truncated is None


BAD_LINES = [
    "\n", "nonsense\n", "[]\n", "5\n",
    '"abc"\n', "null\n", "[1]\n", '[0,["nonsense",1],[]]\n', '[0,["connected"],[]]\n',
    '["0",null,[]]\n', '[0,["synced",9,9],[]]\n', '[0,["failed",1,"nonsense",0,"",false],[]]\n', "[0,5,[]]\n",
    "[" * 100_000 + "\n", "1" * 10_000 + "\n", '[0,["server",{"nonsense":1}],[]]\n', "[0,null,[],[[1]]]\n",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named(bad: str) -> None:
    lines = a_story()
    with pytest.raises(LogError, match="this is no call of the core") as raised:
        compare([*lines[:4], bad, *lines[4:]])
    assert raised.value.line == 5


@pytest.mark.parametrize(
    ("head", "line", "message"),
    [
        ([], 1, "it is empty"),
        (["\n"], 1, "it is empty"),
        (["time,level\n"], 1, "not the header"),
        (["[1,2]\n"], 1, "not the header"),
        (['{"message":"hello"}\n'], 1, "not the header"),
        (['{"ollama-lb-log":2}\n'], 1, "format 2; this version reads format 1"),
        (['{"ollama-lb-log":1}\n'], 1, "lacks now_ns"),
        (['{"ollama-lb-log":1,"now_ns":0}\n'], 2, "ends before the state"),
        (['{"ollama-lb-log":1,"now_ns":0}\n', '{"classes"'], 2, "ends before the state"),
        (['{"ollama-lb-log":1,"now_ns":0}\n', "nonsense\n"], 2, "not JSON"),
        (['{"ollama-lb-log":1,"now_ns":0}\n', "{}\n"], 2, "cannot be read"),
    ],
)
def test_a_log_without_its_beginning_is_refused(head: list[str], line: int, message: str) -> None:
    with pytest.raises(LogError, match=message) as raised:
        compare(head)
    assert raised.value.line == line
