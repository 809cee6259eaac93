"""Relief, water and climate of the synthetic Earth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mm_model.data.sources.synthetic.noise import (
    F32,
    F64,
    Frame,
    fractal,
    key,
    layered,
    smoothstep,
)

_LAPSE_K_PER_M = 0.0065
_M_PER_DEGREE = 110_574


@dataclass(frozen=True)
class Terrain:
    """The ground without what grows or stands on it; all arrays are [H, W].

    Attributes:
        elevation: metres above the sea; of the surface where there is water.
        east, north: slope, as metres up a metre.
        water: rivers, lakes and the sea.
        shore_m: how far the surface lies above the nearest water level, in metres.
        river_m: distance from the middle of the nearest valley line, in metres.
        climate_c: mean temperature of the year, in °C.
        moisture: 0 (desert) to 1 (rain forest).
        depth: 0 at the shore to 1 in open water; means nothing on land.
    """

    elevation: F32
    east: F32
    north: F32
    water: NDArray[np.bool_]
    shore_m: F32
    river_m: F32
    climate_c: F32
    moisture: F32
    depth: F32
    sea: NDArray[np.bool_]

    @cached_property
    def slope(self) -> F32:
        """Steepness, as metres up a metre."""
        return np.sqrt(self.east * self.east + self.north * self.north)


def latitude_of(northing_m: float | F64) -> F64:
    """Latitude of northings in the plane's UTM zone, in °, -90 to 90.

    Of the northing alone, as if a degree were as long everywhere as at the equator: less than half
    a degree off, which neither sun nor climate shows.
    """
    return np.asarray(np.clip(northing_m / _M_PER_DEGREE, -90, 90), np.float64)


def gradient(field: F32, gsd_m: float) -> tuple[F32, F32]:
    """Rise a metre eastwards and northwards; exact but for the outermost pixels."""
    down, right = np.gradient(field, np.float32(gsd_m))
    return np.asarray(right, np.float32), np.asarray(-down, np.float32)


def terrain(seed: int, frame: Frame) -> Terrain:
    """The ground of a frame."""
    gsd = frame.gsd_m

    def field(salt: int, *octaves: tuple[float, float]) -> F32:
        return layered(key(seed, salt), frame, *((km * 1000, size) for km, size in octaves))

    plateau = 140 + field(1, (70, 125), (18, 45), (5, 12))
    ruggedness = field(4, (45, 0.75), (13, 0.5))
    relief = 14 + 42 * np.exp(np.clip(1.05 * ruggedness, -3, 1.9)).astype(np.float32)
    moisture = 0.6 + field(6, (60, 0.19), (11, 0.1))

    course = fractal(key(seed, 8), frame, 3000, 6, 0.45)
    river_m = np.abs(course) / (np.hypot(*gradient(course, gsd)) + np.float32(2e-4))
    height = course * course
    height /= height + np.float32(0.3)  # flat valley floors, then slopes
    detail = fractal(key(seed, 9), frame, 1300, 6, 0.52)
    # Gullies: a crease wherever a field crosses zero, as running water cuts them.
    gullies = np.abs(field(10, (1, 1)))
    gullies += 0.5 * np.abs(field(16, (0.42, 1)))
    elevation = height * (0.55 + 0.45 * gullies + 0.25 * detail) + 0.05 * detail
    elevation *= relief

    basin = fractal(key(seed, 11), frame, 2400, 5, 0.5)
    wet = smoothstep(0.3, 0.75, moisture)
    hollow = basin - (2.5 - 0.85 * wet - field(12, (25, 0.35))) - height * relief / 70
    elevation -= 30 * np.clip(hollow + 0.15, 0, None)

    width = (38 + field(13, (22, 26))) * (0.4 + 0.8 * wet)
    river = (river_m < 0.5 * width) & (width > 9)
    level = np.maximum(plateau, 0)
    above = elevation + np.minimum(plateau, 0)
    sea = (above < 0) & (plateau < 0)
    water = river | (hollow > 0) | sea
    above = np.where(water, np.float32(0), np.maximum(above, np.float32(0.3)))
    depth = np.where(
        sea, -0.06 * (plateau + elevation), np.maximum(hollow * 3, 0.7 - river_m / (width + 1))
    )
    surface = (level + above).astype(np.float32)
    east, north = gradient(surface, gsd)
    # At usual elevations about 26 °C near 8° N and -2 °C near 70° N, give or take a region's luck.
    sea_level = (31.5 - 0.45 * latitude_of(frame.y)).astype(np.float32)[:, None]
    climate = sea_level + field(14, (80, 3.2), (17, 2)) - _LAPSE_K_PER_M * 1.6 * surface
    return Terrain(
        elevation=surface,
        east=east,
        north=north,
        water=water,
        shore_m=above.astype(np.float32),
        river_m=river_m.astype(np.float32),
        climate_c=climate.astype(np.float32),
        moisture=np.clip(moisture, 0, 1).astype(np.float32),
        depth=np.clip(depth, 0, 1).astype(np.float32),
        sea=sea,
    )
