"""Which dialect each API speaks. Pure."""

from collections.abc import Mapping

from simulator.fakes.answers import ANTHROPIC, NATIVE, OPENAI, Api, Dialect
from simulator.fakes.embeddings import EMBED, EMBEDDINGS, OPENAI_EMBEDDINGS

DIALECTS: Mapping[Api, Dialect] = {
    Api.CHAT: NATIVE,
    Api.GENERATE: NATIVE,
    Api.OPENAI_CHAT: OPENAI,
    Api.OPENAI_COMPLETIONS: OPENAI,
    Api.ANTHROPIC: ANTHROPIC,
    Api.EMBED: EMBED,
    Api.EMBEDDINGS: EMBEDDINGS,
    Api.OPENAI_EMBEDDINGS: OPENAI_EMBEDDINGS,
}
