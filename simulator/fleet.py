"""`[[fleet]]` tables into the `FakeSpec`s of fake servers, with every problem found. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lbcore.ollama import canonical_model
from lbcore.parsing import Keys, Problem, choice_fix, parse_table
from lbcore.schema import MS_NS, SECOND_NS, Kind, count, duration, join, ratio, setting, size
from lbcore.units import format_size
from simulator.fakes.specs import FakeModel, FakeSpec, memory_bytes, model_key, runner_options
from simulator.fault_tables import fault_keys, parse_server_faults
from simulator.profiles import Profile, ProfileError, profile, profile_names, speed_of

# schema functions declare fields; they do not make shared mutable values

DEFAULT_MODEL = "llama3.2:latest"
SKILLS = ("tools", "thinking", "vision", "audio", "insert")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTable:
    """One `[[fleet]]` table, without its lists."""

    name: str = setting(Kind.TEXT, "how the server is called, here and in the balancer")
    profile: str = setting(Kind.TEXT, "hardware whose speeds and memory it has (profiles.toml); empty: none", "")
    port: int = count("where it listens on loopback; 0 takes a free port", 0, high=65535)
    slots: int = count("requests one model serves at once (OLLAMA_NUM_PARALLEL)", 1, low=1, high=1024)
    queue_max: int = count("requests that may wait for a model to load (OLLAMA_MAX_QUEUE)", 512)
    in_flight_max: int = count("requests that the balancer sends to one model here at once", 8, low=1, high=4096)
    loaded_max: int = count("models in memory at once (OLLAMA_MAX_LOADED_MODELS)", 3, low=1)
    vram: int | None = size("memory for models; 0 is a server without a GPU", None)
    first_token_ns: int = duration("from the slot to the first token", 50 * MS_NS, high=3600 * SECOND_NS)
    token_ns: int = duration("between two tokens", 5 * MS_NS, high=3600 * SECOND_NS)
    load_ns: int = duration("time to load a model, whatever its size", 2 * SECOND_NS, high=3600 * SECOND_NS)
    load_rate: int | None = size("bytes per s from disk to memory, on top of load", None, low=1)
    prefill: float | None = ratio("prompt tokens read per s, on top of first_token", None, low=0.001)
    batch_slowdown: float = ratio("share of token that each further stream of a batch adds", 0.0, high=100.0)
    prefill_interference: float = ratio("share of its speed that decoding loses while a prompt is read", 0.0, high=0.99)
    tokens: int = count("length of an answer unless the client says", 60, low=1, high=1_000_000)
    keep_alive_ns: int = duration("how long an idle model stays in memory", 300 * SECOND_NS)
    version: str = setting(Kind.TEXT, "what /api/version says", "0.12.6")
    seed: int = count("of the answers' text; servers with the same seed give the same answers", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTable:
    """One model of a fake server, as a table."""

    name: str = setting(Kind.TEXT, "its name")
    num_ctx: int = count("context that it is loaded with unless asked otherwise", 4096, low=1)
    kv: int = size("memory for each token of its context", 0)
    size: int = size("memory that it takes", 5_000_000_000, low=1)
    embedding: int = count("numbers in an embedding, if it gives those; 0: it gives text", 0, high=65536)
    can: tuple[str, ...] = setting(Kind.TEXTS, "what it can do besides: tools, thinking, vision, audio, insert", ())


_LISTS: tuple[str, ...] = ("models", "loaded", "fault")


def parse_fleet(
    tables: Sequence[Mapping[str, Any]], problems: list[Problem], *, end_ns: int | None = None
) -> tuple[FakeSpec, ...]:
    """Return the fake servers that the `[[fleet]]` tables describe; append every problem found.

    `end_ns` is when the run ends, if it does.
    """
    parsed = [_parse_fake(table, f"fleet[{index}]", problems, end_ns) for index, table in enumerate(tables)]
    specs = [(f"fleet[{index}]", spec) for index, spec in enumerate(parsed) if spec is not None]
    _refuse_duplicates(specs, problems)
    return tuple(spec for _, spec in specs)


def _parse_fake(raw: Mapping[str, Any], key: str, problems: list[Problem], end_ns: int | None) -> FakeSpec | None:
    plain = {name: value for name, value in raw.items() if name not in _LISTS}
    also: Keys = (*((key, name) for name in _LISTS), *fault_keys(f"{key}.fault"))
    table = parse_table(FleetTable, plain, key, problems, also=also)
    models = _parse_models(raw.get("models", [DEFAULT_MODEL]), join(key, "models"), problems)
    loaded = _parse_names(raw.get("loaded", []), join(key, "loaded"), problems)
    faults = parse_server_faults(raw.get("fault", []), join(key, "fault"), problems, end_ns=end_ns)
    if models is not None:
        _refuse_absent(loaded, [model.name for model in models], join(key, "loaded"), problems)
    if table is None:
        return None
    hardware = _parse_profile(table, raw, key, problems)
    if any(not "!" <= char <= "~" or char in ",/" for char in table.name) or not table.name:
        problems.append(
            Problem(
                join(key, "name"), table.name, "is no name for a server", "write ASCII without space, comma and slash"
            )
        )
    default_vram = 24_000_000_000 if hardware is None else hardware.vram_bytes
    spec = FakeSpec(
        name=table.name,
        port=table.port,
        num_parallel=table.slots,
        max_queue=table.queue_max,
        in_flight_max=table.in_flight_max,
        max_loaded=table.loaded_max,
        vram_bytes=default_vram if table.vram is None else table.vram,
        first_token_ms=table.first_token_ns / MS_NS,
        token_ms=table.token_ns / MS_NS,
        load_ms=table.load_ns / MS_NS,
        load_rate=math.inf if table.load_rate is None else float(table.load_rate),
        prefill_rate=math.inf if table.prefill is None else table.prefill,
        batch_slowdown=table.batch_slowdown,
        prefill_interference=table.prefill_interference,
        tokens=table.tokens,
        keep_alive_s=table.keep_alive_ns / SECOND_NS,
        version=table.version,
        seed=table.seed,
        models=tuple(models or ()),
        start_loaded=tuple(loaded),
        faults=faults,
    )
    _refuse_too_large(spec, key, problems, spills=hardware is not None)
    if hardware is not None:
        speeds = tuple((model.name, speed_of(hardware, size_bytes=model.size_bytes)) for model in spec.models)
        spec = replace(spec, speeds=speeds)
    return spec


_BY_PROFILE = ("first_token", "token", "load", "load_rate", "prefill", "batch_slowdown", "prefill_interference")


def _parse_profile(table: FleetTable, raw: Mapping[str, Any], key: str, problems: list[Problem]) -> Profile | None:
    """Return the hardware that a table names; what the profile decides must not be written beside it."""
    if not table.profile:
        return None
    problems.extend(
        Problem(join(key, name), raw[name], f"is decided by the profile {table.profile}", "remove the one or the other")
        for name in _BY_PROFILE
        if name in raw
    )
    try:
        return profile(table.profile)
    except ProfileError:
        fix = choice_fix(table.profile, profile_names())
        problems.append(Problem(join(key, "profile"), table.profile, "is not known", fix))
        return None


def _parse_models(raw: Any, key: str, problems: list[Problem]) -> list[FakeModel] | None:
    """Return models that are written as names, or as tables with their sizes; None when one cannot be used."""
    if not isinstance(raw, list) or not all((isinstance(m, str) and m) or isinstance(m, Mapping) for m in raw):
        problems.append(Problem(key, raw, "is not a list of model names", f'write ["{DEFAULT_MODEL}"]'))
        return None
    before = len(problems)
    models: list[FakeModel] = []
    for index, item in enumerate(raw):
        if isinstance(item, str):
            models.append(FakeModel(item))
            continue
        table = parse_table(ModelTable, item, f"{key}[{index}]", problems)
        if table is not None:
            model = FakeModel(
                table.name, size_bytes=table.size, num_ctx=table.num_ctx, kv_bytes_per_token=table.kv
            )
            if table.embedding:
                model = replace(model, embedding_length=table.embedding, capabilities=("embedding",))
            _refuse_unknown(table.can, f"{key}[{index}].can", problems)
            models.append(replace(model, capabilities=(*model.capabilities, *table.can)))
    return models if len(problems) == before else None


def _refuse_unknown(skills: Sequence[str], key: str, problems: list[Problem]) -> None:
    what = "is nothing that a model can do"
    problems.extend(Problem(key, skill, what, choice_fix(skill, SKILLS)) for skill in skills if skill not in SKILLS)


def _parse_names(raw: Any, key: str, problems: list[Problem]) -> list[str]:
    """Return a list of model names."""
    if not isinstance(raw, list) or not all(isinstance(name, str) and name for name in raw):
        problems.append(Problem(key, raw, "is not a list of model names", f'write ["{DEFAULT_MODEL}"]'))
        return []
    return raw


def _refuse_absent(loaded: Sequence[str], models: Sequence[str], key: str, problems: list[Problem]) -> None:
    on_disk = {canonical_model(name) for name in models}
    problems.extend(
        Problem(key, name, "is not among this server's models", "add it to models")
        for name in loaded
        if canonical_model(name) not in on_disk
    )


def _refuse_too_large(spec: FakeSpec, key: str, problems: list[Problem], *, spills: bool) -> None:
    """Refuse what could never be in memory, or not at once. What `spills` computes the rest of a model on its CPU."""
    taken = {model_key(model.name): memory_bytes(model, runner_options(model, None)) for model in spec.models}
    vram, given = spec.vram_bytes, format_size(spec.vram_bytes)
    loaded = [name for name in dict.fromkeys(map(model_key, spec.start_loaded)) if name in taken]
    together = sum(taken[name] for name in loaded)
    if vram and not spills:
        problems += [
            Problem(join(key, "models"), name, f"takes {format_size(n_bytes)}, and vram is {given}",
                    'write more vram, such as "24GB", or a smaller size')
            for name, n_bytes in taken.items() if n_bytes > vram
        ]  # fmt: skip
    if vram and together > vram and len(loaded) > 1:
        message = f"take {format_size(together)} together, and vram is {given}"
        problems.append(Problem(join(key, "loaded"), loaded, message, "let fewer be loaded, or write more vram"))
    if len(loaded) > spec.max_loaded:
        message = f"are {len(loaded)} models, and loaded_max is {spec.max_loaded}"
        problems.append(Problem(join(key, "loaded"), loaded, message, "let fewer be loaded, or raise loaded_max"))


def _refuse_duplicates(specs: Sequence[tuple[str, FakeSpec]], problems: list[Problem]) -> None:
    names: dict[str, str] = {}
    ports: dict[int, str] = {}
    for key, spec in specs:
        if names.setdefault(spec.name, key) != key:
            problems.append(
                Problem(
                    join(key, "name"),
                    spec.name,
                    f"is also the name of {names[spec.name]}",
                    "give each server a name of its own",
                )
            )
        if spec.port and ports.setdefault(spec.port, key) != key:
            problems.append(
                Problem(
                    join(key, "port"), spec.port, f"is also the port of {ports[spec.port]}", "write 0 for a free port"
                )
            )
