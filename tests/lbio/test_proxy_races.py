"""What a race does to connections: who is asked when, what the client has when, and what is left for the next race."""

from typing import Any

import anyio
import pytest

from lbcore.commands import CancelAttempt
from lbio.driver import Driver
from lbio.relay import Relay
from tests.lbio.kit import Rig, balanced, chat_request, client, specs
from tests.lbio.sockets_kit import until

RACE_ALL: dict[str, Any] = {
    "race": {"racers_min": 3, "racers_max": 3, "utilisation_max": 1.0, "budget": 3.0, "hedges_max": 0}
}
NAMES = ("a", "b", "c")


def n_idle(driver: Driver) -> int:
    return sum(len(endpoint._idle) for endpoint in driver._endpoints.values())


async def settled(rig: Rig, n: int) -> None:
    """Return when `n` connections are idle and no request is under way."""
    await until(lambda: n_idle(rig.service.driver) >= n and not rig.n_requests)


def dialled(rig: Rig) -> int:
    return sum(server.stats.connections_total for server in rig.fleet)


@pytest.mark.anyio
async def test_a_race_leaves_each_server_a_connection_for_the_next() -> None:
    async with balanced(specs(*NAMES, first_token_ms=20), **RACE_ALL) as rig:
        assert (await rig.chat()).status == 200
        await settled(rig, 3)
        before = dialled(rig)
        async with client(rig) as asking:
            await asking.send(chat_request())
            await asking.until(b"\r\n\r\n")
            assert dialled(rig) == before, "the racers were asked on the connections that were there"
            await asking.rest()
        await settled(rig, 3)
        assert n_idle(rig.service.driver) == 3, "one for each that was closed, and no more"


@pytest.mark.anyio
async def test_no_spare_connection_where_none_is_to_be_kept() -> None:
    async with balanced(specs(*NAMES, first_token_ms=5), pool={"idle_max": 0}, **RACE_ALL) as rig:
        before = dialled(rig)
        assert (await rig.chat()).status == 200
        await anyio.sleep(0.1)
        assert dialled(rig) == before + 3
        assert not n_idle(rig.service.driver)


@pytest.mark.anyio
async def test_spare_connections_that_have_died_cost_nobody_an_answer() -> None:
    async with balanced(specs(*NAMES, first_token_ms=5), **RACE_ALL) as rig:
        assert (await rig.chat()).status == 200
        await settled(rig, 3)
        for server in rig.fleet:
            await server.stop()
            await server.start()
        assert (await rig.chat()).status == 200


@pytest.mark.anyio
async def test_the_client_has_its_first_token_before_a_loser_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bool] = []
    async with balanced(specs(*NAMES, first_token_ms=20), **RACE_ALL) as rig:
        driver = rig.service.driver
        cancel = driver._execute[CancelAttempt]

        def looking(command: CancelAttempt) -> None:
            relay = driver._runs[command.attempt_id].exchange.relay
            written.append(isinstance(relay, Relay) and not relay._unsent and relay._problem is None)
            cancel(command)

        monkeypatch.setattr(driver, "_execute", {**driver._execute, CancelAttempt: looking})
        assert (await rig.chat()).status == 200
    assert written == [True, True]


@pytest.mark.anyio
async def test_every_racer_is_asked_before_anything_else_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    async with balanced(specs(*NAMES, first_token_ms=20), **RACE_ALL) as rig:
        assert (await rig.chat()).status == 200
        await settled(rig, 3)
        asked: list[int] = []
        opened = Driver.open

        def looking(driver: Driver, request: Any) -> Any:
            exchange = opened(driver, request)
            asked.extend(run._connection.stream.bytes_sent for run in exchange.runs.values())  # type: ignore[union-attr]
            return exchange

        monkeypatch.setattr(Driver, "open", looking)
        assert (await rig.chat()).status == 200
        assert len(asked) == 3
        assert all(asked)
