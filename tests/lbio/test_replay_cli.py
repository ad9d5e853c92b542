"""`ollama-lb replay`: the same, the first difference, one request explained, and logs that cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lbcore.events import AttemptFailed, FirstTokenReceived, Reason
from lbcore.trace import Recorder
from lbio.cli import main
from lbio.journal import replay as replay_module
from tests.playbook import fleet, many

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Return the log of two requests: one is raced, one retried."""
    book = fleet("a b c", routes=many(racers_min=2, racers_max=2))
    lines: list[str] = []
    book.balancer = Recorder(book.balancer, lines.append, seed=1, started=lambda: "2026-01-01T00:00:00+00:00")
    first, second = book.race(1)
    book.after(50).head(first, second)
    book >> FirstTokenReceived(first.id)
    book.skip()
    book.after(50).ends(first)
    book.race(2)
    for attempt in list(book.balancer.ledger.attempts.values()):
        book.after(10) >> AttemptFailed(attempt.id, Reason.RESET, 0, "the words of a server")
        book.skip()
    path = tmp_path / "events.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_the_same_is_said_to_be_byte_identical(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(log)]) == 0
    out, err = capsys.readouterr()
    head, counted, verdict = out.splitlines()
    assert head == f"{log}: written by ollama-lb 0.1.0, begun 2026-01-01T00:00:00+00:00; this is 0.1.0"
    n_calls = len(log.read_text(encoding="utf-8").splitlines()) - 2
    assert counted.startswith(f"{n_calls} calls over 0.1 s, 2 requests, ")
    assert counted.endswith(" commands compared")
    assert verdict == "byte-identical"
    assert err == ""


def test_as_json(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(log), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["n_requests"], told["difference"], told["truncated"]) == (True, 2, None, None)
    assert told["calls"]["arrived"] == 2


def test_the_first_difference_is_shown_with_its_context(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = log.read_text(encoding="utf-8")
    assert text.count('["commit",1,1]') == 1
    log.write_text(text.replace('["commit",1,1]', '["commit",1,2]'), encoding="utf-8")
    assert main(["replay", str(log)]) == 1
    out = capsys.readouterr().out
    assert "byte-identical" not in out
    assert "the first difference is in line 8, 0.050000 s after the first call\n  line 3, 0.000000 s: Request" in out
    assert "\n  line 8: FirstTokenReceived(attempt_id=1)\n" in out
    assert "    - CommitAttempt(request_id=1, attempt_id=2)   (recorded)\n" in out
    assert "    + CommitAttempt(request_id=1, attempt_id=1)   (now)\n" in out
    assert main(["replay", str(log), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["difference"]["line"] == 8


def test_a_log_that_breaks_off_is_replayed_up_to_there(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = log.read_text(encoding="utf-8")
    log.write_text(lines[:-20], encoding="utf-8")
    assert main(["replay", str(log)]) == 0
    last = len(lines.splitlines())
    assert f"the log breaks off in line {last}: replayed up to there\nbyte-identical\n" in capsys.readouterr().out
    assert main(["replay", str(log), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["truncated"] == last


def test_one_request_is_explained(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(log), "--at", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("+0.000 ms  RequestArrived(request_id=1, route='/api/chat', model='m'")
    assert out.count("RequestArrived") == 1
    assert "SERVER  CHOSEN   STATE    HEALTH  IN FLIGHT  LOADED  EXPECTED  RANK  CHANCE  WHY\n" in out
    assert "    a       primary  healthy  1.00    0/1        yes     100 ms    0     100%    rank 0; ready\n" in out
    assert "not drawn first; and 2 race already" in out or "outranked" in out
    assert "+50.000 ms  FirstTokenReceived(attempt_id=1)   (line 8)\n    -> CommitAttempt(request_id=1, attempt" in out
    assert "request_id=2" not in out


@pytest.mark.parametrize("named", ["1", "#f08f-1", "f08f-1"])
def test_a_request_may_be_named_as_the_log_does(named: str, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(log), "--at", named]) == 0
    assert "RequestArrived(request_id=1," in capsys.readouterr().out


@pytest.mark.parametrize("named", ["0", "#f08f", "#f08f-", "x", "-1x"])
def test_what_names_no_request_is_refused(named: str, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(log), f"--at={named}"]) == 2
    assert f"'{named}' is no request; write its number, or its id from the log" in capsys.readouterr().err


def test_a_request_is_explained_as_json(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(log), "--at", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["request_id"] == 2
    assert [choice["candidates"][0]["server"] for choice in told["choices"]] == ["a", "a"]
    assert [c["chosen_as"] for c in told["choices"][0]["candidates"]] == ["primary", "racer", ""]
    assert any(c["chosen_as"] for c in told["choices"][1]["candidates"])


def test_an_explanation_of_what_would_be_decided_otherwise_says_so(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = log.read_text(encoding="utf-8")
    log.write_text(text.replace('["commit",1,1]', '["commit",1,2]'), encoding="utf-8")
    assert main(["replay", str(log), "--at", "1"]) == 1
    assert "this version decides otherwise than was recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (lambda _: "", 1, "it is empty: there is no header"),
        (lambda _: "12:00:00 hello\n", 1, "this is not the header of an event log of ollama-lb"),
        (lambda text: text.replace('"ollama-lb-log":1', '"ollama-lb-log":9'), 1, "the log has format 9"),
        (lambda text: text[:300], 2, "the log ends before the state of the balancer does"),
        (lambda text: text.replace('"connected",1', '"nonsense",1'), 4, "this is no call of the core"),
        (lambda text: text.replace('["connected",1]', "\x00\xff"), 4, "this is no call of the core"),
        (lambda text: text.replace('"_last_probe_id"', '"_other"'), 2, "Fleet has no '_other' in this version"),
    ],
)
def test_a_log_that_cannot_be_read_is_refused_with_its_line(
    log: Path, capsys: pytest.CaptureFixture[str], change: Callable[[str], str], line: int, message: str
) -> None:
    log.write_bytes(change(log.read_text(encoding="utf-8")).encode("latin-1"))
    for more in ([], ["--at", "2"]):
        assert main(["replay", str(log), *more]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"{log}:{line}: ")
        assert message in err
        assert err.count("\n") == 1
    assert main(["replay", str(log), "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["where"]) == (False, f"{log}:{line}")


def test_what_is_no_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path)]) == 2
    assert "cannot be read: Is a directory" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "none")]) == 2
    assert "none: cannot be read: No such file or directory" in capsys.readouterr().err


def test_a_request_that_is_not_in_the_log(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(log), "--at", "17"]) == 2
    assert "there is no request 17 in this log; it has 1 to 2" in capsys.readouterr().err


def test_people_at_a_terminal_see_how_far_it_is(
    log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_module, "_PROGRESS_EVERY_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["replay", str(log)]) == 0
    assert "\rreplaying: " in capsys.readouterr().err


def test_in_a_process_of_its_own_and_with_other_hash_seeds(log: Path) -> None:
    for seed in ("0", "4711"):
        done = subprocess.run(
            [sys.executable, "-m", "lbio", "replay", str(log)],
            capture_output=True, text=True, check=False, cwd=ROOT, env={"PYTHONHASHSEED": seed, "PATH": ""},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("byte-identical\n")
