"""Which of a modality's bands a file holds, and what is to be expected of those that it lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.data.raster import RasterHeader
from mm_model.modalities import Modality


def bands_of(header: RasterHeader, modality: Modality) -> Sequence[str] | None:
    """Names of a modality's bands in a file that names them, in whatever order and beside whatever
    else; None where they go by their order.

    A file that has as many bands as the modality names all of them or none.
    """
    named = [name for name in modality.band_names if header.band_names.count(name) == 1]
    as_many = header.bands == len(modality.bands)
    return named if named and (len(named) == len(modality.bands) or not as_many) else None


def missing_bands(header: RasterHeader, modality: Modality) -> tuple[str, ...]:
    """A modality's bands that a file lacks; there is none where bands go by their order."""
    named = bands_of(header, modality)
    return () if named is None else tuple(n for n in modality.band_names if n not in named)


def can_complete(modality: Modality, statistics: Mapping[str, Any]) -> bool:
    """Whether a model's statistics tell what a band is to be expected from others."""
    return "correlation" in statistics["modalities"][modality.name]


def complete_bands(
    values: NDArray[np.generic],
    missing: Sequence[str],
    modality: Modality,
    statistics: Mapping[str, Any],
) -> NDArray[np.generic]:
    """All bands of a layer, those that a file lacks being what the others let expect at each pixel.

    The expectation of a Gaussian with the means, standard deviations and correlation of the
    training data, in the scale in which the model sees bands (dB, or the root of reflectance).

    Args:
        values: [known bands, ...] in physical units, in the modality's order.
        missing: names of the bands that are not among them.
        modality: what it is.
        statistics: of the model; `can_complete` them.

    Returns:
        [bands, ...] in physical units; the known ones are as they were.
    """
    if not missing:
        return values
    record = statistics["modalities"][modality.name]
    at = {name: k for k, name in enumerate(modality.band_names)}
    wanted = [at[name] for name in missing]
    given = [k for k in at.values() if k not in wanted]
    keys = ("center", "scale", "transformed_mean", "transformed_std")
    table = np.array([[band[key] for key in keys] for band in record["bands"]])
    centers, scales, means, deviations = (
        column.reshape(-1, *[1] * (values.ndim - 1)) for column in table.T
    )
    deviations = np.maximum(deviations, 1e-12)  # a band that never varies tells nothing
    correlation = np.array(record["correlation"])
    # Bands of a spectrum nearly repeat each other: the least squares that are smallest.
    weights, *_ = np.linalg.lstsq(
        correlation[np.ix_(given, given)], correlation[np.ix_(given, wanted)], rcond=1e-6
    )
    with np.errstate(all="ignore"):  # what an invalid pixel holds means nothing
        mapped = modality.transform.forward(
            values.astype(np.float64), centers[given], scales[given], xp=np
        )
        known = (mapped - means[given]) / deviations[given]
        expected = np.tensordot(weights.T, known, 1) * deviations[wanted] + means[wanted]
        found = modality.transform.inverse(expected, centers[wanted], scales[wanted], xp=np)
    whole = np.empty((len(at), *values.shape[1:]), np.result_type(values, np.float32))
    whole[given], whole[wanted] = values, np.clip(found, *modality.valid_range)
    return whole


def estimated_bands(missing: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Modality name → bands that files lack, as an origin tells them: `sar:VH`."""
    return tuple(f"{name}:{band}" for name, bands in missing.items() for band in bands)
