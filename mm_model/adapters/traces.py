"""Traces of requests to an OpenTelemetry collector; nothing is sent unless one is named."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

import mm_model


def send_to(url: str) -> None:
    """Send this process's spans to a collector, in batches, beside the work; once a process.

    A collector that is away loses spans and nothing else. The variables of OpenTelemetry hold, such
    as OTEL_TRACES_SAMPLER for a share of all traces and OTEL_EXPORTER_OTLP_HEADERS for a login.
    """
    resource = Resource.create({SERVICE_NAME: "mm-model", SERVICE_VERSION: mm_model.__version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    trace.set_tracer_provider(provider)
