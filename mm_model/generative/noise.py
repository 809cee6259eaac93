"""Noise as a function of what it is for: no global state, no order of calls.

A key (seed, what for, where) makes a generator of its own; so a sample depends neither on its batch
nor on which targets are asked for beside it, nor on the size of the canvas around a pixel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

TILE = 64  # noise is drawn in squares of this side


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by a hash of the key; equal keys, equal streams (on one device type)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "big") >> 1  # manual_seed takes signed 64 bits
    return torch.Generator(device=device).manual_seed(seed)


def canvas_noise(
    seed: int,
    purpose: str,
    channels: int,
    height: int,
    width: int,
    origin: tuple[int, int] = (0, 0),
) -> Tensor:
    """Standard normal noise [channels, height, width], float32 on the CPU.

    Each value is a function of (seed, purpose, channel, row, column) alone, rows and columns
    counted from wherever `origin`, the first one's, is: canvases that overlap agree there.
    """
    (top, left), rows = origin, []
    for row in range(top // TILE, -(-(top + height) // TILE)):
        tiles = [
            torch.randn(channels, TILE, TILE, generator=generator(seed, purpose, row, column))
            for column in range(left // TILE, -(-(left + width) // TILE))
        ]
        rows.append(torch.cat(tiles, 2))
    top, left = top % TILE, left % TILE
    return torch.cat(rows, 1)[:, top : top + height, left : left + width]


def batch_noise(
    seeds: Sequence[int | None],
    purpose: str,
    channels: int,
    height: int,
    width: int,
    origins: Sequence[tuple[int, int]],
) -> Tensor:
    """`canvas_noise` [B, channels, height, width] for each seed and origin; 0 for a None."""
    return torch.stack(
        [
            torch.zeros(channels, height, width)
            if seed is None
            else canvas_noise(seed, purpose, channels, height, width, origin)
            for seed, origin in zip(seeds, origins, strict=True)
        ]
    )
