"""What a log, or the memory of a running balancer, tells of one request: as lines for people."""

from __future__ import annotations

from collections.abc import Iterator

from lbcore.explain import Candidate, Choice, Explanation
from lbcore.states import Reliability
from lbio.answers.status import align

_COLUMNS = ("SERVER", "CHOSEN", "STATE", "HEALTH", "IN FLIGHT", "LOADED", "EXPECTED", "RANK", "CHANCE", "WHY")


def explanation_lines(told: Explanation, no_end: str = "the log ends before this request does") -> Iterator[str]:
    """Yield the lines that tell of one request; `no_end` is said when its end is not told of."""
    if not told.about:
        yield f"request {told.request_id} arrived before this log began"
    choices = {choice.line: choice for choice in told.choices}
    for index, moment in enumerate(told.story):
        if index or not told.about:
            yield ""
        yield f"{moment.at_ms:+.3f} ms  {moment.event}   (line {moment.line})"
        if moment.line in choices:
            yield from _choice_lines(choices[moment.line])
        yield from (f"    -> {text}" for text in moment.outcome)
    if told.truncated is not None:
        yield f"the log breaks off in line {told.truncated}"
    elif not told.ended:
        yield ""
        yield no_end
    if not told.same:
        yield ""
        yield "what is said here may be wrong: this version decides otherwise than was recorded (ollama-lb replay LOG)"


def _choice_lines(choice: Choice) -> Iterator[str]:
    yield from (f"    {note}" for note in choice.notes)
    yield f"    race budget: {choice.race_credits:.1f} extra attempts"
    table = align([_COLUMNS, *map(_row, choice.candidates)])
    yield from (f"    {line}" for line in table.splitlines())


def _row(candidate: Candidate) -> tuple[str, ...]:
    doubt = " (doubted)" if candidate.doubted else ""
    broke = "" if candidate.reliability == Reliability.RELIABLE else f" {candidate.reliability}"
    others = f", {candidate.in_flight_others} of others" if candidate.in_flight_others else ""
    return (
        candidate.server,
        candidate.chosen_as or "-",
        f"{candidate.state}{doubt}{broke}",
        f"{candidate.health:.2f}",
        f"{candidate.in_flight}/{candidate.slots}{others}",
        {True: "yes", False: "no", None: "-"}[candidate.loaded],
        "-" if candidate.expected_ms is None else f"{candidate.expected_ms:.0f} ms",
        "-" if candidate.rank is None else str(candidate.rank),
        "-" if candidate.chance is None else f"{candidate.chance:.0%}",
        candidate.why,
    )
