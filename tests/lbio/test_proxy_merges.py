"""What goes to all servers concerned, over real sockets: pull, create, copy, delete; and to those a client names."""

from typing import Any

import anyio
import pytest

from lbcore.events import RequestArrived
from lbcore.schema import MS_NS
from lbio.service import _drain
from simulator.fake_ollama import FakeModel
from simulator.fakes.specs import model_key
from simulator.faults import Fault, FaultKind
from simulator.serve import FakeServer, serve_fleet
from tests.lbio.kit import NDJSON, Rig, balanced, before, chunked, client, scripted, specs
from tests.simulator.wire import Answer, body_of, request

PIN = "X-Ollama-LB-Server"
pytestmark = pytest.mark.anyio

CALM: dict[str, Any] = {"health": {"resurrect": 0}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def holders(rig: Rig, model: str) -> list[str]:
    """Return the names of the servers that have a model on disk."""
    return [fake.spec.name for fake in rig.fleet if model_key(model) in fake.live.fake.disk]


async def pinned(rig: Rig, names: str, method: str, path: str, body: object = None) -> Answer:
    """Ask with the header that names servers."""
    raw = request(method, path, body)
    return await rig.send(raw.replace(b"\r\n\r\n", f"\r\n{PIN}: {names}\r\n\r\n".encode(), 1), method)


def fault(server: FakeServer, kind: FaultKind) -> None:
    server.set_fault(Fault(kind))


# --- pull and create -------------------------------------------------------------------------------------------


async def test_a_pull_reaches_every_server_and_its_progress_is_one_stream() -> None:
    async with balanced(specs("a", "b", "c")) as rig:
        answer = await rig.ask("POST", "/api/pull", {"model": "new"})
        assert answer.complete
        assert answer.header("Content-Type") == "application/x-ndjson"
        assert answer.header(PIN) == "a, b, c"
        assert answer.lines[-1] == {"status": "success", "servers": dict.fromkeys("abc", "success")}
        bars = [line for line in answer.lines if "digest" in line]
        assert {line["total"] for line in bars if "completed" in line} == {line["total"] for line in bars}
        largest = max(line["total"] for line in bars)
        assert [line.get("completed", 0) for line in bars if line["total"] == largest][-1] == largest
        assert holders(rig, "new") == ["a", "b", "c"]


async def test_a_pull_that_one_server_cannot_do_is_done_by_the_others_and_says_who_has_it() -> None:
    async with balanced(specs("a", "b", "c"), **CALM) as rig:
        fault(rig.fleet[1], FaultKind.RESET)
        answer = await rig.ask("POST", "/api/pull", {"model": "new"})
        assert answer.status == 200
        closing = answer.lines[-1]
        assert "a and c have it; b has not" in closing["error"]
        assert closing["servers"]["a"] == "success"
        assert holders(rig, "new") == ["a", "c"]


async def test_a_pull_that_is_not_streamed_answers_when_all_are_done() -> None:
    async with balanced(specs("a", "b")) as rig:
        answer = await rig.ask("POST", "/api/pull", {"model": "new", "stream": False})
        assert (answer.status, body_of(answer)["status"]) == (200, "success")
        assert holders(rig, "new") == ["a", "b"]


async def test_a_pull_that_is_not_streamed_and_failed_on_one_server_is_a_502_that_names_it() -> None:
    async with balanced(specs("a", "b"), **CALM) as rig:
        fault(rig.fleet[1], FaultKind.RESET)
        answer = await rig.ask("POST", "/api/pull", {"model": "new", "stream": False})
        assert answer.status == 502
        assert "done on a; b: " in body_of(answer)["error"]


@pytest.mark.parametrize("body", [{"model": "nope", "stream": False}, {"model": ""}, {}, {"name": 3}])
async def test_what_all_servers_refuse_alike_is_passed_on_as_one_of_them_says_it(body: dict[str, object]) -> None:
    async with balanced(specs("a", "b")) as rig, balanced(specs("a")) as alone:
        answer, expected = [await some.ask("POST", "/api/pull", body) for some in (rig, alone)]
        assert (answer.status, answer.body) == (expected.status, expected.body)
        assert answer.status >= 400


async def test_a_streamed_pull_that_fails_everywhere_ends_with_an_error_line() -> None:
    async with balanced(specs("a", "b")) as rig:
        answer = await rig.ask("POST", "/api/pull", {"model": "nope"})
        assert answer.status == 200
        assert answer.lines[0]["status"] == "pulling manifest"
        assert "no server has it" in answer.lines[-1]["error"]


async def test_a_server_that_dies_in_a_pull_does_not_stop_the_others() -> None:
    async with balanced(specs("a", "b", load_ms=200), **CALM) as rig, client(rig) as one:
        await one.send(request("POST", "/api/pull", {"model": "new"}))
        await one.until(b'"completed"')
        fault(rig.fleet[0], FaultKind.REFUSE)
        rest = await one.rest()
        assert b'"error":"pull of \'new\': b has it; a has not: ' in rest
        assert rest.endswith(b"0\r\n\r\n")


async def test_a_client_that_leaves_stops_the_pulls() -> None:
    async with balanced(specs("a", "b", load_ms=60_000), **CALM) as rig:
        async with client(rig) as one:
            await one.send(request("POST", "/api/pull", {"model": "new"}))
            await one.until(b'"digest"')
        with anyio.fail_after(5):
            while rig.n_requests or rig.server("a").in_flight or rig.server("b").in_flight:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert holders(rig, "new") == []
        assert rig.healths() == {"a": 1.0, "b": 1.0}


async def test_lines_cut_anywhere_are_merged_all_the_same() -> None:
    lines = b'{"status":"pulling manifest"}\n{"status":"success"}\n'
    async with scripted(2) as (rig, servers):
        for server in servers:
            server.pieces = [
                NDJSON + b"Transfer-Encoding: chunked\r\n\r\n",
                *[b"1\r\n%c\r\n" % byte for byte in lines],
                b"0\r\n\r\n",
            ]
        answer = await rig.ask("POST", "/api/pull", {"model": "new"})
        assert answer.lines[-1]["status"] == "success"


async def test_a_stream_that_ends_without_success_has_failed() -> None:
    async with scripted(2, **CALM) as (rig, servers):
        for server, last in zip(servers, (b'{"status":"success"}\n', b'{"status":"verifying"}\n'), strict=True):
            server.pieces = [NDJSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunked([b'{"status":"x"}\n', last])]
        answer = await rig.ask("POST", "/api/pull", {"model": "new"})
        assert "s0 has it; s1 has not" in answer.lines[-1]["error"]


async def test_a_create_is_made_on_every_server() -> None:
    async with balanced(specs("a", "b")) as rig:
        answer = await rig.ask("POST", "/api/create", {"model": "made", "from": "tiny", "system": "x"})
        assert answer.lines[-1]["status"] == "success"
        assert holders(rig, "made") == ["a", "b"]


async def test_one_server_alone_answers_a_pull_byte_for_byte() -> None:
    async with balanced(specs("a")) as rig:
        answer = await rig.ask("POST", "/api/pull", {"model": "new"})
        assert answer.lines[-1] == {"status": "success"}


async def test_a_client_of_http_1_0_gets_a_merged_stream_without_chunks() -> None:
    async with balanced(specs("a", "b")) as rig:
        raw = request("POST", "/api/pull", {"model": "new"}).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
        answer = await rig.send(raw)
        assert answer.chunks is None
        assert answer.lines[-1]["status"] == "success"


async def test_a_shutdown_breaks_a_pull_off_with_an_error_line() -> None:
    async with serve_fleet(specs("a", "b", load_ms=60_000)) as fleet:
        servers = [{"url": fake.url, "name": fake.spec.name} for fake in fleet]
        async with before(servers, drain_timeout="100ms") as service, client(Rig(service, fleet)) as one:
            await one.send(request("POST", "/api/pull", {"model": "new"}))
            await one.until(b'"digest"')
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_drain, service.front, 100 * MS_NS)
                assert b'{"error":"the load balancer is shutting down"}' in await one.rest()


# --- copy and delete -------------------------------------------------------------------------------------------


async def test_a_copy_and_a_delete_go_to_every_server_that_has_the_model_and_can_be_seen_at_once() -> None:
    other = specs("c", models=(FakeModel("other"),), start_loaded=())
    async with balanced([*specs("a", "b"), *other]) as rig:
        copied = await rig.ask("POST", "/api/copy", {"source": "tiny", "destination": "two"})
        assert (copied.status, copied.body, copied.header(PIN)) == (200, b"", "a, b")
        listed = body_of(await rig.ask("GET", "/api/tags"))
        assert "two:latest" in {model["name"] for model in listed["models"]}
        assert holders(rig, "two") == ["a", "b"]
        deleted = await rig.ask("DELETE", "/api/delete", {"model": "two"})
        assert (deleted.status, deleted.body) == (200, b"")
        listed = body_of(await rig.ask("GET", "/api/tags"))
        assert "two:latest" not in {model["name"] for model in listed["models"]}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("DELETE", "/api/delete", {"model": "x"}), ("POST", "/api/copy", {"source": "x", "destination": "y"})],
)
async def test_what_no_server_has_is_a_404_in_ollamas_words(method: str, path: str, body: dict[str, str]) -> None:
    async with balanced(specs("a", "b")) as rig, balanced(specs("a")) as alone:
        answer, expected = [await some.ask(method, path, body) for some in (rig, alone)]
        assert (answer.status, answer.body) == (404, expected.body)


async def test_a_delete_that_failed_on_one_server_is_a_502_that_says_who_did_and_who_did_not() -> None:
    async with balanced(specs("a", "b"), **CALM) as rig:
        fault(rig.fleet[1], FaultKind.RESET)
        answer = await rig.ask("DELETE", "/api/delete", {"model": "tiny"})
        assert answer.status == 502
        assert body_of(answer)["error"].startswith("delete of 'tiny': done on a; b: ")
        assert holders(rig, "tiny") == ["b"]


async def test_what_is_copied_and_deleted_at_once_is_left_nowhere() -> None:
    async with balanced(specs("a", "b", "c")) as rig:
        for _ in range(3):
            copied = await rig.ask("POST", "/api/copy", {"source": "tiny", "destination": "twin"})
            deleted = await rig.ask("DELETE", "/api/delete", {"model": "twin"})
            assert (copied.status, deleted.status) == (200, 200)
            assert holders(rig, "twin") == []


async def test_a_delete_of_what_one_server_has_lost_meanwhile_is_done() -> None:
    async with balanced(specs("a", "b")) as rig:
        del rig.fleet[1].live.fake.disk[model_key("tiny")]
        assert (await rig.ask("DELETE", "/api/delete", {"model": "tiny"})).status == 200


# --- the servers that a client names ---------------------------------------------------------------------------


async def test_a_pinned_chat_goes_where_the_client_says() -> None:
    async with balanced(specs("a", "b", "c")) as rig:
        for name in ("c", "a", "b"):
            answer = await pinned(rig, name, "POST", "/api/chat", {"model": "tiny", "messages": [{"role": "user"}]})
            assert (answer.status, answer.header(PIN)) == (200, name)


async def test_a_pinned_view_is_that_servers_own() -> None:
    other = specs("b", models=(FakeModel("other"),), start_loaded=())
    async with balanced([*specs("a"), *other]) as rig:
        answer = await pinned(rig, "b", "GET", "/api/tags")
        assert [model["name"] for model in body_of(answer)["models"]] == ["other:latest"]
        assert body_of(await pinned(rig, "b", "GET", "/api/ps"))["models"] == []


async def test_a_list_of_very_many_servers_is_refused_and_not_kept() -> None:
    async with balanced(specs("a", "b")) as rig:
        answer = await pinned(rig, "a,b," + ",".join(f"x{number}" for number in range(5000)), "POST", "/api/show", {})
        assert (answer.status, body_of(answer)["error"]) == (400, f'{PIN}: there is no server "x0"; there are a, b')
        (kept,) = [event for segment in rig.service.driver.memory._segments for event, *_ in segment.calls
                   if isinstance(event, RequestArrived)]
        assert kept.servers == ("a", "b", "x0")
        long = await pinned(rig, "y" * 5000, "POST", "/api/show", {})
        assert len(long.body) < 300


async def test_a_pinned_pull_goes_only_to_the_servers_named() -> None:
    async with balanced(specs("a", "b", "c")) as rig:
        answer = await pinned(rig, "a,c", "POST", "/api/pull", {"model": "new"})
        assert answer.lines[-1]["servers"] == {"a": "success", "c": "success"}
        assert holders(rig, "new") == ["a", "c"]


async def test_a_pinned_server_that_is_dead_or_unknown_is_an_error_that_says_so() -> None:
    async with balanced(specs("a", "b"), **CALM) as rig:
        fault(rig.fleet[1], FaultKind.REFUSE)
        await rig.ask("POST", "/sync_servers")
        await rig.ask("POST", "/sync_servers")
        dead = await pinned(rig, "b", "POST", "/api/show", {"model": "tiny"})
        assert (dead.status, body_of(dead)["error"]) == (502, f"{PIN}: server b is dead: connection refused")
        unknown = await pinned(rig, "z", "GET", "/api/version")
        assert (unknown.status, body_of(unknown)["error"]) == (400, f'{PIN}: there is no server "z"; there are a, b')
