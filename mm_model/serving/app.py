"""The HTTP interface; this module and the routes of jobs and progress know FastAPI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from opentelemetry.trace import Tracer
from starlette.background import BackgroundTask
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

import mm_model
from mm_model.api import (
    JSON,
    PNG,
    PROBLEM,
    REQUEST_ID,
    RETRY_AFTER_S,
    TIFF,
    ZIP,
    Health,
    Limits,
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
from mm_model.serving import legends, metrics, openapi, page, web
from mm_model.serving.access import SECURITY_HEADERS, Guard, Keys
from mm_model.serving.answers import Answer, aligned_answer, answer, embedding_answer, wanted_type
from mm_model.serving.batching import Batcher, Lane, ModelSource, Served
from mm_model.serving.challenge import Challenge
from mm_model.serving.decoders import DecoderPool, shared_pool
from mm_model.serving.forms import limited_form
from mm_model.serving.front import Front, request_id_of
from mm_model.serving.jobs.routes import Jobs, JobsPlace
from mm_model.serving.presence import while_present
from mm_model.serving.progress import Progress
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
from mm_model.serving.watch import TRACER, Watch, watched

_Answering = Callable[[Request, list[Part], Lane, Watch], Awaitable[Response]]

_A = TypeVar("_A", bound=Aligned)


def build_app(
    source: ModelSource,
    config: ServeConfig,
    keys: Keys = MappingProxyType({}),
    jobs: JobsPlace | None = None,
    *,
    counted: metrics.Metrics | None = None,
    gather: metrics.Gather | None = None,
    progress: Progress | None = None,
    tracer: Tracer = TRACER,
) -> FastAPI:
    """The endpoint over a source of models, with the limits of the configuration.

    Args:
        source: says which model serves.
        config: limits.
        keys: where there are any, it answers nobody else; see `access`.
        jobs: where they are kept; it takes none, without.
        counted: where it counts; of its own, without.
        gather: asks all replicas for what they have counted; it is alone, without.
        progress: where it says how far requests are; of its own, without.
        tracer: where spans go.
    """
    endpoint = _Endpoint(
        source,
        config,
        jobs,
        counted or metrics.Metrics(),
        gather,
        progress or Progress(),
        tracer,
    )
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
    app.post("/v1/align", response_class=Response, **openapi.align_operation(config))(
        endpoint.align
    )
    endpoint.jobs.add_routes(app, config)
    endpoint.progress.add_route(app)
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
        summary="Counters of all replicas, for Prometheus",
        operation_id="metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )(endpoint.metrics_page)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page.render(app.openapi()))

    web.mount(app)
    app.add_middleware(
        Guard, keys=keys, max_per_key=config.max_per_key, on_refused=endpoint.count_refused
    )
    app.add_middleware(Front)
    app.add_exception_handler(MMError, endpoint.on_error)
    app.add_exception_handler(HTTPException, endpoint.on_http_error)
    app.add_exception_handler(Exception, endpoint.on_bug)
    return app


class _Endpoint:
    """The operations, over one source and one queue."""

    def __init__(
        self,
        source: ModelSource,
        config: ServeConfig,
        jobs: JobsPlace | None,
        counted: metrics.Metrics,
        gather: metrics.Gather | None,
        progress: Progress,
        tracer: Tracer,
    ) -> None:
        self._source, self.progress = source, progress
        self.jobs = Jobs(jobs, source, config, self._served, counted)
        self._decoders = shared_pool(config.max_side_px)
        self._metrics, self._gather, self._tracer = counted, gather, tracer
        counted.decoders_replaced.set_function(lambda: self._decoders.replaced)
        self._batcher = Batcher(
            config.max_batch,
            config.batch_wait_ms / 1000,
            counted.batch_size.observe,
            counted.queued.set,
        )
        self._challenge = Challenge(config, source, counted, lambda: self._batcher.is_busy)
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
            await asyncio.to_thread(self._challenge.close)
            self._decoders.close()

    async def generate(self, request: Request) -> Response:
        return await self._count("generate", request, self._generate, challenged=True)

    async def embed(self, request: Request) -> Response:
        return await self._count("embed", request, self._embed)

    async def align(self, request: Request) -> Response:
        return await self._count("align", request, self._align)

    async def fill(self, request: Request) -> Response:
        return await self._count("fill", request, self._fill, challenged=True)

    async def _count(
        self, operation: str, request: Request, answering: _Answering, *, challenged: bool = False
    ) -> Response:
        facts = {"request_id": request_id_of(request.scope)}
        with (
            watched(operation, request.headers, self._metrics, self._tracer, **facts) as watch,
            self.progress.of(request, watch),
        ):
            status = 500
            try:
                response = await self._admit(request, answering, watch, challenged)
                status = response.status_code
                return response
            except MMError as error:
                status = problem_of(error).status
                watch.note(problem=error.code)
                raise
            except HTTPException as error:
                status = error.status_code
                raise
            except asyncio.CancelledError:
                status = 499  # the caller left; nginx's number for it
                raise
            finally:
                watch.answered(status)

    async def _admit(
        self, request: Request, answering: _Answering, watch: Watch, challenged: bool
    ) -> Response:
        """Answer if there is room, all within the deadline; the challenger may come first."""
        served = self._served()
        watch.serves(served.identity)
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
                with watch.stage("read"):
                    parts = await _read_parts(request, self._limits.max_body_bytes)

                async def answer_by(lane: Lane) -> Response:
                    watch.serves(lane.served.identity)
                    return await answering(request, parts, lane, watch)

                if challenged:
                    made = await self._challenge.answer(request_id_of(request.scope), answer_by)
                    if made is not None:
                        return made
                return await answer_by(Lane(served, self._batcher))
        except TimeoutError:
            raise DeadlineError(
                "the answer took too long",
                allowed=f"{self._limits.deadline_s:g} s",
                remedy="ask for a smaller piece, fewer samples or fewer steps",
            ) from None
        finally:
            self._in_progress -= 1
            self._metrics.in_progress.dec()

    async def _generate(
        self, request: Request, parts: list[Part], lane: Lane, watch: Watch
    ) -> Response:
        served = lane.served
        if wants_uncertainty(parts):
            return await self._whole(request, parts, lane, watch, FIELDS)
        sample, batcher = served.generator.sample, lane.batcher
        with batcher.coming():
            prepared = await self._prepared(parts, served, watch, _prepare)
            watch.note(samples=prepared.samples, steps=prepared.steps)
            sampling = batcher.submit(sample, prepared, watch.took, watch.tell)
        result = await while_present(request, sampling)
        for name, values in result.values.items():
            self._metrics.pixels.labels(name).inc(len(values) * prepared.valid.size)
        provenance = Provenance(
            **_origin(served, prepared),
            targets=prepared.targets,
            samples=prepared.samples,
            seed=prepared.seed,
            steps=prepared.steps,
        )
        with watch.stage("write"):
            made = await asyncio.to_thread(
                answer,
                result,
                served.generator.modalities,
                provenance,
                media_type=_wanted(request, TIFF, ZIP, PNG),
            )
        response, request_id = _response(made, provenance), request_id_of(request.scope)
        repeat = self._challenge.repetition(request_id, prepared, result, served)
        if repeat is not None:
            response.background = BackgroundTask(_in_loop, repeat)
        return response

    async def _fill(
        self, request: Request, parts: list[Part], lane: Lane, watch: Watch
    ) -> Response:
        return await self._whole(request, parts, lane, watch, FILL_FIELDS)

    async def _whole(
        self,
        request: Request,
        parts: list[Part],
        lane: Lane,
        watch: Watch,
        fields: Mapping[str, str],
    ) -> Response:
        zipped = _wanted(request, TIFF, ZIP) == ZIP
        made = await while_present(
            request, answer_scene(parts, fields, lane, self._decoders, watch, zipped=zipped)
        )
        for name in made.provenance.targets:
            self._metrics.pixels.labels(name).inc(made.pixels)
        return _response(made.answer, made.provenance)

    async def _embed(
        self, request: Request, parts: list[Part], lane: Lane, watch: Watch
    ) -> Response:
        served = lane.served
        scenes, batcher = served.generator.scenes, lane.batcher
        with batcher.coming():
            prepared = await self._prepared(parts, served, watch, _prepare_embedding)
            embedding_to_be = batcher.submit(scenes, prepared, watch.took)
        embedding = await while_present(request, embedding_to_be)
        origin = SceneOrigin(
            **_origin(served, prepared), bundle_id=served.generator.manifest.bundle_id
        )
        media_type = _wanted(request, TIFF, JSON, ZIP)
        with watch.stage("write"):
            made = await asyncio.to_thread(embedding_answer, embedding, origin, media_type)
        return _response(made, origin)

    async def _prepared(
        self,
        parts: list[Part],
        served: Served,
        watch: Watch,
        prepare: Callable[[list[Part], Served, DecoderPool], _A],
    ) -> _A:
        """A form's layers, decoded and aligned."""
        with watch.stage("decode"):
            prepared = await self._decoders.run(prepare, parts, served, self._decoders)
            await asyncio.to_thread(self._metrics.see_input, served.generator, prepared.observed)
        height, width = prepared.grid.shape
        watch.note(height_px=height, width_px=width, observed=len(prepared.observed))
        return prepared

    async def _align(
        self, request: Request, parts: list[Part], lane: Lane, watch: Watch
    ) -> Response:
        served = lane.served
        aligned = await self._prepared(parts, served, watch, _prepare_embedding)
        origin = Origin(**_origin(served, aligned))
        modalities = served.generator.modalities
        with watch.stage("write"):
            made = await asyncio.to_thread(aligned_answer, aligned, modalities, origin)
        return _response(made, origin)

    async def model(self) -> ModelInfo:
        served, challenger = self._source.served, self._source.challenger
        return ModelInfo(
            serving=served.identity if served else None,
            challenger=challenger.identity if challenger else None,
            modalities=tuple(served.generator.modalities) if served else (),
            refused=self._source.refused,
            registry_error=self._source.registry_error,
            limits=self._limits,
        )

    async def modalities(self) -> ModalityList:
        known = self._served().generator.modalities.values()
        return legends.modality_list(known)

    async def healthz(self) -> Health:
        return Health()

    async def readyz(self) -> Health:
        return Health(model_version=self._served().identity.version)

    async def metrics_page(self) -> Response:
        replicas = (
            await self._gather() if self._gather else {"": self._metrics.snapshot(self._source)}
        )
        return Response(metrics.page(replicas), media_type=metrics.CONTENT_TYPE)

    def count_refused(self, code: str) -> None:
        self._metrics.refused.labels(code).inc()

    async def on_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, MMError)
        return self._problem_response(problem_of(error, request_id_of(request.scope)))

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        request_id = request_id_of(request.scope)
        response = self._problem_response(
            http_problem(error.status_code, str(error.detail), request_id)
        )
        response.headers.update(error.headers or {})
        return response

    async def on_bug(self, request: Request, error: Exception) -> Response:
        # The trace goes to the log, not to the caller. No middleware sees this answer.
        request_id = request_id_of(request.scope)
        what = f"internal error ({type(error).__name__})"
        response = self._problem_response(http_problem(500, what, request_id))
        response.headers.update({**SECURITY_HEADERS, REQUEST_ID: request_id})
        return response

    def _problem_response(self, problem: Problem) -> Response:
        self.count_refused(problem.code)
        retry = RETRY_AFTER_S.get(problem.status)
        return JSONResponse(
            problem.model_dump(exclude_none=True),
            status_code=problem.status,
            media_type=PROBLEM,
            headers={"Retry-After": str(retry)} if retry else None,
        )

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
        "estimated_bands": prepared.estimated,
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


async def _in_loop(task: Callable[[], None]) -> None:
    task()


async def _read_parts(request: Request, max_bytes: int) -> list[Part]:
    async with limited_form(request, max_bytes) as form:
        return [
            Part(name, await value.read() if isinstance(value, UploadFile) else value)
            for name, value in form.multi_items()
        ]
