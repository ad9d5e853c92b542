"""A scenario: a fleet, what its clients do, what goes wrong, and what is expected. Read from TOML, and run.

A scenario file has the tables of a configuration that are about decisions, `[[fleet]]` for its servers, and `about`,
`duration`, `[workload]`, `[network]`, `[[fault]]` and `[expect]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from lbcore.balancer import LoadBalancer
from lbcore.config import Alias, Config, ServerSettings
from lbcore.config_aliases import ALIAS_KEYS, parse_aliases
from lbcore.config_models import MODEL_KEYS, parse_models
from lbcore.config_order import CORE_ORDER, check_order
from lbcore.config_routes import ROUTE_KEYS, parse_routes
from lbcore.ollama import canonical_model
from lbcore.parsing import ABSENT, Keys, Problem, parse_table, quote
from lbcore.schema import SECOND_NS, Kind, count, duration, fields_of, keys_of, ratio, section, setting, size
from simulator.box import Box
from simulator.checkers import Safety, check_liveness, check_recovery, is_settled
from simulator.fakes.specs import FakeSpec, model_key
from simulator.fault_tables import PAUSE, parse_faults
from simulator.fleet import parse_fleet
from simulator.kernel import Kernel
from simulator.network import Link, LinkFault, Wire
from simulator.policies.placements import WorldView
from simulator.promises import Promises
from simulator.reports.expect import Expectation, parse_expect
from simulator.reports.results import Band, RunResult
from simulator.workload import Workload, make_source, models_of, parse_workload
from simulator.workloads.asks import Source
from simulator.world import World

# ruff: noqa: RUF009  # schema functions declare fields; they do not make shared mutable values

Build = Callable[[Config, Random, WorldView], LoadBalancer]
"""Makes the balancer of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkTable:
    """`[network]`: the way to every server, the same in both directions."""

    latency_ns: int = duration("one way", 100_000, high=60 * SECOND_NS)
    jitter_ns: int = duration("mean of an exponential addition to it", 0, high=60 * SECOND_NS)
    loss: float = ratio("share of the messages that TCP must send again", 0.0, high=0.9)
    bandwidth: int = size("bytes per s", 125_000_000, low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioTable:
    """The keys of a scenario that stand in no table, and `[network]`."""

    about: str = setting(Kind.TEXT, "what it shows, in a sentence")
    duration_ns: int = duration("how long faults are on and clients come; then all is healed", low=1)
    settle_ns: int = duration("how soon after that everything must be well", 120 * SECOND_NS, low=1)
    seed: int = count("of everything that is random", 1)
    network: NetworkTable = section("the way to every server", NetworkTable)


@dataclass(frozen=True, slots=True)
class Scenario:
    """All that a run is made of, but for its seed and its policy."""

    name: str
    about: str
    config: Config
    specs: tuple[FakeSpec, ...]
    workload: Workload
    duration_ns: int
    settle_ns: int
    seed: int = 1
    link: Link = field(default_factory=Link)
    link_faults: Mapping[str, tuple[LinkFault, ...]] = field(default_factory=dict)
    pauses: tuple[tuple[int, int], ...] = ()  # of the balancer: its machine is suspended
    expectations: tuple[Expectation, ...] = ()
    warnings: tuple[str, ...] = ()


# --- running -----------------------------------------------------------------------------------------------------


def run_scenario(
    scenario: Scenario,
    seed: int | None = None,
    *,
    source: Source | None = None,
    build: Build | None = None,
    policy: str = "",
    keep_lines: bool = False,
    audit: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> RunResult:
    """Run a scenario: faults on for its duration, then healed until everything is well or `settle_ns` are over.

    `source` are other clients than those of its workload.
    `audit` looks at every invariant after every step, which takes several times as long. `on_progress` is told the
    virtual time now and then.
    """
    seed = scenario.seed if seed is None else seed
    kernel = Kernel()
    result = RunResult(scenario.name, seed, policy)
    boxes = [
        Box(spec, Wire(scenario.link, scenario.link_faults.get(spec.name, ()), _rng(seed, f"wire {spec.name}")), kernel)
        for spec in scenario.specs
    ]
    promises = Promises(scenario.config, boxes, scenario.pauses)
    safety = Safety(result, promises) if audit else None
    clients = source or make_source(scenario.workload, seed)
    world = World(boxes, clients, kernel, result, pauses=scenario.pauses, keep_lines=keep_lines, watch=safety)
    balancer = (build or _as_configured)(scenario.config, _rng(seed, "core"), world)
    if safety is not None:
        safety.begin(balancer)
    world.begin(balancer)
    for at_ns in range(0, scenario.duration_ns, max(1, scenario.duration_ns // 100)):
        kernel.run_until(at_ns)
        if on_progress is not None:
            on_progress(at_ns)
    kernel.run_until(scenario.duration_ns)
    for box in boxes:
        box.heal()
    if not is_settled(world):
        kernel.run_until(scenario.duration_ns + scenario.settle_ns, over=lambda: is_settled(world))
    result.violations += check_liveness(world, scenario.settle_ns)
    if audit:
        result.violations += promises.at_end(kernel.now_ns)
        result.violations += check_recovery(result, scenario.config, scenario.duration_ns)
    world.finish()
    result.bands += _bands(scenario)
    return result


def _rng(seed: int, what: str) -> Random:
    return Random(f"{seed} {what}")


def _as_configured(config: Config, rng: Random, _world: WorldView) -> LoadBalancer:
    return LoadBalancer(config, rng)


def _bands(scenario: Scenario) -> list[Band]:
    bands = [Band("", PAUSE, from_ns, until_ns) for from_ns, until_ns in scenario.pauses]
    for spec in scenario.specs:
        for fault in spec.faults:
            from_ns = 0 if fault.from_s is None else round(fault.from_s * SECOND_NS)
            until_ns = scenario.duration_ns if fault.until_s is None else round(fault.until_s * SECOND_NS)
            bands.append(Band(spec.name, fault.kind, from_ns, min(until_ns, scenario.duration_ns)))
        bands += [
            Band(spec.name, fault.kind, fault.from_ns, fault.until_ns)
            for fault in scenario.link_faults.get(spec.name, ())
        ]
    return bands


# --- reading -----------------------------------------------------------------------------------------------------

_CORE_TABLES = tuple(f.key for f in fields_of(Config))
_OWN_PARSERS = frozenset({"fleet", "workload", "fault", "expect", "models", "routes", "alias"})
_KEYS: Keys = (
    *keys_of(ScenarioTable),
    *keys_of(Config),
    *ROUTE_KEYS,
    *MODEL_KEYS,
    *ALIAS_KEYS,
    *(("", name) for name in ("fleet", "workload", "fault", "expect")),
)


def parse_scenario(
    raw: Mapping[str, Any], name: str, problems: list[Problem], *, folder: Path | None = None
) -> Scenario | None:
    """Return the scenario that the tables `raw` describe; append every problem found. None: it cannot be run.

    `folder` is where the paths of traces start from.
    """
    core_raw = {key: value for key, value in raw.items() if key in _CORE_TABLES}
    own_raw = {key: value for key, value in raw.items() if key not in {*_CORE_TABLES, *_OWN_PARSERS}}
    table = parse_table(ScenarioTable, own_raw, "", problems, also=_KEYS)
    core = parse_table(Config, core_raw, "", problems, also=_KEYS) or Config()
    routes = parse_routes(raw.get("routes", {}), core.race, problems, _KEYS)
    aliases = parse_aliases(raw.get("alias", {}), problems)
    check_order(raw, (core,), CORE_ORDER, problems)
    duration_ns = table.duration_ns if table is not None else None
    specs = _parse_specs(raw, problems, duration_ns)
    names = [spec.name for spec in specs]
    models = parse_models(raw.get("models", []), names, problems, _KEYS)
    faults = parse_faults(raw.get("fault", []), names, duration_ns, problems)
    if "workload" not in raw:
        problems.append(Problem("workload", ABSENT, "no client asks for anything", "write a [workload] table"))
    end_ns = duration_ns or 1  # a problem tells of a duration that is missing: then any end will do
    workload = parse_workload(raw["workload"], problems, folder=folder, duration_ns=end_ns) if "workload" in raw else ()
    expectations = parse_expect(raw.get("expect", {}), problems, servers=names, also=_KEYS)
    if problems or table is None:
        return None
    servers = tuple(
        ServerSettings(url=f"http://{s.name}", name=s.name, slots=s.num_parallel, in_flight_max=s.in_flight_max)
        for s in specs
    )
    net = table.network
    return Scenario(
        name=name,
        about=table.about,
        config=replace(core, servers=servers, models=models, routes=routes, aliases=aliases),
        specs=tuple(replace(spec, faults=(*spec.faults, *faults.servers[spec.name])) for spec in specs),
        workload=workload,
        duration_ns=table.duration_ns,
        settle_ns=table.settle_ns,
        seed=table.seed,
        link=Link(net.latency_ns, net.jitter_ns, net.loss, float(net.bandwidth)),
        link_faults={name: tuple(of) for name, of in faults.links.items() if of},
        pauses=tuple(faults.pauses),
        expectations=expectations,
        warnings=tuple(_warnings(workload, specs, aliases)),
    )


def _parse_specs(raw: Mapping[str, Any], problems: list[Problem], end_ns: int | None) -> tuple[FakeSpec, ...]:
    tables = raw.get("fleet", [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        problems.append(Problem("fleet", tables, "is not a list of tables", "write [[fleet]] above each fake server"))
        return ()
    if not tables:
        problems.append(Problem("fleet", ABSENT, "no server is named", 'write [[fleet]] and below it name = "one"'))
    return parse_fleet(tables, problems, end_ns=end_ns)


def _warnings(workload: Workload, specs: Sequence[FakeSpec], aliases: Mapping[str, Alias]) -> Iterator[str]:
    """Yield what can be run, but is probably not meant."""
    on_disk = {model_key(model.name) for spec in specs for model in spec.models}
    asked = dict.fromkeys(name for settings in workload for name in models_of(settings))
    for name in asked:
        alias = aliases.get(canonical_model(name))
        if not any(model_key(model) in on_disk for model in ([name] if alias is None else alias.models)):
            yield f"workload: no server of the fleet has {quote(name)}, so whoever asks for it gets an error"
