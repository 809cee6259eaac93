"""What the index says of a layer's content, so that it can be judged without reading pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.data.patch import Layer
from mm_model.modalities import Modality, Quantity

_HASH_SIDE = 8
# White and bright: the reflectance of thick clouds and of snow; soil and roofs are darker, sand is
# redder.
_CLOUD_REFLECTANCE = 0.35
_CLOUD_COLOUR_SPREAD = 0.25


def known_values(layer: Layer) -> NDArray[Any]:
    """The values of the valid pixels, [bands, n]; without a copy where all are."""
    if layer.valid.all():
        return layer.values.reshape(len(layer.values), -1)
    return layer.values[:, layer.valid]


def content(layer: Layer, modality: Modality) -> dict[str, Any]:
    """Columns of the index.

    Returns:
        median: over the valid pixels of all bands, in the modality's unit; NaN for classes.
        saturated_share: of the valid pixels, the share that hold their band's greatest value, in
            the worst band; 1 in a constant band; NaN for classes and relief (a lake is level).
        white_share: of the valid pixels, the share that is bright in every band and nearly without
            colour, as clouds and snow are; NaN unless three bands or more of reflectance.
        look: 128 bits (hexadecimal) that nearly equal images share; None for classes and relief
            (hillsides resemble each other), for a constant layer and below 9 px a side.
    """
    if modality.is_categorical or not layer.valid.any():
        return {"median": np.nan, "saturated_share": np.nan, "white_share": np.nan, "look": None}
    known = known_values(layer).astype(np.float32, copy=False)
    greatest = known.max(axis=1, keepdims=True)
    white = np.nan
    if modality.quantity is Quantity.REFLECTANCE and len(modality.bands) >= 3:
        low, high = known.min(axis=0), known.max(axis=0)
        bright = (low > _CLOUD_REFLECTANCE) & (high - low < _CLOUD_COLOUR_SPREAD * high)
        white = float(bright.mean())
    saturated = float((known == greatest).mean(axis=1).max())
    return {
        "median": float(np.median(known)),
        "saturated_share": np.nan if modality.splits_relief else saturated,
        "white_share": white,
        "look": None if modality.splits_relief else _look(layer),
    }


def _look(layer: Layer) -> str | None:
    """Signs of the differences of neighbouring cells of a coarse picture, across and down (dHash).

    N. Krawetz, "Kind of Like That" (2013); unlike a digest, small changes of values keep it.
    """
    mean = layer.values.astype(np.float64).mean(axis=0)
    inside = mean[layer.valid]
    if inside.min() == inside.max() or min(mean.shape) <= _HASH_SIDE:
        return None
    filled = np.where(layer.valid, mean, inside.mean())
    side = _HASH_SIDE + 1
    cells = _cell_means(_cell_means(filled, side, 0), side, 1)
    across = cells[:-1, 1:] > cells[:-1, :-1]
    down = cells[1:, :-1] > cells[:-1, :-1]
    return np.packbits([across, down]).tobytes().hex()


def _cell_means(image: NDArray[np.float64], cells: int, axis: int) -> NDArray[np.float64]:
    parts = np.array_split(image, cells, axis)
    return np.stack([p.mean(axis) for p in parts], axis)
