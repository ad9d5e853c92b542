"""How many parts a request goes in, and over whom."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.catalog import same_build
from lbcore.config import ServerSettings
from lbcore.events import ModelInfo
from lbcore.parts import part_count, ready_at_once, shares
from lbcore.records import Server
from lbcore.states import Reliability, ServerState

MODEL = "m:latest"


def holder(number: int, digest: str = "d", *, modified_at: str = "2026-01-01T00:00:00Z", slots: int = 1) -> Server:
    server = Server(number, ServerSettings(url=f"http://s{number}", name=f"s{number}", slots=slots))
    server.state = ServerState.HEALTHY
    record = server.model(MODEL)
    record.available = ModelInfo(MODEL, digest, modified_at, "{}")
    record.loaded = True
    return server


@given(st.integers(1, 5000), st.integers(1, 64))
def test_shares_add_up_and_differ_by_one_at_most(n_inputs: int, n_parts: int) -> None:
    found = shares(n_inputs, n_parts)
    assert sum(found) == n_inputs
    assert len(found) == n_parts
    assert max(found) - min(found) <= 1


@pytest.mark.parametrize(
    ("n_inputs", "above", "n_servers", "expected"),
    [
        (64, 64, 8, 1), (65, 64, 8, 2), (95, 64, 8, 2), (96, 64, 8, 3), (512, 64, 4, 4), (512, 64, 1, 1),
        (512, 0, 4, 1), (2, 1, 4, 2), (3, 2, 9, 3), (1, 1, 4, 1), (10, 64, 4, 1), (512, 64, 0, 1),
    ],
)  # fmt: skip
def test_no_part_is_small_and_no_server_gets_two(n_inputs: int, above: int, n_servers: int, expected: int) -> None:
    assert part_count(n_inputs, above, n_servers) == expected


def test_the_build_that_most_servers_have_counts() -> None:
    servers = [holder(1, "new", modified_at="2026-06-01T00:00:00Z"), holder(2, "old"), holder(3, "old")]
    assert [server.name for server in same_build(servers, MODEL)] == ["s2", "s3"]


def test_of_builds_that_as_many_have_the_newest_counts() -> None:
    servers = [holder(1, "old"), holder(2, "new", modified_at="2026-06-01T00:00:00Z")]
    assert [server.name for server in same_build(servers, MODEL)] == ["s2"]
    assert [server.name for server in same_build(servers[::-1], MODEL)] == ["s2"]


def test_a_server_whose_build_is_not_known_has_none() -> None:
    unknown, nameless = holder(1), holder(2, "")
    unknown.models[MODEL].available = None
    assert same_build([unknown, nameless], MODEL) == []


def test_who_would_not_start_at_once_gets_no_part() -> None:
    cold, full, failing, doubted, outdated, unreliable, other = [holder(number) for number in range(1, 8)]
    cold.models[MODEL].loaded = False
    full.models[MODEL].in_flight = 1
    failing.models[MODEL].failing_until_ns = 11
    doubted.doubted = True
    outdated.outdated = True
    unreliable.reliability, unreliable.trusted_from_ns = Reliability.UNRELIABLE, 11
    other.models[MODEL].runner_key = '{"num_ctx":1}'
    good, roomy = holder(8), holder(9, slots=2)
    roomy.models[MODEL].in_flight = 1
    servers = [cold, full, failing, doubted, outdated, unreliable, other, good, roomy]
    assert ready_at_once(servers, MODEL, "", 10) == [good, roomy]
