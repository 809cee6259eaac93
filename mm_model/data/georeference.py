"""Reference systems of coordinates: their names, points in them, and what a grid spans on Earth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # what PROJ's complaints are; it has no public name
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.warp import calculate_default_transform
from rasterio.warp import transform as transform_points

from mm_model.errors import GeoreferenceError
from mm_model.geo.grid import Grid


def crs_to_string(crs: CRS | None) -> str:
    """The name "EPSG:<code>" where it says exactly the same, else WKT 2; "" for none."""
    if crs is None or not crs.wkt:
        return ""
    code = crs.to_epsg(confidence_threshold=100)
    if code is not None and CRS.from_epsg(code) == crs:
        return f"EPSG:{code}"
    return str(crs.to_wkt(version="WKT2_2019"))


def same_crs(first: str, second: str) -> bool:
    """Whether two strings name one coordinate reference system, however they spell it."""
    return first == second or (bool(first and second) and crs_of(first) == crs_of(second))


def to_lonlat(crs: str, xs: Sequence[float], ys: Sequence[float]) -> NDArray[np.float64]:
    """Longitude and latitude in degrees [n, 2] of points in a reference system."""
    return np.array(transform_xy(crs, "EPSG:4326", xs, ys), dtype=np.float64).T


def metric_grid(grid: Grid, crs: str, gsd_m: float) -> Grid:
    """The grid of square pixels of `gsd_m` in `crs` that covers `grid`.

    Its corner is a multiple of the pixel, so that neighbours share one lattice.

    Raises:
        GeoreferenceError: the reference system is unknown or its unit is not the metre.
    """
    target = crs_of(crs)
    if not target.is_projected or target.linear_units_factor[1] != 1.0:
        raise GeoreferenceError(
            "reference system of a grid in metres",
            got=crs,
            allowed="a projected system in metres",
            remedy=f"use the UTM zone {utm_zone(grid)}",
        )
    transform, width, height = calculate_default_transform(
        crs_of(grid.crs), target, grid.width, grid.height, *grid.bounds, resolution=gsd_m
    )
    left = np.floor(transform.c / gsd_m + 1e-6) * gsd_m
    top = np.ceil(transform.f / gsd_m - 1e-6) * gsd_m
    width = int(np.ceil((transform.c - left) / gsd_m + width - 1e-6))
    height = int(np.ceil((top - transform.f) / gsd_m + height - 1e-6))
    coefficients = (gsd_m, 0.0, float(left), 0.0, -gsd_m, float(top))
    return Grid(crs_to_string(target), coefficients, height, width)


def utm_zone(grid: Grid) -> str:
    """The UTM zone of the grid's centre: "EPSG:326zz" or "EPSG:327zz"."""
    x, y = grid.xy(grid.height / 2, grid.width / 2)
    lon, lat = to_lonlat(grid.crs, [x], [y])[0]
    zone = int(np.clip((lon + 180) // 6 + 1, 1, 60))
    return f"EPSG:{(32600 if lat >= 0 else 32700) + zone}"


def is_metric(crs: str) -> bool:
    """Whether coordinates of the reference system are metres on a plane."""
    found = crs_of(crs)
    return bool(found.is_projected and found.linear_units_factor[1] == 1.0)


_DEGREE_M = 111_320.0
# Training asks again for the grids of its patches, and 0.2 to 0.8 ms is what each takes to tell.
_KEPT_GRIDS = 1 << 13
_LONGEST_KEPT = 2048  # characters of a system; a system of one's own takes 800

T = TypeVar("T")


def _kept(tell: Callable[[Grid], T]) -> Callable[[Grid], T]:
    """Keep what was told of the last grids, at most 16 MB of text: a caller's WKT may be long."""
    known = lru_cache(maxsize=_KEPT_GRIDS)(tell)

    @wraps(tell)
    def told(grid: Grid) -> T:
        return known(grid) if len(grid.crs) <= _LONGEST_KEPT else tell(grid)

    return told


@_kept
def latitude_deg(grid: Grid) -> float | None:
    """Latitude of the grid's centre, north positive; None for a grid that lies nowhere on Earth."""
    if not grid.crs:
        return None
    x, y = grid.xy(grid.height / 2, grid.width / 2)
    try:
        latitude = float(to_lonlat(grid.crs, [x], [y])[0, 1])
    except GeoreferenceError:  # a plane of its own, or beyond what its system can express
        return None
    return latitude if abs(latitude) <= 90 else None


@_kept
def ground_sampling_m(grid: Grid) -> float | None:
    """Mean side of a pixel on the ground, in metres; None where the grid does not tell."""
    latitude = latitude_deg(grid)
    if latitude is None:
        return None
    row, column = grid.height / 2, grid.width / 2
    points = [grid.xy(row + down, column + right) for down, right in ((0, 0), (0, 1), (1, 0))]
    try:
        lonlat = to_lonlat(grid.crs, *zip(*points, strict=True))
    except GeoreferenceError:  # at the rim of what its system can express
        return None
    steps = (lonlat[1:] - lonlat[0] + 180) % 360 - 180  # across the antimeridian, too
    (a, b), (c, d) = steps * (math.cos(math.radians(latitude)), 1)
    on_ground = math.sqrt(abs(a * d - b * c)) * _DEGREE_M
    if not is_metric(grid.crs):
        return on_ground
    along, across = grid.pixel_size
    nominal = math.sqrt(along * across)
    # Web Mercator's metres are those of the equator; a UTM zone's differ by less than the sphere.
    return nominal if abs(on_ground / nominal - 1) < 0.01 else on_ground


def source_pixels_per_target(source: Grid, target: Grid) -> float:
    """How many source pixels, along a side, a pixel in the middle of the target spans."""
    row, col = target.height / 2, target.width / 2
    corners = [target.xy(row, col), target.xy(row, col + 1), target.xy(row + 1, col)]
    xs, ys = transform_xy(target.crs, source.crs, *zip(*corners, strict=True))
    at = np.array([source.row_col(x, y) for x, y in zip(xs, ys, strict=True)])
    return float(np.linalg.norm(at[1:] - at[0], axis=1).max())


def transform_xy(
    source: str, target: str, xs: Sequence[float], ys: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Points of one reference system in another; raises GeoreferenceError where it has none."""
    found = list(xs), list(ys)
    try:
        if not same_crs(source, target):
            found = transform_points(crs_of(source), crs_of(target), *found)
    except CPLE_BaseError:
        found = [math.nan], [math.nan]
    if not np.isfinite(found).all():
        raise GeoreferenceError(
            "position of an image",
            got=f"{xs[0]}, {ys[0]} in {source[:80]}",
            allowed=f"a place that {target[:80]} can express",
        )
    return found[0], found[1]


def crs_of(text: str) -> CRS:
    """The reference system that a text names; raises GeoreferenceError for none."""
    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise GeoreferenceError(
            "coordinate reference system", got=text[:120] or "none", allowed="EPSG:<code> or WKT"
        ) from error
