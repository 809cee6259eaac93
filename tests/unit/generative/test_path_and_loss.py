from __future__ import annotations

import itertools

import pytest
import torch

from mm_model.generative.loss import (
    MIN_REMAINING_TIME,
    class_weight,
    cross_entropy,
    masked_mean,
    velocity_weight,
)
from mm_model.generative.path import advance, clean, interpolate, velocity
from mm_model.generative.sampler import euler

SOURCE = torch.Generator().manual_seed(0)
DATA, NOISE = torch.randn(2, 3, 4, 5, 6, generator=SOURCE, dtype=torch.float64)
T = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)[:, None, None, None]


def test_endpoints_are_noise_and_data() -> None:
    assert torch.equal(interpolate(DATA, NOISE, torch.zeros_like(T)), NOISE)
    assert torch.equal(interpolate(DATA, NOISE, torch.ones_like(T)), DATA)


def test_velocity_is_the_derivative_of_the_path() -> None:
    ahead, behind = (interpolate(DATA, NOISE, T + d) for d in (1e-3, -1e-3))
    derivative = (ahead - behind) / 2e-3  # exact up to rounding: the path is straight
    x_t = interpolate(DATA, NOISE, T)
    assert torch.allclose(velocity(DATA, x_t, T), derivative, rtol=0, atol=1e-12)
    assert torch.allclose(derivative, DATA - NOISE, rtol=0, atol=1e-12)


def test_velocity_and_clean_are_inverse() -> None:
    x_t = interpolate(DATA, NOISE, T)
    assert torch.allclose(clean(velocity(NOISE, x_t, T), x_t, T), NOISE, atol=1e-12)


def test_weights_turn_errors_of_x_into_errors_of_v() -> None:
    estimate = DATA + 0.3
    x_t = interpolate(DATA, NOISE, T)
    of_v = (velocity(estimate, x_t, T) - velocity(DATA, x_t, T)).square()
    assert torch.allclose(of_v, (estimate - DATA).square() * velocity_weight(T), atol=1e-9)
    late = torch.tensor([0.999], dtype=torch.float64)
    assert velocity_weight(late).item() == pytest.approx(MIN_REMAINING_TIME**-2)
    assert class_weight(late).item() == pytest.approx(1 / MIN_REMAINING_TIME)


def test_masked_mean_counts_valid_pixels_of_each_sample() -> None:
    values = torch.rand(3, 2, 4, 5, dtype=torch.float64)
    mask = torch.rand(3, 4, 5) < 0.5
    mask[1] = False
    expected = [
        values[b].permute(1, 2, 0)[mask[b]].mean().item() if mask[b].any() else 0.0
        for b in range(3)
    ]
    assert masked_mean(values, mask).tolist() == pytest.approx(expected)


def test_cross_entropy_is_least_at_the_truth() -> None:
    one_hot = torch.eye(4, dtype=torch.float64)[torch.randint(4, (2, 3, 5))].movedim(-1, 1)
    right = cross_entropy(50 * one_hot, one_hot)
    assert right.shape == (2, 1, 3, 5)
    assert right.max() < 1e-12
    flat = cross_entropy(torch.zeros_like(one_hot), one_hot)
    assert torch.allclose(flat, torch.log(torch.tensor(4.0, dtype=torch.float64)))


def test_last_step_returns_the_estimate() -> None:
    assert advance(DATA, NOISE, 0.75, 1.0) is DATA
    half = advance(DATA, NOISE, 0.0, 0.5)
    assert torch.allclose(half, interpolate(DATA, NOISE, torch.tensor(0.5)), atol=1e-12)


@pytest.mark.parametrize("power", [0.7, 1, 1.4])
def test_euler_converges_with_first_order_to_the_analytic_solution(power: float) -> None:
    """Data N(μ, s²): x̂ = E[x₁ | x_t] is known, and so is the flow's end, μ + s·x₀."""
    mu, s = 0.7, 0.4
    noise = torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def estimate(x_t: torch.Tensor, t: float) -> torch.Tensor:
        gain = t * s**2 / ((1 - t) ** 2 + t**2 * s**2)
        return mu + gain * (x_t - t * mu)

    errors = [
        (euler(estimate, noise, steps, power=power) - (mu + s * noise)).abs().mean().item()
        for steps in (16, 32, 64, 128)
    ]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(1.85 < r < 2.15 for r in ratios), ratios
    assert torch.allclose(euler(estimate, noise, 1, power=power), torch.full_like(noise, mu))


def test_check_runs_before_every_step_and_may_cancel() -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        euler(lambda x, t: x, torch.zeros(2), 8, check)
    assert len(calls) == 3
