"""What `GET /status` tells of every server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lbcore.aliases import model_now
from lbcore.balancer import LoadBalancer
from lbcore.catalog import builds
from lbcore.commands import Work
from lbcore.provision import Place
from lbcore.records import Server, ServerModel
from lbcore.schema import MS_NS, SECOND_NS
from lbcore.units import counted
from lbio.journal.totals import Totals


def status(
    balancer: LoadBalancer, totals: Totals, now_ns: int, shares: Mapping[int, float | None] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the state of the fleet, what is under way now, and what has come of requests since the start.

    Times are seconds, or milliseconds where the name says so. `shares` tells how far each job has come, 0 to 1.
    """
    ledger = balancer.ledger
    return {
        "servers": [server_status(server, now_ns) for server in balancer.fleet],
        "models": [_placed_model(place, balancer, shares, now_ns) for place in balancer.provision.places(now_ns)],
        "warnings": warnings_of(balancer),
        "requests": len(ledger.requests),
        "queued": len(ledger.queue),
        "attempts": len(ledger.attempts),
        "retries": ledger.retry_budget.under_way,
        "since_start": {
            "seconds": round((now_ns - totals.since_ns) / SECOND_NS, 1),
            "requests": totals.outcomes(),
            "attempts": {str(kind): number for kind, number in totals.attempts.items()},
            "wasted_tokens": ledger.wasted_tokens,
            "late_events": ledger.late_events,
        },
    }


def warnings_of(balancer: LoadBalancer) -> list[str]:
    """Return what an operator had better look at, though all goes on."""
    return [*different_builds(balancer.fleet), *_hollow_aliases(balancer)]


def _hollow_aliases(balancer: LoadBalancer) -> Iterator[str]:
    """Yield the aliases of which no live server has any model, once all servers were read, or could not be."""
    if any(server.last_sync_ns is None and not server.probe_failures for server in balancer.fleet):
        return
    for alias in balancer.config.aliases.values():
        if model_now(alias, balancer.fleet) is None:
            yield f"alias {alias.name}: no live server has {' or '.join(alias.models)}"


def different_builds(servers: Iterable[Server]) -> list[str]:
    """Return what is worth a warning: models of one name that are not the same everywhere."""
    return [
        f"{name} is not the same everywhere: "
        + "; ".join(f"{digest[:12]} on {', '.join(names)}" for digest, names in digests.items())
        for name, digests in builds(servers).items()
    ]


def server_status(server: Server, now_ns: int) -> dict[str, Any]:
    """Return the state of one server."""
    return {
        "name": server.name,
        "url": server.settings.url,
        "state": server.state,
        "health": round(server.health, 2),
        "reliability": server.reliability,
        "doubted": server.doubted,
        "version": server.version,
        "in_flight": server.in_flight,
        "models": {name: _model(record) for name, record in sorted(server.models.items())},
        "last_error": server.last_error or None,
        "last_error_s_ago": _s_ago(server.last_error_ns, now_ns),
        "last_sync_s_ago": _s_ago(server.last_sync_ns, now_ns),
    }


def _placed_model(
    place: Place, balancer: LoadBalancer, shares: Mapping[int, float | None], now_ns: int
) -> dict[str, Any]:
    """Return where a declared model is, and is to be; what is under way for it, and what waits to be tried again."""
    provision, servers = balancer.provision, balancer.fleet.servers
    jobs = [job for job in provision.jobs.values() if job.model == place.model]
    waiting = [
        (servers[server_id].name, work, setback)
        for (server_id, model, work), setback in provision.setbacks.items()
        if model == place.model and setback.again_ns > now_ns and _is_wanted(work, servers.get(server_id), model)
    ]
    return {
        "name": place.settings.name,
        "copies": place.copies,
        "servers": list(place.servers),
        "on_disk": list(place.on_disk),
        "loaded": list(place.loaded),
        "warm": place.settings.warm,
        "prune": place.settings.prune,
        "under_way": [
            {"server": job.server.name, "work": job.work, "s": _s_ago(job.started_ns, now_ns),
             "done": shares.get(job.id)}
            for job in jobs
        ],
        "waiting": [
            {"server": name, "work": work, "why": setback.why, "times": setback.times,
             "again_in_s": round((setback.again_ns - now_ns) / SECOND_NS, 1)}
            for name, work, setback in waiting
        ],
    }  # fmt: skip


def _is_wanted(work: Work, server: Server | None, model: str) -> bool:
    """Tell whether a server still lacks what some work is for: what has gone well may rest, too."""
    record = server.models.get(model) if server is not None else None
    if work is Work.WARM:
        return record is not None and not record.loaded
    return (record is not None and record.available is not None) is (work is Work.DELETE)


def _model(record: ServerModel) -> dict[str, Any]:
    return {
        "on_disk": record.available is not None,
        "loaded": record.loaded,
        "in_flight": record.in_flight,
        "digest": record.available.digest if record.available is not None else None,
        "first_token_ms": round(record.known_ns / MS_NS, 1) if record.known_ns else None,
        "tokens_per_s": round(record.token_rate, 1) if record.token_rate is not None else None,
    }


def _s_ago(then_ns: int | None, now_ns: int) -> float | None:
    return None if then_ns is None else round((now_ns - then_ns) / SECOND_NS, 1)


COLUMNS = (
    "SERVER",
    "STATE",
    "HEALTH",
    "RELIABILITY",
    "IN FLIGHT",
    "MODELS",
    "LOADED",
    "TTFT",
    "TOKENS/S",
    "SYNCED",
    "LAST ERROR",
)


def as_table(told: dict[str, Any]) -> str:
    """Return the same for people: a line for each server."""
    lines = align([COLUMNS, *(_row(server) for server in told["servers"])])
    now = (
        f"now: {counted(told['requests'], 'request')} ({told['queued']} queued), "
        f"{counted(told['attempts'], 'attempt')} ({counted(told['retries'], 'retry')})"
    )
    warnings = "".join(f"warning: {text}\n" for text in told["warnings"])
    models = f"\n{models_table(told['models'])}\n" if told["models"] else ""
    return f"{lines}\n{models}\n{now}\n{_since_start(told['since_start'])}\n{warnings}"


MODEL_COLUMNS = ("MODEL", "COPIES", "PLACED ON", "ON DISK", "LOADED", "UNDER WAY")


def models_table(models: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each declared model: where it is to be and is, what is being done; then what has failed."""
    rows = align([MODEL_COLUMNS, *map(_models_row, models)])
    return "\n".join([rows, *(line for model in models for line in _failures(model))])


def _models_row(model: Mapping[str, Any]) -> tuple[str, ...]:
    there = [name for name in model["servers"] if name in model["on_disk"]]
    names = (", ".join(model[key]) or "-" for key in ("servers", "on_disk", "loaded"))
    doing = "; ".join(map(_doing, model["under_way"]))
    return model["name"], f"{len(there)} of {model['copies']}", *names, doing or "-"


def _failures(model: Mapping[str, Any]) -> Iterator[str]:
    """Yield what waits to be tried again, servers of which the same is true together."""
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for waits in model["waiting"]:
        alike.setdefault((waits["work"], waits["why"]), []).append(waits)
    for (work, why), of in alike.items():
        names, again_s = ", ".join(waits["server"] for waits in of), min(waits["again_in_s"] for waits in of)
        yield f"{work} {model['name']} on {names}: {why} (again in {again_s:.0f} s)"


def _doing(job: Mapping[str, Any]) -> str:
    done = "" if job["done"] is None else f" {100 * job['done']:.0f} %"
    return f"{job['work']} on {job['server']}{done} ({job['s']:.0f} s)"


def _since_start(told: dict[str, Any]) -> str:
    ends = ", ".join(f"{number} {outcome}" for outcome, number in told["requests"].items())
    kinds = ", ".join(f"{number} {kind}" for kind, number in told["attempts"].items() if number)
    n_attempts = sum(told["attempts"].values())
    return (
        f"since the start, {told['seconds']:.0f} s ago: {counted(sum(told['requests'].values()), 'request')} ({ends}); "
        f"{counted(n_attempts, 'attempt')}{f' ({kinds})' if kinds else ''}; "
        f"{counted(told['wasted_tokens'], 'token')} wasted; {counted(told['late_events'], 'late event')}"
    )


def _row(server: dict[str, Any]) -> tuple[str, ...]:
    models: dict[str, dict[str, Any]] = server["models"]
    loaded = [name for name, model in models.items() if model["loaded"]]
    known = [model for model in models.values() if model["first_token_ms"] is not None]
    rates = [model["tokens_per_s"] for model in models.values() if model["tokens_per_s"] is not None]
    error = server["last_error"]
    return (
        server["name"],
        server["state"] + (" (doubted)" if server["doubted"] else ""),
        f"{server['health']:.1f}",
        server["reliability"],
        str(server["in_flight"]),
        str(sum(1 for model in models.values() if model["on_disk"])),
        ", ".join(loaded) or "-",
        f"{min(model['first_token_ms'] for model in known):.0f} ms" if known else "-",
        f"{max(rates):.0f}" if rates else "-",
        "never" if server["last_sync_s_ago"] is None else f"{server['last_sync_s_ago']:.0f} s ago",
        "-" if error is None else f"{error} ({server['last_error_s_ago']:.0f} s ago)",
    )


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines whose columns are aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
