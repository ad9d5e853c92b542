"""Merged lists depend neither on the order of the servers nor on their groups: a merge of merges is the merge."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore import catalog
from lbcore.config import ServerSettings
from lbcore.events import ActiveModel, ModelInfo
from lbcore.ollama import canonical_model
from lbcore.records import Server
from lbcore.states import ServerState

Entry = dict[str, Any]


def server(name: str, disk: Iterable[Entry] = (), memory: Iterable[Entry] = (), version: str = "") -> Server:
    """A live server with such lists."""
    made = Server(1, ServerSettings(url=f"http://{name}:1", name=name))
    made.state, made.version = ServerState.HEALTHY, version
    for entry in disk:
        info = ModelInfo(entry["name"], entry["digest"], entry["modified_at"], compact(entry))
        made.model(canonical_model(info.name)).available = info
    for entry in memory:
        made.model(canonical_model(entry["name"])).active = ActiveModel(entry["name"], compact(entry))
    return made


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


NAMES = ["m", "m:latest", "M:latest", "n:7b", "user/n:7b", "registry.ollama.ai/library/m:latest"]
TIMES = ["2026-11-01T12:00:00Z", "2026-11-01T14:00:00+02:00", "2026-11-01T12:00:00.0000001Z", "2026-10-01", "never", ""]
ENTRIES = st.fixed_dictionaries(
    {
        "name": st.sampled_from(NAMES),
        "digest": st.sampled_from("abc"),
        "modified_at": st.sampled_from(TIMES),
        "size": st.integers(0, 2),
    }
)
VERSIONS = st.sampled_from(["", "0.9.0", "0.12.6", "0.12.6-rc1", "0.12", "10", "weird"])
LISTS = st.lists(ENTRIES, max_size=4, unique_by=lambda entry: canonical_model(entry["name"]))
FLEETS = st.lists(LISTS, max_size=5)


def on_disk(lists: Sequence[list[Entry]]) -> list[Server]:
    return [server(f"s{i}", entries) for i, entries in enumerate(lists)]


def in_memory(lists: Sequence[list[Entry]]) -> list[Server]:
    return [server(f"s{i}", memory=entries) for i, entries in enumerate(lists)]


MERGES: dict[str, tuple[Callable[..., list[Server]], Callable[[Iterable[Server]], bytes]]] = {
    "/api/tags": (on_disk, catalog.tags_json),
    "/v1/models": (on_disk, catalog.v1_models_json),
    "/api/ps": (in_memory, catalog.ps_json),
}


@pytest.mark.parametrize("path", MERGES)
@given(lists=FLEETS, data=st.data())
def test_the_order_of_the_servers_changes_nothing(path: str, lists: list[list[Entry]], data: st.DataObject) -> None:
    made, merged = MERGES[path]
    assert merged(made(data.draw(st.permutations(lists)))) == merged(made(lists))


@pytest.mark.parametrize("path", ["/api/tags", "/api/ps"])
@given(lists=FLEETS, data=st.data())
def test_a_merge_of_merges_is_the_merge(path: str, lists: list[list[Entry]], data: st.DataObject) -> None:
    """As when one balancer stands before others."""
    made, merged = MERGES[path]
    cut = data.draw(st.integers(0, len(lists)))
    halves = [json.loads(merged(made(half)))["models"] for half in (lists[:cut], lists[cut:])]
    assert merged(made(halves)) == merged(made(lists))


@pytest.mark.parametrize("path", MERGES)
@given(lists=FLEETS)
def test_every_model_of_a_live_server_is_listed_once(path: str, lists: list[list[Entry]]) -> None:
    made, merged = MERGES[path]
    servers = made(lists)
    told = json.loads(merged(servers))
    listed = [canonical_model(each.get("name") or each["id"]) for each in told.get("models", told.get("data"))]
    assert sorted(listed) == sorted({canonical_model(entry["name"]) for entries in lists for entry in entries})
    for each in servers:
        each.state = ServerState.DEAD
    assert not any(json.loads(merged(servers)).get(name) for name in ("models", "data"))


@given(versions=st.lists(VERSIONS, max_size=5), data=st.data())
def test_the_highest_version_does_not_depend_on_order_or_groups(versions: list[str], data: st.DataObject) -> None:
    def highest(told: Iterable[str]) -> str | None:
        return catalog.highest_version(server(f"s{i}", version=each) for i, each in enumerate(told))

    cut = data.draw(st.integers(0, len(versions)))
    assert highest(data.draw(st.permutations(versions))) == highest(versions)
    assert highest(highest(half) or "" for half in (versions[:cut], versions[cut:])) == highest(versions)


@given(lists=FLEETS)
def test_different_builds_are_told_of_exactly_where_there_are_some(lists: list[list[Entry]]) -> None:
    servers = on_disk(lists)
    digests: dict[str, set[str]] = {}
    for entry in (entry for entries in lists for entry in entries):
        digests.setdefault(canonical_model(entry["name"]), set()).add(entry["digest"])
    assert {name: set(found) for name, found in catalog.builds(servers).items()} == {
        name: found for name, found in digests.items() if len(found) > 1
    }
