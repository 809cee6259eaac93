"""A tile of the synthetic Earth equals the slice of any larger rendering, to the last bit."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_model.data.sources.synthetic import CRS, Acquisition, render
from mm_model.data.sources.synthetic.noise import Frame, fractal, key, noise
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES

ALL = tuple(MODALITIES.values())


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    x=st.integers(20_000, 80_000),
    y=st.integers(-1_000, 700_000),
    row=st.integers(0, 60),
    col=st.integers(0, 50),
    gsd=st.sampled_from([10.0, 20.0, 2.5]),
)
def test_tiles_have_no_seams(seed, x, y, row, col, gsd):
    when = Acquisition.draw(seed)
    whole = Grid(CRS, (gsd, 0.0, x * gsd, 0.0, -gsd, y * gsd), 92, 78)
    part = whole.window(row, col, 32, 28)
    large, small = (render(seed, grid, ALL, when) for grid in (whole, part))
    for name, layer in small.items():
        expected = large[name].values[:, row : row + 32, col : col + 28]
        np.testing.assert_array_equal(layer.values, expected, err_msg=name)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), wavelength=st.floats(15, 400))
def test_noise_is_standard(seed, wavelength):
    """Mean near 0 and deviation near 1, over an area of many wavelengths."""
    frame = Frame(
        np.arange(120) * wavelength / 2.3, -np.arange(100) * wavelength / 2.3, wavelength / 2.3
    )
    for field in (noise(seed, frame, wavelength), fractal(seed, frame, wavelength, 1)):
        # About 2,000 independent cells: six standard errors.
        assert abs(field.mean()) < 0.14
        assert abs(field.std() - 1) < 0.15


@given(parts=st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4))
def test_keys_are_words_that_depend_on_order(parts):
    assert 0 <= key(*parts) < 2**32
    if parts != parts[::-1]:
        assert key(*parts) != key(*parts[::-1])
