"""What a noisy image tells of the clean one, in closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm_model.nn.posterior import SCALE_VARIANCES, SCALES_PX, gain, wiener, with_measurement

SHAPE = (2, 3, 48, 80)
EVERYWHERE = torch.ones(SHAPE, dtype=torch.bool)
VALUES = torch.zeros(3, 1, 1, dtype=torch.bool)


def drawn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def posterior_mean(
    mean: Tensor, variances: list[float], x_t: Tensor, t: float, where: Tensor = EVERYWHERE
) -> Tensor:
    scales = (torch.tensor(variances) / torch.tensor(SCALE_VARIANCES)).expand(2, 3, -1)
    return with_measurement(mean, scales, alone(3), x_t, torch.full((2, 3, 1, 1), t), where, VALUES)


def alone(channels: int) -> Tensor:
    return torch.eye(channels).repeat(len(SCALES_PX), 1, 1)


def posterior_logits(weights: list[float], x_t: Tensor, t: float) -> Tensor:
    classes = x_t.shape[1]
    return with_measurement(
        torch.zeros_like(x_t),
        torch.tensor(weights).expand(len(x_t), classes, -1),
        alone(classes),
        x_t,
        torch.full((len(x_t), classes, 1, 1), t),
        torch.ones_like(x_t, dtype=torch.bool),
        torch.ones(classes, 1, 1, dtype=torch.bool),
    )


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 0.99])
def test_with_one_variance_it_is_the_mean_of_two_gaussians(t: float) -> None:
    mean, x_t = drawn(0), drawn(1)
    made = posterior_mean(mean, [0.6] * len(SCALES_PX), x_t, t)
    prior, noise = 1 / 0.6, t**2 / (1 - t) ** 2
    expected = (prior * mean + noise * x_t / t) / (prior + noise) if t else mean
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_a_perfect_measurement_is_the_answer() -> None:
    truth = drawn(2)
    made = posterior_mean(drawn(3), [1.0] * len(SCALES_PX), truth * 0.99, 0.99)
    torch.testing.assert_close(made, truth, rtol=0, atol=0.01)


def test_the_level_of_a_field_is_known_before_its_pixels_are() -> None:
    coarse = torch.randn(2, 3, 6, 10, generator=torch.Generator().manual_seed(4))
    truth = F.interpolate(coarse, scale_factor=8, mode="bilinear", align_corners=False)
    truth = truth + 0.1 * drawn(5)
    x_t = 0.3 * truth + 0.7 * drawn(6)
    by_scale, by_pixel = (
        (posterior_mean(torch.zeros(SHAPE), v, x_t, 0.3) - truth).square().mean().item()
        for v in ([0.01, 0.03, 0.3, 20.0], [truth.var().item()] * 4)
    )
    assert by_scale < 0.4 * by_pixel


def test_what_is_not_measured_keeps_its_expectation_and_says_nothing() -> None:
    mean, x_t = drawn(7), drawn(8)
    where = drawn(9) > 0.3
    variances = [0.1, 0.3, 1.0, 9.0]
    made = posterior_mean(mean, variances, x_t, 0.5, where)
    spoilt = posterior_mean(mean, variances, torch.where(where, x_t, 1e6), 0.5, where)
    assert torch.equal(made, spoilt)
    assert torch.equal(made[~where], mean[~where])
    assert not torch.equal(made[where], mean[where])


def test_gain_is_of_wiener() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(wiener(t, 1.0), torch.tensor([0.0, 1.0, 1.0]))


def test_channels_that_depart_together_are_told_by_each_other() -> None:
    """Against the posterior of a Gaussian vector, seen with noise of its own in each channel."""
    source = torch.Generator().manual_seed(13)
    mixing = torch.randn(len(SCALES_PX), 3, 3, generator=source)
    scales = torch.rand(1, 3, len(SCALES_PX), generator=source) + 0.2
    t = torch.tensor([[0.6, 0.0, 0.9]])
    made = gain(t, scales, mixing, torch.zeros(3, dtype=torch.bool))[0, 1]
    correlation = mixing[1] @ mixing[1].T
    correlation = correlation / correlation.diagonal().outer(correlation.diagonal()).sqrt()
    spread = (scales[0, :, 1] * SCALE_VARIANCES[1]).sqrt()
    covariance = correlation * spread.outer(spread)
    precision = torch.linalg.inv(covariance) + torch.diag(t[0] ** 2 / (1 - t[0]) ** 2)
    expected = torch.linalg.inv(precision) @ torch.diag(t[0] / (1 - t[0]) ** 2)
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)
    assert made[1, 0].abs() > 0.01
    assert not made[:, 1].any()


def test_classes_gain_the_likelihood_of_what_was_measured() -> None:
    classes, t = 4, 0.7
    x = F.one_hot(torch.tensor([2]), classes).float() - 1 / classes
    noise = torch.randn(1, classes, generator=torch.Generator().manual_seed(10))
    x_t = t * x + (1 - t) * noise
    every = torch.eye(classes) - 1 / classes
    likelihood = torch.distributions.Normal(t * every, 1 - t).log_prob(x_t).sum(1)
    image = x_t[:, :, None, None].expand(1, classes, 8, 16)
    made = posterior_logits([1.0] * len(SCALES_PX), image, t)[0, :, 3, 5]
    torch.testing.assert_close(made.softmax(0), likelihood.softmax(0), rtol=1e-4, atol=1e-5)


def test_neighbours_of_one_class_find_it_together() -> None:
    truth = torch.randint(3, (1, 1, 6, 10), generator=torch.Generator().manual_seed(11))
    truth = F.interpolate(truth.float(), scale_factor=8)[:, 0].long()
    x = F.one_hot(truth, 3).permute(0, 3, 1, 2) - 1 / 3
    x_t = 0.3 * x + 0.7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(12))
    alone, together = (
        (posterior_logits(w, x_t, 0.3).argmax(1) == truth).float().mean().item()
        for w in ([1.0] * 4, [1.0, 4.0, 16.0, 64.0])
    )
    assert together > alone + 0.2
