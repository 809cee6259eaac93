"""What a batch waits for, and for whom it does not."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from mm_model.serving.batching import Batcher

FOREVER_S = 3600.0


@dataclass(frozen=True)
class Request:
    name: str
    batch_key: str = "same"


def work(requests, check):
    check()
    return [r.name for r in requests]


def run(using, max_batch=4, wait_s=FOREVER_S):
    """Runs it with a batcher; a batch that waits for what never comes is an error."""
    sizes: list[int] = []

    async def bounded():
        async with asyncio.timeout(20):
            return await using(Batcher(max_batch, wait_s, sizes.append))

    return asyncio.run(bounded()), sizes


async def read_then_submit(batcher, name, reading):
    with batcher.coming():
        await reading
        answer = batcher.submit(work, Request(name))
    return await answer


def test_a_lone_request_waits_for_nobody():
    async def alone(batcher):
        with batcher.coming():
            answer = batcher.submit(work, Request("a"))
        return await answer

    assert run(alone) == ("a", [1])


def test_a_batch_waits_for_what_is_being_read_and_no_longer():
    async def together(batcher):
        read = [asyncio.Event() for _ in range(3)]
        calls = [
            asyncio.create_task(read_then_submit(batcher, str(k), event.wait()))
            for k, event in enumerate(read)
        ]
        for event in read:
            await asyncio.sleep(0.02)
            assert not any(call.done() for call in calls)
            event.set()
        return await asyncio.gather(*calls)

    assert run(together) == (["0", "1", "2"], [3])


def test_a_full_batch_does_not_wait():
    async def full(batcher):
        with batcher.coming():
            return await asyncio.gather(*(batcher.submit(work, Request(n)) for n in "abc"))

    assert run(full, max_batch=3) == (["a", "b", "c"], [3])


def test_what_is_read_slowly_holds_up_the_others_only_so_long():
    async def slow(batcher):
        with batcher.coming():
            return await batcher.submit(work, Request("a"))

    assert run(slow, wait_s=0.05) == ("a", [1])


def test_a_request_that_is_refused_holds_up_nobody():
    async def refused(batcher):
        reading = asyncio.get_running_loop().create_future()
        bad = asyncio.create_task(read_then_submit(batcher, "bad", reading))
        await asyncio.sleep(0)
        good = batcher.submit(work, Request("good"))
        await asyncio.sleep(0.02)
        assert not good.done()
        reading.set_exception(ValueError("no GeoTIFF"))
        with pytest.raises(ValueError, match="no GeoTIFF"):
            await bad
        return await good

    assert run(refused) == ("good", [1])


def test_who_leaves_takes_no_part():
    async def leaving(batcher):
        reading = asyncio.Event()
        other = asyncio.create_task(read_then_submit(batcher, "stays", reading.wait()))
        await asyncio.sleep(0)
        left = batcher.submit(work, Request("leaves"))
        await asyncio.sleep(0.02)
        left.cancel()
        reading.set()
        return await other

    assert run(leaving) == ("stays", [1])


def test_batches_wait_for_no_thread_of_others_and_all_run_in_one():
    def where(requests, check):
        return [threading.get_ident() for _ in requests]

    async def busy(batcher):
        loop, free = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        other = loop.run_in_executor(None, free.wait)
        try:
            return [await batcher.submit(where, Request(name)) for name in "abc"]
        finally:
            free.set()
            await other

    threads, _ = run(busy)
    assert len(set(threads)) == 1
