"""One piece of work for placement in the simulated world: the twin of `lbio.job`. Times are int ns."""

from __future__ import annotations

from typing import Any, Protocol

from lbcore.commands import StartJob, Work
from lbcore.events import Event, JobEnded, JobProgressed, Reason
from lbcore.ollama import canonical_model
from lbcore.schema import SECOND_NS
from simulator.box import INSTEAD, Box
from simulator.fakes.jobs import Job
from simulator.fakes.jobs import Work as FakeWork
from simulator.fakes.specs import FOREVER_NS, NS_PER_MS, FakeModel, runner_options
from simulator.kernel import Kernel
from simulator.workloads.asks import Ask

_TELL_NS = 5 * SECOND_NS


class Core(Protocol):
    """What a job needs of the world."""

    def dispatch(self, event: Event) -> None:
        """Give the core an event and carry out what it commands."""

    def gate(self, at_ns: int) -> int:
        """Return when the balancer gets to see what reaches it at a moment."""


class JobRun:
    """One job, from the connection to its end; to its server it is a visitor whose id is negative."""

    def __init__(self, command: StartJob, box: Box, core: Core, kernel: Kernel) -> None:
        self.id = command.job_id
        self.attempt_id = -command.job_id
        self.ask = Ask(-command.job_id, 0, command.model, 0, 1)
        self._work = command.work
        self._box = box
        self._core = core
        self._kernel = kernel
        self._closed = False

    def start(self) -> None:
        """Connect and ask."""
        self._later(self._arrive)

    def cancel(self) -> None:
        """Close the connection; the server hears of it when that has arrived."""
        self._closed = True
        self._later(lambda: self._box.leave(self))

    def _later(self, do: Any) -> None:
        wire, now_ns = self._box.wire, self._kernel.now_ns
        if not wire.is_silent(now_ns):  # else nobody ever hears of it
            self._kernel.at(wire.arrival_ns(now_ns), do)

    # --- at the server ---------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        box = self._box
        if self._closed:
            return
        if not box.is_up:
            self._end(Reason.CONNECT_REFUSED)
        elif (box.hangs_probes and self._work is not Work.WARM) or (box.hangs and self._work is Work.WARM):
            box.hold_probe(self._arrive)
        elif (kind := box.replaces(generates=self._work is Work.WARM)) is not None:
            self._end(INSTEAD[kind][0])
        else:
            self._do(self._kernel.now_ns)

    def _do(self, now_ns: int) -> None:
        box, model = self._box, self._box.fake.find(self.ask.model)
        if self._work is Work.DELETE:
            box.delete(self.ask.model)
            self._end(None)
        elif self._work is Work.PULL:
            box.stay(self)
            self._pull(now_ns + round(box.spec.load_ms * NS_PER_MS))
        elif model is None:
            self._end(Reason.MODEL_NOT_FOUND)
        else:
            options = runner_options(model, None)
            box.admit(self, Job(self.attempt_id, model.name, options, FOREVER_NS, FakeWork.LOAD))

    def _pull(self, ready_ns: int) -> None:
        """Go on with a pull, which takes as long as a load of its server."""
        if self._closed or not self._box.knows(self):
            return
        now_ns = self._kernel.now_ns
        if now_ns < ready_ns:
            self._to_balancer(JobProgressed(self.id))
            self._kernel.at(min(ready_ns, now_ns + _TELL_NS), self._pull, ready_ns)
            return
        self._box.put(FakeModel(canonical_model(self.ask.model)))
        self._box.leave(self)
        self._end(None)

    def on_started(self, _now_ns: int) -> None:
        """It has what it wants: the model is in memory."""
        self._box.leave(self)
        self._end(None)

    def on_first_token(self, now_ns: int) -> None:
        """It asks for none."""

    def on_whole(self, now_ns: int) -> None:
        """It asks for no answer."""

    def on_failed(self, _now_ns: int, reason: Reason, _status: int, detail: str, *, answered: bool) -> None:
        """It is answered with an error, or its connection has ended."""
        self._end(reason, detail if answered else "")

    def on_lost(self, now_ns: int) -> None:
        """It is gone, and nobody will ever be told."""

    # --- back at the balancer --------------------------------------------------------------------------------

    def _end(self, reason: Reason | None, detail: str = "") -> None:
        self._to_balancer(JobEnded(self.id, reason, detail))

    def _to_balancer(self, event: JobEnded | JobProgressed) -> None:
        wire, now_ns = self._box.wire, self._kernel.now_ns
        if not wire.is_silent(now_ns):
            self._kernel.at(self._core.gate(wire.arrival_ns(now_ns)), self._report, event)

    def _report(self, event: JobEnded | JobProgressed) -> None:
        if not self._closed:
            self._closed = isinstance(event, JobEnded)
            self._core.dispatch(event)
