"""How far bodies run ahead of who takes them, between Ray Serve's proxy and a replica.

Ray passes a body on from queue to queue, and none of them has an end: what comes faster than the
application takes it, or goes faster than the caller reads it, would fill the proxy, the replica and
the object store. So each end tells the other what it has got rid of, by a message of its own among
those of ASGI, which Ray carries as it finds them; and neither lets more than `MAX_AHEAD_BYTES` of a
request lie between them. A body that is shorter costs no message.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_AHEAD_BYTES = 4 * 2**20
"""Of a body, between both ends, in each direction; and the message that goes beyond it."""

_TELL_BYTES = MAX_AHEAD_BYTES // 4
# By this the proxy's end lets the replica's know that somebody hears it: code of one is younger
# than that of the other where an application was deployed anew, and there may be no proxy at all.
_EXTENSION = "mm_model.ahead"
_TAKEN = "mm_model.taken"
# Of a caller who reads nothing while an answer waits: it holds a place in a replica. A file comes
# in pieces of 64 KiB; no line that large files are fetched by is slower.
_PATIENCE_S = 60.0


class ProxyEnd:
    """ASGI middleware of the proxy.

    Whatever it stands before must have a `ReplicaEnd`: who tells nothing gets no more of a body
    than `MAX_AHEAD_BYTES`.

    Args:
        app: the proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["extensions"] = {**scope.get("extensions", {}), _EXTENSION: {}}
        way = _ProxyWay(receive, send)
        try:
            await self._app(scope, way.received, way.sent)
        finally:
            way.close()


class ReplicaEnd:
    """ASGI middleware of the application; does nothing where no `ProxyEnd` is before it.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _EXTENSION not in scope.get("extensions", {}):
            await self._app(scope, receive, send)
            return
        up, down, changed = _Taken(), _Ahead(), asyncio.Event()
        arrived: asyncio.Queue[Message] = asyncio.Queue()
        gone = False

        async def sort_out() -> None:
            nonlocal gone
            try:
                while (message := await receive())["type"] != "http.disconnect":
                    if message["type"] == _TAKEN:
                        down.told(message)
                        changed.set()
                    else:
                        arrived.put_nowait(message)
            finally:  # whatever ends it, nobody is told any more
                gone = True
                changed.set()
                arrived.put_nowait({"type": "http.disconnect"})

        async def received() -> Message:
            message = await arrived.get()
            if message["type"] == "http.disconnect":
                arrived.put_nowait(message)  # it stays so
            up.take(message)
            if up.is_news:
                await send(up.news())
            return message

        async def sent(message: Message) -> None:
            while not (down.has_room or gone):
                changed.clear()
                await changed.wait()
            if not gone:
                down.goes(message)
                await send(message)

        sorting = asyncio.create_task(sort_out())
        try:
            await self._app(scope, received, sent)
        finally:
            sorting.cancel()


class _ProxyWay:
    """What a proxy does with one request; `received` and `sent` are ASGI's."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._up, self._down, self._changed = _Ahead(), _Taken(), asyncio.Event()
        self._coming: asyncio.Future[Message] | None = None
        self._is_given_up = False

    async def received(self) -> Message:
        while True:
            if self._is_given_up:
                return {"type": "http.disconnect"}
            if self._down.is_news:  # even while the body has to wait
                return self._down.news()
            if self._coming is not None and self._coming.done():
                message, self._coming = self._coming.result(), None
                self._up.goes(message)
                return message
            if self._coming is None and self._up.has_room:
                self._coming = asyncio.ensure_future(self._receive())
                self._coming.add_done_callback(lambda _: self._changed.set())
            self._changed.clear()
            await self._changed.wait()

    async def sent(self, message: Message) -> None:
        if message["type"] == _TAKEN:
            self._up.told(message)
        elif not self._is_given_up:
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await self._send(message)  # returns once the caller has read what came before
                self._down.take(message)
            except TimeoutError:
                self._is_given_up = True  # the work ends; the server closes what is not whole
        self._changed.set()

    def close(self) -> None:
        if self._coming is not None:
            self._coming.cancel()


class _Ahead:
    """Bytes of a body that have gone, less those that are known to be taken."""

    def __init__(self) -> None:
        self._gone = self._taken = 0

    @property
    def has_room(self) -> bool:
        return self._gone - self._taken < MAX_AHEAD_BYTES

    def goes(self, message: Message) -> None:
        self._gone += len(message.get("body", b""))

    def told(self, message: Message) -> None:
        self._taken = message["bytes"]


class _Taken:
    """Bytes of a body that were taken, and how many of them the other end knows of."""

    def __init__(self) -> None:
        self._taken = self._told = 0

    @property
    def is_news(self) -> bool:
        return self._taken - self._told >= _TELL_BYTES

    def take(self, message: Message) -> None:
        self._taken += len(message.get("body", b""))

    def news(self) -> Message:
        self._told = self._taken
        return {"type": _TAKEN, "bytes": self._taken}
