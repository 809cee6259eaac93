"""Sets of all modalities from nothing: are they distributed as real ones, and do they agree?

Every figure stands beside the same figure of a second real set of other places (`real`, the floor)
and of real patches whose modalities were dealt out anew (`shuffled`: each fine, together wrong).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.model.judges import Judges
from benchmarks.model.methods import STEPS, SceneMethod
from benchmarks.model.regimes import Regime
from mm_model.evaluation import distributions
from mm_model.evaluation.evaluate import _in_parallel
from mm_model.scene import Scene
from mm_model.training.dataset import collate

_AT_ONCE = 8
OTHER_STEPS = (32,)  # beside those of the product


def evaluate_joint(
    method: SceneMethod, regime: Regime, judges: Judges, *, sets: int, seed: int
) -> dict[str, Any]:
    """All figures, generated beside real and shuffled.

    Args:
        method: trained.
        regime: with reference patches.
        judges: of that regime.
        sets: how many to make; as many as the references hold, at most.
        seed: of the sets that are made; no two have any in common.
    """
    count = min(sets, *map(len, regime.reference_at))
    reference, other = (real_sets(regime, at[:count]) for at in regime.reference_at)
    groups = {
        "generated": make_sets(method, regime, count, seed=seed),
        "real": other,
        "shuffled": shuffled(regime, reference),
    }
    expected = judges.describe(reference)
    record: dict[str, Any] = {
        "sets": count,
        "features": {n: compare(expected, judges.describe(x)) for n, x in groups.items()},
        "consistency": {n: judges.consistency(x) for n, x in groups.items()},
        "pixels": {n: _pixels(regime, reference, groups[n]) for n in ("generated", "real")},
        "steps": {},
    }
    for steps in OTHER_STEPS:
        made = judges.describe(make_sets(method, regime, count, steps, seed=seed))
        record["steps"][str(steps)] = distributions.frechet_distance(expected, made)
    record["steps"][str(STEPS)] = record["features"]["generated"]["frechet"]
    return record


def compare(real: distributions.Features, other: distributions.Features) -> dict[str, float]:
    """Figures of a set of features beside real ones, equal in number."""
    k = min(5, len(real) - 2)
    precision, recall = distributions.precision_recall(real, other, k)
    return {
        "frechet": distributions.frechet_distance(real, other),
        "kernel": distributions.kernel_distance(real, other, seed=0),
        "one_nn_accuracy": distributions.one_nn_accuracy(real, other),
        "precision": precision,
        "recall": recall,
        "pairwise_distance": distributions.mean_pairwise_distance(other),
        "pairwise_distance_of_real": distributions.mean_pairwise_distance(real),
    }


def real_sets(regime: Regime, positions: Sequence[int]) -> Tensor:
    """Reference patches as sets [N, C, H, W] in model space."""
    patches = [regime.reference.read(p, regime.names) for p in positions]
    return regime.codec.encode(collate(patches, regime.modalities))[0]


def make_sets(
    method: SceneMethod, regime: Regime, count: int, steps: int = STEPS, *, seed: int = 0
) -> Tensor:
    """Generated sets [N, C, H, W], as model space has them after a way through physical units."""

    def make(first: int) -> Tensor:
        seeds = range(seed * count + first, seed * count + min(first + _AT_ONCE, count))
        return through_units(regime, method.joint(list(seeds), regime.patch_px, steps))

    return torch.cat(list(_in_parallel(make, range(0, count, _AT_ONCE))))


def through_units(regime: Regime, x: Tensor) -> Tensor:
    """What x is once it was written in physical units and read again, as every real image was."""
    values = regime.codec.decode(x, regime.names)
    valid = {n: torch.ones_like(v[:, :1], dtype=torch.bool) for n, v in values.items()}
    return regime.codec.encode(Scene(values, valid))[0]


def shuffled(regime: Regime, x: Tensor) -> Tensor:
    """The same layers, each modality of a set from another patch, and mostly another place."""
    mixed = x.clone()
    count = len(regime.names)
    for number, channels in enumerate(regime.codec.slices.values()):
        mixed[:, channels] = x[:, channels].roll(number * max(1, len(x) // count), 0)
    return mixed


def _pixels(regime: Regime, real: Tensor, other: Tensor) -> Mapping[str, Any]:
    """Distances of values and of spectra for each band of each continuous modality."""
    found = {}
    for modality in regime.modalities:
        if modality.is_categorical:
            continue
        a, b = (
            regime.codec.decode(x, [modality.name])[modality.name].numpy() for x in (real, other)
        )
        masks = [np.ones((len(v), *v.shape[2:]), np.bool_) for v in (a, b)]
        distance = distributions.band_wasserstein(
            a, b, real_valid=masks[0], generated_valid=masks[1]
        )
        spectra = [distributions.power_spectrum(v) for v in (a, b)]
        found[modality.name] = {
            "bands": list(modality.band_names),
            "unit": modality.unit,
            "wasserstein": distance.tolist(),
            "spectrum_log10": distributions.spectrum_distance(*spectra).tolist(),
        }
    return found
