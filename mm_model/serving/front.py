"""What stands before everything else: each request has an id, and no header lifts a limit."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_model.api import REQUEST_ID

# What people use as ids: UUIDs, ULIDs, hashes, and those of load balancers (Root=1-67…;Self=…).
_SANE = re.compile(r"[\w.:;=/+@-]{1,128}", re.ASCII)
# With these a caller changes the limits of Ray Serve's proxy.
_OF_THE_PROXY = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")


class Front:
    """ASGI middleware: an id for each request, from its caller or made here, in every answer.

    It may stand twice on the way of a request, in the proxy and in the replica.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _SANE.fullmatch(given) else uuid.uuid4().hex
        scope["headers"] = [
            (name, value) for name, value in scope["headers"] if name not in _OF_THE_PROXY
        ]
        MutableHeaders(scope=scope)[REQUEST_ID] = request_id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id  # once, whoever set it too
            await send(message)

        await self._app(scope, receive, named)


def request_id_of(scope: Scope) -> str:
    """The id that `Front` has given to a request."""
    return Headers(scope=scope).get(REQUEST_ID, "")
