"""Two results side by side: what is called worse, better or chance, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.kit import Figure, Report

LOW = [1.0, 1.1, 1.2]
HIGH = [2.0, 2.1, 2.2]


def _result(**figures: Figure) -> dict[str, Any]:
    report = Report("relay", "relay", (), figures=dict(figures))
    return json.loads(json.dumps(report.as_object()))  # type: ignore[no-any-return]


def _saved(path: Path, found: dict[str, Any]) -> str:
    path.write_text(json.dumps(found), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "higher_is_better", "word"),
    [
        (LOW, HIGH, False, "worse"),
        (HIGH, LOW, False, "better"),
        (LOW, HIGH, True, "better"),
        (HIGH, LOW, True, "worse"),
        (LOW, [1.2, 1.3, 1.4], False, "within the spread"),
        (LOW, LOW, False, "within the spread"),
        (LOW, [2.0, 2.1], False, "too few repetitions"),
        ([1.0], [5.0], False, "too few repetitions"),
    ],
)
def test_a_change_is_more_than_chance_when_no_repetition_overlaps(
    old: list[float], new: list[float], *, higher_is_better: bool, word: str
) -> None:
    assert compare.word_on(Figure(old, "x", higher_is_better), Figure(new, "x", higher_is_better)) == word


def test_what_depends_on_the_moment_is_not_judged() -> None:
    assert compare.word_on(Figure(LOW, "us", judged=False), Figure(HIGH, "us", judged=False)) == "for information"


def test_the_change_is_that_of_the_medians() -> None:
    changes = compare.compare(_result(cost=Figure([1.0, 2.0, 3.0], "x")), _result(cost=Figure([2.5], "x")))
    assert [change.percent for change in changes] == [25.0]
    assert compare.Change("none", "", [0.0], [1.0], "").percent is None


def test_figures_that_one_result_lacks_are_left_out() -> None:
    changes = compare.compare(
        _result(a=Figure(LOW, ""), b=Figure(LOW, "")), _result(b=Figure(LOW, ""), c=Figure(LOW, ""))
    )
    assert [change.name for change in changes] == ["b"]


def test_of_a_result_without_figures_all_numbers_are_shown_for_information() -> None:
    data = {"8": {"rate": [1, 2], "peak": 3.5, "ok": True, "samples": list(range(100)), "said": "200"}}
    found = compare.figures_of({"data": data})
    assert {name: figure.values for name, figure in found.items()} == {"8, rate": [1, 2], "8, peak": [3.5]}
    assert not any(figure.judged for figure in found.values())


def test_the_exit_code_says_whether_something_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low, high = _saved(tmp_path / "low.json", _result(cost=Figure(LOW, "x"))), ""
    high = _saved(tmp_path / "high.json", _result(cost=Figure(HIGH, "x")))
    assert compare.main([low, high]) == 1
    assert "worse" in capsys.readouterr().out
    assert compare.main([high, low]) == 0
    assert compare.main([low, high, "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["high"][0]["word"] == "worse"


def test_two_directories_are_compared_file_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, values in (("old", LOW), ("new", LOW)):
        (tmp_path / name).mkdir()
        _saved(tmp_path / name / "relay.json", _result(cost=Figure(values, "x")))
    _saved(tmp_path / "new" / "small.json", _result(cost=Figure(HIGH, "x")))
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert "small" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "told"),
    [(None, "No such file"), ("{", "no JSON"), ("[]", "not a result"), ('{"data": {}}', "no figure in common")],
)
def test_what_cannot_be_compared_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, told: str
) -> None:
    good = _saved(tmp_path / "good.json", _result(cost=Figure(LOW, "x")))
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text, encoding="utf-8")
    assert compare.main([str(bad), good]) == 2
    assert told in capsys.readouterr().err


def test_a_file_and_a_directory_are_no_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = _saved(tmp_path / "good.json", _result(cost=Figure(LOW, "x")))
    assert compare.main([good, str(tmp_path)]) == 2
    assert "two files or two directories" in capsys.readouterr().err
