"""How fast common hardware is: named profiles, and the speed of a model of any size under one of them. Pure.

The figures, each with its source, are in `profiles.toml`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

from lbcore.parsing import ABSENT, Problem, choice_fix, parse_table, quote
from lbcore.schema import Kind, count, duration, join, ratio, setting, size
from simulator.fakes.engine import Speed

BYTES_PER_PARAMETER = 0.61
"""Of a Q4_K_M model: 4.58 GiB for 8.03 billion, 39.6 GiB for 70.6 (XiongjieDai/GPU-Benchmarks-on-LLM-Inference)."""

VRAM_SHARE = 0.9
"""What of a GPU's memory a model's weights may take; the rest is for its context and for the driver."""

_INTERFERENCE_MAX = 0.999
_NS_PER_S = 1_000_000_000
_HOST = "cpu"  # what computes the layers that do not fit into a GPU's memory


class ProfileError(ValueError):
    """There is no such profile, or a model without a size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """What one profile does with models of one size; a `[[name.models]]` table."""

    parameters: float = ratio("billions of parameters, at Q4", low=0.01, high=10_000)
    prefill: float = ratio("prompt tokens per s", low=0.001)
    prefill_source: str = setting(Kind.TEXT, "where the figure is from")
    decode: float = ratio("tokens per s of one stream", low=0.001)
    decode_source: str = setting(Kind.TEXT, "where the figure is from")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFigures:
    """What does not depend on a model's size; a `[name]` table."""

    about: str = setting(Kind.TEXT, "what it is")
    vram: int = size("memory for models; 0: no GPU")
    vram_source: str = setting(Kind.TEXT, "where the figure is from")
    first_token_ns: int = duration("before a first token, apart from reading the prompt", high=60 * _NS_PER_S)
    first_token_source: str = setting(Kind.TEXT, "where the figure is from")
    load_fixed_ns: int = duration("of a load, whatever the size", high=600 * _NS_PER_S)
    load_fixed_source: str = setting(Kind.TEXT, "where the figure is from")
    load_rate: int = size("bytes per s from disk to memory", low=1)
    load_rate_source: str = setting(Kind.TEXT, "where the figure is from")
    batch_slowdown: float = ratio("share that each further stream of a batch adds to the time of a token", high=100)
    batch_slowdown_source: str = setting(Kind.TEXT, "where the figure is from")
    prefill_chunk: int = count("tokens of a prompt read at a time, for which decoding waits", low=1, high=1_000_000)
    prefill_chunk_source: str = setting(Kind.TEXT, "where the figure is from")


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of hardware."""

    name: str
    figures: ProfileFigures
    models: tuple[ModelFigures, ...]  # the smallest first

    @property
    def vram_bytes(self) -> int:
        """Memory for models; 0: no GPU."""
        return self.figures.vram


def profile_names() -> tuple[str, ...]:
    """Return the names of all profiles."""
    return tuple(_profiles())


def profile(name: str) -> Profile:
    """Return a profile. Raises `ProfileError`."""
    try:
        return _profiles()[name]
    except KeyError:
        known = _profiles()
        raise ProfileError(f"{quote(name)} is no profile; {choice_fix(name, list(known))}") from None


@lru_cache(maxsize=1)
def _profiles() -> Mapping[str, Profile]:
    problems: list[Problem] = []
    raw = tomllib.loads(files("simulator").joinpath("profiles.toml").read_text(encoding="utf-8"))
    found = parse_profiles(raw, problems)
    if problems:
        raise ProfileError("; ".join(map(str, problems)))
    return found


def parse_profiles(raw: Mapping[str, Any], problems: list[Problem], key: str = "") -> dict[str, Profile]:
    """Return the profiles of a table of `[name]` tables, which stands at `key`; append every problem found."""
    found = {name: _parse_profile(name, table, join(key, name), problems) for name, table in raw.items()}
    return {name: parsed for name, parsed in found.items() if parsed is not None}


def _parse_profile(name: str, raw: Any, key: str, problems: list[Problem]) -> Profile | None:
    plain = {field: value for field, value in raw.items() if field != "models"} if isinstance(raw, Mapping) else raw
    figures = parse_table(ProfileFigures, plain, key, problems, also=((key, "models"),))
    rows = raw.get("models", ABSENT) if isinstance(raw, Mapping) else ABSENT
    if not isinstance(rows, list) or not rows:
        fix = f"write [[{join(key, 'models')}]] tables"
        problems.append(Problem(join(key, "models"), rows, "is not a list of tables", fix))
        return None
    parsed = [parse_table(ModelFigures, row, f"{join(key, 'models')}[{at}]", problems) for at, row in enumerate(rows)]
    models = sorted((row for row in parsed if row is not None), key=lambda row: row.parameters)
    if any(small.parameters == large.parameters for small, large in pairwise(models)):
        problems.append(Problem(join(key, "models"), rows, "has two tables for one size", "leave one out"))
        return None
    return Profile(name, figures, tuple(models)) if figures and models else None


# --- the speed of a model ------------------------------------------------------------------------------------------


def speed_of(
    hardware: Profile, *, parameters: float | None = None, size_bytes: int | None = None, host: Profile | None = None
) -> Speed:
    """Return the speed of a model of so many billion parameters, or of so many bytes at Q4.

    What of it does not fit into the memory is computed by the `host` (the profile "cpu" unless another is given), as
    Ollama does it: the layers follow one another, so that the times of both parts add up.
    """
    if parameters is None:
        if size_bytes is None:
            raise ProfileError("neither parameters nor size_bytes is given")
        parameters = size_bytes / BYTES_PER_PARAMETER / 1e9
    if not 0 < parameters < math.inf:
        raise ProfileError(f"a model of {parameters:g} billion parameters has no speed")
    prefill, decode = _rates(hardware.models, parameters)
    share = fitting_share(hardware, round(parameters * 1e9 * BYTES_PER_PARAMETER))
    if share < 1:
        host_prefill, host_decode = _rates((host or profile(_HOST)).models, parameters)
        prefill = 1 / (share / prefill + (1 - share) / host_prefill)
        decode = 1 / (share / decode + (1 - share) / host_decode)
    figures = hardware.figures
    return Speed(
        first_token_ns=figures.first_token_ns,
        prefill_rate=prefill,
        token_ns=round(_NS_PER_S / decode),
        batch_slowdown=figures.batch_slowdown,
        prefill_interference=_interference(prefill, decode, figures.prefill_chunk),
        load_fixed_ns=figures.load_fixed_ns,
        load_rate=float(figures.load_rate),
    )


def fitting_share(hardware: Profile, size_bytes: int) -> float:
    """Return the share of a model that a GPU holds; 1 without a GPU, where nothing is spilled."""
    return min(1.0, hardware.vram_bytes * VRAM_SHARE / size_bytes) if hardware.vram_bytes else 1.0


def _interference(prefill: float, decode: float, chunk: int) -> float:
    """Return the share of its speed that decoding loses while a prompt is read: it makes one token for each chunk."""
    return min(_INTERFERENCE_MAX, max(0.0, 1 - prefill / chunk / decode))


def _rates(models: Sequence[ModelFigures], parameters: float) -> tuple[float, float]:
    """Return prefill and decode rates, on the line through the logarithms of the two nearest sizes."""
    if len(models) == 1:
        factor = models[0].parameters / parameters
        return models[0].prefill * factor, models[0].decode * factor
    above = next((at for at, row in enumerate(models) if row.parameters >= parameters), len(models) - 1)
    small, large = models[max(0, above - 1)], models[max(1, above)]
    at = math.log(parameters / small.parameters) / math.log(large.parameters / small.parameters)
    return (small.prefill * (large.prefill / small.prefill) ** at, small.decode * (large.decode / small.decode) ** at)
