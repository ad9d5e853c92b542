"""Conversations, traces and several tables at once: where asks come from."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbcore.parsing import Problem
from simulator.workload import make_source, parse_workload, scaled
from simulator.workloads.arrivals import Even, Gamma, Herd, Mmpp, Poisson
from simulator.workloads.asks import BLOCK_TOKENS, Ask, Source
from simulator.workloads.sources import OpenLoop, Sessions, Trace, Traits
from tests.simulator.clients import ALL_KINDS, MS, REAL, ROOT, S, asks, talk, workload

# --- sessions ----------------------------------------------------------------------------------------------------

CHAT = ('kind = "sessions"\nprompt_tokens = { median = 700, p95 = 2000 }\nnew_tokens = { min = 20, max = 200 }\n'
        "output_tokens = { median = 200, p95 = 600 }\nprompt_max = 100000\n")


def shared_tokens(first: Ask, second: Ask) -> int:
    n_same = 0
    for one, other in zip(first.blocks, second.blocks, strict=False):
        if one != other:
            break
        n_same += 1
    return min(n_same * BLOCK_TOKENS, first.prompt_tokens + first.output_tokens, second.prompt_tokens)


def by_session(found: list[Ask]) -> dict[int, list[Ask]]:
    sessions: dict[int, list[Ask]] = {}
    for ask in found:
        sessions.setdefault(ask.session, []).append(ask)
    return sessions


@pytest.mark.parametrize("who", ["rate = 2", "users = 7"])
def test_a_turn_begins_with_the_last_turn_and_its_answer(who: str) -> None:
    found = talk(make_source(workload(f"{CHAT}{who}\nturns = 6\nrequests = 600"), 5))
    sessions = by_session(found)
    assert len(found) == 600
    assert len({ask.id for ask in found}) == 600
    assert 0 not in sessions
    for turns in sessions.values():
        assert len(turns) <= 6
        for before, after in pairwise(turns):
            history = before.prompt_tokens + before.output_tokens
            assert 20 <= after.prompt_tokens - history <= 200
            assert abs(shared_tokens(before, after) - history) <= BLOCK_TOKENS // 2
    firsts = [turns[0] for turns in sessions.values()]
    assert all(shared_tokens(one, other) == 0 for one, other in pairwise(firsts))


def test_turns_wait_for_the_answer_and_then_think() -> None:
    found = talk(make_source(workload(f'{CHAT}rate = 1\nturns = 3\nthink = "4s"\nrequests = 90'), 1), lambda _: 10 * S)
    for turns in by_session(found).values():
        assert all(after.arrives_ns - before.arrives_ns == 14 * S for before, after in pairwise(turns))


def test_think_times_have_their_mean() -> None:
    found = talk(make_source(workload(f'{CHAT}users = 5\nturns = 50\nthink = {{ mean = "8s" }}\nrequests = 5000'), 1))
    waits = [after.arrives_ns - before.arrives_ns - S for turns in by_session(found).values()
             for before, after in pairwise(turns)]
    assert statistics.fmean(waits) == pytest.approx(8 * S, rel=0.06)
    assert statistics.pstdev(waits) == pytest.approx(8 * S, rel=0.1)


def test_so_many_users_talk_at_a_time_and_begin_anew() -> None:
    found = talk(make_source(workload(f'{CHAT}users = 4\nturns = 2\nthink = "1s"\nrequests = 80'), 1), lambda _: 3 * S)
    sessions = by_session(found)
    assert len(sessions) == 40
    assert all(len(turns) == 2 for turns in sessions.values())
    assert Counter((session - 1) % 4 for session in sessions) == dict.fromkeys(range(4), 10)
    assert all(sum(ask.arrives_ns <= at.arrives_ns < ask.arrives_ns + 3 * S for ask in found) <= 4 for at in found)


def test_users_do_not_begin_all_at_once() -> None:
    first = [ask.arrives_ns for ask in asks(f'{CHAT}users = 200\nthink = "10s"\nrequests = 200')]
    assert 0 <= first[0] < first[-1] < 10 * S
    assert statistics.fmean(first) == pytest.approx(5 * S, rel=0.15)


def test_a_session_stays_with_its_model() -> None:
    text = f"{CHAT}users = 9\nrequests = 300\nmodels = {{ a = 1, b = 1 }}\nnum_ctx = {{ default = 1, 8192 = 1 }}"
    sessions = by_session(talk(make_source(workload(text), 1)))
    assert all(len({(ask.model, ask.num_ctx) for ask in turns}) == 1 for turns in sessions.values())
    assert len({(turns[0].model, turns[0].num_ctx) for turns in sessions.values()}) == 4


def test_a_turn_that_failed_is_asked_again_and_counts() -> None:
    failed = iter([False, True, True, False, True, True])
    source = make_source(workload(f"{CHAT}users = 1\nturns = 6\nrequests = 6"), 1)
    found = talk(source, completed=lambda _: next(failed))
    assert len({ask.id for ask in found}) == 6
    same = [(before.prompt_tokens, before.blocks) == (after.prompt_tokens, after.blocks)
            for before, after in pairwise(found)]
    assert same == [True, False, False, True, False]
    assert len({ask.session for ask in found}) == 1
    source = make_source(workload(f"{CHAT}users = 1\nturns = 3\nrequests = 9"), 1)
    assert [ask.session for ask in talk(source, completed=lambda _: False)] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_prompt_is_cut_at_its_maximum_and_then_shares_nothing() -> None:
    text = ('kind = "sessions"\nusers = 1\nturns = 5\nrequests = 5\nprompt_tokens = 600\noutput_tokens = 600\n'
            "prompt_max = 2000")
    found = talk(make_source(workload(text), 1))
    assert [ask.prompt_tokens for ask in found] == [600, 1800, 2000, 2000, 2000]
    assert [len(ask.blocks) for ask in found] == [2, 5, 0, 0, 0]


def test_what_is_asked_does_not_depend_on_when_answers_come() -> None:
    parsed = workload(f"{CHAT}users = 6\nturns = 4\nduration = '200s'\nthink = '1s'\npoison = 0.1\nstream = 0.5")

    def told(answer_ns: Callable[[Ask], int]) -> dict[tuple[int, int], Ask]:
        sessions = by_session(talk(make_source(parsed, 3), answer_ns))
        return {(session, turn): replace(ask, id=0, arrives_ns=0)
                for session, turns in sessions.items() for turn, ask in enumerate(turns)}

    slow, quick = told(lambda ask: 3 * S + ask.id), told(lambda ask: S + ask.output_tokens * MS)
    assert len(slow) > 100
    assert len(slow.keys() & quick.keys()) > 100
    assert all(slow[place] == quick[place] for place in slow.keys() & quick.keys())


def test_sessions_end_by_number_and_by_time_follow_ups_included() -> None:
    assert len(talk(make_source(workload(f"{CHAT}rate = 1\nrequests = 33"), 1))) == 33
    found = talk(make_source(workload(f"{CHAT}rate = 1\nduration = '50s'\nstart = '10s'"), 1))
    assert len(found) > 50
    assert all(10 * S <= ask.arrives_ns < 60 * S for ask in found)


def test_conversations_that_are_over_cost_no_memory() -> None:
    source: Any = make_source(workload(f"{CHAT}rate = 100\nturns = 3\nrequests = 3000"), 1)
    talk(source)
    assert len(source._parts[0]._under_way) == 0


# --- traces ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "p.csv").write_text(
        "arrives_s,prompt_tokens,output_tokens,model,session\n10,1,9,x,u\n12,2,9,,\n12,3,9,x,u\n16,4,9,y,v\n",
        encoding="utf-8")
    (tmp_path / "a.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:10.5,1,9\n2023-11-16 18:00:12.5,2,9\n",
        encoding="utf-8")
    lines = [{"timestamp": 1000 * at, "input_length": 700, "output_length": 1, "hash_ids": [0, at]} for at in (3, 4)]
    (tmp_path / "m.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return tmp_path


def trace(folder: Path, text: str) -> list[Ask]:
    return asks(f'kind = "trace"\n{text}', folder=folder)


def seconds(found: list[Ask]) -> list[float]:
    return [ask.arrives_ns / S for ask in found]


def test_a_trace_comes_as_recorded(folder: Path) -> None:
    found = trace(folder, 'path = "p.csv"')
    assert seconds(found) == [10, 12, 12, 16]
    assert [(ask.id, ask.model, ask.prompt_tokens, ask.session) for ask in found] == [
        (1, "x", 1, 1), (2, "llama3.2:latest", 2, 0), (3, "x", 3, 1), (4, "y", 4, 2)]


def test_a_clock_of_any_origin_starts_with_the_first_row(folder: Path) -> None:
    assert seconds(trace(folder, 'path = "a.csv"\nstart = 5')) == [5, 7]
    assert seconds(trace(folder, 'path = "m.jsonl"')) == [0, 1]


def test_a_trace_is_sped_up_cut_and_repeated(folder: Path) -> None:
    assert seconds(trace(folder, 'path = "p.csv"\nspeed = 4')) == [2.5, 3, 3, 4]
    assert seconds(trace(folder, 'path = "p.csv"\nlimit = 2')) == [10, 12]
    assert seconds(trace(folder, 'path = "p.csv"\nduration = "16s"')) == [10, 12, 12]
    assert seconds(trace(folder, 'path = "p.csv"\nrepeat = 3')) == [10, 12, 12, 16, 18, 20, 20, 24, 26, 28, 28, 32]
    assert seconds(trace(folder, 'path = "p.csv"\nrepeat = 3\nlimit = 2')) == [10, 12, 14, 16, 18, 20]
    assert seconds(trace(folder, 'path = "a.csv"\nrepeat = 2\nspeed = 2\nstart = 1')) == [1, 2, 3, 4]
    found = trace(folder, 'path = "p.csv"\nrepeat = 3\nsort = true')
    assert seconds(found) == [10, 12, 12, 16, 18, 20, 20, 24, 26, 28, 28, 32]
    assert [ask.session for ask in found] == [1, 0, 1, 2, 3, 0, 3, 4, 5, 0, 5, 6]
    assert [ask.id for ask in found] == list(range(1, 13))


def test_models_of_a_trace_are_renamed_or_replaced(folder: Path) -> None:
    assert [ask.model for ask in trace(folder, 'path = "p.csv"\nrename = { x = "qwen2.5:0.5b" }')] == [
        "qwen2.5:0.5b", "llama3.2:latest", "qwen2.5:0.5b", "y"]
    assert {ask.model for ask in trace(folder, 'path = "p.csv"\nmodels = "z"\nrename = { x = "w" }')} == {"z"}
    text = 'path = "p.csv"\nnum_ctx = 8192\nstream = 0\npoison = 1\nleave = { after = 2 }\nroute = "/api/generate"'
    assert {(ask.num_ctx, ask.stream, ask.poison, ask.leaves_after_ns, ask.route) for ask in trace(folder, text)} == {
        (8192, False, True, 2 * S, "/api/generate")}


def test_every_lap_of_a_trace_begins_with_cold_caches(folder: Path) -> None:
    found = trace(folder, 'path = "m.jsonl"\nrepeat = 2')
    assert found[0].blocks == (0, 3)
    assert found[1].blocks == (0, 4)
    assert found[2].blocks[0] == found[3].blocks[0] != 0


def test_traces_side_by_side_share_nothing(folder: Path) -> None:
    found = asks('[[workload]]\nkind = "trace"\npath = "m.jsonl"\n[[workload]]\nkind = "trace"\npath = "m.jsonl"\n'
                 '[[workload]]\nkind = "trace"\npath = "p.csv"\n[[workload]]\nkind = "trace"\npath = "p.csv"',
                 folder=folder)
    assert len({ask.blocks[0] for ask in found if ask.blocks}) == 2
    assert len({ask.session for ask in found if ask.session}) == 4


def test_what_a_trace_left_out_is_told(folder: Path) -> None:
    (folder / "p.csv").write_text("arrives_s,prompt_tokens,output_tokens\n1,2,0\n1,2,3\n4,5", encoding="utf-8")
    source: Any = make_source(workload('kind = "trace"\npath = "p.csv"\nrepeat = 2', folder), 1)
    assert len(list(source.asks())) == 2
    assert source.notes == [f"{folder / 'p.csv'}:4: the last line is cut off and left out",
                            f"{folder / 'p.csv'}: 1 rows without output tokens are left out"]


def test_the_azure_conversations_twice_over() -> None:
    if not (REAL / "AzureLLMInferenceTrace_conv_2023.csv").exists():
        pytest.skip(f"the trace is not at {REAL}")
    text = 'kind = "trace"\npath = "AzureLLMInferenceTrace_conv_2023.csv"\n'
    once, twice = asks(text, folder=REAL), asks(f"{text}repeat = 2", folder=REAL)
    assert len(once) == 19_366
    assert twice[: len(once)] == once
    assert [(ask.prompt_tokens, ask.output_tokens) for ask in twice[len(once):]] == [
        (ask.prompt_tokens, ask.output_tokens) for ask in once]
    assert once[0].arrives_ns == 0
    assert once[-1].arrives_ns == 3_501_721_937_000


# --- all together ------------------------------------------------------------------------------------------------

def test_tables_are_merged_by_time_with_ids_in_order() -> None:
    found = asks(ALL_KINDS)
    assert [ask.id for ask in found] == list(range(1, len(found) + 1))
    assert [ask.arrives_ns for ask in found] == sorted(ask.arrives_ns for ask in found)
    assert sum(ask.arrives_ns == 7 * S for ask in found) == 10


def test_a_conversation_goes_on_at_its_own_table() -> None:
    found = talk(make_source(workload(ALL_KINDS), 1))
    assert len(found) == 300 * 3 + 100 * 2 + 10
    assert len({ask.id for ask in found}) == len(found)
    tables = {(session - 1) % 6 for session in by_session(found) if session}
    assert tables == {3, 4}
    assert all(not ask.blocks for ask in found if not ask.session)


def test_a_source_serves_one_run() -> None:
    source = make_source(workload(ALL_KINDS), 1)
    source.asks()
    with pytest.raises(RuntimeError, match="make another"):
        source.asks()


def test_seeds_differ_and_tables_differ() -> None:
    text = '[[workload]]\nkind = "poisson"\nrate = 1\nrequests = 20\n' * 2
    found = asks(text)
    assert len({ask.arrives_ns for ask in found}) == 40
    assert asks(text, seed=2) != found
    assert asks(text) == found


PRINT_ALL = """
import hashlib, sys
from simulator.workload import make_source
from tests.simulator.clients import ALL_KINDS, talk, workload
print(hashlib.sha256(repr(talk(make_source(workload(ALL_KINDS), 7))).encode()).hexdigest())
"""


def test_the_same_seed_gives_the_same_bytes_whatever_the_hash_seed() -> None:
    found = [subprocess.run([sys.executable, "-c", PRINT_ALL], cwd=ROOT, check=True, capture_output=True, text=True,
                            env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "4242")]
    assert len(set(found)) == 1
    assert len(found[0]) == 65


def test_asks_are_made_as_they_are_drawn() -> None:
    text = ALL_KINDS.replace("requests = 300", "requests = 100000000")
    tracemalloc.start()
    for _ in islice(make_source(workload(text), 1).asks(), 5000):
        pass
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_load_is_scaled() -> None:
    found = scaled(workload(ALL_KINDS), 2.0)
    rates = [settings.arrivals for settings in found if isinstance(settings, OpenLoop)]
    assert rates == [Poisson(10.0), Gamma(10.0, 3.0), Mmpp(2.0, 18.0, 3 * S, S), Herd()]
    assert [(settings.users, settings.rate) for settings in found if isinstance(settings, Sessions)] == [
        (6, None), (None, 2.0)]
    (traced,) = scaled((Trace(Traits(), Path("x"), speed=1.5),), 2.0)
    assert isinstance(traced, Trace)
    assert traced.speed == 3.0
    (even,) = scaled(workload('kind = "even"\nrate = 1\nrequests = 1'), 0.5)
    assert isinstance(even, OpenLoop)
    assert even.arrivals == Even(0.5)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["poisson", "gamma", "mmpp", "even", "herd", "sessions"]))
    rate = st.floats(0.01, 1000)
    table: dict[str, Any] = {"kind": kind, "requests": draw(st.integers(1, 40))}
    if kind in {"poisson", "gamma", "even"}:
        table["rate"] = draw(rate)
    if kind == "gamma":
        table["cv"] = draw(st.floats(0.05, 20))
    if kind == "mmpp":
        table |= {"rate_low": draw(st.just(0.0) | rate), "rate_high": draw(rate),
                  "dwell_low": draw(st.floats(0.01, 100)), "dwell_high": draw(st.floats(0.01, 100))}
    if kind == "herd":
        table["at"] = draw(st.floats(0, 100))
    else:
        table["start"] = draw(st.floats(0, 100))
        table |= draw(st.sampled_from([{}, {"duration": draw(st.floats(0.01, 1000))}]))
    if kind == "sessions":
        table |= draw(st.sampled_from([{"users": draw(st.integers(1, 9))}, {"rate": draw(rate)}]))
        table |= {"turns": draw(st.integers(1, 5)), "think": draw(st.floats(0, 10))}
    lengths = st.integers(1, 5000) | st.just({"median": 50, "p95": 900}) | st.just({"min": 3, "max": 9})
    table |= {"prompt_tokens": draw(lengths), "output_tokens": draw(lengths), "stream": draw(st.floats(0, 1)),
              "leave": {"share": draw(st.floats(0, 1)), "after": draw(st.floats(0, 10))}}
    return table


@settings(max_examples=100, deadline=None)
@given(st.lists(tables(), min_size=1, max_size=4), st.integers(0, 2**64), st.floats(0, 20))
def test_whatever_the_tables_say(raw: list[dict[str, Any]], seed: int, answer_s: float) -> None:
    problems: list[Problem] = []
    parsed = parse_workload(raw, problems)
    assert problems == []
    rng = Random(seed)
    failed = {id_: rng.random() < 0.3 for id_ in range(1, 1000)}
    runs = [talk(make_source(parsed, seed), lambda _: round(answer_s * S), lambda ask: not failed[ask.id])
            for _ in range(2)]
    found = runs[0]
    assert runs[1] == found
    assert len(found) <= sum(table["requests"] for table in raw)
    assert sorted(ask.id for ask in found) == list(range(1, len(found) + 1))
    assert [ask.arrives_ns for ask in found] == sorted(ask.arrives_ns for ask in found)
    for ask in found:
        assert ask.arrives_ns >= 0
        assert ask.prompt_tokens >= 1
        assert ask.output_tokens >= 1
        assert all(type(getattr(ask, name)) is int for name in ("id", "arrives_ns", "prompt_tokens", "output_tokens"))
    firsts = list(_drawn(make_source(parsed, seed)))
    assert [ask.id for ask in firsts] == list(range(1, len(firsts) + 1))
    assert {field.name for field in fields(Ask)} >= {"id", "blocks"}


def _drawn(source: Source) -> Iterator[Ask]:
    yield from source.asks()
