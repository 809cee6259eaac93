"""What the observed values of a pixel tell by themselves, and how sure an expectation is.

In near infrared from colour, or land cover from it, most is told by the pixel alone. A network on
random Fourier features learns that in seconds where convolutions take an hour; it has weights of
its own for each target and a loss of its own, so that hard targets do not disturb easy ones
(docs/experiments.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_model.nn.blocks import FINE_STRIDE, to_image, zero_
from mm_model.nn.posterior import SCALES_PX

WAVES = 32
_FREQUENCY = 6.0  # standard deviation of the phase's slope, in radians a unit of model space
WIDTH = 32  # hidden units of each target
# Weights are kept that much smaller than they act, so that Adam's steps are as much larger: these
# networks learn best at several times the rate of the others.
RATE = 6.0

_LOG_VARIANCE = (-8.0, 4.0)
_LOG_SCALES = (-6.0, 6.0)


class Waves(nn.Module):
    """Random Fourier features, [..., C] → [..., 2 · WAVES] (Tancik et al. 2020, arXiv 2006.10739).

    Channels are summed, so that any subset of them has features of one width; absent ones are 0.
    """

    projection: Tensor
    width = 2 * WAVES

    def __init__(self, channels: int) -> None:
        super().__init__()
        drawn = torch.randn(channels, WAVES, generator=torch.Generator().manual_seed(0))
        self.register_buffer("projection", _FREQUENCY * drawn)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # phases want more digits than bf16 has
            phase = x.float() @ self.projection
            return torch.cat([phase.sin(), phase.cos()], -1)


class FastLinear(nn.Linear):
    """A linear layer that learns `RATE` times as fast as others."""

    def __init__(self, inputs: int, outputs: int, *, zero: bool = False) -> None:
        super().__init__(inputs, outputs)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0 if zero else 1 / RATE)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, RATE * self.weight, RATE * self.bias)


class PixelNetworks(nn.Module):
    """One hidden layer for each target, on the observed values of a pixel.

    Args:
        channels: of all modalities.
        modalities: their number.
        owner: modality of each of the targets' channels.
    """

    own: Tensor

    def __init__(self, channels: int, modalities: int, owner: Tensor) -> None:
        super().__init__()
        targets = int(owner.max()) + 1
        hidden = targets * WIDTH
        self.inner = FastLinear(channels + Waves.width + modalities, hidden)
        self.scale = FastLinear(modalities, hidden)
        self.outer = FastLinear(hidden, len(owner), zero=True)
        unit = torch.arange(targets).repeat_interleave(WIDTH)
        self.register_buffer("own", owner[:, None] == unit, persistent=False)

    def forward(self, seen: Tensor, waves: Tensor, present: Tensor) -> Tensor:
        """Values or logits, [B, channels of the targets, H, W].

        Args:
            seen: observed values [B, H, W, C], 0 where nothing is.
            waves: `Waves` of them.
            present: [B, H, W, M], 1 where a modality is observed.
        """
        scale = 1 + self.scale(present.amax((1, 2)))[:, None, None]
        hidden = F.silu(self.inner(torch.cat([seen, waves, present], -1)) * scale)
        weight = RATE * self.outer.weight * self.own
        return to_image(F.linear(hidden, weight, RATE * self.outer.bias)).float()


class Sureness(nn.Module):
    """How far values may depart from what is expected of them.

    Args:
        modalities: of those that roles are told of.
        width: of the decoder's features at a quarter of the resolution.
        channels: of the values.
    """

    def __init__(self, modalities: int, width: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.hidden = FastLinear(3 * modalities, 2 * WIDTH)
        self.whole = FastLinear(2 * WIDTH, channels * (1 + len(SCALES_PX)), zero=True)
        self.local = zero_(nn.Linear(width, channels))

    def forward(self, roles: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms, float32: of the variance of each value beside the data's, [B, C, H, W], with
        a loss of its own; of each scale's variance or weight beside its first, [B, C, scales].

        Args:
            roles: [B, 3 M]: for each modality, whether it is observed, whether wanted, and when.
            features: [B, H/4, W/4, width].
        """
        told = self.whole(F.silu(self.hidden(roles))).float()
        whole, scales = told[:, : self.channels], told[:, self.channels :]
        found = to_image(whole[:, None, None] + self.local(features.detach()).float())
        found = F.interpolate(found, scale_factor=FINE_STRIDE, mode="bilinear", align_corners=False)
        scales = scales.unflatten(1, (self.channels, -1))
        return found.clamp(*_LOG_VARIANCE), scales.clamp(*_LOG_SCALES)


def uncorrelated(channels: int) -> nn.Parameter:
    """`mixing` of `posterior.with_measurement` to begin with, [scales, C, C]."""
    return nn.Parameter(torch.eye(channels).repeat(len(SCALES_PX), 1, 1))
