"""A toy model and toy scenes: batch 3, 5 modalities, 19 channels, 16 x 24 pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mm_model.codec import Codec
from mm_model.modalities import Modality, select
from mm_model.nn.model import SceneModel, Size
from mm_model.scene import Scene

NAMES = ("rgb", "nir", "sar", "dem", "map")
FIVE = select(NAMES)
SIZE = Size(
    encoder_width=16,
    decoder_width=16,
    dim=32,
    encoder_depth=1,
    flow_depth=1,
    decoder_depth=1,
    heads=2,
    scene_channels=4,
)
BATCH, HEIGHT, WIDTH = 3, 16, 24

# (center, scale, mean and standard deviation after the transform) by unit.
_MOMENTS = {
    "1": (0.2, 1.0, 0.4, 0.2),
    "dB": (-12.0, 10.0, -12.0, 4.0),
    "m": (200.0, 40.0, 0.3, 1.2),
    "K": (290.0, 10.0, 290.0, 12.0),
}
_RELIEF = {"scale": 8.0, "transformed_mean": 0.02, "transformed_std": 1.1}


def statistics(modalities: Sequence[Modality] = FIVE, patches: int = 10) -> dict:
    """What the stage `stats` would write of a training split with every modality in every patch."""
    records = {}
    for m in modalities:
        if m.is_categorical:
            records[m.name] = {"pixels": 99, "classes": {str(c): 9 for c in m.class_codes}}
            continue
        center, scale, mean, std = _MOMENTS[m.unit]
        band = {"center": center, "scale": scale, "transformed_mean": mean, "transformed_std": std}
        if m.splits_relief:
            band["relief"] = _RELIEF
        records[m.name] = {"pixels": 99, "bands": [{"name": b.name, **band} for b in m.bands]}
    sets = [{"modalities": [m.name for m in modalities], "patches": patches}]
    return {"patches": patches, "modalities": records, "sets": sets}


def make_model(
    modalities: Sequence[Modality] = FIVE,
    *,
    seed: int = 0,
    patch_px: int = 32,
    sets: list = (),
    regressions: bool = False,
) -> SceneModel:
    """A toy model with random weights everywhere, the zero-initialised ones too."""
    stats = statistics(modalities)
    torch.manual_seed(seed)
    model = SceneModel(
        modalities,
        SIZE,
        Codec(modalities, stats),
        list(sets) or stats["sets"],
        patch_px,
        regressions=regressions,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if model.decoder.regressions is not None:
            for name in ("near", "far", "trust", "prior"):
                buffer = getattr(model.decoder.regressions, name)
                buffer.copy_(0.1 * torch.rand_like(buffer))
    return model.eval()


def make_scene(
    modalities: Sequence[Modality] = FIVE,
    *,
    batch: int = BATCH,
    height: int = HEIGHT,
    width: int = WIDTH,
    seed: int = 0,
    valid_share: float = 0.8,
) -> Scene:
    """Physical values with holes."""
    source = torch.Generator().manual_seed(seed)
    values, valid = {}, {}
    for m in modalities:
        shape = (batch, len(m.bands), height, width)
        if m.is_categorical:
            codes = torch.tensor(m.class_codes)
            values[m.name] = codes[torch.randint(len(codes), shape, generator=source)]
        else:
            low, high = m.display_range
            values[m.name] = low + (high - low) * torch.rand(shape, generator=source)
        uniform = torch.rand(batch, 1, height, width, generator=source)
        valid[m.name] = uniform < valid_share
    return Scene(values, valid)


def spoil(scene: Scene, value: float) -> Scene:
    """The same scene with something else in its invalid pixels."""
    return Scene(
        {n: torch.where(scene.valid[n], v.float(), value) for n, v in scene.values.items()},
        scene.valid,
    )


def encoded(scene: Scene, model: SceneModel) -> tuple[Tensor, Tensor]:
    return model.codec.encode(scene)
