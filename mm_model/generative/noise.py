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


def canvas_noise(seed: int, purpose: str, channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise [channels, height, width], float32 on the CPU.

    Each value is a function of (seed, purpose, channel, row, column) alone: a larger canvas has the
    same values where the smaller one has any.
    """
    rows = []
    for row in range(-(-height // TILE)):
        tiles = [
            torch.randn(channels, TILE, TILE, generator=generator(seed, purpose, row, column))
            for column in range(-(-width // TILE))
        ]
        rows.append(torch.cat(tiles, 2))
    return torch.cat(rows, 1)[:, :height, :width]


def batch_noise(
    seeds: Sequence[int | None], purpose: str, channels: int, height: int, width: int
) -> Tensor:
    """`canvas_noise` for each seed, [B, channels, height, width]; 0 for a seed of None."""
    return torch.stack(
        [
            torch.zeros(channels, height, width)
            if seed is None
            else canvas_noise(seed, purpose, channels, height, width)
            for seed in seeds
        ]
    )
