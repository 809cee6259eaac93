from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

sys.path.insert(0, str(Path(__file__).parent))
from serving_fixtures import (
    GRID,
    PATCH_PX,
    PLAUSIBLE,
    make_bundle,
    make_generator,
    make_layer,
)

from mm_model.api import ModelIdentity
from mm_model.data import raster
from mm_model.data.strips import (
    MOST_BELOW_PX,
    CogWriter,
    strips,
    thumbnail,
    window_below,
    windows_below,
)
from mm_model.errors import GeoreferenceError, LayerError, RequestError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES
from mm_model.serving.generator import Generator, ObservedLayer, Request
from mm_model.serving.observed import ObservedFiles
from mm_model.serving.requests import SceneRequest
from mm_model.serving.scenes import GENERATED, MAX_SIDE_PX, write_scene
from mm_model.serving.uncertainty import entropy_bits

GENERATOR = make_generator(max_side_px=MAX_SIDE_PX)
MODEL = ModelIdentity(name="mm-test", version="3")
# Begins 5 rows and 3 columns off the cells, taller than two strips that are read together.
TALL = Grid("EPSG:32633", (10.0, 0.0, 500_030.0, 0.0, -10.0, 4_999_950.0), 530, 44)
SMALL = TALL.window(0, 0, 60, 44)


def layers(grid: Grid, *names: str) -> dict[str, ObservedLayer]:
    return {name: make_layer(name, grid, seed) for seed, name in enumerate(names)}


def files(folder: Path, given: dict[str, ObservedLayer]) -> dict[str, Path]:
    for name, layer in given.items():
        raster.write_geotiff(
            folder / f"{name}_in.tif", layer.values, layer.valid, layer.grid, MODALITIES[name]
        )
    return {name: folder / f"{name}_in.tif" for name in given}


def write(folder: Path, given: dict[str, Path], *targets: str, **asked) -> list[Path]:
    asked = {"steps": 2, **asked}
    return write_scene(GENERATOR, SceneRequest(given, targets, **asked), MODEL, folder)


@pytest.mark.parametrize("names", [("sar",), ("dem", "map")])
def test_files_hold_what_memory_makes(tmp_path: Path, names: tuple[str, ...]) -> None:
    given = layers(TALL, *names)
    written = write(tmp_path / "out", files(tmp_path, given), "rgb", samples=2, seed=4, steps=1)
    assert [p.name for p in written] == ["rgb_0.tif", "rgb_1.tif"]
    (result,) = GENERATOR.generate([Request(given, ("rgb",), samples=2, seed=4, steps=1)])
    for k, path in enumerate(written):
        found = raster.read_raster(path)
        assert found.grid == TALL
        assert np.array_equal(found.valid, result.valid)
        expected = result.values["rgb"][k]
        # Levels are means over rows; sums of other lengths round otherwise.
        assert np.allclose(found.values[:, found.valid], expected[:, found.valid], atol=2e-3)


def test_elevation_is_decoded_across_strips(tmp_path: Path) -> None:
    given = layers(SMALL, "rgb")
    written = write(tmp_path, files(tmp_path, given), "dem", "map", seed=1)
    (result,) = GENERATOR.generate([Request(given, ("dem", "map"), seed=1, steps=2)])
    assert [p.name for p in written] == ["dem.tif", "map.tif"]
    dem, land = (raster.read_raster(path) for path in written)
    assert np.allclose(dem.values[0][dem.valid], result.values["dem"][0, 0][dem.valid], atol=0.5)
    assert (land.values == np.where(result.valid, result.values["map"][0], 0)).mean() > 0.99


def test_from_nothing_each_target_sees_those_written_before_it(tmp_path: Path) -> None:
    targets = ("rgb", "dem", "map")
    written = write(tmp_path, {}, *targets, grid=SMALL, seed=3, samples=2)
    (result,) = GENERATOR.generate([Request({}, targets, grid=SMALL, seed=3, samples=2, steps=2)])
    for k in range(2):
        for name in targets:
            (path,) = (p for p in written if p.name == f"{name}_{k}.tif")
            found, expected = raster.read_raster(path).values, result.values[name][k]
            if name == "map":
                assert (found == expected).mean() > 0.99
            else:
                assert np.abs(found - expected).mean() < 0.02 * np.abs(expected).mean()


def pairs_only() -> Generator:
    """Of a model that has seen radar and colour with land cover, and never together."""
    bundle = make_bundle()
    bundle.model.seen_sets = ((frozenset({"sar", "map"}), 2), (frozenset({"rgb", "map"}), 2))
    return Generator(bundle, max_side_px=MAX_SIDE_PX)


def test_what_only_leads_to_a_target_is_not_left_behind(tmp_path: Path) -> None:
    generator, given = pairs_only(), layers(SMALL, "sar")
    request = SceneRequest(files(tmp_path, given), ("rgb",), samples=2, seed=3, steps=2)
    written = write_scene(generator, request, MODEL, tmp_path / "out")
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["rgb_0.tif", "rgb_1.tif"]
    (result,) = generator.generate([Request(given, ("rgb",), samples=2, seed=3, steps=2)])
    (direct,) = make_generator().generate([Request(given, ("rgb",), samples=2, seed=3, steps=2)])
    for k, path in enumerate(written):
        found = raster.read_raster(path)
        expected = result.values["rgb"][k]
        assert np.abs(found.values - expected)[:, found.valid].mean() < 0.01 * expected.std()
        assert np.abs(direct.values["rgb"][k] - expected).mean() > 0.1 * expected.std()


def test_a_hole_is_filled_beside_what_leads_to_it(tmp_path: Path) -> None:
    generator, given = pairs_only(), layers(SMALL, "sar", "rgb")
    cloudy = given["rgb"]
    cloudy.valid[25:40, 10:30] = False
    made = {}
    for name, level in (("as it is", 1.0), ("darker", 0.3)):
        cloudy.values[:, cloudy.valid] *= level
        request = SceneRequest(files(tmp_path, given), (), fill="rgb", seed=3, steps=2)
        (path,) = write_scene(generator, request, MODEL, tmp_path / name)
        made[name] = raster.read_raster(path).values[:3]
        assert np.array_equal(made[name][:, cloudy.valid], cloudy.values[:, cloudy.valid])
        assert np.isfinite(made[name]).all()
    hole = ~cloudy.valid
    assert not np.allclose(made["as it is"][:, hole], made["darker"][:, hole])


def test_what_is_written_is_a_cog_with_all_that_a_file_should_say(tmp_path: Path) -> None:
    grid = TALL.window(0, 0, 530, 600)
    (path,) = write(tmp_path, {}, "map", grid=grid, steps=1)
    with rasterio.open(path) as found:
        assert found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert found.overviews(1) == [2]
        assert found.block_shapes == [(512, 512)]
        assert found.nodata == 0
        assert found.descriptions == MODALITIES["map"].band_names
        assert found.colormap(1)[10] == (0, 100, 0, 255)
        assert found.tags()["MM_MODEL"] == "mm-test"
        assert found.tags()["MODALITY"] == "map"
        assert found.transform == Affine(*grid.transform)
        # Overviews of codes are codes.
        assert set(np.unique(found.read(1, out_shape=(265, 300)))) <= set(found.read(1).ravel())
    # Nothing else is left.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.tif", "map.tif.aux.xml"]


def test_the_same_ground_looks_the_same_in_another_scene(tmp_path: Path) -> None:
    """Overlapping parts of one invented world agree, but for what the edges tell."""
    grid = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), 220, 40)
    part = grid.window(90, 0, 130, 40)
    (whole,), (below,) = (
        write(tmp_path / str(k), {}, "rgb", grid=g, steps=1, seed=6)
        for k, g in enumerate((grid, part))
    )
    a, b = raster.read_raster(whole).values[:, 90:], raster.read_raster(below).values
    inner = slice(2 * PATCH_PX, -2 * PATCH_PX)
    assert np.allclose(a[:, inner], b[:, inner], atol=1e-5)
    assert a[:, inner].std() > 1e-3


def test_looking_through_a_file_takes_no_more_memory_for_a_taller_one(tmp_path: Path) -> None:
    grid = Grid(TALL.crs, TALL.transform, 16_384, 64)
    given = files(tmp_path, layers(grid, "sar"))
    ObservedFiles(given, GENERATOR)  # all is imported
    tracemalloc.start()
    try:
        ObservedFiles(given, GENERATOR)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 3 / 4 * grid.height * grid.width * 2 * 4


def test_what_is_read_of_a_fine_file_at_once_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = Grid(TALL.crs, (1.0, 0.0, 500_000.0, 0.0, -1.0, 5_000_000.0), 2900, 3100)
    coarse = Grid(TALL.crs, (64.0, 0.0, 499_900.0, 0.0, -64.0, 5_000_070.0), 45, 52)
    layer = make_layer("dem", fine)
    given, sizes = files(tmp_path, {"dem": layer}), []
    read = raster.read_raster

    def recorded(*args, window, **options):
        sizes.append(window[2] * window[3])
        return read(*args, window=window, **options)

    monkeypatch.setattr(raster, "read_raster", recorded)
    values, valid = ObservedFiles(given, GENERATOR, coarse).read(0, coarse.height)["dem"]
    assert max(sizes) <= MOST_BELOW_PX < fine.height * fine.width
    whole, known = raster.warp(layer.values, layer.valid, fine, coarse, categorical=False)
    assert known.any()
    assert np.array_equal(valid, known)
    assert np.array_equal(values[:, known], whole[:, known])


def test_pieces_make_up_what_lies_over_a_source() -> None:
    source = Grid("EPSG:4326", (1e-4, 0, 14.99, 0, -1e-4, 45.16), 700, 260)
    target = Grid(TALL.crs, (50.0, 0.0, 499_000.0, 0.0, -50.0, 5_002_000.0), 190, 110)
    most_px, seen = 6000, np.zeros(target.shape, int)
    for (row, col, height, width), below in windows_below(source, target, "dem", most_px):
        assert below[2] * below[3] <= most_px
        seen[row : row + height, col : col + width] += 1
    ones = np.ones((1, *source.shape), np.float32)
    _, known = raster.warp(ones, ones[0] > 0, source, target, categorical=False)
    assert known.any()
    assert (seen[known] == 1).all()
    assert seen.max() == 1
    assert seen.min() == 0


def test_a_file_far_finer_than_the_grid_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "dem.tif"  # has no pixel: whoever reads it says so
    with rasterio.open(
        path, "w", driver="GTiff", height=3000, width=4000, count=1, dtype="float32", nodata=-1,
        crs=TALL.crs, transform=Affine(1, 0, 504_000, 0, -1, 4_996_000), sparse_ok=True,
    ):  # fmt: skip
        pass
    coarse = Grid(TALL.crs, (600.0, 0.0, 500_000.0, 0.0, -600.0, 5_000_000.0), 16, 20)
    with pytest.raises(GeoreferenceError, match=r"layer dem.*single pixel.*gdalwarp -tr"):
        ObservedFiles({"dem": path}, GENERATOR, coarse)


def test_layers_of_other_systems_resolutions_and_extents_guide(tmp_path: Path) -> None:
    fine = make_layer("sar", SMALL, 1)
    low = make_layer("dem", Grid("EPSG:4326", (4e-4, 0, 14.9995, 0, -4e-4, 45.1525), 22, 20), 2)
    half = make_layer("rgb", SMALL.window(0, 20, 200, 130).resized(100, 65), 3)  # of half the scene
    given = files(tmp_path, {"rgb": half, "sar": fine, "dem": low})
    found = ObservedFiles(given, GENERATOR)
    assert found.grid == SMALL
    rgb, dem = found.read(0, 60)["rgb"], found.read(0, 60)["dem"]
    assert not rgb[1][:, :20].any()
    assert 0 < rgb[1].mean() < 1
    assert 0 < dem[1].mean() <= 1
    for name in ("rgb", "dem"):  # any strips make the whole
        values, valid = found.read(0, 60)[name]
        for row, rows in strips(60, 23):
            some, known = found.read(row, rows)[name]
            assert np.array_equal(known, valid[row : row + rows])
            assert np.array_equal(some[:, known], values[:, row : row + rows][:, known])
    (path,) = write(tmp_path / "out", given, "map")
    made = raster.read_raster(path)
    assert made.grid == SMALL
    assert np.array_equal(made.valid, fine.valid | rgb[1] | dem[1])


def test_a_warp_of_strips_is_a_strip_of_the_warp() -> None:
    source = Grid("EPSG:4326", (1e-4, 0, 14.99, 0, -1e-4, 45.16), 700, 260)
    values = np.random.default_rng(0).uniform(size=(1, 700, 260)).astype(np.float32)
    valid = np.ones((700, 260), np.bool_)
    valid[190:210] = False
    whole, known = raster.warp(values, valid, source, TALL, categorical=False, exact=True)
    assert known.any()
    for row, rows in strips(TALL.height, 100):
        target = TALL.window(row, 0, rows, TALL.width)
        below = window_below(source, target)
        assert below is not None
        r, c, h, w = below
        assert h < 300
        inside = slice(r, r + h), slice(c, c + w)
        part, mask = raster.warp(
            values[:, *inside], valid[inside], source.window(*below), target,
            categorical=False, exact=True,
        )  # fmt: skip
        assert np.array_equal(mask, known[row : row + rows])
        assert np.allclose(part[:, mask], whole[:, row : row + rows][:, mask], atol=1e-5)


def test_holes_are_filled_and_nothing_else_is_touched(tmp_path: Path) -> None:
    given = layers(SMALL, "rgb", "sar")
    cloudy = given["rgb"]
    cloudy.valid[25:40, 10:30] = False
    names = files(tmp_path, given)
    (path,) = write(tmp_path / "out", names, fill="rgb", seed=3)
    with rasterio.open(path) as found:
        values, generated = found.read([1, 2, 3]), found.read(4)
        assert found.descriptions == ("red", "green", "blue", GENERATED)
    assert np.array_equal(generated == 1, ~cloudy.valid)
    assert set(np.unique(generated)) == {0, 1}
    assert np.array_equal(values[:, cloudy.valid], cloudy.values[:, cloudy.valid])
    holes = values[:, ~cloudy.valid]
    assert np.isfinite(holes).all()
    assert holes.std() > 1e-3
    # What surrounds a hole is felt in it, and so is what others see there.
    cloudy.values[:, cloudy.valid] *= 0.3
    (darker,) = write(tmp_path / "dark", files(tmp_path, given), fill="rgb", seed=3)
    assert not np.allclose(raster.read_raster(darker).values[:3][:, ~cloudy.valid], holes)
    (alone,) = write(tmp_path / "alone", {"rgb": names["rgb"]}, fill="rgb", seed=3)
    assert raster.read_raster(alone).valid.all()
    # A filled layer can be given again.
    (again,) = write(tmp_path / "again", {"rgb": path}, "sar", steps=1)
    assert raster.read_raster(again).valid.all()


def test_classes_in_a_wider_type_are_filled(tmp_path: Path) -> None:
    land = make_layer("map", SMALL)
    path = tmp_path / "wide.tif"
    with rasterio.open(
        path, "w", driver="GTiff", height=60, width=44, count=1, dtype="int16", crs=SMALL.crs,
        transform=Affine(*SMALL.transform),
    ) as file:  # fmt: skip
        file.write(np.where(land.valid, land.values, 0).astype(np.int16))
    (filled,) = write(tmp_path / "out", {"map": path}, fill="map", steps=1)
    found = raster.read_raster(filled).values
    assert found.dtype == np.uint8
    assert np.array_equal(found[0][land.valid], land.values[0][land.valid])
    assert np.array_equal(found[1] == 1, ~land.valid)


def test_uncertainty_is_that_of_the_samples(tmp_path: Path) -> None:
    given = files(tmp_path, layers(SMALL, "sar"))
    written = write(tmp_path / "out", given, "rgb", "map", samples=4, uncertainty=True)
    assert len(written) == 10
    out = tmp_path / "out"
    samples = np.stack([raster.read_raster(out / f"rgb_{k}.tif").values for k in range(4)])
    told = raster.read_raster(out / "rgb_uncertainty.tif")
    assert told.band_names == tuple(f"{c} {w}" for w in ("mean", "spread")
                                    for c in ("red", "green", "blue"))  # fmt: skip
    valid = told.valid
    assert np.array_equal(valid, raster.read_raster(out / "rgb_0.tif").valid)
    assert np.allclose(told.values[:3][:, valid], samples.mean(0)[:, valid], atol=1e-5)
    spread = samples.std(0, ddof=1)[:, valid]
    assert spread.max() > 1e-3
    assert np.allclose(told.values[3:][:, valid], spread, atol=1e-5)
    land = raster.read_raster(out / "map_uncertainty.tif")
    classes = MODALITIES["map"].classes
    assert land.band_names[0] == f"probability of {classes[0].name}"
    assert land.band_names[-1] == "entropy"
    shares, entropy = land.values[:-1][:, valid], land.values[-1][valid]
    assert np.allclose(shares.sum(0), 1, atol=1e-4)
    assert entropy.min() >= 0
    assert entropy.max() <= np.log2(len(classes)) + 1e-5
    assert np.allclose(entropy, entropy_bits(shares), atol=1e-5)


def test_entropy_of_what_is_certain_and_of_what_is_not() -> None:
    shares = np.array([[1.0, 0.25, 0.5], [0.0, 0.25, 0.5], [0.0, 0.25, 0.0], [0.0, 0.25, 0.0]])
    assert np.allclose(entropy_bits(shares), [0, 2, 1])


def test_progress_reaches_the_end_and_can_cancel(tmp_path: Path) -> None:
    given = SceneRequest(files(tmp_path, layers(SMALL, "sar")), ("rgb", "map"), 2, steps=2)
    told: list[tuple[int, int]] = []
    write_scene(GENERATOR, given, MODEL, tmp_path / "a", lambda *done: told.append(done))
    assert told[-1][0] == told[-1][1]
    assert [d for d, _ in told] == sorted(d for d, _ in told)

    def stop(done: int, total: int) -> None:
        if done > total * 0.4:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        write_scene(GENERATOR, given, MODEL, tmp_path / "b", stop)
    assert not list((tmp_path / "b").glob(".*"))  # nothing half made


def wrong_requests(folder: Path) -> dict[str, tuple[SceneRequest, type, str]]:
    given = files(folder, layers(SMALL, "sar", "rgb"))
    whole = ObservedLayer(make_layer("dem", SMALL).values, np.ones(SMALL.shape, bool), SMALL)
    linear = make_layer("sar", SMALL)
    power = ObservedLayer(10 ** (linear.values / 10), linear.valid, SMALL)
    raster.write_geotiff(folder / "p.tif", power.values, power.valid, SMALL, MODALITIES["sar"])
    far = make_layer("dem", Grid(GRID.crs, (10, 0, 700_000, 0, -10, 5_500_000), 30, 40))
    there = files(folder, {"dem": far})["dem"].rename(folder / "far.tif")
    dem = files(folder, {"dem": whole})["dem"]
    return {
        "no hole": (SceneRequest({"dem": dem}, fill="dem"), RequestError, "no hole"),
        "not observed": (SceneRequest({"dem": dem}, fill="rgb"), RequestError, "to fill"),
        "one sample": (
            SceneRequest(given, ("map",), uncertainty=True), RequestError, "2 or more"
        ),
        "unit": (SceneRequest({"sar": folder / "p.tif"}, ("rgb",)), LayerError, "linear power"),
        "elsewhere": (
            SceneRequest({"sar": given["sar"], "dem": there}), GeoreferenceError, "overlap"
        ),
        "nothing": (SceneRequest(), RequestError, "no layer and no grid"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "case", ["no hole", "not observed", "one sample", "unit", "elsewhere", "nothing"]
)
def test_wrong_requests_are_refused_before_any_work(tmp_path: Path, case: str) -> None:
    request, error, said = wrong_requests(tmp_path)[case]
    with pytest.raises(error, match=said):
        write_scene(GENERATOR, request, MODEL, tmp_path / "out", lambda *_: pytest.fail("worked"))
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    with CogWriter(
        tmp_path / "a.tif", SMALL, ["x"], dtype="float32", nodata=np.nan, units=["1"]
    ) as writer:
        writer.write(np.zeros((1, 10, SMALL.width), np.float32))
    assert not list(tmp_path.iterdir())


def test_scenes_say_which_bands_are_red_green_and_blue(tmp_path: Path) -> None:
    names = ["red", "green", "blue", "generated"]
    with CogWriter(
        tmp_path / "a.tif", SMALL, names, dtype="float32", nodata=np.nan, units=["1"] * 4
    ) as writer:
        writer.write(np.zeros((4, *SMALL.shape), np.float32))
        path = writer.finish()
    with rasterio.open(path) as written:
        assert [kind.name for kind in written.colorinterp] == [*names[:3], "undefined"]


def test_a_thumbnail_is_small_and_says_what_is_valid(tmp_path: Path) -> None:
    path = files(tmp_path, {"sar": make_layer("sar", TALL)})["sar"]
    values, valid = thumbnail(path, 100)
    assert values.shape == (2, 100, 8)
    assert not valid[0, 0]
    assert valid[-1, -1]
    low, high = PLAUSIBLE[MODALITIES["sar"].quantity]
    assert low <= values[:, valid].min() <= values[:, valid].max() <= high
