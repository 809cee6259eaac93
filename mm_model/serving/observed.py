"""Observed files of any size on one grid, a strip of rows at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm_model.codec import Codec
from mm_model.data import raster
from mm_model.data.align import resample
from mm_model.data.strips import strips, window_below
from mm_model.errors import LayerError
from mm_model.generative.windows import Frame
from mm_model.geo.grid import Grid
from mm_model.modalities import LEVEL_PX
from mm_model.scene import Scene
from mm_model.serving.generator import Generator
from mm_model.serving.layers import (
    bands_of,
    check_offset,
    check_overlap,
    check_values,
    elsewhere,
    in_units,
)
from mm_model.serving.uploads import check_header

Pixels = tuple[NDArray[np.generic], NDArray[np.bool_]]
"""Values [bands, rows, W] in physical units, or class codes, and valid [rows, W]."""

_MEDIAN_PIXELS = 4096  # of a strip that tell the median
_READ_ROWS = 256  # half a block of a COG; whole ones would take twice the memory
_ENCODED_ROWS = 128  # that are encoded together
_HALO = LEVEL_PX // 2 * 2  # rows that the level, and the level's mean, of a pixel reach


class ObservedFiles:
    """Layers as people have them, each with its own CRS, resolution, extent and holes.

    Attributes:
        grid: of the finest layer, or of the one that was named.
        has_holes: names of layers that lack a pixel of their own grid.

    Args:
        files: modality name → GeoTIFF; one or more, and any number of pixels.
        generator: knows the modalities, and the limits.
        onto: the grid, or the layer whose grid it shall be; None: the finest.

    Raises:
        RasterError, LayerError: a file cannot be read, or holds not what its modality is.
        GeoreferenceError: layers do not overlap.
    """

    def __init__(
        self, files: Mapping[str, Path], generator: Generator, onto: str | Grid | None = None
    ) -> None:
        # The model's order, not the caller's: the order of layers decides nothing.
        self._files = {n: files[n] for n in generator.modalities if n in files}
        self._modalities = {n: generator.modality(n) for n in self._files}
        self._headers = {n: raster.read_header(path) for n, path in self._files.items()}
        for name, header in self._headers.items():
            check_header(header, self._modalities[name], str(self._files[name]), generator)
        grids = {n: header.grid for n, header in self._headers.items()}
        if isinstance(onto, str):
            self.grid: Grid = generator.check_grids({onto: grids[onto]})
        else:
            self.grid = generator.check_grids(grids, onto)
        self._kept: OrderedDict[int, dict[str, Pixels]] = OrderedDict()
        self.has_holes: set[str] = set()
        for name, grid in grids.items():
            check_overlap(name, grid, self.grid)
            self._survey(name)
        for name, grid in grids.items():
            if grid != self.grid and not any(valid.any() for valid in self._validity(name)):
                raise elsewhere(name, grid, self.grid)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def read(self, row: int, rows: int) -> dict[str, Pixels]:
        """All layers on rows of the grid."""
        numbers = range(row // _READ_ROWS, -(-(row + rows) // _READ_ROWS))
        chunks = [self._chunk(number) for number in numbers]
        inner = slice(row - numbers[0] * _READ_ROWS, row + rows - numbers[0] * _READ_ROWS)
        return {
            name: (
                np.concatenate([chunk[name][0] for chunk in chunks], axis=1)[:, inner],
                np.concatenate([chunk[name][1] for chunk in chunks])[inner],
            )
            for name in self._files
        }

    def _chunk(self, number: int) -> dict[str, Pixels]:
        """Rows that are read together; the last ones stay, for those who follow one another."""
        if number not in self._kept:
            row = number * _READ_ROWS
            rows = min(_READ_ROWS, self.grid.height - row)
            self._kept[number] = {name: self._read(name, row, rows) for name in self._files}
            while len(self._kept) > 3:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def _read(self, name: str, row: int, rows: int) -> Pixels:
        modality, source = self._modalities[name], self._headers[name].grid
        strip = self.grid.window(row, 0, rows, self.grid.width)
        same = source == self.grid
        below = (row, 0, rows, source.width) if same else window_below(source, strip)
        if below is None:
            dtype = np.dtype(modality.dtype)
            nothing = np.zeros((len(modality.bands), rows, self.grid.width), dtype)
            return nothing, np.zeros((rows, self.grid.width), np.bool_)
        values, valid = self._pixels(name, below)
        if same:
            return values, valid
        return resample(values, valid, source.window(*below), strip, modality, exact=True)

    def _pixels(self, name: str, window: tuple[int, int, int, int]) -> Pixels:
        """A window of a layer on its own grid."""
        modality, path = self._modalities[name], self._files[name]
        bands = bands_of(self._headers[name], modality)
        return in_units(raster.read_raster(path, bands=bands, window=window), modality)

    def _survey(self, name: str) -> None:
        """Read a file once from end to end: before hours of work, not in the middle of them."""
        modality, grid = self._modalities[name], self._headers[name].grid
        seen = []
        for row, rows in strips(grid.height):
            values, valid = self._pixels(name, (row, 0, rows, grid.width))
            if not valid.all():
                self.has_holes.add(name)
            known = values[:, valid]
            if not known.size:
                continue
            if modality.is_categorical:
                seen.append(np.unique(known)[None])
            else:
                some = known[:, :: -(-known.shape[1] // _MEDIAN_PIXELS)]
                ends = np.stack([known.min(axis=1), known.max(axis=1)], axis=1)
                seen += [some, ends]
        if not seen:
            raise LayerError(
                f"layer {name}", got="no valid pixel", allowed="one or more", remedy="leave it out"
            )
        known = np.concatenate(seen, axis=1)
        check_values(modality, known)
        check_offset(modality, self._headers[name], known)

    def _validity(self, name: str) -> Iterator[NDArray[np.bool_]]:
        """A layer's masks on strips of the grid."""
        for row, rows in strips(self.grid.height):
            yield self._read(name, row, rows)[1]


class MadeFiles:
    """Layers that were written in physical units on one grid, as though they were observed.

    Args:
        files: modality name → GeoTIFF.
        generator: knows the modalities.
    """

    def __init__(self, files: Mapping[str, Path], generator: Generator) -> None:
        self._files = {generator.modality(n): files[n] for n in generator.modalities if n in files}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(modality.name for modality in self._files)

    def read(self, row: int, rows: int) -> dict[str, Pixels]:
        """All layers on rows of the grid."""
        found = {}
        for modality, path in self._files.items():
            width = raster.read_header(path).grid.width
            part = raster.read_raster(path, window=(row, 0, rows, width))
            found[modality.name] = in_units(part, modality)
        return found


class ModelRows:
    """Rows of observed files in model space, on the canvas of a frame; see `generative.rows`.

    Args:
        files: what is observed; None: nothing.
        codec: of the model.
        frame: of the files' grid.
    """

    def __init__(self, files: ObservedFiles | MadeFiles | None, codec: Codec, frame: Frame) -> None:
        self._files, self._codec, self._frame = files, codec, frame
        names = [] if files is None else files.names
        named = [codec.slices[n] for n in names]
        self._channels = [c for part in named for c in range(codec.channels)[part]]
        self._kept: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, row: int, rows: int) -> tuple[Tensor, Tensor]:
        """X [C, rows, W], 0 where nothing is known, and mask, bool [M, rows, W], of the canvas."""
        wide = self._frame.windows.width
        x = torch.zeros(self._codec.channels, rows, wide)
        mask = torch.zeros(len(self._codec.modalities), rows, wide, dtype=torch.bool)
        top, left = self._frame.corner
        first, last = max(0, row - top), min(self._frame.height, row + rows - top)
        if self._files is None:
            return x, mask
        across = slice(left, left + self._frame.width)
        for number in range(first // _ENCODED_ROWS, -(-last // _ENCODED_ROWS)):
            start = number * _ENCODED_ROWS
            some, known = self._encoded(number)
            low, high = max(first, start), min(last, start + some.shape[1])
            down = slice(low + top - row, high + top - row)
            x[self._channels, down, across] = some[:, low - start : high - start]
            mask[:, down, across] = known[:, low - start : high - start]
        return x, mask

    def _encoded(self, number: int) -> tuple[Tensor, Tensor]:
        """The channels that are observed, and the mask, of one strip; the last two are kept."""
        if number not in self._kept:
            self._kept[number] = self._encode(number * _ENCODED_ROWS)
            while len(self._kept) > 2:
                self._kept.popitem(last=False)
        return self._kept[number]

    def _encode(self, start: int) -> tuple[Tensor, Tensor]:
        assert self._files is not None
        height = self._frame.height
        low, high = max(0, start - _HALO), min(height, start + _ENCODED_ROWS + _HALO)
        inner = slice(start - low, min(height, start + _ENCODED_ROWS) - low)
        values, valid = {}, {}
        for name, (pixels, known) in self._files.read(low, high - low).items():
            values[name] = torch.from_numpy(pixels.astype(np.float32))[None]
            valid[name] = torch.from_numpy(known)[None, None]
        x, mask = self._codec.encode(Scene(values, valid))
        return x[0, self._channels, inner], mask[0, :, inner].clone()
