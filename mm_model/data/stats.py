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

from mm_model.data.patch import Layer
from mm_model.data.store import PatchStore
from mm_model.errors import DataError
from mm_model.modalities import LEVEL_PX, Modality, Transform

QUANTILES = (0.01, 0.02, 0.05, 0.25, 0.5, 0.75, 0.95, 0.98, 0.99)
# Resolution of quantiles: a 65,536th of the valid range (0.00003 of reflectance, 0.15 m, 0.0015 dB)
_BINS = 1 << 16
# The least scale of an ASINH transform, in units: below it lies noise, not relief.
_LEAST_SCALE = 10.0
_LEAST_RELIEF_SCALE = 1.0  # the same for what a level leaves


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

    def shares(self, value: float) -> tuple[float, float]:
        """Of what was seen: below the bin of `value`, and up to its end."""
        low, high = self.valid_range
        at = int(np.clip((value - low) / (high - low) * _BINS, 0, _BINS - 1))
        below, total = self.histogram[:at].sum(), self.histogram.sum()
        return float(below / total), float((below + self.histogram[at]) / total)

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
        and the sets of modalities that occur together. A band that is split into level and relief
        has the constants of its level (centre and scale are those of the values), and those of
        its relief as `relief`. A modality of several bands has their `correlation`, of transformed
        values: what a file without one of them is completed with.

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
        for layer in layers_of(store, positions, modality):
            counts += np.bincount(layer.values[0, layer.valid], minlength=256)
        _require(int(counts.sum()), modality)
        classes = {str(code): int(counts[code]) for code in modality.class_codes}
        return {"pixels": int(counts.sum()), "classes": classes}
    bands, (low, high) = len(modality.bands), modality.valid_range
    ranges = [(low, high)] * bands + [(low - high, high - low)] * (modality.channels - bands)
    summaries: list[BandSummary] | None = None
    for layer in layers_of(store, positions, modality):
        known = [*layer.values[:, layer.valid], *_channels(layer, modality)[bands:]]
        parts = [BandSummary.of(v, limits) for v, limits in zip(known, ranges, strict=True)]
        summaries = (
            [a.merge(b) for a, b in zip(summaries, parts, strict=True)] if summaries else parts
        )
    _require(summaries[0].moments.count if summaries else 0, modality)
    assert summaries is not None
    constants = [_transform_constants(modality.transform, s) for s in summaries[:bands]]
    constants += [(0.0, _half_spread(s, _LEAST_RELIEF_SCALE)) for s in summaries[bands:]]
    transformed = [Moments() for _ in constants]
    products = np.zeros((bands, bands))
    for layer in layers_of(store, positions, modality):
        mapped = np.stack(
            [
                modality.transform.forward(channel, *constant, xp=np)
                for channel, constant in zip(_channels(layer, modality), constants, strict=True)
            ]
        )
        transformed = [m.merge(Moments.of(x)) for m, x in zip(transformed, mapped, strict=True)]
        products += mapped[:bands] @ mapped[:bands].T
    records = [
        {"scale": scale, "transformed_mean": moments.mean, "transformed_std": moments.std}
        for (_, scale), moments in zip(constants, transformed, strict=True)
    ]
    return {
        "pixels": summaries[0].moments.count,
        **({"correlation": _correlation(products, transformed[:bands])} if bands > 1 else {}),
        "bands": [
            {
                "name": name,
                "mean": summary.moments.mean,
                "std": summary.moments.std,
                "min": summary.least,
                "max": summary.greatest,
                "quantiles": {str(q): summary.quantile(q) for q in QUANTILES},
                "center": constants[i][0],
                **records[i],
                **({"relief": records[bands + i]} if modality.splits_relief else {}),
            }
            for i, (name, summary) in enumerate(
                zip(modality.band_names, summaries[:bands], strict=True)
            )
        ],
    }


def _correlation(products: NDArray[np.float64], moments: Sequence[Moments]) -> list[list[float]]:
    """Of bands, from the sum of their outer products over all pixels."""
    means, deviations = np.array([(m.mean, m.std) for m in moments]).T
    covariance = products / moments[0].count - np.outer(means, means)
    scale = np.outer(deviations, deviations)
    found = np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0)
    np.fill_diagonal(found, 1)
    return np.clip(found, -1, 1).tolist()  # type: ignore[no-any-return]


def layers_of(store: PatchStore, positions: Sequence[int], modality: Modality) -> Iterable[Layer]:
    """The modality's layer of each patch that has it."""
    for position in positions:
        layer = store.read(position, [modality.name]).layers.get(modality.name)
        if layer is not None:
            yield layer


def _channels(layer: Layer, modality: Modality) -> NDArray[np.float64]:
    """What the codec transforms, [channels, n] at the n valid pixels, in physical units."""
    values = layer.values.astype(np.float64)
    if modality.splits_relief:
        level = _box_mean(values, layer.valid)
        values = np.concatenate([level, values - _box_mean(level, layer.valid)])
    return values[:, layer.valid]


def _box_mean(values: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The codec's S for numpy: the mean over the valid pixels in a box of `LEVEL_PX`, [K, H, W].

    Only at valid pixels does it mean anything.
    """
    total = _box_sum(np.where(valid, values, 0))
    count = _box_sum(valid[None].astype(np.float64))
    return total / np.maximum(count, 1)


def _box_sum(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the part of a box of `LEVEL_PX` that lies within the image, [K, H, W]."""
    for axis in (1, 2):
        length = image.shape[axis]
        running = np.insert(image.cumsum(axis), 0, 0, axis)
        first = np.arange(length) - LEVEL_PX // 2
        last = np.minimum(first + LEVEL_PX, length)
        image = running.take(last, axis) - running.take(np.maximum(first, 0), axis)
    return image


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
    return summary.quantile(0.5), _half_spread(summary, _LEAST_SCALE)


def _half_spread(summary: BandSummary, least: float) -> float:
    """Half of the inter-quartile range, but not less than `least`, in physical units."""
    return max((summary.quantile(0.75) - summary.quantile(0.25)) / 2, least)
