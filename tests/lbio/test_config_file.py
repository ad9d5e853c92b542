"""Configuration: files, flags, and all the mistakes one can make."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lbcore.config import Config, Policy, RouteSettings, ServerSettings, Strategy, Winner
from lbcore.ollama import default_routes
from lbcore.schema import SECOND_NS, fields_of
from lbio.config_file import NO_OVERRIDES, ConfigError, Overrides, load, parse
from lbio.configuration.config_text import dump
from lbio.configuration.settings import AppConfig, Forwarded, LogLevel
from simulator.fleet import parse_fleet

# ruff: noqa: E501  # tables of exact messages: one case a line

GPU1 = {"url": "http://gpu1:11434"}
LOADED = {"servers": [GPU1]}


def problems_of(raw: Mapping[str, Any], overrides: Overrides = NO_OVERRIDES) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(raw, overrides)
    return [str(problem) for problem in caught.value.problems]


# --- good configurations -----------------------------------------------------------------------------------


def test_one_server_is_enough() -> None:
    app = parse(LOADED)
    server = ServerSettings(url="http://gpu1:11434", name="gpu1:11434")
    assert app == AppConfig(core=Config(servers=(server,), routes=app.core.routes))
    assert app.core.routes == default_routes(app.core.race)
    assert app.warnings == ()


def test_every_table_is_read() -> None:
    app = parse({
        "listen": "[::1]:0", "drain_timeout": "5s", "seed": 7,
        "client": {"head_timeout": "1s"}, "limits": {"body_bytes_max": "1MiB"}, "pool": {"idle_max": 0},
        "proxy": {"forwarded": "none"}, "log": {"level": "debug", "decisions": False},
        "race": {"racers_max": 4, "winner": "most-tokens"}, "selection": {"policy": "health"},
        "servers": [{"url": "https://gpu1/", "name": "one", "slots": 4, "in_flight_max": 9, "ca_file": "x.pem"}],
    })
    assert (app.listen, app.drain_timeout_ns, app.seed) == ("[::1]:0", 5 * SECOND_NS, 7)
    assert (app.client.head_timeout_ns, app.limits.body_bytes_max, app.pool.idle_max) == (SECOND_NS, 1 << 20, 0)
    assert (app.proxy.forwarded, app.log.level, app.log.decisions) == (Forwarded.NONE, LogLevel.DEBUG, False)
    assert (app.core.race.racers_max, app.core.selection.policy) == (4, Policy.HEALTH)
    assert app.core.servers == (ServerSettings(url="https://gpu1:443", name="one", slots=4, in_flight_max=9, ca_file="x.pem"),)
    assert app.core.route("/api/chat") == RouteSettings(
        strategy=Strategy.RACE, winner=Winner.MOST_TOKENS, racers_min=1, racers_max=4, hedges_max=1)


def test_a_port_alone_may_be_a_number() -> None:
    assert parse({**LOADED, "listen": 8080}).listen == "0.0.0.0:8080"


def test_routes_as_text_and_as_table() -> None:
    app = parse({**LOADED, "race": {"hedges_max": 2}, "routes": {
        "/api/chat": "hedge", "/api/generate": {"racers_min": 3, "racers_max": 5}, "/api/tags": "sequential",
        "/v1/messages": {"strategy": "race", "winner": "first-finish", "hedges_max": 0}}})
    routes = app.core.routes
    assert routes["/api/chat"] == RouteSettings(strategy=Strategy.HEDGE, hedges_max=2)
    assert routes["/api/generate"] == RouteSettings(strategy=Strategy.RACE, racers_min=3, racers_max=5, hedges_max=2)
    assert routes["/api/tags"] == RouteSettings(strategy=Strategy.SEQUENTIAL)
    assert routes["/v1/messages"] == RouteSettings(strategy=Strategy.RACE, winner=Winner.FIRST_FINISH, racers_max=2)
    assert app.core.route("/anything") == routes["*"] == RouteSettings()


@pytest.mark.parametrize(("server", "warnings"), [
    ({"url": "https://a", "verify": False}, ("servers[0]: verify = false: whoever answers at https://a:443 is trusted",)),
    ({"url": "http://a", "verify": False}, ()),
    ({"url": "http://a", "ca_file": "x"}, ("servers[0]: ca_file is not used: http://a:11434 is not verified",)),
    ({"url": "http://a", "slots": 16}, ("servers[0]: in_flight_max = 8 leaves some of its 16 slots always empty",)),
])
def test_what_is_probably_not_meant_is_warned_of(server: dict[str, Any], warnings: tuple[str, ...]) -> None:
    assert parse({"servers": [server]}).warnings == warnings


def test_open_management_is_warned_of() -> None:
    assert parse({**LOADED, "admin": {"allow": "any"}}).warnings == (
        'admin.allow = "any": whoever reaches 0.0.0.0:11434 may add and remove servers',)


def test_no_server_is_no_problem_for_those_who_need_none() -> None:
    assert parse({}, need_servers=False).core.servers == ()


def test_a_fleet_is_kept_for_the_simulator() -> None:
    fakes = [{"name": "a", "fault": {"kind": "flap"}}]
    app = parse({"fleet": fakes})
    assert app.fleet == tuple(fakes)
    assert tomllib.loads(dump(app))["fleet"] == fakes


# --- bad configurations ------------------------------------------------------------------------------------

TABLES_FIX = 'write [[servers]] on a line of its own and below it url = "http://gpu1:11434"'
NO_SERVER = ('servers: no server is named; write [[servers]] and below it url = "http://gpu1:11434", '
             "or give the flag -s http://gpu1:11434=gpu1")


@pytest.mark.parametrize(("raw", "problem"), [
    ({"servers": []}, NO_SERVER),
    ({"servers": GPU1}, f"servers: {{...}} is not a list of tables; {TABLES_FIX}"),
    ({"servers": ["http://gpu1"]}, f'servers[0]: "http://gpu1" is not a table; {TABLES_FIX}'),
    ({"servers": [GPU1, {"url": "gpu3:11434"}]}, 'servers[1].url: "gpu3:11434" has no scheme; write "http://gpu3:11434"'),
    ({"servers": [{"name": "x"}]},
     "servers[0].url: is missing; it says where this Ollama listens: http://host:port or https://host:port"),
    ({"servers": [{**GPU1, "name": "a b"}]},
     'servers[0].name: "a b" has " " in it; write a name of ASCII without space, comma and slash'),
    ({"servers": [GPU1, {"url": "http://GPU1"}]},
     'servers[1].url: "http://gpu1:11434" is also the url of servers[0]; name each server once'),
    ({"servers": [{**GPU1, "name": "x"}, {"url": "http://b", "name": "x"}]},
     'servers[1].name: "x" is also the name of servers[0]; give each server a name of its own'),
    ({"servers": [{**GPU1, "slot": 2}]}, "servers[0].slot: 2 is set, but there is no such key; did you mean servers[0].slots?"),
    ({"servers": [{"url": "http://localhost:11434"}]},
     'servers[0].url: "http://localhost:11434" is where ollama-lb itself listens (0.0.0.0:11434); let one of the two use another port'),
    ({**LOADED, "server": [GPU1]}, "server: [...] is set, but there is no such key; did you mean servers?"),
    ({**LOADED, "listen": "localhost"}, 'listen: "localhost" has no port; write "localhost:11434"'),
    ({**LOADED, "listen": True}, "listen: true is not text; write text in quotes"),
    ({**LOADED, "mesure": "2s"}, 'mesure: "2s" is set, but there is no such key; did you mean race.measure?'),
    ({**LOADED, "timeout": {"silence": "2m"}}, "timeout: {...} is set, but there is no such key; did you mean timeouts?"),
    ({**LOADED, "drain": 5}, "drain: 5 is set, but there is no such key; did you mean drain_timeout?"),
    ({"servers": [{**GPU1, "zzzz": 2}]},
     "servers[0].zzzz: 2 is set, but there is no such key; the keys here are url, name, slots, in_flight_max, verify, ca_file, bearer, headers"),
    ({**LOADED, "timeouts": {"measure": 2}}, "timeouts.measure: 2 is set, but there is no such key; did you mean race.measure?"),
    ({**LOADED, "zzzz": 1},
     "zzzz: 1 is set, but there is no such key; the keys here are listen, origins, drain_timeout, seed, cli_extras, client, limits, pool, proxy, admin, embed, log, record, race, selection, health, probe, timeouts, retry, queue, placement, servers, models, routes, alias, keys, fleet"),
    ({**LOADED, "selection": {"idle_timeout": 2}},
     "selection.idle_timeout: 2 is set, but there is no such key; did you mean client.idle_timeout or pool.idle_timeout?"),
    ({**LOADED, "race": {"slots": 2}}, "race.slots: 2 is set, but there is no such key; did you mean servers.slots?"),
    ({**LOADED, "race": {"racers": 2}}, "race.racers: 2 is set, but there is no such key; did you mean race.racers_min or race.racers_max?"),
    ({**LOADED, "race": {"hedge-delay-max": 2}},
     "race.hedge-delay-max: 2 is set, but there is no such key; did you mean race.hedge_delay_max?"),
    ({**LOADED, "probe": {"interval": "1ms"}}, 'probe.interval: "1ms" is too small; write a duration of 100ms or more'),
    ({**LOADED, "race": {"racers_min": 5}},
     "race.racers_min: 5 is more than race.racers_max, which is 2 (the default); lower the one or raise the other"),
    ({**LOADED, "race": {"hedge_delay_max": "500ms"}},
     'race.hedge_delay_initial: "1s" (the default) is more than race.hedge_delay_max, which is "500ms"; lower the one or raise the other'),
    ({**LOADED, "race": {"hedge_delay_min": "3s", "hedge_delay_initial": "2s"}},
     'race.hedge_delay_min: "3s" is more than race.hedge_delay_initial, which is "2s"; lower the one or raise the other'),
    ({**LOADED, "probe": {"interval_dead": "1m"}},
     'probe.interval_dead: "1m" is more than probe.interval_dead_max, which is "15s" (the default); lower the one or raise the other'),
    ({**LOADED, "limits": {"bodies_bytes_max": "1MiB"}},
     'limits.body_bytes_max: "64MiB" (the default) is more than limits.bodies_bytes_max, which is "1MiB"; lower the one or raise the other'),
    ({**LOADED, "routes": ["race"]}, 'routes: [...] is not a table; write [routes] and below it "/api/chat" = "race"'),
    ({**LOADED, "routes": {"/api/chats": "race"}},
     'routes."/api/chats": "race" is set, but there is no such key; did you mean routes."/api/chat"?'),
    ({**LOADED, "routes": {"/api/show": "race"}},
     'routes."/api/show": "race" is not possible for this route; write one of "sequential"'),
    ({**LOADED, "routes": {"/api/tags": {"strategy": "hedge"}}},
     'routes."/api/tags".strategy: "hedge" is not possible for this route; write one of "aggregate", "sequential"'),
    ({**LOADED, "routes": {"/api/chat": "sequencial"}},
     'routes."/api/chat": "sequencial" is not one of the choices; did you mean "sequential"? The choices are "local", "aggregate", "sequential", "race", "hedge", "broadcast"'),
    ({**LOADED, "routes": {"/api/chat": {"strategy": "hedge", "racers_max": 2}}},
     'routes."/api/chat".racers_max: 2 means nothing to the strategy hedge; remove it, or change the strategy'),
    ({**LOADED, "routes": {"/api/chat": {"racers_min": 3}}},
     'routes."/api/chat".racers_min: 3 is more than racers_max, which is 2; write both'),
    ({**LOADED, "routes": {"/api/chat": {"racer_min": 3}}},
     'routes."/api/chat".racer_min: 3 is set, but there is no such key; did you mean routes."/api/chat".racers_min?'),
    ({"fleet": {"name": "a"}}, "fleet: {...} is not a list of tables; write [[fleet]] above each fake server"),
    ({"servers": [{**GPU1, "name": "a"}], "fleet": [{"name": "a"}]},
     'fleet[0].name: "a" is also the name of servers[0]; give each server a name of its own'),
])
def test_each_mistake_has_its_message(raw: dict[str, Any], problem: str) -> None:
    assert problems_of(raw) == [problem]


def test_a_config_full_of_mistakes_reports_all_of_them_in_its_order() -> None:
    found = problems_of({
        "lisen": ":1", "drain_timeout": "5", "race": {"racers_min": 9, "mesure": 1, "winner": "last"},
        "servers": [{"url": "x"}, {"nam": "y"}, "z"], "routes": {"/": "race", "/x": 1}, "log": {"level": "loud"},
        "limits": {"connections_max": True, "head_bytes_max": "1"}, "probe": 5, "queue": {"length_max": -1},
    })
    assert [problem.partition(": ")[0] for problem in found] == [
        "lisen", "drain_timeout", "race.mesure", "race.winner", "race.racers_min", "servers[0].url", "servers[1].nam",
        "servers[1].url", "servers[2]", 'routes."/"', 'routes."/x"', "log.level", "limits.head_bytes_max",
        "limits.connections_max", "probe", "queue.length_max"]


NAME_FIX = "write a name of ASCII without space, comma and slash"


@pytest.mark.parametrize(("servers", "keys"), [
    ([{"url": "gpu1", "name": "a b"}], ["servers[0].url", "servers[0].name"]),
    ([{"name": "a b"}], ["servers[0].url", "servers[0].name"]),
    ([{"url": 5, "name": "a b"}], ["servers[0].url", "servers[0].name"]),
    ([{**GPU1, "name": "x"}, {"url": "gpu1", "name": "x"}], ["servers[1].url", "servers[1].name"]),
    ([{**GPU1, "name": "x"}, {"name": "x"}], ["servers[1].url", "servers[1].name"]),
    ([{"name": "x"}, {**GPU1, "name": "x"}], ["servers[0].url", "servers[1].name"]),
    ([{**GPU1, "name": "x"}, {**GPU1, "name": "x"}], ["servers[1].url", "servers[1].name"]),
    ([{**GPU1, "name": "a b"}, {**GPU1}], ["servers[0].name", "servers[1].url"]),
    ([{"url": "http://localhost", "name": "a b"}], ["servers[0].name", "servers[0].url"]),
    ([{"name": "a b", "slots": 0, "slot": 1}],
     ["servers[0].slot", "servers[0].url", "servers[0].slots", "servers[0].name"]),
])
def test_no_problem_of_a_server_hides_another(servers: list[dict[str, Any]], keys: list[str]) -> None:
    assert [problem.partition(": ")[0] for problem in problems_of({"servers": servers})] == keys


def test_a_server_without_url_does_not_hide_its_certificate(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[[servers]]\nca_file = "no.pem"\n', encoding="utf-8")
    assert [problem.partition(": ")[0] for problem in problems_in(path)] == ["servers[0].url", "servers[0].ca_file"]


def test_a_fake_server_may_not_have_the_name_of_a_server_without_url() -> None:
    found = problems_of({"servers": [{"name": "a"}], "fleet": [{"name": "a"}]})
    assert [problem.partition(": ")[0] for problem in found] == ["servers[0].url", "fleet[0].name"]


def test_both_halves_of_a_servers_flag_are_judged() -> None:
    assert problems_of({}, Overrides(servers=("ftp://b=a b",))) == [
        '--servers[0]: "ftp://b=a b" has the scheme "ftp"; write http:// or https://',
        f'--servers[0]: "ftp://b=a b" has " " in it; {NAME_FIX}']


def test_a_pair_is_not_compared_when_one_of_it_is_wrong_by_itself() -> None:
    assert len(problems_of({**LOADED, "race": {"racers_min": 99, "racers_max": 1}})) == 1


def test_problems_of_the_fleet_come_with_the_others() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"fleet": [{"nam": "a"}], "seed": -1}, check_fleet=parse_fleet)
    assert [problem.key for problem in caught.value.problems] == ["fleet[0].nam", "fleet[0].name", "seed"]


JSON_LIKE = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.sampled_from(["http://a", "race"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
        st.sampled_from(["url", "name", "race", "servers", "routes", "listen", "/api/chat", "strategy", "x", "fleet", "fault",
                         "models", "kind", "winner", "probe", "interval", "bearer", "headers", "hash", "env", "allow"]), inner, max_size=4)), max_leaves=15)
TOP_KEYS = [field.key for cls in (AppConfig, Config) for field in fields_of(cls)] + ["servers", "routes", "fleet", "keys", "x"]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(TOP_KEYS), JSON_LIKE, max_size=6))
def test_whatever_toml_holds_is_read_or_refused(raw: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        assert parse(raw, check_fleet=parse_fleet).listen


# --- files -------------------------------------------------------------------------------------------------


def problems_in(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return [str(problem).replace(str(path.parent), "") for problem in caught.value.problems]


@pytest.mark.parametrize(("content", "problem"), [
    (b"listen =\n", '/c.toml:1: is not TOML: Invalid value (column 9); write key = value, with text in "quotes"'),
    (b"seed = 1\nseed = 2\n",
     "/c.toml:2: is not TOML: Cannot overwrite a value (column 9); each key and each table may stand there once"),
    (b"seed = 1\nx = \xff\n", "/c.toml:2: is not UTF-8 text; save the file as UTF-8"),
    (b"seed = " + b"[" * 9999, "/c.toml: is nested too deeply; write plain tables"),
])
def test_a_file_that_is_no_toml(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    assert problems_in(path) == [problem]


def test_a_number_beyond_measure_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("seed = " + "9" * 5000, encoding="utf-8")
    assert problems_in(path)[0].startswith("/c.toml: is not TOML: Exceeds the limit")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert problems_in(tmp_path / "no.toml") == ["/no.toml: cannot be read: No such file or directory; name a file that exists"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows words it differently")
def test_a_directory_is_no_file(tmp_path: Path) -> None:
    assert problems_in(tmp_path)[0].endswith("cannot be read: Is a directory; name a file that exists")


def test_bom_and_crlf_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b'\xef\xbb\xbflisten = ":1"\r\n[[servers]]\r\nurl = "http://a"\r\n')
    assert load(path).listen == "0.0.0.0:1"


def test_certificates_are_looked_for_beside_the_file(tmp_path: Path) -> None:
    path, ca_file = tmp_path / "c.toml", tmp_path / "ca.pem"
    path.write_text('[[servers]]\nurl = "https://a"\nca_file = "ca.pem"\n', encoding="utf-8")
    assert problems_in(path) == [f'servers[0].ca_file: "ca.pem" is no file; there is nothing readable at {Path("/ca.pem")}']
    shutil.copy(Path(__file__).parent / "localhost.pem", ca_file)
    assert load(path).core.servers[0].ca_file == str(ca_file)


# --- flags -------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file() -> None:
    app = parse({**LOADED, "listen": ":1", "timeouts": {"silence": "9s", "answer": "8m"}},
                Overrides(listen=":2", servers=("http://a=x", "b:1"), timeout_s="30", timeout_ft_s=1.5, time_measure_s="3s"))
    assert app.listen == "0.0.0.0:2"
    assert [(server.url, server.name) for server in app.core.servers] == [("http://a:11434", "x"), ("http://b:1", "b:1")]
    assert app.core.timeouts == dataclasses.replace(
        Config().timeouts, silence_ns=30 * SECOND_NS, first_token_warm_ns=3 * SECOND_NS // 2, answer_ns=480 * SECOND_NS)
    assert app.core.race.measure_ns == 3 * SECOND_NS


def test_flags_do_without_a_file() -> None:
    assert load(None, Overrides(servers=("gpu1",))).core.servers == (ServerSettings(url="http://gpu1:11434", name="gpu1:11434"),)


def test_timeout_bounds_connecting_and_timeout_ft_the_cold_start() -> None:
    timeouts = parse(LOADED, Overrides(timeout_s=2, timeout_ft_s="20m")).core.timeouts
    assert (timeouts.connect_ns, timeouts.silence_ns) == (2 * SECOND_NS, 2 * SECOND_NS)
    assert (timeouts.first_token_warm_ns, timeouts.first_token_cold_ns) == (1200 * SECOND_NS, 1200 * SECOND_NS)


@pytest.mark.parametrize(("overrides", "problem"), [
    (Overrides(listen="x"), '--listen: "x" has no port; write "x:11434"'),
    (Overrides(timeout_s="soon"), '--timeout: "soon" is not a duration; write "300ms", "1.5s", "1h30m" or a number of seconds'),
    (Overrides(timeout_s="0"), "--timeout: 0 is too small; write a duration of 1ms or more"),
    (Overrides(timeout_ft_s="-3"), '--timeout-ft: -3 is negative; write "300ms", "1.5s", "1h30m" or a number of seconds'),
    (Overrides(timeout_ft_s="nan"), '--timeout-ft: nan is not finite; write "300ms", "1.5s", "1h30m" or a number of seconds'),
    (Overrides(time_measure_s="1h"), '--time-measure: "1h" is too large; write a duration from 0s to 10m'),
    (Overrides(servers=("a", "x=http://b")), '--servers[1]: "x=http://b" has the name first; write "http://b=x"'),
    (Overrides(servers=("http://b=",)), '--servers[0]: "http://b=" has no name after "="; write "http://b" or add a name'),
    (Overrides(servers=("ftp://b",)), '--servers[0]: "ftp://b" has the scheme "ftp"; write http:// or https://'),
    (Overrides(servers=("http://b=a/b",)),
     '--servers[0]: "http://b=a/b" has "/" in it; write a name of ASCII without space, comma and slash'),
    (Overrides(servers=("",)), '--servers[0]: "" is empty; write "http://host:11434"'),
    (Overrides(servers=("localhost:11434",)),
     '--servers[0]: "http://localhost:11434" is where ollama-lb itself listens (0.0.0.0:11434); let one of the two use another port'),
    (Overrides(server_file=Path("no.txt")),
     '--server-file: "no.txt" cannot be read: No such file or directory; name a file that exists'),
])
def test_problems_of_flags_name_the_flag(overrides: Overrides, problem: str) -> None:
    assert problems_of(LOADED, overrides) == [problem]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_server_file(tmp_path: Path) -> None:
    path = write(tmp_path / "s.txt", b"\xef\xbb\xbf# ours\r\n\r\nhttp://a=one\r\n  b:1=two  # old\r\n\t#c\r\nhttp://d#5=x\r\n")
    assert problems_of({}, Overrides(server_file=path)) == [
        f'{path}:6: "http://d#5=x" has "#5" after the host; the path comes from the client; write "http://d"']
    write(path, path.read_bytes().replace(b"#5", b""))
    app = parse({}, Overrides(server_file=path))
    assert [(server.url, server.name) for server in app.core.servers] == [
        ("http://a:11434", "one"), ("http://b:1", "two"), ("http://d:11434", "x")]


def test_duplicates_are_mended_with_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "s.txt", b"http://c=x\nhttp://a=again\nhttp://d=x-2\n")
    app = parse({}, Overrides(servers=("http://a=x", "http://b=x"), server_file=path))
    assert [(server.url, server.name) for server in app.core.servers] == [
        ("http://a:11434", "x"), ("http://b:11434", "x-2"), ("http://c:11434", "x-3"), ("http://d:11434", "x-2-2")]
    assert app.warnings == (
        '--servers[1]: the name "x" is taken; http://b:11434 is called "x-2"',
        f'{path}:1: the name "x" is taken; http://c:11434 is called "x-3"',
        f"{path}:2: http://a:11434 is also named by --servers[0]; used once",
        f'{path}:3: the name "x-2" is taken; http://d:11434 is called "x-2-2"',
    )


@pytest.mark.parametrize(("content", "problem"), [
    (b"", '--server-file: "PATH" names no server; write one URL=NAME a line'),
    (b"# nothing\n\n", '--server-file: "PATH" names no server; write one URL=NAME a line'),
    (b"http://a\nhttp://\xff\n", "PATH:2: is not UTF-8 text; save the file as UTF-8"),
    (b"\n\nhttp://a b\n",
     'PATH:3: "http://a b" has "a b" in it, which is no host name or address; write a host such as "gpu1", "10.0.0.7" or "[::1]"'),
])
def test_bad_server_files(tmp_path: Path, content: bytes, problem: str) -> None:
    path = write(tmp_path / "s.txt", content)
    found = problems_of({}, Overrides(server_file=path))
    assert [text.replace(str(path), "PATH") for text in found] == [problem]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows words it differently")
def test_a_directory_is_no_server_file(tmp_path: Path) -> None:
    assert problems_of({}, Overrides(server_file=tmp_path)) == [
        f'--server-file: "{tmp_path}" cannot be read: Is a directory; name a file that exists']


def test_named_servers_replace_the_fleet_too() -> None:
    app = parse({"fleet": [{"name": "a"}]}, Overrides(servers=("b",)))
    assert app.fleet == ()
    assert app.warnings == ("--servers: the fake servers of [[fleet]] are not started",)


def test_more_copies_than_servers_is_worth_a_warning() -> None:
    app = parse({"servers": [{"url": "http://a"}], "models": [{"name": "m", "copies": 2}]})
    assert any(text.startswith("models[0].copies: 2 are wanted of 1 server;") for text in app.warnings)
