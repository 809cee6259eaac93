"""Shards: Arrow IPC files of one modality each, and the rows of the index that describe them.

Uncompressed, so that a layer is a range of bytes: mapped where the file is here, fetched by range
where it is in object storage, and readable by whatever reads Arrow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mm_model.data.content import content, known_values
from mm_model.data.index import NOT_MEASURED, table_of
from mm_model.data.patch import Layer, Patch
from mm_model.data.storage import Folder
from mm_model.errors import DataError
from mm_model.modalities import Modality

# Enough to make the cost of a batch's header vanish, little enough to be held while writing.
_BATCH_BYTES = 8 << 20


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
    known = known_values(layer)
    values, packed = _canonical(layer, modality)
    described = {
        "patch_id": patch.patch_id,
        "place_id": patch.place_id,
        "source": patch.source,
        "modality": modality.name,
        "bands": len(values),
        "dtype": values.dtype.name,
        "crs": patch.grid.crs,
        **dict(zip("abcdef", patch.grid.transform, strict=True)),
        "height": patch.grid.height,
        "width": patch.grid.width,
        "gsd_m": patch.gsd_m,
        "native_gsd_m": layer.native_gsd_m,
        "min": float(known.min()) if known.size else np.nan,
        "max": float(known.max()) if known.size else np.nan,
        "mean": float(known.astype(np.float64).mean()) if known.size else np.nan,
        "valid_fraction": float(layer.valid.mean()),
        "acquired_at": layer.acquired_at,
        "sha256": hashlib.sha256(values.tobytes() + (packed or b"")).hexdigest(),
        **content(layer, modality),
        **NOT_MEASURED,
        **more,
    }
    return StoredLayer(values, packed, described)


class ChunkWriter:
    """The shards of some patches that follow one another: `<modality>-<name>.arrow`, one for each
    modality that occurs.

    Leaving the context without an error completes them, and `rows` is their part of the index.

    Args:
        folder: of the shards.
        name: what their names end in.
        modalities: name → declaration.
    """

    def __init__(self, folder: Folder, name: str, modalities: Mapping[str, Modality]) -> None:
        self._folder, self._name, self._modalities = folder, name, modalities
        self._open: dict[str, _Shard] = {}
        self._files = ExitStack()
        self._rows: list[dict[str, Any]] = []
        self.rows: pa.Table = None

    def append(self, layers: Mapping[str, StoredLayer]) -> None:
        """A patch as a store holds it."""
        for name in self._modalities:
            layer = layers.get(name)
            if layer is None:
                continue
            if name not in self._open:
                new = self._files.enter_context(self._folder.create(self._shard(name)))
                shape = layer.values.shape[1:]
                self._open[name] = _Shard(new.path, self._modalities[name], shape)
            row = self._open[name].add(layer)
            self._rows.append({**layer.described, "shard": self._shard(name), "row": row})

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for shard in self._open.values():
                shard.abandon()
            self._files.__exit__(kind, error, trace)
            return
        with self._files:
            places = {name: shard.close() for name, shard in self._open.items()}
        for row in self._rows:
            row["values_at"], row["mask_at"] = places[row["modality"]][row["row"]]
        self.rows = table_of(self._rows)

    def _shard(self, modality: str) -> str:
        return f"{modality}-{self._name}.arrow"


def _canonical(layer: Layer, modality: Modality) -> tuple[NDArray[np.generic], bytes | None]:
    """Values with nodata where invalid, so that equal patches have equal bytes; packed mask."""
    values = np.where(layer.valid, layer.values, modality.nodata).astype(modality.dtype)
    return values, None if layer.valid.all() else np.packbits(layer.valid).tobytes()


class _Shard:
    """One Arrow file of a modality, written in batches of an even number of rows."""

    def __init__(self, path: Path, modality: Modality, shape: tuple[int, ...]) -> None:
        self._path, self._modality = path, modality
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
        self._rows = 0

    def add(self, layer: StoredLayer) -> int:
        """The row that the layer has."""
        if layer.values.shape != self._frame:
            raise DataError(
                f"layer of {self._modality.name}", got=layer.values.shape, allowed=self._frame
            )
        self._pending.append((layer.values, layer.packed))
        if len(self._pending) == self._batch_rows:
            self._flush()
        self._rows += 1
        return self._rows - 1

    def _flush(self) -> None:
        values = np.stack([v for v, _ in self._pending])
        flat = pa.array(values.reshape(-1))
        storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(self._frame)))
        tensors = pa.ExtensionArray.from_storage(self._type, storage)
        masks = pa.array([m for _, m in self._pending], pa.binary())
        self._writer.write_batch(pa.record_batch([tensors, masks], schema=self._schema))
        self._pending.clear()

    def close(self) -> list[tuple[int, int]]:
        """Complete the file; where values and mask of each row begin in it, in bytes."""
        if self._pending:
            self._flush()
        self._writer.close()
        return _places(self._path, int(np.prod(self._frame)) * self._type.value_type.byte_width)

    def abandon(self) -> None:
        self._writer.close()


def _places(path: Path, row_bytes: int) -> list[tuple[int, int]]:
    places = []
    with pa.memory_map(str(path)) as file:
        begin = file.read_buffer().address
        file.seek(0)
        with pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                values, masks = reader.get_batch(number).columns
                first = values.storage.flatten().buffers()[1].address - begin
                _, ends, bits = masks.buffers()
                starts = np.frombuffer(ends, np.int32, len(masks)).tolist()
                known = masks.is_valid().to_pylist()
                bits_at = bits.address - begin if bits is not None else 0
                for row, (start, has) in enumerate(zip(starts, known, strict=True)):
                    places.append((first + row * row_bytes, bits_at + start if has else 0))
    return places
