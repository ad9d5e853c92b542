"""Who calls back when a socket can be read: the one place where the event loop is asked, and not anyio.

asyncio's event loops do (uvloop too, Windows' own does not), trio does not. Without it everything works the same, by
tasks that wait: that generic way is the oracle of the tests, which ask for it by `IS_WANTED`.
"""

from __future__ import annotations

import asyncio

IS_WANTED = True
"""False: the generic way, everywhere."""


def loop_with_readers() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop if it calls back when a descriptor can be read; None for the generic way."""
    if not IS_WANTED:
        return None
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # trio, or no loop at all
        return None
    has_readers = type(loop).add_reader is not asyncio.AbstractEventLoop.add_reader
    return loop if has_readers else None
