"""Configuration as TOML text: what `init` writes is read back as the same, and the files in configs/ are right."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbcore.config import Config, ModelSettings, Policy, RouteSettings, ServerSettings, Strategy, Winner
from lbcore.ollama import PASS_THROUGH, ROUTES, default_routes
from lbcore.parsing import Problem, parse_value
from lbcore.schema import SECOND_NS, Field, Kind, describe_setting, fields_of, format_value, join
from lbio.config_file import ConfigError, load, parse
from lbio.configuration.config_text import document, dump
from lbio.configuration.settings import AppConfig, KeySettings, UpstreamSettings
from simulator.fakes.specs import FakeSpec
from simulator.fleet import parse_fleet

# ruff: noqa: E501  # tables of values: one case a line

CONFIGS = Path(__file__).parents[2] / "configs"
GPU1 = {"url": "http://gpu1:11434"}


# --- the way back to TOML ----------------------------------------------------------------------------------


def _toml_value(field: Field) -> st.SearchStrategy[Any]:
    """Values that `field` may have in TOML."""
    declared = field.setting
    assert declared is not None
    low, high = declared.low or 0, declared.high
    whole = st.integers(int(low), int(high if high is not None else max(low, 1) * 10**6))
    by_kind: dict[Kind, st.SearchStrategy[Any]] = {
        Kind.DURATION: whole.map(lambda ns: format_value(Kind.DURATION, ns)),
        Kind.SIZE: whole,
        Kind.COUNT: whole,
        Kind.RATIO: st.floats(low, high if high is not None else 1e6),
        Kind.FLAG: st.booleans(),
        Kind.CHOICE: st.sampled_from([str(choice) for choice in declared.choices or ()]),
        Kind.TEXTS: st.lists(st.text("abc", max_size=5), max_size=3),
        Kind.TEXT: st.text("abc \\\"'é", max_size=5),
        Kind.PAIRS: st.dictionaries(st.sampled_from(["X-A", "x-b"]), st.text("abc", min_size=1, max_size=5), max_size=2),
    }
    return by_kind[declared.kind]


def _table(cls: type, **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    values = {field.key: _toml_value(field) for field in fields_of(cls) if field.setting is not None}
    return st.fixed_dictionaries({}, optional={**values, **fixed})


def _sections(cls: type) -> dict[str, st.SearchStrategy[Any]]:
    return {field.key: _table(field.section) for field in fields_of(cls) if field.section is not None}


RACED = st.one_of(st.sampled_from(["race", "hedge", "sequential"]), st.fixed_dictionaries(
    {"strategy": st.just("race"), "racers_min": st.integers(1, 3), "racers_max": st.integers(3, 64)},
    optional={"winner": st.sampled_from([str(winner) for winner in Winner]), "hedges_max": st.integers(0, 63)}))
UPSTREAM = {field.key: _toml_value(field) for field in fields_of(UpstreamSettings)}
KEYS = st.lists(_table(KeySettings, name=st.nothing(), hash=st.nothing(), env=st.nothing(), file=st.nothing(),
                       models=st.lists(st.sampled_from(["a", "b:1b", "*", "c*"]), min_size=1, max_size=2),
                       allow=st.sampled_from([["use"], ["manage"], ["manage", "use"]])), max_size=2).map(
    lambda tables: [{**table, "name": f"key {index}", "env": "A_KEY"} for index, table in enumerate(tables)])
SERVERS = st.lists(_table(ServerSettings, url=st.nothing(), name=st.from_regex(r"[!-+\-.0-~]{1,9}", fullmatch=True), **UPSTREAM), max_size=4).map(
    lambda tables: [{**table, "url": f"http://host{index}"} for index, table in enumerate(tables)])
ALIAS_NAMES = st.sampled_from(["a", "gpt-4.1", "hf.co/x/Y:Q4_K_M", "ä", "b"])
FILES = st.fixed_dictionaries({}, optional={
    **_sections(Config), **_sections(AppConfig), "listen": st.sampled_from([":1", "gpu:0", "[::1]:5"]),
    "origins": st.lists(st.sampled_from(["https://a.example", "*", "App://*", "http://*.b:1"]), max_size=3),
    "drain_timeout": st.integers(0, 99), "seed": st.integers(0, 2**63 - 1), "servers": SERVERS, "keys": KEYS,
    "alias": st.dictionaries(ALIAS_NAMES, ALIAS_NAMES | st.lists(ALIAS_NAMES, min_size=1, max_size=3), max_size=3),
    "routes": st.fixed_dictionaries({}, optional={
        "/api/chat": RACED, "/v1/messages": RACED, "/api/tags": st.just("sequential"), "*": st.just("sequential")}),
})


def parse_mended(raw: dict[str, Any]) -> AppConfig:
    """Parse `raw` without the keys that contradict each other."""
    for _ in range(20):
        try:
            return parse(raw, need_servers=False)
        except ConfigError as error:
            for problem in error.problems:
                raw.pop(re.split(r"[.\[]", problem.key)[0], None)
    raise AssertionError(raw)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FILES)
def test_dump_is_read_back_as_the_same(raw: dict[str, Any]) -> None:
    app = parse_mended(raw)
    assert parse(tomllib.loads(dump(app)), need_servers=False) == app


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FILES)
def test_the_explained_document_is_read_back_as_the_same(raw: dict[str, Any]) -> None:
    app = parse_mended({"servers": [GPU1], **raw})
    if app.core.servers:
        assert parse(tomllib.loads(document(app))) == app


def test_dump_says_only_what_differs() -> None:
    app = parse({"servers": [GPU1, {"url": "http://b", "name": "b"}], "log": {"level": "info"}, "race": {"measure": 3},
                 "listen": "11434", "routes": {"/api/chat": "race", "/api/generate": {"hedges_max": 3}}})
    assert dump(app) == (
        '[[servers]]\nurl = "http://gpu1:11434"\n\n[[servers]]\nurl = "http://b:11434"\nname = "b"\n\n'
        '[routes."/api/generate"]\nstrategy = "race"\nhedges_max = 3\n\n[race]\nmeasure = "3s"\n')


# --- the files in configs/ ---------------------------------------------------------------------------------


def test_prod_toml_is_what_document_writes() -> None:
    """Regenerate it with: python -m lbio.cli init --full > configs/prod.toml."""
    assert (CONFIGS / "prod.toml").read_text(encoding="utf-8") == document()


def explained_keys() -> list[tuple[str, str, str, str]]:
    """Return (table, key, value, comment) of each key of prod.toml down from each table's first header."""
    found, table, comment, headers = [], "", "", set()
    for line in (CONFIGS / "prod.toml").read_text(encoding="utf-8").splitlines():
        if header := re.fullmatch(r"(?:# )?\[+(.*?)\]+", line):
            table = "again" if header[1] in headers else header[1]
            headers.add(header[1])
        elif key := re.fullmatch(r'(?:# )?("[^"]+"|[a-z_]+) = (.*?)(  # .*)?', line):
            found.append((table, key[1].strip('"'), key[2], comment + (key[3] or "")))
            comment = ""
        else:
            comment = f"{comment} {line[2:]}" if line.startswith("#") else ""
    return [entry for entry in found if entry[0] not in {"again", "alias"}]  # whose keys are names of the operator's


def expected_fields() -> dict[tuple[str, str], Field]:
    top = [("", field) for cls in (AppConfig, Config) for field in fields_of(cls)]
    nested = [(field.key, inner) for _, field in top if field.section is not None for inner in fields_of(field.section)]
    servers = [("servers", field) for cls in (ServerSettings, UpstreamSettings) for field in fields_of(cls)]
    keys = [("keys", field) for field in fields_of(KeySettings)]
    models = [("models", field) for field in fields_of(ModelSettings)]
    all_fields = (*top, *nested, *servers, *keys, *models)
    return {(table, field.key): field for table, field in all_fields if field.setting is not None}


def test_prod_toml_explains_every_key_exactly_once() -> None:
    keys = [(table, key) for table, key, _, _ in explained_keys()]
    routes = [("routes", route.name) for route in (*ROUTES, PASS_THROUGH)]
    assert sorted(keys) == sorted((*expected_fields(), *routes))


def test_prod_toml_has_every_key_at_its_default_and_tells_its_unit() -> None:
    fields = expected_fields()
    explained = [entry for entry in explained_keys() if (entry[0], entry[1]) in fields]
    assert len(explained) == len(fields)
    for table, key, value, comment in explained:
        field = fields[table, key]
        assert field.setting is not None
        assert field.why in comment
        assert describe_setting(field.setting) in comment
        if table != "servers" and key not in {"seed", "name", "requests_per_minute", "copies"}:
            assert parse_value(field.setting, tomllib.loads(f"x = {value}")["x"]) == field.default, join(table, key)


def test_prod_toml_differs_from_the_defaults_only_in_its_servers() -> None:
    app = load(CONFIGS / "prod.toml")
    assert len(app.core.servers) == 2
    assert dataclasses.replace(app, core=dataclasses.replace(app.core, servers=(), routes={})) == AppConfig(core=Config(routes={}))
    assert app.core.routes == default_routes(Config().race)
    assert app.warnings == ()


def test_seed_toml_is_the_original() -> None:
    app = load(CONFIGS / "seed.toml")
    for path in ("/api/chat", "/api/generate"):
        assert app.core.route(path) == RouteSettings(
            strategy=Strategy.RACE, winner=Winner.MOST_TOKENS, racers_min=3, racers_max=6, hedges_max=0)
    race = app.core.race
    assert (race.measure_ns, race.utilisation_max, race.budget) == (2 * SECOND_NS, 1.0, 5.0)
    assert app.core.selection.policy is Policy.HEALTH


def test_demo_toml_has_four_fakes() -> None:
    problems: list[Problem] = []
    app = load(CONFIGS / "demo.toml", check_fleet=parse_fleet)
    specs = parse_fleet(app.fleet, problems)
    assert problems == []
    assert app.listen == "127.0.0.1:11434"
    assert [spec.name for spec in specs] == ["swift", "steady", "slow", "flaky"]
    assert [len(spec.models) for spec in specs] == [2, 2, 1, 1]
    assert all(_serves_llama(spec) for spec in specs)
    assert [[str(fault.kind) for fault in spec.faults] for spec in specs] == [[], [], [], ["flap"]]


def _serves_llama(spec: FakeSpec) -> bool:
    return spec.models[0].name == "llama3.2:latest" and spec.port == 0
