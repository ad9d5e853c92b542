"""Keys: how they are made and found, what each may do, and what is told of them. Tables, and what must always hold."""

from __future__ import annotations

import ast
import hashlib
import hmac
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbcore.ollama import ROUTES, find_route
from lbcore.parsing import RefusedError
from lbcore.schema import SECOND_NS
from lbio.access import keys
from lbio.access.keys import Bucket, Key, Keyring, Models, needed_right, new_hash, new_token, parse_hash
from lbio.access.named_models import LENIENT_BYTES_MAX, UnreadableError, named_models
from lbio.configuration.settings import Right
from lbio.http1 import RequestHead, parse_request_head

# ruff: noqa: E501  # tables of values: one case a line

SERVER = {"url": "http://gpu1:11434", "name": "gpu1"}
TOKEN = "olb_" + "abcdefghijklmnopqrstuvwxyz" * 2
SALT = bytes(range(16))
HASH = f"sha256:{SALT.hex()}:{hashlib.sha256(SALT + TOKEN.encode()).hexdigest()}"
USE, MANAGE = Right.USE, Right.MANAGE


def head(method: str = "POST", path: str = "/api/chat", *lines: str, n_body: int = 0) -> RequestHead:
    length = [f"Content-Length: {n_body}"] if n_body else []
    text = "\r\n".join((f"{method} {path} HTTP/1.1", "Host: a", *lines, *length, "", ""))
    return parse_request_head(text.encode())


def ring(*allowed: Key) -> tuple[Keyring, dict[str, str]]:
    """A ring of these keys, and what their owners send."""
    tokens = {key.name: new_token() for key in allowed}
    return Keyring((key, *parse_hash(new_hash(tokens[key.name]))) for key in allowed), tokens


def key(name: str = "alice", models: tuple[str, ...] = ("*",), rights: tuple[Right, ...] = (USE,), per_minute: int = 0) -> Key:
    return Key(name, Models(models), frozenset(rights), Bucket(per_minute) if per_minute else None)


# --- tokens and hashes -----------------------------------------------------------------------------------------


def test_a_key_is_256_bits_and_each_another() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(re.fullmatch(r"olb_[a-z2-7]{52}", token) for token in tokens)  # 52 x 5 bits


def test_a_hash_is_salted_and_does_not_tell_the_key() -> None:
    hashes = {new_hash(TOKEN) for _ in range(10)}
    assert len(hashes) == 10
    assert not any(TOKEN.removeprefix("olb_") in text for text in hashes)
    salt, digest = parse_hash(HASH)
    assert hashlib.sha256(salt + TOKEN.encode()).digest() == digest


@pytest.mark.parametrize("text", ["", "x", TOKEN, "sha256:00:00", HASH[:-2], HASH + "00", HASH.replace("sha256", "md5"), HASH.replace(":", ""), "sha256::" + "0" * 64])
def test_what_is_no_hash_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_hash(text)
    assert not text or text not in f"{caught.value.message} {caught.value.fix}"


def test_the_right_key_is_found_and_no_other() -> None:
    found, tokens = ring(key("a"), key("b"))
    for name, token in tokens.items():
        for _ in range(2):  # the second time it is known
            seen = found.find(token.encode())
            assert seen is not None
            assert seen.name == name
    for wrong in ("", "x", TOKEN, tokens["a"][:-1], tokens["a"] + "a", tokens["a"].upper(), "x" * 10_000, "\xff"):
        assert found.find(wrong.encode("latin-1")) is None


def test_who_guesses_cannot_fill_the_memory() -> None:
    found, tokens = ring(key("a"))
    for _ in range(1000):
        found.find(new_token().encode())
    found.find(tokens["a"].encode())
    assert len(found._found) == 1
    assert repr(found) == "<Keyring a>"


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return left == right

    found, tokens = ring(key("a"), key("b"), key("c"))
    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert found.find(tokens["a"].encode()) is not None
    assert len(compared) == 3  # the first one is right, and the others are looked at all the same
    found.find(b"wrong")
    assert len(compared) == 6


def test_nothing_else_compares_digests() -> None:
    tree = ast.parse(Path(keys.__file__).read_text("utf-8"))
    compares = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert not [text for text in compares if "digest" in text and "len(" not in text]


# --- models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "yes", "no"), [
    ("llama3.2", ["llama3.2", "LLAMA3.2:latest", "library/llama3.2", "registry.ollama.ai/library/llama3.2:latest"], ["llama3.2:1b", "llama3.2x", "me/llama3.2", "x://registry.ollama.ai/library/llama3.2"]),
    ("llama3.2:1b", ["llama3.2:1b", "Llama3.2:1B"], ["llama3.2", "llama3.2:1bx"]),
    ("llama3.2:*", ["llama3.2", "llama3.2:1b"], ["llama3.20", "llama3"]),
    ("llama*", ["llama3.2", "llama3.2:1b", "llama"], ["qwen3", "me/llama3", "llama-x://registry.ollama.ai/library/secret"]),
    ("qwen?", ["qwen3", "qwen3:latest"], ["qwen3:8b", "qwen"]),
    ("hf.co/me/*", ["hf.co/me/a:Q4", "hf.co/me/a"], ["hf.co/you/a", "me/a"]),
    ("*", ["a", "b:c", "x://y"], []),
    ("Library/Qwen3", ["qwen3"], ["qwen"]),
    ("a.c", ["a.c"], ["abc"]),
    ("*-embed", ["nomic-embed", "nomic-embed:latest"], ["nomic", "nomic-embed:v2"]),
])
def test_models(pattern: str, yes: list[str], no: list[str]) -> None:
    allowed = Models([pattern])
    assert [name for name in yes if not allowed.may(name)] == []
    assert [name for name in no if allowed.may(name)] == []


# --- rights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path", "right"), [
    ("GET", "/", None), ("HEAD", "/", None), ("POST", "/", MANAGE), ("OPTIONS", "/", USE),
    *[("GET", path, USE) for path in ("/api/tags", "/api/ps", "/api/version", "/v1/models", "/v1/models/a", "/api/unknown")],
    *[("POST", path, USE) for path in ("/api/chat", "/api/generate", "/api/show", "/api/embed", "/v1/messages", "/v1/anything", "/api/me", "/api/experimental/web_search")],
    *[("POST", path, MANAGE) for path in ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/blobs/sha256:0", "/api/signout", "/api/unknown", "/api/experimental/x")],
    ("HEAD", "/api/blobs/sha256:0", MANAGE), ("DELETE", "/api/delete", MANAGE), ("DELETE", "/v1/models/a", MANAGE), ("GET", "/api/delete", MANAGE),
    ("POST", "/api/%70ull", MANAGE), ("DELETE", "/api/%64elete", MANAGE), ("POST", "/%61pi/pull", MANAGE), ("POST", "/api/%62lobs/x", MANAGE),
    *[("POST", path, MANAGE) for path in ("/v1/../api/pull", "/v1/%2e%2e/api/pull", "/v1/..%2fapi/pull", "/v1/.%2E//api/pull", "/v1/x/../../api/pull", "/v1/..;/api/pull", "/v1/..;x=1/api/pull", "/v1/..\\api\\pull", "/v1/%5c../api/pull", "/v1//x", "/v1/./x", "/v1/x/..", "//v1/x")],
    ("GET", "/v1/../api/blobs/x", MANAGE), ("GET", "/v1//models", MANAGE), ("POST", "/v1/x/", USE), ("POST", "/v1/a..b/...", USE),
    ("PUT", "/api/chat", MANAGE), ("PATCH", "/v1/anything", MANAGE), ("POST", "/api/pull/", MANAGE), ("POST", "//api/pull", MANAGE),
])
def test_the_right_that_a_path_needs(method: str, path: str, right: Right | None) -> None:
    assert needed_right(method, path) == right


def test_every_route_that_changes_something_needs_manage() -> None:
    for route in ROUTES:
        for method in route.methods:
            assert (needed_right(method, route.name) == MANAGE) == route.changes


# --- requests a minute -----------------------------------------------------------------------------------------


def test_a_bucket_lets_a_minutes_worth_through_at_once_and_then_one_by_one() -> None:
    bucket = Bucket(6)
    assert [bucket.take(0) for _ in range(6)] == [0] * 6
    assert bucket.take(0) == pytest.approx(10 * SECOND_NS, abs=10)
    assert bucket.take(9 * SECOND_NS) > 0
    assert bucket.take(10 * SECOND_NS) == 0
    assert bucket.take(10 * SECOND_NS) > 0
    assert [bucket.take(1000 * SECOND_NS) for _ in range(7)].count(0) == 6


@given(st.integers(1, 1_000_000), st.lists(st.integers(0, 10 * SECOND_NS), max_size=200))
def test_no_time_sees_more_than_the_bucket_and_what_came_in_since(per_minute: int, pauses: list[int]) -> None:
    bucket, now_ns, taken = Bucket(per_minute), 0, 0
    for pause_ns in pauses:
        now_ns += pause_ns
        wait_ns = bucket.take(now_ns)
        assert wait_ns >= 0
        if wait_ns == 0:
            taken += 1
            assert taken <= per_minute * (1 + now_ns / (60 * SECOND_NS)) * (1 + 1e-4) + 1e-6
        else:
            assert bucket.take(now_ns + wait_ns) == 0
            now_ns += wait_ns
            taken += 1


# --- which models a body names ---------------------------------------------------------------------------------


def named(body: bytes, path: str = "/api/chat", *lines: str, method: str = "POST") -> list[str]:
    request = head(method, path, *lines)
    return named_models(request, find_route(request.path), body)


@pytest.mark.parametrize(("path", "body", "names"), [
    ("/api/chat", b'{"model":"a"}', ["a"]),
    ("/api/chat", b' \n{"model":"a","messages":[{"model":"b"}]}', ["a"]),
    ("/api/chat", b'{"MODEL":"b","model":"a"}', ["b", "a"]),
    ("/api/chat", b'{"model":"a","Model":"b"}', ["a", "b"]),
    ("/api/chat", b'{"mod\\u0065l":"a"}', ["a"]),
    ("/api/chat", b'{"model":"a"} {"model":"b"}', ["a"]),
    ("/api/chat", b'{"model":"a","x":"\\ud83d"}', ["a"]),
    ("/api/chat", b'{"model":"a","x":"\xff"}', ["a"]),
    ("/api/chat", b'{"model":"a","name":"ignored"}', ["a"]),
    ("/api/chat", b'{"model":""}', []),
    ("/api/chat", b"{}", []), ("/api/chat", b"", []), ("/api/chat", b" \r\n", []),
    ("/api/show", b'{"name":"a"}', ["a"]),
    ("/api/show", b'{"model":"","Name":"b"}', ["b"]),
    ("/api/copy", b'{"source":"a","destination":"b"}', ["a", "b"]),
    ("/api/copy", '{"\u017fource":"a","destination":"b"}'.encode(), ["a", "b"]),  # Go folds a long s
    ("/api/create", b'{"model":"a","from":"b","modelfile":""}', ["a", "b"]),
    ("/api/pull", b'{"model":"a"}', ["a"]),
    ("/api/delete", b'{"name":"a"}', ["a"]),
    ("/v1/unknown", b'{"model":"a"}', ["a"]),
    ("/api/experimental/aliases", b'{"alias":"a","target":"b"}', ["a", "b"]),
])
def test_models_that_a_body_names(path: str, body: bytes, names: list[str]) -> None:
    assert sorted(named(body, path)) == sorted(names)


@pytest.mark.parametrize(("path", "body"), [
    ("/api/chat", b'{"model":"a"'),
    ("/api/chat", b'{"model":7}'),
    ("/api/chat", b"null"),
    ("/api/chat", b'["a"]'),
    ("/api/chat", b'\xef\xbb\xbf{"model":"a"}'),
    ("/api/chat", '{"model":"a"}'.encode("utf-16")),
    ("/api/chat", '{"model":"a"}'.encode("utf-16-be")),
    ("/v1/images/edits", b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--x--\r\n'),
    ("/v1/unknown", b"model=a"),
    ("/api/chat", b'{"model":"a","model":null}'),  # to Go, it is still "a"
    ("/api/chat", b'{"model":"a","Model":{}}'),
    ("/api/create", b'{"model":"a","modelfile":"FROM b"}'),
    ("/api/chat", b"{" + b'"a":{' * 5000 + b"}" * 5001),
    ("/api/chat", b'{"model":"a","x":"' + b"x" * LENIENT_BYTES_MAX + b'"} rest'),
    ("/api/chat", b"{" + b",".join(b'"%d":1' % n for n in range(250_000)) + b"}"),
])
def test_what_may_be_read_in_two_ways_is_unreadable(path: str, body: bytes) -> None:
    with pytest.raises(UnreadableError):
        named(body, path)


def test_large_bodies_are_read() -> None:
    images = b'{"model":"a","images":["' + b"A" * (8 << 20) + b'"],"x":"'
    assert named(images + b'"}') == named(images + b'\\ud83d"}') == ["a"]


def test_a_compressed_body_is_unreadable() -> None:
    with pytest.raises(UnreadableError):
        named(b"\x28\xb5\x2f\xfd", "/v1/responses", "Content-Encoding: zstd")
    assert named(b'{"model":"a"}', "/v1/responses", "Content-Encoding: identity") == ["a"]


FORM = "/v1/audio/transcriptions"
MULTIPART = "Content-Type: multipart/form-data; boundary=xx"


def part(name: str, value: str, more: str = "", before: str = "") -> str:
    return f'--xx\r\n{before}Content-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'


FILE = part("file", "RIFF....", '; filename="a.wav"\r\nContent-Type: audio/wav')


@pytest.mark.parametrize(("body", "names"), [
    (FILE + part("model", "a"), ["a"]),
    (part("model", "a") + FILE, ["a"]),
    (part("model", "a") + part("model", "b"), ["a", "b"]),
    (part("language", "model") + FILE, []),
    (part("file", 'form-data; name="model"\r\n\r\nb', '; filename="x"; filename*=utf-8\'\'%C3%A9') + part("model", "a"), ["a"]),
])
def test_models_that_a_form_names(body: str, names: list[str]) -> None:
    assert named(f"{body}--xx--\r\n".encode(), FORM, MULTIPART) == names


@pytest.mark.parametrize(("lines", "body", "query"), [
    ((MULTIPART,), part("model", "a"), "?model=b"),
    ((MULTIPART,), part("model", "a"), "?%6Dodel=b"),
    (("Content-Type: multipart/form-data; boundary=xx; boundary=yy",), part("model", "a"), ""),
    ((), part("model", "a"), ""),
    ((MULTIPART,), part("model", "a").replace("\r\n", "\n"), ""),
    ((MULTIPART,), part("mo\\del", "a"), ""),
    ((MULTIPART,), part("x", "a", '; name="model"'), ""),
    ((MULTIPART,), part("model", "YQ==", "\r\nContent-Transfer-Encoding: base64"), ""),
    ((MULTIPART,), part("model", "a\r\nb"), ""),
    ((MULTIPART,), part("x", "a") * 1001, ""),
    ((MULTIPART,), part("model", "a", "\r\nContent-Type: x" * 1000), ""),
])
def test_a_form_that_may_be_read_in_two_ways_is_unreadable(lines: tuple[str, ...], body: str, query: str) -> None:
    with pytest.raises(UnreadableError):
        named(f"{body}--xx--\r\n".encode(), FORM + query, *lines)
