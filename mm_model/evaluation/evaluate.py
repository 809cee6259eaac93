"""How well a bundle translates, measured on held-out patches.

Each declared row is an observed set and one target. A row takes all held-out patches that have
both; one that none has is there with `patches: 0`. All targets of an observed set are generated
jointly, as the endpoint would. Where the patches are of several ground sampling distances, the same
rows are there for each of them as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from mm_model.bundle import Bundle
from mm_model.conditions import NOTHING, stack_features
from mm_model.config import EvaluateConfig
from mm_model.data.circumstances import complete
from mm_model.data.patch import Patch
from mm_model.data.store import PatchStore
from mm_model.errors import DataError
from mm_model.evaluation import metrics
from mm_model.evaluation.scene_use import scene_use
from mm_model.generative.noise import sample_seeds
from mm_model.generative.sampler import sample
from mm_model.modalities import Modality, Quantity
from mm_model.nn.model import SceneModel
from mm_model.training.dataset import collate

_BATCH = 16  # images sampled at once: more gains nothing on CPU and costs memory
_SHOWN = 4  # patches of a picture sheet
_SCENES = 32  # patches on which the use of the scene is measured
_JOINT = 6  # sets generated from nothing

T = TypeVar("T")
U = TypeVar("U")
Samples = NDArray[Any]  # [samples, bands, H, W], physical units or class codes


@dataclass(frozen=True)
class Example:
    """A held-out patch and what was generated from a part of it; for pictures.

    Attributes:
        observed: what the model was shown of the patch.
        generated: target → [samples, bands, H, W].
    """

    patch: Patch
    observed: tuple[str, ...]
    generated: Mapping[str, Samples]


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        metrics: the content of metrics.json: summary figures, `rows`, `distances` (for each ground
            sampling distance `gsd_m`, patches, places, summary figures and rows of its own; they
            stand in `rows` together), and what was evaluated.
        modalities: of the bundle, in its order.
        examples: a few patches of each observed set.
        joint: sets of all modalities generated from nothing, target → [sets, bands, H, W].
    """

    metrics: Mapping[str, Any]
    modalities: tuple[Modality, ...]
    examples: tuple[Example, ...]
    joint: Mapping[str, Samples]


def declared_rows(modalities: Sequence[Modality]) -> list[tuple[tuple[str, ...], str]]:
    """(observed set, target): every single source to every other modality, then every modality
    from all the others.
    """
    names = [m.name for m in modalities]
    singles = [((source,), target) for source in names for target in names if source != target]
    rests = [(tuple(n for n in names if n != target), target) for target in names]
    return singles + [row for row in rests if row[0] and row not in singles]


def choose_patches(store: PatchStore, positions: Sequence[int], count: int, seed: int) -> list[int]:
    """Up to `count` positions, in turn from each place and, within it, from each of its ground
    sampling distances, in an order that the seed makes.
    """
    by_place: dict[str, list[int]] = {}
    gsd_m: dict[int, float] = {}
    for position in sorted(positions):
        first = store.rows(position).iloc[0]
        by_place.setdefault(str(first["place_id"]), []).append(position)
        gsd_m[position] = float(first["gsd_m"])
    rng = np.random.default_rng(seed)
    queues = [
        [members[i] for i in rng.permutation(len(members))]
        for _, members in sorted(by_place.items())
    ]
    queues = [queues[i] for i in rng.permutation(len(queues))]
    queues = [_in_turn(queue, gsd_m, first=i) for i, queue in enumerate(queues)]
    depth = max(map(len, queues), default=0)
    return [queue[i] for i in range(depth) for queue in queues if i < len(queue)][:count]


def _in_turn(positions: Sequence[int], gsd_m: Mapping[int, float], *, first: int) -> list[int]:
    """One of each distance in turn, beginning with number `first` (modulo); else as given."""
    distances = sorted({gsd_m[p] for p in positions})
    start = first % len(distances)
    queues = [
        [p for p in positions if gsd_m[p] == d] for d in distances[start:] + distances[:start]
    ]
    depth = max(map(len, queues))
    return [queue[i] for i in range(depth) for queue in queues if i < len(queue)]


def evaluate(
    bundle: Bundle, store: PatchStore, positions: Sequence[int], config: EvaluateConfig
) -> Evaluation:
    """Generate every declared row on held-out patches and compare with what is real.

    Args:
        bundle: the model.
        store: patches at rest.
        positions: of the held-out patches in the store; `config.patches` of them are used.
        config: how much is generated, and how.

    Raises:
        DataError: there is no held-out patch.
    """
    modalities = bundle.model.modalities
    names = [m.name for m in modalities]
    chosen = choose_patches(store, positions, config.patches, config.seed)
    patches = [patch for patch in (store.read(i, names) for i in chosen) if patch.layers]
    if not patches:
        raise DataError("held-out patches", got="none", remedy="split off places for testing")
    rows = declared_rows(modalities)
    generator = _Generator(bundle.model, config)
    scores: dict[tuple[tuple[str, ...], str], list[dict[str, Any]]] = {row: [] for row in rows}
    examples: list[Example] = []
    jobs = _jobs(rows, patches, max(1, _BATCH // config.samples))

    def draw(job: tuple[tuple[str, ...], list[Patch]]) -> list[dict[str, _Draws]]:
        observed, batch = job
        return generator.draw(batch, observed, [n for n in names if n not in observed])

    for (observed, batch), draws in track(
        zip(jobs, _in_parallel(draw, jobs), strict=True),
        total=len(jobs),
        description="evaluating",
        console=Console(stderr=True),
    ):
        for patch, drawn in zip(batch, draws, strict=True):
            for modality in modalities:
                row = (observed, modality.name)
                if row in scores and modality.name in patch.layers:
                    scores[row].append(_score(patch, modality, drawn[modality.name]))
            if sum(e.observed == observed for e in examples) < _SHOWN:
                shown = {n: d.samples for n, d in drawn.items()}
                examples.append(Example(patch, observed, shown))
    table = _table(scores, modalities)
    found = {
        **_summary(table, modalities),
        **_scene_figures(bundle.model, patches, config),
        "patches": len(patches),
        "places": len({p.place_id for p in patches}),
        "samples": config.samples,
        "steps": config.steps,
        "bundle_id": bundle.manifest.bundle_id,
        "held_out": _fingerprint(store, chosen, names, config),
        "rows": table,
        "distances": [
            _at_distance(gsd_m, patches, scores, modalities)
            for gsd_m in sorted({p.gsd_m for p in patches})
        ],
    }
    return Evaluation(found, modalities, tuple(examples), generator.joint(_JOINT))


@dataclass(frozen=True)
class _Draws:
    """Samples of one target for one patch, and their mean (likeliest class of the summed
    probabilities).
    """

    samples: Samples
    mean: NDArray[Any]


class _Generator:
    """Samples with seeds that belong to the patch, so that no batch changes them."""

    def __init__(self, model: SceneModel, config: EvaluateConfig) -> None:
        self._model, self._config = model, config

    def draw(
        self, patches: Sequence[Patch], observed: Sequence[str], targets: Sequence[str]
    ) -> list[dict[str, _Draws]]:
        """Target → draws, for each patch."""
        count = self._config.samples
        x, mask = self._encode(patches, observed)
        seeds = [s for p in patches for s in sample_seeds(count, self._config.seed, p.patch_id)]
        # What the grid tells, as in the endpoint; a caller who knows the date has to say it.
        known = torch.from_numpy(stack_features([complete(NOTHING, p.grid) for p in patches]))
        generated = sample(
            self._model,
            x.repeat_interleave(count, 0),
            mask.repeat_interleave(count, 0),
            targets,
            seeds,
            self._config.steps,
            conditions=known.repeat_interleave(count, 0),
        )
        return self._split(generated, targets, count)

    def joint(self, count: int) -> dict[str, Samples]:
        """Sets of all modalities from nothing: name → [count, bands, H, W]."""
        model = self._model

        def draw(seed: int) -> dict[str, torch.Tensor]:
            x, mask = model.codec.empty(1, model.patch_px, model.patch_px)
            made = sample(model, x, mask, model.names, [seed], self._config.steps)
            return model.codec.decode(made, model.names)

        # Each by itself: mirror images of one another would make a set look more varied than it is.
        seeds = [sample_seeds(1, self._config.seed, "joint", k)[0] for k in range(count)]
        sets = list(_in_parallel(draw, seeds))
        return {name: np.concatenate([s[name].numpy() for s in sets]) for name in model.names}

    def _encode(
        self, patches: Sequence[Patch], observed: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codec = self._model.codec
        if not observed:
            return codec.empty(len(patches), *patches[0].grid.shape)
        return codec.encode(collate(patches, codec.modalities).only(*observed))

    def _split(
        self, generated: torch.Tensor, targets: Sequence[str], count: int
    ) -> list[dict[str, _Draws]]:
        codec = self._model.codec
        places = len(generated) // count
        answers: list[dict[str, _Draws]] = [{} for _ in range(places)]
        for name, decoded in codec.decode(generated, targets).items():
            samples = decoded.numpy().reshape(places, count, *decoded.shape[1:])
            modality = codec.by_name[name]
            if modality.is_categorical:
                shares = codec.class_probabilities(generated, name)
                likeliest = shares.view(places, count, *shares.shape[1:]).sum(1).argmax(1).numpy()
                means = np.array(modality.class_codes, np.uint8)[likeliest][:, None]
            else:
                means = samples.mean(axis=1)
            for answer, drawn, mean in zip(answers, samples, means, strict=True):
                answer[name] = _Draws(drawn, mean)
        return answers


def _scene_figures(
    model: SceneModel, patches: Sequence[Patch], config: EvaluateConfig
) -> dict[str, float | None]:
    """`scene_use` over a few patches of one frame, names prefixed with `scene_`."""
    frame = patches[0].grid.shape
    fit = [p for p in patches if p.grid.shape == frame][:_SCENES]
    use = scene_use(model, fit, steps=config.steps, seed=config.seed)
    return {f"scene_{name}": _round(value) for name, value in use.items()}


def _in_parallel(function: Callable[[T], U], items: Sequence[T]) -> Iterator[U]:
    """Results in order, one core an item: the sampler works on one image at a time, which is too
    little for several threads (on a busy machine they wait for each other 40 times as long).
    """
    threads = torch.get_num_threads()
    # Each thread sets its own; this one keeps what it has.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def _jobs(
    rows: Sequence[tuple[tuple[str, ...], str]], patches: Sequence[Patch], size: int
) -> list[tuple[tuple[str, ...], list[Patch]]]:
    """Observed sets and patches to generate for, in batches of patches."""
    wanted: dict[tuple[str, ...], set[str]] = {}
    for observed, target in rows:
        wanted.setdefault(observed, set()).add(target)
    jobs = []
    # Patches that have most come first, so that they are the ones that are shown.
    richest = sorted(patches, key=lambda p: -len(p.layers))
    for observed, targets in wanted.items():
        fit = [p for p in richest if set(observed) <= set(p.layers) and targets & set(p.layers)]
        jobs += [(observed, fit[i : i + size]) for i in range(0, len(fit), size)]
    return jobs


def _score(patch: Patch, modality: Modality, drawn: _Draws) -> dict[str, Any]:
    """The measurements of one patch; `_row` puts them together."""
    layer = patch.layers[modality.name]
    truth, valid = layer.values, layer.valid
    score: dict[str, Any] = {"pixels": int(valid.sum()), "gsd_m": patch.gsd_m}
    independent = drawn.samples[::2]  # without mirror images, see `sample_seeds`
    if modality.is_categorical:
        codes = modality.class_codes
        score["each"] = sum(metrics.confusion(s[0], truth[0], valid, codes) for s in drawn.samples)
        score["mean"] = metrics.confusion(drawn.mean[0], truth[0], valid, codes)
        score["spread"] = metrics.disagreement(independent[:, 0], valid)
        return score
    span = metrics.peak(modality)
    colored = modality.quantity is Quantity.REFLECTANCE and len(modality.bands) > 1
    for key, guesses in (("each", drawn.samples), ("mean", drawn.mean[None])):
        score[key] = np.sum([metrics.errors(g, truth, valid) for g in guesses], axis=0)
        score[f"ssim_{key}"] = np.mean([metrics.ssim(g, truth, valid, span) for g in guesses])
        if colored:
            angles = [metrics.spectral_angles_deg(g, truth, valid) for g in guesses]
            score[f"angle_{key}"] = np.mean(angles) if valid.any() else math.nan
    score["spread"] = metrics.spread(independent, valid)
    score["level"] = truth[:, valid].mean() if valid.any() else math.nan
    levels = independent[:, :, valid].mean(axis=(1, 2)) if valid.any() else [math.nan]
    score["level_spread"] = np.std(levels, ddof=1) if len(levels) > 1 else math.nan
    return score


_Scores = Mapping[tuple[tuple[str, ...], str], Sequence[Mapping[str, Any]]]


def _table(scores: _Scores, modalities: Sequence[Modality]) -> list[dict[str, Any]]:
    """The rows of metrics.json, in the order of the scores."""
    by_name = {m.name: m for m in modalities}
    return [
        {"observed": list(observed), "target": target, **_row(by_name[target], measured)}
        for (observed, target), measured in scores.items()
    ]


def _at_distance(
    gsd_m: float, patches: Sequence[Patch], scores: _Scores, modalities: Sequence[Modality]
) -> dict[str, Any]:
    """Figures and rows of the patches of one ground sampling distance."""
    here = [p for p in patches if p.gsd_m == gsd_m]
    of_it = {row: [s for s in measured if s["gsd_m"] == gsd_m] for row, measured in scores.items()}
    rows = _table(of_it, modalities)
    return {
        "gsd_m": gsd_m,
        "patches": len(here),
        "places": len({p.place_id for p in here}),
        **_summary(rows, modalities),
        "rows": rows,
    }


def _row(modality: Modality, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row's figures. Errors and class counts are pooled over all pixels of all patches;
    similarity, angle and spread are means over patches. `…_of_mean` judges the mean of the samples.
    """
    row: dict[str, Any] = {
        "kind": modality.kind.value,
        "unit": modality.unit,
        "patches": len(scores),
        "pixels": sum(s["pixels"] for s in scores),
    }
    if not row["pixels"]:
        return row
    span = metrics.peak(modality)
    for key, suffix in (("each", ""), ("mean", "_of_mean")):
        pooled = sum(s[key] for s in scores)
        if modality.is_categorical:
            row[f"miou{suffix}"] = _round(metrics.mean_iou(pooled))
            row[f"accuracy{suffix}"] = _round(metrics.accuracy(pooled))
            continue
        squared, absolute, number = pooled
        row[f"psnr{suffix}_db"] = _round(metrics.psnr_db(squared / number, span))
        row[f"ssim{suffix}"] = _mean(scores, f"ssim_{key}")
        row[f"mae{suffix}"] = _round(absolute / number)
        if f"angle_{key}" in scores[0]:
            row[f"spectral_angle{suffix}_deg"] = _mean(scores, f"angle_{key}")
    row["spread"] = _mean(scores, "spread")
    if not modality.is_categorical:
        row["level_spread"] = _mean(scores, "level_spread")
        levels = [s["level"] for s in scores if s["pixels"]]
        row["real_level_spread"] = _round(np.std(levels, ddof=1)) if len(levels) > 1 else None
    return row


def _summary(table: Sequence[Mapping[str, Any]], modalities: Sequence[Modality]) -> dict[str, Any]:
    """Means over the rows with one source, and over those from all others. A figure that no row
    gives is None; one of a kind that the model lacks is absent.
    """
    kinds = {m.is_categorical for m in modalities}
    figures = [("psnr_db", False), ("psnr_of_mean_db", False), ("ssim", False)]
    figures += [("miou", True), ("miou_of_mean", True), ("accuracy", True)]
    singles = [r for r in table if len(r["observed"]) == 1]
    rests = [r for r in table if len(r["observed"]) == len(modalities) - 1]
    reflectance = {m.name for m in modalities if m.quantity is Quantity.REFLECTANCE}
    colored = [r for r in singles if r["target"] in reflectance]
    summary: dict[str, Any] = {
        f"{prefix}_{name}": _mean(rows, name)
        for prefix, rows in (("mean", singles), ("leave_one_out", rests))
        for name, categorical in figures
        if categorical in kinds
    }
    summary["sample_color_spread"] = _mean(colored, "level_spread")
    summary["real_color_spread"] = _mean(colored, "real_level_spread")
    summary["rows_without_patches"] = sum(not r["patches"] for r in table)
    return summary


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Mean of what is known; None if nothing is."""
    known = [r[key] for r in records if r.get(key) is not None and math.isfinite(r[key])]
    return _round(np.mean(known)) if known else None


def _round(value: Any) -> float | None:
    """Six significant digits, so that metrics.json can be read; None for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _fingerprint(
    store: PatchStore, positions: Sequence[int], names: Sequence[str], config: EvaluateConfig
) -> str:
    """Identity of what was asked: two evaluations that share it can be compared."""
    table = [
        store.rows(i)[["patch_id", "modality", "sha256"]].to_numpy().tolist() for i in positions
    ]
    asked = [config.model_dump(), list(names), table]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
