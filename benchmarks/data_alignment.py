"""Shifts that were put between layers of the synthetic Earth, and how many of them are found.

Each layer of a place is displaced by a known amount: numbers by a fraction of a pixel (through the
Fourier transform), classes by whole pixels. A shift counts as found when the measured change of a
pair's displacement is within 0.3 px of the change that was made. The displacement that is measured
of the pair before that, on the one grid it was rendered on, is given beside it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import setting
from mm_model.data.coregistration import LEAST_CONFIDENCE, Features, Shift, features, find_shift
from mm_model.data.patch import Layer
from mm_model.data.sources.synthetic.source import render
from mm_model.modalities import Modality

PLACES = 40
WINDOWS = ((96, 96), (96, 32), (32, 120))  # of a place of 256 px: row, column
_WITHIN_PX = 0.3


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Figures of pairs of 64 px patches; the same places every time."""
    chosen = setting.params()
    side, gsd_m = 64, chosen.prepare.gsd_m[0]
    pairs = list(itertools.combinations(chosen.selected, 2))
    errors: list[float] = []
    own: list[float] = []
    false = 0
    tried = unrelated = 0
    seconds: list[float] = []
    before_place: dict[str, Features] = {}
    source = setting.synthetic_source(chosen, PLACES)
    for number, place in enumerate(source._places.values()):
        grid = place.grid.window(0, 0, 256, 256)
        layers = render(chosen.prepare.synthetic.seed, grid, chosen.selected, place.when)  # type: ignore[union-attr]
        rng = np.random.default_rng(number)
        moves = {m.name: _draw(m, rng) for m in chosen.selected}
        for row, col in WINDOWS:
            window = slice(row, row + side), slice(col, col + side)
            plain = _cut(layers, window, chosen.selected, {}, gsd_m)
            moved = _cut(layers, window, chosen.selected, moves, gsd_m)
            for a, b in pairs:
                began = time.process_time()
                first = find_shift(plain[a.name], plain[b.name])
                seconds.append(time.process_time() - began)
                second = find_shift(moved[a.name], moved[b.name])
                tried += 1
                if first.is_known and second.is_known:
                    errors.append(_error(first, second, moves[b.name] - moves[a.name]))
                    own.append(first.length_px)
                if before_place:
                    unrelated += 1
                    false += find_shift(before_place[a.name], plain[b.name]).is_known
        before_place = plain
    found = np.array(errors)
    figures = {
        "shift_found_within_0_3px_share": float((found < _WITHIN_PX).mean()),
        "shift_error_median_px": float(np.median(found)),
        "shift_error_p95_px": float(np.quantile(found, 0.95)),
        "shift_known_share": len(found) / tried,
        "shift_known_of_unrelated_share": false / unrelated,
        "shift_own_of_synthetic_median_px": statistics.median(own),
        "shift_own_of_synthetic_p95_px": float(np.quantile(own, 0.95)),
        "shift_pair_ms": 1e3 * statistics.median(seconds),
    }
    notes = {
        "shift_found_within_0_3px_share": "of pairs with a known shift, all pairs of modalities",
        "shift_known_share": f"textured: confidence over {LEAST_CONFIDENCE:g}, before and after",
        "shift_known_of_unrelated_share": "layers of two places, which share nothing",
        "shift_own_of_synthetic_median_px": "as rendered on one grid, not displaced",
        "shift_pair_ms": "processor time of a pair of 64 px, without its features",
    }
    return figures, notes


def _draw(modality: Modality, rng: np.random.Generator) -> NDArray[np.float64]:
    if modality.is_categorical:
        return rng.integers(-2, 3, 2).astype(np.float64)
    return rng.uniform(-1.5, 1.5, 2)


def _cut(
    layers: Mapping[str, Layer],
    window: tuple[slice, slice],
    modalities: tuple[Modality, ...],
    moves: Mapping[str, Any],
    gsd_m: float,
) -> dict[str, Features]:
    cut = {}
    for modality in modalities:
        values = layers[modality.name].values
        if modality.name in moves:
            values = displaced(values, moves[modality.name], modality)
        valid = np.ones(values[0, *window].shape, np.bool_)
        cut[modality.name] = features(Layer(values[:, *window], valid), modality, gsd_m)
    return cut


def displaced(values: NDArray[Any], by_px: NDArray[np.float64], modality: Modality) -> NDArray[Any]:
    """An image whose content lies `by_px` (rows, columns) farther; what leaves comes in again."""
    if modality.is_categorical:
        return np.roll(values, by_px.astype(int), (1, 2))
    height, width = values.shape[1:]
    rows, cols = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    turn = np.exp(-2j * np.pi * (rows * by_px[0] + cols * by_px[1]))
    return np.fft.irfft2(np.fft.rfft2(values) * turn, s=(height, width)).astype(np.float32)


def _error(first: Shift, second: Shift, made: NDArray[np.float64]) -> float:
    change = np.array([second.row_px - first.row_px, second.col_px - first.col_px])
    return float(np.hypot(*(change - made)))


if __name__ == "__main__":
    for key, value in measure()[0].items():
        print(f"{key:40} {value:.4g}")
