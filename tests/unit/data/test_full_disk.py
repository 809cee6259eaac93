"""What is written where there is no room: whole, or an error and nothing left.

A limit on the size of a file stands for a full disk: it needs no root, and stops at any byte.
"""

from __future__ import annotations

import os
import resource
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import rasterio

from mm_model.data import raster
from mm_model.data.files import needs_room, prune, write_atomically
from mm_model.data.strips import CogWriter, write_copy
from mm_model.errors import StorageError
from mm_model.geo.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), 512, 1024)
VALUES = np.random.default_rng(0).integers(1, 255, (1, *GRID.shape)).astype(np.uint8)


@contextmanager
def room_for(size_bytes: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_cog(path):
    with CogWriter(
        path, GRID, ["code"], dtype="uint8", nodata=0, units=["1"], sidecar=b"<PAMDataset/>"
    ) as writer:
        for row in range(0, GRID.height, 200):
            writer.write(VALUES[:, row : row + 200])
        return writer.finish()


def test_a_cog_is_whole_or_not_there(tmp_path):
    whole = write_cog(tmp_path / "whole" / "x.tif").read_bytes()
    # Noise does not shrink, and overviews come on top: room for the raw file may not be enough.
    assert len(whole) > VALUES.nbytes * 1.2
    path, refused = tmp_path / "tight" / "x.tif", 0
    edges = [0, 1, 100, 4096, 300_000, VALUES.nbytes, VALUES.nbytes + 4096]
    edges += range(len(whole) - 4000, len(whole) + 4001, 400)
    for size in (*edges, len(whole) + 2**20):  # less beyond what is needed is taken for nothing
        with room_for(size):
            try:
                write_cog(path)
            except StorageError:
                refused += 1
                assert list(path.parent.iterdir()) == []
                continue
        assert path.read_bytes() == whole
        for left in path.parent.iterdir():
            left.unlink()
    assert refused == len(edges)


def test_a_copy_is_whole_or_an_error(tmp_path):
    source = write_cog(tmp_path / "x.tif")
    header = raster.read_header(source)
    valid = np.ones(GRID.shape, np.bool_)
    whole, outcomes = tmp_path / "whole.tif", set()
    write_copy(whole, header, [1], [(0, VALUES, valid)])
    # Less than 1 MiB beyond what is needed is taken for nothing.
    for size in (*range(0, whole.stat().st_size + 9973, 9973), whole.stat().st_size + 2**20):
        copy = tmp_path / f"{size}.tif"
        with room_for(size):
            try:
                write_copy(copy, header, [1], [(0, VALUES, valid)])
            except StorageError:
                outcomes.add("refused")
                continue
        with rasterio.open(copy) as found:
            np.testing.assert_array_equal(found.read(), VALUES)
            assert (found.read_masks(1) == 255).all()
        outcomes.add("whole")
    assert outcomes == {"refused", "whole"}


def test_a_file_that_finds_no_room_leaves_what_was_there(tmp_path):
    path = tmp_path / "record.json"
    write_atomically(path, b"before")
    with room_for(100), pytest.raises(StorageError, match="no room for record"):
        write_atomically(path, bytes(101))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_other_faults_of_files_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), needs_room("it"):
        (tmp_path / "nowhere" / "x").write_bytes(b"")
    with (
        room_for(10),
        pytest.raises(StorageError, match="no room for a zip"),
        needs_room("a zip"),
        zipfile.ZipFile(tmp_path / "x.zip", "w") as archive,
    ):
        archive.writestr("x", bytes(100))


def test_the_oldest_files_go_first(tmp_path):
    for age, (name, size) in enumerate({"new": 30, "middle": 50, "old": 40, "oldest": 1}.items()):
        (tmp_path / name).write_bytes(bytes(size))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    prune(tmp_path, 80)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "middle"}
    prune(tmp_path / "nowhere", 80)
