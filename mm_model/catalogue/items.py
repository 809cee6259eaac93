"""Patches as STAC items, all in one Parquet file by the conventions of stac-geoparquet.

https://radiantearth.github.io/stac-geoparquet-spec/ and https://github.com/radiantearth/stac-spec
(1.1.0). One item a patch, one asset a layer; a million items are one file, and not a million.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mm_model.catalogue.census import Census
from mm_model.data.footprints import BBOX, GEOMETRY, geo_metadata
from mm_model.data.index import INDEX
from mm_model.data.store import PatchStore
from mm_model.modalities import Modality

STAC_VERSION = "1.1.0"
CLASSIFICATION = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"
EO = "https://stac-extensions.github.io/eo/v2.0.0/schema.json"
PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
COLLECTION = "collection.json"
PARQUET = "application/vnd.apache.parquet"
# STAC wants an interval where no time is known: one that no search by time can miss, and that
# nobody takes for a measured one.
ALWAYS = (datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC))
_ARROW = "application/vnd.apache.arrow.file"
_AUTHORITY = re.compile(r"^[A-Z]+:[0-9]+$")
_NAMES = pa.list_(pa.string())
_ROW_GROUP = 10_000  # patches that are held at a time, and that a search by box reads or skips
_TIME = pa.timestamp("us", tz="UTC")
_DAY_S, _EPOCH_DAY = 86_400, datetime(1970, 1, 1).toordinal()


def asset_of(modality: Modality) -> dict[str, Any]:
    """What all assets of a modality have in common: the collection's `item_assets`."""
    nodata = "nan" if np.isnan(modality.nodata) else int(modality.nodata)
    asset: dict[str, Any] = {
        "title": modality.title,
        "type": _ARROW,
        "roles": ["data"],
        "data_type": modality.dtype,
        "nodata": nodata,
        "unit": modality.unit,
        "bands": [_band(modality, i) for i in range(len(modality.bands))],
    }
    if modality.is_categorical:
        asset["classification:classes"] = [
            {
                "value": c.code,
                "name": re.sub(r"[^0-9A-Za-z-]+", "_", c.name),
                "title": c.name,
                "color_hint": c.color[1:].upper(),
            }
            for c in modality.classes
        ]
    return asset


def extensions(census: Census) -> list[str]:
    """The extensions whose fields items and collection have."""
    optical = any(b.center_nm is not None for m in census.modalities for b in m.bands)
    classes = any(m.is_categorical for m in census.modalities)
    return [PROJECTION, *[EO] * optical, *[CLASSIFICATION] * classes]


def write_items(
    path: Path, store: PatchStore, census: Census, collection: Mapping[str, Any]
) -> None:
    """Write items.parquet beside collection.json, with outlines as the store's index has them.

    A patch that lies nowhere is no item: readers of stac-geoparquet fail on a file with one that
    has no box. `datetime` is the first day on which a
    layer of the patch may have been acquired, `start_datetime` to `end_datetime` all of them; where
    no date is known `datetime` is null and the interval is `ALWAYS`.
    """
    index = store.index
    starts = np.flatnonzero((index["patch_id"] != index["patch_id"].shift()).to_numpy(dtype=bool))
    ends = np.append(starts[1:], len(index))
    outlines = pq.read_table(store.path / INDEX, columns=[GEOMETRY, BBOX])
    outlines = outlines.take(starts).combine_chunks()
    facts = {
        **geo_metadata(outlines[GEOMETRY].to_pylist()),
        b"stac-geoparquet": json.dumps(
            {"version": "1.0.0", "collections": {collection["id"]: collection}}
        ).encode(),
    }
    same = {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": extensions(census),
        "links": [
            {"rel": rel, "href": f"./{COLLECTION}", "type": "application/json"}
            for rel in ("collection", "parent", "root")
        ],
        "collection": collection["id"],
    }
    with ExitStack() as stack:
        writer = None
        for low in range(0, len(starts), _ROW_GROUP):
            part = slice(low, low + _ROW_GROUP)
            rows = index.iloc[starts[part][0] : ends[part][-1]]
            folder = store.shards_url or f"../{store.path.name}"
            table = _table(rows, census, part, outlines[part], same, folder)
            table = table.replace_schema_metadata(facts)
            writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)


def _table(
    index: pd.DataFrame,
    census: Census,
    part: slice,
    outlines: pa.Table,
    same: Mapping[str, Any],
    folder: str,
) -> pa.Table:
    """The items of some neighbouring patches, whose rows of the index are given."""
    patches = census.patches[part]
    n = len(patches)
    begins = (index["patch_id"] != index["patch_id"].shift()).to_numpy(dtype=bool)
    of_row, first = np.cumsum(begins) - 1, index[begins]
    assets = {m.name: _assets(m, index, of_row, n, folder) for m in census.modalities}
    codes = [c if _AUTHORITY.match(c) else None for c in first["crs"]]
    others = [c if c and not _AUTHORITY.match(c) else None for c in first["crs"]]
    columns: dict[str, Any] = {
        **{name: _same(value, n) for name, value in same.items()},
        "id": _whole(patches["patch_id"], pa.string()),
        GEOMETRY: outlines[GEOMETRY],
        BBOX: outlines[BBOX],
        "assets": pa.StructArray.from_arrays(list(assets.values()), list(assets)),
        **_times(patches),
        "gsd": _whole(patches["gsd_m"]),
        "proj:code": pa.array(codes, pa.string()),
        "proj:wkt2": pa.array(others, pa.string()),
        "proj:shape": _rows(first[["height", "width"]].to_numpy(np.int64)),
        "proj:transform": _rows(first[[*"abcdef"]].to_numpy(np.float64)),
        "mm:place_id": _whole(patches["place_id"], pa.string()),
        "mm:source": _whole(patches["source"], pa.string()),
        "mm:split": _whole(patches["split"], pa.string()),
        "mm:modalities": pa.array([census.names(m) for m in patches["members"]], _NAMES),
    }
    return pa.table(columns).filter(_whole(patches["xmin"].notna()))


def _band(modality: Modality, number: int) -> dict[str, Any]:
    band = modality.bands[number]
    record: dict[str, Any] = {"name": band.name}
    if band.polarisation:
        record["description"] = f"polarisation {band.polarisation}"
    if band.center_nm is not None:
        record["eo:center_wavelength"] = round(band.center_nm / 1000, 6)  # micrometres
    if band.width_nm is not None:
        record["eo:full_width_half_max"] = round(band.width_nm / 1000, 6)
    return record


def _assets(
    modality: Modality, index: pd.DataFrame, of_row: NDArray[np.int64], n: int, folder: str
) -> pa.StructArray:
    """The modality's asset of each patch, null where the patch has none."""
    at = np.full(n, -1)
    rows = np.flatnonzero((index["modality"] == modality.name).to_numpy())
    at[of_row[rows]] = rows
    absent = at < 0
    which = pa.array(at, mask=absent)

    def column(name: str, of: pa.DataType | None = None) -> pa.Array:
        return _whole(index[name], of).take(which)

    statistics = {} if modality.is_categorical else {
        "minimum": column("min"), "maximum": column("max"), "mean": column("mean")
    }  # fmt: skip
    statistics["valid_percent"] = _whole(index["valid_fraction"] * 100).take(which)
    fields: dict[str, pa.Array] = {
        "href": _whole(folder + "/" + index["shard"], pa.string()).take(which),
        **{key: _same(value, n) for key, value in asset_of(modality).items()},
        "statistics": pa.StructArray.from_arrays(list(statistics.values()), list(statistics)),
        "mm:row": column("row"),
        "mm:acquired_at": column("acquired_at", pa.string()),
        "mm:native_gsd_m": column("native_gsd_m"),
    }
    return pa.StructArray.from_arrays(list(fields.values()), list(fields), mask=pa.array(absent))


def _times(patches: pd.DataFrame) -> dict[str, pa.Array]:
    first, last = (patches[k].to_numpy() for k in ("first_day", "last_day"))
    unknown = np.isnan(first)
    micros = 1_000_000

    def moments(days: NDArray[np.float64], add_s: int) -> NDArray[np.int64]:
        known = np.where(unknown, _EPOCH_DAY, days)
        return ((known.astype(np.int64) - _EPOCH_DAY) * _DAY_S + add_s) * micros

    begin, end = moments(first, 0), moments(last, _DAY_S - 1)
    least, most = (pa.scalar(t, _TIME).cast(pa.int64()).as_py() for t in ALWAYS)
    return {
        "datetime": pa.array(begin, pa.int64(), mask=unknown).cast(_TIME),
        "start_datetime": pa.array(np.where(unknown, least, begin)).cast(_TIME),
        "end_datetime": pa.array(np.where(unknown, most, end)).cast(_TIME),
    }


def _whole(column: pd.Series[Any], of: pa.DataType | None = None) -> pa.Array:
    """One array: of strings, pandas gives the parts in which it holds them."""
    made = pa.array(column, of, from_pandas=True)
    return made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made


def _same(value: Any, n: int) -> pa.Array:
    """A column that holds one value everywhere."""
    return pa.array([value]).take(pa.array(np.zeros(n, np.int64)))


def _rows(values: NDArray[Any]) -> pa.Array:
    """A column of lists, one a row of values [n, k]."""
    ends = pa.array(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1])
    return pa.ListArray.from_arrays(ends, pa.array(values.ravel()))
