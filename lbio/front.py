"""What all client connections share: who is let in, what is known of heads, which of them are open."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from functools import partial

import anyio
from anyio.abc import ByteStream

from lbcore.ollama import find_route, shape_of
from lbcore.schema import SECOND_NS
from lbio.access.cors import NOTHING, Cors, Verdict
from lbio.access.credentials import CLIENT_KEYS
from lbio.access.gate import Gate
from lbio.access.keys import Key, Keyring
from lbio.admin import Admin
from lbio.answers.local import LocalAnswer
from lbio.answers.own import OwnAnswers
from lbio.answers.parts import Splitter
from lbio.client import LOOK_S, BodyBudget, ClientStream, Lingering
from lbio.configuration.addresses import is_loopback, parse_listen
from lbio.downstream import ClientConnection
from lbio.driver import Driver
from lbio.exchange import head_parts
from lbio.http1 import RequestHead
from lbio.known import Known, pinned
from lbio.wire.headers import upstream_headers

_LOOKS_PER_TIMEOUT = 8
"""An idle connection is closed at most an eighth of its time too late."""


class Front:
    """What all client connections share."""

    def __init__(self, driver: Driver, keyring: Keyring | None = None) -> None:
        self.driver = driver
        self.admin = Admin(driver)
        self.gate = Gate(keyring, self.admin.is_admin) if keyring is not None else None
        own_name = socket.gethostname().lower() if is_loopback(parse_listen(driver.app.listen).host) else None
        self._cors = Cors(driver.app.origins, own_name=own_name)
        self.draining = False
        self.own = OwnAnswers(driver, self.admin, self.gate)
        self.bodies = BodyBudget(driver.app.limits.bodies_bytes_max)
        self.splitter = Splitter(driver)
        self._notes = f"known to {driver.via}"  # under which that is kept with a head
        self._ids: Iterator[int] = itertools.count(1)
        self.connections: dict[int, ClientConnection] = {}
        self._connection_ids: Iterator[int] = itertools.count(1)
        self._served = anyio.Event()
        self._lingering: dict[Lingering, None] = {}

    def linger(self, client: ClientStream) -> bool:
        """Let a client read what was written last, without a task; False where one is needed."""
        lingering = client.linger(lambda ended: self._lingering.pop(ended, None))
        if lingering is not None:
            self._lingering[lingering] = None
        return lingering is not None

    def close(self) -> None:
        """Close what lingers."""
        for lingering in list(self._lingering):
            lingering.close()

    def next_id(self) -> tuple[int, str]:
        """Return a new request's number, and its name in headers and logs, unlike those before a restart."""
        number = next(self._ids)
        return number, f"{self.driver.boot}-{number}"

    def known(self, head: RequestHead) -> Known:
        """Return what can be told of a request by its head alone."""
        found: Known | None = head.notes.get(self._notes)
        return found if found is not None else head.noted(self._notes, partial(self._find, head))

    def _find(self, head: RequestHead) -> Known:
        route, shape = find_route(head.path), shape_of(head.path)
        stages = self.own.stages_for(head, route)
        content_type = head.header(b"content-type") or b""
        uploads = head.method == "POST" and route.uploads
        return Known(route, shape, self._judge(head), stages, uploads, pinned(head), content_type)

    def _judge(self, head: RequestHead) -> Verdict:
        """Tell what a request comes to by the web page that makes it; `admin` is stricter, and judges its own."""
        origin = head.header(b"origin")
        if not (origin or self._cors.checks_host) or self.admin.is_admin(head.path):
            return NOTHING
        host, methods = head.header(b"host") or b"", find_route(head.path).methods
        return self._cors.judge(head.method, origin or b"", host, methods)

    def head_parts(
        self, head: RequestHead, n_body_bytes: int | None, peer: str, *, plain: bool
    ) -> tuple[bytes, bytes]:
        """Return a head as servers get it. Raises ValueError for an illegal header."""
        app = self.driver.app
        headers = upstream_headers(head, n_body_bytes, peer, app.proxy.forwarded, plain=plain, via=self.driver.via)
        if self.gate is not None:  # a key is for us, and for nobody else
            headers = [pair for pair in headers if pair[0] not in CLIENT_KEYS]
        return head_parts(head, headers)

    def admit(self, head: RequestHead, peer: str, verdict: Verdict) -> Key | LocalAnswer | None:
        """Return the key of a request, or the answer to it if it lacks the one it needs, or needs none."""
        if self.gate is None:
            return None
        if verdict.answer is not None:  # to a browser, which has no key to send yet
            return verdict.answer
        admitted = self.gate.admit(head, self.driver.clock())
        if isinstance(admitted, LocalAnswer):
            self.own.tell(admitted, head, peer)
        return admitted

    async def serve(self, stream: ByteStream) -> None:
        """Serve one connection until it ends."""
        connection_id = next(self._connection_ids)
        connection = ClientConnection(stream, self)
        if len(self.connections) + len(self._lingering) >= self.driver.app.limits.connections_max:
            await connection.refuse()
            return
        self.connections[connection_id] = connection
        try:
            await connection.run()
        except Exception as error:  # noqa: BLE001  one connection must not end the program
            self.driver.log.defect(error)
        finally:
            del self.connections[connection_id]
            connection.close()
            self.note_served()

    async def sweep(self) -> None:
        """Close connections that were idle for too long, for ever: one clock for all, instead of a timer for each."""
        limit_ns = self.driver.app.client.idle_timeout_ns
        while True:
            await anyio.sleep(min(LOOK_S, limit_ns / SECOND_NS / _LOOKS_PER_TIMEOUT))
            oldest_ns = self.driver.clock() - limit_ns
            for connection in list(self.connections.values()):
                connection.look(oldest_ns)
            for lingering in list(self._lingering):
                lingering.look()

    def drain(self) -> None:
        """Take no further request: idle connections are closed, the others after their answer."""
        self.draining = True
        for connection in self.connections.values():
            if connection.is_idle:
                connection.close()

    @property
    def n_busy(self) -> int:
        """Clients that are sending a request, or have not got its whole answer yet."""
        return sum(not connection.is_idle for connection in self.connections.values())

    def note_served(self) -> None:
        """Look again whether all are served."""
        self._served.set()

    async def wait_served(self) -> None:
        """Wait, once draining, until every request that had begun to come is answered."""
        while any(not connection.is_idle for connection in self.connections.values()):
            self._served = anyio.Event()
            await self._served.wait()
