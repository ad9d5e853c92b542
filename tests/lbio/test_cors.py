"""Which web pages may use the API: what is decided, what is recorded of Ollama, and that it holds on every path."""

import re
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbio.access.cors import BUILT_IN, NOTHING, Cors
from lbio.config_file import ConfigError, parse
from lbio.configuration.addresses import is_loopback
from lbio.http1 import HeaderPairs
from simulator.faults import Fault, FaultKind
from tests.lbio.kit import LIMIT_S, Rig, balanced, before, client, scripted, specs
from tests.simulator.wire import Answer, chat, load, request
from tests.simulator.wire import parse as parse_answer

# ruff: noqa: E501  # tables of values: one case a line

ALLOW_ORIGIN = "Access-Control-Allow-Origin"
PAGE = "http://localhost:3000"  # a web page that may
FOREIGN = "https://example.com"  # one that may not
GPU1 = {"url": "http://gpu1"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# --- decisions -----------------------------------------------------------------------------------------------


def cors_headers(origin: str) -> HeaderPairs:
    return ((ALLOW_ORIGIN.encode(), origin.encode()), (b"Vary", b"Origin"))


@pytest.mark.parametrize(("origin", "allowed"), [
    ("http://localhost", True), ("https://localhost", True), ("http://localhost:1", True), ("https://127.0.0.1:3000", True),
    ("http://0.0.0.0:8080", True), ("app://obsidian.md", True), ("file://", True), ("tauri://localhost", True),
    ("vscode-webview://0abc", True), ("vscode-file://vscode-app", True),
    ("http://localhost.example.com", False), ("http://localhost@example.com", False), ("http://127.0.0.10", False),
    ("http://[::1]:3000", False), ("null", False), ("chrome-extension://abc", False), ("HTTP://LOCALHOST", False),
    ("https://example.com", False), ("http://gpu", False), ("ftp://localhost", False), ("x", False), ("*", False),
])  # fmt: skip
def test_what_is_allowed_without_configuration(origin: str, allowed: bool) -> None:
    assert Cors().allows(origin.encode()) is allowed


@pytest.mark.parametrize(("configured", "origin", "allowed"), [
    ("https://a.example", "https://a.example", True), ("https://a.example", "http://a.example", False),
    ("https://a.example", "https://a.example:1", False), ("https://a.example", "https://a.example.org", False),
    ("https://*.a.example", "https://x.y.a.example", True), ("https://*.a.example", "https://a.example", False),
    ("https://*.a.example", "https://.a.example", True), ("http://a:*", "http://a:1", True), ("http://a:*", "http://a", False),
    ("*.a", "x://y.a", True), ("chrome-extension://*", "chrome-extension://abc", True), ("*", "null", True),
    ("http://a.*.a", "http://a.a", False), ("http://a.*.a", "http://a.b.a", True), ("*", "https://x", True),
])  # fmt: skip
def test_what_is_allowed_by_configuration(configured: str, origin: str, allowed: bool) -> None:
    assert Cors([configured]).allows(origin.encode()) is allowed


@pytest.mark.parametrize(("method", "origin", "host", "status", "headers"), [
    ("GET", "", "x", 0, ()),
    ("POST", PAGE, "x", 0, cors_headers(PAGE)),
    ("GET", FOREIGN, "x", 403, ()),
    ("OPTIONS", FOREIGN, "x", 403, ()),
    ("OPTIONS", PAGE, "x", 204, ()),
    ("OPTIONS", "", "x", 0, ()),
    ("GET", "http://x", "x", 0, ()),
    ("GET", "https://x:1", "x:1", 0, ()),
    ("OPTIONS", "https://x", "x", 0, ()),
    ("GET", "http://x:2", "x:1", 403, ()),
    ("GET", "http://", "", 0, ()),
])  # fmt: skip
def test_verdicts(method: str, origin: str, host: str, status: int, headers: HeaderPairs) -> None:
    verdict = Cors().judge(method, origin.encode(), host.encode(), ("POST",))
    assert (verdict.answer.status if verdict.answer else 0) == status
    assert verdict.headers == headers
    assert verdict is NOTHING or status or headers


def test_a_refusal_is_empty_and_tells_the_methods_where_they_are_known() -> None:
    for method, methods, told in [("GET", ("POST",), ((b"Allow", b"POST"),)), ("POST", ("POST",), ()), ("GET", (), ()),
                                  ("OPTIONS", ("HEAD", "GET"), ((b"Allow", b"HEAD, GET"),))]:  # fmt: skip
        answer = Cors().judge(method, FOREIGN.encode(), b"", methods).answer
        assert answer is not None
        assert (answer.content_type, answer.body, answer.headers) == (b"", b"", told)


def test_all_origins_are_told_so_by_a_star() -> None:
    cors = Cors(["https://a.example", "*"])
    assert cors.judge("GET", FOREIGN.encode(), b"", ()).headers == ((ALLOW_ORIGIN.encode(), b"*"),)
    answer = cors.judge("OPTIONS", FOREIGN.encode(), b"", ("POST",)).answer
    assert answer is not None
    named = dict(answer.headers)
    assert (named[ALLOW_ORIGIN.encode()], named[b"Allow"], b"Vary" in named) == (b"*", b"POST", False)


@pytest.mark.parametrize(("host", "allowed"), [
    (b"", True), (b"localhost:11434", True), (b"LOCALHOST", True), (b"mine", True), (b"a.local", True), (b"127.0.0.1:1", True),
    (b"host.docker.internal:11434", True), (b"x.localhost", True), (b"[::1]:1", True), (b"10.1.2.3", True),
    (b"ollama.example", False), (b"localhost.example", False), (b"127.0.0.1.example", False), (b"[", False), (b"local", False),
])  # fmt: skip
def test_the_host_of_who_is_reached_from_this_machine_only(host: bytes, allowed: bool) -> None:
    verdict = Cors(own_name="mine").judge("GET", b"", host, ("GET",))
    assert (verdict.answer is None) is allowed
    assert Cors().judge("GET", b"", host, ("GET",)) is NOTHING


def test_a_page_by_a_name_that_was_pointed_here_is_refused() -> None:
    verdict = Cors(own_name="mine").judge("GET", b"http://ollama.example", b"ollama.example", ("GET",))
    assert verdict.answer is not None
    assert verdict.answer.status == 403


@pytest.mark.parametrize(("host", "loopback"), [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("gpu", False),
])  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


ATOMS = st.sampled_from(["http://", "https://", "app://", "localhost", "a", ".a", "b.a", ":", "3000", ".", "/", "null", "é"])
ORIGINS = st.lists(ATOMS, min_size=1, max_size=5).map("".join)
CONFIGURED = st.lists(
    st.tuples(ORIGINS, st.sampled_from(["", "*"]), st.one_of(st.just(""), ORIGINS)).map("".join), max_size=3)


def matches(pattern: str, origin: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), origin, re.DOTALL) is not None


@given(CONFIGURED, ORIGINS, st.sampled_from(["GET", "POST", "OPTIONS", "HEAD", "DELETE"]), st.sampled_from(["a", "b.a:3000"]),
       st.sampled_from([None, "a"]))
def test_only_who_is_allowed_is_ever_told_so(
    configured: list[str], origin: str, method: str, host: str, own_name: str | None
) -> None:
    verdict = Cors(configured, own_name=own_name).judge(method, origin.encode(), host.encode(), ("POST",))
    told = dict([*verdict.headers, *(verdict.answer.headers if verdict.answer else ())]).get(ALLOW_ORIGIN.encode())
    own = origin in {f"http://{host}", f"https://{host}"}
    allowed = any(matches(pattern, origin) for pattern in (*BUILT_IN, *configured))
    assert told == (origin.encode() if allowed and not own else None)
    if not allowed and not own:
        assert verdict.answer is not None
        assert verdict.answer.status == 403


# --- configuration -------------------------------------------------------------------------------------------

FORMS = 'write "scheme://host" or "scheme://host:port", with * for any text, or "*" for all pages'


def test_origins_are_kept_as_browsers_send_them() -> None:
    given_ = ["https://Chat.Example", " http://a:8080 ", "https://*.a", "*", "chrome-extension://*", "http://[::1]:3000", "*.a"]
    app = parse({"servers": [GPU1], "origins": given_})
    assert app.origins == tuple(origin.strip().lower() for origin in given_)
    assert parse({"servers": [GPU1]}).origins == ()


@pytest.mark.parametrize(("origins", "problem"), [
    (["example.com"], 'origins[0]: "example.com" has no scheme; write "https://example.com"'),
    (["*", "localhost:3000"], f'origins[1]: "localhost:3000" has no scheme; {FORMS}'),
    ([""], f'origins[0]: "" has no scheme; {FORMS}'),
    (["http://*:*"], 'origins[0]: "http://*:*" has more than one * in it; write a text for each of them'),
    (["http://a,http://b"], 'origins[0]: "http://a,http://b" has a comma in it; write each origin as a text of its own'),
    (["http://a/"], 'origins[0]: "http://a/" has "/" after the host; write "http://a"'),
    (["http://a/chat"], 'origins[0]: "http://a/chat" has "/chat" after the host; write "http://a"'),
    (["https://a:443"], 'origins[0]: "https://a:443" names the usual port, which browsers leave out; write "https://a"'),
    (["http://"], f'origins[0]: "http://" has no host; {FORMS}'),
    (["http://bücher.example"],
     'origins[0]: "http://bücher.example" has "ü" in it; write the host as browsers send it, of ASCII (xn--...)'),
    ("http://a", 'origins: "http://a" is not a list; write it in brackets: ["http://a"]'),
    (3, 'origins: 3 is not a list of text; write texts in quotes and brackets, such as ["a", "b"]'),
    ([3], 'origins: [...] has 3 in it, which is not text; write it in quotes: "3"'),
])  # fmt: skip
def test_a_bad_origin_is_named_with_its_fix(origins: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse({"servers": [GPU1], "origins": origins})
    assert str(refused.value) == problem


# --- over real sockets ---------------------------------------------------------------------------------------


def asked(method: str, path: str, origin: str, body: object = None, *, close: bool = True) -> bytes:
    raw = request(method, path, body, close=close)
    return raw.replace(b"\r\n\r\n", f"\r\nOrigin: {origin}\r\n\r\n".encode(), 1)


async def ask(rig: Rig, method: str, path: str, origin: str, body: object = None) -> Answer:
    return await rig.send(asked(method, path, origin, body), method)


def all_of(answer: Answer, name: str) -> list[str]:
    return [value for found, value in answer.headers if found == name]


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["options_cors", "options_cors_foreign", "get_with_foreign_origin", "foreign_host"])
async def test_the_head_is_the_recorded_one(name: str) -> None:
    capture = load(name)
    async with balanced(specs("a")) as rig:
        raw = await rig.exchange([capture.request])
    ours, theirs = [re.sub(rb"Date: [^\r]*", b"Date", each) for each in (raw, capture.response)]
    assert ours == theirs


PATHS: list[tuple[str, str, object]] = [
    ("GET", "/", None),
    ("HEAD", "/api/tags", None),
    ("GET", "/api/version", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/unknown", None),
    ("GET", "/nothing/here", None),
    ("POST", "/api/chat", chat()),
    ("POST", "/api/chat", chat(stream=False)),
    ("POST", "/api/chat", chat(model="unknown")),
    ("POST", "/v1/chat/completions", chat(stream=True)),
    ("POST", "/api/embed", {"model": "tiny", "input": "x"}),
    ("POST", "/api/pull", {"model": "new"}),
    ("POST", "/api/pull", {"model": "new", "stream": False}),
    ("DELETE", "/api/delete", {"model": "unknown"}),
    ("GET", "/api/chat", None),
    ("POST", "/api/chat/", chat()),
]


@pytest.mark.anyio
async def test_every_answer_to_an_allowed_page_says_so_once() -> None:
    async with balanced(specs("a", "b")) as rig:
        for method, path, body in PATHS:
            plain = await rig.ask(method, path, body)
            answer = await ask(rig, method, path, PAGE, body)
            assert (answer.status, answer.complete) == (plain.status, plain.complete), path
            assert all_of(answer, ALLOW_ORIGIN) == [PAGE], path
            assert all_of(answer, "Vary") == ["Origin"], path
            assert plain.header(ALLOW_ORIGIN) is None


@pytest.mark.anyio
async def test_a_page_from_elsewhere_gets_403_everywhere_and_no_server_hears_of_it() -> None:
    async with scripted() as (rig, (server,)):
        for method, path, body in PATHS:
            for asking in (method, "OPTIONS"):
                answer = await ask(rig, asking, path, FOREIGN, body)
                assert (answer.status, answer.body, answer.header("Content-Length")) == (403, b"", "0"), path
                assert not [name for name, _ in answer.headers if name.startswith("Access-Control")]
        assert server.heads == []


@pytest.mark.anyio
async def test_preflights_reach_no_server() -> None:
    async with scripted() as (rig, (server,)):
        for _, path, _ in PATHS:
            answer = await ask(rig, "OPTIONS", path, PAGE)
            assert (answer.status, answer.header(ALLOW_ORIGIN)) == (204, PAGE)
            assert answer.header("Content-Length") is None
        assert server.heads == []


@pytest.mark.anyio
@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 405), ("localhost", 204)])
async def test_options_without_an_origin_is_answered_here_as_by_an_ollama_on_loopback(host: str, status: int) -> None:
    async with scripted() as (rig, (server,)):
        raw = request("OPTIONS", "/api/chat").replace(b"localhost:11434", host.encode())
        answer = await rig.send(raw, "OPTIONS")
        assert (answer.status, answer.header("Allow"), answer.header(ALLOW_ORIGIN)) == (status, "POST", None)
        assert server.heads == []


@pytest.mark.anyio
async def test_what_a_server_says_of_origins_is_replaced() -> None:
    said = b"Access-Control-Allow-Origin: *\r\naccess-control-allow-credentials: true\r\nContent-Length: 2\r\n\r\n{}"
    async with scripted() as (rig, (server,)):
        server.pieces = [b"HTTP/1.1 200 OK\r\n" + said]
        answer = await ask(rig, "POST", "/api/show", PAGE, {"model": "tiny"})
        assert all_of(answer, ALLOW_ORIGIN) == [PAGE]
        assert answer.header("Access-Control-Allow-Credentials") is None
        assert (await rig.ask("POST", "/api/show", {"model": "tiny"})).header(ALLOW_ORIGIN) is None


@pytest.mark.anyio
async def test_errors_of_our_own_can_be_read_by_the_page() -> None:
    async with scripted(limits={"body_bytes_max": 1024}, server={"slots": 1}) as (rig, (server,)):
        server.pieces, server.close = [], True
        assert (await ask(rig, "POST", "/api/chat", PAGE, chat())).header(ALLOW_ORIGIN) == PAGE  # 502
        large = asked("POST", "/api/chat", PAGE, b"x" * 2000)
        for origin, told in [(PAGE, PAGE), (FOREIGN, None)]:
            answer = parse_answer(await rig.exchange([large.replace(PAGE.encode(), origin.encode())]))
            assert (answer.status, answer.header(ALLOW_ORIGIN)) == (413, told)


@pytest.mark.anyio
async def test_a_broken_stream_and_a_dead_fleet() -> None:
    async with balanced(specs("a"), health={"resurrect": 0}) as rig:
        rig.fleet[0].set_fault(Fault(FaultKind.RESET))
        for path in ("/api/chat", "/v1/chat/completions", "/api/pull"):
            answer = await ask(rig, "POST", path, PAGE, chat())
            assert (answer.status >= 500, answer.header(ALLOW_ORIGIN)) == (True, PAGE)


@pytest.mark.anyio
async def test_the_next_request_on_the_connection_is_judged_anew() -> None:
    async with balanced(specs("a")) as rig, client(rig) as page:
        with anyio.fail_after(LIMIT_S):
            for origin, expected in [(PAGE, b"200"), ("", b"200"), (FOREIGN, b"403"), (PAGE, b"200")]:
                raw = asked("GET", "/", origin, close=False) if origin else request("GET", "/", close=False)
                await page.send(raw)
                head = await page.until(b"\r\n\r\n")
                assert head.split()[1] == expected
                assert (b"Access-Control-Allow-Origin" in head) == (origin == PAGE)
                if expected == b"200":
                    await page.until(b"Ollama is running")
            await page.send(b"what is this\r\n\r\n")
            head = await page.until(b"\r\n\r\n")
            assert (head.split()[1], b"Access-Control" in head) == (b"400", False)


@pytest.mark.anyio
async def test_configured_origins() -> None:
    async with balanced(specs("a"), origins=["https://*.example.com"]) as rig:
        for origin, status in [("https://chat.example.com", 200), (FOREIGN, 403), (PAGE, 200)]:
            assert (await ask(rig, "GET", "/api/tags", origin)).status == status
    async with balanced(specs("a"), origins=["*"]) as rig:
        answer = await ask(rig, "POST", "/api/chat", FOREIGN, chat())
        assert (all_of(answer, ALLOW_ORIGIN), answer.header("Vary"), answer.complete) == (["*"], None, True)


@pytest.mark.anyio
@pytest.mark.parametrize("origins", [[], ["*"]])
async def test_the_management_endpoints_keep_their_own_rule(origins: list[str]) -> None:
    async with balanced(specs("a"), origins=origins) as rig:
        for origin, method, status in [
            (FOREIGN, "GET", 403), (FOREIGN, "OPTIONS", 403), (PAGE, "GET", 200), (PAGE, "OPTIONS", 405),
        ]:  # fmt: skip
            answer = await ask(rig, method, "/status", origin)
            assert (answer.status, answer.header(ALLOW_ORIGIN)) == (status, None)
            assert answer.body


@pytest.mark.anyio
async def test_only_on_loopback_the_host_is_checked() -> None:
    raw = request("GET", "/api/tags").replace(b"localhost:11434", b"ollama.example")
    async with scripted() as (rig, (server,)):
        assert (await rig.send(raw)).status == 403
        async with before([{"url": server.url, "name": "s"}], listen="0.0.0.0:0") as open_:
            assert (await Rig(open_, []).send(raw)).status == 200


@pytest.mark.anyio
async def test_a_streams_head_goes_out_with_its_first_line() -> None:
    async with scripted() as (rig, _), client(rig) as page:
        await page.send(asked("POST", "/api/chat", PAGE, chat()))
        head = await page.until(b"\r\n\r\n")
        assert head.count(f"{ALLOW_ORIGIN}: {PAGE}\r\n".encode()) == 1
