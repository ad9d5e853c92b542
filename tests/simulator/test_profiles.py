"""Profiles for common hardware."""

from __future__ import annotations

import tomllib
from dataclasses import astuple
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.parsing import Problem
from simulator.profiles import (
    BYTES_PER_PARAMETER,
    ModelFigures,
    Profile,
    ProfileError,
    fitting_share,
    parse_profiles,
    profile,
    profile_names,
    speed_of,
)

ROOT = Path(__file__).parents[2]
NAMES = ("rtx3060", "rtx4090", "a100", "m2", "cpu")
S = 1_000_000_000


def decode(name: str, parameters: float) -> float:
    return S / speed_of(profile(name), parameters=parameters).token_ns


def test_the_profiles_are_there() -> None:
    assert profile_names() == NAMES


def test_the_file_is_installed_with_the_package() -> None:
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "profiles.toml" in packaged["package-data"]["simulator"]


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_source(name: str) -> None:
    known = profile(name)
    sources = [value for key, value in zip(known.figures.__slots__, astuple(known.figures), strict=True)
               if key.endswith("_source")]
    sources += [source for row in known.models for source in (row.prefill_source, row.decode_source)]
    assert all(len(source) >= 5 for source in sources)
    text = (ROOT / "simulator" / "profiles.toml").read_text(encoding="utf-8")
    assert [f"# [{number}] " in text for number in range(1, 11)] == [True] * 10


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_read_as_it_stands(name: str) -> None:
    known = profile(name)
    for row in known.models:
        speed = speed_of(known, parameters=row.parameters)
        assert speed.prefill_rate == pytest.approx(row.prefill)
        assert speed.token_ns == pytest.approx(S / row.decode, abs=1)
        assert speed.first_token_ns == known.figures.first_token_ns
        assert speed.load_rate == known.figures.load_rate
        assert speed.load_fixed_ns == known.figures.load_fixed_ns
        assert speed.batch_slowdown == known.figures.batch_slowdown


@pytest.mark.parametrize("name", NAMES)
def test_a_larger_model_is_slower(name: str) -> None:
    speeds = [speed_of(profile(name), parameters=2 ** (at / 8)) for at in range(-24, 80)]
    assert all(small.prefill_rate > large.prefill_rate for small, large in pairwise(speeds))
    assert all(small.token_ns < large.token_ns for small, large in pairwise(speeds))
    assert all(0 <= speed.prefill_interference < 1 for speed in speeds)


def test_a_faster_card_is_faster_with_whatever_it_holds() -> None:
    order = ("cpu", "m2", "rtx3060", "rtx4090")
    for (slow, quick), parameters in product(pairwise(order), (1, 3, 8, 14, 32)):
        assert decode(slow, parameters) < decode(quick, parameters)
    assert decode("rtx4090", 70) < decode("a100", 70)


@given(st.sampled_from(NAMES), st.floats(0.01, 1000))
def test_every_size_has_a_speed(name: str, parameters: float) -> None:
    speed = speed_of(profile(name), parameters=parameters)
    assert speed.prefill_rate > 0
    assert speed.token_ns > 0
    assert type(speed.token_ns) is int
    assert speed.load_ns(round(parameters * 1e9)) > speed.load_fixed_ns


def test_decoding_makes_a_token_for_each_chunk_of_a_prompt_that_is_read_meanwhile() -> None:
    speed = speed_of(profile("rtx4090"), parameters=8.03)
    chunk_s = 512 / 7139
    assert 130.6 * (1 - speed.prefill_interference) == pytest.approx(1 / chunk_s)


def test_a_size_in_bytes_is_a_size_in_parameters() -> None:
    size_bytes = round(8.03e9 * BYTES_PER_PARAMETER)
    assert size_bytes == pytest.approx(4.58 * 2**30, rel=0.01)  # LLaMA 3 8B Q4_K_M
    assert pytest.approx(39.6 * 2**30, rel=0.02) == 70.6e9 * BYTES_PER_PARAMETER
    by_size, by_count = (speed_of(profile("rtx4090"), size_bytes=size_bytes),
                         speed_of(profile("rtx4090"), parameters=8.03))
    assert by_size.token_ns == pytest.approx(by_count.token_ns, rel=1e-6)


def test_what_does_not_fit_is_left_to_the_host() -> None:
    big = round(70.6e9 * BYTES_PER_PARAMETER)
    assert fitting_share(profile("rtx4090"), big) == pytest.approx(0.54, abs=0.01)
    assert fitting_share(profile("a100"), big) == 1
    assert fitting_share(profile("cpu"), big) == 1
    assert decode("cpu", 70.6) < decode("rtx4090", 70.6) < 3 * decode("cpu", 70.6)
    # measured: 3.10 tokens/s of Llama 3.1 70B on a 4090 beside a Ryzen 9 7900X (geerlingguy/ai-benchmarks)
    assert decode("rtx4090", 70.6) == pytest.approx(3.10, rel=0.2)
    quick = speed_of(profile("rtx4090"), parameters=70.6, host=profile("m2"))
    assert quick.token_ns < speed_of(profile("rtx4090"), parameters=70.6).token_ns


def test_a_figure_that_was_not_put_in_comes_out() -> None:
    # measured: LLaMA 13B Q4_0 at 88.9 tokens/s on a 4090, 65B at 26.6 on an A100 (XiongjieDai/GPU-Benchmarks...)
    assert decode("rtx4090", 13.0) == pytest.approx(88.9, rel=0.15)
    assert decode("a100", 65.2) == pytest.approx(26.6, rel=0.05)
    assert decode("m2", 0.8) > 55  # Qwen 0.8B on an M2 Air, a model with more to do besides reading its weights


def test_a_profile_of_one_size_is_scaled_by_size() -> None:
    row = ModelFigures(parameters=8.0, prefill=800.0, prefill_source="x", decode=80.0, decode_source="x")
    speed = speed_of(Profile("own", profile("cpu").figures, (row,)), parameters=4.0)
    assert (speed.prefill_rate, speed.token_ns) == (1600.0, S // 160)


@pytest.mark.parametrize(("sizes", "error"), [
    ({}, "neither parameters nor size_bytes is given"),
    ({"parameters": 0}, "a model of 0 billion parameters has no speed"),
    ({"parameters": float("nan")}, "a model of nan billion parameters has no speed"),
    ({"size_bytes": -1}, "a model of -1.63934e-09 billion parameters has no speed"),
])
def test_a_model_without_a_size_has_no_speed(sizes: dict[str, Any], error: str) -> None:
    with pytest.raises(ProfileError) as caught:
        speed_of(profile("cpu"), **sizes)
    assert str(caught.value) == error


def test_an_unknown_profile_is_told_with_the_one_that_may_be_meant() -> None:
    with pytest.raises(ProfileError) as caught:
        profile("rtx4080")
    assert str(caught.value) == ('"rtx4080" is no profile; did you mean "rtx4090"? The choices are '
                                 '"rtx3060", "rtx4090", "a100", "m2", "cpu"')


def problems_of(text: str) -> list[str]:
    problems: list[Problem] = []
    parse_profiles(tomllib.loads(text), problems, "profiles")
    return [str(problem) for problem in problems]


def test_problems_of_a_table_of_ones_own_are_told() -> None:
    text = (ROOT / "simulator" / "profiles.toml").read_text(encoding="utf-8")
    assert problems_of(text) == []
    assert problems_of(text.replace('load_rate = "1.4GB"', 'load_rat = "1.4GB"')) == [
        'profiles.rtx3060.load_rat: "1.4GB" is set, but there is no such key; did you mean profiles.rtx3060.load_rate?',
        "profiles.rtx3060.load_rate: is missing; it says bytes per s from disk to memory"]
    assert problems_of(text.replace("decode = 279.0", "decode = 0")) == [
        "profiles.rtx3060.models[0].decode: 0 is too small; write a number of 0.001 or more"]
    assert problems_of(text.replace("parameters = 3.21\nprefill = 2600.0", "parameters = 1.10\nprefill = 2600.0")) == [
        "profiles.rtx3060.models: [...] has two tables for one size; leave one out"]
    assert problems_of("x = 1") == [
        "profiles.x: 1 is not a table; write its keys in a table of their own",
        *(f"profiles.x.{key}: is missing; it says {why}" for key, why in (
            ("about", "what it is"), ("vram", "memory for models; 0: no GPU"),
            ("vram_source", "where the figure is from"),
            ("first_token", "before a first token, apart from reading the prompt"),
            ("first_token_source", "where the figure is from"), ("load_fixed", "of a load, whatever the size"),
            ("load_fixed_source", "where the figure is from"), ("load_rate", "bytes per s from disk to memory"),
            ("load_rate_source", "where the figure is from"),
            ("batch_slowdown", "share that each further stream of a batch adds to the time of a token"),
            ("batch_slowdown_source", "where the figure is from"),
            ("prefill_chunk", "tokens of a prompt read at a time, for which decoding waits"),
            ("prefill_chunk_source", "where the figure is from"))),
        "profiles.x.models: is not a list of tables; write [[profiles.x.models]] tables"]
