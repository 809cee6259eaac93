"""Requests in, generated layers out: no HTTP, no Ray.

The grid of an answer is that of the finest observed layer; the others are warped onto it by kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm_model.api import MAX_STEPS, MIN_SIDE_PX, OneOrMore, each
from mm_model.bundle import Bundle
from mm_model.conditions import Conditions, stack_features
from mm_model.data.circumstances import complete
from mm_model.errors import GeoreferenceError, RequestError, TooLargeError, UnknownModalityError
from mm_model.generative.noise import sample_seeds
from mm_model.generative.sampler import for_sampling, mean_scene, sample, step_count
from mm_model.generative.windows import STRIDE, distance
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality
from mm_model.scene import Scene
from mm_model.serving.bands import complete_bands, estimated_bands
from mm_model.serving.layers import (
    ObservedLayer,
    check_layer,
    check_overlap,
    check_placed,
    check_position,
    reference_grid,
)
from mm_model.serving.overlay import labelled, own_grid, together
from mm_model.serving.requests import (
    Aligned,
    Embedding,
    EmbedRequest,
    Prepared,
    Request,
    Result,
)

__all__ = [
    "EmbedRequest",
    "Embedding",
    "Generator",
    "ObservedLayer",
    "Prepared",
    "Request",
    "Result",
]

MAX_SEED = 2**63 - 1

Check = Callable[[float], None]
"""Told now and then which share of the work is done, from 0 to 1; may raise, to give up."""
A = TypeVar("A", bound=Aligned)
T = TypeVar("T")


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
        self.model = for_sampling(bundle.model)
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
        aligned = self._align(request.observed, request.grid, request.conditions)
        return Prepared(
            **vars(aligned),
            targets=wanted,
            samples=request.samples,
            seed=request.seed,
            steps=request.steps,
        )

    def prepare_embedding(self, request: EmbedRequest) -> Aligned:
        """Check a request and bring its layers onto one grid.

        Raises:
            RequestError: what is wrong with it; one of the subclasses where there is one.
        """
        self.check_observed(tuple(request.observed))
        return self._align(request.observed, None, request.conditions)

    def sample(self, requests: Sequence[Prepared], check: Check | None = None) -> list[Result]:
        """Answer checked requests; those with equal `batch_key` share batches.

        `check` is called between steps; the share is that of the requests that share batches.
        """
        return _by_key(requests, lambda group: self._sample_group(group, check))

    def scenes(self, requests: Sequence[Aligned], check: Check | None = None) -> list[Embedding]:
        """Embed checked requests; those with equal `batch_key` share batches.

        `check` is called between batches.
        """
        return _by_key(requests, lambda group: self._embed_group(group, check))

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Answer each request, in order; none depends on the others.

        Raises:
            RequestError: a request is wrong (one of its subclasses says in which way).
        """
        return self.sample([self.prepare(request) for request in requests])

    def embed(self, requests: Sequence[EmbedRequest]) -> list[Embedding]:
        """The expected scene of each request, in order; none depends on the others.

        Raises:
            RequestError: a request is wrong (one of its subclasses says in which way).
        """
        return self.scenes([self.prepare_embedding(request) for request in requests])

    def modality(self, name: str) -> Modality:
        """The model's modality of this name; raises UnknownModalityError if it has none."""
        if name not in self.modalities:
            raise UnknownModalityError(
                "unknown modality", got=repr(name[:80]), allowed=", ".join(self.modalities)
            )
        return self.modalities[name]

    def completed(
        self, name: str, values: NDArray[np.generic], missing: Sequence[str]
    ) -> NDArray[np.generic]:
        """A layer's bands [known, ...] with those that a file lacks; see `bands.complete_bands`."""
        return complete_bands(values, missing, self.modalities[name], self.manifest.statistics)

    def check_side(self, what: str, grid: Grid) -> None:
        """Raise TooLargeError if a grid is longer than allowed on a side."""
        if max(grid.shape) > self.max_side_px:
            raise TooLargeError(
                f"{what}: height x width in pixels",
                got=f"{grid.height} x {grid.width}",
                allowed=f"at most {self.max_side_px} a side",
                remedy="send it in tiles, or to POST /v1/jobs, which takes longer sides; "
                "mm generate takes any size",
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
        if observed and grid is not None and not grid.crs:
            raise RequestError(
                "a grid beside observed layers",
                got="width and height alone",
                allowed="width, height, crs and transform; or none: the finest layer says where",
            )
        if not observed and grid is None:
            raise RequestError(
                "no layer and no grid",
                remedy="send a GeoTIFF, or name the width and height to generate",
            )
        if grid is not None:
            self._check_scene(grid)
        return self._targets(observed, targets)

    def check_observed(self, observed: Sequence[str]) -> None:
        """Check what can be said of an `EmbedRequest` by the names of its layers alone.

        Raises:
            RequestError: there is none.
            UnknownModalityError: the model does not know one.
        """
        for name in observed:
            self.modality(name)
        if not observed:
            raise RequestError(
                "no layer to embed", allowed="one or more", remedy="send a GeoTIFF of a modality"
            )

    def check_grids(
        self, grids: Mapping[str, OneOrMore[Grid]], declared: Grid | None = None
    ) -> Grid:
        """The grid of an answer to layers on these grids, in the model's order.

        It is the declared one, or the finest layer's; of several files of a layer, see
        `overlay.own_grid`.

        Raises:
            TooLargeError, GeoreferenceError: it is too large or too small, or a layer lies
                elsewhere or nowhere.
        """
        layers = each(grids)
        files = {label: g for n, of_it in layers.items() for label, g in labelled(n, of_it)}
        if declared is not None:
            check_placed({label: grid for label, grid in files.items() if grid != declared})
            check_placed({"that is declared": declared})
        grid = declared or reference_grid({n: own_grid(n, of_it) for n, of_it in layers.items()})
        self._check_scene(grid)
        for label, other in files.items():
            check_overlap(label, other, grid)
        return grid

    def _align(
        self,
        given: Mapping[str, OneOrMore[ObservedLayer]],
        grid: Grid | None,
        conditions: Conditions,
    ) -> Aligned:
        """Check layers and bring them onto one grid: the given one, or the finest layer's."""
        files = each(given)
        # The model's order, not the caller's: the order of modalities decides nothing.
        layers = {n: files[n] for n in self.modalities if n in files}
        for name, of_it in layers.items():
            for label, layer in labelled(name, of_it):
                self.check_side(label, layer.grid)
                check_layer(label, self.modalities[name], layer)
        if layers:
            grids = {n: [layer.grid for layer in of_it] for n, of_it in layers.items()}
            grid = self.check_grids(grids, grid)
        assert grid is not None  # `check_form` refuses a request with neither
        observed = {
            name: together(grid, name, of_it, self.modalities[name])
            for name, of_it in layers.items()
        }
        known = [valid for _, valid in observed.values()] or [np.ones(grid.shape, np.bool_)]
        return Aligned(
            grid,
            observed,
            np.logical_or.reduce(known),
            complete(conditions, grid),
            estimated_bands(
                {
                    name: dict.fromkeys(band for layer in of_it for band in layer.estimated)
                    for name, of_it in layers.items()
                }
            ),
        )

    def _check_scene(self, grid: Grid) -> None:
        self.check_side("grid", grid)
        if min(grid.shape) < MIN_SIDE_PX:
            raise GeoreferenceError(
                "grid: height x width in pixels",
                got=f"{grid.height} x {grid.width}",
                allowed=f"at least {MIN_SIDE_PX} a side",
                remedy="send a larger piece",
            )
        check_position(grid)

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

    def _batches(self, grids: Sequence[Grid]) -> Iterator[list[int]]:
        """Indices of what is computed at once, of grids of one shape: windows must coincide."""
        size, side = self._batch_size(grids[0]), self.manifest.patch_px
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, grid in enumerate(grids):
            alone = max(grid.shape) <= side
            alike[() if alone else tuple(p % distance(side) for p in grid.position)].append(index)
        for indices in alike.values():
            for start in range(0, len(indices), size):
                yield indices[start : start + size]

    def _batch_size(self, grid: Grid) -> int:
        """How many scenes of a shape are computed at once."""
        room = self.max_batch * self.manifest.patch_px**2 // (grid.height * grid.width)
        return max(1, min(self.max_batch, room))

    def _sample_group(self, group: Sequence[Prepared], check: Check | None) -> list[Result]:
        """Answer requests that share shape and steps."""
        items = [
            (request, seed)
            for request in group
            for seed in sample_seeds(request.samples, request.seed)
        ]
        drawn: dict[int, dict[str, NDArray[np.generic]]] = {}
        batches = list(self._batches([request.grid for request, _ in items]))
        for number, batch in enumerate(batches):
            part = check and _part(check, number, len(batches))
            layers = self._sample_batch([items[i] for i in batch], part)
            drawn.update(zip(batch, layers, strict=True))
        results, start = [], 0
        for request in group:
            draws = [drawn[i] for i in range(start, start + request.samples)]
            start += request.samples
            values = {name: np.stack([draw[name] for draw in draws]) for name in request.targets}
            results.append(Result(request.grid, values, request.valid))
        return results

    @torch.inference_mode()
    def _sample_batch(
        self, items: Sequence[tuple[Prepared, int]], check: Check | None
    ) -> list[dict[str, NDArray[np.generic]]]:
        """A draw of each item's targets: name → [bands, H, W]."""
        requests, seeds = [item[0] for item in items], [item[1] for item in items]
        x, mask, known = self._encode(requests)
        targets, steps = [request.targets for request in requests], requests[0].steps
        begun, work = count(), step_count(self.model, mask, targets, steps)
        x = sample(
            self.model,
            x,
            mask,
            targets,
            seeds,
            steps,
            origins=[request.grid.position for request in requests],
            conditions=known,
            check=check and (lambda: check(next(begun) / work)),
        )
        # One by one: where images do not fill the processor's vectors, those within a batch
        # straddle them, and round otherwise than alone (elevation of 27 x 45 pixels: by 1e-5 m).
        return [self._decode(x[i : i + 1], names) for i, names in enumerate(targets)]

    def _decode(self, x: Tensor, names: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        return {
            name: value[0].cpu().numpy().astype(self.modalities[name].dtype, copy=False)
            for name, value in self.model.codec.decode(x, names).items()
        }

    @torch.inference_mode()
    def _embed_group(self, group: Sequence[Aligned], check: Check | None) -> list[Embedding]:
        """Embed requests that share their shape."""
        size, found = self._batch_size(group[0].grid), []
        for start in range(0, len(group), size):
            if check is not None:
                check(start / len(group))
            batch = group[start : start + size]
            x, mask, known = self._encode(batch)
            scenes = mean_scene(self.model, x, mask, conditions=known).float().cpu().numpy()
            found += [_embedding(r, z) for r, z in zip(batch, scenes, strict=True)]
        return found

    def _encode(self, requests: Sequence[Aligned]) -> tuple[Tensor, Tensor, Tensor]:
        """A batch for the model: x [B, C, H, W], mask [B, M, H, W], conditions [B, K]."""
        # Each by itself, as it is decoded: see `_sample_batch`.
        xs, masks = zip(*(self._encode_one(request) for request in requests), strict=True)
        known = torch.from_numpy(stack_features([r.conditions for r in requests]))
        return torch.cat(xs), torch.cat(masks), known.to(self._device)

    def _encode_one(self, request: Aligned) -> tuple[Tensor, Tensor]:
        if not request.observed:
            return self.model.codec.empty(1, *request.grid.shape)
        values = {
            n: torch.from_numpy(v.astype(np.float32)) for n, (v, _) in request.observed.items()
        }
        valid = {n: torch.from_numpy(m) for n, (_, m) in request.observed.items()}
        scene = Scene(
            {n: v[None] for n, v in values.items()}, {n: m[None, None] for n, m in valid.items()}
        )
        return self.model.codec.encode(scene.to(self._device))


def _part(check: Check, number: int, of: int) -> Check:
    """The check of one of several pieces of equal work."""
    return lambda share: check((number + share) / of)


def _embedding(request: Aligned, scene: NDArray[np.float32]) -> Embedding:
    """A request's scene [S, h, w], and what it says of the request as a whole."""
    height, width = request.grid.shape
    padded = np.pad(request.valid, ((0, -height % STRIDE), (0, -width % STRIDE)))
    _, rows, columns = scene.shape
    valid = np.logical_or.reduce(padded.reshape(rows, STRIDE, columns, STRIDE), axis=(1, 3))
    cells = scene[:, valid].astype(np.float64)
    vector = np.concatenate([cells.mean(axis=1), cells.std(axis=1)]).astype(np.float32)
    return Embedding(request.grid.coarser(STRIDE), scene, valid, vector)


def _by_key(requests: Sequence[A], answer: Callable[[Sequence[A]], Sequence[T]]) -> list[T]:
    """Answers in the order of the requests; those with equal `batch_key` are answered together."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        groups[request.batch_key].append(index)
    results: dict[int, T] = {}
    for indices in groups.values():
        group = [requests[i] for i in indices]
        results.update(zip(indices, answer(group), strict=True))
    return [results[i] for i in range(len(requests))]
