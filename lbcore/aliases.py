"""Which model a request for an alias is for: the first of its chain that a live server has; after a failure, the next.

An alias is no model, and its chain holds models alone (`lbcore.config_aliases` sees to that), so none leads to another.
Whoever names servers means these alone: then what they have counts.
"""

from __future__ import annotations

from lbcore import selection
from lbcore.config import Alias, Config
from lbcore.fleet import Fleet
from lbcore.ollama import canonical_model, find_route
from lbcore.records import AliasUse, Request, Server
from lbcore.states import ServerState


def find_alias(config: Config, route: str, model: str | None) -> Alias | None:
    """Return the alias that a request on a route names; None when it names a model, or nothing."""
    if not config.aliases or model is None or not find_route(route).takes_alias:
        return None
    return config.aliases.get(canonical_model(model))


def model_now(alias: Alias, fleet: Fleet) -> str | None:
    """Return the model of an alias that a request is for if it comes now; None when no live server has any."""
    return next((name for name in alias.models if fleet.holders(canonical_model(name))), None)


def is_own_name(alias: Alias, model: str) -> bool:
    """Tell whether a model of an alias is the one of the same name, so that nothing is called by another."""
    return canonical_model(model) == canonical_model(alias.name)


def begin(request: Request, config: Config, fleet: Fleet) -> None:
    """Find out whether a request that has just come names an alias, and if so for which model it is."""
    alias = find_alias(config, request.event.route, request.event.model)
    if alias is not None:
        request.alias = AliasUse(alias)
        resolve(request, fleet)


def resolve(request: Request, fleet: Fleet) -> None:
    """Look anew for which model a request is of which nobody was asked yet.

    It is the first that a live server has; when none has any, the first that a dead one had, else the first of all.
    """
    use = request.alias
    if use is not None:
        name = next((name for name in use.models if _live_holders(request, name, fleet)), None)
        if name is None and not request.event.servers:
            name = next((name for name in use.models if _was_on_a_dead_one(name, fleet)), None)
        _use(request, use, name or use.models[0])


def next_model(request: Request, fleet: Fleet, *, with_room: bool = False) -> str | None:
    """Return the next model of the chain, once all live servers that have the present one were asked.

    None when they were not, or when no live server has another one (`with_room`: and room for the request).
    """
    use = request.alias
    if use is None or selection.eligible(_live_holders(request, use.name, fleet), request):
        return None
    for name in use.models:
        model = canonical_model(name)
        if model != request.model and model not in use.given_up:
            holders = _live_holders(request, name, fleet)
            roomy = [server for server in holders if server.models[model].in_flight < server.in_flight_max]
            if roomy or (holders and not with_room):
                return name
    return None


def change(request: Request, name: str) -> None:
    """Go on to another model of the chain, of a request that nobody works on any more.

    All servers may be asked again: what they could not do with the one they may do with the other, and what they made
    of that one is no evidence against them when another server does well with this one.
    """
    use = request.alias
    if use is not None and request.model is not None:
        use.given_up.append(request.model)
        use.attempts_from = len(request.attempts)
        request.suspects.clear()
        _use(request, use, name)


def words(request: Request, why: str) -> str:
    """Return why servers were asked, and as what if that is not what the client has named."""
    use = request.alias
    return why if use is None or request.model == use.asked else f"{why}, as {use.name}"


def _live_holders(request: Request, name: str, fleet: Fleet) -> list[Server]:
    """Return the live servers that have a model of the chain, of those that the client wants to be asked."""
    holders, pinned = fleet.holders(canonical_model(name)), request.event.servers
    return [server for server in holders if server.name in pinned] if pinned else holders


def _was_on_a_dead_one(name: str, fleet: Fleet) -> bool:
    model = canonical_model(name)
    return any(server.state is ServerState.DEAD and server.has(model) for server in fleet)


def _use(request: Request, use: AliasUse, name: str) -> None:
    use.name = name
    request.model = canonical_model(name)
