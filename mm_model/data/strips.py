"""Rasters of any size, a strip of rows at a time: read onto another grid, and written as COG."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # what closing a file raises; it has no public name
from rasterio.errors import RasterioError
from rasterio.transform import Affine
from rasterio.windows import Window

from mm_model.api import SIDECAR
from mm_model.data import georeference, raster
from mm_model.data.files import check_room, write_atomically
from mm_model.errors import GeoreferenceError, RasterError
from mm_model.geo.grid import Grid

BLOCK_PX = 512  # side of the blocks of what is written
COPY_BLOCK_PX = 256  # side of the blocks of a copy
CACHE_MB = 128  # of decoded blocks that GDAL may hold
MOST_BELOW_PX = 1 << 23  # of a source that are read at once: 200 MB of three bands in float64
_LATTICE = 33  # points along a strip's side that say which part of a source lies below it
_KERNEL_PX = 3  # that resampling reaches beyond a pixel, in source pixels and more

_Window = tuple[int, int, int, int]  # first row and column, height, width


@contextmanager
def bounded_cache() -> Iterator[None]:
    """Blocks that GDAL keeps decoded stay few: it would take a share of the machine's memory."""
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MB):
        yield


def strips(height: int, rows: int = BLOCK_PX) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the strips that a height falls into, the last one may be lower."""
    for row in range(0, height, rows):
        yield row, min(rows, height - row)


def window_below(source: Grid, target: Grid) -> _Window | None:
    """The window (row, column, height, width) of a source that resampling onto a target reads.

    None where they do not overlap.
    """
    steps = np.linspace(0, 1, _LATTICE)
    points = [target.xy(v * target.height, u * target.width) for v in steps for u in steps]
    xs, ys = georeference.transform_xy(target.crs, source.crs, *zip(*points, strict=True))
    at = np.array([source.row_col(x, y) for x, y in zip(xs, ys, strict=True)])
    # What bends between the points of the lattice is less than a step between them.
    reach = _KERNEL_PX * max(1.0, georeference.source_pixels_per_target(source, target)) + 1
    low = np.floor(at.min(axis=0) - reach).astype(int).clip(0)
    high = np.minimum(np.ceil(at.max(axis=0) + reach).astype(int), source.shape)
    if (low >= high).any():
        return None
    return int(low[0]), int(low[1]), int(high[0] - low[0]), int(high[1] - low[1])


def windows_below(
    source: Grid, target: Grid, label: str, most_px: int = MOST_BELOW_PX
) -> Iterator[tuple[_Window, _Window]]:
    """Windows that a target falls into, each with the source's `window_below` it.

    The target is halved until no more than `most_px` pixels are below a piece: what resampling
    takes does not grow with a source that is finer than the target. Pieces below which there is
    nothing are left out. Nothing is read.

    Args:
        source: grid of the file.
        target: grid that it is resampled onto.
        label: what errors call the file.
        most_px: pixels of the source that may lie below a piece.

    Raises:
        GeoreferenceError: more lie below a single pixel; no overview would make its exact mean.
    """
    pieces = [(0, 0, target.height, target.width)]
    while pieces:
        row, col, height, width = piece = pieces.pop()
        below = window_below(source, target.window(*piece))
        if below is None:
            continue
        if below[2] * below[3] <= most_px:
            yield piece, below
        elif height > 1 and height >= width:
            half = height // 2
            pieces += [(row + half, col, height - half, width), (row, col, half, width)]
        elif width > 1:
            half = width // 2
            pieces += [(row, col + half, height, width - half), (row, col, height, half)]
        else:
            raise GeoreferenceError(
                f"layer {label}: its pixels that are read for a single pixel of the answer",
                got=f"{below[2]} x {below[3]}, with those around it",
                allowed=f"{most_px} in all",
                remedy="declare a finer grid, or make the file coarser with gdalwarp -tr, "
                "-r average (of classes -r mode)",
            )


def thumbnail(path: Path, longest_px: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Values [bands, h, w] and valid [h, w] of a GeoTIFF at no more than so many pixels a side.

    From its overviews where it has any; never enlarged.
    """
    with raster.quiet(), rasterio.open(path, driver="GTiff") as dataset:
        share = min(1.0, longest_px / max(dataset.shape))
        shape = tuple(max(1, round(side * share)) for side in dataset.shape)
        values = dataset.read(out_shape=(dataset.count, *shape))
        valid = (dataset.read_masks(out_shape=(dataset.count, *shape)) != 0).all(axis=0)
    if values.dtype.kind == "f":
        valid &= np.isfinite(values).all(axis=0)
    return values, valid


class CogWriter:
    """A raster that is written from top to bottom, then made a cloud-optimised GeoTIFF.

    Nothing stands at `path` before `finish`; leaving the context without it removes what was
    written. Where the disk is full, StorageError is raised. Overviews are made by averaging
    numbers, or by the most frequent class.

    Args:
        path: of the file.
        grid: written unchanged to the last digit.
        band_names: one a band.
        dtype: of all bands.
        nodata: what stands where nothing is known; None if everything is.
        units: one a band.
        colors: RGBA by code; they make it a map.
        tags: of the file.
        categorical: whether values are codes.
        sidecar: what GDAL reads beside it.
    """

    def __init__(
        self,
        path: Path,
        grid: Grid,
        band_names: Sequence[str],
        *,
        dtype: str,
        nodata: float | None,
        units: Sequence[str],
        colors: Mapping[int, tuple[int, ...]] = MappingProxyType({}),
        tags: Mapping[str, str] = MappingProxyType({}),
        categorical: bool = False,
        sidecar: bytes | None = None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._grid, self._categorical = path, grid, categorical
        self._sidecar = sidecar
        self._rows, self._held = 0, np.empty((len(band_names), 0, grid.width), dtype)
        self._raw = path.with_name(f".{path.name}.{os.getpid()}.raw")
        self._cog = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with _written(path, self._raw), raster.quiet():
            self._dataset: Any = rasterio.open(
                self._raw,
                "w",
                driver="GTiff",
                height=grid.height,
                width=grid.width,
                count=len(band_names),
                dtype=dtype,
                nodata=nodata,
                crs=grid.crs or None,
                transform=Affine(*grid.transform),
                tiled=True,
                blockxsize=BLOCK_PX,
                blockysize=BLOCK_PX,
                interleave="band",
                bigtiff="if_safer",
            )
        raster.say_colors(self._dataset, band_names)
        self._dataset.descriptions = tuple(band_names)
        self._dataset.units = tuple(units)
        if colors and len(band_names) == 1:
            self._dataset.write_colormap(1, {0: (0, 0, 0, 0), **colors})
        self._dataset.update_tags(**tags)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What was written is not wanted, or is in the other file already.
        with suppress(RasterioError, CPLE_BaseError):
            self._dataset.close()
        self._raw.unlink(missing_ok=True)
        self._cog.unlink(missing_ok=True)

    def write(self, values: NDArray[np.generic]) -> None:
        """The next rows, [bands, rows, W]."""
        self._held = np.concatenate([self._held, values], axis=1, dtype=self._held.dtype)
        whole = self._held.shape[1] // BLOCK_PX * BLOCK_PX
        if whole:
            self._flush(whole)

    def finish(self) -> Path:
        """Write the rest and make the file; all rows must have been written."""
        self._flush(self._held.shape[1])
        if self._rows != self._grid.height:
            raise RasterError(f"{self.path}: rows", got=self._rows, allowed=self._grid.height)
        with _written(self.path, self._raw):
            self._dataset.close()
        _check_closed(self._raw, self.path)
        # With its overviews it takes less than half as much again.
        with _written(self.path, self._cog, self._raw.stat().st_size * 3 // 2):
            rasterio.shutil.copy(
                self._raw,
                self._cog,
                driver="COG",
                compress="deflate",
                predictor="no" if self._categorical else "yes",
                blocksize=BLOCK_PX,
                overview_resampling="mode" if self._categorical else "average",
                bigtiff="if_safer",
            )
        _check_closed(self._cog, self.path)
        if self._sidecar is not None:
            write_atomically(self.path.with_name(self.path.name + SIDECAR), self._sidecar)
        self._cog.replace(self.path)
        return self.path

    def _flush(self, rows: int) -> None:
        if rows:
            window = Window(0, self._rows, self._grid.width, rows)
            with _written(self.path, self._raw):
                self._dataset.write(self._held[:, :rows], window=window)
            self._held, self._rows = self._held[:, rows:], self._rows + rows


@contextmanager
def _written(path: Path, file: Path, more_bytes: int = 2**20) -> Iterator[None]:
    """What goes wrong while a file is written for a path is a StorageError, or a RasterError."""
    try:
        yield
    except (RasterioError, CPLE_BaseError) as error:
        check_room(file, path.name, more_bytes)
        raise RasterError(
            f"{path} cannot be written", got=" ".join(str(error.__cause__ or error).split())[:200]
        ) from error


def _check_closed(file: Path, path: Path) -> None:
    """Raise StorageError if the disk is full: what GDAL writes while it closes a file is lost then,
    and it does not say so.
    """
    check_room(file, path.name)


def write_copy(
    path: Path,
    header: raster.RasterHeader,
    numbers: Sequence[int],
    rows: Iterable[tuple[int, NDArray[np.generic], NDArray[np.bool_]]],
) -> None:
    """Write decoded pixels as they are: what reads the copy reads what the original holds.

    Args:
        path: of the GeoTIFF; the mask is inside it, and no tags but those of an offset.
        header: of the original.
        numbers: of the bands that are copied, from 1.
        rows: from top to bottom: first row, values [bands, rows, W], valid [rows, W].

    Raises:
        StorageError: there is no room for it.
        RasterError: it cannot be written.
    """
    grid, picked = header.grid, [number - 1 for number in numbers]
    options = {"GDAL_TIFF_INTERNAL_MASK": True, "GDAL_CACHEMAX": CACHE_MB}
    with (
        _written(path, path),
        raster.quiet(),
        rasterio.Env(**options),
        rasterio.open(
            path,
            "w",
            driver="GTiff",
            height=grid.height,
            width=grid.width,
            count=len(picked),
            dtype=header.dtype,
            crs=grid.crs or None,
            transform=Affine(*grid.transform),
            tiled=True,
            blockxsize=COPY_BLOCK_PX,
            blockysize=COPY_BLOCK_PX,
            interleave="band",
            compress="deflate",
            zlevel=1,
            bigtiff="if_safer",
        ) as copy,
    ):
        copy.descriptions = tuple(header.band_names[k] or header.colors[k] for k in picked)
        copy.units = tuple(header.units[k] for k in picked)
        copy.scales = tuple(header.scales[k] for k in picked)
        copy.offsets = tuple(header.offsets[k] for k in picked)
        copy.update_tags(**{k: header.tags[k] for k in raster.OFFSET_TAGS if k in header.tags})
        for row, values, valid in rows:
            window = Window(0, row, grid.width, values.shape[1])
            copy.write(values, window=window)
            copy.write_mask(valid, window=window)
    _check_closed(path, path)
