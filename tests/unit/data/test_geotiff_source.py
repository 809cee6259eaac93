import copy
import itertools
import tracemalloc

import numpy as np
import pytest
import rasterio
import yaml
from geotiff_fixtures import COVER, FOUR, LEGEND, OPTICAL, RADAR, RELIEF, manifest, write_rasters

from mm_model.data.sources import geotiff
from mm_model.data.sources.geotiff import GeotiffSource
from mm_model.data.sources.manifest import load_manifest
from mm_model.errors import ConfigError, RasterError

PATCH_PX = 16


@pytest.fixture
def folder(tmp_path):
    write_rasters(tmp_path / "rasters")
    save(tmp_path, manifest(tmp_path / "rasters"))
    return tmp_path


def save(folder, content):
    (folder / "manifest.yaml").write_text(yaml.safe_dump(content))


def source(folder, modalities=FOUR, gsd_m=10.0):
    return GeotiffSource(folder / "manifest.yaml", PATCH_PX, gsd_m, modalities)


def patches(folder, **options):
    made = source(folder, **options)
    return [p for unit in made.units() for p in made.read(unit)]


def stored(folder, scene, file):
    with rasterio.open(folder / "rasters" / scene / file) as dataset:
        return dataset.read(), dataset.transform


def test_every_whole_window_of_every_scene(folder):
    made = patches(folder)
    assert len(made) == 4 * 2 * 3
    assert len({p.patch_id for p in made}) == len(made)
    assert all(set(p.layers) == {m.name for m in FOUR} for p in made)
    assert all(p.grid.shape == (PATCH_PX, PATCH_PX) and p.gsd_m == 10 for p in made)


def test_layers_of_the_reference_grid_are_not_resampled(folder):
    for patch in patches(folder):
        scene = patch.patch_id.split("/")[1]
        values, transform = stored(folder, scene, "stack.tif")
        col, row = ~transform @ (patch.grid.transform[2], patch.grid.transform[5])
        window = (
            slice(round(row), round(row) + PATCH_PX),
            slice(round(col), round(col) + PATCH_PX),
        )
        raw = values[(slice(0, 3), *window)][::-1]
        layer = patch.layers[OPTICAL.name]
        np.testing.assert_array_equal(layer.valid, (raw != 0).all(axis=0))
        physical = np.clip(raw * 1e-4 - 0.01, 0, None).astype(np.float32)
        np.testing.assert_allclose(
            layer.values[:, layer.valid], physical[:, layer.valid], atol=1e-7
        )
        codes, _ = stored(folder, scene, "cover.tif")
        expected = np.vectorize(LEGEND.get)(codes[(slice(None), *window)])
        np.testing.assert_array_equal(patch.layers[COVER.name].values, expected)
        np.testing.assert_array_equal(patch.layers[COVER.name].valid, expected[0] != 0)


def test_power_becomes_decibels_on_the_finer_grid(folder):
    for patch in patches(folder, modalities=(RADAR,)):
        layer = patch.layers[RADAR.name]
        assert layer.valid.mean() > 0.9
        # Interpolation stays within what it interpolates.
        assert layer.values[:, layer.valid].min() >= 10 * np.log10(0.01) - 1e-4
        assert layer.values[:, layer.valid].max() <= 10 * np.log10(0.2) + 1e-4


def test_dates_come_from_scene_tag_or_nowhere(folder):
    layers = patches(folder)[0].layers
    assert layers[OPTICAL.name].acquired_at == "2020-06-04"
    assert layers[RADAR.name].acquired_at == "2020-06-07"
    assert layers[RELIEF.name].acquired_at is None


def test_the_rotated_grid_is_kept(folder):
    patch = next(p for p in patches(folder) if "/s1/" in p.patch_id)
    _, transform = stored(folder, "s1", "stack.tif")
    assert patch.grid.transform == tuple(transform)[:6]


def test_another_gsd_makes_a_new_grid(folder):
    made = patches(folder, gsd_m=20.0, modalities=(OPTICAL, COVER))
    assert made
    for patch in made:
        assert patch.grid.pixel_size == (20, 20)
        assert patch.grid.transform[2] % 20 == 0
        layer = patch.layers[COVER.name]
        assert set(np.unique(layer.values[0, layer.valid])) <= set(LEGEND.values())


def test_order_of_files_and_scenes_is_irrelevant(folder):
    before = [(u.unit_id, u.fingerprint) for u in source(folder).units()]
    content = manifest(folder / "rasters")
    made = content["sources"]["made"]
    made["scenes"] = dict(reversed(made["scenes"].items()))
    save(folder, content)
    assert [(u.unit_id, u.fingerprint) for u in source(folder).units()] == before


def test_the_fingerprint_tells_what_changed(folder):
    before = [u.fingerprint for u in source(folder).units()]
    file = folder / "rasters" / "s2" / "cover.tif"
    file.write_bytes(file.read_bytes() + b"\0")
    after = [u.fingerprint for u in source(folder).units()]
    assert [a != b for a, b in zip(before, after, strict=True)] == [False, False, True, False]


def test_an_unknown_class_names_file_and_code(folder):
    content = manifest(folder / "rasters")
    del content["sources"]["made"]["layers"][COVER.name]["classes"][2]
    save(folder, content)
    with pytest.raises(RasterError, match=r"cover\.tif: class 2"):
        patches(folder)


@pytest.mark.parametrize("file", ["stack.tif", "relief.tif", "radar.tif", "cover.tif"])
@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "text"])
def test_an_unreadable_file_is_named(folder, file, fault):
    path = folder / "rasters" / "s3" / file
    content = path.read_bytes()
    path.unlink()
    if fault != "missing":
        path.write_bytes(
            {"empty": b"", "truncated": content[: len(content) // 2], "text": b"hello"}[fault]
        )
    with pytest.raises(RasterError, match=rf"s3/{file}"):
        patches(folder)


def test_a_wrong_unit_is_noticed(folder):
    content = manifest(folder / "rasters")
    layers = content["sources"]["made"]["layers"]
    layers[RADAR.name]["unit"] = "dB"  # though the file holds power
    save(folder, content)
    with pytest.raises(RasterError, match=r"radar\.tif: median"):
        patches(folder)
    layers[RADAR.name]["unit"] = "power"
    layers[OPTICAL.name] |= {"scale": 1, "offset": 0, "out_of_range": "error"}
    save(folder, content)
    with pytest.raises(RasterError, match=r"stack\.tif: values .* outside"):
        patches(folder)


def test_scale_and_offset_of_the_file_hold_where_the_manifest_is_silent(folder):
    content = manifest(folder / "rasters", places=1)
    layer = content["sources"]["made"]["layers"][OPTICAL.name]
    expected = patches(folder)[0].layers[OPTICAL.name].values
    del layer["scale"], layer["offset"]
    save(folder, content)
    with rasterio.open(folder / "rasters" / "s0" / "stack.tif", "r+") as dataset:
        dataset.scales, dataset.offsets = [1e-4] * 5, [-0.01] * 5
    np.testing.assert_array_equal(patches(folder)[0].layers[OPTICAL.name].values, expected)


def test_out_of_range_can_be_masked(folder):
    def invalid():
        return [int((~p.layers[OPTICAL.name].valid).sum()) for p in patches(folder)]

    clipped = sum(invalid())
    content = manifest(folder / "rasters")
    content["sources"]["made"]["layers"][OPTICAL.name]["out_of_range"] = "mask"
    save(folder, content)
    masked = sum(invalid())
    # Of 5,000 stored values, 99 lie below zero; a pixel has three.
    assert clipped + 200 < masked < clipped + 600


def test_degrees_need_a_system_in_metres(folder):
    content = manifest(folder / "rasters", places=1)
    path = folder / "rasters" / "s0" / "stack.tif"
    values, _ = stored(folder, "s0", "stack.tif")
    path.unlink()
    from geotiff_fixtures import write

    write(path, values, rasterio.Affine(1.3e-4, 0, 15.0, 0, -9e-5, 45.15), "EPSG:4326", nodata=0)
    save(folder, content)
    with pytest.raises(ConfigError, match="32633"):
        patches(folder, modalities=(OPTICAL,))
    content["sources"]["made"]["crs"] = "utm"
    save(folder, content)
    made = patches(folder, modalities=(OPTICAL,))
    assert made
    assert all(p.grid.crs == "EPSG:32633" for p in made)


FAULTS = {
    "unknown key": lambda m: m["sources"]["made"].update(gsd=10),
    "unknown modality": lambda m: m["sources"]["made"]["layers"].update(
        sonar={"file": "a.tif", "unit": "dB"}
    ),
    "unit": lambda m: m["sources"]["made"]["layers"][RELIEF.name].update(unit="feet"),
    "bands": lambda m: m["sources"]["made"]["layers"][OPTICAL.name].update(bands=[1]),
    "legend to no class": lambda m: m["sources"]["made"]["layers"][COVER.name].update(
        classes={1: 11}
    ),
    "no legend": lambda m: m["sources"]["made"]["layers"][COVER.name].pop("classes"),
    "legend of numbers": lambda m: m["sources"]["made"]["layers"][RELIEF.name].update(
        classes={1: 10}
    ),
    "scaled classes": lambda m: m["sources"]["made"]["layers"][COVER.name].update(scale=2),
    "grid": lambda m: m["sources"]["made"].update(grid="sonar"),
    "scene date": lambda m: m["sources"]["made"]["scenes"]["s0"].update(date="June"),
    "without": lambda m: m["sources"]["made"]["scenes"]["s0"].update(without=["sonar"]),
    "no scenes": lambda m: m["sources"]["made"].update(scenes={}),
    "root": lambda m: m.update(root="nowhere"),
    "no file": lambda m: m["sources"]["made"]["layers"][RELIEF.name].pop("file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_manifest_is_refused_before_any_file_is_opened(folder, fault):
    content = copy.deepcopy(manifest(folder / "rasters"))
    FAULTS[fault](content)
    save(folder, content)
    with pytest.raises(ConfigError, match=r"manifest\.yaml"):
        load_manifest(folder / "manifest.yaml")


def test_scenes_override_and_leave_out(folder, monkeypatch):
    content = manifest(folder / "rasters")
    scenes = content["sources"]["made"]["scenes"]
    scenes["s0"] = {"place": "here", "without": [RADAR.name]}
    scenes["s1"] = {"place": "here", "layers": {RELIEF.name: {"date": "1999"}}}
    content["root"], content["root_variable"] = "nowhere", "SOME_ROOT"
    save(folder, content)
    monkeypatch.setenv("SOME_ROOT", str(folder / "rasters"))
    one, two, *_ = load_manifest(folder / "manifest.yaml")
    assert one.place_id == two.place_id == "made/here"
    assert RADAR.name not in one.layers
    assert two.layers[RELIEF.name].date == "1999"


def test_a_layer_may_come_from_several_files(folder):
    content = manifest(folder / "rasters")
    expected = patches(folder, modalities=(OPTICAL,))
    layer = content["sources"]["made"]["layers"][OPTICAL.name]
    for scene in range(4):
        values, transform = stored(folder, f"s{scene}", "stack.tif")
        from geotiff_fixtures import write

        for band in (1, 2, 3):
            path = folder / "rasters" / f"s{scene}" / f"b{band}.tif"
            write(path, values[[band - 1]], transform, nodata=0)
    layer["bands"] = [{"file": f"b{b}.tif", "band": 1} for b in (3, 2, 1)]
    del layer["file"]
    save(folder, content)
    found = patches(folder, modalities=(OPTICAL,))
    for a, b in itertools.zip_longest(found, expected):
        np.testing.assert_array_equal(a.layers[OPTICAL.name].values, b.layers[OPTICAL.name].values)
        np.testing.assert_array_equal(a.layers[OPTICAL.name].valid, b.layers[OPTICAL.name].valid)


def test_each_layer_remembers_the_distance_it_was_measured_at(folder):
    """Of its own file, whatever the grid it is brought onto; or what the manifest says."""
    for gsd_m in (10.0, 20.0):
        native = {n: x.native_gsd_m for n, x in patches(folder, gsd_m=gsd_m)[0].layers.items()}
        assert native == pytest.approx(
            {OPTICAL.name: 10, RADAR.name: 20, RELIEF.name: 25, COVER.name: 10}
        )
    content = manifest(folder / "rasters")
    content["sources"]["made"]["scenes"]["s2"]["layers"] = {OPTICAL.name: {"native_gsd_m": 30}}
    save(folder, content)
    told = {p.patch_id.split("/")[1]: p.layers[OPTICAL.name].native_gsd_m for p in patches(folder)}
    assert told == {"s0": 10, "s1": pytest.approx(10), "s2": 30, "s3": 10}
    content["sources"]["made"]["layers"][OPTICAL.name]["native_gsd_m"] = 0
    save(folder, content)
    with pytest.raises(ConfigError, match="native_gsd_m"):
        source(folder)


def test_a_large_scene_in_strips_gives_the_patches_of_the_whole(folder, monkeypatch):
    whole = patches(folder)
    monkeypatch.setattr(geotiff, "_PART_PX", 64)  # one row of patches at a time
    strips = patches(folder)
    assert [p.patch_id for p in strips] == [p.patch_id for p in whole]
    assert len({p.patch_id.split("/")[-1].split("-")[0] for p in strips}) > 1
    for mine, theirs in zip(strips, whole, strict=True):
        assert mine.grid == theirs.grid
        assert set(mine.layers) == set(theirs.layers)
        for name, layer in theirs.layers.items():
            got = mine.layers[name]
            # Exact, where the warp of the whole may be an eighth of a pixel off.
            assert (got.valid == layer.valid).mean() > 0.97
            both = got.valid & layer.valid
            spread = np.ptp(layer.values[:, layer.valid]) if layer.valid.any() else 0
            apart = np.abs(got.values[:, both].astype(float) - layer.values[:, both])
            assert np.quantile(apart, 0.95, method="lower") <= 0.15 * spread if both.any() else True


def test_memory_does_not_grow_with_the_number_of_strips(tmp_path, monkeypatch):
    width, height = 128, 4096
    rng = np.random.default_rng(0)
    with rasterio.open(
        tmp_path / "relief.tif",
        "w",
        driver="GTiff",
        width=width,
        height=height,
        count=1,
        dtype="float32",
        crs="EPSG:32633",
        transform=rasterio.Affine(10, 0, 300_000, 0, -10, 5_300_000),
    ) as dataset:
        dataset.write(rng.uniform(100, 200, (1, height, width)).astype(np.float32))
    layers = {RELIEF.name: {"file": "relief.tif", "unit": RELIEF.unit}}
    scenes = {"tall": {"date": "2021-07-01"}}
    made = {"licence": "none needed", "folder": ".", "grid": RELIEF.name, "layers": layers}
    save(tmp_path, {"root": ".", "sources": {"made": {**made, "scenes": scenes}}})
    monkeypatch.setattr(geotiff, "_PART_PX", width * 64)
    tall = source(tmp_path, (RELIEF,))
    (unit,) = tall.units()
    assert sum(1 for _ in tall.read(unit)) == height * width // PATCH_PX**2  # all is imported
    tracemalloc.start()
    try:
        for _ in tall.read(unit):
            pass
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < height * width * 4 / 3


def test_a_scene_in_strips_is_judged_as_a_whole(folder, monkeypatch):
    described = manifest(folder / "rasters")
    (source_of,) = described["sources"].values()
    source_of["layers"][RADAR.name]["unit"] = RADAR.unit  # it is power, around 0
    save(folder, described)
    said = []
    for limit in (4096 * 4096, 64):
        monkeypatch.setattr(geotiff, "_PART_PX", limit)
        with pytest.raises(RasterError, match=f"median of {RADAR.name}") as caught:
            patches(folder)
        said.append(str(caught.value).split("; got")[0])
    assert said[0] == said[1]
