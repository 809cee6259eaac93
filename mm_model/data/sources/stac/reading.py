"""Pinned items to layers: windows over HTTP, clouds into the mask, numbers into physical units."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.data.align import resample, to_classes, to_physical
from mm_model.data.georeference import ground_sampling_m
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
# rasterio silences a warning while it warps, for the whole process: threads would undo it.
_ONE_WARPS = threading.Lock()
# A band as stored [H, W] and the file it is from; None where that does not reach the place.
Stored = tuple[NDArray[Any], Raster] | None
_CLEAR_GSD_M = 60.0  # at which clouds over a place are counted


def clear_share(
    items: Sequence[PinnedItem], product: Product, place: Place, sign: Sign, patience: Patience
) -> float:
    """The share of a place that the items show, 0 to 1."""
    assert product.hidden is not None
    grid = place.grid(_CLEAR_GSD_M)
    seen = np.zeros(grid.shape, np.bool_)
    for item in items:
        address, number = split_band(item.assets[product.hidden.band])
        raster = read_window(address, sign, grid, bands=[number], patience=patience)
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

    All windows are fetched at once, each file opened once; then they are computed one by one.

    Raises:
        RasterError: a file cannot be used; the message names it.
        ServiceError: a server does not deliver.
    """
    needed = [b for m in modalities for b in product.layers[m.name]]
    needed += [product.hidden.band] if product.hidden is not None else []
    files: dict[str, set[int]] = {}
    for item in items:
        for band in needed:
            address, number = split_band(item.assets[band])
            files.setdefault(address, set()).add(number)

    def read(address: str) -> Raster | None:
        return read_window(address, sign, grid, bands=sorted(files[address]), patience=patience)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        windows = dict(zip(files, pool.map(read, files), strict=True))

    def stored(item: PinnedItem, band: str) -> Stored:
        address, number = split_band(item.assets[band])
        raster = windows[address]
        if raster is None:
            return None
        return raster.values[sorted(files[address]).index(number)], raster

    out: dict[str, Layer] = {}
    for modality in modalities:
        values, valid = _layer(items[0], product, modality, grid, stored)
        for item in items[1:]:
            more, known = _layer(item, product, modality, grid, stored)
            fresh = known & ~valid
            values, valid = np.where(fresh, more, values), valid | fresh
        date = None if product.timeless else items[0].datetime[:10]
        out[modality.name] = Layer(
            values, valid, date, _native_gsd_m(product, modality, items, stored)
        )
    return out


def _layer(
    item: PinnedItem,
    product: Product,
    modality: Modality,
    grid: Grid,
    stored: Callable[[PinnedItem, str], Stored],
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """One modality of one item: [bands, H, W] on the grid, and which pixels are known in all."""
    bands = product.layers[modality.name]
    values = np.zeros((len(bands), *grid.shape), modality.dtype)
    nothing = values, np.zeros(grid.shape, np.bool_)
    hidden: Raster | None = None
    if product.hidden is not None:
        found = stored(item, product.hidden.band)
        if found is None:
            return nothing
        hidden = replace(found[1], values=found[0][None])
    # Bands of one file go on together: they share grid and mask.
    by_file: dict[str, list[int]] = {}
    for k, band in enumerate(bands):
        by_file.setdefault(split_band(item.assets[band])[0], []).append(k)
    valid = np.ones(grid.shape, np.bool_)
    for file, at in by_file.items():
        parts = [part for k in at if (part := stored(item, bands[k])) is not None]
        if not parts:
            return nothing
        numbers, raster = np.stack([part for part, _ in parts]), parts[0][1]
        known = raster.valid
        for nodata in product.nodata:
            known = known & (numbers != nodata).all(axis=0)
        if product.hidden is not None and hidden is not None:
            known = known & _clear_on(hidden, product.hidden, raster.grid)
        if product.classes is not None:
            physical, known = to_classes(numbers, known, product.classes, file)
        else:
            scale, offset = _decoding(item, product)
            physical, known = to_physical(
                numbers,
                known,
                modality,
                scales=[scale] * len(at),
                offsets=[offset] * len(at),
                linear_power=product.unit == LINEAR_POWER,
                out_of_range=product.out_of_range,
                where=file,
            )
        values[at], known = resample(physical, known, raster.grid, grid, modality)
        valid = valid & known
    return values, valid


def _native_gsd_m(
    product: Product,
    modality: Modality,
    items: Sequence[PinnedItem],
    stored: Callable[[PinnedItem, str], Stored],
) -> float | None:
    """The coarsest of a layer's files; None where no file reaches the place."""
    if product.native_gsd_m is not None:
        return product.native_gsd_m
    found = [stored(item, band) for item in items for band in product.layers[modality.name]]
    sampled = [ground_sampling_m(raster.grid) for _, raster in filter(None, found)]
    return max((gsd_m for gsd_m in sampled if gsd_m is not None), default=None)


def _decoding(item: PinnedItem, product: Product) -> tuple[float, float]:
    """Scale and offset of an item's numbers."""
    offset = product.offset if item.offset is None else item.offset
    if item.sun_elevation is None:
        return product.scale, offset
    overhead = math.sin(math.radians(item.sun_elevation))
    return product.scale / overhead, offset / overhead


def _clear_on(raster: Raster, hidden: Hidden, grid: Grid) -> NDArray[np.bool_]:
    """Where nothing is in the way, on another grid."""
    codes = raster.values[0]
    covered = np.isin(codes, hidden.classes)
    for bit in hidden.bits:
        covered |= (codes.astype(np.int64) >> bit & 1).astype(np.bool_)
    clear = raster.valid & ~covered
    with _ONE_WARPS:
        _, known = warp(clear[None].astype(np.uint8), clear, raster.grid, grid, categorical=True)
    return known
