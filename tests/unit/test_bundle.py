"""The hand-over from training to serving."""

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mm_model.bundle import (
    FORMAT,
    MANIFEST,
    WEIGHTS,
    Manifest,
    load_bundle,
    load_manifest,
    save_bundle,
)
from mm_model.codec import Codec
from mm_model.config import load_params
from mm_model.errors import BundleError
from mm_model.modalities import MODALITIES
from mm_model.nn.model import SceneModel, Size

NAMES = ("sar", "map", "dem")
SELECTED = tuple(MODALITIES[n] for n in NAMES)
SIZE = Size(8, 8, 16, 1, 1, 1, 2, 4)
SETS = [{"modalities": ["sar", "map"], "patches": 3}, {"modalities": list(NAMES), "patches": 1}]


def statistics() -> dict:
    def band(i: int, name: str) -> dict:
        return {
            "name": name,
            "center": 3.0 + i,
            "scale": 20.0,
            "transformed_mean": -10.0 + i,
            "transformed_std": 2.0 + i,
            "relief": {"scale": 5.0, "transformed_mean": 0.1, "transformed_std": 1.5},
        }

    return {
        "modalities": {
            m.name: {"pixels": 9, "classes": {"10": 9}}
            if m.is_categorical
            else {"pixels": 9, "bands": [band(i, n) for i, n in enumerate(m.band_names)]}
            for m in SELECTED
        }
    }


def make_model() -> SceneModel:
    torch.manual_seed(0)
    model = SceneModel(SELECTED, SIZE, Codec(SELECTED, statistics()), SETS, patch_px=24)
    with torch.no_grad():
        for p in model.parameters():  # also what starts at zero
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def make_manifest(model: SceneModel, **provenance) -> Manifest:
    return Manifest(model.config, [10.0, 20.0], statistics(), {"source": "synthetic", **provenance})


def scene_of(model: SceneModel) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2 * model.codec.channels * 16 * 24)
    x = x.reshape(2, model.codec.channels, 16, 24)
    return model.encode(x, torch.ones(2, len(NAMES), 16, 24, dtype=torch.bool)).z


@pytest.fixture
def bundle_dir(tmp_path):
    model = make_model()
    save_bundle(tmp_path / "bundle", model, make_manifest(model))
    return tmp_path / "bundle"


def edit(folder, change) -> None:
    record = json.loads((folder / MANIFEST).read_text())
    change(record)
    (folder / MANIFEST).write_text(json.dumps(record))


def test_a_loaded_model_computes_the_same(bundle_dir):
    model, loaded = make_model(), load_bundle(bundle_dir)
    torch.testing.assert_close(scene_of(model), scene_of(loaded.model), rtol=0.02, atol=0.02)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half())
    assert torch.equal(scene_of(model), scene_of(loaded.model))
    assert loaded.model.config == model.config
    assert loaded.manifest.modalities == SELECTED
    assert loaded.manifest.patch_px == 24
    assert loaded.manifest.gsd_m == [10.0, 20.0]
    assert loaded.manifest.provenance == {"source": "synthetic"}
    for name, buffer in model.codec.named_buffers():
        assert torch.equal(buffer, loaded.model.codec.get_buffer(name))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_matrices_are_rounded_and_nothing_else_is(bundle_dir):
    kept = load_bundle(bundle_dir).model.state_dict()
    model = make_model()
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1}
    stored = safetensors.torch.load_file(bundle_dir / WEIGHTS)
    for name, tensor in model.state_dict().items():
        assert kept[name].dtype == tensor.dtype
        if name not in matrices:
            assert torch.equal(kept[name], tensor), name
            continue
        assert stored[name].dtype == torch.float16
        # Half precision: 11 bits, and steps of 2^-24 below its least normal number.
        limit = (tensor.abs() * 2**-11).clamp_min(2**-25)
        assert ((kept[name] - tensor).abs() <= limit).all(), name
    assert any(not torch.equal(kept[n], t) for n, t in model.state_dict().items())


def test_a_loaded_bundle_is_saved_with_the_same_bytes(bundle_dir, tmp_path):
    loaded = load_bundle(bundle_dir)
    again = save_bundle(tmp_path / "again", loaded.model, loaded.manifest)
    assert again == loaded.manifest
    for name in (WEIGHTS, MANIFEST):
        assert (tmp_path / "again" / name).read_bytes() == (bundle_dir / name).read_bytes()


@pytest.mark.parametrize("value", [65520.0, -1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_weight_that_does_not_fit_is_named(tmp_path, value, dimensions):
    model = make_model()
    fits = dimensions == 1 and abs(value) < float("inf")  # vectors stay single precision
    name, parameter = next(p for p in model.named_parameters() if p[1].ndim == dimensions)
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    if fits:
        save_bundle(tmp_path / "b", model, make_manifest(model))
        return
    with pytest.raises(BundleError, match=name):
        save_bundle(tmp_path / "b", model, make_manifest(model))
    assert not list(tmp_path.iterdir())


def test_weights_in_another_precision_are_refused(bundle_dir):
    tensors = safetensors.torch.load_file(bundle_dir / WEIGHTS)
    safetensors.torch.save_file({n: t.float() for n, t in tensors.items()}, bundle_dir / WEIGHTS)
    digest = hashlib.sha256((bundle_dir / WEIGHTS).read_bytes()).hexdigest()
    record = load_manifest(bundle_dir).to_dict()
    parts = [digest, record["model"], record["gsd_m"], record["statistics"]]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    identity = hashlib.sha256(text.encode()).hexdigest()
    edit(bundle_dir, lambda r: r.update(weights_sha256=digest, bundle_id=identity))
    with pytest.raises(BundleError, match="mistyped"):
        load_bundle(bundle_dir)


def test_the_size_of_the_project_makes_a_bundle_of_at_most_20_mb(tmp_path):
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    size = Size(**params.model.chosen.model_dump())
    model = SceneModel(params.selected, size, Codec(params.selected, None), [])
    save_bundle(tmp_path / "b", model, Manifest(model.config, [10.0, 20.0], {}))
    assert (tmp_path / "b" / WEIGHTS).stat().st_size <= 20e6


def test_the_effort_of_a_chain_adds_up():
    model = make_model()
    record = {"steps": 30, "samples": 480, "seconds": 2.5}
    alone = make_manifest(model, training={**record, "losses": {"loss": 1.0}})
    later = make_manifest(model, training=record, start={"bundle_id": "a", **alone.effort})
    assert make_manifest(model).effort == {}
    assert alone.effort == record
    assert later.effort == {"steps": 60, "samples": 960, "seconds": 5.0}


def test_the_same_content_has_the_same_bytes(tmp_path):
    model = make_model()
    a = save_bundle(tmp_path / "a", model, make_manifest(model))
    b = save_bundle(tmp_path / "b", model, make_manifest(model))
    assert a == b
    for name in (WEIGHTS, MANIFEST):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_id_follows_what_the_model_computes_and_nothing_else(tmp_path):
    model = make_model()
    first = save_bundle(tmp_path / "a", model, make_manifest(model))
    other_origin = save_bundle(tmp_path / "a", model, make_manifest(model, run="r2"))
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    other_weights = save_bundle(tmp_path / "a", model, make_manifest(model))
    assert first.bundle_id == other_origin.bundle_id != other_weights.bundle_id


def test_a_bundle_is_replaced_whole_and_nothing_else_is_left(tmp_path, bundle_dir):
    model = make_model()
    save_bundle(bundle_dir, model, make_manifest(model, run="later"))
    assert load_manifest(bundle_dir).provenance["run"] == "later"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    with pytest.raises(BundleError, match="finite JSON"):
        save_bundle(bundle_dir, model, make_manifest(model, loss=float("nan")))
    assert load_manifest(bundle_dir).provenance["run"] == "later"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("field", ["format", "bundle_id", "model", "provenance", "statistics"])
def test_a_missing_field_is_named(bundle_dir, field):
    edit(bundle_dir, lambda r: r.pop(field))
    with pytest.raises(BundleError, match=field):
        load_bundle(bundle_dir)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r.update(format=FORMAT - 1), "format"),
        (lambda r: r.update(format=FORMAT + 1), "format"),
        (lambda r: r.update(extra=1), "unknown extra"),
        (lambda r: r["model"].update(extra=1), "unknown extra"),
        (lambda r: r["model"].pop("patch_px"), "lacks patch_px"),
        (lambda r: r["model"].update(patch_px=32), "bundle_id"),
        (lambda r: r.update(gsd_m=[20]), "gsd_m"),
        (lambda r: r["model"]["modalities"][0].update(title="x"), "model"),
        (lambda r: r.update(weights_sha256="0" * 64), "weights_sha256"),
    ],
)
def test_a_changed_field_is_named(bundle_dir, change, named):
    edit(bundle_dir, change)
    with pytest.raises(BundleError, match=named):
        load_bundle(bundle_dir)


def test_damaged_and_missing_files_are_named(bundle_dir, tmp_path):
    with pytest.raises(BundleError, match="elsewhere"):
        load_bundle(tmp_path / "elsewhere")
    content = bytearray((bundle_dir / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (bundle_dir / WEIGHTS).write_bytes(bytes(content))
    with pytest.raises(BundleError, match="weights_sha256"):
        load_bundle(bundle_dir)
    (bundle_dir / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=WEIGHTS):
        load_bundle(bundle_dir)
    (bundle_dir / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match="JSON"):
        load_bundle(bundle_dir)


@pytest.mark.parametrize(("dim", "fault"), [(32, "misshapen"), (16, "unknown")])
def test_weights_of_another_model_are_refused(tmp_path, dim, fault):
    model = make_model()
    wider = Size(8, 8, dim, 1, 1, 1, 2, 4) if dim == 32 else Size(8, 8, 16, 1, 2, 1, 2, 4)
    other = SceneModel(SELECTED, wider, Codec(SELECTED, statistics()), SETS, patch_px=24)
    save_bundle(tmp_path / "b", other, make_manifest(model))  # a manifest that lies
    with pytest.raises(BundleError, match=fault):
        load_bundle(tmp_path / "b")


def test_it_loads_without_the_training_stack_from_anywhere(bundle_dir, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = f"""
        import sys
        for name in ("ray", "mlflow", "prefect", "dvc", "great_expectations", "fastapi", "pandas",
                     "pyarrow", "rasterio", "yaml"):
            sys.modules[name] = None  # importing it fails
        from pathlib import Path
        from mm_model.bundle import load_bundle
        print(load_bundle(Path({str(bundle_dir)!r})).manifest.bundle_id)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == load_manifest(bundle_dir).bundle_id
