"""Statistics of the training patches: what the codec standardises with.

Everything is a sum, so that patches may come in any order and parts may be merged: counts, moments
(float64) and, for quantiles, a histogram of fixed bins over a modality's valid range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.data.store import PatchStore
from mm_model.errors import DataError
from mm_model.modalities import Modality, Transform

QUANTILES = (0.01, 0.02, 0.05, 0.25, 0.5, 0.75, 0.95, 0.98, 0.99)
# Resolution of quantiles: a 65,536th of the valid range (0.00003 of reflectance, 0.15 m, 0.0015 dB)
_BINS = 1 << 16
# The least scale of an ASINH transform, in units: below it lies noise, not relief.
_LEAST_SCALE = 10.0


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations; merging is associative up to rounding."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: NDArray[np.generic]) -> Moments:
        if not values.size:
            return cls()
        exact = values.astype(np.float64)
        mean = float(exact.mean())
        return cls(exact.size, mean, float(np.square(exact - mean).sum()))

    def merge(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * other.count / count,
            self.squares + other.squares + delta**2 * self.count * other.count / count,
        )

    @property
    def std(self) -> float:
        """Of the population."""
        return float(np.sqrt(self.squares / self.count)) if self.count else float("nan")


@dataclass(frozen=True)
class BandSummary:
    """Moments, range and histogram of a band over its valid range."""

    valid_range: tuple[float, float]
    moments: Moments
    least: float
    greatest: float
    histogram: NDArray[np.int64]

    @classmethod
    def of(cls, values: NDArray[np.generic], valid_range: tuple[float, float]) -> BandSummary:
        low, high = valid_range
        share = (values.astype(np.float64) - low) / (high - low)
        bins = np.clip(share * _BINS, 0, _BINS - 1).astype(np.int64)
        return cls(
            valid_range,
            Moments.of(values),
            float(values.min()) if values.size else float("inf"),
            float(values.max()) if values.size else float("-inf"),
            np.bincount(bins, minlength=_BINS),
        )

    def merge(self, other: BandSummary) -> BandSummary:
        return BandSummary(
            self.valid_range,
            self.moments.merge(other.moments),
            min(self.least, other.least),
            max(self.greatest, other.greatest),
            self.histogram + other.histogram,
        )

    def quantile(self, q: float) -> float:
        """By linear interpolation in its bin; never outside of what was seen."""
        cumulative = np.cumsum(self.histogram)
        wanted = q * cumulative[-1]
        at = int(np.searchsorted(cumulative, wanted, side="left"))
        inside = self.histogram[at]
        before = cumulative[at] - inside
        low, high = self.valid_range
        value = low + (at + (wanted - before) / max(inside, 1)) * (high - low) / _BINS
        return float(np.clip(value, self.least, self.greatest))


def compute_statistics(
    store: PatchStore, positions: Sequence[int], modalities: Sequence[Modality]
) -> dict[str, Any]:
    """What stats.json holds, JSON-ready.

    Args:
        store: the patches.
        positions: those of the training split.
        modalities: the active ones.

    Returns:
        patches, places; for each modality its pixels and, for each band, mean, std, min, max,
        quantiles and the constants of its transform (or, for classes, the count of each code);
        and the sets of modalities that occur together.

    Raises:
        DataError: there is no patch, or a modality has no valid pixel.
    """
    if not len(positions):
        raise DataError("statistics of no patches", remedy="look at data/splits.parquet")
    names = [m.name for m in modalities]
    frame = store.index[
        store.index["patch_id"].isin([store.patch_ids[p] for p in positions])
        & store.index["modality"].isin(names)
    ]
    sets = Counter(
        tuple(sorted(group, key=names.index)) for _, group in frame.groupby("patch_id")["modality"]
    )
    return {
        "patches": len(positions),
        "places": int(frame["place_id"].nunique()),
        "modalities": {m.name: _of_modality(store, positions, m) for m in modalities},
        "sets": [
            {"modalities": list(members), "patches": n}
            for members, n in sorted(sets.items(), key=lambda item: (-item[1], item[0]))
        ],
    }


def _of_modality(store: PatchStore, positions: Sequence[int], modality: Modality) -> dict[str, Any]:
    if modality.is_categorical:
        counts = np.zeros(256, dtype=np.int64)
        for values in _known(store, positions, modality):
            counts += np.bincount(values[0], minlength=256)
        _require(int(counts.sum()), modality)
        classes = {str(code): int(counts[code]) for code in modality.class_codes}
        return {"pixels": int(counts.sum()), "classes": classes}
    summaries: list[BandSummary] | None = None
    for values in _known(store, positions, modality):
        parts = [BandSummary.of(band, modality.valid_range) for band in values]
        summaries = (
            [a.merge(b) for a, b in zip(summaries, parts, strict=True)] if summaries else parts
        )
    pixels = summaries[0].moments.count if summaries else 0
    _require(pixels, modality)
    assert summaries is not None
    constants = [_transform_constants(modality.transform, s) for s in summaries]
    transformed = [Moments() for _ in summaries]
    for values in _known(store, positions, modality):
        for i, band in enumerate(values):
            mapped = modality.transform.forward(band.astype(np.float64), *constants[i], xp=np)
            transformed[i] = transformed[i].merge(Moments.of(mapped))
    return {
        "pixels": pixels,
        "bands": [
            {
                "name": name,
                "mean": summary.moments.mean,
                "std": summary.moments.std,
                "min": summary.least,
                "max": summary.greatest,
                "quantiles": {str(q): summary.quantile(q) for q in QUANTILES},
                "center": constant[0],
                "scale": constant[1],
                "transformed_mean": moments.mean,
                "transformed_std": moments.std,
            }
            for name, summary, constant, moments in zip(
                modality.band_names, summaries, constants, transformed, strict=True
            )
        ],
    }


def _known(
    store: PatchStore, positions: Sequence[int], modality: Modality
) -> Iterable[NDArray[Any]]:
    """Valid pixels [bands, n] of each patch that has the modality."""
    for position in positions:
        layer = store.read(position, [modality.name]).layers.get(modality.name)
        if layer is not None:
            yield layer.values[:, layer.valid]


def _require(pixels: int, modality: Modality) -> None:
    if not pixels:
        raise DataError(
            f"statistics of {modality.name}",
            got="no valid pixel in the training split",
            remedy=f"take {modality.name} out of modalities, or add places that have it",
        )


def _transform_constants(transform: Transform, summary: BandSummary) -> tuple[float, float]:
    """Centre and scale of a band's transform, in physical units."""
    if transform is not Transform.ASINH:
        return 0.0, 1.0
    spread = summary.quantile(0.75) - summary.quantile(0.25)
    return summary.quantile(0.5), max(spread / 2, _LEAST_SCALE)
