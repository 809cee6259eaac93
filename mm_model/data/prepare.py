"""A source's patches into a store; to be killed at any moment, and started again.

Each unit becomes a part, which is there when it is whole and named by its fingerprint (parts.py).
When all are there, chunks of them become shards (chunks.py), then the index. Parts and shards are
made in this process or in many; a new start finds what was made, and of the store that stands
whole shards are taken over. Only the index is made anew each time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mm_model.config import AlignmentConfig, PrepareConfig
from mm_model.data.chunks import (
    Chunk,
    ChunkMaker,
    ChunkWork,
    Standing,
    chunks_of,
    damaged,
    read_made,
    rows_name,
)
from mm_model.data.files import sync_folder, write_atomically
from mm_model.data.index import INDEX, IndexWriter
from mm_model.data.parts import PartMaker, Run, Work, counts_of_parts, in_this_process
from mm_model.data.patch import Source
from mm_model.data.sources.geotiff import GeotiffSource
from mm_model.data.sources.pyramid import Pyramid
from mm_model.data.sources.stac.source import StacSource
from mm_model.data.sources.synthetic import SyntheticSource
from mm_model.data.storage import Folder, LocalFolder, open_folder
from mm_model.data.store import ABOUT, about, check_ids
from mm_model.errors import DataError, MMError
from mm_model.modalities import Modality

# What a store depends on besides its source; the same list stands in dvc.yaml.
_PACKAGE = Path(__file__).parents[1]
_CODE = (
    "data/align.py",
    "data/alignment.py",
    "data/chunks.py",
    "data/content.py",
    "data/coregistration.py",
    "data/footprints.py",
    "data/georeference.py",
    "data/index.py",
    "data/parts.py",
    "data/prepare.py",
    "data/raster.py",
    "data/remote.py",
    "data/shards.py",
    "data/sources",
    "data/storage.py",
    "data/store.py",
    "data/strips.py",
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
    shards: str | None = None,
    run: Run = in_this_process,
) -> int:
    """Write the source's patches as a store at `out`.

    With `shards`, the URL of a folder in object storage, parts and shards lie there, and only the
    index at `out`. Shards that no index names any more stay there: an older one may.

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
    fingerprint = _digest([shard_patches, shards, *keys])
    scratch, joined, former = (
        out.with_name(f".{out.name}.{word}") for word in ("parts", "joined", "former")
    )
    if about(joined).get("fingerprint") == fingerprint:  # of a run that died in its last act
        _replace(out, joined, former)
    elif former.is_dir() and not out.is_dir():
        former.rename(out)
    parts = open_folder(shards).below("parts") if shards else LocalFolder(scratch)
    if (done := about(out)).get("fingerprint") == fingerprint:
        parts.remove()
        for rest in (joined, former):
            shutil.rmtree(rest, ignore_errors=True)
        return int(done["patches"])
    for rest in [*scratch.glob("*.partial"), *joined.glob("*.partial")]:
        rest.unlink(missing_ok=True)
    standing = Standing(out)
    counts = {**counts_of_parts(parts), **standing.units}
    works = [Work(unit, key) for unit, key in zip(units, keys, strict=True)]
    make = PartMaker(source, parts, tuple(modalities), min_valid_fraction, alignment)
    counts |= _make_all(make, works, counts, run)
    ordered = [(unit.unit_id, key, counts[key]) for unit, key in zip(units, keys, strict=True)]
    chunks = chunks_of(ordered, shard_patches)
    if not chunks:
        raise DataError(
            "no patch was made",
            got=f"{len(units)} units",
            remedy="look at prepare.min_valid_fraction and prepare.patch_px",
        )
    target = open_folder(shards) if shards else LocalFolder(joined)
    _join(chunks, standing, parts, target, joined, modalities, run)
    patches = sum(piece.count for chunk in chunks for piece in chunk.pieces)
    said = {
        "fingerprint": fingerprint,
        "patches": patches,
        **({"shards": shards} if shards else {}),
        "chunks": [[astuple(piece) for piece in chunk.pieces] for chunk in chunks],
    }
    content = json.dumps(said).encode()
    if shards:  # so that it is a store for whoever knows the address alone
        for name, path in ((INDEX, joined / INDEX), (ABOUT, None)):
            with target.create(name) as new:
                new.path.write_bytes(content if path is None else path.read_bytes())
    write_atomically(joined / ABOUT, content)
    _replace(out, joined, former)
    parts.remove()
    return patches


def _make_all(
    make: PartMaker, works: Sequence[Work], known: Mapping[str, int], run: Run
) -> dict[str, int]:
    """Parts of all units that are not known; the number of patches of each."""
    missing = [work for work in works if work.key not in known]
    made: dict[str, int] = {}
    failed: dict[str, MMError] = {}
    with _progress("units") as progress:
        task = progress.add_task("preparing", total=len(works), completed=len(works) - len(missing))
        for work, result in run(make, missing):
            if isinstance(result, MMError):
                failed[str(work)] = result
            else:
                made[work.key] = result
            said = f", {len(failed)} failed" if failed else ""
            progress.update(task, description=f"preparing {work}{said}", advance=1)
    _raise_all("units that could not be prepared", failed, len(works))
    return made


def _raise_all(what: str, failed: Mapping[str, MMError], of: int) -> None:
    if not failed:
        return
    if len(failed) == 1:
        raise next(iter(failed.values()))
    kinds = {type(error) for error in failed.values()}
    kind = kinds.pop() if len(kinds) == 1 else DataError
    lines = "".join(f"\n  {name}: {error}" for name, error in sorted(failed.items()))
    raise kind(
        f"{what} ({len(failed)} of {of})",
        got=f"{lines}\n",
        remedy="mend these and start again: the others are kept",
    )


def _join(
    chunks: Sequence[Chunk],
    standing: Standing,
    parts: Folder,
    target: Folder,
    joined: Path,
    modalities: Sequence[Modality],
    run: Run,
) -> None:
    """Shards of all chunks in `target`, and the index in `joined`."""
    local = isinstance(target, LocalFolder)
    stays = (
        isinstance(standing.shards, LocalFolder) if local else (standing.shards.url == target.url)
    )
    taken = {c.name for c in chunks if c.name in standing.chunks} if stays else set()
    there, made = target.names(), parts.names()

    def is_made(chunk: Chunk) -> bool:
        if rows_name(chunk) not in made:
            return False
        return set(read_made(parts, chunk)["shard"].to_pylist()) <= there

    missing = [c for c in chunks if c.name not in taken and not is_made(c)]
    works = (
        ChunkWork(
            c,
            tuple(standing.rows_of_piece(p) if p.key in standing.units else None for p in c.pieces),
        )
        for c in missing
    )
    make = ChunkMaker(parts, standing.shards, target, tuple(modalities))
    failed: dict[str, MMError] = {}
    with _progress("chunks") as progress:
        task = progress.add_task("joining", total=len(chunks), completed=len(chunks) - len(missing))
        for work, result in run(make, works):
            if isinstance(result, MMError):
                failed[str(work)] = result
            progress.update(task, advance=1)
    _raise_all("shards that could not be written", failed, len(chunks))
    joined.mkdir(parents=True, exist_ok=True)
    ids: set[int] = set()
    wanted: set[str] = set()
    index = IndexWriter(joined / INDEX)
    for chunk in chunks:
        is_old = chunk.name in taken
        rows = standing.rows_of_chunk(chunk.name) if is_old else read_made(parts, chunk)
        shards = set(rows["shard"].unique().to_pylist())
        wanted |= shards
        if is_old and local:
            for name in sorted(shards):
                _take_over(Path(standing.shards.url) / name, joined / name)
        check_ids(rows["patch_id"].unique().to_pylist(), ids)
        index.write(rows)
    index.close()
    for rest in joined.iterdir():  # of a run that died, when there were other units
        if rest.name != INDEX and rest.name not in wanted:
            rest.unlink()


def _take_over(old: Path, new: Path) -> None:
    """The same file under both names where the disk can do that: it is never written again."""
    if new.is_file():
        return
    partial = new.with_name(f"{new.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        try:
            partial.hardlink_to(old)
        except FileNotFoundError:
            raise
        except OSError:  # another disk, or one without links
            shutil.copy2(old, partial)
    except OSError as error:
        raise damaged(old.parent, error) from error
    partial.replace(new)


def _replace(out: Path, joined: Path, former: Path) -> None:
    """At every moment one of them is whole."""
    sync_folder(joined)
    shutil.rmtree(former, ignore_errors=True)
    if out.is_dir():
        out.rename(former)
    joined.rename(out)
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


def _progress(what: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(what),
        TimeRemainingColumn(),
    )
