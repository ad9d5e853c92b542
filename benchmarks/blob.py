"""What a blob of gigabytes costs: memory and time of its way through the balancer to three servers at once.

Three fake servers, a process each, count and hash what they get and keep nothing; the client sends the same MiB again
and again. The balancer's peak of resident memory is Linux's own record of it (`VmHWM`), read before and after. For
comparison, the same blob goes straight to one of the servers.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks import peers
from benchmarks.kit import Report, fake_fleet, finish, number, parser, workspace

MIB = 1 << 20
SERVERS = 3
BAR_MIB = 150.0
QUICK_MIB = 256
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Blob:
    """`n_pieces` times the same MiB."""

    piece: bytes
    n_pieces: int
    digest: str


def blob_of(n_mib: int) -> Blob:
    """Make a blob of so many MiB."""
    piece = Random(1).randbytes(MIB)
    sha = hashlib.sha256()
    for _ in range(n_mib):
        sha.update(piece)
    return Blob(piece, n_mib, f"sha256:{sha.hexdigest()}")


def send(port: int, blob: Blob, *, chunked: bool = False) -> tuple[int, float]:
    """Upload it; return the answer's status, and how long that took, s."""
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {blob.n_pieces * MIB}"
    head = f"POST /api/blobs/{blob.digest} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{framing}\r\n\r\n"
    piece = b"%x\r\n%s\r\n" % (MIB, blob.piece) if chunked else blob.piece
    begun_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S) as sock:
        sock.sendall(head.encode())
        for _ in range(blob.n_pieces):
            sock.sendall(piece)
        if chunked:
            sock.sendall(b"0\r\n\r\n")
        answer = sock.recv(65536)
    return int(answer.split(b" ")[1]), time.monotonic() - begun_s


def is_there(port: int, blob: Blob) -> bool:
    """Tell whether a server has it: only if it got every byte, since it checks the digest."""
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S) as sock:
        sock.sendall(f"HEAD /api/blobs/{blob.digest} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        return sock.recv(65536).startswith(b"HTTP/1.1 200 ")


def peak_mib(pid: int) -> float:
    """Return the most memory that a process has ever had, MiB."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell")


def cpu_s(pid: int) -> float:
    """Return how much CPU time a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(*, n_mib: int = 2048) -> Report:
    """Send one blob with its length, a smaller one in chunks, and one straight to a server."""
    columns = ("way", "MiB", "s", "MiB/s", "MiB per CPU-second", "before, MiB", "peak, MiB", "status", "have it")
    report = Report("blob", f"blob: {n_mib} MiB through to {SERVERS} servers", columns)
    with contextlib.ExitStack() as stack:
        fleets = [stack.enter_context(fake_fleet([{"name": f"s{i}"}])) for i in range(SERVERS)]
        ports = [fleet.ports[0] for fleet in fleets]
        where = stack.enter_context(workspace())
        proxy = stack.enter_context(peers.ollama_lb(ports, where))
        ways = (("with its length", proxy.port, n_mib, False), ("in chunks", proxy.port, n_mib // 2, True))
        for way, port, size_mib, chunked in (*ways, ("straight to one", ports[0], n_mib // 4, False)):
            blob = blob_of(size_mib)
            before_mib, before_s = peak_mib(proxy.pid), cpu_s(proxy.pid)
            status, took_s = send(port, blob, chunked=chunked)
            n_there = sum(is_there(server, blob) for server in ports)
            through = port == proxy.port
            found = {"mib": size_mib, "s": took_s, "before_mib": before_mib, "peak_mib": peak_mib(proxy.pid)}
            found["cpu_s"] = cpu_s(proxy.pid) - before_s
            n_servers = SERVERS if through else 1
            figures = [number(took_s, 2), number(size_mib / took_s)]
            own = [size_mib / max(found["cpu_s"], 0.01), before_mib, found["peak_mib"]]
            figures += [number(figure) for figure in own] if through else ["-"] * len(own)
            report.rows.append((way, str(size_mib), *figures, str(status), str(n_there)))
            report.data[way] = found
            report.bars[f"{way}: 201, and {n_servers} have it"] = status == 201 and n_there == n_servers
            if through:
                report.bars[f"{way}: memory <= {BAR_MIB:g} MiB"] = found["peak_mib"] <= BAR_MIB
    report.notes.append("memory and CPU time are the balancer's own; peak: of its whole life until then")
    report.notes.append("all processes share the cores of this machine; each server hashes what it gets")
    return report


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    options = parser(__doc__ or "", "python -m benchmarks.blob --mib 8192")
    options.add_argument("--mib", type=int, help="how large the blob is; default 2048")
    args = options.parse_args(argv)
    return finish(run(n_mib=args.mib or (QUICK_MIB if args.quick else 2048)), as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
