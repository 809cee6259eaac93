"""Distances of distributions against closed forms, brute force and their limits."""

import math
from itertools import combinations

import numpy as np
import pytest

from mm_model.errors import DataError
from mm_model.evaluation import distributions as d

SEED = 11


def gaussian_set(mean, covariance, rows, seed):
    """A set whose mean and unbiased covariance are exactly these."""
    raw = np.random.default_rng(seed).normal(size=(rows, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def covariance_of(size, seed):
    root = np.random.default_rng(seed).normal(size=(size, size))
    return root @ root.T + np.eye(size)


def normal(rows, width, seed=SEED):
    return np.random.default_rng(seed).normal(size=(rows, width))


TWO_SET_FIGURES = {
    "frechet": d.frechet_distance,
    "kernel": lambda a, b: d.kernel_distance(a, b, seed=SEED),
    "one_nn": d.one_nn_accuracy,
    "precision_recall": d.precision_recall,
}


# --- all figures of two sets -----------------------------------------------------------------


@pytest.mark.parametrize("name", TWO_SET_FIGURES)
def test_the_order_of_the_rows_does_not_matter(name):
    figure = TWO_SET_FIGURES[name]
    a, b = normal(40, 7), 1.2 * normal(40, 7, 5) + 0.3
    shuffled = np.random.default_rng(2).permutation
    assert figure(shuffled(a), shuffled(b)) == pytest.approx(figure(a, b), rel=1e-9)


@pytest.mark.parametrize("name", [*TWO_SET_FIGURES, "mean_pairwise", "retrieval"])
def test_the_size_of_a_block_does_not_matter(name, monkeypatch):
    others = {"mean_pairwise": lambda a, b: d.mean_pairwise_distance(a)}
    others["retrieval"] = d.retrieval_top1
    figure = (TWO_SET_FIGURES | others)[name]
    a = normal(43, 5)
    b = a + normal(43, 5, 5)
    whole = figure(a, b)
    monkeypatch.setattr(d, "_BLOCK", 7 * len(b))
    assert figure(a, b) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", TWO_SET_FIGURES)
@pytest.mark.parametrize(
    "wrong",
    [
        normal(40, 6),  # another encoder's
        normal(1, 7),
        normal(40, 7)[0],
        np.where(np.arange(280).reshape(40, 7) == 3, np.nan, 1.0),
    ],
    ids=["width", "one row", "no rows", "nan"],
)
def test_features_that_do_not_fit_are_refused(name, wrong):
    for a, b in ((normal(40, 7), wrong), (wrong, normal(40, 7))):
        with pytest.raises(DataError):
            TWO_SET_FIGURES[name](a, b)


def test_halves_are_disjoint_equal_and_a_function_of_the_seed():
    rows = np.arange(3 * 21).reshape(21, 3)
    first, second = d.split_half(rows, SEED)
    assert len(first) == len(second) == 10
    assert len({tuple(r) for r in np.concatenate([first, second])} & {*map(tuple, rows)}) == 20
    assert (d.split_half(rows, SEED)[0] == first).all()
    assert (d.split_half(rows, SEED + 1)[0] != first).any()


# --- Fréchet ---------------------------------------------------------------------------------


def test_frechet_distance_of_known_gaussians():
    size = 6
    c1, c2 = covariance_of(size, 1), covariance_of(size, 2)  # do not commute
    m1, m2 = np.arange(size) / 3, np.ones(size)
    root_trace = np.sqrt(np.linalg.eigvals(c1 @ c2).real).sum()
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root_trace
    a, b = gaussian_set(m1, c1, 31, 3), gaussian_set(m2, c2, 50, 4)
    assert d.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_scaled_and_shifted_sets():
    a = gaussian_set(np.zeros(4), np.diag([1.0, 4, 9, 16]), 23, 1)
    assert d.frechet_distance(a, 3 * a) == pytest.approx(4 * (1 + 4 + 9 + 16))  # (σ - 3σ)²
    assert d.frechet_distance(a, a + 2) == pytest.approx(4 * 2**2)
    assert d.frechet_distance(a, np.zeros((5, 4))) == pytest.approx(30)  # a point has no spread


def test_frechet_distance_with_fewer_rows_than_features():
    a = normal(9, 30)
    assert d.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert d.frechet_distance(a, a + 1) == pytest.approx(30)


def test_frechet_distance_of_two_halves_falls_with_their_size():
    small, large = (d.frechet_distance(*d.split_half(normal(n, 8), 1)) for n in (60, 6000))
    assert 0 < large < small / 10
    assert large < 0.05


# --- kernel ----------------------------------------------------------------------------------


def test_kernel_distance_by_counting_pairs():
    a, b = normal(7, 3), normal(9, 3, 5) + 1

    def k(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / 3 + 1) ** 3

    within = [
        np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
        for s in (a, b)
    ]
    across = np.mean([k(x, y) for x in a for y in b])
    assert d.kernel_distance(a, b, seed=1) == pytest.approx(sum(within) - 2 * across, rel=1e-9)


def test_kernel_distance_is_unbiased():
    found = [d.kernel_distance(normal(6, 4, s), normal(8, 4, 500 + s), seed=0) for s in range(400)]
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error
    assert np.mean(np.array(found) < 0) > 0.2


def test_kernel_distance_of_subsets():
    a, b = normal(300, 5), normal(200, 5, 6) * 1.5
    whole = d.kernel_distance(a, b, seed=1)

    def of_subsets(seed):
        return d.kernel_distance(a, b, seed=seed, subset_rows=50, subsets=200)

    assert of_subsets(1) == pytest.approx(whole, rel=0.1)
    assert of_subsets(1) == of_subsets(1) != of_subsets(2)


# --- nearest neighbours ----------------------------------------------------------------------


def test_one_nn_accuracy_of_equal_apart_and_copied_sets():
    first, second = d.split_half(normal(1600, 4), 3)
    assert d.one_nn_accuracy(first, second) == pytest.approx(0.5, abs=0.04)
    assert d.one_nn_accuracy(first, second + 50) == 1
    assert d.one_nn_accuracy(first, first) == 0


def test_one_nn_accuracy_shares_ties_between_the_sets():
    # All rows are the same: of 2n - 1 others n - 1 are of the own set.
    for n in (2, 5):
        same = np.full((n, 3), 0.1)
        assert d.one_nn_accuracy(same, same) == pytest.approx((n - 1) / (2 * n - 1))
    # On a line real 0, 2 and generated 1, 10: 0 → 1; 2 → 1; 1 → 0 and 2; 10 → 2: none its own.
    real, generated = np.array([[0.0], [2]]), np.array([[1.0], [10]])
    assert d.one_nn_accuracy(real, generated) == 0
    # Real 0, 1 and generated 2, 3: 0 → 1, 1 → 0 and 2, 2 → 1 and 3, 3 → 2.
    real, generated = np.array([[0.0], [1]]), np.array([[2.0], [3]])
    assert d.one_nn_accuracy(real, generated) == pytest.approx((1 + 0.5 + 0.5 + 1) / 4)
    assert d.one_nn_accuracy(generated, real) == pytest.approx(0.75)


@pytest.mark.parametrize("offset", [0, 1e6])
def test_neighbours_are_found_far_from_the_origin(offset):
    first, second = (half + offset for half in d.split_half(normal(240, 6), 3))
    near = first - offset, second - offset
    assert d.one_nn_accuracy(first, second) == d.one_nn_accuracy(*near)
    assert d.precision_recall(first, second) == d.precision_recall(*near)
    # Every row twice in both sets: of three copies one is of the own set, and rounding hides none.
    twice = np.repeat(first, 2, axis=0)
    assert d.one_nn_accuracy(twice, twice) == pytest.approx(1 / 3)


def test_one_nn_accuracy_needs_equal_sizes():
    with pytest.raises(DataError, match="20 real and 19 generated"):
        d.one_nn_accuracy(normal(20, 3), normal(19, 3))


def test_precision_and_recall_of_equal_and_of_separate_sets():
    first, second = d.split_half(normal(1200, 3), 3)
    assert d.precision_recall(first, second) == pytest.approx((0.95, 0.95), abs=0.05)
    assert d.precision_recall(first, first) == (1, 1)
    assert d.precision_recall(first, second + 50) == (0, 0)


def test_collapse_costs_recall_and_invention_costs_precision():
    modes = np.array([[0.0, 0], [20, 0], [0, 20], [20, 20]])
    spread = np.repeat(modes, 50, axis=0) + normal(200, 2)
    one_mode = modes[1] + normal(200, 2, 5)
    precision, recall = d.precision_recall(spread, one_mode)
    assert precision > 0.85
    assert recall < 0.27  # one of four
    precision, recall = d.precision_recall(one_mode, spread)
    assert precision < 0.27
    assert recall > 0.85
    # One real image again and again: its manifold is a point.
    assert d.precision_recall(spread, np.repeat(spread[:1], 200, axis=0)) == (1, 1 / 200)


def test_precision_and_recall_by_brute_force():
    real, generated, k = normal(12, 2), normal(15, 2, 5) * 1.3, 3

    def share(rows, reference):
        def radius(i):
            others = [math.dist(reference[i], reference[j]) for j in range(len(reference)) if j - i]
            return sorted(others)[k - 1]

        radii = [radius(i) for i in range(len(reference))]
        return np.mean(
            [any(math.dist(x, y) <= r for y, r in zip(reference, radii, strict=True)) for x in rows]
        )

    expected = (share(generated, real), share(real, generated))
    assert 0 < expected[0] < 1
    assert d.precision_recall(real, generated, k) == pytest.approx(expected)


def test_precision_needs_more_rows_than_neighbours():
    with pytest.raises(DataError):
        d.precision_recall(normal(5, 2), normal(9, 2), k=5)


def test_mean_pairwise_distance_of_known_sets():
    assert d.mean_pairwise_distance(np.array([[0.0, 0], [3, 4], [0, 8]])) == pytest.approx(
        (5 + 8 + 5) / 3
    )
    assert d.mean_pairwise_distance(np.full((6, 4), 0.1) + 1e3) == 0
    rows = np.repeat(normal(10, 37), 3, axis=0)
    pairs = [math.dist(x, y) for x, y in combinations(rows, 2)]
    assert d.mean_pairwise_distance(rows) == pytest.approx(np.mean(pairs), rel=1e-12)
    # Of a Gaussian in D dimensions: √2·σ·√2·Γ((D + 1)/2)/Γ(D/2), 3.3851 for σ = 1, D = 6.
    assert d.mean_pairwise_distance(normal(900, 6)) == pytest.approx(3.3851, rel=0.02)


def test_retrieval_sees_past_offset_and_scale():
    a, noise = normal(60, 8), normal(60, 8, 5)
    assert d.retrieval_top1(a, 5 * a + 100) == 1
    assert d.retrieval_top1(a, np.roll(a, 1, axis=0)) == 0
    assert 0.2 < d.retrieval_top1(a, a + noise) < 1


def test_retrieval_from_a_side_that_says_nothing_is_chance():
    a, constant = normal(40, 3), np.full((40, 3), 0.1)
    assert d.retrieval_top1(a, constant) == pytest.approx(1 / 40)
    assert d.retrieval_top1(constant, a) == pytest.approx(1 / 40)
    # One dimension, centred, tells on which of two sides a place is, and no more.
    line = np.linspace(-3, 5, 40)[:, None] ** 3 * [0.1, 0.7, 0.3]
    assert d.retrieval_top1(line, line) == pytest.approx(2 / 40)
    unrelated = [d.retrieval_top1(normal(40, 3, s), normal(40, 3, 90 + s)) for s in range(80)]
    assert np.mean(unrelated) == pytest.approx(1 / 40, abs=0.012)


def test_retrieval_needs_the_same_places():
    with pytest.raises(DataError, match="40 and 39"):
        d.retrieval_top1(normal(40, 3), normal(39, 3))


# --- pixels ----------------------------------------------------------------------------------


def wasserstein(a, b, valid_a=None, valid_b=None):
    return d.band_wasserstein(
        a,
        b,
        real_valid=np.ones(a[:, 0].shape, bool) if valid_a is None else valid_a,
        generated_valid=np.ones(b[:, 0].shape, bool) if valid_b is None else valid_b,
    )


def images(n, bands, height, width, seed=SEED):
    return np.random.default_rng(seed).normal(size=(n, bands, height, width)).astype(np.float32)


def test_wasserstein_of_a_shift_is_the_shift_of_each_band():
    a = images(3, 2, 5, 7).astype(np.float64)
    shift = np.array([0.25, -4])
    assert wasserstein(a, a + shift[:, None, None]) == pytest.approx([0.25, 4])
    assert wasserstein(a, a) == pytest.approx([0, 0], abs=0)
    moved = np.random.default_rng(1).permutation(a.reshape(3, 2, 35), axis=2).reshape(a.shape)
    assert wasserstein(a, moved) == pytest.approx([0, 0], abs=0)  # where they are does not matter


def test_wasserstein_of_sets_of_different_size():
    a, b = images(2, 1, 7, 11), images(3, 1, 7, 14, 9) * 2
    # As many copies of each as make the sizes equal: 154 × 21 = 294 × 11.
    copies_a, copies_b = np.repeat(np.sort(a.ravel()), 21), np.repeat(np.sort(b.ravel()), 11)
    expected = np.abs(copies_a.astype(float) - copies_b).mean()
    assert wasserstein(a, b) == pytest.approx([expected])
    # Uniform on [0, 1] and on [0, 3], whose quantile functions u and 3u nowhere cross.
    unit = (np.arange(700).reshape(1, 1, 20, 35) + 0.5) / 700
    wide = (np.arange(63).reshape(1, 1, 7, 9) + 0.5) / 21
    assert wasserstein(unit, wide) == pytest.approx([1], abs=0.01)
    assert wasserstein(wide, unit) == wasserstein(unit, wide)


def test_wasserstein_of_many_pixels_is_thinned_alike(monkeypatch):
    a, b = images(4, 2, 30, 50), images(3, 2, 40, 60, 8) * 1.5 + 0.3
    exact = wasserstein(a, b)
    monkeypatch.setattr(d, "_QUANTILES", 1000)
    assert wasserstein(a, b) == pytest.approx(exact, rel=0.01)
    assert wasserstein(a, a + 1) == pytest.approx([1, 1])


@pytest.mark.parametrize("filler", [np.nan, 1e30])
def test_an_invalid_pixel_changes_no_figure_of_pixels(filler):
    a, b = images(4, 2, 12, 17), images(4, 2, 12, 17, 9)
    valid = np.random.default_rng(4).random((4, 12, 17)) > 0.3
    soiled = np.where(valid[:, None], a, np.float32(filler))
    assert wasserstein(soiled, b, valid) == pytest.approx(wasserstein(a, b, valid), rel=0)
    spectra = [d.power_spectrum(x, valid).log10_power for x in (a, soiled)]
    assert (spectra[0] == spectra[1]).all()
    soiled = np.where(valid[0], a, np.float32(filler))
    counts = [d.rank_histogram(x[1:], x[0], valid[0], seed=1) for x in (a, soiled)]
    assert (counts[0] == counts[1]).all()
    assert counts[0].sum() == 2 * valid[0].sum()


def test_no_pixel_is_not_a_number():
    a, nothing = images(3, 2, 6, 9), np.zeros((3, 6, 9), bool)
    assert np.isnan(wasserstein(a, a, valid_b=nothing)).all()
    assert np.isnan(d.power_spectrum(a, nothing).log10_power).all()
    summary = d.calibration(a, a[0], nothing[0], seed=1)
    assert np.isnan(summary[1:]).all()
    assert summary.counts.sum() == 0


# --- spectra ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("along", "step"), [("x", 1 / 8), ("x", 5 / 16), ("y", 5 / 16)])
def test_a_sine_has_its_power_at_its_frequency(along, step):
    rows, columns = np.mgrid[:64, :112]
    wave = np.sin(2 * np.pi * step * (columns if along == "x" else rows))
    frequency, power = d.power_spectrum(np.stack([wave, 10 * wave])[None])
    assert frequency[power.argmax(axis=1)] == pytest.approx([step, step], abs=0)
    assert power[1] - power[0] == pytest.approx(2 * np.ones(32))  # power goes with amplitude²
    far = np.abs(frequency - step) > 0.1
    assert power[0, far].max() < power[0].max() - 4


def test_a_slanted_sine_counts_by_its_radial_frequency():
    rows, columns = np.mgrid[:96, :60]
    frequency, power = d.power_spectrum(
        np.sin(2 * np.pi * (0.15 * rows + 0.2 * columns))[None, None]
    )
    assert frequency[power[0].argmax()] == pytest.approx(0.25, abs=0)


def test_white_noise_is_flat_at_its_variance_with_and_without_gaps():
    noise = images(60, 2, 40, 64) * np.array([1, 3], np.float32)[:, None, None] + 7
    valid = np.random.default_rng(4).random((60, 40, 64)) > 0.4
    for mask in (None, valid):
        frequency, power = d.power_spectrum(noise, mask)
        assert frequency == pytest.approx(np.arange(1, 21) / 40)
        assert 10 ** power[:, 1:] == pytest.approx(
            np.repeat([[1], [9]], len(frequency) - 1, axis=1), rel=0.12
        )


def test_offset_and_order_change_no_spectrum():
    a = images(5, 1, 17, 26).astype(np.float64)
    power = d.power_spectrum(a).log10_power
    offsets = np.arange(5)[:, None, None, None] * 30
    assert d.power_spectrum(a + offsets).log10_power == pytest.approx(power)
    assert d.power_spectrum(a[::-1]).log10_power == pytest.approx(power)
    assert d.power_spectrum(a[..., ::-1, :]).log10_power == pytest.approx(power)


def test_spectrum_distance_of_an_amplitude_and_of_a_blur():
    a = images(8, 2, 32, 50).astype(np.float64)
    real = d.power_spectrum(a)
    assert d.spectrum_distance(real, real) == pytest.approx([0, 0], abs=0)
    louder = d.power_spectrum(a * np.array([10, 100])[:, None, None])
    assert d.spectrum_distance(real, louder) == pytest.approx([2, 4])
    blurred = d.power_spectrum((a + np.roll(a, 1, axis=-1) + np.roll(a, 1, axis=-2)) / 3)
    gap = real.log10_power - blurred.log10_power
    assert (gap[:, -1] > gap[:, 0] + 0.3).all()  # a blur takes the fine
    assert d.spectrum_distance(blurred, real) == pytest.approx(np.abs(gap).mean(axis=1))


def test_a_flat_image_is_far_but_finite():
    flat = d.power_spectrum(np.full((2, 1, 32, 50), 0.3))
    assert (flat.log10_power == -12).all()
    assert d.spectrum_distance(d.power_spectrum(images(3, 1, 32, 50)), flat) > 10


def test_spectra_of_two_shapes_are_compared_where_both_have_a_frequency():
    coarse, fine = d.power_spectrum(images(300, 1, 12, 15)), d.power_spectrum(images(90, 1, 18, 31))
    shared = np.intersect1d(coarse.frequency, fine.frequency)
    assert shared == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    tilted = d.Spectrum(fine.frequency, fine.log10_power + np.isin(fine.frequency, shared))
    assert d.spectrum_distance(coarse, tilted) == pytest.approx([1], abs=0.05)
    with pytest.raises(DataError, match="no frequency"):
        d.spectrum_distance(coarse, d.power_spectrum(images(2, 1, 13, 17)))


# --- calibration -----------------------------------------------------------------------------


def drawn_scene(samples, sample_spread, bias=0.0):
    """Truth and samples about a common centre; truth's spread is 1."""
    rng = np.random.default_rng(SEED)
    centre = rng.normal(0, 5, (2, 60, 90))
    return (
        centre + rng.normal(bias, sample_spread, (samples, 2, 60, 90)),
        centre + rng.normal(size=(2, 60, 90)),
        rng.random((60, 90)) > 0.2,
    )


def test_calibrated_samples_cover_what_they_should():
    for samples, nominal in ((9, 0.8), (8, 7 / 9), (19, 0.8), (2, 1 / 3)):
        found = d.calibration(*drawn_scene(samples, 1), seed=1)
        assert found.nominal == pytest.approx(nominal)
        assert found.coverage == pytest.approx(nominal, abs=0.02)
        assert found.unevenness < 0.03
    assert d.calibration(*drawn_scene(19, 1), seed=1, central=0.5).nominal == 0.5
    assert d.calibration(*drawn_scene(19, 1), seed=1, central=0.01).nominal == pytest.approx(0.1)


def test_false_spread_and_bias_are_seen():
    confident = d.calibration(*drawn_scene(9, 0.3), seed=1)
    assert confident.coverage < confident.nominal - 0.3
    assert confident.counts[[0, -1]].min() > confident.counts[1:-1].max()  # the histogram is a U
    timid = d.calibration(*drawn_scene(9, 3), seed=1)
    assert timid.coverage > timid.nominal + 0.1
    assert timid.counts[[0, -1]].max() < timid.counts[4:6].min()
    high = d.calibration(*drawn_scene(9, 1, bias=1), seed=1)
    assert high.counts[0] > 3 * high.counts[-1]  # truth lies below the samples
    for found in (confident, timid, high):
        assert found.unevenness > 0.15


def test_samples_that_are_all_the_same_and_wrong_cover_nothing():
    samples, truth = np.ones((9, 1, 5, 8)), np.zeros((1, 5, 8))
    found = d.calibration(samples, truth, np.ones((5, 8), bool), seed=1)
    assert found.coverage == 0
    assert found.counts.tolist() == [40] + [0] * 9
    assert found.unevenness == pytest.approx(0.9)


def test_values_that_pile_up_are_calibrated_too():
    rng = np.random.default_rng(SEED)
    samples, truth = rng.integers(0, 3, (7, 1, 60, 90)), rng.integers(0, 3, (1, 60, 90))
    valid = np.ones((60, 90), bool)
    found = d.calibration(samples, truth, valid, seed=1)
    assert found.unevenness < 0.03
    assert (d.rank_histogram(samples, truth, valid, seed=1) == found.counts).all()
    assert (d.rank_histogram(samples, truth, valid, seed=2) != found.counts).any()


def test_the_order_of_samples_does_not_matter_and_histograms_add_up():
    samples, truth, valid = drawn_scene(6, 0.7)
    counts = d.rank_histogram(samples, truth, valid, seed=1)
    assert (d.rank_histogram(samples[::-1], truth, valid, seed=1) == counts).all()
    parts = [
        d.rank_histogram(samples[..., rows, :], truth[..., rows, :], valid[rows], seed=1)
        for rows in (slice(0, 23), slice(23, None))
    ]
    assert (sum(parts) == counts).all()


def test_one_sample_says_nothing_of_calibration():
    assert np.isnan(d.calibration_of(np.array([30, 40]))[1:]).all()
