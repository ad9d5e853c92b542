"""One simulated server: a fake Ollama, its faults, its link, and the attempts that are on it. Times are int ns.

What `simulator.serve` does over sockets for the same fake is done here as planned moments: an attempt comes, waits, is
answered, breaks as the faults have it, or leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from lbcore.events import ActiveModel, ModelInfo, Reason
from simulator.fake_ollama import FakeOllama, Notice, Refused, Started, Token
from simulator.fakes.api import BUSY, RUNNER_GONE
from simulator.fakes.jobs import Crashed, Job
from simulator.fakes.listings import digest
from simulator.fakes.specs import NS_PER_S, FakeModel, FakeSpec, model_key, runner_options
from simulator.faults import Effect, FaultKind, active, next_change_ns
from simulator.kernel import Kernel
from simulator.network import Wire
from simulator.reports.results import ServerResult
from simulator.workloads.asks import Ask

_HANGS = frozenset({FaultKind.HANG, FaultKind.HANG_CHAT})
_FORESIGHT_NS = 3600 * NS_PER_S


class Visitor(Protocol):
    """An attempt, as the server sees it. Everything said to it takes its time to reach the balancer."""

    attempt_id: int
    ask: Ask

    def on_started(self, now_ns: int) -> None:
        """It has a slot."""

    def on_first_token(self, now_ns: int) -> None:
        """Its first token is made."""

    def on_whole(self, now_ns: int) -> None:
        """Its answer is whole."""

    def on_failed(self, now_ns: int, reason: Reason, status: int, detail: str, *, answered: bool) -> None:
        """It is answered with an error, or its connection has ended."""

    def on_lost(self, now_ns: int) -> None:
        """It is gone, and nobody will ever be told."""


def job_of(visitor_id: int, ask: Ask, model: FakeModel, keep_alive_ns: int) -> Job:
    """Return what an ask is to a server's scheduler."""
    options = runner_options(model, None if ask.num_ctx is None else {"num_ctx": ask.num_ctx})
    marks = (1, ask.output_tokens) if ask.output_tokens > 1 else (1,)
    return Job(
        visitor_id,
        model.name,
        options,
        keep_alive_ns,
        marks=marks,
        prompt_tokens=ask.prompt_tokens,
        blocks=ask.blocks,
        poison=ask.poison,
    )


class Box:
    """One server."""

    def __init__(self, spec: FakeSpec, wire: Wire, kernel: Kernel) -> None:
        self.spec = spec
        self.wire = wire
        self.fake = FakeOllama(spec, 0)
        self.idle_connections = 0
        self.result = ServerResult(spec.name, spec.num_parallel)
        self._kernel = kernel
        self._faults = spec.faults
        self._keep_alive_ns = round(spec.keep_alive_s * NS_PER_S)
        self._visitors: dict[int, Visitor] = {}
        self._hung: dict[int, Visitor] = {}
        self._held_probes: list[Callable[[], None]] = []
        self._effect = Effect()
        self._silent = False
        self._wake_ns: int | None = None
        self._load_began_ns: dict[str, int] = {}
        self._infos: dict[str, ModelInfo] = {}
        self._looks_at_ns = 0
        self.look(0)

    def __repr__(self) -> str:
        return f"<Box {self.spec.name} {'up' if self.is_up else 'down'}, {len(self._visitors)} attempts>"

    @property
    def is_up(self) -> bool:
        """Whether it accepts connections."""
        return not self._effect.down and not self._silent

    @property
    def is_idle(self) -> bool:
        """Whether it works for nobody."""
        fake = self.fake
        works = fake.pending or fake.current or fake.loading or any(not runner.idle for runner in fake.runners.values())
        return not self._visitors and not works

    # --- what balancers do -----------------------------------------------------------------------------------

    def receive(self, visitor: Visitor) -> None:
        """Take in a request that has arrived whole."""
        now_ns = self._kernel.now_ns
        if not self.is_up:
            visitor.on_failed(now_ns, Reason.RESET, 0, "", answered=False)
            return
        self.result.requests += 1
        self._visitors[visitor.attempt_id] = visitor
        self._decide(visitor, now_ns)

    def leave(self, visitor: Visitor) -> None:
        """Take note that the connection of an attempt is closed, wherever it had come to."""
        if visitor.attempt_id in self._visitors:
            self._forget(visitor.attempt_id, self._kernel.now_ns)

    # --- what placement does ---------------------------------------------------------------------------------

    def replaces(self, *, generates: bool) -> FaultKind | None:
        """Return the fault that a request meets instead of its answer, if any."""
        return self._effect.replaces(generates=generates)

    @property
    def hangs(self) -> bool:
        """Whether what uses a model gets no answer."""
        return self._effect.replaces(generates=True) in _HANGS

    def stay(self, visitor: Visitor) -> None:
        """Take in somebody who uses no model, until he leaves or the server dies."""
        self._visitors[visitor.attempt_id] = visitor

    def knows(self, visitor: Visitor) -> bool:
        """Whether it is still there."""
        return self._visitors.get(visitor.attempt_id) is visitor

    def admit(self, visitor: Visitor, job: Job) -> None:
        """Take in somebody who needs a model for nothing but that it is loaded."""
        self.stay(visitor)
        self._take(self.fake.submit(job, self._kernel.now_ns))
        self._plan_wake()

    def put(self, model: FakeModel) -> None:
        """Put a model on the disk."""
        self.fake.disk[model_key(model.name)] = model

    def delete(self, name: str) -> None:
        """Delete a model, if it is there."""
        self._take(self.fake.delete(name, self._kernel.now_ns) or [])
        self._plan_wake()

    def probe_failure(self) -> Reason | None:
        """Return how a probe that is here now fails, or None. A server that hangs lets it wait: see `hangs_probes`."""
        if not self.is_up:
            return Reason.CONNECT_REFUSED
        return {FaultKind.RESET: Reason.RESET, FaultKind.GARBAGE: Reason.GARBAGE}.get(
            self._effect.replaces(generates=False) or FaultKind.HANG
        )

    @property
    def hangs_probes(self) -> bool:
        """Whether a probe gets no answer."""
        return self._silent or self._effect.replaces(generates=False) is FaultKind.HANG

    def hold_probe(self, go_on: Callable[[], None]) -> None:
        """Let a probe wait until the faults change; without power, nobody ever thinks of it again."""
        if not self._silent:
            self._held_probes.append(go_on)

    def models(self) -> tuple[tuple[ModelInfo, ...], tuple[ActiveModel, ...]]:
        """Return what is on disk and what is loaded, as a probe reads it."""
        self._take(self.fake.advance(self._kernel.now_ns))
        available = tuple(self._info(model) for model in self.fake.disk.values())
        active_models = tuple(ActiveModel(r.model.name, _entry(r.model)) for r in self.fake.runners.values())
        return available, active_models

    def _info(self, model: FakeModel) -> ModelInfo:
        info = self._infos.get(model.name)
        if info is None:
            info = ModelInfo(model.name, digest(model), model.modified_at, _entry(model))
            self._infos[model.name] = info
        return info

    # --- faults ----------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """End every fault now."""
        self._faults = ()
        self.wire.heal(self._kernel.now_ns)
        self.look(self._kernel.now_ns)

    def look(self, now_ns: int) -> None:
        """Do what the faults say of this moment, and plan to look again when they say something new."""
        effect, silent = active(self._faults, now_ns), self.wire.is_silent(now_ns)
        if effect != self._effect or silent != self._silent:
            self._change(effect, silent=silent, now_ns=now_ns)
        if now_ns and now_ns < self._looks_at_ns:
            return
        moments = [next_change_ns(self._faults, now_ns)]
        moments += [m for fault in self.wire.faults for m in (fault.from_ns, fault.until_ns) if m > now_ns]
        self._looks_at_ns = min((m for m in moments if m is not None), default=2**63)
        if self._looks_at_ns < 2**63:
            self._kernel.at(self._looks_at_ns, self._look_again)

    def _look_again(self) -> None:
        self.look(self._kernel.now_ns)

    def _change(self, effect: Effect, *, silent: bool, now_ns: int) -> None:
        was_up = self.is_up
        self._take(self.fake.advance(now_ns))
        self._effect, self._silent = effect, silent
        held, self._held_probes = self._held_probes, []
        if not silent:
            for go_on in held:
                go_on()
        if was_up and not self.is_up:
            self._die(now_ns)
            return
        self.fake.set_factors(effect.first_token_factor, effect.token_factor, now_ns)
        self._plan_wake()
        hung, self._hung = self._hung, {}
        for visitor in hung.values():
            self._decide(visitor, now_ns)
        if effect.breaks is not None:
            for visitor in list(self._visitors.values()):
                self._watch_break(visitor, now_ns)

    def _die(self, now_ns: int) -> None:
        """Lose everything that was under way and in memory; without power, nobody is told."""
        self.idle_connections = 0
        for visitor in list(self._visitors.values()):
            if self._silent:
                visitor.on_lost(now_ns)
            else:
                visitor.on_failed(now_ns, Reason.RESET, 0, "", answered=False)
        self._visitors.clear()
        self._hung.clear()
        disk = self.fake.disk
        loaded = tuple(name for name in self.spec.start_loaded if model_key(name) in disk)
        self.fake = FakeOllama(replace(self.spec, models=tuple(disk.values()), start_loaded=loaded), now_ns)
        self._load_began_ns.clear()

    # --- attempts --------------------------------------------------------------------------------------------

    def _decide(self, visitor: Visitor, now_ns: int) -> None:
        kind = self._effect.replaces(generates=True)
        if kind in _HANGS:
            self._hung[visitor.attempt_id] = visitor
            return
        model = self.fake.find(visitor.ask.model)
        if kind is not None:
            self._forget(visitor.attempt_id, now_ns)
            reason, status, detail = INSTEAD[kind]
            visitor.on_failed(now_ns, reason, status, detail, answered=status > 0)
        elif model is None:
            self._forget(visitor.attempt_id, now_ns)
            words = f"model '{visitor.ask.model}' not found"
            visitor.on_failed(now_ns, Reason.MODEL_NOT_FOUND, 404, words, answered=True)
        else:
            self._take(self.fake.submit(job_of(visitor.attempt_id, visitor.ask, model, self._keep_alive_ns), now_ns))
        self._plan_wake()

    def _forget(self, attempt_id: int, now_ns: int) -> None:
        """Take an attempt out of the house."""
        self._hung.pop(attempt_id, None)
        notices = self.fake.advance(now_ns)
        self._take(notices)
        if self._visitors.pop(attempt_id, None) is not None:
            self._take(self.fake.end(attempt_id, now_ns))
            self._plan_wake()

    def _wake(self, due_ns: int) -> None:
        if due_ns == self._wake_ns:
            self._wake_ns = None
            self._take(self.fake.advance(due_ns))
            self._plan_wake()

    def _plan_wake(self) -> None:
        due_ns = self.fake.next_deadline_ns()
        if due_ns is not None and (self._wake_ns is None or due_ns < self._wake_ns):
            self._wake_ns = due_ns
            self._kernel.at(due_ns, self._wake, due_ns)
        loading = self.fake.loading
        if loading is not None:
            self._load_began_ns.setdefault(loading.model.name, self._kernel.now_ns)

    def _take(self, notices: list[Notice]) -> None:
        """Do what the scheduler's decisions mean for the attempts."""
        for notice in notices:
            if isinstance(notice, Token):
                self._on_token(notice)
            elif isinstance(notice, Started):
                self._on_started(notice)
            elif isinstance(notice, Refused):
                self._drop(notice.job_id, notice.at_ns, Reason.BUSY, 503, BUSY)
            elif isinstance(notice, Crashed):
                self._drop(notice.job_id, notice.at_ns, Reason.SERVER_ERROR, 500, RUNNER_GONE)

    def _on_started(self, notice: Started) -> None:
        visitor = self._visitors.get(notice.job_id)
        if visitor is None:
            return
        began_ns = self._load_began_ns.pop(notice.model, None)
        if began_ns is not None:
            self.result.loads += 1
            self.result.load_ns += notice.at_ns - began_ns
        visitor.on_started(notice.at_ns)
        self._watch_break(visitor, notice.at_ns)

    def _drop(self, attempt_id: int, at_ns: int, reason: Reason, status: int, detail: str) -> None:
        visitor = self._visitors.get(attempt_id)
        if visitor is not None:
            visitor.on_failed(at_ns, reason, status, detail, answered=True)
            self._forget(attempt_id, at_ns)

    def _on_token(self, token: Token) -> None:
        visitor = self._visitors.get(token.job_id)
        if visitor is None:
            return
        if token.tokens == 1:
            visitor.on_first_token(token.at_ns)
        kind = self._effect.breaks_at(token.tokens)
        if kind is not None:
            self._break(visitor, kind, token.tokens, token.at_ns)
        elif token.tokens == visitor.ask.output_tokens:
            visitor.on_whole(token.at_ns)
            self._forget(token.job_id, token.at_ns)

    def _watch_break(self, visitor: Visitor, now_ns: int) -> None:
        """See to it that an answer breaks when the faults want it to: after a token, as the live fakes do."""
        if self._effect.breaks is None or self.fake.token_due_ns(visitor.attempt_id, 1) is None:
            return
        made, _ = self.fake.made(visitor.attempt_id, now_ns)
        if not made and not self._effect.after_tokens:
            self._break(visitor, self._effect.breaks, 0, now_ns)
        elif (at := max(self._effect.after_tokens, made + 1)) <= visitor.ask.output_tokens:
            self.fake.watch(visitor.attempt_id, at)
            self._plan_wake()

    def _break(self, visitor: Visitor, kind: FaultKind, sent: int, now_ns: int) -> None:
        """Break an answer after so many tokens; before the first one an error has a status of its own."""
        if kind is FaultKind.STALL_MIDSTREAM:
            self.fake.stall(visitor.attempt_id, now_ns)
            return
        streams = visitor.ask.stream
        if kind is FaultKind.ERROR_MIDSTREAM and (not sent or not streams):
            reason, status = Reason.SERVER_ERROR, 500
        elif not streams:
            reason, status = Reason.RESET, 0
        else:
            reason, status = (Reason.ERROR_LINE if kind is FaultKind.ERROR_MIDSTREAM else Reason.TRUNCATED), 200
        answered = status == 500 or reason is Reason.ERROR_LINE
        visitor.on_failed(now_ns, reason, status, "", answered=answered)
        self._forget(visitor.attempt_id, now_ns)

    # --- foresight ---------------------------------------------------------------------------------------------

    def foresee_first_token_ns(self, ask: Ask, now_ns: int) -> int | None:
        """Return when an ask that arrives now would have its first token, were there no others to come.

        None: it would fail, or break before its end. Runs a copy of the server, faults included, so it is exact, and
        slow; for the oracle alone.
        """
        model = self.fake.find(ask.model)
        if model is None or not self._will_serve(now_ns):
            return None
        fake = self.fake.twin()
        job = job_of(-1, ask, model, self._keep_alive_ns)
        first_ns = None
        notices = fake.submit(job, now_ns)
        while True:
            for notice in notices:
                if isinstance(notice, Refused | Crashed) and notice.job_id == -1:
                    return None
                if not isinstance(notice, Token):
                    continue
                if notice.job_id == -1 and first_ns is None:
                    first_ns = notice.at_ns
                if notice.job_id == -1 and notice.tokens == ask.output_tokens:
                    return first_ns
                whole = ask if notice.job_id == -1 else self._visitors[notice.job_id].ask
                if notice.tokens == whole.output_tokens:
                    fake.end(notice.job_id, notice.at_ns)
            due_ns = fake.next_deadline_ns()
            change_ns = next_change_ns(self._faults, now_ns)
            if due_ns is None or due_ns > now_ns + _FORESIGHT_NS:
                return None
            if change_ns is not None and change_ns <= due_ns:
                now_ns = change_ns
                notices = fake.advance(now_ns)
                effect = active(self._faults, now_ns)
                if not self._will_serve(now_ns) and (effect.down or effect.breaks or first_ns is None):
                    return None
                fake.set_factors(effect.first_token_factor, effect.token_factor, now_ns)
            else:
                now_ns = due_ns
                notices = fake.advance(now_ns)

    def _will_serve(self, now_ns: int) -> bool:
        effect = active(self._faults, now_ns)
        bad = effect.down or effect.breaks is not None or effect.replaces(generates=True) is not None
        return not bad and not self.wire.is_cut(now_ns)


INSTEAD: dict[FaultKind, tuple[Reason, int, str]] = {
    FaultKind.RESET: (Reason.RESET, 0, ""),
    FaultKind.GARBAGE: (Reason.GARBAGE, 0, ""),
    FaultKind.ERROR_500: (Reason.SERVER_ERROR, 500, RUNNER_GONE),
    FaultKind.BUSY_503: (Reason.BUSY, 503, BUSY),
}


def _entry(model: FakeModel) -> str:
    return json.dumps({"name": model.name, "model": model.name, "digest": digest(model)}, separators=(",", ":"))
