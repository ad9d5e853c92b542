"""What the model `lb` says: the answers of /status and /explain as text for a terminal (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lbcore.units import counted
from lbio.answers.status import align, models_table

Told = Mapping[str, Any]
"""What /status tells."""

HELP = """\
This is ollama-lb, which stands before your servers. Ask it for:

  status          how the servers are, what is under way, what came of all so far
  servers         each server: its state, what it works on, its last error
  models          each model: on how many servers it is, and where it is loaded
  why REQUEST_ID  why a request went where it went; its id is in the log, and in
                  the header X-Ollama-LB-Request-Id of the answer

as in: ollama run lb status"""


def status_text(told: Told) -> str:
    """Return how all is, in a few lines."""
    return "\n".join(_status_lines(told))


def _status_lines(told: Told) -> Iterator[str]:
    states = Counter(server["state"] for server in told["servers"])
    ways = ", ".join(f"{number} {state}" for state, number in states.items())
    yield f"{counted(len(told['servers']), 'server')}: {ways}" if ways else "no server"
    yield from _errors(server for server in told["servers"] if server["state"] == "dead")
    yield (
        f"under way: {counted(told['requests'], 'request')} ({told['queued']} queued), "
        f"{counted(told['attempts'], 'attempt')} ({counted(told['retries'], 'retry')})"
    )
    since = told["since_start"]
    yield f"since the start, {since['seconds']:.0f} s ago:"
    yield f"  {_counts(since['requests'], 'request')}"
    yield f"  {_counts(since['attempts'], 'attempt')}"
    yield f"  {counted(since['wasted_tokens'], 'token')} wasted"
    yield from (f"warning: {text}" for text in told["warnings"])


def _counts(numbers: Mapping[str, int], what: str) -> str:
    """Return `3 requests (2 done, 1 failed)`."""
    of = ", ".join(f"{number} {kind}" for kind, number in numbers.items() if number)
    return f"{counted(sum(numbers.values()), what)}{f' ({of})' if of else ''}"


def _errors(servers: Iterator[Mapping[str, Any]]) -> Iterator[str]:
    for server in servers:
        if server["last_error"] is not None:
            yield f"  {server['name']}: {server['last_error']} ({server['last_error_s_ago']:.0f} s ago)"


def servers_text(told: Told) -> str:
    """Return a line for each server, and its last error below them."""
    rows = [("SERVER", "STATE", "HEALTH", "IN FLIGHT", "MODELS", "LOADED"), *map(_server_row, told["servers"])]
    errors = list(_errors(iter(told["servers"])))
    return "\n".join([align(rows), *(["", "last errors:", *errors] if errors else [])])


def _server_row(server: Mapping[str, Any]) -> tuple[str, ...]:
    models = server["models"]
    return (
        server["name"],
        server["state"] + (" (doubted)" if server["doubted"] else ""),
        f"{server['health']:.1f}",
        str(server["in_flight"]),
        str(sum(model["on_disk"] for model in models.values())),
        ", ".join(name for name, model in models.items() if model["loaded"]) or "-",
    )


def models_text(told: Told) -> str:
    """Return a line for each model of a live server, and below them where declared ones are to be."""
    alive = [server for server in told["servers"] if server["state"] == "healthy"]
    names = sorted({name for server in alive for name in server["models"]})
    rows = [("MODEL", "SERVERS", "IN FLIGHT", "LOADED ON")]
    for name in names:
        held = {server["name"]: server["models"][name] for server in alive if name in server["models"]}
        n_with = sum(model["on_disk"] or model["loaded"] for model in held.values())
        in_flight = sum(model["in_flight"] for model in held.values())
        loaded = ", ".join(server for server, model in held.items() if model["loaded"])
        rows.append((name, f"{n_with}/{len(told['servers'])}", str(in_flight), loaded or "-"))
    found = align(rows) if names else "no live server has a model"
    return f"{found}\n\n{models_table(told['models'])}" if told["models"] else found
