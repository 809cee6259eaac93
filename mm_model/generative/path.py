"""The straight path from noise (t = 0) to data (t = 1).

Symbols: x₁ data, x₀ noise, x_t = t·x₁ + (1−t)·x₀, velocity v = dx_t/dt = x₁ − x₀. The networks
predict the clean x₁, written x̂; everything else follows from it.
"""

from __future__ import annotations

from torch import Tensor


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t; t broadcasts."""
    return t * data + (1 - t) * noise


def velocity(estimate: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v̂ = (x̂ − x_t) / (1 − t), for t < 1."""
    return (estimate - x_t) / (1 - t)


def clean(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """x̂ = x_t + (1 − t)·v̂, the inverse of `velocity`."""
    return x_t + (1 - t) * velocity


def advance(estimate: Tensor, x_t: Tensor, t: float, t_next: float) -> Tensor:
    """One Euler step from t to t_next along the velocity of x̂; exactly x̂ for t_next = 1."""
    if t_next == 1:
        return estimate
    return x_t + (t_next - t) / (1 - t) * (estimate - x_t)


def step_times(steps: int, power: float = 1) -> list[float]:
    """Where steps begin, and 1: (k/steps)^power. Equal steps at 1, above it shorter early ones,
    below it shorter late ones.
    """
    return [(k / steps) ** power for k in range(steps + 1)]
