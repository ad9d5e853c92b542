"""The soak: whose fault a failure is, what is broken when, what counts as growth, and how answers are read."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest

from benchmarks.soak_load import KINDS, BadAnswerError, Clients, Kind, Outcome, judge, parse_head, request_bytes
from benchmarks.soak_plot import binned, draw
from benchmarks.soak_watch import BREAKING, OFF, ROTATION, Sample, Span, Verdict, growth, log_of, plan, verdict

S_NS = 1_000_000_000
CHAT, WHOLE = (next(kind for kind in KINDS if kind.name == name) for name in ("chat", "chat, whole"))
V1 = next(kind for kind in KINDS if kind.name == "v1 chat")


def outcome(**more: object) -> Outcome:
    made = Outcome("chat", 10 * S_NS, first_ns=11 * S_NS, ended_ns=12 * S_NS, status=200, server="s1", error_line=True)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def cut(server: str = "s1", kind: str = "cut-midstream", begin_s: float = 5, end_s: float = 11.5) -> Span:
    return Span(server, kind, round(begin_s * S_NS), round(end_s * S_NS))


# --- whose fault -------------------------------------------------------------------------------------------------


def test_a_committed_stream_on_a_server_that_broke_is_explained() -> None:
    assert verdict(CHAT, outcome(), [cut()]) is Verdict.EXPLAINED


def test_a_fault_that_is_still_on_explains_as_well() -> None:
    assert verdict(CHAT, outcome(), [cut(end_s=0)]) is Verdict.EXPLAINED


def test_it_is_not_to_end_without_a_word() -> None:
    assert verdict(CHAT, outcome(error_line=False), [cut()]) is Verdict.SILENT


@pytest.mark.parametrize(
    "span",
    [cut("s2"), cut(kind="hang"), cut(end_s=9.9), cut(begin_s=12.1, end_s=20)],
    ids=["of another server", "that ends no streams", "before", "after"],
)
def test_a_fault_that_cannot_be_the_reason_explains_nothing(span: Span) -> None:
    assert verdict(CHAT, outcome(), [span]) is Verdict.LOST


def test_what_failed_before_its_first_piece_is_lost_whatever_was_broken() -> None:
    assert verdict(CHAT, outcome(first_ns=0), [cut()]) is Verdict.LOST
    assert verdict(CHAT, outcome(status=502), [cut()]) is Verdict.LOST


def test_an_answer_that_is_no_stream_can_always_be_had_elsewhere() -> None:
    assert verdict(WHOLE, outcome(), [cut()]) is Verdict.LOST


def test_a_client_that_left_has_lost_nothing() -> None:
    assert verdict(CHAT, outcome(left=True, error_line=False), []) is Verdict.LEFT
    assert verdict(CHAT, outcome(whole=True), [cut()]) is Verdict.WHOLE


# --- what is broken when -----------------------------------------------------------------------------------------


def test_at_any_time_two_of_four_servers_are_well() -> None:
    plans = plan(600, 5, 4)
    for tenth in range(6000):
        at_s = tenth / 10
        bad = [each.server for each in plans if each.begin_s <= at_s < each.begin_s + each.lasts_s]
        assert len(bad) == len(set(bad)) <= 2


def test_only_the_last_server_is_switched_off_and_nothing_else_is_done_to_it() -> None:
    assert all((each.kind == OFF) is (each.server == 3) for each in plan(600, 5, 4))


def test_in_ten_minutes_each_server_has_each_fault() -> None:
    seen = {(each.server, each.kind) for each in plan(600, 5, 4)}
    assert seen == {(server, kind) for server in range(3) for kind in ROTATION if kind != OFF} | {(3, OFF)}


def test_the_last_fault_ends_before_the_load_does() -> None:
    assert max(each.begin_s + each.lasts_s for each in plan(40, 5, 4)) < 40
    assert set(ROTATION) > BREAKING


# --- what it holds -----------------------------------------------------------------------------------------------


def samples(rss_at: Callable[[int], float]) -> list[Sample]:
    return [Sample(at_s, round(rss_at(at_s)), 0, 0, 1) for at_s in range(100)]


def test_growth_in_the_warm_up_does_not_count() -> None:
    assert growth(samples(lambda at_s: 1000 if at_s < 20 else 2000), 100) == 0


def test_growth_after_it_does_and_a_single_peak_does_not() -> None:
    assert growth(samples(lambda at_s: 1000 + at_s), 100) == pytest.approx(64 / 1027, rel=0.05)
    assert growth(samples(lambda at_s: 9000 if at_s == 95 else 1000), 100) == 0


def test_the_log_of_what_was_lost_is_found(tmp_path: Path) -> None:
    log = tmp_path / "lb.log"
    log.write_text('{"request": "#a-1"}\n{"request": "#a-11"}\n', encoding="utf-8")
    assert log_of(log, {"#a-1"}) == ['{"request": "#a-1"}']
    assert log_of(log, set()) == []


# --- how answers are read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tail", "whole", "error_line"),
    [
        (CHAT, b'{"done":false}\n{"done":true}\n', True, False),
        (CHAT, b'{"done":false}\n{"error":"s1 broke"}\n', False, True),
        (CHAT, b'{"done":false}\n', False, False),
        (CHAT, b"", False, False),
        (V1, b'data: {"x":1}\n\ndata: [DONE]\n\n', True, False),
        (V1, b'data: {"x":1}\n\ndata: {"error":{"message":"s1 broke"}}\n\n', False, True),
        (WHOLE, b'{"done":true}', True, False),
        (WHOLE, b"", False, False),
    ],
)
def test_the_last_line_tells_whether_it_is_whole(kind: Kind, tail: bytes, *, whole: bool, error_line: bool) -> None:
    judged = Outcome(kind.name, 0, status=200)
    judge(kind, judged, tail)
    assert (judged.whole, judged.error_line, bool(judged.problem)) == (whole, error_line, not whole)


def test_an_answer_on_a_connection_that_broke_is_not_whole() -> None:
    judged = Outcome("chat", 0, status=200, problem="IncompleteReadError")
    judge(CHAT, judged, b'{"done":true}\n')
    assert not judged.whole
    assert judged.problem.startswith("IncompleteReadError; 200")


def test_a_head_that_is_no_http_is_refused() -> None:
    assert parse_head(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n").keeps is False
    with pytest.raises(BadAnswerError):
        parse_head(b"\x00\xff no http\r\n\r\n")


def test_a_request_has_a_length_only_with_a_body() -> None:
    (tags,) = (kind for kind in KINDS if kind.name == "tags")
    assert request_bytes(tags, 80, close=True) == (
        b"GET /api/tags HTTP/1.1\r\nHost: 127.0.0.1:80\r\nConnection: close\r\n\r\n"
    )
    assert b"\r\nContent-Length: " in request_bytes(CHAT, 80, close=False)


Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def asked(answer: Answer, kind: Kind, *, times: int = 1) -> list[Outcome]:
    """Return what clients make of a server that does this with each connection."""

    async def ask() -> list[Outcome]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            clients = Clients(server.sockets[0].getsockname()[1], Random(1))
            for _ in range(times):
                await clients.ask(kind, 0, keep=True)
            await clients.close()
            return clients.outcomes

    return asyncio.run(ask())


def _serving(answer: bytes, *, times: int = 1) -> Answer:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(times):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0] or 0))
            writer.write(answer)
        writer.close()

    return serve


CHUNKED = b"HTTP/1.1 200 OK\r\nX-Ollama-LB-Server: s1\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_LINE = b'e\r\n{"done":true}\n\r\n'


def test_a_connection_is_used_again_and_each_answer_is_read_to_its_end() -> None:
    got = asked(_serving(CHUNKED + LAST_LINE + b"0\r\n\r\n", times=2), CHAT, times=2)
    assert [(each.whole, each.server, each.reused) for each in got] == [(True, "s1", False), (True, "s1", True)]


@pytest.mark.parametrize("answer", [b"", CHUNKED, CHUNKED + LAST_LINE, CHUNKED + LAST_LINE[:9], b"\r\n\r\n"])
def test_an_answer_that_ends_within_its_framing_is_a_problem(answer: bytes) -> None:
    (got,) = asked(_serving(answer), CHAT)
    assert not got.whole
    assert got.problem


def test_a_client_that_is_to_leave_leaves() -> None:
    (leaves,) = (kind for kind in KINDS if kind.name == "leaves mid-stream")
    (got,) = asked(_serving(CHUNKED + LAST_LINE * 9), leaves)
    assert got.left
    assert not got.problem


# --- the picture -------------------------------------------------------------------------------------------------


def test_waits_are_put_where_they_were_planned() -> None:
    found = binned([outcome(), outcome(first_ns=13 * S_NS), outcome(first_ns=0)], 0, width_s=4)
    assert found == [(10.0, 1000.0, 3000.0)]


def test_a_run_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "soak.png"
    assert draw(path, samples(lambda _: 1), [cut()], [outcome()], [10 * S_NS], 0, 20.0)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("args", [["--help"], ["--minutes", "0.1"]])
def test_the_command_line_says_what_is_possible(args: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "python -m benchmarks.soak --minutes 60" in done.stdout) in {(0, True), (2, False)}
    assert "Traceback" not in done.stderr
