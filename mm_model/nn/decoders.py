"""Decoder D: all wanted modalities together, given the scene and what is observed directly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_model.nn.added import Added
from mm_model.nn.blocks import (
    FINE_STRIDE,
    STRIDE,
    AdaptiveGroupNorm,
    Block,
    ResidualBlock,
    TimeFeatures,
    fold,
    split_channels,
    to_image,
    to_tokens,
    unfold,
    zero_,
)
from mm_model.nn.pixels import PixelNetworks, Sureness, Waves, uncorrelated
from mm_model.nn.regressions import Regressions

FINE_CHANNELS = 16  # features that reach the full-resolution head


class Context(NamedTuple):
    """What D makes of all but the measurement x_t; float32.

    Attributes:
        mean: expected clean values, or class logits, [B, C, H, W].
        log_variance: of the values about `mean`, beside that of the data, [B, C, H, W].
        log_scales: of what each scale of x_t counts for, beside its first, [B, C, scales].
        pixel: as `mean`, of each pixel's observed values alone. Trains that part alone.
    """

    mean: Tensor
    log_variance: Tensor
    log_scales: Tensor
    pixel: Tensor


class Decoder(nn.Module):
    """D(x, t, present, wanted, z, conditions) → expected clean values or logits, and how sure.

    Args:
        owner: modality of each channel, [C], of those that are not learnt later.
        regressions: what observed values tell in closed form; None if that was not solved for.
    """

    def __init__(
        self,
        owner: Tensor,
        regressions: Regressions | None,
        conditions: int,
        width: int,
        dim: int,
        depth: int,
        heads: int,
        z: int,
    ) -> None:
        super().__init__()
        channels, modalities = len(owner), int(owner.max()) + 1
        self.channels, self.modalities = channels, modalities
        self.register_buffer("owner", owner, persistent=False)
        cell = FINE_STRIDE**2
        self.time = TimeFeatures()
        self.condition_in = nn.Linear(modalities * (self.time.width + 2) + conditions, dim)
        self.condition_out = nn.Linear(dim, dim)
        self.modulation = nn.Sequential(nn.SiLU(), zero_(nn.Linear(dim, 6 * dim)))
        self.mean_scene = zero_(nn.Linear(z, dim))

        self.pixels = nn.Conv2d(channels * cell, width, 3, padding=1)
        self.roles = nn.Linear(2 * modalities, width, bias=False)
        self.down_blocks = nn.ModuleList(ResidualBlock(width, dim) for _ in range(2))
        self.down = nn.Linear(4 * width, dim)
        self.from_scene = nn.Linear(z, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.up = nn.Linear(dim, 4 * width)
        self.skip = nn.Linear(2 * width, width)
        self.up_blocks = nn.ModuleList(ResidualBlock(width, dim) for _ in range(2))
        self.out_norm = AdaptiveGroupNorm(width, dim)
        self.base = zero_(nn.Linear(width, channels * cell))

        # The head at full resolution makes the pictures and takes what observed pixels tell of
        # theirs; the shortcuts from z, there from the first step, keep it from learning to ignore
        # the scene (docs/experiments.md: colour spread .256 → .064 without).
        self.fine_width = max(32, width // 2)
        self.to_fine = nn.Linear(width, FINE_CHANNELS * cell)
        self.fine_in = nn.Conv2d(FINE_CHANNELS + channels, self.fine_width, 3, padding=1)
        self.fine_norm = AdaptiveGroupNorm(self.fine_width, dim)
        self.fine_mix = nn.Conv2d(self.fine_width, self.fine_width, 1)
        self.fine_out = zero_(nn.Conv2d(self.fine_width, channels, 3, padding=1))
        self.coarse = zero_(nn.Linear(z, channels))

        self.waves = Waves(channels)
        self.pooled_waves = nn.Linear(self.waves.width, width)
        self.regressions = regressions
        self.pixel_networks = PixelNetworks(channels, modalities, owner)
        self.sureness = Sureness(modalities, width, channels)
        self.mixing = uncorrelated(channels)

    owner: Tensor

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        present: Tensor,
        wanted: Tensor,
        z: Tensor,
        conditions: Tensor,
        added: Iterable[Added] = (),
    ) -> Context:
        """Expected clean values or logits, how sure they are, and those of pixels alone.

        Args:
            x: [B, C, H, W]: clean where present, at time t and scaled by `posterior.wiener` where
                wanted, 0 elsewhere.
            t: [B, M] in [0, 1], the time of each modality; ignored where it is not wanted.
            present: bool [B, M, H, W], the pixels that are observed.
            wanted: bool [B, M, H, W], the pixels that are generated.
            z: [B, S, H/8, W/8].
            conditions: [B, K], features of `mm_model.conditions`; 0 where nothing is known.
            added: of the modalities that were learnt later, whose channels come last.
        """
        added = tuple(added)
        present, wanted = present.to(x.dtype), wanted.to(x.dtype)
        condition = self._condition(t, present.amax((2, 3)), wanted.amax((2, 3)), conditions, added)
        modulation = self.modulation(condition).unflatten(1, (6, -1))
        condition = F.silu(condition + self.mean_scene(z.mean((2, 3))))

        own, *later = split_channels(x, self.channels, added)
        pixels = to_tokens(own)
        seen = pixels * to_tokens(present[:, self.owner])
        waves = self.waves(seen)
        roles = F.avg_pool2d(torch.cat([present, wanted], 1), FINE_STRIDE)
        skip = self._first_features(pixels, roles, present.shape[1])
        texture = F.avg_pool2d(to_image(waves), FINE_STRIDE)
        skip = skip + to_image(self.pooled_waves(to_tokens(texture)))
        for index, (one, extra) in enumerate(zip(added, later, strict=True), self.modalities):
            pair = roles[:, [index, present.shape[1] + index]]
            skip = skip + one.decoder_input(extra, pair)
        for residual in self.down_blocks:
            skip = residual(skip, condition)
        tokens = self.down(fold(to_tokens(skip), STRIDE // FINE_STRIDE))
        scene = to_tokens(z)
        tokens = tokens + self.from_scene(scene)
        for block in self.blocks:
            tokens = block(tokens, modulation)
        up = unfold(self.up(tokens), STRIDE // FINE_STRIDE)
        features = to_image(self.skip(torch.cat([up, to_tokens(skip)], -1)))
        for residual in self.up_blocks:
            features = residual(features, condition)
        features = to_tokens(F.silu(self.out_norm(features, condition)))

        fine = unfold(self.to_fine(features), FINE_STRIDE)
        fine = self.fine_in(to_image(torch.cat([fine, pixels.to(fine.dtype)], -1)))
        for one, extra in zip(added, later, strict=True):
            fine = fine + one.fine_in(extra)
        fine = F.silu(self.fine_norm(fine, condition))
        fine = fine + F.silu(self.fine_mix(fine))
        base = to_image(unfold(self.base(features), FINE_STRIDE))
        parts = [(base, self.fine_out(fine), to_image(self.coarse(scene)))]
        parts += [one.raw(features, fine, scene) for one in added]
        shown = to_tokens(present[:, : self.modalities].to(x.dtype))
        told = _told(present, wanted, t, self.modalities)
        heads: list[Decoder | Added] = [self, *added]
        contexts = []
        for head, part in zip(heads, parts, strict=True):
            pixel = head.pixel_networks(seen, waves, shown)
            if head is self and self.regressions is not None:
                pixel = pixel + self.regressions(seen, shown)
            log_variance, log_scales = head.sureness(told, features)
            contexts.append(Context(pixel.detach() + _sum(*part), log_variance, log_scales, pixel))
        return Context(*(torch.cat(c, 1) if added else c[0] for c in zip(*contexts, strict=True)))

    def _first_features(self, pixels: Tensor, roles: Tensor, count: int) -> Tensor:
        """Features at a quarter of the resolution, of `count` modalities those learnt first."""
        m = self.modalities
        own = torch.cat([roles[:, :m], roles[:, count : count + m]], 1)
        features = self.pixels(to_image(fold(pixels, FINE_STRIDE)))
        return features + to_image(self.roles(to_tokens(own)))  # type: ignore[no-any-return]

    def _condition(
        self,
        t: Tensor,
        present: Tensor,
        wanted: Tensor,
        conditions: Tensor,
        added: Sequence[Added],
    ) -> Tensor:
        m = self.modalities
        times = self.time(t[:, :m]) * wanted[:, :m, None]
        features = [times.flatten(1), present[:, :m], wanted[:, :m], conditions]
        inner = self.condition_in(torch.cat(features, 1))
        for index, one in enumerate(added, m):
            inner = inner + one.decoder_condition(t[:, index], present[:, index], wanted[:, index])
        return self.condition_out(F.silu(inner))  # type: ignore[no-any-return]


def _told(present: Tensor, wanted: Tensor, t: Tensor, count: int) -> Tensor:
    """[B, 3 M] of the first M modalities: whether observed, whether wanted, the time if wanted."""
    shown, asked = present.amax((2, 3))[:, :count], wanted.amax((2, 3))[:, :count]
    return torch.cat([shown, asked, asked * t[:, :count]], 1)


def _sum(base: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
    coarse = F.interpolate(
        coarse.float(), scale_factor=STRIDE, mode="bilinear", align_corners=False
    )
    return base.float() + fine.float() + coarse
