"""Patch: a co-registered window of every modality that a place has, in physical units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mm_model.errors import DataError
from mm_model.geo.grid import Grid


@dataclass(frozen=True)
class Layer:
    """One modality of a patch.

    Attributes:
        values: [bands, H, W], float32 in physical units or uint8 class codes; what an invalid pixel
            holds means nothing.
        valid: bool [H, W].
        acquired_at: ISO 8601 date of acquisition, or None where it is not known or means nothing.
        native_gsd_m: ground sampling distance at which the values were measured, in metres, before
            they were brought onto the patch's grid; None where it is not known.
    """

    values: NDArray[np.generic]
    valid: NDArray[np.bool_]
    acquired_at: str | None = None
    native_gsd_m: float | None = None

    def __post_init__(self) -> None:
        if (
            self.values.ndim != 3
            or self.valid.dtype != np.bool_
            or self.values.shape[1:] != self.valid.shape
        ):
            raise DataError(
                "layer",
                got=f"values {self.values.shape}, valid {self.valid.dtype} {self.valid.shape}",
                allowed="values [bands, H, W] and valid bool [H, W]",
            )


@dataclass(frozen=True)
class Patch:
    """A window of the ground.

    Attributes:
        patch_id: unique in a store, stable from run to run.
        place_id: what a split keeps together; patches of one place lie side by side or are dates
            of one ground.
        source: name of the data set it comes from.
        grid: the one grid that all layers share.
        gsd_m: ground sampling distance, in metres.
        layers: modality name → Layer; an absent modality has no key.
    """

    patch_id: str
    place_id: str
    source: str
    grid: Grid
    gsd_m: float
    layers: Mapping[str, Layer]

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            if layer.valid.shape != self.grid.shape:
                raise DataError(
                    f"layer {name} of patch {self.patch_id}",
                    got=layer.valid.shape,
                    allowed=self.grid.shape,
                )


@dataclass(frozen=True)
class Unit:
    """A piece of preparation that fits in memory: usually a place.

    Attributes:
        unit_id: unique and sortable; the order of a store is the order of its unit ids.
        fingerprint: changes whenever what `Source.read` would yield may change.
    """

    unit_id: str
    fingerprint: str


class Source(Protocol):
    """Where patches come from."""

    def units(self) -> Sequence[Unit]:
        """All units, sorted by `unit_id`, whatever the order of files on disk."""
        ...

    def read(self, unit: Unit) -> Iterator[Patch]:
        """The unit's patches, in a stable order; an unreadable file raises RasterError."""
        ...
