"""The patch store: few large files, read at random without copying (docs/adr/0003-patch-store.md).

A folder of shards (shards.py) and `index.parquet` (index.py), which has a row for each patch ×
modality and says at which bytes of which shard it lies. Shards may lie elsewhere than the index: in
the folder, local or in object storage, that `store.json` names.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from mm_model.data.files import sync_folder
from mm_model.data.index import COLUMNS, INDEX, IndexWriter
from mm_model.data.patch import Layer, Patch
from mm_model.data.shards import ChunkWriter, StoredLayer, stored_layers
from mm_model.data.storage import Folder, LocalFolder, Range, open_folder
from mm_model.errors import DataError
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality

ABOUT = "store.json"


def about(folder: Path | str) -> dict[str, Any]:
    """What stands in a store about what it was made of; nothing where it is none."""
    try:
        said: dict[str, Any] = json.loads(_content(folder, ABOUT))
    except FileNotFoundError:
        return {}
    return said


class PatchStore:
    """Patches by position, in a stable order. May be pickled, and used after a fork.

    Attributes:
        index: one row a patch × modality, rows of a patch together: patch_id, place_id, source,
            modality, shard, row, crs, a…f, height, width, gsd_m, native_gsd_m (of the layer), min,
            max, mean (over valid pixels of all bands), valid_fraction, acquired_at, sha256; what
            `content.content` and `alignment.align` say of the layer (shifts are NaN where they were
            not measured). In the file stand geometry and bbox as well, which nobody here reads.
        patch_ids: by position.
        shards_url: where the shards lie, if not beside the index.
    """

    def __init__(self, path: Path | str) -> None:
        self.path: Any = path if "://" in str(path) else Path(path)
        try:
            content = io.BytesIO(_content(self.path, INDEX))
            self.index = pd.read_parquet(content, columns=list(COLUMNS))
        except FileNotFoundError:
            raise DataError(
                f"{self.path} is no patch store", remedy="run the stage prepare"
            ) from None
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{self.path}/{INDEX} is of another version, or damaged",
                got=str(error).splitlines()[0],
                remedy="run the stage prepare again",
            ) from error
        self.shards_url: str | None = about(self.path).get("shards")
        self._shards = open_folder(self.shards_url or self.path)
        ids = self.index["patch_id"].to_numpy()
        # Plain arrays: pandas takes longer to find a row than the file to give its pixels.
        self._columns = {c: _plain(self.index[c]) for c in COLUMNS}
        self._value_bytes, self._mask_bytes = _sizes(self._columns)
        first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]) & (ids == ids))
        self._starts = np.append(first, len(ids))
        self.patch_ids = [str(i) for i in ids[first]]

    def __len__(self) -> int:
        return len(self.patch_ids)

    def __reduce__(self) -> tuple[type[PatchStore], tuple[Path | str]]:
        # Index and memory maps stay behind: a copy opens its own.
        return PatchStore, (self.path,)

    def rows(self, position: int) -> pd.DataFrame:
        """The index rows of a patch, one a modality."""
        return self.index.iloc[self._starts[position] : self._starts[position + 1]]

    def described(self, position: int) -> dict[str, dict[str, Any]]:
        """A patch's index rows by modality, None where nothing is known."""
        get = self._columns
        rows = range(self._starts[position], self._starts[position + 1])
        return {get["modality"][row]: {c: _known(get[c][row]) for c in COLUMNS} for row in rows}

    def read(self, position: int, modalities: Sequence[str] | None = None) -> Patch:
        """A patch, with all its layers or those named that it has.

        Values are read-only; where the shards are on this machine they are views of the files.
        Invalid pixels hold NaN or class 0.
        """
        return self.read_many([position], modalities)[0]

    def read_many(
        self, positions: Sequence[int], modalities: Sequence[str] | None = None
    ) -> list[Patch]:
        """Patches, as `read` gives them; from object storage they are fetched at the same time."""
        get = self._columns
        rows: list[list[int]] = []
        wanted: list[Range] = []
        for position in positions:
            if not 0 <= position < len(self):
                raise DataError("patch position", got=position, allowed=f"0 to {len(self) - 1}")
            every = range(self._starts[position], self._starts[position + 1])
            some = [r for r in every if modalities is None or get["modality"][r] in modalities]
            rows.append(some)
            for row in some:
                wanted += self._ranges(row)
        pieces = iter(self._shards.ranges(wanted))
        return [self._patch(at, some, pieces) for at, some in zip(positions, rows, strict=True)]

    def _ranges(self, row: int) -> list[Range]:
        """Where a layer's values lie, and its mask if it has one."""
        get = self._columns
        shard, mask_at = get["shard"][row], int(get["mask_at"][row])
        values = (shard, int(get["values_at"][row]), int(self._value_bytes[row]))
        return [values, (shard, mask_at, int(self._mask_bytes[row]))] if mask_at else [values]

    def _patch(self, position: int, rows: list[int], pieces: Iterator[NDArray[np.uint8]]) -> Patch:
        get = self._columns
        layers = {get["modality"][row]: self._layer(row, pieces) for row in rows}
        at = self._starts[position]
        transform = tuple(float(get[k][at]) for k in "abcdef")
        grid = Grid(get["crs"][at], transform, int(get["height"][at]), int(get["width"][at]))  # type: ignore[arg-type]
        return Patch(
            get["patch_id"][at],
            get["place_id"][at],
            get["source"][at],
            grid,
            float(get["gsd_m"][at]),
            layers,
        )

    def _layer(self, row: int, pieces: Iterator[NDArray[np.uint8]]) -> Layer:
        get = self._columns
        shape = int(get["height"][row]), int(get["width"][row])
        values = next(pieces).view(get["dtype"][row]).reshape(-1, *shape)
        if get["mask_at"][row]:
            flat = np.unpackbits(next(pieces), count=shape[0] * shape[1])
            valid = flat.view(np.bool_).reshape(shape)
        else:
            valid = np.ones(shape, dtype=np.bool_)
        return Layer(values, valid, get["acquired_at"][row], _known(get["native_gsd_m"][row]))


def _sizes(rows: Mapping[str, Any]) -> tuple[Any, Any]:
    """Bytes of the values and of the mask, of rows of the index or of one."""
    pixels = rows["height"] * rows["width"]
    kinds, which = np.unique(np.asarray(rows["dtype"], str), return_inverse=True)
    item = np.array([np.dtype(str(kind)).itemsize for kind in kinds], np.int64)[which]
    return rows["bands"] * pixels * item, -(-pixels // 8)


def read_rows(rows: pa.Table, shards: Folder) -> Iterator[tuple[str, dict[str, StoredLayer]]]:
    """Id and layers of each patch that these rows of an index describe, as a store holds them."""
    for patch_id, group in groupby(rows.to_pylist(), key=lambda row: row["patch_id"]):
        layers = {}
        for row in group:
            value_bytes, mask_bytes = _sizes(row)
            wanted = [(row["shard"], row["values_at"], int(value_bytes))]
            if row["mask_at"]:
                wanted.append((row["shard"], row["mask_at"], int(mask_bytes)))
            values, *mask = shards.ranges(wanted)
            layers[row["modality"]] = StoredLayer(
                values.view(row["dtype"]).reshape(-1, row["height"], row["width"]),
                mask[0].tobytes() if mask else None,
                {name: row[name] for name in COLUMNS},
            )
        yield patch_id, layers


class ShardWriter:
    """Writes a store into a new folder; `close` (or leaving the `with` block) completes it.

    What is written depends only on the patches and their order. The folder has no index, and is no
    store, before it is complete.
    """

    def __init__(self, path: Path, modalities: Sequence[Modality], shard_patches: int) -> None:
        self.path = path
        self._modalities = {m.name: m for m in modalities}
        self._shard_patches = shard_patches
        self._chunk: ChunkWriter | None = None
        self._count = 0
        self._ids: set[int] = set()
        path.mkdir(parents=True)
        self._index = IndexWriter(path / INDEX)

    def add(self, patch: Patch, measured: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Append a patch; one without layers, or with a modality not declared, is an error.

        Args:
            patch: its layers become rows of the index.
            measured: further columns of each layer, as `alignment.align` gives them.
        """
        layers = stored_layers(patch, self._modalities, measured)
        if not layers:
            raise DataError(f"patch {patch.patch_id}", got="no layer", allowed="one or more")
        check_ids([patch.patch_id], self._ids)
        if self._count % self._shard_patches == 0:
            self._finish_chunk()
            name = f"{self._count // self._shard_patches:05d}"
            self._chunk = ChunkWriter(LocalFolder(self.path), name, self._modalities)
        self._count += 1
        assert self._chunk is not None
        self._chunk.append(layers)

    def _finish_chunk(self) -> None:
        if self._chunk is not None:
            self._chunk.__exit__(None, None, None)
            self._index.write(self._chunk.rows)

    def close(self) -> None:
        """Complete the store: its index is renamed into place last."""
        self._finish_chunk()
        self._index.close()
        sync_folder(self.path)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._chunk is not None:
            self._chunk.__exit__(kind, error, trace)


def check_ids(patch_ids: Sequence[str], known: set[int]) -> None:
    """Add ids to those known; raises DataError for one that is among them.

    Digests are kept, since names are longer and these are all that is held of every patch.
    """
    for patch_id in patch_ids:
        digest = int.from_bytes(hashlib.blake2b(patch_id.encode(), digest_size=8).digest())
        if digest in known:
            raise DataError(
                f"patch {patch_id}", got="the same id twice", allowed="an id of its own"
            )
        known.add(digest)


def _content(folder: Path | str, name: str) -> bytes:
    """Of a small file; raises FileNotFoundError."""
    if isinstance(folder, Path):
        return (folder / name).read_bytes()
    remote = open_folder(folder)
    if name not in remote.names():
        raise FileNotFoundError(f"{folder}/{name}")
    with remote.local(name) as path:
        return path.read_bytes()


def _plain(column: pd.Series[Any]) -> NDArray[Any]:
    """Numbers as they lie there; of texts one object each, however many rows have it, or None."""
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy()
    codes, texts = pd.factorize(column)
    found = np.full(len(texts) + 1, None, dtype=object)  # unknown has code -1, which is the last
    found[:-1] = texts
    return found[codes]


def _known(value: Any) -> Any:
    """A Python object, None for NaN."""
    found = value.item() if isinstance(value, np.generic) else value
    return None if found != found else found
