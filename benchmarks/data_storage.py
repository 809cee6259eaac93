"""A store in object storage: bytes and requests of adding places, and of reading patches.

The server is moto's, on loopback: it is real S3 to its clients, and slow. Bytes, requests and
objects are those of any server; times are not.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record, setting
from mm_model.config import SyntheticConfig
from mm_model.data.prepare import prepare
from mm_model.data.sources.synthetic import SyntheticSource
from mm_model.data.store import PatchStore

PLACES, SHARD_PATCHES = 60, 64
READ = 64


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Of a synthetic store with every modality, 16 patches a place."""
    chosen = setting.params()

    def write(places: int, out: Path) -> None:
        config = SyntheticConfig(seed=7, places=places, patches_per_place=16, complete_share=1.0)
        prepare(
            SyntheticSource(config, 32, 10.0, chosen.selected),
            out,
            chosen.selected,
            shard_patches=SHARD_PATCHES,
            min_valid_fraction=0.5,
            shards="s3://world/patches",
        )

    with tempfile.TemporaryDirectory(prefix="mm-bench-") as name, loopback_s3("world") as client:
        out = Path(name) / "patches"
        write(PLACES, out)
        before = _shards(sizes(client, "world"))
        write(PLACES + 1, out)
        after = _shards(sizes(client, "world"))
        store = PatchStore("s3://world/patches")
        order = np.random.default_rng(0).permutation(len(store))[:READ].tolist()
        began = time.perf_counter()
        patches = store.read_many(order)
        seconds = time.perf_counter() - began
    new = set(after) - set(before)
    read = sum(y.values.nbytes for p in patches for y in p.layers.values())
    shards = {s for at in order for s in store.rows(at)["shard"]}
    figures = {
        "s3_objects": len(before),
        "s3_mb": sum(before.values()) / 1e6,
        "s3_old_shards_untouched_share": sum(after.get(k) == v for k, v in before.items())
        / len(before),
        "s3_add_one_place_objects": len(new),
        "s3_add_one_place_mb": sum(after[k] for k in new) / 1e6,
        "s3_add_one_place_share": sum(after[k] for k in new) / sum(after.values()),
        "s3_read_many_patches": READ,
        "s3_read_many_objects_asked": len(shards),
        "s3_read_many_mb": read / 1e6,
        "s3_read_many_patches_per_s": READ / seconds,
    }
    return figures, {
        "": f"{PLACES} places of 16 patches of 32 px, at most {SHARD_PATCHES} patches a shard; "
        "moto's server.",
        "s3_add_one_place_share": "of the bytes of the store",
        "s3_read_many_patches_per_s": "a batch in random order, by range, all shards at once",
    }


@contextmanager
def loopback_s3(*buckets: str) -> Iterator[Any]:
    """A client of moto's server; within, the environment of this process leads to it, too."""
    sys.path.insert(0, str(record.ROOT / "tests" / "integration"))
    from object_storage import s3_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = dict(os.environ)
    try:
        with s3_server(port, *buckets) as (environment, client):
            os.environ.update(environment)
            yield client
    finally:
        os.environ.clear()
        os.environ.update(before)


def sizes(client: Any, bucket: str) -> dict[str, int]:
    """Bytes of every object."""
    from object_storage import objects

    return {key: size for key, (_, _, size) in objects(client, bucket).items()}


def _shards(found: dict[str, int]) -> dict[str, int]:
    return {key: size for key, size in found.items() if key.endswith(".arrow")}
