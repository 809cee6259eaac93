"""The bundle in the box: it is shipped, it is small, and it says where it comes from."""

import subprocess
import tomllib
from pathlib import Path

import pytest

from mm_model.bundle import MANIFEST, WEIGHTS, load_bundle
from mm_model.config import load_params
from mm_model.pretrained import PRETRAINED

ROOT = Path(__file__).parents[2]
FILES = (WEIGHTS, MANIFEST, "card.md")

inside = pytest.mark.skipif(not PRETRAINED.exists(), reason="no bundle is in the box yet")


@pytest.mark.parametrize("name", FILES)
def test_git_and_the_package_take_it_along(name):
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", "-q", PRETRAINED / name], cwd=ROOT, check=False
    )
    assert ignored.returncode == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["mm_model"]
    shipped = (PRETRAINED / name).relative_to(ROOT / "mm_model")
    assert any(shipped.match(pattern) for pattern in patterns)


@inside
def test_it_is_a_bundle_of_at_most_20_mb_that_the_project_can_go_on_from():
    assert sorted(p.name for p in PRETRAINED.iterdir()) == sorted(FILES)
    assert sum(p.stat().st_size for p in PRETRAINED.iterdir()) <= 20e6
    bundle = load_bundle(PRETRAINED)
    params = load_params(ROOT / "params.yaml")
    assert bundle.model.names == params.modalities
    assert bundle.manifest.model["size"] == params.model.chosen.model_dump()
    assert bundle.manifest.effort["samples"] > 0


@inside
def test_its_card_is_of_this_bundle():
    bundle_id = load_bundle(PRETRAINED).manifest.bundle_id
    assert bundle_id in (PRETRAINED / "card.md").read_text()
