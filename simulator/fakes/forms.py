"""Forms, as recordings are sent in (`/v1/audio/transcriptions`; capture: v1_audio). Pure."""

import re
from collections.abc import Iterator
from typing import Any

from simulator.fakes.bodies import ApiError
from simulator.fakes.replies import Request

_BOUNDARY = re.compile(r'multipart/form-data;.*?boundary="?([^";]+)"?', re.IGNORECASE | re.DOTALL)
_NAME = re.compile(rb'form-data;[^\r\n]*?\bname="([^"]*)"', re.IGNORECASE)
_BROKEN = "failed to parse multipart form: "


def form_fields(request: Request) -> dict[str, Any]:
    """Return the fields of a request for a transcription, the file's bytes apart. Raises ApiError 400."""
    found = _BOUNDARY.match(request.content_type)
    if found is None:
        raise ApiError(400, f"{_BROKEN}request Content-Type isn't multipart/form-data", early=True)
    fields = dict(_parts(request.body, b"--" + found[1].encode("latin-1")))
    if not fields:
        raise ApiError(400, f"{_BROKEN}multipart: NextPart: EOF", early=True)
    recording = fields.pop("file", None)
    for wrong, message in (
        (not fields.get("model"), "model is required"),
        (recording is None, "file is required: http: no such file"),
        (not recording, "audio file is empty"),
    ):
        if wrong:
            raise ApiError(400, message, early=True)
    told = {name: value.decode(errors="replace") for name, value in fields.items()}
    return told | {"prompt": f"{told.get('prompt', '')} {len(recording or b'')} bytes", "images": ["a recording"]}


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and value of each field."""
    for part in body.split(boundary)[1:-1]:
        head, _, value = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        name = _NAME.search(head)
        if name is not None:
            yield name[1].decode(errors="replace"), value.removesuffix(b"\r\n")
