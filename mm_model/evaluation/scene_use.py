"""Whether the model uses its scene: figures that fall long before pictures look wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mm_model.conditions import FEATURES
from mm_model.data.patch import Patch
from mm_model.generative.noise import generator
from mm_model.generative.path import interpolate
from mm_model.generative.sampler import decode_scene
from mm_model.modalities import Quantity
from mm_model.nn.model import SceneModel
from mm_model.training.dataset import collate
from mm_model.training.step import target_losses

_TIME = 0.3  # of the decoder, about the mean of what training sees


def scene_use(
    model: SceneModel, patches: Sequence[Patch], *, steps: int, seed: int
) -> dict[str, float]:
    """How far the decoder listens to the scene, on patches of one frame.

    Args:
        model: in evaluation mode.
        patches: held-out; several.
        steps: of the decoder.
        seed: of its noise.

    Returns:
        color_correlation: of a patch's mean reflectance, decoded from its own scene with nothing
            else shown, with the truth; mean over the reflectance modalities, near 1 where the
            decoder listens.
        loss_right_scene, loss_wrong_scene: the decoder's loss at one time with the patch's own
            scene, and with that of another patch; equal where it does not listen.
        NaN where the patches do not tell.
    """
    codec = model.codec
    x, mask = codec.encode(collate(patches, codec.modalities))
    with torch.no_grad():
        z = model.encode(x, mask).z
        right = _loss(model, x, mask, z, seed)
        wrong = _loss(model, x, mask, z.roll(1, 0), seed)
    return {
        "color_correlation": _color_correlation(model, x, mask, z, steps, seed),
        "loss_right_scene": right,
        "loss_wrong_scene": wrong if len(patches) > 1 else math.nan,
    }


def _loss(model: SceneModel, x: Tensor, mask: Tensor, z: Tensor, seed: int) -> float:
    """Mean loss over the targets, all wanted at once and nothing observed."""
    noise = torch.randn(x.shape, generator=generator("scene use", seed)).to(x)
    t = x.new_full((len(x), len(model.names)), _TIME)
    nothing = torch.zeros_like(mask)
    shown = torch.where(model.channelwise(mask), interpolate(x, noise, t[:, :1, None, None]), 0)
    unknown = x.new_zeros(len(x), FEATURES)
    raw = model.decode(shown, t, nothing, mask, z, unknown)
    losses = target_losses(model, raw, x, mask, t)
    return float(losses.sum() / mask.any(-1).any(-1).sum().clamp_min(1))


def _color_correlation(
    model: SceneModel, x: Tensor, mask: Tensor, z: Tensor, steps: int, seed: int
) -> float:
    nothing = torch.zeros_like(mask)
    seeds = [seed + i for i in range(len(x))]
    found = []
    for index, modality in enumerate(model.modalities):
        if modality.quantity is not Quantity.REFLECTANCE:
            continue
        rows = [i for i in range(len(x)) if bool(mask[i, index].any())]
        if len(rows) < 2:
            continue
        made = decode_scene(
            model, x[rows], nothing[rows], z[rows], [modality.name], [seeds[i] for i in rows], steps
        )
        pair = [
            model.codec.decode(v, [modality.name])[modality.name].cpu().numpy()
            for v in (made, x[rows])
        ]
        levels = np.array(
            [
                [values[k][:, mask[i, index].cpu().numpy()].mean() for values in pair]
                for k, i in enumerate(rows)
            ]
        )
        if levels.std(axis=0).all():
            found.append(np.corrcoef(levels.T)[0, 1])
    return float(np.mean(found)) if found else math.nan
