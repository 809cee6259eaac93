"""Grids: world and pixel coordinates are inverse, windows and sizes keep the ground."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_model.errors import GeoreferenceError
from mm_model.geo.grid import Grid

lengths = st.floats(0.1, 1000) | st.floats(-1000, -0.1)
offsets = st.floats(-1e7, 1e7)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Of any orientation: north up, south up, mirrored, rotated."""
    angle, a, e = draw(st.floats(-math.pi, math.pi)), draw(lengths), draw(lengths)
    c, f = draw(offsets), draw(offsets)
    cos, sin = math.cos(angle), math.sin(angle)
    transform = (a * cos, -e * sin, c, a * sin, e * cos, f)
    return Grid("EPSG:32633", transform, draw(st.integers(1, 90)), draw(st.integers(1, 90)))


@given(grids(), st.floats(0, 1), st.floats(0, 1))
def test_pixels_and_world_are_inverse(grid: Grid, down: float, right: float) -> None:
    row, col = down * grid.height, right * grid.width
    # Offsets of 1e7 in float64 leave 1e-9, in pixels of at least 0.1.
    assert grid.row_col(*grid.xy(row, col)) == pytest.approx((row, col), abs=1e-6)


@given(grids(), st.integers(-500, 500), st.integers(-500, 500))
def test_parts_of_one_ground_count_their_pixels_alike(grid: Grid, row: int, col: int) -> None:
    part = grid.window(row, col, 7, 11)
    expected = (grid.position[0] + row, grid.position[1] + col)
    assert part.position == expected
    assert Grid("", grid.transform, 7, 11).position == (0, 0)


@given(st.integers(-10_000, 10_000), st.integers(0, 40_000), st.sampled_from([0.0, 0.25, 0.5]))
def test_a_position_is_the_pixel_of_the_systems_lattice(row: int, col: int, off: float) -> None:
    grid = Grid("EPSG:32633", (10.0, 0.0, 10 * (col + off), 0.0, -10.0, -10 * (row + off)), 8, 8)
    assert grid.position == (row + (off >= 0.5), col + (off >= 0.5))


@given(grids(), st.integers(-5, 50), st.integers(-5, 50))
def test_a_window_begins_at_its_pixel(grid: Grid, row: int, col: int) -> None:
    window = grid.window(row, col, 7, 11)
    assert window.shape == (7, 11)
    assert window.xy(3, 4) == pytest.approx(grid.xy(row + 3, col + 4), rel=1e-12, abs=1e-6)
    assert window.pixel_size == grid.pixel_size


@given(grids(), st.integers(1, 60), st.integers(1, 60))
def test_another_size_covers_the_same_ground(grid: Grid, height: int, width: int) -> None:
    other = grid.resized(height, width)
    assert other.shape == (height, width)
    assert other.bounds == pytest.approx(grid.bounds, rel=1e-9, abs=1e-6)


@given(grids(), st.integers(1, 12))
def test_cells_begin_at_the_corner_and_cover_all(grid: Grid, factor: int) -> None:
    cells = grid.coarser(factor)
    assert cells.xy(0, 0) == grid.xy(0, 0)
    assert cells.xy(2, 3) == pytest.approx(grid.xy(2 * factor, 3 * factor), rel=1e-12, abs=1e-6)
    for side, pixels in zip(cells.shape, grid.shape, strict=True):
        assert 0 <= side * factor - pixels < factor


@given(grids(), st.integers(1, 20))
def test_patches_lie_side_by_side_inside(grid: Grid, side: int) -> None:
    corners = list(grid.subdivide(side))
    assert len(corners) == (grid.height // side) * (grid.width // side)
    pixels = {(r + i, c + j) for r, c in corners for i in range(side) for j in range(side)}
    assert len(pixels) == len(corners) * side**2
    assert all(r < grid.height and c < grid.width for r, c in pixels)


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        ((1, 2, 0, 2, 4, 0), (3, 5)),  # both axes point the same way
        ((1, 0, math.nan, 0, -1, 0), (3, 5)),
        ((math.inf, 0, 0, 0, -1, 0), (3, 5)),
        ((1, 0, 0, 0, -1, 0), (0, 5)),
    ],
)
def test_no_grid_without_area(transform: tuple[float, ...], shape: tuple[int, int]) -> None:
    with pytest.raises(GeoreferenceError):
        Grid("EPSG:32633", transform, *shape)
