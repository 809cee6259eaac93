"""The example manifest on the real rasters, where they are: checked against bare GDAL."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "serving"))
from serving_fixtures import make_generator

from mm_model.config import GeotiffConfig, load_params
from mm_model.data import raster
from mm_model.data.prepare import open_source, prepare
from mm_model.data.sources.geotiff import GeotiffSource
from mm_model.data.store import PatchStore
from mm_model.serving.generator import Request
from mm_model.serving.uploads import read_layers

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("MM_REAL_DATA", ROOT.parent / "shared" / "data"))

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not DATA.is_dir(), reason="no real rasters: set MM_REAL_DATA"),
]


@pytest.fixture(scope="module")
def source() -> GeotiffSource:
    params = load_params(ROOT / "examples" / "real" / "params.yaml")
    os.environ["MM_REAL_DATA"] = str(DATA)
    manifest = ROOT / "examples" / "real" / "manifest.yaml"
    return GeotiffSource(
        manifest, params.prepare.patch_px, params.prepare.gsd_m[0], params.selected
    )


def patches(source: GeotiffSource, unit_id: str) -> list:
    (unit,) = [u for u in source.units() if u.unit_id == unit_id]
    return list(source.read(unit))


def test_every_scene_gives_layers_within_their_ranges(source: GeotiffSource) -> None:
    seen: dict[str, int] = {}
    for unit in source.units():
        for patch in source.read(unit):
            for name, layer in patch.layers.items():
                seen[name] = seen.get(name, 0) + 1
                known = layer.values[:, layer.valid]
                low, high = source._modalities[name].valid_range
                assert known.size == 0 or (known.min() >= low and known.max() <= high), unit
    assert set(seen) == {"rgb", "nir", "sar", "dem", "map"}
    assert min(seen.values()) > 50


def test_values_and_places_are_those_of_the_files(source: GeotiffSource) -> None:
    folder = DATA / "terramesh_examples" / "38D_378R_2_3"
    stack, radar, cover = (
        rasterio.open(folder / name) for name in ("s2_l2a.tif", "s1.tif", "lulc.tif")
    )
    found = patches(source, "terramesh_examples/38D_378R_2_3")
    assert len(found) == 9  # 224 px a side in patches of 64
    red, green, blue = (stack.descriptions.index(band) + 1 for band in ("B04", "B03", "B02"))
    for patch in found:
        col, row = ~radar.transform * (patch.grid.transform[2], patch.grid.transform[5])
        window = rasterio.windows.Window(round(col), round(row), 64, 64)
        expected = radar.window_transform(window)
        assert patch.grid.transform == tuple(expected)[:6]
        assert patch.grid.crs == f"EPSG:{radar.crs.to_epsg()}"
        assert np.array_equal(patch.layers["sar"].values, radar.read(window=window))
        numbers = stack.read([red, green, blue], window=window)
        assert np.allclose(patch.layers["rgb"].values, numbers * 1e-4, rtol=0, atol=1e-6)
        codes = cover.read(1, window=window)
        for esri, worldcover in ((1, 80), (2, 10), (4, 40), (5, 50), (9, 30)):
            assert (patch.layers["map"].values[0][codes == esri] == worldcover).all()


def test_a_month_without_clear_sky_lacks_its_optical_layers(source: GeotiffSource) -> None:
    (december,) = patches(source, "worldcereal_belgium_monthly/2020-12")
    assert set(december.layers) == {"sar", "dem", "map"}


def test_a_real_radar_file_is_answered_on_its_own_grid() -> None:
    path = DATA / "terramesh_examples" / "38D_378R_2_3" / "s1.tif"
    generator = make_generator()
    layers = read_layers({"sar": path.read_bytes()}, generator)
    (result,) = generator.generate([Request(layers, ("map",), steps=1)])
    with rasterio.open(path) as file:
        assert result.grid.transform == tuple(file.transform)[:6]
        assert result.grid == raster.read_header(path).grid
        assert result.values["map"].shape == (1, 1, file.height, file.width)


def test_real_places_at_two_distances_keep_the_native_one_of_each_layer(tmp_path: Path) -> None:
    params = load_params(ROOT / "examples" / "real" / "params.yaml")
    os.environ["MM_REAL_DATA"] = str(DATA)
    manifest = yaml.safe_load((ROOT / "examples" / "real" / "manifest.yaml").read_text())
    manifest["root"] = str(DATA)
    some = ("majortom_s2_sample", "terramesh_examples", "zion_landsat8")
    manifest["sources"] = {name: manifest["sources"][name] for name in some}
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    config = params.prepare.model_copy(
        update={
            "gsd_m": (10.0, 20.0),
            "geotiff": GeotiffConfig(manifest=tmp_path / "manifest.yaml"),
        }
    )
    opened = open_source(config, params.selected)
    prepare(opened, tmp_path / "patches", params.selected, shard_patches=99, min_valid_fraction=0.5)
    index = PatchStore(tmp_path / "patches").index
    distances = index.groupby("source")["gsd_m"].agg(lambda column: sorted(set(column))).to_dict()
    assert distances == {
        "majortom_s2_sample": [10, 20],
        "terramesh_examples": [10, 20],
        "zion_landsat8": [30],  # fixed by the manifest
    }
    native = index.groupby(["source", "modality"])["native_gsd_m"].agg(set).to_dict()
    assert native["terramesh_examples", "rgb"] == native["majortom_s2_sample", "nir"] == {10}
    assert native["terramesh_examples", "dem"] == {30}
    assert native["zion_landsat8", "dem"] == {90}
    # The same ground, four times fewer pixels: what is coarse is the mean of what is fine.
    for place, rows in index[index["modality"] == "nir"].groupby("place_id"):
        fine, coarse = (rows[rows["gsd_m"] == gsd]["mean"].mean() for gsd in (10, 20))
        assert coarse == pytest.approx(fine, rel=0.25), place
