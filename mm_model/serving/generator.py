"""Requests in, generated layers out: no HTTP, no Ray.

The grid of an answer is that of the finest observed layer; the others are warped onto it by kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from mm_model.api import DEFAULT_STEPS, MAX_STEPS, MIN_SIDE_PX
from mm_model.bundle import Bundle
from mm_model.errors import GeoreferenceError, RequestError, TooLargeError, UnknownModalityError
from mm_model.generative.sampler import sample
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality
from mm_model.scene import Scene
from mm_model.serving.layers import (
    ObservedLayer,
    check_layer,
    check_overlap,
    onto,
    reference_grid,
)

__all__ = ["Generator", "ObservedLayer", "Prepared", "Request", "Result", "sample_seeds"]

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """What is observed, and what is wanted.

    Attributes:
        observed: modality name → layer; may be empty.
        targets: modalities to generate, jointly; none of the observed. Empty means all that were
            not observed.
        samples: how many draws; draw k depends on (seed, k), not on how many there are.
        seed: 0 to 2^63 - 1.
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
class Prepared:
    """A checked request whose layers lie on one grid.

    Attributes:
        observed: modality name → values [bands, H, W] and valid [H, W], in the model's order.
        valid: bool [H, W]; false where every observed layer lacks the pixel.
    """

    grid: Grid
    observed: Mapping[str, tuple[NDArray[np.generic], NDArray[np.bool_]]]
    valid: NDArray[np.bool_]
    targets: tuple[str, ...]
    samples: int
    seed: int
    steps: int

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Requests with equal keys may share a batch."""
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


def sample_seeds(seed: int, samples: int) -> list[int]:
    """The sampler's seeds of a request's draws: a hash of (seed, k), so that no two requests with
    different seeds share a draw.
    """
    return [
        int(np.random.SeedSequence([seed, k]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        for k in range(samples)
    ]


class Generator:
    """A bundle that answers requests.

    Args:
        bundle: what training handed over.
        max_side_px: greatest height or width of any layer.
        max_samples: most samples of a request.
        max_batch: most scenes of the training size that are sampled at once; larger scenes are
            sampled fewer at a time, so that memory stays bounded.
    """

    def __init__(
        self, bundle: Bundle, *, max_side_px: int = 1024, max_samples: int = 16, max_batch: int = 8
    ) -> None:
        self._model = bundle.model
        self.manifest = bundle.manifest
        self.modalities: Mapping[str, Modality] = {m.name: m for m in bundle.manifest.modalities}
        self.max_side_px = max_side_px
        self.max_samples = max_samples
        self.max_batch = max_batch
        self._device = next(bundle.model.parameters()).device

    def prepare(self, request: Request) -> Prepared:
        """Check a request and bring its layers onto one grid.

        Raises:
            RequestError: what is wrong with it; one of the subclasses where there is one.
        """
        wanted = self.check_form(
            tuple(request.observed),
            request.targets,
            request.grid,
            samples=request.samples,
            seed=request.seed,
            steps=request.steps,
        )
        # The model's order, not the caller's: the order of parts decides nothing.
        layers = {n: request.observed[n] for n in self.modalities if n in request.observed}
        for name, layer in layers.items():
            self.check_side(name, layer.grid)
            check_layer(self.modalities[name], layer)
        grid = request.grid or self.check_grids({n: layer.grid for n, layer in layers.items()})
        observed = {
            name: onto(grid, name, layer, self.modalities[name]) for name, layer in layers.items()
        }
        known = [valid for _, valid in observed.values()] or [np.ones(grid.shape, np.bool_)]
        return Prepared(
            grid=grid,
            observed=observed,
            valid=np.logical_or.reduce(known),
            targets=wanted,
            samples=request.samples,
            seed=request.seed,
            steps=request.steps,
        )

    def sample(
        self, requests: Sequence[Prepared], check: Callable[[], None] | None = None
    ) -> list[Result]:
        """Answer checked requests; those with equal `batch_key` share batches.

        `check` is called between steps and may raise, to give up.
        """
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[request.batch_key].append(index)
        results: dict[int, Result] = {}
        for indices in groups.values():
            group = [requests[i] for i in indices]
            results.update(zip(indices, self._sample_group(group, check), strict=True))
        return [results[i] for i in range(len(requests))]

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Answer each request, in order; none depends on the others.

        Raises:
            RequestError: a request is wrong (one of its subclasses says in which way).
        """
        return self.sample([self.prepare(request) for request in requests])

    def modality(self, name: str) -> Modality:
        """The model's modality of this name; raises UnknownModalityError if it has none."""
        if name not in self.modalities:
            raise UnknownModalityError(
                "unknown modality", got=repr(name[:80]), allowed=", ".join(self.modalities)
            )
        return self.modalities[name]

    def check_side(self, what: str, grid: Grid) -> None:
        """Raise TooLargeError if a grid is longer than allowed on a side."""
        if max(grid.shape) > self.max_side_px:
            raise TooLargeError(
                f"{what}: height x width in pixels",
                got=f"{grid.height} x {grid.width}",
                allowed=f"at most {self.max_side_px} a side",
                remedy="send it in tiles",
            )

    def check_form(
        self,
        observed: Sequence[str],
        targets: Sequence[str],
        grid: Grid | None,
        *,
        samples: int,
        seed: int,
        steps: int,
    ) -> tuple[str, ...]:
        """Check what can be said of a `Request` by the names of its layers alone.

        Returns:
            The modalities to generate, in the model's order.

        Raises:
            RequestError: what is wrong; one of the subclasses where there is one.
        """
        if not 1 <= steps <= MAX_STEPS:
            raise RequestError("steps", got=steps, allowed=f"1 to {MAX_STEPS}")
        if not 0 <= seed <= MAX_SEED:
            raise RequestError("seed", got=seed, allowed=f"0 to {MAX_SEED}")
        if not 1 <= samples <= self.max_samples:
            raise RequestError("samples", got=samples, allowed=f"1 to {self.max_samples}")
        for name in (*observed, *targets):
            self.modality(name)
        if observed and grid is not None:
            raise RequestError(
                "a grid beside observed layers",
                remedy="leave out width, height, crs and transform: the finest layer says where",
            )
        if not observed and grid is None:
            raise RequestError(
                "no layer and no grid",
                remedy="send a GeoTIFF, or name the width and height to generate",
            )
        if grid is not None:
            self._check_scene(grid)
        return self._targets(observed, targets)

    def check_grids(self, grids: Mapping[str, Grid]) -> Grid:
        """The grid of an answer to layers on these grids, in the model's order.

        Raises:
            TooLargeError, GeoreferenceError: it is too large or too small, or a layer lies
                elsewhere or nowhere.
        """
        grid = reference_grid(grids)
        self._check_scene(grid)
        for name, other in grids.items():
            check_overlap(name, other, grid)
        return grid

    def _check_scene(self, grid: Grid) -> None:
        self.check_side("grid", grid)
        if min(grid.shape) < MIN_SIDE_PX:
            raise GeoreferenceError(
                "grid: height x width in pixels",
                got=f"{grid.height} x {grid.width}",
                allowed=f"at least {MIN_SIDE_PX} a side",
                remedy="send a larger piece",
            )

    def _targets(self, observed: Sequence[str], targets: Sequence[str]) -> tuple[str, ...]:
        """The wanted modalities, in the model's order."""
        both = [name for name in targets if name in observed]
        if both or len(set(targets)) != len(targets):
            raise RequestError(
                "targets",
                got=", ".join(targets),
                allowed="each once, and none that is observed",
                remedy=f"leave out {', '.join(both)}" if both else "name each once",
            )
        wanted = targets or tuple(n for n in self.modalities if n not in observed)
        if not wanted:
            raise RequestError(
                "targets",
                got="every modality is observed",
                allowed="one or more that are not",
                remedy="leave a layer out",
            )
        return tuple(name for name in self.modalities if name in wanted)

    def _sample_group(
        self, group: Sequence[Prepared], check: Callable[[], None] | None
    ) -> list[Result]:
        """Answer requests that share shape and steps."""
        items = [
            (request, seed)
            for request in group
            for seed in sample_seeds(request.seed, request.samples)
        ]
        height, width = group[0].grid.shape
        room = self.max_batch * self.manifest.patch_px**2 // (height * width)
        size = max(1, min(self.max_batch, room))
        drawn = [
            layers
            for start in range(0, len(items), size)
            for layers in self._sample_batch(items[start : start + size], check)
        ]
        results, start = [], 0
        for request in group:
            draws = drawn[start : start + request.samples]
            start += request.samples
            values = {name: np.stack([draw[name] for draw in draws]) for name in request.targets}
            results.append(Result(request.grid, values, request.valid))
        return results

    @torch.inference_mode()
    def _sample_batch(
        self, items: Sequence[tuple[Prepared, int]], check: Callable[[], None] | None
    ) -> list[dict[str, NDArray[np.generic]]]:
        """A draw of each item's targets: name → [bands, H, W]."""
        requests, seeds = [item[0] for item in items], [item[1] for item in items]
        scene, codec = self._scene(requests), self._model.codec
        if scene.values:
            x, mask = codec.encode(scene.to(self._device))
        else:
            x, mask = codec.empty(len(items), *requests[0].grid.shape)
        targets = [request.targets for request in requests]
        x = sample(self._model, x, mask, targets, seeds, requests[0].steps, check=check)
        wanted = [name for name in self.modalities if any(name in names for names in targets)]
        decoded = {
            name: value.cpu().numpy().astype(self.modalities[name].dtype, copy=False)
            for name, value in codec.decode(x, wanted).items()
        }
        return [{name: decoded[name][i] for name in names} for i, names in enumerate(targets)]

    def _scene(self, requests: Sequence[Prepared]) -> Scene:
        """What a batch observes; a request lacks what others observe by an empty mask."""
        shape = requests[0].grid.shape
        values, valid = {}, {}
        for name, modality in self.modalities.items():
            if not any(name in request.observed for request in requests):
                continue
            nothing = np.zeros((len(modality.bands), *shape), np.float32), np.zeros(shape, np.bool_)
            layers = [request.observed.get(name, nothing) for request in requests]
            values[name] = torch.from_numpy(np.stack([v.astype(np.float32) for v, _ in layers]))
            valid[name] = torch.from_numpy(np.stack([m for _, m in layers])[:, None])
        return Scene(values, valid)
