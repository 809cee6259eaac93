"""A source's patches into a store; to be killed at any moment, and started again.

Each unit becomes a small store of its own beside the result, renamed into place when it is whole
and named by its fingerprint. A new start finds those and makes only what is missing. At the end
they are joined, in the order of unit ids, and removed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mm_model.config import AlignmentConfig, PrepareConfig
from mm_model.data.alignment import align
from mm_model.data.files import sync_folder, write_atomically
from mm_model.data.patch import Layer, Patch, Source, Unit
from mm_model.data.sources.geotiff import GeotiffSource
from mm_model.data.sources.pyramid import Pyramid
from mm_model.data.sources.stac.source import StacSource
from mm_model.data.sources.synthetic import SyntheticSource
from mm_model.data.store import PatchStore, ShardWriter
from mm_model.errors import DataError
from mm_model.modalities import Modality

_DONE = "store.json"
# What a store depends on besides its source; the same list stands in dvc.yaml.
_PACKAGE = Path(__file__).parents[1]
_CODE = (
    "data/align.py",
    "data/alignment.py",
    "data/content.py",
    "data/coregistration.py",
    "data/footprints.py",
    "data/prepare.py",
    "data/raster.py",
    "data/remote.py",
    "data/sources",
    "data/store.py",
    "geo",
    "modalities.py",
)


def open_source(config: PrepareConfig, modalities: Sequence[Modality]) -> Source:
    """The source that params.yaml names, at every distance of it.

    Raises:
        ConfigError: a manifest or search is wrong, or the synthetic Earth has no such places.
    """

    def at(gsd_m: float) -> Source:
        if config.source == "synthetic":
            assert config.synthetic is not None
            return SyntheticSource(
                config.synthetic, config.patch_px, gsd_m, modalities, finest_gsd_m=config.gsd_m[0]
            )
        if config.source == "stac":
            assert config.stac is not None
            return StacSource(config.stac.search, config.patch_px, gsd_m, modalities)
        assert config.geotiff is not None
        return GeotiffSource(config.geotiff.manifest, config.patch_px, gsd_m, modalities)

    return Pyramid({gsd_m: at(gsd_m) for gsd_m in config.gsd_m})


def prepare(
    source: Source,
    out: Path,
    modalities: Sequence[Modality],
    *,
    shard_patches: int,
    min_valid_fraction: float,
    alignment: AlignmentConfig | None = None,
) -> int:
    """Write the source's patches as a store at `out`.

    A store that holds the very same is left alone. A layer with fewer valid pixels than
    `min_valid_fraction` counts as absent; a patch without layers is not stored. `alignment` says
    what becomes of layers that lie elsewhere than the others; without it nothing is measured.

    Returns:
        The number of patches.

    Raises:
        RasterError: a file cannot be read.
        DataError: the source has no patch.
    """
    units = source.units()
    settings = [_code_digest(), [m.to_dict() for m in modalities], min_valid_fraction]
    settings.append(alignment.model_dump() if alignment else None)
    keys = [_digest([*settings, unit.unit_id, unit.fingerprint]) for unit in units]
    wanted = {"fingerprint": _digest([shard_patches, *keys])}
    parts = out.with_name(f".{out.name}.parts")
    if (out / _DONE).is_file() and json.loads((out / _DONE).read_text()) == wanted:
        shutil.rmtree(parts, ignore_errors=True)  # of a run that died in its last act
        return len(PatchStore(out))
    parts.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        task = progress.add_task("preparing", total=len(units))
        for unit, key in zip(units, keys, strict=True):
            progress.update(task, description=f"preparing {unit.unit_id}")
            if not (parts / key).is_dir():
                _make_part(source, unit, parts / key, modalities, min_valid_fraction, alignment)
            progress.advance(task)
    joined = out.with_name(f".{out.name}.joined")
    shutil.rmtree(joined, ignore_errors=True)
    with ShardWriter(joined, modalities, shard_patches) as writer:
        for key in keys:
            part = PatchStore(parts / key)
            for position in range(len(part)):
                writer.copy(part, position)
    count = len(PatchStore(joined))
    if not count:
        raise DataError(
            "no patch was made",
            got=f"{len(units)} units",
            remedy="look at prepare.min_valid_fraction and prepare.patch_px",
        )
    write_atomically(joined / _DONE, json.dumps(wanted).encode())
    shutil.rmtree(out, ignore_errors=True)
    joined.rename(out)
    sync_folder(out)
    shutil.rmtree(parts)
    return count


def _make_part(
    source: Source,
    unit: Unit,
    path: Path,
    modalities: Sequence[Modality],
    min_valid_fraction: float,
    alignment: AlignmentConfig | None,
) -> None:
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with ShardWriter(partial, modalities, shard_patches=1 << 30) as writer:
        for patch in source.read(unit):
            patch = _without_sparse(patch, min_valid_fraction)
            measured = None
            if alignment and patch.layers:
                patch, measured = align(patch, modalities, alignment)
                patch = _without_sparse(patch, min_valid_fraction)  # moving costs pixels
            if patch.layers:
                writer.add(patch, measured)
    partial.rename(path)


def _without_sparse(patch: Patch, min_valid_fraction: float) -> Patch:
    present = {n: y for n, y in patch.layers.items() if _is_present(y, min_valid_fraction)}
    return replace(patch, layers=present)


def _is_present(layer: Layer, min_valid_fraction: float) -> bool:
    return bool(layer.valid.any() and layer.valid.mean() >= min_valid_fraction)


def _code_digest() -> str:
    """Of the code that makes patches: a store of other code is another store."""
    digest = hashlib.sha256()
    for name in _CODE:
        path = _PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("units"),
        TimeRemainingColumn(),
    )
