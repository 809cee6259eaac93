"""Scene flow F: predicts the clean scene z from a noisy one, given the tokens of what was seen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_model.nn.blocks import Block, TimeFeatures, to_image, to_tokens, zero_


class SceneFlow(nn.Module):
    """F(z_t, t, h, seen, conditions) → estimate of the clean z."""

    def __init__(
        self, modalities: int, conditions: int, dim: int, depth: int, heads: int, z: int
    ) -> None:
        super().__init__()
        self.from_scene = nn.Linear(z, dim)
        self.from_observed = nn.Linear(dim, dim)
        self.time = TimeFeatures()
        self.condition = nn.Sequential(
            nn.Linear(self.time.width + modalities + conditions, dim),
            nn.SiLU(),
            zero_(nn.Linear(dim, 6 * dim)),
        )
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.to_scene = zero_(nn.Linear(dim, z))

    def forward(
        self, z_t: Tensor, t: Tensor, h: Tensor, seen: Tensor, conditions: Tensor
    ) -> Tensor:
        """Estimate of z, [B, S, h, w].

        Args:
            z_t: [B, S, h, w], at time t: t·z + (1−t)·noise.
            t: [B] in [0, 1]; 1 is clean.
            h: tokens [B, h, w, d] of the observed modalities.
            seen: [B, M], the fraction of pixels that is observed of each modality.
            conditions: [B, K], features of `mm_model.conditions`; 0 where nothing is known.
        """
        condition = torch.cat([self.time(t), seen, conditions], -1)
        modulation = self.condition(condition).unflatten(1, (6, -1))
        tokens = self.from_scene(to_tokens(z_t)) + self.from_observed(h)
        for block in self.blocks:
            tokens = block(tokens, modulation)
        return to_image(self.to_scene(F.layer_norm(tokens, tokens.shape[-1:]))).float()
