"""Work that ends when nobody waits for it any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

T = TypeVar("T")

CLIENT_LEFT = 499
"""Status of a request whose caller left, in logs and metrics; nginx's number for it."""


class CallerLeftError(HTTPException):
    """The caller left; nobody reads what it says."""

    def __init__(self) -> None:
        super().__init__(CLIENT_LEFT, "the caller left")


async def while_present(request: Request, work: Awaitable[T]) -> T:
    """The work's result; the work is cancelled once the caller has closed the connection.

    Servers need not cancel what a caller has left, and most do not. The request's body must have
    been read.

    Raises:
        CallerLeftError: the connection is closed.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise CallerLeftError
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
