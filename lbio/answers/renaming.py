"""Relays the answer to a request for an alias: the model in it is called what the client has called it."""

from __future__ import annotations

from dataclasses import replace

from lbcore.ollama import Shape
from lbio.answers.local import LocalAnswer
from lbio.attempt import AttemptRun
from lbio.client import ClientStream
from lbio.exchange import Exchange
from lbio.http1 import Framing, ResponseHead
from lbio.relay import Core, Relay
from lbio.upstream import Answer
from lbio.wire.model_names import Renamer, renamed_in_error

_JSON = (b"application/json", b"application/x-ndjson", b"text/event-stream")


class RenamingRelay(Relay):
    """Relays an answer in which the model has another name. `asked` is that name, as the client wrote it."""

    __slots__ = ("_asked", "_renamer")
    is_verbatim = False

    def __init__(
        self, exchange: Exchange, run: AttemptRun, answer: Answer, client: ClientStream, core: Core, asked: str
    ) -> None:
        super().__init__(exchange, run, answer, client, core)
        self._asked = asked
        readable = _is_readable(answer.head)
        self._renamer = Renamer(asked, exchange.request.shape, lines=answer.streams) if readable else None

    def _head(self, n_bytes: int) -> ResponseHead:
        """Return the head without a length that is not known yet; a body that is here whole has one."""
        head = self._answer.head
        if head.framing is not Framing.LENGTH or self._renamer is None:
            return head
        if self._answer.ended:
            return replace(head, content_length=n_bytes)
        return replace(head, framing=Framing.CHUNKED, content_length=0)

    def _whole_lines(self, payload: bytes) -> bytes:
        lines = super()._whole_lines(payload)
        if self._renamer is None:
            return lines
        if self._answer.head.status >= 400:
            return renamed_in_error(lines, self._run.sent_as, self._asked)
        renamed = self._renamer.feed(lines)
        return renamed + self._renamer.end() if self._answer.ended else renamed


def renamed_answer(answer: LocalAnswer, sent: str, asked: str, shape: Shape) -> LocalAnswer:
    """Return an answer made of those of servers that were asked for the model `sent`."""
    if answer.status >= 400:
        return replace(answer, body=renamed_in_error(answer.body, sent, asked))
    renamer = Renamer(asked, shape, lines=False)
    return replace(answer, body=renamer.feed(answer.body) + renamer.end())


def _is_readable(head: ResponseHead) -> bool:
    is_plain = (head.header(b"content-encoding") or b"identity").lower() == b"identity"
    return is_plain and (head.header(b"content-type") or b"").lower().startswith(_JSON)
