"""The synthetic Earth as a source of patches."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mm_model.config import SyntheticConfig
from mm_model.data.patch import Layer, Patch, Unit
from mm_model.data.sources.synthetic.cover import ground
from mm_model.data.sources.synthetic.noise import Frame, fractal, key
from mm_model.data.sources.synthetic.sensors import Acquisition, Sensors
from mm_model.data.sources.synthetic.terrain import latitude_of, terrain
from mm_model.errors import ConfigError
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality, Quantity

CRS = "EPSG:32633"
_VERSION = 3  # to be raised whenever the same parameters give other pixels
_NAME = "synthetic"
# Places lie on a lattice over the part of the UTM zone where its coordinates mean something.
_SPACING_M = 25_000
_COLS, _ROWS = 24, 280
_WEST, _NORTH = 200_000, 7_900_000
_MOVED_BY_TIME = {Quantity.REFLECTANCE, Quantity.BACKSCATTER, Quantity.TEMPERATURE}
_BLOCKED_BY_CLOUDS = {Quantity.REFLECTANCE, Quantity.TEMPERATURE}


def render(
    seed: int, grid: Grid, modalities: Sequence[Modality], when: Acquisition
) -> dict[str, Layer]:
    """What each modality shows of a part of the plane, whole and cloudless.

    Args:
        seed: of the world.
        grid: north up, square pixels, in metres; any position and shape. Two grids that share
            pixels give the same values there.
        modalities: what to render.
        when: date, weather and view.

    Raises:
        ConfigError: the grid is turned or not square, or a modality cannot be rendered.
    """
    gsd, turned, _, turned_too, down, _ = grid.transform
    if turned or turned_too or gsd <= 0 or down != -gsd:
        raise ConfigError(
            "grid of the synthetic Earth", got=grid.transform, allowed="north up, square pixels"
        )
    halo = Sensors.HALO
    frame = Frame.of(grid, halo)
    land = terrain(seed, frame)
    sensors = Sensors(seed, frame, land, ground(seed, frame, land), when)
    inside = slice(halo, -halo)
    date = when.date.isoformat()
    return {
        m.name: Layer(
            np.ascontiguousarray(sensors.render(m)[:, inside, inside]),
            np.ones(grid.shape, np.bool_),
            date if m.quantity in _MOVED_BY_TIME else None,
            gsd,
        )
        for m in modalities
    }


@dataclass(frozen=True)
class _Place:
    """One place of the source: where, when, and what of it is known."""

    name: str
    grid: Grid
    when: Acquisition
    modalities: tuple[Modality, ...]


class SyntheticSource:
    """Patches of the synthetic Earth, with gaps as in life.

    Args:
        config: seed, number of places and patches.
        patch_px: side of a patch, in pixels.
        gsd_m: side of a pixel, in metres.
        modalities: the active ones.
        finest_gsd_m: the distance at which `config` counts patches and at which places begin on
            whole pixels, so that sources that differ in `gsd_m` alone show the same ground on the
            same day; `gsd_m` where it is not given.

    Raises:
        ConfigError: the places are more or larger than the plane has room for, or no whole number
            of patches wide.
    """

    def __init__(
        self,
        config: SyntheticConfig,
        patch_px: int,
        gsd_m: float,
        modalities: Sequence[Modality],
        *,
        finest_gsd_m: float | None = None,
    ) -> None:
        self._config, self._patch_px, self._gsd_m = config, patch_px, gsd_m
        self._modalities = tuple(modalities)
        self._finest_gsd_m = finest_gsd_m or gsd_m
        side_m = patch_px * self._finest_gsd_m * round(config.patches_per_place**0.5)
        patches = side_m / (patch_px * gsd_m)
        self._side_px = patch_px * round(patches)
        if abs(patches - round(patches)) > 1e-6 or not self._side_px:
            raise ConfigError(
                "ground sampling distance of the synthetic source",
                got=f"{gsd_m:g} m: a place of {side_m:g} m is {patches:.3g} patches wide",
                allowed="one at which a place is a whole number of patches wide",
                remedy="change prepare.gsd_m or prepare.synthetic.patches_per_place",
            )
        if config.places > _COLS * _ROWS or side_m > 0.8 * _SPACING_M:
            raise ConfigError(
                "size of the synthetic source",
                got=f"{config.places} places of {side_m:.0f} m",
                allowed=f"{_COLS * _ROWS} places of {0.8 * _SPACING_M:.0f} m",
            )
        self._places = {p.name: p for p in self._draw_places()}

    def units(self) -> Sequence[Unit]:
        """One unit a place, sorted."""
        return [Unit(name, self._fingerprint(place)) for name, place in self._places.items()]

    def read(self, unit: Unit) -> Iterator[Patch]:
        """The patches of a place, row by row; the place is rendered once, as a whole."""
        place = self._places[unit.unit_id]
        layers = self._with_gaps(
            place, render(self._config.seed, place.grid, place.modalities, place.when)
        )
        size = self._patch_px
        for row, col in place.grid.subdivide(size):
            window = slice(row, row + size), slice(col, col + size)
            yield Patch(
                patch_id=f"{place.name}-{row // size:02d}-{col // size:02d}",
                place_id=place.name,
                source=_NAME,
                grid=place.grid.window(row, col, size, size),
                gsd_m=self._gsd_m,
                layers={
                    name: Layer(
                        layer.values[:, *window].copy(),
                        layer.valid[window].copy(),
                        layer.acquired_at,
                        layer.native_gsd_m,
                    )
                    for name, layer in layers.items()
                },
            )

    def _draw_places(self) -> Iterator[_Place]:
        config = self._config
        rng = np.random.default_rng(config.seed)
        # A prefix of one fixed order: more places leave the first ones where they are.
        cells = rng.permutation(_COLS * _ROWS)[: config.places]
        complete = set(
            rng.permutation(config.places)[: round(config.complete_share * config.places)].tolist()
        )
        count = len(self._modalities)
        subsets = [s for k in range(2, count) for s in itertools.combinations(self._modalities, k)]
        # Every subset equally often, so that every pair of modalities occurs together.
        order = rng.permutation(len(subsets))
        incomplete = 0
        for index, cell in enumerate(cells.tolist()):
            kept = self._modalities
            if index not in complete and subsets:
                kept = subsets[order[incomplete % len(subsets)]]
                incomplete += 1
            gsd, finest, side = self._gsd_m, self._finest_gsd_m, self._side_px
            # Snapped to whole pixels of the plane.
            x = round((_WEST + cell % _COLS * _SPACING_M) / finest) * finest
            y = round((_NORTH - cell // _COLS * _SPACING_M) / finest) * finest
            yield _Place(
                name=f"{_NAME}-{index:05d}",
                grid=Grid(CRS, (gsd, 0.0, float(x), 0.0, -gsd, float(y)), side, side),
                when=Acquisition.draw(key(config.seed, index, 1), float(latitude_of(y))),
                modalities=kept,
            )

    def _fingerprint(self, place: _Place) -> str:
        facts = {
            "version": _VERSION,
            "seed": self._config.seed,
            "patch_px": self._patch_px,
            "grid": [place.grid.transform, place.grid.shape],
            "when": str(place.when),
            "modalities": [m.to_dict() for m in place.modalities],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _with_gaps(self, place: _Place, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        """Clouds over what sees light, and the edge of a swath over what is radar."""
        seed = place.when.seed
        chance = np.random.default_rng([seed, 2])
        cloudy, edged, angle, offset = chance.random(4)
        frame = Frame.of(place.grid)
        gaps: dict[Quantity, tuple[NDArray[np.bool_], dict[str, float]]] = {}
        if cloudy < 0.25:
            cloud = fractal(key(seed, 3), frame, 1800, 5) > 1.3 - 2.0 * cloudy
            looks = {Quantity.REFLECTANCE: 0.8, Quantity.TEMPERATURE: 255.0}
            for quantity in _BLOCKED_BY_CLOUDS:
                gaps[quantity] = cloud, {"fill": looks[quantity]}
        if edged < 0.1:
            x = (np.arange(place.grid.width) + 0.5) / place.grid.width - 0.5
            y = (np.arange(place.grid.height) + 0.5) / place.grid.height - 0.5
            tilt = 0.2 + 0.2 * angle  # orbits are tilted against the meridian
            beyond = x + tilt * y[:, None] > 0.1 + 0.3 * offset
            gaps[Quantity.BACKSCATTER] = beyond, {"fill": -30.0}
        out = dict(layers)
        for modality in place.modalities:
            if modality.quantity in gaps:
                hidden, look = gaps[modality.quantity]
                layer = layers[modality.name]
                out[modality.name] = replace(
                    layer,
                    values=np.where(hidden, np.float32(look["fill"]), layer.values),
                    valid=layer.valid & ~hidden,
                )
        return out
