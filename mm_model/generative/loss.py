"""Losses of clean-image prediction, weighted as velocity losses, over valid pixels only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MIN_REMAINING_TIME = 0.05  # floor of 1 − t in the weights


def velocity_weight(t: Tensor) -> Tensor:
    """1 / max(1−t, floor)²: what turns |x̂ − x|² into the squared error of the velocity."""
    return (1 - t).clamp_min(MIN_REMAINING_TIME) ** -2


def class_weight(t: Tensor) -> Tensor:
    """1 / max(1−t, floor), for cross-entropy."""
    return (1 - t).clamp_min(MIN_REMAINING_TIME) ** -1


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [B, K, H, W] over all channels and the masked pixels [B, H, W]: [B].

    0 where no pixel is in the mask. Values outside the mask must be finite.
    """
    weight = mask.to(values.dtype)
    total = (values.mean(1) * weight).sum((1, 2))
    return total / weight.sum((1, 2)).clamp_min(1)


def cross_entropy(logits: Tensor, one_hot: Tensor) -> Tensor:
    """−Σ p log softmax(logits), [B, 1, H, W], for class probabilities p [B, K, H, W]."""
    return -(one_hot * F.log_softmax(logits, 1)).sum(1, keepdim=True)
