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
_LEAST_NOISE = 1e-4  # a variance; keeps the gains well conditioned


def with_measurement(
    expected: Tensor,
    scales: Tensor,
    mixing: Tensor,
    x_t: Tensor,
    t: Tensor,
    where: Tensor,
    is_class: Tensor,
) -> Tensor:
    """What is expected of x, and what x_t measures of it.

    Neighbouring pixels and channels depart together from what is expected of them, and share their
    class. So what is measured is split into what averages of 2, 4 and 8 px leave and these
    averages, and each counts for itself: the level of a field is known early, when its pixels are
    still noise. Were all scales one, the convolutions would have to learn that, and overshoot until
    they have; were channels independent, samples would be mottled in colour.

    Values are the mean of two Gaussians, m + G·(x_t − t·m) with the `gain` of the scale; logits
    gain the likelihood of one-hot classes, t·x_t / (1 − t)² up to a constant, weighed by scale.

    Args:
        expected: m or logits, [B, C, H, W]; sides are multiples of the coarsest scale.
        scales: of values their variance, beside `SCALE_VARIANCES`, of classes the weight of the
            likelihood; [B, C, scales], finest first.
        mixing: A of correlations A·Aᵀ between values, scaled to a diagonal of 1, [scales, C, C].
        x_t: the measurement, [B, C, H, W].
        t: its time, [B, C, 1, 1].
        where: bool [B, C, H, W], the pixels that are measured.
        is_class: bool [C, 1, 1].
    """
    with torch.autocast(x_t.device.type, enabled=False):  # solving wants more digits than bf16 has
        likelihood = x_t * t / (1 - t).clamp_min(_MIN_REMAINING_TIME).square()
        measured = torch.where(is_class, likelihood, x_t - t * expected)
        measures = where.any(-1).any(-1)
        gains = gain(t[..., 0, 0] * measures, scales, mixing, is_class[:, 0, 0]).unbind(1)
        known = where.to(measured.dtype)
        levels = [measured * known]
        for _ in SCALES_PX[1:]:
            coarser = F.avg_pool2d(known, 2)
            levels.append(F.avg_pool2d(levels[-1] * known, 2) / coarser.clamp_min(1e-6))
            known = coarser
        # A Laplacian pyramid, put together from its coarsest level (Burt and Adelson 1983).
        coarser = levels[-1]
        told = _mixed(gains[-1], coarser)
        for level, by in zip(levels[-2::-1], gains[-2::-1], strict=True):
            rest = told - _mixed(by, coarser)
            told = _mixed(by, level) + F.interpolate(
                rest, scale_factor=2, mode="bilinear", align_corners=False
            )
            coarser = level
        return expected + told * where


def gain(t: Tensor, scales: Tensor, mixing: Tensor, is_class: Tensor) -> Tensor:
    """Wiener gains G = S·T·(T·S·T + N)⁻¹, [B, scales, C, C], for a prior of covariance S.

    T is the diagonal of t and N of (1 − t)². Classes have their weights on the diagonal.

    Args:
        t: [B, C], 0 where nothing is measured.
        scales: as in `with_measurement`.
        mixing: as there.
        is_class: bool [C].
    """
    spread = (scales * scales.new_tensor(SCALE_VARIANCES)).sqrt().transpose(1, 2)  # [B, L, C]
    alone = torch.eye(len(is_class), device=t.device, dtype=torch.bool)
    between = alone | ~(is_class | is_class[:, None])
    mixing = torch.where(between, mixing, 0)
    products = mixing @ mixing.transpose(1, 2)
    size = products.diagonal(dim1=1, dim2=2).clamp_min(1e-6).rsqrt()
    covariance = (
        products * (size[:, :, None] * size[:, None]) * spread[..., None] * spread[:, :, None]
    )
    t = t[:, None]
    noise = (1 - t).square().clamp_min(_LEAST_NOISE)
    of_measured = t[..., None] * covariance * t[:, :, None] + torch.diag_embed(noise)
    gains = torch.linalg.solve(of_measured, t[..., None] * covariance).transpose(2, 3)
    weights = torch.diag_embed(scales.transpose(1, 2))
    return torch.where(is_class[:, None], weights, torch.where(is_class, 0, gains))


def wiener(t: Tensor, variance: float) -> Tensor:
    """Gain g = t·s² / (t²·s² + (1 − t)²) of one value, for a prior of variance s²."""
    return t * variance / (t.square() * variance + (1 - t).square())


def _mixed(gains: Tensor, values: Tensor) -> Tensor:
    """[B, C, C] · [B, C, H, W]."""
    return (gains @ values.flatten(2)).view_as(values)
