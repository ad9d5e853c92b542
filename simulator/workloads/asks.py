"""What a client asks for: one request of a workload, before anything has become of it. Pure; times are int ns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK_TOKENS = 512
"""Tokens of one block of a prompt, the unit in which prompts share a beginning (as in the Mooncake traces)."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request that a client will make.

    `blocks` identify the prompt, `BLOCK_TOKENS` tokens each, from its beginning: two prompts share as many tokens as
    their blocks are equal from the first on. They may go on into the answer, where a later prompt begins with that too.
    Empty: it shares nothing with any other.
    """

    id: int  # from 1 on, in the order of arrival; never reused
    arrives_ns: int
    model: str
    prompt_tokens: int
    output_tokens: int  # how long the answer would be
    route: str = "/api/chat"
    stream: bool = True
    num_ctx: int | None = None  # None: the model's default; another value makes Ollama load the model anew
    session: int = 0  # requests of the same client's conversation; 0: none
    blocks: tuple[int, ...] = ()
    leaves_after_ns: int | None = None  # the client gives up when its answer is not complete by then
    poison: bool = False  # crashes the runner that works on it


class Source(Protocol):
    """Where the asks of a run come from. Everything random in it is drawn from generators seeded at its making."""

    def asks(self) -> Iterator[Ask]:
        """Return the asks whose moment does not depend on any answer, in order of time; made as they are drawn."""

    def follow_up(self, ask: Ask, ended_ns: int, *, completed: bool) -> Ask | None:
        """Return what the client of `ask` asks next, not before `ended_ns`; None: nothing more."""
