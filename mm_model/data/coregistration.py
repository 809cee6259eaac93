"""How far the layers of a patch lie from one another, measured across modalities.

Grids say that layers are co-registered; this looks. Layers of different sensors share structure,
not contrast, so each becomes features that keep their place: its bands without slow trends (one per
frequent class of a map; slopes for elevation), and its structure tensor, which knows an edge
whichever side is brighter. Of every displacement within reach the score is the share of variance
that two sets of features explain of one another (the mean squared canonical correlation, which for
normal variables orders displacements as mutual information does). Variances are those of all valid
pixels, decorrelated once a layer; what depends on the displacement is how the layers vary together,
how many pixels they have in common, and how much variance the other layer has there. These come
from the Fourier transform, so a displacement between pixels costs what one of whole pixels costs:
the peak is searched on whole pixels, then on quarters, and a paraboloid is fitted to it.

Arrays of features are [H, K, W], channels between rows and columns: what is done along rows or
along columns, smoothing and the transform, is then one product of matrices. At these sizes that
takes a fraction of the time of a fast transform.

The confidence is the peak's height above the scores elsewhere, in their standard deviations (peak
to sidelobe ratio); a patch without common structure has no such peak and its shift is unknown.

What is found is where things seem to be. Layers of the synthetic Earth, rendered on one grid, are
measured to lie up to 0.9 px apart (95th percentile; 0.2 px in the median). Shadows and the geometry
of radar may be why; a grid that is wrong by as much cannot be told from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.data.patch import Layer
from mm_model.modalities import Modality

F32 = NDArray[np.float32]

REACH_PX = 6
"""Displacements are looked for up to here, along rows and columns (less in patches below 48 px).
The outermost two are not believed: a peak at the rim may be the flank of one that lies outside."""
LEAST_CONFIDENCE = 8.0
"""Below this a shift is unknown; `benchmarks/data_alignment.py` measures what is above."""

_SMOOTH_PX, _TREND_PX = 0.7, 8.0  # standard deviations of the band-pass
_FINEST = 0.3125  # cycles a pixel, along rows and columns: smoothing has left little above
_CLASSES = 4  # of a map: the most frequent ones, of which each further one adds little
_BORDER_PX = 2  # where derivatives know one side only
_LEAST_TEMPLATE_PX = 256  # fewer common pixels say nothing
_LEAST_VARIANCE = 0.1  # of the whole layer's: where it has less, hardly anything is to be explained


@dataclass(frozen=True)
class Shift:
    """Where a layer's content lies, seen from where another layer has it.

    Attributes:
        row_px, col_px: downwards and to the right, pixels; NaN where unknown.
        confidence: peak to sidelobe ratio, 0 where there was nothing to compare.
    """

    row_px: float
    col_px: float
    confidence: float

    @property
    def is_known(self) -> bool:
        return self.row_px == self.row_px

    @property
    def length_px(self) -> float:
        return float(np.hypot(self.row_px, self.col_px))


@dataclass(frozen=True)
class Features:
    """What is compared of a layer: [H, K, W] with means near 0, and where it can be trusted."""

    values: F32
    valid: NDArray[np.bool_]

    @property
    def reach_px(self) -> int:
        """How far a displacement may be for these to be compared."""
        return int(min(REACH_PX, min(self.valid.shape) // 8))

    @cached_property
    def template(self) -> NDArray[np.bool_]:
        """What is trusted and lies inside wherever another image is displaced to.

        But for one pixel at the farthest displacements; what the transform brings in there from the
        other side is a border that is never trusted.
        """
        inside = np.zeros_like(self.valid)
        border = max(0, self.reach_px - 1)
        within = slice(border, -border or None)
        inside[within, within] = self.valid[within, within]
        return inside

    @cached_property
    def can_be_found(self) -> bool:
        """Whether there is anything to be compared."""
        pixels = min(np.count_nonzero(self.template), np.count_nonzero(self.valid))
        return self.values.shape[1] > 0 and bool(pixels >= _LEAST_TEMPLATE_PX)

    @cached_property
    def as_reference(self) -> _Side:
        return _Side(self.values, self.template)

    @cached_property
    def as_other(self) -> _Side:
        return _Side(self.values, self.valid)


def features(layer: Layer, modality: Modality, gsd_m: float) -> Features:
    """The structure of a layer, without the contrast of its sensor."""
    values, valid = layer.values, layer.valid
    within = _Within(valid)
    known = _eroded(valid, _BORDER_PX)
    nothing = Features(np.zeros((len(valid), 0, valid.shape[1]), np.float32), known)
    if min(np.count_nonzero(nothing.template), np.count_nonzero(known)) < _LEAST_TEMPLATE_PX:
        return nothing  # nothing could be found
    if modality.is_categorical:
        bands = _frequent_classes(values[0], valid)
    else:
        bands = np.ascontiguousarray(np.moveaxis(values, 0, 1), np.float32)
        bands = within.only(bands)
        if modality.splits_relief:
            # Light and water follow slopes, not heights.
            slopes = _gradient(within.blurred(bands, _SMOOTH_PX))
            bands = np.arctan(np.concatenate(slopes, axis=1) / np.float32(gsd_m))
        else:
            scale = np.float32(10)
            bands = np.asarray(modality.transform.forward(bands, np.float32(0), scale, xp=np))
    bands = within.blurred(bands, _SMOOTH_PX)
    detail = within.only(bands - within.blurred(bands, _TREND_PX))
    spread = np.sqrt(np.einsum("hkw,hkw->k", detail, detail) / np.float32(np.count_nonzero(valid)))
    alive = spread > 1e-6
    if not alive.any():
        return nothing
    detail = detail[:, alive] / spread[alive, None]
    return Features(np.concatenate([detail, _structure(detail, within)], axis=1), known)


def find_shift(reference: Features, other: Features) -> Shift:
    """The displacement of `other` against `reference`, or an unknown one."""
    reach = reference.reach_px
    if not (reference.can_be_found and other.can_be_found):
        return Shift(np.nan, np.nan, 0.0)
    scores = _Scores(reference.as_reference, other.as_other)
    coarse = scores.at(tuple(range(-reach, reach + 1)), tuple(range(-reach, reach + 1)))
    row, col = (int(i) for i in np.unravel_index(coarse.argmax(), coarse.shape))
    elsewhere = np.ones_like(coarse, np.bool_)
    elsewhere[max(0, row - 2) : row + 3, max(0, col - 2) : col + 3] = False
    low = coarse[elsewhere]
    confidence = float((coarse[row, col] - low.mean()) / max(low.std(), 1e-6))
    unknown = Shift(np.nan, np.nan, confidence)
    if confidence < LEAST_CONFIDENCE or max(abs(row - reach), abs(col - reach)) > reach - 2:
        return unknown
    rows, cols = (tuple(i - reach + k / 4 for k in range(-4, 5)) for i in (row, col))
    fine = scores.at(rows, cols)
    top, left = (int(i) for i in np.unravel_index(fine.argmax(), fine.shape))
    if not (0 < top < 8 and 0 < left < 8):
        return unknown
    offset = _summit(fine[top - 1 : top + 2, left - 1 : left + 2])
    if offset is None:
        return unknown
    return Shift(rows[top] + offset[0] / 4, cols[left] + offset[1] / 4, confidence)


class _Side:
    """One of two layers that are compared.

    Attributes:
        shape: rows and columns.
        decorrelate: [K, K], makes features that do not vary together, each of variance 1.
        spectra: [frequencies of rows, 2 + K, of columns] of the mask, of the mean square of the
            decorrelated features, and of the features, which are 0 outside the mask.
    """

    def __init__(self, values: F32, mask: NDArray[np.bool_]) -> None:
        height, channels, width = values.shape
        self.shape = height, width
        planes = np.empty((2 + channels, height, width), np.float32)
        planes[0] = mask
        known = planes[2:]
        np.multiply(np.moveaxis(values, 1, 0), planes[0], out=known)
        count = np.float32(np.count_nonzero(mask))
        known -= (known.sum(axis=(1, 2)) / count)[:, None, None] * planes[0]
        flat = known.reshape(channels, -1)
        covariance = (flat @ flat.T).astype(np.float64) / float(count)
        # A hundredth of the variance as a ridge: bands of a sensor are nearly copies of each other.
        every = range(channels)
        covariance[every, every] += 0.01 * covariance.diagonal() + 1e-9
        self.decorrelate: F32 = np.linalg.inv(np.linalg.cholesky(covariance)).astype(np.float32)
        apart = self.decorrelate @ flat
        apart *= apart
        planes[1] = (apart.sum(axis=0) / channels).reshape(self.shape)
        self.spectra = _spectra(planes)


class _Scores:
    """How much two layers explain of one another at any displacement of the second."""

    def __init__(self, reference: _Side, other: _Side) -> None:
        self._x, self._y = reference, other
        fx, fy = reference.spectra.conj(), other.spectra
        rows, p, q, cols = len(fx), fx.shape[1] - 2, fy.shape[1] - 2, fx.shape[2]
        # Of what is summed over common pixels: their number, the variance there, and the products.
        self._products = np.empty((rows, 2 + p * q, cols), np.complex64)
        np.multiply(fx[:, :1], fy[:, :2], out=self._products[:, :2])
        products = self._products[:, 2:].reshape(rows, p, q, cols)
        np.multiply(fx[:, 2:, None], fy[:, None, 2:], out=products)

    def at(self, rows: tuple[float, ...], cols: tuple[float, ...]) -> NDArray[np.float64]:
        """Mean squared canonical correlation at each displacement, [rows, cols], 0 to 1."""
        height, width = self._x.shape
        down = _phases_of_rows(height, rows)
        along = _phases_of_columns(width, cols)
        half = down @ self._products.reshape(len(self._products), -1)
        sums = half.reshape(-1, self._products.shape[2]).view(np.float32) @ along
        sums = sums.reshape(len(rows), -1, len(cols)) / np.float32(height * width)
        count = np.maximum(sums[:, 0], 1)
        variance = np.maximum(sums[:, 1] / count, _LEAST_VARIANCE)
        p, q = len(self._x.decorrelate), len(self._y.decorrelate)
        cross = self._x.decorrelate @ sums[:, 2:].reshape(len(rows), p, -1)
        cross = self._y.decorrelate @ cross.reshape(len(rows) * p, q, -1)
        cross *= cross
        explained = cross.reshape(len(rows), p * q, -1).sum(axis=1)
        share = explained / (count * count * variance * min(p, q))
        return np.where(count >= _LEAST_TEMPLATE_PX / 2, share, 0).astype(np.float64)


def _spectra(planes: F32) -> NDArray[np.complex64]:
    """Of [K, H, W]: [frequencies of rows, K, of columns], up to `_FINEST`."""
    number, height, width = planes.shape
    along = planes.reshape(-1, width) @ _waves_of_columns(width)
    down = _waves_of_rows(height) @ along.view(np.complex64).reshape(number, height, -1)
    return np.ascontiguousarray(np.moveaxis(down, 0, 1))


def _frequencies(side: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Those of rows, in both directions, and those of columns, cycles a pixel."""
    both, half = np.fft.fftfreq(side), np.fft.rfftfreq(side)
    return both[abs(both) <= _FINEST], half[half <= _FINEST]


@lru_cache(maxsize=16)
def _waves_of_rows(height: int) -> NDArray[np.complex64]:
    rows, _ = _frequencies(height)
    waves = np.exp(-2j * np.pi * np.outer(rows, np.arange(height)))
    return np.asarray(waves, np.complex64)


@lru_cache(maxsize=16)
def _waves_of_columns(width: int) -> F32:
    """[W, 2 F]: real and imaginary parts side by side, as a complex number lies in memory."""
    _, cols = _frequencies(width)
    waves = np.exp(-2j * np.pi * np.outer(np.arange(width), cols))
    return np.asarray(waves, np.complex64).view(np.float32)


@lru_cache(maxsize=1024)
def _phases_of_rows(height: int, at: tuple[float, ...]) -> NDArray[np.complex64]:
    rows, _ = _frequencies(height)
    return np.asarray(np.exp(2j * np.pi * np.outer(at, rows)), np.complex64)


@lru_cache(maxsize=1024)
def _phases_of_columns(width: int, at: tuple[float, ...]) -> F32:
    """[2 F, n]: what makes the real part of real and imaginary parts that lie side by side."""
    _, cols = _frequencies(width)
    phases = np.exp(-2j * np.pi * np.outer(cols, at))
    phases[cols > 0] *= 2  # the half of the spectrum that is left out of real numbers
    return np.stack([phases.real, phases.imag], axis=1).reshape(-1, len(at)).astype(np.float32)


def _summit(scores: NDArray[np.float64]) -> tuple[float, float] | None:
    """Where the paraboloid through 3 x 3 scores is highest, in steps from the middle."""
    r, c, rr, rc, cc = (_paraboloid() @ scores.ravel()).tolist()
    determinant = 4 * rr * cc - rc * rc
    if rr >= 0 or determinant <= 0:
        return None
    down, right = (rc * c - 2 * cc * r) / determinant, (rc * r - 2 * rr * c) / determinant
    return min(max(down, -1.0), 1.0), min(max(right, -1.0), 1.0)


@lru_cache(maxsize=1)
def _paraboloid() -> NDArray[np.float64]:
    """[5, 9]: from 3 x 3 values to the least-squares coefficients of r, c, rr, rc and cc."""
    row, col = np.mgrid[-1:2, -1:2].reshape(2, -1).astype(np.float64)
    design = np.stack([np.ones(9), row, col, row * row, row * col, col * col], axis=1)
    return np.linalg.pinv(design)[1:]


def _frequent_classes(codes: NDArray[Any], valid: NDArray[np.bool_]) -> F32:
    """Where the most frequent classes are, 0 or 1, [H, K, W]."""
    counts = np.bincount(codes[valid])
    frequent = np.argsort(-counts, kind="stable")[:_CLASSES]
    frequent = frequent[counts[frequent] > 0]
    if len(frequent) > 1 and counts[frequent].sum() == counts.sum():
        frequent = frequent[:-1]  # it is where the others are not
    return np.asarray(codes[:, None] == frequent[:, None], np.float32)


def _structure(bands: F32, within: _Within) -> F32:
    """Edges and their direction, whatever their sign: three channels [H, 3, W]."""
    down, right = _gradient(bands)
    turned = 2 * (down * right).mean(axis=1)
    down *= down
    right *= right
    strength, difference = (down + right).mean(axis=1), (down - right).mean(axis=1)
    # Divided by its own size, so that one bright edge does not outweigh all others.
    size = np.sqrt(strength)
    typical = np.median(size if within.is_all else size[within.valid])
    tensor = np.stack([difference, turned, strength], axis=1)
    tensor /= (size + typical + np.float32(1e-6))[:, None]
    tensor = within.blurred(tensor, _SMOOTH_PX)
    tensor -= within.blurred(tensor, _TREND_PX)
    return tensor


def _gradient(bands: F32) -> tuple[F32, F32]:
    """Central differences downwards and to the right; 0 at the border."""
    down, right = np.zeros_like(bands), np.zeros_like(bands)
    np.subtract(bands[2:], bands[:-2], out=down[1:-1])
    np.subtract(bands[:, :, 2:], bands[:, :, :-2], out=right[:, :, 1:-1])
    down /= 2
    right /= 2
    return down, right


class _Within:
    """Means over the valid pixels alone; `bands` are [H, K, W]."""

    def __init__(self, valid: NDArray[np.bool_]) -> None:
        self.valid, self.is_all = valid, bool(valid.all())
        self._known = valid[:, None].astype(np.float32)

    def only(self, bands: F32) -> F32:
        """With 0 where nothing is known."""
        return bands if self.is_all else np.where(self.valid[:, None], bands, np.float32(0))

    def blurred(self, bands: F32, sigma_px: float) -> F32:
        """Gaussian mean around each pixel (Knutsson's normalised convolution)."""
        if self.is_all:
            return _filtered(bands, sigma_px)
        weight = np.maximum(_filtered(self._known, sigma_px), np.float32(1e-6))
        return np.asarray(_filtered(self.only(bands), sigma_px) / weight)


def _filtered(bands: F32, sigma_px: float) -> F32:
    height, channels, width = bands.shape
    for factor in _bell(height, sigma_px):
        bands = factor @ bands.reshape(factor.shape[1], -1)
    bands = bands.reshape(-1, width)
    for factor in _bell(width, sigma_px):
        bands = bands @ factor.T
    return bands.reshape(height, channels, width)


@lru_cache(maxsize=16)
def _bell(side: int, sigma_px: float) -> tuple[F32, ...]:
    """Gaussian weights [side, side] whose rows add up to 1, as factors that are applied in turn.

    A wide one has few degrees of freedom, so that two thin factors take less work than itself.
    """
    at = np.arange(side)
    weights = np.exp(-0.5 * ((at[:, None] - at) / sigma_px) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    left, size, right = np.linalg.svd(weights)
    rank = int(np.count_nonzero(size > 1e-3 * size[0]))
    if 2 * rank >= side:
        return (weights.astype(np.float32),)
    return right[:rank].astype(np.float32), (left[:, :rank] * size[:rank]).astype(np.float32)


def _eroded(valid: NDArray[np.bool_], by_px: int) -> NDArray[np.bool_]:
    """Valid pixels that are farther than this from an invalid one and from the border."""
    out = np.zeros_like(valid)
    inside = slice(by_px, -by_px)
    if valid.all():
        out[inside, inside] = True
        return out
    rows, cols = (side - 2 * by_px for side in valid.shape)
    steps = range(2 * by_px + 1)
    down = np.logical_and.reduce([valid[i : i + max(0, rows)] for i in steps])
    out[inside, inside] = np.logical_and.reduce([down[:, i : i + max(0, cols)] for i in steps])
    return out
