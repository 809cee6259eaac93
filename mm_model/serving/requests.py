"""What callers ask for and get: records between HTTP, the generator and Python callers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mm_model.api import DEFAULT_STEPS, MIN_SIDE_PX, OneOrMore
from mm_model.conditions import NOTHING, Conditions
from mm_model.errors import RequestError
from mm_model.geo.grid import Grid
from mm_model.serving.layers import ObservedLayer

if TYPE_CHECKING:
    from mm_model.serving.generator import Generator


@dataclass(frozen=True)
class Request:
    """What is observed, and what is wanted.

    Attributes:
        observed: modality name → layer, or several in turn; may be empty.
        targets: modalities to generate, jointly; none of the observed. Empty means all that were
            not observed.
        samples: how many draws; draw k depends on (seed, k), not on how many there are.
        seed: 0 to 2^63 - 1.
        steps: sampling steps; 1 gives the best single estimate, E[target | observed].
        grid: where to generate: needed where nothing is observed; layers are warped onto it. None:
            the finest layer's.
        conditions: what is known besides; what the grid tells need not be said.
    """

    observed: Mapping[str, OneOrMore[ObservedLayer]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0
    steps: int = DEFAULT_STEPS
    grid: Grid | None = None
    conditions: Conditions = NOTHING


@dataclass(frozen=True)
class SceneRequest:
    """What is observed, in files, and what is wanted.

    Attributes:
        observed: modality name → GeoTIFF, or several in turn, each on a grid of its own; may be
            empty.
        targets: modalities to generate; empty: all that are not observed.
        samples, seed, steps, grid, conditions: as in `Request`.
        fill: a modality that is observed in parts, to be completed: the only target, on its own
            grid, whose observed pixels stay untouched.
        uncertainty: whether mean and spread of the samples are wanted, too.
    """

    observed: Mapping[str, OneOrMore[Path]] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0
    steps: int = DEFAULT_STEPS
    grid: Grid | None = None
    conditions: Conditions = NOTHING
    fill: str | None = None
    uncertainty: bool = False


def check_request(asked: SceneRequest, generator: Generator) -> tuple[str, ...]:
    """Check what can be said of a request without its files.

    Returns:
        The modalities to generate, in the model's order.

    Raises:
        RequestError: what is wrong; one of the subclasses where there is one.
    """
    if asked.uncertainty and asked.samples < 2:
        raise RequestError(
            "samples of an uncertainty",
            got=asked.samples,
            allowed="2 or more",
            remedy="ask for more samples",
        )
    others, targets, grid = tuple(asked.observed), asked.targets, asked.grid
    if asked.fill is not None:
        if asked.fill not in asked.observed or targets or grid is not None:
            raise RequestError(
                "layer to fill",
                got=asked.fill[:80],
                allowed="one that is observed, without targets and grid",
            )
        others = tuple(name for name in others if name != asked.fill)
        targets, grid = (asked.fill,), None if others else _OWN
    return generator.check_form(
        others, targets, grid, samples=asked.samples, seed=asked.seed, steps=asked.steps
    )


# Of a layer that is filled alone: its own grid is checked when it is read.
_OWN = Grid("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), MIN_SIDE_PX, MIN_SIDE_PX)


@dataclass(frozen=True)
class EmbedRequest:
    """What is observed, to be told by its scene.

    Attributes:
        observed: modality name → layer, or several in turn; one or more.
        conditions: what is known besides; what the grid tells need not be said.
    """

    observed: Mapping[str, OneOrMore[ObservedLayer]]
    conditions: Conditions = NOTHING


@dataclass(frozen=True)
class Aligned:
    """Checked layers on one grid; all that an embedding needs.

    Attributes:
        observed: modality name → values [bands, H, W] and valid [H, W], in the model's order.
        valid: bool [H, W]; false where every observed layer lacks the pixel.
        conditions: completed by what the grid tells.
        estimated: bands that no file held, as `sar:VH`.
    """

    grid: Grid
    observed: Mapping[str, tuple[NDArray[np.generic], NDArray[np.bool_]]]
    valid: NDArray[np.bool_]
    conditions: Conditions
    estimated: tuple[str, ...]

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Requests with equal keys may share a batch."""
        return (self.grid.shape,)


@dataclass(frozen=True)
class Prepared(Aligned):
    """A checked request to generate."""

    targets: tuple[str, ...]
    samples: int
    seed: int
    steps: int

    @property
    def batch_key(self) -> tuple[object, ...]:
        return self.grid.shape, self.steps


@dataclass(frozen=True)
class Result:
    """What was generated.

    Attributes:
        grid: the reference grid, its CRS and transform unchanged.
        values: target name → [samples, bands, H, W] in physical units, or class codes.
        valid: bool [H, W]; false where every observed layer lacks the pixel.
    """

    grid: Grid
    values: Mapping[str, NDArray[np.generic]]
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class Embedding:
    """The expected scene of what was observed, as a representation.

    Attributes:
        grid: of its cells, each 8 x 8 pixels of the reference grid, from the same corner.
        scene: float32 [S, ⌈H/8⌉, ⌈W/8⌉].
        valid: bool [⌈H/8⌉, ⌈W/8⌉]; false where a cell holds no pixel that any layer knows.
        vector: float32 [2·S]: mean, then standard deviation, of each channel over valid cells.
    """

    grid: Grid
    scene: NDArray[np.float32]
    valid: NDArray[np.bool_]
    vector: NDArray[np.float32]
