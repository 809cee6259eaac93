"""Outlines of patches, as tools of the field read them: geopandas, shapely and pyproj."""

import json
from dataclasses import replace

import geopandas
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pyproj
import pytest
import shapely
from data_fixtures import PAIR, make_store, place_patches
from geotiff_fixtures import ROTATED

from mm_model.data.footprints import footprints
from mm_model.data.georeference import to_lonlat
from mm_model.data.index import INDEX
from mm_model.data.store import PatchStore, ShardWriter
from mm_model.errors import GeoreferenceError
from mm_model.geo.grid import Grid

GEOD = pyproj.Geod(ellps="WGS84")


def outlines(*grids):
    rows = [
        (g.crs, *g.transform, g.height, g.width) for g in grids
    ]  # the columns that the index has
    frame = pd.DataFrame(rows, columns=["crs", *"abcdef", "height", "width"])
    shapes, boxes = footprints(frame)
    return [s and shapely.from_wkb(s) for s in shapes.to_pylist()], boxes.to_pylist()


def test_the_index_is_a_geoparquet_that_geopandas_reads(tmp_path):
    store = make_store(tmp_path / "store", 3)
    frame = geopandas.read_parquet(store.path / INDEX)
    assert len(frame) == len(store.index)
    assert frame.crs.equals(pyproj.CRS("OGC:CRS84"))
    for position in range(len(store)):
        grid = store.read(position).grid
        corners = [grid.xy(r, c) for r in (0, grid.height) for c in (0, grid.width)]
        wanted = to_lonlat(grid.crs, *zip(*corners, strict=True))
        found = frame[frame["patch_id"] == store.patch_ids[position]].geometry
        for shape in found:
            assert shape.is_valid
            assert shape.exterior.is_ccw
            assert {tuple(p) for p in wanted} <= set(shape.exterior.coords)
    # Metres on the ground, found from the outline alone.
    area, _ = GEOD.geometry_area_perimeter(frame.geometry.iloc[0])
    assert area == pytest.approx(80 * 120, rel=2e-3)


def test_a_search_by_box_reads_only_what_is_there(tmp_path):
    store = make_store(tmp_path / "store", 4)
    whole = geopandas.read_parquet(store.path / INDEX)
    place = whole[whole["place_id"] == "place002"]
    found = geopandas.read_parquet(store.path / INDEX, bbox=tuple(place.total_bounds))
    assert set(found["place_id"]) == {"place002"}
    assert len(found) == len(place)
    meta = json.loads(pq.read_schema(store.path / INDEX).metadata[b"geo"])
    assert meta["version"] == "1.1.0"
    assert meta["columns"]["geometry"]["geometry_types"] == ["Polygon"]


def test_the_same_patches_make_the_same_bytes_and_order_is_kept(tmp_path):
    first, second = (make_store(tmp_path / name, 3).path / INDEX for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    grids = [Grid("EPSG:32633", (10, 0, x, 0, -10, 5e6), 16, 24) for x in (5e5, 4e5, 5e5, 5e5)]
    shapes, boxes = outlines(*grids)
    assert shapes[0].equals(shapes[2])
    assert shapes[0].equals(shapes[3])
    assert not shapes[0].equals(shapes[1])
    assert boxes[1]["xmin"] < boxes[0]["xmin"] < boxes[0]["xmax"]


@pytest.mark.parametrize(
    "transform", [tuple(ROTATED)[:6], (10, 0, 5e5, 0, 10, 5e6), (-10, 0, 5e5, 0, -10, 5e6)]
)
def test_turned_and_mirrored_grids_run_counter_clockwise(transform):
    ((shape,), _) = outlines(Grid("EPSG:32633", transform, 40, 56))
    assert shape.exterior.is_ccw
    area, _ = GEOD.geometry_area_perimeter(shape)
    assert area == pytest.approx(400 * 560, rel=2e-3)


def test_long_edges_bend_as_they_do_on_the_ground():
    grid = Grid("EPSG:3035", (900, 0, 3e6, 0, -900, 4e6), 512, 768)
    ((shape,), _) = outlines(grid)
    edge = [grid.xy(row, 0) for row in np.linspace(0, 512, 33)]
    points = to_lonlat(grid.crs, *zip(*edge, strict=True))
    away = [shape.exterior.distance(shapely.Point(p)) for p in points]
    corners = shapely.Polygon([shape.exterior.coords[0], shape.exterior.coords[-2], points[-1]])
    straight = [corners.exterior.distance(shapely.Point(p)) for p in points]
    assert max(away) < 1e-4  # ten metres
    assert max(straight) > 1e-2


def test_an_outline_is_cut_at_the_antimeridian():
    # Fiji: 180° runs through the patch.
    ((shape,), (box,)) = outlines(Grid("EPSG:32760", (10, 0, 816_000, 0, -10, 8_130_000), 400, 700))
    assert shape.geom_type == "MultiPolygon"
    assert shape.is_valid
    parts = sorted(shape.geoms, key=lambda part: part.bounds[0])
    assert [part.bounds[0] for part in parts[:1]] == [-180]
    assert parts[1].bounds[2] == 180
    assert all(part.exterior.is_ccw for part in parts)
    area = sum(GEOD.geometry_area_perimeter(part)[0] for part in parts)
    assert area == pytest.approx(4000 * 7000, rel=5e-3)
    assert (box["xmin"], box["xmax"]) == (-180, 180)


def test_around_a_pole_all_longitudes_are_inside():
    ((shape,), (box,)) = outlines(Grid("EPSG:3031", (1000, 0, -3e5, 0, -1000, 2e5), 400, 600))
    assert box["ymin"] == -90
    assert (box["xmin"], box["xmax"]) == (-180, 180)
    assert shape.is_valid
    assert all(shape.contains(shapely.Point(lon, -89.5)) for lon in (-170, 0, 90))


def test_what_lies_nowhere_has_no_outline(tmp_path):
    grid = Grid("", (1, 0, 0, 0, 1, 0), 8, 12)
    shapes, boxes = outlines(grid, Grid("EPSG:32633", (10, 0, 5e5, 0, -10, 5e6), 8, 12), grid)
    assert shapes[0] is shapes[2] is boxes[0] is boxes[2] is None
    assert shapes[1].is_valid
    with ShardWriter(tmp_path / "s", PAIR, 4) as writer:
        writer.add(replace(next(place_patches(0, PAIR)), grid=grid))
    assert PatchStore(tmp_path / "s").read(0).grid == grid
    assert geopandas.read_parquet(tmp_path / "s" / INDEX).geometry.isna().all()


def test_a_system_that_nobody_knows_is_named():
    with pytest.raises(GeoreferenceError, match="EPSG:99999"):
        outlines(Grid("EPSG:99999", (10, 0, 5e5, 0, -10, 5e6), 8, 12))
