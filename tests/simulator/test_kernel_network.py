"""Virtual time and wires."""

from __future__ import annotations

from random import Random

from lbcore.schema import MS_NS, SECOND_NS
from simulator.kernel import Kernel
from simulator.network import RETRANSMIT_NS, Link, LinkFault, LinkFaultKind, Wire


def test_what_is_planned_for_one_moment_happens_in_the_order_of_planning() -> None:
    kernel = Kernel()
    seen: list[object] = []
    kernel.at(5, seen.append, "b")
    kernel.at(3, seen.append, "a")
    kernel.at(5, seen.append, "c")
    kernel.at(5, lambda: kernel.at(1, seen.append, "d"))  # the past is now
    kernel.run_until(5)
    assert seen == ["a", "b", "c", "d"]
    assert kernel.now_ns == 5


def test_a_run_stops_when_it_is_over() -> None:
    kernel = Kernel()
    seen: list[object] = []
    for moment in range(10):
        kernel.at(moment, seen.append, moment)
    kernel.run_until(100, over=lambda: len(seen) == 3)
    assert (seen, kernel.now_ns, kernel.next_ns) == ([0, 1, 2], 2, 3)


def wire(link: Link, *faults: LinkFault) -> Wire:
    return Wire(link, faults, Random(1))


def test_a_message_takes_its_latency_and_its_bytes() -> None:
    assert wire(Link(latency_ns=MS_NS, bandwidth=1e6)).arrival_ns(10, 500) == 10 + MS_NS + 500_000


def test_a_lost_message_comes_again_after_the_timeout() -> None:
    lossy = wire(Link(latency_ns=MS_NS, loss=0.5))
    late = [lossy.arrival_ns(0) - MS_NS for _ in range(1000)]
    assert {delay % RETRANSMIT_NS for delay in late} == {0}
    assert 0.4 < sum(delay > 0 for delay in late) / 1000 < 0.6


def test_jitter_is_added_on_average() -> None:
    shaky = wire(Link(latency_ns=MS_NS, jitter_ns=MS_NS))
    assert 1.9 < sum(shaky.arrival_ns(0) for _ in range(5000)) / 5000 / MS_NS < 2.1


def test_nothing_arrives_in_a_partition_but_after_it() -> None:
    cut = wire(Link(), LinkFault(LinkFaultKind.PARTITION, SECOND_NS, 2 * SECOND_NS))
    assert cut.arrival_ns(0) < SECOND_NS
    assert 2 * SECOND_NS < cut.arrival_ns(SECOND_NS + 5) < 2 * SECOND_NS + 2 * RETRANSMIT_NS
    cut.heal(SECOND_NS + 6)
    assert cut.arrival_ns(SECOND_NS + 7) < SECOND_NS + MS_NS
