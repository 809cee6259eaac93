"""The index of a store: a GeoParquet with a row for each patch × modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mm_model.data.footprints import BBOX, GEOMETRY, footprints, geo_metadata

INDEX = "index.parquet"

COLUMNS = {
    **dict.fromkeys(("patch_id", "place_id", "source", "modality", "shard"), "object"),
    **dict.fromkeys(("row", "values_at", "mask_at"), "int64"),
    **{"bands": "int64", "dtype": "object"},
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
"""Of a row, without its outline. Values are [bands, height, width] of dtype; `values_at` and
`mask_at` are where they begin in the shard, in bytes (0, where the file's own magic stands: there
is no mask, since all pixels are valid)."""
NOT_MEASURED: Mapping[str, Any] = {
    **{"shift_reference": None, "excluded_layers": None},
    **dict.fromkeys(("shift_row_px", "shift_col_px", "shift_confidence"), np.nan),
    **dict.fromkeys(("moved_rows_px", "moved_cols_px"), 0),
}
_TYPES = {"object": pa.string(), "int64": pa.int64(), "float64": pa.float64()}
_PLAIN = pa.schema([(name, _TYPES[kind]) for name, kind in COLUMNS.items()])
_BOX = pa.struct([(side, pa.float64()) for side in ("xmin", "ymin", "xmax", "ymax")])
SCHEMA = _PLAIN.append(pa.field(GEOMETRY, pa.binary())).append(pa.field(BBOX, _BOX))


def table_of(rows: Sequence[Mapping[str, Any]] | pd.DataFrame) -> pa.Table:
    """Rows of the index, with their outlines."""
    index = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows, columns=list(COLUMNS))
    index = index.astype(COLUMNS)
    shapes, boxes = footprints(index)
    plain = pa.Table.from_pandas(index, _PLAIN, preserve_index=False)
    plain = plain.replace_schema_metadata(None)
    return plain.append_column(GEOMETRY, shapes).append_column(BBOX, boxes).cast(SCHEMA)


class IndexWriter:
    """The index, a row group for each table; the file has its name once it is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._writer = pq.ParquetWriter(str(self._partial), SCHEMA, store_schema=False)
        self._shapes: dict[bytes, bytes] = {}

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table, row_group_size=max(1, len(table)))
        # One outline of each type says all that the file's metadata says of them.
        known = (shape for shape in table[GEOMETRY].to_pylist() if shape is not None)
        self._shapes |= {shape[:5]: shape for shape in known}  # which say its type

    def close(self) -> None:
        self._writer.add_key_value_metadata(geo_metadata(list(self._shapes.values())))
        self._writer.close()
        self._partial.rename(self._path)
