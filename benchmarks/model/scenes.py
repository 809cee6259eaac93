"""What the scene knows: probes of it, and whether two modalities of one place meet in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.model.judges import continuous_channels
from benchmarks.model.methods import SceneMethod
from benchmarks.model.regimes import MAP, RGB, SAR, Regime
from mm_model.data.patch import Patch
from mm_model.evaluation import distributions, probes
from mm_model.evaluation.evaluate import _in_parallel, choose_patches
from mm_model.nn.blocks import STRIDE
from mm_model.training.dataset import collate

SHARES = {"1": 0.01, "10": 0.1, "100": 1.0}  # of the labels, in percent
PCA_COMPONENTS = 16  # as many as a scene has channels
_AT_ONCE = 8
_WATER_CLASS = "permanent water"

Reals = NDArray[Any]


def evaluate_scenes(
    method: SceneMethod, regime: Regime, *, patches: int, taught: int
) -> dict[str, Any]:
    """Retrieval and probes of one trained model.

    Args:
        method: trained; its scene is the expected one given what is shown.
        regime: probes learn from its training patches, and are judged on held-out ones.
        patches: held-out ones that are used, at most.
        taught: training patches that probes learn from.
    """
    held_out = [regime.test.read(i, regime.names) for i in regime.test_at]
    return {
        "retrieval": retrieval(method, regime, held_out[:patches]),
        "misregistration": misregistration(method, regime, held_out[:patches]),
        "probes": probe(method, regime, held_out[:patches], taught),
    }


def retrieval(method: SceneMethod, regime: Regime, patches: Sequence[Patch]) -> dict[str, float]:
    """How often the scene from colour is nearest to that from the radar of the same place."""
    fit = [p for p in patches if {RGB, SAR} <= set(p.layers)]
    colour, radar = (
        _scenes(method.scenes, regime, fit, [n]).flatten(1).numpy() for n in (RGB, SAR)
    )
    return {
        "rgb_to_sar_top1": distributions.retrieval_top1(colour, radar),
        "sar_to_rgb_top1": distributions.retrieval_top1(radar, colour),
        "chance": 1 / len(fit),
    }


def misregistration(
    method: SceneMethod, regime: Regime, patches: Sequence[Patch]
) -> dict[str, float]:
    """How often the scene from radar that fits the one from colour best is that of the same pixels,
    among those of pieces that are moved by a cell (`STRIDE` px) up, down, left, right or both.
    """
    fit = [p for p in patches if {RGB, SAR} <= set(p.layers)]
    side = regime.patch_px - 2 * STRIDE

    def scenes_of(name: str, down: int, right: int) -> Reals:
        def moved(x: Tensor, mask: Tensor) -> Tensor:
            rows, columns = (slice(m, m + side) for m in (STRIDE + down, STRIDE + right))
            return method.scenes(x[..., rows, columns], mask[..., rows, columns])

        return _scenes(moved, regime, fit, [name]).flatten(1).numpy()

    moves = [(y, x) for y in (-STRIDE, 0, STRIDE) for x in (-STRIDE, 0, STRIDE)]
    colour = scenes_of(RGB, 0, 0)
    radar = np.stack([scenes_of(SAR, *move) for move in moves])
    colour, radar = colour - colour.mean(0), radar - radar.mean((0, 1))
    likeness = (colour * radar).sum(-1) / np.linalg.norm(radar, axis=-1)
    found = likeness.argmax(0) == moves.index((0, 0))
    return {"found": float(found.mean()), "chance": 1 / len(moves)}


def probe(
    method: SceneMethod, regime: Regime, held_out: Sequence[Patch], taught: int
) -> dict[str, Any]:
    """Accuracy in percent: task → features → probe and share of labels."""
    train_at = choose_patches(regime.train, regime.positions_with(regime.names), taught, 0)
    train = [regime.train.read(i, regime.names) for i in train_at]
    whole = set(regime.names)
    test = [p for p in held_out if set(p.layers) == whole]
    (labels, known), (truth, judged) = (_labels(regime, part) for part in (train, test))
    shown = [n for n in regime.names if not regime.codec.by_name[n].is_categorical]
    torch.manual_seed(0)
    untrained = SceneMethod(regime)
    untrained.model.eval()
    pixels = [_cells_of_pixels(regime, part) for part in (train, test)]
    middle, basis = probes.pca(pixels[0][known], min(PCA_COMPONENTS, int(known.sum()) - 1))
    rows = {
        name: [_cells(_scenes(how, regime, part, shown)) for part in (train, test)]
        for name, how in (
            ("z", method.scenes),
            ("encoded_z", method.encoded),
            ("random_z", untrained.encoded),
        )
    }
    rows |= {
        "pixels": pixels,
        "pca": [probes.project(p, middle, basis) for p in pixels],
    }
    water = next(c.code for c in regime.codec.by_name[MAP].classes if c.name == _WATER_CLASS)
    tasks = {
        "cover": (labels, truth, regime.codec.by_name[MAP].class_codes),
        "water": ((labels == water) + 1, (truth == water) + 1, (1, 2)),
    }
    return {
        task: {
            name: _accuracies(a[known], y[known], b[judged], true[judged], codes)
            for name, (a, b) in rows.items()
        }
        for task, (y, true, codes) in tasks.items()
    }


def _accuracies(
    train: Reals, labels: Reals, test: Reals, truth: Reals, codes: Sequence[int]
) -> dict[str, float]:
    found = {}
    for name, share in SHARES.items():
        chosen = probes.choose_labels(labels, share, seed=0)
        linear = probes.linear_probe(train[chosen], labels[chosen], test, classes=codes, seed=0)
        nearest = probes.knn_probe(train[chosen], labels[chosen], test, classes=codes)
        for kind, guess in (("linear", linear), ("knn", nearest)):
            found[f"{kind}_{name}"] = 100 * float((guess == truth).mean())
    return found


def _labels(regime: Regime, patches: Sequence[Patch]) -> tuple[Reals, NDArray[np.bool_]]:
    layers = [p.layers[MAP] for p in patches]
    codes = np.stack([layer.values[0] for layer in layers]).astype(np.uint8)
    cells, known = probes.cell_labels(codes, np.stack([y.valid for y in layers]), STRIDE)
    return cells.ravel(), known.ravel()


def _scenes(
    how: Callable[[Tensor, Tensor], Tensor],
    regime: Regime,
    patches: Sequence[Patch],
    shown: Sequence[str],
) -> Tensor:
    def make(batch: Sequence[Patch]) -> Tensor:
        x, mask = regime.codec.encode(collate(batch, regime.modalities).only(*shown))
        return how(x, mask)

    parts = [patches[i : i + _AT_ONCE] for i in range(0, len(patches), _AT_ONCE)]
    return torch.cat(list(_in_parallel(make, parts)))


def _cells(z: Tensor) -> Reals:
    """[B, S, h, w] → [B·h·w, S], in the order of labels."""
    found: Reals = z.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    return found


def _cells_of_pixels(regime: Regime, patches: Sequence[Patch]) -> Reals:
    """All continuous values within each cell."""
    x, _ = regime.codec.encode(collate(patches, regime.modalities))
    squares = torch.nn.functional.pixel_unshuffle(x[:, continuous_channels(regime)], STRIDE)
    return _cells(squares)
