"""Shifts between the layers of real rasters, as preparation measures them, by source."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import record, setting
from mm_model.data.index import INDEX
from mm_model.data.prepare import prepare
from mm_model.data.sources.geotiff import GeotiffSource
from mm_model.errors import ConfigError

LEAST_KNOWN = 3  # shifts, for a median


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Median length of each source's layers' shifts against their patches' references."""
    chosen = setting.params()
    manifest = record.ROOT / "examples" / "real" / "manifest.yaml"
    try:
        source = GeotiffSource(
            manifest, chosen.prepare.patch_px, chosen.prepare.gsd_m[0], chosen.selected
        )
    except ConfigError as error:
        return {}, {"": f"not measured: {error}"}
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as name:
        prepare(
            source,
            Path(name) / "patches",
            chosen.selected,
            shard_patches=chosen.prepare.shard_patches,
            min_valid_fraction=chosen.prepare.min_valid_fraction,
            alignment=chosen.prepare.alignment.model_copy(update={"action": "keep"}),
        )
        rows = pq.read_table(Path(name) / "patches" / INDEX).to_pandas()
    rows = rows[rows["shift_reference"].notna()].assign(
        length=lambda found: np.hypot(found["shift_row_px"], found["shift_col_px"])
    )
    figures, notes = {}, {}
    for (where, layer, reference), of in rows.groupby(["source", "modality", "shift_reference"]):
        known = of["length"].dropna()
        if len(known) >= LEAST_KNOWN:
            key = f"shift_real_{where}_{layer}_to_{reference}_px"
            figures[key] = float(known.median())
            notes[key] = f"known of {len(known)} of {len(of)} patches"
    return figures, {"": "Medians, in pixels of the patch; nothing is left out or moved.", **notes}
