"""Observed files of any size on one grid, a strip of rows at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mm_model.api import OneOrMore, each
from mm_model.codec import Codec
from mm_model.data import raster
from mm_model.data.align import resample
from mm_model.data.strips import BLOCK_PX, MOST_BELOW_PX, strips, windows_below
from mm_model.errors import LayerError
from mm_model.generative.windows import Frame
from mm_model.geo.grid import Grid
from mm_model.modalities import LEVEL_PX, Modality
from mm_model.scene import Scene
from mm_model.serving.bands import estimated_bands, missing_bands, numbers_of
from mm_model.serving.generator import Generator
from mm_model.serving.layers import (
    check_offset,
    check_overlap,
    check_values,
    elsewhere,
    in_units,
)
from mm_model.serving.overlay import Pixels, labelled, laid_over, places, put, shared_part
from mm_model.serving.uploads import check_header

_MEDIAN_PIXELS = 4096  # of a strip that tell the median
_READ_ROWS = 256  # half a block of a COG; whole ones would take twice the memory
_ENCODED_ROWS = 128  # that are encoded together
_HALO = LEVEL_PX // 2 * 2  # rows that the level, and the level's mean, of a pixel reach


@dataclass(frozen=True)
class _File:
    """One of the files of a modality.

    Attributes:
        label: what errors call it.
        place: row and column of its first pixel on the grid; None: it is resampled.
    """

    label: str
    path: Path
    modality: Modality
    header: raster.RasterHeader
    place: tuple[int, int] | None

    @property
    def bands(self) -> Sequence[str]:
        """Names of the modality's bands that it has."""
        return tuple(n for n in self.modality.band_names if n not in self.missing)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of those that it lacks."""
        return missing_bands(self.header, self.modality)


class ObservedFiles:
    """Layers as people have them, each with its own CRS, resolution, extent and holes.

    Attributes:
        grid: of the finest layer, or of the one that was named.

    Args:
        files: modality name → GeoTIFF, or several in turn (see `overlay`); one or more, and any
            number of pixels.
        generator: knows the modalities, and the limits.
        onto: the grid, or the layer whose grid it shall be; None: the finest.

    Raises:
        RasterError, LayerError: a file cannot be read, or holds not what its modality is.
        GeoreferenceError: layers do not overlap.
    """

    def __init__(
        self,
        files: Mapping[str, OneOrMore[Path]],
        generator: Generator,
        onto: str | Grid | None = None,
    ) -> None:
        given = each(files)
        # The model's order, not the caller's: the order of modalities decides nothing.
        paths = {n: given[n] for n in generator.modalities if n in given}
        headers = {n: [raster.read_header(path) for path in of_it] for n, of_it in paths.items()}
        for name, of_it in headers.items():
            for path, header in zip(paths[name], of_it, strict=True):
                check_header(header, generator.modality(name), str(path), generator)
        grids = {n: [header.grid for header in of_it] for n, of_it in headers.items()}
        if isinstance(onto, str):
            self.grid: Grid = generator.check_grids({onto: grids[onto]})
        else:
            self.grid = generator.check_grids(grids, onto)
        self._layers: dict[str, list[_File]] = {}
        for name, of_it in headers.items():
            at = places(name, grids[name], self.grid)
            one_by_one = zip(labelled(name, paths[name]), of_it, at, strict=True)
            self._layers[name] = [
                _File(label, path, generator.modality(name), header, place)
                for (label, path), header, place in one_by_one
            ]
        self._generator = generator
        self._kept: OrderedDict[int, dict[str, Pixels]] = OrderedDict()
        self._whole: set[str] = set()  # labels of files that know all of their own pixels
        every = [file for of_it in self._layers.values() for file in of_it]
        for file in every:
            check_overlap(file.label, file.header.grid, self.grid)
            self._plan(file)
        for file in every:
            self._survey(file)
        for file in every:
            grid = file.header.grid
            if grid != self.grid and not any(valid.any() for _, valid in self._strips(file)):
                raise elsewhere(file.label, grid, self.grid)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._layers)

    def missing(self, name: str) -> tuple[str, ...]:
        """Bands that a file of a layer lacks."""
        return tuple(dict.fromkeys(b for file in self._layers[name] for b in file.missing))

    @property
    def estimated(self) -> tuple[str, ...]:
        """The same of all layers, as `sar:VH`."""
        return estimated_bands({name: self.missing(name) for name in self._layers})

    def has_hole(self, name: str) -> bool:
        """Whether a layer lacks a pixel of the grid."""
        files = self._layers[name]
        if len(files) == 1 and files[0].header.grid == self.grid:  # the survey has seen it
            return files[0].label not in self._whole
        return any(
            not self._layer(name, row, rows)[1].all() for row, rows in strips(self.grid.height)
        )

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
            for name in self._layers
        }

    def _chunk(self, number: int) -> dict[str, Pixels]:
        """Rows that are read together; the last ones stay, for those who follow one another."""
        if number not in self._kept:
            row = number * _READ_ROWS
            rows = min(_READ_ROWS, self.grid.height - row)
            self._kept[number] = {name: self._layer(name, row, rows) for name in self._layers}
            while len(self._kept) > 3:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def _layer(self, name: str, row: int, rows: int) -> Pixels:
        return laid_over(self._read(file, row, rows) for file in self._layers[name])

    def _read(self, file: _File, row: int, rows: int) -> Pixels:
        """A file on rows of the grid."""
        source, width = file.header.grid, self.grid.width
        strip = self.grid.window(row, 0, rows, width)
        if file.place is not None:
            shared = shared_part(file.place, source, row, rows, width)
            if shared is None:
                return _nothing(file.modality, rows, width)
            down, across = shared
            size = down.stop - down.start, across.stop - across.start
            begin = down.start - file.place[0], across.start - file.place[1]
            below = slice(down.start - row, down.stop - row)
            return put(self._whole_pixels(file, (*begin, *size)), below, across, rows, width)
        values, valid = _nothing(file.modality, rows, width)
        for piece, window in windows_below(source, strip, file.label):
            top, left, height, wide = piece
            inside = slice(top, top + height), slice(left, left + wide)
            values[:, *inside], valid[inside] = resample(
                *self._whole_pixels(file, window),
                source.window(*window),
                strip.window(*piece),
                file.modality,
                exact=True,
            )
        return values, valid

    def _whole_pixels(self, file: _File, window: tuple[int, int, int, int]) -> Pixels:
        """A window of a file on its own grid, with all bands."""
        values, valid = _pixels(file, window)
        return self._generator.completed(file.modality.name, values, file.missing), valid

    def _plan(self, file: _File) -> None:
        """Refuse a file that is too fine for the grid by its header, before a pixel is read."""
        source = file.header.grid
        if file.place is None and source.height * source.width > MOST_BELOW_PX:
            for row, rows in strips(self.grid.height):
                strip = self.grid.window(row, 0, rows, self.grid.width)
                for _ in windows_below(source, strip, file.label):
                    continue

    def _survey(self, file: _File) -> None:
        """Read a file once from end to end: before hours of work, not in the middle of them."""
        modality, grid = file.modality, file.header.grid
        seen, whole = [], True
        most_rows = max(1, min(BLOCK_PX, MOST_BELOW_PX // grid.width))
        for row, rows in strips(grid.height, most_rows):
            values, valid = _pixels(file, (row, 0, rows, grid.width))
            whole = whole and bool(valid.all())
            known = values[:, valid]
            if not known.size:
                continue
            if modality.is_categorical:
                seen.append(np.unique(known)[None])
            else:
                # A copy: a view would keep all of the strip.
                some = known[:, :: -(-known.shape[1] // _MEDIAN_PIXELS)].copy()
                ends = np.stack([known.min(axis=1), known.max(axis=1)], axis=1)
                seen += [some, ends]
        if not seen:
            raise LayerError(
                f"layer {file.label}",
                got="no valid pixel",
                allowed="one or more",
                remedy="leave it out",
            )
        known = np.concatenate(seen, axis=1)
        check_values(file.label, modality, known, file.bands)
        check_offset(file.label, modality, file.header, known, file.bands)
        if whole:
            self._whole.add(file.label)

    def _strips(self, file: _File) -> Iterator[Pixels]:
        """A file on the grid."""
        for row, rows in strips(self.grid.height):
            yield self._read(file, row, rows)


def _pixels(file: _File, window: tuple[int, int, int, int]) -> Pixels:
    """A window of a file on its own grid, with the bands that it has."""
    numbers = numbers_of(file.header, file.modality)
    return in_units(raster.read_raster(file.path, bands=numbers, window=window), file.modality)


def _nothing(modality: Modality, rows: int, width: int) -> Pixels:
    dtype = np.dtype(modality.dtype)
    nothing = np.zeros((len(modality.bands), rows, width), dtype)
    return nothing, np.zeros((rows, width), np.bool_)


class MadeFiles:
    """Layers that were written in physical units on one grid, as though they were observed.

    Args:
        files: modality name → GeoTIFF.
        generator: knows the modalities.
        observed: what is really observed, on the same grid.
        kept: layers of it that are there, too.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        generator: Generator,
        observed: ObservedFiles | None = None,
        kept: Sequence[str] = (),
    ) -> None:
        self._files = {generator.modality(n): files[n] for n in generator.modalities if n in files}
        self._observed, self._kept = observed, kept
        self.names = tuple(n for n in generator.modalities if n in files or n in kept)

    def read(self, row: int, rows: int) -> dict[str, Pixels]:
        """All layers on rows of the grid."""
        found = {}
        if self._observed is not None and self._kept:
            there = self._observed.read(row, rows)
            found = {name: there[name] for name in self._kept}
        for modality, path in self._files.items():
            width = raster.read_header(path).grid.width
            part = raster.read_raster(path, window=(row, 0, rows, width))
            found[modality.name] = in_units(part, modality)
        return {name: found[name] for name in self.names}


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
