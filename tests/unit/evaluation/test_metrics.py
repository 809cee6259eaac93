"""Metrics against closed forms and brute force."""

import math

import numpy as np
import pytest

from mm_model.evaluation import metrics
from mm_model.modalities import MODALITIES

RNG = np.random.default_rng(3)
H, W = 13, 21
VALID = RNG.random((H, W)) > 0.3


def brute_ssim(x, y, valid, span):
    """Wang et al., one window at a time, each over its valid pixels."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    found = []
    for band_x, band_y in zip(x, y, strict=True):
        for row, column in np.argwhere(valid):
            weights, xs, ys = [], [], []
            for i in range(-5, 6):
                for j in range(-5, 6):
                    r, c = row + i, column + j
                    if 0 <= r < valid.shape[0] and 0 <= c < valid.shape[1] and valid[r, c]:
                        weights.append(window[i + 5] * window[j + 5])
                        xs.append(band_x[r, c])
                        ys.append(band_y[r, c])
            w, xs, ys = np.array(weights) / sum(weights), np.array(xs), np.array(ys)
            mx, my = w @ xs, w @ ys
            vx, vy, vxy = w @ (xs - mx) ** 2, w @ (ys - my) ** 2, w @ ((xs - mx) * (ys - my))
            found.append(
                (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            )
    return np.mean(found)


def test_ssim_is_that_of_each_window():
    x, y = RNG.random((2, H, W)), RNG.random((2, H, W))
    expected = brute_ssim(x, y, VALID, 0.35)
    assert metrics.ssim(x, y, VALID, 0.35) == pytest.approx(expected, rel=1e-9)


def test_ssim_of_an_image_with_itself_is_one():
    x = RNG.random((3, 5, 7)).astype(np.float32)  # smaller than the window
    assert metrics.ssim(x, x, np.ones((5, 7), bool), 1.0) == pytest.approx(1)


@pytest.mark.parametrize("filler", [np.nan, 1e30, -7.0])
def test_an_invalid_pixel_changes_nothing(filler):
    truth, guess = RNG.random((2, 3, H, W)).astype(np.float32)
    soiled = np.where(VALID, guess, filler).astype(np.float32)
    spoiled_truth = np.where(VALID, truth, filler).astype(np.float32)
    for measure in (
        metrics.errors,
        lambda p, t, v: metrics.ssim(p, t, v, 1.0),
        lambda p, t, v: metrics.spectral_angles_deg(p, t, v).tolist(),
        lambda p, t, v: metrics.spread(np.stack([p, t]), v),
    ):
        assert measure(soiled, spoiled_truth, VALID) == measure(guess, truth, VALID)


def test_psnr_of_a_known_error():
    truth = np.zeros((2, H, W), np.float32)
    squared, absolute, count = metrics.errors(truth + 0.1, truth, VALID)
    assert count == 2 * VALID.sum()
    assert absolute / count == pytest.approx(0.1)
    assert metrics.psnr_db(squared / count, 1.0) == pytest.approx(20, abs=1e-5)
    assert metrics.psnr_db(squared / count, 10.0) == pytest.approx(40, abs=1e-5)
    assert metrics.psnr_db(0, 1.0) == math.inf


def test_the_peak_is_the_display_span():
    for modality in MODALITIES.values():
        low, high = modality.display_range
        assert metrics.peak(modality) == high - low


def test_spectral_angle_of_known_spectra():
    guess = np.array([[1, 1, 0, 0, 2], [0, 1, 0, 1, 2]], np.float32)[:, None]
    truth = np.array([[0, 2, 0, 0, 1], [1, 2, 0, 0, 0]], np.float32)[:, None]
    angles = metrics.spectral_angles_deg(guess, truth, np.ones((1, 5), bool))
    assert angles == pytest.approx([90, 0, 0, 90, 45], abs=1e-4)


def test_brightness_does_not_change_the_spectral_angle():
    truth, guess = RNG.random((2, 3, H, W))
    angles = metrics.spectral_angles_deg(guess, truth, VALID)
    assert metrics.spectral_angles_deg(5 * guess, truth, VALID) == pytest.approx(angles)


def test_confusion_iou_and_accuracy_by_counting():
    codes = (10, 40, 95)
    truth, guess = RNG.choice([10, 40], (H, W)), RNG.choice(codes, (H, W))
    counts = metrics.confusion(guess, truth, VALID, codes)
    t, g = truth[VALID], guess[VALID]
    expected = [[np.sum((t == a) & (g == b)) for b in codes] for a in codes]
    assert counts.tolist() == expected
    # A class that never occurs in truth costs the others what was wrongly given to it, no more.
    ious = [np.sum((t == c) & (g == c)) / np.sum((t == c) | (g == c)) for c in (10, 40)]
    assert metrics.mean_iou(counts) == pytest.approx(np.mean(ious))
    assert metrics.accuracy(counts) == pytest.approx(np.mean(t == g))


def test_spread_is_an_unbiased_deviation():
    samples = RNG.normal(0, 2, (400, 1, 4, 5))
    assert metrics.spread(samples, np.ones((4, 5), bool)) == pytest.approx(2, rel=0.03)
    assert metrics.spread(samples[:1].repeat(4, 0), np.ones((4, 5), bool)) == 0


def test_disagreement_counts_pairs():
    samples = np.array([[[1, 1]], [[1, 2]], [[1, 3]]])
    assert metrics.disagreement(samples, np.array([[True, True]])) == pytest.approx(0.5)
    assert metrics.disagreement(samples, np.array([[True, False]])) == 0


def test_nothing_valid_is_not_a_number():
    nothing = np.zeros((H, W), bool)
    x = np.ones((3, H, W))
    assert math.isnan(metrics.ssim(x, x, nothing, 1.0))
    assert math.isnan(metrics.spread(x[None].repeat(2, 0), nothing))
    assert math.isnan(metrics.disagreement(x, nothing))
    empty = metrics.confusion(x[0], x[0], nothing, (1, 2))
    assert math.isnan(metrics.mean_iou(empty))
    assert math.isnan(metrics.accuracy(empty))
