"""The patch store: few large files, read at random without copying (docs/adr/0003-patch-store.md).

A folder of Arrow IPC files, uncompressed and memory-mapped. Each file holds one modality of up to
`shard_patches` patches: a column `values` of tensors [bands, H, W] and a column `valid` of packed
bits, null where every pixel is valid. `index.parquet` has a row for each patch × modality; it is a
GeoParquet, with the outline of the patch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mm_model.data.content import content
from mm_model.data.files import sync_folder
from mm_model.data.footprints import BBOX, GEOMETRY, footprints, geo_metadata
from mm_model.data.patch import Layer, Patch
from mm_model.errors import DataError
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality

INDEX = "index.parquet"
# Enough to make the cost of a batch's header vanish, little enough to be held while writing.
_BATCH_BYTES = 8 << 20
# Of the index, held while writing: memory must not grow with the number of patches.
_GROUP_ROWS = 1 << 13
_PIECE_ROWS = 1 << 10


@dataclass(frozen=True)
class StoredLayer:
    """A layer as it lies in a store.

    Attributes:
        values: [bands, H, W], nodata where invalid, so that equal layers have equal bytes.
        packed: bits of the mask [H x W], most significant first; None where all is valid.
        described: the row of the index, without `shard` and `row`.
    """

    values: NDArray[np.generic]
    packed: bytes | None
    described: Mapping[str, Any]


class PatchStore:
    """Patches by position, in a stable order. May be pickled, and used after a fork.

    Attributes:
        index: one row a patch × modality, rows of a patch together: patch_id, place_id, source,
            modality, shard, row, crs, a…f, height, width, gsd_m, native_gsd_m (of the layer), min,
            max, mean (over valid pixels of all bands), valid_fraction, acquired_at, sha256; what
            `content.content` and `alignment.align` say of the layer (shifts are NaN where they were
            not measured). In the file stand geometry and bbox as well, which nobody here reads.
        patch_ids: by position.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._shards: dict[str, list[tuple[NDArray[np.generic], pa.Array]]] = {}
        try:
            self.index = pd.read_parquet(self.path / INDEX, columns=list(_COLUMNS))
        except FileNotFoundError:
            raise DataError(
                f"{self.path} is no patch store", remedy="run the stage prepare"
            ) from None
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{self.path / INDEX} is of another version, or damaged",
                got=str(error).splitlines()[0],
                remedy="run the stage prepare again",
            ) from error
        ids = self.index["patch_id"].to_numpy()
        # Plain arrays: pandas takes longer to find a row than the file to give its pixels.
        self._columns = {c: _plain(self.index[c]) for c in _COLUMNS}
        first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]) & (ids == ids))
        self._starts = np.append(first, len(ids))
        self.patch_ids = [str(i) for i in ids[first]]

    def __len__(self) -> int:
        return len(self.patch_ids)

    def __reduce__(self) -> tuple[type[PatchStore], tuple[Path]]:
        # Index and memory maps stay behind: a copy opens its own.
        return PatchStore, (self.path,)

    def rows(self, position: int) -> pd.DataFrame:
        """The index rows of a patch, one a modality."""
        return self.index.iloc[self._starts[position] : self._starts[position + 1]]

    def described(self, position: int) -> dict[str, dict[str, Any]]:
        """A patch's index rows by modality, None where nothing is known."""
        get = self._columns
        rows = range(self._starts[position], self._starts[position + 1])
        return {get["modality"][row]: {c: _known(get[c][row]) for c in _COLUMNS} for row in rows}

    def read(self, position: int, modalities: Sequence[str] | None = None) -> Patch:
        """A patch, with all its layers or those named that it has.

        Values are read-only views of the file; invalid pixels hold NaN or class 0.
        """
        if not 0 <= position < len(self):
            raise DataError("patch position", got=position, allowed=f"0 to {len(self) - 1}")
        rows = range(self._starts[position], self._starts[position + 1])
        get = self._columns
        layers = {}
        for row in rows:
            name = get["modality"][row]
            if modalities is None or name in modalities:
                layers[name] = self._layer(
                    get["shard"][row],
                    int(get["row"][row]),
                    get["acquired_at"][row],
                    _known(get["native_gsd_m"][row]),
                )
        at = rows[0]
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

    def _layer(
        self, shard: str, row: int, acquired_at: str | None, native_gsd_m: float | None
    ) -> Layer:
        batches = self._shards.get(shard)
        if batches is None:
            batches = self._shards[shard] = _open_shard(self.path / shard)
        values, bits = _pixels(batches, row)
        shape = values.shape[1:]
        if bits is None:
            valid = np.ones(shape, dtype=np.bool_)
        else:
            flat = np.unpackbits(np.frombuffer(bits, np.uint8), count=shape[0] * shape[1])
            valid = flat.view(np.bool_).reshape(shape)
        return Layer(values, valid, acquired_at, native_gsd_m)


def read_stored(path: Path) -> Iterator[tuple[str, dict[str, StoredLayer]]]:
    """Id and layers of every patch, in order, holding a piece of the index and a shard a modality.

    `PatchStore` knows the whole index; this needs no more memory for a store of a million patches.
    """
    shards: dict[str, tuple[str, list[tuple[NDArray[np.generic], pa.Array]]]] = {}

    def stored(row: dict[str, Any]) -> StoredLayer:
        name, batches = shards.get(row["modality"], ("", []))
        if name != row["shard"]:
            batches = _open_shard(path / row["shard"])
            shards[row["modality"]] = row["shard"], batches
        return StoredLayer(*_pixels(batches, row["row"]), row)

    try:
        with pq.ParquetFile(path / INDEX) as index:
            pieces = index.iter_batches(_PIECE_ROWS, columns=list(_COLUMNS))
            rows = (row for piece in pieces for row in piece.to_pylist())
            for patch_id, layers in groupby(rows, key=lambda row: row["patch_id"]):
                yield patch_id, {row["modality"]: stored(row) for row in layers}
    except (OSError, pa.ArrowInvalid, DataError) as error:
        raise DataError(
            f"{path} is damaged, and nothing can be taken over from it",
            got=str(error).splitlines()[0],
            remedy="remove it, and run the stage prepare again",
        ) from error


class ShardWriter:
    """Writes a store into a new folder; `close` (or leaving the `with` block) completes it.

    What is written depends only on the patches and their order. The folder has no index, and is no
    store, before it is complete.
    """

    def __init__(self, path: Path, modalities: Sequence[Modality], shard_patches: int) -> None:
        self.path = path
        self._modalities = {m.name: m for m in modalities}
        self._shard_patches = shard_patches
        self._open: dict[str, _Shard] = {}
        self._counts = dict.fromkeys(self._modalities, 0)
        self._ids: set[int] = set()
        path.mkdir(parents=True)
        self._index = _IndexWriter(path / INDEX)

    def add(self, patch: Patch, measured: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Append a patch; one without layers, or with a modality not declared, is an error.

        Args:
            patch: its layers become rows of the index.
            measured: further columns of each layer, as `alignment.align` gives them.
        """
        self.append(patch.patch_id, stored_layers(patch, self._modalities, measured))

    def append(self, patch_id: str, layers: Mapping[str, StoredLayer]) -> None:
        """Append a patch as a store holds it, without measuring it again."""
        # Digests, since names are longer, and these are all that is kept of every patch.
        digest = int.from_bytes(hashlib.blake2b(patch_id.encode(), digest_size=8).digest())
        if not layers or digest in self._ids:
            raise DataError(
                f"patch {patch_id}",
                got="no layer" if not layers else "the same id twice",
                allowed="one or more layers, and an id of its own",
            )
        self._ids.add(digest)
        for name, modality in self._modalities.items():
            layer = layers.get(name)
            if layer is None:
                continue
            number, row = divmod(self._counts[name], self._shard_patches)
            self._counts[name] += 1
            shard = f"{name}-{number:05d}.arrow"
            if row == 0:
                if name in self._open:
                    self._open.pop(name).close()
                self._open[name] = _Shard(self.path / shard, modality, layer.values.shape[1:])
            self._open[name].add(layer)
            self._index.add({**layer.described, "shard": shard, "row": row})

    def close(self) -> None:
        """Complete the store: its index is renamed into place last."""
        for shard in self._open.values():
            shard.close()
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


_COLUMNS = {
    **dict.fromkeys(("patch_id", "place_id", "source", "modality", "shard"), "object"),
    "row": "int64",
    "crs": "object",
    **dict.fromkeys("abcdef", "float64"),
    **dict.fromkeys(("height", "width"), "int64"),
    **dict.fromkeys(("gsd_m", "native_gsd_m"), "float64"),
    **dict.fromkeys(("min", "max", "mean", "valid_fraction"), "float64"),
    **dict.fromkeys(("acquired_at", "sha256"), "object"),
    **dict.fromkeys(("median", "saturated_share", "white_share"), "float64"),
    **dict.fromkeys(("look", "shift_reference"), "object"),
    **dict.fromkeys(("shift_row_px", "shift_col_px", "shift_confidence"), "float64"),
    **dict.fromkeys(("moved_rows_px", "moved_cols_px"), "int64"),
    "excluded_layers": "object",
}
_TYPES = {"object": pa.string(), "int64": pa.int64(), "float64": pa.float64()}
_INDEX_SCHEMA_PLAIN = pa.schema([(name, _TYPES[kind]) for name, kind in _COLUMNS.items()])
_BOX = pa.struct([(side, pa.float64()) for side in ("xmin", "ymin", "xmax", "ymax")])
_INDEX_SCHEMA = _INDEX_SCHEMA_PLAIN.append(pa.field(GEOMETRY, pa.binary())).append(
    pa.field(BBOX, _BOX)
)
_NOT_MEASURED = {
    **{"shift_reference": None, "excluded_layers": None},
    **dict.fromkeys(("shift_row_px", "shift_col_px", "shift_confidence"), np.nan),
    **dict.fromkeys(("moved_rows_px", "moved_cols_px"), 0),
}


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


def stored_layers(
    patch: Patch,
    modalities: Mapping[str, Modality],
    measured: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, StoredLayer]:
    """A patch's layers as a store holds them, each with its row of the index.

    Args:
        patch: with layers of these modalities alone, else DataError.
        modalities: name → declaration.
        measured: further columns of each layer, as `alignment.align` gives them.
    """
    foreign = sorted(set(patch.layers) - set(modalities))
    if foreign:
        raise DataError(
            f"layers of patch {patch.patch_id}", got=foreign, allowed=sorted(modalities)
        )
    more = measured or {}
    return {name: _stored(patch, modalities[name], more.get(name, {})) for name in patch.layers}


def _stored(patch: Patch, modality: Modality, more: Mapping[str, Any]) -> StoredLayer:
    layer = patch.layers[modality.name]
    known = layer.values[:, layer.valid].astype(np.float64)
    values, packed = _canonical(layer, modality)
    described = {
        "patch_id": patch.patch_id,
        "place_id": patch.place_id,
        "source": patch.source,
        "modality": modality.name,
        "crs": patch.grid.crs,
        **dict(zip("abcdef", patch.grid.transform, strict=True)),
        "height": patch.grid.height,
        "width": patch.grid.width,
        "gsd_m": patch.gsd_m,
        "native_gsd_m": layer.native_gsd_m,
        "min": known.min() if known.size else np.nan,
        "max": known.max() if known.size else np.nan,
        "mean": known.mean() if known.size else np.nan,
        "valid_fraction": float(layer.valid.mean()),
        "acquired_at": layer.acquired_at,
        "sha256": hashlib.sha256(values.tobytes() + (packed or b"")).hexdigest(),
        **content(layer, modality),
        **_NOT_MEASURED,
        **more,
    }
    return StoredLayer(values, packed, described)


class _IndexWriter:
    """The index, a row group at a time; the file has its name once it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._writer = pq.ParquetWriter(str(self._partial), _INDEX_SCHEMA, store_schema=False)
        self._rows: list[dict[str, Any]] = []
        self._shapes: dict[bytes, bytes] = {}

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        self.write(pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS))

    def write(self, index: pd.DataFrame) -> None:
        """Rows of the index, with their outlines."""
        shapes, boxes = footprints(index)
        plain = pa.Table.from_pandas(index, _INDEX_SCHEMA_PLAIN, preserve_index=False)
        table = plain.append_column(GEOMETRY, shapes).append_column(BBOX, boxes)
        self._writer.write_table(table.cast(_INDEX_SCHEMA))
        # One outline of each type says all that the file's metadata says of them.
        known = (shape for shape in shapes.to_pylist() if shape is not None)
        self._shapes |= {shape[:5]: shape for shape in known}  # which say its type

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.add_key_value_metadata(geo_metadata(list(self._shapes.values())))
        self._writer.close()
        self._partial.rename(self._path)


def _canonical(layer: Layer, modality: Modality) -> tuple[NDArray[np.generic], bytes | None]:
    """Values with nodata where invalid, so that equal patches have equal bytes; packed mask."""
    values = np.where(layer.valid, layer.values, modality.nodata).astype(modality.dtype)
    return values, None if layer.valid.all() else np.packbits(layer.valid).tobytes()


class _Shard:
    """One Arrow file of a modality, written in batches of an even number of rows."""

    def __init__(self, path: Path, modality: Modality, shape: tuple[int, int]) -> None:
        self._modality = modality
        self._frame = (len(modality.bands), *shape)
        self._batch_rows = max(1, _BATCH_BYTES // (int(np.prod(self._frame)) * 4))
        self._type = pa.fixed_shape_tensor(
            pa.from_numpy_dtype(np.dtype(modality.dtype)), self._frame
        )
        facts = {
            "modality": modality.name,
            "unit": modality.unit,
            "bands": json.dumps(modality.band_names),
            "valid": "bits of H x W, most significant first; null: all valid",
        }
        self._schema = pa.schema(
            [pa.field("values", self._type, nullable=False), pa.field("valid", pa.binary())],
            metadata=facts,
        )
        self._writer = pa.ipc.new_file(str(path), self._schema)
        self._pending: list[tuple[NDArray[np.generic], bytes | None]] = []

    def add(self, layer: StoredLayer) -> None:
        if layer.values.shape != self._frame:
            raise DataError(
                f"layer of {self._modality.name}", got=layer.values.shape, allowed=self._frame
            )
        self._pending.append((layer.values, layer.packed))
        if len(self._pending) == self._batch_rows:
            self._flush()

    def _flush(self) -> None:
        values = np.stack([v for v, _ in self._pending])
        flat = pa.array(values.reshape(-1))
        storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(self._frame)))
        tensors = pa.ExtensionArray.from_storage(self._type, storage)
        masks = pa.array([m for _, m in self._pending], pa.binary())
        self._writer.write_batch(pa.record_batch([tensors, masks], schema=self._schema))
        self._pending.clear()

    def close(self) -> None:
        if self._pending:
            self._flush()
        self._writer.close()


def _open_shard(path: Path) -> list[tuple[NDArray[np.generic], pa.Array]]:
    """Values [rows, bands, H, W], mapped and not read, and masks of each batch."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        return [(b.column("values").to_numpy_ndarray(), b.column("valid")) for b in batches]
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"shard {path} cannot be read", got=error, remedy="run the stage prepare again"
        ) from error


def _pixels(
    batches: list[tuple[NDArray[np.generic], pa.Array]], row: int
) -> tuple[NDArray[np.generic], bytes | None]:
    """Values [bands, H, W] and packed mask of a row of a shard."""
    values, packed = batches[row // len(batches[0][1])]
    at = row % len(batches[0][1])
    return values[at], packed[at].as_py()
