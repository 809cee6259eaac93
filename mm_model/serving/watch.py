"""A request seen from outside: how long each stage took, as figures and as spans of a trace."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mm_model.api import ModelIdentity
from mm_model.serving.metrics import Metrics

# Its spans are nothing, and cost as much, until a provider is installed: see `adapters.traces`.
TRACER = trace.get_tracer("mm_model")


class Watch:
    """Follows one request; made by `watched`.

    Attributes:
        version: of the model that answers; "" where there is none.
        share: of the work that is done, from 0 to 1.
    """

    def __init__(self, operation: str, metrics: Metrics, tracer: Tracer, span: Span) -> None:
        self.operation, self.version, self.share = operation, "", 0.0
        self._metrics, self._tracer, self._span = metrics, tracer, span
        self._context = trace.set_span_in_context(span)
        self._began = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block is a stage of the request."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.took(name, began, time.perf_counter())

    def took(self, stage: str, began: float, ended: float) -> None:
        """A stage went from `began` to `ended`, as `time.perf_counter` tells them."""
        self._metrics.stage_seconds.labels(self.operation, stage, self.version).observe(
            ended - began
        )
        if self._span.is_recording():
            # Spans are dated by the clock of the day.
            offset = time.time() - time.perf_counter()
            span = self._tracer.start_span(
                stage, self._context, start_time=int((began + offset) * 1e9)
            )
            span.end(int((ended + offset) * 1e9))

    def serves(self, identity: ModelIdentity) -> None:
        """This version answers."""
        self.version = identity.version
        self.note(model=identity.name, model_version=identity.version)

    def note(self, **facts: str | int) -> None:
        """Facts of the request for its span; nothing of what was sent."""
        self._span.set_attributes({f"mm.{name}": fact for name, fact in facts.items()})

    def tell(self, share: float) -> None:
        """So much of the work is done; for any thread."""
        self.share = share

    def answered(self, status: int) -> None:
        """The request ended so."""
        self._metrics.requests.labels(self.operation, status, self.version).inc()
        seconds = self._metrics.seconds.labels(self.operation, self.version)
        seconds.observe(time.perf_counter() - self._began)
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))


@contextmanager
def watched(
    operation: str, headers: Mapping[str, str], metrics: Metrics, tracer: Tracer, **facts: Any
) -> Iterator[Watch]:
    """Follow a request; its span continues the caller's trace, if the headers name one."""
    caller = TraceContextTextMapPropagator().extract(dict(headers))
    with tracer.start_as_current_span(
        operation, caller, SpanKind.SERVER, record_exception=False, set_status_on_exception=False
    ) as span:
        watch = Watch(operation, metrics, tracer, span)
        watch.note(**facts)
        yield watch
