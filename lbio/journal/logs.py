"""The log, on standard error: one line for each decision, readable or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from lbcore.commands import Decision, RecordDecision
from lbcore.decision_words import decision_words
from lbcore.schema import MS_NS
from lbio.configuration.settings import LogFormat, LogSettings
from lbio.exchange import ClientRequest
from lbio.journal.late_writer import LateWriter

_log = logging.getLogger("ollama_lb")
_WORD_CHARS_MAX = 200  # paths and names of models come from clients


def set_up(settings: LogSettings) -> None:
    """Send what is logged to standard error, in the format and from the level asked for."""
    logging.raiseExceptions = False  # a log that cannot be written (a closed pipe, a full disk) is no reason to stop
    handler = _handler()
    handler.setFormatter(_JsonFormatter() if settings.format is LogFormat.JSON else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())


def _handler() -> logging.Handler:
    try:
        number = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or not a file
        return logging.StreamHandler(sys.stderr)
    return LateWriter(open(number, "wb", buffering=0, closefd=False))


class _Told:
    """A decision as the message of a log record: put into words only when it is written."""

    __slots__ = ("_decision", "_request", "created", "level")

    def __init__(self, decision: RecordDecision, request: ClientRequest | None, level: int) -> None:
        self._decision = decision
        self._request = request
        self.created = time.time()
        self.level = level

    def __str__(self) -> str:
        return in_words(self._decision, self._request)

    def fields(self) -> dict[str, Any]:
        """Return what it consists of."""
        return _fields(self._decision, self._request)


class _TextFormatter(logging.Formatter):
    """`12:34:56.789 WARNING what happened`; the usual level is left out."""

    def format(self, record: logging.LogRecord | _Told) -> str:
        """Return the line of a record, or of a decision that came without one."""
        message = str(record) if isinstance(record, _Told) else record.getMessage()
        level = record.level if isinstance(record, _Told) else record.levelno
        if not message.isprintable():  # names come from clients, and must not forge lines
            message = message.encode("unicode_escape").decode()
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = "" if level == logging.INFO else f"{logging.getLevelName(level)} "
        return f"{clock}.{int(record.created % 1 * 1000):03d} {name}{message}"


class _JsonFormatter(logging.Formatter):
    """One object a line; a decision's fields are members of their own."""

    def format(self, record: logging.LogRecord | _Told) -> str:
        """Return the line of a record, or of a decision that came without one."""
        told = record if isinstance(record, _Told) else record.msg
        level = record.level if isinstance(record, _Told) else record.levelno
        fields: dict[str, Any] = {
            "time": record.created,
            "level": logging.getLevelName(level).lower(),
            "message": str(record) if isinstance(record, _Told) else record.getMessage(),
        }
        if isinstance(told, _Told):
            fields |= told.fields()
        return _to_json(fields)


def _to_json(fields: Mapping[str, Any]) -> str:
    try:
        return msgspec.json.encode(fields).decode()
    except (UnicodeEncodeError, TypeError):  # half of an emoji
        return json.dumps(fields, ensure_ascii=False)


class Log:
    """Tells of decisions, with requests under the names their clients see."""

    def __init__(self, settings: LogSettings) -> None:
        self._enabled = settings.decisions and _log.isEnabledFor(logging.INFO)
        self._requests: dict[int, ClientRequest] = {}

    def request(self, request: ClientRequest) -> None:
        """Know a request from now on."""
        if self._enabled:
            self._requests[request.request_id] = request

    def forget(self, request: ClientRequest) -> None:
        """Know a request no more."""
        self._requests.pop(request.request_id, None)

    def decision(self, decision: RecordDecision) -> None:
        """Write one decision of the core."""
        if self._enabled:
            level = _LEVELS.get(decision.decision, logging.INFO)
            told = _Told(decision, self._requests.get(decision.request_id), level)
            handlers = logging.root.handlers
            if len(handlers) == 1 and isinstance(handlers[0], LateWriter):
                handlers[0].emit(told)  # all that the rest of logging would come to, at a tenth of the cost
            else:
                _log.handle(logging.LogRecord(_log.name, level, __file__, 0, told, (), None))

    def note(self, text: str) -> None:
        """Write what no decision of the core tells of, if decisions are written."""
        if self._enabled:
            _log.info("%s", text)

    def warning(self, text: str) -> None:
        """Write what an operator should look into."""
        _log.warning("%s", text)

    def defect(self, error: BaseException) -> None:
        """Write that the program itself has a defect; the trace only when asked for."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        shown = error if _log.isEnabledFor(logging.DEBUG) else None
        words = 'internal error: %s: %s (please report; log.level = "debug" shows where)'
        _log.error(words, type(error).__name__, error, exc_info=shown)


_LEVELS: Mapping[Decision, int] = {
    Decision.FAILED: logging.WARNING,
    Decision.REJECTED: logging.WARNING,
    Decision.SERVER_DIED: logging.WARNING,
    Decision.SERVER_UNREAD: logging.WARNING,
}


def _fields(decision: RecordDecision, request: ClientRequest | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"decision": decision.decision}
    if request is not None:
        model = request.facts.model
        fields |= {"request": request.tag, "path": _shortened(request.head.path), "model": model and _shortened(model)}
        fields |= {"key": request.key} if request.key else {}
    named = {"server": decision.server, "why": decision.why, "before": decision.before, "after": decision.after}
    fields |= {name: value for name, value in named.items() if value}
    if decision.took_ns:
        fields["took_ms"] = round(decision.took_ns / MS_NS, 3)
    if decision.names:
        fields["servers"] = list(decision.names)
    return fields


def _shortened(word: str) -> str:
    return word if len(word) <= _WORD_CHARS_MAX else f"{word[:_WORD_CHARS_MAX]}…"


def in_words(decision: RecordDecision, request: ClientRequest | None) -> str:
    """Return one decision as a line: `#17 /api/chat llama3.2 gpu1 won after 53 ms (first-token)`."""
    text = decision_words(decision)
    if request is None:
        return text
    what = f"{_shortened(request.head.path)} {_shortened(request.facts.model or '')}".rstrip()
    what += f" ({request.key})" if request.key else ""
    return f"#{request.tag} {what} {text}" if decision.decision in _OPENING else f"#{request.tag} {text}"


_OPENING = frozenset({Decision.STARTED, Decision.QUEUED, Decision.REJECTED})
"""Decisions that may be the first about a request, so that they say what it is."""
