"""Large requests for embeddings over real sockets: divided over servers, and answered as one server would."""

import contextlib
import dataclasses
import json
import re
from typing import Any

import anyio
import pytest

from lbio.http1 import Reader, parse_request_head
from lbio.wire.streams import SocketStream
from simulator.fake_ollama import FakeModel, FakeSpec
from simulator.faults import Fault, FaultKind
from tests.lbio.kit import FAST, Rig, balanced, client, played
from tests.lbio.sockets_kit import until
from tests.simulator.wire import Answer, ask, body_of, request

pytestmark = pytest.mark.anyio

BY = "X-Ollama-LB-Server"
E5 = FakeModel("e5", size_bytes=1_000_000, capabilities=("embedding",), embedding_length=6)
NEWER = dataclasses.replace(E5, digest="f" * 64, modified_at="2026-11-20T00:00:00Z")
FEW: dict[str, Any] = {"embed": {"split_above": 8}, "health": {"resurrect": 0}}
PATHS = ["/api/embed", "/v1/embeddings"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def embedders(*names: str, model: FakeModel = E5, **fields: Any) -> list[FakeSpec]:
    """Fast servers which have an embedding model loaded."""
    base = dataclasses.replace(FAST, models=(model,), start_loaded=(model.name,), first_token_ms=1, token_ms=0.2)
    return [dataclasses.replace(base, name=name, **fields) for name in names]


def asked(n_inputs: int = 40, **fields: Any) -> dict[str, Any]:
    return {"model": "e5", "input": [f"text {number} é" for number in range(n_inputs)], **fields}


def inputs_of(rig: Rig, path: str = "/api/embed") -> list[int]:
    """How many requests each server has got."""
    return [fake.stats.requests[path] for fake in rig.fleet]


def without_times(body: bytes) -> bytes:
    return re.sub(rb'_duration":[0-9]+', b"", body)


def pinned(names: bytes, body: object) -> bytes:
    """A request that names servers."""
    raw = request("POST", "/api/embed", body)
    return raw.replace(b"\r\n\r\n", b"\r\n%s: %s\r\n\r\n" % (BY.encode(), names), 1)


async def alone(rig: Rig, path: str, body: object) -> Answer:
    """What one server answers to the same request."""
    return await ask(rig.fleet[0].url, "POST", path, body)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_inputs", [9, 12, 40, 41, 43])
async def test_the_parts_make_what_one_server_answers(path: str, n_inputs: int) -> None:
    async with balanced(embedders("a", "b", "c"), **FEW) as rig:
        whole = await alone(rig, path, asked(n_inputs))
        answer = await rig.ask("POST", path, asked(n_inputs))
        assert (answer.status, answer.header("Content-Type")) == (200, whole.header("Content-Type"))
        assert without_times(answer.body) == without_times(whole.body)
        n_parts = min(3, n_inputs // 4)
        assert sum(inputs_of(rig, path)) == 1 + n_parts
        assert answer.header("X-Ollama-LB-Attempts") == str(n_parts)
        assert len((answer.header(BY) or "").split(", ")) == n_parts


@pytest.mark.parametrize("fields", [{"encoding_format": "base64"}, {"dimensions": 2}, {"user": "me"}])
async def test_what_holds_for_all_inputs_goes_with_every_part(fields: dict[str, Any]) -> None:
    async with balanced(embedders("a", "b"), **FEW) as rig:
        whole = await alone(rig, "/v1/embeddings", asked(**fields))
        answer = await rig.ask("POST", "/v1/embeddings", asked(**fields))
        assert (answer.body, answer.header(BY) or "") == (whole.body, "a, b")


async def test_only_servers_of_the_build_that_most_have_are_asked() -> None:
    async with balanced([*embedders("other", model=NEWER), *embedders("a", "b", "c")], **FEW) as rig:
        for _ in range(3):
            answer = await rig.ask("POST", "/api/embed", asked())
            assert sorted((answer.header(BY) or "").split(", ")) == ["a", "b", "c"]
        assert inputs_of(rig) == [0, 3, 3, 3]


async def test_a_server_that_dies_under_a_part_is_replaced_by_one_of_the_same_build() -> None:
    fleet = [*embedders("other", model=NEWER), *embedders("a", "b"), *embedders("c", token_ms=200)]
    async with balanced(fleet, **FEW) as rig:
        whole = await ask(rig.fleet[1].url, "POST", "/api/embed", asked())

        async def kill() -> None:
            await until(lambda: rig.fleet[3].stats.concurrent == 1)
            rig.fleet[3].set_fault(Fault(FaultKind.REFUSE))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kill)
            answer = await rig.ask("POST", "/api/embed", asked())
        assert without_times(answer.body) == without_times(whole.body)
        assert answer.header("X-Ollama-LB-Attempts") == "4"
        assert set((answer.header(BY) or "").split(", ")) == {"a", "b"}
        assert rig.fleet[0].stats.requests["/api/embed"] == 0


@pytest.mark.parametrize("path", PATHS)
async def test_a_part_that_is_refused_is_the_answer_and_stops_the_others(path: str) -> None:
    slow = embedders("a", "b", "c", model=dataclasses.replace(E5, num_ctx=20), token_ms=3000)
    async with balanced(slow, **FEW) as rig:
        body = asked(truncate=False) if path == "/api/embed" else asked(encoding_format="float32")
        body["input"][25] = "long " * 100
        whole = await alone(rig, path, body)
        assert whole.status == 400
        answer = await rig.ask("POST", path, body)
        assert (answer.status, answer.body) == (400, whole.body)
        assert answer.header("Content-Type") == whole.header("Content-Type")
        await until(lambda: all(fake.stats.concurrent == 0 for fake in rig.fleet))
        assert rig.n_requests == 0
        assert set(rig.healths().values()) <= {1.0, 3.0}


async def test_a_client_that_leaves_stops_all_parts() -> None:
    async with balanced(embedders("a", "b", "c", token_ms=500), **FEW) as rig:
        async with client(rig) as one:
            await one.send(request("POST", "/api/embed", asked()))
            await until(lambda: all(fake.stats.concurrent == 1 for fake in rig.fleet))
        await until(lambda: all(fake.stats.aborted == 1 for fake in rig.fleet))
        await until(lambda: not rig.service.front.connections)
        assert rig.n_requests == 0
        assert rig.service.front.bodies.held == 0
        assert rig.healths() == {"a": 1.0, "b": 1.0, "c": 1.0}


async def test_a_slow_server_is_waited_for() -> None:
    async with balanced([*embedders("a", "b"), *embedders("slow", first_token_ms=300)], **FEW) as rig:
        whole = await alone(rig, "/api/embed", asked())
        began_s = anyio.current_time()
        answer = await rig.ask("POST", "/api/embed", asked())
        assert without_times(answer.body) == without_times(whole.body)
        assert anyio.current_time() - began_s >= 0.3
        assert body_of(answer)["total_duration"] >= 300_000_000


async def test_a_server_with_no_idle_slot_gets_no_part() -> None:
    async with balanced(embedders("a", "b", "c"), **FEW) as rig:
        rig.fleet[2].set_fault(Fault(FaultKind.HANG_CHAT))
        async with client(rig) as busy:
            await busy.send(pinned(b"c", asked(1)))
            await until(lambda: rig.server("c").in_flight == 1)
            answer = await rig.ask("POST", "/api/embed", asked())
        assert answer.header(BY) == "a, b"


@pytest.mark.parametrize(
    ("fleet", "body", "config"),
    [
        (embedders("a", "b"), asked(8), FEW),
        (embedders("a", "b"), asked(), FEW | {"embed": {"split_above": 0}}),
        (embedders("a", "b"), asked(64), {}),
        (embedders("a"), asked(), FEW),
        ([*embedders("a"), *embedders("b", start_loaded=())], asked(), FEW),
        ([*embedders("a"), *embedders("b", model=NEWER)], asked(), FEW),
        (embedders("a", "b"), asked(later=1), FEW),
        (embedders("a", "b"), {"model": "e5", "input": "one text " * 20}, FEW),
        (embedders("a", "b"), asked() | {"input": ["x"] * 20 + [1]}, FEW),
        (embedders("a", "b"), asked() | {"model": "nosuch"}, FEW),
        (embedders("a", "b"), json.dumps(asked()).encode()[:-1], FEW),
    ],
)
async def test_what_stays_whole_is_one_request(fleet: list[FakeSpec], body: object, config: dict[str, Any]) -> None:
    async with balanced(fleet, **config) as rig:
        whole = await alone(rig, "/api/embed", body)
        answer = await rig.ask("POST", "/api/embed", body)
        assert (answer.status, without_times(answer.body)) == (whole.status, without_times(whole.body))
        assert answer.header("X-Ollama-LB-Attempts") in {"1", "2"}  # what nobody has is asked for twice
        assert "," not in (answer.header(BY) or "")


async def test_a_pinned_request_stays_whole() -> None:
    async with balanced(embedders("a", "b"), **FEW) as rig:
        assert (await rig.send(pinned(b"a,b", asked()), "POST")).header(BY) in {"a", "b"}


# --- what goes wrong -------------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n"
SHOWN = b'{"models":[{"name":"e5:latest","digest":"d"}]}'


class Breaking:
    """Answers requests for embeddings, the first `breaks` of them not to the end."""

    def __init__(self, breaks: int = 0) -> None:
        self.breaks = breaks
        self.asked: list[int] = []  # with how many inputs
        self.says: bytes | None = None  # in place of the vectors
        self.url = ""

    async def serve(self, stream: SocketStream) -> None:
        reader = Reader(stream)
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while (raw := await reader.read_head(1 << 20, role="request")) is not None:
                head = parse_request_head(raw)
                body = await reader.read_body(head, None)
                if head.path != "/api/embed":
                    told = b'{"version":"1"}' if head.path == "/api/version" else SHOWN
                    await stream.send(HEAD % len(told) + told)
                    continue
                n_inputs = len(json.loads(body)["input"])
                self.asked.append(n_inputs)
                vectors = b",".join([b"[%s1]" % (b"1," * 500)] * n_inputs)
                told = self.says or b'{"model":"e5","embeddings":[%s]}' % vectors
                self.breaks -= 1
                await stream.send(HEAD % len(told) + told[: len(told) // 2 if self.breaks >= 0 else None])
                if self.breaks >= 0:
                    break
        stream.close()


async def test_a_part_that_breaks_off_when_it_was_chosen_already_makes_the_request_whole_again() -> None:
    async with played([Breaking(1), Breaking()], **FEW, limits={"buffer_bytes_max": "1KiB"}) as (rig, servers):
        answer = await rig.ask("POST", "/api/embed", asked())
        assert (answer.status, len(body_of(answer)["embeddings"])) == (200, 40)
        assert sorted(servers[0].asked + servers[1].asked) == [20, 20, 40]


@pytest.mark.parametrize("says", [b'{"embeddings":[[1]]}', b"<html>", b"{}", b'{"model":"e5","embeddings":[[1],'])
async def test_answers_that_cannot_be_joined_make_the_request_whole_again(says: bytes) -> None:
    async with played([Breaking(), Breaking()], **FEW) as (rig, servers):
        servers[0].says = servers[1].says = says
        answer = await rig.ask("POST", "/api/embed", asked())
        assert (answer.status, answer.body) == (200, says)
        assert sorted(servers[0].asked + servers[1].asked) == [20, 20, 40]


async def test_answers_larger_than_the_buffer_are_joined() -> None:
    wide = dataclasses.replace(E5, embedding_length=600)
    async with balanced(embedders("a", "b", model=wide), **FEW, limits={"buffer_bytes_max": "4KiB"}) as rig:
        whole = await alone(rig, "/api/embed", asked())
        answer = await rig.ask("POST", "/api/embed", asked())
        assert len(answer.body) > 100_000
        assert answer.header(BY) == "a, b"
        assert without_times(answer.body) == without_times(whole.body)


async def test_answers_larger_than_may_be_held_are_had_from_one_server() -> None:
    wide = dataclasses.replace(E5, embedding_length=600)
    limits = {"buffer_bytes_max": "4KiB", "body_bytes_max": "64KiB"}
    async with balanced(embedders("a", "b", model=wide), **FEW, limits=limits) as rig:
        whole = await alone(rig, "/api/embed", asked())
        for n_asked in (1 + 3, 1 + 3 + 1):  # the second time it is known beforehand
            answer = await rig.ask("POST", "/api/embed", asked())
            assert without_times(answer.body) == without_times(whole.body)
            assert sum(inputs_of(rig)) == n_asked
        assert (await rig.ask("POST", "/api/embed", asked(10))).header(BY) == "a, b"
        await until(lambda: not rig.service.front.connections)
        assert rig.service.front.bodies.held == 0


async def test_no_room_for_the_parts_keeps_a_request_whole() -> None:
    body = json.dumps(asked(400)).encode()
    limits = {"body_bytes_max": len(body), "bodies_bytes_max": len(body) + 10}
    async with balanced(embedders("a", "b"), **FEW, limits=limits) as rig:
        assert (await rig.ask("POST", "/api/embed", body)).status == 200
        assert sum(inputs_of(rig)) == 1


async def test_a_build_that_changes_meanwhile_makes_it_whole_again() -> None:
    async with balanced(embedders("a", "b", token_ms=10), **FEW) as rig:

        async def change() -> None:
            await until(lambda: all(fake.stats.concurrent for fake in rig.fleet))
            rig.fleet[1].live.fake.disk["e5:latest"] = dataclasses.replace(NEWER, name="e5:latest")
            await rig.ask("POST", "/sync_servers")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(change)
            answer = await rig.ask("POST", "/api/embed", asked())
        assert answer.status == 200
        assert "," not in (answer.header(BY) or "")
        assert sum(inputs_of(rig)) == 3


async def test_when_nobody_of_the_build_is_left_another_one_answers() -> None:
    fleet = [*embedders("other", model=NEWER), *embedders("a", "b", token_ms=200)]
    async with balanced(fleet, **FEW) as rig:

        async def kill() -> None:
            await until(lambda: all(fake.stats.concurrent for fake in rig.fleet[1:]))
            for fake in rig.fleet[1:]:
                fake.set_fault(Fault(FaultKind.REFUSE))

        whole = await alone(rig, "/api/embed", asked())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kill)
            answer = await rig.ask("POST", "/api/embed", asked())
        assert answer.header(BY) == "other"
        assert without_times(answer.body) == without_times(whole.body)


@pytest.mark.parametrize("kind", [FaultKind.ERROR_500, FaultKind.BUSY_503])
async def test_an_error_of_all_servers_is_the_answer(kind: FaultKind) -> None:
    async with balanced(embedders("a", "b"), **FEW) as rig:
        for fake in rig.fleet:
            fake.set_fault(Fault(kind))
        whole = await alone(rig, "/v1/embeddings", asked())
        answer = await rig.ask("POST", "/v1/embeddings", asked())
        assert (answer.status, answer.body) == (whole.status, whole.body)


async def test_who_asks_for_an_explanation_is_told_of_the_parts() -> None:
    async with balanced(embedders("a", "b"), **FEW) as rig:
        name = (await rig.ask("POST", "/api/embed", asked())).header("X-Ollama-LB-Request-Id") or ""
        boot, _, number = name.partition("-")
        parts = [f"{boot}-{int(number) + more}" for more in (1, 2)]
        told = await rig.ask("GET", f"/explain/{name}")
        words = f"request {number} went in parts, which are explained one by one: {', '.join(parts)}"
        assert (told.status, body_of(told)) == (404, {"error": words})
        assert [(await rig.ask("GET", f"/explain/{part}")).status for part in parts] == [200, 200]


async def test_the_log_tells_of_the_parts_by_their_ids(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ollama_lb")
    async with balanced(embedders("a", "b"), **FEW) as rig:
        answer = await rig.ask("POST", "/api/embed", asked())
    boot, _, number = (answer.header("X-Ollama-LB-Request-Id") or "").partition("-")
    parts = [f"#{boot}-{int(number) + more}" for more in (1, 2)]
    said = [record.getMessage() for record in caplog.records]
    assert f"#{boot}-{number} /api/embed e5:latest in 2 parts: {', '.join(parts)}" in said
    assert f"#{boot}-{number} done by a, b: 40 inputs" in said
    assert all(any(text.startswith(f"{part} /api/embed e5 ->") for text in said) for part in parts)
