"""Words for people."""

from __future__ import annotations

_IRREGULAR = {"retry": "retries"}


def counted(number: int, noun: str) -> str:
    """Return "1 slot", "2 slots", "0 retries"."""
    return f"{number} {noun if number == 1 else _IRREGULAR.get(noun, f'{noun}s')}"
