"""Scene encoder E: any subset of modalities, even none → coarse tokens h and the scene z."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mm_model.nn.added import Added
from mm_model.nn.blocks import (
    FINE_STRIDE,
    STRIDE,
    Block,
    ResidualBlock,
    fold,
    split_channels,
    to_image,
    to_tokens,
)


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
        self.channels, self.modalities = channels, modalities
        self.pixels = nn.Conv2d(channels * FINE_STRIDE**2, width, 3, padding=1)
        self.presence = nn.Linear(modalities, width, bias=False)
        self.residual = ResidualBlock(width)
        self.patch = nn.Linear(4 * width, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.to_scene = nn.Linear(dim, z)

    def forward(self, x: Tensor, mask: Tensor, added: Iterable[Added] = ()) -> Encoded:
        """Tokens and scene.

        Args:
            x: [B, C, H, W], 0 where unknown; H and W multiples of 8.
            mask: bool [B, M, H, W].
            added: of the modalities that were learnt later, whose channels come last.
        """
        added = tuple(added)
        x, *later = split_channels(x, self.channels, added)
        coverage = F.avg_pool2d(mask[:, : self.modalities].to(x.dtype), FINE_STRIDE)
        features = self.pixels(to_image(fold(to_tokens(x), FINE_STRIDE)))
        features = features + to_image(self.presence(to_tokens(coverage)))
        for index, (one, pixels) in enumerate(zip(added, later, strict=True), self.modalities):
            features = features + one.encoder_input(pixels, mask[:, index : index + 1])
        tokens = self.patch(fold(to_tokens(self.residual(features)), STRIDE // FINE_STRIDE))
        for block in self.blocks:
            tokens = block(tokens)
        h = F.layer_norm(tokens, tokens.shape[-1:])
        z = self.to_scene(h).float()
        # No affine: every scene has the same length, so that noise has one meaning for the flow.
        return Encoded(h, to_image(F.layer_norm(z, z.shape[-1:])))
