"""A folder of odd rasters and its manifest: sizes, types, systems and gaps of the real world."""

from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import Affine

from mm_model.modalities import MODALITIES, Kind, Quantity

OPTICAL = next(m for m in MODALITIES.values() if m.quantity is Quantity.REFLECTANCE)
RADAR = next(m for m in MODALITIES.values() if m.quantity is Quantity.BACKSCATTER)
RELIEF = next(m for m in MODALITIES.values() if m.quantity is Quantity.ELEVATION)
COVER = next(m for m in MODALITIES.values() if m.kind is Kind.CATEGORICAL)
FOUR = (OPTICAL, RADAR, RELIEF, COVER)
ROTATED = Affine.translation(500_000, 5_000_000) @ Affine.rotation(-20) @ Affine.scale(10, -10)
LEGEND = {1: COVER.class_codes[0], 2: COVER.class_codes[3], 9: 0}
HEIGHT, WIDTH = 40, 56


def write(path: Path, values, transform, crs="EPSG:32633", **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=bands, height=height, width=width,
        dtype=values.dtype, crs=crs, transform=transform, **profile,
    ) as dataset:  # fmt: skip
        dataset.write(values)
        dataset.update_tags(DATE="20200607")


def write_rasters(root: Path, places: int = 4, seed: int = 0) -> None:
    """Places of 40 x 56 pixels: scaled uint16 with a hole, dB of 20 m in degrees, and so on."""
    for place in range(places):
        rng = np.random.default_rng([seed, place])
        folder = root / f"s{place}"
        north_up = Affine(10, 0, 500_000 + 50_000 * place, 0, -10, 5_000_000)
        grid = ROTATED if place == 1 else north_up
        stored = rng.integers(1, 5000, (5, HEIGHT, WIDTH)).astype("uint16")
        stored[:, 3:6, 4:9] = 0
        write(folder / "stack.tif", stored, grid, nodata=0)
        # 25 m, reaching over the others, in another zone: nothing fits anything.
        relief = rng.uniform(100, 900, (1, 40, 50)).astype("float32")
        around = Affine(25, 0, grid.c - 300, 0, -25, grid.f + 300)
        write(folder / "relief.tif", relief, around, nodata=-9999.0)
        power = rng.uniform(0.01, 0.2, (2, HEIGHT // 2, WIDTH // 2)).astype("float32")
        write(folder / "radar.tif", power, grid @ Affine.scale(2))
        codes = rng.choice(np.array([1, 2, 2, 9], "int16"), (1, HEIGHT, WIDTH))
        write(folder / "cover.tif", codes, grid)


def manifest(root: Path, places: int = 4) -> dict:
    return {
        "root": str(root),
        "sources": {
            "made": {
                "licence": "CC0-1.0",
                "folder": "{scene}",
                "grid": OPTICAL.name,
                "layers": {
                    OPTICAL.name: {
                        "file": "stack.tif", "bands": [3, 2, 1], "unit": OPTICAL.unit,
                        "scale": 1e-4, "offset": -0.01, "out_of_range": "clip",
                    },
                    RADAR.name: {"file": "radar.tif", "unit": "power", "date": "tag:DATE"},
                    RELIEF.name: {"file": "relief.tif", "unit": RELIEF.unit, "date": "none"},
                    COVER.name: {"file": "cover.tif", "unit": COVER.unit, "classes": dict(LEGEND)},
                },
                "scenes": {f"s{place}": {"date": "2020-06-04"} for place in range(places)},
            }
        },
    }  # fmt: skip
