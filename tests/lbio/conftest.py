"""The relay has two ways to read, by callbacks of the loop and by tasks: what it does is tested on both."""

import pytest

from lbio.wire import readiness

BOTH_WAYS = frozenset(
    {
        "test_hostile_servers",
        "test_proxy_clients",
        "test_proxy_failures",
        "test_proxy_floods",
        "test_proxy_races",
        "test_proxy_recordings",
        "test_proxy_relay",
        "test_proxy_whole",
        "test_splice",
    }
)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "IS_WANTED", request.param == "callbacks")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in BOTH_WAYS:
        metafunc.fixturenames.append("way")
        metafunc.parametrize("way", ["callbacks", "tasks"], indirect=True)
