"""A source's patches into a store; to be killed at any moment, and started again.

Each unit becomes a part beside the result, renamed into place when it is whole and named by its
fingerprint (parts.py). A new start finds those and makes only what is missing, in this process or
in many. At the end they are joined, in the order of unit ids, and removed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mm_model.config import AlignmentConfig, PrepareConfig
from mm_model.data.files import sync_folder, write_atomically
from mm_model.data.parts import PartMaker, Run, Work, in_this_process, read_part
from mm_model.data.patch import Source
from mm_model.data.sources.geotiff import GeotiffSource
from mm_model.data.sources.pyramid import Pyramid
from mm_model.data.sources.stac.source import StacSource
from mm_model.data.sources.synthetic import SyntheticSource
from mm_model.data.store import ShardWriter, StoredLayer, read_stored
from mm_model.errors import DataError, MMError
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
    "data/georeference.py",
    "data/parts.py",
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
    run: Run = in_this_process,
) -> int:
    """Write the source's patches as a store at `out`.

    A store that holds the very same is left alone; of another one the units that did not change are
    taken over. A layer with fewer valid pixels than `min_valid_fraction` counts as absent; a patch
    without layers is not stored. `alignment` says what becomes of layers that lie elsewhere than
    the others; without it nothing is measured. The result does not depend on `run`.

    Returns:
        The number of patches.

    Raises:
        RasterError: files cannot be read; names each. All other units are made, and kept for the
            next start.
        DataError: the source has no patch, or units failed in several ways.
    """
    out = out.absolute()  # for workers elsewhere
    units = source.units()
    settings = [_code_digest(), [m.to_dict() for m in modalities], min_valid_fraction]
    settings.append(alignment.model_dump() if alignment else None)
    keys = [_digest([*settings, unit.unit_id, unit.fingerprint]) for unit in units]
    fingerprint = _digest([shard_patches, *keys])
    parts, joined, former = (
        out.with_name(f".{out.name}.{word}") for word in ("parts", "joined", "former")
    )
    if _done(joined).get("fingerprint") == fingerprint:  # of a run that died in its last act
        _replace(out, joined, former)
    elif former.is_dir() and not out.is_dir():
        former.rename(out)
    done = _done(out)
    if done.get("fingerprint") == fingerprint:
        for rest in (parts, joined, former):
            shutil.rmtree(rest, ignore_errors=True)
        return sum(done["units"].values())
    parts.mkdir(parents=True, exist_ok=True)
    for rest in parts.glob("*.partial"):
        rest.unlink(missing_ok=True)
    had = _had(out, keys)
    works = [Work(unit, parts / key) for unit, key in zip(units, keys, strict=True)]
    missing = [w for w in works if w.path.name not in had and not w.path.is_file()]
    make = PartMaker(source, tuple(modalities), min_valid_fraction, alignment)
    _make_all(make, missing, run, total=len(works))
    shutil.rmtree(joined, ignore_errors=True)
    counts = _join(keys, parts, out, had, joined, modalities, shard_patches)
    if not sum(counts.values()):
        shutil.rmtree(joined)
        raise DataError(
            "no patch was made",
            got=f"{len(units)} units",
            remedy="look at prepare.min_valid_fraction and prepare.patch_px",
        )
    said = {"fingerprint": fingerprint, "units": counts}
    write_atomically(joined / _DONE, json.dumps(said).encode())
    _replace(out, joined, former)
    shutil.rmtree(parts)
    return sum(counts.values())


def _make_all(make: PartMaker, missing: Sequence[Work], run: Run, total: int) -> None:
    failed: dict[str, MMError] = {}
    with _progress() as progress:
        task = progress.add_task("preparing", total=total, completed=total - len(missing))
        for work, error in run(make, missing):
            if error is not None:
                failed[work.unit.unit_id] = error
            said = f", {len(failed)} failed" if failed else ""
            progress.update(task, description=f"preparing {work.unit.unit_id}{said}", advance=1)
    if not failed:
        return
    if len(failed) == 1:
        raise failed.popitem()[1]
    kinds = {type(error) for error in failed.values()}
    kind = kinds.pop() if len(kinds) == 1 else DataError
    lines = "".join(f"\n  {name}: {error}" for name, error in sorted(failed.items()))
    raise kind(
        f"units that could not be prepared ({len(failed)} of {total})",
        got=f"{lines}\n",
        remedy="mend these and start again: the other units are kept",
    )


def _join(
    keys: Sequence[str],
    parts: Path,
    old: Path,
    had: Mapping[str, int],
    joined: Path,
    modalities: Sequence[Modality],
    shard_patches: int,
) -> dict[str, int]:
    """All units as one store, in this order; the number of patches of each."""
    by_name = {m.name: m for m in modalities}
    taken = _taken_over(old, had, keys)
    counts = {}
    with ShardWriter(joined, modalities, shard_patches) as writer:
        for key in keys:
            counts[key] = 0
            patches = next(taken) if key in had else read_part(parts / key, by_name)
            for patch_id, layers in patches:
                writer.append(patch_id, layers)
                counts[key] += 1
    return counts


def _taken_over(
    store: Path, had: Mapping[str, int], keys: Sequence[str]
) -> Iterator[Iterator[tuple[str, dict[str, StoredLayer]]]]:
    """The patches of each unit of a store that is wanted again."""
    wanted = set(keys)
    if had:
        patches = read_stored(store)
        for key, count in had.items():
            unit = islice(patches, count)
            if key in wanted:
                yield unit
            for _ in unit:  # passed over
                pass


def _had(store: Path, keys: Sequence[str]) -> dict[str, int]:
    """The units of a store and the number of patches of each; none if none can be taken over."""
    had: dict[str, int] = _done(store).get("units", {})
    wanted = set(keys)
    # Both are read from front to back. A source that sorts as it should has no other order.
    if [key for key in had if key in wanted] != [key for key in keys if key in had]:
        return {}
    return had if had.keys() & wanted else {}


def _done(store: Path) -> dict[str, Any]:
    """What stands in a store about what it was made of; nothing where it is none, or an old one."""
    try:
        said: dict[str, Any] = json.loads((store / _DONE).read_text())
    except FileNotFoundError:
        return {}
    return said if "units" in said else {}


def _replace(out: Path, joined: Path, former: Path) -> None:
    """At every moment one of them is whole."""
    shutil.rmtree(former, ignore_errors=True)
    if out.is_dir():
        out.rename(former)
    joined.rename(out)
    sync_folder(out)
    shutil.rmtree(former, ignore_errors=True)


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
