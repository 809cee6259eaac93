"""Preparation by real Ray workers, killed and started again; on real rasters where they are."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("MM_REAL_DATA", ROOT.parent / "shared" / "data"))


DEFAULT = yaml.safe_load((ROOT / "params.yaml").read_text())["modalities"]


def hashes(store: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(store.iterdir())}


def project(folder: Path, workers: int, example: str = ".", **section: object) -> Path:
    """A pipeline folder with the parameters of an example, and so many workers."""
    folder.mkdir(parents=True, exist_ok=True)
    params = yaml.safe_load((ROOT / example / "params.yaml").read_text())
    params["prepare"].update(workers=workers, **section)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def synthetic(folder: Path, workers: int) -> Path:
    few = {"seed": 7, "places": 5, "patches_per_place": 4, "complete_share": 0.5}
    return project(folder, workers, patch_px=32, synthetic=few)


@pytest.fixture
def start(free_tcp_port_factory):
    """Starts the stage in a folder, with no Ray but its own; ends what is left of it."""
    started = []

    def run(folder: Path, rasters: Path = DATA) -> subprocess.Popen:
        away = {
            "RAY_ADDRESS": f"127.0.0.1:{free_tcp_port_factory()}",
            "MM_PROJECT": str(folder),
            "MM_REAL_DATA": str(rasters),
            "OMP_NUM_THREADS": "1",
        }
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mm_model.stages.prepare"],
                cwd=folder,
                env={**os.environ, **away},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(process: subprocess.Popen, folder: Path, code: int = 0) -> str:
    assert process.wait(240) == code, (folder / "log").read_text()[-2000:]
    return (folder / "log").read_text()


def test_any_number_of_workers_makes_the_same_bytes(tmp_path, start):
    for workers in (0, 1, 3):
        folder = synthetic(tmp_path / str(workers), workers)
        finish(start(folder), folder)
    alone = hashes(tmp_path / "0/data/patches")
    assert {n.partition("-")[0] for n in alone} == {*DEFAULT, "index.parquet", "store.json"}
    assert hashes(tmp_path / "1/data/patches") == alone
    assert hashes(tmp_path / "3/data/patches") == alone


def test_a_killed_worker_costs_nothing(tmp_path, start):
    whole, killed = synthetic(tmp_path / "whole", 0), synthetic(tmp_path / "killed", 2)
    finish(start(whole), whole)
    process = start(killed)
    deadline = time.monotonic() + 120
    while not list(killed.glob("data/.patches.parts/*.partial")):
        assert process.poll() is None, (killed / "log").read_text()
        assert time.monotonic() < deadline, "no worker began"
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    (worker, *_) = [p for p in family if "_Worker.make" in " ".join(p.cmdline())]
    assert worker.nice() == psutil.Process().nice() + 10  # replicas go first
    worker.kill()
    finish(process, killed)
    assert hashes(killed / "data/patches") == hashes(whole / "data/patches")


def real(folder: Path, workers: int) -> Path:
    manifest = {"manifest": str(ROOT / "examples/real/manifest.yaml")}
    return project(folder, workers, "examples/real", geotiff=manifest)


@pytest.mark.skipif(not DATA.is_dir(), reason="no real rasters: set MM_REAL_DATA")
def test_bad_files_are_listed_and_the_others_are_prepared(tmp_path, start):
    whole = real(tmp_path / "whole", 0)
    finish(start(whole), whole)
    rasters = tmp_path / "rasters"
    shutil.copytree(DATA, rasters)
    scenes = [p for p in sorted((rasters / "terramesh_examples").iterdir()) if p.is_dir()]
    broken = [scenes[0] / "dem.tif", scenes[-1] / "s1.tif"]
    for path in broken:
        os.truncate(path, 100)
    folder = real(tmp_path / "cut", 2)
    said = " ".join(finish(start(folder, rasters), folder, code=1).split())
    assert "units that could not be prepared (2 of 58)" in said
    assert all(str(path) in said for path in broken)
    assert not (folder / "data/patches").exists()
    assert len(list((folder / "data/.patches.parts").glob("*.part"))) == 56
    for path in broken:
        shutil.copy2(DATA / path.relative_to(rasters), path)
    finish(start(folder, rasters), folder)
    assert hashes(folder / "data/patches") == hashes(whole / "data/patches")


@pytest.mark.skipif(not DATA.is_dir(), reason="no real rasters: set MM_REAL_DATA")
@pytest.mark.parametrize(("workers", "times"), [(0, 10), (2, 3)])
def test_killed_again_and_again_it_ends_in_the_same_hashes(tmp_path, start, workers, times):
    whole, killed = real(tmp_path / "whole", 0), real(tmp_path / "killed", workers)
    began = time.monotonic()
    finish(start(whole), whole)
    took = time.monotonic() - began
    rng = random.Random(0)
    kills = 0
    while kills < times:
        process = start(killed)
        time.sleep(rng.uniform(0, took) + (6 if workers else 0))  # until Ray is there
        if process.poll() is not None:  # it was through: all over again
            assert process.returncode == 0, (killed / "log").read_text()
            shutil.rmtree(killed / "data")
            continue
        os.killpg(process.pid, signal.SIGKILL)  # the workers and Ray's own processes with it
        process.wait()
        kills += 1
    finish(start(killed), killed)
    assert hashes(killed / "data/patches") == hashes(whole / "data/patches")
    assert [p.name for p in (killed / "data").iterdir()] == ["patches"]
