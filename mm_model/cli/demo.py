"""`mm demo`: the whole loop on one machine, and a page that shows what came of it.

Starts the services, runs the release flow as a user would, asks the endpoint over HTTP for all that
radar does not show of three held-out scenes and for sets out of nothing, and draws the answers.
"""

from __future__ import annotations

import html
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from mm_model.adapters import environment, services
from mm_model.cli.images import panel_of
from mm_model.client import Client
from mm_model.config import Params, load_params
from mm_model.data import raster
from mm_model.data.patch import Patch
from mm_model.data.split import TEST, load_split
from mm_model.data.store import PatchStore
from mm_model.errors import DataError, ServiceError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES, Quantity
from mm_model.pictures import Panel, save_sheet

OBSERVED = next(m.name for m in MODALITIES.values() if m.quantity is Quantity.BACKSCATTER)
SCENES, JOINT_SETS = 3, 2
BLOCK = (2, 3)
"""Rows and columns of neighbouring patches that make a scene, where there are so many."""


@dataclass(frozen=True)
class HeldOut:
    """A scene that training never saw: layers on one grid."""

    name: str
    grid: Grid
    layers: Mapping[str, tuple[NDArray[np.generic], NDArray[np.bool_]]]


def run(pipeline: Path) -> None:
    """The demo of a pipeline folder; writes demo/ there."""
    console = Console(soft_wrap=True)
    start = time.monotonic()
    params = load_params(pipeline / "params.yaml")
    services.up()
    is_root = pipeline.resolve() == environment.project_root()
    deployment = f"release/{'synthetic' if is_root else pipeline.resolve().name}"
    console.print(f"prefect deployment run '{deployment}' --watch")
    prefect = str(Path(sys.executable).with_name("prefect"))
    done = subprocess.run(
        [prefect, "deployment", "run", deployment, "--watch"],
        cwd=environment.project_root(),
        check=False,
    )
    if done.returncode:
        raise ServiceError(
            f"{deployment} did not complete", remedy="open the flow run in Prefect, named above"
        )
    out = pipeline / "demo"
    shutil.rmtree(out, ignore_errors=True)
    url = environment.endpoint_url() + params.serve.route_prefix.rstrip("/")
    scenes = choose_scenes(pipeline / "data", params)
    height, width = (n * params.prepare.patch_px for n in BLOCK)
    rows: list[list[Panel | None]] = []
    with Client(url) as client:
        for number, scene in enumerate(scenes, 1):
            rows += _ask(client, scene, out / f"scene-{number}")
        for number in range(1, JOINT_SETS + 1):
            made = client.generate({}, seed=number, height=height, width=width)
            files = made.save(out / f"from-nothing-{number}")
            rows.append([panel_of(path, "generated from nothing") for path in files])
    title = f"Held-out places: from {OBSERVED} alone; below: from nothing"
    save_sheet(out / "sheet.png", rows, title)
    page = _write_page(out, url, params, scenes)
    console.print(f"\ndone in {time.monotonic() - start:.0f} s")
    for name, where in _places(page, url, pipeline):
        console.print(f"  {name:22} {where}")


def choose_scenes(data: Path, params: Params) -> list[HeldOut]:
    """Up to `SCENES` scenes of held-out places that have every modality, of different places.

    Of each place the block of neighbouring patches with the most classes or the most contrast.

    Raises:
        DataError: no held-out patch has the observed modality.
    """
    store = PatchStore(data / "patches")
    positions = load_split(data / "splits.parquet", store.patch_ids)[TEST]
    by_place: dict[str, list[Patch]] = {}
    for position in positions:
        patch = store.read(position, params.modalities)
        if OBSERVED in patch.layers:
            by_place.setdefault(patch.place_id, []).append(patch)
    if not by_place:
        raise DataError(f"no held-out patch has {OBSERVED}", remedy="split with another seed")
    blocks = [max(_blocks(patches), key=_interest) for patches in by_place.values()]
    blocks.sort(key=_interest, reverse=True)
    return [_mosaic(block) for block in blocks[:SCENES]]


def _blocks(patches: Sequence[Patch]) -> list[list[Patch]]:
    """All blocks of neighbouring patches, or single patches where there is none."""

    def where(patch: Patch, x: float, y: float) -> tuple[object, ...]:
        # The date too: a place may have been seen more than once.
        dates = tuple(sorted((name, layer.acquired_at) for name, layer in patch.layers.items()))
        return patch.grid.crs, round(x, 3), round(y, 3), dates

    at = {where(p, p.grid.transform[2], p.grid.transform[5]): p for p in patches}
    blocks = []
    for patch in patches:
        height, width = patch.grid.shape
        corners = [
            patch.grid.xy(i * height, j * width) for i in range(BLOCK[0]) for j in range(BLOCK[1])
        ]
        found = [at.get(where(patch, x, y)) for x, y in corners]
        whole = [p for p in found if p is not None]
        if len(whole) == len(corners):
            blocks.append(whole)
    return blocks or [[patch] for patch in patches]


def _interest(block: Sequence[Patch]) -> tuple[int, int, float]:
    """How many modalities, how many classes of some share, how much contrast a block has."""
    names = set.intersection(*(set(p.layers) for p in block))
    classes = 0
    for name in names:
        if MODALITIES[name].is_categorical:
            codes = np.concatenate([p.layers[name].values.ravel() for p in block])
            counts = np.unique(codes, return_counts=True)[1]
            classes += int((counts > codes.size / 50).sum())
    contrast = float(
        np.mean([np.nanstd(p.layers[OBSERVED].values.astype(np.float64)) for p in block])
    )
    return len(names), classes, contrast


def _mosaic(block: Sequence[Patch]) -> HeldOut:
    first = block[0]
    height, width = first.grid.shape
    rows, columns = BLOCK if len(block) > 1 else (1, 1)
    layers = {}
    for name in sorted(set.intersection(*(set(p.layers) for p in block))):
        cells = [p.layers[name] for p in block]
        grid_of = [cells[i * columns : (i + 1) * columns] for i in range(rows)]
        layers[name] = (
            np.concatenate([np.concatenate([c.values for c in r], 2) for r in grid_of], 1),
            np.concatenate([np.concatenate([c.valid for c in r], 1) for r in grid_of], 0),
        )
    return HeldOut(first.place_id, first.grid.window(0, 0, rows * height, columns * width), layers)


def _ask(client: Client, scene: HeldOut, folder: Path) -> list[list[Panel | None]]:
    """Send the observed layer as a GeoTIFF; returns a row of answers and a row of what is real."""
    for name, (values, valid) in scene.layers.items():
        place = folder / ("observed" if name == OBSERVED else "real") / f"{name}.tif"
        place.parent.mkdir(parents=True, exist_ok=True)
        raster.write_geotiff(place, values, valid, scene.grid, MODALITIES[name], tags={})
    observed = folder / "observed" / f"{OBSERVED}.tif"
    files = client.generate({OBSERVED: observed}, seed=1).save(folder / "generated")
    answered: list[Panel | None] = [panel_of(observed, f"observed, {scene.name}")]
    real: list[Panel | None] = [None]
    for path in files:
        answered.append(panel_of(path, "generated"))
        truth = folder / "real" / path.name
        real.append(panel_of(truth, "real") if truth.is_file() else None)
    return [answered, real]


def _places(page: Path, url: str, pipeline: Path) -> list[tuple[str, str]]:
    prefect = environment.prefect_api_url().removesuffix("/api")
    return [
        ("pictures and files", str(page.resolve())),
        ("endpoint", f"{url}/v1/generate"),
        ("its OpenAPI page", f"{url}/docs"),
        ("MLflow", environment.mlflow_url()),
        ("Prefect", prefect),
        ("Ray", environment.ray_dashboard_url()),
        ("data card", str((pipeline / "data/catalogue/index.html").resolve())),
        ("Data Docs", str((pipeline / "data/docs/index.html").resolve())),
        ("stop everything", "make down"),
    ]


def _write_page(out: Path, url: str, params: Params, scenes: Sequence[HeldOut]) -> Path:
    """A short page beside the pictures; needs no network."""
    files = "\n".join(
        f'<li><a href="{p.relative_to(out)}">{p.relative_to(out)}</a></li>'
        for p in sorted(out.rglob("*.tif"))
    )
    links = "\n".join(
        f"<tr><th>{html.escape(name)}</th><td>"
        + (f'<a href="{where}">{where}</a>' if where.startswith("http") else html.escape(where))
        + "</td></tr>"
        for name, where in _places(out / "index.html", url, out.parent)
    )
    observed = f"scene-1/observed/{OBSERVED}.tif"
    curl = f"curl -F {OBSERVED}=@{observed} -F seed=1 -o answer.zip {url}/v1/generate"
    names = ", ".join(scene.name for scene in scenes)
    text = _PAGE.format(
        observed=html.escape(MODALITIES[OBSERVED].title),
        model=html.escape(params.register_.model),
        names=html.escape(names),
        curl=html.escape(curl),
        files=files,
        links=links,
    )
    page = out / "index.html"
    page.write_text(text, encoding="utf-8")
    return page


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>One scene, every modality</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }}
img {{ width: 100%; height: auto; border: 1px solid #ddd }}
code, pre {{ font: 14px/1.4 ui-monospace, monospace; background: #f4f4f4 }}
pre {{ padding: .7rem; overflow-x: auto }}
th {{ text-align: left; padding-right: 1.5rem; font-weight: 600 }}
ul {{ columns: 2 }}
</style></head><body>
<h1>One scene, every modality</h1>
<p>The model <b>{model}</b> was given only <i>{observed}</i> of places that it had never seen
({names}) and generated every other modality of each from one latent scene. Below each answer stands
what is real there. Where the radar leaves something open, such as the season, an answer may differ
from what is real and still be right. The last rows were generated from nothing at all.</p>
<p><a href="sheet.png"><img src="sheet.png" alt="Observed, generated and real layers, each with its
legend and unit"></a></p>
<p>The same with <code>curl</code>, in this folder:</p>
<pre>{curl}</pre>
<h2>Where everything is</h2>
<table>{links}</table>
<h2>Files</h2>
<ul>{files}</ul>
</body></html>
"""
