import multiprocessing
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import CONTINUOUS, PAIR, make_store, place_patches

from mm_model.data.index import INDEX
from mm_model.data.patch import Layer
from mm_model.data.store import PatchStore, ShardWriter
from mm_model.errors import DataError
from mm_model.modalities import MODALITIES

ALL = tuple(MODALITIES.values())


def same(read, written):
    assert (read.patch_id, read.place_id, read.source) == (
        written.patch_id,
        written.place_id,
        written.source,
    )
    assert read.grid == written.grid
    assert read.gsd_m == written.gsd_m
    assert set(read.layers) == set(written.layers)
    for name, layer in written.layers.items():
        np.testing.assert_array_equal(read.layers[name].valid, layer.valid)
        np.testing.assert_array_equal(
            read.layers[name].values[:, layer.valid], layer.values[:, layer.valid]
        )
        assert read.layers[name].values.dtype == MODALITIES[name].dtype
        assert read.layers[name].acquired_at == layer.acquired_at
        assert read.layers[name].native_gsd_m == layer.native_gsd_m


def test_patches_come_back_as_they_were_in_any_order(tmp_path):
    written = [p for place in range(7) for p in place_patches(place, ALL)]
    store = make_store(tmp_path / "store", 7, ALL)
    assert store.patch_ids == [p.patch_id for p in written]
    for position in np.random.default_rng(0).permutation(len(written)):
        same(store.read(int(position)), written[position])


def test_named_modalities_alone_are_read(tmp_path):
    store = make_store(tmp_path / "store", 2, ALL)
    some = [ALL[0].name, ALL[3].name]
    for position in range(len(store)):
        whole = store.read(position)
        assert set(store.read(position, some).layers) == set(whole.layers) & set(some)


def test_reading_copies_no_values(tmp_path):
    layer = make_store(tmp_path / "store", 2).read(1).layers[PAIR[0].name]
    assert not layer.values.flags.writeable
    assert not layer.values.flags.owndata


def test_what_an_invalid_pixel_held_is_not_kept(tmp_path):
    patch = next(place_patches(1, PAIR))
    digests = []
    for i, filler in enumerate((0, 7)):
        layers = {
            n: Layer(np.where(x.valid, x.values, filler).astype(x.values.dtype), x.valid)
            for n, x in patch.layers.items()
        }
        with ShardWriter(tmp_path / str(i), PAIR, 4) as writer:
            writer.add(replace(patch, layers=layers))
        digests.append([p.read_bytes() for p in sorted((tmp_path / str(i)).iterdir())])
    assert digests[0] == digests[1]


def test_index_measures_valid_pixels_only(tmp_path):
    store = make_store(tmp_path / "store", 3)
    for position in range(len(store)):
        patch = store.read(position)
        for row in store.rows(position).to_dict("records"):
            layer = patch.layers[row["modality"]]
            known = layer.values[:, layer.valid].astype(float)
            assert row["min"] == known.min()
            assert row["max"] == known.max()
            assert row["mean"] == pytest.approx(known.mean(), rel=1e-12)
            assert row["valid_fraction"] == layer.valid.mean()
    assert store.index["sha256"].nunique() == len(store.index)


def test_other_tools_read_the_shards(tmp_path):
    make_store(tmp_path / "store", 3)
    modality = PAIR[0]
    table = pa.ipc.open_file(tmp_path / "store" / f"{modality.name}-00001.arrow").read_all()
    assert table.schema.metadata[b"unit"].decode() == modality.unit
    tensors = table["values"].combine_chunks().to_numpy_ndarray()
    assert tensors.shape == (4, len(modality.bands), 8, 12)


def test_few_files(tmp_path):
    store = make_store(tmp_path / "store", 20, shard_patches=1000)
    assert len(list(store.path.iterdir())) == len(PAIR) + 1


def _first_value(store):
    return float(np.nansum(store.read(3).layers[PAIR[0].name].values))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_other_processes_read_it_too(tmp_path, method):
    store = make_store(tmp_path / "store", 3)
    here = _first_value(store)  # opens the maps before the fork
    assert _first_value(pickle.loads(pickle.dumps(store))) == here
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_first_value, (store,)) == here


def test_a_native_distance_that_is_not_known_is_none(tmp_path):
    patch = next(place_patches(0, PAIR))
    layers = {n: Layer(x.values, x.valid) for n, x in patch.layers.items()}
    with ShardWriter(tmp_path / "s", PAIR, 4) as writer:
        writer.add(replace(patch, layers=layers))
    read = PatchStore(tmp_path / "s").read(0)
    assert {x.native_gsd_m for x in read.layers.values()} == {None}


def test_an_index_of_another_version_says_what_to_do(tmp_path):
    store = make_store(tmp_path / "store", 1)
    store.index.drop(columns="native_gsd_m").to_parquet(store.path / "index.parquet")
    with pytest.raises(DataError, match=r"native_gsd_m.*run the stage prepare again"):
        PatchStore(store.path)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="run the stage prepare"):
        PatchStore(tmp_path)
    store = make_store(tmp_path / "store", 2)
    with pytest.raises(DataError, match="position"):
        store.read(len(store))
    patch = next(place_patches(0, PAIR))
    with ShardWriter(tmp_path / "twice", PAIR, 4) as writer:
        writer.add(patch)
        with pytest.raises(DataError, match="same id"):
            writer.add(patch)
        with pytest.raises(DataError, match="no layer"):
            writer.add(replace(patch, patch_id="empty", layers={}))
    damaged = store.path / f"{PAIR[0].name}-00000.arrow"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(DataError, match=damaged.name):
        PatchStore(store.path).read(0)


def test_a_half_written_folder_is_no_store(tmp_path):
    def stop_halfway():
        with ShardWriter(tmp_path / "s", PAIR, 4) as writer:
            writer.add(next(place_patches(0, PAIR)))
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        stop_halfway()
    with pytest.raises(DataError, match="no patch store"):
        PatchStore(tmp_path / "s")


def test_patches_of_another_size_are_refused(tmp_path):
    with ShardWriter(tmp_path / "s", [CONTINUOUS[0]], 4) as writer:
        writer.add(next(place_patches(0, [CONTINUOUS[0]])))
        with pytest.raises(DataError, match="allowed"):
            writer.add(next(place_patches(1, [CONTINUOUS[0]], shape=(9, 12))))


def test_described_rows_are_plain_objects_and_texts_are_held_once(tmp_path):
    store = make_store(tmp_path / "store", 5)
    rows = [row for at in range(len(store)) for row in store.described(at).values()]
    assert {type(v) for row in rows for v in row.values()} <= {str, int, float, type(None)}
    for row, (_, expected) in zip(rows, store.index.iterrows(), strict=True):
        for column, value in row.items():
            assert value == expected[column] or (value is None and pd.isna(expected[column]))
    assert any(row["shift_row_px"] is None for row in rows)
    assert len({id(row["crs"]) for row in rows}) == 1


def test_an_index_of_many_row_groups_reads_as_one(tmp_path):
    whole = make_store(tmp_path / "whole", 6, shard_patches=1000)
    cut = make_store(tmp_path / "cut", 6, shard_patches=2)
    assert pq.ParquetFile(whole.path / INDEX).num_row_groups == 1
    assert pq.ParquetFile(cut.path / INDEX).num_row_groups > 3
    where = ["shard", "row", "values_at", "mask_at"]
    pd.testing.assert_frame_equal(cut.index.drop(columns=where), whole.index.drop(columns=where))
    names = pq.read_schema(cut.path / INDEX).metadata
    assert names == pq.read_schema(whole.path / INDEX).metadata


def test_the_index_says_where_a_reader_of_arrow_finds_each_layer(tmp_path):
    store = make_store(tmp_path / "store", 7, ALL, shard_patches=6)
    masked = 0
    for row in store.index.to_dict("records"):
        table = pa.ipc.open_file(store.path / row["shard"]).read_all()
        (values,) = table["values"].combine_chunks().slice(row["row"], 1).to_numpy_ndarray()
        mask = table["valid"][row["row"]].as_py()
        content = (store.path / row["shard"]).read_bytes()
        assert content[row["values_at"] :].startswith(values.tobytes())
        assert values.shape == (row["bands"], row["height"], row["width"])
        assert values.dtype == row["dtype"]
        assert (row["mask_at"] == 0) == (mask is None)
        if mask is not None:
            masked += 1
            assert content[row["mask_at"] :].startswith(mask)
    assert 0 < masked < len(store.index)
