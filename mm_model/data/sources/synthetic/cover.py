"""What grows and stands on the ground: land cover, parcels, roads and buildings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from mm_model.data.sources.synthetic.noise import (
    F32,
    U32,
    Frame,
    Regions,
    fractal,
    hash_of,
    key,
    layered,
    noise,
    regions,
    smoothstep,
    unit,
    white,
)
from mm_model.data.sources.synthetic.terrain import Terrain, gradient


class Cover(IntEnum):
    """Covers that look different to some sensor; maps know fewer classes."""

    WATER = 0
    BROADLEAF = 1
    CONIFER = 2
    SHRUB = 3
    GRASS = 4
    CROP = 5
    ROOF = 6
    PAVED = 7
    YARD = 8
    BARE = 9
    ICE = 10
    WETLAND = 11
    MANGROVE = 12
    MOSS = 13


@dataclass(frozen=True)
class Ground:
    """The cover of a frame; all arrays are [H, W].

    Attributes:
        cover: `Cover` codes, uint8.
        parcel: hash of the field, block or region that a pixel belongs to.
        roof: hash of the building; means nothing elsewhere.
        height_m: of buildings and trees above the ground.
        grain: white noise in [0, 1), for texture.
        lush: how well plants grow, about 0 to 1.
        rows: the fine stripes along which a field is worked, -1 to 1.
    """

    cover: NDArray[np.uint8]
    parcel: U32
    roof: U32
    height_m: F32
    grain: F32
    lush: F32
    rows: F32


@dataclass(frozen=True)
class _Parcels:
    """A rotated, staggered grid in each region: `id` of the rectangle, metres to its border."""

    id: U32
    edge_m: F32
    centre_m: F32


def _parcels(seed: int, region: U32, u: F32, v: F32, width_m: F32, length_m: F32) -> _Parcels:
    across = u / width_m
    strip = np.floor(across)
    index = hash_of(seed, region, strip.astype(np.int32).view(np.uint32))
    # Each strip is shifted and stretched by itself, so that no long lines run through.
    along = v / (length_m * (0.6 + 0.8 * unit(index))) + unit(index, 3)
    lot = np.floor(along)
    own = hash_of(key(seed, 5), index, lot.astype(np.int32).view(np.uint32))
    fu, fv = across - strip, along - lot
    side = length_m * (0.6 + 0.8 * unit(index))
    edge = np.minimum(np.minimum(fu, 1 - fu) * width_m, np.minimum(fv, 1 - fv) * side)
    centre = np.hypot((fu - 0.5) * width_m, (fv - 0.5) * side)
    return _Parcels(own, edge.astype(np.float32), centre.astype(np.float32))


def ground(seed: int, frame: Frame, land: Terrain) -> Ground:
    """Cover of a frame, from nature to what people made of it."""
    patchy = fractal(key(seed, 21), frame, 1000, 6, 0.62)
    grain = unit(white(key(seed, 22), frame))
    slope = land.slope
    lush = land.moisture + 0.05 * patchy - 0.25 * slope + 0.12 * np.exp(-land.shore_m / 6)
    cover = _nature(seed, frame, land, patchy, grain, lush, slope)

    warp = (
        38 * noise(key(seed, 23), frame, 700),
        38 * noise(key(seed, 24), frame, 700),
    )
    region = regions(key(seed, 25), frame, 1150, warp)
    angle = unit(region.id, 4) * np.float32(np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = cos * region.dx + sin * region.dy, cos * region.dy - sin * region.dx
    temperate = smoothstep(2, 7, land.climate_c)
    fertile = temperate * smoothstep(0.22, 0.45, land.moisture)
    flat = smoothstep(0.3, 0.1, slope)

    field, rows = _fields(seed, cover, region, u, v, fertile * flat, patchy, land)
    roof, height, block = _towns(seed, frame, cover, region, (u, v), temperate * flat, land, grain)
    parcel = np.where(block == 0, field, block)
    _roads(seed, frame, cover, region, fertile * flat, land)
    forest = (cover == Cover.BROADLEAF) | (cover == Cover.CONIFER) | (cover == Cover.MANGROVE)
    height = np.where(forest, 9 + 5 * grain, height)
    height = np.where(cover == Cover.PAVED, np.float32(0), height)
    return Ground(cover, parcel, roof, height.astype(np.float32), grain, lush, rows)


def _nature(
    seed: int,
    frame: Frame,
    land: Terrain,
    patchy: F32,
    grain: F32,
    lush: F32,
    slope: F32,
) -> NDArray[np.uint8]:
    """Cover as if nobody lived here."""
    t = land.climate_c
    jitter = 0.5 * (grain - 0.5)
    trees = 4.2 * (lush - 0.5) + 0.55 * patchy + jitter - 2 * smoothstep(3.0, -3.0, t)
    cool = (t - 8) * 0.16 + 0.35 * noise(key(seed, 26), frame, 400) + 0.5 * jitter
    wood = np.where(cool > 0, np.uint8(Cover.BROADLEAF), np.uint8(Cover.CONIFER))
    barren = 5 * (0.27 - lush) + 0.35 * patchy + 0.3 * jitter
    barren += 3 * (slope - 0.75) * (slope > 0.5) + 1.6 * smoothstep(-3.5, -7.5, t)
    cover = np.full(frame.shape, np.uint8(Cover.GRASS))
    cover[trees > -0.55] = Cover.SHRUB
    cover[trees > -0.33] = Cover.GRASS
    cover[(lush < 0.47) & (patchy + jitter > -0.2) & (t > 6)] = Cover.SHRUB
    cover = np.where(trees > 0, wood, cover)
    moss = (t < 0.2 + 1.2 * patchy) & (trees <= 0)
    cover[moss] = Cover.MOSS
    cover[barren > 0] = Cover.BARE
    cover[(land.shore_m < 2.2 + patchy) & (land.elevation < 5) & (slope < 0.12)] = Cover.BARE
    swamp = (land.shore_m < 2.6 + 2 * patchy) & (land.moisture > 0.5) & (slope < 0.1)
    cover[swamp & (trees < 0.8)] = Cover.WETLAND
    tidal = (land.elevation < 8 + 4 * patchy) & (t > 15) & (land.moisture > 0.4)
    cover[tidal] = Cover.MANGROVE
    cover[t + 1.5 * patchy < -6] = Cover.ICE
    cover[land.water] = Cover.WATER
    return cover


def _fields(
    seed: int,
    cover: NDArray[np.uint8],
    region: Regions,
    u: F32,
    v: F32,
    arable: F32,
    patchy: F32,
    land: Terrain,
) -> tuple[U32, F32]:
    """Turn fertile land into parcels, in place; their hashes and the direction of work."""
    size = 75 + 190 * unit(region.id, 5) ** 2
    shape = 1.0 + 2.2 * unit(region.id, 6)
    pivots = (unit(region.id, 7) < 0.6) & (land.moisture < 0.45)
    size = np.where(pivots, np.float32(430), size)
    shape = np.where(pivots, np.float32(1), shape)
    parcels = _parcels(key(seed, 27), region.id, u, v, size, size * shape)
    use = unit(parcels.id, 8)
    wild = 0.8 + 0.35 * (unit(region.id, 9) - 0.5)
    open_land = (arable > wild * (0.55 + 0.35 * patchy)) & (patchy < 1.15)
    farmed = open_land & (cover != Cover.WATER) & (cover != Cover.WETLAND)
    farmed &= (land.shore_m > 1.0) & (cover != Cover.MANGROVE) & (cover != Cover.ICE)
    dry = land.moisture < 0.45
    circle = parcels.centre_m < 0.47 * size
    cropped = farmed & (use < np.where(dry, np.float32(0.8), np.float32(0.66)))
    cropped &= ~pivots | circle
    meadow = farmed & ~dry & (use >= 0.66) & (use < 0.9)
    cover[meadow] = Cover.GRASS
    cover[cropped] = Cover.CROP
    hedge = farmed & (parcels.edge_m < 7) & (unit(region.id, 10) < 0.35) & (size > 110) & ~dry
    cover[hedge] = np.where(
        (unit(parcels.id, 11) < 0.6)[hedge], np.uint8(Cover.BROADLEAF), np.uint8(Cover.GRASS)
    )
    margin = farmed & (parcels.edge_m < 4) & ~hedge
    cover[margin] = Cover.GRASS
    rows = np.sin(u * np.float32(2 * np.pi / 47) + 6 * use)
    return np.where(farmed, parcels.id, region.id), rows


def _towns(
    seed: int,
    frame: Frame,
    cover: NDArray[np.uint8],
    region: Regions,
    uv: tuple[F32, F32],
    livable: F32,
    land: Terrain,
    grain: F32,
) -> tuple[U32, F32, U32]:
    """Build towns and hamlets, in place; hashes of buildings, heights in m, hashes of blocks."""
    crowd = layered(
        key(seed, 30), frame, (9000, 1.0), (2600, 0.8), (600, 0.14), (300, 0.07), (150, 0.04)
    )
    hamlet = np.exp(-np.hypot(region.dx, region.dy) / 150)
    hamlet *= unit(region.id, 12) < 0.3
    hamlet *= 1 + 0.5 * noise(key(seed, 36), frame, 140)
    density = crowd - 1.45 + 2.0 * hamlet - 2.5 * (1 - livable)
    town = (density > 0) & (cover != Cover.WATER) & (cover != Cover.ICE)
    shape = frame.shape
    roof = np.zeros(shape, np.uint32)
    height = np.zeros(shape, np.float32)
    if not town.any():
        return roof, height, roof
    u, v = uv
    width = 70 + 50 * unit(region.id, 13)
    block = _parcels(key(seed, 33), region.id, u, v, width, width * 1.3)
    use = unit(block.id, 14)
    industry = use < 0.12
    park = (use > 0.9) | (block.edge_m < 0)
    lot_m = np.where(industry, np.float32(60), 22 + 8 * unit(block.id, 15))
    lots = _parcels(key(seed, 34), block.id, u, v, lot_m, lot_m)
    dense = np.clip(density, 0, 1)
    built = (unit(lots.id, 16) < 0.5 + 0.45 * dense) & (lots.edge_m > 3.0)
    street = block.edge_m < 6
    garden = np.where(grain + unit(lots.id, 17) < 0.75 - 0.5 * dense, Cover.BROADLEAF, Cover.YARD)
    made = np.where(built, np.uint8(Cover.ROOF), garden.astype(np.uint8))
    green = np.where(unit(block.id, 18) < 0.5, np.uint8(Cover.BROADLEAF), np.uint8(Cover.GRASS))
    made = np.where(park, green, made)
    made = np.where(street, np.uint8(Cover.PAVED), made)
    cover[town] = made[town]
    up = (4 + 5 * unit(lots.id, 19)) * (1 + 2.5 * dense * dense)
    height = np.where(town & (made == Cover.ROOF), up, height).astype(np.float32)
    style = hash_of(key(seed, 35), block.id, (lots.id & np.uint32(3)))
    return style, height, np.where(town, block.id, np.uint32(0))


def _roads(
    seed: int,
    frame: Frame,
    cover: NDArray[np.uint8],
    region: Regions,
    settled: F32,
    land: Terrain,
) -> None:
    """Highways along contours of a smooth field, country roads between regions; in place."""
    line = layered(key(seed, 40), frame, (5200, 1.0), (1300, 0.25))
    distance = np.abs(line) / (np.hypot(*gradient(line, frame.gsd_m)) + np.float32(1e-5))
    highway = (distance < 9) & (land.climate_c > -2) & (land.slope < 0.6) & ~land.sea
    country = (region.edge_m < 5.5) & (settled > 0.35) & (cover != Cover.WATER)
    cover[highway | country] = Cover.PAVED
