"""The jobs' part of the HTTP interface."""

from __future__ import annotations

import asyncio
import datetime as dt
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastapi import FastAPI, Request, Response
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse

from mm_model.api import TIFF, ZIP, JobInfo, JobState, each
from mm_model.config import ServeConfig
from mm_model.data.raster import RasterHeader
from mm_model.serving import openapi
from mm_model.serving.access import holder_of
from mm_model.serving.batching import ModelSource, Served
from mm_model.serving.copies import check_file
from mm_model.serving.forms import limited_form
from mm_model.serving.jobs.intake import Intake, expected_bytes, steady
from mm_model.serving.jobs.needs import check_disk, check_memory, disk_bytes, grid_of
from mm_model.serving.jobs.store import Job, JobStore
from mm_model.serving.jobs.worker import UPLOADS, Worker, for_scenes, parse
from mm_model.serving.metrics import Metrics
from mm_model.serving.overlay import labelled
from mm_model.serving.uploads import JOB_FIELDS


@dataclass(frozen=True)
class JobsPlace:
    """Where jobs are kept.

    Attributes:
        folder: of their files, the same for every replica.
        url: of their database; SQLite in the folder by default.
        model: whose jobs they are.
    """

    folder: Path
    url: str = ""
    model: str = ""

    @property
    def database(self) -> str:
        return self.url or f"sqlite:///{self.folder / 'jobs.db'}"


class Jobs:
    """The operations on jobs.

    Args:
        place: where they are kept; None: this endpoint takes none.
        source: says which model serves.
        config: of the endpoint.
        served: gives the model that serves, or raises NotReadyError.
        counted: where its worker counts.
    """

    def __init__(
        self,
        place: JobsPlace | None,
        source: ModelSource,
        config: ServeConfig,
        served: Callable[[], Served],
        counted: Metrics,
    ) -> None:
        self._config, self._served, self._intake = config.jobs, served, Intake()
        self._room = (config.jobs.max_jobs, config.jobs.max_stored_mb * 2**20)
        self._store: JobStore | None = None
        if place is not None:
            place.folder.mkdir(parents=True, exist_ok=True)
            self._folder = place.folder
            self._store = JobStore(place.database, place.model)
            self._worker = Worker(self._store, place.folder, source, config.jobs, counted)

    def add_routes(self, app: FastAPI, config: ServeConfig) -> None:
        """The paths below /v1/jobs."""
        made: dict[int | str, dict[str, Any]] = {201: {"description": "The job", "model": JobInfo}}
        refused = openapi.problems(400, 401, 403, 413, 415, 422, 429, 503, 504, 404, 507)
        found = openapi.problems(401, 403, 404, 503)
        app.post(
            "/v1/jobs",
            status_code=201,
            summary="Generate or fill a scene of any size",
            description="Takes the form of generate, or of fill, and answers at once.",
            operation_id="create_job",
            response_model=JobInfo,
            responses={**made, **refused},
            openapi_extra={
                "requestBody": openapi.request_body(
                    config, JOB_FIELDS, max_side_px=config.jobs.max_side_px
                )
            },
        )(self.create)
        app.get(
            "/v1/jobs/{job_id}",
            summary="How far a job is",
            operation_id="job",
            responses={**found},
        )(self.show)
        media: dict[str, Any] = {TIFF: {"schema": {}}, ZIP: {"schema": {}}}
        app.get(
            "/v1/jobs/{job_id}/result",
            summary="What a job made",
            operation_id="job_result",
            response_class=Response,
            responses={
                200: {"description": "What was generated", "content": media},
                **openapi.problems(401, 403, 404, 409, 503),
            },
        )(self.result)
        app.delete(
            "/v1/jobs/{job_id}",
            status_code=204,
            summary="Cancel a job and forget what it made",
            operation_id="delete_job",
            response_class=Response,
            responses={**found, **openapi.problems(507)},
        )(self.delete)

    def start(self) -> None:
        if self._store is not None:
            self._worker.start()

    def close(self) -> None:
        if self._store is not None:
            self._worker.close()
            self._store.close()

    async def create(self, request: Request) -> Response:
        store, owner, served = self._open(), holder_of(request.scope), self._served()
        max_bytes = self._config.max_upload_mb * 2**20
        job_id = uuid.uuid4().hex
        expected = expected_bytes(request.headers, max_bytes)
        with self._intake.place(owner, expected) as ahead:
            more = (ahead.byte_count + expected, ahead.jobs)
            await asyncio.to_thread(store.check_room, owner, *self._room, *more)
            body = Request(request.scope, steady(request.receive))
            async with limited_form(body, max_bytes, "send it in tiles") as form:
                job = await asyncio.to_thread(self._keep, form, store, served, owner, job_id)
        self._worker.start()
        where = f"{request.scope.get('root_path', '')}/v1/jobs/{job_id}"
        return JSONResponse(info_of(job).model_dump(mode="json"), 201, {"Location": where})

    def _keep(
        self, form: FormData, store: JobStore, served: Served, owner: str, job_id: str
    ) -> Job:
        """Check a form, and put it where a worker finds it; nothing of it stays if that fails."""
        texts = [(n, v) for n, v in form.multi_items() if isinstance(v, str)]
        sent = [(n, v) for n, v in form.multi_items() if isinstance(v, UploadFile)]
        names = [name for name, _ in sent]
        generator = for_scenes(served.generator, self._config)
        request = parse(texts, names, generator)
        # What a name may be is known now: modalities' names, and no path.
        place = self._folder / job_id
        folder = place / UPLOADS
        stored, headers = 0, dict[str, list[RasterHeader]]()
        with ExitStack() as undo:
            # Here, and not where a caller may leave: what is queued by then keeps its files.
            undo.callback(shutil.rmtree, place, ignore_errors=True)
            folder.mkdir(parents=True)
            for name, paths in each(request.observed).items():
                uploads = [upload for sent_as, upload in sent if sent_as == name]
                for (label, path), upload in zip(labelled(name, paths), uploads, strict=True):
                    stored += _save(upload.file, folder / path.stem)
                    modality = generator.modality(name)
                    header = check_file(folder / path.stem, label, modality, generator)
                    headers.setdefault(name, []).append(header)
            grids = {name: [header.grid for header in of_it] for name, of_it in headers.items()}
            grid = grid_of(request, grids, generator)
            check_memory(request, grid, generator, self._config.max_memory_mb)
            # Room is kept from now on for what it may come to hold.
            stored += disk_bytes(request, grid, headers, generator)
            check_disk(stored, self._room[1])
            store.check_room(owner, *self._room, stored)
            job = store.add(job_id, owner, texts, names, stored)
            undo.pop_all()
        return job

    async def show(self, job_id: str, request: Request) -> JobInfo:
        return info_of(await self._get(job_id, request))

    async def result(self, job_id: str, request: Request) -> Response:
        job = await self._get(job_id, request)
        if job.result is None:
            raise HTTPException(409, f"the job is {job.state}, and has no result")
        found: Mapping[str, Any] = job.result
        path = self._folder / job.id / found["file"]
        return FileResponse(
            path, media_type=found["media_type"], filename=path.name, headers=found["headers"]
        )

    async def delete(self, job_id: str, request: Request) -> Response:
        job = await self._get(job_id, request)
        await asyncio.to_thread(forget, self._open(), self._folder, job.id)
        return Response(status_code=204)

    async def _get(self, job_id: str, request: Request) -> Job:
        """A job of the caller's; another's is not there."""
        store = self._open()
        job = await asyncio.to_thread(store.get, job_id, holder_of(request.scope))
        if job is None:
            raise HTTPException(404, "no such job; it may have expired")
        return job

    def _open(self) -> JobStore:
        if self._store is None:
            raise HTTPException(404, "this endpoint takes no jobs")
        return self._store


def forget(store: JobStore, folder: Path, job_id: str) -> bool:
    """Cancel a job, and remove its files below the folder of all; false if there is no such job."""
    state = store.delete(job_id)
    if state is not JobState.RUNNING:  # else who works on it cleans up
        shutil.rmtree(folder / job_id, ignore_errors=True)
    return state is not None


def _save(source: IO[bytes], path: Path) -> int:
    source.seek(0)
    with path.open("wb") as file:
        shutil.copyfileobj(source, file, 2**20)
        return file.tell()


def info_of(job: Job) -> JobInfo:
    """What is told of a job."""
    progress = job.done / job.work if job.work else 0.0
    left = None
    if job.state is JobState.RUNNING and progress > 0 and job.began_s is not None:
        left = (time.time() - job.began_s) * (1 - progress) / progress
    return JobInfo(
        id=job.id,
        state=job.state,
        progress=1.0 if job.state is JobState.DONE else progress,
        time_left_s=left,
        attempt=job.attempt,
        created_at=_time(job.created_s),
        expires_at=None if job.expires_s is None else _time(job.expires_s),
        problem=job.problem,
    )


def _time(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC)
