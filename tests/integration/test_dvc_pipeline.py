"""The stages as DVC runs them, on a small folder of rasters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/unit/data"))
from geotiff_fixtures import COVER, FOUR, manifest, write_rasters  # noqa: E402

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"project": str(ROOT), "modalities": [m.name for m in FOUR]}
    params["prepare"] |= {"source": "geotiff", "patch_px": 16, "min_valid_fraction": 0.2}
    params["prepare"]["geotiff"] = {"manifest": "manifest.yaml"}
    params["prepare"]["stac"] = {"search": "manifest.yaml"}  # not read
    params["split"]["margin_m"] = 0
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(manifest(tmp_path / "rasters")))
    write_rasters(tmp_path / "rasters")
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    dvc(tmp_path, "init", "--no-scm", "-q")
    return tmp_path


def dvc(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DVC_SITE_CACHE_DIR": str(folder / "site"),
            "MM_RAY_PORT": "9",  # nobody listens there: the stages start a Ray of their own
        },
        capture_output=True,
        text=True,
    )


def test_stages_run_once_and_write_what_they_declare(folder):
    first = dvc(folder, "repro", "stats", "catalogue")
    assert first.returncode == 0, first.stdout + first.stderr
    statistics = json.loads((folder / "data/stats.json").read_text())
    assert set(statistics["modalities"]) == {m.name for m in FOUR}
    outputs = {p.name for p in (folder / "data").iterdir() if not p.name.startswith(".")}
    files = {"splits.parquet", "validation.json", "stats.json"}
    assert outputs == {"patches", "docs", "catalogue", *files}
    card = (folder / "data/catalogue/card.md").read_text()
    assert "| `made` | CC0-1.0 |" in card  # of the manifest
    again = dvc(folder, "repro", "stats", "catalogue")
    assert "up to date" in again.stdout
    assert "Running stage" not in again.stdout


def test_another_licence_makes_another_card_and_no_other_patches(folder):
    assert dvc(folder, "repro", "catalogue").returncode == 0
    path = folder / "manifest.yaml"
    path.write_text(path.read_text().replace("CC0-1.0", "CC-BY-4.0"))
    before = (folder / "data/patches/index.parquet").stat().st_ino
    again = dvc(folder, "repro", "catalogue")
    assert "Running stage 'catalogue'" in again.stdout
    record = json.loads((folder / "data/catalogue/collection.json").read_text())
    assert record["license"] == "CC-BY-4.0"
    assert (folder / "data/patches/index.parquet").stat().st_ino == before


def test_a_failing_stage_says_why_in_one_line(folder):
    (folder / "rasters/s2/cover.tif").write_bytes(b"")
    failed = dvc(folder, "repro", "stats")
    assert failed.returncode != 0
    lines = [line for line in (failed.stdout + failed.stderr).splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "s2/cover.tif is empty" in lines[0]
    assert "Traceback" not in failed.stderr
    assert COVER.name not in {p.name for p in (folder / "data").glob("*")}
