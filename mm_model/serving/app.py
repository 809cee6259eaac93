"""The HTTP interface; this module and the jobs' routes know FastAPI."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

import mm_model
from mm_model.api import (
    JSON,
    PNG,
    PROBLEM,
    RETRY_AFTER_S,
    TIFF,
    ZIP,
    Health,
    Limits,
    ModalityInfo,
    ModalityList,
    ModelInfo,
    Origin,
    Problem,
    Provenance,
    SceneOrigin,
    http_problem,
    max_body_bytes,
    problem_of,
)
from mm_model.config import ServeConfig
from mm_model.errors import (
    DeadlineError,
    MMError,
    NotReadyError,
    OverloadedError,
)
from mm_model.serving import metrics, openapi, page
from mm_model.serving.access import Guard, Keys
from mm_model.serving.answers import Answer, answer, embedding_answer, wanted_type
from mm_model.serving.batching import Batcher, ModelSource, Served
from mm_model.serving.decoders import DecoderPool, shared_pool
from mm_model.serving.forms import limited_form
from mm_model.serving.jobs.routes import Jobs, JobsPlace
from mm_model.serving.presence import while_present
from mm_model.serving.requests import Aligned, Prepared
from mm_model.serving.scene_answers import answer_scene
from mm_model.serving.uploads import (
    FIELDS,
    FILL_FIELDS,
    Part,
    read_embed_request,
    read_request,
    wants_uncertainty,
)

_Answering = Callable[[Request, Served], Awaitable[Response]]


def build_app(
    source: ModelSource,
    config: ServeConfig,
    keys: Keys = MappingProxyType({}),
    jobs: JobsPlace | None = None,
) -> FastAPI:
    """The endpoint over a source of models, with the limits of the configuration.

    It takes jobs where it is told where to keep them. Where there are keys, it answers nobody else;
    see `access`.
    """
    endpoint = _Endpoint(source, config, jobs)
    app = FastAPI(
        lifespan=endpoint.lifespan,
        title="mm-model",
        version=mm_model.__version__,
        description=openapi.DESCRIPTION,
        docs_url=None,  # FastAPI's page loads its scripts from elsewhere
        redoc_url=None,
    )
    not_ready = openapi.problems(503)
    app.post("/v1/generate", response_class=Response, **openapi.generate_operation(config))(
        endpoint.generate
    )
    app.post("/v1/fill", response_class=Response, **openapi.fill_operation(config))(endpoint.fill)
    app.post("/v1/embed", response_class=Response, **openapi.embed_operation(config))(
        endpoint.embed
    )
    endpoint.jobs.add_routes(app, config)
    app.get("/v1/model", summary="The version that serves", operation_id="model")(endpoint.model)
    app.get(
        "/v1/modalities",
        summary="What the serving version knows",
        operation_id="modalities",
        responses=not_ready,
    )(endpoint.modalities)
    app.get("/healthz", summary="Alive", operation_id="healthz")(endpoint.healthz)
    app.get("/readyz", summary="A model is loaded", operation_id="readyz", responses=not_ready)(
        endpoint.readyz
    )
    app.get(
        "/metrics",
        summary="Counters, for Prometheus",
        operation_id="metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )(endpoint.metrics_page)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page.render(app.openapi()))

    app.add_middleware(Guard, keys=keys)
    app.add_exception_handler(MMError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    return app


class _Endpoint:
    """The operations, over one source and one queue."""

    def __init__(self, source: ModelSource, config: ServeConfig, jobs: JobsPlace | None) -> None:
        self._source = source
        self.jobs = Jobs(jobs, source, config, self._served)
        self._decoders = shared_pool(config.max_side_px)
        self._metrics = metrics.Metrics()
        self._batcher = Batcher(
            config.max_batch, config.batch_wait_ms / 1000, self._metrics.batch_size.observe
        )
        self._in_progress = 0
        self._limits = Limits(
            max_side_px=config.max_side_px,
            max_samples=config.max_samples,
            max_queued=config.max_queued,
            max_body_bytes=max_body_bytes(config.max_side_px),
            deadline_s=config.deadline_s,
        )

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Decoders are warm before the first request, and jobs of before go on."""
        self._decoders.start()
        self.jobs.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.jobs.close)
            self._decoders.close()

    async def generate(self, request: Request) -> Response:
        return await self._count("generate", request, self._generate)

    async def embed(self, request: Request) -> Response:
        return await self._count("embed", request, self._embed)

    async def fill(self, request: Request) -> Response:
        return await self._count("fill", request, self._fill)

    async def _count(self, operation: str, request: Request, answering: _Answering) -> Response:
        began, status = time.perf_counter(), 500
        try:
            response = await self._admit(request, answering)
            status = response.status_code
            return response
        except MMError as error:
            status = problem_of(error).status
            raise
        except HTTPException as error:
            status = error.status_code
            raise
        except asyncio.CancelledError:
            status = 499  # the caller left; nginx's number for it
            raise
        finally:
            self._metrics.requests.labels(operation, status).inc()
            self._metrics.seconds.labels(operation).observe(time.perf_counter() - began)

    async def _admit(self, request: Request, answering: _Answering) -> Response:
        """Answer if there is room, all within the deadline."""
        served = self._served()
        if self._in_progress >= self._limits.max_queued:
            raise OverloadedError(
                "too many requests are in progress",
                got=self._in_progress,
                allowed=self._limits.max_queued,
                remedy="try again in a second",
            )
        self._in_progress += 1
        self._metrics.in_progress.inc()
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                return await answering(request, served)
        except TimeoutError:
            raise DeadlineError(
                "the answer took too long",
                allowed=f"{self._limits.deadline_s:g} s",
                remedy="ask for a smaller piece, fewer samples or fewer steps",
            ) from None
        finally:
            self._in_progress -= 1
            self._metrics.in_progress.dec()

    async def _generate(self, request: Request, served: Served) -> Response:
        parts = await _read_parts(request, self._limits.max_body_bytes)
        if wants_uncertainty(parts):
            return await self._whole(request, served, parts, FIELDS)
        prepared = await asyncio.to_thread(_prepare, parts, served, self._decoders)
        del parts
        sampling = self._batcher.submit(served.generator.sample, prepared)
        result = await while_present(request, sampling)
        provenance = Provenance(
            **_origin(served, prepared),
            targets=prepared.targets,
            samples=prepared.samples,
            seed=prepared.seed,
            steps=prepared.steps,
        )
        made = await asyncio.to_thread(
            answer,
            result,
            served.generator.modalities,
            provenance,
            picture=_wanted(request, TIFF, ZIP, PNG) == PNG,
        )
        return _response(made, provenance)

    async def _fill(self, request: Request, served: Served) -> Response:
        parts = await _read_parts(request, self._limits.max_body_bytes)
        return await self._whole(request, served, parts, FILL_FIELDS)

    async def _whole(
        self, request: Request, served: Served, parts: list[Part], fields: Mapping[str, str]
    ) -> Response:
        made, provenance = await while_present(
            request, answer_scene(parts, fields, served, self._decoders, self._batcher)
        )
        return _response(made, provenance)

    async def _embed(self, request: Request, served: Served) -> Response:
        parts = await _read_parts(request, self._limits.max_body_bytes)
        prepared = await asyncio.to_thread(_prepare_embedding, parts, served, self._decoders)
        del parts
        embedding = await while_present(
            request, self._batcher.submit(served.generator.scenes, prepared)
        )
        origin = SceneOrigin(
            **_origin(served, prepared), bundle_id=served.generator.manifest.bundle_id
        )
        media_type = _wanted(request, TIFF, JSON, ZIP)
        made = await asyncio.to_thread(embedding_answer, embedding, origin, media_type)
        return _response(made, origin)

    async def model(self) -> ModelInfo:
        served = self._source.served
        return ModelInfo(
            serving=served.identity if served else None,
            modalities=tuple(served.generator.modalities) if served else (),
            refused=self._source.refused,
            registry_error=self._source.registry_error,
            limits=self._limits,
        )

    async def modalities(self) -> ModalityList:
        known = self._served().generator.modalities.values()
        return ModalityList(modalities=tuple(ModalityInfo.of(modality) for modality in known))

    async def healthz(self) -> Health:
        return Health()

    async def readyz(self) -> Health:
        return Health(model_version=self._served().identity.version)

    async def metrics_page(self) -> Response:
        return Response(self._metrics.page(self._source), media_type=metrics.CONTENT_TYPE)

    def _served(self) -> Served:
        served = self._source.served
        if served is None:
            raise NotReadyError(
                "no model is loaded",
                got=self._source.registry_error,
                remedy="promote a version to champion, then try again",
            )
        return served


def _prepare(parts: list[Part], served: Served, pool: DecoderPool) -> Prepared:
    with pool.decoder() as decoder:
        request = read_request(parts, served.generator, decoder)
    return served.generator.prepare(request)


def _prepare_embedding(parts: list[Part], served: Served, pool: DecoderPool) -> Aligned:
    with pool.decoder() as decoder:
        request = read_embed_request(parts, served.generator, decoder)
    return served.generator.prepare_embedding(request)


def _origin(served: Served, prepared: Aligned) -> dict[str, Any]:
    return {
        "model": served.identity.name,
        "model_version": served.identity.version,
        "run_id": served.identity.run_id,
        "observed": tuple(prepared.observed),
        "conditions": prepared.conditions,
    }


def _wanted(request: Request, *offered: str) -> str:
    return wanted_type(request.headers.get("accept", ""), offered)


def _response(made: Answer, origin: Origin) -> Response:
    disposition = f'attachment; filename="{made.filename}"'
    return Response(
        made.content,
        media_type=made.media_type,
        headers={**origin.headers(), "Content-Disposition": disposition},
    )


async def _read_parts(request: Request, max_bytes: int) -> list[Part]:
    async with limited_form(request, max_bytes) as form:
        return [
            Part(name, await value.read() if isinstance(value, UploadFile) else value)
            for name, value in form.multi_items()
        ]


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, MMError)
    return _problem_response(problem_of(error))


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _problem_response(http_problem(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _on_bug(_: Request, error: Exception) -> Response:
    # The trace goes to the log, not to the caller.
    return _problem_response(http_problem(500, f"internal error ({type(error).__name__})"))


def _problem_response(problem: Problem) -> Response:
    retry = RETRY_AFTER_S.get(problem.status)
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        status_code=problem.status,
        media_type=PROBLEM,
        headers={"Retry-After": str(retry)} if retry else None,
    )
