"""Standard input, output and error, as far as whoever started us has left them open."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO, Any


def open_closed() -> None:
    """Open the null device for each of the three that is closed.

    Their numbers would go to the next files that are opened: to sockets, into which others would then print, or to the
    event loop's own, which libuv refuses to close.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    sys.stdin = sys.stdin or _null("r")
    sys.stdout = sys.stdout or _null("w")
    sys.stderr = sys.stderr or _null("w")


def give_up_output() -> None:
    """Print nothing any more: what standard output still holds would fail again at exit."""
    sys.stdout = _null("w")


def _null(mode: str) -> IO[Any]:
    return Path(os.devnull).open(mode, encoding="utf-8")
