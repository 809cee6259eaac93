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
        connected = False

        def run(make: Make[Any], works: Iterable[Any]) -> Iterator[tuple[Any, int | MMError]]:
            nonlocal connected
            waiting = iter(works)
            first = list(islice(waiting, 1))
            if first and not connected:
                stack.enter_context(cluster(workers))
                connected = True
            yield from on_ray(make, chain(first, waiting), workers) if first else ()

        yield run if workers else in_this_process


def on_ray(
    make: Make[Any], works: Iterable[Any], workers: int
) -> Iterator[tuple[Any, int | MMError]]:
    """Works by so many workers of the Ray that this process is connected to, as they are done."""
    import ray
    from ray.exceptions import RayActorError

    # A worker gets the source once, not with every unit: it grows with the number of units.
    shared = ray.put(make)
    actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=_RETRIES)(_Worker)
    waiting = iter(works)
    busy: dict[Any, tuple[Any, Any]] = {}
    for work in islice(waiting, workers):
        worker = actor.remote(shared, Path.cwd())
        busy[worker.make.remote(work)] = worker, work
    while busy:
        (ready, *_), _ = ray.wait(list(busy))
        worker, work = busy.pop(ready)
        following = next(waiting, None)
        if following is not None:
            busy[worker.make.remote(following)] = worker, following
        try:
            yield work, ray.get(ready)
        except RayActorError as error:
            yield (
                work,
                ServiceError(
                    f"the worker of {work} died {_RETRIES + 1} times",
                    got=" ".join(str(error).split())[:300],
                    remedy="give it more memory, or see whether a file of the unit brings it down",
                ),
            )


class _Worker:
    """One process that makes parts."""

    def __init__(self, make: Make[Any], folder: Path) -> None:
        os.chdir(folder)  # relative paths mean what they mean to who started the work
        self._make = make

    def make(self, work: Any) -> int | MMError:
        return self._make(work)
