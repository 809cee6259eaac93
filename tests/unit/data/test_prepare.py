import hashlib
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_fixtures import PAIR, PlacesSource
from geotiff_fixtures import FOUR, manifest, write_rasters

from mm_model.data.patch import Layer
from mm_model.data.prepare import prepare
from mm_model.data.sources.geotiff import GeotiffSource
from mm_model.data.store import PatchStore
from mm_model.errors import DataError, RasterError

OPTIONS = {"shard_patches": 5, "min_valid_fraction": 0.0}


def hashes(store: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(store.iterdir())}


class DiesAt(PlacesSource):
    """Stops in the middle of a unit, as if the process had been killed."""

    def __init__(self, unit_id, *args):
        super().__init__(*args)
        self.unit_id = unit_id

    def read(self, unit):
        for i, patch in enumerate(super().read(unit)):
            if unit.unit_id == self.unit_id and i == 1:
                raise KeyboardInterrupt
            yield patch


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    prepare(PlacesSource(6, PAIR), tmp_path / "whole", PAIR, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        prepare(DiesAt("place003", 6, PAIR), tmp_path / "patches", PAIR, **OPTIONS)
    assert not (tmp_path / "patches").exists()
    again = PlacesSource(6, PAIR)
    prepare(again, tmp_path / "patches", PAIR, **OPTIONS)
    assert again.read_units == ["place003", "place004", "place005"]
    assert hashes(tmp_path / "patches") == hashes(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["patches", "whole"]


def test_what_stands_is_left_alone_and_what_changed_is_not(tmp_path):
    out = tmp_path / "patches"
    prepare(PlacesSource(3, PAIR), out, PAIR, **OPTIONS)
    again = PlacesSource(3, PAIR)
    assert prepare(again, out, PAIR, **OPTIONS) == 9
    assert not again.read_units
    prepare(again, out, PAIR, shard_patches=5, min_valid_fraction=0.9)
    assert len(again.read_units) == 3
    prepare(PlacesSource(3, PAIR[:1]), out, PAIR[:1], **OPTIONS)
    assert set(PatchStore(out).index["modality"]) == {PAIR[0].name}


class Sparse(PlacesSource):
    """Patches of which the first modality has one valid row of eight."""

    def read(self, unit):
        for patch in super().read(unit):
            name = PAIR[0].name
            layer = patch.layers[name]
            valid = np.zeros_like(layer.valid)
            valid[0] = True
            sparse = Layer(layer.values, valid)
            yield replace(patch, layers={**patch.layers, name: sparse})


def test_sparse_layers_are_absent_and_empty_patches_are_not_stored(tmp_path):
    count = prepare(
        Sparse(4, PAIR), tmp_path / "patches", PAIR, shard_patches=5, min_valid_fraction=0.2
    )
    store = PatchStore(tmp_path / "patches")
    assert set(store.index["modality"]) == {PAIR[1].name}
    assert 0 < count == len(store) < 12
    with pytest.raises(DataError, match="min_valid_fraction"):
        prepare(
            Sparse(4, PAIR[:1]), tmp_path / "none", PAIR[:1], shard_patches=5, min_valid_fraction=1
        )


def test_a_broken_file_leaves_no_store(tmp_path):
    write_rasters(tmp_path / "rasters")
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(manifest(tmp_path / "rasters")))
    (tmp_path / "rasters/s2/radar.tif").write_bytes(b"broken")
    source = GeotiffSource(tmp_path / "manifest.yaml", 16, 10.0, FOUR)
    with pytest.raises(RasterError, match=r"s2/radar\.tif"):
        prepare(source, tmp_path / "patches", FOUR, **OPTIONS)
    assert not (tmp_path / "patches").exists()


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from geotiff_fixtures import FOUR
from mm_model.data.prepare import prepare
from mm_model.data.sources.geotiff import GeotiffSource
class Slow(GeotiffSource):
    def read(self, unit):
        for patch in super().read(unit):
            time.sleep({pause})
            yield patch
source = Slow(Path("manifest.yaml"), 16, 10.0, FOUR)
prepare(source, Path("patches"), FOUR, shard_patches=5, min_valid_fraction=0.2)
"""


def start(folder: Path, pause: float) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(tests=str(Path(__file__).parent), pause=pause)
    return subprocess.Popen([sys.executable, "-c", script], cwd=folder)


def test_killed_at_any_moment_it_ends_in_the_same_hashes(tmp_path):
    write_rasters(tmp_path / "rasters")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest(tmp_path / "rasters")))
    assert start(whole, 0).wait() == 0
    parts = killed / ".patches.parts"
    for finished in (1, 3):  # killed in the second unit, and in the fourth
        process = start(killed, 0.05)
        while len([p for p in parts.glob("*") if p.suffix != ".partial"]) < finished:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "patches").exists()
    assert start(killed, 0).wait() == 0
    assert hashes(killed / "patches") == hashes(whole / "patches")


def backwards(make, works):
    """As any number of workers may do: in another order, in an own process's copy of the maker."""
    make = pickle.loads(pickle.dumps(make))
    for work in reversed(list(works)):
        yield work, make(work)


def test_the_order_of_units_changes_nothing(tmp_path):
    prepare(PlacesSource(6, PAIR), tmp_path / "forth", PAIR, **OPTIONS)
    prepare(PlacesSource(6, PAIR), tmp_path / "back", PAIR, run=backwards, **OPTIONS)
    assert hashes(tmp_path / "forth") == hashes(tmp_path / "back")


class Faulty(PlacesSource):
    """Some units fail, as the test says; the others are as they are."""

    faults: dict[str, Exception] = {}  # noqa: RUF012

    def read(self, unit):
        for i, patch in enumerate(super().read(unit)):
            if unit.unit_id in self.faults and i == 1:
                raise self.faults[unit.unit_id]
            yield patch


def test_units_that_fail_are_named_at_the_end_and_the_others_are_kept(tmp_path):
    source = Faulty(6, PAIR)
    source.faults = {
        "place001": RasterError("a.tif cannot be read"),
        "place004": RasterError("b.tif is empty"),
    }
    with pytest.raises(RasterError) as caught:
        prepare(source, tmp_path / "patches", PAIR, **OPTIONS)
    said = str(caught.value)
    assert "(2 of 6)" in said
    assert "place001: a.tif cannot be read" in said
    assert "place004: b.tif is empty" in said
    assert not (tmp_path / "patches").exists()
    source.faults = {"place004": ZeroDivisionError("of a library")}
    with pytest.raises(DataError, match=r"place004.*ZeroDivisionError: of a library.*\.py:\d+"):
        prepare(source, tmp_path / "patches", PAIR, **OPTIONS)
    mended = PlacesSource(6, PAIR)
    prepare(mended, tmp_path / "patches", PAIR, **OPTIONS)
    assert mended.read_units == ["place004"]
    prepare(PlacesSource(6, PAIR), tmp_path / "whole", PAIR, **OPTIONS)
    assert hashes(tmp_path / "patches") == hashes(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["patches", "whole"]


def test_only_what_is_new_is_read(tmp_path):
    out = tmp_path / "patches"
    prepare(PlacesSource(4, PAIR), out, PAIR, **OPTIONS)
    more = PlacesSource(6, PAIR)
    assert prepare(more, out, PAIR, **OPTIONS) == 18
    assert more.read_units == ["place004", "place005"]
    prepare(PlacesSource(6, PAIR), tmp_path / "whole", PAIR, **OPTIONS)
    assert hashes(out) == hashes(tmp_path / "whole")
    fewer = PlacesSource(3, PAIR)
    assert prepare(fewer, out, PAIR, **OPTIONS) == 9
    assert not fewer.read_units
    prepare(PlacesSource(3, PAIR), tmp_path / "three", PAIR, **OPTIONS)
    assert hashes(out) == hashes(tmp_path / "three")


def test_an_exchange_of_stores_that_was_cut_off_is_taken_up(tmp_path):
    out = tmp_path / "patches"
    prepare(PlacesSource(4, PAIR), out, PAIR, **OPTIONS)
    before = hashes(out)
    # Died when the old store had been moved away, and the new one had not come.
    out.rename(tmp_path / ".patches.former")
    shutil.copytree(tmp_path / ".patches.former", tmp_path / ".patches.joined")
    again = PlacesSource(4, PAIR)
    prepare(again, out, PAIR, **OPTIONS)
    assert not again.read_units
    # The same, and the new one is of other units.
    out.rename(tmp_path / ".patches.former")
    more = PlacesSource(5, PAIR)
    prepare(more, out, PAIR, **OPTIONS)
    assert more.read_units == ["place004"]
    prepare(PlacesSource(4, PAIR), out, PAIR, **OPTIONS)
    assert hashes(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["patches"]


def test_a_damaged_store_is_not_taken_over(tmp_path):
    out = tmp_path / "patches"
    prepare(PlacesSource(4, PAIR), out, PAIR, **OPTIONS)
    next(out.glob("*.arrow")).unlink()
    with pytest.raises(DataError, match=r"patches is damaged.*remove it"):
        prepare(PlacesSource(5, PAIR), out, PAIR, **OPTIONS)
    shutil.rmtree(out)
    assert prepare(PlacesSource(5, PAIR), out, PAIR, **OPTIONS) == 15
