"""Stores, rasters and a DVC remote in object storage: a real S3 server on loopback."""

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests/unit/data"), str(Path(__file__).parent)]
from data_fixtures import PAIR, PlacesSource  # noqa: E402
from geotiff_fixtures import FOUR, manifest, write_rasters  # noqa: E402
from object_storage import objects, s3_server  # noqa: E402

from mm_model.data.prepare import prepare  # noqa: E402
from mm_model.data.sources.geotiff import GeotiffSource  # noqa: E402
from mm_model.data.storage import open_folder  # noqa: E402
from mm_model.data.store import PatchStore  # noqa: E402
from mm_model.errors import ConfigError, DataError, RasterError, ServiceError  # noqa: E402

pytestmark = pytest.mark.integration
OPTIONS = {"shard_patches": 5, "min_valid_fraction": 0.0}
URL = "s3://world/patches"


@pytest.fixture(scope="module")
def server(free_tcp_port_factory):
    with s3_server(free_tcp_port_factory(), "world", "remote", "rasters") as given:
        yield given


@pytest.fixture
def s3(server, monkeypatch):
    environment, client = server
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    yield client
    for bucket in ("world", "remote", "rasters"):
        for key in objects(client, bucket):
            client.delete_object(Bucket=bucket, Key=key)


def same(one: PatchStore, other: PatchStore) -> None:
    assert one.patch_ids == other.patch_ids
    assert list(one.index["sha256"]) == list(other.index["sha256"])
    for mine, theirs in zip(
        one.read_many(range(len(one))), other.read_many(range(len(other))), strict=True
    ):
        assert mine.grid == theirs.grid
        assert set(mine.layers) == set(theirs.layers)
        for name, layer in theirs.layers.items():
            np.testing.assert_array_equal(mine.layers[name].values, layer.values)
            np.testing.assert_array_equal(mine.layers[name].valid, layer.valid)


def test_a_store_in_a_bucket_is_the_store_on_a_disk(tmp_path, s3):
    prepare(PlacesSource(7, PAIR), tmp_path / "here", PAIR, **OPTIONS)
    prepare(PlacesSource(7, PAIR), tmp_path / "index", PAIR, shards=URL, **OPTIONS)
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == ["index.parquet", "store.json"]
    here = PatchStore(tmp_path / "here")
    same(PatchStore(tmp_path / "index"), here)
    same(pickle.loads(pickle.dumps(PatchStore(URL))), here)  # by its address alone
    shards = {k for k in objects(s3, "world") if k.endswith(".arrow")}
    assert {k.removeprefix("patches/") for k in shards} == set(here.index["shard"])
    assert not [k for k in objects(s3, "world") if "/parts/" in k]
    for name in here.index["shard"].unique():
        body = s3.get_object(Bucket="world", Key=f"patches/{name}")["Body"].read()
        assert body == (tmp_path / "here" / name).read_bytes()


def test_added_places_send_only_what_is_new(tmp_path, s3):
    prepare(PlacesSource(30, PAIR), tmp_path / "index", PAIR, shards=URL, **OPTIONS)
    before = {k: v for k, v in objects(s3, "world").items() if k.endswith(".arrow")}
    more = PlacesSource(33, PAIR)
    prepare(more, tmp_path / "index", PAIR, shards=URL, **OPTIONS)
    assert more.read_units == ["place030", "place031", "place032"]
    after = objects(s3, "world")
    assert {k: after[k] for k in before} == before
    prepare(PlacesSource(33, PAIR), tmp_path / "whole", PAIR, **OPTIONS)
    same(PatchStore(tmp_path / "index"), PatchStore(tmp_path / "whole"))
    # A store on a disk moves into the bucket without a raster being read.
    moved = PlacesSource(33, PAIR)
    prepare(moved, tmp_path / "whole", PAIR, shards="s3://world/moved", **OPTIONS)
    assert not moved.read_units
    same(PatchStore("s3://world/moved"), PatchStore(tmp_path / "index"))


class Dies(PlacesSource):
    def read(self, unit):
        if unit.unit_id == "place004":
            raise KeyboardInterrupt
        yield from super().read(unit)


def test_an_interrupted_run_goes_on_from_the_parts_in_the_bucket(tmp_path, s3):
    with pytest.raises(KeyboardInterrupt):
        prepare(Dies(6, PAIR), tmp_path / "index", PAIR, shards=URL, **OPTIONS)
    assert len([k for k in objects(s3, "world") if "/parts/" in k]) == 4
    again = PlacesSource(6, PAIR)
    prepare(again, tmp_path / "index", PAIR, shards=URL, **OPTIONS)
    assert again.read_units == ["place004", "place005"]
    prepare(PlacesSource(6, PAIR), tmp_path / "whole", PAIR, **OPTIONS)
    same(PatchStore(URL), PatchStore(tmp_path / "whole"))


def test_what_is_wrong_with_the_storage_is_said(tmp_path, s3, monkeypatch, free_tcp_port):
    prepare(PlacesSource(4, PAIR), tmp_path / "index", PAIR, shards=URL, **OPTIONS)
    store = PatchStore(tmp_path / "index")
    shard = store.index["shard"][0]
    s3.put_object(Bucket="world", Key=f"patches/{shard}", Body=b"short")
    with pytest.raises((DataError, ServiceError), match=shard):
        store.read(0)
    s3.delete_object(Bucket="world", Key=f"patches/{shard}")
    with pytest.raises(DataError, match=rf"{shard} cannot be read.*run the stage prepare again"):
        store.read(0)
    with pytest.raises(DataError, match="no patch store"):
        PatchStore("s3://world/nowhere")
    with pytest.raises(ServiceError, match="none/of"):
        prepare(PlacesSource(4, PAIR), tmp_path / "x", PAIR, shards="s3://none/of", **OPTIONS)
    with pytest.raises(ConfigError, match="s3://bucket/folder"):
        open_folder("ftp://somewhere/else")
    assert not (tmp_path / "x").exists()


def test_rasters_in_a_bucket_give_the_patches_of_rasters_on_a_disk(tmp_path, s3):
    write_rasters(tmp_path / "rasters")
    for path in (tmp_path / "rasters").rglob("*.tif"):
        key = f"of/{path.relative_to(tmp_path / 'rasters')}"
        s3.put_object(Bucket="rasters", Key=key, Body=path.read_bytes())
    described = manifest(tmp_path / "rasters")
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(described))
    (tmp_path / "there.yaml").write_text(yaml.safe_dump({**described, "root": "s3://rasters/of"}))
    stores = []
    for name in ("here", "there"):
        source = GeotiffSource(tmp_path / f"{name}.yaml", 16, 10.0, FOUR)
        prepare(source, tmp_path / name, FOUR, **OPTIONS)
        stores.append(PatchStore(tmp_path / name))
    same(*stores)
    source = GeotiffSource(tmp_path / "there.yaml", 16, 10.0, FOUR)
    before = {u.unit_id: u.fingerprint for u in source.units()}
    radar = "of/s2/radar.tif"
    s3.put_object(Bucket="rasters", Key=radar, Body=b"broken")
    changed = {u.unit_id for u in source.units() if before[u.unit_id] != u.fingerprint}
    assert changed == {u for u in before if u.endswith("/s2")}
    with pytest.raises(RasterError, match=r"s2/radar\.tif cannot be read as GeoTIFF"):
        prepare(source, tmp_path / "there", FOUR, **OPTIONS)
    s3.delete_object(Bucket="rasters", Key=radar)
    with pytest.raises(RasterError, match=r"s2/radar\.tif does not exist"):
        source.units()


def run(folder, *command):
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "MM_PROJECT": str(folder),
            "DVC_SITE_CACHE_DIR": str(folder / "site"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pipeline(folder, places, **section):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["project"] = str(ROOT)
    few = {"seed": 7, "places": places, "patches_per_place": 4, "complete_share": 1.0}
    params["prepare"].update(
        patch_px=32, synthetic=few, shard_patches=16, **{"workers": 0, **section}
    )
    params["prepare"]["geotiff"]["manifest"] = str(ROOT / "examples/real/manifest.yaml")
    params["prepare"]["stac"]["search"] = str(ROOT / "examples/stac/search")
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())


def test_dvc_pushes_what_is_new_and_pulls_the_same_files(tmp_path, s3):
    here, there = tmp_path / "here", tmp_path / "there"
    pipeline(here, 12)
    run(here, "dvc", "init", "--no-scm", "-q")
    run(here, "dvc", "remote", "add", "-d", "bucket", "s3://remote/dvc")
    run(here, "dvc", "remote", "modify", "bucket", "endpointurl", os.environ["AWS_ENDPOINT_URL"])
    run(here, "dvc", "repro", "-q", "prepare")
    run(here, "dvc", "push", "-q")
    before = objects(s3, "remote")
    shards = {p.name: p.read_bytes() for p in (here / "data/patches").glob("*.arrow")}
    pipeline(here, 13)
    run(here, "dvc", "repro", "-q", "prepare")
    grown = {p.name: p.read_bytes() for p in (here / "data/patches").glob("*.arrow")}
    new = {n for n, content in grown.items() if shards.get(n) != content}
    assert 0 < len(new) < len(grown) / 2
    run(here, "dvc", "push", "-q")
    after = objects(s3, "remote")
    assert {k: after[k] for k in before} == before
    # New shards, the index, store.json and the list of the folder.
    assert len(after) - len(before) == len(new) + 3
    there.mkdir()
    for name in (".dvc/config", "params.yaml", "dvc.yaml", "dvc.lock"):
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_bytes((here / name).read_bytes())
    run(there, "dvc", "pull", "-q", "prepare")
    same(PatchStore(there / "data/patches"), PatchStore(here / "data/patches"))


def test_ray_workers_write_to_a_bucket(tmp_path, s3, monkeypatch, free_tcp_port):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_tcp_port}")
    pipeline(tmp_path / "alone", 6)
    run(tmp_path / "alone", "mm_model.stages.prepare")
    pipeline(tmp_path / "two", 6, workers=2, shards="s3://world/two")
    assert "24 patches" in run(tmp_path / "two", "mm_model.stages.prepare")
    same(PatchStore("s3://world/two"), PatchStore(tmp_path / "alone/data/patches"))


def content(client, folder):
    """Hashes of everything in the bucket, and of what lies in the folder."""
    there = {
        key: client.get_object(Bucket="world", Key=key)["Body"].read()
        for key in objects(client, "world")
    }
    here = {p.name: p.read_bytes() for p in (folder / "data/patches").iterdir()}
    return [
        {k: hashlib.sha256(v).hexdigest() for k, v in sorted(found.items())}
        for found in (there, here)
    ]


def kill_when(folder, client, is_time):
    """Start the stage and kill it, with SIGKILL, as soon as the bucket's keys say so."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mm_model.stages.prepare"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "MM_PROJECT": str(folder)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + 240
    try:
        while not is_time(objects(client, "world")):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was through before it could be killed"


def test_killed_while_it_writes_to_a_bucket_it_ends_in_the_same_hashes(tmp_path, s3):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        pipeline(folder, 12, shards=URL)
        params = yaml.safe_load((folder / "params.yaml").read_text())
        params["prepare"]["shard_patches"] = 4  # many shards, so that kills hit them
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
    run(whole, "mm_model.stages.prepare")
    undisturbed = content(s3, whole)
    for key in objects(s3, "world"):
        s3.delete_object(Bucket="world", Key=key)

    def number(keys, suffix):
        return sum(key.endswith(suffix) for key in keys)

    kill_when(killed, s3, lambda keys: number(keys, ".part") >= 3)
    parts = {k: v for k, v in objects(s3, "world").items() if k.endswith(".part")}
    kill_when(killed, s3, lambda keys: number(keys, ".part") > len(parts) + 2)
    kill_when(killed, s3, lambda keys: number(keys, ".arrow") >= 7)
    left = objects(s3, "world")
    assert {k: left[k] for k in parts} == parts  # what was made is not made again
    assert not (killed / "data/patches").exists()
    run(killed, "mm_model.stages.prepare")
    assert content(s3, killed) == undisturbed
