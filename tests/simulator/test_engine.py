"""How fast tokens come: fixed time, reading, decoding; company, faults, marks."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.fakes.engine import Engine, Mark, Speed

MS = 1_000_000
S = 1_000_000_000
PLAIN = Speed(first_token_ns=50 * MS, token_ns=5 * MS)


def drained(engine: Engine) -> list[Mark]:
    marks: list[Mark] = []
    while engine.next_ns is not None:
        marks += engine.advance(engine.next_ns)
    return marks


def test_first_token_after_the_fixed_time_and_the_others_at_the_token_time() -> None:
    engine = Engine(PLAIN)
    engine.add(1, 1000, [1, 2, 40], 10 * MS)
    assert drained(engine) == [Mark(1, 60 * MS, 1), Mark(1, 65 * MS, 2), Mark(1, (60 + 39 * 5) * MS, 40)]


def test_the_prompt_is_read_at_its_rate() -> None:
    engine = Engine(Speed(first_token_ns=10 * MS, prefill_rate=1000.0, token_ns=5 * MS))
    engine.add(1, 500, [1], 0)
    assert drained(engine) == [Mark(1, 510 * MS, 1)]


def test_prompts_that_are_read_together_share_the_rate() -> None:
    engine = Engine(Speed(first_token_ns=0, prefill_rate=1000.0, token_ns=0))
    engine.add(1, 500, [1], 0)
    engine.add(2, 1000, [1], 0)
    assert drained(engine) == [Mark(1, S, 1), Mark(2, 3 * S // 2, 1)]


def test_each_further_stream_of_a_batch_slows_all() -> None:
    engine = Engine(Speed(first_token_ns=0, token_ns=10 * MS, batch_slowdown=0.5))
    engine.add(1, 1, [11], 0)
    engine.add(2, 1, [11], 0)
    engine.add(3, 1, [6], 0)  # 5 tokens at 20 ms, then the others go on at 15 ms
    assert drained(engine) == [Mark(3, 100 * MS, 6), Mark(1, 175 * MS, 11), Mark(2, 175 * MS, 11)]


def test_decoding_is_slower_while_a_prompt_is_read() -> None:
    engine = Engine(Speed(first_token_ns=0, prefill_rate=1000.0, token_ns=10 * MS, prefill_interference=0.5))
    engine.add(1, 0, [101], 0)
    engine.advance(0)
    engine.add(2, 500, [1], 0)  # reads for 500 ms, in which the first makes 25 tokens and not 50
    marks = drained(engine)
    assert marks == [Mark(2, 500 * MS, 1), Mark(1, 1250 * MS, 101)]


def test_factors_slow_what_is_under_way() -> None:
    engine = Engine(PLAIN)
    engine.add(1, 1, [1, 3], 0)
    engine.advance(25 * MS)
    engine.set_factors(3.0, 2.0, 25 * MS)
    assert drained(engine) == [Mark(1, 100 * MS, 1), Mark(1, 120 * MS, 3)]


def test_made_counts_tokens_and_dates_the_last_one() -> None:
    engine = Engine(PLAIN)
    engine.add(1, 1, [1, 40], 0)
    assert engine.made(1, 49 * MS) == (0, 0)
    engine.advance(50 * MS)
    assert engine.made(1, 50 * MS) == (1, 50 * MS)
    assert engine.made(1, 64 * MS) == (3, 60 * MS)
    drained(engine)
    assert engine.made(1, 10 * S) == (40, (50 + 39 * 5) * MS)


def test_a_stopped_stream_makes_no_more_tokens() -> None:
    engine = Engine(PLAIN)
    engine.add(1, 1, [1, 40], 0)
    engine.advance(50 * MS)
    engine.stop(1, 62 * MS)
    assert engine.next_ns is None
    assert engine.made(1, S) == (3, 60 * MS)


def test_a_stream_stopped_before_its_first_token_has_made_none() -> None:
    engine = Engine(PLAIN)
    engine.add(1, 1, [1, 40], 0)
    engine.stop(1, 20 * MS)
    assert engine.made(1, S) == (0, 0)


def test_a_further_mark_is_told_of_in_its_turn() -> None:
    engine = Engine(PLAIN)
    engine.add(1, 1, [40], 0)
    engine.advance(52 * MS)
    engine.add_mark(1, 3)
    assert drained(engine) == [Mark(1, 60 * MS, 3), Mark(1, (50 + 39 * 5) * MS, 40)]


def test_tokens_that_cost_nothing_come_at_once() -> None:
    engine = Engine(Speed(first_token_ns=0, token_ns=0))
    engine.add(1, 1, [1, 40], 7)
    assert drained(engine) == [Mark(1, 7, 1), Mark(1, 7, 40)]


def test_when_a_token_is_due() -> None:
    engine = Engine(PLAIN)
    engine.add(1, 1, [40], 0)
    assert engine.token_due_ns(1, 1) == 50 * MS
    engine.advance(50 * MS)
    assert engine.token_due_ns(1, 3) == 60 * MS


@pytest.mark.parametrize(("rate", "expected"), [(inf, 2 * S), (1e9, 7 * S)])
def test_load_time_is_a_fixed_part_and_the_bytes(rate: float, expected: int) -> None:
    assert Speed(load_fixed_ns=2 * S, load_rate=rate).load_ns(5_000_000_000) == expected


SPEEDS = st.builds(
    Speed,
    first_token_ns=st.integers(0, 100 * MS),
    prefill_rate=st.one_of(st.just(inf), st.floats(10, 1e5)),
    token_ns=st.integers(0, 50 * MS),
    batch_slowdown=st.floats(0, 2),
    prefill_interference=st.floats(0, 0.9),
)
STREAMS = st.lists(st.tuples(st.integers(0, 2 * S), st.integers(0, 5000), st.integers(1, 200)), min_size=1, max_size=6)


@given(SPEEDS, STREAMS, st.lists(st.integers(0, 4 * S), max_size=10))
def test_looking_more_often_changes_nothing_and_company_only_slows(
    speed: Speed, streams: list[tuple[int, int, int]], looks: list[int]
) -> None:
    def run(moments: list[int]) -> list[Mark]:
        engine = Engine(speed)
        marks: list[Mark] = []
        todo = sorted([(at, 1, i) for i, (at, _, _) in enumerate(streams)] + [(at, 0, 0) for at in moments])
        for at_ns, adds, i in todo:
            marks += engine.advance(at_ns)
            if adds:
                engine.add(i, streams[i][1], sorted({1, streams[i][2]}), at_ns)
        return marks + drained(engine)

    marks = run([])
    assert run(looks) == marks
    assert [mark.at_ns for mark in marks] == sorted(mark.at_ns for mark in marks)
    for i, (at_ns, prompt, tokens) in enumerate(streams):
        alone = Engine(speed)
        alone.add(i, prompt, sorted({1, tokens}), at_ns)
        for mine, together in zip(drained(alone), [mark for mark in marks if mark.stream_id == i], strict=True):
            assert mine.tokens == together.tokens
            assert mine.at_ns <= together.at_ns + len(streams) + 2
