"""What can come of a request to a fake Ollama: a reply, lines in their time, or a job for its scheduler. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from simulator.fake_ollama import FakeModel, FakeOllama, Job, Notice
from simulator.fakes.answers import Answer

HeaderPairs = tuple[tuple[bytes, bytes], ...]

JSON_CHARSET: HeaderPairs = ((b"Content-Type", b"application/json; charset=utf-8"),)
JSON: HeaderPairs = ((b"Content-Type", b"application/json"),)
NDJSON: HeaderPairs = ((b"Content-Type", b"application/x-ndjson"),)


class Upload(NamedTuple):
    """What is kept of the body of a blob (`simulator.fakes.blobs`)."""

    digest: str  # "sha256:…"
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Request:
    """A request as far as Ollama looks at it."""

    method: str
    path: str
    host: str = "localhost"
    origin: str | None = None
    body: bytes = b""
    content_type: str = ""
    upload: Upload | None = None  # in place of the body


class Moment(NamedTuple):
    """When a request came (ns: the state's clock, and wall clock), and its number on this server."""

    now_ns: int
    wall_ns: int
    serial: int


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer. Date and framing are for the driver, by Go's rule: chunked above 2,048 bytes."""

    status: int
    headers: HeaderPairs = ()
    body: bytes = b""
    chunked: bool = False  # even if short
    notices: tuple[Notice, ...] = ()  # what the request did to the scheduler


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer that needs a model first."""

    job: Job
    answer: Answer
    headers: HeaderPairs = ()  # CORS
    failure: Reply | None = None  # what comes of it instead, once the model is loaded


class Step(NamedTuple):
    """One line of a stream, and how long after the one before it (ns) it comes."""

    after_ns: int
    line: bytes


@dataclass(frozen=True, slots=True)
class Lines:
    """An answer that takes its time, but no model. A client that leaves before the end has changed nothing."""

    steps: tuple[Step, ...]  # at least one
    headers: HeaderPairs = NDJSON
    puts: FakeModel | None = None  # on disk from the last line on
    single: Reply | None = None  # what is sent at the end in place of all the lines


Result = Reply | Generation | Lines
Handler = Callable[[FakeOllama, Request, Moment], Result]


def in_order(headers: HeaderPairs) -> HeaderPairs:
    """Return headers as Go writes them: sorted, but several of a name (Vary) as they were."""
    return tuple(sorted(headers, key=lambda pair: pair[0]))
