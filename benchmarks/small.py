"""What small requests cost on connections that stay open: requests for each second of the proxy's own CPU time.

16 connections ask one after the other as fast as they are answered (wrk, one thread; without it, an own client). The
server is benchmarks/upstream.py. ollama-lb answers all but the last two from what it knows (`/api/show` from an answer
that it has kept), where nginx and haproxy ask the server; a path that Ollama does not know, without and with a body, it
passes on as well. Programs take turns; figures are medians of the repetitions.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import uvloop

from benchmarks import peers
from benchmarks.kit import Figure, Report, find_program, finish, median, parser, ratios, spread, workspace
from benchmarks.processes import cpu_ns, upstream

CONNECTIONS = 16
REPEATS, QUICK_REPEATS = 5, 1
SECONDS, QUICK_SECONDS = 2, 1
PASS_BAR, STATE_BAR = 0.2, 0.5


@dataclass(frozen=True)
class Kind:
    """A request; `bar`: how much of nginx's requests for each CPU-second there must be at least."""

    name: str
    target: str
    body: str
    bar: float | None


KINDS = (
    Kind("/", "/", "", None),
    Kind("/api/version", "/api/version", "", None),
    Kind("/api/tags", "/api/tags", "", STATE_BAR),
    Kind("/v1/models", "/v1/models", "", None),
    Kind("/api/show", "/api/show", '{"model": "tiny"}', None),
    Kind("pass-through", "/api/unknown-path", "", PASS_BAR),
    Kind("pass-through, POST", "/api/unknown-path", '{"some": "thing", "that": "is small"}', None),
)


@dataclass(frozen=True)
class Got:
    """What a load came to."""

    requests: int
    failed: int
    seconds: float
    cpu_s: float = 0.0

    @property
    def per_cpu_s(self) -> float:
        """Requests for each second of CPU time."""
        return self.requests / self.cpu_s if self.cpu_s else 0.0


def wrk_output(text: str, seconds: float) -> Got:
    """Read what wrk prints. Raises ValueError when that is not wrk's."""
    counted = re.search(r"(\d+) requests in", text)
    if counted is None:
        raise ValueError(f"wrk: {text}")
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    failed = (int(refused[1]) if refused else 0) + sum(map(int, errors.groups() if errors else ()))
    return Got(int(counted[1]), failed, seconds)


def _wrk(port: int, kind: Kind, seconds: int, where: Path) -> Got:
    script = where / "wrk.lua"
    lines = ['wrk.headers["User-Agent"] = "ollama-python/0.5.1"', 'wrk.headers["Accept"] = "application/json"']
    if kind.body:
        lines += [
            'wrk.method = "POST"',
            f"wrk.body = '{kind.body}'",
            'wrk.headers["Content-Type"] = "application/json"',
        ]
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", str(script)]
    command += [f"http://127.0.0.1:{port}{kind.target}"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return wrk_output(done.stdout + done.stderr, time.monotonic() - begun)


class _Asker(asyncio.Protocol):
    """One connection that asks again and again. Reads answers with a length only, or with a chunked body's end."""

    def __init__(self, request: bytes, until: float) -> None:
        self._request = request
        self._until = until
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self.over = asyncio.get_running_loop().create_future()
        self.answered = self.failed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank:
            return
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if len(body) < int(length[1]) if length else not body.endswith(b"0\r\n\r\n"):
            return
        self.answered += 1
        self.failed += not head.startswith(b"HTTP/1.1 200")
        self._received = b""
        if self._transport is None or time.monotonic() >= self._until:
            self.over.set_result(None)
        else:
            self._transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if not self.over.done():
            self.failed += 1
            self.over.set_result(None)


async def _ask(port: int, kind: Kind, seconds: float) -> Got:
    head = f"{'POST' if kind.body else 'GET'} {kind.target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += "User-Agent: ollama-python/0.5.1\r\nAccept: application/json\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(kind.body)}\r\n" if kind.body else ""
    request, begun = f"{head}\r\n{kind.body}".encode(), time.monotonic()
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: _Asker(request, begun + seconds), "127.0.0.1", port)
        for _ in range(CONNECTIONS)
    ]
    await asyncio.wait([asker.over for _, asker in made], timeout=seconds + 10)
    for transport, _ in made:
        transport.abort()
    requests, failed = (sum(values) for values in zip(*((each.answered, each.failed) for _, each in made), strict=True))
    return Got(requests, failed, time.monotonic() - begun)


def ask(port: int, kind: Kind, seconds: float, where: Path, *, with_wrk: bool) -> Got:
    """Ask for some seconds; wrk takes whole ones."""
    return _wrk(port, kind, round(seconds), where) if with_wrk else uvloop.run(_ask(port, kind, seconds))


def contenders() -> tuple[dict[str, peers.Starter], list[str]]:
    """Return what can be measured here, and a word on what cannot."""
    here, missing = peers.patient()
    logging: peers.Starter = partial(peers.nginx, patience_s=peers.LONG_S, access_log=True)
    wanted = {**here, "nginx with access_log": logging} if "nginx" in here else here
    order = ("ollama-lb", "nginx", "nginx with access_log", "haproxy")
    return {name: wanted[name] for name in order if name in wanted}, missing


@contextlib.contextmanager
def _all_running(found: dict[str, peers.Starter]) -> Iterator[dict[str, tuple[peers.Proxy, Path]]]:
    """Run all programs before the same server: idle ones cost nothing."""
    with contextlib.ExitStack() as stack:
        ports, _ = stack.enter_context(upstream(1))
        running = {}
        for name, start in found.items():
            where = stack.enter_context(workspace())
            running[name] = stack.enter_context(start(ports, where)), where
        yield running


def measure(
    found: dict[str, peers.Starter], kinds: Sequence[Kind], repeats: int, seconds: int
) -> dict[tuple[str, str], list[Got]]:
    """Let the programs take turns; what came of each repetition, by the names of kind and program."""
    with_wrk = find_program("wrk") is not None
    got: dict[tuple[str, str], list[Got]] = {(kind.name, name): [] for kind in kinds for name in found}
    with _all_running(found) as running:
        for kind in kinds:
            for proxy, where in running.values():
                ask(proxy.port, kind, 0.1, where, with_wrk=False)  # not counted: imports, connections
        for _, kind, name in itertools.product(range(repeats), kinds, found):
            proxy, where = running[name]
            before = cpu_ns(proxy.pid)
            one = ask(proxy.port, kind, seconds, where, with_wrk=with_wrk)
            got[kind.name, name].append(replace(one, cpu_s=(cpu_ns(proxy.pid) - before) / 1e9))
    return got


def report_of(kinds: Sequence[Kind], got: dict[tuple[str, str], list[Got]]) -> Report:
    """Put the repetitions together, and judge ours."""
    columns = ("request, program", "a CPU-second", "x nginx", "CPU us each", "a second", "failed")
    report = Report("small", f"small: requests, {CONNECTIONS} connections, median (min-max)", columns)
    bars = {kind.name: kind.bar for kind in kinds}
    for (kind, program), each in got.items():
        name, rates = f"{kind}, {program}", [one.per_cpu_s for one in each]
        to_nginx = ratios(rates, [one.per_cpu_s for one in got.get((kind, "nginx"), [])])
        row = [name, spread(rates, 0), spread(to_nginx, 2), spread([1e6 / rate for rate in rates if rate])]
        row += [spread([one.requests / one.seconds for one in each], 0), str(sum(one.failed for one in each))]
        report.rows.append(tuple(row))
        report.data[name] = [one.__dict__ for one in each]
        report.figures[f"{name}: a CPU-second"] = Figure(rates, "requests", higher_is_better=True, judged=False)
        if program == "ollama-lb":
            report.bars[f"{kind}: all are answered with 200"] = all(one.requests and not one.failed for one in each)
            if to_nginx:
                report.figures[f"{name}: a CPU-second, to nginx"] = Figure(to_nginx, "x", higher_is_better=True)
            if to_nginx and (bar := bars[kind]) is not None:
                report.bars[f"{kind}: >= {bar:g} x nginx's"] = median(to_nginx) >= bar
    return report


def run(*, repeats: int = REPEATS, seconds: int = SECONDS, kinds: Sequence[Kind] = KINDS) -> Report:
    """Measure all kinds."""
    found, missing = contenders()
    report = report_of(kinds, measure(found, kinds, repeats, seconds))
    report.notes += missing
    if find_program("wrk") is None:
        report.notes.append("wrk is not installed: an own client asks")
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.small --quick /api/tags pass-through")
    options.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(kind.name for kind in KINDS)}")
    words = f"how often each is measured; default {REPEATS}, with --quick {QUICK_REPEATS}"
    options.add_argument("--repeats", type=int, help=words)
    args = options.parse_args(argv)
    kinds = [kind for kind in KINDS if not args.kinds or kind.name in args.kinds]
    if unknown := set(args.kinds) - {kind.name for kind in KINDS}:
        options.error(f"no such kind: {', '.join(sorted(unknown))}")
    repeats = args.repeats or (QUICK_REPEATS if args.quick else REPEATS)
    seconds = QUICK_SECONDS if args.quick else SECONDS
    return finish(run(repeats=repeats, seconds=seconds, kinds=kinds), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
