"""The policies that can be compared: a table. What ships is configuration, the rest a `Placement` (see there).

    balancer = policy("prequal").build(config, Random(seed), world)

Every policy is applied to the scenario's own configuration: servers, health, probes, timeouts, retries and the queue
stay as they are; only what the policy is about is replaced. Policies that race or hedge do so on the routes that race
by default (`/api/chat`, `/v1/messages`, …); all other routes go to one server after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from lbcore.balancer import LoadBalancer
from lbcore.config import (
    Config,
    Policy,
    RaceSettings,
    RetrySettings,
    RouteSettings,
    SelectionSettings,
    Strategy,
    Winner,
)
from lbcore.fleet import Fleet
from lbcore.ollama import ROUTES, default_routes, route_settings
from lbcore.parsing import choice_fix, quote
from lbcore.placement import Placement
from lbcore.schema import MS_NS, SECOND_NS
from simulator.policies import placements
from simulator.policies.original import Original
from simulator.policies.placements import WorldView

PlacementType = Callable[[Config, Fleet, Random], Placement]
KnowingType = Callable[[Config, Fleet, Random, WorldView], Placement]

_RACED = tuple(route.name for route in ROUTES if route.strategy is Strategy.RACE)


class PolicyError(ValueError):
    """A policy that does not exist, or that cannot be built as asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """One policy."""

    name: str
    about: str
    """What it does, in a line."""
    source: str
    """Where it comes from."""
    changes: Callable[[Config], Config]
    placement: PlacementType = Placement
    knowing: KnowingType | None = None
    """A placement that must ask the world: instead of `placement`."""
    program: Callable[[Config, Random], LoadBalancer] | None = None
    """Another program altogether, which places by itself."""
    ships: bool = False
    """An operator can have it, by configuration alone."""

    @property
    def needs_world(self) -> bool:
        """Whether it knows more than the core does."""
        return self.knowing is not None

    def configure(self, config: Config) -> Config:
        """Return the configuration under this policy; doing it twice changes nothing more."""
        return self.changes(config)

    def place(self, world: WorldView | None = None) -> PlacementType:
        """Return what chooses the servers; raises PolicyError when it needs a world and gets none."""
        if self.knowing is None:
            return self.placement
        if world is None:
            raise PolicyError(f"policy {self.name} must be given the world that it asks")
        knowing = self.knowing
        return lambda config, fleet, rng: knowing(config, fleet, rng, world)

    def build(self, config: Config, rng: Random, world: WorldView | None = None) -> LoadBalancer:
        """Return a balancer that works by this policy; its `config` is the configured one."""
        if self.program is not None:
            return self.program(self.configure(config), rng)
        return LoadBalancer(self.configure(config), rng, self.place(world))


def policy(name: str) -> PolicySpec:
    """Return the policy called `name`; raises PolicyError, naming all, when there is none."""
    spec = POLICIES.get(name)
    if spec is None:
        raise PolicyError(f"no policy is called {quote(name)}; {choice_fix(name, list(POLICIES))}")
    return spec


# --- configurations ----------------------------------------------------------------------------------------


def _routes(config: Config, raced: RouteSettings) -> Mapping[str, RouteSettings]:
    """Return the routes of `config`, those that race by default as `raced` says, no other racing or hedging."""
    many = (Strategy.RACE, Strategy.HEDGE)
    known = {**default_routes(config.race), **config.routes}
    one = RouteSettings()
    return {
        name: raced if name in _RACED else one if settings.strategy in many else settings
        for name, settings in known.items()
    }


def _sequential(config: Config, *, order: Policy = Policy.EXPECTED) -> Config:
    return replace(config, routes=_routes(config, RouteSettings()), selection=SelectionSettings(policy=order))


def _many(config: Config, *, strategy: Strategy, race: RaceSettings) -> Config:
    routes = _routes(config, route_settings(strategy, race))
    return replace(config, routes=routes, race=race, selection=SelectionSettings())


def _race(k: int) -> Callable[[Config], Config]:
    # the budget pays for nothing but a new racer in the place of one that failed
    race = RaceSettings(racers_min=k, racers_max=k, utilisation_max=1.0, budget=float(k - 1), hedges_max=0)
    return lambda config: _many(config, strategy=Strategy.RACE, race=race)


def _oracle(config: Config) -> Config:
    """A clairvoyant knows at once that a server is back; the core learns it from a probe, so probes are frequent."""
    often_ns = 250 * MS_NS
    probe = replace(config.probe, interval_dead_ns=often_ns, interval_dead_max_ns=often_ns)
    return replace(_sequential(config), probe=probe)


def _original(config: Config) -> Config:
    """configs/seed.toml; one limit of 30 s for a connection, a first token (loading or not) and silence."""
    race = RaceSettings(
        winner=Winner.MOST_TOKENS, racers_min=3, racers_max=6, utilisation_max=1.0, budget=5.0, hedges_max=0
    )
    timeout_ns = 30 * SECOND_NS
    return replace(
        config,
        servers=tuple(replace(server, in_flight_max=4096) for server in config.servers),
        routes=_routes(config, route_settings(Strategy.RACE, race)),
        race=race,
        selection=SelectionSettings(policy=Policy.HEALTH),
        probe=replace(
            config.probe,
            interval_dead_ns=config.probe.interval_ns,
            interval_dead_max_ns=config.probe.interval_ns,
        ),
        timeouts=replace(
            config.timeouts,
            connect_ns=timeout_ns,
            first_token_warm_ns=timeout_ns,
            first_token_cold_ns=timeout_ns,
            silence_ns=timeout_ns,
            answer_ns=timeout_ns,
        ),
        retry=RetrySettings(budget=0.0, budget_min=0),
        queue=replace(config.queue, length_max=0),
    )


_P95 = RaceSettings(hedges_max=1, hedge_delay_min_ns=0, hedge_delay_max_ns=3600 * SECOND_NS)
_OURS = "this project (design §5)"

_ALL = (
    PolicySpec(
        name="round-robin",
        about="one server after the other",
        source="the default of nginx and haproxy",
        changes=_sequential,
        placement=placements.RoundRobin,
    ),
    PolicySpec(
        name="random",
        about="any server, each equally likely",
        source="the least that can be done",
        changes=_sequential,
        placement=placements.Uniform,
    ),
    PolicySpec(
        name="least-in-flight",
        about="the server with the fewest requests in flight a slot",
        source="least_conn of nginx, leastconn of haproxy, wlc of LVS",
        changes=_sequential,
        placement=placements.LeastInFlight,
    ),
    PolicySpec(
        name="power-of-two",
        about="two servers at random, of which the less loaded",
        source="Mitzenmacher: The Power of Two Choices in Randomized Load Balancing, IEEE TPDS 12(10), 2001",
        changes=_sequential,
        placement=placements.PowerOfTwo,
    ),
    PolicySpec(
        name="weighted-health",
        about="sampled by health, loaded models first; one server at a time",
        source="the original's selection: [selection] policy = health",
        changes=partial(_sequential, order=Policy.HEALTH),
        ships=True,
    ),
    PolicySpec(
        name="peak-ewma",
        about="two servers at random, of which the smaller decaying latency peak times (in flight + 1)",
        source="Finagle, PeakEwma.scala; linkerd",
        changes=_sequential,
        placement=placements.PeakEwma,
    ),
    PolicySpec(
        name="prequal",
        about="the fastest server that is not hot (in flight above the 0.84 quantile), else the least loaded",
        source="Wydrowski et al.: Load is not what you should balance: Introducing Prequal, NSDI 2024",
        changes=_sequential,
        placement=placements.Prequal,
    ),
    *(
        PolicySpec(
            name=f"race-{k}",
            about=f"{k} servers at once, always and wherever; the first token wins",
            source="redundant requests without bounds: [race] racers_min = racers_max",
            changes=_race(k),
            ships=True,
        )
        for k in (2, 3, 4)
    ),
    PolicySpec(
        name="race-budget",
        about="races to idle slots within a budget, and one hedge: the defaults",
        source=f"{_OURS}: configs/prod.toml",
        changes=partial(_many, strategy=Strategy.RACE, race=RaceSettings()),
        ships=True,
    ),
    PolicySpec(
        name="hedge-p95",
        about="one more server, busy or not, after the p95 of the first-token times",
        source="Dean & Barroso: The Tail at Scale, CACM 56(2), 2013",
        changes=partial(_many, strategy=Strategy.HEDGE, race=_P95),
        placement=placements.HedgeAnywhere,
    ),
    PolicySpec(
        name="hedge-adaptive",
        about="no races; one hedge to an idle slot, within a budget",
        source=f"{_OURS}: strategy = hedge",
        changes=partial(_many, strategy=Strategy.HEDGE, race=RaceSettings()),
        ships=True,
    ),
    PolicySpec(
        name="session-affinity",
        about="the server that the session hashes to, unless it has 1.25 times its share of the load",
        source="Mirrokni et al.: Consistent Hashing with Bounded Loads, SODA 2018; rendezvous hashing",
        changes=_sequential,
        knowing=placements.SessionAffinity,
    ),
    PolicySpec(
        name="oracle",
        about="whoever will give the first token soonest: the lower bound, greedy",
        source="clairvoyance",
        changes=_oracle,
        knowing=placements.Oracle,
    ),
    PolicySpec(
        name="original",
        about="the original program: 3 to 6 racers, the client waits for the slowest one's first token + 2 s",
        source="the original program, as its configuration (configs/seed.toml) and its defects are known",
        changes=_original,
        program=Original,
    ),
)

POLICIES: Mapping[str, PolicySpec] = {spec.name: spec for spec in _ALL}
"""All policies by name, in the order in which tables show them."""
