"""From a pipeline folder's artefacts to a bundle: one training, resumed where it was cut off."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from mm_model import __version__
from mm_model.adapters.mlflow_registry import collect_lineage
from mm_model.adapters.mlflow_reporter import Journal, read_journal, run_id_of, shipping
from mm_model.adapters.ray_train import Job, launch
from mm_model.adapters.train_progress import following
from mm_model.bundle import Manifest, load_manifest, save_bundle
from mm_model.config import Params
from mm_model.data.index import INDEX
from mm_model.data.licences import licences
from mm_model.data.split import TRAIN, VALIDATION, load_split
from mm_model.data.store import PatchStore
from mm_model.errors import ConfigError
from mm_model.pretrained import NAME, PRETRAINED
from mm_model.training.start import check_start, join_correlations, join_statistics, merge_sets

_SHOWN = 6  # held-out patches in a picture sheet
_FINISHED = "finished"
_BUNDLE = "models/bundle"
# What makes two trainings of the same data and parameters differ.
_CODE = (
    "codec.py",
    "conditions.py",
    "data/circumstances.py",
    "data/store.py",
    "generative",
    "geo/sun.py",
    "modalities.py",
    "nn",
    "training",
)


def train_bundle(params: Params, folder: Path) -> dict[str, Any]:
    """Train on a pipeline folder and write models/bundle there.

    A training that was cut off is resumed if parameters, data and code are still the same; else
    another begins. One that is finished is never taken for a new one.

    Returns:
        The content of models/train.json: steps, samples, seconds, samples_per_s, losses, run_id,
        run_dir (for `flush_backlog`), bundle_id.
    """
    folder = folder.absolute()
    job = make_job(params, folder)
    # Read now: at the end, another bundle may stand where the one that it begins with stood.
    model, begun = job.model(), load_manifest(job.start) if job.start else None
    lineage = collect_lineage(folder, _flow_run_id())
    journal = Journal(job.run)
    config = {
        "model": {"size": params.model.size, **job.size.model_dump()},
        "modalities": ",".join(m.name for m in job.modalities),
        "train": job.config.model_dump(),
    }
    journal.begin(params.register_.model, job.run.name, params=config, tags=lineage)
    with shipping(job.run):
        try:
            with following(job.run, job.config.steps):
                launch(job)
        except Exception:
            journal.end("FAILED")
            raise
        except BaseException:
            journal.end("KILLED")
            raise
        journal.end("FINISHED")
    summary = {**_figures(job), "run_id": run_id_of(job.run), "run_dir": str(job.run)}
    job.checkpoints.load_average(model)
    split = _read_statistics(folder)
    figures = {k: summary[k] for k in ("steps", "samples", "seconds", "losses")}
    provenance = {
        **lineage,
        "version": __version__,
        "params": json.loads(params.model_dump_json(by_alias=True)),
        "start": {"bundle_id": begun.bundle_id, **begun.effort} if begun else None,
        "sources": {
            **(begun.provenance.get("sources", {}) if begun else {}),
            **licences(params.prepare, params.selected, folder),
        },
        "fingerprint": job.fingerprint,
        "mlflow_run_id": summary["run_id"],
        "training": {**figures, "patches": split["patches"], "places": split["places"]},
        "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    manifest = Manifest(model.config, params.prepare.gsd_m, job.statistics, provenance)
    saved = save_bundle(folder / _BUNDLE, model, manifest)
    (job.run / _FINISHED).touch()
    shutil.rmtree(job.run / "checkpoints", ignore_errors=True)
    shutil.rmtree(job.run / "ray", ignore_errors=True)
    return {**summary, "bundle_id": saved.bundle_id}


def make_job(params: Params, folder: Path) -> Job:
    """The training that a pipeline folder, given by its absolute path, asks for.

    Raises:
        ConfigError: `train.start` names no bundle that these parameters can go on from.
        BundleError: that bundle is not there, or damaged.
    """
    start = _start_folder(params.train.start, folder)
    begun = load_manifest(start) if start else None
    if start and begun:
        size = params.model.chosen.model_dump()
        check_start(begun, start, params.selected, size, params.train.add)
    data = folder / "data"
    store = PatchStore(data / "patches")
    splits = load_split(data / "splits.parquet", store.patch_ids)
    measured = _read_statistics(folder)
    statistics: Mapping[str, Any] = measured
    seen = measured["sets"]
    files = [data / "patches" / INDEX, data / "splits.parquet", data / "stats.json"]
    fingerprint = _fingerprint(params, files, begun.bundle_id if begun else None)
    positions, modalities = splits[TRAIN], params.selected
    if begun:
        modalities = begun.modalities
        statistics = join_correlations(begun.statistics, measured)
    if begun and (add := params.train.add):
        modalities = (*modalities, next(m for m in params.selected if m.name == add))
        statistics = join_statistics(statistics, measured, add)
        # It learns from where it is beside something that the scene is known by.
        positions = [i for i in positions if add in (has := store.described(i)) and len(has) > 1]
    elif begun:
        seen = merge_sets(begun.model["seen_sets"], seen)
    return Job(
        run=_run_folder(folder / "models" / "runs", fingerprint[:12]),
        fingerprint=fingerprint,
        store=data / "patches",
        positions=tuple(positions),
        shown=_richest(store, splits[VALIDATION], _SHOWN),
        start=start,
        add=params.train.add,
        statistics=statistics,
        seen_sets=seen,
        modalities=modalities,
        size=params.model.chosen,
        patch_px=params.prepare.patch_px,
        config=params.train,
    )


def _start_folder(start: str, folder: Path) -> Path | None:
    """Where the bundle lies that a training begins with; None for random weights."""
    if start == "scratch":
        return None
    path = PRETRAINED if start == NAME else folder / start
    if path.resolve() == (folder / _BUNDLE).resolve():
        raise ConfigError(
            "train.start is the bundle that this training replaces",
            got=start,
            remedy="copy it elsewhere, and name the copy",
        )
    return path


def _read_statistics(folder: Path) -> dict[str, Any]:
    """Of the training split, as the stage stats wrote them."""
    read: dict[str, Any] = json.loads((folder / "data" / "stats.json").read_bytes())
    return read


def _fingerprint(params: Params, files: list[Path], start_id: str | None) -> str:
    package = Path(__file__).parents[1]
    code = [f for part in _CODE for f in sorted([package / part, *(package / part).rglob("*.py")])]
    chosen = {
        "modalities": [m.to_dict() for m in params.selected],
        "size": params.model.chosen.model_dump(),
        "train": params.train.model_dump(),
        "start": start_id,
        "patch_px": params.prepare.patch_px,
        # The index holds the SHA-256 of every layer.
        "data": [hashlib.sha256(f.read_bytes()).hexdigest() for f in files],
        "code": [hashlib.sha256(f.read_bytes()).hexdigest() for f in code if f.is_file()],
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def _run_folder(runs: Path, name: str) -> Path:
    """The first folder of this name whose training is not finished."""
    number = 1
    while (runs / f"{name}-{number}" / _FINISHED).exists():
        number += 1
    return runs / f"{name}-{number}"


def _richest(store: PatchStore, positions: list[int], count: int) -> tuple[int, ...]:
    """Evenly spread patches among those that have the most modalities."""
    sizes = {i: len(store.rows(i)) for i in positions}
    best = [i for i in positions if sizes[i] == max(sizes.values())]
    return tuple(best[i * len(best) // count] for i in range(min(count, len(best))))


def _figures(job: Job) -> dict[str, Any]:
    """Totals of a training, all its attempts together."""
    records = [r for r in read_journal(job.run)[0] if r["kind"] == "metrics"]
    steps = [0, *(r["step"] for r in records)]
    samples = [(b - a) * job.config.batch for a, b in pairwise(steps)]
    rates = [r["values"]["samples_per_s"] for r in records]
    seconds = sum(n / rate for n, rate in zip(samples, rates, strict=True))
    losses = {k: v for k, v in records[-1]["values"].items() if k.startswith("loss")}
    return {
        "steps": steps[-1],
        "samples": sum(samples),
        "seconds": round(seconds, 3),
        "samples_per_s": round(sum(samples) / seconds, 3),
        "losses": losses,
    }


def _flow_run_id() -> str:
    names = ("MM_FLOW_RUN_ID", "PREFECT__FLOW_RUN_ID")
    return next((os.environ[n] for n in names if n in os.environ), "")
