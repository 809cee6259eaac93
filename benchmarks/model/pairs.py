"""Every modality from every other one, on held-out patches, scored as the project's evaluation is.

One sample is judged (figures without a suffix: the mean over samples), and the mean of all samples
(`…_of_mean`): of values in physical units, or the class with the largest sum of probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.model.methods import STEPS, Method, Question
from benchmarks.model.regimes import RGB, SAR, Regime, ordered_pairs
from mm_model.data.patch import Patch
from mm_model.evaluation.distributions import calibration_of, rank_histogram
from mm_model.evaluation.evaluate import _Draws, _in_parallel, _row, _score
from mm_model.generative.noise import sample_seeds
from mm_model.training.dataset import collate

PATCHES_AT_ONCE = 4
Row = dict[str, Any]


@dataclass
class _Found:
    """What is known of one pair so far."""

    scores: list[Row] = field(default_factory=list)
    ranks: NDArray[np.int64] | int = 0


def key(source: str, target: str) -> str:
    """Name of an ordered pair in records."""
    return f"{source}→{target}"


def seeds_of(patches: Sequence[Patch], count: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Seeds that belong to the patch, so that no batch changes a sample."""
    return tuple(tuple(sample_seeds(count, "pairs", seed, p.patch_id)) for p in patches)


def ask(
    regime: Regime,
    patches: Sequence[Patch],
    source: str,
    targets: Sequence[str],
    *,
    samples: int,
    steps: int = STEPS,
    seed: int = 0,
) -> Question:
    """The question that shows one modality of the patches."""
    x, mask = regime.codec.encode(collate(patches, regime.modalities).only(source))
    return Question(x, mask, source, tuple(targets), seeds_of(patches, samples, seed), steps)


def evaluate_pairs(
    method: Method,
    regime: Regime,
    *,
    patches: int,
    samples: int,
    steps: int = STEPS,
    seed: int = 0,
    only: tuple[str, str] | None = None,
) -> dict[str, Row]:
    """A row of figures for each ordered pair that a held-out patch has.

    Args:
        method: trained.
        regime: whose held-out patches are shown.
        patches: that a source is taken from, at most.
        samples: of each patch.
        steps: of samplers that have any.
        seed: of the samples.
        only: one pair instead of all.
    """
    rows: dict[str, Row] = {}
    wanted = [only] if only else ordered_pairs(regime.names)
    for source in regime.names:
        targets = [t for s, t in wanted if s == source]
        held_out = [regime.test.read(i, regime.names) for i in regime.test_at]
        fit = [p for p in held_out if source in p.layers and len(p.layers) > 1][:patches]
        if not targets or not fit:
            continue
        found = {t: _Found() for t in targets}
        starts = range(0, len(fit), PATCHES_AT_ONCE)
        batches = [fit[i : i + PATCHES_AT_ONCE] for i in starts]
        for part in _in_parallel(
            _scorer(method, regime, source, targets, samples, steps, seed), batches
        ):
            for target, (scores, ranks) in part.items():
                found[target].scores += scores
                found[target].ranks = found[target].ranks + ranks
        for target, so_far in found.items():
            row = _row(regime.codec.by_name[target], so_far.scores)
            if isinstance(so_far.ranks, np.ndarray):
                row |= _calibration(so_far.ranks)
            rows[key(source, target)] = row
    return rows


def _scorer(
    method: Method,
    regime: Regime,
    source: str,
    targets: Sequence[str],
    samples: int,
    steps: int,
    seed: int,
) -> Callable[[Sequence[Patch]], dict[str, tuple[list[Row], NDArray[np.int64] | int]]]:
    def score(batch: Sequence[Patch]) -> dict[str, tuple[list[Row], NDArray[np.int64] | int]]:
        there = [t for t in targets if any(t in p.layers for p in batch)]
        question = ask(regime, batch, source, there, samples=samples, steps=steps, seed=seed)
        draws = draws_of(regime, method.answer(question), there)
        scored = {}
        for target in there:
            modality = regime.codec.by_name[target]
            fit = [(p, d) for p, d in zip(batch, draws[target], strict=True) if target in p.layers]
            scores = [_score(p, modality, d) for p, d in fit]
            ranks: NDArray[np.int64] | int = 0
            if {source, target} == {SAR, RGB} and len(fit[0][1].samples) > 2:
                layers = [p.layers[target] for p, _ in fit]
                independent = [d.samples[::2] for _, d in fit]  # without mirror images
                histograms = [
                    rank_histogram(s, layer.values, layer.valid, seed=0)
                    for s, layer in zip(independent, layers, strict=True)
                ]
                ranks = np.sum(histograms, axis=0)
            scored[target] = (scores, ranks)
        return scored

    return score


def draws_of(regime: Regime, made: Tensor, targets: Sequence[str]) -> Mapping[str, list[_Draws]]:
    """Samples [B, S, C, H, W] in model space → for each target and patch, its samples and their
    mean, in physical units.
    """
    codec, count = regime.codec, made.shape[1]
    flat = made.flatten(0, 1)
    answers: dict[str, list[_Draws]] = {}
    for name, decoded in codec.decode(flat, targets).items():
        modality = codec.by_name[name]
        samples = decoded.view(-1, count, *decoded.shape[1:]).numpy()
        if modality.is_categorical:
            each = codec.class_probabilities(flat, name)
            shares = each.view(-1, count, *each.shape[1:]).sum(1)
            codes = torch.tensor(modality.class_codes, dtype=torch.uint8)
            means = codes[shares.argmax(1, keepdim=True)].numpy()
        else:
            means = samples.mean(axis=1)
        answers[name] = [_Draws(s, m) for s, m in zip(samples, means, strict=True)]
    return answers


def _calibration(ranks: NDArray[np.int64]) -> Row:
    found = calibration_of(ranks)
    return {
        "coverage": found.coverage,
        "nominal_coverage": found.nominal,
        "unevenness": found.unevenness,
        "ranks": ranks.tolist(),
    }


def summary(rows: Mapping[str, Row]) -> dict[str, float]:
    """Means over the continuous pairs, and over those to classes; one sample, and mean of all."""
    found = {}
    for name, kind in (("psnr", "_db"), ("ssim", ""), ("miou", ""), ("accuracy", "")):
        for suffix in ("", "_of_mean"):
            column = f"{name}{suffix}{kind}"
            values = [r[column] for r in rows.values() if r.get(column) is not None]
            if values:
                found[f"pairs_{column}"] = float(np.mean(values))
    return found
