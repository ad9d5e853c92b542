"""Lets in who has a key, and says why not, in the shape of the path. Pure; time is passed in.

A key is asked for on every path but Ollama's sign of life and the preflights of browsers, which send no key. All that
can be decided from the head is decided before the body is read.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import unquote

from lbcore.ollama import PASS_THROUGH, find_route, shape_of
from lbcore.requests import PIN_HEADER
from lbcore.schema import SECOND_NS
from lbio.access.keys import Key, Keyring, is_straight, needed_right
from lbio.access.named_models import UnreadableError, named_models
from lbio.answers.local import LocalAnswer, error_answer, model_in_path
from lbio.configuration.settings import Right
from lbio.http1 import Framing, RequestHead

_SCHEME = b"bearer"
_PIN = PIN_HEADER.lower().encode()
_TELL_NS = SECOND_NS
"""Refusals are told of no more often than this: whoever has no key must not fill the log."""


class Gate:
    """Asks for keys. `is_admin` tells which paths are the management endpoints."""

    def __init__(self, keyring: Keyring, is_admin: Callable[[str], bool]) -> None:
        self._keyring = keyring
        self._is_admin = is_admin
        self._tell_from_ns = 0
        self._n_untold = 0

    def admit(self, head: RequestHead, now_ns: int) -> Key | LocalAnswer | None:
        """Return the key that a request may go on with, the answer to it if it may not, None if it needs no key."""
        right = Right.MANAGE if self._is_admin(head.path) else needed_right(head.method, head.path)
        if right is None and head.framing is Framing.NONE and head.header(_PIN) is None:
            return None
        right = right or Right.USE  # a sign of life has no body to be held, and asks no server
        tokens = _tokens(head)
        key = next((key for token in tokens if (key := self._keyring.find(token)) is not None), None)
        if key is None:
            return _unknown(head, sent=bool(tokens))
        if right not in key.rights:
            what = f"{head.method} {head.path[:100]}"
            return _error(head, 403, f"the key of '{key.name}' may not {right}, which {what} needs")
        wait_ns = key.bucket.take(now_ns) if key.bucket is not None else 0
        if wait_ns and key.bucket is not None:
            wait_s = -(-wait_ns // SECOND_NS)
            message = f"the key of '{key.name}' may make {key.bucket.per_minute} requests a minute; again in {wait_s} s"
            return _error(head, 429, message, retry_after_s=wait_s)
        return key

    def refuse_models(self, key: Key, head: RequestHead, body: bytes) -> LocalAnswer | None:
        """Return the answer to a request that names a model which its key may not use."""
        if key.models.is_all or self._is_admin(head.path):
            return None
        plain = unquote(head.path)
        route = find_route(head.path)
        if route is PASS_THROUGH and (find_route(plain) is not PASS_THROUGH or not is_straight(plain)):
            return _error(head, 403, f"the key of '{key.name}' is for some models; write {plain[:100]} as it is")
        in_path = model_in_path(route, head.path)
        try:
            uploaded = plain.startswith("/api/blobs/")
            names = [] if uploaded or not body else named_models(head, find_route(plain), body)
        except UnreadableError as error:
            message = f"the key of '{key.name}' is for some models, and which this request names is unclear: {error}"
            return _error(head, 403, message)
        for name in [*names, *([in_path] if in_path is not None else [])]:
            if not key.models.may(name):
                return _error(head, 403, f"the key of '{key.name}' may not use the model '{name[:100]}'")
        return None

    def words(self, answer: LocalAnswer, head: RequestHead, peer: str, now_ns: int) -> str | None:
        """Return what is logged of a refusal; None when one was told of just now."""
        if now_ns < self._tell_from_ns:
            self._n_untold += 1
            return None
        more = f" ({self._n_untold} more since the last such line)" if self._n_untold else ""
        self._tell_from_ns, self._n_untold = now_ns + _TELL_NS, 0
        return f"{peer} got {answer.status} for {head.method} {head.path[:100]}{more}"


def _tokens(head: RequestHead) -> list[bytes]:
    """Return what may be a key: that of OpenAI's and Ollama's clients, and that of Anthropic's."""
    scheme, _, token = (head.header(b"authorization") or b"").partition(b" ")
    sent = (token.strip() if scheme.lower() == _SCHEME else b"", (head.header(b"x-api-key") or b"").strip())
    return [token for token in sent if token]


def _unknown(head: RequestHead, *, sent: bool) -> LocalAnswer:
    message = "this key is not known here" if sent else "a key is needed: send the header Authorization: Bearer KEY"
    answer = _error(head, 401, message)
    challenge = b'Bearer error="invalid_token"' if sent else b"Bearer"
    return LocalAnswer(401, answer.content_type, answer.body, ((b"WWW-Authenticate", challenge),))


def _error(head: RequestHead, status: int, message: str, *, retry_after_s: int = 0) -> LocalAnswer:
    return error_answer(shape_of(head.path), status, message, retry_after_s=retry_after_s)
