"""A version that is tried beside the champion: it answers a share of requests, or repeats them
unseen. Whatever becomes of it, the champion's answers do not.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mm_model.config import ServeConfig
from mm_model.errors import RequestError
from mm_model.modalities import Modality
from mm_model.serving.batching import Batcher, Lane, ModelSource, Served
from mm_model.serving.layers import ObservedLayer
from mm_model.serving.metrics import Metrics
from mm_model.serving.presence import CallerLeftError
from mm_model.serving.requests import Prepared, Request, Result

_LOG = logging.getLogger(__name__)
_NICEST = 19  # of a thread: it gets a sixtieth of a core that another one wants
_LOOK_S = 0.01
_STOP_S = 10.0
_WAITING = 2  # requests to repeat; each holds its layers and the champion's answer

T = TypeVar("T")


def is_chosen(request_id: str, share: float) -> bool:
    """Whether a request is one of the challenger's: a function of its id, and of nothing else."""
    digest = hashlib.sha256(request_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class Challenge:
    """What the alias `challenger` names, at work.

    Args:
        config: how it is tried, and with which share of requests.
        source: says which version it is.
        counted: where outcomes are counted.
        is_busy: whether the champion is at work.
    """

    def __init__(
        self,
        config: ServeConfig,
        source: ModelSource,
        counted: Metrics,
        is_busy: Callable[[], bool],
    ) -> None:
        self._config, self._source, self._counted = config.challenger, source, counted
        # A queue of its own: nobody who waits for the champion waits for it.
        self._batcher = Batcher(
            config.max_batch, config.batch_wait_ms / 1000, counted.batch_size.observe
        )
        share = config.challenger.share if config.challenger is not None else 0.0
        self._room = max(1, round(share * config.max_queued))
        self._answering = 0
        self._shadow = Shadow(source, counted, is_busy, config.deadline_s)

    async def answer(self, request_id: str, answering: Callable[[Lane], Awaitable[T]]) -> T | None:
        """The challenger's answer; None where it is the champion's to answer.

        That is so where the request is not of the challenger's share, where too many wait for it
        already, and where it fails or refuses.
        """
        served = self._chosen("share", request_id)
        if served is None:
            return None
        outcome = "dropped"
        try:
            if self._answering >= self._room:
                return None
            self._answering += 1
            try:
                outcome = "left"  # by its caller, or by the deadline
                made = await answering(Lane(served, self._batcher))
                outcome = "answered"
                return made
            finally:
                self._answering -= 1
        except CallerLeftError:  # nobody waits for an answer any more
            raise
        except RequestError:  # if it is one, the champion says so, too
            outcome = "refused"
        except Exception:
            outcome = "failed"
            _LOG.exception("the challenger, version %s, failed", served.identity.version)
        finally:
            self._counted.challenged.labels(served.identity.version, outcome).inc()
        return None

    def close(self) -> None:
        """Repeat no more."""
        self._shadow.close()

    def repetition(
        self, request_id: str, prepared: Prepared, result: Result, champion: Served
    ) -> Callable[[], None] | None:
        """Has the challenger repeat, unseen, what the champion answered; None: it need not.

        To be called once the answer is sent; returns at once.
        """
        served = self._chosen("shadow", request_id)
        if served is None or served.identity == champion.identity:
            return None
        return lambda: self._shadow.repeat(_Repetition(served, champion, prepared, result))

    def _chosen(self, mode: str, request_id: str) -> Served | None:
        served, config = self._source.challenger, self._config
        if served is None or config is None or config.mode != mode:
            return None
        return served if is_chosen(request_id, config.share) else None


@dataclass(frozen=True)
class _Repetition:
    served: Served
    champion: Served
    prepared: Prepared
    result: Result


class Shadow:
    """Repeats requests in a thread that gives way: to all else that computes, and to the champion.

    What does not find room, or does not come to its end within `patience_s`, is dropped.
    """

    def __init__(
        self,
        source: ModelSource,
        counted: Metrics,
        is_busy: Callable[[], bool],
        patience_s: float,
    ) -> None:
        self._source, self._counted = source, counted
        self._is_busy, self._patience_s = is_busy, patience_s
        self._waiting: queue.Queue[_Repetition | None] = queue.Queue(_WAITING)
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """Drop what is repeated and what waits. A process that ends must not compute meanwhile."""
        self._ending.set()
        if self._thread is not None:
            with suppress(queue.Full):  # else it has not to be woken
                self._waiting.put_nowait(None)
            self._thread.join(_STOP_S)

    def repeat(self, repetition: _Repetition) -> None:
        """Repeat a request when there is time for it; used from one thread."""
        if self._ending.is_set():
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="challenger", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(repetition)
        except queue.Full:
            self._count(repetition, "dropped")

    def _work(self) -> None:
        # Of this thread alone, on Linux, and of those that torch starts for it.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)
        while (repetition := self._waiting.get()) is not None and not self._ending.is_set():
            try:
                self._count(repetition, self._repeat(repetition))
            except Exception:
                _LOG.exception("version %s failed, unseen", repetition.served.identity.version)
                self._count(repetition, "failed")
            del repetition  # it must not hold a model that was unloaded

    def _repeat(self, repetition: _Repetition) -> str:
        """How it went."""
        generator, since = repetition.served.generator, time.perf_counter()
        gave_way_s = 0.0

        def is_over() -> bool:
            return self._ending.is_set() or time.perf_counter() - since > self._patience_s

        def give_way(_: float = 0.0) -> None:
            nonlocal gave_way_s
            began = time.perf_counter()
            while self._is_busy() and not is_over():
                time.sleep(_LOOK_S)
            gave_way_s += time.perf_counter() - began
            if is_over() or self._source.challenger is not repetition.served:
                raise _DroppedError

        try:
            give_way()
            prepared = generator.prepare(_request(repetition.prepared))
            (result,) = generator.sample([prepared], give_way)
        except _DroppedError:
            return "dropped"
        except RequestError:
            return "refused"
        version = repetition.served.identity.version
        seconds = time.perf_counter() - since - gave_way_s
        self._counted.shadow_seconds.labels(version).observe(seconds)
        modalities = repetition.champion.generator.modalities
        for name, distance in differences(repetition.result, result, modalities).items():
            self._counted.shadow_difference.labels(version, name).observe(distance)
        return "answered"

    def _count(self, repetition: _Repetition, outcome: str) -> None:
        self._counted.challenged.labels(repetition.served.identity.version, outcome).inc()


class _DroppedError(Exception):
    """There is no time for it, or the challenger is one no more."""


def _request(prepared: Prepared) -> Request:
    """What was asked, of another generator, which may know its modalities in another order."""
    observed = {
        name: ObservedLayer(values, valid, prepared.grid)
        for name, (values, valid) in prepared.observed.items()
    }
    return Request(
        observed,
        prepared.targets,
        prepared.samples,
        prepared.seed,
        prepared.steps,
        None if observed else prepared.grid,
        prepared.conditions,
    )


def differences(one: Result, other: Result, modalities: Mapping[str, Modality]) -> dict[str, float]:
    """How far two answers to a request lie apart, by target, over samples, bands and valid pixels.

    The mean absolute difference in the modality's unit; of classes, the share of pixels that
    differ. What no pixel tells is left out.
    """
    found = {}
    for name, values in one.values.items():
        ours, theirs = values[..., one.valid], other.values[name][..., one.valid]
        if modalities[name].is_categorical:
            apart = ours != theirs
        else:
            apart = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        if apart.size:
            found[name] = float(apart.mean())
    return found
