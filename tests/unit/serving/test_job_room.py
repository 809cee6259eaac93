"""Bytes on disk of an owner's jobs: kept free when one is sent, and watched while it runs."""

import time

import pytest
from serving_fixtures import GRID, ask, form, geotiff, make_source, refused, serve_config

from mm_model.api import JobState
from mm_model.data import raster
from mm_model.geo.grid import Grid
from mm_model.serving.app import build_app
from mm_model.serving.jobs.needs import disk_bytes
from mm_model.serving.jobs.routes import JobsPlace
from mm_model.serving.jobs.store import JobStore
from mm_model.serving.jobs.worker import Worker, size_bytes
from mm_model.serving.metrics import Metrics
from mm_model.serving.requests import SceneRequest
from mm_model.serving.scenes import write_scene

SOURCE = make_source(max_side_px=2048)
SMALL = [("target", "dem"), ("width", "16"), ("height", "20"), ("steps", "1")]


def config(max_stored_mb):
    jobs = serve_config().jobs.model_copy(update={"max_stored_mb": max_stored_mb})
    return serve_config(jobs=jobs.model_dump())


def ended(store, job_id):
    give_up = time.monotonic() + 120
    while (job := store.get(job_id)).state not in (JobState.DONE, JobState.FAILED):
        assert time.monotonic() < give_up, job
        time.sleep(0.05)
    return job


@pytest.fixture
def place(tmp_path):
    return JobsPlace(tmp_path / "jobs", "", "mm-test")


def worked_off(place, max_stored_mb, *jobs):
    """The last of jobs (owner, form, bytes that it holds already), which a worker has had."""
    place.folder.mkdir()
    store = JobStore(place.database, place.model)
    worker = Worker(store, place.folder, SOURCE, config(max_stored_mb).jobs, Metrics())
    for number, (owner, fields, held) in enumerate(jobs):
        store.add(job_id := f"{number:032}", owner, fields, [], held)
        if not fields:  # it has ended
            assert store.finish(store.claim(), {}, held, 60)
    worker.start()
    try:
        return ended(store, job_id)
    finally:
        worker.close()
        store.close()


def test_a_job_keeps_room_for_what_it_will_write(place):
    app = build_app(SOURCE, config(12), jobs=place)
    slow = {"target": "dem", "height": 600, "width": 700, "steps": 64, "path": "/v1/jobs"}
    (first,) = ask(app, form(**slow))
    (second,) = ask(app, form(**slow))
    assert first.status_code == 201, first.text
    assert "bytes" in refused(second, 429, "overloaded").detail
    assert ask(app, ("DELETE", first.headers["location"], {}))[0].status_code == 204
    (third,) = ask(app, form(**slow))
    assert third.status_code == 201, third.text
    assert ask(app, ("DELETE", third.headers["location"], {}))[0].status_code == 204


@pytest.mark.parametrize("more", [{"samples": 5}, {"target": "rgb"}, {"width": 1400}])
def test_a_job_that_can_never_have_room_is_refused_at_once(place, more):
    app = build_app(SOURCE, config(12), jobs=place)
    asked = {"target": "dem", "height": 600, "width": 700, "steps": 64, **more}
    (answer,) = ask(app, form(path="/v1/jobs", **asked))
    problem = refused(answer, 413, "too_large")
    assert problem.allowed == "12 MiB (serve.jobs.max_stored_mb)"
    assert not [path for path in place.folder.iterdir() if path.is_dir()]


def test_a_job_that_comes_to_hold_too_much_fails_and_leaves_nothing(place):
    """Long before its last sample."""
    fields = [("target", "rgb"), ("width", "300"), ("height", "320"), ("steps", "2")]
    fields.append(("samples", "16"))
    job = worked_off(place, 1, ("one", fields, 0))
    assert (job.state, job.problem.code, job.stored_bytes) == (JobState.FAILED, "storage", 0)
    assert job.problem.allowed == "1 MiB (serve.jobs.max_stored_mb)"
    assert 0 < job.done < job.work / 2
    assert size_bytes(place.folder / job.id) == 0


@pytest.mark.parametrize(("owner", "state"), [("one", JobState.FAILED), ("two", JobState.DONE)])
def test_what_other_jobs_of_the_owner_hold_counts(place, owner, state):
    """However short a job is."""
    job = worked_off(place, 1, ("one", [], 2**20), (owner, SMALL, 0))
    assert job.state is state
    assert state is JobState.DONE or job.problem.code == "storage"


def test_a_job_that_has_ended_holds_its_result_alone(place):
    several = [field for field in SMALL if field[0] != "target"]
    several += [("target", "map"), ("samples", "2")]
    job = worked_off(place, 64, ("one", several, 50 * 2**20))
    files = [path for path in (place.folder / job.id).rglob("*") if path.is_file()]
    assert [path.name for path in files] == ["generated.zip"]
    assert job.stored_bytes == size_bytes(place.folder / job.id) == files[0].stat().st_size


@pytest.mark.parametrize(
    "more", [{}, {"samples": 2, "uncertainty": True}, {"fill": "sar", "samples": 2}]
)
def test_no_job_writes_more_than_room_is_kept_for(tmp_path, more):
    served, most = SOURCE.served, 0
    grid = Grid(GRID.crs, GRID.transform, 1010, 500)
    path, out = tmp_path / "sar.tif", tmp_path / "out"
    path.write_bytes(geotiff("sar", grid))
    targets = () if "fill" in more else ("map", "rgb")
    request = SceneRequest({"sar": (path,)}, targets, steps=1, **more)

    def look(*_):
        nonlocal most
        most = max(most, size_bytes(out))

    write_scene(served.generator, request, served.identity, out, look)
    look()
    headers = {"sar": [raster.read_header(path)]}
    said = disk_bytes(request, grid, headers, served.generator)
    assert said / 8 < most < said
