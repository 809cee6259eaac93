"""From one ground to what each kind of sensor sees of it, by quantity and band facts alone."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mm_model.data.sources.synthetic.cover import Cover, Ground
from mm_model.data.sources.synthetic.noise import (
    F32,
    Frame,
    fractal,
    hash_of,
    key,
    layered,
    smoothstep,
    unit,
    white,
)
from mm_model.data.sources.synthetic.spectra import (
    Material,
    backscatter,
    canopy_opacity,
    spectrum,
)
from mm_model.data.sources.synthetic.terrain import Terrain, latitude_of
from mm_model.errors import ConfigError
from mm_model.geo.sun import sun_position
from mm_model.modalities import WORLDCOVER, Band, Modality, Quantity

# Optical archives hold few scenes with the sun lower than this: no such day is drawn, and whoever
# renders one all the same gets a sun of this elevation instead of a night.
_LEAST_SUN_DEG = 10.0
_INCIDENCE = np.deg2rad(35)
_LOOKS = 4
_WORLDCOVER_CODES = np.array([80, 10, 10, 20, 30, 40, 50, 50, 50, 60, 70, 90, 95, 100], np.uint8)
_TREES = (Cover.BROADLEAF, Cover.CONIFER, Cover.MANGROVE)


@dataclass(frozen=True)
class Acquisition:
    """When and how a place is seen.

    Attributes:
        date: day of the pictures; it sets season and sun.
        seed: what a date leaves open: which crops grow, weather, speckle.
        wetness: of the soil, 0 to 1.
        wind: roughness of water, 0 to 1.
        looks_east: the radar's direction of view (else west).
    """

    date: dt.date
    seed: int = 0
    wetness: float = 0.3
    wind: float = 0.3
    looks_east: bool = True

    @classmethod
    def draw(cls, seed: int, latitude_deg: float = 0.0) -> Acquisition:
        """A random day of 2024 on which the sun is up at this latitude, with random weather."""
        chance = np.random.default_rng(seed)
        day, wet, wind, look = chance.random(4)
        while True:
            date = dt.date(2024, 1, 1) + dt.timedelta(days=int(day * 366))
            if sun_position(date, latitude_deg)[0] >= _LEAST_SUN_DEG:
                return cls(date, seed, float(wet), float(wind), bool(look < 0.5))
            day = chance.random()

    @property
    def summer(self) -> float:
        """1 in the middle of July, -1 in the middle of January."""
        return float(np.cos(2 * np.pi * (self.date.timetuple().tm_yday - 198) / 365.25))

    def sun(self, latitude_deg: float) -> tuple[float, float, float]:
        """Unit vector to the sun (east, north, up) at half past ten, above the horizon."""
        elevation_deg, azimuth_deg = sun_position(self.date, latitude_deg)
        elevation = math.radians(max(elevation_deg, _LEAST_SUN_DEG))
        azimuth, across = math.radians(azimuth_deg), math.cos(elevation)
        return across * math.sin(azimuth), across * math.cos(azimuth), math.sin(elevation)


class Sensors:
    """All sensors over one frame at one time; what they share is computed once.

    Args:
        seed: of the world.
        frame: pixel centres; the outermost `HALO` pixels of the result are not to be used.
    """

    HALO = 20
    """Pixels by which shadows, slopes and displaced echoes reach into their surroundings."""

    def __init__(
        self, seed: int, frame: Frame, land: Terrain, ground: Ground, when: Acquisition
    ) -> None:
        self.seed, self.frame, self.land, self.ground, self.when = seed, frame, land, ground, when

    def render(self, modality: Modality) -> NDArray[np.generic]:
        """[bands, H, W] in physical units (or class codes), inside the valid range.

        Raises:
            ConfigError: the modality has other classes than ESA WorldCover, or a band lacks the
                fact (wavelength, polarisation) that its quantity needs.
        """
        if modality.quantity is Quantity.LAND_COVER:
            if modality.classes != WORLDCOVER:
                raise ConfigError(
                    f"classes of {modality.name}",
                    got=modality.class_codes,
                    allowed="those of ESA WorldCover, for the synthetic source",
                )
            return _WORLDCOVER_CODES[self.ground.cover][None]
        draw = {
            Quantity.REFLECTANCE: self._reflectance,
            Quantity.BACKSCATTER: self._backscatter,
            Quantity.ELEVATION: self._elevation,
            Quantity.TEMPERATURE: self._temperature,
        }[modality.quantity]
        low, high = modality.valid_range
        out = np.empty((len(modality.bands), *self.frame.shape), np.float32)
        for target, band in zip(out, modality.bands, strict=True):
            needed = {
                Quantity.REFLECTANCE: band.center_nm,
                Quantity.BACKSCATTER: band.polarisation,
            }
            if needed.get(modality.quantity, "") is None:
                raise ConfigError(
                    f"band {band.name} of {modality.name}",
                    allowed="center_nm for reflectance, polarisation for backscatter",
                )
            np.clip(draw(band), low, high, out=target)
        return out

    @cached_property
    def _sun(self) -> tuple[F32, F32, F32]:
        """Unit vectors to the sun (east, north, up), each [H, 1]: of each row, so without seams."""
        rows = [self.when.sun(latitude) for latitude in latitude_of(self.frame.y).tolist()]
        east, north, up = np.array(rows, np.float32).T[:, :, None]
        return east, north, up

    # -- what the season made of the ground ---------------------------------------------------

    @cached_property
    def _air_c(self) -> F32:
        """Air temperature of the day, in °C."""
        swing = 11 - 0.2 * np.clip(self.land.climate_c, 0, 25)
        return np.asarray(self.land.climate_c + swing * self.when.summer, np.float32)

    @cached_property
    def _snow(self) -> F32:
        """Share of a pixel under snow, 0 to 1; it clings to shaded slopes and spares towns."""
        land, ground = self.land, self.ground
        east, north, _ = self._sun
        cold = -1.2 - self._air_c - 6 * (land.east * -east + land.north * -north)
        if float(cold.max()) < -6:
            return np.zeros(self.frame.shape, np.float32)
        cold += 0.9 * fractal(key(self.seed, 50), self.frame, 500, 4, 0.6) - 0.7 * ground.grain
        caught = np.full(len(Cover), 0.9, np.float32)
        caught[[Cover.BROADLEAF, Cover.CONIFER, Cover.MANGROVE, Cover.SHRUB]] = 0.55, 0.3, 0, 0.8
        caught[[Cover.PAVED, Cover.ROOF, Cover.YARD]] = 0.25, 0.75, 0.8
        caught[[Cover.WATER, Cover.ICE]] = 0, 0.9
        frozen = (ground.cover == Cover.WATER) & (self._air_c < -6) & ~land.sea
        share = np.where(frozen, np.float32(0.8), caught[ground.cover])
        return smoothstep(-0.6, 1.2, cold) * share

    @cached_property
    def _state(self) -> tuple[F32, F32, NDArray[np.uint8], F32, NDArray[np.uint8]]:
        """Leaf area, share of dry leaves, ground material, brightness, leaf material."""
        ground, land, when = self.ground, self.land, self.when
        cover, grain, air = ground.cover, ground.grain, self._air_c
        parcel = hash_of(key(self.seed, 51, when.seed), ground.parcel)
        lot = unit(parcel)
        warm = smoothstep(3, 15, air)
        drought = smoothstep(0.5, 0.2, ground.lush) * smoothstep(12, 24, air)

        # Leaf area of full summer, share of it that stays in winter, and how much may dry out.
        table = np.zeros((len(Cover), 3), np.float32)
        table[Cover.BROADLEAF] = 4.2, 0.22, 0.35
        table[Cover.CONIFER] = 3.6, 0.95, 0.05
        table[Cover.SHRUB] = 1.3, 0.5, 0.7
        table[Cover.GRASS] = 1.9, 0.45, 0.95
        table[Cover.YARD] = 0.9, 0.5, 0.5
        table[Cover.BARE] = 0.06, 0.5, 0.9
        table[Cover.WETLAND] = 2.2, 0.3, 0.6
        table[Cover.MANGROVE] = 3.8, 1.0, 0.0
        table[Cover.MOSS] = 0.5, 0.5, 0.8
        full, kept, dries = (table[:, i][cover] for i in range(3))
        area = full * (kept + (1 - kept) * warm) * (0.55 + 0.6 * np.clip(ground.lush, 0, 1.2))
        late = float(smoothstep(0.1, 0.5, np.array(1 - abs(when.summer)))) * (when.date.month > 6)
        autumn = late * smoothstep(21, 13, land.climate_c)  # woods that know no winter do not turn
        dry = dries * np.maximum(drought, (1 - warm) * 0.75)
        turning = 0.7 * autumn * (0.4 + 0.6 * unit(ground.parcel, 52))
        dry = np.where(cover == Cover.BROADLEAF, dries * (0.5 * (1 - warm)) + turning, dry)
        dry = np.where(cover == Cover.GRASS, dry * (0.5 + 0.5 * lot), dry)

        crop = cover == Cover.CROP
        leaf = np.full(self.frame.shape, np.uint8(Material.GRASS_LEAF))
        for wood in (Cover.BROADLEAF, Cover.MANGROVE):
            leaf[cover == wood] = Material.BROAD_LEAF
        leaf[cover == Cover.CONIFER] = Material.NEEDLE
        if crop.any():
            # Position in the plant's own year: 0 sown, .5 at full height, .8 ripe, over 1 fallow.
            kind = unit(parcel, 53)
            start = np.where(kind < 0.55, np.float32(-20), 115 + 30 * unit(parcel, 54))
            length = np.where(kind < 0.55, np.float32(225), np.float32(150))
            day = when.date.timetuple().tm_yday - 6 * (land.climate_c - 11)
            age = (day - start + 20 * lot) / length
            age = np.where(land.climate_c > 20, unit(parcel, 55) * 1.3, age)
            grown = smoothstep(0.1, 0.55, age) * smoothstep(1.03, 0.97, age)
            tilled = unit(parcel, 56)
            area = np.where(crop, 3.6 * grown * (0.7 + 0.4 * lot) + 0.05, area)
            ripe = smoothstep(0.68, 0.9, age)
            stubble = smoothstep(0.97, 1.03, age) * (tilled < 0.45)
            area = np.where(crop & (stubble > 0.5), 0.8 * (0.5 + lot), area)
            dry = np.where(crop, np.maximum(ripe, stubble), dry)
            bloom = crop & (kind < 0.12) & (age > 0.55) & (age < 0.7)
            leaf[bloom] = Material.FLOWER

        material = self._materials()
        patch = fractal(key(self.seed, 57), self.frame, 700, 4, 0.7)
        bright = (
            1 + np.where(crop, np.float32(0.05), np.float32(0.11)) * patch + 0.18 * (grain - 0.5)
        )
        wet = when.wetness * 0.35
        bright *= np.where(cover >= Cover.ROOF, np.float32(1), 1.08 - wet - 0.2 * (lot - 0.5))
        bright += np.where(crop, 0.06 * ground.rows, 0)
        bright = np.where(cover == Cover.ROOF, 0.7 + 0.6 * unit(ground.roof, 58), bright)
        bright = np.where(cover == Cover.WATER, np.float32(1), bright)
        gaps = 1 + 0.45 * (grain - 0.5) * (full > 3)
        return (
            np.asarray(area * gaps, np.float32),
            np.clip(dry, 0, 1).astype(np.float32),
            material,
            bright.astype(np.float32),
            leaf,
        )

    def _materials(self) -> NDArray[np.uint8]:
        """What lies under, or instead of, plants."""
        ground, land = self.ground, self.land
        sandy = layered(key(self.seed, 59), self.frame, (6000, 1.0), (300, 0.25))
        soil = np.full(self.frame.shape, np.uint8(Material.BROWN_SOIL))
        soil[(land.moisture < 0.4) & (sandy > -0.2)] = Material.PALE_SAND
        soil[(land.climate_c > 18) & (sandy <= -0.2)] = Material.RED_SOIL
        cover = ground.cover
        out = soil
        bare = cover == Cover.BARE
        out[bare & ((land.slope > 0.3) | (land.climate_c < 4))] = Material.ROCK
        out[bare & (land.elevation < 5)] = Material.PALE_SAND
        out[cover == Cover.WATER] = Material.CLEAR_WATER
        out[cover == Cover.PAVED] = Material.ASPHALT
        out[cover == Cover.YARD] = Material.CONCRETE
        out[cover == Cover.ICE] = Material.ICE
        out[cover == Cover.MOSS] = Material.LICHEN
        roofs = np.array(
            [Material.RED_ROOF, Material.RED_ROOF, Material.GREY_ROOF, Material.WHITE_ROOF],
            np.uint8,
        )
        roof = cover == Cover.ROOF
        out[roof] = roofs[(unit(ground.roof[roof], 61) * 3.35).astype(np.int64)]
        return out

    @cached_property
    def _turbid(self) -> F32:
        """Share of turbid water, 0 to 1."""
        cloudiness = layered(key(self.seed, 62), self.frame, (4000, 0.45), (700, 0.15))
        cloudiness += 0.75 - self.land.depth
        return np.clip(cloudiness, 0, 1).astype(np.float32)

    @cached_property
    def _light(self) -> F32:
        """Illumination relative to level, sunlit ground: Lambert, cast shadow, sky."""
        east, north, up = self._sun
        land, ground, gsd = self.land, self.ground, self.frame.gsd_m
        surface = land.elevation + ground.height_m
        down, right = np.gradient(surface, np.float32(gsd))
        lit = np.clip(up - 0.6 * (east * right - north * down), 0, None)
        lit /= np.sqrt(1 + 0.36 * (right * right + down * down)) * up
        across = np.hypot(east, north)
        rise = up / across * np.float32(gsd)
        shade = np.full(self.frame.shape, -np.inf, np.float32)
        height, width = self.frame.shape
        row, col = np.arange(height)[:, None], np.arange(width)
        for step in (1, 2, 3, 5, 8, 12, 17):
            down_px = np.rint(-north / across * step).astype(np.int64)
            right_px = np.rint(east / across * step).astype(np.int64)
            toward = surface[(row + down_px) % height, (col + right_px) % width] - rise * step
            np.maximum(shade, toward, out=shade)
        sunlit = smoothstep(3.0, -1.0, shade - surface)
        sky = 0.22 + 0.1 * (1 - up)
        light = sky + (1 - sky) * lit * sunlit
        return np.where(land.water, np.float32(1), np.minimum(light, 1.45)).astype(np.float32)

    # -- sensors ------------------------------------------------------------------------------

    def _reflectance(self, band: Band) -> F32:
        area, dry, material, bright, leaf = self._state
        of = spectrum(band)
        base = of[material] * bright
        turbid = (of[Material.TURBID_WATER] - of[Material.CLEAR_WATER]) * self._turbid
        base += np.where(self.land.water, turbid + np.float32(0.004 * self.when.wind), 0)
        plants = of[leaf]
        plants += dry * (of[Material.STRAW] - plants)
        hidden = 1 - np.exp(np.float32(-canopy_opacity(band)) * area)
        base += hidden * (plants * (0.9 + 0.2 * bright - 0.1) - base)
        base += self._snow * (of[Material.SNOW] * 0.8 - base)
        base *= self._light
        return base

    def _backscatter(self, band: Band) -> F32:
        ground, land, when = self.ground, self.land, self.when
        polarisation = band.polarisation or ""
        crossed = polarisation[0] != polarisation[-1]
        cover = ground.cover
        db = backscatter(polarisation)[cover]
        parcel = unit(hash_of(key(self.seed, 63, when.seed), ground.parcel))
        db += np.where(cover == Cover.CROP, 6 * (parcel - 0.5), 0)
        soil = (cover == Cover.CROP) | (cover == Cover.GRASS) | (cover == Cover.BARE)
        db += np.where(soil, np.float32(4 * (when.wetness - 0.4)), 0)
        if not crossed:
            db += np.where(cover == Cover.WATER, np.float32(7 * (when.wind - 0.4)), 0)
        db += np.where(cover == Cover.BARE, 7 * smoothstep(0.05, 0.5, land.slope), 0)
        # Walls and street make a corner that sends the pulse straight back, for flat walls only
        # when they face the radar; that is drawn by building.
        corner = 8 * (unit(ground.roof, 64) - 0.35) + 0.25 * ground.height_m
        db += np.where(cover == Cover.ROOF, corner if not crossed else 0.5 * corner, 0)

        toward = 1.0 if when.looks_east else -1.0
        rise = land.east * toward  # ground that rises away from the radar faces it
        # Sine and cosine of the local incidence, without the angle: slopes that face the radar
        # are squeezed into few pixels and look bright.
        tangent = np.float32(np.tan(_INCIDENCE))
        squeezed = tangent / np.maximum(tangent - rise, np.float32(0.12))
        facing = np.maximum(1 + rise * tangent, np.float32(0.03))
        power = np.exp(np.float32(0.1 * np.log(10)) * db) * squeezed * facing
        tall = np.where(ground.height_m > 9, power, 0)
        # Layover: what stands high is drawn a pixel nearer to the radar.
        power += 0.35 * np.roll(tall, -round(toward), axis=1)
        product = np.ones(self.frame.shape, np.float32)
        salt = sum(polarisation.encode())
        for look in range(_LOOKS // 2):
            h = white(key(self.seed, 65, when.seed, salt, look), self.frame)
            product *= ((h >> np.uint32(16)).astype(np.float32) + 0.5) * np.float32(2**-16)
            product *= ((h & np.uint32(0xFFFF)).astype(np.float32) + 0.5) * np.float32(2**-16)
        speckle = -np.log(product) / _LOOKS  # the mean of exponential variates: gamma
        noise_floor = np.float32(10 ** (-3.1))
        decibels = np.float32(10 / np.log(10)) * np.log(power * speckle + noise_floor)
        return np.asarray(decibels, np.float32)

    def _elevation(self, band: Band) -> F32:
        return self.land.elevation

    def _temperature(self, band: Band) -> F32:
        cover = self.ground.cover
        area, dry, *_ = self._state
        up = self._sun[2]
        heat = np.full(len(Cover), 16.0, np.float32)
        heat[[Cover.ROOF, Cover.PAVED, Cover.YARD]] = 19, 21, 17
        heat[[Cover.WATER, Cover.ICE, Cover.WETLAND]] = -1, -6, 6
        cooling = 10 * (1 - np.exp(-0.7 * area)) * (1 - dry)
        kelvin = 273.15 + self._air_c + up * (heat[cover] * self._light - cooling)
        kelvin += (0.4 * (self.ground.grain - 0.5)).astype(np.float32)
        cold = np.minimum(kelvin, 273.15 + np.minimum(self._air_c, 0))
        return np.asarray(kelvin + self._snow * (cold - kelvin), np.float32)
