"""How near generated layers come to real ones: pure, mask-aware, in physical units.

Everywhere `predicted` and `truth` are [bands, H, W] and `valid` is bool [H, W]; what an invalid
pixel holds changes nothing. A figure of no pixel is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.modalities import Modality

Values = NDArray[Any]
Mask = NDArray[np.bool_]

# Wang et al. 2004: a Gaussian window of 11 pixels, standard deviation 1.5, and the two constants.
_WINDOW = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
_WINDOW /= _WINDOW.sum()
_K1, _K2 = 0.01, 0.03


def peak(modality: Modality) -> float:
    """The signal's span for PSNR and SSIM: that of the modality's display range.

    The valid range would flatter (no scene spans -500 to 9,000 m), and a range that is measured
    from the data would make figures of two data sets incomparable.
    """
    low, high = modality.display_range
    return high - low


def psnr_db(mean_squared_error: float, span: float) -> float:
    """Peak signal-to-noise ratio; infinite without error."""
    if mean_squared_error == 0:
        return math.inf
    return 10 * math.log10(span * span / mean_squared_error)


def errors(predicted: Values, truth: Values, valid: Mask) -> tuple[float, float, int]:
    """Sums of squared and of absolute errors over the valid pixels of all bands; their number."""
    difference = predicted[:, valid].astype(np.float64) - truth[:, valid]
    return float(np.square(difference).sum()), float(np.abs(difference).sum()), difference.size


def ssim(predicted: Values, truth: Values, valid: Mask, span: float) -> float:
    """Structural similarity, mean over valid pixels and bands.

    Each window's moments are taken over its valid pixels alone (weights renormalised), so that
    neither a gap nor the image's edge is compared with anything.
    """
    if not valid.any():
        return math.nan
    x, y = (np.where(valid, v, 0).astype(np.float64) for v in (predicted, truth))
    weight = np.where(valid, _blur(valid.astype(np.float64)), 1)
    mean_x, mean_y = _blur(x) / weight, _blur(y) / weight
    var_x = np.maximum(_blur(x * x) / weight - mean_x**2, 0)
    var_y = np.maximum(_blur(y * y) / weight - mean_y**2, 0)
    covariance = _blur(x * y) / weight - mean_x * mean_y
    c1, c2 = (_K1 * span) ** 2, (_K2 * span) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return float(similarity[:, valid].mean())


def spectral_angles_deg(predicted: Values, truth: Values, valid: Mask) -> NDArray[np.float64]:
    """Angle between the spectra of each valid pixel; a black pixel is at 90° to any other."""
    p, t = predicted[:, valid].astype(np.float64), truth[:, valid].astype(np.float64)
    norms = np.linalg.norm(p, axis=0) * np.linalg.norm(t, axis=0)
    both_black = ~(p.any(axis=0) | t.any(axis=0))
    cosine = np.divide((p * t).sum(axis=0), norms, out=np.zeros_like(norms), where=norms > 0)
    angles: NDArray[np.float64] = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return np.where(both_black, 0.0, angles)


def confusion(
    predicted: NDArray[np.generic],
    truth: NDArray[np.generic],
    valid: Mask,
    codes: Sequence[int],
) -> NDArray[np.int64]:
    """Pixel counts [true class, predicted class] of two [H, W] arrays of class codes."""
    order = np.zeros(256, np.int64)
    order[list(codes)] = np.arange(len(codes))
    pairs = (
        order[truth[valid].astype(np.int64)] * len(codes) + order[predicted[valid].astype(np.int64)]
    )
    return np.bincount(pairs, minlength=len(codes) ** 2).reshape(len(codes), len(codes))


def mean_iou(counts: NDArray[np.int64]) -> float:
    """Intersection over union, mean over the classes that occur in truth."""
    occurs = counts.sum(axis=1) > 0
    hits = np.diag(counts)
    unions = counts.sum(axis=0) + counts.sum(axis=1) - hits
    return float((hits[occurs] / unions[occurs]).mean()) if occurs.any() else math.nan


def accuracy(counts: NDArray[np.int64]) -> float:
    """Share of pixels whose class is right."""
    total = counts.sum()
    return float(np.trace(counts) / total) if total else math.nan


def spread(samples: Values, valid: Mask) -> float:
    """How far samples [S, bands, H, W] of one scene differ: standard deviation over the samples
    (of the population they are drawn from), mean over valid pixels and bands. NaN below two.
    """
    if len(samples) < 2 or not valid.any():
        return math.nan
    return float(samples[:, :, valid].astype(np.float64).std(axis=0, ddof=1).mean())


def disagreement(samples: NDArray[np.generic], valid: Mask) -> float:
    """Share of valid pixels at which two of the samples [S, H, W] of class codes differ, mean over
    all pairs. NaN below two samples.
    """
    codes = samples[:, valid]
    pairs = [(i, j) for i in range(len(codes)) for j in range(i)]
    if not pairs or not valid.any():
        return math.nan
    return float(np.mean([(codes[i] != codes[j]).mean() for i, j in pairs]))


def _blur(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian window sums over [..., H, W]; outside the image lies zero."""
    for axis in (-2, -1):
        reach = len(_WINDOW) // 2
        padding = [(0, 0)] * image.ndim
        padding[axis] = (reach, reach)
        padded = np.pad(image, padding)
        size = image.shape[axis]
        image = sum(
            (w * np.take(padded, range(k, k + size), axis=axis) for k, w in enumerate(_WINDOW)),
            start=np.zeros_like(image),
        )
    return image
