"""The endpoint under ten thousand requests that nobody means well with, and what decoders cost.

The application runs in this process with the bundle in the box; requests come from
`benchmarks.mutations` over real rasters (MM_REAL_DATA), several at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import statistics
import time
from collections import Counter

import httpx
import psutil

from benchmarks import setting
from benchmarks.mutations import BOUNDARY, Mutated, form, mutated, real_seeds
from benchmarks.stac import DATA
from mm_model.adapters.environment import replica_environment
from mm_model.api import ModelIdentity
from mm_model.bundle import load_bundle
from mm_model.pretrained import PRETRAINED
from mm_model.serving.app import build_app
from mm_model.serving.batching import FixedModel, Served
from mm_model.serving.decoders import Decoder, DecoderPool, InProcess, shared_pool
from mm_model.serving.generator import Generator

REQUESTS = 10_000
WARM = 500  # that are not counted: pages, caches and threads that are made once
SIZES = 48  # of images asked for before, too: torch keeps kernels for each, until it has its most
AT_ONCE = 8
REPEATS = 51
MAX_SIDE_PX = 256
SLOWEST_S = 20.0
_WHERE = (
    "/v1/generate",
    {"content-type": f"multipart/form-data; boundary={BOUNDARY.decode()}"},
)


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Answers by class, the slowest one, memory before and after; then a file, both ways."""
    os.environ.update(replica_environment())
    seeds = real_seeds(DATA)
    logging.disable(logging.WARNING)  # python-multipart tells of each broken form
    generator = Generator(load_bundle(PRETRAINED), max_side_px=MAX_SIDE_PX)
    figures = asyncio.run(_storm(generator, seeds))
    figures |= _compare(seeds["sar"][1])
    notes = {
        "": f"{REQUESTS} mutated GeoTIFFs and forms, {AT_ONCE} at once, after {WARM} others "
        f"and {SIZES} sizes of images; "
        f"seeds are pieces of real radar and elevation files in {len(seeds['sar'])} layouts.",
        "mutated_5xx": "answers of 500 and above, and requests that took longer than "
        f"{SLOWEST_S:g} s",
        "mutated_200": "what was changed did not matter, or made another lawful request",
        "decoders_replaced": "killed by what they read, or after 500 requests",
        "whole_after_ok": "1: a whole file is answered afterwards, as before, byte for byte",
        "decoder_p50_ms": "header and pixels of 48 x 41 pixels, deflate, by a decoder",
        "in_process_p50_ms": "the same in this process",
        "decoder_added_ms": "median over turns of the difference",
    }
    return figures, notes


async def _storm(generator: Generator, seeds: dict[str, list[bytes]]) -> dict[str, float]:
    source = FixedModel(Served(generator, ModelIdentity(name="mutated", version="1")))
    config = setting.params().serve.model_copy(
        update={"max_side_px": MAX_SIDE_PX, "deadline_s": SLOWEST_S}
    )
    # A fault that the application does not catch comes out as the 500 that a caller would get.
    transport = httpx.ASGITransport(build_app(source, config), raise_app_exceptions=False)
    pool, statuses, slowest = shared_pool(MAX_SIDE_PX), Counter[int](), 0.0
    whole = _whole(seeds)
    async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as http:
        first = await _ask(http, whole)
        for request in mutated(seeds, WARM, first=REQUESTS):
            await _ask(http, request)
        for number in range(SIZES):
            assert (await _ask(http, _sized(64 + number, 96 + 2 * number)))[0] == 200
        before, replaced = _memory_mb(pool), pool.replaced
        waiting = enumerate(mutated(seeds, REQUESTS))

        async def caller() -> None:
            nonlocal slowest
            for number, request in waiting:  # shared: each takes the next
                began = time.perf_counter()
                status = (await _ask(http, request))[0]
                took = time.perf_counter() - began
                slowest = max(slowest, took)
                if took > SLOWEST_S:
                    status = max(status, 504)
                statuses[status] += 1
                if status >= 500:
                    print(f"request {number} ({request.kind}): {status}", flush=True)

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
        after, last = _memory_mb(pool), await _ask(http, whole)
    return {
        "mutated_uploads": sum(statuses.values()),
        "mutated_5xx": sum(count for status, count in statuses.items() if status >= 500),
        "mutated_4xx": sum(count for status, count in statuses.items() if 400 <= status < 500),
        "mutated_200": statuses[200],
        "slowest_s": slowest,
        "decoders_replaced": pool.replaced - replaced,
        "memory_before_mb": before,
        "memory_after_mb": after,
        "whole_after_ok": float(first == last and first[0] == 200),
    }


async def _ask(http: httpx.AsyncClient, request: Mutated) -> tuple[int, bytes]:
    headers = {name: value.encode() for name, value in request.headers.items()}
    answer = await http.post(
        request.path, content=request.body, headers=headers, timeout=3 * SLOWEST_S
    )
    return answer.status_code, answer.content


def _whole(seeds: dict[str, list[bytes]]) -> Mutated:
    body = form({"sar": seeds["sar"][1]}, [("steps", "1"), ("target", "dem")])
    return Mutated("none", *_WHERE, body)


def _sized(height: int, width: int) -> Mutated:
    """A lawful request, from nothing."""
    numbers = {"height": height, "width": width, "steps": 1}
    body = form({}, [("target", "dem"), *((name, str(n)) for name, n in numbers.items())])
    return Mutated("none", *_WHERE, body)


def _memory_mb(pool: DecoderPool) -> float:
    """Resident memory of this process and its decoders."""
    gc.collect()
    found = 0
    for pid in (os.getpid(), *pool.pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(pid).memory_info().rss
    return found / 1e6


def _compare(content: bytes) -> dict[str, float]:
    """One file read by a decoder and here, in turn."""
    pool = DecoderPool(512 * 2**20)

    def read(decoder: Decoder) -> None:
        decoder.pixels(content, "it", decoder.header(content, "it"), None)

    def elsewhere() -> None:
        with pool.decoder() as decoder:
            read(decoder)

    try:
        elsewhere()  # until both are warm
        elsewhere()
        sides = {"decoder": elsewhere, "in_process": lambda: read(InProcess())}
        seconds = setting.take_turns(sides, REPEATS)
    finally:
        pool.close()
    added = [a - b for a, b in zip(seconds["decoder"], seconds["in_process"], strict=True)]
    return {
        "decoder_p50_ms": statistics.median(seconds["decoder"]) * 1e3,
        "in_process_p50_ms": statistics.median(seconds["in_process"]) * 1e3,
        "decoder_added_ms": statistics.median(added) * 1e3,
    }
