"""Running out of file descriptors: nobody's fault, and kept away as far as the system lets us."""

import contextlib
import errno
import logging
import socket
import sys
from collections.abc import Iterator

import pytest

from lbcore.events import SyncRequested
from lbio import descriptors
from lbio.configuration.settings import LimitSettings
from lbio.wire.streams import is_exhaustion
from tests.lbio.kit import balanced, chat_request, client, specs
from tests.lbio.sockets_kit import until

if sys.platform == "win32":
    pytest.skip("no such limit", allow_module_level=True)

import resource

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Until the end of the block, this process can open nothing."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as lowest_free:
        number = lowest_free.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_when_descriptors_run_out_no_server_is_blamed() -> None:
    async with balanced(specs("a", "b"), pool={"idle_max": 0}) as rig, client(rig) as asking:
        healths = rig.healths()
        with no_descriptor_left():
            await asking.send(chat_request(close=False))
            answer = await asking.until(b'"}')
            rig.service.driver.dispatch(SyncRequested())
            await until(lambda: all(server.probe_id == 0 for server in rig.service.driver.balancer.fleet))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1\r\n" in answer
        assert b"run out" in answer
        assert rig.healths() == healths
        assert (await rig.chat()).status == 200


def test_a_name_that_cannot_be_looked_up_for_lack_of_a_descriptor_is_no_unknown_name() -> None:
    unknown = socket.gaierror(socket.EAI_NONAME, "unknown")
    assert not is_exhaustion(unknown)
    with no_descriptor_left():
        assert is_exhaustion(unknown)


@pytest.mark.parametrize(("code", "ours"), [(errno.EMFILE, True), (errno.ENFILE, True), (errno.EHOSTUNREACH, False)])
def test_what_counts_as_running_out(code: int, ours: bool) -> None:
    assert is_exhaustion(OSError(code, "x")) is ours


class Limits:
    """A system whose limits are these, and which refuses a soft one above `granted`."""

    def __init__(self, soft: int, hard: int, granted: int) -> None:
        self.now = (soft, hard)
        self.granted = granted

    def getrlimit(self, what: int) -> tuple[int, int]:
        return self.now

    def setrlimit(self, what: int, limits: tuple[int, int]) -> None:
        if not 0 <= limits[0] <= self.granted:
            raise ValueError("not allowed to raise maximum limit")
        self.now = limits


INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(("soft", "hard", "granted", "expected"), [
    (1024, 4096, 4096, 4096), (1024, 1024, 1024, 1024), (1024, 4096, 1024, 1024), (256, INFINITE, 10_240, 10_240),
    (20_000, INFINITE, 10_240, 20_000),
])  # fmt: skip
def test_the_soft_limit_is_raised(
    soft: int, hard: int, granted: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = Limits(soft, hard, granted)
    monkeypatch.setattr(resource, "getrlimit", system.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", system.setrlimit)
    assert descriptors.raise_limit() == expected == system.now[0]
    assert system.now[1] == hard


def test_clients_that_do_not_fit_are_not_let_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(descriptors, "raise_limit", lambda: 1024)
    assert descriptors.fitted(LimitSettings(connections_max=512)) == LimitSettings(connections_max=512)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert descriptors.fitted(LimitSettings(connections_max=10_000)).connections_max == 512
    assert "limits.connections_max is 10000, but 1024 file descriptors" in caplog.text
