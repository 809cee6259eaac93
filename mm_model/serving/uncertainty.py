"""What the samples of a scene have in common, and where they differ: bands of a target."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mm_model.data.strips import CogWriter
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality


class Moments:
    """Mean and spread over samples, gathered strip by strip in a file beside the result.

    Of a continuous modality, the mean and the standard deviation of each band, in its unit. Of a
    categorical one, the probability of each class (the mean over the samples of what the model
    gives it) and the entropy of these, in bits: 0 where the class is certain, log2 of the number of
    classes where nothing is known.

    Args:
        modality: what the samples are of.
        grid: of the samples.
        folder: where the file lies meanwhile; leaving the context removes it.
    """

    def __init__(self, modality: Modality, grid: Grid, folder: Path) -> None:
        self.modality, self._grid = modality, grid
        several = 1 if modality.is_categorical else 2
        count = len(modality.classes) if modality.is_categorical else len(modality.bands)
        self._shape = (several, count)
        self._path = folder / f".{modality.name}.{os.getpid()}.moments"
        self._stream = self._path.open("w+b")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._stream.close()
        finally:
            self._path.unlink(missing_ok=True)

    @property
    def band_names(self) -> tuple[str, ...]:
        if self.modality.is_categorical:
            return (*(f"probability of {c.name}" for c in self.modality.classes), "entropy")
        names = self.modality.band_names
        return (*(f"{n} mean" for n in names), *(f"{n} spread" for n in names))

    @property
    def units(self) -> tuple[str, ...]:
        if self.modality.is_categorical:
            return (*("1" for _ in self.modality.classes), "bit")
        return (self.modality.unit,) * len(self.band_names)

    def add(self, sample: int, row: int, values: NDArray[np.floating]) -> None:
        """Rows of sample 0, 1, …: [bands, rows, W], or probabilities [classes, rows, W]."""
        rows = values.shape[1]
        if sample == 0:
            found = np.zeros((*self._shape, *values.shape[1:]), np.float32)
            found[0] = values
        else:  # Welford: no difference of large sums
            found = self._read(row, rows)
            change = values - found[0]
            found[0] += change / (sample + 1)
            if not self.modality.is_categorical:
                found[1] += change * (values - found[0])
        self._stream.seek(self._offset(row))
        self._stream.write(np.ascontiguousarray(found.transpose(2, 0, 1, 3)).tobytes())

    def bands(self, row: int, rows: int, samples: int) -> NDArray[np.float32]:
        """Rows of the result, [bands, rows, W]."""
        found = self._read(row, rows)
        if self.modality.is_categorical:
            p = found[0]
            return np.concatenate([p, entropy_bits(p)[None]])
        spread = np.sqrt(found[1] / (samples - 1))
        return np.concatenate([found[0], spread])

    def writer(self, path: Path, tags: Mapping[str, str]) -> CogWriter:
        """Where the result goes."""
        return CogWriter(
            path,
            self._grid,
            self.band_names,
            dtype="float32",
            nodata=np.nan,
            units=self.units,
            tags={"MM_UNCERTAINTY_OF": self.modality.name, **tags},
        )

    def _offset(self, row: int) -> int:
        several, count = self._shape
        return row * several * count * self._grid.width * 4

    def _read(self, row: int, rows: int) -> NDArray[np.float32]:
        self._stream.seek(self._offset(row))
        size = self._offset(rows)
        found = np.frombuffer(self._stream.read(size), np.float32)
        return found.reshape(rows, *self._shape, self._grid.width).transpose(1, 2, 0, 3).copy()


def entropy_bits(probabilities: NDArray[np.floating]) -> NDArray[np.float32]:
    """Entropy over the first axis, in bits."""
    p = probabilities.astype(np.float32)
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    # A sum of probabilities that rounding left a little above 1 must not make it negative.
    return np.maximum(0, -(p * logs).sum(axis=0))  # type: ignore[no-any-return]
