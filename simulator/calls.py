"""One request as whoever watches a balancer from outside knows it."""

from __future__ import annotations

from lbcore.commands import StartAttempt
from lbcore.config import Alias
from lbcore.events import RequestArrived
from lbcore.ollama import canonical_model


class Call:
    """One request, as its client and we know it."""

    __slots__ = (
        "arrived_ns",
        "committed",
        "id",
        "is_over",
        "live",
        "model",
        "options",
        "others",
        "racers_min",
        "tried",
    )

    def __init__(self, arrived: RequestArrived, alias: Alias | None, racers_min: int, now_ns: int) -> None:
        self.id = arrived.request_id
        self.model = canonical_model(arrived.model or "")  # as servers are asked for it at present
        self.others = [canonical_model(name) for name in alias.models] if alias is not None else []  # not tried yet
        self.options = arrived.runner_key
        self.arrived_ns = now_ns
        self.racers_min = racers_min
        self.tried: list[int] = []  # servers
        self.live: dict[int, StartAttempt] = {}
        self.committed: int | None = None  # attempt
        self.is_over = False

    @property
    def waits(self) -> bool:
        """Nobody was asked for it yet."""
        return not self.tried and not self.is_over

    @property
    def races(self) -> bool:
        """Somebody was asked, and it has no answer yet."""
        return bool(self.tried) and self.committed is None and not self.is_over
