"""What one observed modality tells of another, by regression in closed form.

Gradient descent takes thousands of steps to what the normal equations give in seconds: near
infrared from colour at a pixel, or land cover from radar whose speckle is averaged. So these are
solved before the first step, and the networks learn what they leave (docs/experiments.md). Each
ordered pair of modalities has a ridge regression of its own, on random Fourier features (Rahimi and
Recht 2007) of the pixel and of means about it, so that pairs that never occur together are just not
there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_model.nn.blocks import FINE_STRIDE, fold, to_image

WAVES, WIDE_WAVES = 32, 16  # of the pixel, and of each mean about it
_FREQUENCY, _WIDE_FREQUENCY = 6.0, 3.0  # deviation of the phase's slope, radians a unit
MEANS_PX = (4, 12, 36)  # sides of the squares that are averaged, at a quarter of the resolution
_RIDGE = 1e-4  # beside features of variance 1/2; and 1 / places² on top
_LEAST_PLACES = 2  # in each half, with both modalities; of fewer nothing is believed
_LEAST_VARIANCE = 1e-6  # in model space: no source is believed without end
_LEAST_PROBABILITY = 0.01  # of a class: a regression may say less than nothing


class Regressions(nn.Module):
    """Expected values of every modality, given each that is observed.

    Where several modalities are observed, each one's expectation weighs by the inverse square of
    the variance that it leaves: of two that tell the same, neither counts twice.

    Args:
        owner: modality of each channel, [C].
        is_class: whether each channel is a class, [C].

    Attributes:
        near, far: [M, features, C], weights from each source's features to all channels; 0 until
            `fit`.
        trust: [M, C], what each source's expectation weighs; 0 where it tells nothing.
        prior: [C], what is expected where nothing is observed: 0, or the logarithm of a class's
            share.
        low, high: [C], between which values were seen. Beyond them nothing is known of how one
            modality goes with another, so values count as the nearest that was seen, and none
            further out is expected.
    """

    owner: Tensor
    is_class: Tensor
    own: Tensor
    projection: Tensor
    near: Tensor
    far: Tensor
    trust: Tensor
    prior: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, owner: Tensor, is_class: Tensor) -> None:
        super().__init__()
        channels, modalities = len(owner), int(owner.max()) + 1
        own = owner == torch.arange(modalities)[:, None]  # [M, C]
        drawn = torch.randn(modalities, channels, WAVES, generator=torch.Generator().manual_seed(1))
        near, far = 1 + channels + 2 * WAVES, len(MEANS_PX) * (channels + 2 * WIDE_WAVES)
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("is_class", is_class, persistent=False)
        self.register_buffer("own", own, persistent=False)
        self.register_buffer("projection", drawn * own[..., None])
        self.register_buffer("near", torch.zeros(modalities, near, channels))
        self.register_buffer("far", torch.zeros(modalities, far, channels))
        self.register_buffer("trust", torch.zeros(modalities, channels))
        self.register_buffer("prior", torch.zeros(channels))
        self.register_buffer("low", torch.full((channels,), -torch.inf))
        self.register_buffer("high", torch.full((channels,), torch.inf))

    @torch.no_grad()
    def forward(self, seen: Tensor, present: Tensor) -> Tensor:
        """Expected values or logits, [B, C, H, W], float32.

        Args:
            seen: observed values [B, H, W, C], 0 where nothing is.
            present: [B, H, W, M], 1 where a modality is observed.
        """
        batch, height, width, channels = seen.shape
        with torch.autocast(seen.device.type, enabled=False):
            seen, present = seen.float(), present.float()
            # Of what is observed somewhere in the sample alone: features are what it costs.
            there = present.amax((1, 2)) > 0
            sample, source = there.nonzero(as_tuple=True)
            known = present[sample, ..., source]
            pixels = self._shown(seen[sample], known, source)
            expected = self._expected(pixels, known, source).clamp(self.low, self.high)
            weights = known[..., None] * self.trust[source, None, None]
            summed, total = seen.new_zeros(2, batch, height, width, channels)
            # The first source of every sample, then the second: sums of an order of their own.
            turn = (there.cumsum(1) - 1)[sample, source]
            for now in (turn == k for k in range(int(there.sum(1).amax()))):
                total[sample[now]] += weights[now]
                summed[sample[now]] += weights[now] * expected[now]
            found = summed / total.clamp_min(1e-12)  # 0 where nothing tells anything
            logits = torch.where(total > 0, self._shares(found).log(), self.prior)
            return to_image(torch.where(self.is_class, logits, found))

    def _expected(self, pixels: Tensor, known: Tensor, source: Tensor) -> Tensor:
        """[K, H, W, C], what each of K sources expects of all channels; arguments as of `_far`."""
        count, height, width, channels = pixels.shape
        sizes = [1, channels, WAVES, WAVES]
        offset, linear, sines, cosines = torch.split(self.near[source], sizes, 1)
        flat = pixels.flatten(1, 2)
        phase = self._phase(flat, source)
        found = torch.baddbmm(offset, flat, linear)
        found = torch.baddbmm(found, phase.sin(), sines)
        found = torch.baddbmm(found, phase.cos_(), cosines)
        far = self._far(pixels, known, source)
        wide = torch.bmm(far.flatten(1, 2), self.far[source]).view(*far.shape[:3], channels)
        return found.view(count, height, width, channels) + _enlarged(wide)

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        """Solve for the weights.

        What a regression leaves is measured at places that it has not seen, halves in turn, so
        that what holds at few of them is not believed more than it deserves.

        Args:
            batches: x in model space, [N, C, H, W]; bool mask [N, M, H, W]; which pixels of each
                patch to look at, [N, P], numbered row by row; and the places of the patches, [N],
                numbered from 0.
        """
        for told in (self.near, self.far, self.trust):
            told.zero_()
        self.low.fill_(-torch.inf)
        self.high.fill_(torch.inf)
        moments = _Moments(len(self.trust), self.near.shape[1] + self.far.shape[1], self.owner)
        low, high = self.high.clone(), self.low.clone()
        for x, mask, at, place in batches:
            y = _at(x, at)
            known = _at(mask.to(x.dtype), at) > 0
            there = known[..., self.owner]
            low = torch.minimum(low, torch.where(there, y, torch.inf).amin((0, 1)))
            high = torch.maximum(high, torch.where(there, y, -torch.inf).amax((0, 1)))
            moments.usual(y, there)
            for source in range(len(self.trust)):
                features = self._features_at(x, mask, at, source)
                moments.add(source, features, y, known, place)
        self.low.copy_(torch.minimum(low, high))  # of what was never seen it stays open
        self.high.copy_(torch.maximum(low, high))
        self.prior.copy_(torch.where(self.is_class, self._shares(moments.mean()).log(), 0))
        for target in range(len(self.trust)):
            for source in range(len(self.trust)):
                if source != target and moments.places(source, target) >= _LEAST_PLACES:
                    self._solve(moments, source, target)

    def _solve(self, moments: _Moments, source: int, target: int) -> None:
        channels = self.owner == target
        halves = [moments.left(source, target, half)[channels] for half in (0, 1)]
        variance, usual = torch.stack(halves).mean(0), moments.variance(source, target)[channels]
        if bool(self.is_class[channels].any()):  # one weight for all: shares add up to 1
            variance, usual = variance.mean().expand_as(variance), usual.mean()
        weight, first = moments.weight(source, target)[:, channels].float(), self.near.shape[1]
        self.near[source][:, channels] = weight[:first]
        self.far[source][:, channels] = weight[first:]
        trust = torch.where(variance < usual, variance.clamp_min(_LEAST_VARIANCE) ** -2, 0)
        self.trust[source, channels] = trust.float()

    def _features_at(self, x: Tensor, mask: Tensor, at: Tensor, source: int) -> Tensor:
        """[N, P, features], near and far, of the pixels that are looked at."""
        which = torch.full((len(x),), source, device=x.device)
        known = mask[:, source].to(x.dtype)
        pixels = self._shown(x.movedim(1, -1), known, which)
        looked = pixels.flatten(1, 2).gather(1, at[..., None].expand(-1, -1, x.shape[1]))
        far = to_image(self._far(pixels, known, which))
        height, width = x.shape[2:]
        where = torch.stack([at % width * 2 + 1, at // width * 2 + 1], -1).to(x.dtype)
        where = where / torch.tensor([width, height], device=x.device) - 1
        wide = F.grid_sample(far, where[:, None], padding_mode="border", align_corners=False)
        return torch.cat([self._near(looked, which), wide[:, :, 0].mT], -1)

    def _shown(self, pixels: Tensor, known: Tensor, source: Tensor) -> Tensor:
        """What is looked at of pixels [K, H, W, C], each of one source: 0 where it is not known."""
        own = self.own[source, None, None] & (known > 0)[..., None]
        return torch.where(own, pixels.clamp(self.low, self.high), 0)

    def _near(self, pixels: Tensor, source: Tensor) -> Tensor:
        """[K, N, features] of pixels [K, N, C], each row of one source."""
        phase = self._phase(pixels, source)
        return torch.cat([torch.ones_like(pixels[..., :1]), pixels, phase.sin(), phase.cos()], -1)

    def _phase(self, pixels: Tensor, source: Tensor) -> Tensor:
        return torch.bmm(pixels, _FREQUENCY * self.projection[source])

    def _far(self, pixels: Tensor, known: Tensor, source: Tensor) -> Tensor:
        """[K, H/4, W/4, features]: of means over what is known; pixels [K, H, W, C], 0 elsewhere;
        known [K, H, W].
        """
        folded = fold(torch.cat([pixels, known[..., None]], -1), FINE_STRIDE)
        cells = to_image(
            folded.view(*folded.shape[:3], FINE_STRIDE**2, pixels.shape[-1] + 1).mean(-2)
        )
        projection = _WIDE_FREQUENCY * self.projection[source, :, :WIDE_WAVES]
        found: list[Tensor] = []
        wider = pixels.new_zeros(())
        for side in reversed(MEANS_PX):
            box = side // FINE_STRIDE
            summed = F.avg_pool2d(cells, box, 1, box // 2).movedim(1, -1)
            share = summed[..., -1:]
            # Where a square knows nothing, the one about it may.
            wider = torch.where(share > 0, summed[..., :-1] / share.clamp_min(1e-6), wider)
            phase = torch.bmm(wider.flatten(1, 2), projection)
            phase = phase.view(*wider.shape[:-1], WIDE_WAVES)
            found += [wider, phase.sin(), phase.cos()]
        return torch.cat(found, -1)

    def _shares(self, expected: Tensor) -> Tensor:
        """Shares of classes from their expected values [..., C]; 1 in all other channels."""
        count = self.own.sum(1)[self.owner]
        shares = (expected + 1 / count).clamp_min(_LEAST_PROBABILITY)
        return torch.where(self.is_class, shares, 1)


class _Moments:
    """Second moments of every pair's features and values, of places in two halves.

    Args:
        modalities: their number.
        features: theirs.
        owner: modality of each channel of the values, [C].
    """

    def __init__(self, modalities: int, features: int, owner: Tensor) -> None:
        shape, channels = (modalities, modalities, 2), len(owner)

        def zeros(*more: int) -> Tensor:
            return owner.new_zeros(*shape, *more, dtype=torch.float64)

        self._gram, self._cross = zeros(features, features), zeros(features, channels)
        self._sum, self._squares, self._pixels = zeros(channels), zeros(channels), zeros()
        self._places: dict[tuple[int, int, int], set[int]] = {}
        self._total, self._count = self._sum.new_zeros(channels), self._sum.new_zeros(channels)

    def usual(self, y: Tensor, known: Tensor) -> None:
        """Values [N, P, C] and which of them are known."""
        self._total += torch.where(known, y, 0).double().sum((0, 1))
        self._count += known.sum((0, 1))

    def add(self, source: int, features: Tensor, y: Tensor, known: Tensor, place: Tensor) -> None:
        """Features [N, P, features] of a source, values [N, P, C], known [N, P, M], place [N]."""
        for target in range(known.shape[-1]):
            for half in (0, 1) if target != source else ():
                both = known[..., source] & known[..., target] & (place % 2 == half)[:, None]
                phi, values = features[both], y[both]
                where = (source, target, half)
                self._gram[where] += (phi.T @ phi).double()
                self._cross[where] += (phi.T @ values).double()
                self._sum[where] += values.double().sum(0)
                self._squares[where] += values.double().square().sum(0)
                self._pixels[where] += len(phi)
                self._places.setdefault(where, set()).update(place[both.any(1)].tolist())

    def places(self, source: int, target: int) -> int:
        """Places with both, in the half that has fewer."""
        return min(len(self._places.get((source, target, half), ())) for half in (0, 1))

    def mean(self) -> Tensor:
        """[C]: of each channel wherever it is known."""
        return (self._total / self._count.clamp_min(1)).float()

    def variance(self, source: int, target: int) -> Tensor:
        """[C], where both are known."""
        pixels, first, second = (
            m[source, target].sum(0) for m in (self._pixels, self._sum, self._squares)
        )
        return second / pixels - (first / pixels).square()

    def weight(self, source: int, target: int, half: int | None = None) -> Tensor:
        """[features, C], of one half of the places, or of all."""
        halves = (0, 1) if half is None else (half,)
        at = [(source, target, h) for h in halves]
        gram, cross, pixels = (
            torch.stack([m[i] for i in at]).sum(0) for m in (self._gram, self._cross, self._pixels)
        )
        # Pixels of a place are alike: what is few is places.
        ridge = _RIDGE + 1 / sum(len(self._places[i]) for i in at) ** 2
        regular = gram / pixels + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight: Tensor = torch.linalg.solve(regular, cross / pixels)
        return weight

    def left(self, source: int, target: int, half: int) -> Tensor:
        """[C]: mean square that the weights of one half leave in the other."""
        weight, other = self.weight(source, target, half), (source, target, 1 - half)
        told = (weight * (self._gram[other] @ weight - 2 * self._cross[other])).sum(0)
        found: Tensor = (self._squares[other] + told) / self._pixels[other]
        return found


def _at(images: Tensor, at: Tensor) -> Tensor:
    """[N, P, C]: pixels of images [N, C, H, W]."""
    return images.flatten(2).gather(2, at[:, None].expand(-1, images.shape[1], -1)).mT


def _enlarged(tokens: Tensor) -> Tensor:
    """[K, h, w, C] → [K, 4 h, 4 w, C], bilinearly."""
    images = F.interpolate(
        to_image(tokens), scale_factor=FINE_STRIDE, mode="bilinear", align_corners=False
    )
    return images.movedim(1, -1)
