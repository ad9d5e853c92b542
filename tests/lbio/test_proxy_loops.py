"""Servers that lead back here: a request must not go round in a circle, nor such servers keep each other alive."""

import json

import anyio
import pytest

from lbcore.config import ServerSettings
from lbcore.events import ServerAdded
from lbio.service import Service
from tests.lbio.kit import Rig, balanced, before, first_probes, scripted, specs
from tests.lbio.sockets_kit import until
from tests.lbio.test_proxy_headers import with_headers

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def add(service: Service, url: str, name: str) -> None:
    service.driver.dispatch(ServerAdded(ServerSettings(url=url, name=name)))


async def test_a_server_that_is_this_balancer_never_comes_alive() -> None:
    async with balanced(specs("a")) as rig:
        add(rig.service, rig.url, "me")
        await until(lambda: rig.server("me").probe_failures > 1)
        assert not rig.server("me").is_alive
        assert "leads back to this load balancer" in rig.server("me").last_error
        assert (await rig.chat()).complete


async def test_a_request_that_comes_back_gets_508() -> None:
    async with scripted() as (rig, (server,)):
        await rig.chat()
        (via,) = [value for name, value in server.headers() if name == "via"]
        answer = await rig.send(with_headers("Via: 1.1 somebody", f"Via: {via}, 1.0 another"))
        assert answer.status == 508
        assert "leads back" in json.loads(answer.body)["error"]
        assert len(server.heads) == 1


async def test_two_balancers_that_list_each_other_give_up_at_once() -> None:
    async with scripted() as (rig, (server,)):
        server.pieces, server.close = [], True  # the only true server answers nothing any more
        async with before([{"url": rig.url, "name": "outer"}]) as inner:
            add(rig.service, inner.url, "inner")
            await first_probes(rig.service)
            await until(lambda: rig.server("inner").is_alive)
            with anyio.fail_after(2):
                answer = await rig.chat()
            assert answer.status in {502, 508}
            assert rig.n_requests == inner.driver.n_requests == 0


async def test_two_balancers_in_a_row_are_no_circle() -> None:
    async with balanced(specs("a")) as rig, before([{"url": rig.url, "name": "inner"}]) as outer:
        assert (await Rig(outer, []).chat()).complete
