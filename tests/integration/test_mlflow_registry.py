"""The registry against a real MLflow server: a version's whole life."""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import mlflow
import numpy as np
import pytest
import torch
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from mm_model.adapters import mlflow_registry as registry
from mm_model.bundle import Manifest, load_bundle, save_bundle
from mm_model.codec import Codec
from mm_model.conditions import Conditions
from mm_model.config import GateConfig, RegisterConfig
from mm_model.errors import BundleError, GateError, RegistryError
from mm_model.geo.grid import Grid
from mm_model.modalities import select
from mm_model.nn.model import SceneModel, Size
from mm_model.serving.generator import Generator, ObservedLayer, Request

pytestmark = pytest.mark.integration

MODALITIES = select(["sar", "map", "dem"])
GATE = GateConfig(
    min_mean_psnr_db=13.0, min_mean_miou=0.1, max_psnr_drop_db=0.5, max_miou_drop=0.03
)
H, W = 16, 24


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    """A server with its own database and artefacts; ends with the session."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                if httpx.get(f"{url}/health", timeout=1).is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


@pytest.fixture
def at_server(mlflow_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return mlflow.MlflowClient(mlflow_server)


def statistics() -> dict:
    def band(name: str) -> dict:
        numbers = {"center": 100.0, "scale": 20.0, "transformed_mean": -10, "transformed_std": 2}
        relief = {"scale": 5.0, "transformed_mean": 0, "transformed_std": 1}
        return {"name": name, **numbers, "relief": relief}

    def record(m) -> dict:
        if m.is_categorical:
            return {"pixels": 9, "classes": {"10": 9}}
        return {"pixels": 9, "bands": [band(n) for n in m.band_names]}

    return {"patches": 5, "places": 2, "modalities": {m.name: record(m) for m in MODALITIES}}


def make_bundle(folder: Path, seed: int) -> Path:
    sets = [{"modalities": [m.name for m in MODALITIES], "patches": 5}]
    torch.manual_seed(seed)
    codec = Codec(MODALITIES, statistics())
    model = SceneModel(MODALITIES, Size(8, 8, 16, 1, 1, 1, 2, 4), codec, sets, patch_px=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_bundle(folder, model.eval(), Manifest(model.config, [10.0], statistics()))
    return folder


def make_reports(folder: Path, bundle: Path, **figures) -> Path:
    sar = np.random.default_rng(1).normal(-12, 3, (2, H, W)).astype(np.float32)
    (folder / "sheets").mkdir(parents=True)
    (folder / "sheets" / "from-sar.png").write_bytes(b"\x89PNG")
    (folder / "table.md").write_text("a table")
    (folder / "example.json").write_text(json.dumps({"sar": sar.tolist()}))
    metrics = {
        "mean_psnr_of_mean_db": 15.0,
        "mean_miou_of_mean": 0.2,
        "scene_color_correlation": None,
        "patches": 3,
        "places": 2,
        "samples": 2,
        "steps": 2,
        "held_out": "a" * 64,
        "bundle_id": load_bundle(bundle).manifest.bundle_id,
        "rows": [],
        **figures,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def make_version(tmp_path: Path, model: str, seed: int, **figures) -> int:
    bundle = make_bundle(tmp_path / f"bundle{seed}", seed)
    reports = make_reports(tmp_path / f"reports{seed}", bundle, **figures)
    return registry.register(
        bundle, reports, config_of(model), run_id=None, lineage={"git_commit": "abc"}
    )


def config_of(model: str) -> RegisterConfig:
    return RegisterConfig(model=model, gate=GATE)


def never(_: Path) -> dict:
    raise AssertionError("the champion's figures on these patches are known")


def test_from_register_to_rollback(at_server, tmp_path):
    model = "life"
    assert registry.champion(model) is None
    first = make_version(tmp_path, model, 1)
    with pytest.raises(GateError, match="not passed its gate"):
        registry.promote(model, first)
    verdict = registry.gate(model, first, GATE, evaluate_champion=never)
    assert verdict.passed, verdict.reasons
    registry.promote(model, first)
    champion = registry.champion(model)
    assert champion.version == first
    assert champion.run_id

    worse = make_version(tmp_path, model, 2, mean_psnr_of_mean_db=14.4)
    verdict = registry.gate(model, worse, GATE, evaluate_champion=never)
    assert not verdict.passed
    assert any("14.4" in r and f"version {first}" in r for r in verdict.reasons)
    tags = at_server.get_model_version(model, str(worse)).tags
    assert tags["gate.verdict"] == "failed"
    assert "14.4" in tags["gate.reasons"]
    with pytest.raises(GateError, match=r"14\.4"):
        registry.promote(model, worse)

    better = make_version(tmp_path, model, 3, mean_psnr_of_mean_db=16.0)
    assert registry.gate(model, better, GATE, evaluate_champion=never).passed
    registry.promote(model, better)
    registry.promote(model, better)  # again: nothing changes
    assert registry.champion(model).version == better
    assert registry.rollback(model) == first
    assert registry.champion(model).version == first
    with pytest.raises(RegistryError, match="no previous champion"):
        registry.rollback(model)


def test_registering_twice_is_one_version(at_server, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", 1)
    reports = make_reports(tmp_path / "reports", bundle)
    versions = [
        registry.register(bundle, reports, config_of("twice"), run_id=None, lineage={})
        for _ in range(2)
    ]
    assert versions[0] == versions[1]
    assert len(at_server.search_model_versions("name='twice'")) == 1


def test_a_version_says_where_it_comes_from(at_server, tmp_path):
    run_id = at_server.create_run(at_server.create_experiment("training of tags")).info.run_id
    bundle = make_bundle(tmp_path / "bundle", 1)
    reports = make_reports(tmp_path / "reports", bundle)
    lineage = {"git_commit": "abc", "data_source": "synthetic", "dvc.prepare.patches": "123"}
    version = registry.register(bundle, reports, config_of("tags"), run_id=run_id, lineage=lineage)
    found = at_server.get_model_version("tags", str(version))
    bundle_id = load_bundle(bundle).manifest.bundle_id
    assert found.run_id == run_id
    assert lineage.items() <= found.tags.items()
    assert found.tags["bundle_id"] == bundle_id
    assert found.tags["held_out"] == "a" * 64
    assert found.tags["metrics.mean_psnr_of_mean_db"] == "15"
    for part in ("## Limits", "## Intended use", bundle_id, "VV", "3 held-out patches"):
        assert part in found.description
    logged = at_server.get_run(run_id)
    assert logged.data.metrics["test_mean_miou_of_mean"] == 0.2
    assert {f.path for f in at_server.list_artifacts(run_id, "reports")} >= {
        "reports/metrics.json",
        "reports/sheets",
    }


def test_a_training_may_outlive_the_database_that_it_was_logged_in(at_server, tmp_path):
    bundle = make_bundle(tmp_path / "bundle", 1)
    reports = make_reports(tmp_path / "reports", bundle)
    lost = "0" * 32
    version = registry.register(bundle, reports, config_of("lost"), run_id=lost, lineage={})
    run_id = at_server.get_model_version("lost", str(version)).run_id
    assert run_id != lost
    assert at_server.get_run(run_id).info.status == "FINISHED"


def test_only_the_evaluated_bundle_is_registered(at_server, tmp_path):
    evaluated, other = make_bundle(tmp_path / "a", 1), make_bundle(tmp_path / "b", 2)
    reports = make_reports(tmp_path / "reports", evaluated)
    with pytest.raises(RegistryError, match="another bundle"):
        registry.register(other, reports, config_of("other"), run_id=None, lineage={})


@pytest.mark.parametrize(
    ("model", "figures", "culprit"),
    [
        ("low-psnr", {"mean_psnr_of_mean_db": 12.0}, "psnr"),
        ("low-miou", {"mean_miou_of_mean": 0.01}, "miou"),
        ("no-miou", {"mean_miou_of_mean": None}, "miou"),
    ],
)
def test_the_gate_holds_to_its_thresholds(at_server, tmp_path, model, figures, culprit):
    version = make_version(tmp_path, model, 1, **figures)
    verdict = registry.gate(model, version, GATE, evaluate_champion=never)
    assert not verdict.passed
    assert any(culprit in reason for reason in verdict.reasons)


def test_a_champion_of_other_patches_is_evaluated_again(at_server, tmp_path):
    model, asked = "other-patches", []
    first = make_version(tmp_path, model, 1, mean_psnr_of_mean_db=20.0)
    registry.gate(model, first, GATE, evaluate_champion=never)
    registry.promote(model, first)
    second = make_version(tmp_path, model, 2, held_out="b" * 64)

    def again(bundle: Path) -> dict:
        asked.append(load_bundle(bundle).manifest.bundle_id)
        return {"mean_psnr_of_mean_db": 15.2, "mean_miou_of_mean": 0.2, "held_out": "b" * 64}

    assert registry.gate(model, second, GATE, evaluate_champion=again).passed
    assert asked == [registry.champion(model).tags["bundle_id"]]
    with pytest.raises(RegistryError, match="other patches"):
        registry.gate(model, second, GATE, evaluate_champion=lambda b: {"held_out": "c"})


def test_a_champion_of_other_modalities_is_not_compared(at_server, tmp_path):
    model = "more-modalities"
    first = make_version(tmp_path, model, 1, mean_psnr_of_mean_db=20.0)
    registry.gate(model, first, GATE, evaluate_champion=never)
    registry.promote(model, first)
    at_server.set_model_version_tag(model, str(first), "modalities", "sar, map")
    second = make_version(tmp_path, model, 2, held_out="b" * 64)
    verdict = registry.gate(model, second, GATE, evaluate_champion=never)
    assert verdict.passed
    assert any("other modalities (sar, map)" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(("number", "error"), [(1, BundleError("format 0")), (2, KeyError("flow"))])
def test_a_champion_that_cannot_be_loaded_does_not_end_the_gate(at_server, tmp_path, number, error):
    model = f"old-format-{number}"
    first = make_version(tmp_path, model, 1, mean_psnr_of_mean_db=20.0)
    registry.gate(model, first, GATE, evaluate_champion=never)
    registry.promote(model, first)
    second = make_version(tmp_path, model, 2, held_out="b" * 64)

    def fails(_: Path) -> dict:
        raise error

    verdict = registry.gate(model, second, GATE, evaluate_champion=fails)
    assert verdict.passed
    (reason,) = (r for r in verdict.reasons if "cannot be loaded" in r)
    assert str(error) in reason
    assert "thresholds alone" in reason
    assert at_server.get_model_version(model, str(second)).tags["gate.verdict"] == "passed"


def test_a_bundle_evaluated_anew_is_judged_by_the_new_figures(at_server, tmp_path):
    model = "anew"
    bundle = make_bundle(tmp_path / "bundle", 1)
    for number, psnr in enumerate((15.0, 12.0)):
        reports = make_reports(
            tmp_path / f"reports{number}",
            bundle,
            mean_psnr_of_mean_db=psnr,
            held_out=f"{number}" * 64,
        )
        version = registry.register(bundle, reports, config_of(model), run_id=None, lineage={})
        verdict = registry.gate(model, version, GATE, evaluate_champion=never)
        assert verdict.passed == (psnr > GATE.min_mean_psnr_db)
    tags = at_server.get_model_version(model, str(version)).tags
    assert tags["held_out"] == "1" * 64


def test_rollback_after_the_alias_was_moved_by_hand(at_server, tmp_path):
    model = "by-hand"
    for seed in (1, 2):
        version = make_version(tmp_path, model, seed)
        registry.gate(model, version, GATE, evaluate_champion=never)
        registry.promote(model, version)
    at_server.set_registered_model_alias(model, registry.CHAMPION, "1")
    with pytest.raises(RegistryError, match="champion already"):
        registry.rollback(model)
    at_server.set_model_version_tag(model, "1", registry.VERDICT, registry.FAILED)
    registry.promote(model, 2)
    with pytest.raises(GateError, match="not passed"):
        registry.rollback(model)  # not to what the endpoint refuses


def test_a_version_that_does_not_load_fails_its_gate(at_server, tmp_path):
    model = "broken"
    version = make_version(tmp_path, model, 1)
    bundle = registry.fetch_bundle(model, version, tmp_path / "fetched")
    weights = bundle / "weights.safetensors"
    weights.write_bytes(b"broken")
    model_id = mlflow.models.Model.load(f"models:/{model}/{version}").model_id
    logged = at_server.get_logged_model(model_id)
    stored = get_artifact_repository(logged.artifact_location)
    stored.log_artifact(str(weights), f"artifacts/{bundle.name}")
    verdict = registry.gate(model, version, GATE, evaluate_champion=never)
    assert not verdict.passed
    assert any("does not load" in reason for reason in verdict.reasons)


def test_pyfunc_gives_what_the_generator_gives(at_server, tmp_path):
    model = "same"
    version = make_version(tmp_path, model, 1)
    registry.gate(model, version, GATE, evaluate_champion=never)
    registry.promote(model, version)
    loaded = mlflow.pyfunc.load_model(f"models:/{model}@champion")
    sar = np.random.default_rng(2).normal(-12, 3, (2, H, W)).astype(np.float32)
    sar[:, 3:7, 5:9] = np.nan
    table = loaded.input_example.iloc[:0].reindex([0])
    table["sar"] = [sar.astype(float).tolist()]
    options = {"targets": ["map", "dem"], "samples": 2, "seed": 9, "steps": 2}
    options |= {"date": "2024-01-15", "gsd_m": 30.0}
    answer = loaded.predict(table, params=options)

    bundle = load_bundle(registry.fetch_bundle(model, version, tmp_path / "fetched"))
    grid = Grid("", (1, 0, 0, 0, -1, 0), H, W)
    layer = ObservedLayer(sar, np.isfinite(sar).all(0), grid)
    known = Conditions(gsd_m=30, date=dt.date(2024, 1, 15))
    request = Request({"sar": layer}, ("map", "dem"), samples=2, seed=9, steps=2, conditions=known)
    (result,) = Generator(bundle).generate([request])
    assert answer[["row", "sample"]].to_numpy().tolist() == [[0, 0], [0, 1]]
    for name, values in result.values.items():
        assert np.array_equal(np.array(answer[name].tolist(), values.dtype), values), name


def test_mlflow_that_is_away_is_one_clear_error(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{probe.getsockname()[1]}")
    with pytest.raises(RegistryError, match="mm up"):
        registry.champion("anything")


def test_a_version_that_is_not_there(at_server):
    with pytest.raises(RegistryError, match=r"not found.*var/log/mlflow\.log"):
        registry.promote("nobody", 3)


def test_lineage_of_a_folder(tmp_path):
    (tmp_path / "params.yaml").write_text("prepare: {source: geotiff}\n")
    lock = "stages:\n  prepare:\n    outs:\n    - {path: data/patches, md5: 12.dir}\n"
    (tmp_path / "dvc.lock").write_text(lock)
    lineage = registry.collect_lineage(tmp_path, flow_run_id="f")
    assert lineage["data_source"] == "geotiff"
    assert lineage["dvc.prepare.patches"] == "12.dir"
    assert lineage["flow_run_id"] == "f"
    assert "git_commit" not in lineage
