"""A unit that is a whole Sentinel-2 tile: peak memory and processor time of preparing it.

10,980 px a side, `rgb` on the tile's grid and `nir` on that of the neighbouring zone, so that both
ways are gone: cut out, and warped strip by strip. Once from cloud-optimised files (tiles of 512 px,
compressed), once from striped ones (rows, not compressed, as older software writes them). Beside
it, a tile of a third of the side: where memory is bounded it takes as much.
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
from rasterio.transform import Affine
from rasterio.windows import Window

from benchmarks import record, setting
from mm_model.data.prepare import prepare
from mm_model.data.sources.geotiff import GeotiffSource
from mm_model.modalities import Modality

SIDE_PX, PATCH_PX, BLOCK_PX = 10_980, 256, 512
LAYOUTS: dict[str, dict[str, Any]] = {
    "cog": {"tiled": True, "blockxsize": BLOCK_PX, "blockysize": BLOCK_PX, "compress": "deflate"},
    "striped": {"tiled": False, "blockysize": 1},
}
_PLACES = (("EPSG:32633", 300_000), ("EPSG:32632", 736_000))


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Of a process that prepares the tile, and of one that prepares a ninth of it."""
    figures = {}
    for layout in LAYOUTS:
        for side in (SIDE_PX // 3, SIDE_PX):
            with tempfile.TemporaryDirectory(prefix="mm-bench-") as name:
                _write(Path(name), side, layout)
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.data_tile", name],
                    check=True,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": str(record.ROOT)},
                )
            said = json.loads(done.stdout.splitlines()[-1])
            figures |= {f"tile_{layout}_{side}px_{key}": value for key, value in said.items()}
    bands = sum(len(m.bands) for m in setting.params().selected[: len(_PLACES)])
    whole_mb = f"{SIDE_PX**2 * bands * 4 / 1e6:.0f} MB"
    return figures, {
        "": f"{bands} bands of uint16, colours on the tile's own grid, near infrared warped from "
        f"the neighbouring zone; patches of {PATCH_PX} px, shifts measured, stored.",
        **{
            f"tile_{layout}_{SIDE_PX}px_peak_rss_mb": f"its bands as float32 alone are {whole_mb}"
            for layout in LAYOUTS
        },
    }


def _write(folder: Path, side: int, layout: str) -> None:
    """Rasters with structure and noise that repeats every `BLOCK_PX`, and their manifest."""
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:BLOCK_PX, :BLOCK_PX] * (2 * np.pi / BLOCK_PX)
    waves = np.sin(7 * rows + 3 * np.cos(5 * cols)) + np.cos(23 * cols - 2 * np.sin(11 * rows))
    block = (1500 + 400 * waves + rng.normal(0, 60, waves.shape)).astype(np.uint16)
    strip = np.tile(block, (1, side // BLOCK_PX + 1))[:, :side]
    layers = {}
    for modality, (crs, left) in zip(_modalities(), _PLACES, strict=True):
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
            transform=Affine(10, 0, left, 0, -10, 5_300_000),
            interleave="band",
            **LAYOUTS[layout],
        ) as dataset:
            for band in range(1, len(modality.bands) + 1):
                for top in range(0, side, BLOCK_PX):
                    height = min(BLOCK_PX, side - top)
                    dataset.write(strip[:height], band, window=Window(0, top, side, height))
        layers[modality.name] = {"file": file, "unit": modality.unit, "scale": 1e-4}
    source = {
        "licence": "none needed",
        "folder": ".",
        "grid": _modalities()[0].name,
        "layers": layers,
        "scenes": {"tile": {"date": "2021-07-01"}},
    }
    manifest = {"root": ".", "sources": {"made": source}}
    (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest))


def _modalities() -> tuple[Modality, ...]:
    return setting.params().selected[: len(_PLACES)]


def _prepare(folder: Path) -> dict[str, float]:
    chosen = setting.params().prepare
    source = GeotiffSource(folder / "manifest.yaml", PATCH_PX, 10.0, _modalities())
    began = time.process_time()
    count = prepare(
        source,
        folder / "patches",
        _modalities(),
        shard_patches=chosen.shard_patches,
        min_valid_fraction=chosen.min_valid_fraction,
        alignment=chosen.alignment,
    )
    seconds = time.process_time() - began
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"peak_rss_mb": int(peak) * 1024 / 1e6, "patches": count, "cpu_s": seconds}


if __name__ == "__main__":
    print(json.dumps(_prepare(Path(sys.argv[1]))))
