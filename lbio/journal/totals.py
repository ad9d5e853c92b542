"""What has come of requests since the start, counted from what the core commands."""

from __future__ import annotations

from lbcore.commands import AttemptKind, Decision

OUTCOMES = {
    Decision.FINISHED: "done",
    Decision.REJECTED: "rejected",
    Decision.FAILED: "failed",
    Decision.ABORTED: "aborted",
}
"""The decisions that end a request, each request by exactly one, and what `/status` calls them."""


class Totals:
    """Counts that only grow. The driver adds to them, at every command: a dict increment each."""

    __slots__ = ("attempts", "decisions", "since_ns")

    def __init__(self, now_ns: int) -> None:
        self.since_ns = now_ns
        self.attempts: dict[AttemptKind, int] = dict.fromkeys(AttemptKind, 0)
        self.decisions: dict[Decision, int] = dict.fromkeys(Decision, 0)

    def outcomes(self) -> dict[str, int]:
        """Return how many requests have ended in each way."""
        return {name: self.decisions[decision] for decision, name in OUTCOMES.items()}
