"""The records of requests, attempts and servers. Only the balancer (and the fleet it owns) changes them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from lbcore.commands import AttemptKind
from lbcore.compiling import mypyc_attr
from lbcore.config import Alias, RouteSettings, ServerSettings, Winner
from lbcore.events import ActiveModel, ModelInfo, Reason, RequestArrived
from lbcore.ollama import canonical_model
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.states import ATTEMPT_ENDS, AttemptState, Reliability, RequestState, ServerState

TTFT_UNKNOWN_NS: Final = 500 * MS_NS
"""First-token time assumed of a model nobody has used yet; only its ratio to the two below matters."""
LOAD_UNKNOWN_NS: Final = 10 * SECOND_NS
"""Load time assumed before one was seen: a few GB from an SSD."""
SERVICE_UNKNOWN_NS: Final = 5 * SECOND_NS
"""Time a slot is taken by one request, assumed before one was seen."""

# Members bound once: in Python 3.11 a look-up in an enum's class costs more than what the member is used for here.
_CONNECTING: Final = AttemptState.CONNECTING
_QUEUED: Final = RequestState.QUEUED
_HEALTHY: Final = ServerState.HEALTHY
_FIRST_FINISH: Final = Winner.FIRST_FINISH

_SMOOTHING: Final = 0.3
_MEDIAN_OF: Final = 5
_RECENT: Final = 100
_RECOMPUTE_EVERY: Final = 8


def smooth(old: float | None, sample: float) -> float:
    """Return the exponentially weighted mean of `old` and `sample`."""
    return float(sample) if old is None else old + _SMOOTHING * (sample - old)  # an int becomes one when compiled


@mypyc_attr(allow_interpreted_subclasses=True)
class Quantile:
    """The p95 of the last 100 samples, recomputed every 8th."""

    __slots__ = ("_p95", "_samples", "_since")

    def __init__(self) -> None:
        self._samples: deque[int] = deque(maxlen=_RECENT)
        self._since = 0
        self._p95: int | None = None

    def add(self, sample_ns: int) -> None:
        """Take one more sample."""
        self._samples.append(sample_ns)
        self._since += 1
        if self._since >= _RECOMPUTE_EVERY:
            self._since = 0
            ordered = sorted(self._samples)
            self._p95 = ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]

    @property
    def p95(self) -> int | None:
        """The p95, or None before there were 8 samples."""
        return self._p95


@dataclass(slots=True)
class ModelStats:
    """What is known of one model over the whole fleet."""

    first_token: Quantile = field(default_factory=Quantile)
    answer: Quantile = field(default_factory=Quantile)


@mypyc_attr(allow_interpreted_subclasses=True)
class ServerModel:
    """One model on one server: what is on disk and loaded, our requests to it, and how fast it is."""

    __slots__ = (
        "active",
        "available",
        "failed_ns",
        "failing_until_ns",
        "failures",
        "floor_ns",
        "in_flight",
        "known_ns",
        "load_ns",
        "loaded",
        "loading",
        "runner_key",
        "seen_ns",
        "service_ns",
        "token_rate",
        "ttft_ns",
        "ttft_samples",
    )

    def __init__(self) -> None:
        self.available: ModelInfo | None = None
        self.active: ActiveModel | None = None  # as /api/ps last said
        self.loaded = False  # /api/ps said so, or it has just answered us
        self.runner_key: str | None = None  # runner options it was loaded with by us; None: unknown
        self.in_flight = 0
        self.loading = 0  # our attempts that wait for it to be loaded
        self.ttft_samples: deque[int] = deque(maxlen=_MEDIAN_OF)
        self.ttft_ns: int | None = None  # median of the last 5, so that one long prompt does not count
        self.floor_ns = 0  # lower bound from lost races
        self.known_ns = 0  # the higher of the two; 0: nothing is known
        self.seen_ns = 0  # when the two above last changed
        self.failures = 0  # in a row, before a first token; those together count as one
        self.failed_ns = 0  # when the last of them came
        self.failing_until_ns = 0  # others go first until then
        self.load_ns: float | None = None
        self.service_ns: float | None = None
        self.token_rate: float | None = None  # tokens/s

    def is_warm(self, runner_key: str) -> bool:
        """Tell whether a request with these runner options finds its runner loaded."""
        return self.loaded and (self.runner_key is None or self.runner_key == runner_key)

    def note_first_token(self, sample_ns: int, now_ns: int) -> None:
        """Take a measured first-token time; measured beats inferred, so the floor is dropped."""
        self.ttft_samples.append(sample_ns)
        ordered = sorted(self.ttft_samples)
        self.ttft_ns = ordered[len(ordered) // 2]
        self.floor_ns = 0
        self.known_ns = self.ttft_ns
        self.seen_ns = now_ns

    def raise_floor(self, floor_ns: int, now_ns: int) -> None:
        """Take a lower bound of the first-token time; it can only raise the estimate."""
        self.floor_ns = max(self.floor_ns, floor_ns)
        self.known_ns = max(self.known_ns, floor_ns)
        self.seen_ns = now_ns


@mypyc_attr(allow_interpreted_subclasses=True)
class Server:
    """One Ollama server."""

    __slots__ = (
        "breaks",
        "deaths",
        "died_ns",
        "doubted",
        "health",
        "id",
        "in_flight",
        "in_flight_max",
        "last_error",
        "last_error_ns",
        "last_probe_id",
        "last_sync_ns",
        "losses",
        "models",
        "name",
        "outdated",
        "probe_again",
        "probe_failures",
        "probe_id",
        "probe_pause_ns",
        "reliability",
        "revive_from_ns",
        "settings",
        "slots",
        "state",
        "trusted_from_ns",
        "version",
    )

    def __init__(self, server_id: int, settings: ServerSettings) -> None:
        self.id = server_id
        self.name = settings.name
        self.settings = settings
        self.slots = settings.slots
        self.in_flight_max = settings.in_flight_max
        self.state = ServerState.DEAD
        self.health = 0.0
        self.reliability = Reliability.RELIABLE
        self.trusted_from_ns = 0  # while UNRELIABLE: passed over until then
        self.breaks = 0  # streams broken in a row
        self.losses = 0  # races lost in a row without a byte
        self.doubted = False
        self.models: dict[str, ServerModel] = {}
        self.in_flight = 0
        self.version = ""
        self.probe_id = 0  # the probe under way, 0: none
        self.last_probe_id = 0  # the last one that ended well
        self.outdated = False  # something has changed since it was last read
        self.probe_again = False  # something has changed since the probe under way was started
        self.probe_failures = 0
        self.probe_pause_ns = 0
        self.last_sync_ns: int | None = None
        self.last_error = ""
        self.last_error_ns: int | None = None
        self.died_ns: int | None = None
        self.deaths = 0  # by failed requests, since it last served one well
        self.revive_from_ns = 0  # a probe that goes well revives it from then on

    def __repr__(self) -> str:
        return (
            f"<Server {self.name} {self.state} health={self.health:.1f} {self.reliability} in_flight={self.in_flight}"
            f"{' doubted' if self.doubted else ''}>"
        )

    @property
    def is_alive(self) -> bool:
        """Healthy: may be chosen."""
        return self.state is _HEALTHY

    def has(self, model: str) -> bool:
        """Tell whether the model (canonical name) is on this server's disk, as far as is known."""
        record = self.models.get(model)
        return record is not None and (record.available is not None or record.loaded)

    def model(self, model: str) -> ServerModel:
        """Return the record of a model, new if need be."""
        record = self.models.get(model)
        if record is None:
            record = self.models[model] = ServerModel()
        return record


@mypyc_attr(allow_interpreted_subclasses=True)
class Attempt:
    """One try to get a request answered by one server."""

    __slots__ = (
        "answered",
        "cold",
        "detached",
        "due_ns",
        "failure",
        "first_token_ns",
        "full",
        "id",
        "kind",
        "last_chunk_ns",
        "loader",
        "n_bytes",
        "n_tokens",
        "paused",
        "request",
        "server",
        "started_ns",
        "state",
        "target",
        "timer_ns",
    )

    def __init__(
        self, attempt_id: int, request: Request, server: Server, kind: AttemptKind, now_ns: int, due_ns: int = 0
    ) -> None:
        self.id = attempt_id
        self.request = request
        self.server = server
        self.kind = kind
        self.state = _CONNECTING
        model = request.model
        self.target: ServerModel | None
        if model and request.generates:
            self.target = target = server.models.get(model) or server.model(model)
            self.cold = not target.is_warm(request.runner_key)
        else:
            self.target = None
            self.cold = False
        self.loader = False  # the one that makes Ollama load; kept by the ledger
        self.detached = False  # lost its race, but goes on until the model is loaded
        self.answered = False  # failed, but with a whole answer that could be passed on
        self.failure: Failure | None = None
        self.full = False  # as much is held as may be
        self.paused = False  # we do not read, since the client does not, or is still sending its request
        self.started_ns = now_ns
        self.first_token_ns: int | None = None
        self.last_chunk_ns = now_ns
        self.due_ns = due_ns  # when it has taken too long at its present step
        self.timer_ns = due_ns  # when its timer fires, not later than that
        self.n_bytes = 0
        self.n_tokens = 0

    def __repr__(self) -> str:
        where = f"of {self.request.id} on {self.server.name}"
        return f"<Attempt {self.id} {self.kind} {where} {self.state} tokens={self.n_tokens}>"

    @property
    def loads(self) -> bool:
        """Waits for its model to be loaded."""
        return self.cold and self.first_token_ns is None

    @property
    def is_live(self) -> bool:
        """Not ended yet."""
        return self.state not in ATTEMPT_ENDS


@dataclass(frozen=True, slots=True)
class Failure:
    """What became of one attempt, for the error that names them all."""

    server: str
    reason: Reason
    status: int
    detail: str

    def __str__(self) -> str:
        return f"{self.server}: {self.words}"

    @property
    def words(self) -> str:
        """What happened, without saying where."""
        status = f" {self.status}" if self.status >= 400 else ""
        detail = self.detail.removeprefix(f"{self.status} ")  # "404 page not found"
        return f"{self.reason}{status}{': ' if detail else ''}{detail}"


@mypyc_attr(allow_interpreted_subclasses=True)
class AliasUse:
    """How far a request for an alias has come on its chain."""

    __slots__ = ("asked", "attempts_from", "given_up", "models", "name", "sent")

    def __init__(self, alias: Alias) -> None:
        self.models = alias.models
        self.asked = canonical_model(alias.name)
        self.name = ""  # of the model in use, as the operator wrote it
        self.sent = self.asked  # what the body names: at first what the client wrote
        self.given_up: list[str] = []  # models that all live servers were asked for which have them
        self.attempts_from = 0  # the first attempt for the model in use

    def __repr__(self) -> str:
        return f"<AliasUse {self.asked} as {self.name}, given up {self.given_up}>"


@mypyc_attr(allow_interpreted_subclasses=True)
class Request:
    """One request of a client."""

    __slots__ = (
        "alias",
        "arrived_ns",
        "attempts",
        "awaits_sync",
        "committed",
        "event",
        "failures",
        "generates",
        "hedge_delay_ns",
        "hedges_left",
        "id",
        "kind",
        "last_answered",
        "live_attempts",
        "merged",
        "model",
        "raced",
        "route",
        "rule",
        "runner_key",
        "state",
        "stream",
        "suspects",
    )

    def __init__(self, event: RequestArrived, model: str | None, route: RouteSettings, now_ns: int) -> None:
        self.id = event.request_id
        self.event = event
        self.model = model  # canonical; of an alias, the one in use
        self.alias: AliasUse | None = None
        self.kind = event.kind
        self.stream = event.stream
        # an answer that is not streamed has no first token to go by
        self.rule = route.winner if event.stream else _FIRST_FINISH
        self.generates = event.generates
        self.runner_key = event.runner_key
        self.route = route
        self.state = _QUEUED
        self.arrived_ns = now_ns
        self.attempts: list[Attempt] = []
        self.live_attempts: list[Attempt] = []  # those that may still answer it; kept by the ledger
        self.raced = False  # a racer or a hedge was started
        self.merged = False  # the answer is made of those of all attempts, and none of them is committed
        self.committed: Attempt | None = None
        self.failures: list[Failure] = []
        self.suspects: list[tuple[Server, Failure]] = []  # 5xx, blamed once another server answers well
        self.last_answered: Attempt | None = None
        self.hedges_left = 0
        self.hedge_delay_ns = 0
        self.awaits_sync = False  # queued until probes have told whether any server has the model

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.event.route} {self.model} {self.state} attempts={len(self.attempts)}>"

    def has_tried(self, server: Server) -> bool:
        """Tell whether this server was asked already, for the model in use."""
        return any(tried is server for tried in self.tried())

    def tried(self) -> list[Server]:
        """Return the servers that were asked already, for the model in use."""
        attempts = self.attempts if self.alias is None else self.attempts[self.alias.attempts_from :]
        return [attempt.server for attempt in attempts]
