"""Items and collection as the field's tools read them: pystac, stac-geoparquet, geopandas."""

import json
from datetime import UTC, datetime

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pystac
import pytest
import stac_geoparquet.arrow
from catalogue_fixtures import MODALITIES_OF_ODD
from pystac.validation import validate_dict

from mm_model.catalogue import items as writing
from mm_model.catalogue.items import ALWAYS
from mm_model.data.index import INDEX
from mm_model.data.quality import day_span
from mm_model.data.store import PatchStore


@pytest.fixture(scope="module")
def items(catalogue):
    table = pq.read_table(catalogue / "items.parquet")
    return list(stac_geoparquet.arrow.stac_table_to_items(table))


@pytest.fixture(scope="module")
def located(store):
    """Positions of the patches that lie somewhere; the others are no items."""
    found = [i for i in range(len(store)) if store.read(i).grid.crs]
    assert 0 < len(found) < len(store)
    return found


def test_items_and_collection_are_valid_stac(catalogue, items):
    record = json.loads((catalogue / "collection.json").read_text())
    validate_dict(record, extensions=[])
    for item in items:
        validate_dict(item, extensions=[])
    collection = pystac.Collection.from_dict(record)
    assert "3 patches that lie nowhere are no items" in collection.description
    assert collection.extent.spatial.bboxes[0][0] == -180  # a place lies on the antimeridian
    assert set(collection.item_assets) == {m.name for m in MODALITIES_OF_ODD}
    broken = {**items[0], "bbox": ["west"]}
    with pytest.raises(pystac.STACValidationError):
        validate_dict(broken, extensions=[])


def test_a_patch_is_an_item_and_a_layer_an_asset(folder, store, located, items):
    splits = pq.read_table(folder / "splits.parquet").to_pandas().set_index("patch_id")["split"]
    assert [item["id"] for item in items] == [store.patch_ids[i] for i in located]
    assert any(len(item["assets"]) < len(MODALITIES_OF_ODD) for item in items)
    for position, item in zip(located, items, strict=True):
        patch, rows = store.read(position), store.described(position)
        found = pystac.Item.from_dict(item)
        assert set(found.assets) == set(patch.layers)
        assert item["properties"]["mm:modalities"] == list(patch.layers)
        assert item["properties"]["mm:split"] == splits[patch.patch_id]
        assert item["properties"]["mm:place_id"] == patch.place_id
        assert item["properties"]["proj:transform"] == list(patch.grid.transform)
        assert item["properties"]["proj:shape"] == list(patch.grid.shape)
        code, wkt = (item["properties"][f"proj:{k}"] for k in ("code", "wkt2"))
        assert (code or wkt or "") == patch.grid.crs
        for name, asset in item["assets"].items():
            percent = asset["statistics"]["valid_percent"]
            assert percent == pytest.approx(100 * patch.layers[name].valid.mean())
            assert asset["mm:acquired_at"] == rows[name]["acquired_at"]


def test_an_asset_leads_to_its_values(catalogue, store, located, items):
    for position, item in zip(located, items, strict=True):
        for name, asset in item["assets"].items():
            shard = catalogue / asset["href"]
            table = pa.ipc.open_file(pa.memory_map(str(shard))).read_all()
            values = table["values"].combine_chunks().to_numpy_ndarray()[asset["mm:row"]]
            layer = store.read(position, [name]).layers[name]
            np.testing.assert_array_equal(values, layer.values)
            assert asset["data_type"] == values.dtype
            assert len(asset["bands"]) == len(values)


def test_outlines_are_those_of_the_index(catalogue, store, located):
    found = geopandas.read_parquet(catalogue / "items.parquet").set_index("id")
    index = store.path / INDEX
    wanted = geopandas.read_parquet(index).drop_duplicates("patch_id")
    wanted = wanted.set_index("patch_id")
    assert found.crs == wanted.crs
    assert list(found.index) == [store.patch_ids[i] for i in located]
    assert found.geometry.geom_equals(wanted.geometry[found.index]).all()
    assert {"Polygon", "MultiPolygon"} == set(found.geometry.geom_type)
    boxes = (pq.read_table(p, columns=["bbox"]) for p in (catalogue / "items.parquet", index))
    ours, theirs = (table["bbox"].to_pylist() for table in boxes)
    assert ours == [theirs[store.rows(i).index[0]] for i in located]


def test_times_say_what_is_known(store, located, items):
    undated = 0
    for position, item in zip(located, items, strict=True):
        layers = store.described(position).values()
        spans = [day_span(r["acquired_at"]) for r in layers if r["acquired_at"]]
        properties = item["properties"]
        begin, end = (
            datetime.fromisoformat(properties[k]) for k in ("start_datetime", "end_datetime")
        )
        if not spans:
            undated += 1
            assert properties["datetime"] is None
            assert (begin, end) == ALWAYS
            continue
        assert datetime.fromisoformat(properties["datetime"]) == begin
        assert begin == datetime.fromordinal(min(s[0] for s in spans)).replace(tzinfo=UTC)
        assert end.date() == datetime.fromordinal(max(s[1] for s in spans)).date()
    assert 0 < undated < len(items)


def test_a_large_index_makes_the_same_items(catalogue, store, census, tmp_path, monkeypatch):
    parts = PatchStore(store.path)
    parts.index = pd.concat([store.index.iloc[:7], store.index.iloc[7:]])
    assert isinstance(pa.array(parts.index["shard"]), pa.ChunkedArray)
    record = json.loads((catalogue / "collection.json").read_text())
    monkeypatch.setattr(writing, "_ROW_GROUP", 4)
    writing.write_items(tmp_path / "items.parquet", parts, census, record)
    made = pq.ParquetFile(tmp_path / "items.parquet")
    assert made.num_row_groups > 2
    assert made.read().equals(pq.read_table(catalogue / "items.parquet"), check_metadata=True)


def test_the_file_carries_its_collection(catalogue):
    facts = json.loads(pq.read_schema(catalogue / "items.parquet").metadata[b"stac-geoparquet"])
    record = json.loads((catalogue / "collection.json").read_text())
    assert facts["collections"] == {record["id"]: record}
    hrefs = [a["href"] for a in record["assets"].values()]
    hrefs += [link["href"] for link in record["links"]]
    assert all((catalogue / href).is_file() for href in hrefs)
