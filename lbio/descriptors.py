"""File descriptors, of which every connection takes one: as many as the system lets us have, and no more clients."""

from __future__ import annotations

import contextlib
import logging
import sys
from dataclasses import replace

from lbio.configuration.settings import LimitSettings

if sys.platform != "win32":
    import resource

_log = logging.getLogger("ollama_lb")
_MACOS_MAX = 10_240  # its hard limit is infinite, but more than this is refused


def raise_limit() -> int:
    """Raise the soft limit of descriptors to the hard one, as Go does; return it (`sys.maxsize`: there is none)."""
    if sys.platform == "win32":
        return sys.maxsize
    soft, hard = (_number(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    for wanted in (hard, _MACOS_MAX):
        if soft < wanted <= hard:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (_limit(wanted), _limit(hard)))
                return wanted
    return soft


def _number(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def _limit(number: int) -> int:
    return resource.RLIM_INFINITY if number == sys.maxsize else number


def fitted(limits: LimitSettings) -> LimitSettings:
    """Return the limits with no more clients than there are descriptors for: each may need a connection to a server."""
    n_descriptors = raise_limit()
    if 2 * limits.connections_max <= n_descriptors:
        return limits
    fitting = max(1, n_descriptors // 2)
    _log.warning(
        "limits.connections_max is %d, but %d file descriptors (ulimit -n) are enough for %d clients; more get 503",
        limits.connections_max,
        n_descriptors,
        fitting,
    )
    return replace(limits, connections_max=fitting)
