"""The endpoint over HTTP: beside the same call in this process, under load, and from nothing.

MLflow, Ray and the endpoint are started as `mm up` starts them, in a project of their own; the
bundle goes through the registry. Both sides get the same requests and give the same pixels.
`make bench-serve` runs it; OVERLOAD_S and CALLERS_S say for how long.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks import generate, record, serve_load, setting
from mm_model.adapters import environment, services
from mm_model.bundle import load_manifest
from mm_model.client import Client
from mm_model.config import Params
from mm_model.data.raster import read_raster, write_geotiff
from mm_model.serving.generator import Generator, ObservedLayer, Request

CALLERS = 8
REPEATS = 9
ROUNDS = 3
START_S = 120.0
OVERLOAD_S = 300.0
CALLERS_S = 20.0

# What other benchmarks measure of the same service: file → its figures → the names here.
_TAKEN: dict[str, dict[str, str]] = {
    "scene": {
        "scene_4096_s": "scene_4096_s",
        "scene_4096_peak_rss_mb": "scene_4096_peak_rss_mb",
        "scene_10980_peak_rss_mb": "scene_10980_peak_rss_mb",
        "scene_4096_seam_gradient_ratio_rgb": "seam_gradient_ratio",
    },
    "hostile": {"mutated_uploads": "mutated_uploads", "mutated_5xx": "mutated_5xx"},
}


def measure(
    overload_s: float = OVERLOAD_S, callers_s: float = CALLERS_S
) -> tuple[dict[str, float], dict[str, str]]:
    """One caller for latency, several at once for throughput; the sides in turn. Then the load.

    Args:
        overload_s: how long requests come at ten times the capacity.
        callers_s: how long each number of callers asks.
    """
    chosen = setting.params()
    threads = torch.get_num_threads()
    with setting.temporary_project() as project:
        bundle, store = setting.make_bundle(chosen, project)
        source = generate.observed_of(chosen.selected)
        layers = generate.layers_of(store, source, CALLERS)
        files = [write_geotiff(None, y.values, y.valid, y.grid, source) or b"" for y in layers]
        try:
            _start(chosen, project)
            # As many threads as the replica has.
            torch.set_num_threads(os.cpu_count() or 1)
            generator = Generator(bundle, max_batch=chosen.serve.max_batch)
            with Client(environment.endpoint_url()) as client:
                client.wait_ready(START_S)
                figures = _compare(generator, client, source.name, layers, files)
            load = serve_load.Load(environment.endpoint_url(), source.name, files[0])
            figures |= load.by_callers(callers_s)
            capacity = max(figures[f"callers_{n}_per_s"] for n in serve_load.CALLERS)
            figures |= load.overload(capacity, overload_s)
            figures["cold_start_s"] = _cold_start(source.name, files[0])
        finally:
            torch.set_num_threads(threads)
            services.down(_silent)
    notes = {
        "": f"Size `{chosen.model.size}`, {chosen.prepare.patch_px} px, {source.name} to all "
        f"others, default steps. In process: arrays in and out, no GeoTIFF.",
        "http_p50_ms": "one caller; GeoTIFF in, zip of GeoTIFFs out",
        "http_p50_added_ms": "median over turns of the difference",
        "http_patches_per_s": f"{CALLERS} callers at once, each with one patch",
        "in_process_patches_per_s": f"one call with {CALLERS} requests",
        "callers_1_p50_ms": f"so many callers, each again once it is answered, for {callers_s:g} s",
        "overload_s": f"{serve_load.OVERLOAD} times the most patches a second of the callers above",
        "overload_p99_accepted_s": f"the deadline is {chosen.serve.deadline_s:g} s",
        "overload_rss_growth_mb": "of the replicas, from a tenth of the time to its end",
        "overload_proxy_rss_growth_mb": "of Ray Serve's proxy, in the same time",
        "cold_start_s": "MLflow, Ray, endpoint and model, from no process to the first answer",
    }
    for name, names in _TAKEN.items():
        taken, note = _taken(name, names)
        figures |= taken
        notes |= dict.fromkeys(taken, note)
    return figures, notes


def _taken(name: str, names: dict[str, str]) -> tuple[dict[str, float], str]:
    """Figures of another benchmark's last run, and when that was."""
    result = json.loads((record.RESULTS / f"{name}.json").read_text())
    figures = {ours: result["figures"][theirs] for theirs, ours in names.items()}
    return figures, f"of `{name}`, {result['date'][:10]}, commit {result['commit']}"


def _cold_start(name: str, file: bytes) -> float:
    """Seconds from no process to the first answer; what serves is in the registry already."""
    services.down(_silent)
    began = time.perf_counter()
    services.up(["endpoint"], say=_silent)
    with Client(environment.endpoint_url()) as client:
        client.wait_ready(START_S)
        client.generate({name: file})
    return time.perf_counter() - began


def _start(chosen: Params, project: Path) -> None:
    """Services, and the bundle as champion."""
    shutil.copytree(record.ROOT / "infra" / "local", project / "infra" / "local")
    shutil.copy(record.ROOT / "params.yaml", project)
    environment.enter()
    services.up(["endpoint"], say=_silent)
    from mlflow import MlflowClient

    from mm_model.adapters import mlflow_registry as registry

    name = chosen.register_.model
    client = MlflowClient(environment.mlflow_url())
    version = _register(chosen, project)
    # Random weights pass no gate on quality: the verdict is written as a gate would.
    client.set_model_version_tag(name, str(version), registry.VERDICT, registry.PASSED)
    registry.promote(name, version)


def _register(chosen: Params, project: Path) -> int:
    from mm_model.adapters import mlflow_registry as registry

    reports = project / "reports"
    reports.mkdir()
    side = chosen.prepare.patch_px
    source = generate.observed_of(chosen.selected)
    low, high = source.valid_range
    example = np.full((len(source.bands), side, side), (low + high) / 2)
    (reports / "example.json").write_text(json.dumps({source.name: example.tolist()}))
    metrics = {
        "bundle_id": load_manifest(project / "bundle").bundle_id,
        "held_out": "none",
        "patches": 0,
        "places": 0,
        "samples": 0,
        "steps": 0,
        "mean_psnr_db": 0.0,
        "mean_miou": 0.0,
        "scene_color_correlation": None,
        "rows": [],
    }
    (reports / "metrics.json").write_text(json.dumps(metrics))
    return registry.register(project / "bundle", reports, chosen.register_, run_id=None, lineage={})


def _compare(
    generator: Generator,
    client: Client,
    source: str,
    layers: list[ObservedLayer],
    files: list[bytes],
) -> dict[str, float]:
    requests = [Request(observed={source: layer}, seed=k) for k, layer in enumerate(layers)]
    _check_same(generator, client, source, requests[0], files[0])

    one = setting.take_turns(
        {
            "http": lambda: client.generate({source: files[0]}),
            "in_process": lambda: generator.generate(requests[:1]),
        },
        REPEATS,
    )
    with ThreadPoolExecutor(CALLERS) as callers:

        def all_at_once() -> None:
            calls = [
                callers.submit(client.generate, {source: file}, seed=k)
                for k, file in enumerate(files)
            ]
            for call in calls:
                call.result()

        many = setting.take_turns(
            {"http": all_at_once, "in_process": lambda: generator.generate(requests)}, ROUNDS
        )
    added = [h - p for h, p in zip(one["http"], one["in_process"], strict=True)]
    return {
        "http_p50_ms": statistics.median(one["http"]) * 1e3,
        "in_process_p50_ms": statistics.median(one["in_process"]) * 1e3,
        "http_p50_added_ms": statistics.median(added) * 1e3,
        "http_patches_per_s": CALLERS / statistics.median(many["http"]),
        "in_process_patches_per_s": CALLERS / statistics.median(many["in_process"]),
        "http_throughput_over_in_process_ratio": setting.ratio(many, "in_process", "http"),
    }


def _check_same(
    generator: Generator, client: Client, source: str, request: Request, file: bytes
) -> None:
    """Both sides must do the same work, or their times say nothing of each other."""
    (result,) = generator.generate([request])
    answered = client.generate({source: file}, seed=request.seed)
    for name, values in result.values.items():
        got = read_raster(answered.files[f"{name}.tif"]).values
        if not np.array_equal(got[:, result.valid], values[0][:, result.valid]):
            raise RuntimeError(f"the endpoint and this process generate different {name}")


def _silent(_: str) -> None:
    """Nobody reads the services' progress here."""


def main() -> None:
    """Measure for as long as the command says, and write result and page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve")
    parser.add_argument("--overload-s", type=float, default=OVERLOAD_S, metavar="SECONDS")
    parser.add_argument("--callers-s", type=float, default=CALLERS_S, metavar="SECONDS")
    parser.add_argument("--show", action="store_true", help="print the figures, write nothing")
    chosen = parser.parse_args()
    figures, notes = measure(chosen.overload_s, chosen.callers_s)
    for key, value in figures.items():
        print(f"{key:48} {value:.4g}", flush=True)
    if not chosen.show:
        record.write("serve", figures, notes)
        record.write_page()


if __name__ == "__main__":
    main()
