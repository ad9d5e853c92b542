"""What must hold in every run: safety after every step of the core, liveness once the faults are healed."""

from __future__ import annotations

from collections.abc import Sequence

from lbcore.balancer import LoadBalancer
from lbcore.commands import Command, Work
from lbcore.config import Config
from lbcore.errors import InvariantError
from lbcore.events import Event
from lbcore.invariants import Auditor
from lbcore.provision import Step
from lbcore.schema import SECOND_NS
from simulator.box import Box
from simulator.promises import Promises
from simulator.reports.results import Outcome, RunResult
from simulator.world import World

_VIOLATIONS_MAX = 20  # one defect is seen again and again; the first ones tell most
_SHOWN = 100  # of an event


class Safety:
    """Audits a balancer after every step (`lbcore.invariants`, `simulator.promises`); a `Watcher` of a world."""

    def __init__(self, result: RunResult, promises: Promises) -> None:
        self._result = result
        self._promises = promises
        self._auditor: Auditor | None = None

    def begin(self, balancer: LoadBalancer) -> None:
        """Follow a balancer from its first step on."""
        self._auditor = Auditor(balancer)
        self._promises.begin(balancer)

    def __call__(self, event: Event | None, commands: Sequence[Command], now_ns: int) -> None:
        """Audit one step."""
        if self._auditor is None or len(self._result.violations) >= _VIOLATIONS_MAX:
            return
        problems = self._promises(event, commands, now_ns)
        try:
            self._auditor.check(commands, now_ns)
        except InvariantError as error:
            problems.append(str(error))
        if problems:
            when = f"at {now_ns / SECOND_NS:.6f} s, after {str(event or 'a timeout')[:_SHOWN]}"
            self._result.violations += [f"{when}: {problem}" for problem in problems]


def is_settled(world: World) -> bool:
    """Tell whether nothing is left to wait for: clients have their outcome, servers are healthy and work for nobody."""
    balancer = world.balancer
    return (
        world.is_over
        and not balancer.ledger.attempts
        and all(server.is_alive for server in balancer.fleet)
        and not _overworked(world)
        and not _misplaced(world)
    )


def _overworked(world: World) -> list[Box]:
    """Return the servers that work though nobody has asked them to, neither a client nor placement."""
    asked = {job.server.name for job in world.balancer.provision.jobs.values()}
    return [box for name, box in world.boxes.items() if not box.is_idle and name not in asked]


def _misplaced(world: World) -> list[Step]:
    """Return what placement has still to do; to keep a model loaded it may have for ever, where memory is short."""
    return [step for step in world.balancer.provision.wanted(world.now_ns) if step.work is not Work.WARM]


def check_liveness(world: World, settle_ns: int) -> list[str]:
    """Return what should have come to its end within `settle_ns` after the last fault and has not, in words."""
    after = f"{settle_ns / SECOND_NS:g} s after the last fault"
    unfinished = [str(call.ask.id) for call in world.open_calls]
    problems = []
    if unfinished:
        more = f" and {len(unfinished) - 10} more" if len(unfinished) > 10 else ""
        problems.append(f"{after}, still under way: requests {', '.join(unfinished[:10])}{more}")
    problems += [
        f"{after}, {server.name} is not healthy: {server}" for server in world.balancer.fleet if not server.is_alive
    ]
    ledger = world.balancer.ledger
    if not unfinished and ledger.attempts:
        problems.append(f"{after}, attempts live whose requests are over: {list(ledger.attempts.values())[:10]}")
    elif not unfinished:
        problems += [f"{after}, {box} still works, for nobody" for box in _overworked(world)]
    problems += [f"{after}, {s.server.name} is still to {s.work} {s.model}: {s.why}" for s in _misplaced(world)]
    return problems


def check_recovery(result: RunResult, config: Config, end_ns: int) -> list[str]:
    """Return which clients were not served though they came when everything had been well for long, in words.

    A balancer whose timeouts are short, or that may look for a dead server seldom, owes them nothing, nor does one with
    older work to do; and it may say that it is full, or that nobody has the model.
    """
    probe = config.probe
    looks_ns = probe.interval_dead_max_ns + probe.timeout_ns
    crashes = any(request.ask.poison for request in result.requests)  # runners, at any time, for whoever is on them
    if config.timeouts.first_token_warm_ns < _PATIENT_NS or looks_ns > _RECOVERED_NS or crashes:
        return []
    well_ns = end_ns + _RECOVERED_NS
    work_ns = max((r.ended_ns for r in result.requests if r.ask.arrives_ns < well_ns), default=0)
    late = (request for request in result.requests if request.ask.arrives_ns >= max(well_ns, work_ns))
    return [
        f"request {request.ask.id} came when all was well again, and failed: {request.status} {request.why}"
        for request in late
        if request.outcome is Outcome.FAILED and request.status not in {404, 503}
    ]


_RECOVERED_NS = 20 * SECOND_NS
_PATIENT_NS = 10 * SECOND_NS
