from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from model_fixtures import FIVE, statistics

from mm_model.codec import Codec
from mm_model.modalities import Modality
from mm_model.scene import Scene

CONTINUOUS = [m for m in FIVE if not m.is_categorical]
# Relative to the valid range's larger end; sinh amplifies the rounding of heights far from the
# median, hence 100 ulp.
TOLERANCE = {dtype: 100 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("modality", CONTINUOUS, ids=lambda m: m.name)
@given(data=st.data())
def test_decode_inverts_encode(modality: Modality, dtype: torch.dtype, data: st.DataObject) -> None:
    low, high = modality.valid_range
    number = st.floats(low, high, allow_nan=False, width=32)
    pixels = data.draw(st.lists(number, min_size=6, max_size=6))
    codec = Codec([modality], statistics([modality]))
    values = torch.tensor(pixels, dtype=dtype).view(1, 1, 2, 3)
    values = values.expand(1, len(modality.bands), 2, 3)
    valid = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    x, _ = codec.encode(Scene({modality.name: values}, {modality.name: valid}))
    decoded = codec.decode(x, [modality.name])[modality.name]
    assert x.dtype is dtype
    assert (decoded - values).abs().max() <= TOLERANCE[dtype] * max(abs(low), abs(high))


@pytest.mark.parametrize("modality", CONTINUOUS, ids=lambda m: m.name)
@given(data=st.data())
def test_encode_is_monotone(modality: Modality, data: st.DataObject) -> None:
    number = st.floats(*modality.valid_range, allow_nan=False, width=32)
    pixels = sorted(data.draw(st.lists(number, min_size=8, max_size=8)))
    codec = Codec([modality], statistics([modality]))
    # One pixel an image: what is split into level and relief is monotone only image by image.
    values = torch.tensor(pixels).view(8, 1, 1, 1).expand(8, len(modality.bands), 1, 1)
    valid = torch.ones(8, 1, 1, 1, dtype=torch.bool)
    x, _ = codec.encode(Scene({modality.name: values}, {modality.name: valid}))
    assert (x.diff(dim=0) >= 0).all()
