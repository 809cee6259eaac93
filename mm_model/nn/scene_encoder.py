"""Scene encoder E: any subset of modalities, even none → coarse tokens h and the scene z."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mm_model.nn.blocks import Block, ResidualBlock, fold, to_image, to_tokens

STRIDE = 8  # pixels a token's side
FINE_STRIDE = 4  # pixels a convolutional feature's side


class Encoded(NamedTuple):
    """What E makes of a batch: tokens h [B, H/8, W/8, d] and the scene z [B, S, H/8, W/8]."""

    h: Tensor
    z: Tensor


class SceneEncoder(nn.Module):
    """Adds all observed modalities of one position into one token; absent ones add nothing.

    The first convolution over the stacked channels is the sum of one convolution a modality, so
    that cost does not grow with their number and their order cannot matter.
    """

    def __init__(
        self, channels: int, modalities: int, width: int, dim: int, depth: int, heads: int, z: int
    ) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(channels * FINE_STRIDE**2, width, 3, padding=1)
        self.presence = nn.Linear(modalities, width, bias=False)
        self.residual = ResidualBlock(width)
        self.patch = nn.Linear(4 * width, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.to_scene = nn.Linear(dim, z)

    def forward(self, x: Tensor, mask: Tensor) -> Encoded:
        """x: [B, C, H, W], 0 where unknown; mask: bool [B, M, H, W]; H and W multiples of 8."""
        coverage = F.avg_pool2d(mask.to(x.dtype), FINE_STRIDE)
        features = self.pixels(to_image(fold(to_tokens(x), FINE_STRIDE)))
        features = features + to_image(self.presence(to_tokens(coverage)))
        tokens = self.patch(fold(to_tokens(self.residual(features)), STRIDE // FINE_STRIDE))
        for block in self.blocks:
            tokens = block(tokens)
        h = F.layer_norm(tokens, tokens.shape[-1:])
        z = self.to_scene(h).float()
        # No affine: every scene has the same length, so that noise has one meaning for the flow.
        return Encoded(h, to_image(F.layer_norm(z, z.shape[-1:])))
