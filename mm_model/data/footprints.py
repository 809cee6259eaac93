"""Where patches lie on the Earth: their outlines, as GeoParquet 1.1 wants them.

https://geoparquet.org/releases/v1.1.0/
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from mm_model.data.georeference import is_metric, to_lonlat

GEOMETRY, BBOX = "geometry", "bbox"
_GRID = ["crs", *"abcdef", "height", "width"]
_POLYGON, _MULTI_POLYGON = 3, 6
# An edge longer than this gets points between its corners: a straight line in one system is none in
# another, and over this length they part by less than ten metres.
_STRAIGHT_M, _STRAIGHT_DEG = 20_000, 0.2
_MOST_SEGMENTS = 64

# PROJJSON of OGC:CRS84, longitude before latitude.
_CRS84: dict[str, Any] = {
    "$schema": "https://proj.org/schemas/v0.7/projjson.schema.json",
    "type": "GeographicCRS",
    "name": "WGS 84 (CRS84)",
    "datum": {
        "type": "GeodeticReferenceFrame",
        "name": "World Geodetic System 1984",
        "ellipsoid": {
            "name": "WGS 84",
            "semi_major_axis": 6378137,
            "inverse_flattening": 298.257223563,
        },
    },
    "coordinate_system": {
        "subtype": "ellipsoidal",
        "axis": [
            {
                "name": f"Geodetic {name.lower()}",
                "abbreviation": name[:3],
                "direction": direction,
                "unit": "degree",
            }
            for name, direction in (("Longitude", "east"), ("Latitude", "north"))
        ],
    },
    "id": {"authority": "OGC", "code": "CRS84"},
}


def footprints(grids: pd.DataFrame) -> tuple[pa.Array, pa.Array]:
    """The outline of each grid, and the box around it, in degrees of WGS 84.

    An outline that crosses the antimeridian is cut there, and its box spans all longitudes, so that
    a search by box never misses it. A grid that lies nowhere has neither.

    Args:
        grids: columns crs, a…f, height, width, as in the index; equal neighbours are computed once.

    Returns:
        WKB, and structs of xmin, ymin, xmax, ymax.

    Raises:
        GeoreferenceError: a reference system is unknown, or cannot express where a grid lies.
    """
    changed = (grids[_GRID] != grids[_GRID].shift()).any(axis=1).to_numpy(dtype=bool)
    distinct = grids.loc[changed, _GRID].reset_index(drop=True)
    shapes: NDArray[Any] = np.full(len(distinct), None, dtype=object)
    boxes = np.full((len(distinct), 4), np.nan)
    for crs, group in distinct[distinct["crs"].astype(bool)].groupby("crs"):
        at = group.index.to_numpy()
        rings = _rings(str(crs), group[[*"abcdef", "height", "width"]].to_numpy(dtype=float))
        shapes[at], boxes[at] = _shapes(rings)
    of_row = np.cumsum(changed) - 1
    shapes, boxes = shapes[of_row], boxes[of_row]
    names = ("xmin", "ymin", "xmax", "ymax")
    sides = [pa.array(boxes[:, i]) for i in range(len(names))]
    nowhere = pa.array(np.isnan(boxes[:, 0]))
    return pa.array(shapes, pa.binary()), pa.StructArray.from_arrays(sides, names, mask=nowhere)


def geo_metadata(shapes: Sequence[bytes | None]) -> dict[bytes, bytes]:
    """The file's metadata that makes a table with these columns a GeoParquet.

    Args:
        shapes: the outlines in it, or some of them, where all are of the same types.
    """
    kinds = {struct.unpack_from("<I", shape, 1)[0] for shape in shapes if shape is not None}
    names = {_POLYGON: "Polygon", _MULTI_POLYGON: "MultiPolygon"}
    column = {
        "encoding": "WKB",
        "geometry_types": [name for kind, name in names.items() if kind in kinds],
        "crs": _CRS84,
        "orientation": "counterclockwise",
        "edges": "planar",
        "covering": {BBOX: {k: [BBOX, k] for k in ("xmin", "ymin", "xmax", "ymax")}},
    }
    content = {"version": "1.1.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}}
    return {b"geo": json.dumps(content).encode()}


def _rings(crs: str, grids: NDArray[np.float64]) -> NDArray[np.float64]:
    """Closed outlines [n, points, 2] of grids [n, (a…f, height, width)], in degrees."""
    a, b, c, d, e, f, height, width = grids.T
    sides = np.stack([np.hypot(a, d) * width, np.hypot(b, e) * height])
    straight = _STRAIGHT_M if is_metric(crs) else _STRAIGHT_DEG
    segments = int(np.clip(np.ceil(sides.max() / straight), 1, _MOST_SEGMENTS))
    shares = np.arange(segments) / segments
    # Upper left, lower left, lower right, upper right: counter-clockwise where north is up.
    row = np.concatenate([shares, np.ones(segments), 1 - shares, np.zeros(segments), [0]])
    col = np.concatenate([np.zeros(segments), shares, np.ones(segments), 1 - shares, [0]])
    rows, cols = row * height[:, None], col * width[:, None]
    xs = a[:, None] * cols + b[:, None] * rows + c[:, None]
    ys = d[:, None] * cols + e[:, None] * rows + f[:, None]
    return to_lonlat(crs, xs.ravel().tolist(), ys.ravel().tolist()).reshape(*xs.shape, 2)


def _shapes(rings: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """WKB and boxes of closed rings."""
    steps = np.diff(rings[..., 0], axis=1)
    crossing = (np.abs(steps) > 180).any(axis=1)
    x, y = rings[..., 0], rings[..., 1]
    doubled_area = (x[:, :-1] * y[:, 1:] - x[:, 1:] * y[:, :-1]).sum(axis=1)
    rings = np.where((doubled_area < 0)[:, None, None], rings[:, ::-1], rings)
    boxes = np.concatenate([rings.min(axis=1), rings.max(axis=1)], axis=1)
    head = np.frombuffer(struct.pack("<BIII", 1, _POLYGON, 1, rings.shape[1]), np.uint8)
    body = np.ascontiguousarray(rings, "<f8").reshape(len(rings), -1).view(np.uint8)
    packed = np.concatenate([np.broadcast_to(head, (len(rings), len(head))), body], axis=1)
    shapes: NDArray[Any] = np.empty(len(rings), dtype=object)
    shapes[:] = [row.tobytes() for row in packed]
    for i in np.flatnonzero(crossing):
        parts = _cut(rings[i])
        shapes[i] = struct.pack("<BII", 1, _MULTI_POLYGON, len(parts)) + b"".join(
            struct.pack("<BIII", 1, _POLYGON, 1, len(part)) + part.astype("<f8").tobytes()
            for part in parts
        )
        every = np.concatenate(parts)
        boxes[i] = -180, every[:, 1].min(), 180, every[:, 1].max()
    return shapes, boxes


def _cut(ring: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Parts of an outline that crosses the antimeridian; all that lies about a pole, around one."""
    steps = np.diff(ring[:, 0])
    if abs(((steps + 180) % 360 - 180).sum()) > 180:
        least, greatest = ring[:, 1].min(), ring[:, 1].max()
        south, north = (least, 90.0) if least > 0 else (-90.0, greatest)
        corners = [(-180, south), (180, south), (180, north), (-180, north), (-180, south)]
        return [np.array(corners, np.float64)]
    east = np.where(ring[:, :1] < 0, ring + np.array([360, 0]), ring)  # from 0 to 360
    turned = east if _doubled_area(east) > 0 else east[::-1]
    west_part = _clipped(turned, keep_above=False)
    east_part = _clipped(turned, keep_above=True) - np.array([360, 0])
    return [part for part in (west_part, east_part) if len(part) > 3]


def _clipped(ring: NDArray[np.float64], *, keep_above: bool) -> NDArray[np.float64]:
    """The part of a closed ring on one side of 180° (Sutherland and Hodgman 1974)."""
    sign = 1 if keep_above else -1
    kept: list[NDArray[np.float64]] = []
    for start, end in pairwise(ring):
        inside, next_inside = sign * (start[0] - 180) >= 0, sign * (end[0] - 180) >= 0
        if inside:
            kept.append(start)
        if inside != next_inside:
            share = (180 - start[0]) / (end[0] - start[0])
            kept.append(np.array([180.0, start[1] + share * (end[1] - start[1])]))
    return np.array([*kept, kept[0]]) if kept else np.empty((0, 2))


def _doubled_area(ring: NDArray[np.float64]) -> float:
    x, y = ring.T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())
