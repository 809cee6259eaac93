"""Seeded fields over an infinite plane: each value depends on (key, absolute position) alone.

Only element-wise arithmetic is used, in a fixed order, so that a tile equals the slice of any
larger rendering to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mm_model.geo.grid import Grid

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]

_WORD = 0xFFFFFFFF
_BLOCK_ROWS = 64
# Multipliers of a 32-bit finaliser with low bias (C. Wellons, "Prospecting for hash functions").
_M1, _M2 = 0x7FEB352D, 0x846CA68B


def key(*parts: int) -> int:
    """A 32-bit number that depends on all parts and their order."""
    state = 0x9E3779B9
    for part in parts:
        while True:
            state = (state ^ (part & _WORD)) * _M1 & _WORD
            state ^= state >> 15
            state = state * _M2 & _WORD
            state ^= state >> 16
            part >>= 32
            if part in (0, -1):
                break
    return state


def mix(h: U32) -> U32:
    """The finaliser, in place; returns its argument."""
    h ^= h >> np.uint32(16)
    h *= np.uint32(_M1)
    h ^= h >> np.uint32(15)
    h *= np.uint32(_M2)
    h ^= h >> np.uint32(16)
    return h


def hash_of(seed: int, *numbers: U32) -> U32:
    """One 32-bit hash an element from integer arrays that broadcast together."""
    h = mix(numbers[0] + np.uint32(seed))
    for number in numbers[1:]:
        h = mix(h * np.uint32(0x9E3779B1) ^ number)
    return h


def hash_grid(seed: int, rows: I64, cols: I64) -> U32:
    """[len(rows), len(cols)] hashes of integer positions."""
    r = mix(rows.astype(np.uint32) + np.uint32(seed))
    c = mix(cols.astype(np.uint32) + np.uint32(key(seed, 1)))
    return mix(r[:, None] + c)


def unit(h: U32, salt: int = 0) -> F32:
    """Uniform in [0, 1); another salt gives another, unrelated number from the same hash."""
    if salt:
        h = mix(h ^ np.uint32(key(salt)))
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


@dataclass(frozen=True)
class Frame:
    """The pixel centres that are rendered.

    Attributes:
        x: [W] eastings, y: [H] northings, both in metres.
        gsd_m: distance between neighbours, in metres.
    """

    x: F64
    y: F64
    gsd_m: float

    @classmethod
    def of(cls, grid: Grid, halo: int = 0) -> Frame:
        """The pixels of a north-up grid of square pixels, and a frame of `halo` pixels around."""
        gsd, _, west, _, _, north = grid.transform
        cols = np.arange(-halo, grid.width + halo, dtype=np.float64)
        rows = np.arange(-halo, grid.height + halo, dtype=np.float64)
        return cls(west + gsd * (cols + 0.5), north - gsd * (rows + 0.5), gsd)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.y), len(self.x)

    @property
    def rows(self) -> I64:
        """Absolute pixel rows (downwards)."""
        return np.floor(-self.y / self.gsd_m).astype(np.int64)

    @property
    def cols(self) -> I64:
        """Absolute pixel columns."""
        return np.floor(self.x / self.gsd_m).astype(np.int64)


def white(seed: int, frame: Frame) -> U32:
    """An independent hash a pixel."""
    return hash_grid(seed, frame.rows, frame.cols)


def _taps(position: F64, wavelength_m: float) -> tuple[I64, tuple[F32, F32, F32]]:
    """First lattice index and the three weights of a quadratic B-spline."""
    t = position / wavelength_m
    index = np.floor(t + 0.5)
    f = t - index
    weights = 0.5 * (0.5 - f) ** 2, 0.75 - f**2, 0.5 * (0.5 + f) ** 2
    a, b, c = (w.astype(np.float32) for w in weights)
    return index.astype(np.int64) - 1, (a, b, c)


def layered(seed: int, frame: Frame, *octaves: tuple[float, float]) -> F32:
    """A sum of smooth fields [H, W] of mean 0, given as (wavelength in metres, deviation).

    Octaves shorter than two pixels are left out: they would alias.
    """
    total = np.zeros(frame.shape, np.float32)
    for index, (wavelength_m, deviation) in enumerate(octaves):
        if wavelength_m >= 2 * frame.gsd_m:
            _add(total, key(seed, index), frame, wavelength_m, deviation)
    return total


def _add(total: F32, seed: int, frame: Frame, wavelength_m: float, deviation: float) -> None:
    row, row_weights = _taps(frame.y, wavelength_m)
    col, col_weights = _taps(frame.x, wavelength_m)
    r0, c0 = int(row.min()), int(col.min())
    lattice = hash_grid(seed, np.arange(r0, int(row.max()) + 3), np.arange(c0, int(col.max()) + 3))
    values = unit(lattice)
    # 6.3: a uniform lattice, averaged by the spline along two axes, has a deviation of 1 / 6.3.
    values -= np.float32(0.5)
    values *= np.float32(6.3 * deviation)
    row, col = row - r0, col - c0
    # Columns first, on the few lattice rows; gathering whole rows is then a plain copy. A few
    # rows at a time, so that they stay in the cache.
    across = values[:, col] * col_weights[0]
    across += values[:, col + 1] * col_weights[1]
    across += values[:, col + 2] * col_weights[2]
    scratch = np.empty((_BLOCK_ROWS, total.shape[1]), np.float32)
    for top in range(0, len(row), _BLOCK_ROWS):
        rows = slice(top, top + _BLOCK_ROWS)
        part = scratch[: len(row[rows])]
        for tap, weights in enumerate(row_weights):
            np.take(across, row[rows] + tap, axis=0, out=part, mode="clip")
            part *= weights[rows, None]
            total[rows] += part


def noise(seed: int, frame: Frame, wavelength_m: float) -> F32:
    """A smooth field [H, W] of mean 0 and standard deviation near 1."""
    return layered(seed, frame, (wavelength_m, 1.0))


def fractal(seed: int, frame: Frame, wavelength_m: float, octaves: int, gain: float = 0.5) -> F32:
    """Noise of several octaves [H, W], each half as long; standard deviation near 1."""
    norm = sum(gain ** (2 * i) for i in range(octaves)) ** -0.5
    return layered(seed, frame, *((wavelength_m / 2**i, norm * gain**i) for i in range(octaves)))


def smoothstep(low: float, high: float, values: NDArray[np.floating]) -> F32:
    """0 below low, 1 above high, smooth between (low > high turns it round)."""
    t = np.clip((values - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


@dataclass(frozen=True)
class Regions:
    """A Voronoi tiling of the plane.

    Attributes:
        id: [H, W] hash of the region.
        dx, dy: [H, W] metres from the region's site (bent by the warp).
        edge_m: [H, W] metres to the nearest border.
    """

    id: U32
    dx: F32
    dy: F32
    edge_m: F32


def regions(seed: int, frame: Frame, spacing_m: float, warp: tuple[F32, F32]) -> Regions:
    """Irregular regions of some `spacing_m`; the warp (metres, well below it) bends borders."""
    row, col = (np.floor(p / spacing_m).astype(np.int64) for p in (frame.y, frame.x))
    wx, wy = warp
    x = (frame.x - col * spacing_m).astype(np.float32) + wx
    y = (frame.y - row * spacing_m).astype(np.float32)[:, None] + wy
    shape = frame.shape
    out = Regions(
        np.empty(shape, np.uint32),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
    )
    for r in np.unique(row):
        for c in np.unique(col):
            ys, xs = np.flatnonzero(row == r), np.flatnonzero(col == c)
            block = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
            _nearest(seed, (int(r), int(c)), spacing_m, (x[block], y[block]), out, block)
    return out


def _nearest(
    seed: int,
    cell: tuple[int, int],
    spacing_m: float,
    position: tuple[F32, F32],
    out: Regions,
    block: tuple[slice, slice],
) -> None:
    """Write one lattice cell's share of a Voronoi tiling."""
    steps = np.arange(-1, 2)
    ids = hash_grid(seed, cell[0] + steps, cell[1] + steps).ravel()
    # Sites keep away from their cell's borders, so that 3 x 3 cells hold the nearest two.
    dj, di = (s.ravel().astype(np.float32) for s in np.meshgrid(steps, steps, indexing="ij"))
    sx = (di + 0.15 + 0.7 * unit(ids, 1)) * np.float32(spacing_m)
    sy = (dj + 0.15 + 0.7 * unit(ids, 2)) * np.float32(spacing_m)
    x, y = position
    squares = np.empty((9, *x.shape), np.float32)
    for i in range(9):
        dx, dy = x - sx[i], y - sy[i]
        squares[i] = dx * dx + dy * dy
    first = squares.argmin(axis=0)
    near = squares.min(axis=0)
    np.put_along_axis(squares, first[None], np.float32(np.inf), axis=0)
    second = squares.argmin(axis=0)
    far = squares.min(axis=0)
    gap = np.hypot(sx[:, None] - sx, sy[:, None] - sy)[first, second]
    out.id[block] = ids[first]
    out.dx[block] = x - sx[first]
    out.dy[block] = y - sy[first]
    out.edge_m[block] = (far - near) / (2 * gap)
