"""Does what callers send look like what the model was trained on? By band and class, as it comes.

The same distances as those of `mm_model.data.drift`, of a memory that fades.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.data.drift import band_distance, class_changes, is_described
from mm_model.modalities import Modality

LEAST_LAYERS = 20
"""Of so many layers of a modality something can be said: one lake is no drift."""

_HALF_LIFE = 200.0  # layers after which one counts half
_FADING = 0.5 ** (1 / _HALF_LIFE)
_MOST_PIXELS = 1 << 14  # of a layer; sorting so many takes a millisecond

Observed = Mapping[str, tuple[NDArray[np.generic], NDArray[np.bool_]]]


class InputDrift:
    """How far the layers of late requests lie from the training set of one bundle.

    Every layer counts alike, however large. For threads.

    Args:
        modalities: of the model, by name.
        statistics: of the training set, as the bundle's manifest holds them. A modality that they
            do not describe is not judged.
    """

    def __init__(self, modalities: Mapping[str, Modality], statistics: Mapping[str, Any]) -> None:
        described = [m for m in modalities.values() if is_described(m, statistics)]
        self._bands = {
            m.name: [
                _FadingBand(band["name"], band["quantiles"])
                for band in statistics["modalities"][m.name]["bands"]
            ]
            for m in described
            if not m.is_categorical
        }
        self._classes = {
            m.name: _FadingClasses(m, statistics["modalities"][m.name]["classes"])
            for m in described
            if m.is_categorical
        }
        self._layers = dict.fromkeys((m.name for m in described), 0)
        self._lock = threading.Lock()

    def see(self, observed: Observed) -> None:
        """Take a request's layers into account: name → values [bands, H, W], valid [H, W]."""
        for name, (values, valid) in observed.items():
            known = values[:, valid]
            if name not in self._layers or not known.size:
                continue
            sample = known[:, :: -(-known.shape[1] // _MOST_PIXELS)]
            with self._lock:
                self._layers[name] += 1
                if name in self._classes:
                    self._classes[name].see(sample[0])
                else:
                    for band, pixels in zip(self._bands[name], sample, strict=True):
                        band.see(pixels)

    def distances(self) -> Iterator[tuple[str, str, float]]:
        """(modality, band or "classes", distance from 0 to 1), of which enough has been seen."""
        with self._lock:
            for name, layers in self._layers.items():
                if layers < LEAST_LAYERS:
                    continue
                if name in self._classes:
                    yield name, "classes", self._classes[name].distance()
                else:
                    for band in self._bands[name]:
                        yield name, band.name, band.distance()


class _FadingBand:
    """Shares of a band's pixels below and up to each quantile of the training set."""

    def __init__(self, name: str, quantiles: Mapping[str, float]) -> None:
        self.name = name
        self._quantiles = quantiles
        self._values = np.array(list(quantiles.values()))
        self._shares = _Fading((2, len(quantiles)))

    def see(self, pixels: NDArray[np.generic]) -> None:
        ordered = np.sort(pixels.astype(np.float64))
        below = np.searchsorted(ordered, self._values, "left")
        upto = np.searchsorted(ordered, self._values, "right")
        self._shares.see(np.stack([below, upto]) / ordered.size)

    def distance(self) -> float:
        below, upto = self._shares.mean()
        at = {value: i for i, value in enumerate(self._values.tolist())}
        return band_distance(self._quantiles, lambda q: (below[at[q]], upto[at[q]]))


class _FadingClasses:
    """Shares of a map's codes."""

    def __init__(self, modality: Modality, trained: Mapping[str, int]) -> None:
        self._modality, self._trained = modality, trained
        self._shares = _Fading((256,))

    def see(self, pixels: NDArray[np.generic]) -> None:
        self._shares.see(np.bincount(pixels.astype(np.int64), minlength=256) / pixels.size)

    def distance(self) -> float:
        changes = class_changes(self._modality, self._trained, self._shares.mean())
        return float(np.abs(changes).sum() / 2)


class _Fading:
    """A mean in which what came later counts more."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._sum, self._weight = np.zeros(shape), 0.0

    def see(self, value: NDArray[np.float64]) -> None:
        self._sum = _FADING * self._sum + value
        self._weight = _FADING * self._weight + 1

    def mean(self) -> NDArray[np.float64]:
        return self._sum / self._weight
