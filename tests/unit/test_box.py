"""The bundle of a pipeline folder goes into the box with a card that is its own."""

import json
import shutil

import pytest

from mm_model.bundle import load_bundle, load_manifest
from mm_model.cli.box import put_in_box
from mm_model.errors import BundleError
from mm_model.pretrained import PRETRAINED

METRICS = {"rows": [], "patches": 3, "places": 2, "samples": 1, "steps": 4}


@pytest.fixture
def pipeline(tmp_path):
    shutil.copytree(PRETRAINED, tmp_path / "models/bundle", ignore=shutil.ignore_patterns("*.md"))
    (tmp_path / "reports").mkdir()
    bundle_id = load_manifest(PRETRAINED).bundle_id
    report = json.dumps({**METRICS, "bundle_id": bundle_id})
    (tmp_path / "reports/metrics.json").write_text(report)
    return tmp_path


def test_a_bundle_arrives_whole_with_its_card(pipeline, tmp_path):
    box = tmp_path / "box"
    put_in_box(pipeline, box)
    assert sorted(p.name for p in box.iterdir()) == [
        "card.md",
        "manifest.json",
        "weights.safetensors",
    ]
    manifest = load_bundle(box).manifest
    assert manifest.bundle_id in (box / "card.md").read_text()


def test_a_report_of_another_bundle_is_refused_and_nothing_written(pipeline, tmp_path):
    (pipeline / "reports/metrics.json").write_text(json.dumps({**METRICS, "bundle_id": "x"}))
    with pytest.raises(BundleError, match="another bundle"):
        put_in_box(pipeline, tmp_path / "box")
    assert not (tmp_path / "box").exists()
