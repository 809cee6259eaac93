"""Long jobs: the interface over ASGI, with a real model, database and files.

What the store promises is tested with SQLite, and with a PostgreSQL where its server is installed.
"""

import asyncio
import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving_fixtures import ask, form, geotiff, make_layer, make_source, refused, serve_config

from mm_model.api import JobInfo, JobState, Provenance
from mm_model.client import AsyncClient, Client
from mm_model.data import raster
from mm_model.errors import OverloadedError, RequestError, ServiceError, StorageError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES
from mm_model.serving.access import KeyScope, new_key, parse_keys
from mm_model.serving.app import build_app
from mm_model.serving.jobs import store as job_store
from mm_model.serving.jobs import worker as job_worker
from mm_model.serving.jobs.routes import JobsPlace
from mm_model.serving.jobs.store import JobStore
from mm_model.serving.jobs.worker import Worker
from mm_model.serving.metrics import Metrics
from mm_model.serving.requests import SceneRequest
from mm_model.serving.scenes import write_scene

SOURCE = make_source(max_side_px=96)
CONFIG = serve_config(max_side_px=96)
# Larger than one request may be, and than a strip that is copied at once.
GRID = Grid("EPSG:32633", (10.0, 0.0, 500_030.0, 0.0, -10.0, 4_999_950.0), 300, 44)


def endpoint(folder: Path, database: str = "", **more):
    return build_app(SOURCE, CONFIG, jobs=JobsPlace(folder, database, "mm-test"), **more)


def create(app, files=None, headers=None, **fields):
    (response,) = ask(app, form(files, headers, "/v1/jobs", **{"steps": 1, **fields}))
    return response


def get(app, path, method="GET", headers=None):
    (response,) = ask(app, (method, path, {"headers": headers or {}}))
    return response


def ended(app, job_id: str) -> JobInfo:
    give_up = time.monotonic() + 240
    while True:
        job = JobInfo.model_validate_json(get(app, f"/v1/jobs/{job_id}").content)
        if job.state in (JobState.DONE, JobState.FAILED):
            return job
        assert time.monotonic() < give_up, job
        time.sleep(0.2)


def library(folder: Path, contents: dict[str, bytes], **asked) -> bytes:
    folder.mkdir()
    files = {name: folder / f"in_{name}.tif" for name in contents}
    for name, content in contents.items():
        files[name].write_bytes(content)
    request = SceneRequest(files, **{"steps": 1, **asked})
    larger = make_source(max_side_px=2048).served
    (path,) = write_scene(larger.generator, request, larger.identity, folder / "out")
    return path.read_bytes()


def test_a_job_makes_of_a_large_scene_what_the_library_makes(tmp_path, database):
    app, sar = endpoint(tmp_path / "jobs", database), geotiff("sar", GRID)
    response = create(app, {"sar": sar}, target="dem", seed=3)
    assert response.status_code == 201, response.text
    job = JobInfo.model_validate_json(response.content)
    path = f"/v1/jobs/{job.id}"
    assert response.headers["location"] == path
    done = ended(app, job.id)
    assert (done.state, done.progress, done.problem, done.attempt) == (JobState.DONE, 1, None, 1)
    result = get(app, f"{path}/result")
    assert result.content == library(tmp_path / "lib", {"sar": sar}, targets=("dem",), seed=3)
    assert Provenance.from_headers(result.headers).seed == 3
    assert not (tmp_path / "jobs" / job.id / "uploads").exists()
    assert get(app, path, "DELETE").status_code == 204
    refused(get(app, path), 404, "request")
    assert not (tmp_path / "jobs" / job.id).exists()


def test_what_is_wrong_is_said_at_once_or_by_the_job(tmp_path):
    app = endpoint(tmp_path / "jobs")
    sar = geotiff("sar", GRID)
    refused(create(app, {"sar": sar}, target="sar"), 422, "request")
    refused(create(app, {"sar": geotiff("rgb", GRID)}, target="dem"), 422, "layer")
    refused(create(app, {"sar": b"no TIFF"}, target="dem"), 415, "media_type")
    refused(create(app, {"../sar": sar}, target="dem"), 422, "unknown_modality")
    far = geotiff("rgb", Grid(GRID.crs, (10.0, 0.0, 300_000.0, 0.0, -10.0, 4_000_000.0), 28, 44))
    refused(create(app, {"sar": sar, "rgb": far}, target="dem"), 422, "georeference")
    assert [p.name for p in (tmp_path / "jobs").iterdir() if p.is_dir()] == []
    layer = make_layer("sar", GRID)
    power = raster.encode_geotiff(
        10 ** (layer.values / 10), GRID, MODALITIES["sar"].band_names, nodata=None, tags={}
    )
    job = ended(app, create(app, {"sar": power}, target="dem").json()["id"])
    assert job.state is JobState.FAILED
    assert "linear power" in job.problem.remedy
    refused(get(app, f"/v1/jobs/{job.id}/result"), 409, "request")
    refused(create(app, {"sar": sar[: len(sar) // 2]}, target="dem"), 415, "media_type")


def test_a_job_that_takes_too_long_ends_and_says_so(tmp_path):
    jobs = CONFIG.jobs.model_copy(update={"max_hours": 1e-7})
    hasty = CONFIG.model_copy(update={"jobs": jobs})
    app = build_app(SOURCE, hasty, jobs=JobsPlace(tmp_path / "jobs", "", "mm-test"))
    job = ended(app, create(app, {"sar": geotiff("sar", GRID)}, target="dem").json()["id"])
    assert job.state is JobState.FAILED
    assert job.problem.code == "deadline"
    assert job.problem.allowed == "1e-07 h (serve.jobs.max_hours)"
    assert not list((tmp_path / "jobs" / job.id).glob("*"))


def test_jobs_belong_to_keys(tmp_path):
    one, line_one = new_key("one", frozenset({KeyScope.GENERATE}))
    two, line_two = new_key("two", frozenset({KeyScope.GENERATE}))
    app = endpoint(tmp_path / "jobs", keys=parse_keys(f"{line_one}\n{line_two}", "keys"))
    mine, other = ({"Authorization": f"Bearer {key}"} for key in (one, two))
    job = create(app, {}, mine, target="dem", width=16, height=16).json()
    path = f"/v1/jobs/{job['id']}"
    assert get(app, path, headers=mine).status_code == 200
    for method, below in (("GET", path), ("GET", f"{path}/result"), ("DELETE", path)):
        refused(get(app, below, method, other), 404, "request")
        refused(get(app, below, method), 401, "unauthenticated")


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL of our own."""
    pytest.importorskip("psycopg")
    tools = {name: shutil.which(name) for name in ("initdb", "postgres")}
    if None in tools.values():
        pytest.skip("no PostgreSQL server is installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # It refuses to run as root, and nobody else may look into pytest's folders.
    with tempfile.TemporaryDirectory(prefix="mm-pg-", ignore_cleanup_errors=True) as name:
        user = "nobody" if os.getuid() == 0 else None
        if user:
            shutil.chown(name, user)
        data = f"{name}/data"
        made = [tools["initdb"], "-D", data, "-U", "mm", "-A", "trust", "--no-sync"]
        subprocess.run(made, user=user, cwd=name, check=True, capture_output=True)
        command = [tools["postgres"], "-D", data, "-p", str(port), "-k", name, "-F"]
        server = subprocess.Popen([*command, "-h", "127.0.0.1"], user=user, cwd=name)
        try:
            url = f"postgresql+psycopg://mm@127.0.0.1:{port}/postgres"
            give_up = time.monotonic() + 60
            while True:
                try:
                    JobStore(url, "is it there").close()
                    break
                except ServiceError:
                    assert time.monotonic() < give_up
                    time.sleep(0.1)
            yield url
        finally:
            server.send_signal(signal.SIGINT)  # at once, whoever is connected
            server.wait(60)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    return request.getfixturevalue("postgres")


@pytest.fixture
def store(database):
    found = JobStore(database, f"mm-test-{time.time_ns()}")
    yield found
    found.close()


def test_a_job_is_held_by_one_and_passed_on_when_that_one_falls_silent(store, monkeypatch):
    store.add("a" * 32, "", [("seed", "1")], [], 0)
    monkeypatch.setattr(job_store, "LEASE_S", -1.0)  # it is over as soon as it begins
    first = store.claim()
    second = store.claim()
    assert (first.attempt, second.attempt) == (1, 2)
    assert not store.renew(first, 1, 2)
    assert not store.finish(first, {"file": "first"}, 1, 60)
    assert store.renew(second, 1, 2)
    monkeypatch.undo()
    assert store.renew(second, 1, 2)
    assert store.claim() is None
    assert store.finish(second, {"file": "second"}, 1, 60)
    assert store.get("a" * 32).result == {"file": "second"}


def test_many_who_ask_for_work_at_once_never_hold_one_job_together(store):
    ids = {f"{number:032}" for number in range(12)}
    for job_id in ids:
        store.add(job_id, "", [], [], 0)
    held, lock = [], threading.Lock()

    def ask() -> None:
        while True:
            job = store.claim()
            with lock:
                if job is None:
                    # Somebody was faster with each that was free when it looked.
                    if len(held) == len(ids):
                        return
                    continue
                held.append(job.id)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert sorted(held) == sorted(ids)


def test_a_database_that_is_away_is_said_to_be(tmp_path):
    with pytest.raises(ServiceError, match="jobs' database does not answer"):
        JobStore("postgresql+psycopg://mm@127.0.0.1:9/postgres?connect_timeout=2", "mm-test")
    found = JobStore(f"sqlite:///{tmp_path}/jobs.db", "mm-test")
    found.close()
    (tmp_path / "jobs.db").write_bytes(b"no database" * 100)
    with pytest.raises(ServiceError, match="jobs' database does not answer"):
        found.get("a" * 32)


def test_a_full_disk_is_a_problem_and_leaves_nothing(tmp_path):
    """A limit on the size of a file stands for the disk."""
    app, sar = endpoint(tmp_path / "jobs"), geotiff("sar", GRID)
    large = geotiff("sar", Grid(GRID.crs, GRID.transform, 600, 500))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(sar) - 1, before[1]))
    try:
        kept = create(app, {"sar": sar}, target="dem")  # small enough to stay in memory till then
        spooled = create(app, {"sar": large}, target="dem")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for response in (kept, spooled):
        assert "what was sent" in refused(response, 507, "storage").detail
    assert [p.name for p in (tmp_path / "jobs").iterdir() if p.is_dir()] == []
    assert ended(app, create(app, {"sar": sar}, target="dem").json()["id"]).problem is None


def test_a_full_database_says_so(tmp_path):
    found = JobStore(f"sqlite:///{tmp_path}/jobs.db", "mm-test")
    with found._engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 10")
    with pytest.raises(StorageError, match="no room in the jobs' database"):
        found.add("a" * 32, "", [("crs", "x" * 100_000)], [], 0)
    found.close()


def test_a_job_that_ends_every_process_is_given_up(tmp_path, store, monkeypatch):
    store.add("b" * 32, "", [("target", "dem"), ("width", "32"), ("height", "24")], [], 0)
    with monkeypatch.context() as silent:
        silent.setattr(job_store, "LEASE_S", -1.0)
        assert [store.claim().attempt for _ in range(job_store.MAX_ATTEMPTS)] == [1, 2, 3]
    worker = Worker(store, tmp_path, SOURCE, CONFIG.jobs, counted := Metrics())
    worker.start()
    try:
        give_up = time.monotonic() + 60
        while (job := store.get("b" * 32)).state is not JobState.FAILED:
            assert time.monotonic() < give_up
            time.sleep(0.1)
    finally:
        worker.close()
    assert job.problem.code == "service"
    assert job.problem.got == "3 times"
    assert figures(counted)["mm_job_seconds_count", "service"] == 1


def figures(counted: Metrics) -> dict[tuple[str, str], float]:
    """Of jobs: name and label → value."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in counted.snapshot(SOURCE)
        for sample in family.samples
        if sample.name.startswith("mm_job") and "le" not in sample.labels
    }


def test_figures_tell_of_jobs_that_wait_run_and_have_ended(tmp_path, store):
    fields = [("target", "dem"), ("width", "400"), ("height", "300"), ("steps", "4")]
    ids = [uuid.uuid4().hex for _ in range(3)]
    for job_id in ids:
        store.add(job_id, "", fields, [], 0)
    worker = Worker(store, tmp_path, SOURCE, CONFIG.jobs, counted := Metrics())
    worker.start()
    give_up = time.monotonic() + 120

    def wait_for(name: str, label: str, value: float) -> None:
        while figures(counted).get((name, label)) != value:
            assert time.monotonic() < give_up, figures(counted)
            time.sleep(0.1)

    try:
        wait_for("mm_jobs", "running", 1)
        wait_for("mm_jobs", "queued", 2)
        assert 0 < figures(counted)["mm_job_wait_seconds", ""] < 120
        store.delete(ids[2])
        wait_for("mm_job_seconds_count", "done", 1)
        wait_for("mm_jobs", "queued", 0)
        wait_for("mm_jobs", "running", 1)
        assert figures(counted)["mm_job_wait_seconds", ""] == 0
        store.delete(ids[1])
        wait_for("mm_job_seconds_count", "cancelled", 1)
        wait_for("mm_jobs", "running", 0)
    finally:
        worker.close()
    assert counted.pixels.labels("dem")._value.get() == 400 * 300


def test_there_is_room_for_so_many_jobs_and_bytes_of_each_owner(store):
    store.add("c" * 32, "one", [], [], 100)
    with pytest.raises(OverloadedError, match="unfinished"):
        store.check_room("one", 1, 1000)
    with pytest.raises(OverloadedError, match="bytes"):
        store.check_room("one", 2, 150, 51)
    store.check_room("one", 2, 150, 50)
    store.check_room("two", 1, 100)


@pytest.mark.parametrize("processes", [1, 2])
def test_owners_take_turns(database, processes):
    """However many jobs one has queued before, and although what has ended is deleted."""
    model = uuid.uuid4().hex
    stores = [JobStore(database, model) for _ in range(processes)]
    for owner in ["one"] * 4 + ["two", "three"]:
        stores[0].add(uuid.uuid4().hex, owner, [], [], 0)
    owners = []
    for turn in range(4):
        job = stores[turn % processes].claim()
        owners.append(job.owner)
        if processes == 1:  # none runs when the next one is begun; with two, all do
            assert stores[0].finish(job, {}, 0, 60)
            assert stores[0].delete(job.id) is JobState.DONE
    for store in stores:
        store.close()
    assert owners == ["one", "two", "three", "one"]


def test_who_deletes_a_job_learns_how_it_stood(store):
    """Told by the database that deletes it: whoever looked before may have seen another state."""
    ids = [uuid.uuid4().hex for _ in range(2)]
    for job_id in ids:
        store.add(job_id, "", [], [], 0)
    running = store.claim()
    assert store.delete(ids[1]) is JobState.QUEUED
    assert store.delete(running.id) is JobState.RUNNING
    assert store.delete(running.id) is None


def test_a_job_that_ends_as_it_is_deleted_leaves_nothing(tmp_path, monkeypatch):
    app, real = endpoint(tmp_path / "jobs"), JobStore.delete

    def delete(store, job_id):
        while store.get(job_id).state is JobState.RUNNING:
            time.sleep(0.05)
        return real(store, job_id)

    monkeypatch.setattr(JobStore, "delete", delete)
    made = create(app, {}, target="dem", width=250, height=240, steps=4).json()
    path = f"/v1/jobs/{made['id']}"
    while get(app, path).json()["state"] == "queued":
        continue
    assert get(app, path, "DELETE").status_code == 204
    assert not (tmp_path / "jobs" / made["id"]).exists()


def test_a_worker_sweeps_again_and_gives_way(tmp_path, store, monkeypatch):
    monkeypatch.setattr(job_worker, "_SWEEP_S", 0.0)
    monkeypatch.setattr(job_worker, "_OLD_S", -1.0)
    worker = Worker(store, tmp_path, SOURCE, CONFIG.jobs, Metrics())
    worker.start()
    try:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            give_up = time.monotonic() + 60
            while (tmp_path / name).exists():
                assert time.monotonic() < give_up
                time.sleep(0.1)
        (thread,) = (t for t in threading.enumerate() if t is worker._thread)
        mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        assert os.getpriority(os.PRIO_PROCESS, thread.native_id) > mine
    finally:
        worker.close()


def test_what_one_worker_leaves_the_next_one_does(tmp_path, store):
    folder, jobs = tmp_path / "files", CONFIG.jobs
    fields = [("target", "dem"), ("width", "400"), ("height", "400"), ("steps", "2")]
    store.add("d" * 32, "", fields, [], 0)
    folder.mkdir()
    first = Worker(store, folder, SOURCE, jobs, Metrics())
    first.start()
    while store.get("d" * 32).done == 0:
        time.sleep(0.05)
    first.close()
    left = store.get("d" * 32)
    assert (left.state, left.attempt) == (JobState.QUEUED, 0)
    second = Worker(store, folder, SOURCE, jobs, Metrics())
    second.start()
    try:
        while store.get("d" * 32).state is not JobState.DONE:
            time.sleep(0.1)
        store.delete("d" * 32)
    finally:
        second.close()


def test_a_deleted_job_ends_and_leaves_nothing(tmp_path):
    app = endpoint(tmp_path / "jobs")
    made = create(app, {}, target="dem", width=2000, height=2000, steps=64).json()
    path = f"/v1/jobs/{made['id']}"
    give_up = time.monotonic() + 60
    while get(app, path).json()["state"] == "queued":
        assert time.monotonic() < give_up
    assert get(app, path, "DELETE").status_code == 204
    while (tmp_path / "jobs" / made["id"]).exists():
        assert time.monotonic() < give_up
        time.sleep(0.2)
    refused(get(app, path), 404, "request")


class InProcess(httpx.BaseTransport):
    """The real application behind a synchronous client."""

    def __init__(self, app):
        self._app = app

    def handle_request(self, request):
        request.read()
        headers = {k: v for k, v in request.headers.items() if k != "host"}
        sent = {"content": request.content, "headers": headers}
        (answer,) = ask(self._app, (request.method, request.url.path, sent))
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


def test_the_client_fills_and_keeps_jobs(tmp_path):
    app, dem = endpoint(tmp_path / "jobs"), tmp_path / "holes.tif"
    dem.write_bytes(geotiff("dem"))
    with Client("http://test", transport=InProcess(app)) as client:
        filled = client.fill("dem", {"dem": dem}, seed=2, steps=1)
        job = client.start_job({"dem": dem}, fill="dem", seed=2, steps=1)
        while client.job(job.id).state is not JobState.DONE:
            time.sleep(0.2)
        path = client.save_result(job.id, tmp_path / "out")
        assert {path.name: path.read_bytes()} == filled.files
        client.delete_job(job.id)
        with pytest.raises(RequestError, match="no such job"):
            client.job(job.id)
        with pytest.raises(RequestError, match="no such job"):
            client.save_result(job.id, tmp_path / "out")
        # On a declared grid: the same place at twice the distance, 24 x 17 pixels of it.
        asked = {"samples": 1, "steps": 1}
        header = raster.read_header(dem)
        a, b, c, d, e, f = header.grid.transform
        coarse = {"transform": (2 * a, b, c, d, 2 * e, f), "crs": header.grid.crs}
        job = client.start_job({"dem": dem}, ["sar"], height=24, width=17, **coarse, **asked)
        while client.job(job.id).state is not JobState.DONE:
            time.sleep(0.2)
        there = raster.read_header(client.save_result(job.id, tmp_path / "out")).grid
        assert (there.shape, there.transform) == ((24, 17), coarse["transform"])
        asked = {"samples": 2, "steps": 1, "uncertainty": True}
        made = client.generate({"dem": dem}, ["sar"], **asked)

    async def ask_again():
        transport = httpx.ASGITransport(app)
        async with AsyncClient("http://test", transport=transport) as client:
            return await client.generate({"dem": dem}, ["sar"], **asked)

    assert set(made.files) == {"sar_0.tif", "sar_1.tif", "sar_uncertainty.tif"}
    assert asyncio.run(ask_again()).files == made.files
