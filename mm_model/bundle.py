"""Bundle: all that serving and evaluation need of a training, in one folder without any pickle.

`weights.safetensors` holds the weights (averaged over training) and the codec's buffers;
`manifest.json` says how to build the model around them, and where they come from. Both have the
same bytes whenever they are written from the same content.

Matrices of weights lie there in half precision, so that a bundle is half as large; whoever uses a
model (evaluation, registry, serving, a training that goes on from it) loads it from here, and so
all of them compute with the same rounded weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mm_model.errors import BundleError, ConfigError
from mm_model.modalities import Modality
from mm_model.nn.model import SceneModel

FORMAT = 3  # 1: elevation had one channel a band; 2: the decoder read x_t without a closed form
WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
_MODEL_KEYS = {"size", "modalities", "added", "seen_sets", "patch_px"}
_LATER_MODEL_KEYS = {"regressions"}  # older bundles lack it
_KEYS = {
    "format",
    "bundle_id",
    "weights_sha256",
    "model",
    "gsd_m",
    "statistics",
    "provenance",
}


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        model: what `SceneModel.config` gave: modalities, added, size, seen_sets, patch_px,
            regressions. A bundle carries its own modality table, so that it does not change
            meaning when the registry does.
        gsd_m: ground sampling distances it was trained at, in metres.
        statistics: of the training split, as `data.stats` writes them.
        provenance: JSON-ready record of origin: commit, data hashes, parameters, sources, run.
        weights_sha256, bundle_id: filled by `save_bundle`.
    """

    model: Mapping[str, Any]
    gsd_m: Sequence[float]
    statistics: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""
    bundle_id: str = ""

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """In the order of the model's channels."""
        return tuple(Modality.from_dict(m) for m in self.model["modalities"])

    @property
    def patch_px(self) -> int:
        """Side of the training patches, which is the window of the sampler."""
        return int(self.model["patch_px"])

    @property
    def effort(self) -> dict[str, float]:
        """Steps, samples and seconds of its training and of those before that it went on from.

        Empty where the provenance does not tell.
        """
        own, before = (self.provenance.get(k) or {} for k in ("training", "start"))
        return {k: own[k] + before.get(k, 0) for k in ("steps", "samples", "seconds") if k in own}

    def to_dict(self) -> dict[str, Any]:
        """The content of manifest.json."""
        return {
            "format": FORMAT,
            "bundle_id": self.bundle_id,
            "weights_sha256": self.weights_sha256,
            "model": dict(self.model),
            "gsd_m": list(self.gsd_m),
            "statistics": dict(self.statistics),
            "provenance": dict(self.provenance),
        }


@dataclass(frozen=True)
class Bundle:
    """A loaded model, in evaluation mode, and its manifest."""

    model: SceneModel
    manifest: Manifest


def save_bundle(path: Path, model: SceneModel, manifest: Manifest) -> Manifest:
    """Write a bundle folder, whole or not at all; one that stands there is replaced.

    Matrices of weights are rounded to half precision: to 11 bits, or to 2^-25 where that is more.

    Returns:
        The manifest with `weights_sha256` and `bundle_id` filled in.

    Raises:
        BundleError: a weight is not finite in half precision, or the manifest is no JSON.
    """
    weights = safetensors.torch.save(_packed(model))
    record = manifest.to_dict()
    record["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    record["bundle_id"] = _bundle_id(record)
    try:
        text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BundleError("manifest", got=error, allowed="finite JSON values") from error
    saved = _parse_manifest(json.loads(text), path / MANIFEST)

    path = path.absolute()
    fresh = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    stale = fresh.with_name(fresh.name + "-old")
    fresh.mkdir(parents=True)
    try:
        _write(fresh / WEIGHTS, weights)
        _write(fresh / MANIFEST, (text + "\n").encode())
        if path.exists():
            path.rename(stale)  # a folder that is not empty cannot be replaced in one call
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)
    return saved


def load_manifest(path: Path) -> Manifest:
    """Read and check a bundle's manifest, without its weights.

    Raises:
        BundleError: the field that is missing, unknown or inconsistent is named.
    """
    file = path / MANIFEST
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise BundleError(f"{file} does not exist", remedy="name a bundle's folder") from None
    except ValueError as error:
        raise BundleError(f"{file} is not JSON", got=error) from error
    return _parse_manifest(record, file)


def load_bundle(path: Path, device: torch.device | str = "cpu") -> Bundle:
    """Load a bundle; strict: every tensor must be there, in its shape and type, and none besides.

    The model's weights are single precision again.

    Raises:
        BundleError: the file or field that is damaged, missing or unknown is named.
    """
    manifest = load_manifest(path)
    file = path / WEIGHTS
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{file} does not exist", remedy="train again") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != manifest.weights_sha256:
        raise BundleError(f"weights_sha256 of {file}", got=digest, allowed=manifest.weights_sha256)
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise BundleError(f"{file} is not safetensors", got=error) from error
    try:
        model = SceneModel.from_config(manifest.model)
    except ConfigError as error:
        raise BundleError(f"{path / MANIFEST}: model", got=error) from error
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    both = [n for n in expected if n in tensors]
    misshapen = [n for n in both if tensors[n].shape != expected[n].shape]
    types = _stored_types(model)
    mistyped = [n for n in both if tensors[n].dtype != types[n]]
    faults = {"missing": missing, "unknown": unknown, "misshapen": misshapen, "mistyped": mistyped}
    for fault, names in faults.items():
        if names:
            raise BundleError(f"{fault} tensors in {file}", got=names[:8])
    model.load_state_dict(tensors)
    return Bundle(model.to(device).eval().requires_grad_(False), manifest)


def _stored_types(model: SceneModel) -> dict[str, torch.dtype]:
    """The type in which each tensor is written: half for matrices of weights, else its own.

    Vectors (norms, biases) are small, and the codec's buffers are measurements: both stay exact.
    """
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1 and p.dtype is torch.float32}
    tensors = model.state_dict()
    return {n: torch.float16 if n in matrices else t.dtype for n, t in tensors.items()}


def _packed(model: SceneModel) -> dict[str, Tensor]:
    """The model's tensors as they are written; raises BundleError if a weight does not survive."""
    tensors, types = model.state_dict(), _stored_types(model)
    packed = {n: t.detach().to("cpu", types[n]).contiguous().clone() for n, t in tensors.items()}
    for name, _ in model.named_parameters():
        if not bool(packed[name].isfinite().all()):
            raise BundleError(
                f"weights {name}",
                got=f"a largest magnitude of {float(tensors[name].abs().max()):g}",
                allowed=f"finite, up to {torch.finfo(packed[name].dtype).max:g}",
                remedy="train again with a lower train.learning_rate",
            )
    return packed


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _bundle_id(record: Mapping[str, Any]) -> str:
    """Identity of what the model computes: its weights and the record it is built from."""
    parts = [record["weights_sha256"], record["model"], record["gsd_m"], record["statistics"]]
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _check_keys(
    record: Any, expected: set[str], where: str, possible: Collection[str] = ()
) -> None:
    if not isinstance(record, dict):
        raise BundleError(where, got=type(record).__name__, allowed="an object")
    if missing := expected - record.keys():
        raise BundleError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := record.keys() - expected - {*possible}:
        raise BundleError(f"{where} has unknown {', '.join(sorted(unknown))}")


def _parse_manifest(record: Any, file: Path) -> Manifest:
    if isinstance(record, dict) and record.get("format") != FORMAT:
        raise BundleError(
            f"format of {file}",
            got=record.get("format"),
            allowed=FORMAT,
            remedy="train it again, or load it with the version of mm_model that made it",
        )
    _check_keys(record, _KEYS, str(file))
    _check_keys(record["model"], _MODEL_KEYS, f"{file}: model", _LATER_MODEL_KEYS)
    expected = _bundle_id(record)
    if record["bundle_id"] != expected:
        raise BundleError(
            f"bundle_id of {file}: weights_sha256, model, gsd_m or statistics was changed",
            got=record["bundle_id"],
            allowed=expected,
            remedy="restore the bundle",
        )
    try:
        names = {Modality.from_dict(m).name for m in record["model"]["modalities"]}
    except ConfigError as error:
        raise BundleError(f"{file}: model.modalities", got=error) from error
    if unknown := {n for s in record["model"]["seen_sets"] for n in s["modalities"]} - names:
        raise BundleError(f"{file}: model.seen_sets", got=sorted(unknown), allowed=sorted(names))
    return Manifest(**{k: v for k, v in record.items() if k != "format"})
