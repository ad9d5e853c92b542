"""Clients and servers that send a great deal: nobody else is to notice."""

import logging

import pytest

from tests.lbio.kit import balanced, specs
from tests.simulator.wire import request

pytestmark = pytest.mark.anyio


async def test_names_that_clients_make_up_are_shortened_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ollama_lb")
    async with balanced(specs("a")) as rig:
        await rig.send(request("POST", "/api/" + "p" * 10_000, {"model": "tiny"}, close=True), "POST")
        for length in (500, 100_000):
            await rig.ask("POST", "/api/show", {"model": "m" * length})
    told = [record.getMessage() for record in caplog.records]
    assert any("/api/ppp" in text for text in told)
    assert any("mmm" in text for text in told)
    assert max(map(len, told)) < 1000
