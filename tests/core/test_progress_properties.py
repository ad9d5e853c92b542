"""Merged progress: what holds however the lines of the servers interleave."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbcore.progress import ERROR_CHARS_MAX, LAYERS_MAX, LINE_BYTES_MAX, STAGES_MAX, TEXT_CHARS_MAX
from tests.core.test_progress import (
    BIG,
    JSON_SAFE_MAX,
    PULLING,
    SMALL,
    SUCCESS,
    VERIFYING,
    WHOLE,
    WRITING,
    Player,
    layer,
)

# --- every interleaving of two ------------------------------------------------------------------------------------


def interleavings(n_first: int, n_second: int) -> Iterator[list[int]]:
    for first in combinations(range(n_first + n_second), n_first):
        yield [0 if index in first else 1 for index in range(n_first + n_second)]


STREAMS: dict[str, list[dict[str, Any]]] = {
    "whole": [PULLING, layer(BIG, 100, 40), layer(BIG, 100, 100), VERIFYING, SUCCESS],
    "again": [PULLING, layer(BIG, 100, 70), layer(BIG, 100, 10), layer(BIG, 100, 100), VERIFYING, SUCCESS],
    "has": [PULLING, layer(BIG, 100, 100), VERIFYING, SUCCESS],
    "refused": [],
    "fails": [PULLING, layer(BIG, 100, 60), {"error": "no space"}],
    "cut": [PULLING, layer(BIG, 100, 90), VERIFYING],
}
ORDER = [line["status"] for line in (PULLING, VERIFYING, WRITING)]


def play(streams: Sequence[Sequence[dict[str, Any]]], turns: Iterable[int]) -> Player:
    """Feed whole streams in the order of `turns`, each with one turn more for its end, and check each stage told."""
    player = Player([f"gpu{index}" for index in range(len(streams))])
    places = [iter(stream) for stream in streams]
    stage_of = [-1] * len(streams)  # the last that each told; above all when it is done
    shown = -1
    for turn in turns:
        name, line = player.names[turn], next(places[turn], None)
        before = dict(player.completed)
        told = player.end(name) if line is None else player.feed(name, line)
        if line is None or "error" in line:
            stage_of[turn] = len(ORDER)
        elif line["status"] in ORDER:
            stage_of[turn] = ORDER.index(line["status"])
        if told is not None and "digest" not in told:
            stage = ORDER.index(told["status"])
            assert stage >= shown
            assert stage <= max(0, min(stage_of)), "the slowest has not come so far"
            shown = stage
        assert shown < 1 or player.completed == before, "a layer after the stage that follows it"
    good = {name: list(stream[-1:]) == [SUCCESS] for name, stream in zip(player.names, streams, strict=True)}
    closing = player.closing()
    assert player.progress.ok == all(good.values())
    for name, state in closing["servers"].items():
        assert good[name] == (state == "success")
        assert player.progress.ok or len(streams) == 1 or name in closing["error"]
    if player.progress.ok:
        assert player.completed == player.totals
        assert player.stages == [line["status"] for line in streams[0] if line["status"] in ORDER]
    return player


@pytest.mark.parametrize("second", list(STREAMS))
@pytest.mark.parametrize("first", ["whole", "again", "fails"])
def test_two_servers_in_every_interleaving(first: str, second: str) -> None:
    streams = [STREAMS[first], STREAMS[second]]
    for turns in interleavings(*(len(stream) + 1 for stream in streams)):
        player = play(streams, turns)
        assert player.totals in ({}, {BIG: 200})


# --- properties ---------------------------------------------------------------------------------------------------


@st.composite
def streams_of_one_model(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    """Return whole streams of up to four servers that pull the same layers at their own paces; some fail."""
    totals = draw(st.lists(st.integers(1, 10**12), min_size=1, max_size=3))
    streams = []
    for _ in range(draw(st.integers(1, 4))):
        lines = [PULLING]
        for index, total in enumerate(totals):
            digest = f"sha256:{index:064}"
            told = draw(st.lists(st.integers(0, total), max_size=2))
            lines += [layer(digest, total, completed) for completed in (*told, total)]
        lines += [VERIFYING, WRITING, SUCCESS]
        if draw(st.booleans()):
            lines = lines[: draw(st.integers(0, len(lines) - 1))]
            lines += draw(st.sampled_from([[], [{"error": "no space left on device"}]]))
        streams.append(lines)
    return streams


@settings(max_examples=200, deadline=None)
@given(streams=streams_of_one_model(), data=st.data())
def test_whatever_the_interleaving_bars_only_grow_and_the_end_is_told_once(
    streams: list[list[dict[str, Any]]], data: st.DataObject
) -> None:
    turns = [index for index, stream in enumerate(streams) for _ in range(len(stream) + 1)]
    totals = {told["digest"]: told["total"] for stream in streams for told in stream if "digest" in told}
    player = play(streams, data.draw(st.permutations(turns)))
    assert player.totals == {digest: total * len(streams) for digest, total in totals.items()}
    for digest, completed in player.completed.items():
        best = [
            max([told.get("completed", 0) for told in stream if told.get("digest") == digest], default=0)
            for stream in streams
        ]
        assert completed == sum(best)
    assert player.stages == [status for status in ORDER if status in player.stages]
    closing = player.closing()
    for name in player.names:  # late lines change nothing
        assert player.feed(name, PULLING) is None
        assert player.end(name, "too late") is None
    assert player.closing() == closing


ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["\ud800", "x" * 1_000, "success", BIG, SMALL, [], {}, {"a": [1]}, 10**400]),
)
ODD_LINES = st.one_of(
    st.binary(max_size=40),
    ODD.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(["status", "digest", "total", "completed"]), ODD).map(
        lambda value: json.dumps(value).encode()
    ),
    st.fixed_dictionaries({"error": ODD}).map(lambda value: json.dumps(value).encode()),
    st.sampled_from([json.dumps(line).encode() for line in WHOLE]),
    st.sampled_from(
        [
            b"",
            b"\n",
            b"[" * 60_000,
            b'{"status":' * 6_000,
            b'{"total":' + b"9" * 5_000 + b"}",
            b'{"status":"' + b"x" * LINE_BYTES_MAX + b'"}',
            b'\xff\xfe{"status":"x"}',
            b'{"status":"x"',
            b'{"status":NaN}',
        ]
    ),
)


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), ODD_LINES), max_size=25))
def test_garbage_never_raises_and_bars_stay_true(lines: list[tuple[str, bytes]]) -> None:
    player = Player(["a", "b", "c"])
    for name, line in lines:
        player.feed(name, line)
    player.closing()


@pytest.mark.parametrize(
    "line",
    [
        {"status": "x", "digest": BIG},
        {"status": "x", "digest": BIG, "total": 0, "completed": 5},
        {"status": "x", "digest": BIG, "total": -5},
        {"status": "x", "digest": BIG, "total": True},
        {"status": "x", "digest": BIG, "total": 1e9},
        {"status": "x", "digest": BIG, "total": "5"},
        {"status": "x", "digest": "d" * 201, "total": 5},
        {"status": "x", "digest": "d\ud800", "total": 5},  # would be written as another such digest is
    ],
    ids=repr,
)
def test_a_layer_that_cannot_be_drawn_is_only_a_state(line: dict[str, Any]) -> None:
    player = Player(["a", "b"])
    assert player.feed("a", line) is None
    player.feed("b", PULLING)
    assert player.lines[-1] == PULLING | {"servers": {"a": "x", "b": "pulling manifest"}}


def test_a_huge_line_is_none_of_ollamas() -> None:
    player = Player(["a"])
    line = b'{"status":"x","more":"%s"}'
    assert player.feed("a", line % (b"y" * LINE_BYTES_MAX)) is None
    assert player.feed("a", line % b"y") is not None


def test_numbers_stay_within_what_every_client_can_count() -> None:
    player = Player(["a", "b", "c"])
    player.feed("a", layer(BIG, 10**30, 10**30))
    player.feed("b", layer(BIG, 10, -5))
    player.feed("c", layer(BIG, 10**30, 10**29))
    assert player.totals[BIG] <= JSON_SAFE_MAX
    assert player.completed[BIG] == player.totals[BIG] // 3 * 2


def test_memory_is_bounded_whatever_servers_tell() -> None:
    player = Player(["a", "b"])
    for index in range(3 * max(LAYERS_MAX, STAGES_MAX)):
        for name in player.names:
            player.feed(name, layer(f"sha256:{index:064}", 100, 50))
            player.feed(name, {"status": f"{index} " + "x" * 1_000, "more": "y" * 1_000})
            player.feed(name, {"status": "same"})
    progress = player.progress
    assert len(player.totals) == len(progress._layers) == LAYERS_MAX
    assert len(progress._stages) == STAGES_MAX
    assert len(progress._shown) <= STAGES_MAX
    for server in progress._servers.values():
        assert len(server.told) <= STAGES_MAX
        assert len(server.reached) <= STAGES_MAX
        assert all(len(status) <= TEXT_CHARS_MAX for status, _ in server.told)
    assert len(player.raw) < 2_000
    player.feed("a", {"error": "z" * 10_000})
    assert len(player.raw) < 2_000
    assert player.lines[-1]["servers"]["a"] == "failed: " + "z" * (ERROR_CHARS_MAX - 1) + "…"
    player.end("b", "w" * 10_000)
    assert len(player.closing()["error"]) < 3 * ERROR_CHARS_MAX
