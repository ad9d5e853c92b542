"""Which dialect an answer is written in. Pure."""

from collections.abc import Mapping

from simulator.fakes.answers import Answer, Api, Dialect
from simulator.fakes.anthropic import ANTHROPIC
from simulator.fakes.embeddings import EMBED, EMBEDDINGS, OPENAI_EMBEDDINGS
from simulator.fakes.native import NATIVE
from simulator.fakes.openai import OPENAI, TRANSCRIPTION, TRANSCRIPTION_AS_TEXT
from simulator.fakes.responses import RESPONSES

_DIALECTS: Mapping[Api, Dialect] = {
    Api.CHAT: NATIVE,
    Api.GENERATE: NATIVE,
    Api.OPENAI_CHAT: OPENAI,
    Api.OPENAI_COMPLETIONS: OPENAI,
    Api.RESPONSES: RESPONSES,
    Api.ANTHROPIC: ANTHROPIC,
    Api.TRANSCRIPTION: TRANSCRIPTION,
    Api.EMBED: EMBED,
    Api.EMBEDDINGS: EMBEDDINGS,
    Api.OPENAI_EMBEDDINGS: OPENAI_EMBEDDINGS,
}


def dialect_of(answer: Answer) -> Dialect:
    """Return the dialect of the API that was asked; a transcription comes as plain text if that is wanted."""
    if answer.api is Api.TRANSCRIPTION and answer.asked.get("response_format") == "text":
        return TRANSCRIPTION_AS_TEXT
    return _DIALECTS[answer.api]
