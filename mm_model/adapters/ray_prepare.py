"""Preparation by worker processes on Ray, on this machine or on all of a cluster.

Every worker must see the rasters and, unless shards go to object storage, the folder of the result
under the same paths. A worker that
dies (killed, out of memory) is started anew, and its unit tried again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mm_model.adapters import environment
from mm_model.adapters.ray_cluster import cluster
from mm_model.data.parts import Make, Run, in_this_process
from mm_model.errors import MMError, ServiceError

_RETRIES = 2  # of a unit whose worker died


@contextmanager
def by_workers(workers: int) -> Iterator[Run]:
    """How `prepare` is run: by so many Ray workers, or in this process where it is 0.

    Ray is there from the first work to the end of the context, and not without work.
    """
    with ExitStack() as stack:
        started: RayWorkers | None = None

        def run(make: Make[Any], works: Iterable[Any]) -> Iterator[tuple[Any, int | MMError]]:
            nonlocal started
            waiting = iter(works)
            first = list(islice(waiting, 1))
            if first and started is None:
                stack.enter_context(cluster(workers))
                started = RayWorkers(workers)
            yield from started(make, chain(first, waiting)) if first and started else ()

        yield run if workers else in_this_process


class RayWorkers:
    """At most so many processes of the Ray that this process is connected to.

    Each is started when there is work for it, and kept for what is run next: a start takes seconds.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._started: list[Any] = []

    def __call__(
        self, make: Make[Any], works: Iterable[Any]
    ) -> Iterator[tuple[Any, int | MMError]]:
        """Works as they are done, each with the number of its patches or what went wrong."""
        import ray
        from ray.exceptions import RayActorError

        # A worker gets the source once, not with every unit: it grows with the number of units.
        # In a list, so that it is the worker that asks for it, and a new one in its place as well.
        shared = [ray.put(make)]
        waiting = iter(works)
        busy: dict[Any, tuple[Any, Any]] = {}
        for number, work in enumerate(islice(waiting, self._count)):
            if number == len(self._started):
                actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=_RETRIES)(_Worker)
                self._started.append(actor.remote(Path.cwd()))
            worker = self._started[number]
            busy[worker.make.remote(shared, work)] = worker, work
        while busy:
            (ready, *_), _ = ray.wait(list(busy))
            worker, work = busy.pop(ready)
            following = next(waiting, None)
            if following is not None:
                busy[worker.make.remote(shared, following)] = worker, following
            try:
                yield work, ray.get(ready)
            except RayActorError as error:
                yield (
                    work,
                    ServiceError(
                        f"the worker of {work} died {_RETRIES + 1} times",
                        got=" ".join(str(error).split())[:300],
                        remedy="give it more memory, or see whether a file of the unit brings it "
                        "down",
                    ),
                )


class _Worker:
    """One process that makes parts, then chunks."""

    def __init__(self, folder: Path) -> None:
        environment.give_way()
        os.chdir(folder)  # relative paths mean what they mean to who started the work
        self._shared: Any = None
        self._make: Make[Any] | None = None

    def make(self, shared: list[Any], work: Any) -> int | MMError:
        import ray

        if self._make is None or shared[0] != self._shared:
            self._shared, self._make = shared[0], ray.get(shared[0])
        return self._make(work)
