"""Parts: what one unit of preparation leaves, in a file of its own until all are joined.

A unit is work that fits in memory and knows nothing of others, so any number of processes may make
parts, in any order, and a part that is there need not be made again. Its name says of which unit
it is and how many patches it holds.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from threadpoolctl import ThreadpoolController

from mm_model.config import AlignmentConfig
from mm_model.data.alignment import align
from mm_model.data.patch import Layer, Patch, Source, Unit
from mm_model.data.shards import StoredLayer, stored_layers
from mm_model.data.storage import Folder
from mm_model.errors import DataError, MMError
from mm_model.modalities import Modality

_SCHEMA = pa.schema(
    [
        pa.field("described", pa.string(), nullable=False),  # JSON
        pa.field("values", pa.large_binary(), nullable=False),
        pa.field("packed", pa.large_binary()),
    ]
)
_SUFFIX = ".part"

T = TypeVar("T")
Make = Callable[[T], "int | MMError"]
"""Does a piece of work; gives back how many patches it made, or why it could not."""
Run = Callable[[Make[Any], Iterable[Any]], Iterator[tuple[Any, "int | MMError"]]]
"""Has works done, somewhere, and tells of each as it is done; `make` and works may be pickled."""


def in_this_process(make: Make[T], works: Iterable[T]) -> Iterator[tuple[T, int | MMError]]:
    """One work after the other."""
    for work in works:
        yield work, make(work)


@dataclass(frozen=True)
class Work:
    """A unit whose part shall be made, and the key that the part is found by."""

    unit: Unit
    key: str

    def __str__(self) -> str:
        return self.unit.unit_id


@dataclass(frozen=True)
class PartMaker:
    """Reads a unit and writes its part; may be pickled if the source may.

    Attributes:
        source: of the units.
        parts: where they go.
        modalities: that are kept.
        min_valid_fraction: a layer with fewer valid pixels counts as absent.
        alignment: what becomes of layers that lie elsewhere; None measures nothing.
    """

    source: Source
    parts: Folder
    modalities: Sequence[Modality]
    min_valid_fraction: float
    alignment: AlignmentConfig | None

    def __call__(self, work: Work) -> int | MMError:
        try:
            with self.parts.create() as new:
                # Sums of many threads differ in their last digit from those of one.
                with (
                    _libraries().limit(limits=1, user_api="blas"),
                    pa.OSFile(str(new.path), "wb") as stream,
                ):
                    count = self._write(work.unit, stream)
                new.name = f"{work.key}-{count}{_SUFFIX}"
        except MMError as error:
            return error
        # Not foreseen, yet no reason to lose the other units.
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            return DataError(
                f"reading {work.unit.unit_id}",
                got=f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})",
            )
        return count

    def _write(self, unit: Unit, stream: pa.NativeFile) -> int:
        by_name = {m.name: m for m in self.modalities}
        count = 0
        with pa.ipc.new_file(stream, _SCHEMA) as writer:
            for patch in self.source.read(unit):
                patch = self._without_sparse(patch)
                measured = None
                if self.alignment and patch.layers:
                    patch, measured = align(patch, self.modalities, self.alignment)
                    patch = self._without_sparse(patch)  # moving costs pixels
                if patch.layers:
                    writer.write_batch(_batch(stored_layers(patch, by_name, measured)))
                    count += 1
        return count

    def _without_sparse(self, patch: Patch) -> Patch:
        least = self.min_valid_fraction
        present = {n: y for n, y in patch.layers.items() if _is_present(y, least)}
        return replace(patch, layers=present)


@lru_cache(maxsize=1)
def _libraries() -> ThreadpoolController:
    """Those of this process that calculate in threads of their own."""
    return ThreadpoolController()


def counts_of_parts(parts: Folder) -> dict[str, int]:
    """Keys of the parts that are there, and how many patches each holds."""
    whole = (n.removesuffix(_SUFFIX).split("-") for n in parts.names() if n.endswith(_SUFFIX))
    return {key: int(count) for key, count in whole}


def read_part(
    parts: Folder,
    key: str,
    count: int,
    modalities: Mapping[str, Modality],
    chosen: range,
) -> Iterator[tuple[str, dict[str, StoredLayer]]]:
    """Id and layers of the chosen patches of a part, in the order of the source."""
    with (
        parts.local(f"{key}-{count}{_SUFFIX}") as path,
        pa.OSFile(str(path)) as file,  # mapped, all of a large part would count as our memory
        pa.ipc.open_file(file) as reader,
    ):
        for number in chosen:
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
