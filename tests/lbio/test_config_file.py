"""Configuration: files, flags, all the mistakes one can make, and the way back to TOML."""

from __future__ import annotations

import contextlib
import dataclasses
import re
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
from lbcore.ollama import PASS_THROUGH, ROUTES, default_routes
from lbcore.parsing import Problem, RefusedError, parse_value
from lbcore.schema import SECOND_NS, Field, Kind, describe_setting, fields_of, format_value, join
from lbio.addresses import Address, is_same_place, parse_listen, parse_name, parse_server_url
from lbio.config_file import NO_OVERRIDES, ConfigError, Overrides, document, dump, load, parse
from lbio.settings import AppConfig, Forwarded, LogLevel
from simulator.fakes.specs import FakeSpec
from simulator.fleet import parse_fleet

# ruff: noqa: E501  # tables of exact messages: one case a line

CONFIGS = Path(__file__).parents[2] / "configs"
GPU1 = {"url": "http://gpu1:11434"}
LOADED = {"servers": [GPU1]}


def problems_of(raw: Mapping[str, Any], overrides: Overrides = NO_OVERRIDES) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(raw, overrides)
    return [str(problem) for problem in caught.value.problems]


# --- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [
    ("127.0.0.1:80", "127.0.0.1:80"), ("[::1]:80", "[::1]:80"), ("[0::0:1]:80", "[::1]:80"), (":8080", "0.0.0.0:8080"),
    ("8080", "0.0.0.0:8080"), ("LocalHost:0", "localhost:0"), (" gpu_1.lan:1 ", "gpu_1.lan:1"), ("[::]:1", "[::]:1"),
])
def test_where_to_listen(text: str, expected: str) -> None:
    assert str(parse_listen(text)) == expected
    assert str(parse_listen(expected)) == expected


LISTEN_FORMS = 'write it as "host:port", "[::1]:port", ":port" or "port"'
HOST_FORMS = 'write a host such as "gpu1", "10.0.0.7" or "[::1]"'


@pytest.mark.parametrize(("text", "message", "fix"), [
    ("127.0.0.1", "has no port", 'write "127.0.0.1:11434"'),
    ("::1", "has no port", 'write "[::1]:11434"'),
    ("[::1]", "has no port", 'write "[::1]:11434"'),
    ("", "has no port", LISTEN_FORMS),
    ("a:b:c", "has no port", LISTEN_FORMS),
    ("http://h:1/", 'begins with "http://"', 'write "h:1"'),
    ("http://", 'begins with "http://"', LISTEN_FORMS),
    ("h:65536", 'has port "65536"', "write a port from 0 to 65535"),
    ("99999", 'has port "99999"', "write a port from 0 to 65535"),
    ("h:", 'has port ""', "write a port from 0 to 65535"),
    ("h:²", 'has port "²"', "write a port from 0 to 65535"),
    ("*:80", 'has "*" in it, which is no host name or address', HOST_FORMS),
    ("1.2.3.400:80", 'has "1.2.3.400" in it, which is no IPv4 address', HOST_FORMS),
    ("[zz]:80", 'has "[zz]" in it, which is no IPv6 address', HOST_FORMS),
])
def test_where_one_cannot_listen(text: str, message: str, fix: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_listen(text)
    assert (caught.value.message, caught.value.fix) == (message, fix)


@pytest.mark.parametrize(("text", "expected"), [
    ("http://gpu1", "http://gpu1:11434"), ("HTTP://GPU1:80/", "http://gpu1:80"), ("https://gpu1", "https://gpu1:443"),
    ("http://[::1]", "http://[::1]:11434"), ("http://[0:0::1]:5", "http://[::1]:5"), (" http://a ", "http://a:11434"),
    ("http://münchen", "http://xn--mnchen-3ya:11434"), ("http://a:", "http://a:11434"), ("https://a.b.c:1", "https://a.b.c:1"),
])
def test_server_urls_have_one_spelling(text: str, expected: str) -> None:
    assert str(parse_server_url(text)) == expected
    assert str(parse_server_url(expected)) == expected


@pytest.mark.parametrize(("text", "message", "fix"), [
    ("gpu3:11434", "has no scheme", 'write "http://gpu3:11434"'),
    ("gpu3/", "has no scheme", 'write "http://gpu3"'),
    ("", "is empty", 'write "http://host:11434"'),
    ("ftp://x", 'has the scheme "ftp"', "write http:// or https://"),
    ("http://u:p@x:1", "has a user name in it, and Ollama has no users", 'write "http://x:1"'),
    ("http://x:1/api", 'has "/api" after the host', 'the path comes from the client; write "http://x:1"'),
    ("http://x?a=b", 'has "?a=b" after the host', 'the path comes from the client; write "http://x"'),
    ("http://x#a", 'has "#a" after the host', 'the path comes from the client; write "http://x"'),
    ("http://", "has no host", 'write "http://host:port"'),
    ("http://:11434", "has no host", 'write "http://host:port"'),
    ("http://x:0", 'has port "0"', "write a port from 1 to 65535"),
    ("http://x:http", 'has port "http"', "write a port from 1 to 65535"),
    ("http://::1:11434", "has an IPv6 address without brackets", 'write it as "http://[::1]:11434"'),
    ("http://[zz]", "is not a URL", 'write "http://host:port"'),
    ("http://a b", 'has "a b" in it, which is no host name or address', HOST_FORMS),
    ("http://-a", 'has "-a" in it, which is no host name or address', HOST_FORMS),
    ("a b", 'has "a b" in it, which is no host name or address', HOST_FORMS),
])
def test_bad_server_urls(text: str, message: str, fix: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_server_url(text)
    assert (caught.value.message, caught.value.fix) == (message, fix)


def test_the_command_line_takes_hosts_without_scheme() -> None:
    assert str(parse_server_url("gpu3:11434", scheme_optional=True)) == "http://gpu3:11434"


@given(st.one_of(st.text(max_size=30), st.text("htps:/[]@?#.0123456789ab %\\", max_size=30)))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    for read in (parse_listen, parse_server_url, lambda it: parse_server_url(it, scheme_optional=True), parse_name):
        with contextlib.suppress(RefusedError):
            parsed = str(read(text))
            assert str(read(parsed)) == parsed


@pytest.mark.parametrize(("listen", "server", "same"), [
    ("0.0.0.0:1", "127.0.0.1:1", True), ("0.0.0.0:1", "localhost:1", True), ("[::]:1", "[::1]:1", True),
    ("127.0.0.1:1", "0.0.0.0:1", True), ("127.0.0.1:1", "localhost:1", True), ("gpu1:1", "gpu1:1", True),
    ("10.0.0.1:1", "10.0.0.1:1", True), ("0.0.0.0:1", "0.0.0.0:1", True),
    ("0.0.0.0:1", "127.0.0.1:2", False), ("127.0.0.1:1", "127.0.0.2:1", False), ("0.0.0.0:1", "10.0.0.1:1", False),
    ("0.0.0.0:1", "gpu1:1", False), ("0.0.0.0:0", "127.0.0.1:1", False), ("10.0.0.1:1", "127.0.0.1:1", False),
])
def test_the_same_place(listen: str, server: str, same: bool) -> None:
    assert is_same_place(parse_listen(listen), parse_listen(server)) is same


@pytest.mark.parametrize("name", ["a b", "a,b", "a/b", "ä", "a\tb", "a\x7f", ""])
def test_names_fit_headers_and_paths(name: str) -> None:
    with pytest.raises(RefusedError):
        parse_name(name)


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
    ({**LOADED, "timeouts": {"measure": 2}}, "timeouts.measure: 2 is set, but there is no such key; did you mean race.measure?"),
    ({**LOADED, "zzzz": 1},
     "zzzz: 1 is set, but there is no such key; the keys here are listen, drain_timeout, seed, client, limits, pool, proxy, admin, log, record, race, selection, health, probe, timeouts, retry, queue, servers, routes, fleet"),
    ({**LOADED, "selection": {"idle_timeout": 2}},
     "selection.idle_timeout: 2 is set, but there is no such key; did you mean client.idle_timeout or pool.idle_timeout?"),
    ({**LOADED, "race": {"slots": 2}}, "race.slots: 2 is set, but there is no such key; did you mean servers.slots?"),
    ({**LOADED, "race": {"racers": 2}}, "race.racers: 2 is set, but there is no such key; did you mean race.racers_min?"),
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
                         "models", "kind", "winner", "probe", "interval"]), inner, max_size=4)), max_leaves=15)
TOP_KEYS = [field.key for cls in (AppConfig, Config) for field in fields_of(cls)] + ["servers", "routes", "fleet", "x"]


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
    (b"\n\nhttp://a b\n", 'PATH:3: "http://a b" has "a b" in it, which is no host name or address; ' + HOST_FORMS),
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
        Kind.TEXT: st.text("abc \\\"'é", max_size=5),
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
SERVERS = st.lists(_table(ServerSettings, url=st.nothing(), name=st.from_regex(r"[!-+\-.0-~]{1,9}", fullmatch=True)), max_size=4).map(
    lambda tables: [{**table, "url": f"http://host{index}"} for index, table in enumerate(tables)])
FILES = st.fixed_dictionaries({}, optional={
    **_sections(Config), **_sections(AppConfig), "listen": st.sampled_from([":1", "gpu:0", "[::1]:5"]),
    "drain_timeout": st.integers(0, 99), "seed": st.integers(0, 2**63 - 1), "servers": SERVERS,
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


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(FILES)
def test_dump_is_read_back_as_the_same(raw: dict[str, Any]) -> None:
    app = parse_mended(raw)
    assert parse(tomllib.loads(dump(app)), need_servers=False) == app


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
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
        if header := re.fullmatch(r"\[+(.*?)\]+", line):
            table = "again" if header[1] in headers else header[1]
            headers.add(header[1])
        elif key := re.fullmatch(r'(?:# )?("[^"]+"|[a-z_]+) = (.*?)(  # .*)?', line):
            found.append((table, key[1].strip('"'), key[2], comment + (key[3] or "")))
            comment = ""
        else:
            comment = f"{comment} {line[2:]}" if line.startswith("#") else ""
    return [entry for entry in found if entry[0] != "again"]


def expected_fields() -> dict[tuple[str, str], Field]:
    top = [("", field) for cls in (AppConfig, Config) for field in fields_of(cls)]
    nested = [(field.key, inner) for _, field in top if field.section is not None for inner in fields_of(field.section)]
    servers = [("servers", field) for field in fields_of(ServerSettings)]
    return {(table, field.key): field for table, field in (*top, *nested, *servers) if field.setting is not None}


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
        if table != "servers" and key != "seed":
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


def test_an_address_knows_its_brackets() -> None:
    assert str(Address("::1", 5)) == "[::1]:5"
