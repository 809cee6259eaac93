"""A unit that is a whole Sentinel-2 tile: peak memory of reading and warping it.

10,980 px a side: colours on the tile's grid, near infrared on another one (as from the neighbouring
zone), so that both ways are gone: cut out, and warped strip by strip.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml

from benchmarks import record, setting
from mm_model.data.sources.geotiff import GeotiffSource

SIDE_PX, PATCH_PX = 10_980, 256
_HERE = "benchmarks.data_tile"


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Peak memory of a process that reads the tile, and of one that reads a ninth of it."""
    chosen = setting.params()
    figures = {}
    for side in (SIDE_PX // 3, SIDE_PX):
        with tempfile.TemporaryDirectory(prefix="mm-bench-") as name:
            _write(Path(name), side, chosen.selected[0], chosen.selected[1])
            done = subprocess.run(
                [sys.executable, "-m", _HERE, name],
                check=True,
                capture_output=True,
                env={**os.environ, "PYTHONPATH": str(record.ROOT)},
            )
            said = json.loads(done.stdout.splitlines()[-1])
        figures |= {f"tile_{side}px_{key}": value for key, value in said.items()}
    return figures, {
        "": "Colours on the tile's own grid, near infrared warped from the neighbouring zone; "
        f"patches of {PATCH_PX} px, not stored.",
        f"tile_{SIDE_PX}px_peak_rss_mb": "four bands as float32 alone are "
        f"{SIDE_PX**2 * 16 / 1e6:.0f} MB",
    }


def _write(folder: Path, side: int, first: Any, second: Any) -> None:
    block = np.random.default_rng(0).integers(500, 3000, (512, 512), dtype=np.uint16)
    rows = np.tile(block, (1, side // 512 + 1))[:, :side]
    places = {first: ("EPSG:32633", 300_000), second: ("EPSG:32632", 736_000)}
    layers = {}
    for modality, (crs, left) in places.items():
        file = f"{modality.name}.tif"
        with rasterio.open(
            folder / file,
            "w",
            driver="GTiff",
            width=side,
            height=side,
            count=len(modality.bands),
            dtype="uint16",
            nodata=0,
            crs=crs,
            transform=rasterio.Affine(10, 0, left, 0, -10, 5_300_000),
            tiled=True,
            blockxsize=512,
            blockysize=512,
            interleave="band",
        ) as dataset:
            for top in range(0, side, 512):
                height = min(512, side - top)
                window = rasterio.windows.Window(0, top, side, height)
                for band in range(1, len(modality.bands) + 1):
                    dataset.write(rows[:height], band, window=window)
        layers[modality.name] = {"file": file, "unit": modality.unit, "scale": 1e-4}
    source = {
        "licence": "none needed",
        "folder": ".",
        "grid": first.name,
        "layers": layers,
        "scenes": {"tile": {"date": "2021-07-01"}},
    }
    manifest = {"root": ".", "sources": {"made": source}}
    (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest))


def _read(folder: Path) -> dict[str, float]:
    chosen = setting.params()
    source = GeotiffSource(folder / "manifest.yaml", PATCH_PX, 10.0, chosen.selected)
    before = time.process_time()
    count = sum(bool(p.layers) for unit in source.units() for p in source.read(unit))
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    seconds = time.process_time() - before
    return {"peak_rss_mb": int(peak) / 1024, "patches": count, "cpu_s": seconds}


if __name__ == "__main__":
    print(json.dumps(_read(Path(sys.argv[1]))))
