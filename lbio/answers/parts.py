"""One large request for embeddings, done by several servers at once: planned, asked for in parts, answered as one.

Each part is a request of its own to the core, so it is retried, queued and blamed as any other; but only servers that
have the same build of the model are asked, since what another one computes cannot be compared. Nothing goes to the
client before all parts have ended well. So whatever goes wrong with that, other than that a server refuses a part,
the request can still go whole, as if it had never been taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio

from lbcore.catalog import same_build
from lbcore.ollama import canonical_model
from lbcore.parts import part_count, ready_at_once, shares
from lbcore.units import counted
from lbio.answers.local import JSON, PLAIN_JSON, LocalAnswer, error_answer
from lbio.answers.own import Ask
from lbio.attempt import AttemptRun
from lbio.client import BodyBudget
from lbio.driver import Driver
from lbio.exchange import ClientRequest, Exchange
from lbio.upstream import Answer
from lbio.wire.inputs import FORMS, Form, Inputs, Portion, find_inputs, join, read_portion

_BUILDS_MAX = 1024


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is taken apart."""

    form: Form
    model: str  # canonical
    digest: str
    servers: tuple[str, ...]  # who may do a part: all that have this build
    inputs: Inputs
    shares: Sequence[int]  # of them, for each part


class Splitter:
    """Plans which requests are taken apart, and how."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._split_above = driver.app.embed.split_above
        self._too_many: dict[str, int] = {}  # by digest: the answers to so many inputs were more than may be held

    def plan(self, ask: Ask) -> Plan | None:
        """Return how a request is taken apart; None: it stays whole."""
        above, form, model = self._split_above, FORMS.get(ask.route.name), ask.facts.model
        if not above or form is None or model is None or ask.is_pinned or len(ask.body) < above * len(b'"",'):
            return None
        name, fleet = canonical_model(model), self._driver.balancer.fleet
        alike = same_build(fleet.holders(name), name)
        n_ready = len(ready_at_once(alike, name, ask.facts.runner_key, self._driver.clock()))
        if n_ready < 2 or (inputs := find_inputs(ask.body, form)) is None:
            return None
        n_parts = part_count(len(inputs), above, n_ready)
        digest = self.digest(alike[0].name, name)
        if n_parts < 2 or len(inputs) >= self._too_many.get(digest, len(inputs) + 1):
            return None
        servers = tuple(server.name for server in alike)
        return Plan(form, name, digest, servers, inputs, shares(len(inputs), n_parts))

    def digest(self, server_name: str, model: str) -> str:
        """Return the build of a model that a server was last seen to have."""
        server = self._driver.balancer.fleet.by_name(server_name)
        record = server.models.get(model) if server is not None else None
        return record.available.digest if record is not None and record.available is not None else ""

    def note_too_many(self, plan: Plan) -> None:
        """So many inputs are not taken apart again: their answers cannot be held."""
        if len(self._too_many) >= _BUILDS_MAX:
            self._too_many.clear()
        n_inputs = len(plan.inputs)
        self._too_many[plan.digest] = min(n_inputs, self._too_many.get(plan.digest, n_inputs))


class _Collected:
    """The answer to a part while it comes: it is held, all of it, for as long as there is room."""

    def __init__(self, answer: Answer, hold: Callable[[int], bool]) -> None:
        self.answer = answer
        self.over = anyio.Event()
        self._hold = hold
        self.has_room = hold(len(answer.held))
        if answer.ended or not self.has_room:
            self.over.set()

    def feed(self, payload: bytes) -> None:
        """Hold the next piece."""
        if self.has_room:
            self.answer.held += payload
            self.has_room = self._hold(len(payload))
        if self.answer.ended or not self.has_room:
            self.over.set()

    def wake(self) -> None:
        """Nothing more comes."""
        self.over.set()


class Parts:
    """The parts of one request while they are under way. `tag` is how its client calls it."""

    def __init__(
        self,
        driver: Driver,
        splitter: Splitter,
        bodies: BodyBudget,
        plan: Plan,
        requests: list[ClientRequest],
        tag: str,
    ) -> None:
        self._driver = driver
        self._splitter = splitter
        self._bodies = bodies
        self._plan = plan
        self._requests = requests  # until they are under way
        self._tag = tag
        self._room_bytes = driver.app.limits.body_bytes_max  # for all answers
        self._held = 0  # bytes, counted in `bodies`
        self._exchanges: list[Exchange] = []
        self._portions: list[Portion | None] = [None] * len(plan.shares)
        self._servers = [""] * len(plan.shares)  # that have answered
        self._is_over = False  # one part has ended all of them
        self._answer: LocalAnswer | None = None

    def __repr__(self) -> str:
        n_done = sum(portion is not None for portion in self._portions)
        return f"<Parts of #{self._tag}: {n_done} of {len(self._plan.shares)} done, {self._held} bytes held>"

    @property
    def n_attempts(self) -> int:
        """All that were made so far."""
        return sum(exchange.n_attempts for exchange in self._exchanges)

    @property
    def servers(self) -> str:
        """Who has answered, in the order of the parts."""
        return ", ".join(dict.fromkeys(name for name in self._servers if name))

    async def run(self) -> LocalAnswer | None:
        """Have all parts done and return the one answer; None: the request is to go whole."""
        requests, self._requests = self._requests, []
        if not self._hold(sum(len(request.body) for request in requests)):
            return None
        names = ", ".join(f"#{request.tag}" for request in requests)
        self._tell(f"{requests[0].head.path} {self._plan.model} in {len(requests)} parts: {names}")
        while requests:
            exchange = self._driver.open(requests.pop(0))
            exchange.on_chosen = self._collect
            self._exchanges.append(exchange)
        async with anyio.create_task_group() as tasks:
            for index in range(len(self._exchanges)):
                tasks.start_soon(self._see_through, index, tasks.cancel_scope)
        if not self._is_over:
            self._answer = self._joined()
        self._stop()
        return self._answer

    def close(self) -> None:
        """Let go of everything: parts under way are cancelled, the answer is written or not wanted any more."""
        self._stop()
        self._bodies.give_back(self._held)
        self._held = 0

    def _stop(self) -> None:
        self._is_over = True
        for exchange in self._exchanges:
            self._driver.close(exchange)
        self._portions.clear()

    def _tell(self, words: str) -> None:
        self._driver.log.note(f"#{self._tag} {words}")

    def _hold(self, n_bytes: int) -> bool:
        has_room = self._bodies.take(n_bytes)
        self._held += n_bytes if has_room else 0
        return has_room

    # --- one part ------------------------------------------------------------------------------------------

    async def _see_through(self, index: int, all_parts: anyio.CancelScope) -> None:
        """Wait for the end of a part; unless it is a good one, it is the end of all of them."""
        exchange, share = self._exchanges[index], self._plan.shares[index]
        answer = await self._read(exchange)
        if self._is_over:
            return
        self._servers[index] = exchange.chosen.endpoint.name if exchange.chosen is not None else ""
        as_planned = exchange.chosen is not None and not exchange.chosen.sent_as
        if answer is not None and answer.head.status == 200 and as_planned:
            n_before = sum(self._plan.shares[:index])
            self._portions[index] = read_portion(bytes(answer.held), self._plan.form, n_before, share)
        if self._portions[index] is not None:
            self._driver.close(exchange)
            return
        self._is_over = True
        self._answer = _refusal(exchange, answer)
        ended = "goes whole after all" if self._answer is None else f"refused with {self._answer.status}"
        self._tell(f"{ended}, since #{exchange.request.tag} was not done: its parts are stopped")
        all_parts.cancel()

    async def _read(self, exchange: Exchange) -> Answer | None:
        """Return the whole answer to a part; None when there is none, it broke off, or is more than may be held."""
        await exchange.decided.wait()
        collected = exchange.relay
        if not isinstance(collected, _Collected):
            return None
        await collected.over.wait()
        answer = collected.answer
        return answer if collected.has_room and answer.ended and exchange.aborted is None else None

    def _collect(self, exchange: Exchange, run: AttemptRun) -> None:
        """Begin to hold the answer that was chosen."""
        if run.answer is not None:
            exchange.relay = _Collected(run.answer, self._hold_answer)
            run.resume()

    def _hold_answer(self, n_bytes: int) -> bool:
        """Count what was read of an answer; False when it is too much."""
        self._room_bytes -= n_bytes
        if self._room_bytes < 0:
            self._splitter.note_too_many(self._plan)
        return self._room_bytes >= 0 and self._hold(n_bytes)

    # --- all of them ---------------------------------------------------------------------------------------

    def _joined(self) -> LocalAnswer | None:
        """Put the answers together, unless they are not of one build any more."""
        portions = [portion for portion in self._portions if portion is not None]
        digests = {self._splitter.digest(name, self._plan.model) for name in self._servers}
        body = join(portions, self._plan.form) if digests == {self._plan.digest} else None
        if body is None:
            self._tell("goes whole: the answers to its parts do not make one")
            return None
        self._tell(f"done by {self.servers}: {counted(len(self._plan.inputs), 'input')}")
        return LocalAnswer(200, PLAIN_JSON if self._plan.form.numbered else JSON, body)


def _refusal(exchange: Exchange, answer: Answer | None) -> LocalAnswer | None:
    """Return what the client is told of a part that was not done; None: whole, the request may fare better."""
    refused = exchange.rejected
    if answer is not None and answer.head.status >= 400:
        return LocalAnswer(answer.head.status, answer.head.header(b"content-type") or b"", bytes(answer.held))
    if refused is None or refused.status == 502:  # nobody who has this build could be reached
        return None
    shape, seconds = exchange.request.shape, refused.retry_after_s
    return error_answer(shape, refused.status, refused.message, retry_after_s=seconds)
