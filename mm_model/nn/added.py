"""A modality that a trained model learns later: its inputs and heads, beside networks that stay.

Nothing here has a bias on its way in, so that where the modality is neither observed nor wanted
exactly zero is added to what the frozen networks compute, and their outputs stay what they were,
bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_model.nn.blocks import FINE_STRIDE, TimeFeatures, fold, to_image, to_tokens, unfold, zero_
from mm_model.nn.pixels import PixelNetworks, Sureness, uncorrelated


class Added(nn.Module):
    """Inputs and heads of one modality.

    Args:
        channels: of the modality in model space.
        encoder_width, decoder_width, fine_width: channels of the convolutions that it joins.
        dim: width of the decoder's condition.
        z: channels of the scene.
        first: modality of each channel, of those learnt first. Its pixels tell of these alone by
            themselves, and theirs nothing of it: that is left to the convolutions.
    """

    def __init__(
        self,
        channels: int,
        encoder_width: int,
        decoder_width: int,
        fine_width: int,
        dim: int,
        z: int,
        first: Tensor,
    ) -> None:
        super().__init__()
        self.channels = channels
        modalities = int(first.max()) + 1
        cell = FINE_STRIDE**2
        self.time = TimeFeatures()
        self.encoder_pixels = nn.Conv2d(channels * cell, encoder_width, 3, padding=1, bias=False)
        self.encoder_presence = nn.Linear(1, encoder_width, bias=False)
        self.decoder_pixels = nn.Conv2d(channels * cell, decoder_width, 3, padding=1, bias=False)
        self.decoder_roles = nn.Linear(2, decoder_width, bias=False)
        self.condition = nn.Linear(self.time.width + 2, dim, bias=False)
        self.fine_in = nn.Conv2d(channels, fine_width, 3, padding=1, bias=False)
        self.base = zero_(nn.Linear(decoder_width, channels * cell))
        self.fine_out = zero_(nn.Conv2d(fine_width, channels, 3, padding=1))
        self.coarse = zero_(nn.Linear(z, channels))
        owner = torch.zeros(channels, dtype=torch.long)
        self.pixel_networks = PixelNetworks(len(first), modalities, owner)
        self.sureness = Sureness(modalities, decoder_width, channels)
        self.mixing = uncorrelated(channels)

    def encoder_input(self, x: Tensor, mask: Tensor) -> Tensor:
        """What the encoder's first features gain: [B, width, H/4, W/4].

        x: [B, channels, H, W], 0 where unknown; mask: [B, 1, H, W].
        """
        coverage = F.avg_pool2d(mask.to(x.dtype), FINE_STRIDE)
        features = self.encoder_pixels(to_image(fold(to_tokens(x), FINE_STRIDE)))
        return features + to_image(self.encoder_presence(to_tokens(coverage)))  # type: ignore[no-any-return]

    def decoder_input(self, x: Tensor, roles: Tensor) -> Tensor:
        """What the decoder's first features gain; roles: [B, 2, H/4, W/4], observed and wanted."""
        features = self.decoder_pixels(to_image(fold(to_tokens(x), FINE_STRIDE)))
        return features + to_image(self.decoder_roles(to_tokens(roles)))  # type: ignore[no-any-return]

    def decoder_condition(self, t: Tensor, present: Tensor, wanted: Tensor) -> Tensor:
        """What the first layer of the decoder's condition gains; all arguments are [B]."""
        features = torch.cat([self.time(t) * wanted[:, None], present[:, None], wanted[:, None]], 1)
        return self.condition(features)  # type: ignore[no-any-return]

    def raw(self, features: Tensor, fine: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Parts of the raw output: base and fine [B, channels, H, W], coarse [B, channels, h, w].

        features: tokens [B, H/4, W/4, width]; fine: [B, fine width, H, W]; z: tokens [B, h, w, S].
        """
        base = to_image(unfold(self.base(features), FINE_STRIDE))
        return base, self.fine_out(fine), to_image(self.coarse(z))
