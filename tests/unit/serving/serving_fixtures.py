"""A small model with constructed weights, GeoTIFFs for it, and an application to ask."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import rasterio
import torch
import uvicorn
from rasterio.transform import Affine

from mm_model.api import ModelIdentity, Problem
from mm_model.bundle import Bundle, Manifest
from mm_model.codec import Codec
from mm_model.config import ServeConfig
from mm_model.data import raster
from mm_model.data.stats import QUANTILES
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES, Kind, Modality, Quantity
from mm_model.nn.model import SceneModel, Size
from mm_model.serving.batching import FixedModel, Served
from mm_model.serving.generator import Generator, ObservedLayer

# Layers this small gain nothing from threads, and lose much where the cores are busy.
torch.set_num_threads(1)

NAMES = ("rgb", "sar", "dem", "map")  # nir stays unknown to this model
PATCH_PX = 24
# A transform whose numbers have no short decimal form.
GRID = Grid("EPSG:32633", (10.1, 0.0, 500_000 / 3, 0.0, -9.9, 5_000_000 / 7), 24, 40)
PLAUSIBLE = {
    Quantity.REFLECTANCE: (0.02, 0.4),
    Quantity.BACKSCATTER: (-25.0, -5.0),
    Quantity.ELEVATION: (0.0, 600.0),
    Quantity.TEMPERATURE: (270.0, 300.0),
}


SIZE = Size(16, 16, 32, 1, 1, 1, 2, 4)


def make_bundle(names: tuple[str, ...] = NAMES, seed: int = 0, size: Size = SIZE) -> Bundle:
    """Weights are random, those that start at zero too: every input reaches every output.

    Widths are multiples of 16, as in every declared size: see `sampler.Chunks`.
    """
    modalities = tuple(MODALITIES[n] for n in names)
    measured = {m.name: _statistics(m) for m in modalities}
    statistics = {"patches": 4, "places": 2, "modalities": measured}
    seen = [{"modalities": list(names), "patches": 4}]
    torch.manual_seed(seed)
    model = SceneModel(modalities, size, Codec(modalities, statistics), seen, PATCH_PX)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().requires_grad_(False)
    origin = {"source": "constructed"}
    return Bundle(model, Manifest(model.config, [10.0], statistics, origin, bundle_id="b0b" * 9))


def _statistics(modality: Modality) -> dict:
    if modality.is_categorical:
        first, *others = (str(code) for code in modality.class_codes)
        return {"pixels": 9, "classes": {first: 9, **dict.fromkeys(others, 0)}}
    low, high = PLAUSIBLE[modality.quantity]
    values = np.linspace(low, high, 50)
    center, scale = (low + high) / 2, (high - low) / 4
    seen = modality.transform.forward(values, center, scale, np)
    count = len(modality.bands)
    return {
        "pixels": 50,
        "correlation": np.where(np.eye(count, dtype=bool), 1, 0.8).tolist(),
        "bands": [
            {
                "name": name,
                "quantiles": {str(q): low + q * (high - low) for q in QUANTILES},
                "center": center,
                "scale": scale,
                "transformed_mean": float(seen.mean()),
                "transformed_std": float(seen.std()),
                "relief": {"scale": scale / 9, "transformed_mean": 0.0, "transformed_std": 1.0},
            }
            for name in modality.band_names
        ],
    }


def make_generator(**limits: int) -> Generator:
    return Generator(make_bundle(), **limits)


def make_source(version: str = "3", **limits: int) -> FixedModel:
    identity = ModelIdentity(name="mm-test", version=version, run_id="f00d")
    return FixedModel(Served(make_generator(**limits), identity))


def serve_config(**changes: object) -> ServeConfig:
    values = {
        "route_prefix": "/",
        "replicas": 1,
        "max_batch": 4,
        "batch_wait_ms": 5,
        "max_queued": 32,
        "max_side_px": 1024,
        "max_samples": 16,
        "deadline_s": 60,
        "alias_poll_s": 1,
        "jobs": {
            "max_side_px": 2048,
            "max_memory_mb": 1024,
            "max_upload_mb": 64,
            "max_jobs": 4,
            "max_stored_mb": 256,
            "max_hours": 1,
            "keep_hours": 1,
        },
        **changes,
    }
    return ServeConfig.model_validate(values)


def make_layer(name: str, grid: Grid = GRID, seed: int = 0, hole: bool = True) -> ObservedLayer:
    """Plausible values, with an invalid corner."""
    modality = MODALITIES[name]
    rng = np.random.default_rng(seed)
    shape = (len(modality.bands), *grid.shape)
    if modality.kind is Kind.CATEGORICAL:
        values = rng.choice(modality.class_codes, shape).astype(np.uint8)
    else:
        values = rng.uniform(*PLAUSIBLE[modality.quantity], shape).astype(np.float32)
    valid = np.ones(grid.shape, np.bool_)
    if hole:
        valid[: grid.height // 4, : grid.width // 4] = False
    return ObservedLayer(values, valid, grid)


def geotiff(
    name: str, grid: Grid = GRID, seed: int = 0, hole: bool = True, bands: tuple[str, ...] = ()
) -> bytes:
    """A file of plausible values; with these bands alone, if they are named."""
    layer, modality = make_layer(name, grid, seed, hole), MODALITIES[name]
    if bands:
        at = [modality.band_names.index(band) for band in bands]
        return file_of(layer.values[at], layer.valid, bands, grid)
    content = raster.write_geotiff(None, layer.values, layer.valid, grid, modality)
    assert content is not None
    return content


def file_of(values, valid, names, grid=GRID, colors=None) -> bytes:
    """A GeoTIFF with bands of these names, and colours; NaN where nothing is known."""
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=grid.height, width=grid.width, count=len(values),
            dtype="float32", crs=grid.crs, transform=Affine(*grid.transform), nodata=np.nan,
        ) as file:  # fmt: skip
            if colors is not None:
                file.colorinterp = colors
            file.write(np.where(valid, values, np.nan).astype("float32"))
            file.descriptions = names
        return bytes(memory.getbuffer())


def ask(app, *requests, times_out=60):
    """Responses to (method, path, keyword arguments) requests, sent at once."""

    async def run():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", timeout=times_out
        ) as http:
            return await asyncio.gather(*(http.request(m, p, **k) for m, p, k in requests))

    return asyncio.run(run())


def form(files=None, headers=None, path="/v1/generate", **fields):
    """A multipart request, as curl -F makes it; a list is a part that is repeated."""
    parts = [
        (name, (None, str(value)))
        for name, given in fields.items()
        for value in (given if isinstance(given, list) else [given])
    ]
    parts += [
        (name, (f"{name}.tif", content))
        for name, given in (files or {}).items()
        for content in (given if isinstance(given, list) else [given])
    ]
    return "POST", path, {"files": parts, "headers": headers or {}}


def refused(response, status, code):
    """The problem, checked for what every problem has."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(response.content)
    assert problem.status == status
    assert problem.code == code
    return problem


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The address of an application that listens on this machine, in a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
