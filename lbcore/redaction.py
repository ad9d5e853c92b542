"""What a record of production must not hold, and how it is left out (pure).

A server's error may quote the prompt, and a model list says more than names. So the words of servers are cut where they
begin: `Failure.words` puts them behind the reason and a colon, in every text that the core makes of them. The reasons
below are those whose words come from the operating system or from us; they are kept.

Cutting is sound for a comparison: two texts that differ only in the words of servers are equal once they are cut, since
all before the first of these words is the same in both, and all behind it is gone.
"""

from __future__ import annotations

import re

from lbcore.events import Reason

CUT = "…"
"""Stands for words that were left out."""

OWN_WORDS = frozenset(
    {
        Reason.CONNECT_REFUSED,
        Reason.CONNECT_FAILED,
        Reason.CONNECT_TIMEOUT,
        Reason.TLS_FAILED,
        Reason.EXHAUSTED,
        Reason.FIRST_TOKEN_TIMEOUT,
        Reason.SILENCE_TIMEOUT,
        Reason.ANSWER_TIMEOUT,
        Reason.PROBE_TIMEOUT,
    }
)
"""Reasons that are explained by us or by the operating system, never in a server's words."""

_BEFORE_WORDS = re.compile(
    f"(?:{'|'.join(re.escape(reason) for reason in Reason if reason not in OWN_WORDS)})(?: -?[0-9]+)?: "
)


def cut_detail(reason: Reason | None, detail: str) -> str:
    """Return what is kept of the words that explain a failure for this reason."""
    return detail if reason in OWN_WORDS or not detail else CUT


def cut_text(text: str) -> str:
    """Return a text of the core up to the first words of a server."""
    if ": " not in text:
        return text
    found = _BEFORE_WORDS.search(text)
    return text if found is None else text[: found.end()] + CUT
