"""Decoder D: all wanted modalities together, given the scene and what is observed directly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_model.nn.blocks import (
    AdaptiveGroupNorm,
    Block,
    ResidualBlock,
    TimeFeatures,
    fold,
    to_image,
    to_tokens,
    unfold,
    zero_,
)
from mm_model.nn.scene_encoder import FINE_STRIDE, STRIDE

FINE_CHANNELS = 16  # features that reach the full-resolution head


class Decoder(nn.Module):
    """D(x, t, present, wanted, z) → raw outputs: clean values, or class logits."""

    def __init__(
        self, channels: int, modalities: int, width: int, dim: int, depth: int, heads: int, z: int
    ) -> None:
        super().__init__()
        cell = FINE_STRIDE**2
        self.time = TimeFeatures()
        self.condition = nn.Sequential(
            nn.Linear(modalities * (self.time.width + 2), dim), nn.SiLU(), nn.Linear(dim, dim)
        )
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
        self.base = nn.Linear(width, channels * cell)

        # The head at full resolution makes the pictures; the shortcuts from z, there from the first
        # step, keep it from learning to ignore the scene (docs: colour spread .256 → .064 without).
        fine = max(32, width // 3)
        self.to_fine = nn.Linear(width, FINE_CHANNELS * cell)
        self.fine_in = nn.Conv2d(FINE_CHANNELS + channels, fine, 3, padding=1)
        self.fine_norm = AdaptiveGroupNorm(fine, dim)
        self.fine_out = zero_(nn.Conv2d(fine, channels, 3, padding=1))
        self.coarse = zero_(nn.Linear(z, channels))

    def forward(self, x: Tensor, t: Tensor, present: Tensor, wanted: Tensor, z: Tensor) -> Tensor:
        """Raw outputs [B, C, H, W], float32.

        Args:
            x: [B, C, H, W]: clean where present, at time t where wanted, 0 elsewhere.
            t: [B, M] in [0, 1], the time of each modality; ignored where it is not wanted.
            present: bool [B, M, H, W], the pixels that are observed.
            wanted: bool [B, M, H, W], the pixels that are generated.
            z: [B, S, H/8, W/8].
        """
        present, wanted = present.to(x.dtype), wanted.to(x.dtype)
        condition = self._condition(t, present.amax((2, 3)), wanted.amax((2, 3)))
        modulation = self.modulation(condition).view(len(x), 6, -1)
        condition = F.silu(condition + self.mean_scene(z.mean((2, 3))))

        roles = F.avg_pool2d(torch.cat([present, wanted], 1), FINE_STRIDE)
        pixels = to_tokens(x)
        skip = self.pixels(to_image(fold(pixels, FINE_STRIDE)))
        skip = skip + to_image(self.roles(to_tokens(roles)))
        for residual in self.down_blocks:
            skip = residual(skip, condition)
        tokens = self.down(fold(to_tokens(skip), STRIDE // FINE_STRIDE))
        tokens = tokens + self.from_scene(to_tokens(z))
        for block in self.blocks:
            tokens = block(tokens, modulation)
        up = unfold(self.up(tokens), STRIDE // FINE_STRIDE)
        features = to_image(self.skip(torch.cat([up, to_tokens(skip)], -1)))
        for residual in self.up_blocks:
            features = residual(features, condition)
        features = to_tokens(F.silu(self.out_norm(features, condition)))

        base = to_image(unfold(self.base(features), FINE_STRIDE))
        fine = unfold(self.to_fine(features), FINE_STRIDE)
        fine = self.fine_in(to_image(torch.cat([fine, pixels.to(fine.dtype)], -1)))
        fine = self.fine_out(F.silu(self.fine_norm(fine, condition)))
        coarse = to_image(self.coarse(to_tokens(z))).float()
        coarse = F.interpolate(coarse, scale_factor=STRIDE, mode="bilinear", align_corners=False)
        raw: Tensor = base.float() + fine.float() + coarse
        return raw

    def _condition(self, t: Tensor, present: Tensor, wanted: Tensor) -> Tensor:
        times = self.time(t) * wanted[..., None]
        features = torch.cat([times.flatten(1), present, wanted], 1)
        return self.condition(features)  # type: ignore[no-any-return]
