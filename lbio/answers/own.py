"""What is answered here and not by a server: asked in the order of one table, before the core hears of a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import anyio

from lbcore.aliases import find_alias, is_own_name, model_now
from lbcore.config import Alias, Strategy
from lbcore.ollama import BodyFacts, Route, canonical_model, shape_of
from lbcore.requests import PIN_HEADER
from lbio.access.gate import Gate
from lbio.access.keys import Key
from lbio.admin import Admin
from lbio.answers import lb_model, shows
from lbio.answers.cli_view import VIEWS, answer_cli, is_cli
from lbio.answers.lb_model import LbModel
from lbio.answers.local import (
    LISTS,
    NEEDS_SERVERS,
    LocalAnswer,
    answer_list,
    answer_route,
    error_answer,
    model_in_path,
    preliminary_answer,
)
from lbio.answers.shows import Shows
from lbio.configuration.settings import Right
from lbio.driver import Driver
from lbio.http1 import HeaderPairs, RequestHead
from lbio.known import Known, Stage
from lbio.wire.bodies import read_facts
from lbio.wire.headers import has_passed
from lbio.wire.model_place import ModelPlace, PlacelessError, find_place

SERVER_HEADER = PIN_HEADER.encode()
"""In which a client names servers, and an answer tells who gave it."""
MODEL_HEADER = b"X-Ollama-LB-Model"
"""In which the answer to a request for an alias tells which model gave it."""

_OWN = frozenset({Strategy.LOCAL, Strategy.AGGREGATE})
_LOOP = "this request has been here before: a server that it was sent to leads back to this load balancer"
_SETTLE_S = 2.0
"""How long a merged view waits for the first probes after the start."""
_OUTDATED_S = 0.5
"""How long it waits for those servers that have changed since they were last read."""


@dataclass(slots=True)
class Ask:
    """What one client asks, as far as it can be told without asking anybody."""

    head: RequestHead
    known: Known
    body: bytes
    peer: str
    key: Key | None = None
    show_key: shows.Key | None = None
    """Under which the answer of a server to `/api/show` is kept."""
    show_model: str = ""
    """The model that this answer is of, if another name than that goes to the server."""
    alias: Alias | None = None
    """Which the model named is."""
    place: ModelPlace | None = None
    """Where the body names the alias."""
    _facts: BodyFacts | None = None

    @property
    def route(self) -> Route:
        """The route of the path."""
        return self.known.route

    @property
    def facts(self) -> BodyFacts:
        """What the body, or the path, says that decides where it goes."""
        if self._facts is None:
            facts = read_facts(self.route, self.head.method, self.body, self.known.content_type)
            model = model_in_path(self.route, self.head.path)
            self._facts = facts if model is None else replace(facts, model=model)
        return self._facts

    @property
    def servers(self) -> tuple[str, ...]:
        """The names of the servers that the client wants to be asked; () when it leaves that to us."""
        return self.known.pinned or ()

    @property
    def is_pinned(self) -> bool:
        """Whether the client names servers, or tries to."""
        return self.known.pinned is not None


class OwnAnswers:
    """Gives the answers that need no server."""

    def __init__(self, driver: Driver, admin: Admin, gate: Gate | None) -> None:
        self._driver = driver
        self._admin = admin
        self._gate = gate
        self.shows = Shows()
        self._lb = LbModel(admin.told, admin.explainer.explain)
        cli, config = driver.app.cli_extras, driver.balancer.config
        self._stages: Sequence[tuple[Stage, Callable[[RequestHead, Route], bool]]] = (
            (self._loop, lambda head, _: has_passed(head, driver.via)),
            (self._management, lambda head, _: admin.is_admin(head.path)),
            (self._settled_by_head, lambda head, _: preliminary_answer(head) is not None),
            (self._lb_model, lambda head, route: cli and route.name in lb_model.ROUTES and is_cli(head)),
            (self._forbidden_models, lambda _, __: gate is not None),
            (self._cli_view, lambda head, route: cli and route.name in VIEWS and is_cli(head)),
            (self._lists_for_some, lambda _, route: gate is not None and route.name in LISTS),
            (self._view, lambda _, route: config.route(route.name).strategy in _OWN),
            (self._named_by_alias, lambda _, route: bool(config.aliases) and route.takes_alias),
            (self._kept_show, lambda _, route: route.name == "/api/show"),
        )

    def stages_for(self, head: RequestHead, route: Route) -> tuple[Stage, ...]:
        """Return those that may have an answer, as far as the head tells."""
        return tuple(stage for stage, may_answer in self._stages if may_answer(head, route))

    async def find(self, ask: Ask) -> LocalAnswer | None:
        """Return the answer of the first stage that has one; None: a server is to give it."""
        for stage in ask.known.stages:
            answer = await stage(ask)
            if answer is not None:
                return answer
        return None

    async def _loop(self, ask: Ask) -> LocalAnswer | None:
        return error_answer(shape_of(ask.head.path), 508, _LOOP) if has_passed(ask.head, self._driver.via) else None

    async def _management(self, ask: Ask) -> LocalAnswer | None:
        return await self._admin.answer(ask.head, ask.body, ask.peer, has_key=ask.key is not None)

    async def _settled_by_head(self, ask: Ask) -> LocalAnswer | None:
        return preliminary_answer(ask.head)

    async def _lb_model(self, ask: Ask) -> LocalAnswer | None:
        """Answer the CLI for the model that is this balancer, unless there is one of that name."""
        if canonical_model(ask.facts.model or "") != lb_model.NAME:
            return None
        balancer = self._driver.balancer
        taken = lb_model.NAME in balancer.config.aliases or balancer.fleet.holders(lb_model.NAME)
        if taken or ask.is_pinned:
            return None
        return await self._lb.answer(ask.route.name, ask.facts, ask.body, self._why_not_managed(ask))

    def _why_not_managed(self, ask: Ask) -> str:
        """Return why a client is told nothing that the management endpoints tell, "" if it is."""
        if ask.key is not None and Right.MANAGE not in ask.key.rights:
            return f"the key of '{ask.key.name}' may not manage, which is needed for that"
        return self._admin.why_not(ask.head, ask.peer, has_key=ask.key is not None)

    async def _forbidden_models(self, ask: Ask) -> LocalAnswer | None:
        if self._gate is None or ask.key is None:
            return None
        refusal = self._gate.refuse_models(ask.key, ask.head, ask.body)
        if refusal is not None:
            self.tell(refusal, ask.head, ask.peer)
        return refusal

    def tell(self, refusal: LocalAnswer, head: RequestHead, peer: str) -> None:
        """Log that somebody was not let in, or not further."""
        now_ns = self._driver.clock()
        if self._gate is not None and (words := self._gate.words(refusal, head, peer, now_ns)) is not None:
            self._driver.log.warning(words)

    async def _cli_view(self, ask: Ask) -> LocalAnswer | None:
        """Show the CLI of what the fleet is made."""
        if ask.is_pinned:
            return None
        if self._driver.balancer.config.route(ask.route.name).strategy is not Strategy.AGGREGATE:
            return None
        await self._settled()
        may = ask.key.models.may if ask.key is not None else None
        balancer = self._driver.balancer
        return answer_cli(ask.route.name, balancer.fleet, may, balancer.config.aliases.values())

    async def _lists_for_some(self, ask: Ask) -> LocalAnswer | None:
        """Answer lists for a key that is for some models, and so is shown no others."""
        if ask.key is None or ask.key.models.is_all:
            return None
        await self._settled()
        fleet = self._driver.balancer.fleet
        servers = [server for server in fleet if server.is_alive and (not ask.servers or server.name in ask.servers)]
        if servers:
            aliases = () if ask.servers else self._driver.balancer.config.aliases.values()
            return answer_list(ask.route, servers, ask.key.models.may, aliases)
        message = f"{PIN_HEADER}: no server of this name is alive" if ask.servers else fleet.nobody_there()
        return error_answer(ask.route.shape, 502, message, retry_after_s=1)

    async def _view(self, ask: Ask) -> LocalAnswer | None:
        """Answer what is made of what is known of all servers; who names one gets that server's own."""
        if ask.is_pinned:
            return None
        if ask.route.name in NEEDS_SERVERS:
            await self._settled()
        balancer = self._driver.balancer
        answer = answer_route(ask.route, ask.head.path, balancer.fleet, balancer.config.aliases.values())
        if answer is None or self._gate is not None or answer.status != 200:
            return answer
        return replace(answer, is_view=not any(server.outdated for server in balancer.fleet))

    async def _named_by_alias(self, ask: Ask) -> LocalAnswer | None:
        """Find out whether an alias is asked for, and where the body says so; refuse one that does not tell."""
        ask.alias = find_alias(self._driver.balancer.config, ask.route.name, ask.facts.model)
        if ask.alias is None:
            return None
        try:
            ask.body, ask.place = find_place(ask.body, ask.known.content_type)
        except PlacelessError as error:
            message = f"'{ask.alias.name}' is an alias here, and no model can be put in its place: {error}"
            return error_answer(ask.route.shape, 400, message)
        return None

    def for_model_now(self, ask: Ask) -> Ask:
        """Return a request for an alias as one for the model that the alias stands for now."""
        if ask.alias is None or ask.place is None:
            return ask
        model = model_now(ask.alias, self._driver.balancer.fleet)
        if model is None or is_own_name(ask.alias, model):
            return replace(ask, alias=None, place=None)
        return replace(ask, body=ask.place.renamed(ask.body, model)[0], alias=None, place=None, _facts=None)

    async def _kept_show(self, ask: Ask) -> LocalAnswer | None:
        if ask.is_pinned:
            return None
        fleet, model = self._driver.balancer.fleet, ask.facts.model
        if ask.alias is not None:
            model = model_now(ask.alias, fleet)
            ask.show_model = "" if model is None or is_own_name(ask.alias, model) else model
        ask.show_key = Shows.key(fleet, model, ask.body)
        shown = self.shows.get(ask.show_key) if ask.show_key is not None else None
        if shown is None:
            return None
        ours: HeaderPairs = ((SERVER_HEADER, shown.server.encode()),)
        if ask.show_model:
            ours = (*ours, (MODEL_HEADER, ask.show_model.encode()))
        return LocalAnswer(200, shown.content_type, shown.body, ours)

    async def _settled(self) -> None:
        """Give the first probes after the start a moment, so that they are not taken for an empty fleet."""
        with anyio.move_on_after(_SETTLE_S):
            await self._driver.wait_probed(lambda server: server.last_sync_ns is None and server.probe_failures == 0)
        with anyio.move_on_after(_OUTDATED_S):  # who has just pulled a model wants to see it
            await self._driver.wait_probed(lambda server: server.outdated and server.is_alive)
