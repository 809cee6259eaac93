"""What a job takes of memory and of the disk, told by its form and headers before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mm_model.api import MIN_SIDE_PX
from mm_model.data.raster import RasterHeader
from mm_model.data.strips import BLOCK_PX
from mm_model.errors import TooLargeError
from mm_model.generative.plan import Pass, plan
from mm_model.generative.rows import column_bytes
from mm_model.geo.grid import Grid
from mm_model.serving.generator import Generator
from mm_model.serving.requests import SceneRequest, check_request


def grid_of(
    request: SceneRequest, grids: Mapping[str, Sequence[Grid]], generator: Generator
) -> Grid:
    """The grid that a request is answered on.

    Args:
        request: a checked one.
        grids: of its files, by modality.
        generator: knows the modalities, and the limits.

    Raises:
        TooLargeError, GeoreferenceError: as `Generator.check_grids`.
    """
    if not grids:
        assert request.grid is not None  # `check_request` refuses a request with neither
        return request.grid
    if request.fill is not None:
        return generator.check_grids({request.fill: grids[request.fill]})
    ordered = {name: grids[name] for name in generator.modalities if name in grids}
    return generator.check_grids(ordered, request.grid)


def memory_bytes(request: SceneRequest, grid: Grid, generator: Generator, steps: int) -> int:
    """Most that generating takes at once, which grows with the width and the steps; beside it are
    the model and the rows of files that are read and written.
    """
    kept = [request.fill] if request.fill is not None else []
    passes = _passes(request, generator)
    return grid.width * column_bytes(generator.model, grid.height, passes, kept, steps)


def _passes(request: SceneRequest, generator: Generator) -> tuple[Pass, ...]:
    model, targets = generator.model, check_request(request, generator)
    known = [name for name in request.observed if name not in targets]
    return plan(known, targets, model.names, model.seen_sets, model.added_names)


def check_memory(request: SceneRequest, grid: Grid, generator: Generator, max_mb: int) -> None:
    """Raise TooLargeError, which names what would fit, if a job takes more memory than allowed."""
    needed, allowed = memory_bytes(request, grid, generator, request.steps), max_mb * 2**20
    if needed <= allowed:
        return
    width_px = grid.width * allowed // needed
    fewer = range(request.steps - 1, 0, -1)
    fit = (k for k in fewer if memory_bytes(request, grid, generator, k) <= allowed)
    fits = [f"{k} steps" for k in [next(fit, 0)] if k]
    fits += [f"a width of {width_px} px"] * (width_px >= MIN_SIDE_PX)
    raise TooLargeError(
        "memory that the job's width and steps take",
        got=f"{needed / 2**20:.0f} MiB for {grid.width} px and {request.steps} steps",
        allowed=f"{max_mb} MiB (serve.jobs.max_memory_mb)",
        remedy=f"ask for at most {' or '.join(fits)}, or for fewer targets at once",
    )


def disk_bytes(
    request: SceneRequest,
    grid: Grid,
    headers: Mapping[str, Sequence[RasterHeader]],
    generator: Generator,
) -> int:
    """Most that a job writes beside its uploads: their copies, and what is made of them.

    As though nothing could be compressed; overviews add a third.
    """
    copies = 0
    for name, of_it in headers.items():
        for header in of_it:
            bands = min(header.bands, len(generator.modality(name).bands))
            pixels = header.grid.height * header.grid.width
            copies += bands * np.dtype(header.dtype).itemsize * pixels
    down, across = (-(-side // BLOCK_PX) * BLOCK_PX for side in grid.shape)
    made = uncertain = 0  # bytes a pixel of one sample, and of what all have in common
    targets = check_request(request, generator)
    for modality in map(generator.modality, targets):
        bands = len(modality.bands) + (modality.name == request.fill)
        made += bands * np.dtype(modality.dtype).itemsize
        if request.uncertainty:
            classes = len(modality.classes) + 1  # and the entropy
            uncertain += 4 * (classes if modality.is_categorical else 2 * bands)
    led = {n for one in _passes(request, generator) for n in one.targets} - {*targets}
    for modality in map(generator.modality, sorted(led)):  # what is there until its sample is done
        made += len(modality.bands) * np.dtype(modality.dtype).itemsize
    results = (request.samples * made + uncertain) * 4 // 3
    # Beside them what samples have in common is gathered, and one of all is there as raw pixels.
    return copies + down * across * (results + uncertain + max(made, uncertain))


def check_disk(needed: int, max_bytes: int) -> None:
    """Raise TooLargeError if a job takes more of the disk than all of its owner's may."""
    if needed > max_bytes:
        raise TooLargeError(
            "what the job writes, with its uploads",
            got=f"up to {needed / 2**20:.0f} MiB",
            allowed=f"{max_bytes / 2**20:.0f} MiB (serve.jobs.max_stored_mb)",
            remedy="ask for fewer samples or targets, or for pieces of it",
        )
