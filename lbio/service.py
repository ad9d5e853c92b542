"""`ollama-lb run`: everything put together, from the first probe to the last byte at shutdown."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib.util
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import anyio

from lbcore.balancer import LoadBalancer
from lbcore.config import ServerSettings
from lbcore.events import DrainDeadlinePassed
from lbcore.schema import SECOND_NS
from lbcore.units import counted
from lbio.access.credentials import SecretsError, read_secrets
from lbio.answers.status import align
from lbio.config_file import access_warnings
from lbio.configuration.addresses import Address, parse_listen
from lbio.configuration.settings import AppConfig
from lbio.descriptors import fitted
from lbio.driver import Driver
from lbio.front import Front
from lbio.journal import logs
from lbio.journal.record import RecordError, Recording
from lbio.wire.streams import TCP, Network
from lbio.wire.tls import client_context

_log = logging.getLogger("ollama_lb")
_GC_THRESHOLDS = (20_000, 20, 20)  # requests leave no cycles behind, so little is found however often one looks
_CUT_S = 0.5  # for error lines to be written once the drain deadline has passed

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  and how this machine reaches itself

FleetFactory = Callable[[], AbstractAsyncContextManager[Sequence[ServerSettings]]]
"""Starts servers of its own (the demo's) and says where they are."""


def run(app: AppConfig, *, fleet: FleetFactory | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code.

    0: ended as asked, 1: could not start, 2: cannot record, or a secret is missing.
    """
    logs.set_up(app.log)
    app = replace(app, limits=fitted(app.limits))
    try:
        return anyio.run(_main, app, fleet, backend_options={"use_uvloop": _has_uvloop()})
    except KeyboardInterrupt:  # where signals cannot be received by the event loop (Windows)
        return 0


def _has_uvloop() -> bool:
    return importlib.util.find_spec("uvloop") is not None


async def _main(app: AppConfig, fleet: FleetFactory | None) -> int:
    async with contextlib.AsyncExitStack() as stack:
        signals = stack.enter_context(_receiving_signals())
        try:
            if fleet is not None:
                servers = await stack.enter_async_context(fleet())
                app = replace(app, core=replace(app.core, servers=(*app.core.servers, *servers)))
            service = await stack.enter_async_context(start(app))
        except OSError as error:
            _log.error("cannot start: %s", error.strerror or error)
            return 1
        except RecordError as error:
            _log.error("%s", error)
            return 2
        except SecretsError as error:
            for problem in error.problems:
                _log.error("%s", problem)
            return 2
        gc.freeze()  # what was imported stays: a collection that looks at all of it stops everything for 20 ms
        gc.set_threshold(*_GC_THRESHOLDS)
        gc.enable()
        with contextlib.suppress(OSError):  # nobody may be reading standard output
            _greet(service, demo=fleet is not None)
        await _until_told(service, signals)
    return 0


def _check_ca_file(settings: ServerSettings) -> None:
    """Raise OSError for an unusable ca_file, with words that say whose it is."""
    try:
        client_context(settings)
    except OSError as error:
        words = f"the ca_file {settings.ca_file} of {settings.name} cannot be used: {error.strerror or error}"
        raise OSError(error.errno, words) from None


def _cannot_listen(error: OSError, address: Address) -> OSError:
    """Return the same with words that say where, and what to do about it."""
    words = str(error.strerror or error)
    if isinstance(error, socket.gaierror):
        words = f"cannot listen on {address}: {words}"
    elif error.errno == errno.EADDRINUSE:
        words = f"{words}; another program has this port, perhaps an Ollama: choose another one with --listen"
    return OSError(error.errno, words)


class Service:
    """A running load balancer."""

    def __init__(self, app: AppConfig, driver: Driver, front: Front, addresses: Sequence[tuple[str, int]]) -> None:
        self.app = app
        self.driver = driver
        self.front = front
        self.addresses = addresses

    @property
    def url(self) -> str:
        """Where clients on this machine reach it."""
        host, port = self.addresses[0]
        local = _WILDCARDS.get(host, host)
        return f"http://{Address(local, port)}"


@contextlib.asynccontextmanager
async def start(
    app: AppConfig, *, clock: Callable[[], int] = time.monotonic_ns, network: Network = TCP
) -> AsyncIterator[Service]:
    """Start a load balancer, and drain it at the end. `clock` and the event loop's must run alike.

    Raises OSError when it cannot listen or a ca_file is unusable, RecordError when nothing can be recorded, and
    SecretsError when a key or another secret is not where the configuration says.
    """
    address = parse_listen(app.listen)
    secrets = read_secrets(app)
    for settings in app.core.servers:
        _check_ca_file(settings)  # found here and not in the task group, which would wrap the error
    try:
        listener = await network.listen(address.host, address.port)
    except OSError as error:
        raise _cannot_listen(error, address) from None
    for text in (*access_warnings(app), *secrets.warnings):
        _log.warning("%s", text)
    recording = Recording(app.record)
    try:
        seed = app.seed if app.seed is not None else random.SystemRandom().getrandbits(63)
        _log.debug("seed = %d", seed)
        balancer = recording.begin(LoadBalancer(app.core, random.Random(seed)), seed)  # noqa: S311
        async with anyio.create_task_group() as tasks:
            driver = Driver(balancer, app, tasks, logs.Log(app.log), clock, network.connect, secrets.upstream)
            front = Front(driver, secrets.keyring)
            tasks.start_soon(driver.run_timer)
            tasks.start_soon(driver.sweep_pools)
            tasks.start_soon(driver.watch_builds)
            tasks.start_soon(driver.watch_streams)
            tasks.start_soon(front.sweep)
            tasks.start_soon(listener.accept_forever, lambda stream: tasks.start_soon(front.serve, stream))
            try:
                yield Service(app, driver, front, listener.addresses)
                listener.close()
                await _drain(front, app.drain_timeout_ns)
            finally:
                front.close()
                driver.close_pools()
                tasks.cancel_scope.cancel()
    finally:
        listener.close()
        recording.close()


async def _drain(front: Front, timeout_ns: int) -> None:
    """Finish what is under way, then cut what is left with an error."""
    front.drain()
    if front.n_busy:
        waited_for = counted(front.n_busy, "request")
        _log.info("shutting down: waiting up to %g s for %s", timeout_ns / SECOND_NS, waited_for)
    with anyio.move_on_after(timeout_ns / SECOND_NS):
        await front.wait_served()
        return
    _log.warning("shutting down: cutting %s", counted(front.n_busy, "request"))
    front.driver.dispatch(DrainDeadlinePassed())
    with anyio.move_on_after(_CUT_S):
        await front.driver.wait_all_answered()


_Signals = AsyncIterator[signal.Signals] | None


@contextlib.contextmanager
def _receiving_signals() -> Iterator[_Signals]:
    """Receive what ends the program from now on; None where the event loop cannot (Windows: Ctrl-C raises instead)."""
    try:
        receiver = anyio.open_signal_receiver(*_signals())
        signals = receiver.__enter__()
    except NotImplementedError:
        yield None
        return
    try:
        yield signals
    finally:
        receiver.__exit__(None, None, None)


def _signals() -> list[signal.Signals]:
    """Return what ends the program: a terminal that is closed does, unless it was started so that it would not."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


async def _until_told(service: Service, signals: _Signals) -> None:
    """Return at the first signal; a second one ends the program at once."""
    if signals is None:
        await anyio.sleep_forever()
        return
    _log.info("%s: shutting down", (await anext(signals)).name)
    service.driver.tasks.start_soon(_exit_at_next, signals)


async def _exit_at_next(signals: AsyncIterator[signal.Signals]) -> None:
    number = await anext(signals)
    _log.warning("second signal (%s): exiting at once", number.name)
    logging.shutdown()
    sys.stdout.flush()
    _exit_now()


def _exit_now() -> None:
    os._exit(1)  # nothing that is still under way is waited for


def _greet(service: Service, *, demo: bool) -> None:
    """Say where it listens, over what, and what to paste."""
    servers = [("SERVER", "URL", "SLOTS"), *((s.name, s.url, str(s.slots)) for s in service.app.core.servers)]
    model = _a_model(service) if demo else "llama3.2"
    host, port = service.addresses[0]
    everywhere = f" and on every other address of this machine, port {port}" if host in _WILDCARDS else ""
    key = ' -H "Authorization: Bearer $OLLAMA_API_KEY"' if service.app.keys else ""
    print(  # noqa: T201  for people at a terminal
        f"ollama-lb listens on {service.url}{everywhere}\n\n{align(servers)}\n\n"
        f"try it:  curl -N {service.url}/api/chat{key} -d "
        f"""'{{"model": "{model}", "messages": [{{"role": "user", "content": "hello"}}]}}'\n"""
        f"watch:   curl -H 'Accept: text/plain' {service.url}/status{key}\n",
        flush=True,
    )


def _a_model(service: Service) -> str:
    names = [name for server in service.driver.balancer.fleet for name in server.models]
    return names[0].removesuffix(":latest") if names else "llama3.2"
