"""The catalogue of real rasters, where they are: STAC by pystac, search by box by geopandas."""

from __future__ import annotations

import json
import os
from pathlib import Path

import geopandas
import pandas as pd
import pyarrow.parquet as pq
import pytest
import stac_geoparquet.arrow
import yaml
from pystac.validation import validate_dict

from mm_model.catalogue.write import page_of, write_catalogue
from mm_model.config import GeotiffConfig, load_params
from mm_model.data.index import INDEX
from mm_model.data.licences import licences
from mm_model.data.prepare import open_source, prepare
from mm_model.data.store import PatchStore

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("MM_REAL_DATA", ROOT.parent / "shared" / "data"))
SOURCES = ("rstoolbox_sentinel2", "terramesh_examples", "worldcereal_belgium_monthly")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not DATA.is_dir(), reason="no real rasters: set MM_REAL_DATA"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder `data` with patches, splits and catalogue."""
    folder = tmp_path_factory.mktemp("real")
    params = load_params(ROOT / "examples" / "real" / "params.yaml")
    manifest = yaml.safe_load((ROOT / "examples" / "real" / "manifest.yaml").read_text())
    manifest["root"] = str(DATA)
    manifest["sources"] = {name: manifest["sources"][name] for name in SOURCES}
    (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    config = params.prepare.model_copy(
        update={"geotiff": GeotiffConfig(manifest=folder / "manifest.yaml")}
    )
    out = folder / "data"
    prepare(
        open_source(config, params.selected),
        out / "patches",
        params.selected,
        shard_patches=50,
        min_valid_fraction=0.5,
    )
    store = PatchStore(out / "patches")
    splits = out / "splits.parquet"
    pd.DataFrame({"patch_id": store.patch_ids, "split": "train"}).to_parquet(splits)
    terms = licences(config, params.selected, folder)
    write_catalogue(out / "catalogue", "real", store, splits, params.selected, terms)
    return out


def test_items_are_valid_and_lie_where_the_index_says(data: Path) -> None:
    table = pq.read_table(data / "catalogue/items.parquet")
    items = list(stac_geoparquet.arrow.stac_table_to_items(table))
    assert len(items) == len(PatchStore(data / "patches"))
    for item in items:
        validate_dict(item, extensions=[])
    validate_dict(json.loads((data / "catalogue/collection.json").read_text()), extensions=[])
    ours = geopandas.read_parquet(data / "catalogue/items.parquet").set_index("id")
    theirs = geopandas.read_parquet(data / "patches" / INDEX).drop_duplicates("patch_id")
    theirs = theirs.set_index("patch_id")
    assert ours.geometry.geom_equals(theirs.geometry[ours.index]).all()


def test_a_search_by_box_finds_belgium_alone(data: Path) -> None:
    found = geopandas.read_parquet(data / "catalogue/items.parquet", bbox=(2, 50, 6, 52))
    assert set(found["mm:source"]) == {"worldcereal_belgium_monthly"}
    assert found["datetime"].dt.year.min() >= 2020
    assert found["datetime"].dt.year.max() <= 2021


def test_the_card_names_every_licence_and_the_page_every_place(data: Path) -> None:
    card = (data / "catalogue/card.md").read_text()
    for name in SOURCES:
        assert card.count(f"| `{name}` |") == 2  # with its patches, and with its licence
    assert "Copernicus DEM (c) DLR e.V. 2010-2014" in card
    page = page_of(data / "catalogue", data / "patches", data / "splits.parquet").read_text()
    index = PatchStore(data / "patches").index
    shown = [i for i in set(index["patch_id"]) if f"<code>{i}</code>" in page]
    assert len(shown) == index["place_id"].nunique()
