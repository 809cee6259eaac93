"""Multipart forms, their size checked before and while they are read."""

from __future__ import annotations

from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.requests import Request

from mm_model.data.files import needs_room
from mm_model.errors import MediaTypeError, TooLargeError

# What a text field of a form may hold at most; a long WKT has some 10 kB.
_MAX_FIELD_BYTES = 64 * 1024
_MAX_PARTS = 64


@asynccontextmanager
async def limited_form(
    request: Request,
    max_bytes: int,
    remedy: str = "send it in tiles, or to POST /v1/jobs, which takes more",
) -> AsyncIterator[FormData]:
    """A request's form; files of more than 1 MB lie in the folder for temporary files.

    Args:
        request: whose body has not been read.
        max_bytes: how long that may be.
        remedy: what is told to do with a longer one.

    Raises:
        MediaTypeError: the body is no form.
        TooLargeError: it is larger than allowed.
        StorageError: there is no room for it.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    media_type, charset = (
        text.decode("latin-1") for text in (kind, options.get(b"charset", b"utf-8"))
    )
    if media_type != "multipart/form-data":
        raise MediaTypeError(
            "body",
            got=media_type[:80] or "no Content-Type",
            allowed="multipart/form-data",
            remedy="send it with curl -F",
        )
    if charset.lower() not in ("utf-8", "utf8", "us-ascii"):  # Python knows a hundred, some odd
        raise MediaTypeError(
            "charset of the form", got=charset[:80], allowed="utf-8", remedy="leave it out"
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(declared, max_bytes, remedy)
    limited = _LimitedReceive(request, max_bytes, remedy)
    with needs_room("what was sent"):
        async with Request(request.scope, limited).form(
            max_files=_MAX_PARTS, max_fields=_MAX_PARTS, max_part_size=_MAX_FIELD_BYTES
        ) as form:
            yield form


class _LimitedReceive:
    """ASGI's receive, which stops at the first byte over a limit."""

    def __init__(self, request: Request, max_bytes: int, remedy: str) -> None:
        self._receive = request.receive
        self._max_bytes, self._remedy = max_bytes, remedy
        self._got = 0

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self._got += len(message.get("body", b""))
        if self._got > self._max_bytes:
            raise _too_large(f"more than {self._max_bytes}", self._max_bytes, self._remedy)
        return message


def _too_large(got: str, max_bytes: int, remedy: str) -> TooLargeError:
    return TooLargeError("body in bytes", got=got, allowed=f"at most {max_bytes}", remedy=remedy)
