"""Breaks the core in ways that are listed here, and shows which check catches each: `python -m benchmarks.mutations`.

A check that catches nothing is worth nothing. Each mutation is one edit of the core's source, made in memory and undone
after it. The checks are those that CI runs: random scenarios (`simulator.sweeps.swarm`) with the audit of the core's
own books (`lbcore.invariants`), the promises seen from outside (`simulator.promises`) and liveness.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lbcore.compiled import is_compiled
from lbcore.invariants import Auditor
from simulator.sweeps.swarm import run_seed

SEEDS_MAX = 200


@dataclass(frozen=True, slots=True)
class Mutation:
    """One way to break the core: in `where` (module:Class.method), the text `old` becomes `new`, once."""

    what: str
    where: str
    old: str
    new: str


MUTATIONS: Sequence[Mutation] = (
    Mutation(
        "a server is told to do several things at once",
        "lbcore.provision:Provision.review",
        "step.server.id not in busy and ",
        "",
    ),
    Mutation(
        "copies are pruned before all are there",
        "lbcore.provision:Provision._wanted",
        "have == place.copies",
        "have >= 0",
    ),
    Mutation(
        "the servers that a model may be on do not count",
        "lbcore.provision:Provision._place",
        "if not settings.servers or s.name in settings.servers",
        "",
    ),
    Mutation(
        "what is missing is never pulled",
        "lbcore.provision:Provision._wanted",
        "record is None or not server.has(model)",
        "record is None and False",
    ),
    Mutation(
        "the race budget allows one attempt too many",
        "lbcore.admission:RaceBudget.spend",
        "if self.credits < 1.0:",
        "if self.credits < 0.0:",
    ),
    Mutation("races cost nothing", "lbcore.admission:RaceBudget.spend", "self.credits -= 1.0", "pass"),
    Mutation(
        "losers are not cancelled",
        "lbcore.attempts:Attempts._commit",
        "if loser is not winner:",
        "if loser is not winner and False:",
    ),
    Mutation(
        "health never falls",
        "lbcore.fleet:Fleet.fail",
        "after_failure(server.health, self._config.health)",
        "server.health",
    ),
    Mutation(
        "a dead server is not probed again",
        "lbcore.fleet:Fleet._probe_failed",
        "self._timers.arm(TimerKind.PROBE, server.id, now_ns + server.probe_pause_ns)",
        "pass",
    ),
    Mutation(
        "every failed probe of a server that was never read is told of",
        "lbcore.fleet:Fleet._probe_failed",
        "server.died_ns is None and server.probe_failures == 1",
        "server.died_ns is None",
    ),
    Mutation(
        "the pause between probes of a dead server grows without bound",
        "lbcore.fleet:Fleet._probe_failed",
        "server.probe_pause_ns, probe.interval_dead_ns, probe.interval_dead_max_ns",
        "server.probe_pause_ns, probe.interval_dead_ns, 2**60",
    ),
    Mutation(
        "the retry budget is ignored",
        "lbcore.admission:RetryBudget.allows",
        "return ",
        "return True or ",
    ),
    Mutation("retries cost nothing", "lbcore.admission:RetryBudget.begin", "self.credits -= 1.0", "pass"),
    Mutation(
        "an attempt is committed twice",
        "lbcore.attempts:Attempts._commit",
        "self._out.append(CommitAttempt(request.id, winner.id))",
        "self._out += [CommitAttempt(request.id, winner.id)] * 2",
    ),
    Mutation(
        "every racer is committed",
        "lbcore.attempts:Attempts._commit",
        "self._out.append(CommitAttempt(request.id, winner.id))",
        "self._out += [CommitAttempt(request.id, a.id) for a in request.live_attempts or [winner]]",
    ),
    Mutation(
        "a lost race cancels a load",
        "lbcore.attempts:Attempts._lose",
        "if loser.loads and loser.loader:",
        "if False:",
    ),
    Mutation(
        "requests go to servers that do not have the model",
        "lbcore.records:Server.has",
        "return record is not None and",
        "return True or record is not None and",
    ),
    Mutation(
        "any live server will do",
        "lbcore.pools:Pools.pool",
        "(model is None or s.has(model))",
        "(s.model(model) if model else True)",
    ),
    Mutation(
        "the queue is unbounded",
        "lbcore.admission:AdmissionQueue.is_full",
        "len(self.waiting) >= self.length_max",
        "False",
    ),
    Mutation(
        "the queue is one too long",
        "lbcore.admission:AdmissionQueue.is_full",
        "len(self.waiting) >= self.length_max",
        "len(self.waiting) > self.length_max",
    ),
    Mutation(
        "who waits is served last come first",
        "lbcore.admission:AdmissionQueue.pop_ready",
        "list(islice(self.waiting.values(), len(self.waiting)))",
        "list(self.waiting.values())[::-1]",
    ),
    Mutation(
        "who waits is not served when there is room",
        "lbcore.ledger:Ledger.release",
        "self.room_made = True",
        "pass",
    ),
    Mutation(
        "the timer of an attempt is not armed",
        "lbcore.ledger:Ledger.start",
        "self._timers.arm(_ATTEMPT_TIMER, attempt_id, due_ns)",
        "pass",
    ),
    Mutation(
        "the timer of the queue is not armed",
        "lbcore.requests:Requests._enqueue",
        "self._timers.arm(TimerKind.QUEUE, request.id, now_ns + self._config.queue.timeout_ns)",
        "pass",
    ),
    Mutation(
        "a broken stream is ended, and the client told, twice",
        "lbcore.attempts:Attempts._break_stream",
        'self._out.append(AbortRequest(request.id, f"the stream broke: {failure}"))',
        'self._out += [AbortRequest(request.id, f"the stream broke: {failure}")] * 2',
    ),
    Mutation(
        "tokens flow on after the client has left",
        "lbcore.requests:Requests.on_downstream_closed",
        "self._ledger.cancel_all(request, Reason.CLIENT_LEFT, now_ns)",
        "request.live_attempts.clear()",
    ),
    Mutation(
        "the cancellation is kept in the books and not commanded",
        "lbcore.ledger:Ledger.cancel",
        "self._out.append(_new(CancelAttempt, (attempt.id, reason)))",
        "pass",
    ),
    Mutation(
        "a slot is not given back",
        "lbcore.ledger:Ledger.release",
        "target.in_flight -= 1",
        "pass",
    ),
    Mutation(
        "the cap of requests in flight is off by one",
        "lbcore.pools:Holders.with_room",
        "record.in_flight < server.in_flight_max",
        "record.in_flight <= server.in_flight_max",
    ),
    Mutation(
        "the same server is asked again",
        "lbcore.selection:eligible",
        "if not request.has_tried(server)",
        "",
    ),
    Mutation(
        "a failure is final though another server is there",
        "lbcore.attempts:Attempts._after_failure",
        "if _may_go_elsewhere(request, reason) and self._requests.retry(request, now_ns):",
        "if False:",
    ),
    Mutation(
        "whoever waits on a server that died is left there",
        "lbcore.requests:Requests.rescue_from",
        "a.server is server and",
        "False and",
    ),
    Mutation(
        "an alias stands for its first model, whoever has that",
        "lbcore.aliases:resolve",
        "name or use.models[0]",
        "use.models[0]",
    ),
    Mutation(
        "the next model of an alias is not tried",
        "lbcore.requests:Requests.retry",
        "(model := aliases.next_model(request, self._fleet)) is not None",
        "(model := None) is not None",
    ),
    Mutation(
        "servers are asked for another model than is counted",
        "lbcore.ledger:Ledger.start",
        "self._out.append(UseModel(request.id, alias.name))",
        "pass",
    ),
    Mutation(
        "the last model of an alias comes first",
        "lbcore.aliases:resolve",
        "for name in use.models if _live_holders(request, name, fleet)",
        "for name in use.models[::-1] if _live_holders(request, name, fleet)",
    ),
)


@contextmanager
def broken(mutation: Mutation) -> Iterator[None]:
    """Break the core for a while. Raises LookupError when the source does not have what is to be changed."""
    module_name, _, path = mutation.where.partition(":")
    module = importlib.import_module(module_name)
    owner: Any = module
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    honest = inspect.getattr_static(owner, name)
    function: Any = honest.fget if isinstance(honest, property) else honest
    # as ast writes it, so that it does not matter how it is laid out
    source = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(function))))
    old, new = (_unparsed(text) for text in (mutation.old, mutation.new))
    if old not in source:
        raise LookupError(f"{mutation.where} does not say {old!r} any more: write the mutation anew\n{source}")
    scope: dict[str, Any] = {}
    exec(compile(source.replace(old, new, 1), mutation.where, "exec"), vars(module), scope)  # noqa: S102  its purpose
    mutant = scope[name]
    setattr(owner, name, mutant)
    elsewhere = [m for key, m in sys.modules.items() if key.startswith("lbcore.") and vars(m).get(name) is function]
    for other in elsewhere:
        setattr(other, name, mutant)
    try:
        yield
    finally:
        setattr(owner, name, honest)
        for other in elsewhere:
            setattr(other, name, function)


def _unparsed(text: str) -> str:
    """Return a piece of code as `ast.unparse` writes it, if it is code by itself."""
    try:
        return ast.unparse(ast.parse(text))
    except SyntaxError:
        return text.replace('"', "'")


# --- who catches it ----------------------------------------------------------------------------------------------


@contextmanager
def without_audit() -> Iterator[None]:
    """Leave the checking to the promises and to liveness: the core's own books may be wrong for once."""
    honest = Auditor.check

    def blind(*_: object) -> None:
        return None

    setattr(Auditor, "check", blind)  # noqa: B010  a plain assignment is no type that mypy knows
    try:
        yield
    finally:
        setattr(Auditor, "check", honest)  # noqa: B010


def seeds_needed(seeds: Sequence[int]) -> tuple[int, str] | None:
    """Return how many of the seeds it takes to find a violation, and the first one in words."""
    for n, seed in enumerate(seeds, 1):
        violations = run_seed(seed).violations
        if violations:
            return n, violations[0]
    return None


def main(names: Sequence[str]) -> int:
    """Print the table; 1 when one was not caught, 2 when the core cannot be changed."""
    if is_compiled():
        print("the core is compiled, and only plain Python can be changed in memory: rm lbcore/*.so", file=sys.stderr)
        return 2
    chosen = [m for m in MUTATIONS if not names or any(name in m.what for name in names)]
    uncaught = 0
    print(f"{'mutation':62} {'all checks':>10} {'from outside':>12}  first violation")
    for mutation in chosen:
        with broken(mutation):
            caught = seeds_needed(range(1, SEEDS_MAX + 1))
            with without_audit():
                outside = seeds_needed(range(1, SEEDS_MAX + 1))
        uncaught += caught is None
        shown = [f"seed {found[0]}" if found else "-" for found in (caught, outside)]
        words = (outside or caught or (0, "NOT CAUGHT"))[1]
        print(f"{mutation.what:62} {shown[0]:>10} {shown[1]:>12}  {words[:110]}", flush=True)
    print(f"{len(chosen) - uncaught} of {len(chosen)} caught within {SEEDS_MAX} seeds")
    return 1 if uncaught else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
