"""What a fake server is asked to do, and what it tells of it. Pure; times are int ns."""

from dataclasses import dataclass
from enum import StrEnum

from simulator.fakes.specs import RunnerOptions


class Work(StrEnum):
    """What a job needs its model for."""

    GENERATE = "generate"  # a slot, until the answer ends
    LOAD = "load"  # only that it is in memory


@dataclass(frozen=True, slots=True)
class Job:
    """One request that needs a model. Ids are the driver's, and never reused.

    `marks` are the token counts that the driver wants to be told of, ascending; at the last one the answer is whole.
    """

    id: int
    model: str
    options: RunnerOptions
    keep_alive_ns: int
    work: Work = Work.GENERATE
    marks: tuple[int, ...] = ()
    prompt_tokens: int = 0
    blocks: tuple[int, ...] = ()  # of the prompt, as in `simulator.workloads.asks.Ask`
    poison: bool = False  # its first token is the end of the runner


@dataclass(frozen=True, slots=True)
class Started:
    """The job has what it asked for; from here on the answer is made. `end` it when it is over."""

    job_id: int
    at_ns: int
    model: str


@dataclass(frozen=True, slots=True)
class Token:
    """The job's answer has come to one of its marks."""

    job_id: int
    at_ns: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Crashed:
    """The runner that the job was on, or waited for, is gone. The job is forgotten."""

    job_id: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The cold queue is full: 503. The job is forgotten."""

    job_id: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load has ended well."""

    model: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A model has left the memory."""

    model: str
    at_ns: int


Notice = Started | Token | Crashed | Refused | Loaded | Unloaded
