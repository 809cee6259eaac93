"""Parts: what one unit of preparation leaves, in a file of its own until all are joined.

A unit is work that fits in memory and knows nothing of others, so any number of processes may make
parts, in any order, and a part that is there need not be made again.
"""

from __future__ import annotations

import json
import os
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mm_model.config import AlignmentConfig
from mm_model.data.alignment import align
from mm_model.data.patch import Layer, Patch, Source, Unit
from mm_model.data.store import StoredLayer, stored_layers
from mm_model.errors import DataError, MMError
from mm_model.modalities import Modality

_SCHEMA = pa.schema(
    [
        pa.field("described", pa.string(), nullable=False),  # JSON
        pa.field("values", pa.large_binary(), nullable=False),
        pa.field("packed", pa.large_binary()),
    ]
)


@dataclass(frozen=True)
class Work:
    """A unit, and the file that shall hold its part."""

    unit: Unit
    path: Path


Make = Callable[[Work], MMError | None]
"""Makes a part; gives back why it could not."""
Run = Callable[[Make, Sequence[Work]], Iterator[tuple[Work, MMError | None]]]
"""Has parts made, somewhere, and tells of each as it is done; `make` and works may be pickled."""


def in_this_process(make: Make, works: Sequence[Work]) -> Iterator[tuple[Work, MMError | None]]:
    """One part after the other."""
    for work in works:
        yield work, make(work)


@dataclass(frozen=True)
class PartMaker:
    """Reads a unit and writes its part; may be pickled if the source may.

    Attributes:
        source: of the units.
        modalities: that are kept.
        min_valid_fraction: a layer with fewer valid pixels counts as absent.
        alignment: what becomes of layers that lie elsewhere; None measures nothing.
    """

    source: Source
    modalities: Sequence[Modality]
    min_valid_fraction: float
    alignment: AlignmentConfig | None

    def __call__(self, work: Work) -> MMError | None:
        # A name of its own: two processes may be at the same part when a machine was thought lost.
        partial = work.path.with_name(f"{work.path.name}.{uuid.uuid4().hex}.partial")
        try:
            self._write(work.unit, partial)
        except MMError as error:
            partial.unlink(missing_ok=True)
            return error
        except Exception as error:  # not foreseen, yet no reason to lose the other units
            partial.unlink(missing_ok=True)
            at = traceback.extract_tb(error.__traceback__)[-1]
            return DataError(
                f"reading {work.unit.unit_id}",
                got=f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})",
            )
        partial.replace(work.path)
        return None

    def _write(self, unit: Unit, path: Path) -> None:
        by_name = {m.name: m for m in self.modalities}
        with path.open("wb") as stream:
            with pa.ipc.new_file(stream, _SCHEMA) as writer:
                for patch in self.source.read(unit):
                    patch = self._without_sparse(patch)
                    measured = None
                    if self.alignment and patch.layers:
                        patch, measured = align(patch, self.modalities, self.alignment)
                        patch = self._without_sparse(patch)  # moving costs pixels
                    if patch.layers:
                        writer.write_batch(_batch(stored_layers(patch, by_name, measured)))
            stream.flush()
            os.fsync(stream.fileno())

    def _without_sparse(self, patch: Patch) -> Patch:
        least = self.min_valid_fraction
        present = {n: y for n, y in patch.layers.items() if _is_present(y, least)}
        return replace(patch, layers=present)


def read_part(
    path: Path, modalities: Mapping[str, Modality]
) -> Iterator[tuple[str, dict[str, StoredLayer]]]:
    """Id and layers of each patch of a part, in the order of the source."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        for number in range(reader.num_record_batches):
            layers = {}
            rows = reader.get_batch(number)
            for text, values, packed in zip(*rows.columns, strict=True):
                described = json.loads(text.as_py())
                modality = modalities[described["modality"]]
                pixels = np.frombuffer(values.as_buffer(), modality.dtype)
                shape = (len(modality.bands), described["height"], described["width"])
                layers[modality.name] = StoredLayer(
                    pixels.reshape(shape), packed.as_py(), described
                )
            yield described["patch_id"], layers


def _batch(layers: Mapping[str, StoredLayer]) -> pa.RecordBatch:
    columns = [
        pa.array([json.dumps(y.described, default=_plain) for y in layers.values()], pa.string()),
        pa.array([y.values.tobytes() for y in layers.values()], pa.large_binary()),
        pa.array([y.packed for y in layers.values()], pa.large_binary()),
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def _plain(value: Any) -> Any:
    return value.item()


def _is_present(layer: Layer, min_valid_fraction: float) -> bool:
    return bool(layer.valid.any() and layer.valid.mean() >= min_valid_fraction)
