"""One request's story, line by line: what its client saw, what the balancer decided, what the servers did. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from lbcore.health import ALIVE_FROM
from lbcore.schema import MS_NS, SECOND_NS
from simulator.reports.results import AttemptResult, Outcome, RequestResult, RunResult

_MEANWHILE_MAX = 20  # lines about its servers that have other causes


class _Order(IntEnum):
    """What comes first of all that happens at one instant: a cause before what it leads to."""

    ARRIVAL = 0
    FAULT = 1
    SERVER = 2  # a server did something of its own
    CLIENT = 3
    DECISION = 4
    STARTED = 5
    SLOT = 6
    CANCELLED = 7
    END = 8


class _Line(NamedTuple):
    at_ns: int
    order: _Order
    who: str
    text: str
    place: int = 0  # among the run's lines


def explain(result: RunResult, request_id: int) -> list[str]:
    """Return the story of a request as lines; times are relative to its arrival. Raises LookupError when there is none.

    Why servers were chosen and what became of their health is told only when the run kept its `lines`.
    """
    request = next((request for request in result.requests if request.ask.id == request_id), None)
    if request is None:
        ids = [other.ask.id for other in result.requests]
        have = f"they go from {min(ids)} to {max(ids)}" if ids else "there are none"
        raise LookupError(f"there is no request {request_id} in this run; {have}")
    attempts = [attempt for attempt in result.attempts if attempt.request_id == request_id]
    own = [*_client(request), *(line for attempt in attempts for line in _attempt(attempt))]
    decisions = list(_decisions(result, request))
    if not decisions and request.committed_ns is not None:
        decisions = [_Line(request.committed_ns, _Order.DECISION, "balancer", f"{request.server} is committed")]
    moments = {line.at_ns for line in (*own, *decisions)}
    lines = [*own, *decisions, *_faults(result, attempts), *_consequences(result, attempts, moments)]
    lines.sort(key=lambda line: (line.at_ns, line.order, line.place))
    width = max(len(line.who) for line in lines)
    return [_head(result, request), *(_told(line, request.ask.arrives_ns, width) for line in lines)]


def _told(line: _Line, zero_ns: int, width: int) -> str:
    return f"{(line.at_ns - zero_ns) / MS_NS:+14,.3f} ms  {line.who:<{width}}  {line.text}"


def _head(result: RunResult, request: RequestResult) -> str:
    ask = request.ask
    about = [
        f"{ask.route} {ask.model}",
        f"a prompt of {ask.prompt_tokens:,} tokens",
        f"an answer of {ask.output_tokens:,}",
        *([f"num_ctx {ask.num_ctx}"] if ask.num_ctx is not None else []),
        *([] if ask.stream else ["not streamed"]),
        *([f"of session {ask.session}"] if ask.session else []),
        *(["poison"] if ask.poison else []),
    ]
    where = f"request {ask.id} of {result.scenario}, seed {result.seed}"
    return f"{where}, at {ask.arrives_ns / SECOND_NS:,.3f} s: {', '.join(about)}"


# --- what each saw ---------------------------------------------------------------------------------------------


def _client(request: RequestResult) -> Iterator[_Line]:
    ask = request.ask
    patience = "" if ask.leaves_after_ns is None else f", and will leave after {ask.leaves_after_ns / SECOND_NS:,.1f} s"
    yield _Line(ask.arrives_ns, _Order.ARRIVAL, "client", f"asks{patience}")
    if request.first_token_ns is not None:
        yield _Line(request.first_token_ns, _Order.CLIENT, "client", f"sees the first token, from {request.server}")
    got = f"{request.tokens:,} token{'' if request.tokens == 1 else 's'}"
    status = f"status {request.status}" if request.status else "no status"
    ends = {
        Outcome.COMPLETED: f"has the whole answer: {got}, {status}",
        Outcome.FAILED: f"sees it fail after {got}, {status}: {request.why}",
        Outcome.REJECTED: f"is refused, {status}: {request.why}",
        Outcome.LEFT: f"leaves, after {got}",
        Outcome.UNFINISHED: f"still waits when the run ends, after {got}",
    }
    yield _Line(request.ended_ns, _Order.END, "client", ends[request.outcome])


def _attempt(attempt: AttemptResult) -> Iterator[_Line]:
    name = f"attempt {attempt.attempt_id} ({attempt.kind})"
    yield _Line(attempt.started_ns, _Order.STARTED, attempt.server, f"{name} begins")
    if attempt.slot_ns is not None:
        waited_ns = attempt.slot_ns - attempt.started_ns
        waited = f" after waiting {waited_ns / MS_NS:,.1f} ms" if waited_ns >= MS_NS else ""
        yield _Line(attempt.slot_ns, _Order.SLOT, attempt.server, f"{name} has a slot{waited}")
    if attempt.first_token_ns is not None:
        yield _Line(attempt.first_token_ns, _Order.SERVER, attempt.server, f"{name} makes its first token")
    order = _Order.CANCELLED if attempt.outcome == "cancelled" else _Order.SERVER
    why = f": {attempt.why}" if attempt.why else ""
    end = f"{name} {attempt.outcome or 'goes on'}{why}; {_cost(attempt)}"
    yield _Line(attempt.ended_ns, order, attempt.server, end)


def _cost(attempt: AttemptResult) -> str:
    if not attempt.tokens and not attempt.busy_ns:
        return "it cost nothing"
    tokens = f"{attempt.tokens:,} token{'' if attempt.tokens == 1 else 's'}"
    fate = "delivered" if attempt.delivered else "wasted"
    return f"{tokens} and {attempt.busy_ns / SECOND_NS:,.3f} s of a slot, {fate}"


# --- what was decided, and the world around --------------------------------------------------------------------


def _decisions(result: RunResult, request: RequestResult) -> Iterator[_Line]:
    tag = f"#{request.ask.id} "
    for place, (at_ns, request_id, text) in enumerate(result.lines):
        if request_id == request.ask.id:
            yield _Line(at_ns, _Order.DECISION, "balancer", text.removeprefix(tag), place)


def _faults(result: RunResult, attempts: list[AttemptResult]) -> Iterator[_Line]:
    """Yield the faults of its servers that were on while they worked for it, and those of everything."""
    for band in result.bands:
        hit = [
            attempt.started_ns
            for attempt in attempts
            if band.server in {"", attempt.server}
            and band.from_ns <= attempt.ended_ns
            and band.until_ns >= attempt.started_ns
        ]
        if hit:
            stretch = f"from {band.from_ns / SECOND_NS:,.3f} s to {band.until_ns / SECOND_NS:,.3f} s of the run"
            text = f"{band.server or 'everywhere'}: {band.kind}, {stretch}"
            yield _Line(max(band.from_ns, min(hit)), _Order.FAULT, "fault", text)


_HEALTH = re.compile(r" health ([0-9.]+) -> ([0-9.]+)")


def _consequences(result: RunResult, attempts: list[AttemptResult], moments: set[int]) -> Iterator[_Line]:
    """Yield the lines about its servers while they worked for it.

    Those at its own moments are taken for consequences; of those between, which have other causes, some are told, but
    not that a server served others well.
    """
    windows: dict[str, tuple[int, int]] = {}
    for attempt in attempts:
        begin_ns, end_ns = windows.get(attempt.server, (attempt.started_ns, attempt.ended_ns))
        windows[attempt.server] = min(begin_ns, attempt.started_ns), max(end_ns, attempt.ended_ns)
    if not windows:
        return
    names = "|".join(re.escape(server) for server in sorted(windows, key=len, reverse=True))
    named = re.compile(rf"(?<![\w.:-])(?:{names})(?![\w-])")
    others, last_ns = 0, max(end_ns for _, end_ns in windows.values())
    for place, (at_ns, request_id, text) in enumerate(result.lines):
        found = None if request_id else named.search(text)
        if found is None or not windows[found[0]][0] <= at_ns <= windows[found[0]][1]:
            continue
        if at_ns in moments:
            yield _Line(at_ns, _Order.DECISION, "balancer", text, place)
        elif not _is_praise(text):
            others += 1
            if others <= _MEANWHILE_MAX:
                yield _Line(at_ns, _Order.DECISION, "meanwhile", text, place)
    if others > _MEANWHILE_MAX:
        more = f"{others - _MEANWHILE_MAX:,} more lines about its servers"
        yield _Line(last_ns, _Order.DECISION, "meanwhile", more, len(result.lines))


def _is_praise(text: str) -> bool:
    """Return whether a line says only that a server does well."""
    found = _HEALTH.search(text)
    return found is not None and float(found[2]) >= float(found[1]) >= ALIVE_FROM
