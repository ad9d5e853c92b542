"""Stories of minutes and hours over the whole HTTP path, each in a moment: see `tests.lbio.virtual`."""

import anyio

from tests.lbio.kit import specs
from tests.lbio.virtual import in_virtual_time, took, virtual


@in_virtual_time
async def test_an_idle_client_is_let_go_after_the_idle_timeout() -> None:
    async with virtual(specs("a")) as rig:
        caller = await rig.connect()
        await caller.get("/api/version")
        await anyio.sleep(74.9)
        await caller.get("/api/version")  # in time: it begins anew
        began_s = anyio.current_time()
        assert await caller.rest() == b""
        assert took(began_s) == 75
