"""Scene: the values and masks of a batch of places, checked on construction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_model.errors import LayerError


@dataclass(frozen=True)
class Scene:
    """What is known of B places of H x W pixels, in physical units.

    An absent modality has no key. Within a batch a place may lack a modality that others have: all
    its pixels are then invalid. What an invalid pixel holds means nothing and may be NaN.

    Attributes:
        values: modality name → [B, bands, H, W]; float for continuous modalities, class codes of
            any integer or float type for categorical ones.
        valid: modality name → bool [B, 1, H, W]; the same keys.
    """

    values: Mapping[str, Tensor]
    valid: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if set(self.values) != set(self.valid):
            raise LayerError(
                "scene",
                got=f"values of {sorted(self.values)}, masks of {sorted(self.valid)}",
                allowed="a mask for each layer",
            )
        frames = set()
        for name, value in self.values.items():
            mask = self.valid[name]
            if value.ndim != 4:
                raise LayerError(f"scene layer {name}", got=list(value.shape), allowed="[B,C,H,W]")
            expected = (value.shape[0], 1, *value.shape[2:])
            if mask.dtype is not torch.bool or tuple(mask.shape) != expected:
                raise LayerError(
                    f"scene mask {name}",
                    got=f"{mask.dtype} {list(mask.shape)}",
                    allowed=f"torch.bool {list(expected)}",
                )
            frames.add(expected)
        if len(frames) > 1:
            raise LayerError("scene", got=sorted(frames), allowed="one batch and frame for all")

    def without(self, *names: str) -> Scene:
        """A copy that lacks the named modalities."""
        return self.only(*(n for n in self.values if n not in names))

    def only(self, *names: str) -> Scene:
        """A copy that has none but the named modalities (those of them that it has)."""
        kept = [n for n in self.values if n in names]
        return Scene({n: self.values[n] for n in kept}, {n: self.valid[n] for n in kept})

    def to(self, device: torch.device | str) -> Scene:
        return Scene(
            {n: v.to(device) for n, v in self.values.items()},
            {n: v.to(device) for n, v in self.valid.items()},
        )
