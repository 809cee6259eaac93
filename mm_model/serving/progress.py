"""How far a request is, for whoever asks by its id while it is answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException

from mm_model.api import ProgressInfo
from mm_model.serving import openapi
from mm_model.serving.access import holder_of
from mm_model.serving.front import request_id_of
from mm_model.serving.watch import Watch

Seek = Callable[[str, str], Awaitable[float | None]]
"""Asks all replicas for the request of a key's holder, by its id: the share of its steps done."""


class Progress:
    """The requests that one process is answering.

    Args:
        seek: asks all replicas; this process is alone, without.
    """

    def __init__(self, seek: Seek | None = None) -> None:
        self._seek = seek
        self._watches: dict[tuple[str, str], Watch] = {}

    @contextmanager
    def of(self, request: Request, watch: Watch) -> Iterator[None]:
        """The block answers the request."""
        key = holder_of(request.scope), request_id_of(request.scope)
        self._watches[key] = watch
        try:
            yield
        finally:
            self._watches.pop(key, None)

    def share(self, holder: str, request_id: str) -> float | None:
        """From 0 to 1; None for a request that is not being answered here."""
        watch = self._watches.get((holder, request_id))
        return None if watch is None else watch.share

    def add_route(self, app: FastAPI) -> None:
        app.get(
            "/v1/progress/{request_id:path}",
            summary="How far a request is",
            description="Of a request that is being answered, by its X-Request-ID.",
            operation_id="progress",
            responses=openapi.problems(401, 403, 404),
        )(self.show)

    async def show(self, request_id: str, request: Request) -> ProgressInfo:
        holder = holder_of(request.scope)
        share = self.share(holder, request_id)
        if share is None and self._seek is not None:
            share = await self._seek(holder, request_id)
        if share is None:
            raise HTTPException(404, "no such request is being answered")
        return ProgressInfo(share=share)
