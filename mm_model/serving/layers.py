"""Observed layers: is their unit what it should be, and onto which grid do they go?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mm_model.data import georeference, raster
from mm_model.data.align import resample
from mm_model.errors import GeoreferenceError, LayerError
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality, Quantity

# A median says something about the unit only where enough pixels stand behind it.
_MEDIAN_NEEDS_PIXELS = 256
_RAISED_DN = 1000  # that no digital number falls below where an offset was added
_RAISED_SCALE = 1e-4
# Where the darkest pixels of visible bands lie if it was added and not taken away. Of 577 windows
# of 64 x 64 px of ten real sources 316 lay there in all three bands once it was added, and 16 as
# they are, all of one scene whose haze was not corrected.
_RAISED_DARKEST = (0.1, 0.14)
_VISIBLE_NM = 700
_RAISED_SINCE = "04.00"
_LATTICE = 17  # points a side
_COUNTABLE_PX = 2**53  # float64 knows no odd numbers beyond
_EARTH_RADIUS_M = 6_371_000.0


@dataclass(frozen=True)
class ObservedLayer:
    """One observed modality on a grid of its own.

    Attributes:
        values: [bands, H, W] in physical units, or class codes.
        valid: bool [H, W]; what an invalid pixel holds means nothing.
        estimated: bands that the file lacks; see `bands.complete_bands`.
    """

    values: NDArray[np.generic]
    valid: NDArray[np.bool_]
    grid: Grid
    estimated: tuple[str, ...] = ()


def in_units(
    found: raster.Raster, modality: Modality
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """Values and mask of a file's pixels: its scale and offset applied, class 0 not valid."""
    values, valid = found.values, found.valid
    scales, offsets = np.array(found.scales), np.array(found.offsets)
    if (scales != 1).any() or (offsets != 0).any():
        with np.errstate(over="ignore", invalid="ignore"):  # `check_values` refuses what comes out
            values = values * scales[:, None, None] + offsets[:, None, None]
    if modality.is_categorical:
        valid = valid & (values != modality.nodata).all(axis=0)
    return values, valid


def check_layer(name: str, modality: Modality, layer: ObservedLayer) -> None:
    """Check bands, shape and, by range and median, the unit; `name` is what errors call it.

    Raises:
        LayerError: the layer does not hold what the modality is; it says what it looks like.
    """
    expected = (len(modality.bands), *layer.grid.shape)
    if layer.values.shape != expected or layer.valid.shape != layer.grid.shape:
        raise LayerError(
            f"layer {name}",
            got=f"values {layer.values.shape}, mask {layer.valid.shape}",
            allowed=f"values {expected} (bands {', '.join(modality.band_names)})",
        )
    if not layer.valid.any():
        raise LayerError(
            f"layer {name}", got="no valid pixel", allowed="one or more", remedy="leave it out"
        )
    check_values(name, modality, layer.values[:, layer.valid])


def check_values(
    name: str, modality: Modality, known: NDArray[np.generic], bands: Sequence[str] = ()
) -> None:
    """Check known values [bands, n] against what the modality's unit allows.

    Args:
        name: what errors call it.
        modality: what it should be.
        known: the values.
        bands: their names; all of the modality's, without.

    Raises:
        LayerError: they are not what the modality is; it says what they look like.
    """
    for band, values in zip(bands or modality.band_names, known, strict=True):
        if modality.is_categorical:
            _check_classes(name, modality, values)
        else:
            _check_range(name, modality, band, values.astype(np.float64))


def check_offset(
    name: str,
    modality: Modality,
    found: raster.RasterHeader,
    known: NDArray[np.generic],
    bands: Sequence[str] = (),
) -> None:
    """Refuse reflectance that still has the offset of Sentinel-2's numbers, 1000, in it.

    Since processing baseline 04.00 they stand 1000 above zero: what is made of them by the scale
    alone is plausible, and 0.1 too bright. It is told by the file's tag PROCESSING_BASELINE, or,
    of integers with a scale of 0.0001, by no pixel of three visible bands being dark.

    Args:
        name: what errors call it.
        modality: what it should be.
        found: header of the file.
        known: values [bands, n] in physical units, the least of each band among them.
        bands: their names; all of the modality's, without.

    Raises:
        LayerError: it looks so, and neither an offset nor the tag BOA_ADD_OFFSET is declared.
    """
    declared = any(found.offsets) or "BOA_ADD_OFFSET" in found.tags
    if modality.quantity is not Quantity.REFLECTANCE or declared:
        return
    least = known.min(axis=1)
    baseline = found.tags.get("PROCESSING_BASELINE", "")
    told = re.fullmatch(r"\d\d\.\d\d", baseline) and baseline >= _RAISED_SINCE
    wavelengths = {b.name: b.center_nm or np.inf for b in modality.bands}
    names = bands or modality.band_names
    visible = [k for k, band in enumerate(names) if wavelengths[band] < _VISIBLE_NM]
    low, high = _RAISED_DARKEST
    looks = (
        np.dtype(found.dtype).kind in "iu"
        and set(found.scales) == {_RAISED_SCALE}
        and len(visible) >= 3
        and known.shape[1] >= _MEDIAN_NEEDS_PIXELS
        and bool(((low <= least[visible]) & (least[visible] < high)).all())
    )
    if looks or (told and bool((least >= low).all())):
        raise LayerError(
            f"layer {name}: offset",
            got=f"no pixel darker than {float(least.min()):.4g}"
            + (f", processing baseline {baseline}" if told else ""),
            allowed="reflectance from 0, or a declared offset",
            remedy="Sentinel-2 numbers stand 1000 above zero since baseline 04.00: declare it, as "
            "gdal_edit.py -offset -0.1 does; if they do not, say so with "
            "gdal_edit.py -mo BOA_ADD_OFFSET=0",
        )


def _check_classes(name: str, modality: Modality, codes: NDArray[np.generic]) -> None:
    unknown = np.setdiff1d(codes, modality.class_codes)
    if unknown.size:
        raise LayerError(
            f"layer {name}: class codes",
            got=", ".join(map(str, unknown[:8].tolist())),
            allowed=", ".join(map(str, modality.class_codes)),
            remedy="map the classes to these codes; 0 means nodata",
        )


def _check_range(name: str, modality: Modality, band: str, known: NDArray[np.float64]) -> None:
    low, high = modality.valid_range
    least, most, median = float(known.min()), float(known.max()), float(np.median(known))
    least_median, most_median = modality.quantity.traits.plausible_median
    plausible = known.size < _MEDIAN_NEEDS_PIXELS or least_median <= median <= most_median
    # Of few pixels, too: no ground sends as much back as to be above 0 dB everywhere.
    plausible &= modality.quantity is not Quantity.BACKSCATTER or least < 0
    if low <= least and most <= high and plausible:
        return
    raise LayerError(
        f"layer {name}, band {band}: unit",
        got=f"values from {least:.6g} to {most:.6g}, median {median:.6g}",
        allowed=f"{low:g} to {high:g} {modality.unit}, median {least_median:g} to {most_median:g}",
        remedy=_remedy(modality, known, median),
    )


def _remedy(modality: Modality, known: NDArray[np.float64], median: float) -> str:
    """What the values look like, and how to make what they should be."""
    low, high = modality.valid_range
    least, most = float(known.min()), float(known.max())
    if not np.isfinite([least, most]).all():
        return "infinite values: write them as nodata"
    match modality.quantity:
        case Quantity.REFLECTANCE if median > modality.quantity.traits.plausible_median[1]:
            if least >= 0 and most <= 255 and not (known % 1).any():
                return "looks like an 8-bit picture, made to be seen: send what it was made of"
            if least >= 0 and most <= 100:
                return "looks like percent: declare that in the file, as gdal_edit.py -scale 0.01"
            # Since processing baseline 04.00 Sentinel-2's numbers stand 1000 above zero.
            offset = "-0.1" if least >= _RAISED_DN else "0"
            return (
                "looks like digital numbers: declare their scale in the file, as "
                f"gdal_edit.py -scale 0.0001 -offset {offset} does for such Sentinel-2"
            )
        case Quantity.REFLECTANCE if least < low and most <= high:
            return "negative reflectance: clip it to 0, or write it as nodata"
        case Quantity.BACKSCATTER if least >= 0 and most <= 100:
            return (
                "looks like linear power: convert it to dB by 10*log10(power), or by "
                "20*log10(amplitude) if it is amplitude"
            )
        case Quantity.BACKSCATTER if least >= 0:
            return "looks like digital numbers: calibrate it to backscatter, then to dB"
        case Quantity.TEMPERATURE if least >= -100 and most <= 100:
            return "looks like degrees Celsius: add 273.15"
        case Quantity.ELEVATION if least < low:
            return "looks like a fill value: declare it as the file's nodata"
    return f"write what lies outside as nodata, or convert it to {modality.unit}"


def reference_grid(grids: Mapping[str, Grid]) -> Grid:
    """The layers' grid with the fewest metres a pixel; of equals (within 1 %), the first.

    Raises:
        GeoreferenceError: layers differ in grid and one of them says not where it lies.
    """
    first = next(iter(grids.values()))
    if all(grid == first for grid in grids.values()):
        return first
    check_placed(grids)
    sizes = [(_metres_per_pixel(grid), grid) for grid in grids.values()]
    finest = min(size for size, _ in sizes)
    # Two zones of one projection differ by less than this in what "10 m" is on the ground.
    return next(grid for size, grid in sizes if size <= 1.01 * finest)


def check_placed(grids: Mapping[str, Grid]) -> None:
    """Refuse layers that cannot be brought onto another grid.

    Raises:
        GeoreferenceError: one of them says not where it lies, or its pixels have no size.
    """
    for name, grid in grids.items():
        if not grid.crs:
            raise GeoreferenceError(
                f"layer {name} has no reference system, and its grid differs from another layer's",
                allowed="a CRS in each layer, or one grid for all",
                remedy="write the CRS into the file, as gdal_edit -a_srs does",
            )
    for name, grid in grids.items():
        _check_size(name, grid)


def _check_size(name: str, grid: Grid) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        size_m = _metres_per_pixel(grid)
    if not 0 < size_m < np.inf:
        raise GeoreferenceError(
            f"layer {name}: metres a pixel",
            got=f"{size_m:g} by transform {grid.transform}",
            allowed="pixels that lie on the Earth and have a size",
            remedy="correct it with gdal_edit -a_ullr",
        )


def _metres_per_pixel(grid: Grid) -> float:
    """Side on the ground of a square as large as a pixel in the middle of the grid."""
    row, col = grid.height / 2, grid.width / 2
    corners = [grid.xy(row, col), grid.xy(row, col + 1), grid.xy(row + 1, col)]
    lonlat = np.radians(georeference.to_lonlat(grid.crs, *zip(*corners, strict=True)))
    (right_x, right_y), (down_x, down_y) = lonlat[1:] - lonlat[0]
    area = abs(right_x * down_y - right_y * down_x) * np.cos(lonlat[0, 1])
    return float(_EARTH_RADIUS_M * np.sqrt(area))


def check_position(grid: Grid) -> None:
    """Refuse a grid whose pixels cannot be counted from the origin of its reference system.

    Raises:
        GeoreferenceError: a pixel is so small, or so far away, that its number is not exact.
    """
    try:
        farthest = max(abs(n) for n in grid.position)
    except (OverflowError, ValueError):  # infinite, or 0 by infinity
        farthest = _COUNTABLE_PX
    if farthest >= _COUNTABLE_PX:
        raise GeoreferenceError(
            "affine transform",
            got=grid.transform,
            allowed="pixels that lie less than 2^53 pixels from the origin of the system",
            remedy="correct it with gdal_edit -a_ullr",
        )


def onto(
    grid: Grid, name: str, layer: ObservedLayer, modality: Modality
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """A layer's values [bands, H, W] and mask [H, W] on another grid.

    Raises:
        GeoreferenceError: the layer has no valid pixel there.
    """
    if layer.grid == grid:
        return layer.values, layer.valid
    values, valid = resample(layer.values, layer.valid, layer.grid, grid, modality)
    if not valid.any():
        raise elsewhere(name, layer.grid, grid)
    return values, valid


def check_overlap(name: str, grid: Grid, finest: Grid) -> None:
    """Refuse a layer that lies elsewhere than the answer, by what their grids say.

    Boxes in longitude and latitude are compared: what passes may still lie beside it, which `onto`
    tells from the pixels.

    Raises:
        GeoreferenceError: the boxes do not overlap.
    """
    if grid == finest:
        return
    (west, south, east, north), other = _lonlat_box(grid), _lonlat_box(finest)
    # The date line is where 180 is -180: the same box, a turn further.
    turns = (other[0] < east + turn and west + turn < other[2] for turn in (-360, 0, 360))
    if not any(turns) or not (other[1] < north and south < other[3]):
        raise elsewhere(name, grid, finest)


def _lonlat_box(grid: Grid) -> tuple[float, float, float, float]:
    """West, south, east, north in degrees around a grid, from a lattice of its points.

    The lattice reaches inside, since a pole may lie there; a margin makes up for what lies between.
    """
    steps = np.linspace(0, 1, _LATTICE)
    points = [grid.xy(v * grid.height, u * grid.width) for v in steps for u in steps]
    lonlat = georeference.to_lonlat(grid.crs, *zip(*points, strict=True))
    if np.ptp(lonlat[:, 0]) > 180:  # it crosses the date line
        lonlat[lonlat[:, 0] < 0, 0] += 360
    margin = np.ptp(lonlat, axis=0) / 8
    west, south = lonlat.min(axis=0) - margin
    east, north = lonlat.max(axis=0) + margin
    return float(west), float(south), float(east), float(north)


def elsewhere(name: str, grid: Grid, finest: Grid) -> GeoreferenceError:
    """The error of a layer that lies elsewhere than the answer."""
    return GeoreferenceError(
        f"layer {name} does not overlap the grid of the answer",
        got=f"bounds {_rounded(grid)} in {_short(grid.crs)}",
        allowed=f"valid pixels within {_rounded(finest)} in {_short(finest.crs)}",
        remedy="give layers of one place, or declare a grid that reaches over all of them",
    )


def _rounded(grid: Grid) -> str:
    return "(" + ", ".join(f"{value:.10g}" for value in grid.bounds) + ")"


def _short(crs: str) -> str:
    return crs if len(crs) < 32 else crs[:28] + " ..."
