"""What a fake server is (models, slots, speeds), and what a request asks of it, in Ollama's own terms. Pure."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from simulator.fakes.engine import Speed
from simulator.faults import Fault

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
FOREVER_NS = 2**63 - 1  # keep_alive < 0, in Go's longest duration: some 292 years


class Prefill(StrEnum):
    """What a model makes of a trailing assistant message (§7.11)."""

    ECHO = "echo"  # goes on from it; the first chunk repeats it (capture: chat_prefill)
    CONTINUE = "continue"  # goes on from it
    IGNORE = "ignore"  # starts anew


@dataclass(frozen=True, slots=True)
class FakeModel:
    """One model on a server's disk."""

    name: str  # with or without its tag
    digest: str = ""  # 64 hex digits; "" makes one from the name
    size_bytes: int = 5_000_000_000
    family: str = "llama"
    parameter_size: str = "8.0B"
    quantization: str = "Q4_K_M"
    context_length: int = 131_072  # what it was trained for
    embedding_length: int = 4096
    num_ctx: int = 4096  # what it is loaded with unless asked otherwise
    kv_bytes_per_token: int = 0  # memory for each token of num_ctx, on top of size_bytes
    modified_at: str = "2026-11-01T12:00:00Z"
    capabilities: tuple[str, ...] = ("completion",)
    prefill: Prefill = Prefill.ECHO


@dataclass(frozen=True, slots=True)
class FakeSpec:
    """One server, all that does not change. Times in ms or s as named.

    `speeds` are those of models that differ from what the fields above it say of all.
    """

    name: str
    models: tuple[FakeModel, ...] = (FakeModel("llama3.2"),)
    start_loaded: tuple[str, ...] = ()  # names of models in memory when it starts
    num_parallel: int = 1  # slots of each loaded model
    max_queue: int = 512  # cold jobs that may wait
    in_flight_max: int = 8  # what the balancer is told: requests that it may send to one model at once
    max_loaded: int = 3  # runners at a time
    vram_bytes: int = 24_000_000_000  # 0: no GPU; everything fits, size_vram is 0
    first_token_ms: float = 50.0  # from the slot to the first token
    token_ms: float = 5.0
    load_ms: float = 2000.0
    prefill_rate: float = math.inf  # prompt tokens/s; inf: reading costs nothing beyond first_token_ms
    batch_slowdown: float = 0.0  # share of token_ms that each further stream of a batch adds
    prefill_interference: float = 0.0  # share of its speed that decoding loses while a prompt is read
    load_rate: float = math.inf  # bytes/s, on top of load_ms
    speeds: tuple[tuple[str, Speed], ...] = ()  # by model name
    tokens: int = 40  # length of an answer unless the client says
    keep_alive_s: float = 300.0
    version: str = "0.12.6"
    seed: int = 0  # of the answers' text: servers with the same seed give the same answers
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    faults: tuple[Fault, ...] = ()

    def speed(self, model: str) -> Speed:
        """Return how fast a model is here."""
        for name, speed in self.speeds:
            if model_key(name) == model_key(model):
                return speed
        return Speed(
            first_token_ns=round(self.first_token_ms * NS_PER_MS),
            prefill_rate=self.prefill_rate,
            token_ns=round(self.token_ms * NS_PER_MS),
            batch_slowdown=self.batch_slowdown,
            prefill_interference=self.prefill_interference,
            load_fixed_ns=round(self.load_ms * NS_PER_MS),
            load_rate=self.load_rate,
        )


def canonical_name(name: str) -> str:
    """Return a model's name with its tag; what Ollama compares, case apart."""
    name = name.strip().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rsplit("/", 1)[-1] else f"{name}:latest"


def model_key(name: str) -> str:
    """Return what identifies a model on a server: its full name, case apart."""
    return canonical_name(name).lower()


# --- what a request asks of a runner ---------------------------------------------------------------------------


class RunnerOptions(NamedTuple):
    """The options that belong to a loaded model; a change of any of them means a reload (§7.5)."""

    num_ctx: int
    num_batch: int = 512
    num_gpu: int = -1
    main_gpu: int = 0
    use_mmap: bool | None = None
    num_thread: int = 0


def runner_options(model: FakeModel, options: Mapping[str, Any] | None) -> RunnerOptions:
    """Return the runner options that a request's `options` come to for this model."""
    defaults = RunnerOptions(min(model.num_ctx, model.context_length))
    asked = {name: options[name] for name in defaults._fields if options and options.get(name) is not None}
    asked = {name: int(value) if name != "use_mmap" else value for name, value in asked.items()}
    if "num_ctx" in asked:
        asked["num_ctx"] = max(1, min(asked["num_ctx"], model.context_length))
    return defaults._replace(**asked)


def memory_bytes(model: FakeModel, options: RunnerOptions) -> int:
    """Return what a model takes of a server's memory when it is loaded with these options."""
    return model.size_bytes + model.kv_bytes_per_token * options.num_ctx


_GO_UNITS_NS = {
    "ns": 1,
    "us": 1000,
    "µs": 1000,  # U+00B5, and below U+03BC: Go takes both
    "μs": 1000,
    "ms": NS_PER_MS,
    "s": NS_PER_S,
    "m": 60 * NS_PER_S,
    "h": 3600 * NS_PER_S,
}
_GO_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_GO_DURATION = re.compile(rf"[-+]?(?:0|(?:{_GO_PART.pattern})+)")


def keep_alive_ns(value: object, default_ns: int) -> int:
    """Parse `keep_alive` as Ollama does. Raises ValueError with Go's own words.

    A number is seconds, a string a Go duration; negative means for ever; None the default.
    """
    if value is None:
        return default_ns
    if isinstance(value, str):
        if _GO_DURATION.fullmatch(value) is None:
            raise ValueError(_bad_duration(value))
        parts = _GO_PART.findall(value)
        total_ns = _at_most_forever(sum(float(number) * _GO_UNITS_NS[unit] for number, unit in parts))
        return FOREVER_NS if value[0] == "-" and total_ns else total_ns
    if isinstance(value, int | float) and not isinstance(value, bool):
        return FOREVER_NS if value < 0 else _at_most_forever(value * float(NS_PER_S))
    raise ValueError(f"Unsupported type: '{value!r}'")


def _at_most_forever(duration_ns: float) -> int:
    return round(duration_ns) if duration_ns < FOREVER_NS else FOREVER_NS


def _bad_duration(text: str) -> str:
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text):
        return f'time: missing unit in duration "{text}"'
    return f'time: invalid duration "{text}"'
