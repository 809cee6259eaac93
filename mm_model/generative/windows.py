"""Windows that cover a canvas, and their blending without seams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDE = 8  # windows lie on the grid of the scene


@dataclass(frozen=True)
class Windows:
    """Equal windows over a canvas of `height` x `width`, overlapping by a quarter or more.

    All lengths are multiples of `STRIDE` pixels; `scaled` gives the same windows on the scene's
    grid.
    """

    height: int
    width: int
    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]

    @classmethod
    def cover(cls, height: int, width: int, side: int, origin: tuple[int, int] = (0, 0)) -> Windows:
        """Windows of at most `side` pixels a side.

        But for the first and the last, which lie at the edges, they begin at multiples of their
        distance, counted from where `origin` is the canvas' first row and column: canvases that
        overlap have the same windows inside.
        """
        rows, columns = _starts(height, side, origin[0]), _starts(width, side, origin[1])
        size = (min(side, height), min(side, width))
        return cls(height, width, size, tuple((r, c) for r in rows for c in columns))

    @cached_property
    def rows(self) -> list[int]:
        """First rows of the windows, ascending."""
        return sorted({row for row, _ in self.corners})

    @cached_property
    def columns(self) -> list[int]:
        """First columns of the windows, ascending."""
        return sorted({column for _, column in self.corners})

    def scaled(self) -> Windows:
        """The same windows, in tokens."""
        return Windows(
            self.height // STRIDE,
            self.width // STRIDE,
            (self.size[0] // STRIDE, self.size[1] // STRIDE),
            tuple((r // STRIDE, c // STRIDE) for r, c in self.corners),
        )

    def cut(self, canvas: Tensor) -> Tensor:
        """[B, C, height, width] → [B · windows, C, *size], the windows of a sample together."""
        high, wide = self.size
        pieces = [canvas[:, :, r : r + high, c : c + wide] for r, c in self.corners]
        return torch.stack(pieces, 1).flatten(0, 1)

    @cached_property
    def weight(self) -> Tensor:
        """Of a window's pixels where several meet, float64 [*size]."""
        return _hump(self.size[0])[:, None] * _hump(self.size[1])

    def blend(self, pieces: Tensor) -> Tensor:
        """The inverse of `cut`: the weighted mean of all windows over each pixel."""
        if len(self.corners) == 1:
            return pieces
        count = len(self.corners)
        pieces = pieces.view(-1, count, *pieces.shape[1:])
        batch, _, channels, high, wide = pieces.shape
        weight = self.weight.to(pieces)
        canvas = pieces.new_zeros(batch, channels, self.height, self.width)
        total = pieces.new_zeros(self.height, self.width)
        for index, (r, c) in enumerate(self.corners):
            canvas[:, :, r : r + high, c : c + wide] += pieces[:, index] * weight
            total[r : r + high, c : c + wide] += weight
        return canvas / total


@dataclass(frozen=True)
class Frame:
    """An image within its canvas of whole tokens, on the lattice of windows that all images share.

    Attributes:
        height, width: of the image, in pixels.
        side: of the windows.
        origin: row and column of the image's first pixel, from a point that images of one ground
            share (`Grid.position`).
    """

    height: int
    width: int
    side: int
    origin: tuple[int, int] = (0, 0)

    @property
    def corner(self) -> tuple[int, int]:
        """Row and column of the image's first pixel within the canvas.

        Tokens lie at multiples of `STRIDE` from the shared point, but where a single window holds
        the image: four of them for one patch would be no gain.
        """
        if self.height <= self.side and self.width <= self.side:
            return 0, 0
        return self.origin[0] % STRIDE, self.origin[1] % STRIDE

    @property
    def start(self) -> tuple[int, int]:
        """Row and column of the canvas' first pixel, counted as `origin`."""
        (row, column), (top, left) = self.origin, self.corner
        return row - top, column - left

    @cached_property
    def windows(self) -> Windows:
        """Over the canvas, whose sides are multiples of `STRIDE`."""
        top, left = self.corner
        high, wide = self.height + top, self.width + left
        return Windows.cover(high + -high % STRIDE, wide + -wide % STRIDE, self.side, self.start)

    def pad(self, image: Tensor) -> Tensor:
        """[..., height, width] → the canvas, 0 or False around the image."""
        (top, left), windows = self.corner, self.windows
        bottom, right = windows.height - self.height - top, windows.width - self.width - left
        return F.pad(image, (left, right, top, bottom))

    def crop(self, canvas: Tensor) -> Tensor:
        """The inverse of `pad`."""
        top, left = self.corner
        return canvas[..., top : top + self.height, left : left + self.width]


def _starts(length: int, side: int, origin: int) -> Sequence[int]:
    """First pixels of windows that cover [0, length), overlapping by a quarter or more."""
    if length <= side:
        return [0]
    step = distance(side)
    return [0, *range(step - origin % step, length - side, step), length - side]


def distance(side: int) -> int:
    """Pixels from one window's first row or column to the next one's."""
    return max(1, side * 3 // 4 // STRIDE) * STRIDE


def _hump(length: int) -> Tensor:
    """A smooth weight over a window's side: sin², nowhere 0."""
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return torch.sin(torch.pi * position).square()
