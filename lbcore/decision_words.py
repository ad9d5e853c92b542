"""Decisions in words, as the log and the simulator's stories tell them (pure)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lbcore.commands import Decision, RecordDecision
from lbcore.schema import MS_NS


def _ms(d: RecordDecision) -> str:
    return f"{d.took_ns / MS_NS:.0f} ms"


def _by(d: RecordDecision) -> str:
    return f" by {d.server}" if d.server else ""


_WORDS: Mapping[Decision, Callable[[RecordDecision], str]] = {
    Decision.QUEUED: lambda d: f"waits: {d.why}",
    Decision.STARTED: lambda d: f"-> {' + '.join(d.names)} ({d.why})",
    Decision.HEDGED: lambda d: f"{' + '.join(d.names)} asked too: {d.why}",
    Decision.RETRIED: lambda d: f"retried on {' + '.join(d.names)}: {d.why}" if d.names else f"not retried: {d.why}",
    Decision.COMMITTED: lambda d: f"{d.server} won after {_ms(d)} ({d.why})",
    Decision.CANCELLED: lambda d: f"{d.server} cancelled after {_ms(d)}: {d.why}",
    Decision.ATTEMPT_FAILED: lambda d: f"{d.why} (after {_ms(d)})",
    Decision.FINISHED: lambda d: f"done in {_ms(d)}{_by(d)}{': ' if d.why else ''}{d.why}",
    Decision.REJECTED: lambda d: f"refused with {d.why}",
    Decision.FAILED: lambda d: f"failed after {_ms(d)}: {d.why}",
    Decision.ABORTED: lambda d: f"ended after {_ms(d)}: {d.why}",
    Decision.HEALTH: lambda d: f"{d.server} health {d.before} -> {d.after}: {d.why}",
    Decision.SERVER_ADDED: lambda d: f"{d.server} {d.why}",
    Decision.SERVER_BACK: lambda d: f"{d.server} is back: {d.why}",
    Decision.SERVER_DIED: lambda d: f"{d.server} is dead: {d.why}",
    Decision.SERVER_UNREAD: lambda d: f"{d.server} cannot be read: {d.why} (probed again while it is in the fleet)",
    Decision.SERVER_DRAINING: lambda d: f"{d.server} is being removed: {d.why}",
    Decision.SERVER_GONE: lambda d: f"{d.server} is removed",
    Decision.JOB_STARTED: lambda d: f"{d.server} is to {d.before}: {d.why}",
    Decision.JOB_DONE: lambda d: f"{d.server}: {d.before} done in {_ms(d)}",
    Decision.JOB_FAILED: lambda d: f"{d.server}: {d.before} failed after {_ms(d)}: {d.why}",
    Decision.RELIABILITY: lambda d: f"{d.server} {d.before} -> {d.after}: {d.why}",
}


def decision_words(decision: RecordDecision) -> str:
    """Return what was decided, without the request it is about: `gpu1 won after 53 ms (first-token)`."""
    words = _WORDS.get(decision.decision)
    return words(decision) if words is not None else f"{decision.server} {decision.decision}: {decision.why}"
