"""What the I/O benchmarks count is what happened, and what they make of it is right. Nothing here looks at times."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import memory, peers, relay, relay_times, small
from benchmarks.kit import Report, find_program, percentile, ratios, spread, workspace
from benchmarks.processes import cpu_ns, family, load, upstream
from benchmarks.processes import memory as memory_of
from benchmarks.streams import Load, Seen, even, load_of, scattered
from benchmarks.upstream import Pace

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", ["relay", "small", "memory", "upstream", "streams"])
def test_each_script_says_what_it_does(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5


def test_percentiles_are_values_that_occurred() -> None:
    values = list(range(1, 101))
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_one_repetition_has_no_spread() -> None:
    assert spread([2.0]) == "2.0"
    assert spread([3.0, 1.0, 2.0]) == "2.0 (1.0-3.0)"
    assert spread([]) == "-"


def test_ratios_are_to_the_same_repetition() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert ratios([2.0], []) == []


def test_a_load_is_passed_on_as_it_is() -> None:
    wanted = Load(80, (0.0, 0.5), Pace(3, 5, 7, 1), timed=True)
    assert load_of(wanted.as_json()) == Load(80, [0.0, 0.5], Pace(3, 5, 7, 1), timed=True)


def test_moments_lie_in_their_span_and_the_same_seed_gives_the_same() -> None:
    assert even(4, 2.0) == [0.0, 0.5, 1.0, 1.5]
    found = scattered(100, 2.0, 7)
    assert found == sorted(found) == scattered(100, 2.0, 7)
    assert 0 <= found[0] < found[-1] <= 2.0


def test_the_client_counts_what_the_servers_have_sent() -> None:
    with upstream(2) as (ports, servers):
        with load(Load(ports[1], even(3, 0.01), Pace(3, 1, 1), timed=True)) as running:
            seen = running.result()
        stats = servers.ask("stats")
    assert (seen.complete, seen.tokens, seen.problems) == (3, 9, [])
    assert (stats["chats"], stats["tokens"], stats["complete"]) == (3, 9, 3)
    assert (len(seen.ttft_ms), len(seen.late_ms), len(seen.total_ms)) == (3, 3, 3)
    assert 3 <= seen.reads <= 3 * 5
    assert (len(seen.gaps_ms), len(seen.transit_ms)) == (3 * 3, 3 * 4)  # the last line has a moment as well


def test_a_client_of_a_port_where_nobody_listens_says_so() -> None:
    with upstream(1) as (ports, _):
        port = ports[0]
    with load(Load(port, [0.0], Pace(1))) as running:
        seen = running.result()
    assert (seen.complete, seen.tokens, len(seen.ttft_ms)) == (0, 0, 0)
    assert "cannot connect" in seen.problems[0]


def test_a_stream_that_gets_no_answer_in_time_is_told_of() -> None:
    with upstream(1) as (ports, _), load(Load(ports[0], [0.0, 0.0], Pace(2, hold=1), patience_s=0.05)) as running:
        seen = running.result()
    assert (seen.complete, seen.problems) == (0, ["timed out"] * 2)


def test_what_is_relayed_through_ollama_lb_is_counted_as_what_the_server_sent() -> None:
    start = peers.patient()[0]["ollama-lb"]
    with upstream(1) as (ports, servers), workspace() as where, start(ports, where) as proxy:
        before = servers.ask("stats").get("tokens", 0)
        assert before == 0
        got = relay.cost(proxy.port, proxy.pid, servers, n_streams=3, n_tokens=3, seed=0)
        stats = servers.ask("stats")
        assert (got.complete, got.tokens, got.problems) == (3, 9, ())
        assert (stats["chats"], stats["tokens"]) == (3 + got.chats, 9 + got.chats)
        assert got.cpu_us > 0


@pytest.mark.skipif(find_program("nginx") is None, reason="nginx is not installed")
def test_small_requests_are_counted_as_the_server_counts_them() -> None:
    kind = next(kind for kind in small.KINDS if kind.name == "pass-through, POST")
    with upstream(1) as (ports, servers), workspace() as where, peers.nginx(ports, where) as proxy:
        got = small.ask(proxy.port, kind, 0.05, where, with_wrk=False)
        assert got.requests == servers.ask("stats")["small"] > 0
        assert got.failed == 0


def test_streams_that_wait_are_all_held_and_all_come_whole() -> None:
    start = memory.contenders()[0]["ollama-lb"]
    got = memory.measure(start, 5)
    assert (got.streams, got.complete, got.problems) == (5, 5, ())
    assert got.idle_mib > 1


def test_a_process_has_its_children_s_time_and_memory() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
        while len(family(parent.pid)) < 2:
            time.sleep(0.01)
        assert family(parent.pid)[0] == parent.pid
        parent.communicate(b"\n")
    assert cpu_ns(os.getpid()) > 0
    assert memory_of(os.getpid())["rss"] >= memory_of(os.getpid())["uss"] > 1_000_000


def test_what_wrk_prints_is_read() -> None:
    text = "  1234 requests in 1.00s, 1MB read\n  Socket errors: connect 0, read 1, write 0, timeout 2\n"
    text += "  Non-2xx or 3xx responses: 4\n"
    assert small.wrk_output(text, 1.0) == small.Got(1234, 7, 1.0)
    assert small.wrk_output("12 requests in 1.00s", 1.0) == small.Got(12, 0, 1.0)
    with pytest.raises(ValueError, match="wrk"):
        small.wrk_output("wrk: command not found", 1.0)


def _cost(token_us: float) -> relay.Cost:
    return relay.Cost(token_us * 2000, 1000, token_us * 500, 500, 40_000.0, 200, 10)


def test_the_bar_of_a_token_is_judged_by_the_median_of_ratios_in_the_same_repetition() -> None:
    start = peers.nginx
    found = [relay.Contender("ollama-lb", start), relay.Contender("nginx", start)]
    costs = {
        found[0].name: [_cost(token_us) for token_us in (11.0, 40.0, 90.0)],
        found[1].name: [_cost(token_us) for token_us in (10.0, 40.0, 50.0)],
    }
    report = relay.report_of(found, costs, 10, 100)
    assert report.bars["ollama-lb, 1 server: a token, in all <= 1.2 x nginx"]
    assert report.figures["ollama-lb, 1 server: a token, in all, to nginx"].values == [1.1, 1.0, 1.8]
    assert report.rows[0][:3] == ("ollama-lb, 1 server", "80.0 (22.0-180.0)", "1.10 (1.00-1.80)")
    costs[found[0].name].append(relay.Cost(1.0, 1000, 1.0, 500, 1.0, 200, 9))
    assert not relay.report_of(found, costs, 10, 100).bars["ollama-lb, 1 server: all streams come whole"]


def test_added_times_are_to_the_direct_run_of_the_same_repetition() -> None:
    report = Report("relay-times", "", ())
    runs = {
        "ollama-lb": [Seen(ttft_ms=[52.0], late_ms=[0.0], complete=1), Seen(ttft_ms=[72.0], late_ms=[0.0], complete=1)],
        "direct": [Seen(ttft_ms=[51.0], late_ms=[0.0], complete=1), Seen(ttft_ms=[70.0], late_ms=[0.0], complete=1)],
    }
    relay_times.add_crowd(report, relay_times.CROWDS[0], runs)
    assert report.figures["10, ollama-lb: TTFT p50, added"].values == [1.0, 2.0]
    assert report.bars["10 streams: TTFT p50 <= direct + 1 ms"]
    assert report.bars["10, ollama-lb: all streams come whole"]
    assert report.rows[1][1:5] == ("51.00", "51.00", "-", "-")


def test_the_least_of_small_requests_is_judged_to_nginx() -> None:
    def got(per_cpu_s: float) -> small.Got:
        return small.Got(1000, 0, 1.0, 1000 / per_cpu_s)

    kinds = [kind for kind in small.KINDS if kind.bar is not None]
    assert [kind.bar for kind in kinds] == [0.5, 0.2]
    found = {("/api/tags", "ollama-lb"): [got(400.0)], ("/api/tags", "nginx"): [got(1000.0)]}
    report = small.report_of(kinds, found)
    assert not report.bars["/api/tags: >= 0.5 x nginx's"]
    found["/api/tags", "ollama-lb"] = [got(500.0)]
    assert small.report_of(kinds, found).bars["/api/tags: >= 0.5 x nginx's"]


def test_a_stream_that_is_lost_is_a_missed_bar_of_memory() -> None:
    whole = memory.Got(8.0, 8.0, 9.0, 20.0, 10, 10, ())
    report = memory.report_of({(10, "ollama-lb"): [whole], (10, "nginx"): [whole]})
    assert all(report.bars.values())
    lost = memory.Got(17.0, 8.0, 9.0, 20.0, 10, 9, ("timed out",))
    assert not any(memory.report_of({(10, "ollama-lb"): [lost]}).bars.values())


def test_every_program_has_a_row_in_the_order_of_the_repetitions() -> None:
    names = [each.name for each in relay.contenders()[0]]
    assert names[:2] == ["ollama-lb, 1 server", "ollama-lb, 4 servers"]
    assert len(set(names)) == len(names)
    assert all(a != b for a, b in itertools.pairwise(names))
