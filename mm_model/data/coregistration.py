"""How far the layers of a patch lie from one another, measured across modalities.

Grids say that layers are co-registered; this looks. Layers of different sensors share structure,
not contrast, so each becomes features that keep their place: its bands without slow trends (one per
frequent class of a map; slopes for elevation), and its structure tensor, which knows an edge
whichever side is brighter. Of every displacement within reach the score is the share of variance
that two sets of features explain of one another (the mean squared canonical correlation, which for
normal variables orders displacements as mutual information does). All second moments over the
pixels valid in both come from the Fourier transform, so a displacement between pixels costs what
one of whole pixels costs: the peak is searched on whole pixels, then on quarters, and a paraboloid
is fitted to it.

The confidence is the peak's height above the scores elsewhere, in their standard deviations (peak
to sidelobe ratio); a patch without common structure has no such peak and its shift is unknown.

What is found is where things seem to be. Layers of the synthetic Earth, rendered on one grid, are
measured to lie up to 0.9 px apart (95th percentile; 0.2 px in the median). Shadows and the geometry
of radar may be why; a grid that is wrong by as much cannot be told from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

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
_CLASSES = 4  # of a map: the most frequent ones, of which each further one adds little
_BORDER_PX = 2  # where derivatives know one side only
_LEAST_TEMPLATE_PX = 256  # fewer common pixels say nothing


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
    """What is compared of a layer: [K, H, W] with means near 0, and where it can be trusted."""

    values: F32
    valid: NDArray[np.bool_]

    @property
    def reach_px(self) -> int:
        """How far a displacement may be for these to be compared."""
        return int(min(REACH_PX, min(self.valid.shape) // 8))

    @cached_property
    def template(self) -> NDArray[np.bool_]:
        """What is trusted and stays inside wherever another image is displaced to."""
        inside = np.zeros_like(self.valid)
        within = slice(self.reach_px, -self.reach_px or None)
        inside[within, within] = self.valid[within, within]
        return inside

    @cached_property
    def template_spectra(self) -> NDArray[np.complex64]:
        """Conjugated, as every comparison with these as reference wants them."""
        return np.conj(_spectra(self.values, self.template))


def features(layer: Layer, modality: Modality, gsd_m: float) -> Features:
    """The structure of a layer, without the contrast of its sensor."""
    values, valid = layer.values, layer.valid
    known = _eroded(valid, _BORDER_PX)
    nothing = Features(np.zeros((0, *valid.shape), np.float32), known)
    if min(nothing.template.sum(), known.sum()) < _LEAST_TEMPLATE_PX:
        return nothing  # nothing could be found
    if modality.is_categorical:
        codes, counts = np.unique(values[0][valid], return_counts=True)
        frequent = codes[np.argsort(-counts, kind="stable")][:_CLASSES]
        bands = (values == frequent[:, None, None]).astype(np.float32)
    else:
        filled = np.where(valid, values, 0).astype(np.float32)
        center = np.float32(np.median(filled[:, valid])) if valid.any() else np.float32(0)
        bands = np.asarray(modality.transform.forward(filled, center, np.float32(10), xp=np))
        if modality.splits_relief:
            # Light and water follow slopes, not heights.
            slopes = _gradient(_blurred(filled, valid, _SMOOTH_PX))
            bands = np.arctan(np.concatenate(slopes) / np.float32(gsd_m))
    bands = _blurred(bands, valid, _SMOOTH_PX)
    detail = bands - _blurred(bands, valid, _TREND_PX)
    spread = detail[:, valid].std(axis=1) if valid.any() else np.zeros(len(detail))
    alive = spread > 1e-6
    detail, spread = detail[alive], spread[alive, None, None]
    if not len(detail):
        return nothing
    detail = detail / spread
    tensor = _structure(detail, valid)
    return Features(np.concatenate([detail, tensor]).astype(np.float32), known)


def find_shift(reference: Features, other: Features) -> Shift:
    """The displacement of `other` against `reference`, or an unknown one."""
    reach = reference.reach_px
    if (
        not len(reference.values)
        or not len(other.values)
        or min(reference.template.sum(), other.valid.sum()) < _LEAST_TEMPLATE_PX
    ):
        return Shift(np.nan, np.nan, 0.0)
    moments = _Moments(reference, other)
    whole = np.arange(-reach, reach + 1, dtype=np.float64)
    coarse = moments.score(whole, whole)
    row, col = (int(i) for i in np.unravel_index(coarse.argmax(), coarse.shape))
    elsewhere = np.ones_like(coarse, np.bool_)
    elsewhere[max(0, row - 2) : row + 3, max(0, col - 2) : col + 3] = False
    noise = float(coarse[elsewhere].std())
    confidence = float((coarse[row, col] - coarse[elsewhere].mean()) / max(noise, 1e-6))
    unknown = Shift(np.nan, np.nan, confidence)
    if confidence < LEAST_CONFIDENCE or max(abs(row - reach), abs(col - reach)) > reach - 2:
        return unknown
    quarters = np.arange(-4, 5) / 4
    rows, cols = whole[row] + quarters, whole[col] + quarters
    fine = moments.score(rows, cols)
    top, left = (int(i) for i in np.unravel_index(fine.argmax(), fine.shape))
    if not (0 < top < 8 and 0 < left < 8):
        return unknown
    offset = _summit(fine[top - 1 : top + 2, left - 1 : left + 2])
    if offset is None:
        return unknown
    return Shift(float(rows[top]) + offset[0] / 4, float(cols[left]) + offset[1] / 4, confidence)


class _Moments:
    """Second moments of two sets of features at any displacement of the second.

    Sums over the pixels valid in both, as products in the frequency domain.
    """

    def __init__(self, reference: Features, other: Features) -> None:
        self._shape = reference.valid.shape
        self._p, self._q = len(reference.values), len(other.values)
        fx, fy = reference.template_spectra, _spectra(other.values, other.valid)
        p, q = self._p, self._q
        both = fx[1 : p + 1, None] * fy[None, 1 : q + 1]
        self._products = np.concatenate(
            [fx * fy[:1], fx[:1] * fy[1:], both.reshape(p * q, *fx.shape[1:])]
        )

    def score(self, rows: NDArray[np.float64], cols: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean squared canonical correlation at each displacement, [rows, cols], 0 to 1."""
        height, width = self._shape
        down = np.exp(2j * np.pi * np.outer(rows, np.fft.fftfreq(height)))
        along = np.exp(2j * np.pi * np.outer(np.fft.rfftfreq(width), cols))
        along[1 : (width + 1) // 2] *= 2  # the half of the spectrum that rfft leaves out
        sums = down.astype(np.complex64) @ self._products @ along.astype(np.complex64)
        sums = sums.real.reshape(len(self._products), -1).T.astype(np.float64) / (height * width)
        p, q = self._p, self._q
        pairs_x, pairs_y = np.triu_indices(p), np.triu_indices(q)
        parts = np.cumsum([1, p, len(pairs_x[0]), q, len(pairs_y[0])])
        count, mean_x, square_x, mean_y, square_y, cross = np.split(sums, parts, axis=1)
        count = np.maximum(count, 1)
        mean_x, mean_y = mean_x / count, mean_y / count
        xx = _covariance(square_x / count, mean_x, pairs_x)
        yy = _covariance(square_y / count, mean_y, pairs_y)
        xy = (cross / count).reshape(-1, p, q) - mean_x[:, :, None] * mean_y[:, None]
        explained = np.linalg.solve(xx, xy) @ np.linalg.solve(yy, xy.transpose(0, 2, 1))
        share: NDArray[np.float64] = np.trace(explained, axis1=1, axis2=2) / min(p, q)
        return np.where(count[:, 0] >= _LEAST_TEMPLATE_PX / 2, share, 0).reshape(
            len(rows), len(cols)
        )


def _spectra(values: F32, valid: NDArray[np.bool_]) -> NDArray[np.complex64]:
    """Of the mask, the values and their products, in this order."""
    known = np.where(valid, values, np.float32(0))
    first, second = np.triu_indices(len(values))
    stack = np.concatenate([valid[None].astype(np.float32), known, known[first] * known[second]])
    return np.fft.rfft2(stack).astype(np.complex64)


def _covariance(
    squares: NDArray[np.float64],
    means: NDArray[np.float64],
    pairs: tuple[NDArray[np.intp], NDArray[np.intp]],
) -> NDArray[np.float64]:
    first, second = pairs
    size = means.shape[1]
    out = np.zeros((len(means), size, size))
    out[:, first, second] = squares - means[:, first] * means[:, second]
    out[:, second, first] = out[:, first, second]
    # A hundredth of the variance as a ridge: bands of a sensor are nearly copies of one another.
    variance = np.trace(out, axis1=1, axis2=2) / size
    out[:, range(size), range(size)] += 0.01 * np.maximum(variance, 0)[:, None] + 1e-9
    return out


def _summit(scores: NDArray[np.float64]) -> tuple[float, float] | None:
    """Where the paraboloid through 3 x 3 scores is highest, in steps from the middle."""
    row, col = np.mgrid[-1:2, -1:2].reshape(2, -1).astype(np.float64)
    design = np.stack([np.ones(9), row, col, row * row, row * col, col * col], axis=1)
    _, r, c, rr, rc, cc = np.linalg.lstsq(design, scores.ravel(), rcond=None)[0].tolist()
    bend = np.array([[2 * rr, rc], [rc, 2 * cc]])
    if np.linalg.eigvalsh(bend).max() >= 0:
        return None
    down, right = np.clip(-np.linalg.solve(bend, [r, c]), -1, 1).tolist()
    return down, right


def _structure(bands: F32, valid: NDArray[np.bool_]) -> F32:
    """Edges and their direction, whatever their sign: three channels [3, H, W]."""
    down, right = _gradient(bands)
    strength = (down**2 + right**2).mean(axis=0)
    tensor = np.stack(
        [(down**2 - right**2).mean(axis=0), 2 * (down * right).mean(axis=0), strength]
    )
    # Divided by its own size, so that one bright edge does not outweigh all others.
    size = np.sqrt(strength)
    tensor = tensor / (size + np.median(size[valid]) + np.float32(1e-6))
    tensor = _blurred(tensor, valid, _SMOOTH_PX)
    tensor = tensor - _blurred(tensor, valid, _TREND_PX)
    spread = tensor[:, valid].std(axis=1)[:, None, None]
    return np.asarray(tensor / np.maximum(spread, np.float32(1e-6)), np.float32)


def _gradient(bands: F32) -> tuple[F32, F32]:
    """Central differences downwards and to the right; 0 at the border."""
    down, right = np.zeros_like(bands), np.zeros_like(bands)
    down[:, 1:-1] = (bands[:, 2:] - bands[:, :-2]) / 2
    right[:, :, 1:-1] = (bands[:, :, 2:] - bands[:, :, :-2]) / 2
    return down, right


def _blurred(bands: F32, valid: NDArray[np.bool_], sigma_px: float) -> F32:
    """Gaussian mean over the valid pixels around each (Knutsson's normalised convolution)."""
    rows, cols = (_bell(side, sigma_px) for side in valid.shape)
    if valid.all():
        known, weight = bands, _weight_of_all(valid.shape, sigma_px)
    else:
        known, weight = np.where(valid, bands, np.float32(0)), _weight(valid, sigma_px)
    return np.asarray((rows @ known @ cols) / weight, np.float32)


def _weight(valid: NDArray[np.bool_], sigma_px: float) -> F32:
    rows, cols = (_bell(side, sigma_px) for side in valid.shape)
    weight = rows @ valid.astype(np.float32) @ cols
    return np.asarray(np.maximum(weight, np.float32(1e-6)), np.float32)


@lru_cache(maxsize=16)
def _weight_of_all(shape: tuple[int, int], sigma_px: float) -> F32:
    return _weight(np.ones(shape, np.bool_), sigma_px)


@lru_cache(maxsize=16)
def _bell(side: int, sigma_px: float) -> F32:
    at = np.arange(side)
    return np.exp(-0.5 * ((at[:, None] - at) / sigma_px) ** 2).astype(np.float32)


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
