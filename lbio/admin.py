"""The management endpoints: what the fleet is, and changing it."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from lbcore.config import ServerSettings
from lbcore.events import ServerAdded, ServerRemovalRequested, SyncRequested
from lbcore.ollama import Shape
from lbcore.parsing import RefusedError, quote
from lbcore.records import Server
from lbio.answers.explained import Explainer
from lbio.answers.local import TEXT, LocalAnswer, error_answer, json_answer
from lbio.answers.status import as_table, server_status, status
from lbio.configuration.addresses import parse_name, parse_server_url
from lbio.configuration.settings import AdminAccess
from lbio.driver import Driver
from lbio.http1 import RequestHead

_SERVERS = "/servers/"
_EXPLAIN = "/explain/"
_PREFIXES = (_SERVERS, _EXPLAIN)  # the name of a server, or of a request, follows
_BODY_BYTES_MAX = 65536


def _error(code: int, message: str) -> LocalAnswer:
    return error_answer(Shape.NATIVE, code, message)


class Admin:
    """Answers the management endpoints."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.explainer = Explainer(driver.memory, driver.boot)
        self._methods: Mapping[str, tuple[str, Callable[[RequestHead, bytes], Awaitable[LocalAnswer]]]] = {
            "/status": ("GET", self._status),
            "/add_server": ("POST", self._add_server),
            "/sync_servers": ("POST", self._sync_servers),
            _SERVERS: ("DELETE", self._remove_server),
            _EXPLAIN: ("GET", self._explain),
        }

    def is_admin(self, path: str) -> bool:
        """Tell whether a path is one of ours."""
        return path in self._methods or path.startswith(_PREFIXES)

    def why_not(self, head: RequestHead, peer: str, *, has_key: bool = False) -> str:
        """Return why a request from `peer` may not manage, "" if it may; one whose key allows it may from anywhere."""
        is_open = has_key or self._driver.app.admin.allow is AdminAccess.ANY
        if not is_open and (why := _why_foreign(head, peer)):
            return f'management is allowed from this machine only, and {why} (admin.allow = "any" opens it to all)'
        if not _has_local_origin(head):
            return "management is not allowed to web pages from elsewhere (the Origin header is foreign)"
        return ""

    async def answer(self, head: RequestHead, body: bytes, peer: str, *, has_key: bool = False) -> LocalAnswer:
        """Carry out a management request."""
        if why := self.why_not(head, peer, has_key=has_key):
            return _error(403, why)
        prefix = next((prefix for prefix in _PREFIXES if head.path.startswith(prefix)), "")
        method, carry_out = self._methods[prefix or head.path]
        if head.method != method and not (method == "GET" and head.method == "HEAD"):
            return LocalAnswer(405, b"text/plain", b"405 method not allowed", ((b"Allow", method.encode()),))
        return await carry_out(head, body)

    def told(self) -> dict[str, Any]:
        """Return what /status tells."""
        shares = {job.id: job.share for job in self._driver.jobs.values()}
        return status(self._driver.balancer, self._driver.totals, self._driver.clock(), shares)

    async def _status(self, head: RequestHead, _body: bytes) -> LocalAnswer:
        told = self.told()
        if _wants_text(head):
            return LocalAnswer(200, TEXT, as_table(told).encode())
        return json_answer(200, told)

    async def _explain(self, head: RequestHead, _body: bytes) -> LocalAnswer:
        return await self.explainer.answer(unquote(head.path.removeprefix(_EXPLAIN)), as_text=_wants_text(head))

    async def _add_server(self, _head: RequestHead, body: bytes) -> LocalAnswer:
        """Take a server in once a probe of it has ended well."""
        parsed = _parse_addition(body)
        if isinstance(parsed, LocalAnswer):
            return parsed
        fleet = self._driver.balancer.fleet
        for server in fleet:
            if parsed.name == server.name or parsed.url == server.settings.url:
                return _error(409, f"there is already a server {server.name} at {server.settings.url}")
        self._driver.dispatch(ServerAdded(parsed))
        added = fleet.by_name(parsed.name)
        await self._driver.wait_probed(
            lambda server: server is added and server.last_sync_ns is None and server.probe_failures == 0
        )
        if added is None or added.last_sync_ns is None:
            detail = added.last_error if added is not None else "it was removed meanwhile"
            if added is not None:
                self._driver.dispatch(ServerRemovalRequested(added.id))
            return _error(502, f"not added, since it cannot be used now: {detail}")
        return json_answer(200, server_status(added, self._driver.clock()))

    async def _remove_server(self, head: RequestHead, _body: bytes) -> LocalAnswer:
        name = unquote(head.path.removeprefix(_SERVERS))
        server = self._driver.balancer.fleet.by_name(name)
        if server is None:
            known = ", ".join(s.name for s in self._driver.balancer.fleet) or "none"
            return _error(404, f"there is no server called '{name}' (there are: {known})")
        in_flight = server.in_flight
        self._driver.dispatch(ServerRemovalRequested(server.id))
        return json_answer(200, {"name": name, "state": "draining" if in_flight else "removed", "in_flight": in_flight})

    async def _sync_servers(self, _head: RequestHead, _body: bytes) -> LocalAnswer:
        """Probe all now and tell what has changed."""
        fleet = self._driver.balancer.fleet
        before = {server.name: _digest(server) for server in fleet}
        self._driver.dispatch(SyncRequested())
        awaited = {server.id: server.probe_id for server in fleet if server.probe_id}
        # Not until no probe at all is under way, which may never be: only until each of these has ended.
        await self._driver.wait_probed(lambda server: awaited.get(server.id) == server.probe_id)
        changes = {server.name: _difference(before.get(server.name), _digest(server)) for server in fleet}
        return json_answer(
            200, {"servers": len(fleet.servers), "changed": {name: c for name, c in changes.items() if c}}
        )


def _wants_text(head: RequestHead) -> bool:
    return b"text/plain" in (head.header(b"accept") or b"")


def _why_foreign(head: RequestHead, peer: str) -> str:
    """Return why a request was not made on this machine, "" if it was: not through a proxy nor by a rebound name."""
    for name in ("X-Forwarded-For", "Forwarded"):
        if head.header(name.lower().encode()) is not None:
            return f"this request came through a proxy, which says so in the header {name}"
    if not _is_loopback(peer):
        return f"this request came from {peer}"
    host = (head.header(b"host") or b"").decode("latin-1")
    return "" if _is_own_name(host) else f"the Host of this request is {quote(host)}, which may be anybody's name"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _is_own_name(authority: str) -> bool:
    """Refuse names that somebody else's DNS may have pointed at this machine (DNS rebinding)."""
    try:
        host = urlsplit(f"//{authority}").hostname or ""
    except ValueError:  # such as "["
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost") or host == socket.gethostname().lower()
    return True


def _has_local_origin(head: RequestHead) -> bool:
    origin = head.header(b"origin")
    return origin is None or _is_own_name(origin.decode("latin-1").partition("://")[2])


def _parse_addition(body: bytes) -> ServerSettings | LocalAnswer:
    """Return the server that a body `{"url": …, "name": …}` names, or the error that says what is wrong with it."""
    example = '{"url": "http://gpu3:11434", "name": "gpu3"}'
    if len(body) > _BODY_BYTES_MAX:  # objects take many times the memory of their text
        return _error(413, f"the body is larger than {_BODY_BYTES_MAX} bytes; send {example}")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        return _error(400, f"the body is not JSON ({error}); send {example}")
    if not isinstance(given, dict) or not isinstance(given.get("url"), str):
        return _error(400, f'the body has no "url"; send {example}')
    unknown = [key for key in given if key not in {"url", "name"}]
    if unknown:
        return _error(400, f"unknown member {quote(unknown[0])}; send {example}")
    name = "" if given.get("name") is None else given["name"]
    if not isinstance(name, str):
        return _error(400, f"name: {json.dumps(name)} is not a text; send {example}")
    try:
        url = parse_server_url(given["url"], scheme_optional=True)
        return ServerSettings(url=str(url), name=parse_name(name) if name else str(url.address))
    except RefusedError as error:
        field = "name" if name and _is_url(given["url"]) else "url"
        return _error(400, f"{field}: {json.dumps(given[field])} {error.message}; {error.fix}")


def _is_url(text: str) -> bool:
    try:
        parse_server_url(text, scheme_optional=True)
    except RefusedError:
        return False
    return True


def _digest(server: Server) -> dict[str, Any]:
    return {
        "state": str(server.state),
        "models": sorted(name for name, model in server.models.items() if model.available is not None),
        "loaded": sorted(name for name, model in server.models.items() if model.loaded),
    }


def _difference(before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, Any]:
    """Return what has changed: the state from what to what, models gained and lost."""
    if before is None:
        return {"added": after}
    changes: dict[str, Any] = {}
    if before["state"] != after["state"]:
        changes["state"] = [before["state"], after["state"]]
    for what in ("models", "loaded"):
        gained = [name for name in after[what] if name not in before[what]]
        lost = [name for name in before[what] if name not in after[what]]
        if gained or lost:
            changes[what] = {"gained": gained, "lost": lost}
    return changes
