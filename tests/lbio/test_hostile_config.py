"""Configurations that nobody means: each is a problem that is told in a line, and none a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbio.config_file import ConfigError, load
from lbio.configuration.summary import problems_object
from simulator.fleet import parse_fleet

HUGE = "0x" + "f" * 5000
"""A number of more digits than Python writes."""


def problems_in(path: Path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path, check_fleet=parse_fleet)
    json.dumps(problems_object(caught.value.problems), default=str)
    return [str(problem) for problem in caught.value.problems]


BROKEN = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("text", ["", "no certificate", BROKEN])
def test_a_file_without_certificates_is_none_of_certificates(text: str, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text(text, encoding="ascii")
    (problem,) = problems_in(tmp_path / "c.toml", '[[servers]]\nurl = "https://a"\nca_file = "ca.pem"\n')
    assert problem.startswith('servers[0].ca_file: "ca.pem" has no certificate in it; ')


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a" * 5000])
def test_a_name_that_no_file_can_have_is_a_problem_of_the_file(name: str, tmp_path: Path) -> None:
    (problem,) = problems_in(tmp_path / "c.toml", f'[[servers]]\nurl = "https://a"\nca_file = "{name}"\n')
    assert problem.startswith("servers[0].ca_file: ")


@pytest.mark.parametrize("text", [
    f"seed = {HUGE}\n", f"listen = {HUGE}\n", f"drain_timeout = {HUGE}\n", f"[limits]\nhead_bytes_max = {HUGE}\n",
    f"[race]\nbudget = {HUGE}\n", f"[log]\nlevel = {HUGE}\n", f"[log]\ndecisions = {HUGE}\n", f"unknown = {HUGE}\n",
    f"[routes]\n'/api/chat' = {HUGE}\n", f"[[fleet]]\nname = {HUGE}\n", f"[[servers]]\nurl = {HUGE}\n",
])
def test_a_number_of_thousands_of_digits_is_shown_in_short(text: str, tmp_path: Path) -> None:
    problems = problems_in(tmp_path / "c.toml", text)
    assert any("0xfff" in problem for problem in problems)
    assert all(len(problem) < 500 for problem in problems)


def test_a_fake_server_whose_name_is_a_list_is_compared_with_no_other(tmp_path: Path) -> None:
    text = '[[servers]]\nurl = "http://a"\n[[fleet]]\nname = ["a"]\n'
    (problem,) = problems_in(tmp_path / "c.toml", text)
    assert problem.startswith("fleet[0].name: ")
