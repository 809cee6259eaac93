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
    return torch.Generator(device=device).manual_seed(_hash(*key))


def _hash(*key: int | str) -> int:
    """From 0 to 2^63 − 1: what manual_seed takes."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def sample_seeds(samples: int, *key: int | str) -> list[int]:
    """Seeds of several samples of one thing: each a function of the key and its number alone.

    The second of a pair is the mirror image of the first: ~s has the noise of s with the other
    sign, which is as good a draw. What depends evenly on the noise cancels in the mean of the two,
    so that the mean of 8 is as near to the truth as that of 32 independent ones
    (docs/experiments.md); their standard deviation errs upwards, at most by √(n / (n − 1)).
    """
    seeds = []
    for number in range(samples):
        drawn = _hash(*key, number // 2)
        seeds.append(~drawn if number % 2 else drawn)
    return seeds


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
    counted from wherever `origin`, the first one's, is: canvases that overlap agree there. That of
    ~seed is the same with the other sign.
    """
    if seed < 0:
        return -canvas_noise(~seed, purpose, channels, height, width, origin)
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
    if seed < 0:
        return -scene_noise(~seed, channels, height, width, origin, side)
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
