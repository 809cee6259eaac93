"""What the endpoint counts, for Prometheus: each replica for itself, and one page of them all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mm_model.errors import MMError, ServiceError, StorageError
from mm_model.serving.batching import ModelSource
from mm_model.serving.drift import InputDrift, Observed

if TYPE_CHECKING:
    from mm_model.serving.generator import Generator

CONTENT_TYPE = CONTENT_TYPE_LATEST

Snapshot = Sequence[Metric]
"""What one replica has counted."""
Gather = Callable[[], Awaitable[Mapping[str, Snapshot]]]
"""Asks all replicas, the caller's own among them: name → what it has counted."""

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
_STAGE_SECONDS = (0.001, 0.005, 0.01, *_SECONDS)
FAULTS = (MMError.code, ServiceError.code, StorageError.code)
"""Outcomes of jobs that are the endpoint's fault, and not what was sent."""
_JOB_SECONDS = (1, 10, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)


class Metrics:
    """Counters of one process."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "mm_requests",
            "Answered requests, by the version that they met",
            ["operation", "status", "version"],
            registry=registry,
        )
        self.refused = Counter(
            "mm_requests_refused",
            "Requests that were refused or failed, by the code of the problem",
            ["code"],
            registry=registry,
        )
        self.seconds = Histogram(
            "mm_request_seconds",
            "Time from the first byte of a request to its answer, by the version that gave it",
            ["operation", "version"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "mm_stage_seconds",
            "Time that requests spent in a stage: read, decode, queue, sample, write",
            ["operation", "stage", "version"],
            buckets=_STAGE_SECONDS,
            registry=registry,
        )
        self.in_progress = Gauge(
            "mm_requests_in_progress", "Requests being read, queued or answered", registry=registry
        )
        self.queued = Gauge(
            "mm_queue_length", "Requests that wait for the sampler", registry=registry
        )
        self.batch_size = Histogram(
            "mm_batch_size",
            "Requests that were answered together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.pixels = Counter(
            "mm_generated_pixels",
            "Pixels that were generated, samples counted each",
            ["modality"],
            registry=registry,
        )
        self.jobs = Gauge(
            "mm_jobs",
            "Jobs of all replicas that wait or run, as each replica last saw them",
            ["state"],
            registry=registry,
        )
        self.job_waits = Gauge(
            "mm_job_wait_seconds",
            "How long the job that waits longest has waited, as each replica last saw it",
            registry=registry,
        )
        self.job_seconds = Histogram(
            "mm_job_seconds",
            "Time that jobs took once they had begun, by how they ended: done, cancelled, or the "
            "code of their problem",
            ["outcome"],
            buckets=_JOB_SECONDS,
            registry=registry,
        )
        for code in FAULTS:  # Prometheus sees no increase in a series that begins with its first
            self.job_seconds.labels(code)
        self.decoders_replaced = Gauge(
            "mm_decoders_replaced",
            "Decoders that died, were killed, or were replaced in turn",
            registry=registry,
        )
        self.challenged = Counter(
            "mm_challenger_requests",
            "Requests for the challenger: answered, or why not",
            ["version", "outcome"],
            registry=registry,
        )
        self.shadow_seconds = Histogram(
            "mm_shadow_seconds",
            "Time that the challenger took to answer unseen, without that of giving way",
            ["version"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.shadow_difference = Summary(
            "mm_shadow_difference",
            "How far the challenger's unseen answers lie from the champion's: mean absolute "
            "difference in the modality's unit; of classes, the share of pixels that differ",
            ["version", "modality"],
            registry=registry,
        )
        self._drift = Gauge(
            "mm_input_drift",
            "Distance of late input from the training set, 0 (alike) to 1",
            ["modality", "band"],
            registry=registry,
        )
        self._ready = Gauge("mm_model_ready", "Whether a model is loaded", registry=registry)
        self._model = Gauge(
            "mm_model_info",
            "The version that serves",
            ["model", "version", "run_id"],
            registry=registry,
        )
        self._challenger = Gauge(
            "mm_challenger_info",
            "The version that is tried beside the one that serves",
            ["model", "version", "run_id"],
            registry=registry,
        )
        self._versions_refused = Gauge(
            "mm_model_versions_refused",
            "Versions that an alias named and that were not taken up",
            registry=registry,
        )
        self._registry_up = Gauge(
            "mm_registry_up", "Whether the registry answered last", registry=registry
        )
        self._inputs: tuple[str, InputDrift] | None = None

    def see_input(self, generator: Generator, observed: Observed) -> None:
        """Compare a request's layers with what its model was trained on."""
        manifest = generator.manifest
        if self._inputs is None or self._inputs[0] != manifest.bundle_id:
            drift = InputDrift(generator.modalities, manifest.statistics)
            self._inputs = manifest.bundle_id, drift
        self._inputs[1].see(observed)

    def snapshot(self, source: ModelSource) -> Snapshot:
        """All that has been counted so far."""
        for gauge, loaded in ((self._model, source.served), (self._challenger, source.challenger)):
            gauge.clear()
            if loaded is not None:
                identity = loaded.identity
                gauge.labels(identity.name, identity.version, identity.run_id).set(1)
        self._ready.set(source.served is not None)
        self._versions_refused.set(len(source.refused))
        self._registry_up.set(source.registry_error is None)
        self._drift.clear()
        if self._inputs is not None:
            for modality, band, distance in self._inputs[1].distances():
                self._drift.labels(modality, band).set(distance)
        return list(self._registry.collect())


def page(replicas: Mapping[str, Snapshot]) -> bytes:
    """The text that Prometheus reads: every sample with the name of its replica, if it has one."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(replicas))
    return generate_latest(registry)


class _Merged(Collector):
    """The families of all replicas, each once, as the format asks for."""

    def __init__(self, replicas: Mapping[str, Snapshot]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, snapshot in self._replicas.items():
            name = {"replica": replica} if replica else {}
            for metric in snapshot:
                fresh = Metric(metric.name, metric.documentation, metric.type)
                family = families.setdefault(metric.name, fresh)
                family.samples += [
                    sample._replace(labels={**sample.labels, **name}) for sample in metric.samples
                ]
        yield from families.values()
