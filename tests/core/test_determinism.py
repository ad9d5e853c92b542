"""Same config, seed and events: the same commands, byte for byte, in every process (design §4)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from random import Random

from lbcore import commands as cmd
from lbcore import events
from lbcore.balancer import LoadBalancer
from lbcore.config import Config, HealthSettings, RaceSettings, ServerSettings
from lbcore.events import ActiveModel, Event, ModelInfo, Reason
from lbcore.ollama import RequestKind, default_routes

MODELS = ("llama3.2", "qwen2.5:0.5b", "gone")
MS_NS = 1_000_000


def _listing(rng: Random) -> tuple[tuple[ModelInfo, ...], tuple[ActiveModel, ...]]:
    on_disk = [name for name in MODELS[:2] if rng.random() < 0.9]
    available = tuple(ModelInfo(name, f"sha-{name}", "2026-01-01T00:00:00Z", "{}") for name in on_disk)
    return available, tuple(ActiveModel(name, "{}") for name in on_disk if rng.random() < 0.7)


def digest_of_a_run(seed: int, n_events: int = 6000) -> str:
    """Drive a balancer at random and return a hash over all its commands."""
    race = RaceSettings(racers_max=3)
    servers = tuple(ServerSettings(url=f"http://s{i}:11434", name=f"s{i}", slots=2) for i in range(6))
    config = Config(servers=servers, race=race, routes=default_routes(race), health=HealthSettings(resurrect=0.2))
    balancer = LoadBalancer(config, Random(seed))
    rng, told = Random(seed + 1), hashlib.sha256()
    attempts: list[int] = []
    requests: list[int] = []
    probes: list[tuple[int, int]] = []
    now_ns = 0

    def take(commands: list[cmd.Command]) -> None:
        for command in commands:
            told.update(repr(command).encode())
            if isinstance(command, cmd.StartAttempt):
                attempts.append(command.attempt_id)
            elif isinstance(command, cmd.StartProbe):
                probes.append((command.server_id, command.probe_id))

    def some_attempt() -> int:
        return attempts[rng.randrange(max(0, len(attempts) - 12), len(attempts))] if attempts else 1

    def arrival() -> Event:
        requests.append(len(requests) + 1)
        kind = rng.choice([RequestKind.GENERATE] * 8 + [RequestKind.LOAD, RequestKind.UNLOAD])
        stream = kind is RequestKind.GENERATE and rng.random() < 0.8
        return events.RequestArrived(requests[-1], "/api/chat", rng.choice(MODELS), kind, stream, generates=True)

    for _ in range(n_events):
        now_ns += rng.randrange(20 * MS_NS)
        deadline = balancer.next_deadline()
        if deadline is not None and deadline <= now_ns:
            take(balancer.handle_timeout(now_ns))
        if probes and rng.random() < 0.5:
            server_id, probe_id = probes.pop(0)
            reason = Reason.CONNECT_REFUSED if rng.random() < 0.2 else None
            take(balancer.handle(events.ProbeCompleted(server_id, probe_id, reason, "0.9.0"), now_ns))
            if reason is None:
                take(balancer.handle(events.ModelsSynced(server_id, probe_id, *_listing(rng)), now_ns))
        kind = rng.random()
        if kind < 0.2:
            event = arrival()
        elif kind < 0.4:
            event = events.AttemptConnected(some_attempt())
        elif kind < 0.6:
            event = events.HeadReceived(some_attempt(), 200)
        elif kind < 0.75:
            event = events.FirstTokenReceived(some_attempt())
        elif kind < 0.88:
            event = events.StreamEnded(some_attempt())
        elif kind < 0.97:
            event = events.AttemptFailed(
                some_attempt(), rng.choice(list(Reason)[:14]), 500, "x", answered=rng.random() < 0.5
            )
        else:
            event = events.DownstreamClosed(rng.randrange(1, len(requests) + 2))
        take(balancer.handle(event, now_ns))
        balancer.note_chunk(some_attempt(), 100, 1, now_ns)
    return told.hexdigest()


def _digest_in_a_process(hash_seed: str) -> str:
    code = "from tests.core.test_determinism import digest_of_a_run; print(digest_of_a_run(7))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_processes_with_different_hash_seeds_give_the_same_commands() -> None:
    assert _digest_in_a_process("0") == _digest_in_a_process("4711") == digest_of_a_run(7)


def test_another_seed_gives_other_commands() -> None:
    assert digest_of_a_run(7) != digest_of_a_run(8)
