"""What x_t tells of the clean x, in closed form, beside what everything else tells.

x_t = t·x + (1 − t)·noise is a measurement of x with known noise. For a value that the context
expects to be Gaussian, and for classes, the posterior is then known; the decoder has to learn the
context alone.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

DATA_VARIANCE = 0.45  # of a channel in model space, about
SCALES_PX = (1, 2, 4, 8)
_MIN_REMAINING_TIME = 0.05  # of likelihoods: nobody is asked closer to the end


def gain(t: Tensor, variance: Tensor | float) -> Tensor:
    """Wiener gain g = t·s² / (t²·s² + (1 − t)²), for a prior of variance s²."""
    return t * variance / (t.square() * variance + (1 - t).square())


def posterior_mean(mean: Tensor, variances: Tensor, x_t: Tensor, t: Tensor, where: Tensor) -> Tensor:
    """E[x | x_t] for an x that departs from its expectation m by more the coarser one looks.

    The measured departure x_t − t·m is split into what averages of 2, 4 and 8 px leave and these
    averages, in each of which noise is white and x has a variance s² of its own, and each counts
    with its Wiener gain. So the level of a field is known early, when its pixels are still noise;
    were all scales one, the convolutions would have to learn that, and overshoot until they have.

    Args:
        mean: m, [B, C, H, W]; sides are multiples of the coarsest scale.
        variances: s² of each scale, [B, C, len(SCALES_PX)], finest first.
        x_t, t: the measurement and its time, [B, C, H, W] and [B, C, 1, 1].
        where: bool [B, C, H, W], the pixels that are measured.
    """
    weight = where.to(mean.dtype)
    departure = (x_t - t * mean) * weight
    gains = gain(t[..., None], variances[:, :, None, None]).unbind(-1)
    result, finer = mean, departure
    for side, finer_gain in zip(SCALES_PX[1:], gains, strict=False):
        share = F.avg_pool2d(weight, side).clamp_min(1e-6)
        coarser = F.interpolate(
            F.avg_pool2d(departure, side) / share,
            scale_factor=side,
            mode="bilinear",
            align_corners=False,
        )
        result = result + finer_gain * (finer - coarser)
        finer = coarser
    return result + gains[-1] * finer


def posterior_logits(logits: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Logits plus the log-likelihood of one-hot classes, t·x_t / (1 − t)² up to a constant."""
    return logits + x_t * t / (1 - t).clamp_min(_MIN_REMAINING_TIME).square()
