"""What x_t tells of the clean x, in closed form, beside what everything else tells.

x_t = t·x + (1 − t)·noise is a measurement of x with known noise. For a value that the context
expects to be Gaussian, and for classes, the posterior is then known; the decoder has to learn the
context alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DATA_VARIANCE = 0.45  # of a channel in model space, about
SCALES_PX = (1, 2, 4, 8)
SCALE_VARIANCES = (0.1, 0.27, 0.74, 3.3)  # to begin with: structure is larger than a pixel
_MIN_REMAINING_TIME = 0.05  # of likelihoods: nobody is asked closer to the end


def gain(t: Tensor, variance: Tensor | float) -> Tensor:
    """Wiener gain g = t·s² / (t²·s² + (1 − t)²), for a prior of variance s²."""
    return t * variance / (t.square() * variance + (1 - t).square())


def with_measurement(
    expected: Tensor, scales: Tensor, x_t: Tensor, t: Tensor, where: Tensor, is_class: Tensor
) -> Tensor:
    """What is expected of x, and what x_t measures of it.

    Neighbouring pixels depart together from what is expected of them, and share their class. So
    what is measured is split into what averages of 2, 4 and 8 px leave and these averages, and each
    counts for itself: the level of a field is known early, when its pixels are still noise. Were
    all scales one, the convolutions would have to learn that, and overshoot until they have.

    Values are the mean of two Gaussians, m + g·(x_t − t·m) with the `gain` of the scale; logits
    gain the likelihood of one-hot classes, t·x_t / (1 − t)² up to a constant, weighed by scale.

    Args:
        expected: m or logits, [B, C, H, W]; sides are multiples of the coarsest scale.
        scales: of values their variance, beside `SCALE_VARIANCES`, of classes the weight of the
            likelihood; [B, C, scales], finest first.
        x_t: the measurement, [B, C, H, W].
        t: its time, [B, C, 1, 1].
        where: bool [B, C, H, W], the pixels that are measured.
        is_class: bool [C, 1, 1].
    """
    likelihood = x_t * t / (1 - t).clamp_min(_MIN_REMAINING_TIME).square()
    measured = torch.where(is_class, likelihood, x_t - t * expected)
    gains = gain(t[..., 0], scales * scales.new_tensor(SCALE_VARIANCES))
    weights = torch.where(is_class[..., 0], scales, gains)[:, :, None, None].unbind(-1)
    known = where.to(measured.dtype)
    levels = [measured * known]
    for _ in SCALES_PX[1:]:
        coarser = F.avg_pool2d(known, 2)
        levels.append(F.avg_pool2d(levels[-1] * known, 2) / coarser.clamp_min(1e-6))
        known = coarser
    # A Laplacian pyramid, put together again from its coarsest level (Burt and Adelson 1983).
    coarser = levels[-1]
    told = weights[-1] * coarser
    for level, weight in zip(levels[-2::-1], weights[-2::-1], strict=True):
        finer = told - weight * coarser
        told = weight * level + F.interpolate(
            finer, scale_factor=2, mode="bilinear", align_corners=False
        )
        coarser = level
    return expected + told * where
