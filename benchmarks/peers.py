"""The programs under test as subprocesses: ollama-lb itself, and nginx and haproxy set up as well as they can be."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.kit import ended, find_program, free_port, wait_listening

_NGINX_CONNECTIONS = 65536
_IN_FLIGHT_MAX, _FIRST_TOKEN_S = 8, 120  # ollama-lb's defaults
LONG_S = 60  # the same for loads on purpose, where nothing is broken
SLOTS_MAX = 1024  # of one server, as many as ollama-lb's settings allow
PATIENCE_S = 10  # silence after which nginx and haproxy give a server up, and ollama-lb a stream


@dataclass(frozen=True)
class Proxy:
    """A running program under test."""

    name: str
    port: int
    log: Path
    pid: int
    command: tuple[str, ...]

    def status(self) -> dict[str, Any]:
        """Return ollama-lb's /status."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/status", timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def decisions(self) -> list[dict[str, Any]]:
        """Return ollama-lb's log lines that are JSON objects."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


Starter = Callable[[Sequence[int], Path], AbstractContextManager[Proxy]]


@contextlib.contextmanager
def _started(name: str, command: list[str], port: int, log: Path) -> Iterator[Proxy]:
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process, ended(process):
        wait_listening(port, process, log)
        yield Proxy(name, port, log, process.pid, tuple(command))


@contextlib.contextmanager
def ollama_lb(
    ports: Sequence[int], where: Path, extra: str = "", slots: int = 4, *, patience_s: int = PATIENCE_S
) -> Iterator[Proxy]:
    """Run `ollama-lb run` with default settings but for `silence`; it is ready when all servers were read.

    The first token of a loaded model may take as long as any silence when that is longer than by default.
    `slots` of each server; above the default of `in_flight_max`, that is raised as well. Its log goes to a file.
    """
    port = free_port()
    lines = [f'listen = "127.0.0.1:{port}"', "seed = 1", extra, "[timeouts]", f'silence = "{patience_s}s"']
    lines += [f'first_token_warm = "{max(_FIRST_TOKEN_S, patience_s)}s"', "[log]", 'format = "json"']
    for index, server in enumerate(ports):
        lines += ["[[servers]]", f'url = "http://127.0.0.1:{server}"', f'name = "s{index}"', f"slots = {slots}"]
        lines += [f"in_flight_max = {slots}"] if slots > _IN_FLIGHT_MAX else []
    config = where / "lb.toml"
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "lbio", "run", str(config)]
    with _started("ollama-lb", command, port, where / "lb.log") as proxy:
        until = time.monotonic() + 10
        while any(server["health"] < 1 for server in proxy.status()["servers"]):
            if time.monotonic() > until:
                raise RuntimeError(f"the servers were not read: {proxy.status()}")
            time.sleep(0.05)
        yield proxy


@contextlib.contextmanager
def nginx(
    ports: Sequence[int], where: Path, *, patience_s: int = PATIENCE_S, access_log: bool = False
) -> Iterator[Proxy]:
    """Run nginx: one worker, least_conn, no buffering, every kind of retry it has (POST included)."""
    port = free_port()
    servers = "\n".join(f"server 127.0.0.1:{p} max_fails=1 fail_timeout=10s;" for p in ports)
    temp = "\n".join(
        f"{kind}_temp_path {where}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = where / "nginx.conf"
    config.write_text(
        f"""daemon off; worker_processes 1; user root; pid {where}/nginx.pid; error_log {where}/nginx.err warn;
events {{ worker_connections {_NGINX_CONNECTIONS}; }}
http {{
  access_log {f"{where}/access.log" if access_log else "off"}; {temp}
  upstream ollama {{ least_conn; {servers} keepalive 32; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096; keepalive_requests 1000000;
    location / {{
      proxy_pass http://ollama; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host localhost;
      proxy_buffering off; proxy_connect_timeout 1s; proxy_read_timeout {patience_s}s;
      proxy_next_upstream error timeout invalid_header http_500 http_502 http_503 non_idempotent;
    }}
  }}
}}
""",
        encoding="utf-8",
    )
    command = [find_program("nginx") or "nginx", "-e", f"{where}/nginx.err", "-c", str(config)]
    with _started("nginx", command, port, where / "nginx.log") as proxy:
        yield proxy


@contextlib.contextmanager
def haproxy(ports: Sequence[int], where: Path, *, patience_s: int = PATIENCE_S) -> Iterator[Proxy]:
    """Run haproxy: one thread, leastconn, health checks each second, L7 retries of all that can be retried."""
    port = free_port()
    servers = "\n".join(f"  server s{i} 127.0.0.1:{p} check inter 1s fall 2 rise 2" for i, p in enumerate(ports))
    config = where / "haproxy.cfg"
    config.write_text(
        f"""global
  nbthread 1
defaults
  mode http
  timeout connect 1s
  timeout client 600s
  timeout server {patience_s}s
  retries 3
  option redispatch 1
  option http-buffer-request
  option http-no-delay
  retry-on all-retryable-errors
frontend front
  bind 127.0.0.1:{port}
  default_backend ollama
backend ollama
  balance leastconn
  option httpchk GET /api/version
{servers}
""",
        encoding="utf-8",
    )
    command = [find_program("haproxy") or "haproxy", "-db", "-f", str(config)]
    with _started("haproxy", command, port, where / "haproxy.log") as proxy:
        time.sleep(1.2)  # its first checks
        yield proxy


def found() -> tuple[dict[str, Starter], list[str]]:
    """Return the programs that can be run here, ollama-lb first, and a word on each that cannot."""
    others: dict[str, Starter] = {"nginx": nginx, "haproxy": haproxy}
    here: dict[str, Starter] = {name: start for name, start in others.items() if find_program(name)}
    missing = [f"{name} is not installed: left out" for name in others if name not in here]
    return {"ollama-lb": ollama_lb, **here}, missing


def patient() -> tuple[dict[str, Starter], list[str]]:
    """Return the same, set up for loads that a healthy server bears: they wait long, and slots are no limit."""
    here, missing = found()
    ready: dict[str, Starter] = {
        "ollama-lb": partial(ollama_lb, slots=SLOTS_MAX, patience_s=LONG_S),
        "nginx": partial(nginx, patience_s=LONG_S),
        "haproxy": partial(haproxy, patience_s=LONG_S),
    }
    return {name: ready[name] for name in here}, missing
