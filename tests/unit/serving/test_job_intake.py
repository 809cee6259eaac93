"""Uploads of jobs: how many at once, for whom there is room, how slow they may be."""

import asyncio
import re
import threading
from contextlib import asynccontextmanager, suppress

import httpx
import pytest
from serving_fixtures import GRID, ask, form, geotiff, make_source, refused, serve_config

from mm_model.api import JobInfo, JobState
from mm_model.geo.grid import Grid
from mm_model.serving.access import KeyScope, new_key, parse_keys
from mm_model.serving.app import build_app
from mm_model.serving.jobs import intake
from mm_model.serving.jobs.routes import JobsPlace
from mm_model.serving.jobs.store import JobStore

SOURCE = make_source(max_side_px=96)
ONE, LINE_ONE = new_key("one", frozenset({KeyScope.GENERATE}))
TWO, LINE_TWO = new_key("two", frozenset({KeyScope.GENERATE}))
KEYS = parse_keys(f"{LINE_ONE}\n{LINE_TWO}", "keys")
JOBS = {
    "max_side_px": 2048,
    "max_memory_mb": 1024,
    "max_upload_mb": 64,
    "max_stored_mb": 256,
    "keep_hours": 1,
    "max_hours": 1,
}


def endpoint(folder, keys=(), max_per_key=None, **limits):
    jobs = {**JOBS, "max_jobs": 8, **limits}
    config = serve_config(max_side_px=96, max_per_key=max_per_key, jobs=jobs)
    return build_app(SOURCE, config, dict(keys), JobsPlace(folder, "", "mm-test"))


class Uploads:
    """Posts of a job that stop half way until `opened` is set."""

    def __init__(self, http):
        self._http, self.opened, self._stopped = http, asyncio.Event(), 0
        method, path, parts = form({"sar": geotiff("sar")}, path="/v1/jobs", target="dem", steps=1)
        self.request = http.build_request(method, path, files=parts["files"])

    async def body(self, is_held):
        content = await self.request.aread()
        yield content[:200]
        if is_held:
            self._stopped += 1
            await self.opened.wait()
        yield content[200:]

    def send(self, key=None, is_held=False, declared=True):
        headers = {"Content-Type": self.request.headers["content-type"]}
        if declared:
            headers["Content-Length"] = self.request.headers["content-length"]
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return self._http.post("/v1/jobs", content=self.body(is_held), headers=headers)

    async def hold(self, *keys, declared=True):
        """Posts that have stopped half way."""
        before = self._stopped
        tasks = [asyncio.create_task(self.send(key, True, declared)) for key in keys]
        while self._stopped < before + len(keys):
            assert not any(task.done() for task in tasks), [task.result().text for task in tasks]
            await asyncio.sleep(0.01)
        return tasks


@asynccontextmanager
async def client(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        asyncio.timeout(120),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http,
    ):
        yield http


def test_an_upload_of_a_job_takes_a_place_of_its_key(tmp_path):
    async def run():
        async with client(endpoint(tmp_path, KEYS, max_per_key=2)) as http:
            uploads = Uploads(http)
            mine = await uploads.hold(ONE, ONE)
            third, theirs = await uploads.send(ONE), await uploads.send(TWO)
            uploads.opened.set()
            return third, [theirs.status_code, *[(await task).status_code for task in mine]]

    third, answered = asyncio.run(run())
    assert "API key one" in refused(third, 429, "overloaded").detail
    assert answered == [201, 201, 201]


def test_uploads_leave_a_replica_to_others(tmp_path):
    """Few at once, whoever sends them; one that ended, well or not, makes place."""

    async def run():
        async with client(endpoint(tmp_path)) as http:
            uploads = Uploads(http)
            held = await uploads.hold(*[None] * intake.MAX_UPLOADS)
            more, alive = await uploads.send(), await http.get("/healthz")
            held[0].cancel()
            await asyncio.wait([held[0]])
            held[:1] = await uploads.hold(None)
            uploads.opened.set()
            return more, alive, [(await task).status_code for task in held]

    more, alive, answered = asyncio.run(run())
    problem = refused(more, 429, "overloaded")
    assert problem.allowed == str(intake.MAX_UPLOADS)
    assert more.headers["retry-after"]
    assert alive.status_code == 200
    assert answered == [201] * intake.MAX_UPLOADS


@pytest.mark.parametrize(
    ("limits", "declared", "reason"),
    [({"max_jobs": 1}, True, "unfinished"), ({"max_stored_mb": 100}, False, "bytes")],
)
def test_there_is_room_for_what_is_on_its_way(tmp_path, limits, declared, reason):
    """Of one owner; what does not say how long it is may be as long as any."""

    async def run():
        async with client(endpoint(tmp_path, KEYS, **limits)) as http:
            uploads = Uploads(http)
            mine = await uploads.hold(ONE, declared=declared)
            another = await uploads.send(ONE, declared=declared)
            theirs = await uploads.send(TWO, declared=declared)
            uploads.opened.set()
            return another, theirs.status_code, (await mine[0]).status_code

    another, *answered = asyncio.run(run())
    assert reason in refused(another, 429, "overloaded").detail
    assert answered == [201, 201]


def test_what_says_how_long_it_is_needs_no_more_room(tmp_path):
    async def run():
        async with client(endpoint(tmp_path, max_stored_mb=65)) as http:
            uploads = Uploads(http)
            (unknown,) = await uploads.hold(None, declared=False)
            known = await uploads.send()
            uploads.opened.set()
            return known.status_code, (await unknown).status_code

    assert asyncio.run(run()) == (201, 201)


@pytest.mark.parametrize("drips", [False, True])
def test_a_body_that_hardly_comes_gives_its_place_back(tmp_path, monkeypatch, drips):
    async def slow(whole):
        yield (await whole.aread())[:200]
        while True:
            if drips:
                yield b"-"
            await asyncio.sleep(0.01)

    async def run():
        async with client(endpoint(tmp_path)) as http:
            whole = Uploads(http).request
            headers = {"Content-Type": whole.headers["content-type"], "Content-Length": "90000"}
            with monkeypatch.context() as hurry:
                hurry.setattr(intake, "_PAUSE_S", 0.1)
                posts = [
                    http.post("/v1/jobs", content=slow(whole), headers=headers) for _ in range(4)
                ]
                ended = await asyncio.gather(*posts)
            return ended, await Uploads(http).send()

    ended, later = asyncio.run(run())
    for answer in ended:
        assert "slowly" in refused(answer, 504, "deadline").detail
    assert later.status_code == 201


def test_a_job_that_is_queued_keeps_its_files_whoever_leaves(tmp_path, monkeypatch):
    real, added, left = JobStore.add, threading.Event(), threading.Event()

    def add(store, *job):
        kept = real(store, *job)
        added.set()
        assert left.wait(60)
        return kept

    app = endpoint(tmp_path)

    async def run():
        async with client(app) as http:
            with monkeypatch.context() as slow:
                slow.setattr(JobStore, "add", add)
                post = asyncio.create_task(Uploads(http).send())
                await asyncio.to_thread(added.wait, 60)
                post.cancel()
                with suppress(asyncio.CancelledError):
                    await post
                left.set()
            (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
            await Uploads(http).send()  # it starts the worker, as there is no lifespan here
            while True:
                shown = await http.get(f"/v1/jobs/{folder.name}")
                job = JobInfo.model_validate_json(shown.content)
                if job.state in (JobState.DONE, JobState.FAILED):
                    return job
                await asyncio.sleep(0.1)

    job = asyncio.run(run())
    assert (job.state, job.problem) == (JobState.DONE, None)


def test_a_job_that_memory_does_not_hold_is_refused_and_told_what_would_fit(tmp_path):
    """By its form, or by the header of its file."""
    app = endpoint(tmp_path, max_memory_mb=24)
    wide = {"width": 2000, "height": 48, "target": "map", "path": "/v1/jobs"}
    sar = {"sar": geotiff("sar", Grid(GRID.crs, GRID.transform, 48, 2000))}
    told = {"target": "map", "path": "/v1/jobs"}
    many, read, few = ask(
        app, form(steps=64, **wide), form(sar, steps=64, **told), form(steps=1, **wide)
    )
    assert few.status_code == 201, few.text
    for answer in (many, read):
        problem = refused(answer, 413, "too_large")
        assert problem.got.endswith("for 2000 px and 64 steps")
        assert problem.allowed == "24 MiB (serve.jobs.max_memory_mb)"
    steps, width = map(int, re.findall(r"\d+", problem.remedy))
    again = [{"steps": steps}, {"steps": steps + 1}, {"steps": 64, "width": width}]
    fits, over, narrow = ask(app, *(form(**{**wide, **asked}) for asked in again))
    assert (fits.status_code, narrow.status_code) == (201, 201)
    refused(over, 413, "too_large")


def test_what_is_too_long_for_a_request_is_sent_to_jobs(tmp_path):
    """And to nowhere else where it is too long for those."""
    app = endpoint(tmp_path, max_upload_mb=1)
    wide = {"width": 128, "height": 16, "target": "dem"}
    long = {"content": b"", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}
    long["headers"]["Content-Length"] = str(10**9)
    sides, body, job = ask(
        app, form(**wide), ("POST", "/v1/generate", long), ("POST", "/v1/jobs", long)
    )
    for answer in (sides, body):
        assert "POST /v1/jobs" in refused(answer, 413, "too_large").remedy
    assert "jobs" not in refused(job, 413, "too_large").remedy
