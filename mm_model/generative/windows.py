"""Windows that cover a canvas, and their blending without seams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
    def cover(cls, height: int, width: int, side: int) -> Windows:
        """Windows of at most `side` pixels a side."""
        rows, columns = _starts(height, side), _starts(width, side)
        size = (min(side, height), min(side, width))
        return cls(height, width, size, tuple((r, c) for r in rows for c in columns))

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

    def blend(self, pieces: Tensor) -> Tensor:
        """The inverse of `cut`: the weighted mean of all windows over each pixel."""
        if len(self.corners) == 1:
            return pieces
        count = len(self.corners)
        pieces = pieces.view(-1, count, *pieces.shape[1:])
        batch, _, channels, high, wide = pieces.shape
        weight = (_hump(high)[:, None] * _hump(wide)).to(pieces)
        canvas = pieces.new_zeros(batch, channels, self.height, self.width)
        total = pieces.new_zeros(self.height, self.width)
        for index, (r, c) in enumerate(self.corners):
            canvas[:, :, r : r + high, c : c + wide] += pieces[:, index] * weight
            total[r : r + high, c : c + wide] += weight
        return canvas / total


def _starts(length: int, side: int) -> Sequence[int]:
    """First pixels of windows, evenly spread on the token grid, that cover [0, length)."""
    if length <= side:
        return [0]
    free = (length - side) // STRIDE
    most = max(1, side * 3 // 4 // STRIDE)  # overlap of a quarter or more
    count = -(-free // most)
    return [STRIDE * (free * i // count) for i in range(count + 1)]


def _hump(length: int) -> Tensor:
    """A smooth weight over a window's side: sin², nowhere 0."""
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return torch.sin(torch.pi * position).square()
