"""Units, and TOML tables into settings dataclasses."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.config import Config
from lbcore.parsing import Problem, nearest, parse_table
from lbcore.schema import (
    MS_NS,
    SECOND_NS,
    Kind,
    Setting,
    count,
    describe_setting,
    duration,
    fields_of,
    join,
    keys_of,
    ratio,
    section,
    setting,
    size,
)
from lbcore.units import UnitError, format_duration, format_size, parse_duration, parse_size

# ruff: noqa: RUF009  # schema functions declare fields

NS = 1
MINUTE = 60 * SECOND_NS
HOUR = 60 * MINUTE


# --- durations and sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected"), [
    ("300ms", 300 * MS_NS), ("1h30m", HOUR + 30 * MINUTE), ("5m", 5 * MINUTE), ("1.5s", 1500 * MS_NS), ("0s", 0),
    ("1h 30m", HOUR + 30 * MINUTE), (" 5 m ", 5 * MINUTE), ("2d", 48 * HOUR), ("7us", 7000), ("7µs", 7000), ("7ns", 7),
    (10, 10 * SECOND_NS), (0, 0), (0.1, 100 * MS_NS), (1.5, 1500 * MS_NS), (1e-9, NS),
])
def test_durations_are_read_exactly(value: Any, expected: int) -> None:
    assert parse_duration(value) == expected


@pytest.mark.parametrize(("value", "expected"), [
    ("10 seconds", 10 * SECOND_NS), ("30 secs", 30 * SECOND_NS), ("1 minute 1 second", 61 * SECOND_NS),
    ("5min", 5 * MINUTE), ("2 mins", 2 * MINUTE), ("1 hour", HOUR), ("2 hrs", 2 * HOUR), ("2 days", 48 * HOUR),
    ("7 milliseconds", 7 * MS_NS),
])
def test_units_of_durations_may_be_words(value: str, expected: int) -> None:
    assert parse_duration(value) == expected


@pytest.mark.parametrize(("value", "expected"), [
    ("64MiB", 64 << 20), ("64MB", 64_000_000), ("1GiB", 1 << 30), ("1.5KiB", 1536), ("64 mib", 64 << 20), ("7B", 7),
    (0, 0), (123, 123), (5.0, 5),
])
def test_sizes_are_read_exactly(value: Any, expected: int) -> None:
    assert parse_size(value) == expected


DURATION_FORMS = 'write "300ms", "1.5s", "1h30m" or a number of seconds'
SIZE_FORMS = 'write "64MiB", "64MB" or a number of bytes'
DURATION_UNITS = "the units are d, h, m, s, ms, us, ns"
SIZE_UNITS = "the units are TiB, TB, GiB, GB, MiB, MB, KiB, kB, B"


@pytest.mark.parametrize(("value", "message", "fix"), [
    ("10", "is text without a unit", 'write 10 or "10s"'),
    ("1.5", "is text without a unit", 'write 1.5 or "1.5s"'),
    ("-5s", "is negative", DURATION_FORMS),
    ("-5", "is negative", DURATION_FORMS),
    (-1, "is negative", DURATION_FORMS),
    (-0.5, "is negative", DURATION_FORMS),
    (math.nan, "is not finite", DURATION_FORMS),
    (math.inf, "is not finite", DURATION_FORMS),
    (-math.inf, "is not finite", DURATION_FORMS),
    (True, "is not a duration", DURATION_FORMS),
    (None, "is not a duration", DURATION_FORMS),
    ([], "is not a duration", DURATION_FORMS),
    ("", "is not a duration", DURATION_FORMS),
    ("soon", "is not a duration", DURATION_FORMS),
    ("5s later", "is not a duration", DURATION_FORMS),
    ("5 weeks", 'has an unknown unit "weeks"', DURATION_UNITS),
    ("5S", "is not a duration", DURATION_FORMS),
    ("nan", "is not a duration", DURATION_FORMS),
    ("5s!", "is not a duration", DURATION_FORMS),
])
def test_bad_durations_say_what_is_wrong(value: Any, message: str, fix: str) -> None:
    with pytest.raises(UnitError) as caught:
        parse_duration(value)
    assert (caught.value.message, caught.value.fix) == (message, fix)


@pytest.mark.parametrize(("value", "message", "fix"), [
    ("10", "is text without a unit", 'write 10 or "10MiB"'),
    ("-5MiB", "is negative", SIZE_FORMS),
    (-1, "is negative", SIZE_FORMS),
    (math.inf, "is not finite", SIZE_FORMS),
    (True, "is not a size", SIZE_FORMS),
    ({}, "is not a size", SIZE_FORMS),
    ("big", "is not a size", SIZE_FORMS),
    ("64M", 'has an unknown unit "M"', SIZE_UNITS),
    (1.5, "is not a whole number of bytes", SIZE_FORMS),
    ("1.0001KiB", "is not a whole number of bytes", SIZE_FORMS),
])
def test_bad_sizes_say_what_is_wrong(value: Any, message: str, fix: str) -> None:
    with pytest.raises(UnitError) as caught:
        parse_size(value)
    assert (caught.value.message, caught.value.fix) == (message, fix)


@pytest.mark.parametrize(("duration_ns", "text"), [
    (0, "0s"), (1, "1ns"), (50 * MS_NS, "50ms"), (100 * MS_NS, "100ms"), (1500 * MS_NS, "1.5s"),
    (90 * SECOND_NS, "90s"), (HOUR, "1h"), (10 * MINUTE, "10m"), (HOUR + 30 * MINUTE, "90m"),
    (SECOND_NS + 1, "1s1ns"), (86_400 * SECOND_NS, "24h"),
])
def test_durations_are_written_short(duration_ns: int, text: str) -> None:
    assert format_duration(duration_ns) == text


@pytest.mark.parametrize(("n_bytes", "text"), [
    (0, "0B"), (1 << 20, "1MiB"), (10**6, "1MB"), (64 << 10, "64KiB"), (1500, "1500B"),
    (3 << 29, "1.5GiB"), (1 << 60, "1048576TiB"),
])
def test_sizes_are_written_short(n_bytes: int, text: str) -> None:
    assert format_size(n_bytes) == text


AMOUNTS = st.one_of(
    st.integers(0, 10**19),
    st.builds(lambda number, unit: number * unit, st.integers(0, 5000),
              st.sampled_from([NS, 1000, MS_NS, SECOND_NS, MINUTE, HOUR])),
    st.builds(lambda number, shift: number << shift, st.integers(0, 5000), st.sampled_from([0, 10, 20, 30, 40])),
)


@given(AMOUNTS)
def test_durations_round_trip(duration_ns: int) -> None:
    assert parse_duration(format_duration(duration_ns)) == duration_ns


@given(AMOUNTS)
def test_sizes_round_trip(n_bytes: int) -> None:
    assert parse_size(format_size(n_bytes)) == n_bytes


@pytest.mark.parametrize("parse", [parse_duration, parse_size])
@given(value=st.one_of(st.text(max_size=20), st.text("0123456789.smhndµ +-e", max_size=12), st.floats(),
                       st.integers(), st.booleans(), st.none()))
def test_any_value_is_an_amount_or_refused(parse: Callable[[Any], int], value: Any) -> None:
    with contextlib.suppress(UnitError):
        amount = parse(value)
        assert type(amount) is int
        assert amount >= 0


# --- tables ------------------------------------------------------------------------------------------------


class Colour(StrEnum):
    RED = "dark-red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    wait_ns: int = duration("a wait", SECOND_NS, low=100 * MS_NS, high=HOUR)
    most: int = count("how many", 3, low=1, high=9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    share: float = ratio("a share", 0.5, high=1.0)
    held_max: int = size("held", 1 << 20, low=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    name: str = setting(Kind.TEXT, "what it is called")
    colour: Colour = setting(Kind.CHOICE, "its colour", Colour.RED)
    mood: Colour | None = setting(Kind.CHOICE, "its mood", None, choices=Colour)
    on: bool = setting(Kind.FLAG, "whether", default=True)
    pause_ns: int = duration("a pause", 0, low=5)
    inner: Inner = section("inside", Inner)
    other: Other = section("beside", Other)
    hidden: int = 7  # no key


def parse(raw: Any) -> tuple[Table | None, list[str]]:
    problems: list[Problem] = []
    table = parse_table(Table, raw, "", problems)
    return table, [str(problem) for problem in problems]


def test_every_kind_is_read() -> None:
    table, problems = parse({
        "name": "x", "colour": "blue", "mood": "dark-red", "on": False, "pause": "2m",
        "inner": {"wait": 0.25, "most": 9}, "other": {"share": 1, "held_max": "2KiB"},
    })
    assert problems == []
    assert table == Table(
        name="x", colour=Colour.BLUE, mood=Colour.RED, on=False, pause_ns=2 * MINUTE,
        inner=Inner(wait_ns=250 * MS_NS, most=9), other=Other(share=1.0, held_max=2048))
    assert isinstance(table.other.share, float)


def test_what_is_left_out_has_its_default() -> None:
    assert parse({"name": "x"}) == (Table(name="x"), [])


CHOICES = '"dark-red", "blue"'


@pytest.mark.parametrize(("raw", "problem"), [
    ({"name": 5}, 'name: 5 is not text; write it in quotes: "5"'),
    ({"name": True}, "name: true is not text; write text in quotes"),
    ({"name": ["x"]}, "name: [...] is not text; write text in quotes"),
    ({"name": "a\nb"}, 'name: "a\\nb" has unprintable characters in it; write one line of plain text'),
    ({"colour": "bleu"}, f'colour: "bleu" is not one of the choices; did you mean "blue"? The choices are {CHOICES}'),
    ({"colour": "DARK_RED"},
     f'colour: "DARK_RED" is not one of the choices; did you mean "dark-red"? The choices are {CHOICES}'),
    ({"colour": "zzz"}, f'colour: "zzz" is not one of the choices; write one of {CHOICES}'),
    ({"mood": 3}, f"mood: 3 is not one of the choices; write one of {CHOICES}"),
    ({"on": "yes"}, 'on: "yes" is not true or false; write true, without quotes'),
    ({"on": 0}, "on: 0 is not true or false; write false, without quotes"),
    ({"on": "maybe"}, 'on: "maybe" is not true or false; write true or false'),
    ({"pause": "10"}, 'pause: "10" is text without a unit; write 10 or "10s"'),
    ({"pause": True}, f"pause: true is not a duration; {DURATION_FORMS}"),
    ({"pause": 10**400}, f"pause: {str(10**400)[:80]}... is too large; write a duration from 5ns to 8760h"),
    ({"pause_ns": 5}, "pause_ns: 5 is set, but there is no such key; did you mean pause?"),
    ({"inner": {"wait": "5ms"}}, 'inner.wait: "5ms" is too small; write a duration from 100ms to 1h'),
    ({"inner": {"wait": "2h"}}, 'inner.wait: "2h" is too large; write a duration from 100ms to 1h'),
    ({"inner": {"most": 0}}, "inner.most: 0 is too small; write a whole number from 1 to 9"),
    ({"inner": {"most": 2.0}}, "inner.most: 2.0 is not a whole number; write 2"),
    ({"inner": {"most": 2.5}}, "inner.most: 2.5 is not a whole number; write a whole number such as 3"),
    ({"inner": {"most": "3"}}, 'inner.most: "3" is not a whole number; write 3'),
    ({"inner": {"most": "few"}},
     'inner.most: "few" is not a whole number; write a whole number such as 3, without quotes'),
    ({"inner": {"most": False}}, "inner.most: false is not a whole number; write a whole number such as 3"),
    ({"other": {"share": math.nan}}, "other.share: nan is not finite; write a number such as 0.5"),
    ({"other": {"share": 10**400}}, f"other.share: {str(10**400)[:80]}... is not finite; write a number such as 0.5"),
    ({"other": {"share": 1.5}}, "other.share: 1.5 is too large; write a number from 0 to 1"),
    ({"other": {"share": "0.5"}}, 'other.share: "0.5" is not a number; write 0.5'),
    ({"other": {"share": True}}, "other.share: true is not a number; write a number such as 0.5"),
    ({"other": {"held_max": "1KB"}}, 'other.held_max: "1KB" is too small; write a size of 1KiB or more'),
    ({"inner": 5}, "inner: 5 is not a table; write its keys in a table of their own"),
    ({"inner": {"most ": 5}}, 'inner."most ": 5 is set, but there is no such key; did you mean inner.most?'),
    ({"inner": {"share": 5}}, "inner.share: 5 is set, but there is no such key; did you mean other.share?"),
    ({"inner": {"heldmax": 5}}, "inner.heldmax: 5 is set, but there is no such key; did you mean other.held_max?"),
    ({"wait": "1s"}, 'wait: "1s" is set, but there is no such key; did you mean inner.wait?'),
    ({"Inner": {"most": 5}}, "Inner: {...} is set, but there is no such key; did you mean inner?"),
    ({"inner": {"zzz": 5}}, "inner.zzz: 5 is set, but there is no such key; the keys here are wait, most"),
    ({"hidden": 5},
     "hidden: 5 is set, but there is no such key; the keys here are name, colour, mood, on, pause, inner, other"),
])
def test_each_mistake_has_its_message(raw: dict[str, Any], problem: str) -> None:
    assert parse({"name": "x", **raw})[1] == [problem]


def test_a_mandatory_key_is_missed() -> None:
    assert parse({}) == (None, ["name: is missing; it says what it is called"])
    assert parse({"name": 5})[0] is None


def test_what_is_no_table_is_one_problem() -> None:
    problems: list[Problem] = []
    assert parse_table(Inner, "x", "inner", problems) == Inner()
    assert str(problems[0]) == 'inner: "x" is not a table; write its keys in a table of their own'
    assert len(problems) == 1


def test_all_mistakes_are_found_and_the_rest_is_read() -> None:
    raw = {"nam": 1, "colour": 1, "on": 1, "inner": {"most": 0, "wait": 7}, "other": {"shar": 1}, "name": "x"}
    table, problems = parse(raw)
    assert [problem.partition(":")[0] for problem in problems] == ["nam", "colour", "on", "inner.most", "other.shar"]
    assert table == Table(name="x", inner=Inner(wait_ns=7 * SECOND_NS))


def test_keys_elsewhere_in_the_file_are_suggested() -> None:
    problems: list[Problem] = []
    parse_table(Inner, {"x": 1}, "inner", problems, also=[("far", "x"), ("away", "x")])
    assert problems[0].fix == "did you mean far.x or away.x?"


@given(st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
        st.one_of(st.sampled_from([name for _, name in keys_of(Table)]), st.text(max_size=6)), inner, max_size=5)),
    max_leaves=12))
def test_any_table_is_read_or_refused_in_one_line_each(raw: Any) -> None:
    table, problems = parse(raw)
    assert table is not None or problems
    assert all("\n" not in problem for problem in problems)


def test_long_values_are_shown_short() -> None:
    assert len(parse({"name": "x", "colour": "z" * 9999})[1][0]) < 200


def test_the_table_as_data() -> None:
    assert list(keys_of(Table)) == [
        ("", "name"), ("", "colour"), ("", "mood"), ("", "on"), ("", "pause"),
        ("", "inner"), ("inner", "wait"), ("inner", "most"), ("", "other"), ("other", "share"), ("other", "held_max")]
    assert [field.key for field in fields_of(Table) if field.mandatory] == ["name"]
    assert join("routes", "/api/chat") == 'routes."/api/chat"'


@pytest.mark.parametrize(("declared", "text"), [
    (Setting(Kind.DURATION, "", MS_NS), "duration, 1ms or more"),
    (Setting(Kind.DURATION, "", 0, HOUR), "duration, from 0s to 1h"),
    (Setting(Kind.SIZE, "", None, 1 << 20), "size, 1MiB or less"),
    (Setting(Kind.RATIO, "", 0.0, 1e6), "number, from 0 to 1000000"),
    (Setting(Kind.FLAG, ""), "true or false"),
    (Setting(Kind.CHOICE, "", choices=Colour), "one of dark-red, blue"),
])
def test_settings_are_described(declared: Setting, text: str) -> None:
    assert describe_setting(declared) == text


def test_the_nearest_word() -> None:
    assert nearest("racer-max", ["racers_min", "racers_max"]) == ["racers_max"]
    assert nearest("qqq", ["racers_min"]) == []


def test_every_default_of_the_core_is_a_legal_value() -> None:
    for outer in fields_of(Config):
        held = outer.section()
        raw = {field.key: getattr(held, field.name) for field in fields_of(outer.section)}
        in_seconds = {key: value / SECOND_NS if f"{key}_ns" in {f.name for f in dataclasses.fields(held)} else value
                      for key, value in raw.items()}
        problems: list[Problem] = []
        assert parse_table(outer.section, in_seconds, outer.key, problems) == held
        assert problems == []


def test_the_keys_that_exist_are_listed_once() -> None:
    problems: list[Problem] = []
    parse_table(Config, {"aa": 1, "queues": 2, "bb": 3}, "", problems)
    assert [problem.fix.partition(" ")[0] for problem in problems] == ["the", "did", ""]
    assert str(problems[2]) == "bb: 3 is set, but there is no such key"
