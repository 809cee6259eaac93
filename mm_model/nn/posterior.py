"""What x_t tells of the clean x, in closed form, beside what everything else tells.

x_t = t·x + (1 − t)·noise is a measurement of x with known noise. For a value that the context
expects to be Gaussian, and for classes, the posterior is then known; the decoder has to learn the
context alone.
"""

from __future__ import annotations

from torch import Tensor

DATA_VARIANCE = 0.45  # of a channel in model space, about
_MIN_REMAINING_TIME = 0.05  # of likelihoods: nobody is asked closer to the end


def gain(t: Tensor, variance: Tensor | float) -> Tensor:
    """Wiener gain g = t·s² / (t²·s² + (1 − t)²), for a prior of variance s²."""
    return t * variance / (t.square() * variance + (1 - t).square())


def posterior_mean(mean: Tensor, variance: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """E[x | x_t] = m + g·(x_t − t·m) for x ~ N(m, s²); shapes broadcast."""
    g = gain(t, variance)
    return mean * (1 - t * g) + g * x_t


def posterior_logits(logits: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Logits plus the log-likelihood of one-hot classes, t·x_t / (1 − t)² up to a constant."""
    return logits + x_t * t / (1 - t).clamp_min(_MIN_REMAINING_TIME).square()
