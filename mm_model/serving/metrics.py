"""What the endpoint counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from mm_model.serving.batching import ModelSource

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Metrics:
    """Counters of one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "mm_requests",
            "Answered requests",
            ["operation", "status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "mm_request_seconds",
            "Time from the first byte of a request to its answer",
            ["operation"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.in_progress = Gauge(
            "mm_requests_in_progress",
            "Requests being read, queued or answered",
            registry=self._registry,
        )
        self.batch_size = Histogram(
            "mm_batch_size",
            "Requests that were answered together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self._registry,
        )
        self._ready = Gauge("mm_model_ready", "Whether a model is loaded", registry=self._registry)
        self._model = Gauge(
            "mm_model_info",
            "The version that serves",
            ["model", "version", "run_id"],
            registry=self._registry,
        )
        self._refused = Gauge(
            "mm_model_versions_refused",
            "Versions that the alias named and that were not taken up",
            registry=self._registry,
        )
        self._registry_up = Gauge(
            "mm_registry_up", "Whether the registry answered last", registry=self._registry
        )

    def page(self, source: ModelSource) -> bytes:
        """The text that Prometheus reads."""
        self._model.clear()
        served = source.served
        if served is not None:
            identity = served.identity
            self._model.labels(identity.name, identity.version, identity.run_id).set(1)
        self._ready.set(served is not None)
        self._refused.set(len(source.refused))
        self._registry_up.set(source.registry_error is None)
        return generate_latest(self._registry)
