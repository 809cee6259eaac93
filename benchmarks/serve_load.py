"""Load on a running endpoint: by number of callers, and far beyond what it can do."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from dataclasses import dataclass, field

import aiohttp
import numpy as np
import psutil

CALLERS = (1, 2, 4, 8, 16, 32, 64)
OVERLOAD = 10
"""Requests that come, over those that the endpoint can answer."""

_MEASURED = ("ServeReplica", "ProxyActor")
_RAMP_SHARE = 0.1  # of the time; what memory is compared with comes after it


@dataclass
class Answers:
    """What came back.

    Attributes:
        seconds: of each answer of success, in the order in which they came.
        statuses: how many of each; 0 stands for a connection without an answer.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q)) if self.seconds else float("nan")


class Load:
    """Sends one and the same patch, with another seed each time.

    Args:
        url: of the endpoint.
        name: the observed modality.
        file: its GeoTIFF.
    """

    def __init__(self, url: str, name: str, file: bytes) -> None:
        self._url, self._name, self._file, self._seed = f"{url}/v1/generate", name, file, 0

    def by_callers(self, seconds: float) -> dict[str, float]:
        """Latency and throughput of so many callers; each asks again once it is answered."""
        figures: dict[str, float] = {}
        for callers in CALLERS:
            answers, took = asyncio.run(self._closed(callers, seconds))
            if set(answers.statuses) - {200, 429}:
                raise RuntimeError(f"{callers} callers got {dict(answers.statuses)}")
            figures |= {
                f"callers_{callers}_{name}_ms": answers.quantile(q) * 1e3
                for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
            }
            figures[f"callers_{callers}_per_s"] = len(answers.seconds) / took
        return figures

    def overload(self, capacity_per_s: float, seconds: float) -> dict[str, float]:
        """Requests at ten times the capacity, whether or not those before are answered.

        Raises:
            RuntimeError: something else came back than 200 and 429.
        """
        answers, memory = asyncio.run(self._open(OVERLOAD * capacity_per_s, seconds))
        others = {s: n for s, n in answers.statuses.items() if s not in (200, 429)}
        if others:
            raise RuntimeError(f"answers other than 200 and 429: {others}")
        return {
            "overload_s": seconds,
            "overload_sent_per_s": sum(answers.statuses.values()) / seconds,
            "overload_accepted_per_s": answers.statuses[200] / seconds,
            "overload_refused_share": answers.statuses[429] / sum(answers.statuses.values()),
            "overload_p50_accepted_s": answers.quantile(0.5),
            "overload_p99_accepted_s": answers.quantile(0.99),
            "overload_rss_growth_mb": memory["ServeReplica"],
            "overload_proxy_rss_growth_mb": memory["ProxyActor"],
        }

    async def _closed(self, callers: int, seconds: float) -> tuple[Answers, float]:
        answers, began = Answers(), time.monotonic()

        async def ask(http: aiohttp.ClientSession) -> None:
            while time.monotonic() < began + seconds:
                if await self._one(http, answers) == 429:
                    await asyncio.sleep(1)  # as Retry-After says

        async with _http() as http:
            await asyncio.gather(*(ask(http) for _ in range(callers)))
        return answers, time.monotonic() - began

    async def _open(self, per_s: float, seconds: float) -> tuple[Answers, dict[str, float]]:
        """Answers, and by which memory in MB has grown since soon after the begin: see `rss_mb`."""
        answers, began, sent = Answers(), time.monotonic(), 0
        before: dict[str, float] = {}
        running: set[asyncio.Task[int]] = set()
        async with _http() as http:
            while (now := time.monotonic() - began) < seconds:
                for _ in range(int(now * per_s) - sent):
                    task = asyncio.create_task(self._one(http, answers))
                    running.add(task)
                    task.add_done_callback(running.discard)
                    sent += 1
                if not before and now > _RAMP_SHARE * seconds:
                    before = rss_mb()
                await asyncio.sleep(0.01)
            after = rss_mb()
            await asyncio.gather(*running)
        return answers, {kind: mb - before.get(kind, mb) for kind, mb in after.items()}

    async def _one(self, http: aiohttp.ClientSession, answers: Answers) -> int:
        self._seed += 1
        form = aiohttp.FormData({"seed": str(self._seed)})
        form.add_field(self._name, self._file, filename=f"{self._name}.tif")
        began = time.monotonic()
        try:
            async with http.post(self._url, data=form) as response:
                await response.read()
        except (aiohttp.ClientError, TimeoutError):
            answers.statuses[0] += 1
            return 0
        answers.statuses[response.status] += 1
        if response.ok:
            answers.seconds.append(time.monotonic() - began)
        elif response.status == 429 and "Retry-After" not in response.headers:
            raise RuntimeError("a 429 without Retry-After")
        return response.status


def rss_mb() -> dict[str, float]:
    """Resident memory of this project's processes in MB, by what Ray Serve calls them."""
    project, found = os.environ["MM_PROJECT"], dict.fromkeys(_MEASURED, 0.0)
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        kind = next((kind for kind in _MEASURED if kind in title), None)
        if kind is None:
            continue
        try:
            if process.environ().get("MM_PROJECT") == project:
                found[kind] += process.memory_info().rss / 1e6
        except psutil.Error:  # it has just ended, or is somebody else's
            continue
    return found


def _http() -> aiohttp.ClientSession:
    # Callers are many people: none waits for a connection of another. Not httpx, which looks
    # through all of its connections for each request.
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300))
