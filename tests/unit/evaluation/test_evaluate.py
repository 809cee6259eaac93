"""Declared rows, held-out patches, and a whole evaluation of a small model, gaps included."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mm_model.bundle import Bundle, Manifest
from mm_model.codec import Codec
from mm_model.config import EvaluateConfig
from mm_model.data.patch import Layer, Patch
from mm_model.data.store import PatchStore, ShardWriter
from mm_model.errors import DataError
from mm_model.evaluation.card import model_card
from mm_model.evaluation.evaluate import choose_patches, declared_rows, evaluate
from mm_model.evaluation.report import write_report
from mm_model.geo.grid import Grid
from mm_model.modalities import select
from mm_model.nn.model import SceneModel, Size

MODALITIES = select(["rgb", "sar", "map"])
CONFIG = EvaluateConfig(seed=0, patches=6, samples=2, steps=1)
H, W = 16, 24
HELD = [("rgb", "sar"), ("rgb", "sar"), ("sar",), ("rgb",), ("rgb", "sar"), ("sar",), ("rgb",)]


def make_layer(modality, rng):
    valid = rng.random((H, W)) > 0.2
    if modality.is_categorical:
        return Layer(rng.choice(modality.class_codes, (1, H, W)).astype(np.uint8), valid)
    low, high = modality.display_range
    shape = (len(modality.bands), H, W)
    return Layer(rng.uniform(low, high, shape).astype(np.float32), valid)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Seven patches of four places; none has both a map and anything else."""
    path = tmp_path_factory.mktemp("store") / "patches"
    rng = np.random.default_rng(2)
    with ShardWriter(path, MODALITIES, 8) as writer:
        for i, names in enumerate(HELD):
            grid = Grid("EPSG:32633", (10, 0, 1000 * i, 0, -10, 0), H, W)
            layers = {m.name: make_layer(m, rng) for m in MODALITIES if m.name in names}
            writer.add(Patch(f"p{i}", f"place{i % 4}", "test", grid, 10, layers))
    return PatchStore(path)


@pytest.fixture(scope="module")
def bundle():
    def record(m):
        if m.is_categorical:
            return {"pixels": 9, "classes": {"10": 9}}
        low, high = m.display_range
        numbers = {"center": 0, "scale": 1, "transformed_mean": low, "transformed_std": high - low}
        return {"pixels": 9, "bands": [{"name": n, **numbers} for n in m.band_names]}

    statistics = {"patches": 5, "places": 2, "modalities": {m.name: record(m) for m in MODALITIES}}
    sets = [{"modalities": [m.name for m in MODALITIES], "patches": 5}]
    torch.manual_seed(0)
    size = Size(8, 8, 16, 1, 1, 1, 2, 4)
    model = SceneModel(MODALITIES, size, Codec(MODALITIES, statistics), sets, patch_px=16)
    return Bundle(model.eval(), Manifest(model.config, [10.0], statistics, bundle_id="b" * 64))


@pytest.fixture(scope="module")
def evaluation(bundle, store):
    return evaluate(bundle, store, range(len(store)), CONFIG)


def test_declared_rows_hold_all_singles_and_all_leave_one_out():
    rows = declared_rows(MODALITIES)
    assert len(rows) == len(set(rows)) == 6 + 3
    assert (("sar",), "map") in rows
    assert (("rgb", "map"), "sar") in rows
    assert declared_rows(MODALITIES[:2]) == [(("rgb",), "sar"), (("sar",), "rgb")]
    assert declared_rows(MODALITIES[:1]) == []


def test_patches_are_taken_in_turn_from_each_place(store):
    chosen = choose_patches(store, range(len(store)), 4, seed=0)
    assert len({i % 4 for i in chosen}) == 4
    assert choose_patches(store, list(range(len(store)))[::-1], 4, seed=0) == chosen
    assert len(set(choose_patches(store, range(len(store)), 99, seed=0))) == len(store)


def test_a_row_without_patches_is_there(evaluation):
    rows = {(tuple(r["observed"]), r["target"]): r for r in evaluation.metrics["rows"]}
    assert list(rows) == declared_rows(MODALITIES)
    assert rows[("rgb",), "map"]["patches"] == rows[("sar", "map"), "rgb"]["patches"] == 0
    assert rows[("rgb",), "sar"]["patches"] > 1
    assert rows[("sar",), "rgb"]["spectral_angle_deg"] > 0
    assert evaluation.metrics["rows_without_patches"] == 7
    assert evaluation.metrics["mean_miou"] is None
    singles = [rows[k]["psnr_db"] for k in ((("rgb",), "sar"), (("sar",), "rgb"))]
    assert evaluation.metrics["mean_psnr_db"] == pytest.approx(np.mean(singles), rel=1e-5)


def test_only_valid_pixels_count(evaluation, store):
    row = next(r for r in evaluation.metrics["rows"] if r["patches"])
    chosen = choose_patches(store, range(len(store)), CONFIG.patches, CONFIG.seed)
    both = [store.read(i) for i in chosen if len(store.read(i).layers) == 2]
    assert row["pixels"] == sum(p.layers[row["target"]].valid.sum() for p in both)


def test_evaluating_again_gives_the_same(evaluation, bundle, store):
    again = evaluate(bundle, store, range(len(store)), CONFIG)
    assert again.metrics == evaluation.metrics


def test_the_fingerprint_is_of_what_was_asked(evaluation, bundle, store):
    fewer = evaluate(bundle, store, range(len(store) - 2), CONFIG)
    assert fewer.metrics["held_out"] != evaluation.metrics["held_out"]


def test_no_held_out_patch_is_an_error(bundle, store):
    with pytest.raises(DataError, match="held-out"):
        evaluate(bundle, store, [], CONFIG)


def test_the_report_is_whole(evaluation, tmp_path):
    (tmp_path / "sheets").mkdir()
    (tmp_path / "sheets" / "stale.png").write_bytes(b"")
    write_report(evaluation, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == evaluation.metrics
    sheets = {p.name for p in (tmp_path / "sheets").iterdir()}
    assert sheets == {"from-rgb.png", "from-sar.png", "from-nothing.png"}
    text = (tmp_path / "table.md").read_text()
    assert "| rgb | map | 0 | – | – | – |" in text
    assert " dB" in next(line for line in text.splitlines() if line.startswith("| rgb | sar |"))
    (name,) = example = json.loads((tmp_path / "example.json").read_text())
    bands = next(m for m in MODALITIES if m.name == name).bands
    assert np.array(example[name], float).shape == (len(bands), H, W)


def test_the_card_names_what_matters(evaluation, bundle):
    card = model_card(bundle.manifest, MODALITIES, evaluation.metrics, {"git_commit": "abc"})
    for part in ("11 classes", "VV, VH; dB", "5 patches of 2 places", "b" * 64, "`abc`"):
        assert part in card


def test_the_card_says_for_how_long_it_was_trained_in_all(evaluation, bundle):
    training = {"steps": 1200, "samples": 19200, "seconds": 90.0, "patches": 4321, "places": 34}
    start = {"bundle_id": "c" * 64, "steps": 3000, "samples": 50000, "seconds": 3600.0}
    alone = {"data_source": "synthetic", "training": training, "start": None}
    for provenance, parts, absent in (
        ({}, ("5 patches of 2 places", "not recorded"), "in all"),
        (alone, ("4,321 patches of 34 places", "`synthetic`", "1,200 steps"), "in all"),
        (
            {**alone, "start": start},
            ("1,200 steps, 19,200 samples, 1.5 minutes", "c" * 64, "4,200 steps", "69,200 samples",
             "61.5 minutes in all"),
            "not recorded",
        ),
    ):  # fmt: skip
        manifest = replace(bundle.manifest, provenance=provenance)
        card = model_card(manifest, MODALITIES, evaluation.metrics, {})
        section = card.split("## Trained on\n\n")[1].split("\n\n")[0]
        assert all(part in section for part in parts)
        assert absent not in section


def test_the_card_names_the_licences_and_whom_they_want_named(evaluation, bundle):
    sources = {
        "radar": {"licence": "CC-BY-4.0", "attribution": "Somebody 2024"},
        "height": {"licence": "public domain", "attribution": ""},
    }
    for known, lines in (
        (sources, ["- `radar`: CC-BY-4.0 (Somebody 2024)", "- `height`: public domain"]),
        ({}, ["- not recorded"]),
    ):
        manifest = replace(bundle.manifest, provenance={"sources": known})
        card = model_card(manifest, MODALITIES, evaluation.metrics, {})
        section = card.split("## Data licences\n\n")[1].split("\n\n")[0]
        assert section.splitlines() == lines


def test_rows_are_there_for_each_distance_and_together(bundle, tmp_path):
    """Three fine patches for each coarse one, in three places that all have both."""
    rng = np.random.default_rng(5)
    with ShardWriter(tmp_path / "patches", MODALITIES, 8) as writer:
        for i in range(12):
            gsd_m = 20 if i % 4 == 3 else 10
            grid = Grid("EPSG:32633", (gsd_m, 0, 5e5 + 1000 * i, 0, -gsd_m, 0), H, W)
            layers = {m.name: make_layer(m, rng) for m in MODALITIES}
            writer.add(Patch(f"p{i}", f"place{i // 4}", "test", grid, gsd_m, layers))
    store = PatchStore(tmp_path / "patches")
    chosen = choose_patches(store, range(12), 6, seed=1)
    assert sorted(store.read(i).gsd_m for i in chosen) == [10, 10, 10, 20, 20, 20]
    assert len({store.read(i).gsd_m for i in choose_patches(store, range(12), 3, seed=1)}) == 2
    whole = evaluate(bundle, store, range(12), CONFIG)
    fine, coarse = whole.metrics["distances"]
    assert (fine["gsd_m"], coarse["gsd_m"]) == (10, 20)
    assert (fine["patches"], coarse["places"]) == (3, 3)
    for all_, *each in zip(whole.metrics["rows"], fine["rows"], coarse["rows"], strict=True):
        assert {r["target"] for r in each} == {all_["target"]}
        assert all_["pixels"] == sum(r["pixels"] for r in each)
        if "mae" in all_:  # errors are pooled over pixels
            pooled = sum(r["mae"] * r["pixels"] for r in each) / all_["pixels"]
            assert all_["mae"] == pytest.approx(pooled, rel=1e-4)
    assert fine["mean_psnr_db"] != coarse["mean_psnr_db"]
    # What one distance has is what an evaluation of its patches alone finds.
    alone = evaluate(bundle, store, [i for i in chosen if store.read(i).gsd_m == 20], CONFIG)
    assert alone.metrics["rows"] == coarse["rows"]
    assert [d["rows"] for d in alone.metrics["distances"]] == [alone.metrics["rows"]]
    write_report(whole, tmp_path / "reports")

    lines = (tmp_path / "reports" / "table.md").read_text().splitlines()
    assert sum(line.startswith("| rgb | sar | ") for line in lines) == 2
    assert any(line.startswith("| rgb | sar | 20 m | 3 | ") for line in lines)
    assert (tmp_path / "reports/sheets/by-distance.png").read_bytes()[:4] == b"\x89PNG"
    write_report(alone, tmp_path / "reports")
    assert not (tmp_path / "reports/sheets/by-distance.png").exists()
