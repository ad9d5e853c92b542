"""The servers: health, reliability, probes and what they hold. Owned, and only ever called, by the balancer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from lbcore.catalog import known_names
from lbcore.commands import CancelProbe, Command, Decision, ForgetServer, RecordDecision, StartProbe
from lbcore.compiling import mypyc_attr
from lbcore.config import Config, ServerSettings
from lbcore.events import ModelsSynced, ProbeCompleted, Reason
from lbcore.health import (
    ALIVE_FROM,
    BLAME,
    Blame,
    after_failure,
    after_success,
    distrust_ns,
    failing_ns,
    next_probe_pause_ns,
    revive_pause_ns,
)
from lbcore.ollama import RequestKind, canonical_model
from lbcore.pools import Pools
from lbcore.records import Attempt, Failure, ModelStats, Server, ServerModel
from lbcore.states import (
    Reliability,
    ReliabilityInput,
    ServerInput,
    ServerState,
    step_reliability,
    step_server,
)
from lbcore.timers import TimerKind, Timers
from lbcore.units import counted

# Members bound once: in Python 3.11 a look-up in an enum's class costs more than what the member is used for here.
_GENERATE: Final = RequestKind.GENERATE
_UNLOAD: Final = RequestKind.UNLOAD
_HEALTHY: Final = ServerState.HEALTHY
_HEALTH: Final = Decision.HEALTH


def why_not(server: Server) -> str:
    """Return what keeps a server from being asked."""
    return "it is being removed" if server.state is ServerState.DRAINING else server.last_error or "not probed yet"


def _is_outcast(server: Server) -> bool:
    return server.state is ServerState.DEAD or (server.doubted and server.is_alive)


@mypyc_attr(allow_interpreted_subclasses=True)
class Fleet:
    """All servers by id, in the order they were named."""

    def __init__(self, config: Config, timers: Timers, out: list[Command]) -> None:
        self._config = config
        self._timers = timers
        self._out = out
        self._last_server_id = 0
        self._last_probe_id = 0
        self.servers: dict[int, Server] = {}
        self.stats: dict[str, ModelStats] = {}
        self.pools = Pools(self.servers, config.selection)
        self.pool = self.pools.pool
        self.touched, self.moved = self.pools.touched, self.pools.moved
        self.version = 0
        """Changes whenever the catalog does, or may, or who is alive: so long, answers made of them can be kept."""
        self.failing: dict[int, int] = {}  # by server: until when others go first, of any of its models
        self._outcasts: dict[int, Server] | None = None  # a cache
        for settings in config.servers:
            self._new_server(settings, 0)

    def __iter__(self) -> Iterator[Server]:
        return iter(self.servers.values())

    def holders(self, model: str | None) -> list[Server]:
        """Return the live servers that have a model (None: all that are alive); not to be changed by the caller."""
        return self.pool(model).servers

    def named(self, names: Collection[str], model: str | None) -> list[Server]:
        """Return the live servers of these names, each with a record of the model, whether it has that or not."""
        named = [server for server in self.holders(None) if server.name in names]
        if model is not None:
            for server in named:
                server.model(model)
        return named

    def suspected(self, model: str | None) -> list[Server]:
        """Return the live servers that have a model, or may have got it by what has changed since they were read."""
        found = [server for server in self.holders(None) if server.outdated or model is None or server.has(model)]
        return found if model is None else self.named([server.name for server in found], model)

    def outcasts(self) -> list[Server]:
        """Return the servers that are dead or doubted, in the order they were named."""
        if self._outcasts is None:
            self._outcasts = {s.id: s for s in self if _is_outcast(s)}
        return [self._outcasts[server_id] for server_id in sorted(self._outcasts)]

    def set_doubted(self, server: Server, *, doubted: bool) -> None:
        """Doubt a server, or do so no more."""
        server.doubted = doubted
        self.judge(server)

    def judge(self, server: Server) -> None:
        """Take note that a server has died, is back, or is doubted or no more."""
        if self._outcasts is not None:
            if _is_outcast(server):
                self._outcasts[server.id] = server
            else:
                self._outcasts.pop(server.id, None)

    def _changed(self) -> None:
        self.version += 1
        self.pools.forget()

    def by_name(self, name: str) -> Server | None:
        """Return the server called `name`."""
        return next((server for server in self if server.name == name), None)

    def nobody_there(self) -> str:
        """Return the error for a request when no server is alive: what was last heard of each."""
        if not self.servers:
            return "no server is configured"
        return "no server is reachable: " + "; ".join(f"{server.name}: {why_not(server)}" for server in self)

    # --- coming and going ----------------------------------------------------------------------------------

    def add(self, settings: ServerSettings, now_ns: int) -> Server:
        """Take a server in. It is dead until its first probe has ended well, and is probed at once."""
        server = self._new_server(settings, now_ns)
        self._record(Decision.SERVER_ADDED, server, f"added as {settings.url}")
        self.probe_now(server, now_ns)
        return server

    def _new_server(self, settings: ServerSettings, now_ns: int) -> Server:
        self._last_server_id += 1
        server = Server(self._last_server_id, settings)
        self.servers[server.id] = server
        self.judge(server)
        self._timers.arm(TimerKind.PROBE, server.id, now_ns)
        return server

    def drain(self, server: Server) -> None:
        """Choose the server no more; it is forgotten once nothing is in flight on it."""
        if self._step(server, ServerInput.DRAIN):
            self._record(Decision.SERVER_DRAINING, server, f"{server.in_flight} in flight")
            self._cancel_probe(server)
            self._timers.cancel(TimerKind.PROBE, server.id)
            self._changed()
            self.forget_if_drained(server)

    def forget_if_drained(self, server: Server) -> None:
        """Forget a draining server with nothing in flight."""
        if server.state is ServerState.DRAINING and server.in_flight == 0 and server.id in self.servers:
            del self.servers[server.id]
            self._out.append(ForgetServer(server.id))
            self._record(Decision.SERVER_GONE, server, "drained")

    # --- health --------------------------------------------------------------------------------------------

    def succeed(self, server: Server, now_ns: int, why: str, *, fastest: bool = False) -> None:
        """Raise a server's health."""
        server.deaths = 0
        if server.health >= self._config.health.value_max and server.state is _HEALTHY:
            return  # as mostly
        self._set_health(server, after_success(server.health, self._config.health, fastest=fastest), now_ns, why)

    def fail(self, server: Server, failure: Failure, now_ns: int) -> None:
        """Lower a server's health, and look at once what is the matter with it.

        If it dies of that, a probe that goes well does not revive it at once: its probes look well, its answers do not.
        """
        self._note_error(server, failure.words, now_ns)
        was_alive = server.is_alive
        self._set_health(server, after_failure(server.health, self._config.health), now_ns, failure.words)
        if was_alive and not server.is_alive:
            server.deaths += 1
            server.revive_from_ns = now_ns + revive_pause_ns(server.deaths, self._config.probe)
        self.probe_now(server, now_ns)

    def _note_error(self, server: Server, text: str, now_ns: int) -> None:
        server.last_error, server.last_error_ns = text, now_ns

    def _set_health(self, server: Server, value: float, now_ns: int, why: str) -> None:
        before, server.health = server.health, value
        self.moved[server.id] = server
        if value != before:
            self._out.append(RecordDecision(_HEALTH, 0, server.name, why, f"{before:.2f}", f"{value:.2f}"))
        if value >= ALIVE_FROM:
            if server.state is not _HEALTHY and self._step(server, ServerInput.REVIVE):
                server.probe_failures = server.probe_pause_ns = 0
                if server.died_ns is not None:
                    self._record(Decision.SERVER_BACK, server, why)
                server.died_ns = None
                self._changed()
        elif self._step(server, ServerInput.DIE):
            self._record(Decision.SERVER_DIED, server, why)
            server.died_ns = now_ns
            self._changed()

    def _step(self, server: Server, given: ServerInput) -> bool:
        following = step_server(server.state, given)
        if following is None:
            return False
        server.state = following
        self.judge(server)
        return True

    # --- reliability and doubt -----------------------------------------------------------------------------

    def note_reliability(self, server: Server, given: ReliabilityInput, now_ns: int, why: str) -> None:
        """Step a server's reliability record."""
        self.touched[server.id] = server
        if (
            given is ReliabilityInput.BROKE and server.reliability is not Reliability.UNRELIABLE
        ):  # streams break together
            server.breaks += 1
        if given is ReliabilityInput.BROKE:
            server.trusted_from_ns = now_ns + distrust_ns(server.breaks, self._config.health)
        before, server.reliability = server.reliability, step_reliability(server.reliability, given)
        if server.reliability is Reliability.RELIABLE:
            server.breaks = 0
        if server.reliability is not before:
            self._out.append(
                RecordDecision(
                    Decision.RELIABILITY, server=server.name, why=why, before=before, after=server.reliability
                )
            )

    def note_loss(self, loser: Attempt, winner: Attempt, now_ns: int) -> None:
        """Take a lost race without a byte as evidence (design: a lower bound of the loser's first-token time).

        Winner and loser had the same prompt, so the bound is the winner's usual time, scaled by how much longer the
        loser was given: a long prompt does not make a server look slow.
        """
        server = loser.server
        self.touched[server.id] = server
        winner_ns = max(1, (winner.first_token_ns or now_ns) - winner.started_ns)
        loser_ns = now_ns - loser.started_ns
        if loser_ns < winner_ns:
            return  # it had less time than the winner: no evidence
        server.losses += 1
        if loser.target is not None and winner.target is not None and winner.target.ttft_ns:
            loser.target.raise_floor(winner.target.ttft_ns * loser_ns // winner_ns, now_ns)
        if server.losses >= self._config.health.losses_max and not server.doubted:
            self.set_doubted(server, doubted=True)
            self._record(
                Decision.DOUBTED,
                server,
                f"{server.losses} races lost in a row without a byte: probed, and not chosen alone",
            )
            self.probe_now(server, now_ns)

    def note_first_token(self, attempt: Attempt, now_ns: int) -> None:
        """A server has answered: it is not doubted any more, and its model is loaded."""
        server, target = attempt.server, attempt.target
        self.touched[server.id] = server
        kind = attempt.request.kind
        server.losses = 0
        if server.doubted:
            self.set_doubted(server, doubted=False)
        if target is None or kind is _UNLOAD:
            return
        took_ns = now_ns - attempt.started_ns
        if attempt.cold:
            if attempt.loader and (attempt.request.stream or kind is RequestKind.LOAD):
                target.load_ns = float(took_ns) if target.load_ns is None else (target.load_ns + took_ns) / 2
            self.probe_now(server, now_ns, changed=True)  # /api/ps lists it from now on
        elif attempt.request.stream and kind is _GENERATE:
            target.note_first_token(took_ns, now_ns)
        target.runner_key = attempt.request.runner_key
        if target.failures and attempt.started_ns > target.failed_ns:
            target.failures = target.failing_until_ns = 0
        if not target.loaded:
            target.loaded = True
            self._changed()

    def note_failure(self, attempt: Attempt, target: ServerModel, now_ns: int) -> None:
        """A server has failed before a first token: others go first. What was in flight together fails as one."""
        if not target.failures or attempt.started_ns > target.failed_ns:
            target.failures += 1
        target.failed_ns = now_ns
        self.set_back(attempt.server, target, now_ns)

    def set_back(self, server: Server, target: ServerModel, now_ns: int) -> None:
        """Let others go first: a server has failed, or is asked again for the first time since.

        What is asked again may fail again, and fails soon: until that is known nobody else is to follow.
        """
        target.failing_until_ns = now_ns + failing_ns(target.failures)
        self.failing[server.id] = max(self.failing.get(server.id, 0), target.failing_until_ns)
        self.touched[server.id] = server

    # --- models --------------------------------------------------------------------------------------------

    def model_stats(self, model: str) -> ModelStats:
        """Return what is known of a model over the fleet, new if need be."""
        stats = self.stats.get(model)
        if stats is None:
            stats = self.stats[model] = ModelStats()
        return stats

    def lacks(self, server: Server, model: str, now_ns: int) -> None:
        """A server said that it does not have a model: correct the catalog, and read it anew."""
        if not server.has(model):
            return  # as was thought: nothing to correct
        record = server.model(model)
        record.available = record.active = None
        record.loaded = False
        self._changed()
        self.probe_now(server, now_ns)

    def loaded(self, server: Server, model: str, took_ns: int) -> None:
        """A server has loaded a model without a request for it, with the options that it has by default."""
        record = server.model(model)
        if not record.loaded:
            record.loaded, record.runner_key = True, ""
            record.load_ns = float(took_ns) if record.load_ns is None else (record.load_ns + took_ns) / 2
            self._changed()

    def unloaded(self, server: Server, model: str, now_ns: int) -> None:
        """A server has dropped a model from memory."""
        record = server.model(model)
        record.active = record.runner_key = None
        record.loaded = False
        self._changed()
        self.probe_now(server, now_ns, changed=True)

    def _sync_models(self, server: Server, event: ModelsSynced) -> None:
        """Take what a server has; mostly that is what it had."""
        available = known_names(event.available)
        active = {canonical_model(model.name): model for model in event.active}
        for name in (*available, *active):
            server.model(name)
        changed = False
        for name, record in list(server.models.items()):
            had = record.available, record.active, record.loaded
            record.available = available.get(name)
            record.active = active.get(name)
            answering = record.in_flight > record.loading  # loaded for sure, whatever /api/ps said a moment ago
            record.loaded = record.active is not None or (record.loaded and answering and record.available is not None)
            if not record.loaded:
                record.runner_key = None
            if not (record.available or record.loaded or record.in_flight):
                del server.models[name]
            changed = changed or had != (record.available, record.active, record.loaded)
        if changed:
            self._changed()

    # --- probes --------------------------------------------------------------------------------------------

    def probe_now(self, server: Server, now_ns: int, *, changed: bool = False) -> None:
        """Probe a server now, unless it is leaving or that is under way.

        `changed`: something on it has changed, which a probe under way may have missed; then another one follows.
        """
        if changed and not server.outdated:
            server.outdated = True
            self.version += 1
        if server.probe_id:
            server.probe_again = server.probe_again or changed
        elif server.state is not ServerState.DRAINING:
            self._last_probe_id += 1
            server.probe_id = self._last_probe_id
            self._timers.arm(TimerKind.PROBE, server.id, now_ns + self._config.probe.timeout_ns)
            self._out.append(StartProbe(server.id, server.probe_id))

    def on_probe_timer(self, server_id: int, now_ns: int) -> Server | None:
        """Start the probe that is due, or give up the one under way; returns the server then."""
        server = self.servers.get(server_id)
        if server is None:
            return None
        if server.probe_id == 0:
            self.probe_now(server, now_ns)
            return None
        self._cancel_probe(server)
        self._probe_failed(server, Reason.PROBE_TIMEOUT, "", now_ns)
        return server

    def _cancel_probe(self, server: Server) -> None:
        if server.probe_id:
            self._out.append(CancelProbe(server.id, server.probe_id))
            server.probe_id = 0

    def on_probe_completed(self, event: ProbeCompleted, now_ns: int) -> Server | None:
        """Take the end of a probe; None when it is not the one awaited."""
        server = self.servers.get(event.server_id)
        if server is None or server.probe_id != event.probe_id or event.probe_id == 0:
            return None
        server.probe_id = 0
        if event.reason is not None:
            self._probe_failed(server, event.reason, event.detail, now_ns)
            return server
        if server.version != event.version:
            server.version = event.version
            self.version += 1
        server.last_probe_id = event.probe_id
        server.probe_failures = server.probe_pause_ns = 0
        self._timers.arm(TimerKind.PROBE, server.id, now_ns + self._config.probe.interval_ns)
        return server

    def _probe_failed(self, server: Server, reason: Reason, detail: str, now_ns: int) -> None:
        failure = Failure(server.name, reason, 0, detail)
        why = f"probe failed: {failure.words}"
        self._note_error(server, failure.words, now_ns)
        if server.is_alive and BLAME[reason] is Blame.NONE:  # it could not be asked, which is no news of it
            self._timers.arm(TimerKind.PROBE, server.id, now_ns + self._config.probe.interval_ns)
            return
        server.probe_failures += 1
        if server.is_alive:
            fallen = server.probe_failures >= self._config.probe.fall
            value = min(after_failure(server.health, self._config.health), ALIVE_FROM / 2 if fallen else server.health)
            self._set_health(server, value, now_ns, why)
        elif server.died_ns is None and server.probe_failures == 1:  # it was never alive, and has no death to tell of
            self._record(Decision.SERVER_UNREAD, server, failure.words)
        probe = self._config.probe
        server.probe_pause_ns = next_probe_pause_ns(
            server.probe_pause_ns, probe.interval_dead_ns, probe.interval_dead_max_ns
        )
        self._timers.arm(TimerKind.PROBE, server.id, now_ns + server.probe_pause_ns)

    def on_models_synced(self, event: ModelsSynced, now_ns: int) -> Server | None:
        """Take what a server holds. A dead server is revived at 1.0; a health that was earned is left alone."""
        server = self.servers.get(event.server_id)
        if server is None or server.state is ServerState.DRAINING or not 0 < event.probe_id == server.last_probe_id:
            return None
        first = server.last_sync_ns is None
        server.last_sync_ns = now_ns
        self._sync_models(server, event)
        if not server.is_alive and now_ns < server.revive_from_ns:
            self._timers.arm(TimerKind.PROBE, server.id, server.revive_from_ns)
        elif not server.is_alive:
            self._set_health(server, ALIVE_FROM, now_ns, "synced" if first else "synced again")
        if first:
            known = f"{counted(len(event.available), 'model')}, {len(event.active)} loaded"
            self._record(Decision.SYNCED, server, known)
        if server.outdated != server.probe_again:
            server.outdated = server.probe_again
            self.version += 1
        if server.probe_again:
            server.probe_again = False
            self.probe_now(server, now_ns)
        return server

    def _record(self, decision: Decision, server: Server, why: str) -> None:
        self._out.append(RecordDecision(decision, server=server.name, why=why))
