"""Several files of one modality, of other dates or of neighbouring places, as one layer.

They are laid over each other in the order in which they are given: each pixel, all bands together,
is that of the first file that knows it, on the grid of the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mm_model.geo.grid import Grid
from mm_model.modalities import Modality
from mm_model.serving.layers import ObservedLayer, elsewhere, onto, reference_grid

Pixels = tuple[NDArray[np.generic], NDArray[np.bool_]]
"""Values [bands, rows, W] in physical units, or class codes, and valid [rows, W]."""

T = TypeVar("T")
_Box = tuple[int, int, int, int]  # first row and column, and those after the last


def labelled(name: str, files: Sequence[T]) -> list[tuple[str, T]]:
    """Files of a modality with what errors call each: its name, or "<name> (2 of 3)"."""
    if len(files) == 1:
        return [(name, files[0])]
    return [(f"{name} ({k} of {len(files)})", file) for k, file in enumerate(files, 1)]


def own_grid(name: str, grids: Sequence[Grid]) -> Grid:
    """The grid of a layer that lies on these.

    It is that of the first of the finest, which reaches over all others of the same pixels that
    touch or overlap it, one beside the other: dates of one place, or neighbouring tiles.

    Raises:
        GeoreferenceError: they differ, and one of them says not where it lies.
    """
    first = reference_grid(dict(labelled(name, grids)))
    others = [(at, grid) for grid in grids if (at := first.offset_of(grid)) is not None]
    boxes = [(row, col, row + grid.height, col + grid.width) for (row, col), grid in others]
    box, larger = None, (0, 0, *first.shape)
    while larger != box:
        box = larger
        joined = [box, *(other for other in boxes if _touch(other, box))]
        tops, lefts, bottoms, rights = zip(*joined, strict=True)
        larger = min(tops), min(lefts), max(bottoms), max(rights)
    top, left, bottom, right = larger
    return first.window(top, left, bottom - top, right - left)


def _touch(one: _Box, other: _Box) -> bool:
    """Whether boxes have a pixel, a side or a corner in common."""
    down = one[0] <= other[2] and other[0] <= one[2]
    return down and one[1] <= other[3] and other[1] <= one[3]


def places(name: str, grids: Sequence[Grid], grid: Grid) -> list[tuple[int, int] | None]:
    """Where files lie on a grid: row and column of their first pixels; None: to be resampled.

    What makes up the grid is not resampled, so that its pixels stay what they are.
    """
    if own_grid(name, grids) != grid:
        return [None for _ in grids]
    return [grid.offset_of(other) for other in grids]


def laid_over(parts: Iterable[Pixels]) -> Pixels:
    """Each pixel of the first part that knows it; parts are asked for while pixels are missing."""
    more = iter(parts)
    values, valid = next(more)
    while not valid.all():
        part = next(more, None)
        if part is None:
            break
        values, valid = np.where(valid, values, part[0]), valid | part[1]
    return values, valid


def shared_part(
    place: tuple[int, int], source: Grid, row: int, rows: int, width: int
) -> tuple[slice, slice] | None:
    """Rows and columns that a file has in common with rows of the grid on which it is placed.

    They are counted on the grid, the rows from its first one; None if there are none.
    """
    top, left = place
    low, high = max(row, top), min(row + rows, top + source.height)
    first, last = max(0, left), min(width, left + source.width)
    return (slice(low, high), slice(first, last)) if low < high and first < last else None


def put(pixels: Pixels, down: slice, across: slice, rows: int, width: int) -> Pixels:
    """Pixels among others of which nothing is known."""
    values, valid = pixels
    if valid.shape == (rows, width):
        return pixels
    larger = np.zeros((len(values), rows, width), values.dtype)
    known = np.zeros((rows, width), np.bool_)
    larger[:, down, across], known[down, across] = values, valid
    return larger, known


def together(grid: Grid, name: str, files: Sequence[ObservedLayer], modality: Modality) -> Pixels:
    """Files of a modality as one layer: values [bands, H, W] and mask [H, W] on a grid.

    Raises:
        GeoreferenceError: one of them has no valid pixel there.
    """
    at = places(name, [file.grid for file in files], grid)
    parts = (
        onto(grid, label, file, modality) if place is None else _placed(grid, label, file, place)
        for (label, file), place in zip(labelled(name, files), at, strict=True)
    )
    found = laid_over(parts)
    for _ in parts:  # what is not needed must lie there, too
        continue
    return found


def _placed(grid: Grid, name: str, file: ObservedLayer, place: tuple[int, int]) -> Pixels:
    shared = shared_part(place, file.grid, 0, grid.height, grid.width)
    if shared is None:
        raise elsewhere(name, file.grid, grid)
    down, across = shared
    inside = (
        slice(down.start - place[0], down.stop - place[0]),
        slice(across.start - place[1], across.stop - place[1]),
    )
    values, valid = file.values[:, *inside], file.valid[inside]
    if not valid.any():
        raise elsewhere(name, file.grid, grid)
    return put((values, valid), down, across, *grid.shape)
