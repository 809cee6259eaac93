"""Which of a modality's bands a file holds, and what is to be expected of those that it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.data.raster import RasterHeader
from mm_model.modalities import MODALITIES, Band, Modality

# Sentinel-2's names of bands, by their centre in nm: what tools call red is B04 in its products.
_SENTINEL_2_NM = {
    "b01": 442.7, "b02": 492.4, "b03": 559.8, "b04": 664.6, "b05": 704.1, "b06": 740.5,
    "b07": 782.8, "b08": 832.8, "b8a": 864.7, "b09": 945.1, "b11": 1613.7, "b12": 2202.4,
}  # fmt: skip
_POLARISATIONS = {"vv", "vh", "hh", "hv"}
_TELLING = (
    {band.name.casefold() for m in MODALITIES.values() for band in m.bands}
    | set(_SENTINEL_2_NM)
    | _POLARISATIONS
)
"""Names that say what a band measures, where others ("Band 1") say nothing."""


def bands_of(header: RasterHeader, modality: Modality) -> Mapping[str, int] | None:
    """Name → number, from 1, of a modality's bands in a file that names them, in whatever order and
    beside whatever else; None where they go by their order.

    Case does not matter, Sentinel-2's names stand for what they are, and a band without a name that
    is declared as a colour has that for a name. As many bands as the modality's go by their order
    where no name contradicts it. Empty: all names are those of other bands.
    """
    told = [_name(*pair) for pair in zip(header.band_names, header.colors, strict=True)]
    found = {}
    for band in modality.bands:
        numbers = [k for k, name in enumerate(told, 1) if name and name in _names_of(band)]
        if len(numbers) == 1:
            found[band.name] = numbers[0]
    others = {name for k, name in enumerate(told, 1) if k not in found.values()} & _TELLING
    by_order = dict(zip(modality.band_names, header.image_bands, strict=False))
    as_many = header.bands == len(modality.bands)
    if not others and (not found or (as_many and found.items() <= by_order.items())):
        return None
    return found


def _name(description: str, color: str) -> str:
    """A band's name to compare; of a longer one (Sigma0_VV_db) the polarisation that it tells."""
    name = description.strip().casefold()
    told = _POLARISATIONS.intersection(re.split(r"[^a-z0-9]+", name))
    return told.pop() if len(told) == 1 else name or color


def _names_of(band: Band) -> set[str]:
    """All that a band may be called."""
    codes = {
        code
        for code, center_nm in _SENTINEL_2_NM.items()
        if band.center_nm is not None and abs(band.center_nm - center_nm) < 1
    }
    return {band.name.casefold(), *codes}


def numbers_of(header: RasterHeader, modality: Modality) -> list[int]:
    """Numbers of a modality's bands that a file has, from 1, in the modality's order."""
    named = bands_of(header, modality)
    return list(header.image_bands if named is None else named.values())


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
