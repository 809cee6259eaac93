"""GeoTIFF files, and the warping of images between grids. georeference, remote and strips know
rasterio, too.

The driver is always GTiff. Left to choose, GDAL would take a VRT for a raster and read any file of
this machine that it names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # what PROJ's complaints are; it has no public name
from rasterio.abc import FileContainer
from rasterio.enums import ColorInterp
from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile
from rasterio.transform import Affine
from rasterio.warp import Resampling, reproject
from rasterio.windows import Window

from mm_model.data.files import write_atomically
from mm_model.data.georeference import crs_of, crs_to_string, same_crs, source_pixels_per_target
from mm_model.data.storage import gdal_options, stat
from mm_model.errors import GeoreferenceError, RasterError
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality


class OpenFile(FileContainer):  # type: ignore[misc]
    """A file that is open already, as GDAL takes it.

    Args:
        view: gives one more view of it: GDAL takes several at once, and closes them.
        size_bytes: of the file.
    """

    def __init__(self, view: Callable[[], BinaryIO], size_bytes: int) -> None:
        self._view, self._size = view, size_bytes

    def open(self, path: str, mode: str = "r", **_: object) -> BinaryIO:
        if not self.isfile(path):
            raise FileNotFoundError(path)
        return self._view()

    def isfile(self, path: str) -> bool:
        return path.endswith(_OPEN_NAME)

    def isdir(self, path: str) -> bool:
        return False

    def ls(self, path: str) -> list[str]:
        return []

    def mtime(self, path: str) -> int:
        return 0

    def rm(self, path: str) -> None:
        raise OSError(f"{path} is only read")

    def size(self, path: str) -> int:
        return self._size


_OPEN_NAME = "/open/upload"

OFFSET_TAGS = ("PROCESSING_BASELINE", "BOA_ADD_OFFSET")
"""Tags that tell of the offset of Sentinel-2's numbers; GDAL's driver for its products writes the
first.
"""

_ALPHA = ColorInterp.alpha.name
_COLORS = (ColorInterp.red.name, ColorInterp.green.name, ColorInterp.blue.name, _ALPHA)

# A target pixel that spans more source pixels than this is a summary of them, not a sample.
_COARSENING = 1.25


@dataclass(frozen=True)
class RasterHeader:
    """What a GeoTIFF says of itself; no pixel is decoded to know it.

    Attributes:
        grid: `grid.crs` is "" and the transform the identity where the file lies nowhere.
        dtype: NumPy name of the type on disk.
        nodata: the value that stands for "nothing known", if one is declared.
        band_names, units: one a band, "" where the file says nothing.
        colors: one a band: red, green, blue or alpha if it is declared to be that, else "".
        scales, offsets: one a band, as the file declares them (1 and 0 where it does not).
        tags: the file's own tags.
        block_shape: rows and columns of the pieces that are decoded as a whole.
    """

    grid: Grid
    dtype: str
    nodata: float | None
    band_names: tuple[str, ...]
    colors: tuple[str, ...]
    units: tuple[str, ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    tags: Mapping[str, str]
    block_shape: tuple[int, int]

    @property
    def image_bands(self) -> tuple[int, ...]:
        """Numbers, from 1, of the bands that are no mask."""
        return tuple(k for k, color in enumerate(self.colors, 1) if color != _ALPHA)

    @property
    def bands(self) -> int:
        """How many of them there are."""
        return len(self.image_bands)


@dataclass(frozen=True)
class Raster:
    """Pixels of a GeoTIFF as they are on disk, and which of them mean something.

    Attributes:
        values: [bands, H, W] of the bands and window that were asked for, bands in that order.
        valid: bool [H, W]: known (no nodata, no mask, finite) in each of these bands.
        scales, offsets: of these bands, as the file declares them.
        header: what the file says of itself; it lists all its bands.
    """

    values: NDArray[Any]
    valid: NDArray[np.bool_]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    header: RasterHeader

    @property
    def grid(self) -> Grid:
        return self.header.grid

    @property
    def band_names(self) -> tuple[str, ...]:
        return self.header.band_names

    @property
    def units(self) -> tuple[str, ...]:
        return self.header.units

    @property
    def tags(self) -> Mapping[str, str]:
        return self.header.tags


def read_header(file: Path | bytes | OpenFile, name: str | None = None) -> RasterHeader:
    """A GeoTIFF's header; `name` is what errors call a file that is not a path.

    Raises:
        RasterError: the file is missing, empty, or no GeoTIFF; the message names it.
    """
    with _open(file, name) as dataset:
        return header_of(dataset, _label(file, name))


def read_raster(
    file: Path | bytes | OpenFile,
    name: str | None = None,
    *,
    bands: Sequence[int | str] | None = None,
    window: tuple[int, int, int, int] | None = None,
) -> Raster:
    """Decode a GeoTIFF, or some of its bands (numbers from 1, or band descriptions), or a window
    (first row, first column, height, width) of it.

    Raises:
        RasterError: the file is missing, empty, truncated, no GeoTIFF, has pixels that are no real
            numbers, or lacks a band; the message names it.
    """
    label = _label(file, name)
    with _open(file, name) as dataset:
        header = header_of(dataset, label)
        if np.dtype(header.dtype).kind not in "iuf":
            raise RasterError(
                f"{label}: pixel type", got=header.dtype, allowed="integers or floats"
            )
        numbers = band_numbers(header, bands, label)
        part = window and Window(window[1], window[0], window[3], window[2])
        values = dataset.read(numbers, window=part)
        valid = (dataset.read_masks(numbers, window=part) != 0).all(axis=0)
        # GDAL takes opacity for a mask in some types and numbers of bands only.
        for number in set(range(1, dataset.count + 1)) - {*header.image_bands}:
            valid &= dataset.read(number, window=part) > 0
    if values.dtype.kind == "f":
        valid &= np.isfinite(values).all(axis=0)
    scales = tuple(header.scales[n - 1] for n in numbers)
    offsets = tuple(header.offsets[n - 1] for n in numbers)
    return Raster(values, valid, scales, offsets, header)


def write_geotiff(
    path: Path | None,
    values: NDArray[np.generic],
    valid: NDArray[np.bool_],
    grid: Grid,
    modality: Modality,
    *,
    tags: Mapping[str, str] | None = None,
) -> bytes | None:
    """Write a layer as GeoTIFF: to `path`, or to the bytes that are returned where it is None.

    Invalid pixels become nodata (NaN, or class 0). Classes carry a colour table and a CLASSES tag.

    Args:
        path: the file, replaced as a whole; or None.
        values: [bands, H, W] in physical units, or class codes.
        valid: bool [H, W].
        grid: written unchanged to the last digit.
        modality: gives type, nodata, band names, units and colours.
        tags: provenance, kept as tags of the file.
    """
    if values.shape != (len(modality.bands), *grid.shape) or valid.shape != grid.shape:
        raise RasterError(
            f"{modality.name} to be written",
            got=f"values {values.shape}, valid {valid.shape}",
            allowed=f"{(len(modality.bands), *grid.shape)} and {grid.shape}",
        )
    filled = np.where(valid, values, modality.nodata).astype(modality.dtype)
    content = encode_geotiff(
        filled,
        grid,
        modality.band_names,
        nodata=modality.nodata,
        unit=modality.unit,
        colors=modality.color_table,
        tags={**modality.file_tags, **(tags or {})},
    )
    if path is None:
        return content
    write_atomically(path, content)
    return None


def say_colors(dataset: Any, band_names: Sequence[str]) -> None:
    """Which bands are red, green and blue, where all three are there; before pixels are written."""
    if {"red", "green", "blue"} <= set(band_names):
        kinds = {kind.name: kind for kind in (ColorInterp.red, ColorInterp.green, ColorInterp.blue)}
        dataset.colorinterp = [kinds.get(name, ColorInterp.undefined) for name in band_names]


def encode_geotiff(
    values: NDArray[np.generic],
    grid: Grid,
    band_names: Sequence[str],
    *,
    nodata: float,
    tags: Mapping[str, str],
    unit: str = "",
    colors: Mapping[int, tuple[int, ...]] = MappingProxyType({}),
) -> bytes:
    """Bands [bands, H, W] as the bytes of a GeoTIFF; `colors` (RGBA by code) make it a map."""
    profile = {
        "driver": "GTiff",
        "height": grid.height,
        "width": grid.width,
        "count": len(band_names),
        "dtype": values.dtype.name,
        "nodata": nodata,
        "crs": crs_of(grid.crs) if grid.crs else None,
        "transform": Affine(*grid.transform),
        "compress": "deflate",
        "zlevel": 1,  # half of the time to write a patch of colour; 6 makes it 1 % smaller
        "predictor": 3 if values.dtype.kind == "f" else 1,
    }
    with quiet(), MemoryFile() as memory:
        with memory.open(**profile) as dataset:
            say_colors(dataset, band_names)
            dataset.write(values)
            dataset.descriptions = tuple(band_names)
            dataset.units = [unit] * len(band_names)
            if colors:
                dataset.write_colormap(1, {0: (0, 0, 0, 0), **colors})
            dataset.update_tags(**tags)
        return bytes(memory.getbuffer())


def warp(
    values: NDArray[np.generic],
    valid: NDArray[np.bool_],
    source_grid: Grid,
    target_grid: Grid,
    *,
    categorical: bool,
    exact: bool = False,
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """Bring an image onto another grid, resampled by what its values are.

    Classes keep their codes (nearest; the most frequent one where a target pixel spans several).
    Numbers are interpolated bilinearly, or averaged where a target pixel spans several. A target
    pixel is valid if its centre lies in a valid source pixel, or, where it spans several, if at
    least half of what it spans is valid. Warp a scene once and slice the result, or be `exact`:
    GDAL's approximations make the warp of a window differ from the window of a warp.

    Args:
        values: [bands, H, W]; class codes from 1 to 255 if categorical.
        valid: bool [H, W].
        source_grid: the grid of `values`.
        target_grid: the grid wanted.
        categorical: whether values are class codes.
        exact: without approximations of up to an eighth of a source pixel, which take less time.

    Returns:
        Values [bands, h, w] (uint8 or float32; 0 or NaN where invalid) and valid bool [h, w].
    """
    dtype, nodata = ("uint8", 0) if categorical else ("float32", np.nan)
    filled = np.where(valid, values, nodata).astype(dtype)
    if source_grid == target_grid:
        return filled, valid.copy()
    several = source_pixels_per_target(source_grid, target_grid) > _COARSENING
    method = Resampling.average if several else Resampling.bilinear
    if categorical:
        method = Resampling.mode if several else Resampling.nearest
    warped = _reproject(filled, source_grid, target_grid, method, nodata, exact)
    method = Resampling.average if several else Resampling.nearest
    counted = valid[None].astype("float32")
    share = _reproject(counted, source_grid, target_grid, method, np.nan, exact)[0]
    known = (warped != 0).all(axis=0) if categorical else np.isfinite(warped).all(axis=0)
    new_valid = known & (np.nan_to_num(share) >= 0.5)
    return np.where(new_valid, warped, np.asarray(nodata, dtype)), new_valid


def _reproject(
    values: NDArray[Any],
    source: Grid,
    target: Grid,
    method: Resampling,
    nodata: float,
    exact: bool,
) -> NDArray[Any]:
    out = np.full((values.shape[0], *target.shape), nodata, dtype=values.dtype)
    same = same_crs(source.crs, target.crs)
    # Without reference system, both grids lie on one plane: any projected one will do.
    source_crs = crs_of(source.crs or "EPSG:3857")
    try:
        reproject(
            values,
            out,
            src_transform=Affine(*source.transform),
            src_crs=source_crs,
            src_nodata=nodata,
            dst_transform=Affine(*target.transform),
            dst_crs=source_crs if same else crs_of(target.crs),
            resampling=method,
            tolerance=0 if exact else 0.125,
        )
    except (CPLE_BaseError, RasterioError) as error:
        cause = " ".join(str(error).split())[:200]
        raise GeoreferenceError("warping of an image", got=cause) from error
    return out


@contextmanager
def quiet() -> Iterator[None]:
    """An image that lies nowhere is no fault here: `Grid.crs` says so. Nor is one that has nodata
    and opacity: what either hides is not known.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        warnings.simplefilter("ignore", NodataShadowWarning)
        yield


def _label(file: Path | bytes | OpenFile, name: str | None) -> str:
    return name or (str(file) if isinstance(file, Path) else "upload")


def _size_of(file: bytes | OpenFile) -> int:
    return len(file) if isinstance(file, bytes) else file.size(_OPEN_NAME)


@contextmanager
def _open(file: Path | bytes | OpenFile, name: str | None) -> Iterator[Any]:
    """An open dataset; whatever goes wrong with it until it is closed is a RasterError."""
    label = _label(file, name)
    try:
        size = stat(file)[0] if isinstance(file, Path) else _size_of(file)
    except OSError:
        raise RasterError(f"{label} does not exist", remedy="mend the path") from None
    if size == 0:  # rasterio would open an empty memory file for writing
        raise RasterError(f"{label} is empty", remedy="fetch or send it again")
    try:
        with quiet():
            if isinstance(file, Path):
                options = gdal_options(file)
                with rasterio.Env(**options), rasterio.open(file, driver="GTiff") as dataset:
                    yield dataset
            elif isinstance(file, bytes):
                with MemoryFile(file) as memory, memory.open(driver="GTiff") as dataset:
                    yield dataset
            else:
                with rasterio.open(_OPEN_NAME, driver="GTiff", opener=file) as dataset:
                    yield dataset
    except RasterioError as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise RasterError(
            f"{label} cannot be read as GeoTIFF",
            got=cause[:200],
            allowed="a whole GeoTIFF file",
            remedy="mend or remove it",
        ) from error


def header_of(dataset: Any, label: str) -> RasterHeader:
    """What an open dataset says of itself; `label` is what errors call it.

    Raises:
        GeoreferenceError: it lies somewhere, but no transform says where.
    """
    points = len(dataset.gcps[0])
    if dataset.transform == Affine.identity() and (points or dataset.rpcs):
        raise GeoreferenceError(
            f"{label}: place of its pixels",
            got=f"{points} ground control points" if points else "a camera model (RPC)",
            allowed="an affine transform in the file",
            remedy="bring it onto a grid with gdalwarp -t_srs",
        )
    return RasterHeader(
        Grid(
            crs_to_string(dataset.crs),
            tuple(dataset.transform)[:6],
            dataset.height,
            dataset.width,
        ),
        dataset.dtypes[0],
        dataset.nodata,
        tuple(d or "" for d in dataset.descriptions),
        tuple(c.name if c.name in _COLORS else "" for c in dataset.colorinterp),
        tuple(u or "" for u in dataset.units),
        tuple(dataset.scales),
        tuple(dataset.offsets),
        dataset.tags(),
        dataset.block_shapes[0],
    )


def band_numbers(header: RasterHeader, bands: Sequence[int | str] | None, label: str) -> list[int]:
    """Numbers from 1 of the bands asked for; raises RasterError for one that is not there."""
    if bands is None:
        return list(header.image_bands)
    numbers = []
    for band in bands:
        if isinstance(band, int) and 1 <= band <= len(header.band_names):
            numbers.append(band)
        elif isinstance(band, str) and header.band_names.count(band) == 1:
            numbers.append(header.band_names.index(band) + 1)
        else:
            raise RasterError(
                f"{label}: band",
                got=repr(band),
                allowed=f"1 to {len(header.band_names)}, or one of {list(header.band_names)}",
            )
    return numbers
