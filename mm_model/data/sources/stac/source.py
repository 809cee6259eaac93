"""Patches of places that a STAC catalogue has images of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from mm_model.data.patch import Layer, Patch, Unit
from mm_model.data.remote import PATIENT, Patience
from mm_model.data.sources.stac.lock import Lock, PinnedAcquisition, PinnedItem
from mm_model.data.sources.stac.places import Place, places_of
from mm_model.data.sources.stac.reading import read_layers
from mm_model.data.sources.stac.request import Product, load_request
from mm_model.data.sources.stac.search import pinned
from mm_model.data.sources.stac.signing import Signer
from mm_model.errors import ConfigError
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality

_TIMELESS = "timeless"


class StacSource:
    """A unit is one acquisition of one place, with what is timeless there.

    The catalogue is asked when units are first wanted, and only for places that the lock does not
    have; afterwards only files are read.

    Args:
        search: folder with search.yaml; the lock is written there.
        patch_px: side of a patch.
        gsd_m: size of a pixel, in metres.
        modalities: the active ones; what search.yaml says of others is not asked for.
        patience: with servers.

    Raises:
        ConfigError: search.yaml is wrong, or a place is no whole number of patches wide.
    """

    def __init__(
        self,
        search: Path,
        patch_px: int,
        gsd_m: float,
        modalities: Sequence[Modality],
        *,
        patience: Patience = PATIENT,
    ) -> None:
        self._patch_px, self._gsd_m, self._patience = patch_px, gsd_m, patience
        self._modalities = tuple(modalities)
        self._request = load_request(search, modalities)
        side_m = self._request.search.side_m
        patches = side_m / (patch_px * gsd_m)
        if abs(patches - round(patches)) > 1e-6 or not round(patches):
            raise ConfigError(
                f"{search}: side_m",
                got=f"{side_m:g}, which is {patches:.3g} patches of {patch_px} px at {gsd_m:g} m",
                allowed=f"a multiple of {patch_px * gsd_m:g}",
            )
        self._places = {place.name: place for place in places_of(self._request)}
        self._signer = Signer(self._request.catalogue.sign, patience)
        self._timeless: tuple[str, dict[str, Layer]] = ("", {})

    def units(self) -> Sequence[Unit]:
        """Sorted; asks the catalogue for what the lock does not have.

        Raises:
            ServiceError: the catalogue does not answer.
            DataError: it has nothing of a product.
        """
        return [Unit(key, self._fingerprint(key)) for key in sorted(self._acquisitions)]

    def read(self, unit: Unit) -> Iterator[Patch]:
        """The patches of an acquisition, row by row; each file is opened once.

        Raises:
            RasterError: a file cannot be used.
            ServiceError: a server does not deliver.
        """
        place, acquisition = self._acquisitions[unit.unit_id]
        grid, name = place.grid(self._gsd_m), self._request.catalogue_name
        layers = dict(self._timeless_layers(place, grid))
        for entry, items in (acquisition.images if acquisition else {}).items():
            layers |= self._read(entry, items, grid)
        size = self._patch_px
        for row, col in grid.subdivide(size):
            window = slice(row, row + size), slice(col, col + size)
            yield Patch(
                f"{name}/{unit.unit_id}/{row:05d}-{col:05d}",
                f"{name}/{place.name}",
                name,
                grid.window(row, col, size, size),
                self._gsd_m,
                {
                    m.name: Layer(
                        layers[m.name].values[:, *window],
                        layers[m.name].valid[window],
                        layers[m.name].acquired_at,
                        layers[m.name].native_gsd_m,
                    )
                    for m in self._modalities
                    if m.name in layers
                },
            )

    @cached_property
    def _lock(self) -> Lock:
        return pinned(self._request, list(self._places.values()), self._patience)

    @cached_property
    def _acquisitions(self) -> Mapping[str, tuple[Place, PinnedAcquisition | None]]:
        """Unit id → place, and what was taken there; None where only the timeless is known."""
        found: dict[str, tuple[Place, PinnedAcquisition | None]] = {}
        for name, place in self._places.items():
            pins = self._lock.places[name]
            for acquisition in pins.acquisitions:
                found[f"{name}/{acquisition.date}"] = place, acquisition
            if not pins.acquisitions and pins.timeless:
                found[f"{name}/{_TIMELESS}"] = place, None
        return found

    def _timeless_layers(self, place: Place, grid: Grid) -> Mapping[str, Layer]:
        """Read once for all acquisitions of a place, whose units follow one another."""
        if self._timeless[0] != place.name:
            layers: dict[str, Layer] = {}
            for entry, items in self._lock.places[place.name].timeless.items():
                layers |= self._read(entry, items, grid)
            self._timeless = place.name, layers
        return self._timeless[1]

    def _read(self, entry: str, items: Sequence[PinnedItem], grid: Grid) -> dict[str, Layer]:
        wanted = [m for m in self._modalities if self._request.layers.get(m.name) == entry]
        sign = self._signer.of(self._request.collections[entry].collection)
        product = self._request.products[entry]
        return read_layers(items, product, wanted, grid, sign, self._patience)

    def _fingerprint(self, unit_id: str) -> str:
        """Of the pinned items and of how they are read."""
        place, acquisition = self._acquisitions[unit_id]
        timeless = self._lock.places[place.name].timeless
        facts = {
            "acquisition": acquisition.model_dump(mode="json") if acquisition else None,
            "timeless": {e: [i.model_dump(mode="json") for i in v] for e, v in timeless.items()},
            "products": {e: _decoding(p) for e, p in self._request.products.items()},
            "layers": self._request.layers,
            "grid": [place.crs, place.grid(self._gsd_m).transform, place.side_m],
            "patch_px": self._patch_px,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _decoding(product: Product) -> object:
    return product.model_dump(mode="json", exclude={"licence", "attribution"}, by_alias=True)
