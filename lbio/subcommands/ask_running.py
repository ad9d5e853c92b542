"""Asks a balancer that is running, for commands that tell of one. Only click is imported up here, as in `lbio.cli`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

# ruff: noqa: PLC0415  # `--help` must not wait for what it does not need

_C = TypeVar("_C", bound=Callable[..., Any])

EXIT_OK = 0
EXIT_NOT_FOUND = 1
EXIT_CANNOT_ASK = 2

DEFAULT_URL = "http://127.0.0.1:11434"
DEFAULT_KEY_ENV = "OLLAMA_API_KEY"
TIMEOUT_S = 30.0

_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--url", metavar="URL", default=DEFAULT_URL, show_default=True,
                 help="Where the balancer listens."),
    click.option("--key-env", metavar="NAME", default=None,
                 help='The environment variable that holds a key with "manage", where keys are asked for. '
                      f"[default: {DEFAULT_KEY_ENV}, if it is set]"),
)


def with_running(command: _C) -> _C:
    """Add the options that say which balancer is asked: `url` and `key_env`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


class CannotAskError(Exception):
    """Nobody could be asked; the message says who, and why."""


def token_of(key_env: str | None) -> str | None:
    """Return the key to send. Raises CannotAskError when there is none in the variable that was named."""
    import os

    token = os.environ.get(key_env or DEFAULT_KEY_ENV, "").strip()
    if key_env is not None and not token:
        raise CannotAskError(f"--key-env: the environment variable {key_env} is not set, or empty")
    if not (token.isascii() and token.isprintable()):
        raise CannotAskError(f"the key in {key_env or DEFAULT_KEY_ENV} has characters that no key has")
    return token or None


def fetch(url: str, path: str, accept: str, token: str | None = None) -> tuple[int, bytes]:
    """Ask a running balancer for `path`; return the status and the body.

    Raises CannotAskError when it cannot be reached, or is none of ours to be asked.
    """
    import http.client

    from lbcore.parsing import RefusedError, quote
    from lbio.configuration.addresses import parse_server_url

    try:
        where = parse_server_url(url, scheme_optional=True)
    except RefusedError as error:
        raise CannotAskError(f"--url: {quote(url)} {error.message}; {error.fix}") from None
    kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
    connection = kind(where.address.host, where.address.port, timeout=TIMEOUT_S)
    headers = {"Accept": accept, "Connection": "close", **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        words = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CannotAskError(f"{where} cannot be asked: {words}; is ollama-lb running there? (--url)") from None
    finally:
        connection.close()


class UnknownError(Exception):
    """The balancer knows nothing of what was asked for; the message is its own."""


def ask(url: str, path: str, accept: str, key_env: str | None) -> bytes:
    """Return what a running balancer answers for `path`.

    Raises UnknownError for a 404 of its own, CannotAskError for all else that is not a good answer.
    """
    status, body = fetch(url, path, accept, token_of(key_env))
    if status == 200:
        return body
    said = _error_of(body)
    if said is None:
        raise CannotAskError(f"{url} answered with {status} and no words of ollama-lb: is it one?")
    if status == 404:
        raise UnknownError(said)
    raise CannotAskError(f"{said.partition(':')[0]}: {_KEY_FIX}" if status == 401 else said)


def _error_of(body: bytes) -> str | None:
    """Return what an answer of ours that is an error says; None when it is none of ours."""
    try:
        said = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return said if isinstance(said, str) and said else None


_KEY_FIX = (
    f'set {DEFAULT_KEY_ENV} to a key with "manage", or name the environment variable that holds one with --key-env NAME'
)
