"""Random scenarios (swarm testing: Groce, Zhang, Eide, Chen, Regehr, ISSTA 2012), as the tables of a file. Pure.

A scenario in which everything may happen seldom shows what needs one thing to happen again and again. So each scenario
first turns kinds of settings, clients and faults on and off, and then draws within what is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Protocol, TypeVar

from simulator.fault_tables import PAUSE
from simulator.faults import FaultKind
from simulator.network import LinkFaultKind

_T = TypeVar("_T")

Tables = dict[str, Any]
"""A scenario, or a part of one, as it stands in a TOML file."""


class Dice(Protocol):
    """Where a scenario's choices come from: a seed, or whoever wants to make a failing one smaller."""

    def pick(self, options: Sequence[_T]) -> _T:
        """Return one of the options; the first is the simplest."""

    def whole(self, low: int, high: int) -> int:
        """Return a whole number, both bounds included; the lowest is the simplest."""

    def chance(self, share: float) -> bool:
        """Return True with this probability; False is simpler."""


class SeededDice:
    """Choices that a seed makes."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(f"swarm {seed}")

    def pick(self, options: Sequence[_T]) -> _T:
        """Return one of the options."""
        return options[self._rng.randrange(len(options))]

    def whole(self, low: int, high: int) -> int:
        """Return a whole number, both bounds included."""
        return self._rng.randint(low, high)

    def chance(self, share: float) -> bool:
        """Return True with this probability."""
        return self._rng.random() < share


ONE, TWO, NOBODYS, ALIAS = "one:latest", "two:latest", "nobodys:latest", "any"
_QUIET_S = 25
"""How long after the last fault the last clients come: by then every server must have been found again."""


def draw_scenario(dice: Dice) -> Tables:
    """Return a short scenario of one to six servers: all is well in the end, and then a few clients come once more."""
    duration_s = dice.whole(5, 20)
    two_models = dice.chance(0.5)
    tight = two_models and dice.chance(0.5)  # a server can hold one of them at a time
    names = [f"s{i + 1}" for i in range(dice.whole(1, 6))]
    settings = _settings(dice)
    tables: Tables = {
        "about": "drawn at random",
        "duration": f"{duration_s}s",
        "settle": "1800s",
        **settings,
        "fleet": _fleet(dice, names, two_models=two_models, tight=tight),
        "workload": _workloads(dice, duration_s, two_models=two_models),
    }
    network = _network(dice)
    if network:
        tables["network"] = network
    faults = _faults(dice, names, duration_s)
    if faults:
        tables["fault"] = faults
    models = _models(dice, names)  # drawn last, so that older seeds are what they were but for these
    if models:
        tables["models"] = models
    if dice.chance(0.3):  # drawn last, so that all else of a seed is as without it
        _name_by_alias(dice, tables)
    return tables


def _models(dice: Dice, names: Sequence[str]) -> list[Tables]:
    """Return what placement is to do meanwhile: also what makes it harder for clients."""
    if not dice.chance(0.3):
        return []
    return [_model(dice, model, names) for model in (ONE, TWO, "three:latest") if dice.chance(0.5)]


def _model(dice: Dice, model: str, names: Sequence[str]) -> Tables:
    table: Tables = {"name": model, "copies": dice.whole(1, len(names))}
    if dice.chance(0.5):
        servers = [name for name in names if dice.chance(0.5)]
        table |= {"servers": servers, "copies": min(table["copies"], len(servers) or len(names))}
    return {**table, "warm": dice.chance(0.5), "prune": dice.chance(0.5)}


# --- servers -----------------------------------------------------------------------------------------------------


def _fleet(dice: Dice, names: Sequence[str], *, two_models: bool, tight: bool) -> list[Tables]:
    cold = dice.chance(0.4)
    unequal = dice.chance(0.5)
    forgetful = dice.chance(0.25)
    busy = dice.chance(0.3)
    capped = dice.chance(0.4)
    reads = dice.chance(0.3)
    common = _speeds(dice)
    fleet = []
    for i, name in enumerate(names):
        on_disk = [ONE]
        if two_models:
            on_disk = [ONE, TWO] if i == 0 else dice.pick([[ONE, TWO], [ONE], [TWO]])
        loaded = on_disk[:1] if tight else on_disk
        if cold:
            loaded = dice.pick([loaded, []])
        models: list[Any] = [{"name": model, "size": "18GB"} for model in on_disk] if tight else [*on_disk]
        table: Tables = {"name": name, "models": models, "loaded": [*loaded]}
        table |= _speeds(dice) if unequal else common
        if forgetful:
            table["keep_alive"] = dice.pick(["300s", "2s", "300ms"])
        if busy:
            table["queue_max"] = dice.pick([512, 0, 2])
        if capped:
            table["in_flight_max"] = dice.pick([8, 1, 2, 3, 32])
        if reads:
            table |= {"prefill": 2000.0, "batch_slowdown": 0.1}
        fleet.append(table)
    return fleet


def _speeds(dice: Dice) -> Tables:
    return {
        "slots": dice.pick([4, 1, 2, 8]),
        "first_token": dice.pick(["50ms", "20ms", "200ms"]),
        "token": dice.pick(["5ms", "2ms", "20ms"]),
        "load": dice.pick(["500ms", "100ms", "3s"]),
    }


# --- the balancer ------------------------------------------------------------------------------------------------


def _settings(dice: Dice) -> Tables:
    """Return the tables of the configuration; those that are left out stay at their defaults."""
    drawn = {
        "race": _race(dice) if dice.chance(0.6) else {},
        "selection": {"policy": dice.pick(["expected-first-token", "health"]), "forget": dice.pick(["120s", "1s"])}
        if dice.chance(0.3)
        else {},
        "health": _health(dice) if dice.chance(0.4) else {},
        "probe": _probe(dice) if dice.chance(0.5) else {},
        "timeouts": _timeouts(dice),
        "retry": {"budget": dice.pick([0.2, 0.0, 1.0]), "budget_min": dice.pick([3, 0, 1, 20])}
        if dice.chance(0.4)
        else {},
        "queue": {"length_max": dice.pick([512, 0, 1, 10]), "timeout": dice.pick(["300s", "500ms", "3s"])}
        if dice.chance(0.3)
        else {},
    }
    if dice.chance(0.3):
        drawn["routes"] = {"/api/chat": dice.pick(["race", "hedge", "sequential"])}
    return {name: table for name, table in drawn.items() if table}


def _race(dice: Dice) -> Tables:
    racers_min = dice.pick([1, 1, 2, 3])
    delays = sorted((dice.pick([50, 5, 500]), dice.pick([500, 20, 2000])))
    return {
        "winner": dice.pick(["first-token", "most-tokens", "first-finish"]),
        "measure": dice.pick(["100ms", "2s", "1ms"]),
        "racers_min": racers_min,
        "racers_max": racers_min + dice.pick([1, 0, 3]),
        "utilisation_max": dice.pick([0.3, 1.0, 0.0]),
        "budget": dice.pick([1.0, 0.1, 0.0, 5.0]),
        "hedges_max": dice.pick([1, 0, 3]),
        "hedge_delay_min": f"{delays[0]}ms",
        "hedge_delay_initial": f"{delays[1]}ms",
        "hedge_delay_max": f"{delays[1] * dice.pick([1, 10])}ms",
    }


def _health(dice: Dice) -> Tables:
    return {
        "value_max": dice.pick([100.0, 5.0]),
        "failure_divisor": dice.pick([2.0, 1.5, 100.0]),
        "resurrect": dice.pick([0.05, 0.0, 1.0]),
        "losses_max": dice.pick([4, 1]),
        "second_chance": dice.pick(["30s", "1s", "0s"]),
    }


def _probe(dice: Dice) -> Tables:
    first_ms = dice.pick([1000, 100])
    return {
        "interval": dice.pick(["10s", "1s", "5s"]),
        "interval_dead": f"{first_ms}ms",
        "interval_dead_max": f"{first_ms * dice.pick([10, 1])}ms",
        "timeout": dice.pick(["5s", "1s"]),
        "fall": dice.pick([2, 1, 4]),
    }


def _timeouts(dice: Dice) -> Tables:
    """Return timeouts that are shorter than the defaults, most of them, so that runs are."""
    if dice.chance(0.5):
        return {"first_token_warm": "15s", "first_token_cold": "30s", "silence": "5s", "answer": "30s"}
    return {
        "connect": dice.pick(["3s", "100ms", "500ms"]),
        "first_token_warm": dice.pick(["2s", "300ms"]),
        "first_token_cold": dice.pick(["30s", "2s", "600s"]),
        "silence": dice.pick(["5s", "200ms", "60s"]),
        "answer": dice.pick(["30s", "1s", "900s"]),
    }


# --- clients -----------------------------------------------------------------------------------------------------


def _workloads(dice: Dice, duration_s: int, *, two_models: bool) -> list[Tables]:
    common: Tables = {"prompt_tokens": dice.pick([100, 10, 3000])}
    common["output_tokens"] = dice.pick([40, 1, 5, {"min": 1, "max": 150}])
    if two_models:
        common["models"] = {ONE: 0.5, TWO: 0.5}
    else:
        common["models"] = {ONE: 0.9, NOBODYS: 0.1} if dice.chance(0.15) else ONE
    last = {"kind": "herd", "at": f"{duration_s + _QUIET_S}s", "requests": 3, **common}
    if dice.chance(0.3):
        common["stream"] = dice.pick([0.5, 0.0])
    if dice.chance(0.2):
        common["num_ctx"] = {"default": 0.7, "8192": 0.3}
    if dice.chance(0.3):
        common["leave"] = {"share": dice.pick([0.3, 1.0]), "after": dice.pick(["100ms", "20ms", {"mean": "1s"}])}
    if dice.chance(0.15):
        common["poison"] = dice.pick([0.05, 0.3])
    n = dice.whole(20, 60)
    return [_clients(dice, n, duration_s) | common, last]


def _clients(dice: Dice, n: int, duration_s: int) -> Tables:
    kind = dice.pick(["poisson", "even", "gamma", "herd", "sessions"])
    if kind == "herd":
        return {"kind": kind, "at": dice.pick(["1s", "0s", "3s"]), "requests": n}
    if kind == "sessions":
        talk: Tables = {"users": max(1, n // 5), "turns": 4, "think": {"mean": "500ms"}, "new_tokens": 50}
        return {"kind": kind, "requests": n, "duration": f"{duration_s}s", **talk}
    table: Tables = {"kind": kind, "requests": n, "rate": n / duration_s * dice.pick([1.2, 5.0])}
    return table | {"cv": 4.0} if kind == "gamma" else table


def _name_by_alias(dice: Dice, tables: Tables) -> None:
    """Let clients ask for an alias, or for a model that has others to fall back on."""
    chain = dice.pick([[TWO, ONE], [NOBODYS, ONE], [ONE, TWO], [ONE]])
    tables["alias"] = dice.pick([{ALIAS: chain}, {ONE: [ONE, TWO]}, {TWO: [TWO, ONE], ALIAS: [TWO]}])
    share = dice.pick([1.0, 0.5])
    asked = ALIAS if ALIAS in tables["alias"] else ONE
    clients, *_ = tables["workload"]
    others = clients["models"] if isinstance(clients["models"], dict) else {clients["models"]: 1.0}
    mixed = {name: weight * (1.0 - share) for name, weight in others.items()} if share < 1.0 else {}
    clients["models"] = {**mixed, asked: mixed.get(asked, 0.0) + share}


# --- what goes wrong ---------------------------------------------------------------------------------------------


def _network(dice: Dice) -> Tables:
    if not dice.chance(0.3):
        return {}
    table = {"latency": dice.pick(["100us", "5ms", "20ms"]), "jitter": dice.pick(["0s", "1ms", "10ms"])}
    return {**table, "loss": dice.pick([0.0, 0.02])}


_FAULTS = (*FaultKind, *LinkFaultKind, PAUSE)


def _faults(dice: Dice, names: Sequence[str], duration_s: int) -> list[Tables]:
    if dice.chance(0.15):
        return []
    kinds = [kind for kind in _FAULTS if dice.chance(0.12)]
    return [_fault(dice, kind, names, duration_s) for kind in kinds for _ in range(dice.pick([1, 2]))]


def _fault(dice: Dice, kind: str, names: Sequence[str], duration_s: int) -> Tables:
    from_ms = dice.pick([dice.whole(0, 1000 * duration_s - 1), 0])
    most_ms = 1000 * duration_s - from_ms
    until_ms = from_ms + min(most_ms, dice.pick([1000, 100, 5000, most_ms]))
    fault: Tables = {"kind": str(kind), "from": f"{from_ms}ms", "until": f"{until_ms}ms"}
    if kind == PAUSE:
        return fault
    wide = dice.pick(["one", "some", "all"])
    one = dice.pick(names)
    fault["servers"] = [one] if wide == "one" else [n for n in names if wide == "all" or n == one or dice.chance(0.5)]
    if kind in {FaultKind.SLOW, FaultKind.CRAWL}:
        fault["factor"] = dice.pick([10.0, 3.0, 100.0])
    elif kind is FaultKind.FLAP:
        period_ms = dice.pick([2000, 200, 1000])
        fault |= {"period": f"{period_ms}ms", "up": f"{period_ms * dice.pick([5, 1, 9]) // 10}ms"}
    elif kind in _MIDSTREAM:
        fault["after_tokens"] = dice.pick([3, 0, 1, 30])
    elif kind is LinkFaultKind.LATENCY:
        fault["latency"] = dice.pick(["50ms", "1s"])
    elif kind is LinkFaultKind.LOSS:
        fault["loss"] = dice.pick([0.1, 0.5])
    return fault


_MIDSTREAM = frozenset(kind for kind in FaultKind if kind.endswith("midstream"))
