"""What one observed modality tells of another at the same pixel, by regression in closed form.

Gradient descent takes thousands of steps to what the normal equations give in two seconds: near
infrared from red, green and blue, say. So these are solved before the first step, and the networks
learn what they leave (docs/experiments.md). Each ordered pair of modalities has a ridge regression
on random Fourier features of its own, so that pairs that never occur together are just not there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm_model.nn.blocks import to_image

WAVES = 32
_FREQUENCY = 6.0  # standard deviation of the phase's slope, in radians a unit of model space
_RIDGE = 1e-4  # beside features of variance 1/2; and 1 / patches² on top
_LEAST_PATCHES = 8  # of which both modalities are known; of fewer nothing is believed
_LEAST_VARIANCE = 1e-6  # in model space: no source is believed without end
_LEAST_PROBABILITY = 0.01  # of a class: a regression may say less than nothing


class Regressions(nn.Module):
    """Expected values of every modality, given what is observed at a pixel.

    Where several modalities are observed, each one's expectation weighs by the inverse square of
    the variance that it leaves: of two that tell the same, neither counts twice.

    Args:
        owner: modality of each channel, [C].
        is_class: whether each channel is a class, [C].

    Attributes:
        weight: [M, F, C], from features of each source to all channels; 0 until `fit`.
        trust: [M, C], what each source's expectation weighs; 0 where it tells nothing.
        prior: [C], what is expected where nothing is observed: 0, or the logarithm of a class's
            share.
    """

    owner: Tensor
    is_class: Tensor
    projection: Tensor
    weight: Tensor
    trust: Tensor
    prior: Tensor

    def __init__(self, owner: Tensor, is_class: Tensor) -> None:
        super().__init__()
        channels, modalities = len(owner), int(owner.max()) + 1
        drawn = torch.randn(modalities, channels, WAVES, generator=torch.Generator().manual_seed(1))
        own = owner == torch.arange(modalities)[:, None]  # [M, C]
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("is_class", is_class, persistent=False)
        self.register_buffer("projection", _FREQUENCY * drawn * own[..., None])
        self.register_buffer("weight", torch.zeros(modalities, 1 + channels + 2 * WAVES, channels))
        self.register_buffer("trust", torch.zeros(modalities, channels))
        self.register_buffer("prior", torch.zeros(channels))

    @torch.no_grad()
    def forward(self, seen: Tensor, present: Tensor) -> Tensor:
        """Expected values or logits, [B, C, H, W], float32.

        Args:
            seen: observed values [B, H, W, C], 0 where nothing is.
            present: [B, H, W, M], 1 where a modality is observed.
        """
        batch, height, width, channels = seen.shape
        # Of what is observed somewhere in the sample alone: features are what it costs.
        sample, source = present.amax((1, 2)).nonzero(as_tuple=True)
        with torch.autocast(seen.device.type, enabled=False):
            pixels = seen.float().reshape(batch, -1, channels)[sample]
            known = present.float().reshape(batch, height * width, -1)[sample, :, source]
            expected = torch.bmm(self._features(pixels, source), self.weight[source])
            weights = known[..., None] * self.trust[source, None]
            each = pixels.new_zeros(2, batch, len(self.trust), height * width, channels)
            each[0, sample, source], each[1, sample, source] = weights * expected, weights
            summed, total = each.sum(2)
            found = torch.where(total > 0, summed / total.clamp_min(1e-12), 0)
            shares = self._shares(found).log()
            logits = torch.where(total > 0, shares, self.prior)
            found = torch.where(self.is_class, logits, found)
        return to_image(found.view(batch, height, width, channels))

    @torch.no_grad()
    def fit(self, pixels: Tensor, known: Tensor, patch: Tensor) -> None:
        """Solve for the weights.

        What a regression leaves is measured on patches that it has not seen, halves in turn, so
        that few of them are not believed more than they deserve.

        Args:
            pixels: in model space, [N, C].
            known: bool [N, M].
            patch: which patch each pixel is of, [N].
        """
        modalities = len(self.trust)
        for target in range(modalities):
            channels = self.owner == target
            if bool(known[:, target].any()):
                mean = pixels[known[:, target]].mean(0)
                usual = torch.where(self.is_class, self._shares(mean).log(), 0)
                self.prior[channels] = usual[channels]
            for source in range(modalities):
                both = known[:, source] & known[:, target]
                if source != target and _count(patch[both]) >= _LEAST_PATCHES:
                    self._fit_pair(source, channels, pixels[both], patch[both])

    def _fit_pair(self, source: int, target: Tensor, pixels: Tensor, patch: Tensor) -> None:
        truth = pixels[:, target]
        features = self._features(pixels[None], torch.tensor([source], device=pixels.device))[0]
        left = torch.zeros_like(truth)
        second = _rank(patch) % 2 == 1
        for mine in (second, ~second):
            weight = _ridge(features[mine], truth[mine], patch[mine])
            left[~mine] = features[~mine] @ weight - truth[~mine]
        variance, usual = left.square().mean(0), truth.var(0)
        if bool(self.is_class[target].any()):  # one weight for all, so that shares add up to 1
            variance, usual = variance.mean().expand_as(variance), usual.mean()
        trust = torch.where(variance < usual, variance.clamp_min(_LEAST_VARIANCE) ** -2, 0)
        self.weight[source][:, target] = _ridge(features, truth, patch)
        self.trust[source, target] = trust

    def _features(self, pixels: Tensor, source: Tensor) -> Tensor:
        """[K, N, F]: of pixels [K, N, C], of one source each, [K]."""
        own = pixels * (self.owner == source[:, None])[:, None]
        phase = torch.bmm(own, self.projection[source])
        return torch.cat([torch.ones_like(own[..., :1]), own, phase.sin(), phase.cos()], -1)

    def _shares(self, expected: Tensor) -> Tensor:
        """Shares of classes from their expected values [..., C]; 1 in all other channels."""
        count = torch.bincount(self.owner)[self.owner]
        shares = (expected + 1 / count).clamp_min(_LEAST_PROBABILITY)
        return torch.where(self.is_class, shares, 1)


def _ridge(features: Tensor, truth: Tensor, patch: Tensor) -> Tensor:
    """Weights [F, C]. Pixels of a patch are alike: what is few is patches."""
    gram = features.T @ features / len(features)
    gram.diagonal().add_(_RIDGE + 1 / _count(patch) ** 2)
    weight: Tensor = torch.linalg.solve(gram, features.T @ truth / len(features))
    return weight


def _rank(patch: Tensor) -> Tensor:
    """[N]: which of the patches that occur each pixel is of, from 0."""
    return torch.searchsorted(torch.unique(patch), patch)


def _count(patch: Tensor) -> int:
    return len(torch.unique(patch))
