"""What a noisy image tells of the clean one, in closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm_model.nn.posterior import SCALES_PX, gain, posterior_logits, posterior_mean

SHAPE = (2, 3, 48, 80)
EVERYWHERE = torch.ones(SHAPE, dtype=torch.bool)


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def times(t: float) -> Tensor:
    return torch.full((2, 3, 1, 1), t)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 0.99])
def test_with_one_variance_it_is_the_mean_of_two_gaussians(t: float) -> None:
    mean, x_t = drawn(0), drawn(1)
    made = posterior_mean(mean, torch.full((2, 3, len(SCALES_PX)), 0.6), x_t, times(t), EVERYWHERE)
    prior, noise = 1 / 0.6, t**2 / (1 - t) ** 2
    expected = (prior * mean + noise * x_t / max(t, 1e-9)) / (prior + noise) if t else mean
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_a_perfect_measurement_is_the_answer() -> None:
    truth = drawn(2)
    made = posterior_mean(
        drawn(3), torch.ones(2, 3, len(SCALES_PX)), truth * 0.999, times(0.999), EVERYWHERE
    )
    torch.testing.assert_close(made, truth, rtol=1e-3, atol=1e-3)


def test_the_level_of_a_field_is_known_before_its_pixels_are() -> None:
    coarse = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(4))
    truth = F.interpolate(coarse, scale_factor=8, mode="bilinear", align_corners=False)
    truth = truth + 0.1 * drawn(5)
    t = 0.3
    x_t = t * truth + (1 - t) * drawn(6)
    nothing = torch.zeros(SHAPE)
    scales = torch.tensor([0.01, 0.03, 0.3, 20.0]).expand(2, 3, 4)
    white = truth.var().expand(2, 3, 4)
    by_scale, by_pixel = (
        (posterior_mean(nothing, v, x_t, times(t), EVERYWHERE) - truth).square().mean().item()
        for v in (scales, white)
    )
    assert by_scale < 0.4 * by_pixel


def test_what_is_not_measured_keeps_its_expectation_and_says_nothing() -> None:
    mean, x_t = drawn(7), drawn(8)
    where = drawn(9) > 0.3
    variances = torch.tensor([0.1, 0.3, 1.0, 9.0]).expand(2, 3, 4)
    made = posterior_mean(mean, variances, x_t, times(0.5), where)
    spoilt = posterior_mean(mean, variances, torch.where(where, x_t, 1e6), times(0.5), where)
    assert torch.equal(made, spoilt)
    nowhere = torch.zeros_like(where)
    assert torch.equal(posterior_mean(mean, variances, x_t, times(0.5), nowhere), mean)


def test_gain_is_of_wiener() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(gain(t, 1.0), torch.tensor([0.0, 1.0, 1.0]))


def test_classes_gain_the_likelihood_of_what_was_measured() -> None:
    classes, t = 4, torch.tensor(0.7)
    x = F.one_hot(torch.tensor([2]), classes).float() - 1 / classes
    noise = torch.randn(1, classes, generator=torch.Generator().manual_seed(10))
    x_t = t * x + (1 - t) * noise
    every = torch.eye(classes) - 1 / classes
    likelihood = torch.distributions.Normal(t * every, 1 - t).log_prob(x_t).sum(1)
    made = posterior_logits(torch.zeros(1, classes), x_t, t)[0]
    torch.testing.assert_close(made.softmax(0), likelihood.softmax(0), rtol=1e-4, atol=1e-5)
