"""What the oracle is told of a server: it comes true, and the server does not notice that it was asked."""

from __future__ import annotations

from lbcore.schema import SECOND_NS
from simulator.cli import builder
from simulator.fake_ollama import FakeOllama
from simulator.fakes.engine import Engine, Speed
from simulator.fakes.jobs import Job
from simulator.fakes.specs import FakeModel, FakeSpec, runner_options
from simulator.policies.known import policy
from simulator.reports.summary import flat, summarise
from simulator.scenario import run_scenario
from tests.simulator.worlds import scenario, tables

SPEED = Speed(first_token_ns=50, prefill_rate=1e8, token_ns=7, batch_slowdown=0.5, prefill_interference=0.3)


def test_the_twin_of_an_engine_goes_on_as_the_engine_does_and_by_itself() -> None:
    engine = Engine(SPEED)
    for stream_id in (1, 2, 3):
        engine.add(stream_id, 10 * stream_id, [1, 5, 9], 10 * stream_id)
    engine.advance(120)
    twin, control = engine.twin(), engine.twin()
    assert twin.advance(10_000) == control.advance(10_000)
    assert twin.next_ns is None
    after = engine.twin()
    assert after.next_ns == engine.next_ns is not None
    assert engine.advance(10_000) == after.advance(10_000)


def test_what_the_twin_of_a_server_does_is_not_seen_by_the_server() -> None:
    model = FakeModel("m:latest")
    fake = FakeOllama(FakeSpec("a", (model,), ("m:latest",), num_parallel=2), 0)

    def job(job_id: int) -> Job:
        return Job(job_id, "m:latest", runner_options(model, None), SECOND_NS, marks=(1, 40), blocks=(job_id,))

    for job_id in (1, 2, 3):  # two run, one waits
        fake.submit(job(job_id), 0)
    fake.advance(100_000_000)
    control, twin = fake.twin(), fake.twin()
    twin.submit(job(4), 100_000_000)
    twin.end(1, 100_000_000)
    twin.set_factors(20.0, 20.0, 100_000_000)
    twin.delete("m", 100_000_000)
    twin.advance(20 * SECOND_NS)
    assert fake.ps(100_000_000) == control.ps(100_000_000)
    assert fake.advance(20 * SECOND_NS) == control.advance(20 * SECOND_NS)


def test_the_oracle_is_never_slower_than_a_choice_at_random_with_a_slow_server() -> None:
    case = scenario(tables("a", "b", "c", fault={"kind": "slow", "servers": ["b"], "from": "2s"}))
    flats = {name: flat(summarise(run_scenario(case, 1, build=builder(policy(name))))) for name in ("oracle", "random")}
    assert flats["oracle"]["ttft_max_ms"] < 60 < flats["random"]["ttft_max_ms"]
