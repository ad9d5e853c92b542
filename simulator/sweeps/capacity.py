"""How much work a scenario offers its fleet, as a share of what the fleet can do: the load. Pure, but for traces.

A server is full when all its slots are taken at all times. At so many requests a second, of mean length, a slot is
taken for the fixed time to the first token, for reading the prompt (the prompts read together share the rate) and for
making the tokens, at the pace of a full batch that is slowed down by reading. The rate at which this fills all slots is
what the server can do; the fleet can do the sum. What this leaves out: loads of models, prompts that are in a cache,
clients that leave, and models that not every server has. So a load is nominal, and the measure by which scenarios are
brought to comparable loads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf

from lbcore.schema import SECOND_NS
from simulator.fakes.specs import FakeSpec, model_key
from simulator.fleet import DEFAULT_MODEL
from simulator.scenario import Scenario
from simulator.workloads.arrivals import Even, Gamma, Mmpp, Poisson
from simulator.workloads.lengths import Amount, Mix
from simulator.workloads.sources import OpenLoop, Sessions, Settings, Trace, make_source

_GRID = 2000  # points at which an amount is looked at for its mean
_ROWS_MAX = 50_000  # rows of a trace that are looked at
_HALVINGS = 60


class LoadError(ValueError):
    """The load of a scenario cannot be told."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one table of a workload asks for, on average."""

    rate: float  # requests per s
    prompt_tokens: float
    output_tokens: float
    models: Mapping[str, float]  # shares


def offered_load(scenario: Scenario) -> float:
    """Return the work that the clients bring, as a share of what the fleet can do; 1.0 is saturation.

    A herd is not a rate and does not count. Raises LoadError when nothing else is asked for, or nobody can answer.
    """
    demands = [d for settings in scenario.workload if (d := demand(settings, scenario.specs)).rate > 0]
    rate = sum(d.rate for d in demands)
    if not rate:
        raise LoadError("has no rate of requests that could be a load")
    models: dict[str, float] = {}
    for d in demands:
        for model, share in d.models.items():
            models[model] = models.get(model, 0.0) + share * d.rate
    prompt = sum(d.prompt_tokens * d.rate for d in demands) / rate
    output = sum(d.output_tokens * d.rate for d in demands) / rate
    capacity = sum(capacity_of(spec, models, prompt, output) for spec in scenario.specs)
    if not capacity:
        raise LoadError("asks for models that no server has")
    return rate / capacity


def capacity_of(spec: FakeSpec, models: Mapping[str, float], prompt_tokens: float, output_tokens: float) -> float:
    """Return how many requests per s, of mean lengths, fill all slots of a server; 0: it has none of the models."""
    known = {model_key(model.name) for model in spec.models}
    weights = {model: weight for model, weight in models.items() if model_key(model) in known}
    total = sum(weights.values())
    if not total:
        return 0.0
    fixed_s = read_s = decode_s = interference = 0.0
    for model, weight in weights.items():
        speed, share = spec.speed(model), weight / total
        batch = 1.0 + speed.batch_slowdown * (spec.num_parallel - 1)
        fixed_s += share * speed.first_token_ns / SECOND_NS
        read_s += share * (0.0 if speed.prefill_rate == inf else prompt_tokens / speed.prefill_rate)
        decode_s += share * max(0.0, output_tokens - 1) * speed.token_ns / SECOND_NS * batch
        interference += share * speed.prefill_interference
    low, high = 0.0, spec.num_parallel / max(1e-9, fixed_s + read_s + decode_s)
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        reading = rate * read_s
        taken = inf
        if reading < 1.0:
            taken = rate * fixed_s + reading / (1.0 - reading) + rate * decode_s / (1.0 - interference * reading)
        low, high = (rate, high) if taken <= spec.num_parallel else (low, rate)
    return low


# --- what a workload asks for ------------------------------------------------------------------------------------


def demand(settings: Settings, specs: Sequence[FakeSpec]) -> Demand:
    """Return what a table of a workload asks for. Users of a closed loop ask as often as unhurried servers let them."""
    if isinstance(settings, Trace):
        return _of_trace(settings)
    models = _shares(settings.traits.models)
    if isinstance(settings, OpenLoop):
        return Demand(_rate_of(settings), mean_of(settings.prompt), mean_of(settings.output), models)
    turns = max(1.0, mean_of(settings.turns))
    new, output = mean_of(settings.new), mean_of(settings.output)
    lengths = [mean_of(settings.prompt) + turn * (new + output) for turn in range(round(turns))]
    prompt = sum(min(length, settings.prompt_max) for length in lengths) / len(lengths)
    return Demand(_rate_of_sessions(settings, turns, prompt, output, models, specs), prompt, output, models)


def mean_of(amount: Amount) -> float:
    """Return the mean of an amount, clamping included."""
    return sum(amount.at((i + 0.5) / _GRID) for i in range(_GRID)) / _GRID


def _shares(mix: Mix[str] | None) -> dict[str, float]:
    if mix is None:
        return {DEFAULT_MODEL: 1.0}
    lower = (0.0, *mix.bounds[:-1])
    return {name: high - low for name, low, high in zip(mix.values, lower, mix.bounds, strict=True)}


def _rate_of(settings: OpenLoop) -> float:
    match settings.arrivals:
        case Poisson(rate) | Gamma(rate, _) | Even(rate):
            return rate
        case Mmpp(low, high, dwell_low_ns, dwell_high_ns):
            return (low * dwell_low_ns + high * dwell_high_ns) / max(1, dwell_low_ns + dwell_high_ns)
    return 0.0


def _rate_of_sessions(
    settings: Sessions,
    turns: float,
    prompt: float,
    output: float,
    models: Mapping[str, float],
    specs: Iterable[FakeSpec],
) -> float:
    if settings.users is None:
        return (settings.rate or 0.0) * turns
    capacities = [(spec.num_parallel, capacity_of(spec, models, prompt, output)) for spec in specs]
    answers_s = [slots / capacity for slots, capacity in capacities if capacity]
    answer_s = sum(answers_s) / len(answers_s) if answers_s else 0.0
    return settings.users / max(1e-9, mean_of(settings.think) / SECOND_NS + answer_s)


def _of_trace(settings: Trace) -> Demand:
    asks = list(islice(make_source((settings,), 0).asks(), _ROWS_MAX))
    if len(asks) < 2 or asks[-1].arrives_ns == asks[0].arrives_ns:
        return Demand(0.0, 0.0, 0.0, {})
    models = Counter(ask.model for ask in asks)
    return Demand(
        (len(asks) - 1) * SECOND_NS / (asks[-1].arrives_ns - asks[0].arrives_ns),
        sum(ask.prompt_tokens for ask in asks) / len(asks),
        sum(ask.output_tokens for ask in asks) / len(asks),
        {model: n / len(asks) for model, n in models.items()},
    )
