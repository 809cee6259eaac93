"""A pipeline folder's training that begins with a bundle, in this process."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from data_fixtures import make_store

from mm_model.adapters.mlflow_reporter import read_journal
from mm_model.adapters.ray_train import Job, launch
from mm_model.adapters.train_bundle import make_job, train_bundle
from mm_model.bundle import load_bundle, load_manifest, save_bundle
from mm_model.config import Params, parse
from mm_model.data.split import TRAIN, load_split, make_splits
from mm_model.data.stats import compute_statistics
from mm_model.errors import BundleError, ConfigError
from mm_model.generative.sampler import sample
from mm_model.pretrained import PRETRAINED

ROOT = Path(__file__).parents[3]
SIZE = {
    "encoder_width": 8,
    "decoder_width": 8,
    "dim": 16,
    "encoder_depth": 1,
    "flow_depth": 1,
    "decoder_depth": 1,
    "heads": 2,
    "scene_channels": 4,
}
NAMES = ("rgb", "nir", "sar", "dem", "map")
SOME = ("nir", "map")


@pytest.fixture(scope="module", autouse=True)
def _small_and_alone():
    """One thread, and no MLflow: neither is needed, and both cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        yield
    torch.set_num_threads(threads)


def choose(modalities=NAMES, patch_px=16, **train) -> Params:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["modalities"] = list(modalities)
    raw["prepare"]["patch_px"] = patch_px
    raw["split"] = {"seed": 0, "train": 0.6, "validation": 0.2, "margin_m": 0}
    raw["model"] = {"size": "least", "sizes": {"least": SIZE, "other": {**SIZE, "heads": 4}}}
    few = {"workers": 0, "batch": 4, "steps": 12, "checkpoint_every": 5, "picture_every": 10**6}
    raw["train"] |= {"start": "scratch", "precision": "fp32", "warmup_steps": 0, **few, **train}
    return parse(Params, raw, "params")


def make_data(folder: Path, params: Params) -> Path:
    data = folder / "data"
    store = make_store(data / "patches", 8, params.selected, shape=(16, 24))
    make_splits(store.index, params.split).to_parquet(data / "splits.parquet", index=False)
    positions = load_split(data / "splits.parquet", store.patch_ids)[TRAIN]
    statistics = compute_statistics(store, positions, params.selected)
    (data / "stats.json").write_text(json.dumps(statistics))
    (folder / "params.yaml").write_text("prepare: {source: synthetic}\n")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A pipeline folder whose first training is done; its bundle lies in older/."""
    folder = make_data(tmp_path_factory.mktemp("first"), choose())
    said = train_bundle(choose(steps=150, learning_rate=3e-3, ema=0.9), folder)
    (folder / "older_losses.json").write_text(json.dumps(losses(Path(said["run_dir"]))))
    shutil.move(folder / "models/bundle", folder / "older")
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """The same data in a folder of its own."""
    shutil.copytree(trained, tmp_path / "own", ignore=shutil.ignore_patterns("models"))
    return tmp_path / "own"


def losses(run: Path) -> list[float]:
    """Mean loss of each ten steps."""
    return [r["values"]["loss"] for r in read_journal(run)[0] if r["kind"] == "metrics"]


def last_weights(job: Job) -> dict[str, torch.Tensor]:
    return load_file(job.checkpoints.files()[-1])


def test_the_first_step_begins_with_the_bundles_weights(folder):
    older = load_bundle(folder / "older").model.state_dict()
    job = make_job(choose(start="older", steps=1, learning_rate=1e-9), folder)
    assert all(torch.equal(t, older[n]) for n, t in job.model().state_dict().items())
    launch(job)
    after = last_weights(job)
    for name, tensor in older.items():
        torch.testing.assert_close(after[f"model/{name}"], tensor, rtol=0, atol=1e-7)
    fresh = make_job(choose(), folder).model().state_dict()
    assert any((fresh[n] - t).abs().max() > 0.05 for n, t in older.items())


def test_a_training_from_scratch_solves_for_its_regressions(folder):
    found = load_bundle(folder / "older").model.decoder.regressions
    assert found.low.isfinite().all()
    assert (found.low < found.high).all()
    unsolved = make_job(choose(), folder).model().decoder.regressions
    assert unsolved.low.isinf().all()


def test_its_loss_starts_where_that_of_the_older_training_ended(folder):
    first = {}
    for start in ("scratch", "older"):
        job = make_job(choose(start=start, steps=10, seed=5), folder)
        launch(job)
        first[start] = losses(job.run)[0]
    won = first["scratch"] - np.mean(json.loads((folder / "older_losses.json").read_text())[-5:])
    assert first["scratch"] - first["older"] > 0.9 * won


def test_resumed_equals_uninterrupted(folder, tmp_path):
    params = choose(start="older")
    whole = make_job(params, folder)
    launch(whole)
    expected = last_weights(whole)
    part_way = whole.checkpoints.files()[0]
    assert part_way.name == "step-000000010.safetensors"
    shutil.move(part_way, tmp_path)
    shutil.rmtree(folder / "models")
    resumed = make_job(params, folder)
    resumed.checkpoints.folder.mkdir(parents=True)
    shutil.move(tmp_path / part_way.name, resumed.checkpoints.folder)
    launch(resumed)
    steps = [r["step"] for r in read_journal(resumed.run)[0] if r["kind"] == "metrics"]
    assert steps == [12]  # it did go on from there
    found = last_weights(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_another_bundle_at_the_same_path_is_another_training(folder):
    params = choose(start="older")
    before = make_job(params, folder)
    bundle = load_bundle(folder / "older")
    next(bundle.model.parameters()).add_(0.25)
    save_bundle(folder / "older", bundle.model, bundle.manifest)
    after = make_job(params, folder)
    scratch = make_job(choose(), folder)
    runs = {job.run for job in (before, after, scratch)}
    assert len({job.fingerprint for job in (before, after, scratch)}) == len(runs) == 3


def test_a_chain_keeps_its_normalisation_and_its_history(folder):
    first = load_manifest(folder / "older")
    assert first.provenance["start"] is None
    train_bundle(choose(start="older", steps=10), folder)
    shutil.move(folder / "models/bundle", folder / "newer")
    train_bundle(choose(start="newer", steps=5), folder)
    second, third = load_manifest(folder / "newer"), load_manifest(folder / "models/bundle")
    assert second.provenance["start"] == {"bundle_id": first.bundle_id, **first.effort}
    assert third.provenance["start"] == {"bundle_id": second.bundle_id, **second.effort}
    assert [m.effort["steps"] for m in (first, second, third)] == [150, 160, 165]
    assert third.effort["samples"] == 165 * 4
    assert third.statistics == first.statistics
    assert "synthetic" in third.provenance["sources"]
    counts = [sum(s["patches"] for s in m.model["seen_sets"]) for m in (first, second, third)]
    assert counts == [counts[0] * k for k in (1, 2, 3)]
    codecs = [load_bundle(folder / n).model.codec for n in ("older", "models/bundle")]
    for name, buffer in codecs[0].named_buffers():
        assert torch.equal(buffer, codecs[1].get_buffer(name))


def test_data_that_lack_modalities_teach_a_model_that_keeps_them(trained, tmp_path):
    params = choose(SOME, patch_px=24, start=str(trained / "older"), steps=3)
    folder = make_data(tmp_path, params)
    assert tuple(m.name for m in make_job(params, folder).modalities) == NAMES
    train_bundle(params, folder)
    made, older = load_bundle(folder / "models/bundle"), load_manifest(trained / "older")
    assert made.model.names == NAMES
    assert made.manifest.patch_px == 24
    assert made.manifest.statistics == older.statistics
    before, after = (
        {frozenset(s["modalities"]): s["patches"] for s in m.model["seen_sets"]}
        for m in (older, made.manifest)
    )
    assert after.keys() > before.keys()
    assert frozenset(SOME) in after.keys() - before.keys()
    own = made.manifest.provenance["training"]
    assert own["patches"] == json.loads((folder / "data/stats.json").read_text())["patches"]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"start": "nowhere"}, BundleError, r"own/nowhere/manifest\.json"),
        ({"start": "models/bundle"}, ConfigError, "copy it elsewhere"),
        ({"start": "./models/../models/bundle"}, ConfigError, "copy it elsewhere"),
        ({"modalities": ("rgb", "tir", "map")}, ConfigError, "got tir; .*--add tir"),
        ({"modalities": NAMES[::-1]}, ConfigError, "order of modalities"),
    ],
)
def test_what_it_cannot_begin_with_is_an_error_before_anything_starts(folder, changes, error, said):
    with pytest.raises(error, match=said):
        train_bundle(choose(**{"start": "older", **changes}), folder)
    assert not (folder / "models").exists()


def test_another_size_is_refused(folder):
    params = choose(start="older")
    model = params.model.model_copy(update={"size": "other"})
    with pytest.raises(ConfigError, match=r"model\.size"):
        make_job(params.model_copy(update={"model": model}), folder)


def test_the_pretrained_bundle_is_a_start_by_its_name(folder, monkeypatch):
    job = make_job(choose(start="older"), folder)
    monkeypatch.setattr("mm_model.adapters.train_bundle.PRETRAINED", folder / "older")
    by_name = make_job(choose(start="pretrained"), folder)
    assert by_name.start == job.start
    assert PRETRAINED.parent == ROOT / "mm_model/pretrained"


def test_a_modality_joins_and_the_others_stay_bit_for_bit(folder):
    wider = choose((*NAMES, "pan"), start="older", add="pan", steps=40, learning_rate=3e-3)
    older = load_bundle(folder / "older")
    shutil.rmtree(folder / "data")
    make_data(folder, wider)
    summary = train_bundle(wider, folder)
    bundle = load_bundle(folder / "models/bundle")
    assert bundle.model.added_names == ("pan",)
    assert any("pan" in s for s, _ in bundle.model.seen_sets)
    before = older.model.state_dict()
    after = bundle.model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items() if not n.startswith("codec."))
    for name in ("center", "scale", "shift", "gain"):
        first = before[f"codec.{name}"]
        assert torch.equal(after[f"codec.{name}"][: len(first)], first)
    x, mask = older.model.codec.empty(2, 16, 24)
    y, known = bundle.model.codec.empty(2, 16, 24)
    was = sample(older.model, x, mask, ["rgb", "map"], [1, 2], 2)
    now = sample(bundle.model, y, known, ["rgb", "map", "pan"], [1, 2], 2)
    assert torch.equal(now[:, : was.shape[1]], was)
    assert now[:, -1].std() > 0
    # Zero before the first step.
    assert after["added.pan.fine_out.weight"].abs().sum() > 0
    assert summary["losses"]["loss_pan"] > 0


@pytest.mark.parametrize(
    ("modalities", "add", "said"),
    [
        (NAMES, "rgb", "train.add"),
        (NAMES, "pan", "train.add"),
        ((*NAMES, "pan", "ms"), "pan", "ms"),
    ],
)
def test_what_cannot_join_is_refused(folder, modalities, add, said):
    with pytest.raises(ConfigError, match=said):
        make_job(choose(modalities, start="older", add=add), folder)


def test_nothing_joins_random_weights():
    with pytest.raises(ConfigError, match="needs a trained model"):
        choose((*NAMES, "pan"), add="pan")


def test_the_flow_learns_alone_and_all_else_stays_bit_for_bit(folder):
    older = load_bundle(folder / "older")
    summary = train_bundle(choose(start="older", only="flow", steps=20), folder)
    bundle = load_bundle(folder / "models/bundle")
    before, after = older.model.state_dict(), bundle.model.state_dict()
    changed = {n for n, t in before.items() if not torch.equal(after[n], t)}
    assert changed
    assert all(n.startswith("flow.") for n in changed)
    assert summary["losses"]["loss"] == summary["losses"]["loss_flow"] > 0
    assert bundle.manifest.effort["steps"] == 170


@pytest.mark.parametrize("changes", [{"start": "scratch"}, {"start": "older", "add": "pan"}])
def test_nothing_learns_alone_without_the_rest_or_beside_what_joins(changes):
    with pytest.raises(ConfigError, match="no other part that learns"):
        choose((*NAMES, "pan"), only="flow", **changes)
