"""Noise as a function of what it is for: no global state, no order of calls.

A key (seed, what for, where) makes a generator of its own; so a sample depends neither on its batch
nor on which targets are asked for beside it, nor on the size of the canvas around a pixel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
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


def scene_noise(
    seed: int | None,
    channels: int,
    height: int,
    width: int,
    origin: tuple[int, int],
    side: int,
) -> Tensor:
    """Standard normal noise of the scene, [channels, height, width]; 0 for a seed of None.

    As `canvas_noise`, but the moving mean over `side` x `side` cells, the window of the scene flow,
    is replaced by one for the seed. What is left open of a window as a whole (season, sun, snow)
    follows from its mean; so windows of a scene mostly agree on it. Cells keep their variance of 1;
    means of windows correlate by 0.75 however far apart, and spread by 1.14 times what training
    shows, since the moving mean is not the window's own (docs/experiments.md).
    """
    if seed is None:
        return torch.zeros(channels, height, width)
    (top, left), before = origin, side // 2
    around = (height + side - 1, width + side - 1)
    noise = canvas_noise(seed, "scene", channels, *around, (top - before, left - before))
    mean = F.avg_pool2d(noise[None], side, 1)[0]
    shared = torch.randn(channels, 1, 1, generator=generator(seed, "scene", "mean")) / side
    inner = noise[:, before : before + height, before : before + width]
    return inner - mean + shared


def batch_noise(
    seeds: Sequence[int],
    purpose: str,
    channels: int,
    height: int,
    width: int,
    origins: Sequence[tuple[int, int]],
) -> Tensor:
    """`canvas_noise` for each seed and origin, [B, channels, height, width]."""
    return torch.stack(
        [
            canvas_noise(seed, purpose, channels, height, width, origin)
            for seed, origin in zip(seeds, origins, strict=True)
        ]
    )
