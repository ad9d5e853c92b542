"""Reads every server once, so that what placement would do can be told without doing it."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import replace

import anyio

from lbcore.balancer import LoadBalancer
from lbcore.commands import StartProbe, Work
from lbcore.events import Event, ModelInfo
from lbcore.provision import Provision, Step
from lbcore.schema import SECOND_NS
from lbcore.timers import Timers
from lbio.access.credentials import NO_CREDENTIALS, Credentials, read_secrets
from lbio.configuration.settings import AppConfig
from lbio.prober import Probe
from lbio.upstream import Endpoint
from lbio.wire.streams import connect
from lbio.wire.tls import client_context


class _Reader:
    """Gives the core what probes have found, and carries out nothing."""

    def __init__(self, balancer: LoadBalancer) -> None:
        self._balancer = balancer

    def dispatch(self, event: Event) -> None:
        self._balancer.handle(event, 1)


def read_fleet(app: AppConfig) -> tuple[LoadBalancer, Provision]:
    """Return a balancer that has read all servers that can be reached, and what placement makes of that.

    Raises SecretsError when a credential is not where the configuration says, OSError for an unusable ca_file.
    """
    # Without models: else the balancer would take for begun what it only commands.
    balancer = LoadBalancer(replace(app.core, models=()), random.Random(0))  # noqa: S311
    upstream = read_secrets(app).upstream
    anyio.run(_read_all, app, balancer, upstream)
    return balancer, Provision(app.core, balancer.fleet, Timers(), [])


def all_steps(provision: Provision) -> list[Step]:
    """Return all that would be done, one thing after the other, if everything went well.

    What is done is written into the balancer, to see what would follow.
    """
    done: dict[tuple[Work, int, str], Step] = {}
    while new := [step for step in provision.wanted(0) if (step.work, step.server.id, step.model) not in done]:
        for step in new:
            done[step.work, step.server.id, step.model] = step
            record = step.server.model(step.model)
            if step.work is not Work.WARM:
                record.available = ModelInfo(step.model, "", "", "") if step.work is Work.PULL else None
            record.loaded = step.work is Work.WARM or (record.loaded and step.work is Work.PULL)
    return list(done.values())


async def _read_all(app: AppConfig, balancer: LoadBalancer, upstream: Mapping[str, Credentials]) -> None:
    probes = [command for command in balancer.handle_timeout(0) if isinstance(command, StartProbe)]
    with anyio.move_on_after(app.core.probe.timeout_ns / SECOND_NS):
        async with anyio.create_task_group() as tasks:
            for command in probes:
                settings = balancer.fleet.servers[command.server_id].settings
                own = upstream.get(settings.url, NO_CREDENTIALS)
                tls = client_context(settings)
                endpoint = Endpoint(settings.name, settings.url, tls, app.pool, time.monotonic_ns, connect, own)
                probe = Probe(command.server_id, command.probe_id, endpoint, _Reader(balancer), "ollama-lb-plan")
                tasks.start_soon(probe.run, _raise)
    balancer.handle_timeout(app.core.probe.timeout_ns)  # those that have not answered have failed


def _raise(error: BaseException) -> None:
    raise error
