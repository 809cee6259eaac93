"""Whole scenes, from a file to files: seconds, peak memory, and whether borders of windows show.

`python -m benchmarks scene` measures the sides in `SIDES_PX`; `python -m benchmarks.scene --side N
--steps K` one of any size. Each runs in a process of its own, through the bundle in the box.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import record
from benchmarks.generate import observed_of
from mm_model.api import DEFAULT_STEPS, ModelIdentity
from mm_model.bundle import load_bundle
from mm_model.data import raster
from mm_model.data.sources.synthetic import CRS, Acquisition, render
from mm_model.data.strips import CogWriter, strips
from mm_model.generative.windows import STRIDE, Frame
from mm_model.geo.grid import Grid
from mm_model.modalities import Kind, Modality, Quantity
from mm_model.pretrained import PRETRAINED
from mm_model.serving.generator import Generator
from mm_model.serving.requests import SceneRequest
from mm_model.serving.scenes import MAX_SIDE_PX, write_scene

SIDES_PX = {1024: DEFAULT_STEPS, 4096: DEFAULT_STEPS, 10_980: 1}
"""Sampling steps by the scene's side; 10,980 is a tile of Sentinel-2, at the cheapest."""
_TILE_PX = 512  # that the observed scene is rendered in
_SEED = 5


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Each side in turn."""
    figures: dict[str, float] = {}
    for side, steps in SIDES_PX.items():
        figures |= _in_a_process(side, steps, None)
    for name, (quantity, path, scale) in real_scenes().items():
        with tempfile.TemporaryDirectory(prefix="mm-bench-") as folder:
            given = _in_units(quantity, path, scale, Path(folder))
            found = _in_a_process(0, DEFAULT_STEPS, given)
        figures |= {key.replace("scene", f"real_{name}", 1): v for key, v in found.items()}
    notes = {
        "": "Synthetic radar to reflectance and land cover, and real reflectance and elevation to "
        "others of these, through the bundle in the box, files in and out (COG with overviews), a "
        "process for each; its peak resident memory. Seam ratio: the mean step from pixel to pixel "
        "where windows begin or end, over that at other borders of the decoder's cells of 8 px; "
        "cell ratio: at these, over elsewhere.",
        "scene_10980_s": "one step: the best single estimate",
    }
    return figures, notes


def real_scenes() -> dict[str, tuple[Quantity, Path, float]]:
    """Scenes with a side of 800 px or more, where the real rasters are: what is observed and what a
    stored number is in its unit.
    """
    folder = Path(os.environ.get("MM_REAL_DATA", record.ROOT.parent / "shared" / "data"))
    files = {
        "majortom": (Quantity.REFLECTANCE, "majortom_s2_sample/199U_1099R/rgb.tif", 1e-4),
        "zion": (Quantity.ELEVATION, "zion_landsat8/zion/dem.tif", 1.0),
    }
    found = {name: (q, folder / path, scale) for name, (q, path, scale) in files.items()}
    return {name: it for name, it in found.items() if it[1].is_file()}


def _in_units(quantity: Quantity, path: Path, scale: float, folder: Path) -> str:
    """MODALITY=FILE of a scene in physical units."""
    modality = _of(load_bundle(PRETRAINED).manifest.modalities, quantity)
    found = raster.read_raster(path)
    target = folder / f"{modality.name}_observed.tif"
    values = found.values[: len(modality.bands)] * scale
    raster.write_geotiff(target, values, found.valid, found.grid, modality)
    return f"{modality.name}={target}"


def _of(modalities: Sequence[Modality], *wanted: Quantity) -> Modality:
    """The first modality of these quantities."""
    return next(m for m in modalities if m.quantity in wanted)


def _in_a_process(side: int, steps: int, given: str | None) -> dict[str, float]:
    arguments = ["--side", str(side), "--steps", str(steps), "--json"]
    arguments += ["--observe", given] if given else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scene", *arguments],
        cwd=record.ROOT,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return dict(json.loads(done.stdout))


def observe(path: Path, modality: Modality, side: int) -> None:
    """Write a square of the synthetic Earth as a COG, tile by tile."""
    grid = Grid(CRS, (10.0, 0.0, 300_000.0, 0.0, -10.0, 5_000_040.0), side, side)
    when = Acquisition.draw(_SEED)
    with CogWriter(
        path,
        grid,
        modality.band_names,
        dtype=modality.dtype,
        nodata=modality.nodata,
        units=[modality.unit] * len(modality.bands),
        tags=modality.file_tags,
    ) as writer:
        for row, rows in strips(side, _TILE_PX):
            tiles = [
                render(_SEED, grid.window(row, column, rows, columns), [modality], when)
                for column, columns in strips(side, _TILE_PX)
            ]
            parts = [tile[modality.name].values for tile in tiles]
            writer.write(np.concatenate(parts, axis=2))
        writer.finish()


def observe_box(path: Path, side: int) -> None:
    """`observe` for the bundle in the box."""
    observe(path, observed_of(load_bundle(PRETRAINED).manifest.modalities), side)


def seam_gradient_ratio(path: Path, modality: Modality, frame: Frame) -> dict[str, float]:
    """Mean steps between neighbours, over those elsewhere, across rows and across columns together.

    "seam": where windows begin or end, over other borders of the decoder's cells of 8 px, since
    these show in any window (docs/benchmarks.md). "border": the same over all that is elsewhere.
    "cell": at borders of cells, over elsewhere.
    """
    windows, (top, left) = frame.windows, frame.corner
    wide = raster.read_raster(path).values.astype(np.float32)
    at: dict[str, list[NDArray[np.float64]]] = {"seam": [], "cell": [], "inside": []}
    for axis, starts, first in ((1, windows.rows, top), (2, windows.columns, left)):
        ends = {start + windows.size[axis - 1] for start in starts}
        steps = np.diff(wide, axis=axis)
        if modality.kind is not Kind.CONTINUOUS:
            steps = (steps != 0).astype(np.float32)
        profile = np.nanmean(np.abs(steps), axis=tuple(a for a in range(3) if a != axis))
        place = np.arange(1, len(profile) + 1) + first
        border, cell = np.isin(place, [*starts, *ends]), place % STRIDE == 0
        at["seam"].append(profile[border])
        at["cell"].append(profile[cell & ~border])
        at["inside"].append(profile[~cell])
    seam, cell, inside = (np.concatenate(found) for found in at.values())
    return {
        "seam": float(seam.mean() / cell.mean()),
        "border": float(seam.mean() / np.concatenate([cell, inside]).mean()),
        "cell": float(cell.mean() / inside.mean()),
    }


def run(side: int, steps: int, given: str | None, folder: Path, threads: int) -> dict[str, float]:
    """Figures of one scene."""
    torch.set_num_threads(threads)
    bundle = load_bundle(PRETRAINED)
    modalities = bundle.manifest.modalities
    by_name = {m.name: m for m in modalities}
    if given is None:
        source, path, key = (
            observed_of(modalities),
            folder / f"observed_{side}.tif",
            f"scene_{side}",
        )
        if not path.exists():
            # In a process of its own: its memory is none of the scene's.
            code = (
                "from benchmarks.scene import *; observe_box(Path(sys.argv[1]), int(sys.argv[2]))"
            )
            subprocess.run([sys.executable, "-c", code, str(path), str(side)], check=True)
    else:
        name, _, file = given.partition("=")
        source, path, key = by_name[name], Path(file), "scene"
    others = [m for m in modalities if m != source]
    wanted = [_of(others, Quantity.REFLECTANCE), _of(others, Quantity.LAND_COVER)]
    generator = Generator(bundle, max_side_px=MAX_SIDE_PX)
    request = SceneRequest({source.name: path}, tuple(m.name for m in wanted), steps=steps)
    used = resource.getrusage(resource.RUSAGE_SELF)
    began, before = time.perf_counter(), used.ru_utime + used.ru_stime
    said = began

    def tell(done: int, total: int) -> None:
        nonlocal said
        if time.perf_counter() - said > 30:
            said = time.perf_counter()
            share = done / total
            left = (said - began) * (1 - share) / share
            print(f"{done} of {total} windows, {left:.0f} s left", file=sys.stderr, flush=True)

    model = ModelIdentity(name="pretrained", version=bundle.manifest.bundle_id[:12])
    write_scene(generator, request, model, folder / "out", tell)
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        f"{key}_s": time.perf_counter() - began,
        f"{key}_cpu_s": used.ru_utime + used.ru_stime - before,
        f"{key}_peak_rss_mb": used.ru_maxrss / 1024,
    }
    grid = raster.read_header(path).grid
    frame = Frame(grid.height, grid.width, bundle.manifest.patch_px, grid.position)
    for modality in wanted:
        if side <= 4096:
            found = seam_gradient_ratio(folder / "out" / f"{modality.name}.tif", modality, frame)
            for kind, ratio in found.items():
                figures[f"{key}_{kind}_gradient_ratio_{modality.name}"] = ratio
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scene", description=__doc__)
    add = parser.add_argument
    add("--side", type=int, default=1024, help="of a square of the synthetic Earth, in pixels")
    add("--observe", metavar="MODALITY=FILE", help="a scene of one's own instead")
    add("--steps", type=int, default=DEFAULT_STEPS)
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--keep", type=Path, help="folder for what is observed and generated")
    add("--json", action="store_true", help="print figures as one line of JSON")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as folder:
        kept = chosen.keep or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        figures = run(chosen.side, chosen.steps, chosen.observe, kept, chosen.threads)
    if chosen.json:
        print(json.dumps(figures))
    else:
        for key, value in figures.items():
            print(f"{key:48} {value:.4g}")


if __name__ == "__main__":
    main()
