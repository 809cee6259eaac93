"""Uploads of jobs on their way: few at once, each at a pace, and with room kept for its bytes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from mm_model.errors import DeadlineError, OverloadedError

MAX_UPLOADS = 4
"""Uploads of jobs that a replica takes at once: an upload may be of any size and take hours, and
whoever else asks must find a place."""

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
"""As ASGI has them."""

# Slower than any line that large files are sent by; a caller who sends less holds a place for it.
_LEAST_BYTES, _PAUSE_S = 64 * 1024, 30.0


@dataclass(frozen=True)
class Ahead:
    """What the same owner's uploads that began before may still become."""

    jobs: int
    byte_count: int


class Intake:
    """The uploads that one replica is taking; used from one thread."""

    def __init__(self) -> None:
        self._jobs: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @contextmanager
    def place(self, owner: str, byte_count: int) -> Iterator[Ahead]:
        """Hold a place, and room for so many bytes, while the block runs.

        Raises:
            OverloadedError: there is no place.
        """
        if self._jobs.total() >= MAX_UPLOADS:
            raise OverloadedError(
                "too many uploads of jobs are in progress",
                got=self._jobs.total(),
                allowed=MAX_UPLOADS,
                remedy="try again when one has ended",
            )
        ahead = Ahead(self._jobs[owner], self._bytes[owner])
        self._jobs[owner] += 1
        self._bytes[owner] += byte_count
        try:
            yield ahead
        finally:
            self._jobs[owner] -= 1
            self._bytes[owner] -= byte_count


def expected_bytes(headers: Mapping[str, str], max_bytes: int) -> int:
    """How long a body may be by its headers; 0 for one that is refused unread, as too long."""
    declared = headers.get("content-length", "")
    if "transfer-encoding" in headers or not declared.isdecimal():
        return max_bytes  # who sends in chunks need not keep to what is declared
    return int(declared) if int(declared) <= max_bytes else 0


def steady(receive: Receive) -> Receive:
    """ASGI's receive of a body that comes at a pace; from now on.

    Raises:
        DeadlineError: it does not, when it is called.
    """
    clock = asyncio.get_running_loop().time
    until, got = clock() + _PAUSE_S, 0

    async def received() -> Message:
        nonlocal until, got
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            raise DeadlineError(
                "the body came too slowly",
                got=f"{got} bytes in {_PAUSE_S:g} s",
                allowed=f"at least {_LEAST_BYTES}",
                remedy="send it over a faster line, or in smaller jobs",
            ) from None
        got += len(message.get("body", b""))
        if got >= _LEAST_BYTES:
            until, got = clock() + _PAUSE_S, 0
        return message

    return received
