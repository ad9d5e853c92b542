"""What requests ask for besides text, in each API's own fields: thoughts, tools, JSON, images. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from simulator.fakes.answers import Api
from simulator.fakes.bodies import text_field

Schema = Mapping[str, Any]
_ANY_OBJECT: Schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
_IMAGES = frozenset({"image_url", "input_image", "image"})


@dataclass(frozen=True, slots=True)
class Extras:
    """What is wanted, whatever the API."""

    think: bool = False
    tools: tuple[tuple[str, Schema], ...] = ()  # name, schema of the arguments
    schema: Schema | None = None  # the answer is to be JSON
    images: bool = False


def extras(api: Api, fields: Mapping[str, Any]) -> Extras:
    """Return what the fields of a request amount to."""
    return Extras(
        think=_thinks(api, fields),
        tools=tuple(_tools(fields.get("tools"))),
        schema=_schema(_FORMATS[api](fields)) if api in _FORMATS else None,
        images=bool(fields.get("images")) or any(map(_has_image, _messages(api, fields))),
    )


def _table(value: object, *names: str) -> Mapping[str, Any]:
    """Return what is found along `names`, if it is an object."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _thinks(api: Api, fields: Mapping[str, Any]) -> bool:
    if api in {Api.CHAT, Api.GENERATE}:
        return bool(fields.get("think"))
    if api is Api.ANTHROPIC:
        return text_field(_table(fields, "thinking"), "type") == "enabled"
    effort = text_field(fields, "reasoning_effort") or text_field(_table(fields, "reasoning"), "effort")
    return effort not in {"", "none"}


def _tools(offered: object) -> Iterator[tuple[str, Schema]]:
    """Yield tools, written as Ollama and OpenAI do, or as /v1/responses or Anthropic."""
    for tool in offered if isinstance(offered, list) else []:
        told = _table(tool, "function") or _table(tool)
        yield text_field(told, "name"), _table(told, "parameters") or _table(told, "input_schema")


def _openai_format(fields: Mapping[str, Any]) -> object:
    wanted = _table(fields, "response_format")
    if wanted.get("type") == "json_schema":
        return _table(wanted, "json_schema", "schema")
    return "json" if wanted.get("type") == "json_object" else None


def _response_format(fields: Mapping[str, Any]) -> object:
    wanted = _table(fields, "text", "format")
    return _table(wanted, "schema") if wanted.get("type") == "json_schema" else None


_FORMATS = {
    Api.CHAT: lambda fields: fields.get("format"),
    Api.GENERATE: lambda fields: fields.get("format"),
    Api.OPENAI_CHAT: _openai_format,
    Api.RESPONSES: _response_format,
}


def _schema(wanted: object) -> Schema | None:
    if wanted == "json":
        return _ANY_OBJECT
    return wanted if isinstance(wanted, dict) and wanted else None


def _messages(api: Api, fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = fields.get("input" if api is Api.RESPONSES else "messages")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _has_image(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return bool(message.get("images")) or any(text_field(_table(part), "type") in _IMAGES for part in parts)
