"""Decisions about one request's attempts: who wins, how many run, what to say when none could (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lbcore.config import RaceSettings, Winner
from lbcore.events import Reason
from lbcore.health import TIMEOUTS
from lbcore.ollama import model_not_found
from lbcore.records import Attempt, Failure, ModelStats, Request
from lbcore.states import AttemptState, Reliability

# Members bound once: in Python 3.11 a look-up in an enum's class costs more than what the member is used for here.
_STREAMING: Final = AttemptState.STREAMING
_SUCCEEDED: Final = AttemptState.SUCCEEDED
_ANSWERING: Final = (_STREAMING, _SUCCEEDED)
_UNRELIABLE: Final = Reliability.UNRELIABLE
_FIRST_TOKEN: Final = Winner.FIRST_TOKEN
_MOST_TOKENS: Final = Winner.MOST_TOKENS


def winner_now(request: Request, *, window_over: bool = False) -> Attempt | None:
    """Return the attempt to commit now, or None to wait.

    An answer that is complete, or of which no more can be held, ends every wait. The last attempt left is committed
    at its first token whatever the rule: there is nothing to wait for.
    """
    runners = [a for a in request.attempts if a.first_token_ns is not None and not a.detached and a.state in _ANSWERING]
    if not runners:
        return None
    for attempt in runners:
        if attempt.state is _SUCCEEDED or attempt.full:
            return attempt
    trusted = [a for a in runners if a.server.reliability is not _UNRELIABLE]
    if trusted:
        runners = trusted
    elif not window_over and _has_better(request):
        return None  # streams broke there since it was asked: for a moment, another may still be first
    rule = request.rule
    if rule is _FIRST_TOKEN:
        return runners[0] if len(runners) == 1 else min(runners, key=_first_token)
    alone = request.stream and len(request.live_attempts) == 1
    if rule is _MOST_TOKENS and (window_over or alone):
        return min(runners, key=_fewest_tokens_last)
    return runners[0] if alone else None


def _has_better(request: Request) -> bool:
    return any(a.server.reliability is not _UNRELIABLE for a in request.live_attempts)


def _first_token(attempt: Attempt) -> tuple[int, int]:
    return attempt.first_token_ns or 0, attempt.id


def _fewest_tokens_last(attempt: Attempt) -> tuple[int, int, int]:
    return -attempt.n_tokens, attempt.first_token_ns or 0, attempt.id


def hedge_delay_ns(stats: ModelStats | None, settings: RaceSettings, *, stream: bool) -> int:
    """Return how long to wait for a first token (a whole answer, when not streamed) before asking one more server, ns.

    The p95 of the model's recent times bounds the extra work to about 5 % (Dean & Barroso, The Tail at Scale, 2013).
    """
    if not stream:
        answer_ns = (stats.answer.p95 if stats is not None else None) or settings.hedge_delay_max_ns
        return max(answer_ns, settings.hedge_delay_min_ns)
    p95_ns = stats.first_token.p95 if stats is not None else None
    return min(max(p95_ns or settings.hedge_delay_initial_ns, settings.hedge_delay_min_ns), settings.hedge_delay_max_ns)


def closing_words(request: Request) -> tuple[int, str]:
    """Return the status and the error for a request that no server answered, naming what happened on each.

    404 when all lack the model, 504 when all timed out, 503 when no server could even be asked, else 502.
    """
    failures = request.failures
    if failures and all(failure.reason is Reason.MODEL_NOT_FOUND for failure in failures):
        return 404, model_not_found(request.event.model or "")
    status = 504 if failures and all(failure.reason in TIMEOUTS for failure in failures) else 502
    if failures and all(failure.reason is Reason.EXHAUSTED for failure in failures):
        status = 503
    return status, "no server could answer: " + "; ".join(str(failure) for failure in failures)


def failures_in_words(failures: Sequence[Failure]) -> str:
    """Return what went wrong where; what went wrong alike is said once."""
    servers: dict[str, list[str]] = {}
    for failure in failures:
        servers.setdefault(failure.words, []).append(failure.server)
    return "; ".join(f"{', '.join(names)}: {words}" for words, names in servers.items())
