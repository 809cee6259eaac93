"""Whether generated images are distributed as real ones are: pure functions on two sets.

Features are [N, D], a row an image, from any encoder; images are [N, bands, H, W] in physical units
with masks, true where a pixel is known: what an invalid pixel holds changes nothing, and a figure
of no pixel is NaN. Every figure is biased by N to some degree, so read it beside its floor, the
same figure of real against real (`split_half`) at the same N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm_model.errors import DataError

Features = NDArray[Any]
Values = NDArray[Any]
Mask = NDArray[np.bool_]
Reals = NDArray[np.float64]

# Squared distances come from a Gram matrix: what is below this share of the squared norms is
# rounding, and the rows are the same. Features of single precision differ by as little (1e-6²).
_SAME = 1e-12
_TIE = 1e-9  # relative difference below which two distances or similarities are equal
_BLOCK = 2**24  # distances held at once (128 MB)
_QUANTILES = 2**16  # of the pixels of one band: enough for errors of 1/65,536 of the values' span


# --- features --------------------------------------------------------------------------------


def split_half(features: Features, seed: int) -> tuple[Features, Features]:
    """Two disjoint random halves of equal size, for a floor; an odd row is left out."""
    order = np.random.default_rng(seed).permutation(len(features))
    half = len(order) // 2
    return features[order[:half]], features[order[half : 2 * half]]


def frechet_distance(real: Features, generated: Features) -> float:
    """Fréchet distance of the Gaussians fitted to both sets (Heusel et al. 2017, eq. 6), squared:
    |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½), in squared feature units. Biased upwards at small N.
    """
    real, generated = _checked(real), _checked(generated)
    _same_width(real, generated)
    (mean_r, root_r), (mean_g, root_g) = _gaussian(real), _gaussian(generated)
    # Σ = RᵀR, so that the eigenvalues of Σ₁Σ₂ are the squared singular values of R₁R₂ᵀ: no square
    # root of a matrix that is singular (N < D) or, by rounding, no longer positive.
    overlap = np.linalg.svd(root_r @ root_g.T, compute_uv=False).sum()
    spreads = np.square(root_r).sum() + np.square(root_g).sum() - 2 * overlap
    return float(np.square(mean_r - mean_g).sum() + max(spreads, 0.0))


def kernel_distance(
    real: Features,
    generated: Features,
    *,
    seed: int,
    subsets: int = 100,
    subset_rows: int = 1000,
) -> float:
    """Kernel distance KID (Bińkowski et al. 2018): unbiased squared maximum mean discrepancy under
    k(x, y) = (xᵀy/D + 1)³, mean over random subsets of both sets. About 0, and as often negative as
    positive, for equal distributions. Sets that are no larger than a subset are taken whole.
    """
    real, generated = _checked(real), _checked(generated)
    _same_width(real, generated)
    if max(len(real), len(generated)) <= subset_rows:
        return _cubic_mmd(real, generated)
    rng = np.random.default_rng(seed)
    found = [
        _cubic_mmd(*(rng.permutation(s)[: min(subset_rows, len(s))] for s in (real, generated)))
        for _ in range(subsets)
    ]
    return float(np.mean(found))


def one_nn_accuracy(real: Features, generated: Features) -> float:
    """How often a row's nearest neighbour among all others is of its own set (Lopez-Paz & Oquab
    2017): 0.5 if the sets cannot be told apart, 1 if they are apart, below 0.5 if rows copy rows of
    the other set. Of neighbours that are equally near, each counts for its share.

    Raises:
        DataError: the sets differ in size, which moves the 0.5.
    """
    if len(real) != len(generated):
        raise DataError(
            "two-sample accuracy needs sets of equal size",
            got=f"{len(real)} real and {len(generated)} generated rows",
            remedy="draw as many rows of the larger set as the smaller has",
        )
    real, generated = _centred(real, generated)
    rows = np.concatenate([real, generated])
    is_real = np.arange(len(rows)) < len(real)
    hits = 0.0
    for block, squared in _squared_distances(rows, rows, but_itself=True):
        nearest = squared <= squared.min(axis=1, keepdims=True) * (1 + _TIE)
        own = nearest & (is_real[block, None] == is_real)
        hits += float((own.sum(axis=1) / nearest.sum(axis=1)).sum())
    return hits / len(rows)


def precision_recall(real: Features, generated: Features, k: int = 5) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2), each in [0, 1].

    A set's manifold is the union of balls about its rows, each as far as the k-th nearest other row
    of that set. Precision is the share of generated rows on the real manifold (quality), recall the
    share of real rows on the generated one (variety). Both grow with k and fall with N.
    """
    real, generated = _centred(real, generated, least=k + 1)
    return _share_on_manifold(generated, real, k), _share_on_manifold(real, generated, k)


def mean_pairwise_distance(features: Features) -> float:
    """Euclidean distance of two rows, mean over all pairs: 0 if all rows are the same."""
    rows = _checked(features)
    rows = rows - rows.mean(axis=0)
    total = sum(float(np.sqrt(squared).sum()) for _, squared in _squared_distances(rows, rows))
    return total / (len(rows) * (len(rows) - 1))


def retrieval_top1(a: Features, b: Features) -> float:
    """Share of the rows of `a` whose nearest row of `b` is that of the same place.

    Row i of both is place i. Nearest is by cosine similarity after each side is centred on its own
    mean, so that a constant offset between the sources does not matter. Of rows that are equally
    near each counts for its share: a side that says nothing gets 1/N, chance.
    """
    a, b = _checked(a), _checked(b)
    _same_width(a, b)
    if len(a) != len(b):
        raise DataError(
            "retrieval needs the same places on both sides", got=f"{len(a)} and {len(b)} rows"
        )
    a, b = (_directions(s - s.mean(axis=0)) for s in (a, b))
    hits = 0.0
    for block in _row_blocks(len(a), len(b)):
        similarity = a[block] @ b.T
        nearest = similarity >= similarity.max(axis=1, keepdims=True) - _TIE
        own = nearest[np.arange(len(nearest)), np.arange(len(a))[block]]
        hits += float((own / nearest.sum(axis=1)).sum())
    return hits / len(a)


# --- pixels ----------------------------------------------------------------------------------


def band_wasserstein(
    real: Values, generated: Values, *, real_valid: Mask, generated_valid: Mask
) -> Reals:
    """Wasserstein-1 distance of each band's pixel values, [bands], in physical units.

    Images are [N, bands, H, W] with masks [N, H, W]; both sets may differ in N, H and W. It is
    ∫₀¹ |F⁻¹(u) - G⁻¹(u)| du over the quantile functions: where pixels are does not matter.
    """
    return np.array(
        [
            _wasserstein(real[:, band][real_valid], generated[:, band][generated_valid])
            for band in range(real.shape[1])
        ]
    )


class Spectrum(NamedTuple):
    """Power by spatial frequency.

    Attributes:
        frequency: [F], cycles a pixel, above 0 and up to 0.5.
        log10_power: [bands, F], of squared physical units.
    """

    frequency: Reals
    log10_power: Reals


def power_spectrum(images: Values, valid: Mask | None = None, *, floor: float = 1e-12) -> Spectrum:
    """Mean power of images [N, bands, H, W] over all directions of a spatial frequency.

    Under a Hann window, without each image's mean, and scaled so that white noise of variance σ²
    has power σ² at every frequency (Welch 1967). Rings are 1/min(H, W) wide. A gap, false in
    `valid` [N, H, W], is a hole in the window: it blurs the spectrum, so compare only sets whose
    gaps are alike.

    Args:
        images: of any H and W from 2 up.
        valid: all of them if not given.
        floor: least power, in squared physical units, below which it is arithmetic.
    """
    n, bands, height, width = images.shape
    known = np.ones((n, height, width), bool) if valid is None else valid
    # Without the two zeros at its ends, which would waste the outermost pixels.
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    side = min(height, width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    ring = np.rint(radius * side).astype(np.int64).ravel()
    rings = slice(1, side // 2 + 1)

    sums = np.zeros((bands, ring.max() + 1))
    weight_sum = 0.0
    for image, seen in zip(images, known, strict=True):
        weight = window * seen
        if not seen.any():
            continue
        values = np.where(seen, image, 0).astype(np.float64)
        mean = (values * weight).sum(axis=(1, 2), keepdims=True) / weight.sum()
        power = np.abs(np.fft.fft2((values - mean) * weight)) ** 2
        sums += [np.bincount(ring, p.ravel()) for p in power]
        weight_sum += float(np.square(weight).sum())
    frequency = np.arange(1, side // 2 + 1) / side
    if not weight_sum:
        return Spectrum(frequency, np.full((bands, len(frequency)), math.nan))
    mean_power = sums[:, rings] / np.bincount(ring)[rings] / weight_sum
    return Spectrum(frequency, np.log10(np.maximum(mean_power, floor)))


def spectrum_distance(real: Spectrum, generated: Spectrum) -> Reals:
    """Absolute difference of log10 power, mean over the frequencies that both have: [bands].

    1 is a factor of ten. Images of one shape share all frequencies, others those that coincide.
    """
    # Quotients are rounded correctly: equal fractions are equal numbers.
    shared, r, g = np.intersect1d(real.frequency, generated.frequency, return_indices=True)
    if not len(shared):
        raise DataError(
            "two spectra share no frequency",
            got=f"{len(real.frequency)} and {len(generated.frequency)} frequencies",
            remedy="crop the images of both to one shape",
        )
    gaps = np.abs(real.log10_power[:, r] - generated.log10_power[:, g])
    return np.asarray(gaps.mean(axis=1))


# --- samples ---------------------------------------------------------------------------------


class Calibration(NamedTuple):
    """Whether truth falls where the samples say.

    Attributes:
        counts: rank histogram [S + 1]: how often truth had 0, 1, … S samples below it.
        coverage: share of truths in the central interval of the samples.
        nominal: what `coverage` is of calibrated samples; below it they are over-confident.
        unevenness: total variation distance of the histogram from uniform, in [0, 1).
    """

    counts: NDArray[np.int64]
    coverage: float
    nominal: float
    unevenness: float


def rank_histogram(samples: Values, truth: Values, valid: Mask, *, seed: int) -> NDArray[np.int64]:
    """How often truth had 0, 1, … S of the samples below it: [S + 1], to be summed over patches.

    Samples [S, ..., H, W] are draws given one observation, truth [..., H, W] what was there; valid
    is bool and broadcasts to truth. Among samples that equal truth its place is drawn, without
    which values that pile up (0, a saturated sensor) would look uncalibrated.
    """
    at = np.broadcast_to(valid, truth.shape)
    drawn, true = samples[:, at], truth[at]
    ties = (drawn == true).sum(axis=0)
    ranks = (drawn < true).sum(axis=0) + np.random.default_rng(seed).integers(0, ties + 1)
    return np.bincount(ranks, minlength=len(samples) + 1)


def calibration_of(counts: NDArray[np.int64], *, central: float = 0.8) -> Calibration:
    """The figures of a rank histogram [S + 1].

    The interval is the central one between two samples whose nominal coverage is nearest to
    `central`, one sample's rank cut off each end at least: 7/9 for 8 samples. NaN without a truth
    or below two samples.
    """
    ranks, total = len(counts), int(counts.sum())
    if ranks < 3 or not total:
        return Calibration(counts, math.nan, math.nan, math.nan)
    cut = min(max(round((1 - central) / 2 * ranks), 1), (ranks - 1) // 2)
    return Calibration(
        counts,
        coverage=float(counts[cut : ranks - cut].sum() / total),
        nominal=(ranks - 2 * cut) / ranks,
        unevenness=float(np.abs(counts / total - 1 / ranks).sum() / 2),
    )


def calibration(
    samples: Values, truth: Values, valid: Mask, *, seed: int, central: float = 0.8
) -> Calibration:
    """`calibration_of` the `rank_histogram` of one observation, or of many of one shape."""
    return calibration_of(rank_histogram(samples, truth, valid, seed=seed), central=central)


# --- parts -----------------------------------------------------------------------------------


def _checked(features: Features, least: int = 2) -> Reals:
    """As float64, after a look at what would otherwise become a wrong figure."""
    if features.ndim != 2 or len(features) < least:
        raise DataError(
            "a set of features has a wrong shape",
            got=features.shape,
            allowed=f"[N, D] with N at least {least}",
        )
    rows = features.astype(np.float64)
    if not np.isfinite(rows).all():
        raise DataError(
            "features are not finite", got=f"{(~np.isfinite(rows)).any(axis=1).sum()} such rows"
        )
    return rows


def _same_width(a: Features, b: Features) -> None:
    if a.shape[1] != b.shape[1]:
        raise DataError(
            "two sets of features differ in width",
            got=f"{a.shape[1]} and {b.shape[1]}",
            remedy="take both from one encoder",
        )


def _centred(real: Features, generated: Features, least: int = 2) -> tuple[Reals, Reals]:
    """About one common point, which no distance sees but rounding does."""
    real, generated = _checked(real, least), _checked(generated, least)
    _same_width(real, generated)
    middle = (real.mean(axis=0) + generated.mean(axis=0)) / 2
    return real - middle, generated - middle


def _gaussian(rows: Reals) -> tuple[Reals, Reals]:
    """Mean [D] and R [min(N, D), D] of the unbiased covariance RᵀR."""
    mean = rows.mean(axis=0)
    root = np.linalg.qr((rows - mean) / math.sqrt(len(rows) - 1), mode="r")
    return mean, np.asarray(root)


def _cubic_mmd(x: Reals, y: Reals) -> float:
    """Bińkowski et al. 2018, eq. 4: pairs of a row with itself are left out."""

    def kernel(a: Reals, b: Reals) -> Reals:
        base = a @ b.T / a.shape[1] + 1
        return np.asarray(base * base * base)

    def within(a: Reals) -> float:
        values = kernel(a, a)
        return float((values.sum() - np.trace(values)) / (len(a) * (len(a) - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def _share_on_manifold(rows: Reals, reference: Reals, k: int) -> float:
    """Share of `rows` within the ball of any row of `reference`."""
    radii = np.concatenate(
        [
            np.partition(squared, k - 1, axis=1)[:, k - 1]
            for _, squared in _squared_distances(reference, reference, but_itself=True)
        ]
    ) * (1 + _TIE)
    inside = [(squared <= radii).any(axis=1) for _, squared in _squared_distances(rows, reference)]
    return float(np.concatenate(inside).mean())


def _squared_distances(
    a: Reals, b: Reals, *, but_itself: bool = False
) -> Iterator[tuple[slice, Reals]]:
    """Blocks of rows of `a`, each with its squared distances to all of `b`; with `but_itself`, for
    a set against itself, a row is infinitely far from itself.
    """
    norms_a, norms_b = np.square(a).sum(axis=1), np.square(b).sum(axis=1)
    for block in _row_blocks(len(a), len(b)):
        norms = norms_a[block, None] + norms_b
        squared = norms - 2 * (a[block] @ b.T)
        squared[squared < _SAME * norms] = 0
        if but_itself:
            squared[np.arange(len(squared)), np.arange(len(a))[block]] = math.inf
        yield block, squared


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _directions(rows: Reals) -> Reals:
    """Each row at length 1; a row of zeros stays."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0))


def _wasserstein(a: Values, b: Values) -> float:
    """Integral of the difference of two quantile functions, which are steps: exact, until there
    are more values than `_QUANTILES`.
    """
    if not (a.size and b.size):
        return math.nan
    a, b = _quantiles(a), _quantiles(b)
    steps = np.union1d(np.arange(a.size + 1) / a.size, np.arange(b.size + 1) / b.size)
    middles = (steps[1:] + steps[:-1]) / 2
    at_a, at_b = ((middles * v.size).astype(np.int64) for v in (a, b))
    return float(np.abs(a[at_a] - b[at_b]) @ np.diff(steps))


def _quantiles(values: Values) -> Reals:
    """The values in order, thinned evenly if there are more than `_QUANTILES`."""
    ordered = np.sort(values)
    if ordered.size > _QUANTILES:
        levels = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
        ordered = ordered[(levels * ordered.size).astype(np.int64)]
    return ordered.astype(np.float64)
