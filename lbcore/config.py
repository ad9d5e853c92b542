"""What an operator may decide about the core: frozen settings, each field with its unit, range and reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from lbcore.schema import MS_NS, SECOND_NS, Kind, count, duration, ratio, section, setting


class Strategy(StrEnum):
    """How a route spreads a request over the servers (design §5)."""

    LOCAL = "local"
    AGGREGATE = "aggregate"
    SEQUENTIAL = "sequential"
    RACE = "race"
    HEDGE = "hedge"
    BROADCAST = "broadcast"


class Winner(StrEnum):
    """Which attempt of a race is committed."""

    FIRST_TOKEN = "first-token"
    MOST_TOKENS = "most-tokens"
    FIRST_FINISH = "first-finish"


class Policy(StrEnum):
    """How candidates are ranked before they are sampled by health."""

    EXPECTED = "expected-first-token"
    HEALTH = "health"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """One Ollama server (`[[servers]]`)."""

    url: str = setting(Kind.TEXT, "where this Ollama listens: http://host:port or https://host:port")
    name: str = setting(Kind.TEXT, "how logs, /status and headers call it; empty: host:port", "")
    slots: int = count(
        "requests one model serves at once; set it to the server's OLLAMA_NUM_PARALLEL", 1, low=1, high=1024
    )
    in_flight_max: int = count(
        "requests sent to one model on this server at once; more wait in our queue, where they can still go elsewhere",
        8,
        low=1,
        high=4096,
    )
    verify: bool = setting(Kind.FLAG, "https: check the certificate; false trusts anyone who answers", default=True)
    ca_file: str = setting(Kind.TEXT, "https: PEM file of the authority to trust; empty: the system's", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSettings:
    """How one route is forwarded; what a route leaves out comes from `[race]`."""

    strategy: Strategy = Strategy.SEQUENTIAL
    winner: Winner = Winner.FIRST_TOKEN
    racers_min: int = 1
    racers_max: int = 1
    hedges_max: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceSettings:
    """Races and hedges (`[race]`)."""

    winner: Winner = setting(
        Kind.CHOICE,
        "who is committed: first-token answers soonest; most-tokens waits `measure` and takes the "
        "longest; first-finish takes the first that is complete",
        Winner.FIRST_TOKEN,
    )
    measure_ns: int = duration(
        "most-tokens: how long after the first token of any racer tokens are counted",
        2 * SECOND_NS,
        high=600 * SECOND_NS,
    )
    racers_min: int = count("servers that get a request at once, whatever it costs", 1, low=1, high=64)
    racers_max: int = count("servers that get it at once when the budget below allows", 2, low=1, high=64)
    utilisation_max: float = ratio(
        "share of the model's slots in use above which there are no extra racers; redundancy "
        "pays below 0.15-0.3 and hurts above",
        0.3,
        high=1.0,
    )
    budget: float = ratio(
        "extra racers allowed per request on average; 0 never races, 1 doubles the work at most", 1.0, high=63.0
    )
    hedges_max: int = count("further servers asked, one after each hedge delay without a first token", 1, high=63)
    hedge_utilisation_max: float = ratio(
        "share of the model's slots in use above which there are no hedges, unless every server asked is in doubt: on "
        "a busy fleet they make others wait",
        0.8,
        high=1.0,
    )
    hedge_delay_min_ns: int = duration(
        "a hedge never starts sooner; the delay itself is the p95 of the model's recent first-token times",
        50 * MS_NS,
        high=600 * SECOND_NS,
    )
    hedge_delay_max_ns: int = duration("a hedge never starts later", 10 * SECOND_NS, high=3600 * SECOND_NS)
    hedge_delay_initial_ns: int = duration(
        "the delay before the model has been seen often enough to know its p95", 1 * SECOND_NS, high=3600 * SECOND_NS
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionSettings:
    """Who is asked first (`[selection]`)."""

    policy: Policy = setting(
        Kind.CHOICE,
        "expected-first-token ranks by queue, load and first-token estimates, then by what is in flight for the "
        "slots, then samples by health; health samples by health alone, loaded models first",
        Policy.EXPECTED,
    )
    forget_ns: int = duration(
        "half-life of what is known of a server that is not asked: a slow one gets another try in time",
        120 * SECOND_NS,
        low=SECOND_NS,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthSettings:
    """The health value and the reliability record (`[health]`)."""

    success: float = ratio("added to a server's health when it served a request well", 2.0, high=1000.0)
    fastest: float = ratio("added instead when it won a race", 4.0, high=1000.0)
    value_max: float = ratio(
        "health is capped here, so that a long good past does not outweigh a bad present", 100.0, low=1.0, high=1e6
    )
    failure_divisor: float = ratio(
        "health is divided by this on a failure; below 1.0 the server is dead", 2.0, low=1.0, high=1e6
    )
    resurrect: float = ratio("probability that a raced request also tries one dead or doubted server", 0.05, high=1.0)
    losses_max: int = count(
        "races lost in a row without a byte after which a server is probed and no longer chosen alone", 4, low=1
    )
    second_chance_ns: int = duration(
        "how long a server that broke a stream is passed over while others can serve; doubles with each "
        "further break, 32 times at most",
        30 * SECOND_NS,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSettings:
    """Active checks (`[probe]`)."""

    interval_ns: int = duration(
        "how often a live server's version, models and loaded models are read", 10 * SECOND_NS, low=100 * MS_NS
    )
    interval_dead_ns: int = duration(
        "how soon a dead server is tried again; doubles up to interval_dead_max", 1 * SECOND_NS, low=50 * MS_NS
    )
    interval_dead_max_ns: int = duration(
        "longest pause between two tries of a dead server", 15 * SECOND_NS, low=50 * MS_NS
    )
    timeout_ns: int = duration("longest time for a whole probe", 5 * SECOND_NS, low=10 * MS_NS)
    fall: int = count("failed probes in a row after which a server is dead, whatever its health", 2, low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutSettings:
    """How long an attempt may take at each step (`[timeouts]`)."""

    connect_ns: int = duration("TCP (and TLS) connection to a server", 3 * SECOND_NS, low=MS_NS)
    first_token_warm_ns: int = duration(
        "first token when the model is loaded: long prompts on slow boxes take minutes; hedges and "
        "probes act long before",
        120 * SECOND_NS,
        low=MS_NS,
    )
    first_token_cold_ns: int = duration(
        "first token when the model must be loaded; Ollama itself gives a load 5m without progress",
        600 * SECOND_NS,
        low=MS_NS,
    )
    silence_ns: int = duration("between two tokens of a stream", 60 * SECOND_NS, low=MS_NS)
    answer_ns: int = duration("a whole answer that is not streamed", 900 * SECOND_NS, low=MS_NS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySettings:
    """Retries before anything was sent to the client (`[retry]`)."""

    budget: float = ratio(
        "retries that do not help, as a share of all requests: keeps a storm from doubling itself; up to 20 that were "
        "not needed are kept for a server that fails all it has in flight at once",
        0.2,
        high=100.0,
    )
    budget_min: int = count("retries under way that are allowed where budget is 0", 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """Requests that wait for a server with room (`[queue]`)."""

    length_max: int = count(
        "requests that may wait; more get 503 with Retry-After (Ollama's OLLAMA_MAX_QUEUE is 512 too)", 512
    )
    timeout_ns: int = duration("longest wait before 503", 300 * SECOND_NS, low=MS_NS)


@dataclass(frozen=True, slots=True)
class Alias:
    """A name that stands for others (`[alias]`); all as the operator wrote them."""

    name: str
    models: tuple[str, ...]  # what is asked for: the first that a live server has


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Where one model is to be (`[[models]]`)."""

    name: str = setting(Kind.TEXT, "the model, as `ollama pull` names it")
    copies: int | None = count(
        "on how many servers it is to be on disk; left out: on all of `servers`, or on one if that is empty",
        None,
        low=1,
        high=1024,
    )
    servers: tuple[str, ...] = setting(
        Kind.TEXTS, "the names of the only servers that it is placed on; empty: any may be chosen", ()
    )
    warm: bool = setting(
        Kind.FLAG, "keep it loaded wherever it is placed, so that nobody waits for a load", default=False
    )
    prune: bool = setting(
        Kind.FLAG,
        "delete it from servers that it is not placed on, once every copy is where it is to be; nothing is ever "
        "deleted otherwise",
        default=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """How models are brought to where they are declared to be (`[placement]`)."""

    replace_after_ns: int = duration(
        "how long the copies of a dead server still count, before others are pulled in their place: a restart is "
        "not worth moving gigabytes",
        900 * SECOND_NS,
    )
    retry_ns: int = duration(
        "after a pull, load or deletion that failed, until it is tried again; doubles up to retry_max",
        30 * SECOND_NS,
        low=SECOND_NS,
    )
    retry_max_ns: int = duration("longest pause between two tries", 3600 * SECOND_NS, low=SECOND_NS)
    stall_ns: int = duration(
        "one that tells of no progress for so long is given up; checking a large download says nothing for minutes",
        600 * SECOND_NS,
        low=SECOND_NS,
    )
    warm_every_ns: int = duration(
        "how often a model that is to stay loaded is asked to, since each client's request sets another end; "
        "shorter than the servers' OLLAMA_KEEP_ALIVE",
        120 * SECOND_NS,
        low=SECOND_NS,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything the core needs to know; validated when it was parsed and not checked again."""

    servers: tuple[ServerSettings, ...] = ()
    models: tuple[ModelSettings, ...] = ()
    routes: Mapping[str, RouteSettings] = field(default_factory=lambda: MappingProxyType({}))
    aliases: Mapping[str, Alias] = field(default_factory=lambda: MappingProxyType({}))  # by `ollama.canonical_model`
    race: RaceSettings = section(
        "races and hedges: several servers get the request, the best stream is returned", RaceSettings
    )
    selection: SelectionSettings = section("who is asked first", SelectionSettings)
    health: HealthSettings = section("the health value and the reliability record", HealthSettings)
    probe: ProbeSettings = section("active checks", ProbeSettings)
    timeouts: TimeoutSettings = section("how long an attempt may take at each step", TimeoutSettings)
    retry: RetrySettings = section("retries before anything was sent to the client", RetrySettings)
    queue: QueueSettings = section("requests that wait for a server with room", QueueSettings)
    placement: PlacementSettings = section(
        "how models are brought to where [[models]] wants them", PlacementSettings
    )

    def route(self, name: str) -> RouteSettings:
        """Return the settings of the route called `name` (a path of `lbcore.ollama.ROUTES`, or "*" for the rest)."""
        return self.routes.get(name) or self.routes.get("*") or _SEQUENTIAL


_SEQUENTIAL: Final = RouteSettings()
