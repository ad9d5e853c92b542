"""What an answer says, and what a dialect is in which it is written. Pure.

An `Answer` is all that is known when it begins; the functions of its `Dialect` (`simulator.fakes.dialects`) turn it
into the pieces that Ollama writes: each `bytes` of a list is one HTTP chunk. Wall-clock times are int ns since 1970.
"""

import datetime as dt
import email.utils
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from simulator.fakes.specs import NS_PER_S

Pieces = list[bytes]

RUNNER_DIED = "an error was encountered while running the model: unexpected EOF"

# Short and long, several scripts, with what JSON must escape; at least two characters each.
WORDS = (
    " the", " of", " and", " river", " model", " quick", " stone", " light", " answer", " seven", " under",
    " window", " because", " always", " garden", " signal", " never", " north", " copper", " between", " slow",
    " café", " naïve", " für", " schließlich", " игра", " 良い", " 東京", " Ελλάδα", " \U0001f642", ' "so"',
    " a\\b", " <b>", " R&D", ", but", ", then", ". It", ". We", "\n\n", "ing", "ly", "tion", " 42", " (see)",
)  # fmt: skip
_WORD_LETTERS_MIN = min(map(len, WORDS))


def go_json(value: object) -> bytes:
    """Encode as Go's encoding/json does: compact, UTF-8, but with <, > and & escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character, escape in (("&", "\\u0026"), ("<", "\\u003c"), (">", "\\u003e")):
        text = text.replace(character, escape)
    return text.encode("utf-8", "replace")


def rfc3339(wall_ns: int) -> str:
    """Return a time as Go prints it: UTC, nanoseconds without trailing zeros."""
    seconds, ns = divmod(wall_ns, NS_PER_S)
    moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=seconds)
    fraction = f".{ns:09d}".rstrip("0").rstrip(".")
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def http_date(wall_ns: int) -> bytes:
    """Return a time as the Date header wants it."""
    return email.utils.formatdate(wall_ns // NS_PER_S, usegmt=True).encode()


def hex_id(*parts: object, digits: int = 24) -> str:
    """Return hex digits that depend on `parts` alone."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:digits]


# --- text --------------------------------------------------------------------------------------------------------


def words(key: str, seed: int, count: int) -> list[str]:
    """Return the first `count` tokens of the one answer that `key` has; a longer one begins with a shorter."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "replace")).digest()
    return random.Random(int.from_bytes(digest[:8])).choices(WORDS, k=count)


def continued(key: str, seed: int, count: int | None, natural: int, prefix: str) -> list[str]:
    """Return what follows `prefix`: if it is the beginning of the answer to `key`, the rest of that answer.

    So an answer that was cut off and is resumed elsewhere adds up to the answer that was not. `count` tokens
    are made, or, when None, as many as the whole answer's `natural` length leaves.
    """
    whole = words(key, seed, len(prefix) // _WORD_LETTERS_MIN + 1 + (natural if count is None else count))
    used = letters = 0
    while letters < len(prefix):
        letters += len(whole[used])
        used += 1
    if not "".join(whole[:used]).startswith(prefix):
        return words(f"{key}\0{prefix}", seed, natural if count is None else count)
    left = letters - len(prefix)  # letters of a token that the prefix stops within
    rest = [whole[used - 1][-left:]] if left else []
    rest += whole[used:]
    return rest[: max(0, natural - used + bool(left)) if count is None else count]


# --- answers -----------------------------------------------------------------------------------------------------


class Api(StrEnum):
    """The dialects in which tokens are asked for."""

    CHAT = "/api/chat"
    GENERATE = "/api/generate"
    OPENAI_CHAT = "/v1/chat/completions"
    OPENAI_COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    ANTHROPIC = "/v1/messages"
    TRANSCRIPTION = "/v1/audio/transcriptions"
    EMBED = "/api/embed"
    EMBEDDINGS = "/api/embeddings"
    OPENAI_EMBEDDINGS = "/v1/embeddings"


class Part(StrEnum):
    """What a token belongs to."""

    THOUGHT = "thought"
    TEXT = "text"
    CALL = "call"


@dataclass(frozen=True, slots=True)
class Call:
    """A tool that the model wants to be called."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    @property
    def arguments_json(self) -> str:
        """The arguments as text."""
        return go_json(self.arguments).decode()


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, before its first token: first thoughts, then a text or, as the last token, a call."""

    api: Api
    model: str  # as the client wrote it
    id: str
    tokens: tuple[str, ...]
    done_reason: str  # stop, length, load or unload
    stream: bool
    prompt_tokens: int
    begun_wall_ns: int
    usage: bool = False  # stream_options.include_usage
    context: bool = True  # /api/generate, unless raw
    logprobs: int | None = None  # /api/chat: give them, with so many alternatives each
    n_thoughts: int = 0  # of the tokens
    call: Call | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)  # the request: some answers repeat of it

    @property
    def thinking(self) -> str:
        """All thoughts."""
        return "".join(self.tokens[: self.n_thoughts])

    @property
    def text(self) -> str:
        """All text."""
        return "".join(self.tokens[self.n_thoughts : len(self.tokens) - (self.call is not None)])

    def part(self, index: int) -> Part:
        """Return what a token belongs to."""
        if index < self.n_thoughts:
            return Part.THOUGHT
        return Part.CALL if self.call is not None and index == len(self.tokens) - 1 else Part.TEXT

    @property
    def parts(self) -> dict[Part, int]:
        """All parts in their order, and which token is the first of each."""
        n_text = len(self.tokens) - self.n_thoughts - (self.call is not None)
        firsts = {Part.THOUGHT: 0} if self.n_thoughts else {}
        firsts |= {Part.TEXT: self.n_thoughts} if n_text else {}
        return firsts | ({Part.CALL: len(self.tokens) - 1} if self.call is not None else {})

    def begins_part(self, index: int) -> bool:
        """Tell whether a token is the first of its part."""
        return index == 0 or self.part(index) is not self.part(index - 1)


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time went, in ns, and when it ended."""

    total_ns: int
    load_ns: int
    prompt_ns: int
    eval_ns: int
    wall_ns: int


def _nothing(_answer: Answer) -> Pieces:
    return []


def _no_token(_answer: Answer, _index: int, _wall_ns: int) -> Pieces:
    return []


def _no_end(_answer: Answer, _timing: Timing) -> Pieces:
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one API speaks; without more than the first two, it gives its answers whole."""

    single_type: bytes
    single: Callable[[Answer, Timing], bytes]
    stream_headers: tuple[tuple[bytes, bytes], ...] = ()
    begin: Callable[[Answer], Pieces] = _nothing  # sent with the first token
    token: Callable[[Answer, int, int], Pieces] = _no_token  # answer, index, wall_ns
    finish: Callable[[Answer, Timing], Pieces] = _no_end
    killed: Callable[[Answer], Pieces] = _nothing  # what is still written when the runner dies mid-stream


def sse(value: object) -> bytes:
    """Return an event without a name."""
    return b"data: " + go_json(value) + b"\n\n"


def event(kind: str, value: Mapping[str, Any]) -> bytes:
    """Return an event with a name."""
    return b"event: " + kind.encode() + b"\n" + sse(value)

