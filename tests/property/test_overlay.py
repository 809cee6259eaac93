"""Files of one modality laid over each other: an order decides, and nothing is made up."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/serving"))
from serving_fixtures import GRID, make_layer

from mm_model.errors import GeoreferenceError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES
from mm_model.serving.layers import ObservedLayer
from mm_model.serving.overlay import labelled, laid_over, own_grid, places, together

sides = st.integers(16, 40)


@st.composite
def files(draw: st.DrawFn, name: str, grid: Grid) -> ObservedLayer:
    """Of part of a grid's ground, of its pixels or of others, with holes, and a known middle."""
    row, col = draw(st.integers(-12, 10)), draw(st.integers(-12, 10))
    place = grid.window(row, col, draw(sides), draw(sides))
    if draw(st.booleans()):
        place = place.resized(draw(sides), draw(sides))
    layer = make_layer(name, place, draw(st.integers(0, 99)), hole=False)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    layer.valid[rng.random(place.shape) < draw(st.sampled_from([0, 0.3, 0.9]))] = False
    layer.valid[place.height // 3 : -3, place.width // 3 : -3] = True
    return layer


@given(st.data(), st.sampled_from(["rgb", "sar", "map"]))
@settings(max_examples=60, deadline=None)
def test_each_pixel_is_of_the_first_that_knows_it_and_a_file_twice_is_a_file_once(
    data: st.DataObject, name: str
) -> None:
    modality = MODALITIES[name]
    one, two = data.draw(files(name, GRID)), data.draw(files(name, GRID))
    for grid in (GRID, own_grid(name, [one.grid])):
        try:
            (first, known), (second, other) = (
                together(grid, name, [f], modality) for f in (one, two)
            )
        except GeoreferenceError:  # where one has no pixel, both are refused
            with pytest.raises(GeoreferenceError):
                together(grid, name, [one, two], modality)
            continue
        for times in (2, 3):
            again, valid = together(grid, name, [one] * times, modality)
            np.testing.assert_array_equal(valid, known)
            np.testing.assert_array_equal(again[:, valid], first[:, known])
        values, valid = together(grid, name, [one, two], modality)
        at = places(name, [one.grid, two.grid], grid)
        # Where they make up the grid together, none is resampled, as one alone would be.
        if at == places(name, [one.grid], grid) + places(name, [two.grid], grid):
            np.testing.assert_array_equal(valid, known | other)
            np.testing.assert_array_equal(values[:, known], first[:, known])
            filled = other & ~known
            np.testing.assert_array_equal(values[:, filled], second[:, filled])
        for more in ([one, two, one], [one, two, two]):
            same, still = together(grid, name, more, modality)
            np.testing.assert_array_equal(still, valid)
            np.testing.assert_array_equal(same[:, still], values[:, valid])


@given(
    st.lists(
        st.tuples(st.integers(-40, 40), st.integers(-40, 40), sides, sides), min_size=1, max_size=6
    )
)
@settings(deadline=None)
def test_files_of_one_lattice_lie_whole_on_the_grid_that_they_make(boxes) -> None:
    grids = [GRID.window(*box) for box in boxes]
    own = own_grid("rgb", grids)
    corner, shape = GRID.offset_of(own), own.shape
    joined = [
        box
        for box in boxes
        if corner[0] <= box[0]
        and box[0] + box[2] <= corner[0] + shape[0]
        and corner[1] <= box[1]
        and box[1] + box[3] <= corner[1] + shape[1]
    ]
    assert boxes[0] in joined
    # No larger than they, and no other that touches it is left out.
    assert corner == (min(b[0] for b in joined), min(b[1] for b in joined))
    assert corner[0] + shape[0] == max(b[0] + b[2] for b in joined)
    assert corner[1] + shape[1] == max(b[1] + b[3] for b in joined)
    for row, col, height, width in boxes:
        beside = row > corner[0] + shape[0] or row + height < corner[0]
        beside |= col > corner[1] + shape[1] or col + width < corner[1]
        assert beside != ((row, col, height, width) in joined)
    for box, place in zip(boxes, places("rgb", grids, own), strict=True):
        assert place == (box[0] - corner[0], box[1] - corner[1])


@given(st.lists(st.integers(0, 255), min_size=1, max_size=5))
def test_laying_over_stops_where_all_is_known(masks: list[int]) -> None:
    asked = []

    def parts():
        for number, mask in enumerate(masks):
            asked.append(number)
            valid = np.array([[bool(mask >> bit & 1) for bit in range(8)]])
            yield np.full((1, 1, 8), number), valid

    values, valid = laid_over(parts())
    whole = next(
        (n for n in range(len(masks)) if np.bitwise_or.reduce(masks[: n + 1]) == 255), None
    )
    assert asked == list(range(len(masks) if whole is None else whole + 1))
    for bit in range(8):
        first = next((n for n, mask in enumerate(masks) if mask >> bit & 1), None)
        assert valid[0, bit] == (first is not None)
        assert first is None or values[0, 0, bit] == first


def test_files_are_called_by_their_turn_if_there_are_several() -> None:
    assert labelled("rgb", "x") == [("rgb", "x")]
    assert [label for label, _ in labelled("rgb", "xy")] == ["rgb (1 of 2)", "rgb (2 of 2)"]
