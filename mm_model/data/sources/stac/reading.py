"""Pinned items to layers: windows over HTTP, clouds into the mask, numbers into physical units."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from mm_model.data.align import resample, to_classes, to_physical
from mm_model.data.patch import Layer
from mm_model.data.raster import Raster, warp
from mm_model.data.remote import Patience, read_window
from mm_model.data.sources.manifest import LINEAR_POWER
from mm_model.data.sources.stac.lock import PinnedItem
from mm_model.data.sources.stac.offsets import Sign, split_band
from mm_model.data.sources.stac.places import Place
from mm_model.data.sources.stac.request import Hidden, Product
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality

# Requests wait for a distant server most of their time.
_AT_ONCE = 8
_CLEAR_GSD_M = 60.0  # at which clouds over a place are counted


def clear_share(
    items: Sequence[PinnedItem], product: Product, place: Place, sign: Sign, patience: Patience
) -> float:
    """The share of a place that the items show, 0 to 1."""
    assert product.hidden is not None
    grid = place.grid(_CLEAR_GSD_M)
    seen = np.zeros(grid.shape, np.bool_)
    for item in items:
        raster = _read_bands(item, (product.hidden.band,), grid, sign, patience)
        if raster is not None:
            seen |= _clear_on(raster, product.hidden, grid)
    return float(seen.mean())


def read_layers(
    items: Sequence[PinnedItem],
    product: Product,
    modalities: Sequence[Modality],
    grid: Grid,
    sign: Sign,
    patience: Patience,
) -> dict[str, Layer]:
    """Layers of one product on a grid, by modality; items in their order, the first to know wins.

    Raises:
        RasterError: a file cannot be used; the message names it.
        ServiceError: a server does not deliver.
    """
    jobs = [(item, m) for item in items for m in modalities]
    hidden: dict[str, Raster | None] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        if product.hidden is not None:
            band = (product.hidden.band,)
            read = pool.map(lambda i: _read_bands(i, band, grid, sign, patience), items)
            hidden = {i.id: raster for i, raster in zip(items, read, strict=True)}

        def layer(
            job: tuple[PinnedItem, Modality],
        ) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
            item, modality = job
            return _read_layer(item, product, modality, grid, hidden.get(item.id), sign, patience)

        parts = list(pool.map(layer, jobs))
    out: dict[str, Layer] = {}
    for modality in modalities:
        mine = [part for (_, m), part in zip(jobs, parts, strict=True) if m is modality]
        values, valid = mine[0]
        for more, known in mine[1:]:
            fresh = known & ~valid
            values, valid = np.where(fresh, more, values), valid | fresh
        date = None if product.timeless else items[0].datetime[:10]
        out[modality.name] = Layer(values, valid, date)
    return out


def _read_layer(
    item: PinnedItem,
    product: Product,
    modality: Modality,
    grid: Grid,
    hidden: Raster | None,
    sign: Sign,
    patience: Patience,
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """One modality of one item: [bands, H, W] on the grid, and which pixels are known in all."""
    values = np.zeros((len(modality.bands), *grid.shape), modality.dtype)
    valid = np.ones(grid.shape, np.bool_)
    bands = product.layers[modality.name]
    for file in dict.fromkeys(split_band(item.assets[b])[0] for b in bands):
        at = [k for k, b in enumerate(bands) if split_band(item.assets[b])[0] == file]
        raster = _read_bands(item, [bands[k] for k in at], grid, sign, patience)
        if raster is None or (product.hidden is not None and hidden is None):
            return values, np.zeros_like(valid)
        known = raster.valid
        for nodata in product.nodata:
            known = known & (raster.values != nodata).all(axis=0)
        if product.hidden is not None and hidden is not None:
            known = known & _clear_on(hidden, product.hidden, raster.grid)
        if product.classes is not None:
            physical, known = to_classes(raster.values, known, product.classes, file)
        else:
            offset = product.offset if item.offset is None else item.offset
            physical, known = to_physical(
                raster.values,
                known,
                modality,
                scales=[product.scale] * len(at),
                offsets=[offset] * len(at),
                linear_power=product.unit == LINEAR_POWER,
                out_of_range=product.out_of_range,
                where=file,
            )
        values[at], known = resample(physical, known, raster.grid, grid, modality)
        valid &= known
    return values, valid


def _read_bands(
    item: PinnedItem, bands: Sequence[str], grid: Grid, sign: Sign, patience: Patience
) -> Raster | None:
    """Bands of one file, which is opened once for all of them."""
    addresses = [split_band(item.assets[b]) for b in bands]
    numbers = [number for _, number in addresses]
    return read_window(addresses[0][0], sign, grid, bands=numbers, patience=patience)


def _clear_on(raster: Raster, hidden: Hidden, grid: Grid) -> NDArray[np.bool_]:
    """Where nothing is in the way, on another grid."""
    codes = raster.values[0]
    covered = np.isin(codes, hidden.classes)
    for bit in hidden.bits:
        covered |= (codes.astype(np.int64) >> bit & 1).astype(np.bool_)
    clear = raster.valid & ~covered
    _, known = warp(clear[None].astype(np.uint8), clear, raster.grid, grid, categorical=True)
    return known
