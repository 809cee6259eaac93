"""From what a file holds to physical units, and from its grid to another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mm_model.data.raster import warp
from mm_model.errors import RasterError
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality, Quantity

OutOfRange = Literal["error", "clip", "mask"]


def to_physical(
    values: NDArray[Any],
    valid: NDArray[np.bool_],
    modality: Modality,
    *,
    scales: Sequence[float],
    offsets: Sequence[float],
    linear_power: bool,
    out_of_range: OutOfRange,
    where: str,
    is_part: bool = False,
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Stored numbers in the unit of a continuous modality.

    Args:
        values: [bands, H, W] as stored.
        valid: bool [H, W].
        modality: what the numbers measure.
        scales: one a band; physical = stored * scale + offset.
        offsets: one a band.
        linear_power: whether that is power, to be expressed in dB; no power is no measurement.
        out_of_range: what to do with values that the modality cannot have.
        where: the file, for errors.
        is_part: whether these are some of its pixels, whose median may be anything.

    Raises:
        RasterError: a value is out of range and that is an error, or the median is not plausible
            for the unit.
    """
    column = (slice(None), None, None)
    physical = values * np.asarray(scales, np.float64)[column]
    physical += np.asarray(offsets)[column]
    if linear_power:
        valid = valid & (physical > 0).all(axis=0)
        physical = 10 * np.log10(np.where(physical > 0, physical, 1))
    low, high = modality.valid_range
    # Most often all is inside, which two passes without a mask say; NaN is not.
    inside = physical.size and physical.min() >= low and physical.max() <= high
    outside = None if inside else ((physical < low) | (physical > high)) & valid
    if outside is not None and outside.any():
        if out_of_range == "error":
            raise RasterError(
                f"{where}: values of {modality.name}",
                got=f"{int(outside.sum())} outside, such as {physical[outside][0]:.6g}",
                allowed=f"{low:g} to {high:g} {modality.unit}",
                remedy="mend scale, offset or nodata in the manifest, or declare out_of_range",
            )
        valid = valid if out_of_range == "clip" else valid & ~outside.any(axis=0)
        physical = np.clip(physical, low, high)
    if not is_part:
        check_median(physical if valid.all() else physical[:, valid], modality, where)
    return physical.astype(np.float32), valid


def check_median(known: NDArray[Any], modality: Modality, where: str) -> None:
    """Whether values are what their unit says: a wrong scale or unit shows in the median.

    Raises:
        RasterError: it is not plausible.
    """
    low, high = modality.quantity.traits.plausible_median
    median = float(np.median(known)) if known.size else low
    if not low <= median <= high:
        raise RasterError(
            f"{where}: median of {modality.name}",
            got=f"{median:.6g}",
            allowed=f"{low:g} to {high:g} {modality.unit}",
            remedy="look at scale, offset and unit in the manifest",
        )


def to_classes(
    values: NDArray[np.generic],
    valid: NDArray[np.bool_],
    legend: Mapping[int, int],
    where: str,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Codes of a categorical modality; what the legend maps to 0 becomes invalid.

    Raises:
        RasterError: a valid pixel holds a code that the legend does not name.
    """
    codes, inverse = np.unique(values[0], return_inverse=True)
    present = codes[np.unique(inverse.reshape(valid.shape)[valid])]
    unknown = [c.item() for c in present if c.item() not in legend]
    if unknown:
        raise RasterError(
            f"{where}: class {', '.join(map(str, unknown))}",
            got="no entry in the manifest's legend",
            allowed=sorted(legend),
            remedy="add it under `classes`, with 0 if it shall be ignored",
        )
    table = np.array([legend.get(c.item(), 0) for c in codes], dtype=np.uint8)
    mapped = table[inverse.reshape(values.shape)]
    return mapped, valid & (mapped[0] != 0)


def resample(
    values: NDArray[Any],
    valid: NDArray[np.bool_],
    source: Grid,
    target: Grid,
    modality: Modality,
    *,
    exact: bool = False,
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A layer in physical units, brought onto another grid as its kind and quantity ask for.

    Backscatter is averaged as power: the mean of decibels is not the decibels of the mean. `exact`
    is `raster.warp`'s.
    """
    if source == target:
        return values, valid
    in_power = modality.quantity is Quantity.BACKSCATTER
    if in_power:
        values = np.power(10.0, np.where(valid, values, 0) / 10)
    moved, known = warp(
        values, valid, source, target, categorical=modality.is_categorical, exact=exact
    )
    if in_power:
        moved = (10 * np.log10(np.where(known, moved, 1))).astype(np.float32)
    return moved, known
