"""Blobs: the files that clients upload before a model is made of them (`/api/blobs/:digest`). Pure.

Of a blob its digest and its size are kept, however large it is (captures: blob_post, blob_head_missing and others).
"""

import hashlib
import re
from collections.abc import AsyncIterator

from simulator.fake_ollama import FakeOllama
from simulator.fakes.bodies import ApiError
from simulator.fakes.replies import Moment, Reply, Request, Upload

_PARENT = "/api/blobs/"
_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")


EMPTY = Upload(f"sha256:{hashlib.sha256().hexdigest()}", 0)


async def digested(pieces: AsyncIterator[bytes]) -> Upload:
    """Read a body as it comes, and keep nothing of it."""
    sha = hashlib.sha256()
    n_bytes = 0
    async for piece in pieces:
        sha.update(piece)
        n_bytes += len(piece)
    return Upload(f"sha256:{sha.hexdigest()}", n_bytes)


def is_blob(path: str) -> bool:
    """Tell whether a path is that of a blob."""
    return path.startswith(_PARENT) and path != _PARENT and "/" not in path.removeprefix(_PARENT)


def reads_blob(fake: FakeOllama, path: str) -> bool:
    """Tell whether the body of an upload is looked at: not when the blob is there, or cannot be."""
    digest = path.removeprefix(_PARENT)
    return _DIGEST.fullmatch(digest) is not None and digest not in fake.blobs


def head_blob(fake: FakeOllama, request: Request, _moment: Moment) -> Reply:
    """Tell whether a blob is there."""
    digest = _digest(request)
    if digest not in fake.blobs:
        raise ApiError(404, f'blob "{digest}" not found')
    return Reply(200)


def take_blob(fake: FakeOllama, request: Request, _moment: Moment) -> Reply:
    """Keep an upload, if it is what it says it is."""
    digest = _digest(request)
    if digest in fake.blobs:
        return Reply(200)
    upload = request.upload or EMPTY
    if upload.digest != digest:
        raise ApiError(400, f'digest mismatch, expected "{digest}", got "{upload.digest}"')
    fake.blobs[digest] = upload.n_bytes
    return Reply(201)


def _digest(request: Request) -> str:
    digest = request.path.removeprefix(_PARENT)
    if _DIGEST.fullmatch(digest) is None:
        raise ApiError(400, "invalid digest format")
    return digest
