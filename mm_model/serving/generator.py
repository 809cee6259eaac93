"""Requests in, generated layers out: no HTTP, no Ray.

The grid of an answer is that of the finest observed layer; the others are warped onto it by kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mm_model.api import DEFAULT_STEPS
from mm_model.bundle import Bundle
from mm_model.geo.grid import Grid


@dataclass(frozen=True)
class ObservedLayer:
    """One observed modality on a grid of its own.

    Attributes:
        values: [bands, H, W] in physical units, or class codes.
        valid: bool [H, W]; what an invalid pixel holds means nothing.
    """

    values: NDArray[np.generic]
    valid: NDArray[np.bool_]
    grid: Grid


@dataclass(frozen=True)
class Request:
    """What is observed, and what is wanted.

    Attributes:
        observed: modality name → layer; may be empty.
        targets: modalities to generate, jointly; none of the observed. Empty means all that were
            not observed.
        samples: how many draws; sample k depends on (seed, k) and on nothing else that varies.
        seed: 0 or more.
        steps: sampling steps; 1 gives the posterior mean.
        grid: where to generate if nothing is observed; None otherwise.
    """

    observed: Mapping[str, ObservedLayer] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0
    steps: int = DEFAULT_STEPS
    grid: Grid | None = None


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


class Generator:
    """A bundle that answers requests.

    Args:
        bundle: what training handed over.
        max_side_px: greatest height or width of any layer.
        max_samples: most samples of a request.
        max_batch: most scenes that are sampled at once.
    """

    def __init__(
        self, bundle: Bundle, *, max_side_px: int = 1024, max_samples: int = 16, max_batch: int = 8
    ) -> None:
        raise NotImplementedError

    def prepare(self, request: Request) -> Prepared:
        """Check a request and bring its layers onto one grid; raises RequestError."""
        raise NotImplementedError

    def sample(self, prepared: Sequence[Prepared]) -> list[Result]:
        """Answer checked requests; those of one shape, targets and steps share their batches."""
        raise NotImplementedError

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Answer each request, in order; none depends on the others.

        Raises:
            RequestError: a request is wrong (one of its subclasses says in which way).
        """
        return self.sample([self.prepare(request) for request in requests])


@dataclass(frozen=True)
class Prepared:
    """A checked request whose layers lie on one grid."""

    request: Request
    grid: Grid
    valid: NDArray[np.bool_]
