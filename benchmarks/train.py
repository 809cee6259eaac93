"""Training on Ray beside the bare loop of the same step, and beside a matrix product's peak."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import setting
from benchmarks.step import MATRIX, matmul_flops_per_s, samples_per_s, training_step
from mm_model.adapters.mlflow_reporter import read_journal
from mm_model.adapters.ray_train import Job, launch
from mm_model.config import Params
from mm_model.data.stats import compute_statistics
from mm_model.data.store import PatchStore
from mm_model.generative.precision import used_precision
from mm_model.nn.model import SceneModel
from mm_model.training.dataset import PatchDataset
from mm_model.training.loop import LOG_EVERY, make_state
from mm_model.training.step import draw

PLACES = 4
STEPS = 60
WINDOWS_LEFT_OUT = 2  # in which allocators and DDP's buckets settle
TURNS = 2
BARE_STEPS = 30


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """The two sides in turn: bare, Ray, bare, Ray, bare."""
    chosen = setting.params()
    precision = used_precision(chosen.train.precision, torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        with setting.temporary_project() as folder:
            job = _job(chosen, folder)
            bare_step, flops = _bare(job)
            for _ in range(5):
                bare_step()
            batch = job.config.batch
            bare, full = [samples_per_s(bare_step, batch, BARE_STEPS)], []
            peaks = [matmul_flops_per_s(precision=precision)]
            for _ in range(TURNS):
                full.append(_full(job))
                bare.append(samples_per_s(bare_step, batch, BARE_STEPS))
                peaks.append(matmul_flops_per_s(precision=precision))
    finally:
        torch.set_num_threads(threads)
    # Each Ray run is compared with the mean of the bare runs before and after it.
    ratios = [f * 2 / (a + b) for f, a, b in zip(full, bare, bare[1:], strict=False)]
    bare_rate, peak = statistics.median(bare), statistics.median(peaks)
    config, side = chosen.train, MATRIX["cpu"]
    figures = {
        "train_samples_per_s": statistics.median(full),
        "train_bare_loop_samples_per_s": bare_rate,
        "train_full_path_over_bare_loop_ratio": statistics.median(ratios),
        "train_flops_per_sample": flops / config.batch,
        "train_matmul_peak_gflops": peak / 1e9,
        "train_matmul_peak_share": flops / config.batch * bare_rate / peak,
        "train_full_path_matmul_peak_share": flops / config.batch * statistics.median(full) / peak,
    }
    notes = {
        "": f"Size `{chosen.model.size}`, batch {config.batch}, {precision}, "
        f"{chosen.prepare.patch_px} px; {config.workers} Ray workers, or one process with "
        f"{os.cpu_count()} threads.",
        "train_samples_per_s": "store, batches, step, averaging, journal, on Ray Train; settled",
        "train_bare_loop_samples_per_s": "one process; batch and its randomness lie in memory",
        "train_flops_per_sample": "forward and backward, counted by torch",
        "train_matmul_peak_gflops": f"product of two {side} x {side} {precision} matrices",
        "train_matmul_peak_share": "of the bare loop; its time holds the optimiser, too",
        "train_full_path_matmul_peak_share": "of the whole path, which has a worker for each core",
    }
    return figures, notes


def _job(chosen: Params, folder: Path) -> Job:
    store = setting.make_store(chosen, folder / "patches", PLACES)
    positions = tuple(range(len(store)))
    statistics_ = compute_statistics(store, positions, chosen.selected)
    return Job(
        run=folder / "run",
        fingerprint="benchmark",
        store=store.path,
        positions=positions,
        shown=(),
        start=None,
        add=None,
        statistics=statistics_,
        seen_sets=statistics_["sets"],
        modalities=chosen.selected,
        size=chosen.model.chosen,
        patch_px=chosen.prepare.patch_px,
        config=chosen.train.model_copy(update={"steps": STEPS, "checkpoint_every": STEPS}),
    )


def _full(job: Job) -> float:
    """Samples a second of a training on Ray, by its own reports."""
    job = replace(job, run=Path(tempfile.mkdtemp(dir=job.run.parent)))
    launch(job)
    reports = [r for r in read_journal(job.run)[0] if r["kind"] == "metrics"]
    shutil.rmtree(job.run)
    if len(reports) != STEPS // LOG_EVERY:
        raise RuntimeError(f"{len(reports)} reports: {json.dumps(reports)[:500]}")
    rates = [float(r["values"]["samples_per_s"]) for r in reports[WINDOWS_LEFT_OUT:]]
    return statistics.median(rates)


def _bare(job: Job) -> tuple[Callable[[], None], int]:
    """One step on what lies in memory, and its floating-point operations."""
    config = job.config
    state = make_state(job.model(), config)
    model: SceneModel = state.model  # type: ignore[assignment]
    dataset = PatchDataset(
        PatchStore(job.store), job.positions, job.modalities, seed=config.seed, batch=config.batch
    )
    batches = []
    for number, (_, scene, known) in enumerate(dataset.batches(0, 8)):
        x, mask = model.codec.encode(scene)
        draws = draw(model, config.seed, number, range(config.batch), mask)
        batches.append((x, mask, known, draws))
    return training_step(state, batches, config)
