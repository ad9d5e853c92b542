"""Declared placement: who is told to pull, load or delete which model, and when."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from lbcore import events
from lbcore.balancer import LoadBalancer
from lbcore.commands import (
    CancelJob,
    Command,
    Decision,
    EndMerge,
    RecordDecision,
    StartAttempt,
    StartJob,
    StartMerge,
    StartProbe,
    Work,
)
from lbcore.config import Config, ModelSettings, PlacementSettings, ServerSettings
from lbcore.events import ActiveModel, JobEnded, ModelInfo, ModelsSynced, ProbeCompleted, Reason
from lbcore.invariants import Auditor
from lbcore.ollama import RequestKind, default_routes
from lbcore.schema import SECOND_NS
from tests.playbook import arrival


class House:
    """A balancer whose servers are what the test says whenever they are probed."""

    def __init__(self, names: str, *models: ModelSettings, placement: PlacementSettings | None = None) -> None:
        base = Config()
        config = replace(
            base,
            servers=tuple(ServerSettings(url=f"http://{name}", name=name) for name in names.split()),
            models=models,
            routes=default_routes(base.race),
            placement=placement or PlacementSettings(retry_ns=30 * SECOND_NS),
        )
        self.balancer = LoadBalancer(config, Random(1))
        self.auditor = Auditor(self.balancer)
        self.now_ns = 0
        self.disk: dict[str, list[str]] = {name: [] for name in names.split()}
        self.memory: dict[str, list[str]] = {name: [] for name in names.split()}
        self.dead: set[str] = set()
        self.jobs: list[StartJob] = []
        self.cancelled: list[int] = []
        self.commands: list[Command] = []
        self.probes: list[StartProbe] = []
        self._open: list[StartJob] = []
        self.after(0)

    def _take(self, commands: list[Command]) -> None:
        self.auditor.check(commands, self.now_ns)
        self.commands += commands
        self.jobs += [command for command in commands if isinstance(command, StartJob)]
        self.cancelled += [command.job_id for command in commands if isinstance(command, CancelJob)]
        self.probes += [command for command in commands if isinstance(command, StartProbe)]

    def tell(self, event: events.Event) -> None:
        """Give the core an event, and answer the probes that it wants."""
        self._take(self.balancer.handle(event, self.now_ns))
        self._answer_probes()

    def after(self, seconds: float) -> None:
        """Let time pass, with all that falls due."""
        end_ns = self.now_ns + round(seconds * SECOND_NS)
        while (due_ns := self.balancer.next_deadline()) is not None and due_ns <= end_ns:
            self.now_ns = max(self.now_ns, due_ns)
            self._take(self.balancer.handle_timeout(self.now_ns))
            self._answer_probes()
        self.now_ns = end_ns

    def _answer_probes(self) -> None:
        while self.probes:
            probe = self.probes.pop(0)
            name = self.balancer.fleet.servers[probe.server_id].name
            if name in self.dead:
                self._take(self.balancer.handle(
                    ProbeCompleted(probe.server_id, probe.probe_id, Reason.CONNECT_REFUSED), self.now_ns))
                continue
            available = tuple(ModelInfo(model, "d", "", "{}") for model in self.disk[name])
            active = tuple(ActiveModel(model, "{}") for model in self.memory[name])
            for event in (ProbeCompleted(probe.server_id, probe.probe_id, version="1"),
                          ModelsSynced(probe.server_id, probe.probe_id, available, active)):  # fmt: skip
                self._take(self.balancer.handle(event, self.now_ns))

    def wanted(self) -> list[str]:
        """Return what servers were told since the last call: "pull m on a"."""
        told = [f"{job.work} {job.model} on {self._name(job)}" for job in self.jobs]
        self._open += self.jobs
        self.jobs = []
        return told

    def _name(self, job: StartJob) -> str:
        return self.balancer.fleet.servers[job.server_id].name

    def ends(self, reason: Reason | None = None) -> None:
        """The oldest job that is under way ends; well: with what it was for."""
        self.wanted()
        job = self._open.pop(0)
        name, model = self._name(job), f"{job.model}:latest"
        if reason is None and job.work is Work.PULL:
            self.disk[name].append(model)
        elif reason is None and job.work is Work.DELETE:
            self.disk[name].remove(model)
        elif reason is None:
            self.memory[name] = [*dict.fromkeys([*self.memory[name], model])]
        self.tell(JobEnded(job.job_id, reason))

    def decisions(self, kind: Decision) -> list[RecordDecision]:
        """Return the decisions of a kind so far."""
        return [c for c in self.commands if isinstance(c, RecordDecision) and c.decision is kind]


def m(**said: object) -> ModelSettings:
    """Return the declaration of the model "m"."""
    return ModelSettings(name="m", **said)  # type: ignore[arg-type]


# --- pulls -----------------------------------------------------------------------------------------------------------


def test_without_declared_models_nothing_is_ever_done() -> None:
    house = House("a b")
    house.after(3600)
    assert house.wanted() == []


def test_a_model_that_is_missing_is_pulled_on_as_many_servers_as_it_wants_copies() -> None:
    house = House("a b c", m(copies=2))
    assert house.wanted() == ["pull m on a", "pull m on b"]


def test_without_copies_and_servers_one_copy_is_wanted() -> None:
    assert House("a b", m()).wanted() == ["pull m on a"]


def test_with_servers_and_without_copies_it_is_wanted_on_all_of_them() -> None:
    assert House("a b c", m(servers=("b", "c"))).wanted() == ["pull m on b", "pull m on c"]


def test_what_is_there_already_is_not_pulled() -> None:
    house = House("a b c", m(copies=1))
    house.ends()
    house.after(3600)
    assert house.wanted() == []


def test_a_server_that_has_it_keeps_it_whichever_was_named_first() -> None:
    house = House("a b", m())
    house.disk["b"].append("m:latest")
    house.after(20)
    house.ends(Reason.CONNECT_REFUSED)
    assert house.balancer.provision.places(house.now_ns)[0].servers == ("b",)
    house.after(3600)
    assert house.wanted() == []


def test_models_are_spread_over_the_servers() -> None:
    house = House("a b c", *(ModelSettings(name=name) for name in ("k", "l", "m")))
    assert house.wanted() == ["pull k on a", "pull l on b", "pull m on c"]


def test_a_server_does_one_thing_at_a_time() -> None:
    house = House("a", *(ModelSettings(name=name) for name in ("k", "l")))
    assert house.wanted() == ["pull k on a"]
    house.after(60)
    assert house.wanted() == []
    house.ends()
    assert house.wanted() == ["pull l on a"]


def test_nothing_is_begun_before_every_server_was_read_or_could_not_be() -> None:
    balancer = LoadBalancer(House("a b", m()).balancer.config, Random(1))
    first, second = [c for c in balancer.handle_timeout(0) if isinstance(c, StartProbe)]
    balancer.handle(ProbeCompleted(first.server_id, first.probe_id, version="1"), 1)
    came = balancer.handle(ModelsSynced(first.server_id, first.probe_id), 1)
    assert not [c for c in came if isinstance(c, StartJob)]
    came = balancer.handle(ProbeCompleted(second.server_id, second.probe_id, Reason.CONNECT_REFUSED), 2)
    assert [c.server_id for c in came if isinstance(c, StartJob)] == [first.server_id]


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_pull_that_fails_is_tried_again_after_a_pause_that_doubles_up_to_a_limit() -> None:
    house = House("a", m(), placement=PlacementSettings(retry_ns=30 * SECOND_NS, retry_max_ns=100 * SECOND_NS))
    pauses = []
    for _ in range(4):
        house.ends(Reason.ERROR_LINE)
        failed_ns = house.now_ns
        while not house.jobs:
            house.after(1)
        pauses.append((house.now_ns - failed_ns) // SECOND_NS)
    assert all(0 <= took - wanted <= 5 for took, wanted in zip(pauses, (30, 60, 100, 100), strict=True)), pauses


def test_where_a_pull_has_failed_another_server_is_tried_first() -> None:
    house = House("a b", m())
    house.ends(Reason.ERROR_LINE)
    assert house.wanted() == ["pull m on b"]


def test_a_pull_without_progress_is_given_up_and_tried_again() -> None:
    house = House("a", m(), placement=PlacementSettings(stall_ns=60 * SECOND_NS))
    (job,) = house.jobs
    house.after(50)
    house.tell(events.JobProgressed(job.job_id))
    house.after(50)
    assert house.cancelled == []
    house.after(11)
    assert house.cancelled == [job.job_id]
    assert "no progress (again in 30 s)" in house.decisions(Decision.JOB_FAILED)[-1].why
    house.after(40)
    assert house.wanted() == ["pull m on a", "pull m on a"]


def test_the_copies_of_a_dead_server_count_for_a_while_and_are_replaced_then() -> None:
    house = House("a b", m(), placement=PlacementSettings(replace_after_ns=600 * SECOND_NS))
    house.ends()
    house.dead.add("a")
    house.after(500)
    assert not house.balancer.fleet.by_name("a").is_alive  # type: ignore[union-attr]
    assert house.wanted() == []
    house.after(200)
    assert house.wanted() == ["pull m on b"]


def test_what_is_under_way_on_a_server_that_is_removed_is_given_up() -> None:
    house = House("a b", m())
    (job,) = house.jobs
    house.tell(events.ServerRemovalRequested(1))
    assert house.cancelled == [job.job_id]
    house.after(6)
    assert [self_job.server_id for self_job in house.jobs[1:]] == [2]


def test_the_end_of_a_job_that_was_given_up_comes_too_late() -> None:
    house = House("a b", m())
    (job,) = house.jobs
    house.tell(events.ServerRemovalRequested(1))
    house.tell(JobEnded(job.job_id))
    house.tell(events.JobProgressed(job.job_id))
    assert house.balancer.ledger.late_events == 2


# --- warm ------------------------------------------------------------------------------------------------------------


def test_a_warm_model_is_loaded_where_it_is_placed_once_it_is_there() -> None:
    house = House("a b", m(warm=True))
    house.ends()
    assert house.wanted() == ["warm m on a"]


def test_a_loaded_model_that_is_to_stay_loaded_is_asked_to_from_time_to_time() -> None:
    house = House("a", m(warm=True), placement=PlacementSettings(warm_every_ns=120 * SECOND_NS))
    house.ends()
    house.ends()
    house.after(100)
    assert house.wanted() == []
    house.after(30)
    assert house.wanted() == ["warm m on a"]
    house.ends()
    assert len(house.decisions(Decision.JOB_STARTED)) == 2  # of the pull and of the load: the rest is routine


def test_a_warm_model_that_others_push_out_of_memory_is_loaded_again_ever_less_often() -> None:
    house = House("a", m(warm=True))
    house.ends()
    loads = 0
    for _ in range(3600):
        house.after(1)
        if house.wanted():
            loads += 1
            house.ends()
            house.memory["a"].clear()
    assert 3 <= loads <= 9


def test_a_warm_model_is_not_loaded_while_its_server_works_for_another() -> None:
    house = House("a", m(warm=True))
    house.disk["a"].append("n:latest")
    house.memory["a"].append("n:latest")
    house.ends()
    house.ends(Reason.SERVER_ERROR)
    house.tell(arrival(1, model="n"))
    house.tell(events.AttemptConnected(1))
    house.after(100)
    assert house.wanted() == []


def test_what_is_warmed_keeps_the_options_that_it_was_loaded_with() -> None:
    house = House("a", m(warm=True))
    house.ends()
    house.ends()
    house.balancer.fleet.servers[1].models["m:latest"].runner_key = '{"num_ctx":8192}'
    house.after(130)
    assert house.jobs[-1].runner_key == '{"num_ctx":8192}'


# --- prune -----------------------------------------------------------------------------------------------------------


def test_nothing_is_deleted_unless_that_is_wanted() -> None:
    house = House("a b c", m(servers=("a",)))
    house.disk["b"].append("m:latest")
    house.ends()
    house.after(3600)
    assert house.wanted() == []


def test_pruned_is_what_is_too_much_once_every_copy_is_there() -> None:
    house = House("a b c", m(servers=("a",), prune=True))
    house.disk["b"].append("m:latest")
    house.after(20)
    assert house.wanted() == ["pull m on a"]
    house.ends()
    assert house.wanted() == ["delete m on b"]
    house.ends()
    house.after(3600)
    assert house.wanted() == []
    assert house.disk == {"a": ["m:latest"], "b": [], "c": []}


def test_nothing_is_pruned_while_a_copy_is_on_a_dead_server() -> None:
    house = House("a b c", m(copies=2, prune=True))
    for name in "abc":
        house.disk[name] = ["m:latest"]
    house.dead.add("a")
    house.after(60)
    house.wanted()
    assert not [job for job in house._open if job.work is Work.DELETE]


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_client_that_pulls_a_declared_model_gets_it_where_it_is_placed() -> None:
    house = House("a b c", m(servers=("a", "c")))
    house.tell(arrival(1, route="/api/pull", model="m", kind=RequestKind.MANAGE, stream=True))
    merges = [c for c in house.commands if isinstance(c, StartMerge)]
    assert merges == [StartMerge(1, (1, 3))]


def test_a_pull_for_one_server_is_not_merged() -> None:
    house = House("a b c", m(servers=("b",)))
    house.tell(arrival(1, route="/api/pull", model="m", kind=RequestKind.MANAGE, stream=True))
    started = [c for c in house.commands if isinstance(c, StartAttempt)]
    assert [c.server_id for c in started] == [2]
    assert not [c for c in house.commands if isinstance(c, EndMerge)]


def test_a_load_goes_to_every_server_that_the_model_is_placed_on() -> None:
    house = House("a b c", m(copies=2))
    house.ends()
    house.ends()
    house.disk["c"].append("m:latest")
    house.after(20)
    house.tell(arrival(1, model="m", kind=RequestKind.LOAD))
    started = [c for c in house.commands if isinstance(c, StartAttempt)]
    assert [c.server_id for c in started] == [1, 2]


@pytest.mark.parametrize("route", ["/api/pull", "/api/create"])
def test_a_pull_of_what_is_placed_on_dead_servers_alone_is_refused(route: str) -> None:
    house = House("a b", m(servers=("a",)))
    house.dead.add("a")
    house.after(60)
    house.tell(arrival(1, route=route, model="m", kind=RequestKind.MANAGE))
    assert any("no server that 'm' is placed on is alive" in str(c) for c in house.commands)
