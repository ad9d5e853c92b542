"""The scheduler's rules under virtual time."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from simulator.fake_ollama import (
    FOREVER_NS,
    FakeModel,
    FakeOllama,
    FakeSpec,
    Job,
    Loaded,
    Notice,
    Refused,
    RunnerOptions,
    Started,
    Unloaded,
    Work,
    canonical_name,
    keep_alive_ns,
    runner_options,
)

S = 1_000_000_000
MS = 1_000_000
GB = 1_000_000_000
MODELS = tuple(FakeModel(name, size_bytes=size * GB) for name, size in (("a", 4), ("b", 5), ("c", 8)))
SPEC = FakeSpec("x", models=MODELS, vram_bytes=10 * GB, load_ms=1000)


def job(number: int, model: str = "a", keep_s: float = 300, work: Work = Work.GENERATE, num_ctx: int = 4096) -> Job:
    keep_ns = FOREVER_NS if keep_s < 0 else round(keep_s * S)
    return Job(number, model, RunnerOptions(num_ctx), keep_ns, work)


def started(notices: list[Notice]) -> list[int]:
    return [notice.job_id for notice in notices if isinstance(notice, Started)]


def names(fake: FakeOllama, now: int) -> list[str]:
    return [entry.model.name.removesuffix(":latest") for entry in fake.ps(now)]


def warmed(fake: FakeOllama, now: int, *jobs: Job) -> int:
    """Run these jobs one after the other; return when the last has ended."""
    for one in jobs:
        fake.submit(one, now)
        while (due := fake.next_deadline_ns()) is not None and fake.loading is not None:
            now = due
            fake.advance(now)
        fake.end(one.id, now)
    return now


def test_cold_job_loads_then_starts_and_ps_lists_it_only_then() -> None:
    fake = FakeOllama(SPEC, 0)
    assert fake.submit(job(1), 0) == []
    assert fake.next_deadline_ns() == S
    assert (fake.advance(S - 1), names(fake, S - 1)) == ([], [])
    assert fake.advance(S) == [Loaded("a:latest", S), Started(1, S, "a:latest")]
    assert names(fake, S) == ["a"]


def test_late_advance_dates_events_when_they_were_due() -> None:
    fake = FakeOllama(SPEC, 0)
    fake.submit(job(1, keep_s=1), 0)
    fake.submit(job(2, "b"), 0)
    notices = fake.advance(5 * S)
    assert notices == [
        Loaded("a:latest", S),
        Started(1, S, "a:latest"),
        Loaded("b:latest", 2 * S),
        Started(2, 2 * S, "b:latest"),
    ]


def test_warm_jobs_wait_for_slots_in_order_without_bound() -> None:
    fake = FakeOllama(dataclasses.replace(SPEC, start_loaded=("a",), max_queue=1, num_parallel=2), 0)
    assert [started(fake.submit(job(n), n)) for n in range(1, 8)] == [[1], [2], [], [], [], [], []]
    assert [started(fake.end(n, 100 + n)) for n in (2, 4, 1, 3)] == [[3], [], [5], [6]]


def test_cold_queue_is_bounded() -> None:
    fake = FakeOllama(dataclasses.replace(SPEC, max_queue=2), 0)
    assert [fake.submit(job(n), 0) for n in range(5)] == [[], [], [], [Refused(3, 0)], [Refused(4, 0)]]
    assert started(fake.advance(S)) == [0]
    assert started(fake.end(0, S)) == [1]


def test_loads_are_serial() -> None:
    fake = FakeOllama(SPEC, 0)
    fake.submit(job(1, "a"), 0)
    fake.submit(job(2, "b"), 0)
    assert fake.next_deadline_ns() == S
    fake.advance(S)
    assert fake.next_deadline_ns() == 2 * S
    assert started(fake.advance(2 * S)) == [2]


def test_leaving_while_loading_aborts_the_load_and_the_next_one_begins() -> None:
    fake = FakeOllama(SPEC, 0)
    fake.submit(job(1, "a"), 0)
    fake.submit(job(2, "b"), 0)
    assert fake.end(1, S // 2) == []
    assert fake.advance(3 * S // 2) == [Loaded("b:latest", 3 * S // 2), Started(2, 3 * S // 2, "b:latest")]
    assert names(fake, 2 * S) == ["b"]


@pytest.mark.parametrize(("keep_s", "lives_s"), [(300, 300), (0.5, 0.5), (0, 0), (-1, None)])
def test_keep_alive(keep_s: float, lives_s: float | None) -> None:
    fake = FakeOllama(SPEC, 0)
    end = warmed(fake, 0, job(1, keep_s=keep_s))
    if lives_s is None:
        fake.advance(end + 100 * 365 * 86_400 * S)
        assert names(fake, end) == ["a"]
        return
    dies = end + round(lives_s * S)
    fake.advance(dies - 1)
    assert names(fake, dies - 1) == ([] if lives_s == 0 else ["a"])
    fake.advance(dies)
    assert names(fake, dies) == []


def test_a_busy_model_does_not_expire_and_the_last_keep_alive_counts() -> None:
    fake = FakeOllama(SPEC, 0)
    end = warmed(fake, 0, job(1, keep_s=1))
    fake.submit(job(2, keep_s=2), end)
    assert fake.advance(end + 100 * S) == []
    fake.end(2, end + 100 * S)
    assert fake.next_deadline_ns() == end + 102 * S
    fake.submit(job(3, keep_s=7, work=Work.LOAD), end + 101 * S)
    fake.end(3, end + 101 * S)
    assert fake.next_deadline_ns() == end + 108 * S


def test_load_jobs_take_no_slot() -> None:
    fake = FakeOllama(dataclasses.replace(SPEC, start_loaded=("a",)), 0)
    assert started(fake.submit(job(1), 0)) == [1]
    assert started(fake.submit(job(2, work=Work.LOAD), 0)) == [2]


def test_other_options_reload_once_idle() -> None:
    fake = FakeOllama(dataclasses.replace(SPEC, start_loaded=("a",)), 0)
    fake.submit(job(1), 0)
    assert fake.submit(job(2, num_ctx=8192), 0) == []
    assert fake.loading is None
    assert fake.end(1, 5) == [Unloaded("a:latest", 5)]
    assert started(fake.advance(5 + S)) == [2]
    assert fake.ps(5 + S)[0].num_ctx == 8192


def test_eviction_takes_the_idle_one_with_the_shortest_keep_alive() -> None:
    fake = FakeOllama(dataclasses.replace(SPEC, vram_bytes=17 * GB), 0)
    now = warmed(fake, 0, job(1, "a", keep_s=50), job(2, "b", keep_s=40), job(3, "c", keep_s=60))
    assert sorted(names(fake, now)) == ["a", "b", "c"]
    fake.disk["d:latest"] = FakeModel("d:latest", size_bytes=5 * GB)
    assert fake.submit(job(4, "d"), now) == [Unloaded("b:latest", now)]


def test_eviction_prefers_idle_to_short_and_waits_for_the_busy() -> None:
    fake = FakeOllama(dataclasses.replace(SPEC, vram_bytes=9 * GB), 0)
    now = warmed(fake, 0, job(1, "a", keep_s=10), job(2, "b", keep_s=100))
    fake.submit(job(3, "a", keep_s=10), now)
    assert fake.submit(job(4, "c"), now) == [Unloaded("b:latest", now)]  # idle, though longer-lived
    assert fake.loading is None
    assert fake.end(3, now + 7) == [Unloaded("a:latest", now + 7)]
    assert started(fake.advance(now + 7 + S)) == [4]


def test_max_loaded_counts_too_and_cpu_has_no_limit_of_memory() -> None:
    fake = FakeOllama(dataclasses.replace(SPEC, vram_bytes=0, max_loaded=2), 0)
    now = warmed(fake, 0, job(1, "a"), job(2, "b"), job(3, "c"))
    assert len(fake.runners) == 2
    assert {entry.size_vram_bytes for entry in fake.ps(now)} == {0}


def test_a_model_larger_than_memory_is_loaded_alone_and_spills() -> None:
    fake = FakeOllama(dataclasses.replace(SPEC, vram_bytes=6 * GB), 0)
    now = warmed(fake, 0, job(1, "a"), job(2, "c"))
    (entry,) = fake.ps(now)
    assert (entry.model.name, entry.size_bytes, entry.size_vram_bytes) == ("c:latest", 8 * GB, 6 * GB)


def test_unload_waits_for_the_busy() -> None:
    fake = FakeOllama(dataclasses.replace(SPEC, start_loaded=("a",)), 0)
    fake.submit(job(1), 0)
    assert fake.unload("a", 1) == []
    assert fake.end(1, 2) == [Unloaded("a:latest", 2)]
    assert fake.unload("a", 3) == []


def test_copy_and_delete() -> None:
    fake = FakeOllama(dataclasses.replace(SPEC, start_loaded=("a",)), 0)
    assert not fake.copy("nope", "x", "")
    assert fake.copy("A:latest", "a2", "2026-01-01T00:00:00Z")
    assert fake.delete("a", 0) == [Unloaded("a:latest", 0)]
    assert fake.delete("a", 0) is None
    assert sorted(fake.disk) == ["a2:latest", "b:latest", "c:latest"]


def test_deleted_while_it_waits() -> None:
    fake = FakeOllama(SPEC, 0)
    fake.submit(job(1, "a"), 0)
    fake.submit(job(2, "b"), 0)
    fake.delete("b", 1)
    assert Refused(2, S) in fake.advance(S)


def test_start_loaded_must_exist() -> None:
    with pytest.raises(ValueError, match="start_loaded names 'nope'"):
        FakeOllama(dataclasses.replace(SPEC, start_loaded=("nope",)), 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, 7), (0, 0), (5, 5 * S), (1.5, 3 * S // 2), (-1, FOREVER_NS), (-0.1, FOREVER_NS), (1e300, FOREVER_NS),
        ("5m", 300 * S), ("1h30m", 5400 * S), ("0", 0), ("0s", 0), ("1.5s", 3 * S // 2), ("20ms", 20 * MS),
        (".5s", S // 2), ("-1s", FOREVER_NS), ("-1m", FOREVER_NS), ("+2s", 2 * S), ("3us", 3000), ("3µs", 3000),
        ("7ns", 7), ("24h", 86_400 * S),
    ],
)  # fmt: skip
def test_keep_alive_values(value: object, expected: int) -> None:
    assert keep_alive_ns(value, 7) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("soon", 'time: invalid duration "soon"'),
        ("", 'time: invalid duration ""'),
        ("5", 'time: missing unit in duration "5"'),
        ("5 m", 'time: invalid duration "5 m"'),
        (True, "Unsupported type: 'True'"),
        ([], "Unsupported type: '[]'"),
    ],
)
def test_bad_keep_alive(value: object, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("[", r"\[").replace("]", r"\]") + "$"):
        keep_alive_ns(value, 7)


def test_runner_options_are_compared_with_defaults_filled_in() -> None:
    model = FakeModel("m", num_ctx=2048, context_length=4096)
    assert runner_options(model, None) == runner_options(model, {"num_ctx": 2048, "seed": 1, "temperature": 0})
    assert runner_options(model, {"num_ctx": 99_999}).num_ctx == 4096
    for changed in ("num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread"):
        assert runner_options(model, {changed: 1}) != runner_options(model, None)


def test_names() -> None:
    assert canonical_name("tiny") == canonical_name("registry.ollama.ai/library/tiny") == "tiny:latest"
    assert canonical_name("me/tiny:4b") == "me/tiny:4b"


class Scheduler(RuleBasedStateMachine):
    """Any sequence of arrivals, ends and waiting keeps the house rules, and everything ends at last."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = dataclasses.replace(SPEC, num_parallel=2, max_queue=3, max_loaded=2)
        self.fake = FakeOllama(self.spec, 0)
        self.now = 0
        self.number = 0
        self.jobs: dict[int, Job] = {}  # in the house
        self.running: set[int] = set()
        self.lines: dict[tuple[str, RunnerOptions, bool], list[int]] = {}  # not yet started, in order
        self.cold: set[int] = set()

    def line(self, number: int) -> list[int]:
        """Where it stands: the warm overtake the cold, within each line it is first come, first served."""
        found = self.jobs[number]
        return self.lines.setdefault((found.model, found.options, number in self.cold), [])

    def take(self, notices: list[Notice]) -> None:
        for notice in notices:
            if isinstance(notice, Started):
                found = self.jobs[notice.job_id]
                assert notice.job_id not in self.running
                self.running.add(notice.job_id)
                line = self.line(notice.job_id)
                if found.work is Work.GENERATE:
                    assert notice.job_id == next(n for n in line if self.jobs[n].work is Work.GENERATE)
                line.remove(notice.job_id)
            elif isinstance(notice, Refused):
                self.line(notice.job_id).remove(notice.job_id)
                del self.jobs[notice.job_id]

    @rule(
        model=st.sampled_from("abc"),
        keep_s=st.sampled_from([0, 1, 5, -1]),
        work=st.sampled_from(Work),
        num_ctx=st.sampled_from([4096, 8192]),
    )
    def submit(self, model: str, keep_s: float, work: Work, num_ctx: int) -> None:
        self.number += 1
        new = job(self.number, model, keep_s, work, num_ctx)
        self.jobs[new.id] = new
        fake = self.fake
        cold = len(fake.pending)
        notices = fake.submit(new, self.now)
        loading = fake.loading.job if fake.loading else None
        if new in fake.pending or new in {fake.current, loading}:
            self.cold.add(new.id)
        self.line(new.id).append(new.id)
        if any(isinstance(notice, Refused) for notice in notices):
            assert cold >= self.spec.max_queue
        self.take(notices)

    def leave(self, number: int) -> None:
        if number not in self.running:
            self.line(number).remove(number)
        self.running.discard(number)
        del self.jobs[number]
        self.take(self.fake.end(number, self.now))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def end_or_abort(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(sorted(self.jobs))))

    @rule(ns=st.integers(0, 3 * S))
    def wait(self, ns: int) -> None:
        self.now += ns
        self.take(self.fake.advance(self.now))

    @rule(model=st.sampled_from("abc"))
    def unload(self, model: str) -> None:
        self.take(self.fake.unload(model, self.now))

    @invariant()
    def within_bounds(self) -> None:
        fake = self.fake
        assert len(fake.pending) <= self.spec.max_queue
        assert len(fake.runners) <= self.spec.max_loaded
        sizes = [runner.size_bytes for runner in fake.runners.values()]
        assert sum(sizes) <= self.spec.vram_bytes or len(sizes) == 1
        for runner in fake.runners.values():
            assert len(runner.running) <= self.spec.num_parallel
            assert not runner.waiting or len(runner.running) == self.spec.num_parallel
            assert runner.idle == (runner.expires_at_ns is not None)
            assert {*runner.running} | runner.visiting <= self.running

    @invariant()
    def everyone_is_somewhere(self) -> None:
        fake = self.fake
        places = [one.id for one in fake.pending]
        places += [one.id for runner in fake.runners.values() for one in runner.waiting]
        places += [number for runner in fake.runners.values() for number in {*runner.running} | runner.visiting]
        places += [fake.current.id] if fake.current else []
        places += [fake.loading.job.id] if fake.loading else []
        assert sorted(places) == sorted(self.jobs)

    def teardown(self) -> None:
        for _ in range(10_000):
            if self.running:
                self.leave(min(self.running))
            elif self.jobs:
                due = self.fake.next_deadline_ns()
                assert due is not None, "stuck"
                self.now = max(self.now, due)
                self.take(self.fake.advance(self.now))
            else:
                return
        raise AssertionError("never ends")


TestScheduler = Scheduler.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, S)), max_size=12))
def test_the_same_events_give_the_same_notices(events: list[tuple[str, int]]) -> None:
    def run() -> list[Notice]:
        fake, now, notices = FakeOllama(SPEC, 0), 0, []
        for number, (model, gap) in enumerate(events):
            now += gap
            notices += fake.submit(job(number, model), now)
            notices += fake.end(number - 3, now)
        return notices

    assert run() == run()
