"""A core that is broken on purpose is found out (all of them: `python -m benchmarks.mutations`)."""

from __future__ import annotations

import pytest

from benchmarks.mutations import MUTATIONS, Mutation, broken, seeds_needed

QUICK = (
    "losers are not cancelled",
    "a dead server is not probed again",
    "an attempt is committed twice",
    "a slot is not given back",
    "the retry budget is ignored",
)


@pytest.mark.plain_core
@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.what in QUICK], ids=lambda m: m.what)
def test_a_broken_core_is_caught_by_a_few_seeds(mutation: Mutation) -> None:
    with broken(mutation):
        assert seeds_needed(range(1, 11)) is not None
    assert seeds_needed([1]) is None


@pytest.mark.plain_core
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_every_mutation_still_finds_what_it_changes(mutation: Mutation) -> None:
    with broken(mutation):
        pass


def test_they_are_all_there() -> None:
    assert len({m.what for m in MUTATIONS}) == len(MUTATIONS) >= 20
    assert set(QUICK) <= {m.what for m in MUTATIONS}
