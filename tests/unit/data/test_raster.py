import io
import warnings

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.io import MemoryFile
from rasterio.rpc import RPC

from mm_model.data import georeference, raster
from mm_model.errors import GeoreferenceError, RasterError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES

CONTINUOUS = next(m for m in MODALITIES.values() if len(m.bands) == 3)
CATEGORICAL = next(m for m in MODALITIES.values() if m.is_categorical)
GRID = Grid("EPSG:32633", (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0), 7, 11)


def layer(modality, grid, seed=0):
    rng = np.random.default_rng(seed)
    shape = (len(modality.bands), *grid.shape)
    if modality.is_categorical:
        values = rng.choice(np.array(modality.class_codes, np.uint8), shape)
    else:
        values = rng.uniform(*modality.valid_range, shape).astype(np.float32)
    return values, rng.random(grid.shape) > 0.3


@pytest.mark.parametrize("kind", ["points", "camera"])
def test_a_place_without_a_transform_is_refused(kind, tmp_path):
    """Its pixels lie somewhere: an answer that lies nowhere would lose that without a word."""
    path = tmp_path / "slanted.tif"
    corners = [(0, 0, 15.0, 45.0), (0, 9, 15.1, 45.0), (9, 0, 15.0, 44.9), (9, 9, 15.1, 44.8)]
    points = [GroundControlPoint(r, c, x, y) for r, c, x, y in corners]
    camera = RPC(0, 1, 45, 1, [1] + [0] * 19, [1] + [0] * 19, 5, 1, 15, 1, [1] + [0] * 19,
                 [1] + [0] * 19, 5, 1)  # fmt: skip
    how = {"gcps": points, "crs": "EPSG:4326"} if kind == "points" else {"rpcs": camera}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", driver="GTiff", height=9, width=9, count=1, dtype="uint8",
                           **how) as file:  # fmt: skip
            file.write(np.ones((1, 9, 9), np.uint8))
    with pytest.raises(GeoreferenceError, match=r"slanted\.tif: place") as caught:
        raster.read_header(path)
    assert "gdalwarp" in caught.value.remedy


@pytest.mark.parametrize("modality", MODALITIES.values(), ids=lambda m: m.name)
def test_a_written_layer_is_read_again_with_all_that_is_known_of_it(modality):
    values, valid = layer(modality, GRID)
    content = raster.write_geotiff(None, values, valid, GRID, modality, tags={"SEED": "7"})
    read = raster.read_raster(content)
    assert read.values.dtype == modality.dtype
    np.testing.assert_array_equal(read.valid, valid)
    np.testing.assert_array_equal(read.values[:, valid], values[:, valid])
    assert read.grid == GRID
    assert read.band_names == modality.band_names
    assert read.units == (modality.unit,) * len(modality.bands)
    assert read.tags["SEED"] == "7"
    np.testing.assert_equal(read.header.nodata, modality.nodata)


def test_files_say_which_bands_are_red_green_and_blue():
    for modality in (m for m in MODALITIES.values() if not m.is_categorical):
        values, valid = layer(modality, GRID)
        content = raster.write_geotiff(None, values, valid, GRID, modality)
        with MemoryFile(content) as memory, memory.open() as dataset:
            said = {
                name: kind.name
                for name, kind in zip(dataset.descriptions, dataset.colorinterp, strict=True)
            }
        for color in ("red", "green", "blue"):
            assert (said.get(color) == color) == ({"red", "green", "blue"} <= set(said))


def test_classes_carry_their_colours_and_names():
    values, valid = layer(CATEGORICAL, GRID)
    content = raster.write_geotiff(None, values, valid, GRID, CATEGORICAL)
    with MemoryFile(content) as memory, memory.open() as dataset:
        colors = dataset.colormap(1)
    for entry in CATEGORICAL.classes:
        assert bytes(colors[entry.code][:3]) == bytes.fromhex(entry.color[1:])
        assert f"{entry.code} {entry.name}" in raster.read_header(content).tags["CLASSES"]
    assert colors[0][3] == 0


number = st.floats(-1e7, 1e7, allow_subnormal=False)
size = st.floats(1e-6, 1e4)


@settings(max_examples=60, deadline=None)
@given(size, size, number, number, st.sampled_from(["up", "down", "rotated"]))
def test_georeference_survives_to_the_last_digit(x_size, y_size, left, top, kind):
    transform = {
        "up": (x_size, 0.0, left, 0.0, -y_size, top),
        "down": (x_size, 0.0, left, 0.0, y_size, top),
        "rotated": (x_size, x_size / 3, left, y_size / 7, -y_size, top),
    }[kind]
    grid = Grid("EPSG:32731", transform, 3, 5)
    values, valid = layer(CONTINUOUS, grid)
    content = raster.write_geotiff(None, values, valid, grid, CONTINUOUS)
    assert raster.read_header(content).grid == grid


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:2953", "EPSG:3413", "EPSG:27700"])
def test_reference_systems_survive(crs):
    grid = Grid(crs, (0.1, 0.0, 5.0, 0.0, -0.1, 50.0), 4, 6)
    values, valid = layer(CONTINUOUS, grid)
    content = raster.write_geotiff(None, values, valid, grid, CONTINUOUS)
    assert raster.read_header(content).grid.crs == crs


def test_a_system_without_code_is_kept_as_wkt():
    custom = "+proj=laea +lat_0=12.5 +lon_0=7.25 +x_0=1000 +units=m +ellps=GRS80"
    wkt = georeference.crs_to_string(rasterio.crs.CRS.from_proj4(custom))
    grid = Grid(wkt, (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 4, 6)
    values, valid = layer(CONTINUOUS, grid)
    found = raster.read_header(raster.write_geotiff(None, values, valid, grid, CONTINUOUS)).grid.crs
    assert georeference.same_crs(found, wkt)
    assert not georeference.same_crs(found, "EPSG:32633")


def test_an_image_that_lies_nowhere():
    grid = Grid("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 4, 6)
    values, valid = layer(CONTINUOUS, grid)
    content = raster.write_geotiff(None, values, valid, grid, CONTINUOUS)
    assert raster.read_header(content).grid == grid


def whole():
    grid = GRID.resized(70, 110)
    return raster.write_geotiff(None, *layer(CONTINUOUS, grid), grid, CONTINUOUS)


VRT = (
    b'<VRTDataset rasterXSize="2" rasterYSize="2"><VRTRasterBand dataType="Byte" band="1" '
    b'subClass="VRTRawRasterBand"><SourceFilename relativetoVRT="0">/etc/passwd</SourceFilename>'
    b"</VRTRasterBand></VRTDataset>"
)


def png():
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, np.zeros((4, 6, 3), np.uint8), format="png")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"II*\x00", VRT, b"no raster", png(), whole()[: len(whole()) // 2]],
    ids=["empty", "header", "vrt", "text", "png", "truncated"],
)
def test_what_is_no_whole_geotiff_is_an_error_that_names_it(content, tmp_path):
    with pytest.raises(RasterError, match=r"sar\.tif"):
        raster.read_raster(content, name="sar.tif")
    path = tmp_path / "on_disk.tif"
    path.write_bytes(content)
    with pytest.raises(RasterError, match="on_disk"):
        raster.read_raster(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RasterError, match=r"absent\.tif does not exist"):
        raster.read_header(tmp_path / "absent.tif")


def test_bands_by_number_and_by_name():
    values, valid = layer(CONTINUOUS, GRID)
    content = raster.write_geotiff(None, values, valid, GRID, CONTINUOUS)
    chosen = raster.read_raster(content, bands=[3, CONTINUOUS.band_names[0]])
    np.testing.assert_array_equal(chosen.values[:, valid], values[[2, 0]][:, valid])
    for band in (0, 4, "B99"):
        with pytest.raises(RasterError, match="band"):
            raster.read_raster(content, bands=[band])


def test_warping_onto_the_same_grid_changes_nothing():
    values, valid = layer(CONTINUOUS, GRID)
    moved, known = raster.warp(values, valid, GRID, GRID, categorical=False)
    np.testing.assert_array_equal(known, valid)
    np.testing.assert_array_equal(moved[:, valid], values[:, valid])


def test_a_coarser_grid_averages_what_is_valid():
    values = np.arange(6 * 8, dtype=np.float32).reshape(1, 6, 8)
    valid = np.ones((6, 8), bool)
    valid[:2, :2] = False  # a target pixel with nothing
    valid[0, 2] = False  # one with three of four
    valid[2:4, 2:4] = [[True, False], [False, False]]  # one with a quarter
    grid = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 6, 8)
    values[:, ~valid] = 1e9  # means nothing
    moved, known = raster.warp(values, valid, grid, grid.resized(3, 4), categorical=False)
    expected = np.ones((3, 4), bool)
    expected[0, 0] = expected[1, 1] = False
    np.testing.assert_array_equal(known, expected)
    assert moved[0, 0, 1] == pytest.approx((3 + 10 + 11) / 3)
    assert moved[0, 2, 3] == pytest.approx((38 + 39 + 46 + 47) / 4)
    assert np.isnan(moved[0, ~known]).all()


def test_classes_are_never_mixed():
    rng = np.random.default_rng(0)
    grid = Grid("EPSG:32633", (10.0, 0.0, 5e5, 0.0, -10.0, 5e6), 30, 42)
    codes = rng.choice(np.array([10, 80, 95], np.uint8), (1, *grid.shape))
    for target in (
        grid.resized(60, 84),
        grid.resized(10, 14),
        Grid("EPSG:3035", (13.0, 2.0, 4.63e6, 2.0, -13.0, 2.44e6), 25, 33),
    ):
        if target.crs != grid.crs:
            target = georeference.metric_grid(grid, target.crs, 13.0)
        moved, known = raster.warp(codes, np.ones(grid.shape, bool), grid, target, categorical=True)
        assert known.any()
        assert set(np.unique(moved[0, known])) <= {10, 80, 95}
        assert not moved[0, ~known].any()


def test_the_most_frequent_class_wins_where_several_lie_in_a_pixel():
    codes = np.full((1, 6, 6), 10, np.uint8)
    codes[0, :3, :2] = 50  # six of nine
    grid = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 6, 6)
    moved, _ = raster.warp(codes, np.ones((6, 6), bool), grid, grid.resized(2, 2), categorical=True)
    np.testing.assert_array_equal(moved[0], [[50, 10], [10, 10]])


def test_a_hole_keeps_its_place_in_a_finer_grid():
    values = np.ones((1, 6, 8), np.float32)
    valid = np.ones((6, 8), bool)
    valid[2, 3] = False
    grid = Grid("EPSG:32633", (20.0, 0.0, 0.0, 0.0, -20.0, 0.0), 6, 8)
    moved, known = raster.warp(values, valid, grid, grid.resized(12, 16), categorical=False)
    expected = np.ones((12, 16), bool)
    expected[4:6, 6:8] = False
    np.testing.assert_array_equal(known, expected)
    assert (moved[0, known] == 1).all()


def test_beyond_the_source_nothing_is_known():
    grid = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 4, 6)
    target = Grid("EPSG:32633", (10.0, 0.0, -20.0, 0.0, -10.0, 10.0), 6, 9)
    moved, known = raster.warp(
        np.zeros((1, 4, 6), np.float32), np.ones((4, 6), bool), grid, target, categorical=False
    )
    expected = np.zeros((6, 9), bool)
    expected[1:5, 2:8] = True
    np.testing.assert_array_equal(known, expected)
    assert (moved[0, known] == 0).all()


def test_metric_grid_covers_and_snaps():
    grid = Grid("EPSG:4326", (1e-4, 0.0, 15.2, 0.0, -1e-4, 45.9), 50, 80)
    made = georeference.metric_grid(grid, georeference.utm_zone(grid), 10)
    assert made.crs == "EPSG:32633"
    assert made.pixel_size == (10, 10)
    assert made.transform[2] % 10 == made.transform[5] % 10 == 0
    for row, col in ((0, 0), (0, 80), (50, 0), (50, 80)):
        lon, lat = grid.xy(row, col)
        corners = [made.xy(r, c) for r in (0, made.height) for c in (0, made.width)]
        lonlat = georeference.to_lonlat(made.crs, *zip(*corners, strict=True))
        assert lonlat[:, 0].min() - 2e-5 <= lon <= lonlat[:, 0].max() + 2e-5
        assert lonlat[:, 1].min() - 2e-5 <= lat <= lonlat[:, 1].max() + 2e-5
    with pytest.raises(GeoreferenceError, match="32633"):
        georeference.metric_grid(grid, "EPSG:4326", 10)


def test_southern_utm_zone():
    assert georeference.utm_zone(Grid("EPSG:4326", (1e-4, 0, -48.1, 0, -1e-4, -25.3), 9, 9)) == (
        "EPSG:32722"
    )


def test_an_unknown_system_is_an_error():
    with pytest.raises(GeoreferenceError, match="EPSG:999999"):
        georeference.to_lonlat("EPSG:999999", [0], [0])
