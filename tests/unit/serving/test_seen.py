"""The endpoint seen from outside: ids, figures of all replicas, drift, traces."""

import itertools
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from serving_fixtures import (
    GRID,
    ask,
    form,
    geotiff,
    make_layer,
    make_source,
    refused,
    serve_config,
)

from mm_model.modalities import MODALITIES
from mm_model.serving import metrics
from mm_model.serving.access import AUDIT, KeyScope, new_key, parse_keys
from mm_model.serving.app import build_app
from mm_model.serving.batching import FixedModel
from mm_model.serving.drift import LEAST_LAYERS, InputDrift

STAGES = ["read", "decode", "queue", "sample", "write"]
ROOT_ID = "Root=1-67891233-abcdef012345678912345678"


@pytest.fixture(scope="module")
def source():
    return make_source(max_side_px=64)


def sar_to_dem(headers=None, **fields):
    return form({"sar": geotiff("sar")}, headers, **{"target": "dem", "steps": 1, **fields})


def samples_of(text):
    """(name, labels) → value of every sample of a page of metrics."""
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def counted(app):
    (page,) = ask(app, ("GET", "/metrics", {}))
    assert page.status_code == 200
    return samples_of(page.text)


def value(found, name, **labels):
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


# --- ids -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["0d5f", "a" * 128, ROOT_ID])
def test_a_request_keeps_the_id_of_its_caller(source, given, caplog):
    caplog.set_level(logging.INFO, AUDIT.name)
    (answer,) = ask(build_app(source, serve_config()), sar_to_dem({"X-Request-ID": given}))
    assert answer.headers.get_list("x-request-id") == [given]
    assert [r.request_id for r in caplog.records if r.name == AUDIT.name] == [given]


@pytest.mark.parametrize("given", [None, "", "a" * 129, "two words", "<script>", "é".encode()])
def test_an_id_that_is_none_is_not_repeated(source, given):
    headers = {} if given is None else {"X-Request-ID": given}
    app = build_app(source, serve_config())
    answers = ask(app, *[("GET", "/v1/model", {"headers": headers})] * 2)
    made = {answer.headers["x-request-id"] for answer in answers}
    assert len(made) == 2
    assert all(len(request_id) == 32 and request_id != given for request_id in made)


def test_every_answer_and_every_error_carries_the_id(source):
    _, line = new_key("team", frozenset({KeyScope.GENERATE}))
    keyed = build_app(source, serve_config(), parse_keys(line, "here"))
    empty = build_app(FixedModel(None), serve_config())
    app = build_app(source, serve_config())
    headers = {"X-Request-ID": "mine"}
    get = {"headers": headers}
    cases = [
        (app, ("GET", "/healthz", get), 200),
        (app, ("GET", "/docs", get), 200),
        (app, ("GET", "/nothing", get), 404),
        (app, ("DELETE", "/v1/model", get), 405),
        (app, sar_to_dem(headers, samples=0), 422),
        (app, form({"sar": b"no"}, headers), 415),
        (keyed, sar_to_dem(headers), 401),
        (empty, sar_to_dem(headers), 503),
    ]
    for asked, request, status in cases:
        (answer,) = ask(asked, request)
        assert answer.status_code == status
        assert answer.headers["x-request-id"] == "mine", request
        if status >= 400:
            assert answer.json()["request_id"] == "mine", request


def test_a_fault_of_ours_names_the_request_for_who_runs_it(monkeypatch):
    source = make_source()

    def broken(*_):
        raise KeyError("x")

    monkeypatch.setattr(source.served.generator, "sample", broken)
    (answer,) = ask(build_app(source, serve_config()), sar_to_dem({"X-Request-ID": "mine"}))
    problem = refused(answer, 500, "error")
    assert problem.request_id == answer.headers["x-request-id"] == "mine"
    assert "id" in problem.remedy
    assert answer.headers["x-frame-options"] == "DENY"


# --- figures ---------------------------------------------------------------------------------


def test_figures_of_a_request(source):
    app = build_app(source, serve_config())
    ask(app, sar_to_dem(samples=3), form({"sar": geotiff("sar")}, path="/v1/embed"))
    found = counted(app)
    for operation in ("generate", "embed"):
        assert value(found, "mm_request_seconds_count", operation=operation, version="3") == 1
        for stage in STAGES:
            labels = {"operation": operation, "stage": stage, "version": "3"}
            assert value(found, "mm_stage_seconds_count", **labels) == 1, labels
        # Stages follow each other: together they take no longer than the request.
        total = value(found, "mm_request_seconds_sum", operation=operation, version="3")
        stages = [
            value(found, "mm_stage_seconds_sum", operation=operation, stage=stage, version="3")
            for stage in STAGES
        ]
        assert all(seconds > 0 for seconds in stages)
        assert sum(stages) <= total
    height, width = GRID.shape
    assert value(found, "mm_generated_pixels_total", modality="dem") == 3 * height * width
    assert value(found, "mm_batch_size_count") == 2
    assert value(found, "mm_queue_length") == 0
    assert value(found, "mm_model_info", model="mm-test", run_id="f00d", version="3") == 1


def test_figures_of_what_is_written_as_scenes_are(source):
    app = build_app(source, serve_config())
    height, width = GRID.shape
    ask(
        app,
        form({"sar": geotiff("sar")}, path="/v1/fill", fill="sar", samples=2, steps=1),
        form({"sar": geotiff("sar")}, target="dem", samples=2, steps=1, uncertainty="true"),
    )
    found = counted(app)
    for operation, target in (("fill", "sar"), ("generate", "dem")):
        for stage in ("read", "decode", "queue", "sample"):
            labels = {"operation": operation, "stage": stage, "version": "3"}
            assert value(found, "mm_stage_seconds_count", **labels) == 1, labels
        generated = value(found, "mm_generated_pixels_total", modality=target)
        assert generated == 2 * height * width


def test_refusals_are_counted_by_reason(source):
    _, line = new_key("team", frozenset({KeyScope.METRICS}))
    app = build_app(source, serve_config())
    ask(app, sar_to_dem(samples=0), form({"sar": b"no"}), ("GET", "/nothing", {}))
    found = counted(app)
    assert value(found, "mm_requests_refused_total", code="request") == 2
    assert value(found, "mm_requests_refused_total", code="media_type") == 1
    counter = metrics.Metrics()
    keyed = build_app(source, serve_config(), parse_keys(line, "here"), counted=counter)
    ask(keyed, sar_to_dem())
    page = metrics.page({"": counter.snapshot(source)}).decode()
    assert value(samples_of(page), "mm_requests_refused_total", code="unauthenticated") == 1


def test_one_page_holds_all_replicas(source):
    replicas = {"one": metrics.Metrics(), "two": metrics.Metrics()}

    async def gather():
        return {name: counter.snapshot(source) for name, counter in replicas.items()}

    apps = {
        name: build_app(source, serve_config(), counted=counter, gather=gather)
        for name, counter in replicas.items()
    }
    ask(apps["one"], sar_to_dem())
    ask(apps["two"], sar_to_dem(), sar_to_dem())
    found = counted(apps["one"])
    assert found == counted(apps["two"])
    labels = {"operation": "generate", "status": "200", "version": "3"}
    assert value(found, "mm_requests_total", **labels, replica="one") == 1
    assert value(found, "mm_requests_total", **labels, replica="two") == 2
    (page,) = ask(apps["one"], ("GET", "/metrics", {}))
    kinds = [line for line in page.text.splitlines() if line.startswith("# TYPE")]
    assert len(set(kinds)) == len(kinds)  # a family that is there twice is an error of the format


# --- drift -----------------------------------------------------------------------------------


def drift_of(source, name, values, valid, times=LEAST_LAYERS):
    generator = source.served.generator
    drift = InputDrift(generator.modalities, generator.manifest.statistics)
    for _ in range(times):
        drift.see({name: (values, valid)})
    return {what: distance for _, what, distance in drift.distances()}


def trained_like(source, name, shape=(37, 53)):
    """Values with the very quantiles of the statistics."""
    bands = source.served.generator.manifest.statistics["modalities"][name]["bands"]
    shares = np.linspace(0, 1, shape[0] * shape[1]).reshape(shape)
    quantiles = [(float(q), v) for q, v in bands[0]["quantiles"].items()]
    at, to = zip(*quantiles, strict=True)
    return np.stack([np.interp(shares, at, to).astype(np.float32)] * len(bands))


def test_input_like_the_training_set_has_no_drift_and_other_input_has(source):
    values = trained_like(source, "sar")
    valid = np.ones(values.shape[1:], bool)
    alike = drift_of(source, "sar", values, valid)
    assert list(alike) == list(MODALITIES["sar"].band_names)
    # np.interp holds the outer hundredths at the first and last quantile.
    assert all(distance <= 0.011 for distance in alike.values())
    assert all(d == 1 for d in map(round, drift_of(source, "sar", values - 40, valid).values()))
    shifted = values.copy()
    shifted[1] += 3
    first, second = drift_of(source, "sar", shifted, valid).values()
    assert first <= 0.011 < 0.1 < second
    # What is not valid does not count.
    half = valid.copy()
    half[:, 20:] = False
    spoilt = np.where(half, values, -99)
    kept = drift_of(source, "sar", spoilt, half)
    assert kept == pytest.approx(drift_of(source, "sar", values, half))


def test_classes_drift_by_their_shares(source):
    codes = MODALITIES["map"].class_codes
    valid = np.ones((20, 31), bool)
    same = np.full((1, 20, 31), codes[0], np.uint8)
    assert drift_of(source, "map", same, valid) == {"classes": 0.0}
    assert drift_of(source, "map", np.full_like(same, codes[1]), valid) == {"classes": 1.0}


def test_one_odd_image_is_no_drift_and_the_past_fades(source):
    generator = source.served.generator
    values = trained_like(source, "dem")
    valid = np.ones(values.shape[1:], bool)
    assert drift_of(source, "dem", values, valid, LEAST_LAYERS - 1) == {}
    drift = InputDrift(generator.modalities, generator.manifest.statistics)

    def see(given, times):
        for _ in range(times):
            drift.see({"dem": (given, valid), "unknown": (given, valid)})
        ((_, _, distance),) = drift.distances()
        return distance

    usual = see(values, 60)
    odd = see(values + 5000, 1)
    other = see(values + 5000, 2000)
    again = see(values, 2000)
    assert usual < odd < 0.05 < 0.9 < other
    assert again < 0.05


def test_requests_are_compared_with_the_training_set(source):
    app = build_app(source, serve_config())
    ask(app, *[sar_to_dem() for _ in range(LEAST_LAYERS)])
    found = counted(app)
    layer = make_layer("sar")
    expected = drift_of(source, "sar", layer.values, layer.valid)
    for band in MODALITIES["sar"].band_names:
        got = value(found, "mm_input_drift", modality="sar", band=band)
        assert got == pytest.approx(expected[band])
        assert got > 0
    assert value(found, "mm_input_drift", modality="dem", band="elevation") == 0


# --- traces ----------------------------------------------------------------------------------


def test_a_request_leaves_a_trace_of_its_stages_below_that_of_its_caller(source):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = build_app(source, serve_config(), tracer=provider.get_tracer("test"))
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    ask(app, sar_to_dem({"traceparent": caller, "X-Request-ID": "mine"}))
    *stages, whole = exporter.get_finished_spans()
    assert [span.name for span in stages] == STAGES
    assert f"{whole.context.trace_id:032x}" == caller.split("-")[1]
    assert f"{whole.parent.span_id:016x}" == caller.split("-")[2]
    assert whole.attributes["mm.request_id"] == "mine"
    assert whole.attributes["mm.model_version"] == "3"
    assert whole.attributes["http.response.status_code"] == 200
    for before, after in itertools.pairwise(stages):
        assert before.end_time <= after.start_time + 1_000_000
    for span in stages:
        assert span.parent.span_id == whole.context.span_id
        assert whole.start_time - 1_000_000 <= span.start_time <= span.end_time
        assert span.end_time <= whole.end_time + 1_000_000
    exporter.clear()
    ask(app, sar_to_dem(samples=0))
    (*_, failed) = exporter.get_finished_spans()
    assert failed.attributes["mm.problem"] == "request"
    assert failed.parent is None


def test_without_a_collector_there_is_no_span(source):
    from mm_model.serving.watch import TRACER, Watch, watched

    with watched("generate", {}, metrics.Metrics(), TRACER) as watch, watch.stage("read"):
        assert isinstance(watch, Watch)
        assert not watch._span.is_recording()


def test_spans_reach_a_collector():
    """The exporter that is installed speaks to a collector as one understands it."""
    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        provider = TracerProvider()
        url = f"http://127.0.0.1:{server.server_port}/v1/traces"
        provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=url)))
        with provider.get_tracer("test").start_as_current_span("generate"):
            pass
        server.shutdown()
    ((path, body),) = got
    assert path == "/v1/traces"
    sent = ExportTraceServiceRequest.FromString(body)
    assert sent.resource_spans[0].scope_spans[0].spans[0].name == "generate"
