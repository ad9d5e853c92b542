"""A whole log replayed: how much of it, and the first call of which something else came (pure)."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lbcore import events
from lbcore.loglines import COMMAND_OF, EVENT_CODES, EVENT_OF, fields_of
from lbcore.schema import SECOND_NS
from lbcore.trace import Replay, Step

_CONTEXT = 5


@dataclass(frozen=True, slots=True)
class Difference:
    """The first call of which something else came than was recorded."""

    line: int
    at_s: float  # since the log began
    event: str
    expected: tuple[str, ...]  # the commands recorded
    got: tuple[str, ...]  # those that came of it now
    index: int  # of the first of them that differs
    context: tuple[str, ...]  # the calls before it, and what came of them


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a replay came to."""

    header: dict[str, Any]
    n_calls: int
    n_requests: int
    n_commands: int
    n_chunks: int
    length_s: float
    calls: dict[str, int]  # by kind of event
    truncated: int | None  # the line in which the log breaks off
    difference: Difference | None


def compare(lines: Iterable[str], progress: Callable[[Step], None] = lambda _: None) -> Comparison:
    """Replay a log up to the first difference. Raises LogError for what cannot be read."""
    replay = Replay(lines)
    began_ns: int = replay.header["now_ns"]
    kinds: Counter[str] = Counter()
    before: deque[Step] = deque(maxlen=_CONTEXT)
    n_commands = n_chunks = 0
    first_ns = last_ns = began_ns
    difference: Difference | None = None
    for step in replay:
        if not kinds:
            first_ns = step.now_ns
        kinds["timeout" if step.event is None else EVENT_CODES[type(step.event)]] += 1
        n_commands += step.n_commands
        n_chunks += step.n_chunks
        last_ns = step.now_ns
        progress(step)
        if not step.same:
            difference = _difference(step, before, first_ns)
            break
        before.append(step)
    return Comparison(
        replay.header,
        kinds.total(),
        kinds[EVENT_CODES[events.RequestArrived]],
        n_commands,
        n_chunks,
        (last_ns - first_ns) / SECOND_NS,
        dict(sorted(kinds.items())),
        replay.truncated,
        difference,
    )


def _difference(step: Step, before: Iterable[Step], began_ns: int) -> Difference:
    expected, got = outcome_texts(step.recorded), outcome_texts(step.replayed)
    pairs = enumerate(zip(expected, got, strict=False))
    index = next((i for i, (one, other) in pairs if one != other), min(len(expected), len(got)))
    return Difference(
        step.line,
        (step.now_ns - began_ns) / SECOND_NS,
        event_text(step.recorded),
        expected,
        got,
        index,
        tuple(_told(other, began_ns) for other in before),
    )


def _told(step: Step, began_ns: int) -> str:
    came = "; ".join(outcome_texts(step.recorded)) or "nothing"
    at_s = (step.now_ns - began_ns) / SECOND_NS
    return f"line {step.line}, {at_s:.6f} s: {event_text(step.recorded)} -> {came}"


# --- lines in words ----------------------------------------------------------------------------------------


def event_text(line: str) -> str:
    """Return the event of a line as it would be made: `AttemptConnected(attempt_id=7)`."""
    told = json.loads(line)[1]
    return "handle_timeout" if told is None else _text(EVENT_OF, told)


def outcome_texts(line: str) -> tuple[str, ...]:
    """Return the commands of a line as they would be made, or the exception that was raised."""
    came = json.loads(line)[2]
    if isinstance(came, list):
        return tuple(_text(COMMAND_OF, command) for command in came)
    return (f"raised {came}",)


def _text(classes: dict[str, type], told: Any) -> str:
    cls = classes.get(told[0]) if isinstance(told, list) and told and isinstance(told[0], str) else None
    if cls is None:
        return json.dumps(told)
    named = ", ".join(f"{name}={value!r}" for name, value in zip(fields_of(cls), told[1:], strict=False) if value)
    return f"{cls.__name__}({named})"
