"""The merge of progress streams: stories, every interleaving of two, and properties over many."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lbcore.progress import Progress

CAPTURES = Path(__file__).parent.parent / "captures"
PULLING, VERIFYING, WRITING, SUCCESS = (
    {"status": status} for status in ("pulling manifest", "verifying sha256 digest", "writing manifest", "success")
)
BIG, SMALL = ("sha256:" + digit * 64 for digit in "ab")
JSON_SAFE_MAX = 2**53 - 1


def layer(digest: str, total: int, completed: int = 0) -> dict[str, Any]:
    """Return a line as Ollama tells how far a layer has come; it leaves a zero out."""
    told: dict[str, Any] = {"status": f"pulling {digest[7:19]}", "digest": digest, "total": total}
    return told | ({"completed": completed} if completed else {})


WHOLE = [PULLING, layer(BIG, 100), layer(BIG, 100, 50), layer(BIG, 100, 100), VERIFYING, WRITING, SUCCESS]


@dataclass
class Player:
    """Feeds a merge as a driver would, and checks all that must hold of each line that comes out."""

    names: Sequence[str]
    totals: dict[str, int] = field(default_factory=dict)
    completed: dict[str, int] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.progress = Progress(self.names, "pull of tiny")
        self.raw = b""

    def feed(self, name: str, line: dict[str, Any] | bytes) -> dict[str, Any] | None:
        data = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
        return self._check(self.progress.feed(name, data))

    def end(self, name: str, error: str | None = None) -> dict[str, Any] | None:
        return self._check(self.progress.end(name, error))

    def whole(self, name: str, lines: Iterable[dict[str, Any]]) -> None:
        for line in lines:
            self.feed(name, line)
        self.end(name)

    def closing(self) -> dict[str, Any]:
        raw = self.progress.closing()
        assert raw.endswith(b"\n")
        assert raw.count(b"\n") == 1
        told: dict[str, Any] = json.loads(raw)
        assert list(told) == ["status" if self.progress.ok else "error", "servers"]
        assert list(told["servers"]) == list(self.names)
        assert self.progress.ok == (told.get("status") == "success")
        assert self.progress.closing() == raw
        return told

    @property
    def bare(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key != "servers"} for line in self.lines]

    @property
    def stages(self) -> list[str]:
        """What a client shows of the statuses without a digest."""
        told = [line["status"] for line in self.lines if "digest" not in line]
        return [status for index, status in enumerate(told) if index == 0 or status != told[index - 1]]

    def _check(self, raw: bytes | None) -> dict[str, Any] | None:
        if raw is None:
            return None
        assert raw != self.raw, "nothing has changed for the client"
        assert raw.endswith(b"\n")
        assert raw.count(b"\n") == 1
        self.raw = raw
        told: dict[str, Any] = json.loads(raw)
        assert list(told) == [key for key in ("status", "digest", "total", "completed", "servers") if key in told]
        assert raw == json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        assert list(told["servers"]) == list(self.names)
        if "digest" in told:
            digest, total, completed = told["digest"], told["total"], told.get("completed", 0)
            assert total == self.totals.setdefault(digest, total), "a bar's total is final"
            assert self.completed.get(digest, 0) <= completed <= total <= JSON_SAFE_MAX
            self.completed[digest] = completed
        else:
            assert told["status"] != "success", "only the closing line says so"
        self.lines.append(told)
        return told


# --- stories ------------------------------------------------------------------------------------------------------


def test_one_server_alone_gives_what_it_said_and_its_state() -> None:
    player = Player(["gpu1"])
    player.whole("gpu1", WHOLE)
    assert player.bare == WHOLE[:-1]
    assert [line["servers"]["gpu1"] for line in player.lines] == [
        "pulling manifest",
        "pulling 0%",
        "pulling 50%",
        "pulling 100%",
        "verifying sha256 digest",
        "writing manifest",
    ]
    assert player.closing() == {"status": "success", "servers": {"gpu1": "success"}}


def test_one_server_alone_that_fails_says_why_in_its_own_words() -> None:
    player = Player(["gpu1"])
    player.feed("gpu1", PULLING)
    assert player.feed("gpu1", {"error": "pull model manifest: file does not exist"}) is None
    assert player.closing() == {
        "error": "pull model manifest: file does not exist",
        "servers": {"gpu1": "failed: pull model manifest: file does not exist"},
    }


def test_two_servers_are_one_bar_of_both_and_the_slowest_leads() -> None:
    player = Player(["gpu1", "gpu2"])
    assert player.feed("gpu1", PULLING) == PULLING | {"servers": {"gpu1": "pulling manifest", "gpu2": "waiting"}}
    assert player.feed("gpu1", layer(BIG, 100, 38)) == layer(BIG, 200, 38) | {
        "servers": {"gpu1": "pulling 38%", "gpu2": "waiting"}
    }
    player.feed("gpu1", layer(BIG, 100, 100))
    for line in (VERIFYING, WRITING, SUCCESS):
        player.feed("gpu1", line)
    player.end("gpu1")
    assert player.stages == ["pulling manifest"]
    assert player.lines[-1] == layer(BIG, 200, 100) | {"servers": {"gpu1": "success", "gpu2": "waiting"}}
    player.whole("gpu2", WHOLE)
    assert player.stages == [line["status"] for line in (PULLING, VERIFYING, WRITING)]
    assert player.completed == {BIG: 200}
    assert player.closing() == {"status": "success", "servers": {"gpu1": "success", "gpu2": "success"}}


def test_a_server_that_has_it_already_counts_as_done() -> None:
    player = Player(["has", "lacks"])
    player.whole("has", [PULLING, layer(BIG, 100, 100), layer(SMALL, 10, 10), VERIFYING, WRITING, SUCCESS])
    player.feed("lacks", PULLING)
    assert player.feed("lacks", layer(BIG, 100, 50)) == layer(BIG, 200, 150) | {
        "servers": {"has": "success", "lacks": "pulling 45%"}  # 50 bytes of 110
    }


def test_a_layer_begun_anew_takes_nothing_back() -> None:
    player = Player(["gpu1", "gpu2"])
    player.feed("gpu1", layer(BIG, 100, 80))
    assert player.feed("gpu1", layer(BIG, 100, 5)) is None
    assert player.feed("gpu1", layer(BIG, 100)) is None
    told = player.feed("gpu2", layer(BIG, 100, 1))
    assert told is not None
    assert told["completed"] == 81


def test_the_first_total_counts_and_who_has_all_of_its_own_has_all() -> None:
    player = Player(["a", "b"])
    player.feed("a", layer(BIG, 100, 10))
    player.feed("b", layer(BIG, 50, 30))
    assert player.completed == {BIG: 40}
    player.feed("b", layer(BIG, 50, 50))
    assert player.completed == {BIG: 110}
    player.feed("a", layer(BIG, 500, 400))
    assert player.completed == {BIG: 200}


def test_who_fails_early_holds_nobody_up() -> None:
    player = Player(["good", "bad"])
    assert player.end("bad", "connection refused") is None  # nothing was said yet that could be said again
    player.whole("good", WHOLE)
    assert player.stages == [line["status"] for line in (PULLING, VERIFYING, WRITING)]
    assert player.totals == {BIG: 200}
    assert player.completed == {BIG: 100}
    assert player.closing() == {
        "error": "pull of tiny: good has it; bad has not: connection refused",
        "servers": {"good": "success", "bad": "failed: connection refused"},
    }


def test_who_fails_late_lets_the_others_go_on_from_there() -> None:
    player = Player(["good", "bad"])
    player.feed("bad", PULLING)
    player.feed("bad", layer(BIG, 100, 60))
    for line in WHOLE[:-2]:
        player.feed("good", line)
    assert player.stages == ["pulling manifest"]
    assert player.feed("bad", {"error": "no space left on device"}) == VERIFYING | {
        "servers": {"good": "verifying sha256 digest", "bad": "failed: no space left on device"}
    }
    assert player.feed("bad", layer(BIG, 100, 100)) is None  # it has had its say
    assert player.end("bad", None) is None
    assert player.completed == {BIG: 160}


def test_all_fail_and_the_same_words_are_said_once() -> None:
    player = Player(["a", "b", "c", "d"])
    player.whole("a", [PULLING, {"error": "file does not exist"}])
    player.whole("b", [PULLING, {"error": "disk full"}])
    player.whole("c", [PULLING, {"error": "file does not exist"}])
    assert player.closing()["error"] == (
        "pull of tiny: no server has it; a and c have not: file does not exist; b has not: disk full; "
        "d has not: not finished"
    )
    player.whole("d", [PULLING, {"error": "file does not exist"}])
    assert "a, c and d have not: file does not exist" in player.closing()["error"]
    assert player.stages == ["pulling manifest"]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([PULLING, layer(BIG, 100, 50)], "the answer ended without success"),
        ([], "the answer ended without success"),
        ([PULLING, {"status": 'error: model "x" not found'}], 'model "x" not found'),
        ([PULLING, SUCCESS, {"status": "using existing layer"}], "the answer ended without success"),
        ([PULLING, {"error": {"message": "?"}}], "no reason given"),
        ([SUCCESS, {"error": "after all"}], "after all"),
    ],
)
def test_an_end_without_success_is_a_failure(lines: list[dict[str, Any]], why: str) -> None:
    player = Player(["a"])
    player.whole("a", lines)
    assert player.closing() == {"error": why, "servers": {"a": f"failed: {why}"}}


def test_a_broken_connection_is_no_success_whatever_was_said() -> None:
    player = Player(["a"])
    player.feed("a", SUCCESS)
    player.end("a", "connection reset")
    assert not player.progress.ok


def test_the_success_of_a_pull_within_a_create_is_not_the_end() -> None:
    existing = [{"status": f"using existing layer {digest}"} for digest in (BIG, SMALL)]
    player = Player(["pulls", "has"])
    player.whole("has", [*existing, WRITING, SUCCESS])
    player.whole("pulls", [*WHOLE, *existing, WRITING, SUCCESS])
    assert player.stages == [
        existing[0]["status"],  # the very first is told at once
        "pulling manifest",
        "verifying sha256 digest",
        "writing manifest",
        existing[1]["status"],
        "writing manifest",  # the second one
    ]
    assert player.closing()["status"] == "success"


def test_a_status_of_one_server_only_blocks_nobody_and_is_told_while_it_is_the_slowest() -> None:
    begin, new, old = ({"status": status} for status in ("begin", "creating new layer", "using existing layer"))
    player = Player(["a", "b"])
    for name, line in [("a", begin), ("b", begin), ("a", new), ("b", old)]:
        player.feed(name, line)
    assert player.stages == ["begin"]  # neither is past the other's
    player.feed("a", WRITING)
    assert player.stages == ["begin"]  # nobody knows yet that `old` comes before it
    player.feed("b", WRITING)
    assert player.stages == ["begin", "writing manifest"]

    player = Player(["a", "b", "c"])
    for name, line in [("a", begin), ("b", begin), ("c", begin), ("a", new), ("a", WRITING), ("b", new)]:
        player.feed(name, line)
    assert player.stages == ["begin"]
    player.feed("c", WRITING)  # without `new`, which a told before this
    assert player.stages == ["begin", "creating new layer"]
    player.feed("b", WRITING)
    assert player.stages == ["begin", "creating new layer", "writing manifest"]

    player = Player(["a", "b", "c"])
    for name, line in [("a", begin), ("b", begin), ("c", begin), ("a", new), ("b", new), ("c", WRITING)]:
        player.feed(name, line)
    assert player.stages == ["begin"]
    player.feed("a", WRITING)  # so c is past `new`, where b still is
    assert player.stages == ["begin", "creating new layer"]


def test_the_state_of_a_server_is_news_too() -> None:
    player = Player(["a", "b"])
    player.feed("a", PULLING)
    player.feed("a", layer(BIG, 100, 10))
    assert player.feed("b", PULLING) == layer(BIG, 200, 10) | {
        "servers": {"a": "pulling 10%", "b": "pulling manifest"},
    }
    assert player.feed("b", PULLING) is None


def test_a_line_told_again_is_no_news_even_if_another_came_between() -> None:
    player = Player(["a", "b"])
    player.feed("a", layer(BIG, 100, 10))
    player.feed("b", layer(SMALL, 10, 10))
    player.feed("a", layer(BIG, 100, 10))  # its share of all that is known is another now
    assert player.feed("b", layer(SMALL, 10, 10)) is None
    assert player.feed("a", layer(BIG, 100, 10)) is None
    assert [line["digest"] for line in player.bare] == [BIG, SMALL, SMALL]


def test_the_word_for_what_is_done_is_the_servers_own() -> None:
    player = Player(["a"])
    told = player.feed("a", {"status": "quantizing F16 model to Q4_0", "digest": "0" * 19, "total": 10, "completed": 3})
    assert told is not None
    assert told["servers"] == {"a": "quantizing 30%"}
    player = Player(["a"])
    assert player.feed("a", {"digest": BIG, "total": 10, "completed": 3}) == {
        "digest": BIG,
        "total": 10,
        "completed": 3,
        "servers": {"a": "pulling 30%"},
    }


def test_text_is_written_as_ollama_writes_it() -> None:
    player = Player(["größe"])
    player.feed("größe", b'  {"status":"l\xc3\xa4dt \\ud83d\\ude00"}\r\n')
    assert player.raw == '{"status":"lädt 😀","servers":{"größe":"lädt 😀"}}\n'.encode()


def test_a_merge_is_of_servers_that_are_known() -> None:
    with pytest.raises(ValueError, match="no servers"):
        Progress([], "pull of tiny")
    with pytest.raises(KeyError):
        Progress(["a"], "pull of tiny").feed("b", b"{}")


# --- recorded ----------------------------------------------------------------------------------------------------


def recorded(name: str) -> list[bytes]:
    """Return the lines of a recorded answer."""
    capture = json.loads((CAPTURES / f"{name}.json").read_text(encoding="utf-8"))
    body = "".join(read["data"] for read in capture["response"]).partition("\r\n\r\n")[2]
    return [line.encode() for line in body.split("\n") if line.startswith("{")]


@pytest.mark.parametrize("name", ["create_from", "pull_unreachable", "create_unknown_from", "pull_unreachable_single"])
def test_a_recorded_stream_of_one_server_comes_out_as_it_went_in(name: str) -> None:
    lines = recorded(name)
    player = Player(["gpu1"])
    for line in lines:
        player.feed("gpu1", line)
    player.end("gpu1")
    closing = player.closing()
    closing.pop("servers")
    assert [*player.bare, closing] == [json.loads(line) for line in lines]


def test_a_recorded_stream_of_several_servers() -> None:
    lines = recorded("create_from")
    player = Player(["a", "b", "c"])
    for line in lines:  # in step
        for name in player.names:
            player.feed(name, line)
    assert player.stages == [json.loads(line)["status"] for line in lines[:-1]]
    for name in player.names:
        player.end(name)
    assert player.closing()["status"] == "success"
