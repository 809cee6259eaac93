"""Requests of many callers into batches, and who serves them.

Ray Serve has a batcher of its own. This one differs in what it waits for: a batch holds requests of
one shape and one model version only, a small request never waits for a large one that came later,
a lone request for nobody, and a caller who left takes no part.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mm_model.api import ModelIdentity, Refusal
from mm_model.serving.generator import Check, Generator


class Batched(Protocol):
    """Something to be worked off."""

    @property
    def batch_key(self) -> Hashable:
        """Those with equal keys may share a batch."""
        ...


A = TypeVar("A", bound=Batched)
T = TypeVar("T")

Took = Callable[[str, float, float], object]
"""Told of a stage of a request: its name, its begin and its end, by `time.perf_counter`."""
Tell = Callable[[float], object]
"""Told, in any thread, which share of a request is done, from 0 to 1."""


@dataclass(frozen=True)
class Served:
    """A generator and the name of what it serves."""

    generator: Generator
    identity: ModelIdentity


class ModelSource(Protocol):
    """Says which model serves now; a request keeps the one that it began with."""

    @property
    def served(self) -> Served | None:
        """None until a model has been loaded."""
        ...

    @property
    def challenger(self) -> Served | None:
        """The version that is tried beside it; None if there is none."""
        ...

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """Versions that should have served and were not taken up."""
        ...

    @property
    def registry_error(self) -> str | None:
        """Why the registry cannot be asked now, if so."""
        ...


@dataclass(frozen=True)
class FixedModel:
    """A source that always serves the same."""

    served: Served | None
    refused: tuple[Refusal, ...] = ()
    registry_error: str | None = None
    challenger: Served | None = None


@dataclass(frozen=True, eq=False)
class _Waiting:
    work: Callable[[Sequence[Any], Check], Sequence[Any]]
    request: Batched
    answer: asyncio.Future[Any]
    took: Took
    tell: Tell
    since: float

    @property
    def key(self) -> tuple[object, ...]:
        # Methods are equal if they are the same of the same generator.
        return self.work, self.request.batch_key


class Batcher:
    """Works off what waits, one batch at a time; used from one event loop.

    Args:
        max_batch: most requests of a batch.
        wait_s: how long a batch waits at most for requests that are `coming`.
        on_batch: told the size of each batch.
        on_queue: told how many wait, whenever that changes.
    """

    def __init__(
        self,
        max_batch: int,
        wait_s: float,
        on_batch: Callable[[int], object] = lambda _: None,
        on_queue: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._on_batch = on_batch
        self._on_queue = on_queue
        self._waiting: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._coming = 0
        self._came = asyncio.Event()
        # Its own: it waits for no upload, and what torch keeps for each thread is kept once.
        self._thread = ThreadPoolExecutor(1, "batch")

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Around what reads a request and submits it: a batch waits for it a while."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            self._came.set()

    @property
    def is_busy(self) -> bool:
        """Whether something is being worked on; for any thread."""
        return self._worker is not None and not self._worker.done()

    def submit(
        self,
        work: Callable[[Sequence[A], Check], Sequence[T]],
        request: A,
        took: Took = lambda *_: None,
        tell: Tell = lambda _: None,
    ) -> asyncio.Future[T]:
        """The request's result to be; cancelling it takes the request out of the queue.

        Args:
            work: a generator's method, which answers a batch of such requests; it calls what it
                gets as second argument now and then, with the share done, and lets pass what that
                raises.
            request: waits for companions with the same `work` and `batch_key`.
            took: told how long it waited ("queue") and was worked on ("sample").
            tell: told how far it is, once it is worked on.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(work, request, answer, took, tell, time.perf_counter()))
        self._on_queue(len(self._waiting))
        if not self.is_busy:
            self._worker = asyncio.create_task(self._work())
        return answer

    async def _work(self) -> None:
        while self._waiting:
            await self._wait_for_companions()
            batch = self._take()
            self._on_queue(len(self._waiting))
            if not batch:
                continue
            self._on_batch(len(batch))
            began = time.perf_counter()
            for item in batch:
                item.took("queue", item.since, began)
            try:
                results = await asyncio.get_running_loop().run_in_executor(
                    self._thread, _answer, batch
                )
            except Exception as error:  # whatever it is, it is the callers' to know
                for item in batch:
                    if not item.answer.done():
                        item.answer.set_exception(error)
            else:
                ended = time.perf_counter()
                for item, result in zip(batch, results, strict=True):
                    item.took("sample", began, ended)
                    if not item.answer.done():
                        item.answer.set_result(result)

    async def _wait_for_companions(self) -> None:
        try:
            async with asyncio.timeout(self._wait_s):
                while self._coming and len(self._waiting) < self._max_batch:
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            pass

    def _take(self) -> list[_Waiting]:
        """The longest waiting request and its companions; those that were left are dropped."""
        present = [item for item in self._waiting if not item.answer.done()]
        batch = [item for item in present if item.key == present[0].key][: self._max_batch]
        self._waiting = deque(item for item in present if item not in batch)
        return batch


@dataclass(frozen=True)
class Lane:
    """A version, and the queue in which requests wait for it."""

    served: Served
    batcher: Batcher


def _answer(batch: list[_Waiting]) -> Sequence[Any]:
    """Runs in a thread; gives up between two steps once every caller has left."""

    def check(share: float = 0.0) -> None:
        if all(item.answer.done() for item in batch):
            raise _AllLeftError
        for item in batch:
            item.tell(share)

    return batch[0].work([item.request for item in batch], check)


class _AllLeftError(Exception):
    """Nobody waits for the batch any more."""
