"""The table `[alias]`: what each alias comes to, what cannot be, and that none goes in a circle."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.config_aliases import dump_aliases, parse_aliases
from lbcore.ollama import canonical_model
from lbcore.parsing import Problem


def parsed(raw: object) -> dict[str, list[str]]:
    problems: list[Problem] = []
    aliases = parse_aliases(raw, problems)
    assert problems == []
    assert all(canonical_model(alias.name) == asked for asked, alias in aliases.items())
    return {alias.name: list(alias.models) for alias in aliases.values()}


def problems_of(raw: object) -> list[str]:
    problems: list[Problem] = []
    parse_aliases(raw, problems)
    return [str(problem) for problem in problems]


def test_a_text_is_a_list_of_one() -> None:
    assert parsed({"gpt-4o": "llama3.2", "Big": ["a", "b"]}) == {"gpt-4o": ["llama3.2"], "Big": ["a", "b"]}


def test_another_alias_stands_for_its_own_list() -> None:
    assert parsed({"x": ["one", "y", "two"], "y": ["three", "z"], "z": "four"})["x"] == ["one", "three", "four", "two"]


def test_of_the_same_model_the_first_counts_however_it_is_written() -> None:
    assert parsed({"x": ["M", "y", "m:latest"], "y": ["n", "library/m"]})["x"] == ["M", "n"]


def test_its_own_name_is_the_model_of_that_name_for_others_too() -> None:
    assert parsed({"m": ["m:latest", "n"], "x": ["m"]}) == {"m": ["m:latest", "n"], "x": ["m:latest", "n"]}


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"a": "b", "b": ["c", "a"]}, 'alias.a: goes in a circle: "a" -> "b" -> "a"; let one of them name a model'),
        (
            {"x": "a", "C": "a", "a": "b", "b": "c:latest"},
            'alias.C: goes in a circle: "C" -> "a" -> "b" -> "C"; let one of them name a model',
        ),
        ({"a": ["a", "b"], "b": ["b", "a"]}, 'alias.a: goes in a circle: "a" -> "b" -> "a"'),
    ],
)
def test_a_circle_is_spelt_out(raw: object, told: str) -> None:
    (problem,) = problems_of(raw)
    assert problem.startswith(told)


def test_every_circle_is_told_of() -> None:
    told = problems_of({"a": "b", "b": "a", "c": "d", "d": "c"})
    assert [problem.partition(":")[0] for problem in told] == ["alias.a", "alias.c"]


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ("x", 'alias: "x" is not a table; write [alias] and below it "gpt-4o" = "llama3.2"'),
        ({"a": []}, "alias.a: [] names no model; write "),
        ({"a": ""}, 'alias.a: "" is no name of a model'),
        ({"a": ["b", " "]}, 'alias.a: " " is no name of a model'),
        ({"a": "http://b"}, 'alias.a: "http://b" is no name of a model'),
        ({"a": 5}, "alias.a: 5 is not a list of text"),
        ({"a": ["b", 5]}, "alias.a: [...] has 5 in it"),
        ({"": "b"}, 'alias."": is no name that a client could ask for'),
        ({"a b": "c"}, 'alias."a b": is no name that a client could ask for'),
        ({"*": "c"}, 'alias."*": is no name that a client could ask for'),
        ({"a": "b", "A:latest": "c"}, 'alias."A:latest": is the same name as alias.a; write one of them'),
        ({"gpt-4": {"1": "b"}}, "alias.gpt-4: {...} is a table; a name with a dot in it needs quotes"),
    ],
)
def test_what_cannot_be_is_told_with_its_key_and_how_to_write_it(raw: object, told: str) -> None:
    (problem,) = problems_of(raw)
    assert problem.startswith(told), problem


NAMES = st.sampled_from(["a", "b", "c", "A", "d:7b", "real", "other:latest"])
TABLES = st.dictionaries(NAMES, st.lists(NAMES, min_size=1, max_size=4), max_size=5)


@given(TABLES)
def test_an_alias_never_loops(raw: dict[str, Any]) -> None:
    problems: list[Problem] = []
    aliases = parse_aliases(raw, problems)
    for asked, alias in aliases.items():
        models = [canonical_model(name) for name in alias.models]
        assert len(set(models)) == len(models) > 0
        # a model in a chain that is an alias too is meant as the model: that alias has it itself
        assert all(model == asked or model not in aliases or model in _models(aliases[model]) for model in models)
    if not problems:
        dumped = dump_aliases(aliases)
        again = parse_aliases(dumped, problems)
        assert (again, problems) == (aliases, [])


def _models(alias: Any) -> set[str]:
    return {canonical_model(name) for name in alias.models}


def test_a_long_chain_of_aliases_is_no_deep_one() -> None:
    raw = {f"a{i}": [f"a{i + 1}", "m"] for i in range(3000)}
    assert parsed(raw)["a0"] == ["a3000", "m"]
